"""The YAML file of a comparison: methods, grids and seeds, which are checked before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_one.config import refuse_unknown
from lora_one.errors import UsageError, nearest
from lora_one.reports.compare import Grid

# keys that, like those of the data, must be the same for every method: amount of training and evaluation
SAME = {"seed", "results_dir", "overwrite", "dry_run"} | {
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
    )
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
    grid: dict[str, list[float]]  # key -> values, for every method
    methods: dict[str, list[str]]  # name -> overrides
    own_grid: dict[str, dict[str, list[float]]] = field(
        default_factory=dict
    )  # method -> keys that replace or extend its grid
    not_run: dict[str, str] = field(default_factory=dict)  # name -> reason why the method cannot run here
    seconds_per_run: float | None = None  # measured time of a run with training, for the estimate of a dry run

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
        return replace(self, methods={name: self.methods[name] for name in names}, not_run={})


def read_comparison(path: Path) -> Comparison:
    """Read and check a comparison file. Raises UsageError: no such file, not YAML, an invalid key or value."""
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
    refuse_unknown("", given, Comparison)
    comparison = Comparison(**given)
    check_comparison(comparison)
    return comparison


def check_comparison(comparison: Comparison) -> None:
    """Check every entry. Raises UsageError: an entry is not valid; the first one is named."""
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
    if not isinstance(comparison.test_examples, int) or comparison.test_examples < 1:
        raise UsageError(f"test_examples={comparison.test_examples!r} must be at least 1")
    if not comparison.methods:
        raise UsageError("methods={} contains no method: add <name>: [<overrides>]")
    for name in comparison.own_grid:
        if name not in comparison.methods:
            raise UsageError(f"own_grid.{name} is not a method of this comparison; {nearest(name, comparison.methods)}")
    for name in comparison.methods:
        check_grid(comparison, name)


def check_grid(comparison: Comparison, method: str) -> None:
    """Check a method's grid. Raises UsageError: not lists of different numbers, or not as long as those of others."""
    for key, values in comparison.grid_of(method).items():
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or not values or len(set(values)) < len(values):
            raise UsageError(f"grid of {method}: {key}={values!r} must be a list of different numbers")
        if is_same_for_all(key):
            raise UsageError(f"grid of {method}: {key} must be the same for every method; move it to common")
        shared = comparison.grid.get(key, values)
        if len(values) != len(shared):
            raise UsageError(
                f"grid of {method}: {len(values)} values of {key}, but {len(shared)} for the other methods; every "
                "method must be tuned over the same number"
            )


def is_same_for_all(key: str) -> bool:
    """Return whether a key must have the same value for every method and grid point."""
    return key in SAME or key.startswith("dataset.")
