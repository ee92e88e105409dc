"""Compare evaluation in batches with a shared prefix to one example at a time, as in the published scripts.

    python benchmarks/bench_eval.py --threads 1 --json bench_eval.json --markdown

mmlu: 5-shot questions of made-up words, as long as those of MMLU, on a random Llama with a byte-level tokenizer that
the script trains; with --data_path MMLU itself. gsm8k: generated problems, greedy decoding, the bundled model.
commonsense (the eight sets: greedy, the published beams, and --likelihood) and humaneval (greedy; no program is run):
made-up texts in the form of the sets and as long, on a random Llama with a tokenizer of its own. Both ways alternate on
the same examples and model, and the script stops if their answers differ; the table shows the fewest CPU seconds of
each. The published beams are sampled, and a batch shares its random numbers, so their answers are compared without
sampling, on a quarter of the examples.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Clock, set_threads, write_result
from made_up import NTRAIN, SEED, commonsense_examples, humaneval_prompts, mmlu_problems
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_one.data.encode import prompt_ids
from lora_one.datasets.arithmetic import PRETRAIN_FAMILIES, generate
from lora_one.datasets.commonsense import RESPONSE
from lora_one.datasets.gsm8k import PROMPT
from lora_one.evaluation import commonsense, mmlu
from lora_one.evaluation.choices import question_of
from lora_one.evaluation.decoding import Decoding, stop_ids
from lora_one.evaluation.engines.local import Transformers
from lora_one.evaluation.generate import complete
from lora_one.evaluation.loading import LoadedModel
from lora_one.models import load_model, load_tokenizer
from lora_one.types import Example

FIGURES = {
    "examples": ("examples", "{}"),
    "cpu_seconds": ("CPU seconds", "{:.2f}"),
    "examples_per_cpu_second": ("examples per CPU second", "{:.2f}"),
}
POSITIONS = 8192
COMMONSENSE_TOKENS = 32  # of a completion, the default of eval_commonsense.py
TOGETHER = 16  # prompts in a batch of the new texts, the default on a CPU
PUBLISHED = Decoding(COMMONSENSE_TOKENS, **commonsense.PUBLISHED, beams=commonsense.BEAMS, top_k=commonsense.TOP_K)
Ways = dict[str, Callable[[], list[str]]]
ONE, MANY = "one by one", "in batches"


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


def random_model(vocabulary: int, key_value_heads: int = 16) -> LlamaForCausalLM:
    """Return a Llama with random weights; fewer heads of keys and values than 16 make its cache smaller."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,
        bos_token_id=0,  # <s> and </s> of the tokenizer
        eos_token_id=1,
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
def completions_one_by_one(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, decoding: Decoding | None = None
) -> list[str]:
    """Complete one prompt at a time, greedily or by the beams of ``decoding``."""
    stop, found = stop_ids(model.generation_config, tokenizer), []
    chosen = {"do_sample": False} if decoding is None else decoding.beam_options()
    torch.manual_seed(SEED)
    for ids in prompt_ids(tokenizer, prompts):
        given = torch.tensor([ids], device=model.device)
        options = {"max_new_tokens": new_tokens, "pad_token_id": stop[0], "eos_token_id": stop, **chosen}
        tokens = model.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :]
        found.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def completions_in_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    new_tokens: int,
    batch_size: int,
    decoding: Decoding | None = None,
) -> list[str]:
    """Complete the prompts, greedily or by the beams of ``decoding``."""
    asked = prompt_ids(tokenizer, prompts), decoding or Decoding(new_tokens), batch_size
    found = dict(complete(model, tokenizer, *asked))
    return [found[index].text for index in range(len(prompts))]


