"""Generate what an evaluation needs with the chosen engine, after a comparison with transformers."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one.errors import UsageError
from lora_one.evaluation.benchmark import Benchmark, Prediction
from lora_one.evaluation.engines import TRANSFORMERS, engine_class
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.partial_results import PartialResults
from lora_one.evaluation.predictions import generated_predictions

if TYPE_CHECKING:
    from lora_one.distributed import Processes
    from lora_one.types import Example

PARTIAL = "predictions.partial.jsonl"


@dataclass(frozen=True)
class Generated:
    """The predictions of an evaluation, the file of its completions, and the facts about its engine for metrics.json.

    facts: empty for transformers.
    """

    predictions: Sequence[Prediction]
    partial: PartialResults
    facts: dict[str, Any] = field(default_factory=dict)


def generated(
    benchmark: Benchmark[Any],
    options: EvaluationOptions,
    output: Path,
    fingerprints: dict[str, str],
    processes: "Processes",
) -> Generated:
    """Generate the completions and score them.

    Completions that a file in ``output`` has already are not generated again.
    Raises UsageError: several processes with another engine, or unfinished results of another evaluation.
    """
    examples = benchmark.limited_examples(options)
    identity = {"model": options.model, "settings": options.deciding("completions"), "fingerprints": fingerprints}
    if options.engine == TRANSFORMERS:
        identity["engine"] = engine_class(options.engine).identity(options)
        partial = PartialResults(output / PARTIAL, identity, processes)
        return Generated(generated_predictions(benchmark, examples, options, partial), partial)
    if processes.count > 1:
        raise UsageError(
            f"--engine={options.engine} needs one process, but {processes.count} are running: start the command "
            "without a launcher (--concurrency sets how many requests are sent at a time)"
        )
    return by_another_engine(benchmark, examples, options, output, identity, processes)


def by_another_engine(
    benchmark: Benchmark[Any],
    examples: "Sequence[Example]",
    options: EvaluationOptions,
    output: Path,
    identity: dict[str, Any],
    processes: "Processes",
) -> Generated:
    """Generate the completions with a server; the facts are what identifies it, and the comparison.

    A server that is running already is asked first, so one that cannot be used is said before anything is computed.
    """
    from lora_one.evaluation.engines.parity import Gate

    if not options.serve:
        identity["engine"] = engine_class(options.engine).identity(options)
    gate = Gate.of(benchmark, examples, options, output, identity)
    with ExitStack() as stack:
        if options.serve:
            from lora_one.evaluation.engines.serving import serving

            options = stack.enter_context(serving(options, output))
            identity["engine"] = engine_class(options.engine).identity(options)
        partial = PartialResults(output / PARTIAL, identity, processes)
        predictions = generated_predictions(benchmark, examples, options, partial, gate)
    facts = {"engine": {"name": options.engine, **identity["engine"]}}
    return Generated(predictions, partial, facts | ({"parity": gate.found} if gate.found else {}))
