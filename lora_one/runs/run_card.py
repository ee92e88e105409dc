"""The model card of a run's adapter, from run.json."""

from typing import Any

from lora_one.records.folder import revision_in
from lora_one.records.model_card import CardFacts, on_hub

LEFT_OUT = (
    "wandb",
    "results_dir",
    "overwrite",
    "dry_run",
    "process_timeout_s",
    "plan",
)  # they cannot change the adapter
STAGES = {"start": "pretrained", "init": "after the initialisation", "final": "after training"}


def run_facts(record: dict[str, Any], labels: int | None) -> CardFacts:
    """Return what the card says about a run. record: the content of run.json.  labels: classes of a new head."""
    config, init, train = record["config"], record["init"], record["train"]
    model, dataset, origin = config["model"], config["dataset"], record["provenance"]
    return CardFacts(
        method=init["method"],
        notes=quantization_notes(model["quantization"]),
        initialisation=initialisation(init),
        data={
            "data set": f"`{dataset['name']}`" + (f", from `{dataset['path']}`" if dataset["path"] else ""),
            "training examples": record["data"]["train"]["whole"] + record["data"]["train"]["shortened"],
            "validation examples": record["data"]["validation"]["whole"] + record["data"]["validation"]["shortened"],
        },
        training={
            "optimizer": f"`{config['optimizer']['name']}`, learning rate {model['learning_rate']:g}",
            "steps": f"{train['steps']} of {model['real_batch_size']} examples ({model['epochs']:g} epochs)",
            "rank in training": rank_in_training(config["peft"]["lora_r"], record["init"].get("ranks")),
            "trainable parameters": f"{record['trainable_parameters']:,}",
            "training loss": f"{train['first_loss']:.4g} to {train['last_loss']:.4g}"
            if train["first_loss"] is not None
            else None,
            "time": f"{train['seconds']:.0f} s",
            "seed": config["seed"],
            "configuration hash": f"`{record['config_hash']}`",
            "commit of lora-one": f"`{origin['git_commit']}`" if origin["git_commit"] else None,
        },
        results=results(record["evaluation"]),
        settings={key: value for key, value in config.items() if key not in LEFT_OUT},
        versions=origin["versions"],
        base=model["name"] if on_hub(model["name"]) and not origin["model_folder"] else None,
        revision=revision_in(record),
        labels=labels,
    )


def rank_in_training(rank: int, ranks: dict[str, int] | None) -> str:
    """Return the rank, or the ranks that the initialisation chose, in words."""
    if ranks is None:
        return str(rank)
    return f"{min(ranks.values())} to {max(ranks.values())} by layer, within the parameters of rank {rank}"


def initialisation(init: dict[str, Any]) -> dict[str, Any]:
    """Return the facts about the start."""
    energy, searched = init.get("captured_energy"), init.get("searched")
    measured = init.get("loss_before") is not None and init.get("loss_after") is not None
    return {
        "method": init["method"],
        "examples": init.get("examples") or None,
        "loss on these examples": f"{init['loss_before']:.4g} to {init['loss_after']:.4g}" if measured else None,
        "mean share of the gradient's energy in rank r": f"{energy['mean']:.3f}" if energy else None,
        "gamma": f"{searched['gamma']:.4g}, found by a search" if searched else None,
        "warnings": "; ".join(init.get("warnings", ())),
    }


def results(evaluation: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the table of evaluations: a row for each stage, a column for each value that was measured."""
    names = [
        (key, title)
        for key, title in (("eval_loss", "validation loss"), ("eval_accuracy", "validation accuracy"))
        if any(key in found for found in evaluation.values())
    ]
    rows = [["", *(title for _, title in names)]] if names else []
    for stage, title in STAGES.items():
        found = evaluation.get(stage)
        if found and names:
            rows.append([title, *(f"{found[key]:.4g}" if key in found else "" for key, _ in names)])
    return rows


def quantization_notes(kind: str | None) -> list[str]:
    """Return a note about a quantised base."""
    if kind is None:
        return []
    return [f"It was trained on the base quantised to {kind} by bitsandbytes: quantise the base in the same way."]
