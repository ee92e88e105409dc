"""Does another engine give what transformers gives? A few prompts go through both before an evaluation.

Rounding parts some completions: where two tokens are almost equally likely, another order of additions chooses the
other one. A wrong prompt, template, stop text or checkpoint parts them where the tokens are not equally likely. So the
first token in which two completions differ is compared by the log-probabilities of both tokens.
"""

import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from lora_one.data.encode import common_beginning
from lora_one.errors import UsageError
from lora_one.evaluation.benchmark import Benchmark
from lora_one.evaluation.choices import Question
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.engines import TRANSFORMERS, engine_class
from lora_one.evaluation.engines.protocol import Engine, NoLikelihoods
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.output import first_difference
from lora_one.evaluation.predictions import prediction_of
from lora_one.files import write_json
from lora_one.types import Example

PROMPTS = 32
ROUNDING = 0.5  # nats: a larger difference between two log-probabilities is not called rounding
SHARE = 0.02  # of a log-likelihood, if that is more: a sum over many tokens has as many rounding errors
EXPLAINED = 0.95  # share of prompts that must be equal, or differ by rounding


@dataclass(frozen=True)
class Difference:
    """Where an example differs between the engines.

    token: number of equal tokens of both completions.  nats: by how much the log-probabilities of the two next tokens
    differ, or the largest difference of two log-likelihoods; None: the engine cannot say it.  limit: up to this number
    of nats, it is called rounding.
    """

    example: int
    token: int | None
    nats: float | None
    limit: float = ROUNDING

    @property
    def rounding(self) -> bool:
        return self.nats is not None and self.nats <= self.limit


@dataclass(frozen=True)
class Parity:
    """The comparison: numbers of prompts, of equal completions and of equal answers, and the differences.

    unparsed: of the equal answers, how many have no answer in either completion.
    """

    prompts: int
    equal_completions: int
    equal_answers: int
    unparsed: int
    differences: list[Difference]

    @property
    def explained(self) -> float:
        """Return the share of prompts that are equal or differ by rounding."""
        return 1 - sum(not difference.rounding for difference in self.differences) / self.prompts

    def as_json(self) -> dict[str, Any]:
        """Return the fields, the share that is explained, and the warning, if there is one."""
        _, *warnings = self.lines()
        return asdict(self) | {"explained": self.explained} | ({"warning": warnings[0]} if warnings else {})

    def lines(self) -> list[str]:
        """Return the comparison in words; the second line, if there is one, is a warning."""
        found = [
            f"parity with transformers on {self.prompts} prompts: {self.equal_completions} completions are equal, "
            f"{self.equal_answers} answers are equal"
            + (f" ({self.unparsed} of them unparsed in both)" if self.unparsed else "")
        ]
        known = [difference.nats for difference in self.differences if difference.nats is not None]
        tokens = [difference.token for difference in self.differences if difference.token is not None]
        if tokens:
            found[0] += f"; the others differ from token {min(tokens) + 1} on or later"
        if known:
            found[0] += f"; log-probabilities there differ by at most {max(known):.3g} nats"
        if self.explained < EXPLAINED:
            wrong = [str(difference.example) for difference in self.differences if not difference.rounding]
            found.append(
                f"warning: {len(wrong)} of {self.prompts} prompts (examples {', '.join(wrong[:8])}) differ by more "
                f"than rounding ({ROUNDING} nats, or {SHARE:.0%} of a log-likelihood): the server may have another "
                "model, template or stop text; serve the model of --model_name, and evaluate again with --overwrite"
            )
        return found


def chosen(count: int) -> list[int]:
    """Return the indices of the compared examples: at most PROMPTS, evenly spaced."""
    step = max(1.0, count / PROMPTS)
    return [int(place * step) for place in range(min(PROMPTS, count))]


def greedy(options: EvaluationOptions) -> EvaluationOptions:
    """Return the options without sampling: two engines draw different random numbers."""
    return replace(options, temperature=None, top_p=None)


def reference(benchmark: Benchmark[Any], examples: Sequence[Example], options: EvaluationOptions) -> list[Completion]:
    """Return what transformers gives for these examples, in order."""
    engine = engine_class(TRANSFORMERS).start(options)
    found = completed(benchmark, engine, examples, greedy(options))
    del engine
    gc.collect()
    if torch.cuda.is_available():  # a server that starts now needs the memory
        torch.cuda.empty_cache()
    return found


def completed(
    benchmark: Benchmark[Any], engine: Engine, examples: Sequence[Example], options: EvaluationOptions
) -> list[Completion]:
    """Return the completions of all examples, in order."""
    requests = [(index, 0) for index in range(len(examples))]
    found = dict(benchmark.completions(engine, examples, requests, (), options))
    return [found[request] for request in requests]


