"""The runs of a comparison in other processes: as tasks, side by side on this machine; see also comparison_array."""

import json
import os
import subprocess
import sys
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lora_one.config import RunConfig
from lora_one.errors import RunError
from lora_one.evaluation.sandbox import cores
from lora_one.files import is_listed, write_json
from lora_one.reports.compare import Run
from lora_one.runs.comparison_file import Comparison, Evaluation
from lora_one.runs.comparison_jobs import Job, Jobs
from lora_one.runs.comparison_runners import Measures, Pace, attempt, broken

STOP_S = 600  # seconds that a stopped process may take for its resume point
IDLE_STOP_S = 30  # and one without a task to end
Ended = tuple[int, float, str | None]  # place of a task, its seconds, and why it has no result


@dataclass(frozen=True)
class Task:
    """A job for another process, as plain JSON: the comparison, which of its jobs, and the file of the result."""

    comparison: dict[str, Any]
    method: str
    stage: str
    point: dict[str, Any]
    seed: int
    measured: bool
    result: str

    def __call__(self) -> int:
        """Do the job in this process, and write its ``Run`` to the file of the result."""
        from lora_one.runs.composition import compose
        from lora_one.runs.experiment import execute

        evaluations = {name: Evaluation(**entry) for name, entry in self.comparison["evaluations"].items()}
        comparison = Comparison(**self.comparison | {"evaluations": evaluations})
        jobs = Jobs(comparison, compose)
        measure = Measures.of(jobs) if self.measured else None
        found = attempt(jobs.at(self.method, self.stage, self.point, self.seed), execute, measure)
        write_json(Path(self.result), asdict(found))
        return 0


