"""A comparison whose runs are in other processes has the record of one in this process."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lora_one.runs import compare_command, comparison
from lora_one.runs.comparison_runners import Pace
from lora_one.runs.comparison_workers import SideBySide, Task
from tests.helpers.comparison_records import TIMES, without
from tests.helpers.comparisons import RATE, write_problems
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def content(tmp_path_factory, llama_folder):
    """Two methods, one of them twice, and one that fails when it starts; one evaluation."""
    data = write_problems(tmp_path_factory.mktemp("data"), train=24, test=8)
    common = ["dataset=gsm8k", f"model.name={llama_folder}", "model=tiny", "wandb.mode=disabled"]
    common += ["model.real_batch_size=8", "model.per_device_batch_size=8", "model.max_length=128", "model.bf16=false"]
    common += ["dataset.train_size=16", "dataset.validation_size=8", f"dataset.path={data}"]
    options = ["--max_new_tokens=4", "--limit=5", f"--data_path={data / 'test.jsonl'}"]
    return {
        "title": "In other processes",
        "common": common,
        "test": [f"dataset.path={data / 'test.jsonl'}"],
        "test_examples": 8,
        "tuning_seeds": [1],
        "seeds": [1, 2],
        "shared_seeds": "fewer runs",
        "grid": {RATE: [1e-3, 1e-2]},
        "methods": {"LoRA": ["init=lora"], "itself": ["init=lora"], "broken": ["peft.lora_target_modules=[none]"]},
        "evaluations": {"exact match": {"benchmark": "gsm8k", "options": options}},
        "baseline": "LoRA",
    }


def compared(folder, content, *options):
    """Run the command; return its exit code and the record."""
    file = folder / "file.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(content | {"common": [*content["common"], f"results_dir={folder / 'results'}"]}))
    code = compare_command.main([str(file), "--output", str(folder / "out"), *options])
    return code, json.loads((folder / "out" / "comparison.json").read_text())


@pytest.mark.slow
def test_side_by_side_has_the_record_of_one_process(content, tmp_path, capsys):
    code, alone = compared(tmp_path / "alone", content, "--threads=1")
    assert code == 1 and comparison.failed(alone)
    said = capsys.readouterr().err
    assert "comparison: 1 of 15 runs, " in said
    code, together = compared(tmp_path / "together", content, "--jobs=2", "--threads=1")
    shown = capsys.readouterr()
    assert code == 1 and "failed: broken" in shown.err and "finished: LoRA, learning_rate 0.001, seed 1" in shown.err
    first, second = (without(record, TIMES | {"jobs"}) for record in (alone, together))
    assert json.dumps(first).replace("/alone/", "/together/") == json.dumps(second)
    _again, third = compared(tmp_path / "together", content, "--jobs=2", "--threads=1")
    assert without(third)["runs"] == without(together)["runs"]
    assert "finished: LoRA" not in capsys.readouterr().err, "nothing was run again"


@pytest.mark.slow
def test_a_signal_stops_the_workers_and_the_same_command_continues(content, tmp_path):
    """Stopped in the first runs, and once more later; each leaves its resume point and no process."""
    several = content | {"methods": {"LoRA": ["init=lora"]}, "evaluations": {}}
    several["common"] = [*content["common"], f"results_dir={tmp_path / 'results'}", "model.epochs=12"]
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(several))
    command = [sys.executable, "scripts/compare.py", str(tmp_path / "file.yaml"), "--jobs=2", "--threads=1"]
    command += [f"--output={tmp_path / 'out'}"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list((tmp_path / "results").rglob("metrics.jsonl"))) == 2, started)
    started.send_signal(signal.SIGTERM)
    _out, err = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in err, err
    records = [json.loads(file.read_text()) for file in (tmp_path / "results").rglob("run.json")]
    assert [record["status"] for record in records] == ["interrupted", "interrupted"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert all(
        json.loads(file.read_text())["status"] == "finished" for file in (tmp_path / "results").rglob("run.json")
    )


WORKER = """
import json, os, sys
for line in sys.stdin:
    task = json.loads(line)
    open(task["result"], "w").write(str(os.getpid()))
    if task["seed"] == 2:
        os._exit(9)
    if task["seed"] == 5:
        os._exit(0)
    print(int(task["seed"] == 4), flush=True)
    if task["seed"] == 4:
        break
