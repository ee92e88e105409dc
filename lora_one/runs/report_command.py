"""The command ``lora-one-report``: write the report on a comparison, or on the runs of a results folder."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_one.errors import UsageError
from lora_one.files import folder_name
from lora_one.invocation import Parser, command_name
from lora_one.reports.pages import printed, write_report
from lora_one.reports.runs_record import records_of_runs
from lora_one.runs.sweep import run_command

DESCRIPTION = """\
Write report.html, report.md, report.tex and figures/ from results files alone; nothing is trained or evaluated.

{command} results/comparisons/inits                    the report of a finished comparison, again
{command} results --baseline <configuration>           a report on all runs of a results folder
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = Parser(
        prog=command_name(),
        description=DESCRIPTION.format(command=command_name()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("results", type=Path, help="folder of a comparison, or of runs (results_dir)")
    made.add_argument(
        "--baseline",
        metavar="CONFIGURATION",
        help="of runs: test the other configurations against this one; the beginning of its folder's name",
    )
    made.add_argument("--output", type=Path, help="folder of the report (default: the folder of the results)")
    return made


def report(options: argparse.Namespace) -> int:
    """Write the report; return the exit code. Raises UsageError: there is nothing to report on."""
    records = comparisons(options.results)
    if records and options.baseline:
        raise UsageError(f"--baseline={options.baseline}: the comparison's file names its baseline; leave it out")
    records = records or records_of_runs(options.results, options.baseline)
    titles = {record["title"] for record in records.values()}
    title = titles.pop() if len(titles) == 1 else beginning(sorted(titles)) or str(options.results)
    path = write_report(title, records, options.output or options.results)
    for record in records.values():
        print(printed(record))
    print(f"report: {path.with_suffix('.html')}")
    return 0


def comparisons(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a comparison's folder: task -> record, "" -> that of a file without tasks; {}: none.

    Raises UsageError: comparisons are in the folder and in its subfolders, of which one may be out of date.
    """
    own, others = folder / "comparison.json", sorted(folder.glob("*/comparison.json"))
    if own.exists() and others:
        raise UsageError(
            f"{folder} contains a comparison, and others in subfolders, such as {others[0].parent.name}: pass one of "
            "the subfolders, or remove what is out of date"
        )
    if own.exists():
        return {"": read(own)}
    tasks = sorted(folder.glob("*/*/comparison.json"))
    if others and tasks:
        folders = dict.fromkeys([*(file.parent for file in others), *(file.parent.parent for file in tasks)])
        raise UsageError(
            f"{folder} contains several comparisons: pass the folder of one, of {', '.join(map(str, folders))}"
        )
    records = sorted(((file.parent.name, read(file)) for file in others), key=lambda entry: entry[1]["date"])
    shared = beginning([record["title"] for _, record in records])
    names = {place: record["title"].removeprefix(f"{shared}: ") for place, record in records}
    folders = Counter(map(folder_name, names.values()))  # two of one name would share their figures
    return {
        name if folders[folder_name(name)] == 1 else f"{name} ({place})": record
        for (place, record), name in zip(records, names.values(), strict=True)
    }


def read(file: Path) -> dict[str, Any]:
    """Return the content of a comparison.json. Raises UsageError: it is not valid JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON ({error}): run the comparison again, which writes it") from error


def beginning(titles: Sequence[str]) -> str:
    """Return the title of a file from those of its tasks, <title>: <task>; "" if they have none in common.

    >>> beginning(["LoRA-One: GLUE: MRPC", "LoRA-One: GLUE: RTE"])
    'LoRA-One: GLUE'
    """
    found = {title.rpartition(": ")[0] for title in titles}
    return found.pop() if len(found) == 1 else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default on sys.argv; return the exit code."""
    options = parser().parse_args(arguments)
    return run_command(lambda: report(options), "writes the whole report again")
