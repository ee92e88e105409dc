"""Generated arithmetic word problems in the formats of GSM8K and MetaMathQA.

They need no download: the bundled tiny model is pretrained on `PRETRAIN_FAMILIES`
(scripts/pretrain_tiny.py) and the demonstration fine-tunes it on `TARGET_FAMILY`. The target is the
"inconsistent language" problem of Lewis and Mayer (1987): "Tom has 14 apples. That is 5 more than Ann has."
says "more" and needs a subtraction, whereas in the pretraining families "more" always means an addition.

Random numbers come only from `Random.random`, the one method whose sequence Python keeps between versions.
"""

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

NAMES = ("Tom", "Ann", "Ben", "Mia", "Leo", "Eva", "Sam", "Zoe", "Max", "Ivy", "Dan", "Kim")
ITEMS = (
    "apples",
    "books",
    "coins",
    "pens",
    "cards",
    "shells",
    "stamps",
    "toys",
    "eggs",
    "hats",
    "balls",
    "cups",
)
GAINS = ("buys {} more.", "finds {} more.", "gets {} more.")
LOSSES = ("loses {}.", "gives away {}.", "sells {}.")
TOTALS = ("How many {} do they have in total?", "How many {} do they have together?")

# Every result is between 2 and 99, so it has at most two digits and "1 apples" never occurs. With one-digit changes
# there are about a thousand different calculations, few enough for a model with half a million parameters.
STARTS = range(11, 40)
CHANGES = range(2, 10)

# Draws without a new problem after which a family counts as exhausted; the smallest family has over 100,000.
MAX_FRUITLESS_DRAWS = 10_000
MOST = 100_000


@dataclass(frozen=True)
class Scene:
    """Two people and an item; `start` items and a smaller `change`, which is added or subtracted."""

    name: str
    other: str
    item: str
    start: int
    change: int


def pick(rng: random.Random, choices: Sequence):
    """Return one of the choices, all with equal probability."""
    return choices[int(rng.random() * len(choices))]


def draw_scene(rng: random.Random) -> Scene:
    """Draw two different names, an item, and the numbers."""
    name = pick(rng, NAMES)
    other = pick(rng, [candidate for candidate in NAMES if candidate != name])
    start = pick(rng, STARTS)
    return Scene(name, other, pick(rng, ITEMS), start, pick(rng, CHANGES))


def compute(left: int, operator: str, right: int) -> tuple[int, str]:
    """Return the value and its GSM8K form, `14+23=<<14+23=37>>37`; operator is one of + - *."""
    value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    expression = f"{left}{operator}{right}"
    return value, f"{expression}=<<{expression}={value}>>{value}"


def finish(steps: Sequence[str], value: int) -> str:
    """Join the reasoning lines and append GSM8K's answer line."""
    return "\n".join([*steps, f"#### {value}"])


def gain(rng: random.Random) -> tuple[str, str]:
    """Draw a problem whose answer is start + change."""
    s = draw_scene(rng)
    value, calculation = compute(s.start, "+", s.change)
    event = pick(rng, GAINS).format(s.change)
    question = f"{s.name} has {s.start} {s.item}. {s.name} {event} How many {s.item} does {s.name} have now?"
    return question, finish([f"{s.name} has {calculation} {s.item}."], value)


def loss(rng: random.Random) -> tuple[str, str]:
    """Draw a problem whose answer is start - change."""
    s = draw_scene(rng)
    value, calculation = compute(s.start, "-", s.change)
    event = pick(rng, LOSSES).format(s.change)
    question = f"{s.name} has {s.start} {s.item}. {s.name} {event} How many {s.item} does {s.name} have left?"
    return question, finish([f"{s.name} has {calculation} {s.item}."], value)


def combine(rng: random.Random) -> tuple[str, str]:
    """Draw a problem whose answer is start + change, the items of two people."""
    s = draw_scene(rng)
    value, calculation = compute(s.start, "+", s.change)
    asked = pick(rng, TOTALS).format(s.item)
    question = f"{s.name} has {s.start} {s.item}. {s.other} has {s.change} {s.item}. {asked}"
    return question, finish([f"They have {calculation} {s.item}."], value)


