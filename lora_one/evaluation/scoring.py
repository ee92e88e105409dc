"""The line of predictions.jsonl that every benchmark writes, and how the word of a class is scored."""

from collections.abc import Sequence
from typing import Any

from lora_one.evaluation.benchmark import Prediction


def prediction_line(
    example_id: Any, prompt: str, completion: str, gold: Any, prediction: str | None, *, correct: bool | None
) -> Prediction:
    """Return the fields that all benchmarks write.

    prediction: the answer found in the completion; None: unparsed.  correct: None until ``judge`` decides.
    """
    return {
        "id": example_id,
        "prompt": prompt,
        "completion": completion,
        "prediction": prediction,
        "gold": gold,
        "correct": correct,
    }


def class_line(example_id: Any, prompt: str, completion: str, gold: str, labels: Sequence[str]) -> Prediction:
    """Return the line of a completion that must be the word of a class; any other text is unparsed.

    labels: the words of the classes.  Raises ValueError: gold is not one of them.
    """
    if gold not in labels:
        raise ValueError(f"the gold answer {gold!r} is not one of {', '.join(labels)}")
    written = completion.strip()
    prediction = written if written in labels else None
    return prediction_line(example_id, prompt, completion, gold, prediction, correct=prediction == gold)
