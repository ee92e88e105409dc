"""Where numbers go while a run goes on: metrics.jsonl, and W&B if it is wanted. Tracking never stops a run."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

from lora_one.config import RunConfig


class Tracker:
    """One line of metrics.jsonl a call, and the same to W&B. Only the main process has a live one."""

    def __init__(self, path: Path, *, main_process: bool = True):
        self.path = path
        self.active = main_process
        self.wandb_run: Any = None

    def start_wandb(self, run: RunConfig, folder: Path, config_hash: str) -> None:
        """Open the W&B run; a W&B that cannot start is a warning, not the end of the run."""
        if not self.active or run.wandb.mode == "disabled":
            return
        self.wandb_run = _wandb_run(
            project=run.wandb.project,
            entity=run.wandb.entity,
            name=f"{folder.parent.name}-s{run.seed}",
            group=run.wandb.group or config_hash[:8],
            job_type="train",
            tags=run.wandb.tags,
            mode=run.wandb.mode,
            dir=folder,
            id=f"{config_hash[:12]}-{run.seed}",
            resume="allow" if run.wandb.mode == "online" else None,
            config=run.to_dict(),
        )

    def forget_after(self, step: int) -> None:
        """Drop lines beyond ``step``: the run goes on from there."""
        if self.active and self.path.exists():
            lines = [line for line in read_metrics(self.path) if line["step"] <= step]
            scratch = self.path.with_name(f".{self.path.name}")
            scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
            scratch.replace(self.path)  # killed here, the old lines are all there

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if not self.active:
            return
        line = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log(line, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        if self.wandb_run is not None:
            self.wandb_run.summary.update(summary)
            self.wandb_run.finish()
            self.wandb_run = None


def log_evaluation(
    name: str, mode: str, task: str, metrics: dict[str, float], config: dict[str, Any], folder: Path
) -> None:
    """One W&B run of job type eval that holds an evaluation's metrics, named ``<task>/<metric>``."""
    if mode == "disabled":
        return
    run = _wandb_run(
        project="lora-one", name=name, job_type="eval", mode=mode, dir=folder, config={"task": task, **config}
    )
    if run is not None:
        run.summary.update({f"{task}/{metric}": value for metric, value in metrics.items()})
        run.finish()


def _wandb_run(**options: Any) -> Any:
    """An open W&B run, or None: one that cannot start is a warning, not the end of the work."""
    import wandb

    try:
        return wandb.init(**options, settings=wandb.Settings(silent=True, console="off"))
    except Exception as error:  # a refused tag, a full disk, no server: whatever it is, the work matters more
        warnings.warn(f"W&B could not start, the work goes on without it: {error}", stacklevel=3)
        return None


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; none where there is no file. A last line that a crash cut short is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    return [json.loads(line) for line in lines]
