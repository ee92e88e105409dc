"""The verdict on each method against a named baseline, from the layer of seeds alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from statistics import fmean

from lora_one.statistics.seeds import MIN_SEEDS, SeedTest, detectable, interval, paired, seeds_for
from lora_one.statistics.units import Unit

ALPHA = 0.05  # family-wise, over all methods of a comparison
ROUNDING = 1e-6  # relative, of losses that are summed in fp32
BETTER, WORSE, NO_DIFFERENCE, NOT_TESTED = "better", "worse", "no difference shown", "not tested"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one method: ``outcome``, the test that it comes from, and p after Holm's correction."""

    method: str
    baseline: str
    outcome: str
    test: SeedTest | None
    p: float | None
    sentence: str


def holm(p_values: Mapping[str, float], further: int = 0) -> dict[str, float]:
    """Return Holm's adjusted p values (Scand. J. Statist. 6, 1979): family-wise, under any dependence.

    The k-th smallest of m is multiplied by m - k + 1; adjusted values never decrease, and are at most 1.
    further: tests of the family whose p values are not known, so that they count as the largest ones.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, largest = {}, 0.0
    for left, name in zip(range(len(p_values) + further, further, -1), sorted(p_values, key=p_values.get), strict=True):
        largest = max(largest, min(1.0, left * p_values[name]))
        adjusted[name] = largest
    return adjusted


def verdicts(
    figures: Mapping[str, Mapping[int, float]],
    baseline: str,
    unit: Unit,
    failed: Mapping[str, Collection[int]] | None = None,
    family: int = 0,
) -> list[Verdict]:
    """Return the verdict on each method but the baseline, in their order. figures: method -> seed -> value.

    Only seeds that a method has in common with the baseline are used.
    failed: method -> seeds that ended without a value. If the other side of a pair has a value at such a seed, this
    side, a method or the baseline, is not called better, because the seeds that are left may be its good ones.
    family: number of methods of the comparison without the baseline, at least those with figures. Holm's correction
    counts all of them, also those without a test: which ones these are depends on the results.
    """
    tests = {}
    for method, values in figures.items():
        common = [seed for seed in values if seed in figures[baseline]]
        if method != baseline:
            pairs = [(values[seed], figures[baseline][seed]) for seed in common]
            rounding = ROUNDING * max((abs(value) for pair in pairs for value in pair), default=0.0)
            tests[method] = paired([own - other for own, other in pairs], rounding) if common else None
    known = {method: test.p for method, test in tests.items() if test is not None and test.testable}
    family = max(family, len(tests))
    adjusted = holm(known, family - len(known))
    most = unit.largest_difference(fmean(figures[baseline].values())) if figures[baseline] else inf
    found = []
    for method, test in tests.items():
        verdict = judged(method, baseline, test, adjusted.get(method), family, unit, most)
        pair = ((method, figures[baseline]), (baseline, figures[method]))
        lost = {name: len(set((failed or {}).get(name, ())) & set(other)) for name, other in pair}
        found.append(with_failures(verdict, {name: count for name, count in lost.items() if count}))
    return found


def judged(
    method: str, baseline: str, test: SeedTest | None, p: float | None, family: int, unit: Unit, most: float = inf
) -> Verdict:
    """Return the verdict of one test.

    p: adjusted; None: not testable.  family: number of tests corrected for.  most: the largest possible difference.
    """
    if test is None or p is None:
        return Verdict(method, baseline, NOT_TESTED, test, None, untested(method, baseline, test, unit))
    low, high = test.interval
    several = family > 1
    facts = f"95 % interval{' of this method alone' * several} {unit.text(low).split()[0]} to {unit.text(high)}, "
    facts += f"{test.n} seeds, p = {p:.2g}{' after Holm' * several}"
    if p <= ALPHA:
        outcome = BETTER if (test.mean > 0) == unit.higher else WORSE
        sentence = f"{method} is {outcome} than {baseline}: {unit.text(test.mean)} ({facts})."
    else:
        outcome = NO_DIFFERENCE
        sentence = f"{method} and {baseline}: no difference shown, {unit.text(test.mean)} ({facts}); "
        sentence += limits(test, family, unit, most)
    return Verdict(method, baseline, outcome, test, p, sentence)


def with_failures(verdict: Verdict, lost: Mapping[str, int]) -> Verdict:
    """Return the verdict with the numbers of seeds without a result; such a side is not called better."""
    if not lost:
        return verdict
    note = " and ".join(f"{count} {'seed' if count == 1 else 'seeds'} of {name}" for name, count in lost.items())
    winner = {BETTER: verdict.method, WORSE: verdict.baseline}.get(verdict.outcome)
    if winner not in lost:
        return replace(verdict, sentence=f"{verdict.sentence} Without a result: {note}.")
    of_those = verdict.sentence.removeprefix(f"{verdict.method} is {verdict.outcome} than {verdict.baseline}: ")
    sentence = (
        f"{verdict.method} and {verdict.baseline}: not tested, because results are missing ({note}) and the seeds that "
        f"are left may be the good ones. Of those: {of_those}"
    )
    return replace(verdict, outcome=NOT_TESTED, p=None, sentence=sentence)


def limits(test: SeedTest, family: int, unit: Unit, most: float = inf) -> str:
    """Return which differences are excluded, which ones this design finds, and what half of that would need.

    The level is ALPHA / family: excluded differences hold for all methods together.
    most: the largest difference to the baseline that is possible, as 80 points below 80 %.
    """
    level = ALPHA / family
    excluded = max(map(abs, interval(test, 1 - level)))
    in_sds, needed = reach(test.n, level)
    smallest = in_sds * test.sd
    together = f" for all {family} methods together" * (family > 1)
    text = f"differences above {unit.text(excluded, '')} are excluded{together}. "
    if excluded >= most:
        text = f"the noise is so large that no possible difference is excluded{together}. "
    text += f"If the noise is as these {test.n} seeds estimate it, "
    if smallest > most:
        enough = seeds_for(most, test.sd, level)
        return f"{text}the largest possible difference, {unit.text(most, '')}, needs {enough} seeds."
    return (
        f"{text}they find a true difference of {unit.text(smallest, '')} in 8 of 10 comparisons; half of that needs "
        f"{needed} seeds."
    )


@cache
def reach(n: int, level: float) -> tuple[float, int | None]:
    """Return the true difference that n seeds find, in standard deviations, and the seeds that half of it needs.

    The methods of a comparison mostly share n, and each power problem takes milliseconds.
    """
    smallest = detectable(1.0, n, level)
    return smallest, seeds_for(smallest / 2, 1.0, level)


def untested(method: str, baseline: str, test: SeedTest | None, unit: Unit) -> str:
    """Return why there is no test."""
    if test is None:
        return f"{method} and {baseline}: not tested, they have no seed in common."
    if test.n < MIN_SEEDS:
        return (
            f"{method} and {baseline}: not tested, {test.n} {'seed is' if test.n == 1 else 'seeds are'} too few for an "
            f"interval (at least {MIN_SEEDS})."
        )
    return (
        f"{method} and {baseline}: not tested, the difference is {unit.text(test.mean)} at each of {test.n} seeds, so "
        "that its noise is unknown."
    )
