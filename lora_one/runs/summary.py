"""The text that a run prints: a few lines about its start, and a summary at its end."""

from shlex import quote
from typing import Any

from lora_one.config import RunConfig
from lora_one.datasets import DATASETS
from lora_one.datasets.sources import evaluation_data
from lora_one.distributed import Processes
from lora_one.invocation import other_command
from lora_one.records.folder import RunFolder
from lora_one.statistics.shares import percent


def start_lines(record: dict[str, Any]) -> str:
    """Return a few lines about a start, for the screen. record: ``init`` of run.json."""
    shifts = list(record["relative_shift"].values())
    parts = [
        f"init: {record['method']}, {record['seconds']:.1f} s" + (" (without the cache)" if record["cached"] else "")
    ]
    if record["captured_energy"]:
        parts.append(
            f"rank-r energy {record['captured_energy']['mean']:.3f} (minimum {record['captured_energy']['min']:.3f})"
        )
    if "ranks" in record:
        parts.append(f"ranks {min(record['ranks'].values())} to {max(record['ranks'].values())}")
    step = "eta" in record and not record["captured_energy"]  # in the weights themselves, without adapters
    change = "eta G" if step else "s B A"
    parts.append(f"||{change}|| / ||W|| {min(shifts):.2g} to {max(shifts):.2g}")
    lines = [", ".join(parts)]
    if record["loss_after"] is not None:
        before, after = record["loss_before"], record["loss_after"]
        losses = f"init: loss on its {record['examples']} examples {before:.4f} -> {after:.4f}"
        if record["predicted_decrease"]:
            actual = f"lower by {before - after:.4f}" if after <= before else f"higher by {after - before:.4f}"
            losses += f" ({actual}; first-order prediction: lower by {record['predicted_decrease']:.4f})"
        lines.append(losses)
    if record["searched"]:
        losses = sorted(record["searched"]["losses"].items())
        tried = ", ".join(f"{gamma:.4g}: " + (f"{loss:.4f}" if loss is not None else "nan") for gamma, loss in losses)
        others = record["searched"]["other_examples"]
        where = f"{others} other training examples" if others else "these examples"
        found = f"gamma = {record['searched']['gamma']:.4g}" + (f" = 1 / {record['eta']:.4g}" if step else "")
        lines.append(f"init: {found} has the lowest loss on {where} ({tried})")
    if curvature := record.get("curvature"):
        lines.append(curvature_line(curvature))
    lines += [f"WARNING: {warning}" for warning in record["warnings"]]
    return "\n".join(lines)


def curvature_line(curvature: dict[str, Any]) -> str:
    """Return the largest eigenvalue in words, with its error if the limit of products ended the search."""
    line = (
        f"init: the largest eigenvalue of the Hessian in the adapters is {curvature['largest_eigenvalue']:.4g} "
        f"({curvature['examples']} training examples)"
    )
    if not curvature["converged"]:
        line += f"; not converged: its error may be {curvature['error']:.2g} after {curvature['products']} products"
    if left := curvature["layers_not_converged"]:
        line += f"; {len(left)} of {len(curvature['layers'])} layers not converged"
    return line


def print_summary(run: RunConfig, folder: RunFolder) -> None:
    """Print the results of a finished run, their files, and the next command; only the first process prints."""
    if Processes.current().rank > 0:
        return
    record = folder.read()
    print(f"\n{record['init']['method']} on {run.dataset.name}, {run.model.name}, seed {run.seed}: finished")
    print("\n".join(f"  {line}" for line in [*result_lines(run, record), *cost_lines(record)]))
    for warning in record["init"].get("warnings", ()):
        print(f"  WARNING: {warning}")
    for name, place in record["artifacts"].items():
        print(f"  {name:18s} {folder.path / place}")
    if run.model.quantization:
        print(f"  note: adapter/ is for the base quantised to {run.model.quantization} by bitsandbytes, as in this run")
    if command := next_command(run, folder, record["artifacts"]):
        print(f"  next: {command}")
    print(f"run: {folder.run_json}")


def result_lines(run: RunConfig, record: dict[str, Any]) -> list[str]:
    """Return a table of validation loss and accuracy before, after the initialisation and after training."""
    stages = {"start": "pretrained", "init": "after the initialisation alone"}
    stages |= {"final": "after training"} if record["train"]["steps"] else {}
    results = {title: record["evaluation"].get(stage, {}) for stage, title in stages.items()}
    results = {title: result for title, result in results.items() if result}
    scored = any("eval_accuracy" in result for result in results.values())
    if not results:
        return []
    lines = [f"{'':31s}validation loss" + (f"  {DATASETS[run.dataset.name].accuracy_name}" if scored else "")]
    for title, result in results.items():
        loss = f"{result['eval_loss']:15.4f}" if "eval_loss" in result else " " * 15
        known = "eval_accuracy_n" in result  # absent after a loss that is not finite
        share = f"  {percent(result['eval_accuracy'], result['eval_accuracy_n'])}" if known else ""
        lines.append(f"{title:31s}{loss}{share}")
    return lines


def cost_lines(record: dict[str, Any]) -> list[str]:
    """Return the training loss, steps and seconds, and the peak memory."""
    done, lines = record["train"], []
    if done["first_loss"] is not None:
        change = f"{done['first_loss']:.4f} -> {done['last_loss']:.4f}"
        lines.append(f"training loss {change} in {done['steps']} steps, {done['seconds']:.0f} s")
    return [*lines, f"peak memory {record['peak_memory_bytes'] / 1e9:.2f} GB"]


def run_title(folder: RunFolder) -> str:
    """Return the name of a run and its seed, for the title of its figure."""
    return f"{folder.path.parent.name}, seed {folder.path.name}"


def next_command(run: RunConfig, folder: RunFolder, artifacts: dict[str, str]) -> str | None:
    """Return the command that scores the result, or merges it if no benchmark fits the data set; None: neither."""
    merged = folder.merged.name in artifacts
    evaluation = DATASETS[run.dataset.name].evaluation
    if evaluation is None:
        return None if merged else f"{other_command('scripts/merge.py', 'lora-one-merge')} {quote(str(folder.path))}"
    benchmark, _, options = evaluation.partition(" ")
    words = [other_command(f"eval/eval_{benchmark}.py", f"lora-one-eval {benchmark}"), *options.split()]
    words.append(f"--model_name={quote(str(folder.merged))}" if merged else f"--adapter={quote(str(folder.adapter))}")
    if run.dataset.path is not None:
        words.append(f"--data_path={quote(evaluation_data(run.dataset.path) or '<file or folder of its test split>')}")
    return " ".join(words)
