"""The key ``published`` of a comparison file: what a paper reports, for the columns beside our own figures."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lora_one.config import refuse_unknown
from lora_one.errors import UsageError, nearest

EXAMPLE = "{source: <paper, table>, values: {<evaluation>: {<method>: 60.4, <other>: 59.3 +- 0.2}}}"


@dataclass(frozen=True)
class Published:
    """What a paper reports.

    source: paper and table.  values: name of an evaluation -> method -> number or text, in the unit of the paper.
    """

    source: str
    values: dict[str, dict[str, Any]]


def published_of(given: Any) -> Published | None:
    """Return the entry of a file; None: there is none. Raises UsageError: it has another form."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise UsageError(f"published={given!r} must have the keys source and values, for example {EXAMPLE}")
    refuse_unknown("published.", given, Published)
    if not isinstance(given["source"], str) or not given["source"].strip():
        raise UsageError(f"published.source={given['source']!r} must name the paper and the table")
    values = given["values"]
    if not isinstance(values, dict) or not all(isinstance(by_method, dict) for by_method in values.values()):
        raise UsageError(f"published.values={values!r} must name evaluations and their methods, for example {EXAMPLE}")
    for figure, by_method in values.items():
        for method, value in by_method.items():
            if type(value) not in (int, float, str) or not str(value).strip():
                raise UsageError(
                    f"published.values.{figure}.{method}={value!r} must be a number or a text, for example 59.3 +- 0.2"
                )
    return Published(given["source"], values)


def check_published(
    published: Published | None, evaluations: Collection[str], methods: Collection[str], not_run: Mapping[str, str]
) -> None:
    """Check that each value has its column and its row. Raises UsageError: an unknown evaluation or method."""
    for figure, by_method in published.values.items() if published else ():
        if figure not in evaluations:
            raise UsageError(
                f"published.values.{figure} is not an evaluation of this comparison; {nearest(figure, evaluations)}; "
                "add it to evaluations, with not_run: <reason> if it is not run"
            )
        for method in by_method:
            if method not in methods and method not in not_run:
                raise UsageError(
                    f"published.values.{figure}.{method} is not a method of this comparison; "
                    f"{nearest(method, [*methods, *not_run])}; add it to methods, or to not_run with the reason"
                )