def compared(
    benchmark: Benchmark[Any],
    examples: Mapping[int, Example],
    options: EvaluationOptions,
    engine: Engine,
    expected: Sequence[Completion],
) -> Parity:
    """Evaluate examples with an engine, and compare. examples: by their index; expected: what transformers gives."""
    part = list(examples.values())
    found = completed(benchmark, engine, part, greedy(options))
    prompts = engine.encoder.prompts(part)
    differences, equal, answers, unparsed = [], 0, 0, 0
    for index, example, prompt, one, other in zip(examples, part, prompts, expected, found, strict=True):
        difference = difference_of(engine, index, prompt, one, other)
        equal += one.text == other.text
        answer, others = (prediction_of(benchmark, example, index, text).get("prediction") for text in (one, other))
        answers += answer == others
        unparsed += answer is None and others is None
        if difference is not None:
            differences.append(difference)
    return Parity(len(part), equal, answers, unparsed, differences)


def difference_of(
    engine: Engine, index: int, prompt: Sequence[int], one: Completion, other: Completion
) -> Difference | None:
    """Return how two completions differ; None: they are equal, and their log-likelihoods too.

    A generated text is compared by its tokens even if its details have log-likelihoods as well.
    """
    pairs = list(zip(numbers(one.details), numbers(other.details), strict=False))
    a, b = max(pairs, key=lambda pair: abs(pair[0] - pair[1]) / limit_of(pair[0]), default=(0.0, 0.0))
    of_numbers = Difference(index, None, abs(a - b), limit_of(a))
    if one.text == other.text:
        return of_numbers if a != b else None
    if pairs and one.cut_off is None and other.cut_off is None:  # the text is only the word of the likeliest answer
        return of_numbers
    found = difference_of_texts(engine, index, prompt, one.text, other.text)
    return found if of_numbers.rounding else replace(of_numbers, token=found.token)


def difference_of_texts(engine: Engine, index: int, prompt: Sequence[int], one: str, other: str) -> Difference:
    """Return how two different texts after a prompt differ."""
    rows = [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
    shared = common_beginning(rows)
    ends = [row[len(shared)] if len(row) > len(shared) else engine.tokenizer.eos_token_id for row in rows]
    if None in ends or ends[0] == ends[1]:
        return Difference(index, len(shared), None)
    question = Question([*prompt, *shared], [[token] for token in ends])
    try:
        ((_, values),) = engine.log_likelihoods([question])
    except NoLikelihoods:
        return Difference(index, len(shared), None)
    return Difference(index, len(shared), abs(values[0] - values[1]))


def limit_of(value: float) -> float:
    """Return the difference of a log-likelihood that is called rounding, in nats."""
    return max(ROUNDING, SHARE * abs(value))


def numbers(details: Any) -> list[float]:
    """Return all fractions in the details of a completion, in order; a mean loss of tokens as the sum over them.

    >>> numbers({"loss": 1.5, "tokens": 4, "windows": [{"loss": 1.0, "tokens": 2}]}), numbers({"A": -0.5})
    ([6.0, 2.0], [-0.5])
    """
    if isinstance(details, float):
        return [details]
    if isinstance(details, dict) and {"loss", "tokens"} <= details.keys():
        return [(details["loss"] or 0.0) * details["tokens"], *numbers(details.get("windows"))]
    values = details.values() if isinstance(details, dict) else details if isinstance(details, list) else ()
    return [number for value in values for number in numbers(value)]


class Gate:
    """Compares an engine with transformers before its first completion; ``found`` is the comparison, as plain JSON.

    It is saved with the results, so a continued evaluation does not repeat it, unless the engine differed.
    """

    def __init__(self, output: Path, identity: dict[str, Any], compare: Callable[[Engine], Parity] | None):
        self.path, self.identity, self.compare = output / "parity.json", json.loads(json.dumps(identity)), compare
        self.found: dict[str, Any] | None = None
        self.differed = False

    @classmethod
    def of(
        cls,
        benchmark: Benchmark[Any],
        examples: Sequence[Example],
        options: EvaluationOptions,
        output: Path,
        identity: dict[str, Any],
    ) -> Self:
        """Evaluate a few examples with transformers, unless the comparison is saved or not wanted."""
        gate = cls(output, identity, None)
        if options.overwrite:
            gate.path.unlink(missing_ok=True)
        gate.found = gate.saved()
        gate.differed = gate.found is not None and gate.found["explained"] < EXPLAINED
        if (gate.found is None or gate.differed) and not options.no_parity:
            part = {index: examples[index] for index in chosen(len(examples))}
            expected = reference(benchmark, list(part.values()), options)
            gate.compare = lambda engine: compared(benchmark, part, options, engine, expected)
        return gate

    def __call__(self, engine: Engine) -> None:
        """Compare, print and save.

        Raises UsageError: the engine is as transformers now, but unfinished results are of a time when it was not.
        """
        if self.compare is None:
            return
        parity = self.compare(engine)
        output = self.path.parent
        if self.differed and parity.explained >= EXPLAINED and any(output.glob("predictions.partial*.jsonl")):
            raise UsageError(
                f"{output} has completions of another server or model than the one that answers now: pass --overwrite "
                "to evaluate all examples again, or --output_dir=<another folder>"
            )
        for line in parity.lines():
            print(line, file=sys.stderr)
        self.found = parity.as_json()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"identity": self.identity, "parity": self.found})

    def saved(self) -> dict[str, Any] | None:
        """Return the saved comparison of the same evaluation; None: there is none."""
        try:
            found = json.loads(self.path.read_text())
            return found["parity"] if first_difference(found["identity"], self.identity) is None else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
