"""The command line: published spellings become Hydra's, and Hydra's errors become one line each."""

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
from lora_one.interruption import Interrupted, caught, requeue
from lora_one.runs.sweep import FAILURE, INTERRUPTED, USAGE, Outcome, Sweep, say_error

GROUPS = ("dataset", "model", "peft", "init", "optimizer", "wandb", "experiment")
RENAMED = {"dataset_name": "dataset", "init.weight": "init.scale"}


def translate(arguments: Sequence[str]) -> list[str]:
    """Translate published spellings to Hydra's: ``+init=x`` to ``init=x``, ``++dataset_name=x`` to ``dataset=x``.

    Hydra refuses ``+group=`` for a group of the defaults list and takes ``++dataset_name=`` without effect.

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
    """Run the Hydra application on sys.argv; returns the exit code.

    0; 1 a job failed; 2 wrong usage; 130 interrupted; 143, 138 and 140 ended by SIGTERM, SIGUSR1 and SIGUSR2 (with a
    resume point).
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    sys.argv[1:] = translate(sys.argv[1:])
    sweep = Sweep()
    try:
        check_launcher(sys.argv[1:])
        with sweep.running(), hydra_raises(sweep), caught():
            hydra_main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group set to no name
        sweep.fail(explain(error, sys.argv[1:]), USAGE)
    except Interrupted as stop:
        return ended(stop, sweep)
    except KeyboardInterrupt:
        say_error("interrupted: the same command goes on from the last resume point")
        return INTERRUPTED
    except OSError as error:  # Hydra makes the results folder before the first job
        if error.filename is None:
            raise
        place = f"{error.filename} cannot be written ({error.strerror})"
        sweep.fail(f"results folder {place}: set results_dir=<a writable folder>", FAILURE)
    sweep.close()
    return sweep.exit_code


def ended(stop: Interrupted, sweep: Sweep) -> int:
    """Print that a signal came, requeue the job where SLURM allows it, and return the exit code."""
    said = None if sweep.overwriting else requeue(stop)  # with overwrite=true the next start would delete the results
    say_error(
        f"ended by {stop}: the same command (without overwrite=true) goes on from the last resume point"
        + (f"; {said}" if said else "")
    )
    return stop.exit_code


def check_launcher(arguments: Sequence[str]) -> None:
    """Raise UsageError when the jobs cannot be submitted to SLURM from here."""
    if "hydra/launcher=slurm" not in arguments:
        return
    asked = "hydra/launcher=slurm"
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise UsageError(f"{asked} needs hydra-submitit-launcher, not installed here: pip install 'lora-one[slurm]'")
    if not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        raise UsageError(f"{asked} hands the jobs of a sweep to SLURM: add -m, for a single job too")
    if shutil.which("sbatch") is None:
        raise UsageError(f"{asked} needs sbatch, not found here: run it where jobs are submitted, or leave it away")
    if max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")) > 1:
        raise UsageError(f"{asked} is for one process, which submits: start it without srun or a launcher")


def apart(job: Callable[[], object]) -> Outcome:
    """Run one job of a sweep in a process of its own, and return its result for ``Sweep.add_outcome``.

    A signal ends the process, with a resume point and without a result: SLURM may run it again.
    """
    sweep = Sweep()
    try:
        with sweep.running(), caught():
            job()
    except Interrupted as stop:
        sys.exit(ended(stop, sweep))
    except SystemExit:  # one of several processes failed, and printed why
        pass
    return sweep.outcome


def compose(conf: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the checked configuration of these overrides, as ``run_exp.py <overrides>`` composes it.

    conf: the folder of the configuration, absolute.  Raises UsageError: Hydra or the checks refuse them.
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
    """Set the variable that makes Hydra raise its errors; where the user had set it, tracebacks are printed."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sweep.tracebacks = asked == "1"
    try:
        yield
    finally:
        sweep.tracebacks = False
        os.environ.pop("HYDRA_FULL_ERROR")
        if asked is not None:
            os.environ["HYDRA_FULL_ERROR"] = asked


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return Hydra's refusal of these arguments in one line: the value, the rule, the nearest valid names."""
    from hydra.errors import OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be understood ({first_line(error)}): settings are key=value, such as "
            "model.epochs=1, with quotes around values that hold special characters"
        )
    if text.startswith("Config group override must be"):
        choices = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") in ("", *GROUPS)]
        return (
            f"{' '.join(choices)}: a group takes the name of a file in its folder of conf/; groups: {', '.join(GROUPS)}"
        )
    if "interpolation '${results_dir}'" in text:
        return "results_dir=null is no folder: set results_dir=<a writable folder>"
    if missing := re.search(r"Could not find '([\w/]+)/([^'/]*)'", text):
        group, choice = missing.groups()
        options = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], flags=re.MULTILINE)
        options = [option for option in options if not option.startswith("_")]  # _base is a part of the others
        return f"{group}={choice} is not a choice of conf/{group}; {nearest(choice, options)}"
    if key := re.search(r"Could not override '([^']+)'", text):
        section, _, name = key[1].partition(".")
        if section in GROUPS and name in valid_keys(section):
            return f"unknown key {key[1]}: another choice of {section} reads it; drop it, or choose another {section}="
        if key[1].startswith("hydra.launcher."):
            return (
                f"unknown key {key[1]}: conf/hydra/launcher/slurm.yaml lists those of the launcher; what else sbatch "
                "takes goes into hydra.launcher.additional_parameters={option: value}"
            )
        if name:
            return f"unknown key {key[1]}: nothing here reads it; {nearest(name, valid_keys(section))}"
        return f"unknown key {section}: nothing here reads it; {nearest(section, valid_keys(''))}"
    text = re.sub(r"\s*See https://\S+ for details", "", text)
    return " ".join(text.split())
