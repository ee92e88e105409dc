"""The command line: translate published spellings for Hydra, and turn Hydra's errors into one line each."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_one.config import RunConfig, first_line, valid_keys
from lora_one.errors import UsageError, nearest
from lora_one.interruption import Interrupted, caught, requeue, sigterm_ignored
from lora_one.runs.planned_jobs import MULTIRUN, planned_jobs
from lora_one.runs.sweep import FAILURE, INTERRUPTED, USAGE, Outcome, Sweep, print_error

GROUPS = ("dataset", "model", "peft", "init", "optimizer", "wandb", "experiment")
RENAMED = {"dataset_name": "dataset", "init.weight": "init.scale"}


def translate(arguments: Sequence[str]) -> list[str]:
    """Translate published spellings to Hydra's: ``+init=x`` to ``init=x``, ``++dataset_name=x`` to ``dataset=x``.

    Hydra refuses ``+group=`` for a group of the defaults list, and accepts ``++dataset_name=`` without any effect.

    >>> translate(["-m", "+init=gradient", "++dataset_name=gsm8k,meta_math", "++init.weight=stable", "++seed=9"])
    ['-m', 'init=gradient', 'dataset=gsm8k,meta_math', 'init.scale=stable', '++seed=9']
    """
    translated = []
    for argument in arguments:
        match = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", argument, flags=re.DOTALL)
        if match:
            key = RENAMED.get(match[2], match[2])
            if key != match[2] or key in GROUPS:
                argument = f"{key}={match[3]}"
        translated.append(argument)
    return translated


def launch(hydra_main: Callable[[], None]) -> int:
    """Run the Hydra application on sys.argv, and return the exit code.

    0: success; 1: a job failed; 2: wrong usage; 130, 143, 138, 140: stopped by Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    sys.argv[1:] = translate(sys.argv[1:])
    sweep = Sweep()
    try:
        check_launcher(sys.argv[1:])
        sweep.plan(planned_jobs(sys.argv[1:]))
        with sweep.running(), hydra_raises(sweep), caught():
            hydra_main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: from a group without a name
        sweep.fail(explain(error, sys.argv[1:]), USAGE)
    except Interrupted as stop:
        return report_signal(stop, sweep)
    except KeyboardInterrupt:
        print_error("interrupted: the same command continues from the last resume point")
        sweep.print_state()
        return INTERRUPTED
    except OSError as error:  # Hydra creates the results folder before the first job
        if error.filename is None:
            raise
        reason = f"results folder {error.filename} cannot be written ({error.strerror})"
        sweep.fail(f"{reason}: set results_dir=<a writable folder>", FAILURE)
    sweep.close()
    return sweep.exit_code


def report_signal(stop: Interrupted, sweep: Sweep) -> int:
    """Print that a signal stopped the command, requeue a SLURM job if possible, and return the exit code."""
    with sigterm_ignored():
        requeued = None if sweep.overwriting else requeue(stop)  # a job with overwrite=true would delete its results
        print_error(
            f"stopped by {stop}: the same command (without overwrite=true) continues from the last resume point"
            + (f"; {requeued}" if requeued else "")
        )
        sweep.print_state()
    return stop.exit_code


def check_launcher(arguments: Sequence[str]) -> None:
    """Raise UsageError if the SLURM launcher is requested and cannot submit jobs here."""
    if "hydra/launcher=slurm" not in arguments:
        return
    option = "hydra/launcher=slurm"
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise UsageError(f"{option} needs hydra-submitit-launcher, not installed here: pip install 'lora-one[slurm]'")
    if not MULTIRUN & set(arguments):
        raise UsageError(f"{option} submits the jobs of a sweep: add -m, also for a single job")
    if shutil.which("sbatch") is None:
        raise UsageError(f"{option} needs sbatch, not found here: run it where jobs can be submitted, or drop it")
    if max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")) > 1:
        raise UsageError(f"{option} submits jobs from a single process: start the command without srun or a launcher")


def run_submitted(job: Callable[[], object]) -> Outcome:
    """Run one submitted job of a sweep in this process, and return its result for ``Sweep.add_outcome``.

    A signal ends the process with a resume point and without a result; SLURM may run the job again.
    """
    sweep = Sweep()
    try:
        with sweep.running(), caught():
            job()
    except Interrupted as stop:
        sys.exit(report_signal(stop, sweep))
    except SystemExit:  # one of several processes failed, and has printed its error
        pass
    return sweep.outcome


def compose(conf: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the checked configuration of these overrides, as ``run_exp.py <overrides>`` composes it.

    conf: absolute path of the configuration folder.  Raises UsageError: Hydra or our checks refuse the overrides.
    """
    from hydra import compose as composed
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    arguments = translate(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            return RunConfig.from_hydra(composed("config", arguments))
    except UsageError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(explain(error, arguments)) from error


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


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return Hydra's error about these arguments in one line: the value, the rule, the nearest valid names."""
    from hydra.errors import OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be parsed ({first_line(error)}): write key=value, for example model.epochs=1, "
            "and put a value with special characters in quotes"
        )
    if text.startswith("Config group override must be"):
        choices = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") in ("", *GROUPS)]
        return (
            f"{' '.join(choices)}: the value of a group is the name of a file in conf/<group>/; groups: "
            f"{', '.join(GROUPS)}"
        )
    if "interpolation '${results_dir}'" in text:
        return "results_dir=null is not a folder: set results_dir=<a writable folder>"
    if missing := re.search(r"Could not find '([\w/]+)/([^'/]*)'", text):
        group, choice = missing.groups()
        options = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], flags=re.MULTILINE)
        options = [option for option in options if not option.startswith("_")]  # _base is included by the others
        return f"{group}={choice} is not a choice of conf/{group}; {nearest(choice, options)}"
    if key := re.search(r"Could not override '([^']+)'", text):
        section, _, name = key[1].partition(".")
        if section in GROUPS and name in valid_keys(section):
            return f"unknown key {key[1]}: only another choice of {section}= reads it; drop it, or change {section}="
        if key[1].startswith("hydra.launcher."):
            return (
                f"unknown key {key[1]}: conf/hydra/launcher/slurm.yaml lists the valid keys; set other options of "
                "sbatch with hydra.launcher.additional_parameters={option: value}"
            )
        if name:
            return f"unknown key {key[1]}; {nearest(name, valid_keys(section))}"
        return f"unknown key {section}; {nearest(section, valid_keys(''))}"
    text = re.sub(r"\s*See https://\S+ for details", "", text)
    return " ".join(text.split())
