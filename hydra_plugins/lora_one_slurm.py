"""``hydra/launcher=slurm``: submit the jobs of a sweep as one SLURM array, through submitit."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from lora_one.runs import cli, slurm
from lora_one.runs.composition import checked
from lora_one.runs.sweep import Outcome, Sweep, print_error

if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher"):  # otherwise cli.check_launcher refuses it
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    class ArrayLauncher(SlurmLauncher):
        """Submit the jobs, wait for them, and add their results to the sweep, like those of local jobs.

        A job that fails, or that SLURM ends, does not stop the others. A job that is requeued is waited for.
        """

        def __call__(self, overrides: list[str], *rest: Any) -> Outcome:
            """Run one job; submitit calls this in a separate process on a compute node."""
            return cli.run_submitted(lambda: super(ArrayLauncher, self).__call__(overrides, *rest))

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            sweep = Sweep.current()
            jobs: dict[Any, str] = {}  # submitit's job -> the overrides that differ between jobs
            equal: list[list[int]] = []  # the numbers of equal runs: only the first of them is submitted
            with sweep.errors():
                calls = dict(enumerate(map(list, job_overrides), initial_job_idx))
                equal = self._valid(sweep, calls)
                jobs = self._submit([(same[0], calls[same[0]]) for same in equal])
            numbers = dict(zip(jobs, equal, strict=True)) if jobs else {}
            try:
                for job in slurm.wait_for(list(jobs)):
                    for number in numbers[job]:
                        with sweep.job(number):
                            outcome = slurm.outcome_of(job)
                            sweep.add_outcome(outcome)
                            if number != numbers[job][0]:
                                continue
                            print(f"{job.job_id} {jobs[job]}: {'failed' if outcome.code else 'finished'}", flush=True)
                            if outcome.code:
                                print_error(f"{job.job_id} {jobs[job]}: {slurm.last_error(job)}")
            except KeyboardInterrupt:
                slurm.not_cancelled(list(jobs))
                raise
            return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]

        def _valid(self, sweep: Sweep, calls: dict[int, list[str]]) -> list[list[int]]:
            """Check the jobs' configurations before they wait in a queue; return the numbers of the valid, equal ones.

            calls: the overrides of each job.
            """
            found: dict[str, list[int]] = {}
            for number, overrides in calls.items():
                with sweep.job(number, checked_only=True):
                    sweep.started_with(overrides)
                    composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
                    run = checked(
                        OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]), overrides
                    )
                    found.setdefault(repr(run), []).append(number)
            return list(found.values())

        def _submit(self, numbered: Sequence[tuple[int, list[str]]]) -> dict[Any, str]:
            """Submit the jobs; return {job: name}. Raises UsageError, RunError: see ``slurm.submit``."""
            from hydra.core.singleton import Singleton

            if not numbered:
                return {}
            calls = [(job, "hydra.sweep.dir", number, str(number), Singleton.get_state()) for number, job in numbered]
            jobs = slurm.submit(self, calls, self.params)
            common = set.intersection(*(set(job) for _, job in numbered)) if len(numbered) > 1 else set()
            names = [" ".join(part for part in job if part not in common) for _, job in numbered]
            return dict(zip(jobs, names, strict=True))
