"""Generate what an evaluation needs with the chosen engine, after a comparison with transformers."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one.errors import UsageError
from lora_one.evaluation.benchmark import Benchmark, Prediction
from lora_one.evaluation.engines import TRANSFORMERS, engine_class
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.partial_results import PartialResults
from lora_one.evaluation.predictions import generated_predictions, requests_of

if TYPE_CHECKING:
    from lora_one.distributed import Processes
    from lora_one.evaluation.engines.protocol import Engine
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
    Raises UsageError: several processes with another engine, or a model that it cannot run; or unfinished results of
    another evaluation.
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
    engine_class(options.engine).check(options)
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

    If all completions are saved, the server is not needed. One that is running already is asked first, so one that
    cannot be used is said before anything is computed.
    """
    from lora_one.evaluation.engines.parity import Gate
    from lora_one.evaluation.engines.remembered import Remembered

    finished = None if options.overwrite else all_saved(examples, options, output, identity, processes)
    if finished is not None:
        compared_as = finished.identity if options.base_url else identity
        gate = Gate.of(benchmark, examples, replace(options, no_parity=True), output, compared_as)
        predictions = generated_predictions(benchmark, examples, options, finished)
        return Generated(predictions, finished, facts_of(options, finished.identity, gate.found))
    if not options.serve:
        identity |= {"engine": engine_class(options.engine).identity(options)}
    gate = Gate.of(benchmark, examples, options, output, identity)
    with ExitStack() as stack:
        if options.serve:
            from lora_one.evaluation.engines.serving import serving

            options = stack.enter_context(serving(options, output))
            identity |= {"engine": engine_class(options.engine).identity(options)}
        partial = PartialResults(output / PARTIAL, identity, processes)

        def compared(engine: "Engine") -> "Engine":
            gate(engine)
            return Remembered(engine, partial.likelihoods, partial.identity)

        predictions = generated_predictions(benchmark, examples, options, partial, compared)
    return Generated(predictions, partial, facts_of(options, identity, gate.found))


def all_saved(
    examples: "Sequence[Example]",
    options: EvaluationOptions,
    output: Path,
    identity: dict[str, Any],
    processes: "Processes",
) -> PartialResults | None:
    """Return the file of the completions, whatever engine has given them, if it has all of them; else None."""
    partial = PartialResults(output / PARTIAL, identity, processes)
    if partial.engine is None:
        return None
    partial.identity["engine"] = partial.engine
    return partial if set(requests_of(examples, options)) <= partial.read(overwrite=False).keys() else None


def facts_of(options: EvaluationOptions, identity: dict[str, Any], parity: dict[str, Any] | None) -> dict[str, Any]:
    """Return what metrics.json says about another engine than transformers."""
    return {"engine": {"name": options.engine, **identity["engine"]}, **({"parity": parity} if parity else {})}
