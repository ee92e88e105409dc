"""Pretrain the bundled model, a tiny Llama with its tokenizer, in lora_one/assets/tiny.

    python scripts/pretrain_tiny.py                  # reproduces the shipped model
    python scripts/pretrain_tiny.py --steps 20 --out /tmp/tiny     # a quick test

It is trained on the problems of `PRETRAIN_FAMILIES`, but not on those of `TARGET_FAMILY`.
"""

import argparse
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_one.datasets.arithmetic import FAMILIES, PRETRAIN_FAMILIES, as_text, generate

ASSETS = Path(__file__).resolve().parent.parent / "lora_one" / "assets" / "tiny"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
IGNORED = -100  # label of the tokens without a loss, the default of cross_entropy


class Encoded(NamedTuple):
    """Token ids, and labels: the same ids, or IGNORED for tokens without a loss."""

    ids: list[int]
    labels: list[int]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="output folder")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument(
        "--calculation-steps",
        type=int,
        default=1000,
        help="first steps, with half calculations",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="problems or pages of calculations per step")
    parser.add_argument("--train-size", type=int, default=60_000, help="different problems to train on")
    parser.add_argument("--test-size", type=int, default=200, help="held-out problems per family")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=3e-3,
        help="peak of the schedule: linear warmup, then cosine decay to zero",
    )
    parser.add_argument("--vocabulary", type=int, default=448, help="maximum number of tokens, including special ones")
    parser.add_argument("--hidden", type=int, default=128, help="width of the residual stream")
    parser.add_argument("--intermediate", type=int, default=320, help="width of the MLP")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; their number changes the rounding, and so the weights"
    )
    return parser.parse_args()


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text can be encoded, and each digit is a separate token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama with random weights, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_answers(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[Encoded]:
    """Encode (prompt, answer) pairs, both parts separately as in generation; only the answer and EOS have a loss."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    encoded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = [*answer, tokenizer.eos_token_id]
        encoded.append(Encoded(prompt + answer, [IGNORED] * len(prompt) + answer))
    return encoded


def encode_pages(tokenizer: PreTrainedTokenizerFast, pages: list[str]) -> list[Encoded]:
    """Encode pages of lines like `14+23=37`; only the results have a loss, because the operands are random."""
    equals, newline = (tokenizer(sign, add_special_tokens=False)["input_ids"][0] for sign in "=\n")
    encoded = []
    for ids in tokenizer(pages)["input_ids"]:
        labels, after_equals = [], False
        for token in ids:
            labels.append(token if after_equals else IGNORED)
            after_equals = (after_equals or token == equals) and token != newline
        encoded.append(Encoded(ids, labels))
    return encoded


def calculation_pages(answers: list[str], calculations: int = 8) -> list[str]:
    """Return pages of lines like `14+23=37`: the calculations in the answers, without the text."""
    lines = [line for answer in answers for line in re.findall(r"<<(.*?)>>", answer)]
    random.Random(0).shuffle(lines)
    return ["\n".join(lines[start : start + calculations]) for start in range(0, len(lines), calculations)]


def batches(encoded: list[Encoded], size: int, seed: int) -> Iterator[list[Encoded]]:
    """Yield shuffled batches of examples of similar length, for little padding, in endless epochs."""
    rng = random.Random(seed)
    while True:
        order = sorted(encoded, key=lambda sequence: len(sequence.ids) + rng.random() * 4)
        epoch = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        rng.shuffle(epoch)
        yield from epoch


def mixed(problems: Iterator[list[Encoded]], pages: Iterator[list[Encoded]]) -> Iterator[list[Encoded]]:
    """Yield batches with problems in one half and pages in the other half."""
    for some_problems, some_pages in zip(problems, pages, strict=True):
        half = len(some_problems) // 2
        yield some_problems[:half] + some_pages[half:]


def collate(batch: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, labels), both (batch, length), padded on the right."""
    length = max(len(sequence.ids) for sequence in batch)
    ids = torch.tensor([s.ids + [pad] * (length - len(s.ids)) for s in batch])
    labels = torch.tensor([s.labels + [IGNORED] * (length - len(s.ids)) for s in batch])
    return ids, labels


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Return the factor on the peak learning rate: linear warmup, then a cosine decay to zero."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    arguments: argparse.Namespace,
) -> None:
    """Train in place with AdamW: first on calculations and (prompt, answer) pairs, half each, then on pairs only."""
    pages = encode_pages(tokenizer, calculation_pages([answer for _, answer in pairs]))
    problem_stream = batches(encode_answers(tokenizer, pairs), arguments.batch_size, arguments.seed)
    page_stream = batches(pages, arguments.batch_size, arguments.seed)
    stream = chain(islice(mixed(problem_stream, page_stream), arguments.calculation_steps), problem_stream)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, arguments.steps))
    began = time.perf_counter()
    for step in range(arguments.steps):
        ids, labels = collate(next(stream), tokenizer.pad_token_id)
        # no attention mask, because causal attention does not read padding on the right
        logits = model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f} s", flush=True)


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> tuple[float, float]:
    """Return the shares of greedy answers that are correct, and that end in a number, `#### <number>`."""
    prompts, answers = zip(*as_text(rows), strict=True)
    inputs = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=96,
        do_sample=False,
    )
    completions = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = [re.search(r"#### (-?\d+)\Z", completion) for completion in completions]
    right = [f and f[1] == answer.rsplit("#### ", 1)[1] for f, answer in zip(found, answers, strict=True)]
    return sum(map(bool, right)) / len(rows), sum(map(bool, found)) / len(rows)


