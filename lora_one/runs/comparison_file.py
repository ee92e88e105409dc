"""The YAML file of a comparison: methods, grids and seeds, which are checked before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from lora_one.config import unknown_key
from lora_one.config.defaults import configuration_folder
from lora_one.errors import UsageError, nearest
from lora_one.reports.compare import RATE, Grid, grid_points, is_number
from lora_one.runs.comparison_keys import EXAMPLE, check_kinds, check_names, check_tasks, joined, small_trial
from lora_one.runs.comparison_scores import Evaluation, check_evaluation, evaluated, evaluations_of
from lora_one.runs.published_values import Published, check_published, published_of

# keys that, like those of the data, must be the same for every method: amount of training and evaluation
SAME = {"seed", "results_dir", "overwrite", "dry_run", "process_timeout_s"} | {
    f"model.{key}"
    for key in (
        "name",
        "type",
        "revision",
        "bf16",
        "epochs",
        "real_batch_size",
        "max_length",
        "loss",
        "eval_epochs",
        "early_stopping_patience",
        "seed",
        "order_seed",
    )
}


REQUIRED = {  # key -> an example of its value
    "title": "<text>",
    "common": "[model=<name>, dataset=<name>]",
    "test": "[dataset.path=<test file>]",
    "test_examples": "200",
    "tuning_seeds": "[1]",
    "seeds": "[11, 12, 13]",
    "grid": "{model.learning_rate: [1e-4, 3e-4, 1e-3]}",
    "methods": "{<name>: [init=<choice>], <other>: [init=<choice>]}",
}


@dataclass(frozen=True)
class Comparison:
    """The content of a comparison file. Overrides are those of run_exp.py; later ones replace earlier ones."""

    title: str
    common: list[str]  # overrides of every run
    test: list[str]  # overrides after the common ones; they select the test data, for the reported loss
    test_examples: int  # number of test examples, the first ones of the test data
    tuning_seeds: list[int]
    seeds: list[int]
    grid: dict[str, list[Any]]  # key -> values, for every method
    methods: dict[str, list[str]]  # name -> overrides
    own_grid: dict[str, dict[str, list[Any]]] = field(
        default_factory=dict
    )  # method -> keys that replace or extend its grid
    not_run: dict[str, str] = field(default_factory=dict)  # name -> reason why the method was not run
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # name of the figure -> benchmark
    baseline: str | None = None  # the method that the others are tested against; None: no verdicts
    published: Published | None = None  # values of a paper, for columns beside the evaluations
    refine: int = 0  # rounds of two further learning rates each, for every method; see reports.compare.further_points
    extend: int = 2  # at most so many more rounds, until the best rate of each method had ``refine`` between neighbours
    unequal_budgets: str | None = None  # the reason why methods are tuned over different numbers of points
    shared_seeds: str | None = None  # the reason why reported seeds are also tuning seeds
    overlap: str | None = None  # the reason why test examples may be training or validation examples too
    jobs: int = 1  # runs side by side on this machine
    launcher: str | None = None  # slurm: the runs of a stage are an array of SLURM jobs
    slurm: dict[str, Any] = field(default_factory=dict)  # keys of conf/hydra/launcher/slurm.yaml
    seconds_per_run: float | None = None  # measured time of a run with training, for the estimate of a dry run
    left_out: list[str] = field(default_factory=list)  # methods that are compared elsewhere, or that --only left out

    def grid_of(self, method: str) -> Grid:
        """Return the grid of a method: the common one with the method's own keys."""
        return self.grid | self.own_grid.get(method, {})

    def only(self, names: Sequence[str] | None) -> "Comparison":
        """Return the comparison restricted to these methods; None: all. Raises UsageError: an unknown method."""
        for name in names or ():
            if name not in self.methods:
                raise UsageError(f"--only={name} is not a method of this comparison; {nearest(name, self.methods)}")
        if names is None:
            return self
        baseline = self.baseline if self.baseline in names else None
        left_out = [*self.left_out, *(name for name in self.methods if name not in (*names, self.baseline))]
        methods = {name: self.methods[name] for name in names}
        return replace(self, methods=methods, not_run={}, baseline=baseline, left_out=left_out)


