"""Evaluations before training are made once for a model, a start and a validation set."""

import pytest
from safetensors.torch import load_file, save_file

from lora_one.evaluation.validation import Validation
from lora_one.runs.known_evaluations import known_evaluation
from tests.helpers.hub import HubModel
from tests.helpers.runs import finish, run_config, small_run


def test_a_sweep_of_learning_rates_evaluates_base_and_start_once(tmp_path, llama_folder, monkeypatch, capsys):
    """Another rate takes both from the first run; what changes base, start or validation is measured again."""
    calls, original = [], Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, model: calls.append(1) or original(self, model))
    cache = ("dataset.accuracy_examples=2", "model.epochs=0.1", "model.warmup=0", f"init.cache={tmp_path / 'cache'}")

    def measured(*changes):
        """Return the number of evaluations of a run beside its last one, and its entry in run.json."""
        del calls[:]
        folder = finish(small_run(tmp_path, llama_folder, *cache, *changes))
        return len(calls) - 1, folder.read()["evaluation"]

    first, found = measured()
    assert first == 2 and found["start"] != found["init"]
    number, again = measured("model.learning_rate=1e-2")
    assert number == 0
    assert {stage: again[stage] for stage in ("start", "init")} == {stage: found[stage] for stage in ("start", "init")}
    said = capsys.readouterr().out
    assert " s (without the cache), rank-r energy" in said
    assert "evaluation of the pretrained model read from" in said and "evaluation of the start read from" in said
    assert measured("peft.lora_alpha=4")[0] == 1
    assert measured("init=lora")[0] == 0  # equals the base
    for change in (
        "model.loss=example",
        "dataset.accuracy_examples=3",
        "dataset.max_eval_samples=3",
        "model.bf16=true",
    ):
        number, other = measured(change, "overwrite=true")
        assert number == 2 and other["start"] != found["start"], change


def test_only_what_is_complete_and_finite_is_stored(tmp_path):
    def evaluated(value, **key):
        return known_evaluation(tmp_path, "x", lambda: key, lambda: {"eval_loss": value})["eval_loss"]

    assert evaluated(float("inf")) == float("inf") and not list(tmp_path.iterdir())
    assert [evaluated(1.0), evaluated(2.0)] == [1.0, 1.0]
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    for broken in ("{", "[]", '{"metrics": {"eval_loss": 1.0}}', whole.replace('"eval_loss": 1.0', "")):
        file.write_text(broken)
        assert evaluated(3.0) == 3.0 and evaluated(4.0) == 3.0, broken
    assert evaluated(4.0, loss="example") == 4.0


def test_a_folder_that_cannot_be_written_loses_no_evaluation(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert known_evaluation(tmp_path / "file", "x", dict, lambda: {"eval_loss": 1.0}) == {"eval_loss": 1.0}
    assert "note: init.cache: the evaluation of x cannot be stored" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT asks the hub
def test_another_commit_of_a_hub_model_and_other_drawn_weights_are_other_keys(tmp_path, monkeypatch):
    """The branch of a hub model may move on; a weight that a checkpoint lacks is drawn with the run's seed."""
    model = HubModel(tmp_path / "hub", monkeypatch)
    common = ("model.name=some/model", "model=tiny", "dataset=arithmetic", "init=lora", f"init.cache={tmp_path / 'c'}")

    def evaluations(commit, seed):
        model.move(commit)
        short = ("model.epochs=0", f"results_dir={tmp_path / commit}", f"seed={seed}", "dataset.accuracy_examples=0")
        finish(run_config(*common, *short, "dataset.train_size=16", "dataset.validation_size=8"))
        return len(list((tmp_path / "c").glob("*.evaluation")))

    one, other, lacking = ("1" * 40, "2" * 40, "3" * 40)
    assert [evaluations(one, 1), evaluations(one, 2), evaluations(other, 1)] == [1, 1, 2]
    without_a_weight(model.commit(lacking))
    assert [evaluations(lacking, 1), evaluations(lacking, 2)] == [3, 4]


def without_a_weight(folder):
    """Remove one of the weights of the bundled model."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("down_proj.weight")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