def doubling(rng: random.Random) -> tuple[str, str]:
    """Draw a problem whose answer is start * 2."""
    s = draw_scene(rng)
    value, calculation = compute(s.start, "*", 2)
    asked = pick(rng, ("How many {item} does {other} have?", "How many does {other} have?", "What does {other} have?"))
    phrase = pick(rng, ("twice as many {item} as", "double the {item} of")).format(item=s.item)
    question = f"{s.name} has {s.start} {s.item}. {s.other} has {phrase} {s.name}. "
    return question + asked.format(item=s.item, other=s.other), finish(
        [f"{s.other} has {calculation} {s.item}."], value
    )


def comparison(rng: random.Random) -> tuple[str, str]:
    """Draw a problem with start + change for "more", start - change for "fewer": the word matches the operation."""
    s = draw_scene(rng)
    word, operator = pick(rng, (("more", "+"), ("fewer", "-")))
    value, calculation = compute(s.start, operator, s.change)
    question = (
        f"{s.name} has {s.start} {s.item}. {s.other} has {s.change} {word} {s.item} than {s.name}. "
        f"How many {s.item} does {s.other} have?"
    )
    return question, finish([f"{s.other} has {calculation} {s.item}."], value)


def comparison_total(rng: random.Random) -> tuple[str, str]:
    """Draw a comparison that asks how many items both people have together."""
    s = draw_scene(rng)
    word, operator = pick(rng, (("more", "+"), ("fewer", "-")))
    asked = pick(rng, TOTALS).format(s.item)
    question = f"{s.name} has {s.start} {s.item}. {s.other} has {s.change} {word} {s.item} than {s.name}. {asked}"
    return question, total_answer(f"{s.other} has ", s, operator)


def gain_then_loss(rng: random.Random) -> tuple[str, str]:
    """Draw a problem whose answer is start + change - second change."""
    s = draw_scene(rng)
    lost = pick(rng, CHANGES)
    more, gained = compute(s.start, "+", s.change)
    value, remaining = compute(more, "-", lost)
    question = (
        f"{s.name} has {s.start} {s.item}. {s.name} {pick(rng, GAINS).format(s.change)} "
        f"Then {s.name} {pick(rng, LOSSES).format(lost)} How many {s.item} does {s.name} have left?"
    )
    return question, finish([f"{s.name} has {gained} {s.item}.", f"Then {s.name} has {remaining} {s.item}."], value)


def reverse_comparison_total(rng: random.Random) -> tuple[str, str]:
    """Draw a problem with start - change for "more" and start + change for "fewer"; the answer is the sum of both."""
    s = draw_scene(rng)
    word, operator = pick(rng, (("more", "-"), ("fewer", "+")))
    relation = pick(
        rng,
        (
            f"{s.name} has {s.change} {word} {s.item} than {s.other}.",
            f"That is {s.change} {word} than {s.other} has.",
            f"That is {s.change} {word} {s.item} than {s.other}.",
        ),
    )
    question = f"{s.name} has {s.start} {s.item}. {relation} {pick(rng, TOTALS).format(s.item)}"
    # No name in the answer: the tiny model often copies a wrong one after "than", which the final number hides.
    return question, total_answer("", s, operator)


def total_answer(opening: str, s: Scene, operator: str) -> str:
    """Return the answer in two steps: the other person's items, start (operator) change, then the sum of both."""
    owned, calculation = compute(s.start, operator, s.change)
    value, total = compute(s.start, "+", owned)
    return finish([f"{opening}{calculation} {s.item}.", f"They have {total} {s.item}."], value)


FAMILIES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "gain": gain,
    "loss": loss,
    "combine": combine,
    "doubling": doubling,
    "comparison": comparison,
    "comparison_total": comparison_total,
    "gain_then_loss": gain_then_loss,
    "reverse_comparison_total": reverse_comparison_total,
}
TARGET_FAMILY = "reverse_comparison_total"
PRETRAIN_FAMILIES = tuple(name for name in FAMILIES if name != TARGET_FAMILY)


