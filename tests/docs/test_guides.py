"""Every choice has its place in the guides, and the site is complete."""

import re

import pytest
import yaml

from lora_one.errors import UsageError
from lora_one.evaluation import BENCHMARKS
from lora_one.evaluation.command import parser_of
from lora_one.runs.comparison_file import read_comparisons
from lora_one.runs.composition import compose
from tests.helpers.paths import ROOT

GUIDES = ROOT / "docs/guides"
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def choices(group):
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml"))


def sections(page):
    """Title -> text of each second-level section."""
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def first_cells(page):
    """The choices (in backticks) that the first cells of the page's tables name."""
    cells = re.findall(r"^\|([^|]*)\|", page.read_text(), flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(?:\w+=)?(\w+)`", cell)}


SECTIONS = sections(GUIDES / "methods.md")
METHODS = [title for title, text in SECTIONS.items() if text.strip().startswith("`init=")]


@pytest.mark.parametrize("name", choices("init"))
def test_every_init_is_introduced_by_a_section_of_the_methods(name):
    """The first paragraph of a section names it."""
    introductions = [SECTIONS[title].strip().split("\n\n")[0] for title in METHODS]
    assert any(re.search(rf"`init={name}\b", text) for text in introductions)


@pytest.mark.parametrize("title", METHODS)
def test_a_method_is_described_completely(title):
    """Idea, formula, paper or source, keys, when to use it, cost."""
    text = SECTIONS[title]
    for part in ("**Idea.**", "\n```\n", "**When.**", "**Cost.**"):
        assert part in text, part
    assert re.search(r"\*\*(Paper|Source)\.\*\*", text)
    assert "**Keys.**" in text or "\n| key |" in text


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("data", choices("dataset")),
        ("evaluation", sorted(BENCHMARKS)),
        ("models", choices("model")),
        ("methods", [*choices("optimizer"), *choices("peft")]),
    ],
)
def test_every_choice_has_its_row(page, names):
    assert not set(names) - first_cells(GUIDES / f"{page}.md")


def test_every_page_is_in_the_navigation_of_the_site():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    assert sorted(pages(settings["nav"])) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)


def keys_of(group):
    """Every key of a group, from all its files."""
    files = (ROOT / "conf" / group).glob("*.yaml")
    return {f"{group}.{key}" for file in files for key in yaml.safe_load(file.read_text()) or {}}


GROUPS = ("dataset", "init", "model", "optimizer", "peft", "wandb")
KEYS = {key for group in GROUPS for key in keys_of(group)}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_keys_and_choices_of_the_documents_exist(page):
    """``group=choice`` and ``group.key`` in code and commands; ``--option`` of an evaluation's command."""
    text = page.read_text().replace("\\\n", " ")
    for group, value in re.findall(
        r"(?<![\w.])(dataset|model|init|peft|optimizer)=([a-z]\w*(?:,\w+)*)\b(?! is not)", text
    ):
        assert not set(value.split(",")) - set(choices(group)) - {"mine"}, f"{group}={value}"
    for key in re.findall(rf"[` (]((?:{'|'.join(GROUPS)})\.[a-z]\w*)=", text):
        assert key in KEYS, key
    for name, options in re.findall(r"python eval/eval_(\w+)\.py (.*)", text):
        known = parser_of(name, BENCHMARKS[name]).format_help() if name in BENCHMARKS else name
        for option in re.findall(r"--\w+", options):
            assert option in known, option


@pytest.mark.parametrize(
    "overrides",
    [
        ["++learning_rate=1e-3"],
        ["init=loraone"],
        ["init.stable_gamma=64", "init.scale=unit"],
        ["init=pissa", "model.quantization=nf4"],
        ["model=roberta_large", "dataset=gsm8k"],
    ],
    ids=" ".join,
)
def test_the_answers_quote_the_messages_as_they_are(overrides):
    quotes = re.findall(r"\*\*`([^`]*)`", (GUIDES / "faq.md").read_text())
    with pytest.raises(UsageError) as error:
        compose(overrides)
    assert any(quote in str(error.value) for quote in quotes), str(error.value)


def test_the_file_of_the_guide_to_comparisons_is_valid(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (GUIDES / "comparisons.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    assert set(read_comparisons(tmp_path / "mine.yaml")[""].methods) == {"LoRA-One", "LoRA"}
