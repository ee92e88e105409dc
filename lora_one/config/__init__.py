"""Typed, frozen settings: the composed configuration is converted to a RunConfig before anything is loaded.

Each group has one dataclass (schemas.py); ``init`` (methods/), ``optimizer`` (optimizers.py) and ``dataset`` have one
for each choice, so a key that the choice does not read is refused as unknown. rules.py checks the values. This package
does not import torch, so ``--help`` stays fast.
"""

import copy
import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from lora_one.config.aliases import PUBLISHED_KEYS, published_form, translated
from lora_one.config.methods import METHODS, MethodSettings
from lora_one.config.optimizers import OPTIMIZERS, OptimizerConfig
from lora_one.config.rules import check
from lora_one.config.schemas import (
    ModelConfig,
    PeftConfig,
    PlanConfig,
    WandbConfig,
)
from lora_one.config.suggestions import meant
from lora_one.datasets import DATASETS
from lora_one.errors import UsageError, nearest


@dataclass(frozen=True)
class RunConfig:
    dataset: Any
    peft: PeftConfig
    init: MethodSettings
    model: ModelConfig
    optimizer: OptimizerConfig
    wandb: WandbConfig
    plan: PlanConfig
    seed: int
    results_dir: str
    overwrite: bool
    dry_run: bool
    process_timeout_s: float

    @classmethod
    def from_hydra(cls, composed: DictConfig) -> "RunConfig":
        """Convert the composed configuration, checking every key, type and value.

        If the method trains an r x r core, ``peft.lora_xs`` is set; if it has s = 1, alpha is set to r. A null
        ``init.scale`` is replaced by the method's default.

        Raises UsageError: an unknown key, a value of the wrong type or out of its range, or values that contradict each
        other.
        """
        try:
            given = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise UsageError(_missing(error)) from error
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "configuration"
            raise UsageError(f"{key}: {first_line(error)}; set a value, or ${{<key>}} with an existing key") from error
        given.pop("hydra", None)
        refuse_unknown("", given, cls, known_keys)
        sections: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name == "init":
                sections["init"] = method_settings(given["init"])
                continue
            schema = schema_of(field.name, given[field.name])
            if schema is None:
                sections[field.name] = given[field.name]
                continue
            refuse_unknown(f"{field.name}.", given[field.name], schema, known_keys)
            sections[field.name] = converted(f"{field.name}.", given[field.name], schema)
        converted("", {field.name: sections[field.name] for field in dataclasses.fields(PlainValues)}, PlainValues)
        run = cls(**sections)
        check(run)
        return with_core(run)

    def to_dict(self) -> dict[str, Any]:
        """Return the run as nested dictionaries."""
        return dataclasses.asdict(self)

    def published(self) -> dict[str, Any]:
        """Return the run as a dictionary in the published spelling, from which the run's hash is computed.

        The number of the search's examples is given where it depends on the kind of model.
        """
        init = published_form(self.init)
        if self.further_examples > self.init.further_examples:
            init["search_examples"] = self.further_examples
        return self.to_dict() | {"init": init}

    @property
    def further_examples(self) -> int:
        """Return how many further training examples the search for the scale uses, if there are that many."""
        further, asked = self.init.further_examples, self.init.required_further
        return self.model.kind.searched(further) if further > asked else further

    @property
    def training_seed(self) -> int:
        """Return the seed of dropout and of a new classification head."""
        return self.seed if self.model.seed is None else self.model.seed

    @property
    def init_seed(self) -> int:
        """Return the seed of the initialisation: of its random factors and of the examples that it draws."""
        return self.seed if self.init.seed is None else self.init.seed

    @property
    def order_seed(self) -> int:
        """Return the seed of the order of the training examples."""
        return self.seed if self.model.order_seed is None else self.model.order_seed


PlainValues = dataclasses.make_dataclass(  # the values of a RunConfig that belong to no group
    "PlainValues",
    [(field.name, field.type) for field in dataclasses.fields(RunConfig) if field.type in (int, float, str, bool)],
)
structured = cache(OmegaConf.structured)  # merged into copies
MANY = 10_000
_conversions: dict[tuple[type, str, str], Any] = {}  # (settings, key, value as given) -> value


def method_settings(given: dict[str, Any]) -> MethodSettings:
    """Return the settings of an initialisation, given in either spelling, with defaults in place of null.

    Raises UsageError: an unknown method or key, a value of the wrong type, or a key that the method does not read.
    """
    given = translated(given)
    name = given.get("method")
    if name not in METHODS:
        raise UsageError(f"init.method={name} is not an initialisation; {nearest(name, METHODS)}")
    refuse_unknown("init.", given, METHODS[name], known_keys)
    return converted("init.", given, METHODS[name]).resolved()


def schema_of(section: str, given: Any) -> type | None:
    """Return the dataclass of one section; None: the section is a plain value.

    Raises UsageError: an unknown data set or optimizer.
    """
    if section == "dataset":
        name = given.get("name")
        if name not in DATASETS:
            raise UsageError(f"dataset.name={name} is not a data set; {nearest(name, DATASETS)}")
        return DATASETS[name].settings
    if section == "optimizer":
        name = given.get("name")
        if name not in OPTIMIZERS:
            raise UsageError(f"optimizer.name={name} is not an optimizer; {nearest(name, OPTIMIZERS)}")
        return OPTIMIZERS[name]
    return {"peft": PeftConfig, "model": ModelConfig, "wandb": WandbConfig, "plan": PlanConfig}.get(section)


