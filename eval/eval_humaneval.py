"""Generate and score HumanEval programs: python eval/eval_humaneval.py --model_name=<folder> --num_sample=1"""

import sys

from lora_one.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("humaneval", sys.argv[1:]))