"""


class Scripted(SideBySide):
    """Workers that write their process id as the result, die in tasks 2 and 5 (as if without an error), fail in 4."""

    def start(self, slot):
        return subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_process_does_the_tasks_of_all_stages_until_one_fails(tmp_path):
    tasks = [Task({}, "LoRA", "tuning", {}, seed, False, str(tmp_path / f"{seed}.json")) for seed in range(8)]
    workers = Scripted(tmp_path, count=1)
    found = {}
    for stage in (tasks[:4], tasks[4:]):
        found |= {stage[number].seed: error for number, _, error in workers.ended(stage)}
    workers.end()
    assert {number for number, error in found.items() if error} == {2, 4, 5}
    assert "exit code 9: see" in found[2] and "exit code 1: see" in found[4]
    assert str(tmp_path / "workers/process-0.log") in found[5], "the task has no log"
    processes = [(tmp_path / f"{seed}.json").read_text() for seed in range(8)]
    assert [processes.index(process) for process in processes] == [0, 0, 0, 3, 3, 5, 6, 6]


def test_a_process_killed_while_it_waits_is_replaced(tmp_path):
    first, second = (Task({}, "LoRA", "tuning", {}, seed, False, str(tmp_path / f"{seed}.json")) for seed in (0, 1))
    workers = Scripted(tmp_path, count=1)
    assert [error for _, _, error in workers.ended([first])] == [None]
    workers.workers[0].kill()
    workers.workers[0].wait()
    assert [error for _, _, error in workers.ended([second])] == [None]
    workers.end()
    assert (tmp_path / "0.json").read_text() != (tmp_path / "1.json").read_text()


def test_a_process_that_cannot_be_started_leaves_no_other_behind(tmp_path):
    class Limited(Scripted):
        def start(self, slot):
            if slot == 1:
                raise OSError("no more processes")
            return super().start(slot)

    tasks = [Task({}, "LoRA", "tuning", {}, seed, False, str(tmp_path / f"{seed}.json")) for seed in (0, 1)]
    workers = Limited(tmp_path, count=2)
    with pytest.raises(OSError, match="no more processes"):
        list(workers.ended(tasks))
    workers.end()
    assert workers.workers[0].poll() is not None


def wait_until(condition, process, seconds=120):
    """Wait for a condition while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.stderr.read()
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jobs": 0}, "jobs=0 must be a number of runs side by side"),
        ({"launcher": "sge"}, "launcher='sge' is not a launcher; valid: slurm"),
        ({"launcher": "slurm", "jobs": 2}, "exclude each other"),
        ({"slurm": {"partitions": "gpu"}}, "unknown key slurm.partitions; did you mean slurm.partition"),
        ({"launcher": "slurm", "slurm": {"tasks_per_node": 4}}, "which evaluations in a comparison do not support"),
    ],
)
def test_wrong_launchers_are_refused(content, tmp_path, change, message, capsys):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(content | change))
    assert compare_command.main([str(tmp_path / "file.yaml"), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_comparison_in_several_processes_is_refused(content, tmp_path, variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "2")
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(content))
    assert compare_command.main([str(tmp_path / "file.yaml"), "--dry-run"]) == 2
    assert "starts its own processes: start the command alone" in capsys.readouterr().err


def test_the_cores_of_an_allocation_are_shared_not_those_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert SideBySide(tmp_path, 2).threads == 4


class Stage:
    """As much of a job as the pace needs."""

    def __init__(self, stage):
        self.stage = stage


def test_the_time_left_counts_runs_without_training_by_what_they_took(monkeypatch, capsys):
    clock = iter([0.0, 100.0, 200.0, 210.0])
    monkeypatch.setattr("lora_one.runs.comparison_runners.time.monotonic", lambda: next(clock))
    pace = Pace(trained=4, untrained=2)
    pace.add(Stage("tuning"), 100.0)  # 3 and, of a quarter each, 2 left: 350 s
    pace.add(Stage("final"), 100.0)
    pace.add(Stage("start"), 10.0)  # 2 with and 1 without training left, 0.1 of one: 210 s
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "comparison: 1 of 6 runs, 1:40 elapsed, about 5:50 left"
    assert lines[2] == "comparison: 3 of 6 runs, 3:30 elapsed, about 3:30 left"
