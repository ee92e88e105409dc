"""One experiment, from a composed configuration to a run's folder.

python run_exp.py                                        LoRA-One on the bundled model and generated problems
python run_exp.py -m init=gradient,default seed=1,2,3    a sweep, with a table at the end
python run_exp.py --help                                 the groups and every key
"""

import sys

import hydra
from omegaconf import DictConfig

from lora_one.config import RunConfig
from lora_one.runs import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    with cli.reporting():
        run = RunConfig.from_hydra(composed)  # every key is checked before torch is even imported
        cli.job_begins(run)
        from lora_one.runs.experiment import execute  # torch comes in here

        folder = execute(run)
        if folder is not None:
            cli.job_done(folder)


if __name__ == "__main__":
    sys.exit(cli.launch(main))
