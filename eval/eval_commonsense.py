"""Score a model on the commonsense sets: python eval/eval_commonsense.py --dataset boolq --base_model <folder>"""

import sys

from lora_one.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("commonsense", sys.argv[1:]))
