"""The engine of a server with OpenAI's completions API, such as vLLM, SGLang or llama.cpp's.

Prompts are sent as token ids, which this process makes with the model's own tokenizer. The completion is decoded here
as well, where the server returns its tokens. So both engines see the same prompt and end a completion alike.
"""

import threading
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from lora_one.data.encode import Encoder
from lora_one.errors import RunError, UsageError, nearest
from lora_one.evaluation.choices import Question
from lora_one.evaluation.decoding import Completion, Decoding, Ending, positions_of, stop_ids
from lora_one.evaluation.engines import TRANSFORMERS
from lora_one.evaluation.engines.answers import choice_in, completion_in, finite
from lora_one.evaluation.engines.connection import Connection, Unusable
from lora_one.evaluation.engines.protocol import NoLikelihoods
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.source import base_name
from lora_one.model_kinds import CAUSAL, ModelKind
from lora_one.seeding import generator_for

T = TypeVar("T")
COMPLETIONS = "completions"
AT_START = 3  # attempts of the first requests: a server that is not there is said soon
LIKELIEST = 20  # tokens whose log-probabilities vLLM returns at most
STOPS = 4  # stop texts that OpenAI and vLLM accept; completions are cut here before any of them
# What vLLM would otherwise take from the checkpoint's generation_config.json
NEUTRAL = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Served:
    """What a server says about itself.

    model: the name under which it serves the model.  software, version: None if it does not say.
    room: the largest number of tokens of a prompt and its completion; None if it does not say.
    """

    model: str
    software: str | None
    version: str | None
    room: int | None


def served(connection: Connection, wanted: str | None) -> Served:
    """Ask a server what it serves; wanted: the name of the model, or None for the only one.

    Raises RunError: the server does not answer, or does not serve this model.
    """
    models = {entry["id"]: entry for entry in connection.get("models", lambda body: list(body["data"]), AT_START)}
    if wanted is None and len(models) == 1:
        (wanted,) = models
    if wanted not in models:
        names = ", ".join(models) or "no model"
        if wanted is None:
            raise RunError(f"the server at {connection.root} serves {names}: choose one with --served_model=<name>")
        raise RunError(
            f"--served_model={wanted} is not a model of the server at {connection.root}; {nearest(wanted, models)}"
        )
    entry = models[wanted]
    return Served(wanted, entry.get("owned_by"), version_of(connection), entry.get("max_model_len"))


def version_of(connection: Connection) -> str | None:
    """Return the version of the server; None: it does not say, or has failed several times."""
    try:
        return connection.get("../version", lambda body: str(body["version"]), AT_START)
    except RunError:
        return None


