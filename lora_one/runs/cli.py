"""Around Hydra: the published spellings before it, one-line errors and exit codes after it."""

import gc
import importlib.util
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_one.config import RunConfig, first_line, valid_keys
from lora_one.errors import RunError, UsageError, nearest
from lora_one.interruption import Interrupted, caught, requeue
from lora_one.records.folder import RunFolder, first_process

GROUPS = ("dataset", "model", "peft", "init", "optimizer", "wandb", "experiment")
RENAMED = {"dataset_name": "dataset", "init.weight": "init.scale"}
USAGE, FAILURE, INTERRUPTED = 2, 1, 130

_failures: list[int] = []  # exit codes of the jobs of this process; a sweep runs several
_done: list[RunFolder] = []
_anew: list[bool] = []  # of each job that began in this process: whether it has overwrite=true
_tracebacks: list[bool] = []  # whether HYDRA_FULL_ERROR=1 came from the user


def translate(arguments: Sequence[str]) -> list[str]:
    """Published spellings to Hydra's own: ``+init=x`` to ``init=x``, ``++dataset_name=x`` to ``dataset=x``.

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

    0, 1 failed, 2 wrongly asked for, 130 interrupted, 143, 138 and 140 ended by SIGTERM, SIGUSR1 and SIGUSR2 (with a
    resume point).
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    sys.argv[1:] = translate(sys.argv[1:])
    _failures.clear()
    _done.clear()
    _anew.clear()
    try:
        check_launcher(sys.argv[1:])
        with hydra_raises(), caught():
            hydra_main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group set to no name
        _report(explain(error, sys.argv[1:]), USAGE)
    except Interrupted as stop:
        return ended(stop)
    except KeyboardInterrupt:
        say_error("interrupted: the same command goes on from the last resume point")
        return INTERRUPTED
    except OSError as error:  # Hydra makes the results folder before the first job
        if error.filename is None:
            raise
        place = f"{error.filename} cannot be written ({error.strerror})"
        _report(f"results folder {place}: set results_dir=<a writable folder>", FAILURE)
    if len(_done) > 1 and first_process():
        close_sweep(_done)
    return exit_code()


def ended(stop: Interrupted) -> int:
    """Say that a signal came and, where SLURM can be asked to, queue the job again; returns the exit code."""
    said = None if any(_anew) else requeue(stop)  # with overwrite=true the next start would delete the results
    say_error(
        f"ended by {stop}: the same command (without overwrite=true) goes on from the last resume point"
        + (f"; {said}" if said else "")
    )
    return stop.exit_code


def check_launcher(arguments: Sequence[str]) -> None:
    """Raises UsageError: the jobs cannot be handed to SLURM from here."""
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


@dataclass(frozen=True)
class Outcome:
    """What a job in another process came to: its exit code, and the folders of the runs that it finished."""

    code: int
    done: tuple[Path, ...]


def apart(job: Callable[[], object]) -> Outcome:
    """Run a job of a sweep in a process of its own, as ``launch`` runs the sweep; ``take`` notes what it came to.

    A signal ends the process, with a resume point and no outcome: SLURM may run it again.
    """
    _failures.clear()
    _done.clear()
    _anew.clear()
    try:
        with caught():
            job()
    except Interrupted as stop:
        sys.exit(ended(stop))
    except SystemExit:  # one of several processes failed, and said so
        pass
    return Outcome(exit_code(), tuple(folder.path for folder in _done))


def take(outcome: Outcome) -> None:
    """Note what a job in another process came to."""
    _failures.append(outcome.code)
    _done.extend(map(RunFolder, outcome.done))


def close_sweep(folders: Sequence[RunFolder]) -> None:
    """Show the table of a sweep's finished runs, and leave it in their results_dir."""
    from lora_one.reports.table import save_sweep, sweep_table

    runs = list({folder.path: folder.read() for folder in folders}.items())
    print("\n" + sweep_table(runs))
    results = folders[0].path.parents[2]
    runs = [(path, record) for path, record in runs if path.is_relative_to(results)]
    try:
        path = save_sweep(runs, results)
    except OSError as error:
        _report(
            f"the table cannot be written to {results} ({error.strerror}): free space, or make it writable", FAILURE
        )
    else:
        print(f"table: {path} and {path.with_suffix('.csv').name}")


def compose(conf: Path, overrides: Sequence[str]) -> RunConfig:
    """The checked configuration of these overrides, as ``run_exp.py <overrides>`` composes it.

    conf: the folder of the configuration, absolute.  Raises UsageError: what Hydra or the checks refuse.
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


def job_begins(run: RunConfig) -> None:
    """Note what a signal must know of a run: with overwrite=true, SLURM may not start it again."""
    _anew.append(run.overwrite)


def job_done(folder: RunFolder) -> None:
    """Note a finished run for the table at a sweep's end."""
    _done.append(folder)


def exit_code() -> int:
    """Of this process so far: 0, or the highest of its failed jobs."""
    return max(_failures, default=0)


@contextmanager
def hydra_raises() -> Iterator[None]:
    """Hydra prints its errors and exits unless this variable is set; the user's wish for tracebacks is kept."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _tracebacks.append(asked == "1")
    try:
        yield
    finally:
        _tracebacks.pop()
        os.environ.pop("HYDRA_FULL_ERROR")
        if asked is not None:
            os.environ["HYDRA_FULL_ERROR"] = asked


@contextmanager
def reporting() -> Iterator[None]:
    """One job: an error becomes its line on stderr and the exit code; the next job of a sweep starts in free memory."""
    gc.collect()  # the last job's model and its trainer refer to each other; its error, if any, has let go of them now
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    try:
        yield
    except UsageError as error:
        _report(str(error), USAGE)
    except RunError as error:
        _report(str(error), FAILURE)
        _end_with_the_others()
    except Exception as error:  # a defect of ours or of a library: the traceback says where, the last line what
        if not any(_tracebacks):
            traceback.print_exc()
        _report(f"{type(error).__name__}: {error}", FAILURE)
        _end_with_the_others()


def _end_with_the_others() -> None:
    """One of several processes has failed: the others wait for it, so no job of the sweep can go on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(FAILURE)


def _report(message: str, code: int) -> None:
    _failures.append(code)
    if any(_tracebacks):
        traceback.print_exc()
    say_error(message)


def say_error(message: str) -> None:
    if first_process():
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Hydra's refusal of these arguments in one line: the value, the rule, the nearest valid names."""
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
