"""Numbers on their way to metrics.jsonl and W&B; offline, and never in the way."""

import json
import struct
import time
import warnings
from pathlib import Path

import pytest

from lora_one.diagnostics import by_kind
from lora_one.errors import RunError
from lora_one.evaluation.command import main
from lora_one.files import read_lines
from lora_one.records import tracking
from tests.helpers.runs import finish, small_run, straight_and_resumed
from tests.helpers.wandb_server import WandbServer


def test_lines_are_plain_json(tmp_path):
    tracker = tracking.Tracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"loss": 2.0, "grad_norm": float("inf")})
    tracker.log(2, {"loss": 1.0})
    assert read_lines(tracker.path) == [
        {"step": 1, "loss": 2.0, "grad_norm": None},
        {"step": 2, "loss": 1.0},
    ]
    tracker.forget_after(1)
    assert [line["step"] for line in read_lines(tracker.path)] == [1]


def test_full_disk_gives_one_message_with_a_remedy():
    with pytest.raises(RunError, match=r"/dev/full cannot be written \(No space left on device\): free disk space"):
        tracking.Tracker(Path("/dev/full")).log(1, {"loss": 2.0})


def test_only_the_main_process_writes(tmp_path):
    tracking.Tracker(tmp_path / "metrics.jsonl", main_process=False).log(1, {"loss": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def offline_records(file):
    """Records of an offline W&B run, once its writer, a process of its own, is through."""
    for _ in range(100):
        records = list(parsed(file))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError("the offline run was never closed")


class Offline:
    """What W&B will show of an offline run once it is uploaded."""

    def __init__(self, file):
        records = offline_records(file)
        (self.run,) = (record.run for record in records if record.HasField("run"))
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}
        self.summary, self.history = {}, {}
        for record in records:
            if record.HasField("summary"):
                self.summary |= values(record.summary.update)
            if record.HasField("history"):
                line = values(record.history.item)
                self.history.setdefault(line["_step"], {}).update(line)
        self.exit_code = next(record.exit.exit_code for record in records if record.HasField("exit"))

    def series(self, name):
        return {step: line[name] for step, line in self.history.items() if name in line}


def values(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def offline_runs(folder):
    return [Offline(file) for file in sorted(folder.rglob("offline-run-*/*.wandb"))]


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


SHORT = ("wandb.mode=offline",)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, llama_folder):
    """A finished run that was tracked offline and watched, with two learning rates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        run = small_run(
            tmp_path_factory.mktemp("results"),
            llama_folder,
            *SHORT,
            "wandb.tags=[a,b]",
            "wandb.entity=someone",
            "wandb.diagnostics_every=3",
            "peft.use_loraplus=true",
            "model.saving=true",
        )
        folder = finish(run)
        (offline,) = offline_runs(folder.path)
        return run, folder, offline


def test_offline_run_contains_its_configuration(tracked):
    run, folder, offline = tracked
    record = folder.read()
    assert (offline.run.project, offline.run.entity, offline.run.job_type) == ("lora-one", "someone", "train")
    assert (offline.run.run_id, offline.run.run_group) == (record["wandb_id"], record["config_hash"][:8])
    assert list(offline.run.tags) == ["a", "b"] and offline.run.display_name == f"{folder.path.parent.name}-s42"
    assert {name: offline.config[name] for name in run.published()} == run.published()
    assert offline.config["config_hash"] == record["config_hash"]
    assert offline.config["provenance"]["versions"] == record["provenance"]["versions"]
    assert offline.exit_code == 0


def test_an_offline_run_holds_what_metrics_jsonl_holds(tracked):
    _, folder, offline = tracked
    lines = read_lines(folder.metrics)
    for name in ("loss", "learning_rate_others", "learning_rate_lora_B", "grad_norm", "eval_loss"):
        logged = {line["step"]: line[name] for line in lines if name in line}
        (shown,) = tracking.grouped({name: 0.0})
        assert logged and offline.series(shown) == logged, name


def test_an_offline_run_holds_the_start_and_the_end(tracked):
    _, folder, offline = tracked
    record, summary = folder.read(), offline.summary
    assert summary["init"]["captured_energy"] == record["init"]["captured_energy"]
    assert summary["init"]["relative_shift"] == record["init"]["relative_shift"]
    assert len(summary["init"]["captured_energy"]["layers"]) == 14
    assert summary["status"] == "finished" and summary["train"] == record["train"]
    assert summary["evaluation"] == record["evaluation"]
    assert summary["eval_loss"] == record["evaluation"]["final"]["eval_loss"]


def test_an_offline_run_holds_the_adapters_diagnostics(tracked):
    _, folder, offline = tracked
    lines = read_lines(folder.path / "diagnostics.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 6]
    expected = {line["step"]: by_kind(line["layers"]) for line in lines}
    for matrix in ("A", "B", "BA"):
        for what in (f"{matrix}_norm", *(f"{matrix}_sigma_{place}" for place in range(1, 9))):
            name = f"q_proj/{what}"
            logged = offline.series(f"{'norms' if what.endswith('norm') else 'spectra'}/{name}")
            assert logged == {step: pytest.approx(means[name]) for step, means in expected.items()}, name
    for name in ("down_proj/A_angle_max", "down_proj/B_angle_mean"):
        assert offline.series(f"angles/{name}") == {step: means[name] for step, means in expected.items()}
    kinds = {layer.rpartition(".")[2] for layer in lines[0]["layers"]}
    for group in ("angles", "spectra", "norms"):
        assert {key.split("/")[1] for key in offline.summary if key.startswith(f"{group}/")} == kinds


def test_an_offline_run_holds_the_figure(tracked):
    _, folder, offline = tracked
    (file,) = folder.path.rglob(f"offline-run-*/files/{offline.summary['curves.path']}")
    assert file.read_bytes() == (folder.path / "curves.png").read_bytes()


def test_a_table_is_a_run_of_its_own(tmp_path, offline):
    place = {"project": "p", "entity": None, "group": None, "tags": []}
    record = {"config": {"wandb": {"mode": "offline", **place}}, "config_hash": "1" * 32}
    tracking.log_table("sweep", "sweep-1", "init,seeds\nlora,2\n", record, tmp_path)
    (found,) = offline_runs(tmp_path)
    assert (found.run.project, found.run.job_type, found.run.display_name) == ("p", "sweep", "sweep-1")
    (file,) = tmp_path.rglob(f"offline-run-*/files/{found.summary['sweep.path']}")
    table = json.loads(file.read_text())
    assert (table["columns"], table["data"]) == (["init", "seeds"], [["lora", "2"]])


@pytest.mark.parametrize("given", ["merged_checkpoint", "adapter"])
def test_evaluation_is_in_the_group_of_its_run(tracked, tmp_path, offline, given):
    _, folder, trained = tracked
    option = "--model_name" if given == "merged_checkpoint" else "--adapter"
    command = [f"{option}={folder.path / given}", f"--data_path={problems(tmp_path)}", f"--output_dir={tmp_path}"]
    assert main("gsm8k", [*command, "--max_new_tokens=2", "--wandb_mode=offline"]) == 0
    (found,) = offline_runs(tmp_path)
    assert (found.run.job_type, found.run.display_name) == ("eval", f"{trained.run.display_name}-gsm8k")
    for name in ("project", "entity", "run_group", "tags"):
        assert getattr(found.run, name) == getattr(trained.run, name)
    assert found.config["task"] == "gsm8k" and found.config["max_new_tokens"] == 2
    assert found.config["run"]["wandb_id"] == trained.run.run_id
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert {f"gsm8k/{name}": value for name, value in metrics.items()}.items() <= found.summary.items()


def problems(folder):
    rows = folder / "test.jsonl"
    rows.write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    return rows


@pytest.mark.parametrize(
    ("options", "names"),
    [(["--wandb_name=mine"], ["mine"]), (["--wandb_name=x", "--wandb_mode=disabled"], []), ([], [])],
)
def test_evaluation_can_be_a_separate_run(tmp_path, llama_folder, offline, options, names):
    command = [f"--model_name={llama_folder}", f"--data_path={problems(tmp_path)}", f"--output_dir={tmp_path}"]
    assert main("gsm8k", [*command, "--max_new_tokens=2", *options]) == 0
    found = offline_runs(tmp_path)
    assert [(run.run.display_name, run.run.job_type, run.run.run_group) for run in found] == [
        (name, "eval", "") for name in names
    ]
    assert all("gsm8k/accuracy" in run.summary for run in found)


def test_a_resumed_run_is_whole_in_its_last_offline_folder(tmp_path, llama_folder, offline, monkeypatch):
    """An upload of the last one alone, or of all in turn, shows every step."""
    changes = (*SHORT, "wandb.diagnostics_every=2", "model.epochs=2")
    straight, resumed = straight_and_resumed(tmp_path, llama_folder, changes, monkeypatch)
    (whole,), (stopped, last) = offline_runs(straight.path), offline_runs(resumed.path)
    assert (stopped.exit_code, last.exit_code) == (1, 0) and stopped.summary["status"] == "interrupted"
    assert last.run.run_id == stopped.run.run_id == resumed.read()["wandb_id"] != whole.run.run_id
    assert last.summary["init"]["captured_energy"] == whole.summary["init"]["captured_energy"]
    for name in ("losses/loss", "losses/eval_loss", "norms/q_proj/BA_norm", "angles/q_proj/B_angle_max"):
        assert last.series(name) == whole.series(name), name
    assert sorted(whole.series("angles/q_proj/B_angle_max")) == [0, 2, 4, 6, 8, 10, 12]
    name = "diagnostics.jsonl"
    assert (resumed.path / name).read_text() == (straight.path / name).read_text()


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path, llama_folder, offline, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.Error("no server")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(UserWarning, match="continues without it: no server"):
        folder = finish(small_run(tmp_path, llama_folder, *SHORT))
    assert folder.read()["status"] == "finished"


@pytest.fixture
def server(offline, monkeypatch, tmp_path):
    """A W&B server, and a client in this process that knows no other."""
    import wandb

    server = WandbServer()
    wandb.teardown()  # it reads its environment once
    for name, value in {"BASE_URL": server.url, "API_KEY": "0" * 40, "CONFIG_DIR": str(tmp_path / "config")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield server
    wandb.teardown()
    server.stop()


def test_online_run_resumes_under_the_same_id(tmp_path, llama_folder, server, monkeypatch, capfd):
    changes = ("wandb.mode=online", "dataset.accuracy_examples=0", "wandb.tags=[a]", "model.epochs=2")
    watched = (*changes, "wandb.diagnostics_every=2")
    straight, resumed = (f.read() for f in straight_and_resumed(tmp_path, llama_folder, watched, monkeypatch))
    assert server.runs.keys() == {straight["wandb_id"], resumed["wandb_id"]}
    said = capfd.readouterr()
    assert f"W&B: {server.url}/someone/lora-one/runs/{resumed['wandb_id']}" in said.out
    assert "Tried to log to step" not in said.err, "W&B warns of each step it has already"
    for record in (straight, resumed):
        run = server.runs[record["wandb_id"]]
        fields = {name: run["fields"][name] for name in ("project", "groupName", "jobType", "tags")}
        assert fields == {
            "project": "lora-one",
            "groupName": record["config_hash"][:8],
            "jobType": "train",
            "tags": ["a"],
        }
        assert [line["_step"] for line in run["history"]] == list(range(13))
        assert run["summary"]["init"]["captured_energy"] == record["init"]["captured_energy"]
        assert run["summary"]["status"] == "finished"
    histories = [server.runs[record["wandb_id"]]["history"] for record in (straight, resumed)]
    for name in ("losses/loss", "losses/eval_loss", "norms/q_proj/BA_norm"):
        told = [{line["_step"]: line[name] for line in history if name in line} for history in histories]
        missed = {9} if name == "losses/eval_loss" else set()  # the step it was stopped in had no evaluation yet
        assert told[1] and told[1] == {step: value for step, value in told[0].items() if step not in missed}, name


def test_lost_server_delays_the_end_only_until_the_timeout(tmp_path, server, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 1)
    run = tracking.Wandb.opened("online", project="p", dir=tmp_path)
    assert run.run is not None and not run.run.offline
    server.stop()
    run.log(1, {"loss": 2.0})
    run.finish()  # W&B's own default is to wait without end


def test_a_server_out_of_reach_leaves_an_offline_run(tmp_path, server, monkeypatch):
    server.stop()
    monkeypatch.setattr(tracking, "START_TIMEOUT", 1)
    with pytest.warns(UserWarning, match="could not start online and logs offline: .*refused"):
        run = tracking.Wandb.opened("online", project="p", id="abc", dir=tmp_path)
    run.log(1, {"loss": 2.0})
    run.finish()
    (found,) = offline_runs(tmp_path)
    assert (found.run.project, found.series("loss")) == ("p", {1: 2.0})


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_tracker_failure_during_a_run_warns_once(tmp_path, failing):
    class Failing:
        url, starting_step = None, 0

        def __init__(self):
            self.summary = {}

        def log(self, *_, **__):
            self.fail("log")

        def finish(self, **_):
            self.fail("finish")

        def fail(self, where):
            if where == failing:
                raise OSError("broken\npipe")

    tracker = tracking.Tracker(tmp_path / "metrics.jsonl")
    tracker.wandb = tracking.Wandb(Failing())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker.log(1, {"loss": 2.0})
        tracker.log(2, {"loss": 1.0})
        tracker.finish({"status": "finished"})
    assert [str(warning.message) for warning in caught] == ["W&B failed; the run continues without it: broken pipe"]
    assert len(read_lines(tracker.path)) == 2
