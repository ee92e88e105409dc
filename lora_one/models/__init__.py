"""Models and tokenizers from the hub or a local folder, or the bundled tiny model.

location: where a model is.  loading: tokenizer, configuration, weights.  requirements: whether this machine can train
a model.  inspection: facts about a model: its kind, width, positions, stored weights.
"""

from lora_one.models.inspection import (
    check_positions,
    kind_of,
    kind_of_checkpoint,
    learnt_positions,
    original_weights,
    text_part,
    weight_shape,
    with_rank,
)
from lora_one.models.loading import (
    DTYPES,
    auto_class,
    device,
    generation_settings,
    load_config,
    load_model,
    load_skeleton,
    load_tokenizer,
    never_repacked,
    padded_with,
    refuse_drawn_layers,
)
from lora_one.models.location import BUNDLED, check_weights, commit_of, local_folder
from lora_one.models.peak_memory import free_bytes
from lora_one.models.requirements import (
    CPU_LIMIT,
    count_parameters,
    preflight,
    weight_bytes,
    with_shards,
)

__all__ = [
    "BUNDLED",
    "CPU_LIMIT",
    "DTYPES",
    "auto_class",
    "check_positions",
    "check_weights",
    "commit_of",
    "count_parameters",
    "device",
    "free_bytes",
    "generation_settings",
    "kind_of",
    "kind_of_checkpoint",
    "learnt_positions",
    "load_config",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "local_folder",
    "never_repacked",
    "original_weights",
    "padded_with",
    "preflight",
    "refuse_drawn_layers",
    "text_part",
    "weight_bytes",
    "weight_shape",
    "with_rank",
    "with_shards",
]
