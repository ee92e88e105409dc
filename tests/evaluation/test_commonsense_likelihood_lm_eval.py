"""lm_eval's own tasks give the same log-likelihoods, choices and scores of the commonsense sets, example by example."""

import importlib.util
import json

import pytest

from lora_one.datasets.commonsense_columns import read_columns
from lora_one.evaluation.command import main
from lora_one.models import BUNDLED, load_model, load_tokenizer
from tests.helpers.lm_eval import TASKS, samples_of, task_of
from tests.helpers.paths import real_model, shared

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not here: pip install 'lora-one[lm-eval]'"
)
FIELDS = {"acc": "correct", "acc_norm": "correct_norm"}


def compare(model, name, num_fewshot, limit, folder, tolerance):
    """The largest difference of two log-likelihoods; the choices of both programs are asserted to be equal."""
    data = shared("data/commonsense") / name
    options = [f"--dataset={name}", f"--data_path={data}", f"--num_fewshot={num_fewshot}", f"--limit={limit}"]
    output = folder / f"{name}-{num_fewshot}"
    arguments = [f"--model_name={model}", "--dtype=fp32", f"--output_dir={output}", "--protocol=lm_eval", *options]
    assert main("commonsense", arguments) == 0
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    trained = any(data.glob("train*"))
    solved = [row for row, _ in read_columns(data, name, "train" if trained else "test")[:num_fewshot]]
    first = 0 if trained else num_fewshot
    rows = [row for row, _ in read_columns(data, name, "test")[first : first + limit]]
    assert [line["id"] for line in lines] == [f"{name}/{first + number}" for number in range(limit)]
    loaded = load_model(str(model), dtype="fp32"), load_tokenizer(str(model))
    samples = samples_of([task_of(name, rows, solved, output)], *loaded, num_fewshot, batch_size=4)[name]
    largest = 0.0
    for sample, line in zip(samples, lines, strict=True):
        theirs, ours = [response[0][0] for response in sample["resps"]], list(line["log_likelihoods"].values())
        assert ours == pytest.approx(theirs, abs=tolerance)
        largest = max(largest, *(abs(one - other) for one, other in zip(ours, theirs, strict=True)))
        assert ("acc_norm" in sample) == ("correct_norm" in line)
        assert all(sample[metric] == line[field] for metric, field in FIELDS.items() if metric in sample)
    metrics = json.loads((output / "metrics.json").read_text())["metrics"]
    assert metrics["accuracy"] == sum(sample["acc"] for sample in samples) / limit
    return largest


@pytest.mark.parametrize("name", TASKS)
def test_the_bundled_model(name, tmp_path):
    """Where the context is long enough; the solved examples of three sets come from the rows of their tests."""
    compare(BUNDLED / "tiny", name, 1, 12, tmp_path, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_fewshot", "limit"), [(2, 10), pytest.param(0, 100, marks=pytest.mark.long)], ids=["few", "hundred"]
)
@pytest.mark.parametrize("name", TASKS)
def test_gemma(name, num_fewshot, limit, tmp_path, capsys):
    largest = compare(real_model("gemma-3-270m-hf"), name, num_fewshot, limit, tmp_path, 1e-2)
    with capsys.disabled():
        print(
            f"{name}, {num_fewshot} solved examples, {limit} questions: log-likelihoods differ by up to {largest:.1e}"
        )
