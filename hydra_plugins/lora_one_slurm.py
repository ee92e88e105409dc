"""``hydra/launcher=slurm``: submit the jobs of a sweep as one SLURM array, through submitit."""

import importlib.util
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from lora_one.config import first_line
from lora_one.errors import RunError, UsageError
from lora_one.runs import cli
from lora_one.runs.composition import checked
from lora_one.runs.sweep import Outcome, Sweep, print_error

ROOT = Path(__file__).resolve().parents[1]
LOOK_S = 1  # seconds between two checks for results
ASK_S = 30  # seconds between two queries of SLURM's queue

if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher"):  # otherwise cli.check_launcher refuses it
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    class ArrayLauncher(SlurmLauncher):
        """Submit the jobs, wait for them, and add their results to the sweep, like those of local jobs.

        A job that fails, or that SLURM ends, does not stop the others. A job that is requeued is waited for.
        """

        def __call__(self, overrides: list[str], *rest: Any) -> Outcome:
            """Run one job; submitit calls this in a separate process on a compute node."""
            return cli.run_submitted(lambda: super(ArrayLauncher, self).__call__(overrides, *rest))

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            numbered = [(number, list(job)) for number, job in enumerate(job_overrides, initial_job_idx)]
            sweep = Sweep.current()
            jobs: dict[Any, str] = {}  # submitit's job -> the overrides that differ between jobs
            with sweep.errors():
                valid = [job for job in numbered if self._valid(sweep, *job)]
                jobs = self._submit(valid)
            numbers = {job: number for job, (number, _) in zip(jobs, valid, strict=True)} if jobs else {}
            try:
                for job, name in wait_for(jobs):
                    with sweep.job(numbers[job]):
                        outcome = outcome_of(job)
                        sweep.add_outcome(outcome)
                        print(f"{job.job_id} {name}: {'failed' if outcome.code else 'finished'}", flush=True)
                        if outcome.code:
                            print_error(f"{job.job_id} {name}: {last_error(job)}")
            except KeyboardInterrupt:
                ids = " ".join(sorted({job.job_id.partition("_")[0] for job in jobs}))
                print_error(f"the submitted jobs continue without this command: scancel {ids} cancels them")
                raise
            return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]

        def _valid(self, sweep: Sweep, number: int, overrides: list[str]) -> bool:
            """Check a job's configuration before it waits in a queue; return whether it is valid."""
            with sweep.job(number):
                sweep.started_with(overrides)
                composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
                checked(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]), overrides)
                return True
            return False

        def _submit(self, numbered: Sequence[tuple[int, list[str]]]) -> dict[Any, str]:
            """Submit the jobs; return {job: name}. Raises UsageError: a wrong type of value. RunError: sbatch fails."""
            import submitit
            from hydra.core.singleton import Singleton
            from submitit.core.utils import FailedJobError, FailedSubmissionError

            if not numbered:
                return {}
            plain = set(BaseQueueConf.__dataclass_fields__)
            options = {key: value for key, value in self.params.items() if key != "submitit_folder"}
            options["setup"] = [*(options["setup"] or []), f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH"]
            executor = submitit.AutoExecutor(folder=self.params["submitit_folder"], cluster="slurm")
            count = len(numbered)
            try:
                executor.update_parameters(**{key if key in plain else f"slurm_{key}": options[key] for key in options})
                jobs = executor.map_array(
                    self,
                    [job for _, job in numbered],
                    ["hydra.sweep.dir"] * count,
                    [number for number, _ in numbered],
                    [str(number) for number, _ in numbered],
                    [Singleton.get_state()] * count,
                )
            except (AssertionError, TypeError, ValueError) as error:  # from submitit's checks of its parameters
                raise UsageError(f"hydra.launcher: {first_line(error)}; see conf/hydra/launcher/slurm.yaml") from error
            except (FailedJobError, FailedSubmissionError) as error:
                reason = " ".join(str(error).split())
                raise RunError(
                    f"sbatch failed ({reason}): set hydra.launcher.* to values that this cluster accepts"
                ) from error
            common = set.intersection(*(set(job) for _, job in numbered)) if count > 1 else set()
            names = [" ".join(part for part in job if part not in common) for _, job in numbered]
            logs = jobs[0].paths.folder.parent
            print(f"SLURM array {jobs[0].job_id.partition('_')[0]}: {count} jobs, logs in {logs}", flush=True)
            return dict(zip(jobs, names, strict=True))


def wait_for(jobs: dict[Any, str]) -> Iterator[tuple[Any, str]]:
    """Yield (job, name) when a job ends: it has a result, or two queries in a row lack it (results can be late)."""
    left, missing, queried = dict(jobs), set(), time.monotonic()
    while left:
        lost = set()
        if time.monotonic() - queried >= ASK_S:
            queried, queued = time.monotonic(), in_queue({job.job_id for job in left})
            gone = set() if queued is None else {job.job_id for job in left} - queued
            lost, missing = gone & missing, gone
        for job in [job for job in left if has_result(job) or job.job_id in lost]:
            yield job, left.pop(job)
        if left:
            time.sleep(LOOK_S)


def in_queue(ids: set[str]) -> set[str] | None:
    """Return those of the jobs that SLURM still lists (waiting, running or ending); None: the query failed."""
    arrays = ",".join(sorted({job.partition("_")[0] for job in ids}))
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={arrays}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return ids & set(done.stdout.split())


def has_result(job: Any) -> bool:
    """Return whether a job has written its result."""
    result = job.task(0).paths.result_pickle
    return result.name in {file.name for file in result.parent.iterdir()}  # over NFS, exists() may be out of date


def outcome_of(job: Any) -> Outcome:
    """Return the result of a job. Raises RunError: SLURM ended the job, or it failed before our code started."""
    from submitit.core.utils import pickle_load

    if not has_result(job):
        reason = last_error(job).partition(": the same command")[0]
        raise RunError(f"job {job.job_id} did not finish ({reason}): the same command continues from its resume point")
    kind, content = pickle_load(job.task(0).paths.result_pickle)
    if kind == "error":  # a traceback
        raise RunError(f"job {job.job_id} failed ({content.strip().splitlines()[-1]}): see {job.task(0).paths.stderr}")
    return content


def last_error(job: Any) -> str:
    """Return the last error in the log of a job, or the path of the log."""
    log = job.task(0).paths.stderr
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return errors[-1] if errors else f"see {log}"
