"""The second published name of eval_commonsense.py."""

import sys

from lora_one.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("commonsense", sys.argv[1:]))
