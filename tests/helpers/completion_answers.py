"""Answers of /v1/completions in the JSON form of vLLM 0.32, computed by one forward pass over the whole text per token.

Written without the project's own generation, so that tests compare two implementations.
"""

import copy
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch

STOPS = 4  # more stop texts are refused
DEFAULTS = {"max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


class Refusal(Exception):
    """A request that is answered by an error. status: of HTTP; kind: the type in the JSON."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass
class Written:
    """The tokens of one completion, their scores log p (vocabulary,) each, and why it ended."""

    tokens: list[int] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    stop_reason: str | int | None = None


class Completer:
    """A model that answers requests. name: under which it is served; context: its number of positions.

    defaults: sampling parameters of a request that does not give them, as vLLM takes them from a checkpoint's
    generation_config.json.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str = "model", context: int | None = None, **defaults: Any
    ) -> None:
        self.model = copy.deepcopy(model).eval()  # the test's own model may have hooks meanwhile
        self.tokenizer, self.name = tokenizer, name
        self.context = context or model.config.max_position_embeddings
        self.defaults = DEFAULTS | defaults
        self.lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of an answer. Raises Refusal: the request is not valid."""
        if request.get("model") not in (None, self.name):
            message = f"The model `{request['model']}` does not exist. Valid aliases: {self.name}."
            raise Refusal(404, message, "NotFoundError", "model")
        request = self.defaults | {name: value for name, value in request.items() if value is not None}
        prompts = self.prompts(request["prompt"])
        for prompt in prompts:
            self.check(prompt, request)
        with self.lock, torch.no_grad():
            written = [(p, self.write(p, request, n)) for p in prompts for n in range(request.get("n", 1))]
        choices = [self.choice(index, *pair, request) for index, pair in enumerate(written)]
        used, new = sum(map(len, prompts)), sum(len(completion.tokens) for _, completion in written)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": choices,
            "system_fingerprint": f"test-{self.name}",
            "usage": {"prompt_tokens": used, "total_tokens": used + new, "completion_tokens": new},
        }

    def prompts(self, given: Any) -> list[list[int]]:
        """Return the token ids of each prompt. given: a text, token ids, or a list of either."""
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        return [self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt for prompt in given]

    def check(self, prompt: list[int], request: dict[str, Any]) -> None:
        """Raise Refusal: the prompt is empty, has an unknown token or leaves no position, or an option is not valid."""
        stop, shortest = request.get("stop", []), 0 if request.get("echo") else 1
        if not prompt:
            raise Refusal(400, "The decoder prompt cannot be empty")
        if not all(0 <= token < self.model.config.vocab_size for token in prompt):
            raise Refusal(400, f"Token id {max(prompt)} is out of vocabulary")
        if len(prompt) >= self.context:
            raise Refusal(
                400,
                f"This model's maximum context length is {self.context} tokens. However, your prompt contains "
                f"{len(prompt)} input tokens, which exceeds this limit even without any output tokens.",
                param="input_tokens",
            )
        if request["max_tokens"] < shortest:
            raise Refusal(400, f"max_tokens must be at least 1, got {request['max_tokens']}.", param="max_tokens")
        if not isinstance(stop, str) and len(stop) > STOPS:
            raise Refusal(400, f"List should have at most {STOPS} items after validation, not {len(stop)}")
        if "" in stop:
            raise Refusal(400, "stop cannot contain an empty string.")
        if request.get("logprobs", 0) > 20:
            raise Refusal(400, f"Requested sample logprobs of {request['logprobs']}, max allowed: 20")

    def write(self, prompt: list[int], request: dict[str, Any], number: int) -> Written:
        """Return the completion of a prompt. number: of the completion, when a request asks for several."""
        done = Written()
        generator = torch.Generator().manual_seed(request["seed"] + number) if "seed" in request else None
        ends = {*request.get("stop_token_ids", [])} | (
            set() if request.get("ignore_eos") else {self.tokenizer.eos_token_id}
        )
        for _ in range(min(request["max_tokens"], self.context - len(prompt))):
            logits = self.logits(prompt + done.tokens)[-1]
            token = chosen(logits, prompt + done.tokens, request, generator)
            done.tokens.append(token)
            done.scores.append(logits.log_softmax(-1))
            if token in ends:
                done.finish_reason = "stop"
                done.stop_reason = None if token == self.tokenizer.eos_token_id else token
                break
            done.text = self.tokenizer.decode(done.tokens, skip_special_tokens=True)
            if self.stopped(done, request.get("stop", [])):
                break
        return done

    def stopped(self, done: Written, stop: str | list[str]) -> bool:
        """Return whether the text contains a stop text; it is then cut before the first one."""
        texts = [stop] if isinstance(stop, str) else stop
        found = min(((place, text) for text in texts if (place := done.text.find(text)) >= 0), default=None)
        if found is not None:
            done.text, done.finish_reason, done.stop_reason = done.text[: found[0]], "stop", found[1]
        return found is not None

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Return the logits (tokens, vocabulary) after each token, fp32."""
        return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()

    def choice(self, index: int, prompt: list[int], done: Written, request: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of one completion."""
        echo, asked = request.get("echo", False), request.get("return_token_ids", False)
        text, tokens, scores = done.text, done.tokens, list(done.scores)
        if echo:
            text = text if asked else self.tokenizer.decode(prompt) + text  # as vLLM 0.32
            tokens = prompt + tokens
        logprobs = None
        if request.get("logprobs") is not None:
            if echo:
                scores = [None, *self.logits(prompt).log_softmax(-1)[:-1], *scores]
            logprobs = self.logprobs(tokens, scores, request)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": done.finish_reason,
            "stop_reason": done.stop_reason,
            "token_ids": done.tokens if asked else None,
            "prompt_logprobs": None,
            "prompt_token_ids": prompt if asked else None,
        }

    def logprobs(self, tokens: list[int], scores: list[Any], request: dict[str, Any]) -> dict[str, list[Any]]:
        """Return the log-probabilities of tokens. scores: log p (vocabulary,) of each; None: of the first of a text."""
        names = [self.spelling(token, request) for token in tokens]
        offsets, reached = [], 0
        for token in tokens:
            offsets.append(reached)
            reached += len(self.tokenizer.decode([token]))
        rows = list(zip(tokens, scores, strict=True))
        return {
            "text_offset": offsets,
            "token_logprobs": [None if row is None else float(row[token]) for token, row in rows],
            "tokens": names,
            "top_logprobs": [None if row is None else self.likeliest(token, row, request) for token, row in rows],
        }

    def likeliest(self, token: int, row: torch.Tensor, request: dict[str, Any]) -> dict[str, float]:
        """Return the log-probabilities of the token and of the likeliest ones."""
        best = row.topk(request["logprobs"]).indices.tolist()
        return {self.spelling(other, request): float(row[other]) for other in dict.fromkeys([token, *best])}

    def spelling(self, token: int, request: dict[str, Any]) -> str:
        """Return a token as the answer names it."""
        return f"token_id:{token}" if request.get("return_tokens_as_token_ids") else self.tokenizer.decode([token])


def chosen(logits: torch.Tensor, before: list[int], request: dict[str, Any], generator: torch.Generator | None) -> int:
    """Return the next token: the likeliest at temperature 0, else a sampled one. logits: (vocabulary,)."""
    seen = torch.tensor(sorted(set(before)))
    penalty = request["repetition_penalty"]
    logits = logits.clone()
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if request["temperature"] == 0:
        return int(logits.argmax())
    p = (logits / request["temperature"]).softmax(-1)
    order = p.argsort(descending=True)
    kept = p[order].cumsum(-1) - p[order] < request["top_p"]
    if request["top_k"] > 0:
        kept[request["top_k"] :] = False
    return int(order[torch.multinomial(p[order] * kept, 1, generator=generator)])
