"""Compare evaluation in batches with a shared prefix to one example at a time, as in the published scripts.

    python benchmarks/bench_eval.py --threads 1 --json bench_eval.json --markdown

mmlu: 5-shot questions of made-up words, as long as those of MMLU, on a random Llama with a byte-level tokenizer that
the script trains; with --data_path MMLU itself. gsm8k: generated problems, greedy decoding, the bundled model. Both
ways alternate on the same examples and model, and the script stops if their answers differ; the table shows the fewest
CPU seconds of each.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Clock, set_threads, write_result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_one.data.encode import prompt_ids
from lora_one.datasets.arithmetic import PRETRAIN_FAMILIES, generate
from lora_one.datasets.gsm8k import PROMPT
from lora_one.evaluation import mmlu
from lora_one.evaluation.choices import question_of
from lora_one.evaluation.decoding import Decoding, stop_ids
from lora_one.evaluation.engines.local import Transformers
from lora_one.evaluation.generate import complete
from lora_one.evaluation.loading import LoadedModel
from lora_one.models import load_model, load_tokenizer

FIGURES = {
    "examples": ("examples", "{}"),
    "cpu_seconds": ("CPU seconds", "{:.2f}"),
    "examples_per_cpu_second": ("examples per CPU second", "{:.2f}"),
}
SEED, NTRAIN, POSITIONS = 0, 5, 8192
# mean numbers of characters in MMLU's test set: of a question, an option, and five solved questions
QUESTION, OPTION, SHOTS = 275, 42, 2472


def made_up(subjects: int, questions: int) -> list[mmlu.Problem]:
    """Return 5-shot questions of pseudo-words for the first subjects of MMLU."""
    rng = random.Random(SEED)
    words = ["".join(rng.choices("aeioulnrst", k=rng.randint(2, 9))) for _ in range(2000)]

    def text(size: float) -> str:
        found = rng.choice(words)
        while len(found) < size:
            found += " " + rng.choice(words)
        return found

    def row(size: float) -> mmlu.ROW:
        """Return a question of ``size`` times the mean length."""
        return (text(size * QUESTION), *(text(size * OPTION) for _ in mmlu.LETTERS), rng.choice(mmlu.LETTERS))

    problems = []
    for subject in list(mmlu.SUBJECTS)[:subjects]:
        shots = [row(SHOTS / NTRAIN / (QUESTION + 4 * OPTION)) for _ in range(NTRAIN)]
        problems += mmlu.problems_of(subject, [row(rng.uniform(0.5, 1.5)) for _ in range(questions)], shots)
    return problems


def byte_level_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 1,000 pieces with <s> first; " A" is one piece, as in real tokenizers."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    letters = [f" {letter}" for letter in mmlu.LETTERS] * sum(map(len, texts))
    core.train_from_iterator([*texts, *letters], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def random_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def letters_one_by_one(model: Any, tokenizer: Any, problems: Sequence[mmlu.Problem]) -> list[str]:
    """Answer as the published script: one full prompt at a time, with the logits of all positions."""
    found = []
    letters = [question_of(tokenizer, problems[0].prompt, [f" {letter}"]).answers[0][-1] for letter in mmlu.LETTERS]
    for problem in problems:
        ids = torch.tensor(prompt_ids(tokenizer, [problem.prompt]), device=model.device)
        logits = model(input_ids=ids).logits[0, -1, letters]
        found.append(mmlu.LETTERS[int(logits.argmax())])
    return found


def letters_in_batches(model: Any, tokenizer: Any, problems: Sequence[mmlu.Problem], batch_size: int) -> list[str]:
    found = dict(mmlu.likeliest_letters(Transformers(LoadedModel(model, tokenizer, batch_size)), problems))
    return [found[index].text.strip() for index in range(len(problems))]


@torch.no_grad()
def completions_one_by_one(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    stop, found = stop_ids(model.generation_config, tokenizer), []
    for ids in prompt_ids(tokenizer, prompts):
        given = torch.tensor([ids], device=model.device)
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": stop[0], "eos_token_id": stop}
        tokens = model.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :]
        found.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def completions_in_batches(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, batch_size: int
) -> list[str]:
    decoding = Decoding(new_tokens)
    found = dict(complete(model, tokenizer, prompt_ids(tokenizer, prompts), decoding, batch_size))
    return [found[index].text for index in range(len(prompts))]


def measure(name: str, ways: dict[str, Callable[[], list[str]]], repeats: int) -> list[dict[str, Any]]:
    """Return a row for each way, with the fewest CPU seconds. Raises AssertionError: the answers differ."""
    clocks: dict[str, list[Clock]] = {way: [] for way in ways}
    answers: dict[str, list[str]] = {}
    for turn in range(repeats):
        for way, work in ways.items():
            clock = Clock()
            answers[way] = work()
            clock.stop()
            clocks[way].append(clock)
            print(f"{turn + 1}/{repeats} {name}, {way}: {clock.cpu_seconds:.2f} CPU seconds", flush=True)
    first, *others = answers.values()
    assert all(other == first for other in others), f"{name}: the two ways give different answers"
    rows = []
    for way in ways:
        least = min(clock.cpu_seconds for clock in clocks[way])
        rows.append(
            {
                "name": f"{name}, {way}",
                "seconds": min(clock.seconds for clock in clocks[way]),
                "cpu_seconds": least,
                "examples": len(first),
                "examples_per_cpu_second": len(first) / least,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="MMLU's folder with dev/ and test/, instead of made-up questions")
    parser.add_argument("--subjects", type=int, default=1, help="the first so many (%(default)s)")
    parser.add_argument("--questions", type=int, default=96, help="of each subject (%(default)s)")
    parser.add_argument("--problems", type=int, default=64, help="of gsm8k (%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=128, help="of a gsm8k completion, at most (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="of mmlu; gsm8k takes 32 (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch; its own choice unless given")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table and the ratios as Markdown at the end")
    parser.set_defaults(device="cpu")
    chosen = parser.parse_args(arguments)
    set_threads(chosen)
    problems = made_up(chosen.subjects, chosen.questions)
    if chosen.data_path:
        names = list(mmlu.SUBJECTS)[: chosen.subjects]
        found = mmlu.test_questions(chosen.data_path, NTRAIN)
        problems = [p for name in names for p in found if mmlu.subject_of(p.id) == name][: len(problems)]
    texts = {*(problem.body + problem.response for problem in problems), *(shot for p in problems for shot in p.shots)}
    tokenizer = byte_level_tokenizer(sorted(texts))
    model = random_model(len(tokenizer))
    rows = measure(
        "mmlu",
        {
            "one by one": lambda: letters_one_by_one(model, tokenizer, problems),
            "in batches": lambda: letters_in_batches(model, tokenizer, problems, chosen.batch_size),
        },
        chosen.repeats,
    )
    tiny, its_tokenizer = load_model("bundled/tiny"), load_tokenizer("bundled/tiny")
    rows_of_gsm8k = generate(PRETRAIN_FAMILIES, chosen.problems, SEED)
    prompts = [PROMPT.format(question=row["question"]) for row in rows_of_gsm8k]
    rows += measure(
        "gsm8k",
        {
            "one by one": lambda: completions_one_by_one(tiny, its_tokenizer, prompts, chosen.new_tokens),
            "in batches": lambda: completions_in_batches(tiny, its_tokenizer, prompts, chosen.new_tokens, 32),
        },
        chosen.repeats,
    )
    speed = {row["name"]: row["examples_per_cpu_second"] for row in rows}
    ratios = {
        f"{task}: in batches / one by one": speed[f"{task}, in batches"] / speed[f"{task}, one by one"]
        for task in ("mmlu", "gsm8k")
    }
    sizes = ("data_path", "subjects", "questions", "problems", "new_tokens", "batch_size", "repeats")
    settings = {name: getattr(chosen, name) for name in sizes}
    write_result(chosen, {"settings": settings, "rows": rows, "ratios": ratios}, FIGURES)


if __name__ == "__main__":
    main()
