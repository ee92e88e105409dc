"""Write the report on a comparison or on the runs of a results folder, as ``lora-one-report`` does.

python scripts/report.py results/comparisons/inits
python scripts/report.py results --baseline <configuration>
"""

import sys

from lora_one.runs.report_command import main

if __name__ == "__main__":
    sys.exit(main())
