"""One experiment, from a composed configuration to a run's folder.

python run_exp.py                                        LoRA-One on the bundled model and generated problems
python run_exp.py -m init=gradient,default seed=1,2,3    a sweep, with a table at the end
python run_exp.py --help                                 the groups and every key
"""

import sys
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from lora_one import cli
from lora_one.config import RunConfig

if TYPE_CHECKING:
    from lora_one.run_folder import RunFolder


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    with cli.reporting():
        run = RunConfig.from_hydra(composed)  # every key is checked before torch is even imported
        cli.job_begins(run)
        execute(run)


def execute(run: RunConfig) -> None:
    """Plan, run, or say that it is done: the folder is a function of the configuration."""
    from lora_one import models
    from lora_one.distributed import Processes
    from lora_one.run_folder import placed

    processes = Processes.started()
    models.preflight(run.model, processes.count, full=not run.peft.use_peft)
    place = placed(run)
    run, folder = place.run, place.folder
    if processes.count > 1:
        from lora_one.training import accumulation_steps

        accumulation_steps(run.model, processes.count)  # refuses a batch that cannot be shared out, before any work
    if run.dry_run:
        from lora_one.plan import plan

        print(plan(run, folder.path))
        return
    with folder.locked():
        finished = processes.gathered(folder.finished)[0]
        if finished and not run.overwrite:
            print(f"finished before: {folder.path} (overwrite=true to redo)")
            complete_artifacts(run, folder)
        else:
            experiment(run, folder, place.identity, place.fingerprints)
        processes.meet()
    cli.job_done(folder)


def experiment(run: RunConfig, folder: "RunFolder", identity: str, fingerprints: dict[str, str]) -> None:
    """Gradient, adapters, fine-tuning, evaluation, and everything on disk; goes on where a killed one stopped."""
    from lora_one import adapters, models, stages
    from lora_one.data import load_dataset
    from lora_one.data.encode import encoder_for
    from lora_one.evaluation.validation import Validation
    from lora_one.inits import build_init
    from lora_one.seeding import seed_everything

    stages.check_resumable(run, folder)
    skeleton = models.load_skeleton(run.model.name, run.model.revision, run.model.type)
    if run.peft.use_peft:
        adapters.target_layers(skeleton, run.peft, build_init(run.init))
    models.check_positions(skeleton, run.model)
    encoder = encoder_for(run.model, run.dataset)
    splits = load_dataset(run.dataset, encoder, run.model.max_length)
    probe = stages.draw_probe(run, splits, encoder)
    base = stages.load_base(run, encoder)
    stages.check_together(run, splits, base)
    parts = stages.Experiment(run, folder, encoder, splits, Validation(run, splits, encoder))
    with stages.recorded(run, folder, identity, fingerprints) as tracker:  # what stood there before goes only now
        seed_everything(run.training_seed)
        model = stages.initialise(parts, base, probe, tracker)
        seed_everything(run.training_seed)  # dropout and order are the same whatever the initialisation drew
        stages.fine_tune(parts, model, tracker)
        stages.save(parts, model)
    stages.close(run, folder)


def complete_artifacts(run: RunConfig, folder: "RunFolder") -> None:
    """A finished run of which the merged checkpoint is wanted now: merge, train nothing."""
    from lora_one.run_folder import first_process

    if run.model.saving and not folder.merged.exists() and first_process():
        from lora_one import stages

        stages.merge_run(folder)
    print(f"run: {folder.run_json}")


if __name__ == "__main__":
    sys.exit(cli.launch(main))
