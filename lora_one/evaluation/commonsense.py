"""The eight commonsense sets: the model generates an answer, which contains one of the set's words.

Protocol of the published script: its prompt, 32 new tokens, four beams whose continuations are sampled; the answer is
the first of the set's words in the completion. ``accuracy`` ignores upper and lower case, ``accuracy_official`` is the
published comparison. The protocol lm_eval compares the likelihoods of the options instead: ``commonsense_likelihood``.
"""

import argparse
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one.datasets.commonsense import RESPONSE, WORDS, folder_of_set, read_set
from lora_one.errors import UsageError, nearest
from lora_one.evaluation.benchmark import AnswerBenchmark
from lora_one.evaluation.commonsense_choices import examples_of
from lora_one.evaluation.commonsense_likelihood import PROTOCOL, check_protocol, likeliest_options, remarks_of
from lora_one.evaluation.decoding import Completion, Decoding
from lora_one.evaluation.options import EvaluationOptions, filled_in, option
from lora_one.evaluation.scoring import prediction_line
from lora_one.evaluation.shares import by_kind, counts_of, shares
from lora_one.statistics.shares import share_of
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.evaluation.engines.protocol import Engine

PUBLISHED = {"temperature": 0.1, "top_p": 0.75}
BEAMS, TOP_K = 4, 40
TOGETHER = 16  # prompts that share their random numbers, unless --batch_size is given
PUBLISHED_PLACE = Path("dataset")  # the folder of the published script
FORMAT = re.compile(r"Answer format: (\S+)")
KINDS = {
    "accuracy": "correct",
    "accuracy_official": "correct_official",
    "accuracy_likelihood": "correct_likelihood",
    "accuracy_norm": "correct_norm",
}


def sets_of(chosen: str) -> list[str]:
    """Return the names of the sets in a comma-separated list, or of all sets. Raises UsageError: an unknown name."""
    names = list(WORDS) if chosen == "all" else list(dict.fromkeys(chosen.split(",")))
    for name in names:
        if name not in WORDS:
            raise UsageError(f"--dataset={name} is not a commonsense set: {nearest(name, ['all', *WORDS])}")
    return names


def published_decoding(options: "CommonsenseOptions") -> "CommonsenseOptions":
    """Return the options with sampled beams; temperature, top_p and batch size are the published ones if not given."""
    unset = {name: value for name, value in PUBLISHED.items() if getattr(options, name) is None}
    together = options.batch_size or TOGETHER  # the prompts of a batch share random numbers
    return replace(options, **unset, beams=BEAMS, top_k=TOP_K, batch_size=together, drawn_together=together)


def test_rows(data_path: str | None, dataset: str = "all", limit: int | None = None) -> list[Example]:
    """Return the test examples of the chosen sets, one set after the other; of each set the first ``limit``."""
    folders = folders_of(data_path, dataset)
    return [example for name, folder in folders.items() for example in read_set(folder, name, "test")[:limit]]


def folders_of(data_path: str | None, dataset: str) -> dict[str, Path]:
    """Return the folder, or the file, of each chosen set. Raises UsageError: there is none."""
    place, names = Path(data_path or PUBLISHED_PLACE).expanduser(), sets_of(dataset)
    return {name: folder_of_set(place, name, alone=len(names) == 1) for name in names}


