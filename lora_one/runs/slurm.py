"""Arrays of SLURM jobs through submitit: submit functions, wait for them, and read their results."""

import os
import re
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_one.config import first_line
from lora_one.errors import RunError, UsageError
from lora_one.files import is_listed
from lora_one.runs.sweep import Outcome, print_error

ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 1  # seconds between two checks for results
ASK_S = 30  # seconds between two queries of SLURM's queue
ERROR = "error: |fatal: "  # in a line of a log
OF_USERS = {"SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS"}  # variables of SLURM's commands, not of a job
PLAIN = {
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
}


def submit(function: Callable[..., object], calls: Sequence[Sequence[Any]], parameters: Mapping[str, Any]) -> list[Any]:
    """Submit one array with a job for each call of the function; return submitit's jobs, and print where they are.

    parameters: those of conf/hydra/launcher/slurm.yaml.
    Raises UsageError: a parameter has a wrong type. RunError: sbatch fails.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    options = {key: value for key, value in parameters.items() if key not in ("submitit_folder", "_target_")}
    options["setup"] = [*(options.get("setup") or []), f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH"]
    # submitit does not say that its jobs can be queued again, which some clusters (JobRequeue=0) refuse then
    further = {"requeue": True, **(options.get("additional_parameters") or {})}
    options["additional_parameters"] = {key: value for key, value in further.items() if value is not False}
    try:
        executor = submitit.AutoExecutor(folder=parameters["submitit_folder"], cluster="slurm")
        executor.update_parameters(**{key if key in PLAIN else f"slurm_{key}": options[key] for key in options})
        with outside_a_job():
            jobs = executor.map_array(function, *zip(*calls, strict=True))
    except (AssertionError, TypeError, ValueError) as error:  # from submitit's checks of its parameters
        raise UsageError(f"hydra.launcher: {first_line(error)}; see conf/hydra/launcher/slurm.yaml") from error
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        way_out = "set hydra.launcher.* to values that this cluster accepts"
        if "array spec" in reason:  # also for more jobs than the cluster's MaxArraySize
            way_out += ", or hydra.sweeper.max_batch_size=<number> for several smaller arrays"
        raise RunError(f"sbatch failed ({reason}): {way_out}") from error
    logs = jobs[0].paths.folder.parent
    print(f"SLURM array {jobs[0].job_id.partition('_')[0]}: {len(jobs)} jobs, logs in {logs}", flush=True)
    return jobs


@contextmanager
def outside_a_job() -> Iterator[None]:
    """Hide the variables of the job that this command runs in, which sbatch would hand on to the new jobs.

    They would take the number of an array's task for their own, and options such as the memory could contradict theirs.
    """
    inside = "SLURM_JOB_ID" in os.environ
    hidden = {key: os.environ[key] for key in os.environ if inside and key.startswith("SLURM_") and key not in OF_USERS}
    try:
        for key in hidden:
            del os.environ[key]
        yield
    finally:
        os.environ.update(hidden)


def not_cancelled(jobs: Sequence[Any]) -> None:
    """Print that the jobs continue although this command was stopped."""
    ids = " ".join(sorted({job.job_id.partition("_")[0] for job in jobs}))
    print_error(f"the submitted jobs continue without this command: scancel {ids} cancels them")


def wait_for(jobs: Sequence[Any]) -> Iterator[Any]:
    """Yield each job when it ends: it has a result, or two queries in a row lack it (results can be late).

    The states of the jobs, and why some are pending, are printed when they change.
    """
    left, missing, queried, shown = list(jobs), set(), time.monotonic(), ""
    while left:
        lost = set()
        if time.monotonic() - queried >= ASK_S:
            queried, queued = time.monotonic(), in_queue({job.job_id for job in left})
            gone = set() if queued is None else {job.job_id for job in left} - set(queued)
            lost, missing = gone & missing, gone
            states = "SLURM: " + ", ".join(
                f"{n} {state}" for state, n in sorted(Counter((queued or {}).values()).items())
            )
            if queued and states != shown:
                shown = states
                print(shown, flush=True)
        for job in [job for job in left if has_result(job) or job.job_id in lost]:
            left.remove(job)
            yield job
        if left:
            time.sleep(LOOK_S)


def in_queue(ids: set[str]) -> dict[str, str] | None:
    """Return the states of those jobs that SLURM still lists, such as "running"; None: the query failed.

    A pending job's state has SLURM's reason, for example "pending (Priority)".
    """
    arrays = ",".join(sorted({job.partition("_")[0] for job in ids}))
    command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={arrays}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    lines = (line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2)
    found = {job: (state.lower(), reason) for job, state, reason in lines if job in ids}
    return {job: f"{state} ({reason})" if state == "pending" else state for job, (state, reason) in found.items()}


def has_result(job: Any) -> bool:
    """Return whether a job has written its result."""
    return is_listed(job.task(0).paths.result_pickle)


def outcome_of(job: Any) -> Outcome:
    """Return the result of a job. Raises RunError: SLURM ended the job, or it failed before our code started."""
    from submitit.core.utils import pickle_load

    if not has_result(job):
        reason, _, rest = last_error(job).partition(": the same command")
        never = rest.partition("; ")[2] if "is not queued again" in rest else ""
        then = never or "the same command continues from its resume point"
        raise RunError(f"job {job.job_id} did not finish ({reason}): {then}")
    kind, content = pickle_load(job.task(0).paths.result_pickle)
    if kind == "error":  # a traceback
        raise RunError(f"job {job.job_id} failed ({content.strip().splitlines()[-1]}): see {job.task(0).paths.stderr}")
    return content


def last_error(job: Any) -> str:
    """Return the last error in the log of a job, or the path of the log."""
    log = job.task(0).paths.stderr
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line for line in lines if re.search(ERROR, line)]
    own = [line for line in errors if not line.startswith("srun: error: ")]  # which only says that a task has failed
    return re.split(ERROR, (own or errors)[-1], maxsplit=1)[1] if errors else f"see {log}"
