"""One experiment, from a composed configuration to a run's folder.

python run_exp.py                                        LoRA-One on the bundled model and generated problems
python run_exp.py -m init=gradient,default seed=1,2,3    a sweep, with a table at the end
python run_exp.py --help                                 the groups and every key
"""

import sys

import hydra
from omegaconf import DictConfig

from lora_one.config import RunConfig
from lora_one.runs.cli import launch
from lora_one.runs.sweep import Sweep


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    sweep = Sweep.current()
    with sweep.job():
        run = RunConfig.from_hydra(composed)  # every key is checked before torch is even imported
        sweep.begin(run)
        from lora_one.runs.experiment import execute  # imports torch

        sweep.add(execute(run))


if __name__ == "__main__":
    sys.exit(launch(main))
