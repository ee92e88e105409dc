"""The jobs that a sweep consists of, from its command line, as Hydra's own sweeper orders them."""

import re
from collections import Counter
from collections.abc import Sequence

from lora_one.runs.overrides import is_override

MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
OTHER_SWEEPER = re.compile(r"[+~]*hydra/sweeper=(?!basic$)")
OF_HYDRA = re.compile(r"[+~]*hydra[./@]")  # not among the overrides of a job


def planned_jobs(arguments: Sequence[str]) -> list[dict[str, str]]:
    """Return the overrides of each job of a sweep, by key; [] without a sweep, or if they are not known in advance.

    A glob depends on the files of a group, a shuffle is drawn when Hydra starts, and another sweeper, such as Optuna's,
    chooses its jobs one after another.

    >>> planned_jobs(["-m", "init=lora,lora_one", "seed=1"])
    [{'init': 'lora', 'seed': '1'}, {'init': 'lora_one', 'seed': '1'}]
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not MULTIRUN & set(arguments):
        return []
    overrides = [argument for argument in arguments if is_override(argument) and not OF_HYDRA.match(argument)]
    if any("shuffle(" in override for override in overrides) or any(map(OTHER_SWEEPER.match, arguments)):
        return []
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except (HydraException, AssertionError):  # a mistake, which Hydra reports when it starts; a glob, which it expands
        return []
    return [by_key(job) for job in jobs]


def by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values of overrides, by key."""
    return dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)


class Differing:
    """The keys whose values differ between the jobs that were added, without ``seed``."""

    def __init__(self) -> None:
        self.jobs = 0
        self.values: dict[str, set[str]] = {}  # of each key, in the order of the command line
        self.having: Counter[str] = Counter()  # number of jobs with the key

    def add(self, job: dict[str, str]) -> None:
        """Add a job, by its overrides."""
        self.jobs += 1
        self.having.update(job.keys())
        for key, value in job.items():
            self.values.setdefault(key, set()).add(value)

    @property
    def keys(self) -> list[str]:
        """Return the keys in the order of the command line."""
        found = self.values.items()
        return [key for key, values in found if key != "seed" and (len(values) > 1 or self.having[key] < self.jobs)]


def differing(jobs: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys whose values differ between jobs, without ``seed``, in the order of the command line.

    >>> differing([{"init": "lora", "seed": "1", "a": "0"}, {"init": "lora_one", "seed": "2", "a": "0"}])
    ['init']
    """
    found = Differing()
    for job in jobs:
        found.add(job)
    return found.keys
