"""The change from the pretrained model, which is a start that changes nothing."""

from lora_one.reports.changes import changes
from lora_one.reports.compare import Run
from lora_one.reports.results import Results
from lora_one.statistics.units import NATS, POINTS


def run(method, stage, seed, value, shift=0.0, unit=NATS, base="fp32"):
    score = {"value": value, "metric": "loss", "unit": vars(unit), "predictions": None}
    identity = {"weights of the base": base}
    return Run(method, stage, {}, seed, None, scores={"text": score}, start={"shift": shift}, identity=identity)


def table(runs):
    record = {
        "runs": [vars(one) for one in runs],
        "rows": [{"method": name} for name in dict.fromkeys(one.method for one in runs)],
        "comparison": {"evaluations": {"text": {"benchmark": "text"}}, "baseline": None},
        "findings": [],
    }
    found = list(changes(Results(record)))
    return found[0].table if found else None


RUNS = [
    *(run("LoRA", "start", seed, 2.0) for seed in (1, 2)),
    *(run("LoRA", "final", seed, value) for seed, value in ((1, 2.5), (2, 2.7))),
    *(run("moved", "start", seed, 9.0, shift=0.4) for seed in (1, 2)),
    *(run("moved", "final", seed, value) for seed, value in ((1, 1.5), (2, 1.5), (3, 7.0))),
]


def test_the_change_is_against_the_unchanged_start_of_the_same_seed():
    """Also for a method whose own start moves the weights; a seed without a pretrained score does not count."""
    header, first, second = table(RUNS)
    assert header == ["method", "text (nats) pretrained", "after training", "change"]
    assert first == ["LoRA", "2.0000 +- 0.0000", "2.6000 +- 0.1414", "+0.6000 +- 0.1414"]
    assert second == ["moved", "2.0000 +- 0.0000", "1.5000 +- 0.0000", "-0.5000 +- 0.0000"]


def test_points_are_shown_as_points():
    runs = [run("LoRA", "start", 1, 0.5, unit=POINTS), run("LoRA", "final", 1, 0.625, unit=POINTS)]
    assert table(runs)[1] == ["LoRA", "50.0", "62.5", "+12.5"]


def test_without_an_unchanged_start_there_is_no_table():
    assert table([one for one in RUNS if one.method == "moved"]) is None


def test_each_method_is_compared_with_its_own_base():
    """A quantised base is another model: its scores are not those of a base in fp32."""
    other = [run("QLoRA", "start", 1, 2.3, base="nf4"), run("QLoRA", "final", 1, 1.6, base="nf4")]
    other += [run("full", "start", 1, 5.0, shift=0.1, base="bf16"), run("full", "final", 1, 1.0, base="bf16")]
    lines = {line[0]: line[1:] for line in table([*RUNS, *other])}
    assert lines["LoRA"][2] == "+0.6000 +- 0.1414" and lines["QLoRA"] == ["2.3000", "1.6000", "-0.7000"]
    assert lines["full"] == ["-", "-", "-"], "no start on a base in bf16 leaves it unchanged"