def by_likelihood(engine: "Engine", examples: Sequence[Example], done: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return index -> the log-likelihood of each allowed response, and the word of the likeliest response.

    A response is the whole sentence of the training data, "the correct answer is <word>". Its log-likelihood is the sum
    over its tokens, not divided by their number, which differs at most in boolq. The words are those that the
    question's "Answer format:" allows. For a question longer than the model's context, no word is chosen.
    """
    from lora_one.distributed import Processes
    from lora_one.evaluation.choices import questions_of

    groups: dict[tuple[str, ...], list[int]] = {}  # with the same set and words, prompts begin with the same tokens
    for index, example in enumerate(examples):
        name = set_of(example.id)
        groups.setdefault((name, *allowed_words(name, example.prompt)), []).append(index)
    found: dict[int, dict[str, Any]] = {}
    for (_, *words), indices in groups.items():
        responses = [RESPONSE.format(word=word) for word in words]
        questions = questions_of(engine.tokenizer, [examples[index].prompt for index in indices], responses)
        fitting = [place for place, question in enumerate(questions) if question.length <= engine.context]
        beyond = set(range(len(indices))) - set(fitting)
        found |= {indices[place]: {"prediction_likelihood": None, "correct_likelihood": False} for place in beyond}
        known = {number for number, place in enumerate(fitting) if indices[place] in done}
        asked = [questions[place] for place in fitting]
        for number, values in engine.log_likelihoods(asked, known):
            index = indices[fitting[number]]
            by_word = dict(zip(words, values, strict=True))
            best = max(by_word, key=by_word.get)
            correct = best == examples[index].gold
            found[index] = {"log_likelihoods": by_word, "prediction_likelihood": best, "correct_likelihood": correct}
    return {index: line for part in Processes.current().gathered(found) for index, line in part.items()}


def allowed_words(name: str, prompt: str) -> list[str]:
    """Return the words after the last "Answer format:" of the prompt; without one, all words of the set."""
    formats = FORMAT.findall(prompt)
    words = formats[-1].split("/") if formats else []
    return words if words and set(words) <= set(WORDS[name]) else list(WORDS[name])


def set_of(example_id: Any) -> str:
    """Return the set of an id ``<set>/<number>``. Raises KeyError: there is no such set."""
    name = str(example_id).partition("/")[0]
    if name not in WORDS:
        raise KeyError(name)
    return name


def parse(completion: str, name: str) -> str | None:
    """Return the first of the set's words in the completion, in upper or lower case; None: unparsed.

    >>> parse("The correct answer is True, not false", "boolq"), parse("yes", "boolq")
    ('true', None)
    """
    found = re.search("|".join(WORDS[name]), completion, re.IGNORECASE)
    return found[0].lower() if found else None


def parse_published(completion: str, name: str) -> str | None:
    """Return the word as the published script does: in exact case, after the last "### Response:" if there is one."""
    found = re.search("|".join(WORDS[name]), completion.rpartition("### Response:")[2])
    return found[0] if found else None


@dataclass(frozen=True, kw_only=True)
class CommonsenseOptions(EvaluationOptions):
    """Options of the commonsense sets; beams, top_k and drawn_together describe the published decoding."""

    max_new_tokens: int = option(
        32, help="maximum number of new tokens per completion (%(default)s)", decides="completions"
    )
    dataset: str = option(
        "all",
        help="a set, several separated by commas, or all; --limit applies to each set (%(default)s)",
        decides="completions",
    )
    greedy: bool = option(
        False,
        help="greedy decoding instead of the published sampled beams, which depend on --batch_size",
        decides="completions",
    )
    likelihood: bool = option(
        False, help="also choose the answer with the largest likelihood, as a second metric", decides="completions"
    )
    protocol: str | None = option(
        None,
        help="published: the model writes an answer (default); lm_eval: the likeliest option, with the prompts and "
        "scores of lm_eval's tasks",
        metavar="{published,lm_eval}",
        decides="completions",
    )
    num_fewshot: int | None = option(
        None,
        type=int,
        help="with --protocol=lm_eval: number of solved examples before each question (default: 0)",
        decides="completions",
    )
    beams: int | None = filled_in(None, decides="completions")
    top_k: int | None = filled_in(None, decides="completions")
    drawn_together: int | None = filled_in(None, decides="completions")  # prompts that share random numbers


class Commonsense(AnswerBenchmark[CommonsenseOptions]):
    """The commonsense sets, on their test splits."""

    options = CommonsenseOptions

    def add_spellings(self, parser: argparse.ArgumentParser) -> None:
        """Add the published names of the model and of the W&B run."""
        add = parser.add_argument
        add("--base_model", dest="model_name", default=argparse.SUPPRESS, help="the published name of --model_name")
        add("--name", dest="wandb_name", default=argparse.SUPPRESS, help="the published name of --wandb_name")

    def check(self, options: CommonsenseOptions) -> CommonsenseOptions:
        """Fill in the published decoding and the published folder of the data.

        Raises UsageError: an unknown set, no data, or options that contradict each other.
        """
        sets_of(options.dataset)
        check_protocol(options)
        if options.rescore:
            return options
        if options.protocol == PROTOCOL:
            options = replace(options, num_fewshot=options.num_fewshot or 0)
        else:
            options = replace(options, protocol=None)
        if options.greedy and options.temperature is not None:
            raise UsageError(
                f"--greedy and --temperature={options.temperature} contradict each other: drop one of them"
            )
        if not options.greedy and options.protocol is None:
            options = published_decoding(options)
        if options.data_path is None:
            if not PUBLISHED_PLACE.is_dir():
                raise UsageError(
                    "the commonsense sets are not on the hub: download them from the LLM-Adapters repository "
                    "(dataset/<set>/test.json) and pass --data_path=<the folder with a subfolder for each set>"
                )
            options = replace(options, data_path=str(PUBLISHED_PLACE))
        return options

    def needs_model(self, options: CommonsenseOptions) -> str | None:
        """Return what needs the model itself: sampled beams."""
        without = "--greedy and --protocol=lm_eval do without"
        return f"the published decoding with sampled beams ({without})" if options.beams else None

    def takes_template(self, options: CommonsenseOptions) -> bool:
        """Return whether there are generated answers; the likelihoods beside them follow prompts without a template."""
        return options.protocol is None

    def folder(self, task: str, options: CommonsenseOptions) -> str:
        """Return a different folder for each choice of sets and each protocol."""
        place = task if options.dataset == "all" else f"{task}/{'+'.join(sets_of(options.dataset))}"
        return place if options.protocol is None else f"{place}-{options.protocol}-{options.num_fewshot}-shot"

    def examples(self, options: CommonsenseOptions) -> list[Example]:
        """Return the test examples of the chosen sets."""
        return self.limited_examples(replace(options, limit=None))

    def limited_examples(self, options: CommonsenseOptions) -> list[Example]:
        """Return the first --limit examples of each set."""
        if options.protocol is None:
            return test_rows(options.data_path, options.dataset, options.limit)
        folders = folders_of(options.data_path, options.dataset)
        asked = [examples_of(folder, name, options.num_fewshot) for name, folder in folders.items()]
        return [example for examples in asked for example in examples[: options.limit]]

    def answers(
        self, engine: "Engine", examples: Sequence[Example], options: CommonsenseOptions, done: Collection[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, the completion); with --likelihood, its details contain the likeliest answer."""
        if options.protocol == PROTOCOL:
            yield from likeliest_options(engine, examples, done)
            return
        likely = by_likelihood(engine, examples, done) if options.likelihood else {}
        sampling = (options.temperature, options.top_p, options.seed)
        decoding = Decoding(options.max_new_tokens, *sampling, beams=options.beams or 1, top_k=options.top_k or 0)
        prompts, names = engine.encoder.prompts(examples), [example.id for example in examples]
        for index, completion in engine.generate(prompts, decoding, names, done):
            yield index, replace(completion, details=likely.get(index, {}))

    def score(self, example_id: Any, prompt: str, completion: str, gold: str) -> dict[str, Any]:
        """Return one line of predictions.jsonl. Raises KeyError: the id does not begin with the name of a set."""
        name = set_of(example_id)
        prediction = parse(completion, name)
        line = prediction_line(example_id, prompt, completion, gold, prediction, correct=prediction == gold)
        return line | {"correct_official": parse_published(completion, name) == gold}

    def summarize(self, predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
        """Return (metrics, counts): each kind of accuracy over all examples, if all have it.

        With several sets, also by set, and the unweighted mean over the sets. Standard errors are sqrt(p (1 - p) / n),
        for that mean sqrt(sum of squares) / sets.
        """
        lines_of: dict[str, list[dict[str, Any]]] = {}
        for line in predictions:
            lines_of.setdefault(set_of(line["id"]), []).append(line)
        metrics: dict[str, float] = {}
        for kind, field in KINDS.items():
            parts = {f"{kind}/{name}": by_kind(lines, {kind: field}).get(kind) for name, lines in lines_of.items()}
            scored = {part: hits for part, hits in parts.items() if hits}
            if len(parts) > 1:
                metrics |= shares(scored)
            if len(parts) > len(scored):
                continue
            if len(parts) > 1:
                found = [share_of(hits) for hits in scored.values()]
                metrics[f"{kind}/mean"] = sum(share for share, _ in found) / len(found)
                metrics[f"{kind}/mean_stderr"] = sqrt(sum(error**2 for _, error in found)) / len(found)
            metrics |= shares({kind: [hit for hits in scored.values() for hit in hits]})
        return metrics, counts_of(predictions)

    def judge(
        self, predictions: Sequence[dict[str, Any]], options: CommonsenseOptions, output: Path
    ) -> list[dict[str, Any]]:
        """Return the predictions; those of likelihoods without the published comparison of generated text."""
        return [
            {name: value for name, value in line.items() if name != "correct_official" or "protocol" not in line}
            for line in predictions
        ]

    def remarks(self, predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Count the questions that are not comparable with published results, and those that lost tokens."""
        return remarks_of(predictions)
