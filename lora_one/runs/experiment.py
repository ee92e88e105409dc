"""One run, from its settings to the files in its folder."""

import dataclasses
from functools import partial

from lora_one import models
from lora_one.config import RunConfig
from lora_one.config.hardware import read_hardware
from lora_one.distributed import Processes
from lora_one.initialization.methods import refuse_unready
from lora_one.models.peak_memory import free_memory, reset_peak_memory
from lora_one.optim.optimizer_class import optimizer_class
from lora_one.progress import first_process
from lora_one.records.agreement import refuse_differences
from lora_one.records.folder import LocatedRun, RunFolder, locate
from lora_one.runs.fine_tuning import fine_tune
from lora_one.runs.initial_model import initial_model
from lora_one.runs.parts import check_before_loading, check_model_and_data, load_base, load_parts
from lora_one.runs.plan import plan, planned_per_node, planned_processes
from lora_one.runs.saving import merge_run, save
from lora_one.runs.status import begun, measured_otherwise, recorded, with_commit
from lora_one.runs.summary import print_summary
from lora_one.seeding import seed_everything
from lora_one.training.schedule import micro_batch


def experiment(located: LocatedRun) -> None:
    """Do one run: data, base, gradient, adapters, training, saving. An interrupted run continues where it stopped."""
    folder = located.folder
    earlier = begun(located.run, folder)
    run = with_commit(located.run, earlier)
    if first_process() and (otherwise := measured_otherwise(run, earlier)):
        print(f"note: this run began with {otherwise}")
    free_memory()  # here, because the jobs of a sweep that are finished or dry load no model
    reset_peak_memory()
    check_before_loading(run, folder)
    parts = load_parts(run, folder)
    base = load_base(parts)
    check_model_and_data(parts, base)
    commit = models.commit_of(run.model.name, run.model.revision)
    with recorded(located, commit) as tracker:  # deletes old results, after all the checks above
        seed_everything(run.training_seed)
        model = initial_model(parts, base, tracker)
        seed_everything(run.training_seed)  # so that dropout does not depend on the initialisation
        fine_tune(parts, model, tracker)
        save(parts, model, tracker)
    print_summary(run, folder)


def execute(run: RunConfig) -> RunFolder | None:
    """Do a run, or report that it is already finished; with ``dry_run``, print its plan instead.

    Returns the folder of the finished run; None for a dry run, which writes nothing.
    """
    processes = Processes.started(run.process_timeout_s)
    hardware = None if run.plan.hardware is None else read_hardware(run.plan.hardware)
    moments = run.peft.lora_target_modules if run.optimizer.full_size_moments else None
    per_node = planned_per_node(run, hardware)
    run = dataclasses.replace(run, model=models.with_shards(run.model, planned_processes(run), per_node))
    if not run.plan.given:  # for another machine, the memory and the files of this one do not matter
        options = {"full": run.peft.trains_base, "full_size_moments": moments}
        processes.refuse_together(partial(models.preflight, run.model, processes.count, **options))
    refuse_unready(run.init)
    optimizer_class(run.optimizer)  # raises UsageError if its settings name a wrong class
    located = locate(run)
    run, folder = located.run, located.folder
    refuse_differences(located)
    micro_batch(run.model, planned_processes(run))  # raises UsageError if the batch cannot be divided
    if run.dry_run:
        if processes.rank == 0:
            print(plan(run, folder, hardware))
        return None
    with folder.locked():
        record = folder.read()
        finished = processes.gathered(record.get("status") == "finished")[0]  # all processes must decide alike
        if finished and not run.overwrite:
            if processes.rank == 0:
                print(f"already finished: {folder.path} (overwrite=true runs it again)")
                if otherwise := measured_otherwise(run, record):
                    print(f"note: it ran with {otherwise}, which this command does not change without overwrite=true")
                if run.model.saving and not folder.merged.exists():
                    merge_run(folder, models.local_folder(run.model.name))
                print(f"run: {folder.run_json}")
        else:
            experiment(located)
        processes.meet()
    return folder
