"""Disturb a SLURM array of short runs, and check that every run is finished exactly once, with undisturbed results.

python scripts/slurm_campaign.py --jobs 40 --disturbances 20 --seed 1

Starts a SLURM of two nodes on this machine (as root; apt-get install slurm-wlm munge) and submits a sweep as one array.
While it runs, at random times: a signal to a running job (scancel --signal: USR1, USR2, TERM or KILL), or a node that
goes down and comes back; when half of the runs are finished, slurmctld is restarted. What did not finish is submitted
again by the same command, until nothing is missing. Printed: what was done, and the comparison with a sweep of the same
runs that was not disturbed. Exit code 1: a run differs, was not finished, or was finished twice.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from campaign.slurm_cluster import Cluster, cluster, why_not

ROOT = Path(__file__).resolve().parents[1]
RUN = [
    "wandb.mode=disabled",
    "dataset.cache=null",
    "dataset.train_size=24",
    "dataset.validation_size=4",
    "dataset.accuracy_examples=0",
    "model.real_batch_size=8",
    "model.per_device_batch_size=8",
    "model.epochs=5",
    "model.eval_epochs=5",
    "model.save_steps=3",
]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
SIGNALS = ("USR1", "USR2", "TERM", "KILL")
PAUSE_S = (4.0, 12.0)  # between two disturbances
LOSSES = ("step", "loss", "eval_loss")
ROUNDS = 6


@dataclass
class Disturber:
    """Draws what happens to the jobs of an array: as many disturbances per finished run as were asked for.

    seeds: those of the jobs of the array, in the order of their numbers.  done: the kinds of what was done.
    """

    slurm: Cluster
    draw: random.Random
    most: int
    runs: int
    results: Path
    seeds: Sequence[int] = ()
    began: float = field(default_factory=time.monotonic)
    done: list[str] = field(default_factory=list)

    def disturb(self) -> None:
        """Do one thing to a job, to a node or to the controller; nothing if no job runs, or if enough was done."""
        lines = self.slurm.ask("squeue", "-h", "-r", "-t", "R", "-o", "%i %N").splitlines()
        running = dict(line.split() for line in lines)
        ended = len(finished(self.results))
        if "restart" not in self.done and ended >= self.runs / 2:
            self.slurm.restart_controller()
            self.note("restart", "slurmctld restarted")
        elif running and len(self.done) < min(self.most, self.most * (ended + 4) / self.runs):
            if self.draw.random() < 0.2:
                self.lose_node(self.draw.choice(sorted(running.values())), running)
            else:
                training = [job for job in running if self.steps(job)]  # most of the time goes into imports
                jobs = training if training and self.draw.random() < 0.75 else sorted(running)
                job, name = self.draw.choice(jobs), self.draw.choice(SIGNALS)
                self.slurm.ask("scancel", f"--signal={name}", job)
                self.note(f"SIG{name}", f"SIG{name} to {job} after {self.steps(job)} steps")

    def lose_node(self, node: str, running: dict[str, str]) -> None:
        """Take a node down, and bring it back after two seconds."""
        self.slurm.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=campaign")
        lost = [job for job, where in running.items() if where == node]
        self.note("node down", f"node {node} down, with {', '.join(lost)}")
        time.sleep(2)
        self.slurm.ask("scontrol", "update", f"nodename={node}", "state=resume")

    def steps(self, job: str) -> int:
        """Return how many steps the run of a job has in its metrics."""
        files = list(self.results.glob(f"*/*/{self.seeds[int(job.partition('_')[2])]}/metrics.jsonl"))
        return files[0].read_text().count('"loss"') if files else 0

    def start_requeued(self) -> None:
        """Let jobs that are in the queue again start in 5 seconds instead of in 2 minutes."""
        soon = datetime.now() + timedelta(seconds=20)
        for line in self.slurm.ask("squeue", "-h", "-r", "-t", "PD", "-o", "%i %S %r").splitlines():
            job, start, reason = line.split(maxsplit=2)
            if "held" in reason.lower():  # a node was lost while the job was started on it
                self.slurm.ask("scontrol", "release", job)
            elif reason == "BeginTime" and start != "N/A" and datetime.fromisoformat(start) > soon:
                self.slurm.ask("scontrol", "update", f"jobid={job}", "StartTime=now+5")

    def note(self, kind: str, text: str) -> None:
        self.done.append(kind)
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def follow(self, command: subprocess.Popen) -> None:
        """Disturb until the command ends."""
        due = time.monotonic() + self.draw.uniform(*PAUSE_S)
        while command.poll() is None:
            time.sleep(1)
            self.start_requeued()
            if time.monotonic() > due:
                self.disturb()
                due = time.monotonic() + self.draw.uniform(*PAUSE_S)


def sweep(seeds: Sequence[int], results: Path, *options: str) -> list[str]:
    """Return the command of a sweep over seeds."""
    seed = f"seed={','.join(map(str, seeds))}"
    return [sys.executable, "run_exp.py", "-m", *options, *RUN, seed, f"results_dir={results}"]


def folders(results: Path) -> Iterator[tuple[int, Path]]:
    """Yield (seed, folder) of each run."""
    for file in results.glob("*/*/*/run.json"):
        yield int(file.parent.name), file.parent


def finished(results: Path) -> set[int]:
    """Return the seeds of the finished runs."""
    records = ((seed, json.loads((run / "run.json").read_text())) for seed, run in folders(results))
    return {seed for seed, record in records if record.get("status") == "finished"}


def results_of(results: Path) -> dict[int, Any]:
    """Return the adapter and the losses of each run, by seed."""
    found = {}
    for seed, run in folders(results):
        if not (run / "adapter").exists():
            continue
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{key: line[key] for key in LOSSES if key in line} for line in lines]
        found[seed] = ((run / "adapter/adapter_model.safetensors").read_bytes(), kept)
    return found


def times_finished(results: Path) -> Counter[int]:
    """Return how often each run ended with its results, in the logs of all jobs."""
    logs = [file.read_text() for file in results.glob(".submitit/*/*_log.out")]
    lines = [line for log in logs for line in log.splitlines()]
    ends = Counter(line.partition("run: ")[2] for line in lines if line.startswith("run: "))
    known = Counter(line.split()[2] + "/run.json" for line in lines if line.startswith("already finished: "))
    return Counter({int(Path(file).parent.name): count - known[file] for file, count in ends.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--disturbances", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="of runs and logs, kept; default: a temporary one")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"error: {reason}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="slurm-"))
    results, straight, seeds = folder / "array", folder / "straight", range(1, options.jobs + 1)
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
    began, rounds = time.monotonic(), 0
    undisturbed = subprocess.Popen(sweep(seeds, straight), env=os.environ | own, **quiet)
    with undisturbed, cluster(folder / "slurm") as slurm:
        disturber = Disturber(slurm, random.Random(options.seed), options.disturbances, options.jobs, results)
        while (missing := sorted(set(seeds) - finished(results))) and rounds < ROUNDS:
            rounds, disturber.seeds = rounds + 1, missing
            print(f"array {rounds}: {len(missing)} runs", flush=True)
            command = sweep(missing, results, *SLURM, "hydra.launcher.array_parallelism=4")
            with subprocess.Popen(command, env=slurm.environment | own, **quiet) as running:
                disturber.follow(running)
    return report(options, disturber.done, rounds, time.monotonic() - began, results, straight)


def report(
    options: argparse.Namespace, done: list[str], rounds: int, seconds: float, results: Path, straight: Path
) -> int:
    """Print what was done and what became of the runs; return the exit code."""
    expected, missing = results_of(straight), set(range(1, options.jobs + 1)) - finished(results)
    found = {seed: content for seed, content in results_of(results).items() if seed not in missing}
    differing = sorted(seed for seed, content in found.items() if content != expected[seed])
    twice = sorted(seed for seed, count in times_finished(results).items() if count > 1)
    events = ", ".join(f"{kind} {count}" for kind, count in Counter(done).most_common())
    print(
        f"seed {options.seed}: {options.jobs} runs, {len(done)} disturbances ({events}), {rounds} arrays, "
        f"{seconds:.0f} s:\n"
        f"{len(missing)} missing {sorted(missing) or ''}, {len(twice)} finished twice {twice or ''}, {len(differing)} "
        f"differ {differing or ''}"
    )
    return int(bool(missing or twice or differing))


if __name__ == "__main__":
    sys.exit(main())
