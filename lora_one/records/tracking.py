"""Log a run's metrics to metrics.jsonl and, if asked for, to W&B. A failure of W&B never stops a run."""

import csv
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_one.diagnostics import by_kind
from lora_one.errors import RunError
from lora_one.files import read_lines
from lora_one.records.folder import RunFolder

START_TIMEOUT = 60  # seconds to wait for the W&B server at the start, and for the user to type a key if W&B asks
FINISH_TIMEOUT = 60  # seconds for the remaining uploads at the end; `wandb sync` can upload the rest later


class Wandb:
    """One W&B run, or none. After the first error of W&B, which becomes a warning, W&B is not used any more."""

    def __init__(self, run: Any = None):
        self.run = run

    @classmethod
    def opened(cls, mode: str, **options: Any) -> "Wandb":
        """Start a W&B run; if it cannot start online (no network or no key, for example), start it offline."""
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=START_TIMEOUT,
            login_timeout=START_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
        )
        resume = "allow" if mode == "online" else None
        try:
            run = wandb.init(**options, mode=mode, resume=resume, settings=settings)
        except Exception as error:  # a refused tag, a full disk, no server: none of these may stop the run
            reason = " ".join(str(error).split())
            if mode == "online":
                warnings.warn(f"W&B could not start online and logs offline: {reason}", stacklevel=3)
                return cls.opened("offline", **options | {"id": None})  # W&B blocks an id whose start failed
            warnings.warn(f"W&B could not start; the run continues without it: {reason}", stacklevel=3)
            return cls()
        if mode == "online" and run.url:  # asking an offline run for its address prints a warning
            print(f"W&B: {run.url}")
        return cls(run)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step, unless W&B already has this step from before the run was resumed."""
        self._call(lambda run: run.log(metrics, step=step) if step >= run.starting_step else None)

    def log_table(self, name: str, text: str) -> None:
        """Log a CSV table; its cells are text."""
        header, *rows = csv.reader(io.StringIO(text))

        def log(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=header, data=rows)})

        self._call(log)

    def log_image(self, step: int, name: str, file: Path) -> None:
        """Log an image at a step."""

        def log(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(file))}, step=max(step, run.starting_step))  # after a resumption

        self._call(log)

    def summarize(self, entries: dict[str, Any]) -> None:
        """Set entries of the summary of the W&B run."""
        self._call(lambda run: run.summary.update(entries))

    def finish(self, exit_code: int = 0) -> None:
        self._call(lambda run: run.finish(exit_code=exit_code))
        self.run = None

    def _call(self, function: Callable[[Any], object]) -> None:
        if self.run is None:
            return
        try:
            function(self.run)
        except Exception as error:
            self.run = None
            warnings.warn(f"W&B failed; the run continues without it: {' '.join(str(error).split())}", stacklevel=4)


class Tracker:
    """Append metrics to metrics.jsonl, one line per call, and log the same to W&B; only the main process does this.

    Diagnostics of the adapters are appended to diagnostics.jsonl in the same folder, one line per step with every
    layer; W&B gets the means over the layers of each kind.
    """

    def __init__(self, path: Path, *, main_process: bool = True):
        self.path = path
        self.diagnostics = path.with_name("diagnostics.jsonl")
        self.active = main_process
        self.wandb = Wandb()

    def start_wandb(self, record: dict[str, Any], folder: Path) -> str | None:
        """Start the W&B run of a run and return its id; if W&B cannot start, warn, continue and return None.

        record: the run's run.json.
        """
        mode = record["config"]["wandb"]["mode"]
        if self.active and mode != "disabled":
            self.wandb = Wandb.opened(
                mode,
                **place_of(record),
                name=name_of(record, folder),
                job_type="train",
                dir=folder,
                id=record["wandb_id"],
                config=record["config"] | {name: record[name] for name in ("config_hash", "provenance")},
            )
        return getattr(self.wandb.run, "id", None)

    def forget_after(self, step: int) -> None:
        """Remove the lines after ``step``, from which the run is resumed.

        A W&B run that does not have the earlier steps (every offline one) gets them again.
        """
        if not self.active:
            return
        for path in (self.path, self.diagnostics):
            if path.exists():
                lines = [line for line in read_lines(path) if line["step"] <= step]
                scratch = path.with_name(f".{path.name}")
                scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
                scratch.replace(path)  # atomic: a kill before this line leaves the old file
        if self.wandb.run is not None and not self.wandb.run.resumed:
            logged = [(line["step"], grouped(line)) for line in read_lines(self.path)]
            logged += [(line["step"], _for_wandb(line["layers"])) for line in read_lines(self.diagnostics)]
            for number, line in sorted(logged, key=lambda pair: pair[0]):
                self.wandb.log(number, line)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step."""
        if not self.active:
            return
        line = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        _append(self.path, line)
        self.wandb.log(step, grouped(line))

    def log_layers(self, step: int, layers: dict[str, dict[str, Any]]) -> None:
        """Log the result of ``diagnostics.layer_diagnostics`` for each layer after a step."""
        if not self.active:
            return
        _append(self.diagnostics, {"step": step, "layers": layers})
        self.wandb.log(step, _for_wandb(layers))

    def log_image(self, step: int, name: str, file: Path) -> None:
        """Log an image to W&B."""
        self.wandb.log_image(step, name, file)

    def summarize(self, entries: dict[str, Any]) -> None:
        """Set entries of the summary of the W&B run."""
        self.wandb.summarize(entries)

    def finish(self, summary: dict[str, Any], *, exit_code: int = 0) -> None:
        self.summarize(summary)
        self.wandb.finish(exit_code)


