"""From overrides to a checked configuration, composed by Hydra."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from lora_one.config import RunConfig
from lora_one.config.defaults import configuration_folder
from lora_one.config.rules import largest_divisor
from lora_one.errors import UsageError
from lora_one.runs.explanations import explain
from lora_one.runs.overrides import sets, translate

BATCHES = ("model.per_device_batch_size", "model.real_batch_size")


def checked(composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the checked configuration that Hydra has composed from these overrides. Raises UsageError."""
    return RunConfig.from_hydra(composed if sets(overrides, BATCHES[0]) else with_fitting_micro_batch(composed))


def with_fitting_micro_batch(composed: DictConfig) -> DictConfig:
    """Lower a micro-batch that does not divide ``model.real_batch_size`` to the largest smaller one that does.

    Values of a wrong type or range stay as they are; ``RunConfig`` refuses them.
    """
    micro, real = (OmegaConf.select(composed, key, throw_on_resolution_failure=False) for key in BATCHES)
    if not (type(micro) is type(real) is int and min(micro, real) > 0) or real % micro == 0:
        return composed
    return OmegaConf.merge(composed, {"model": {"per_device_batch_size": largest_divisor(real, micro)}})


def compose(overrides: Sequence[str]) -> RunConfig:
    """Return the checked configuration of these overrides, as ``run_exp.py <overrides>`` composes it.

    Raises UsageError: Hydra or our checks refuse the overrides.
    """
    from hydra import compose as composed
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    arguments = translate(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
            return checked(composed("config", arguments), arguments)
    except UsageError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(explain(error, arguments)) from error
