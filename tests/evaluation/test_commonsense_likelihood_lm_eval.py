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


def task_and_ids(name, num_fewshot, limit, folder):
    """lm_eval's task on rows of the real files, written as its columns, and the ids of these rows."""
    data = shared("data/commonsense") / name
    trained = any(data.glob("train*"))
    solved = [row for row, _ in read_columns(data, name, "train" if trained else "test")[:num_fewshot]]
    first = 0 if trained else num_fewshot
    rows = [row for row, _ in read_columns(data, name, "test")[first : first + limit]]
    return task_of(name, rows, solved, folder), [f"{name}/{first + number}" for number in range(limit)]


def largest_difference(samples, lines):
    """Of two log-likelihoods; the scores of both programs are asserted to be equal."""
    largest = 0.0
    for sample, line in zip(samples, lines, strict=True):
        theirs, ours = [response[0][0] for response in sample["resps"]], list(line["log_likelihoods"].values())
        largest = max(largest, *(abs(one - other) for one, other in zip(ours, theirs, strict=True)))
        assert ("acc_norm" in sample) == ("correct_norm" in line)
        assert all(sample[metric] == line[field] for metric, field in FIELDS.items() if metric in sample)
    return largest


def compare(model, num_fewshot, limit, folder):
    """Set -> the largest difference of two log-likelihoods."""
    options = [f"--data_path={shared('data/commonsense')}", f"--num_fewshot={num_fewshot}", f"--limit={limit}"]
    arguments = [f"--model_name={model}", "--dtype=fp32", f"--output_dir={folder}", "--protocol=lm_eval", *options]
    assert main("commonsense", arguments) == 0
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    asked = {name: task_and_ids(name, num_fewshot, limit, folder) for name in TASKS}
    assert [line["id"] for line in lines] == [number for _, ids in asked.values() for number in ids]
    loaded = load_model(str(model), dtype="fp32"), load_tokenizer(str(model))
    samples = samples_of([task for task, _ in asked.values()], *loaded, num_fewshot, batch_size=4)
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    found = {}
    for name in TASKS:
        found[name] = largest_difference(samples[name], [line for line in lines if line["id"].startswith(f"{name}/")])
        assert metrics[f"accuracy/{name}"] == sum(sample["acc"] for sample in samples[name]) / limit
    return found


def test_the_bundled_model(tmp_path):
    """After one solved example, which comes from the rows of the tests in four sets."""
    assert max(compare(BUNDLED / "tiny", 1, 12, tmp_path).values()) < 1e-3


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("num_fewshot", "limit"), [(2, 4), (0, 100)], ids=["few", "hundred"])
def test_gemma(num_fewshot, limit, tmp_path, capsys):
    found = compare(real_model("gemma-3-270m-hf"), num_fewshot, limit, tmp_path)
    with capsys.disabled():
        for name, largest in found.items():
            print(f"{name}, {num_fewshot} solved examples, {limit} questions: difference at most {largest:.1e} nats")
    assert max(found.values()) < 1e-2
