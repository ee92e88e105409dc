"""Score a merged checkpoint or an adapter on GSM8K: python eval/eval_gsm8k.py --model_name=<folder>"""

import sys

from lora_one.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("gsm8k", sys.argv[1:]))
