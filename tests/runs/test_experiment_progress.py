"""A run shows each of its stages, on stderr; nothing of its results depends on it."""

from lora_one import progress
from tests.helpers.runs import finish, small_run


def test_each_stage_is_shown(tmp_path, llama_folder, monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "TOGETHER", 0.0)
    finish(small_run(tmp_path, llama_folder, "dataset.accuracy_examples=4"))
    said = capsys.readouterr().err.splitlines()
    stages = {line.partition(":")[0] for line in said if " elapsed" in line}
    wanted = {"gradient", "low-rank steps", "search for the scale", "training", "validation, answers"}
    assert wanted <= stages
    shown = [line for line in said if line.startswith("training: ")]
    assert shown[0].startswith("training: 1 of 6 steps (16 %)") and " loss " in shown[1]
    assert [line for line in said if line.startswith("step 6 of 6: validation loss ")]