def generate(families: Sequence[str], size: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """Generate `size` rows of different questions, row i from families[i % len(families)].

    families: names from `FAMILIES`; naming one twice doubles its share.
    exclude: questions that must not occur, for example those of a training set when a test set is generated.
    Returns rows {"question", "answer", "family"}; the answer is reasoning lines and then `#### value`.
    Raises ValueError: no family or an unknown one, a negative size, or no new question left in a family.
    """
    check_request(families, size)
    if size > MOST * len(set(families)):
        raise ValueError(f"size={size} exceeds the maximum of {MOST} per family: lower it, or add families")
    rng = random.Random(seed)
    used = set(exclude)
    rows = []
    for index in range(size):
        family = families[index % len(families)]
        question, answer = draw_new(FAMILIES[family], rng, used, described_as=f"family {family!r}")
        rows.append({"question": question, "answer": answer, "family": family})
    return rows


def check_request(families: Sequence[str], size: int) -> None:
    """Raise ValueError unless every family is known, there is at least one, and the size is not negative."""
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"families must name at least one of {', '.join(FAMILIES)}, got {families!r}")
    check_size(size)


def check_size(size: int) -> None:
    """Raise ValueError for a negative number of rows."""
    if size < 0:
        raise ValueError(f"size={size} must be at least 0: pass the number of rows to generate")


def draw_new(
    draw: Callable[[random.Random], tuple[str, str]], rng: random.Random, used: set[str], described_as: str
) -> tuple[str, str]:
    """Draw until the question is not in `used`; add it to `used` and return it with its answer."""
    for _ in range(MAX_FRUITLESS_DRAWS):
        question, answer = draw(rng)
        if question not in used:
            used.add(question)
            return question, answer
    raise ValueError(
        f"{described_as} produced no new question in {MAX_FRUITLESS_DRAWS} draws ({len(used)} questions are used or "
        "excluded, and all must be different): lower the size, exclude fewer questions, or add families"
    )


REPHRASINGS = ("Here is a puzzle. ", "Work this out. ", "A short story: ")
META_MATH_TYPES = ("GSM_AnsAug", "GSM_Rephrased", "MATH_AnsAug")


def generate_meta_math(size: int, seed: int) -> list[dict[str, str]]:
    """Generate `size` rows in MetaMathQA's format, the types of `META_MATH_TYPES` in round-robin order.

    Returns rows {"query", "response", "type", "original_question"} with different original questions. A
    response consists of a GSM8K answer and the line `The answer is: value`. Only a GSM_Rephrased query
    differs from its original question.
    Raises ValueError: a negative size, or no new question left.
    """
    check_size(size)
    rng = random.Random(seed)
    used: set[str] = set()
    rows = []
    for index in range(size):
        kind = META_MATH_TYPES[index % len(META_MATH_TYPES)]
        draw = bare_calculation if kind.startswith("MATH") else pick(rng, list(FAMILIES.values()))
        question, answer = draw_new(draw, rng, used, described_as=f"type {kind!r}")
        value = answer.rsplit("#### ", 1)[1]
        rows.append(
            {
                "query": pick(rng, REPHRASINGS) + question if kind == "GSM_Rephrased" else question,
                "response": f"{answer}\nThe answer is: {value}",
                "type": kind,
                "original_question": question,
            }
        )
    return rows


def bare_calculation(rng: random.Random) -> tuple[str, str]:
    """Draw a calculation without a story, which replaces MetaMathQA's rows from the MATH dataset."""
    left, right = pick(rng, range(2, 1000)), pick(rng, range(2, 1000))
    operator = pick(rng, "+-*")
    value, calculation = compute(left, operator, right)
    return f"What is the value of ${left} {operator} {right}$?", finish([f"We find {calculation}."], value)


def as_text(rows: Iterable[dict[str, str]]) -> list[tuple[str, str]]:
    """Return (prompt, response) pairs in the tiny model's template, `Q: {question}\\nA: ` and the answer."""
    return [(f"Q: {row['question']}\nA: ", row["answer"]) for row in rows]