def place_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return W&B's project, entity, group and tags for a run and its evaluations; all seeds are in one group.

    record: the run's run.json.
    """
    wandb = record["config"]["wandb"]
    return {
        "project": wandb["project"],
        "entity": wandb["entity"],
        "group": wandb["group"] or record["config_hash"][:8],
        "tags": wandb["tags"],
    }


def name_of(record: dict[str, Any], folder: Path) -> str:
    return f"{folder.parent.name}-s{record['config']['seed']}"


def log_evaluation(
    name: str | None,
    mode: str,
    task: str,
    metrics: dict[str, float],
    config: dict[str, Any],
    folder: Path,
    of_run: RunFolder | None = None,
) -> None:
    """Log the metrics of an evaluation as ``<task>/<metric>`` in a W&B run with job type eval.

    of_run: the run that trained the model, whose project, entity, group and tags are used; None: unknown.
    """
    if mode == "disabled":
        return
    config = {"task": task, **config}
    place: dict[str, Any] = {"project": "lora-one"}
    record = of_run.read() if of_run is not None else {}
    if "config_hash" in record:
        place = place_of(record)
        name = name or f"{name_of(record, of_run.path)}-{task}"
        config["run"] = {key: record.get(key) for key in ("config", "config_hash", "wandb_id")}
    run = Wandb.opened(mode, **place, name=name, job_type="eval", dir=folder, config=config)
    run.summarize({f"{task}/{metric}": value for metric, value in metrics.items()})
    run.finish()


def log_table(kind: str, name: str, text: str, record: dict[str, Any], folder: Path) -> None:
    """Log a table, as CSV, in a W&B run of job type ``kind``, in the mode and project of one of its runs.

    record: run.json of that run.
    """
    mode = record["config"]["wandb"]["mode"]
    if mode == "disabled":
        return
    place = {key: value for key, value in place_of(record).items() if key != "group"}
    run = Wandb.opened(mode, **place, name=name, job_type=kind, dir=folder)
    run.log_table(kind, text)
    run.finish()


def grouped(line: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a line of metrics.jsonl under their names in W&B, which groups charts by the first part.

    >>> grouped({"step": 3, "loss": 2.0, "eval_loss": 2.5, "eval_accuracy": 0.5, "grad_norm": 1.0})
    {'step': 3, 'losses/loss': 2.0, 'losses/eval_loss': 2.5, 'validation/eval_accuracy': 0.5, 'training/grad_norm': 1.0}
    """

    def group(name: str) -> str:
        if name in ("loss", "eval_loss"):
            return "losses/"
        return "" if name == "step" else "validation/" if name.startswith("eval_") else "training/"

    return {f"{group(name)}{name}": value for name, value in line.items()}


def _for_wandb(layers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the means over layers of one kind, in one group of charts each for angles, spectra and norms."""
    groups = {"angle": "angles", "sigma": "spectra", "norm": "norms"}
    means = by_kind(layers).items()
    return {f"{groups[name.rpartition('/')[2].split('_')[1]]}/{name}": value for name, value in means}


def _append(path: Path, line: dict[str, Any]) -> None:
    """Append a line. Raises RunError: it cannot be written; an incomplete line is removed when the run is resumed."""
    try:
        with path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): free disk space; the same command continues from the last "
            "resume point"
        ) from error


def _plain(value: Any) -> Any:
    """Return the value, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
