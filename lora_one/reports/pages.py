"""Write a report as a web page, as Markdown and as LaTeX, with its figures, from the records of comparisons."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.files import folder_name, write_whole
from lora_one.reports.compare import as_csv
from lora_one.reports.figures import Drawing
from lora_one.reports.results import Results, Section, Table
from lora_one.reports.sections import RESULTS, sections, short_sections
from lora_one.reports.table import markdown, plain

FORMATS = ("md", "html", "tex")
LATIN = 0x180  # pdflatex's fonts have the signs below; another one is shown by its number
TEX = {  # characters with a meaning in LaTeX, and signs that its fonts do not have
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",
    "]": "{]}",
}


@dataclass(frozen=True)
class Part:
    """The report on one comparison. name: the beginning of its figures' names and its anchor."""

    name: str
    title: str
    sections: Sequence[Section]


def write_report(title: str, records: Mapping[str, Mapping[str, Any]], output: Path) -> Path:
    """Write report.html, report.md, report.tex and figures/ to ``output``; return the path of report.md.

    If the report leaves methods out, the rows of all are written to [<task>-]methods.csv.
    records: name of a task -> its comparison.json, or "" -> that of a file without tasks.
    Raises OSError: the folder cannot be written.
    """
    parts = [
        Part(folder_name(name), record["title"], named(sections(record), folder_name(name)))
        for name, record in records.items()
    ]
    for part in parts:
        for drawing in (drawn for section in part.sections for drawn in section.drawings):
            write_drawing(drawing, output / "figures")
    for name, record in records.items():
        if Results(record).omitted:
            write_whole(output / f"{name and folder_name(name) + '-'}methods.csv", as_csv(with_outcomes(record)))
    summary = overview(records) if len(records) > 1 else None
    for suffix in FORMATS:
        text = environment(suffix).get_template(f"report.{suffix}.j2").render(title=title, parts=parts, summary=summary)
        write_whole(output / f"report.{suffix}", text.rstrip() + "\n")
    return output / "report.md"


def named(found: Sequence[Section], name: str) -> list[Section]:
    """Return the sections with the name of their task before that of each figure, so that all figures differ."""
    if not name:
        return list(found)
    renamed = []
    for section in found:
        drawings = [Drawing(f"{name}-{drawn.name}", drawn.caption, drawn.figure) for drawn in section.drawings]
        fields = {field: getattr(section, field) for field in Section.__dataclass_fields__}
        renamed.append(Section(**fields | {"drawings": drawings}))
    return renamed


def write_drawing(drawing: Drawing, folder: Path) -> None:
    """Write a figure as SVG and PNG."""
    write_whole(folder / f"{drawing.name}.svg", drawing.svg())
    (folder / f"{drawing.name}.png").write_bytes(drawing.png())


def with_outcomes(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of all methods with the verdict on each figure."""
    rows = [dict(row) for row in record["rows"]]
    for part in record["findings"]:
        outcomes = {verdict["method"]: verdict["outcome"] for verdict in part["verdicts"]}
        for row in rows:
            row[f"verdict on {part['figure']}"] = outcomes.get(row["method"])
    return rows


def overview(records: Mapping[str, Mapping[str, Any]]) -> Section:
    """Return the main figure of every method and task, with the verdict on it."""
    results = {name: Results(record) for name, record in records.items()}
    methods = dict.fromkeys(method for found in results.values() for method in found.methods)
    lines = [["method", *(f"{name}: {found.titled(found.figure)}" for name, found in results.items())]]
    for method in methods:
        lines.append([method, *(found.summary(method) for found in results.values())])
    text = [
        "Mean +- sample standard deviation over the seeds; better, worse: verdict against the baseline. Each column is "
        "corrected for its methods, not for the number of columns."
    ]
    sources = dict.fromkeys(found.source for found in results.values() if found.published)
    text += [f"In brackets, published: {source}" for source in sources]
    return Section("All tasks", text, table=lines)


def printed(record: Mapping[str, Any]) -> str:
    """Return the main table of a comparison with its notes, and the verdicts, for the terminal."""
    lines = []
    for section in short_sections(record):
        heading = [section.title, "", *section.text] if section.title != RESULTS else [f"{record['title']}", ""]
        table = [markdown(section.table), ""] if section.table else []
        lines += [*heading, *table, *(f"- {item}" for item in section.items), ""]
    return "\n".join(lines)


def environment(suffix: str) -> Any:
    """Return the jinja2 environment of a format. LaTeX has braces, so that its blocks are written in angles."""
    import jinja2

    loader = jinja2.PackageLoader("lora_one.reports")
    signs = {}
    if suffix == "tex":
        starts = {"block": ("<%", "%>"), "variable": ("<<", ">>"), "comment": ("<#", "#>")}
        signs = {
            f"{kind}_{end}_string": sign
            for kind, ends in starts.items()
            for end, sign in zip(("start", "end"), ends, strict=True)
        }
    made = jinja2.Environment(
        loader=loader,
        autoescape=suffix == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        **signs,
    )
    made.filters |= {"tex": tex, "markdown": markdown, "numeric": numeric, "plain": plain}
    return made


def tex(text: str) -> str:
    """Return text for LaTeX.

    >>> tex("5 % +- 1")
    '5 \\\\% $\\\\pm$ 1'
    """
    known = (TEX.get(sign, sign if ord(sign) < LATIN else f"{{?U+{ord(sign):04X}?}}") for sign in text)
    return "".join(known).replace("+-", r"$\pm$").replace("--", "-{}-")  # the font has a dash for two


def numeric(table: Table) -> list[bool]:
    """Return for each column whether all its entries begin like numbers, so that it is aligned on the right."""
    return [all(re.match(r"[-+]?[\d.]|-$|$", row[i]) for row in table[1:]) for i in range(len(table[0]))]
