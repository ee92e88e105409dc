"""Score a merged checkpoint or an adapter on MATH: python eval/eval_math.py --model_name=<folder>"""

import sys

from lora_one.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("math", sys.argv[1:]))
