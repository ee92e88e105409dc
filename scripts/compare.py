"""Compare methods in one table, as ``lora-one-compare`` does.

python scripts/compare.py scripts/comparisons/inits_stories_gsm8k.yaml --dry-run
python scripts/compare.py scripts/comparisons/inits_stories_gsm8k.yaml --output results/comparisons/inits
"""

import sys

from lora_one.runs.compare_command import main

if __name__ == "__main__":
    sys.exit(main())
