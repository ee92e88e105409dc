"""Batched generation whose result does not depend on the batch."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lora_one.data.encode import pad_id_of
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.evaluation.batches import each_batch
from lora_one.losses import evaluating
from lora_one.seeding import generator_for


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn. Greedy unless a temperature is given; tokens are counted per completion.

    beams: above 1, that many are kept, and with a temperature their continuations are sampled, as transformers does.
    top_k is read with beams alone.
    stop: texts before the first of which a completion ends; beams are cut there only when all is generated.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    beams: int = 1
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def beam_options(self) -> dict[str, Any]:
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        chosen = {"do_sample": True, **sampling} if self.temperature is not None else {}
        return GREEDY | chosen | {"num_beams": self.beams, "early_stopping": False, "length_penalty": 1.0}


# Every choice is explicit; those of a checkpoint's generation_config.json are not used. Draw does the sampling.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
BEGINNING = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")


@dataclass(frozen=True)
class Completion:
    """Text after the prompt, up to EOS or a stop text. ``too_long``: the prompt leaves no room in the model's context.

    details: what else a benchmark wants in the line of predictions.jsonl; plain JSON.
    room: the tokens that the context leaves, where these are fewer than max_new_tokens.
    """

    text: str
    too_long: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    room: int | None = None


@dataclass(frozen=True)
class BatchGenerator:
    """Generates the completions of one batch of prompts at a time.

    context: positions of the model. separate: an encoder-decoder's prompt takes no room from its completion.
    """

    model: nn.Module
    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    decoding: Decoding
    streams: Sequence[str]
    context: int
    separate: bool

    def __call__(self, chosen: Sequence[int]) -> list[tuple[int, Completion]]:
        """Return (index, completion) of these prompts; the first is the longest."""
        rooms = [self.room(index) for index in chosen]
        stop = stop_ids(self.model, self.tokenizer, self.decoding.stop)
        rows = self.generated(chosen, max(rooms), stop)
        kept = (until(tokens[:room], stop) for tokens, room in zip(rows, rooms, strict=True))
        texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in kept)
        cut = (room if room < self.decoding.max_new_tokens else None for room in rooms)
        return [
            (index, Completion(before(text, self.decoding.stop), room=room))
            for index, text, room in zip(chosen, texts, cut, strict=True)
        ]

    def room(self, index: int) -> int:
        """Return how many tokens the completion of this prompt may have."""
        taken = 1 if self.separate else len(self.prompts[index])
        return min(self.decoding.max_new_tokens, self.context - taken)

    def generated(self, chosen: Sequence[int], new_tokens: int, stop: list[int]) -> list[list[int]]:
        """Return the tokens after each prompt, which may go on beyond its end."""
        prompts = [list(self.prompts[index]) for index in chosen]
        longest, pad = len(prompts[0]), pad_id_of(self.tokenizer)
        device = next(self.model.parameters()).device
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        begin = (
            1 if self.separate else longest
        )  # where generated tokens begin in a row; a decoder starts with one token
        options = self.choosing([self.streams[index] for index in chosen], begin)
        with choosing_nothing(self.model), within(self.context, self.model):
            return self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=new_tokens,
                pad_token_id=pad,
                eos_token_id=stop,
                **options,
            )[:, begin:].tolist()

    def choosing(self, names: Sequence[str], begin: int) -> dict[str, Any]:
        """Return the options of ``generate`` that choose the tokens; sampled beams seed torch's own generator here."""
        decoding = self.decoding
        processors, options, criteria = [Numbers()], GREEDY, []
        if decoding.stop and decoding.beams == 1:
            criteria = [AtText(self.tokenizer, decoding.stop, begin)]
        if decoding.beams > 1:
            options = decoding.beam_options()
            torch.manual_seed(generator_for(decoding.seed, "\n".join(names)).initial_seed())
        elif decoding.temperature is not None:
            processors.append(Draw(decoding, names, begin))
        return options | {
            "logits_processor": LogitsProcessorList(processors),
            "stopping_criteria": StoppingCriteriaList(criteria),
        }


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    streams: Sequence[str] | None = None,
    done: Container[int] = (),
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) of each prompt, longest prompts first; each of several processes has its share.

    Prompts are padded on the left and masked; a completion is cut where its own prompt and max_new_tokens fill
    the context, whatever else is in the batch. An encoder-decoder's prompt takes no room from its completion.
    streams names the random numbers of each prompt, by default its index: what is sampled depends on that name and
    decoding.seed, not on the other prompts. Only sampled beams share the numbers of their batch, so they depend on
    batch_size; prompts in ``done``, which are not yielded, still have their place in it.
    Raises RunError: the model computes scores that are not numbers.
    """
    processes = Processes.current()
    context = context_length(model)
    separate = bool(getattr(model.config, "is_encoder_decoder", False))
    streams = streams or [str(index) for index in range(len(prompts))]
    too_long = (index for index, prompt in enumerate(prompts) if len(prompt) >= context and index not in done)
    if processes.rank == 0:
        yield from ((index, Completion("", too_long=True)) for index in too_long)
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) < context]
    fitting.sort(key=lambda index: -len(prompts[index]))
    generate = BatchGenerator(model, tokenizer, prompts, decoding, streams, context, separate)
    with evaluating(model):
        for _, found in each_batch(fitting, batch_size, generate, done, processes):
            yield from ((index, completion) for index, completion in found if index not in done)


@contextmanager
def choosing_nothing(model: nn.Module) -> Iterator[None]:
    """Ignore the checkpoint's own generation settings, except the tokens that a text begins with.

    These are a repetition penalty, a minimum length, forbidden words, and more.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside an adapter
    given = inner.generation_config
    inner.generation_config = GenerationConfig(**{name: getattr(given, name, None) for name in BEGINNING})
    try:
        yield
    finally:
        inner.generation_config = given