@torch.no_grad()
def words_one_by_one(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """Return each example's likeliest word: one prompt and response at a time, with the logits of all positions."""
    found = []
    for example in examples:
        words = commonsense.allowed_words(commonsense.set_of(example.id), example.prompt)
        question = question_of(tokenizer, example.prompt, [RESPONSE.format(word=word) for word in words])
        likelihoods = []
        for answer in question.answers:
            ids = torch.tensor([question.context + answer], device=model.device)
            log_p = model(input_ids=ids).logits[0, len(question.context) - 1 : -1].log_softmax(-1)
            likelihoods.append(float(log_p[range(len(answer)), answer].sum()))
        found.append(words[likelihoods.index(max(likelihoods))])
    return found


def words_in_batches(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int) -> list[str]:
    """Return each example's likeliest word, as eval_commonsense.py --likelihood does."""
    found = commonsense.by_likelihood(Transformers(LoadedModel(model, tokenizer, batch_size)), examples, ())
    return [found[index]["prediction_likelihood"] for index in range(len(examples))]


def measure(name: str, ways: Ways, repeats: int, *, alike: bool = True) -> list[dict[str, Any]]:
    """Return a row for each way, with the fewest CPU seconds.

    alike: the answers of all ways must be equal.  Raises AssertionError: they differ.
    """
    clocks: dict[str, list[Clock]] = {way: [] for way in ways}
    answers: dict[str, list[str]] = {}
    for turn in range(repeats):
        for way, work in ways.items():
            clock = Clock()
            answers[way] = work()
            clock.stop()
            clocks[way].append(clock)
            print(f"{turn + 1}/{repeats} {name}, {way}: {clock.cpu_seconds:.2f} CPU seconds", flush=True)
    first = next(iter(answers.values()))
    if alike:
        refuse_different(name, answers)
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


def refuse_different(name: str, answers: dict[str, list[str]]) -> None:
    """Raise AssertionError if two ways gave different answers."""
    first, *others = answers.values()
    assert all(other == first for other in others), f"{name}: the two ways give different answers"


def mmlu_ways(chosen: argparse.Namespace) -> Ways:
    problems = mmlu_problems(chosen.subjects, chosen.questions)
    if chosen.data_path:
        names = list(mmlu.SUBJECTS)[: chosen.subjects]
        found = mmlu.test_questions(chosen.data_path, NTRAIN)
        problems = [p for name in names for p in found if mmlu.subject_of(p.id) == name][: len(problems)]
    texts = {*(problem.body + problem.response for problem in problems), *(shot for p in problems for shot in p.shots)}
    tokenizer = byte_level_tokenizer(sorted(texts))
    model = random_model(len(tokenizer))
    return {
        ONE: lambda: letters_one_by_one(model, tokenizer, problems),
        MANY: lambda: letters_in_batches(model, tokenizer, problems, chosen.batch_size),
    }


def gsm8k_ways(chosen: argparse.Namespace) -> Ways:
    tiny, tokenizer = load_model("bundled/tiny"), load_tokenizer("bundled/tiny")
    prompts = [PROMPT.format(question=row["question"]) for row in generate(PRETRAIN_FAMILIES, chosen.problems, SEED)]
    return {
        ONE: lambda: completions_one_by_one(tiny, tokenizer, prompts, chosen.new_tokens),
        MANY: lambda: completions_in_batches(tiny, tokenizer, prompts, chosen.new_tokens, 32),
    }


def greedy_ways(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> Ways:
    return {
        ONE: lambda: completions_one_by_one(model, tokenizer, prompts, new_tokens),
        MANY: lambda: completions_in_batches(model, tokenizer, prompts, new_tokens, TOGETHER),
    }


def beam_ways(model: Any, tokenizer: Any, prompts: Sequence[str], decoding: Decoding) -> Ways:
    return {
        ONE: lambda: completions_one_by_one(model, tokenizer, prompts, decoding.max_new_tokens, decoding),
        MANY: lambda: completions_in_batches(model, tokenizer, prompts, decoding.max_new_tokens, TOGETHER, decoding),
    }


def likelihood_ways(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Ways:
    return {
        ONE: lambda: words_one_by_one(model, tokenizer, examples),
        MANY: lambda: words_in_batches(model, tokenizer, examples, TOGETHER),
    }


def rows_of_new_texts(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure commonsense and humaneval."""
    examples, problems = commonsense_examples(chosen.commonsense), humaneval_prompts(chosen.programs)
    prompts = [example.prompt for example in examples]
    tokenizer = byte_level_tokenizer([*prompts, *(example.response for example in examples), *problems])
    model = random_model(len(tokenizer), key_value_heads=4)
    rows = measure("commonsense greedy", greedy_ways(model, tokenizer, prompts, COMMONSENSE_TOKENS), chosen.repeats)
    unsampled = beam_ways(model, tokenizer, prompts[::4], replace(PUBLISHED, temperature=None))
    refuse_different("commonsense beams without sampling", {way: work() for way, work in unsampled.items()})
    beams = beam_ways(model, tokenizer, prompts, PUBLISHED)
    rows += measure("commonsense beams", beams, chosen.repeats, alike=False)
    rows += measure("commonsense likelihood", likelihood_ways(model, tokenizer, examples), chosen.repeats)
    return rows + measure("humaneval", greedy_ways(model, tokenizer, problems, chosen.new_tokens), chosen.repeats)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="MMLU's folder with dev/ and test/, instead of made-up questions")
    parser.add_argument("--subjects", type=int, default=1, help="the first so many (%(default)s)")
    parser.add_argument("--questions", type=int, default=96, help="of each subject (%(default)s)")
    parser.add_argument("--problems", type=int, default=64, help="of gsm8k (%(default)s)")
    parser.add_argument("--commonsense", type=int, default=8, help="examples of each of the eight sets (%(default)s)")
    parser.add_argument("--programs", type=int, default=32, help="problems of humaneval (%(default)s)")
    parser.add_argument(
        "--new_tokens", type=int, default=128, help="of a completion of gsm8k or humaneval, at most (%(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="of mmlu; gsm8k takes 32, others 16 (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch; its own choice unless given")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table and the ratios as Markdown at the end")
    parser.set_defaults(device="cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parsed(arguments)
    set_threads(chosen)
    rows = measure("mmlu", mmlu_ways(chosen), chosen.repeats)
    rows += measure("gsm8k", gsm8k_ways(chosen), chosen.repeats)
    rows += rows_of_new_texts(chosen)
    speed = {row["name"]: row["examples_per_cpu_second"] for row in rows}
    tasks = [name.removesuffix(f", {ONE}") for name in speed if name.endswith(f", {ONE}")]
    ratios = {f"{task}: {MANY} / {ONE}": speed[f"{task}, {MANY}"] / speed[f"{task}, {ONE}"] for task in tasks}
    sizes = ("data_path", "subjects", "questions", "problems", "commonsense", "programs")
    settings = {name: getattr(chosen, name) for name in (*sizes, "new_tokens", "batch_size", "repeats")}
    write_result(chosen, {"settings": settings, "rows": rows, "ratios": ratios}, FIGURES)


if __name__ == "__main__":
    main()
