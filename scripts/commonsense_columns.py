"""Write the rows of the commonsense sets with the columns that lm_eval's tasks read.

python scripts/commonsense_columns.py <folder of the sets> <output folder>

Writes <output folder>/<set>.<split>.jsonl for each set and split in the folder, in the order of its rows.
"""

import argparse
import json
import sys
from pathlib import Path

from lora_one.datasets.commonsense_columns import COLUMNS, read_columns
from lora_one.errors import UsageError
from lora_one.evaluation.command import exit_code


def write(source: Path, output: Path) -> int:
    """Write the files and say which; return 0. Raises UsageError: there is no set; RunError: a row has another form."""
    found = [
        (name, split) for name in COLUMNS for split in ("test", "train") if any((source / name).glob(f"{split}.*"))
    ]
    if not found:
        raise UsageError(
            f"{source} has no folder of a commonsense set ({', '.join(COLUMNS)}): pass their parent folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    for name, split in found:
        rows = [columns for columns, _ in read_columns(source / name, name, split)]
        file = output / f"{name}.{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{file}: {len(rows)} rows")
    return 0


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with a subfolder for each set, as LLM-Adapters has it")
    parser.add_argument("output", type=Path, help="folder for the files")
    arguments = parser.parse_args()
    return exit_code(lambda: write(arguments.source, arguments.output))


if __name__ == "__main__":
    sys.exit(main())
