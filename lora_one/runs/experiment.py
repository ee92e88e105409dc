"""One run, from its settings to everything in its folder."""

from lora_one import models
from lora_one.adaptation import lora as adapters
from lora_one.config import RunConfig
from lora_one.data import load_dataset
from lora_one.data.encode import encoder_for
from lora_one.distributed import Processes
from lora_one.evaluation.validation import Validation
from lora_one.records.folder import RunFolder, first_process, placed
from lora_one.runs import stages
from lora_one.runs.plan import plan
from lora_one.seeding import seed_everything
from lora_one.training.loop import accumulation_steps


def execute(run: RunConfig) -> RunFolder | None:
    """Plan a run, run it, or report that it is finished; return the folder of a finished run.

    The folder is a function of the configuration. None: a dry run, which leaves nothing.
    """

    processes = Processes.started()
    models.preflight(run.model, processes.count, full=not run.peft.use_peft)
    place = placed(run)
    run, folder = place.run, place.folder
    if processes.count > 1:
        accumulation_steps(run.model, processes.count)  # refuses a batch that cannot be shared out, before any work
    if run.dry_run:
        print(plan(run, folder.path))
        return None
    with folder.locked():
        finished = processes.gathered(folder.finished)[0]
        if finished and not run.overwrite:
            print(f"finished before: {folder.path} (overwrite=true to redo)")
            complete_artifacts(run, folder)
        else:
            experiment(run, folder, place.identity, place.fingerprints)
        processes.meet()
    return folder


def experiment(run: RunConfig, folder: RunFolder, identity: str, fingerprints: dict[str, str]) -> None:
    """Gradient, adapters, fine-tuning, evaluation, and everything on disk; goes on where a killed one stopped."""

    stages.check_resumable(run, folder)
    skeleton = models.load_skeleton(run.model.name, run.model.revision, run.model.type)
    if run.peft.use_peft:
        adapters.target_layers(skeleton, run.peft, run.init)
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


def complete_artifacts(run: RunConfig, folder: RunFolder) -> None:
    """A finished run of which the merged checkpoint is wanted now: merge, train nothing."""

    if run.model.saving and not folder.merged.exists() and first_process():
        stages.merge_run(folder)
    print(f"run: {folder.run_json}")