def read_comparisons(path: Path, *, small: bool = False) -> dict[str, Comparison]:
    """Read and check a comparison file: task -> comparison; without the key ``tasks``, one task with the name "".

    A task has keys of the file: ``common`` comes after that of the file, mappings are merged, others replace.
    small: the keys in ``small``, of the file and then of the task, replace the others; ``common`` comes after theirs.
    Raises UsageError: no such file, not YAML, an invalid key or value, or small without such a key.
    """
    try:
        given = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): pass the YAML file of a comparison") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not valid YAML ({' '.join(str(error).split())}): see the examples in scripts/comparisons/"
        ) from error
    if not isinstance(given, dict):
        raise UsageError(f"{path} contains no keys: see the examples in scripts/comparisons/")
    tasks = given.pop("tasks", None) or {"": {}}
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise UsageError(f"tasks={tasks!r} must be a mapping, for example <name>: {{common: [dataset=<name>]}}")
    check_tasks(tasks)
    comparisons = {}
    for name, task in tasks.items():
        try:
            comparisons[name] = comparison_of(path, given, task, small=small)
        except UsageError as error:
            raise UsageError(f"task {name}: {error}" if name else str(error)) from error
        if name:
            comparisons[name] = replace(comparisons[name], title=f"{comparisons[name].title}: {name}")
    return comparisons


def comparison_of(path: Path, file: dict[str, Any], task: dict[str, Any], *, small: bool = False) -> Comparison:
    """Return the comparison of one task, checked; small: with the keys in ``small``. Raises UsageError."""
    known = list(Comparison.__dataclass_fields__)
    for key in (*file, *task):
        if key not in (*known, "small"):
            raise unknown_key(key, [*known, "small", "tasks"])
    given = joined(file, task)
    changes = given.pop("small", None)
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise UsageError(f"{path} has no key {missing[0]}: add it, for example {missing[0]}: {REQUIRED[missing[0]]}")
    comparison = checked(given)
    if changes is None:
        if small:
            raise UsageError(f"--small needs the key small, which {path} does not have: add small: {EXAMPLE}")
        return comparison
    try:
        trial = checked(small_trial(given, changes, known))  # checked even if not asked for: mistakes are found early
    except UsageError as error:
        raise UsageError(f"small: {error}") from error
    return trial if small else comparison


def checked(given: dict[str, Any]) -> Comparison:
    """Return the comparison with these keys. Raises UsageError: one is not valid."""
    given = {key: value for key, value in given.items() if value is not None or key in REQUIRED}
    check_kinds(given)
    parts = {"evaluations": evaluations_of(given.get("evaluations", {}))}
    comparison = Comparison(**given | parts | {"published": published_of(given.get("published"))})
    check_comparison(comparison)
    return comparison


def check_comparison(comparison: Comparison) -> None:
    """Check every entry. Raises UsageError: an entry is not valid; the first one is named."""
    check_names(comparison.methods, comparison.evaluations, comparison.not_run)
    lists = {"common": comparison.common, "test": comparison.test}
    lists |= {f"methods.{name}": overrides for name, overrides in comparison.methods.items()}
    for key, overrides in lists.items():
        if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
            raise UsageError(f"{key}={overrides!r} must be a list of overrides, for example [init=gradient]")
    for key in ("tuning_seeds", "seeds"):
        seeds = getattr(comparison, key)
        valid = isinstance(seeds, list) and all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
        if not valid or not seeds or len(set(seeds)) < len(seeds):
            raise UsageError(f"{key}={seeds!r} must be a list of different integers in [0, 2^32)")
    check_shared_seeds(comparison)
    if not isinstance(comparison.test_examples, int) or comparison.test_examples < 1:
        raise UsageError(f"test_examples={comparison.test_examples!r} must be at least 1")
    for key in ("refine", "extend"):
        if type(rounds := getattr(comparison, key)) is not int or rounds < 0:
            raise UsageError(f"{key}={rounds!r} must be a number of rounds, 0 or more")
    if not comparison.methods:
        raise UsageError("methods={} contains no method: add <name>: [<overrides>]")
    for name in comparison.own_grid:
        if name not in comparison.methods:
            raise UsageError(f"own_grid.{name} is not a method of this comparison; {nearest(name, comparison.methods)}")
    for name in comparison.methods:
        check_grid(comparison, name)
        if comparison.refine and len(comparison.grid_of(name).get(RATE, [])) < 2:
            raise UsageError(f"refine={comparison.refine} needs at least two values of {RATE} in the grid of {name}")
    if not isinstance(comparison.left_out, list) or set(map(str, comparison.left_out)) & set(comparison.methods):
        raise UsageError(
            f"left_out={comparison.left_out!r} must be a list of methods that this comparison does not run"
        )
    check_budgets(comparison)
    check_launcher(comparison)
    if comparison.baseline is not None and comparison.baseline not in comparison.methods:
        known = nearest(comparison.baseline, comparison.methods)
        raise UsageError(f"baseline={comparison.baseline} is not a method of this comparison; {known}")
    for name, evaluation in evaluated(comparison.evaluations).items():
        check_evaluation(name, evaluation)
    check_published(comparison.published, comparison.evaluations, comparison.methods, comparison.not_run)


