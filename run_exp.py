"""Run one experiment: from a composed configuration to the files in its output folder.

python run_exp.py                                        LoRA-One on the bundled model and generated problems
python run_exp.py -m init=gradient,default seed=1,2,3    a sweep, with a table of the results
python run_exp.py --help                                 the configuration groups and all keys
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
        run = RunConfig.from_hydra(composed)  # checks every key, without importing torch
        sweep.begin(run)
        from lora_one.runs.experiment import execute  # imports torch

        sweep.add(execute(run))


if __name__ == "__main__":
    sys.exit(launch(main))
