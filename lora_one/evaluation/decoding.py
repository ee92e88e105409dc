"""What a completion is and how it is chosen, for every engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """How completions are chosen: greedily, or sampled if a temperature is given.

    max_new_tokens: of each completion.  beams: above 1, beam search of transformers with this number of beams; with a
    temperature, their continuations are sampled.  top_k: used only with beams.
    stop: a completion ends before the first of these texts; beams are truncated there after the whole generation.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    beams: int = 1
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def beam_options(self) -> dict[str, Any]:
        """Return the options of transformers' ``generate`` for beam search."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        chosen = {"do_sample": True, **sampling} if self.temperature is not None else {}
        return GREEDY | chosen | {"num_beams": self.beams, "early_stopping": False, "length_penalty": 1.0}


# All options are explicit, so a checkpoint's generation_config.json has no effect. The class Draw does the sampling.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}


@dataclass(frozen=True)
class Completion:
    """The text after a prompt, up to EOS or a stop text.

    too_long: the prompt fills the model's context, so the text is empty.
    details: more fields for the line of predictions.jsonl, as plain JSON.
    room: the number of tokens that the context leaves, if it is below max_new_tokens; otherwise None.
    cut_off: whether max_new_tokens or the context ended it, instead of EOS or a stop text; None: unknown, or no text
    was generated.
    """

    text: str
    too_long: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    room: int | None = None
    cut_off: bool | None = None


@dataclass(frozen=True)
class Ending:
    """Where completions end: at the ids of EOS and of stop texts that are special tokens, and before stop texts."""

    tokenizer: Any
    ids: list[int]
    decoding: Decoding

    def reached(self, tokens: Sequence[int]) -> bool:
        """Return whether these new tokens contain a token or a text that ends a completion."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return len(until(tokens, self.ids)) < len(tokens) or before(text, self.decoding.stop) != text

    def completion(self, tokens: Sequence[int], room: int) -> Completion:
        """Return the completion that these new tokens contain; room: its maximal length."""
        kept = until(tokens, self.ids)
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        ended = before(text, self.decoding.stop)
        limited = room if room < self.decoding.max_new_tokens else None
        return Completion(ended, room=limited, cut_off=len(kept) == room and ended == text)


def before(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop text."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]


def until(tokens: Sequence[int], stop: Sequence[int]) -> Sequence[int]:
    """Return the tokens before the first stop token."""
    ends = [position for position, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


def stop_ids(generation: Any, tokenizer: Any, texts: Sequence[str] = ()) -> list[int]:
    """Return the ids of EOS, of the checkpoint and the tokenizer, and of stop texts that are special tokens.

    generation: the checkpoint's generation settings (GenerationConfig of transformers).

    Special tokens do not appear in the decoded text, so they must be recognised by their ids.
    """
    given = getattr(generation, "eos_token_id", None)
    given = given if isinstance(given, list) else [given]
    added = tokenizer.get_added_vocab() if texts else {}
    single = [added[text] for text in texts if text in added]
    return sorted({token for token in (*given, *single, tokenizer.eos_token_id) if token is not None})


def positions_of(config: Any) -> int:
    """Return the maximal number of positions of a configuration of transformers; without a limit, a very large one."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
