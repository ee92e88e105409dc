"""Initialisation methods: a settings class contains every fact about its method.

docs/design.md describes how to add one.
"""

from typing import Any

from lora_one.config.methods.base import MethodSettings
from lora_one.config.methods.examples import CordaSettings, EvaSettings, PeftLoraGASettings
from lora_one.config.methods.gradient import (
    FullStepSettings,
    GoraSettings,
    LoraGASettings,
    LoraOneSettings,
    LoraSBSettings,
)
from lora_one.config.methods.moments import LoraDASettings
from lora_one.config.methods.plain import LoraSettings, RandomAbSettings
from lora_one.config.methods.weights import (
    LoftqSettings,
    LoramSettings,
    LoraXsSettings,
    MiloraSettings,
    OloraSettings,
    PissaSettings,
    SvdSettings,
)

METHODS: dict[str, type[MethodSettings]] = {
    "lora": LoraSettings,
    "lora_one": LoraOneSettings,
    "lora_ga": LoraGASettings,
    "lora_sb": LoraSBSettings,
    "lora_xs": LoraXsSettings,
    "svd": SvdSettings,
    "pissa": PissaSettings,
    "olora": OloraSettings,
    "eva": EvaSettings,
    "corda": CordaSettings,
    "loftq": LoftqSettings,
    "lora_ga_peft": PeftLoraGASettings,
    "full_step": FullStepSettings,
    "milora": MiloraSettings,
    "random_ab": RandomAbSettings,
    "loram": LoramSettings,
    "gora": GoraSettings,
    "lora_da": LoraDASettings,
}


def methods_with(**facts: Any) -> str:
    """Return, for a message, the choices of ``init`` whose class attributes have these values.

    >>> methods_with(trains_core=True)
    'init=lora_sb or lora_xs'
    """
    found = [name for name, kind in METHODS.items() if all(getattr(kind, fact) == facts[fact] for fact in facts)]
    return "init=" + ", ".join(found[:-1]) + (" or " if found[1:] else "") + found[-1]