class Workers:
    """Runs jobs as tasks of other processes.

    output: folder of the comparison; tasks, results and logs are in its subfolder ``workers``.
    """

    def __init__(self, output: Path):
        self.folder = output / "workers"

    def begin(self, jobs: Jobs, trained: int, untrained: int) -> None:
        self.comparison, self.measures = jobs.comparison, Measures.of(jobs)
        self.pace = Pace(trained, untrained)

    def run(self, jobs: Sequence[Job], *, measured: bool) -> list[Run]:
        """See ``Runner.run``. Jobs of one folder, such as those of a method against itself, are one task."""
        measure = self.measures if measured else None
        folders = {job.folder.path: place for place, job in reversed(list(enumerate(jobs))) if job.folder is not None}
        todo = [place for place in sorted(folders.values()) if not self.done(jobs[place], measure)]
        tasks = [self.task(jobs[place], measured=measured) for place in todo]
        new = {place for place in todo if not jobs[place].finished}
        results = {}
        for number, seconds, error in self.ended(tasks) if tasks else ():
            place = todo[number]
            results[place] = self.result(tasks[number], jobs[place], error)
            if place in new:  # the others were only measured
                self.pace.add(jobs[place], seconds)
        return [
            results[place] if place in results else self.taken(job, results.get(folders.get(path_of(job))), measure)
            for place, job in enumerate(jobs)
        ]

    def taken(self, job: Job, other: Run | None, measure: Measures | None) -> Run:
        """Return the result of a job that was no task. other: that of a job with the same folder, if it was one."""
        if other is not None and other.error is not None:
            return broken(job, other.error)
        return attempt(job, refuse, measure)

    def done(self, job: Job, measure: Measures | None) -> bool:
        """Return whether nothing is left to do of a job, or it cannot run."""
        return job.error is not None or (job.finished and (measure is None or measure.done(job.folder)))

    def task(self, job: Job, *, measured: bool) -> Task:
        """Return the task of a job, whose result has the name of the run's folder; remove that of an earlier call."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{job.stage}-{job.folder.path.parent.name}-{job.seed}.json"
        for old in (file, file.with_suffix(".log")):
            old.unlink(missing_ok=True)
        return Task(asdict(self.comparison), job.method, job.stage, job.point, job.seed, measured, str(file.resolve()))

    def result(self, task: Task, job: Job, error: str | None) -> Run:
        """Return what a task has written, or the reason why it has not."""
        file = Path(task.result)
        if not is_listed(file):
            return broken(job, error or "its process ended without a result")
        found = Run(**json.loads(file.read_text()))
        if found.error is not None:
            return broken(job, found.error)
        print(f"{'measured' if task.measured else 'finished'}: {job}", file=sys.stderr, flush=True)
        return found

    @abstractmethod
    def ended(self, tasks: Sequence[Task]) -> Iterator[Ended]:
        """Start the tasks; yield each one when it has ended."""

    def end(self) -> None:
        """See ``Runner.end``."""


def path_of(job: Job) -> Path | None:
    """Return the folder of a job; None: it cannot run."""
    return job.folder.path if job.folder else None


def refuse(run: RunConfig) -> None:
    """Run nothing: every job that is left has its result."""
    raise RunError(f"seed {run.seed} has no result")


class SideBySide(Workers):
    """Runs up to ``count`` tasks at a time on this machine, each in a process with a share of the threads and a GPU.

    A process does one task after another until ``end``, because its imports take seconds; after a failed one there is a
    new process.
    """

    def __init__(self, output: Path, count: int, threads: int | None = None):
        super().__init__(output)
        self.count = count
        self.threads = threads or max(1, cores() // count)
        self.workers: dict[int, subprocess.Popen] = {}
        self.busy: dict[int, tuple[int, float]] = {}  # place of a worker -> its task, and when that began
        self.replaced: list[subprocess.Popen] = []

    def ended(self, tasks: Sequence[Task]) -> Iterator[Ended]:
        left = deque(range(len(tasks)))
        while left or self.busy:
            for slot in range(self.count):
                if slot not in self.busy and left:
                    worker = self.worker(slot)
                    self.busy[slot] = left.popleft(), time.monotonic()
                    send(worker, tasks[self.busy[slot][0]])
            ready = wait([self.workers[slot].stdout for slot in self.busy])
            for slot in [slot for slot in self.busy if self.workers[slot].stdout in ready]:
                code = answer(self.workers[slot])
                number, began = self.busy.pop(slot)
                if code != 0:
                    self.replaced.append(self.workers.pop(slot))
                log = log_of(tasks[number])
                yield number, time.monotonic() - began, reason(code, log if log.exists() else self.log(slot))

    def worker(self, slot: int) -> subprocess.Popen:
        """Return a process that waits for a task: a new one if there is none, or if it was killed while it waited."""
        if slot in self.workers and self.workers[slot].poll() is not None:
            self.replaced.append(self.workers.pop(slot))
        if slot not in self.workers:
            self.workers[slot] = self.start(slot)
        return self.workers[slot]

    def end(self) -> None:
        """End all processes; the busy ones, if the comparison was stopped, with resume points."""
        busy = [self.workers[slot] for slot in self.busy]
        stop([*self.replaced, *self.workers.values()], busy)

    def start(self, slot: int) -> subprocess.Popen:
        """Start a process for tasks, in a session of its own, so that only this process forwards signals to it."""
        self.log(slot).unlink(missing_ok=True)
        with self.log(slot).open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lora_one.runs.comparison_workers"],
                env={**os.environ, **self.environment(slot)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def log(self, slot: int) -> Path:
        """Return the file with what a worker prints outside of its tasks."""
        return self.folder / f"process-{slot}.log"

    def environment(self, slot: int) -> dict[str, str]:
        """Return the variables of a worker: threads, GPU, where this package is, and that it is no task of an srun."""
        import torch

        found = {"OMP_NUM_THREADS": str(self.threads), "SLURM_STEP_NUM_TASKS": "1"}
        root = str(Path(__file__).resolve().parents[2])
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if torch.cuda.is_available():
            names = gpus if gpus != [""] else [str(number) for number in range(torch.cuda.device_count())]
            found["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
        return found


def send(worker: subprocess.Popen, task: Task) -> None:
    """Give a task to a worker; one that has just ended cannot take it, which ``answer`` returns."""
    with suppress(BrokenPipeError):
        worker.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
        worker.stdin.flush()


def answer(worker: subprocess.Popen) -> int:
    """Return the exit code of a worker's task; if the process has ended instead, its exit code, but never 0."""
    line = worker.stdout.readline()
    return int(line) if line else worker.wait() or 1


def log_of(task: Task) -> Path:
    """Return the file with the output of a task."""
    return Path(task.result).with_suffix(".log")


def reason(code: int, log: Path) -> str | None:
    """Return why a process without a result has ended; None: it ended as it should."""
    return None if code == 0 else f"its process ended with exit code {code}: see {log}"


def stop(workers: Sequence[subprocess.Popen], busy: Sequence[subprocess.Popen]) -> None:
    """End the workers: those that wait at once, the busy ones with a resume point."""
    for worker in workers:
        with suppress(BrokenPipeError):
            worker.stdin.close()
    for worker in busy:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(STOP_S if worker in busy else IDLE_STOP_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        worker.stdout.close()


def main() -> int:
    """Do the tasks of stdin, one on each line, and write the exit code of each to stdout, until one is not 0.

    What a task prints goes to its own log.
    """
    tasks, answers = os.fdopen(os.dup(0)), os.dup(1)  # no other program that is started here can use these
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for line in tasks:
        code = logged(Task(**json.loads(line)))
        os.write(answers, f"{code}\n".encode())
        if code != 0:
            return code
    return 0


def logged(task: Task) -> int:
    """Do a task, with all output in its log; return its exit code, 1 for a run that failed.

    A failed run may leave its process unusable: after some errors, every use of the GPU fails.
    """
    from lora_one.runs.sweep import run_command

    with log_of(task).open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    code = run_command(task, "continues from the last resume point")
    sys.stdout.flush()
    sys.stderr.flush()
    return code or int(json.loads(Path(task.result).read_text())["error"] is not None)


if __name__ == "__main__":
    sys.exit(main())
