"""Which key was meant by one that does not exist: one of another group, or one that other programs call so."""

from collections.abc import Collection

from lora_one.errors import closest

OTHER_NAMES = {  # names of other programs -> our keys
    "alpha": "peft.lora_alpha",
    "batch_size": "model.real_batch_size",
    "cutoff_len": "model.max_length",
    "data_path": "dataset.path",
    "dropout": "peft.lora_dropout",
    "gamma": "init.stable_gamma",
    "lr": "model.learning_rate",
    "lr_scheduler_type": "model.scheduler",
    "max_seq_length": "model.max_length",
    "method": "init",
    "micro_batch_size": "model.per_device_batch_size",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "name_or_path": "model.name",
    "num_epochs": "model.epochs",
    "num_train_epochs": "model.epochs",
    "optim": "optimizer",
    "output_dir": "results_dir",
    "per_device_train_batch_size": "model.per_device_batch_size",
    "r": "peft.lora_r",
    "rank": "peft.lora_r",
    "target_modules": "peft.lora_target_modules",
    "use_dora": "peft.dora",
    "warmup_ratio": "model.warmup",
    "warmup_steps": "model.warmup",
}


def meant(key: str, known: Collection[str]) -> list[str]:
    """Return the keys that ``key`` may stand for: of the same name in another group, or of a similar name.

    known: all keys, with their group.

    >>> known = ["seed", "model.seed", "model.epochs", "model.learning_rate", "peft.lora_r"]
    >>> meant("learning_rate", known), meant("model.lr", known), meant("peft.lora_rr", known)
    (['model.learning_rate'], ['model.learning_rate'], ['peft.lora_r'])
    """
    section, _, name = key.rpartition(".")
    if OTHER_NAMES.get(name) in known:
        return [OTHER_NAMES[name]]
    keys: dict[str, list[str]] = {}  # name without its group -> keys of this name
    for other in sorted(known):
        keys.setdefault(other.rpartition(".")[2], []).append(other)
    if name in keys:
        return keys[name]
    own = {other.rpartition(".")[2]: other for other in known if section and other.startswith(f"{section}.")}
    near = closest(name, own)
    if near is not None:
        return [own[near]]
    near = closest(name, keys)
    if near is not None:
        return [near] if near in known else keys[near]
    near = closest(name, OTHER_NAMES)
    return [OTHER_NAMES[near]] if near is not None and OTHER_NAMES[near] in known else []
