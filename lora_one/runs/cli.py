"""The command ``lora-one`` (run_exp.py): Hydra composes each job, and errors and signals become exit codes."""

import atexit
import gc
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import lora_one
from lora_one.config.defaults import configuration_folder
from lora_one.config.unread import notes
from lora_one.errors import UsageError
from lora_one.interruption import Interrupted, caught, requeue, sigterm_ignored
from lora_one.invocation import command_name
from lora_one.peers import failed
from lora_one.progress import first_process, processes_started
from lora_one.records.folder import RunFolder
from lora_one.runs.composition import checked
from lora_one.runs.explanations import explain, refuse_unknown_flags
from lora_one.runs.overrides import translate
from lora_one.runs.planned_jobs import MULTIRUN, by_key, planned_jobs
from lora_one.runs.sweep import FAILURE, INTERRUPTED, USAGE, Outcome, Sweep, print_error_of_all
from lora_one.runs.sweep_compositions import choices_composed_once


@hydra.main(version_base="1.3", config_path=str(configuration_folder()), config_name="config")
def main(composed: DictConfig) -> float | None:
    """Do one job, with the configuration that Hydra has composed for it.

    Returns its validation loss after training, which sweepers such as Hydra's Optuna plugin minimise; infinity: the run
    failed, as if its loss diverged; None: there is none (no validation examples, a dry run, a wrong setting).
    """
    sweep = Sweep.current()
    with sweep.job():
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as given, interpolations unresolved
        sweep.started_with(overrides)
        run = checked(composed, overrides)  # checks every key, without importing torch
        sweep.begin(run)
        if first_process():
            for note in notes(run, by_key(overrides)):
                print(f"note: {note}")
        folder = experiment_module().execute(run)
        sweep.add(folder)
        return validation_loss(folder)
    return math.inf if sweep.failures[-1] == FAILURE else None


@cache
def experiment_module() -> ModuleType:
    """Import what runs a job, and torch with it, when the first configuration has been checked.

    Later garbage collections leave out the many objects of these modules: there are two before each training, of a
    third of a second each otherwise.
    """
    from lora_one.runs import experiment

    gc.freeze()
    return experiment


def validation_loss(folder: RunFolder | None) -> float | None:
    """Return the validation loss after training of a finished run; None: there is no such loss."""
    return None if folder is None else folder.read()["evaluation"].get("final", {}).get("eval_loss")


def command() -> int:
    """Run the command ``lora-one`` on sys.argv, and return the exit code."""
    return launch(main)


def launch(hydra_main: Callable[[], None]) -> int:
    """Run the Hydra application on sys.argv, and return the exit code.

    0: success; 1: a job failed; 2: wrong usage; 130, 143, 138, 140: stopped by Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    sys.argv[1:] = translate(sys.argv[1:])
    if "--version" in sys.argv:
        print(f"lora-one {lora_one.__version__}")
        return 0
    if {"--help", "-h"} & set(sys.argv):
        sys.argv.append(f"hydra.help.app_name='{command_name()}'")
    sweep = Sweep()
    try:
        refuse_unknown_flags(sys.argv[1:])
        check_launcher(sys.argv[1:])
        sweep.plan(planned_jobs(sys.argv[1:]), several=bool(MULTIRUN & set(sys.argv[1:])))
        with sweep.running(), hydra_raises(sweep), only_choices_listed(), choices_composed_once(), caught():
            hydra_main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: from a group without a name
        sweep.fail(explain(error, sys.argv[1:]), USAGE)
    except Interrupted as stop:
        return report_signal(stop, sweep)
    except BrokenPipeError:  # the output goes to head or less, which has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except KeyboardInterrupt:
        print_error_of_all(f"interrupted: {continuation(sweep)}")
        sweep.print_state()
        return INTERRUPTED
    except OSError as error:  # Hydra creates the results folder before the first job
        if error.filename is None:
            raise
        reason = f"results folder {error.filename} cannot be written ({error.strerror})"
        sweep.fail(f"{reason}: set results_dir=<a writable folder>", FAILURE)
    sweep.close()
    if sweep.exit_code:
        failed()
    return sweep.exit_code


def report_signal(stop: Interrupted, sweep: Sweep) -> int:
    """Print that a signal stopped the command, requeue a SLURM job if possible, and return the exit code."""
    with sigterm_ignored():
        requeued = None if sweep.overwriting else requeue(stop)  # a job with overwrite=true would delete its results
        print_error_of_all(f"stopped by {stop}: {continuation(sweep)}" + (f"; {requeued}" if requeued else ""))
        sweep.print_state()
    return stop.exit_code


def continuation(sweep: Sweep) -> str:
    """Return what the same command does after an interruption."""
    if sweep.dry:
        return "a dry run has no resume point"
    command = "the same command" + (" (without overwrite=true)" if sweep.overwriting else "")
    return f"{command} continues from the last resume point"


def check_launcher(arguments: Sequence[str]) -> None:
    """Raise UsageError if the SLURM launcher is requested and cannot submit jobs here."""
    if "hydra/launcher=slurm" not in arguments:
        return
    option = "hydra/launcher=slurm"
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise UsageError(f"{option} needs hydra-submitit-launcher, not installed here: pip install 'lora-one[slurm]'")
    if {"dry_run=true", "dry_run=True"} & {argument.lstrip("+") for argument in arguments}:
        raise UsageError(f"{option} and dry_run=true would submit jobs that only print plans: drop one of the two")
    if not MULTIRUN & set(arguments):
        raise UsageError(f"{option} submits the jobs of a sweep: add -m, also for a single job")
    if shutil.which("sbatch") is None:
        raise UsageError(f"{option} needs sbatch, not found here: run it where jobs can be submitted, or drop it")
    if processes_started() > 1:
        raise UsageError(f"{option} submits jobs from a single process: start the command without srun or a launcher")


def run_submitted(job: Callable[[], object]) -> Outcome:
    """Run one submitted job of a sweep in this process, and return its result for ``Sweep.add_outcome``.

    A signal ends the process with a resume point and without a result; SLURM may run the job again.
    """
    sweep = Sweep()
    if os.environ.get("SLURM_PROCID", "0") == "0":  # SLURM may kill a job, and its first process, for another's code
        atexit.register(end_with_code, sweep)  # before libraries register theirs, which are called in reverse order
    try:
        with sweep.running(), caught():
            job()
    except Interrupted as stop:
        sys.exit(report_signal(stop, sweep))
    except SystemExit:  # one of several processes failed, and has printed its error
        pass
    return sweep.outcome


def end_with_code(sweep: Sweep) -> None:
    """End this process with the sweep's exit code, unless it is 0.

    submitit ends it with 0 once the result is written, and SLURM would count the job as successful, in its mails and
    for the jobs that depend on it.
    """
    if sweep.exit_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(sweep.exit_code)


@contextmanager
def hydra_raises(sweep: Sweep) -> Iterator[None]:
    """Make Hydra raise its errors within the block. If the user has set HYDRA_FULL_ERROR=1, tracebacks are printed."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sweep.tracebacks = before == "1"
    try:
        yield
    finally:
        sweep.tracebacks = False
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def only_choices_listed() -> Iterator[None]:
    """Hide files that others include, such as _base, from Hydra's help, completion and ``glob`` within the block."""
    from hydra._internal.config_repository import ConfigRepository

    original = ConfigRepository.get_group_options

    def choices(*arguments: object, **options: object) -> list[str]:
        return [name for name in original(*arguments, **options) if not name.startswith("_")]

    ConfigRepository.get_group_options = choices
    try:
        yield
    finally:
        ConfigRepository.get_group_options = original
