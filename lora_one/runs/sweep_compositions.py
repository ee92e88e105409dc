"""Compose the jobs of a sweep quickly: the files of the same choices are read and merged once, not for each job."""

import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf


@contextmanager
def choices_composed_once() -> Iterator[None]:
    """Make Hydra compose each combination of choices (``init=lora``) once within the block.

    Hydra composes every job twice: all of them before the first one starts, and each before it runs. The files and
    their merge depend on the choices alone; the values of a job (``seed=1``) are then set in a copy. Before the first
    one starts, only jobs with a new value are composed.
    """
    original, compositions = ConfigLoaderImpl.load_sweep_config, Compositions()
    validated = Sweeper.validate_batch_is_legal

    def load(loader: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        found = compositions.composed(loader, master_config, sweep_overrides, original)
        return original(loader, master_config, sweep_overrides) if found is None else found

    def validate(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
        loader = sweeper.hydra_context.config_loader
        validated(sweeper, [job for job in batch if compositions.is_new(loader, job)])

    ConfigLoaderImpl.load_sweep_config, Sweeper.validate_batch_is_legal = load, validate
    try:
        yield
    finally:
        ConfigLoaderImpl.load_sweep_config, Sweeper.validate_batch_is_legal = original, validated


class Compositions:
    """The composed configurations of the choices so far, pickled, and what is known about overrides."""

    def __init__(self) -> None:
        self.of_choices: dict[tuple[str, ...], bytes] = {}
        self.parsed = cache(parse)
        self.groups: dict[str, bool] = {}  # key -> whether it is a group
        # (choices, keys) -> the overrides of these keys in the jobs so far
        self.values: dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]] = defaultdict(set)

    def composed(self, loader: Any, master: DictConfig, overrides: Sequence[str], compose: Any) -> DictConfig | None:
        """Return what ``compose(loader, master, overrides)`` returns; None: a job that only Hydra itself composes."""
        (jobs, choices, values), shared = self.divided(loader, overrides), [*master.hydra.overrides.hydra]
        further = any("searchpath" in text for text in shared) or master.hydra.searchpath  # folders of choices
        if further or not all(map(shareable, jobs)):
            return None
        key = (*shared, "", *choices)
        if key not in self.of_choices:
            self.of_choices[key] = pickle.dumps(compose(loader, master, list(choices)))
        found = pickle.loads(self.of_choices[key])
        ConfigLoaderImpl._apply_overrides_to_config(values, found)
        found.hydra.overrides.task = list(overrides)
        form = found.hydra.job.config.override_dirname
        found.hydra.job.override_dirname = get_overrides_dirname(jobs, form.exclude_keys, form.item_sep, form.kv_sep)
        OmegaConf.copy_cache(from_config=master, to_config=found)
        return found

    def is_new(self, loader: Any, overrides: Sequence[str]) -> bool:
        """Return whether a job has a value that no earlier one with the same choices and the same keys had.

        Hydra refuses an override for its key (unknown with these choices) or for its form, and it sets one after
        another. So a job is accepted if each of its values was accepted among the same keys; sections (``a={b: 1}``)
        are keys of their own.
        """
        jobs, choices, values = self.divided(loader, overrides)
        if not (values and all(map(shareable, jobs))):
            return True
        seen = self.values[choices, tuple(job.key_or_group for job in values)]
        new = {job.input_line for job in values if job.input_line not in seen or isinstance(job.value(), dict)}
        seen.update(new)
        return bool(new)

    def divided(self, loader: Any, overrides: Sequence[str]) -> tuple[list[Override], tuple[str, ...], list[Override]]:
        """Return the parsed overrides of a job, those that are choices as given, and those that set a value."""
        jobs = [self.parsed(text) for text in overrides]
        values = [job for job in jobs if self.sets_value(loader, job)]
        return jobs, tuple(job.input_line for job in jobs if not self.sets_value(loader, job)), values

    def sets_value(self, loader: Any, override: Override) -> bool:
        """Return whether an override sets a value, not a choice; Hydra tells them apart in the same way."""
        key = override.key_or_group
        if key not in self.groups:
            self.groups[key] = loader.repository.group_exists(key)
        return not self.groups[key] or isinstance(override.value(), dict)


def parse(text: str) -> Override:
    """Return an override as Hydra parses it. Raises OverrideParseException."""
    return OverridesParser.create().parse_overrides([text])[0]


def shareable(override: Override) -> bool:
    """Return whether an override is a choice or a value: not a sweep, a removal, or a setting of Hydra itself."""
    return not (override.is_sweep_override() or override.is_delete() or override.is_hydra_override())
