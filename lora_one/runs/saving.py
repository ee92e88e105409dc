"""Save the results of a run: adapter/, curves.png and merged_checkpoint/, the last one in the run or later."""

from pathlib import Path
from typing import Any

from torch import nn

from lora_one.adaptation.checkpoints import load_adapter, write_card
from lora_one.adaptation.merging import dequantized, merge_adapter, save_merged
from lora_one.data import head_labels
from lora_one.data.chat_template import end_of_turn
from lora_one.data.encode import pad_id_of
from lora_one.datasets import DATASETS
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.files import fingerprint, read_lines
from lora_one.models import load_model, load_tokenizer, local_folder
from lora_one.records.folder import RunFolder, revision_in
from lora_one.records.tracking import Tracker
from lora_one.reports.curves import plot_run
from lora_one.runs.parts import RunParts
from lora_one.runs.run_card import run_facts
from lora_one.runs.summary import run_title


def save(parts: RunParts, model: nn.Module, tracker: Tracker) -> None:
    """Write the trained model, the plot and, with model.saving, merged_checkpoint/; only the first process writes.

    The plot is also logged to W&B.
    """
    if Processes.current().rank > 0:
        return
    folder, adaptation = parts.folder, parts.adaptation
    if folder.with_template and adaptation.artifact == folder.merged.name:
        stop_at_turns(model, parts.encoder.tokenizer)
    adaptation.save(model, folder.path / adaptation.artifact)
    if adaptation.artifact == folder.adapter.name:
        labels = head_labels(parts.run.model.type, parts.run.dataset.name)
        write_card(folder.adapter, run_facts(folder.read(), len(labels) if labels else None))
    record, plot = folder.read(), folder.path / "curves.png"
    name = DATASETS[parts.run.dataset.name].accuracy_name
    pretrained = record["evaluation"].get("start")
    plot_run(read_lines(folder.metrics), plot, run_title(folder), pretrained=pretrained, accuracy_name=name)
    tracker.log_image(record["train"]["steps"], "curves", plot)
    artifacts = {"plot": "curves.png", adaptation.artifact: adaptation.artifact}
    if parts.run.model.saving and folder.merged.name not in artifacts:
        base = adaptation.untrained_base(model)
        merge(folder, *(load_original(folder) if base is None else (base, parts.encoder.tokenizer)))
        artifacts[folder.merged.name] = folder.merged.name
    folder.update(artifacts=artifacts)


def merge_run(folder: RunFolder, base: Path | None = None) -> None:
    """Write merged_checkpoint/ of a finished run; full fine-tuning has already written it.

    base: where the run's local model is now; None: where it was.
    Raises RunError: the run is not finished, its model is not there, or merged_checkpoint/ was deleted after full
    fine-tuning.
    """
    record = folder.read()
    if record.get("status") != "finished":
        raise RunError(f"{folder.path} is not a finished run (status: {record.get('status')}): finish it, then merge")
    if folder.adapter.name not in record["artifacts"]:
        if not folder.merged.exists():
            raise RunError(
                f"this run trained every weight, and its model {folder.merged} is missing: train it again with "
                "overwrite=true"
            )
        print(f"nothing to merge: this run trained every weight, and its model is {folder.merged}")
        return
    merge(folder, *load_original(folder, base))
    folder.update(artifacts=record["artifacts"] | {folder.merged.name: folder.merged.name})
    print(f"merged: {folder.merged}")


def merge(folder: RunFolder, base: nn.Module, tokenizer: Any) -> None:
    """Write merged_checkpoint/: the original base merged with adapter/."""
    model = merge_adapter(load_adapter(dequantized(base), folder.adapter))
    if folder.with_template:
        stop_at_turns(model, tokenizer)
    save_merged(model, tokenizer, folder.merged)


def stop_at_turns(model: nn.Module, tokenizer: Any) -> None:
    """Let generation end with the assistant's turn of the chat template, besides EOS.

    A run with the template has learnt to end its answers so; the generation_config of a base model often has only EOS.
    """
    end = end_of_turn(tokenizer)
    if end is None:
        return
    given = model.generation_config.eos_token_id
    ends = [] if given is None else given if isinstance(given, list) else [given]
    number = tokenizer.convert_tokens_to_ids(end)
    if number not in ends:
        model.generation_config.eos_token_id = [*ends, number]
        print(f"the merged model's generation also ends with {end}, as the chat template's turns do")


def load_original(folder: RunFolder, base: Path | None = None) -> tuple[nn.Module, Any]:
    """Load the base and the tokenizer of a run, as recorded in its run.json. base: as in ``merge_run``."""
    record = folder.read()
    model = record["config"]["model"]
    name, revision = original_place(folder.path, record, base)
    dtype = "bf16" if model["bf16"] else "fp32"
    labels = head_labels(model["type"], record["config"]["dataset"]["name"])
    options = {"dtype": dtype, "quantization": model["quantization"], "model_type": model["type"], "labels": labels}
    tokenizer = load_tokenizer(name, revision, model["type"])
    return load_model(name, revision, pad_id=pad_id_of(tokenizer), **options), tokenizer


def original_place(run: Path, record: dict[str, Any], base: Path | None) -> tuple[str, str | None]:
    """Return the folder or the hub id of a run's base, and its commit or revision. record: the content of its run.json.

    Raises RunError: the folder of a local model does not exist, or has other files than at the time of the run.
    """
    name, origin = record["config"]["model"]["name"], record["provenance"]
    if not origin["model_folder"]:
        if base is not None:
            raise RunError(f"the model of {run} is {name}, from the hub: leave --model_name out")
        return name, revision_in(record)
    bundled = local_folder(name) if name.startswith("bundled/") else None
    place = (base or bundled or Path(origin["model_folder"])).expanduser()
    if not place.is_dir():
        raise RunError(
            f"the model of {run} is not in {place}: merge with scripts/merge.py --model_name=<its folder now>"
        )
    if fingerprint(place) != origin["fingerprints"]["model.name"]:
        raise RunError(
            f"the model in {place} is not the one that {run} was trained on, its files differ: restore them, "
            "or merge with scripts/merge.py --model_name=<the folder of the original>"
        )
    return str(place), None
