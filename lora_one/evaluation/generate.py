"""Batched generation whose result does not depend on the batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_one.data.encode import pad_id_of


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn. Greedy unless a temperature is given; tokens are counted per completion."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Every choice spelled out, so that no generation_config.json of a checkpoint decides."""
        if self.temperature is None:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p if self.top_p is not None else 1.0,
            "top_k": 0,
            "num_beams": 1,
        }


@dataclass(frozen=True)
class Completion:
    """Text behind the prompt, up to EOS. ``too_long``: the prompt leaves no room in the model's context."""

    text: str
    too_long: bool = False


@torch.no_grad()
def complete(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) of each prompt, longest prompts first.

    Prompts are padded on the left and masked; a completion is cut where its own prompt and max_new_tokens fill
    the context, whatever else is in the batch.
    """
    context = context_length(model)
    device = next(model.parameters()).device
    pad = pad_id_of(tokenizer)
    stop = stop_ids(model, tokenizer)
    if decoding.temperature is not None:
        torch.manual_seed(decoding.seed)
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) < context]
    yield from ((i, Completion("", too_long=True)) for i, prompt in enumerate(prompts) if len(prompt) >= context)
    fitting.sort(key=lambda index: -len(prompts[index]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(fitting), batch_size):
            chosen = fitting[start : start + batch_size]
            rooms = [min(decoding.max_new_tokens, context - len(prompts[index])) for index in chosen]
            longest = len(prompts[chosen[0]])
            ids = torch.tensor([[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in chosen])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
            produced = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(rooms),
                pad_token_id=pad,
                eos_token_id=stop,
                **decoding.options(),
            )[:, longest:].tolist()
            for index, tokens, room in zip(chosen, produced, rooms, strict=True):
                yield (
                    index,
                    Completion(tokenizer.decode(until(tokens[:room], stop), skip_special_tokens=True)),
                )
    finally:
        model.train(was_training)


def until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Tokens before the first stop token."""
    ends = [position for position, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


def stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """EOS of the checkpoint's generation configuration and of the tokenizer."""
    given = getattr(model.generation_config, "eos_token_id", None)
    given = given if isinstance(given, list) else [given]
    return sorted({token for token in (*given, tokenizer.eos_token_id) if token is not None})


def context_length(model: nn.Module) -> int:
    """Positions the model was built for; without such a limit, as many as fit in memory."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
