"""The curvature at the start of every method of a comparison, beside the learning rates that it suggests."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lora_one.config import RunConfig
from lora_one.errors import RunError, UsageError
from lora_one.records.folder import LocatedRun, locate
from lora_one.reports.table import markdown
from lora_one.runs.comparison_file import Comparison
from lora_one.runs.comparison_jobs import Compose

RATE = "model.learning_rate"


@dataclass(frozen=True)
class CurvatureTable:
    """The eigenvalues of a comparison's methods as a Markdown table, and how many were measured."""

    text: str
    measured: int


def curvature(
    comparison: Comparison,
    compose: Compose,
    execute: Callable[[RunConfig], object],
    examples: int,
) -> CurvatureTable:
    """Measure the largest eigenvalue of the Hessian in the adapters of every method.

    Each method is initialised without training, with the first tuning seed, in ``<results_dir>/curvature``; finished
    measurements are reused. The baseline (or the first method) is the reference: a method whose eigenvalue is k times
    as large gets the learning rates of the reference divided by k: in arXiv:2602.04998 the best learning rate falls
    as the eigenvalue rises. Methods with another optimizer than the reference get no learning rates: their steps have
    other units.
    """
    found: dict[str, dict[str, Any] | str] = {}
    optimizers: dict[str, str] = {}
    for method in comparison.methods:
        try:
            located = untrained(comparison, method, compose, examples)
            optimizers[method] = located.run.optimizer.name
            found[method] = measured_curvature(located, execute)
        except (UsageError, RunError) as error:
            found[method] = str(error)
    reference = comparison.baseline or next(iter(comparison.methods))
    unit = found[reference]["largest_eigenvalue"] if isinstance(found[reference], dict) else 0.0
    rates = [value for value in comparison.grid_of(reference).get(RATE, ()) if isinstance(value, int | float)]
    rows = [["method", "largest eigenvalue", f"relative to {reference}", "learning rates at this ratio"]]
    for method, measured in found.items():
        if isinstance(measured, str):
            rows.append([method, f"not measured: {measured}", "", ""])
            continue
        value = measured["largest_eigenvalue"]
        ratio = value / unit if unit > 0 and value > 0 else None
        scaled = ", ".join(f"{rate / ratio:.2g}" for rate in rates) if ratio else ""
        if optimizers[method] != optimizers.get(reference):
            scaled = f"another optimizer than {reference}"
        rows.append([method, eigenvalue_text(measured), f"{ratio:.3g}" if ratio else "", scaled])
    count = sum(isinstance(measured, dict) for measured in found.values())
    return CurvatureTable(f"{markdown(rows)}\n\nOn {examples} training examples.", count)


def eigenvalue_text(measured: dict[str, Any]) -> str:
    """Return the eigenvalue, with its error if the search did not converge. measured: ``init.curvature`` of run.json.

    >>> eigenvalue_text({"largest_eigenvalue": 2.0, "converged": False, "error": 0.1, "products": 100})
    '2 (not converged: error up to 0.1 after 100 products)'
    """
    text = f"{measured['largest_eigenvalue']:.4g}"
    if measured.get("converged", True):  # absent in records of earlier versions
        return text
    return f"{text} (not converged: error up to {measured['error']:.2g} after {measured['products']} products)"


def untrained(comparison: Comparison, method: str, compose: Compose, examples: int) -> LocatedRun:
    """Return the run that initialises a method and measures the curvature. Raises UsageError: it is not valid."""
    run = compose(
        [
            *comparison.common,
            *comparison.methods[method],
            f"seed={comparison.tuning_seeds[0]}",
            "model.epochs=0",
            f"wandb.curvature_examples={examples}",
        ]
    )
    return locate(replace(run, results_dir=f"{run.results_dir}/curvature"))


def measured_curvature(located: LocatedRun, execute: Callable[[RunConfig], object]) -> dict[str, Any]:
    """Return ``init.curvature`` of run.json; the run is executed if necessary.

    Raises UsageError or RunError: it cannot be measured.
    """
    run, folder = located.run, located.folder
    measured = folder.read()["init"].get("curvature") if folder.finished else None
    if measured is None or measured["examples"] != run.wandb.curvature_examples:
        execute(replace(run, overwrite=folder.finished))
    return folder.read()["init"]["curvature"]