@contextmanager
def within(context: int, model: nn.Module) -> Iterator[None]:
    """Clamp positions to the context: a model with learnt positions has none beyond it.

    A batch continues until its last row is finished; what a row gets after it has filled its context is discarded, so
    any position will do.
    """

    def bounded(_: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        places = given.get("position_ids")
        return arguments, given if places is None else given | {"position_ids": places.clamp(max=context - 1)}

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = inner.register_forward_pre_hook(bounded, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class Numbers(LogitsProcessor):
    """Returns the scores unchanged. Raises RunError: a score is not a number, so the largest one would be arbitrary."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise RunError("the model computes scores that are not numbers: try --dtype=fp32, or check the checkpoint")
        return scores


class Draw(LogitsProcessor):
    """Sampling as a greedy choice: every token but the one drawn gets the score -inf.

    A row's token is the inverse of its distribution function at a number in [0, 1), one for each step from the
    row's own stream: softmax(logits / temperature), cut to the fewest tokens that hold top_p of the probability,
    likeliest first.
    """

    def __init__(self, decoding: Decoding, streams: Sequence[str], prompt_length: int):
        self.temperature, self.top_p = decoding.temperature, decoding.top_p if decoding.top_p is not None else 1.0
        self.prompt_length = prompt_length
        self.numbers = torch.stack(
            [torch.rand(decoding.max_new_tokens, generator=generator_for(decoding.seed, name)) for name in streams]
        )  # (rows, steps)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores (rows, vocabulary), any float dtype: 0 at the token drawn, -inf elsewhere."""
        likely, tokens = (scores.float() / self.temperature).softmax(-1).sort(descending=True, stable=True)
        likely = likely.where(likely.cumsum(-1) - likely < self.top_p, 0.0)
        below = likely.cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length].to(scores.device)
        place = (below <= number[:, None] * below[:, -1:]).sum(-1)
        place = place.minimum((likely > 0).sum(-1) - 1)  # rounding must not carry it beyond the last
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, place[:, None]), 0.0)


class AtText(StoppingCriteria):
    """A row is finished when what it has generated holds a stop text; the others go on.

    A text of n bytes lies within n tokens, as each has a byte or more, so only the last are read at each step. What a
    finished row is padded with follows the stop text and is cut off with it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int):
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        self.reach = max(len(text.encode()) for text in stop)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """input_ids (rows, prompt and generated tokens); (rows,), true where a row is finished."""
        last = input_ids[:, self.prompt_length :][:, -self.reach :].tolist()
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in last]
        return torch.tensor([before(text, self.stop) != text for text in texts], device=input_ids.device)


def before(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop text."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]


def until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Return the tokens before the first stop token."""
    ends = [position for position, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


def stop_ids(model: nn.Module, tokenizer: Any, texts: Sequence[str] = ()) -> list[int]:
    """Return EOS of the checkpoint and of the tokenizer, and stop texts that are single tokens.

    Special tokens do not appear in the decoded text, so they must be recognised as tokens.
    """
    given = getattr(model.generation_config, "eos_token_id", None)
    given = given if isinstance(given, list) else [given]
    added = tokenizer.get_added_vocab() if texts else {}
    own = [added[text] for text in texts if text in added]
    return sorted({token for token in (*given, *own, tokenizer.eos_token_id) if token is not None})


def context_length(model: nn.Module) -> int:
    """Return the positions the model was built for; without such a limit, a number that no prompt reaches."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
