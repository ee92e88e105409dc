"""Measure the loss of a model on a text: python eval/eval_text.py --model_name=<folder> --data_path=<text file>"""

import sys

from lora_one.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("text", sys.argv[1:]))
