"""A report is made from records alone: a page that needs nothing else, Markdown, LaTeX that compiles, and figures."""

import doctest
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lora_one.reports import figures, pages
from lora_one.reports.pages import printed, write_report
from tests.helpers.comparison_records import METHODS, record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "br", "img", "path", "use"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on two tasks, from records as json has them."""
    output = tmp_path_factory.mktemp("report")
    records = {name: json.loads(json.dumps(record(f"Two sets: {name}"))) for name in ("SST-2", "R&D")}
    write_report("Two sets", records, output)
    return output


class Page(HTMLParser):
    """The tags of a page: whether all are closed, their ids, and what they load or link to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "xlink:href") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_well_formed_and_loads_nothing(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "an id of one figure is also that of another one"
    inside = {f"#{name}" for name in page.ids}
    assert all(link in inside or link == "data:," for link in page.links), "the page opens without a network"
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert figures.INK not in text, "text of figures has the colour of the page's text, in light and dark"


def test_every_format_has_the_verdicts_the_figures_and_every_method(report):
    sentence = "LoRA is worse than rsLoRA: -2.0 points"
    for suffix, escaped in (("md", pages.plain), ("tex", pages.tex)):
        text = (report / f"report.{suffix}").read_text()
        assert text.count(escaped(sentence)) == 2
        assert all(escaped(name) in text for name in METHODS)
        shown = re.findall(r"figures/([\w.-]+)", text)
        assert shown and all((report / "figures" / name).stat().st_size > 1000 for name in shown)
    page = Page((report / "report.html").read_text())
    assert page.text.count(sentence) == 2 and all(name in page.text for name in METHODS)
    assert "not run yet: attrs is not installed" in page.text


def test_the_overview_has_the_main_figure_of_every_task_with_its_verdict(report):
    text = (report / "report.md").read_text()
    (row,) = re.findall(r"^\| LoRA-One, scaled AdamW .*$", text.partition("## Two sets")[0], re.MULTILINE)
    assert re.findall(r"73\.\d \+- 0\.\d \(better\)", row) and row.count("(better)") == 2


def test_the_same_record_gives_the_same_files(report, tmp_path):
    records = {name: record(f"Two sets: {name}") for name in ("SST-2", "R&D")}
    write_report("Two sets", records, tmp_path)
    names = sorted(file.relative_to(report) for file in report.rglob("*.*"))
    assert names == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*"))
    assert all((report / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_what_was_not_measured_is_left_out(tmp_path):
    """One seed and no baseline: no verdict, no interval, no forest plot."""
    alone = record("One seed", seeds=1, baseline=None)
    for run in alone["runs"]:
        run |= {"history": (), "start": {}, "adapters": {}, "scores": {}, "train_seconds": None}
    alone["comparison"]["evaluations"] = {}
    write_report("One seed", {"": alone}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[0] == "Results" and "Learning rates" in titles and "Origin" in titles
    assert not {"Over the epochs", "Cost", "What the starts did", "Unparsed and cut answers"} & set(titles)
    assert not any(title.startswith("Verdicts") for title in titles)


def test_gamma_is_given_for_each_seed_and_other_figures_of_a_start_as_means(tmp_path):
    searched = record(seeds=3)
    runs = [run for run in searched["runs"] if run["method"] == "rsLoRA" and run["stage"] == "final"]
    for run, gamma, after in zip(reversed(runs), (22.06, 40.2, 25428.0), (0.1, 0.2, 0.6), strict=True):
        run["start"] |= {"gamma": gamma, "loss_after": after}
    write_report("Searched", {"": searched}, tmp_path)
    section = (tmp_path / "report.md").read_text().partition("What the starts did")[2]
    (row,) = re.findall(r"^\| rsLoRA .*$", section, re.MULTILINE)[:1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:6] == ["2.54e+04, 40.2, 22.1", "0.6900", "0.3000"]
    assert "in the order of the seeds" in section


def test_the_terminal_shows_table_notes_and_verdicts():
    text = printed(record())
    assert "| LoRA-One, scaled AdamW " in text and "- LoRA: without a result, 1 of 14 runs: the loss became nan" in text
    assert "no difference shown" in text and "Learning rates" not in text


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(report):
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=report, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (report / "report.pdf").stat().st_size > 10_000
    for file in report.glob("report.*"):
        if file.suffix not in (".html", ".md", ".tex"):
            file.unlink()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_the_page_without_errors(report, width, tmp_path):
    """Without a network. On a phone nothing but the tables is wider than the screen."""
    text = (report / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width' in text, "phones show a page without it 980 pixels wide"
    script = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{script}</body>"))
    # in a frame, because a headless window is at least 500 pixels wide
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<title>none</title><script>onmessage = message => document.title = message.data</script>"
        f'<iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width + 100},900"]
    done = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    (wide,) = re.findall(r"<title>(\d+)</title>", done.stdout)
    assert width - 20 <= int(wide) <= width, "the scroll bar takes a few pixels"


def test_doctests():
    assert doctest.testmod(pages).failed == doctest.testmod(figures).failed == 0
