"""One run: from its settings to everything in its folder."""

from lora_one import models
from lora_one.config import RunConfig
from lora_one.distributed import Processes
from lora_one.initialization.methods import refuse_unready
from lora_one.optim.optimizer_class import optimizer_class
from lora_one.records.folder import Placed, RunFolder, first_process, placed
from lora_one.runs.fine_tuning import fine_tune
from lora_one.runs.initial_model import initial_model
from lora_one.runs.parts import check_before_loading, check_together, load_base, load_parts
from lora_one.runs.plan import plan
from lora_one.runs.saving import merge_run, save
from lora_one.runs.status import recorded
from lora_one.runs.summary import print_summary
from lora_one.seeding import seed_everything
from lora_one.training.schedule import refuse_uneven_batch


def experiment(run: RunConfig, place: Placed) -> None:
    """Do one run: data, base, gradient, adapters, training, saving. A run that was killed goes on where it stopped."""
    folder = place.folder
    check_before_loading(run, folder)
    parts = load_parts(run, folder)
    base = load_base(parts)
    check_together(parts, base)
    with recorded(run, place) as tracker:  # deletes old results, after all the checks above
        seed_everything(run.training_seed)
        model = initial_model(parts, base, tracker)
        seed_everything(run.training_seed)  # the same dropout whatever the initialisation drew
        fine_tune(parts, model, tracker)
        save(parts, model)
    print_summary(run, folder)


def execute(run: RunConfig) -> RunFolder | None:
    """Plan a run, do it, or report that it is finished; return the folder of a finished run.

    The folder is a function of the configuration. None: a dry run, which leaves nothing.
    """
    processes = Processes.started()
    models.preflight(run.model, processes.count, full=not run.peft.use_peft)
    refuse_unready(run.init)
    optimizer_class(run.optimizer)  # raises UsageError if its settings name a wrong class
    place = placed(run)
    run, folder = place.run, place.folder
    if processes.count > 1:
        refuse_uneven_batch(run.model, processes.count)
    if run.dry_run:
        print(plan(run, folder.path))
        return None
    with folder.locked():
        finished = processes.gathered(folder.finished)[0]
        if finished and not run.overwrite:
            print(f"finished before: {folder.path} (overwrite=true to redo)")
            if run.model.saving and not folder.merged.exists() and first_process():
                merge_run(folder)
            print(f"run: {folder.run_json}")
        else:
            experiment(run, place)
        processes.meet()
    return folder
