"""``python -m lora_one``: the command ``lora-one``."""

import sys

from lora_one.runs.cli import command

if __name__ == "__main__":
    sys.exit(command())
