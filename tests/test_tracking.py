"""Numbers on their way to metrics.jsonl and W&B; offline, and never in the way."""

import json
import struct
import time

import pytest
from conftest import small_run
from test_run import finish

from lora_one import tracking
from lora_one.evaluation.command import main


def test_lines_are_plain_json(tmp_path):
    tracker = tracking.Tracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"loss": 2.0, "grad_norm": float("inf")})
    tracker.log(2, {"loss": 1.0})
    assert tracking.read_metrics(tracker.path) == [
        {"step": 1, "loss": 2.0, "grad_norm": None},
        {"step": 2, "loss": 1.0},
    ]
    tracker.forget_after(1)
    assert [line["step"] for line in tracking.read_metrics(tracker.path)] == [1]


def test_only_the_main_process_writes(tmp_path):
    tracking.Tracker(tmp_path / "metrics.jsonl", main_process=False).log(1, {"loss": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def offline_records(folder):
    """Records of the one offline W&B run below a folder, once its writer, a process of its own, is through."""
    for _ in range(100):
        (file,) = folder.rglob("*.wandb")
        records = list(parsed(file))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError("the offline run was never closed")


def parsed(file):
    """A 7-byte header, then LevelDB log records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_offline_run_holds_what_metrics_jsonl_holds(tmp_path, llama_folder, offline):
    folder = finish(
        small_run(tmp_path, llama_folder, "wandb.mode=offline", "wandb.tags=[a]", "dataset.accuracy_examples=0")
    )
    records = offline_records(folder.path)
    (run,) = (record.run for record in records if record.HasField("run"))
    record = folder.read()
    assert (run.project, run.job_type, run.run_group) == ("lora-one", "train", record["config_hash"][:8])
    assert list(run.tags) == ["a"] and run.display_name == f"{folder.path.parent.name}-s42"
    logged = []
    for entry in (record.history for record in records if record.HasField("history")):
        values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in entry.item}
        logged.append(values.get("loss"))
    assert [loss for loss in logged if loss is not None] == [
        line["loss"] for line in tracking.read_metrics(folder.metrics) if "loss" in line
    ]


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path, llama_folder, offline, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.Error("no server")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(UserWarning, match="goes on without it: no server"):
        folder = finish(small_run(tmp_path, llama_folder, "wandb.mode=offline", "dataset.accuracy_examples=0"))
    assert folder.read()["status"] == "finished"


def test_evaluation_is_a_run_of_its_own_if_named(tmp_path, llama_folder, offline):
    rows = tmp_path / "test.jsonl"
    rows.write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    command = [f"--model_name={llama_folder}", f"--data_path={rows}", "--max_new_tokens=2", f"--output_dir={tmp_path}"]
    assert main("gsm8k", [*command, "--wandb_name=mine"]) == 0
    records = offline_records(tmp_path)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.display_name, run.job_type) == ("mine", "eval")
    summary = {
        item.key or ".".join(item.nested_key) for r in records if r.HasField("summary") for item in r.summary.update
    }
    assert "gsm8k/accuracy" in summary
