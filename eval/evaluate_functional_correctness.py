"""Score HumanEval samples: python eval/evaluate_functional_correctness.py --sample_file=<samples.jsonl> --k=1"""

import sys

from lora_one.evaluation.functional_correctness import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
