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
            numbered = [(number, list(job)) for number, job in enumerate(job_overrides, initial_job_idx)]
            sweep = Sweep.current()
            jobs: dict[Any, str] = {}  # submitit's job -> the overrides that differ between jobs
            with sweep.errors():
                valid = [job for job in numbered if self._valid(sweep, *job)]
                jobs = self._submit(valid)
            numbers = {job: number for job, (number, _) in zip(jobs, valid, strict=True)} if jobs else {}
            try:
                for job in slurm.wait_for(list(jobs)):
                    with sweep.job(numbers[job]):
                        outcome = slurm.outcome_of(job)
                        sweep.add_outcome(outcome)
                        print(f"{job.job_id} {jobs[job]}: {'failed' if outcome.code else 'finished'}", flush=True)
                        if outcome.code:
                            print_error(f"{job.job_id} {jobs[job]}: {slurm.last_error(job)}")
            except KeyboardInterrupt:
                slurm.not_cancelled(list(jobs))
                raise
            return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]

        def _valid(self, sweep: Sweep, number: int, overrides: list[str]) -> bool:
            """Check a job's configuration before it waits in a queue; return whether it is valid."""
            with sweep.job(number, checked_only=True):
                sweep.started_with(overrides)
                composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
                checked(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]), overrides)
                return True
            return False

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
