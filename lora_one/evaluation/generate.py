"""Batched generation; the completion of a prompt does not depend on the other prompts of its batch."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
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
from lora_one.evaluation.decoding import GREEDY, Completion, Decoding, Ending, before, positions_of, stop_ids
from lora_one.losses import evaluating
from lora_one.models import kind_of
from lora_one.seeding import generator_for

BEGINNING = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")


@dataclass(frozen=True)
class BatchGenerator:
    """Generates the completions of one batch of prompts at a time.

    context: number of positions of the model.  separate: the model is an encoder-decoder, so the prompt uses no
    positions of the completion.
    """

    model: nn.Module
    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    decoding: Decoding
    streams: Sequence[str]
    context: int
    separate: bool

    def __call__(self, chosen: Sequence[int]) -> list[tuple[int, Completion]]:
        """Return (index, completion) of the prompts with these indices, of which the first is the longest.

        The maximal length decides which beams win, so beam search generates prompts with different rooms separately.
        """
        parts = [list(part) for _, part in groupby(chosen, self.room)] if self.decoding.beams > 1 else [chosen]
        return [found for part in parts for found in self.completions(part)]

    def completions(self, chosen: Sequence[int]) -> list[tuple[int, Completion]]:
        """Generate these prompts together, up to the largest room, and cut each completion to its own room."""
        rooms = [self.room(index) for index in chosen]
        stop = stop_ids(self.model.generation_config, self.tokenizer, self.decoding.stop)
        ending = Ending(self.tokenizer, stop, self.decoding)
        rows = self.generated(chosen, max(rooms), stop)
        return [
            (index, ending.completion(tokens[:room], room))
            for index, tokens, room in zip(chosen, rows, rooms, strict=True)
        ]

    def room(self, index: int) -> int:
        """Return the maximal number of tokens of a prompt's completion."""
        used = 1 if self.separate else len(self.prompts[index])
        return min(self.decoding.max_new_tokens, self.context - used)

    def generated(self, chosen: Sequence[int], new_tokens: int, stop: list[int]) -> list[list[int]]:
        """Return the new tokens of each prompt, possibly with further tokens after the end of the completion."""
        prompts = [list(self.prompts[index]) for index in chosen]
        longest, pad = len(prompts[0]), pad_id_of(self.tokenizer)
        device = next(self.model.parameters()).device
        ids = torch.tensor([self.filled(prompt, pad, longest) for prompt in prompts])
        mask = torch.tensor([self.filled([1] * len(prompt), 0, longest) for prompt in prompts])
        begin = 1 if self.separate else longest  # first generated token in a row; a decoder's row has a start token
        options = self.choosing([self.streams[index] for index in chosen], begin)
        with default_generation(self.model), clamped_positions(self.model, self.context):
            return self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=new_tokens,
                pad_token_id=pad,
                eos_token_id=stop,
                **options,
            )[:, begin:].tolist()

    def filled(self, row: list[int], filler: int, length: int) -> list[int]:
        """Return a row with fillers before it; behind it if an encoder reads it, which may count absolute positions."""
        fillers = [filler] * (length - len(row))
        return row + fillers if self.separate else fillers + row

    def choosing(self, names: Sequence[str], begin: int) -> dict[str, Any]:
        """Return the options of ``generate`` that choose the tokens; for beams, seed torch's global generator."""
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
    """Yield (index, completion) of each prompt, longest prompts first; with several processes, only this one's share.

    Prompts are padded on the left and masked. A completion ends after max_new_tokens tokens or when it fills the
    context with its own prompt, whatever else is in the batch; the prompt of an encoder-decoder uses none of it. Beams
    are chosen for this length of their own prompt, too.
    streams: names of the random numbers of each prompt, by default its index. What is sampled depends only on that name
    and decoding.seed. Sampled beams are an exception: the prompts of a batch share their random numbers, so the result
    depends on batch_size. Prompts in ``done`` are not yielded, but they remain part of their batch.
    Raises RunError: the model computes logits that are not finite.
    """
    processes = Processes.current()
    context = context_length(model)
    separate = kind_of(model).has_decoder
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
def default_generation(model: nn.Module) -> Iterator[None]:
    """Ignore the checkpoint's generation settings, except the tokens that a text begins with.

    Such settings are a repetition penalty, a minimal length or forbidden words, for example.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside an adapter
    saved = inner.generation_config
    inner.generation_config = GenerationConfig(**{name: getattr(saved, name, None) for name in BEGINNING})
    try:
        yield
    finally:
        inner.generation_config = saved


@contextmanager
def clamped_positions(model: nn.Module, context: int) -> Iterator[None]:
    """Clamp positions to the context, because a model with learnt positions has no embeddings for larger ones.

    A batch is generated until its last row is finished. Tokens after a row has filled its context are discarded, so
    their positions do not matter.
    """

    def clamped(_: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        places = given.get("position_ids")
        return arguments, given if places is None else given | {"position_ids": places.clamp(max=context - 1)}

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = inner.register_forward_pre_hook(clamped, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class Numbers(LogitsProcessor):
    """Return the scores unchanged. Raises RunError: a score is not a number, so the largest one would be arbitrary."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise RunError("the model computes logits that are not finite: try --dtype=fp32, or check the checkpoint")
        return scores


class Draw(LogitsProcessor):
    """Sample a token in each row; all other tokens get the score -inf, so greedy decoding chooses it.

    The distribution is softmax(logits / temperature), restricted to the fewest tokens with a total probability of
    top_p, likeliest first. The token is the inverse of the distribution function at a random number in [0, 1), which
    comes from the row's stream, one number per step.
    """

    def __init__(self, decoding: Decoding, streams: Sequence[str], prompt_length: int):
        self.temperature, self.top_p = decoding.temperature, decoding.top_p if decoding.top_p is not None else 1.0
        self.prompt_length = prompt_length
        self.numbers = torch.stack(
            [torch.rand(decoding.max_new_tokens, generator=generator_for(decoding.seed, name)) for name in streams]
        )  # (rows, steps)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (rows, vocabulary) of the same dtype: 0 at the sampled token, -inf elsewhere."""
        likely, tokens = (scores.float() / self.temperature).softmax(-1).sort(descending=True, stable=True)
        likely = likely.where(likely.cumsum(-1) - likely < self.top_p, 0.0)
        below = likely.cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length].to(scores.device)
        place = (below <= number[:, None] * below[:, -1:]).sum(-1)
        place = place.minimum((likely > 0).sum(-1) - 1)  # rounding must not move it after the last token
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, place[:, None]), 0.0)


class AtText(StoppingCriteria):
    """Stop a row when its generated text contains a stop text; the other rows continue.

    Every token has at least one byte, so a stop text of n bytes is within the last n tokens, and only these are decoded
    at each step. The padding of a finished row comes after the stop text and is removed with it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int):
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        self.reach = max(len(text.encode()) for text in stop)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return (rows,) bool, True for finished rows; input_ids: (rows, prompt and generated tokens)."""
        last = input_ids[:, self.prompt_length :][:, -self.reach :].tolist()
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in last]
        return torch.tensor([before(text, self.stop) != text for text in texts], device=input_ids.device)


def context_length(model: nn.Module) -> int:
    """Return the maximal number of positions of the model; without a limit, a number that no prompt reaches."""
    return positions_of(model.config)