def valid_keys(section: str) -> set[str]:
    """Return every key that any choice of a section reads; for ``""``, the keys of the whole configuration."""
    one_of_many = {
        "dataset": tuple({dataset.settings for dataset in DATASETS.values()}),
        "init": tuple(METHODS.values()),
        "optimizer": tuple(OPTIMIZERS.values()),
    }
    single = {
        "": RunConfig,
        "peft": PeftConfig,
        "model": ModelConfig,
        "wandb": WandbConfig,
        "plan": PlanConfig,
    }
    schemas = one_of_many.get(section) or (single.get(section, RunConfig),)
    keys = {field.name for schema in schemas for field in dataclasses.fields(schema)}
    return keys | PUBLISHED_KEYS if section == "init" else keys


def known_keys() -> set[str]:
    """Return every key that some choice reads, with its group, and the names of the groups."""
    groups = {name: valid_keys(name) for name in ("dataset", "peft", "init", "model", "optimizer", "wandb", "plan")}
    return valid_keys("") | {f"{group}.{name}" for group, names in groups.items() for name in names}


def unknown_key(key: str, valid: Collection[str], elsewhere: Collection[str] = ()) -> UsageError:
    """Return the error for a key that nothing reads.

    valid: the names that its group reads.  elsewhere: keys, with their groups, that may have been meant as well.
    """
    section = key.rpartition(".")[0]
    known = {f"{section}.{name}".removeprefix(".") for name in valid} | set(elsewhere)
    found = " or ".join([] if key in known else meant(key, known))  # in known: another choice of the group reads it
    hint = f"did you mean {found}? " if found else ""
    return UsageError(f"unknown key {key}; {hint}valid: {', '.join(sorted(valid))}")


def refuse_unknown(
    prefix: str, given: dict[str, Any], schema: type, elsewhere: Callable[[], Collection[str]] = tuple
) -> None:
    """Raise UsageError if the keys are not those of the dataclass: one is unknown or missing, or there are none.

    elsewhere: returns the keys, with their groups, that may have been meant as well.
    """
    if not isinstance(given, dict):
        raise UsageError(f"{prefix[:-1] or 'the content'}={given} must have keys: set {prefix}<key>=<value>")
    fields = {field.name for field in dataclasses.fields(schema)}
    for key in given:
        if key not in fields:
            raise unknown_key(f"{prefix}{key}", fields, elsewhere())
    missing = dataclasses.MISSING
    required = (f.name for f in dataclasses.fields(schema) if f.default is missing and f.default_factory is missing)
    for name in required:
        if name not in given:
            raise UsageError(f"{prefix}{name} is missing: set {prefix}{name}=<value>")


def converted(prefix: str, given: dict[str, Any], schema: type) -> Any:
    """Return the values as an instance of the dataclass, see ``typed``.

    A value is converted independently of the others, and a conversion takes milliseconds, so values that were converted
    before are copied: the jobs of a sweep share most of theirs.
    Raises UsageError: a value of the wrong type.
    """
    keys = {name: (schema, name, repr(value)) for name, value in given.items()}
    new = {name: given[name] for name, key in keys.items() if key not in _conversions}
    if new:
        if len(_conversions) > MANY:
            _conversions.clear()
            return converted(prefix, given, schema)
        found = typed(prefix, new, schema)
        for name in new:
            value = found[name]
            _conversions[keys[name]] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    return schema(**{name: copy.deepcopy(_conversions[key]) for name, key in keys.items()})


def typed(prefix: str, given: dict[str, Any], schema: type) -> DictConfig:
    """Return the values merged into the dataclass, converted by OmegaConf's rules (``1`` is also a float).

    Raises UsageError: a value of the wrong type.
    """
    try:
        return OmegaConf.merge(structured(schema), given)
    except OmegaConfBaseException as error:
        key = (error.full_key or str(error.key)).split("[")[0]
        hint = next(field.type for field in dataclasses.fields(schema) if field.name == key)
        kind = getattr(hint, "__name__", None) or str(hint).replace("None", "null").replace(" | ", " or ")
        value = "null" if given[key] is None else repr(given[key])
        raise UsageError(f"{prefix}{key}={value} has the wrong type: it must be {kind}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().split("\n")[0]


def _missing(error: ConfigKeyError) -> str:
    """Return the message for a value that must be set."""
    key = getattr(error, "full_key", None) or first_line(error)
    return f"{key} has no default: set {key}=<value>"


def with_core(run: RunConfig) -> RunConfig:
    """Return the run with the r x r core and the scaling that its initialisation method requires."""
    if not run.init.trains_core:
        return run
    peft = dataclasses.replace(run.peft, lora_xs=True)
    if run.init.unit_scaling:
        peft = dataclasses.replace(peft, lora_alpha=float(peft.lora_r), use_rslora=False)
    return dataclasses.replace(run, peft=peft)
