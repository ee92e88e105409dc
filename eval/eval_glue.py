"""Score a checkpoint or an adapter on a GLUE set: python eval/eval_glue.py --dataset=cola --model_name=<folder>"""

import sys

from lora_one.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("glue", sys.argv[1:]))
