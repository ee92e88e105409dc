"""The runs of a comparison as an array of SLURM jobs."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_one.errors import RunError
from lora_one.runs.comparison_workers import Ended, Task, Workers


class SlurmArray(Workers):
    """Submits the tasks of each stage as one array of SLURM jobs, and waits for them.

    parameters: those of conf/hydra/launcher/slurm.yaml.
    """

    def __init__(self, output: Path, parameters: Mapping[str, Any]):
        super().__init__(output)
        self.parameters = {**parameters, "submitit_folder": str(self.folder / "%j")}

    def ended(self, tasks: Sequence[Task]) -> Iterator[Ended]:
        from lora_one.runs import slurm

        began = time.monotonic()
        submitted = slurm.submit(submitted_task, [(task,) for task in tasks], self.parameters)
        try:
            for job in slurm.wait_for(submitted):
                error = None
                try:
                    slurm.outcome_of(job)
                except RunError as failure:
                    error = str(failure)
                yield submitted.index(job), time.monotonic() - began, error
        except KeyboardInterrupt:
            slurm.not_cancelled(submitted)
            raise


def submitted_task(task: Task) -> object:
    """Do a task in a SLURM job; before a time limit it writes a resume point and is queued again."""
    from lora_one.runs import cli

    return cli.run_submitted(task)
