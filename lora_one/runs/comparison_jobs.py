"""The runs of a comparison: every grid point of every method, then the best point with every seed, and its start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lora_one.config import RunConfig
from lora_one.config.rules import flatten
from lora_one.errors import UsageError
from lora_one.records.folder import LocatedRun, RunFolder, folder_of, locate
from lora_one.reports.compare import Point, is_number, value_text
from lora_one.runs.comparison_file import Comparison, is_same_for_all

Compose = Callable[[Sequence[str]], RunConfig]

FORBIDDEN = {"dry_run": "use --dry-run", "overwrite": "delete the folders of the runs that should run again"}


@dataclass(frozen=True)
class Job:
    """A planned run: its configuration and folder, or the error that prevents it."""

    method: str
    stage: str
    point: Point
    seed: int
    config: RunConfig | None = None
    folder: RunFolder | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.folder is not None and self.folder.finished

    def __str__(self) -> str:
        values = "".join(f", {key.rpartition('.')[2]} {value_text(value)}" for key, value in self.point.items())
        return f"{self.method}{values}, seed {self.seed}" + (", start" if self.stage == "start" else "")


class Jobs:
    """Create the jobs of a comparison. Raises UsageError: the common overrides cannot be composed."""

    def __init__(self, comparison: Comparison, compose: Compose):
        self.comparison, self.compose = comparison, compose
        self.shared = compose(comparison.common)
        self.located: dict[tuple[str, str], LocatedRun] = {}
        for key, instead in FORBIDDEN.items():
            if getattr(self.shared, key):
                raise UsageError(f"{key}=true is not allowed in a comparison: {instead}")

    def configured(self, method: str, point: Point) -> RunConfig:
        """Return the configuration of a method at a grid point.

        Raises UsageError: it is not valid, or its data, amount of training or evaluation differ from the others'.
        """
        values = [
            f"{key}={value!r}" if is_number(value) else f"{key}={value_text(value)}" for key, value in point.items()
        ]
        run = self.compose([*self.comparison.common, *self.comparison.methods[method], *values])
        given, shared = flatten(run.to_dict()), flatten(self.shared.to_dict())
        for key in sorted(given.keys() | shared.keys()):
            if is_same_for_all(key) and given.get(key) != shared.get(key):
                raise UsageError(
                    f"{method} has {key}={given.get(key)}, the others {shared.get(key)}: it must be the same for every "
                    "method; move it to common"
                )
        return run

    def tuning(self, method: str, points: Sequence[Point]) -> list[Job]:
        """Return the jobs of these points with every tuning seed."""
        jobs = []
        for point in points:
            seeds = self.comparison.tuning_seeds
            try:
                jobs += [self.at(method, "tuning", point, seed) for seed in seeds]
            except UsageError as error:
                jobs += [Job(method, "tuning", point, seed, error=str(error)) for seed in seeds]
        return jobs

    def final(self, method: str, chosen: Point) -> list[Job]:
        """Return the jobs of the chosen grid point with every seed. Raises UsageError: it is not valid."""
        return [self.at(method, "final", chosen, seed) for seed in self.comparison.seeds]

    def at(self, method: str, stage: str, point: Point, seed: int) -> Job:
        """Return one job; that of the stage ``start`` exists after the final one has finished. Raises UsageError."""
        if stage == "start":
            return start_of(self.at(method, "final", point, seed))
        key = (method, str(point))
        if key not in self.located:  # hashes the model, which takes seconds; the seed is not part of the hash
            self.located[key] = locate(self.configured(method, point))
        run = replace(self.located[key].run, seed=seed)
        return Job(method, stage, point, seed, run, RunFolder(folder_of(run, self.located[key].config_hash)))


def start_of(trained: Job) -> Job:
    """Return the job of the same run without training.

    A step size that depends on the warm-up is taken from the trained run, because it would differ without training.
    """
    run = replace(trained.config, model=replace(trained.config.model, epochs=0.0))
    eta = trained.folder.read()["init"].get("eta")
    if eta is not None:
        run = replace(run, init=run.init.completed(lambda: eta))
    located = locate(run)
    return Job(trained.method, "start", trained.point, run.seed, located.run, located.folder)
