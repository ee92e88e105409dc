"""Score a model on MMLU, 5-shot: python eval/eval_mmlu.py <merged checkpoint>"""

import sys

from lora_one.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("mmlu", sys.argv[1:]))