@dataclass(frozen=True)
class Server:
    """Sends prompts to a server, ``concurrency`` at a time.

    generation: the checkpoint's generation settings, for its EOS tokens.
    """

    connection: Connection
    served: Served
    tokenizer: Any
    encoder: Encoder
    kind: ModelKind
    context: int
    generation: Any
    concurrency: int

    @classmethod
    def check(cls, options: EvaluationOptions) -> None:
        """Raise UsageError if the model, or its adapter, is not causal, or has no chat template but needs one."""
        from lora_one.adaptation.checkpoints import kind_of_adapter
        from lora_one.data.chat_template import check_template
        from lora_one.models import kind_of_checkpoint, load_tokenizer
        from lora_one.records.folder import revision_of

        name, adapter = options.model_name, options.adapter
        kind = (kind_of_adapter(Path(adapter)) if adapter else None) or kind_of_checkpoint(name)
        if kind is not CAUSAL:
            raise UsageError(
                f"--engine={options.engine} needs a causal model, but {adapter or name} is of the type {kind.name}: "
                f"use --engine={TRANSFORMERS}"
            )
        if options.chat_template:
            path = Path(adapter).expanduser() if adapter else None
            name = name or base_name(path)
            check_template(load_tokenizer(name, revision_of(path, name), model_type=CAUSAL.name), "--chat_template")

    @classmethod
    def start(cls, options: EvaluationOptions) -> Self:
        """Load the tokenizer and connect. Raises UsageError: see ``check``; RunError: the server is not usable."""
        from lora_one.data.encoders import encoder_of
        from lora_one.models import generation_settings, load_config, load_tokenizer
        from lora_one.records.folder import revision_of

        cls.check(options)
        name = options.model_name
        revision = revision_of(Path(options.adapter) if options.adapter else None, name)
        config, tokenizer = load_config(name, revision), load_tokenizer(name, revision, model_type=CAUSAL.name)
        encoder = encoder_of(CAUSAL, tokenizer, config, chat=bool(options.chat_template))
        generation = generation_settings(name, config, revision)
        connection = Connection(options.base_url, options.request_timeout)
        try:
            found = served(connection, options.served_model)
        except BaseException:
            connection.close()
            raise
        return cls(connection, found, tokenizer, encoder, CAUSAL, positions_of(config), generation, options.concurrency)

    @classmethod
    def identity(cls, options: EvaluationOptions) -> dict[str, Any]:
        """Return the server's software and version, and the model's name there."""
        with closing(Connection(options.base_url, options.request_timeout)) as connection:
            found = served(connection, options.served_model)
        return {"software": found.software, "version": found.version, "model": found.model}

    def close(self) -> None:
        """End the connections."""
        self.connection.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, streams: Sequence[str], done: Container[int] = ()
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) of each prompt as it is finished. Raises RunError."""
        decoding = replace(decoding, stop=(*decoding.stop, *self.encoder.stop))
        asked = [index for index in range(len(prompts)) if index not in done]
        rooms = {index: min(decoding.max_new_tokens, self.context - len(prompts[index])) for index in asked}
        yield from ((index, Completion("", too_long=True)) for index in asked if rooms[index] < 1)
        asked = [index for index in asked if rooms[index] >= 1]
        self.check_room(max((len(prompts[index]) + rooms[index] for index in asked), default=0))
        ids = stop_ids(self.generation, self.tokenizer, decoding.stop)
        ending = Ending(self.tokenizer, ids, decoding)

        def completed(index: int) -> Completion:
            prompt, room = list(prompts[index]), rooms[index]
            payload = {**self.request(prompt, room), **sampling(decoding, streams[index]), "return_token_ids": True}
            payload |= {"stop_token_ids": ids, **({"stop": list(decoding.stop[:STOPS])} if decoding.stop else {})}
            read = lambda body: completion_in(body, prompt, self.served.model, ending, room)  # noqa: E731
            return self.connection.post(COMPLETIONS, payload, read)

        yield from self.answered(asked, completed)

    def log_likelihoods(
        self, questions: Sequence[Question], done: Container[int] = (), *, long: bool = False
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield (index, [log p(answer | context) of each answer]) of each question as it is finished. Raises RunError.

        Where the server returns the likeliest next tokens by their ids, answers of one token are looked up there;
        others are read from the log-probabilities of the prompt itself.
        """
        asked = [index for index in range(len(questions)) if index not in done]
        self.check_room(max((questions[index].length + 2 for index in asked), default=0))
        yield from self.answered(asked, lambda index: self.answer_values(questions[index]))

    def answer_values(self, question: Question) -> list[float]:
        """Return the log-likelihood of each answer of one question."""
        known: dict[int, float] = {}
        if self.served.software == "vllm" and sum(len(answer) == 1 for answer in question.answers) > 1:
            known = self.likeliest(question.context)
        return [
            known[answer[0]] if len(answer) == 1 and answer[0] in known else self.echoed(question.context, answer)
            for answer in question.answers
        ]

    def likeliest(self, context: list[int]) -> dict[int, float]:
        """Return the log-probabilities of the likeliest tokens after a context, by their ids."""

        def read(body: Any) -> dict[int, float]:
            (top,) = choice_in(body, context, self.served.model)["logprobs"]["top_logprobs"]
            return {int(name.removeprefix("token_id:")): finite(value) for name, value in top.items()}

        payload = self.request(context, 1) | {"logprobs": LIKELIEST, "return_tokens_as_token_ids": True}
        return self.connection.post(COMPLETIONS, payload, read)

    def echoed(self, context: list[int], answer: list[int]) -> float:
        """Return log p(answer | context), from the log-probabilities of both as a prompt."""
        prompt = [*context, *answer]

        def read(body: Any) -> float:
            found = choice_in(body, prompt, self.served.model).get("logprobs")
            values = found["token_logprobs"] if found else []
            if len(values) < min(2, len(prompt)):  # none, or only that of the generated token
                raise NoLikelihoods(
                    f"the server at {self.connection.root} returns no log-probabilities of a prompt (echo with "
                    "logprobs): use vLLM, or --engine=transformers"
                )
            if len(values) not in (len(prompt), len(prompt) + 1):
                raise Unusable(f"{len(values)} log-probabilities for {len(prompt)} tokens and the next one")
            return sum(map(finite, values[len(context) : len(prompt)]))

        return self.connection.post(COMPLETIONS, self.request(prompt, 1) | {"echo": True, "logprobs": 1}, read)

    def request(self, prompt: Sequence[int], room: int) -> dict[str, Any]:
        """Return the fields of every request; it is greedy unless others replace them."""
        return {"model": self.served.model, "prompt": list(prompt), "max_tokens": room, "temperature": 0.0, **NEUTRAL}

    def check_room(self, tokens: int) -> None:
        """Raise RunError if the server accepts fewer tokens than the longest request has with its completion.

        A likelihood needs two positions more than with transformers: for the last token, and for one that follows.
        """
        if self.served.room is not None and tokens > self.served.room:
            raise RunError(
                f"the longest prompt needs {tokens} tokens with its completion, but the server at "
                f"{self.connection.root} accepts {self.served.room}: start it with a larger context (vLLM: "
                f"--max-model-len {tokens}), ask for less (--max_new_tokens, --max_length, fewer solved examples), or "
                "use --engine=transformers"
            )

    def answered(self, indices: Sequence[int], work: Callable[[int], T]) -> Iterator[tuple[int, T]]:
        """Yield (index, work(index)) as it is finished; after an error, what is in flight is still yielded.

        The threads are daemons, so an interrupted evaluation does not wait for the answers in flight.
        """
        stopping, failed = self.connection.stopping, None
        stopping.clear()
        left, results = deque(indices), SimpleQueue()
        for _ in range(min(self.concurrency, len(indices))):
            threading.Thread(target=each, args=(left, work, results, stopping), daemon=True).start()
        try:
            for _ in indices:
                index, result, error = results.get()
                if error is None:
                    yield index, result
                elif failed is None or isinstance(failed, Skipped):
                    failed = error
            if failed is not None:
                raise failed
        finally:
            stopping.set()  # if this block was interrupted, nothing more is sent


class Skipped(Exception):
    """A request that was not sent, because another one has failed."""


def each(left: deque[int], work: Callable[[int], Any], results: SimpleQueue[Any], stopping: threading.Event) -> None:
    """Take indices until none is left; put (index, work(index), its error) into ``results``.

    After an error, of this thread or another one, the error of all further indices is Skipped.
    """
    while True:
        try:
            index = left.popleft()
        except IndexError:
            return
        try:
            if stopping.is_set():
                raise Skipped
            results.put((index, work(index), None))
        except Exception as error:  # raised again by the thread that takes it
            stopping.set()
            results.put((index, None, error))


def sampling(decoding: Decoding, stream: str) -> dict[str, Any]:
    """Return the fields that choose the tokens; each stream has a seed of its own."""
    if decoding.temperature is None:
        return {}
    seed = generator_for(decoding.seed, stream).initial_seed() % 2**31
    top_p = 1.0 if decoding.top_p is None else decoding.top_p
    return {"temperature": decoding.temperature, "top_p": top_p, "seed": seed}
