"""The text that a run prints: a few lines about its start, and a summary at its end."""

from shlex import quote
from typing import Any

from lora_one.config import RunConfig
from lora_one.datasets import DATASETS
from lora_one.distributed import Processes
from lora_one.records.folder import RunFolder


def start_lines(record: dict[str, Any]) -> str:
    """Return a few lines about a start, for the screen. record: ``init`` of run.json."""
    shifts = list(record["relative_shift"].values())
    parts = [f"init: {record['method']}, {record['seconds']:.1f} s"]
    if record["captured_energy"]:
        parts.append(
            f"rank-r energy {record['captured_energy']['mean']:.3f} (minimum {record['captured_energy']['min']:.3f})"
        )
    parts.append(f"||s B A|| / ||W|| {min(shifts):.2g} to {max(shifts):.2g}")
    lines = [", ".join(parts)]
    if record["loss_after"] is not None:
        before, after = record["loss_before"], record["loss_after"]
        change = f"init: loss on its {record['examples']} examples {before:.4f} -> {after:.4f}"
        if record["predicted_decrease"]:
            actual = f"lower by {before - after:.4f}" if after <= before else f"higher by {after - before:.4f}"
            change += f" ({actual}; first-order prediction: lower by {record['predicted_decrease']:.4f})"
        lines.append(change)
    if record["searched"]:
        losses = sorted(record["searched"]["losses"].items())
        tried = ", ".join(f"{gamma:.4g}: " + (f"{loss:.4f}" if loss is not None else "nan") for gamma, loss in losses)
        others = record["searched"]["other_examples"]
        where = f"{others} other training examples" if others else "these examples"
        lines.append(f"init: gamma = {record['searched']['gamma']:.4g} has the lowest loss on {where} ({tried})")
    lines += [f"WARNING: {warning}" for warning in record["warnings"]]
    return "\n".join(lines)


def print_summary(run: RunConfig, folder: RunFolder) -> None:
    """Print the results of a finished run, their files, and the next command; only the first process prints."""
    if Processes.current().rank > 0:
        return
    record = folder.read()
    print(f"\n{record['init']['method']} on {run.dataset.name}, {run.model.name}, seed {run.seed}: finished")
    for name, title in (
        ("start", "pretrained"),
        ("init", "after the initialisation alone"),
        ("final", "after training"),
    ):
        result = record["evaluation"].get(name, {})
        trained = name != "final" or record["train"]["steps"] > 0
        if "eval_accuracy" in result and trained:
            error = 100 * result["eval_accuracy_stderr"]
            print(f"  exact match, {title:31s} {100 * result['eval_accuracy']:6.2f} +- {error:.2f} %")
    if record["train"]["first_loss"] is not None:
        done = record["train"]
        change = f"{done['first_loss']:.3f} -> {done['last_loss']:.3f}"
        print(f"  training loss {change} in {done['steps']} steps, {done['seconds']:.0f} s")
    if "eval_loss" in record["evaluation"]["final"]:
        print(f"  validation loss {record['evaluation']['final']['eval_loss']:.3f}")
    for warning in record["init"].get("warnings", ()):
        print(f"  WARNING: {warning}")
    for name, place in record["artifacts"].items():
        print(f"  {name:18s} {folder.path / place}")
    if run.model.quantization:
        print(f"  note: adapter/ is for the base quantised to {run.model.quantization} by bitsandbytes, as in this run")
    if "merged_checkpoint" in record["artifacts"]:
        evaluation = DATASETS[run.dataset.name].evaluation
        print(f"  next: python eval/{evaluation} --model_name={quote(str(folder.merged))}")
    else:
        print(f"  next: python scripts/merge.py {quote(str(folder.path))}")
    print(f"run: {folder.run_json}")
