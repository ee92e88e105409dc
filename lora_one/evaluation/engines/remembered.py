"""Log-likelihoods that are saved as they arrive, so a continued evaluation does not ask for them again."""

import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_one.evaluation.choices import Question
from lora_one.evaluation.engines.protocol import Engine
from lora_one.files import whole_lines, write_whole


class Remembered:
    """An engine with a file of the log-likelihoods that it has computed; all else is the engine's own.

    identity: of the evaluation, as plain JSON; what another one has saved is not used.
    """

    def __init__(self, engine: Engine, path: Path, identity: dict[str, Any]):
        self.engine, self.path = engine, path
        self.identity = json.dumps(identity, sort_keys=True)
        self.known = dict(map(json.loads, saved_lines(path)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def log_likelihoods(
        self, questions: Sequence[Question], done: Container[int] = (), *, long: bool = False
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield as the engine does; questions whose values are saved come first, and are not asked again."""
        keys = [self.key(question) for question in questions]
        wanted = [index for index in range(len(questions)) if index not in done]
        yield from ((index, self.known[keys[index]]) for index in wanted if keys[index] in self.known)
        left = {index for index in wanted if keys[index] not in self.known}
        for index, values in self.engine.log_likelihoods(questions, set(range(len(questions))) - left, long=long):
            self.known[keys[index]] = values
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(json.dumps([keys[index], values]) + "\n")
            yield index, values

    def key(self, question: Question) -> str:
        """Return a hash of the evaluation and of the question's tokens."""
        text = json.dumps([self.identity, question.context, question.answers])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def saved_lines(path: Path) -> list[str]:
    """Return the lines of a file without an incomplete last one, which is removed; none if there is no file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = whole_lines(text)
    if whole != text:
        write_whole(path, whole)
    return whole.splitlines()
