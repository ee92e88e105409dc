"""The shapes of LLaMA 2, as folders that contain a config.json and nothing else."""

import sys

from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from scale_plan import SHAPES, bases_of, write_config

PARAMETERS = {"7B": 6_738_415_616, "13B": 13_015_864_320, "70B": 68_976_648_192}

__all__ = ["PARAMETERS", "SHAPES", "bases_of", "write_config"]
