"""Write merged_checkpoint/ of a finished run, as ``lora-one-merge``: python scripts/merge.py results/<...>/<seed>"""

import sys

from lora_one.runs.merge_command import main

if __name__ == "__main__":
    sys.exit(main())
