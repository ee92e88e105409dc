"""The commonsense sets by likelihood, with the tokens and the scores of lm_eval 0.4.13.

The answer is the option whose text is likeliest after the question (``accuracy``, lm_eval's acc), or likeliest when its
log-likelihood is divided by its number of characters (``accuracy_norm``, lm_eval's acc_norm). A log-likelihood is the
sum over the tokens of the option.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lora_one.errors import UsageError, nearest
from lora_one.evaluation.commonsense_choices import ChoiceExample
from lora_one.evaluation.decoding import Completion

if TYPE_CHECKING:
    from lora_one.evaluation.choices import Question
    from lora_one.evaluation.commonsense import CommonsenseOptions
    from lora_one.evaluation.engines.protocol import Engine

PROTOCOL = "lm_eval"
NORMALISED = ("piqa", "hellaswag", "ARC-Easy", "ARC-Challenge", "openbookqa")  # the tasks that have acc_norm
NO_PASSAGE = "boolq"
PROTOCOLS = ("published", PROTOCOL)
OF_GENERATION = ("greedy", "likelihood", "temperature", "top_p", "max_new_tokens")  # options that have no effect here
Part = tuple[list[int], "Question"]  # numbers of the options with the same context, and their question


def check_protocol(options: "CommonsenseOptions") -> None:
    """Raise UsageError: an unknown protocol, or an option that the chosen one does not read."""
    if options.protocol not in (None, *PROTOCOLS):
        raise UsageError(f"--protocol={options.protocol} is not a protocol: {nearest(options.protocol, PROTOCOLS)}")
    if options.protocol != PROTOCOL:
        if options.num_fewshot is not None:
            raise UsageError(
                f"--num_fewshot={options.num_fewshot} needs --protocol={PROTOCOL}: the published prompt has no solved "
                "examples"
            )
        return
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UsageError(f"--num_fewshot={options.num_fewshot} must be at least 0: pass a larger number")
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in OF_GENERATION and value != field.default:
            given = f"--{field.name}" if value is True else f"--{field.name}={value}"
            raise UsageError(
                f"{given} has no effect with --protocol={PROTOCOL}, which compares the likelihoods of the options and "
                "generates no text: leave it out"
            )


def questions_of(tokenizer: Any, example: ChoiceExample, context: int) -> tuple[list[Part], int]:
    """Return a part for each different context of a question's options, and the number of tokens cut.

    Tokens are lm_eval's: white space at the end of the context belongs to the continuation; the context is tokenized
    alone, and the tokens of the whole text that follow as many tokens are the continuation. Texts longer than the
    model's context lose their first tokens.
    Raises UsageError: an option is longer than the model's context.
    """
    from lora_one.data.encode import prompt_ids
    from lora_one.evaluation.choices import Question

    asked = example.choice
    contexts = [example.shots + text for text in asked.contexts]
    wholes = [f"{text} {after}" for text, after in zip(contexts, asked.continuations, strict=True)]
    before = list(dict.fromkeys(text.rstrip() for text in contexts))
    ids = dict(zip([*before, *wholes], prompt_ids(tokenizer, [*before, *wholes]), strict=True))
    by_context: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    most_cut = 0
    for number, (text, whole) in enumerate(zip(contexts, wholes, strict=True)):
        read = ids[text.rstrip()]
        answer = ids[whole][len(read) :]
        cut = max(0, len(read) + len(answer) - 1 - context)
        if cut >= len(read):
            raise UsageError(
                f"option {number + 1} of {example.id} has {len(answer)} tokens, more than the model's context of "
                f"{context}: evaluate a model with a longer context"
            )
        most_cut = max(most_cut, cut)
        by_context.setdefault(tuple(read[cut:]), []).append((number, answer))
    return [
        ([number for number, _ in options], Question(list(read), [answer for _, answer in options]))
        for read, options in by_context.items()
    ], most_cut


def likeliest_options(
    engine: "Engine", examples: Sequence[ChoiceExample], done: Collection[int]
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, the word of the likeliest option) of each example that is not in ``done``, set by set.

    The solved examples that the questions of a set share are read once; questions that were cut are read separately.
    With several processes, each one yields its share.
    """
    from lora_one.distributed import Processes

    processes = Processes.current()
    groups: dict[tuple[str, bool], list[tuple[int, Part]]] = {}
    cuts: dict[int, int] = {}
    for index, example in enumerate(examples):
        parts, cuts[index] = questions_of(engine.tokenizer, example, engine.context)
        groups.setdefault((set_of(example), cuts[index] > 0), []).extend((index, part) for part in parts)
    for group in groups.values():
        found: dict[int, dict[int, float]] = {}  # index -> number of an option -> its log-likelihood
        known = {place for place, (index, _) in enumerate(group) if index in done}
        for place, values in engine.log_likelihoods([question for _, (_, question) in group], known, long=True):
            index, (numbers, _) = group[place]
            found.setdefault(index, {}).update(zip(numbers, values, strict=True))
            if len(found[index]) == len(examples[index].words):
                yield index, chosen(examples[index], found.pop(index), cuts[index])
        rest: dict[int, dict[int, float]] = {}  # of questions whose options several processes have scored
        for part in processes.gathered(found):
            for index, values in part.items():
                rest.setdefault(index, {}).update(values)
        for index in sorted(rest)[processes.rank :: processes.count]:
            yield index, chosen(examples[index], rest[index], cuts[index])


def set_of(example: ChoiceExample) -> str:
    """Return the set of an example, the first part of its id."""
    return str(example.id).partition("/")[0]


def chosen(example: ChoiceExample, log_p: dict[int, float], cut: int) -> Completion:
    """Return the answer of a question as its word, with the log-likelihood of each option in the details.

    Of equal log-likelihoods the first one is chosen, as by lm_eval.
    """
    values = [log_p[number] for number in range(len(example.words))]
    best = example.words[values.index(max(values))]
    details: dict[str, Any] = {
        "protocol": PROTOCOL,
        "num_fewshot": example.num_fewshot,
        "log_likelihoods": dict(zip(example.words, values, strict=True)),
    }
    if set_of(example) in NORMALISED:
        means = [value / len(text) for value, text in zip(values, example.choice.options, strict=True)]
        word = example.words[means.index(max(means))]
        details |= {"prediction_norm": word, "correct_norm": word == example.gold}
    return Completion(best, details=details | ({"tokens_cut": cut} if cut else {}))


def remarks_of(predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Count the questions of boolq, which have no passage here, and those that lost tokens to fit in the context."""
    lines = [line for line in predictions if "protocol" in line]
    counts = {
        "not_comparable": sum(line["id"].startswith(f"{NO_PASSAGE}/") for line in lines),
        "questions_cut": sum("tokens_cut" in line for line in lines),
    }
    return {name: count for name, count in counts.items() if count}
