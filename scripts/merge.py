"""Write merged_checkpoint/ of a finished run: python scripts/merge.py results/<...>/<seed>"""

import argparse
import sys
from pathlib import Path

from lora_one.runs.sweep import Sweep


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, or its run.json")
    path = parser.parse_args().run
    sweep = Sweep()
    with sweep.job():
        from lora_one.errors import UsageError
        from lora_one.records.folder import RunFolder
        from lora_one.runs.saving import merge_run

        folder = RunFolder(path.parent if path.name == "run.json" else path)
        if not folder.run_json.exists():
            raise UsageError(f"{path} has no run.json: pass the folder of a run, as run_exp.py prints it")
        with folder.locked():
            merge_run(folder)
    return sweep.exit_code


if __name__ == "__main__":
    sys.exit(main())
