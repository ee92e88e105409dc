"""Find the folders of an evaluated model, also inside a run's folder; say what is missing before anything is loaded."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

from lora_one.errors import UsageError
from lora_one.evaluation.options import EvaluationOptions
from lora_one.invocation import other_command
from lora_one.records.folder import RunFolder

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def located(options: EvaluationOptions) -> EvaluationOptions:
    """Return the options with the adapter's and the model's own folder where a run's folder is given, and without ~.

    Raises UsageError: a folder has no adapter or no model.
    """
    if options.rescore:
        return replace(options, rescore=str(Path(options.rescore).expanduser()))
    adapter = options.adapter and str(adapter_of(Path(options.adapter)))
    return replace(options, adapter=adapter, model_name=options.model_name and model_of(options.model_name))


def check_present(options: EvaluationOptions) -> None:
    """Check that the model, or the base of the adapter, is there. Raises UsageError: a folder or weights are missing.

    options: as ``located`` returns them.
    """
    from lora_one.models import check_weights

    if options.rescore:
        return
    if options.model_name:
        check_weights(options.model_name, key="--model_name")
    elif options.adapter:
        name = base_name(Path(options.adapter))
        try:
            check_weights(name, key=f"the base of --adapter={options.adapter}")
        except UsageError as error:
            raise UsageError(f"{error}; if it was moved, pass --model_name=<its folder now>") from error


def adapter_of(given: Path) -> Path:
    """Return the folder of an adapter. given: that folder, or a run's. Raises UsageError: there is no adapter."""
    path = given.expanduser()
    found = next((folder for folder in (path, path / "adapter") if (folder / "adapter_config.json").exists()), None)
    if found is None:
        if (path / "config.json").exists():
            raise UsageError(f"--adapter={given} is a whole model, not an adapter: pass it as --model_name")
        run = RunFolder(path)
        instead = f"it has merged_checkpoint/: pass --model_name={given}" if run.merged.exists() else None
        raise missing("adapter", given, "adapter_config.json", "the adapter/ folder of a run", instead)
    if not any((found / name).exists() for name in WEIGHTS):
        raise UsageError(
            f"--adapter={given}: the folder {found} has no {WEIGHTS[0]}: copy the whole folder, or pass another one"
        )
    return given if found == path else found


def model_of(given: str) -> str:
    """Return the folder of a model. given: that folder, a run's, or a hub id. Raises UsageError: there is no model."""
    path = Path(given).expanduser()
    if not path.is_dir() or (path / "config.json").exists():
        return given
    run = RunFolder(path)
    if (run.merged / "config.json").exists():
        return str(run.merged)
    if (path / "adapter_config.json").exists():
        raise UsageError(f"--model_name={given} is an adapter, not a whole model: pass it as --adapter")
    merge = other_command("scripts/merge.py", "lora-one-merge")
    merge = f"pass --adapter={quote(given)}, or merge it first: {merge} {quote(given)}"
    instead = merge if run.adapter.exists() else None
    raise missing("model_name", given, "config.json", "the merged_checkpoint/ folder of a run", instead)


def missing(option: str, given: Path | str, file: str, wanted: str, instead: str | None) -> UsageError:
    """Return the error for a folder without the model or adapter of an option.

    wanted: the folder to pass, in words.  instead: what this folder has, and the way out.
    """
    path = Path(given).expanduser()
    run = RunFolder(path)
    runs = sorted(folder.parent.name for folder in path.glob("*/run.json"))
    if instead is None and run.run_json.exists():
        instead = f"the run is not finished (status: {run.read().get('status')}): run its command again to finish it"
    if instead is None and runs:
        example = quote(str(path / runs[0]))
        instead = f"it contains the runs {', '.join(runs)}: pass one of them, for example --{option}={example}"
    return UsageError(f"--{option}={given} has no {file}: {instead or f'pass {wanted}, or the folder of the run'}")


def base_name(adapter: Path) -> str:
    """Return the name of an adapter's base model, from its configuration."""
    return json.loads((adapter.expanduser() / "adapter_config.json").read_text())["base_model_name_or_path"]


def head_names(options: EvaluationOptions) -> Sequence[str] | None:
    """Return the names of the outputs of the evaluated model's head; None: it has no head, or they are not known.

    They are the words of the data set of the run that trained an adapter, or those in the model's configuration.
    """
    from lora_one.adaptation.checkpoints import kind_of_adapter
    from lora_one.datasets import labels_of
    from lora_one.models import kind_of_checkpoint, load_config
    from lora_one.records.folder import config_of

    adapter = Path(options.adapter).expanduser() if options.adapter else None
    if adapter is not None:
        kind, trained_on = kind_of_adapter(adapter), config_of(adapter).get("dataset", {}).get("name")
        return labels_of(trained_on) if kind is not None and kind.has_head and trained_on else None
    if not kind_of_checkpoint(options.model_name).has_head:
        return None
    config = load_config(options.model_name)
    return [str(config.id2label[place]) for place in range(config.num_labels)]