def readme(arguments: argparse.Namespace, parameters: int, minutes: float, results: dict) -> str:
    """Return the model card: the model, its training and its accuracy."""
    command = " ".join(["python scripts/pretrain_tiny.py", *sys.argv[1:]])
    table = "\n".join(
        f"| {family} | {'yes' if family in PRETRAIN_FAMILIES else 'no'} | {right:.1%} | {parsed:.1%} |"
        for family, (right, parsed) in results.items()
    )
    return f"""---
license: apache-2.0
---
# A tiny Llama for arithmetic word problems

A Llama of {parameters:,} parameters ({arguments.layers} layers, width {arguments.hidden},
MLP {arguments.intermediate}, {arguments.heads} heads, tied embeddings, float32) with a byte-level BPE
tokenizer in which each digit is a token.
It exists so that `python run_exp.py` can show a fine-tuning in minutes without a download or a GPU,
and knows nothing but the generated problems of `lora_one/datasets/arithmetic.py`. Licence: Apache-2.0.

Text: `Q: {{question}}\\nA: {{answer}}`. The prompt `Q: {{question}}\\nA: ` and the answer are tokenized
apart; the tokenizer puts `<s>` in front, and the answer is closed by `</s>`.

Made by

    {command}

in {minutes:.0f} minutes on a machine of 2 CPU cores (Intel Xeon, 2.5 GHz),
threads: {arguments.threads}, seed: {arguments.seed}.
It took {arguments.steps:,} steps of {arguments.batch_size} sequences
from {arguments.train_size:,} different problems, with the loss on the answers only.
In the first {arguments.calculation_steps:,} steps one half of the sequences were
pages of bare calculations, `14+23=37`, with the loss on the results.

Greedy answers to {arguments.test_size} held-out problems of each family:

| family | pretrained on | exact match | ends in a number |
|---|---|---|---|
{table}
"""


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    began = time.perf_counter()
    train_rows = generate(PRETRAIN_FAMILIES, arguments.train_size, arguments.seed)
    pairs = as_text(train_rows)
    tokenizer = train_tokenizer([prompt + answer for prompt, answer in pairs], arguments.vocabulary)
    tokenizer.save_pretrained(arguments.out)  # before any call with padding, because that setting would be saved too
    model = build_model(arguments, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, pairs, arguments)
    minutes = (time.perf_counter() - began) / 60
    model.eval()
    seen = {row["question"] for row in train_rows}
    results = {
        family: measure(model, tokenizer, generate([family], arguments.test_size, arguments.seed + 1, seen))
        for family in FAMILIES
    }
    model.save_pretrained(arguments.out)
    card = readme(arguments, model.num_parameters(), minutes, results)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
