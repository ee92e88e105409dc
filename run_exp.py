"""Run one experiment: from a composed configuration to the files in its output folder.

python run_exp.py                                        LoRA-One on the bundled model and generated problems
python run_exp.py -m init=gradient,default seed=1,2,3    a sweep, with a table of the results
python run_exp.py --help                                 the configuration groups and all keys

Each job has three steps; ``main`` contains them in this order:
    Hydra composes one configuration from conf/ and the command line;
    RunConfig checks every key before anything is loaded              lora_one/config/
    execute loads data and model, computes the gradient, starts the
    adapters from it, trains them, and saves the results              lora_one/runs/experiment.py

An installed package has the same command as ``lora-one`` and ``python -m lora_one``.
"""

import sys

from lora_one.runs.cli import launch, main

if __name__ == "__main__":
    sys.exit(launch(main))