def check_grid(comparison: Comparison, method: str) -> None:
    """Check a method's grid. Raises UsageError: not lists of different values, or not as long as those of others."""
    for key, values in comparison.grid_of(method).items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise UsageError(f"grid of {method}: {key}={values!r} must be a list of different values")
        if any(isinstance(value, dict) for value in values):
            raise UsageError(f"grid of {method}: {key}={values!r} must be a list of values, not of mappings")
        if key == RATE and not all(is_number(value) for value in values):
            raise UsageError(f"grid of {method}: {key}={values!r} must be a list of numbers")
        if key == RATE and comparison.refine and min(values) <= 0:
            raise UsageError(f"grid of {method}: {key}={values!r} must be above 0, because refine multiplies them")
        if is_same_for_all(key):
            raise UsageError(f"grid of {method}: {key} must be the same for every method; move it to common")
        shared = comparison.grid.get(key, values)
        if len(values) != len(shared):
            raise UsageError(
                f"grid of {method}: {len(values)} values of {key}, but {len(shared)} for the other methods; every "
                "method must be tuned over the same number"
            )


def check_budgets(comparison: Comparison) -> None:
    """Raise UsageError if methods are tuned over different numbers of points, and the file does not say why."""
    points = {name: len(grid_points(comparison.grid_of(name))) for name in comparison.methods}
    most, least = (pick(points, key=points.get) for pick in (max, min))
    if points[most] != points[least] and not comparison.unequal_budgets:
        raise UsageError(
            f"{most} is tuned over {points[most]} points and {least} over {points[least]}: give every method the same "
            "number, or say in unequal_budgets: <reason> why they differ, which is printed with the table"
        )


def check_shared_seeds(comparison: Comparison) -> None:
    """Raise UsageError if a reported seed also chooses the points, and the file does not say why."""
    shared = sorted(set(comparison.seeds) & set(comparison.tuning_seeds))
    if shared and not comparison.shared_seeds:
        raise UsageError(
            f"seeds={comparison.seeds} and tuning_seeds={comparison.tuning_seeds} share {', '.join(map(str, shared))}: "
            "a method would be reported on the run for which it was chosen; use other seeds, for example seeds: "
            "[11, 12, 13], or say in shared_seeds: <reason> why, which is printed with the table"
        )


def check_launcher(comparison: Comparison) -> None:
    """Raise UsageError if jobs, launcher or slurm is not valid."""
    if type(comparison.jobs) is not int or comparison.jobs < 1:
        raise UsageError(f"jobs={comparison.jobs!r} must be a number of runs side by side, 1 or more")
    if comparison.launcher not in (None, "slurm"):
        raise UsageError(f"launcher={comparison.launcher!r} is not a launcher; valid: slurm")
    if comparison.launcher and comparison.jobs > 1:
        raise UsageError(
            f"jobs={comparison.jobs} and launcher={comparison.launcher} exclude each other: set "
            "slurm.array_parallelism=<number> instead of jobs"
        )
    known = slurm_defaults()
    for key in comparison.slurm:
        if key not in known:
            raise unknown_key(f"slurm.{key}", known)
    processes = [comparison.slurm.get(key) or known[key] for key in ("nodes", "tasks_per_node")]
    if comparison.launcher and evaluated(comparison.evaluations) and processes != [1, 1]:
        raise UsageError(
            f"slurm.nodes={processes[0]} and slurm.tasks_per_node={processes[1]} start several processes for each run, "
            "which evaluations in a comparison do not support: set both to 1, or leave out evaluations"
        )


def slurm_defaults() -> dict[str, Any]:
    """Return the parameters of conf/hydra/launcher/slurm.yaml."""
    content = safe_load((configuration_folder() / "hydra/launcher/slurm.yaml").read_text())
    return {key: value for key, value in content.items() if key not in ("_target_", "submitit_folder")}


def is_same_for_all(key: str) -> bool:
    """Return whether a key must have the same value for every method and grid point."""
    return key in SAME or key.startswith("dataset.")
