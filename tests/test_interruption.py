"""No work is lost: killed anywhere, the same command ends with the same bytes; signals, full disks, broken points."""

import json
import os
import resource
import signal
import sys
from types import SimpleNamespace

import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import TrainerState

import run_exp
from lora_one import interruption
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.partial_results import PartialResults
from lora_one.files import read_lines
from lora_one.initialization import low_rank_step as steps
from lora_one.initialization import start
from lora_one.interruption import caught
from lora_one.records.folder import RunFolder
from lora_one.records.tracking import Tracker
from lora_one.runs import cli, experiment, initial_model, saving
from lora_one.training import trainer
from lora_one.training.callbacks import AfterStep
from lora_one.training.trainer import FineTuner
from tests.helpers.runs import finish, small_run, stop_at

# twelve steps with dropout, a resume point every second one: the kill lies between points, in epochs, and at ends
CHANGES = ("model.epochs=2", "model.save_steps=2", "model.saving=true", "peft.lora_dropout=0.1", "init=gradient")
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def straight(tmp_path_factory, llama_folder):
    return finish(small_run(tmp_path_factory.mktemp("straight"), llama_folder, *CHANGES))


def in_child(work):
    """The wait status of a forked process that does the work; 0 where it comes back."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_at(owner, name, call, *, after=False):
    """This process is killed by SIGKILL at the n-th call of a function, before it or after it."""
    original, calls = getattr(owner, name), []

    def fatal(*arguments, **options):
        calls.append(name)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, fatal)


KILLS = {
    "gradient: first layer": (steps, "factorised", 1, False),
    "gradient: a middle layer": (steps, "factorised", 7, False),
    "gradient: all of it": (start, "place", 1, False),
    "start: placed": (start, "place", 1, True),
    "training: first step": (FineTuner, "compute_loss", 1, False),
    "training: before a point": (FineTuner, "compute_loss", 4, True),
    "training: second epoch": (FineTuner, "compute_loss", 9, False),
    "training: last step": (FineTuner, "compute_loss", 12, False),
    "training: a line logged": (Tracker, "log", 5, True),
    "checkpoint: first, adapter": (PeftModel, "save_pretrained", 1, True),
    "checkpoint: optimizer": (Trainer, "_save_optimizer_and_scheduler", 2, True),
    "checkpoint: state": (TrainerState, "save_to_json", 3, False),
    "checkpoint: unnamed": (trainer, "publish", 2, False),
    "checkpoint: two at once": (trainer, "publish", 3, True),
    "checkpoint: last": (trainer, "publish", 6, True),
    "adapter: being written": (PeftModel, "save_pretrained", 7, True),
    "adapter: written": (saving, "plot_run", 1, False),
    "merge: begun": (saving, "merge_adapter", 1, False),
    "merge: weights written": (LlamaForCausalLM, "save_pretrained", 1, True),
    "merge: unnamed": (PreTrainedTokenizerBase, "save_pretrained", 1, True),
    "merge: done": (saving, "save_merged", 1, True),
}
QUICK = ("gradient: a middle layer", "checkpoint: optimizer", "merge: weights written")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    "event", [event if event in QUICK else pytest.param(event, marks=pytest.mark.slow) for event in KILLS]
)
def test_resumes_bitwise_after_a_kill_at_any_point(event, tmp_path, llama_folder, straight):
    run = small_run(tmp_path, llama_folder, *CHANGES)

    def work():
        owner, name, call, after = KILLS[event]
        kill_at(owner, name, call, after=after)
        experiment.execute(run)

    status = in_child(work)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it was to be killed"
    folder = finish(run)
    assert (folder.adapter / ADAPTER).read_bytes() == (straight.adapter / ADAPTER).read_bytes()
    merged = "model.safetensors"
    assert (folder.merged / merged).read_bytes() == (straight.merged / merged).read_bytes()
    told = [[(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines(f)] for f in (folder, straight)]
    assert told[0] == told[1]
    assert folder.read()["status"] == "finished" and folder.read()["error"] is None
    left = {str(file.relative_to(folder.path)) for file in folder.path.rglob("*")}
    assert left == {str(file.relative_to(straight.path)) for file in straight.path.rglob("*")}, "nothing lies about"
    assert [point.name for point in folder.checkpoints.glob("checkpoint-*")] == ["checkpoint-12"]


def lines(folder):
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def launched(monkeypatch, *arguments):
    """The exit code of run_exp.py with these arguments, in this process."""
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # conf/ lies beside run_exp.py, as when that is the program
    monkeypatch.setattr(sys, "argv", ["run_exp.py", *arguments])
    return cli.launch(run_exp.main)


def arguments_of(results, model):
    """The command line of ``small_run``."""
    small = ["dataset.train_size=48", "dataset.validation_size=8", "dataset.max_new_tokens=8"]
    batches = ["model.real_batch_size=8", "model.per_device_batch_size=8", "wandb.mode=disabled"]
    return [f"results_dir={results}", f"model.name={model}", *small, *batches, *CHANGES]


def signal_at(monkeypatch, owner, name, call, number):
    """This process sends itself a signal at the n-th call of a function."""
    original, calls = getattr(owner, name), []

    def signalling(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, signalling)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_training_after_its_step_with_a_resume_point(
    number, tmp_path, llama_folder, straight, monkeypatch, capsys
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    command = arguments_of(tmp_path, llama_folder)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, FineTuner, "compute_loss", 3, number)
        assert launched(monkeypatch, *command) == 128 + number
    assert signal.getsignal(number) is before
    assert f"stopped by {number.name}: the same command continues from the last" in capsys.readouterr().err
    (file,) = tmp_path.rglob("run.json")
    folder = RunFolder(file.parent)
    assert folder.read()["status"] == "interrupted" and number.name in folder.read()["error"]
    assert [point.name for point in folder.checkpoints.iterdir()] == ["checkpoint-3"]
    monkeypatch.setattr(initial_model, "attach_adapters", None)  # what was initialised is not initialised again
    assert launched(monkeypatch, *command) == 0
    assert (folder.adapter / ADAPTER).read_bytes() == (straight.adapter / ADAPTER).read_bytes()
    assert folder.read()["status"] == "finished"


def test_a_second_ctrl_c_ends_training_at_once(tmp_path, llama_folder, straight, monkeypatch, capfd):
    """The first one comes in the third step, the second one in its optimizer step: no resume point of step 3."""
    command = arguments_of(tmp_path, llama_folder)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        signal_at(patch, FineTuner, "compute_loss", 3, signal.SIGINT)
        signal_at(patch, AfterStep, "on_optimizer_step", 3, signal.SIGINT)
        assert launched(monkeypatch, *command) == 130
    assert signal.getsignal(signal.SIGINT) is before
    said = capfd.readouterr().err
    assert said.index("press Ctrl-C again to stop at once") < said.index("the same command")
    (file,) = tmp_path.rglob("run.json")
    folder = RunFolder(file.parent)
    assert folder.read()["status"] == "interrupted"
    assert [point.name for point in folder.checkpoints.iterdir()] == ["checkpoint-2"]
    assert launched(monkeypatch, *command) == 0
    assert (folder.adapter / ADAPTER).read_bytes() == (straight.adapter / ADAPTER).read_bytes()


def test_ctrl_c_that_the_process_ignores_stays_ignored(monkeypatch):
    """As in the background of a script, where a shell lets its jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with caught():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_training_ends_the_run_at_once(number, tmp_path, llama_folder, monkeypatch):
    signal_at(monkeypatch, steps, "factorised", 2, number)
    assert launched(monkeypatch, *arguments_of(tmp_path, llama_folder)) == 128 + number
    (file,) = tmp_path.rglob("run.json")
    assert json.loads(file.read_text())["status"] == "interrupted"


def test_an_interrupted_dry_run_promises_no_continuation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "execute", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert launched(monkeypatch, "dry_run=true", f"results_dir={tmp_path}", "wandb.mode=disabled") == 143
    assert "stopped by SIGTERM: a dry run has no resume point" in capsys.readouterr().err


def fake_scontrol(folder, monkeypatch, refusal=False):
    """Make this process part of SLURM's job 77, and let scontrol write what it is asked to folder/asked."""
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    answer = "echo Requested operation is presently disabled >&2; exit 1" if refusal else "exit 0"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked; {answer}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for name in ("SLURM_PROCID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("number", "extra", "answer", "said"),
    [
        (signal.SIGUSR1, (), 0, "SLURM job 77 is queued again"),
        (signal.SIGUSR1, (), 1, "SLURM job 77 was not queued again (Requested operation is presently disabled)"),
        (signal.SIGTERM, (), 0, None),
        (signal.SIGUSR1, ("overwrite=true",), 0, None),
        (signal.SIGUSR1, ("overwrite=True",), 0, None),
        (signal.SIGUSR1, ("++overwrite=1",), 0, None),
        (signal.SIGUSR1, ("overwrite='yes'",), 0, None),
        (signal.SIGUSR1, ("-m", "seed=1", "overwrite=false,true"), 0, None),
        (signal.SIGUSR1, ("overwrite=False",), 0, "SLURM job 77 is queued again"),
    ],
)
def test_slurm_queues_a_job_again_on_sigusr1(number, extra, answer, said, tmp_path, monkeypatch, capsys):
    fake_scontrol(tmp_path, monkeypatch, refusal=bool(answer))
    last = "false,true" not in " ".join(extra)  # of a sweep the second job is ended
    monkeypatch.setattr(experiment, "execute", lambda run: (last or run.overwrite) and os.kill(os.getpid(), number))
    results = f"results_dir={tmp_path / 'results'}"
    assert launched(monkeypatch, *extra, results, "wandb.mode=disabled") == 128 + number
    assert (tmp_path / "asked").exists() == (said is not None)
    if said:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("restarts", "again"), [("2", True), ("3", False)])
def test_a_job_that_never_gets_further_is_not_queued_for_ever(restarts, again, tmp_path, monkeypatch, capsys):
    fake_scontrol(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(experiment, "execute", lambda run: os.kill(os.getpid(), signal.SIGUSR1))
    assert launched(monkeypatch, f"results_dir={tmp_path / 'results'}", "wandb.mode=disabled") == 138
    assert (tmp_path / "asked").exists() == again
    said = "is queued again" if again else "is not queued again: its start number 4 saved nothing to continue from"
    assert said in capsys.readouterr().err


def test_an_answer_of_an_evaluation_is_progress_also_after_an_inner_block(tmp_path, monkeypatch):
    """A server that an evaluation starts is one; the job only evaluates, and would end after some more starts."""
    fake_scontrol(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    partial = PartialResults(tmp_path / "partial.jsonl", {"model": "m"}, Processes(0, 1))
    with caught():
        partial.add((0, 0), Completion("#### 2", False, {}, 7, False))
        with caught():
            pass
    assert "is queued again" in interruption.requeue(interruption.Interrupted(signal.SIGUSR1))
    with caught():
        pass
    assert "is not queued again" in interruption.requeue(interruption.Interrupted(signal.SIGUSR1))


def test_a_job_with_a_new_resume_point_is_queued_again_however_often(tmp_path, llama_folder, monkeypatch):
    fake_scontrol(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "30")
    signal_at(monkeypatch, FineTuner, "compute_loss", 3, signal.SIGUSR1)
    assert launched(monkeypatch, *arguments_of(tmp_path, llama_folder)) == 138
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.fixture
def stopped(tmp_path, llama_folder, monkeypatch):
    """A run that was stopped at step 4, with its resume point, and its configuration."""
    run = small_run(tmp_path, llama_folder, *CHANGES)
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        experiment.execute(run)
    monkeypatch.undo()
    (file,) = tmp_path.rglob("run.json")
    return run, RunFolder(file.parent)


def test_a_broken_resume_point_is_named_with_the_way_out(stopped, straight, monkeypatch):
    run, folder = stopped
    point = folder.checkpoints / "checkpoint-4"
    with monkeypatch.context() as patch:
        patch.setattr("lora_one.models.load_model", None)  # refused before anything is loaded
        for name in ("trainer_state.json", ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            whole = (point / name).read_bytes()
            for cut in (whole[: len(whole) // 2], None):
                (point / name).unlink()
                if cut is not None:
                    (point / name).write_bytes(cut)
                with pytest.raises(RunError, match=r"checkpoint-4 is damaged \(.*delete that folder, or add overwrite"):
                    experiment.execute(run)
                (point / name).write_bytes(whole)
    (point / ADAPTER).write_bytes(b"")
    for file in point.iterdir():
        file.unlink()
    point.rmdir()
    assert (finish(run).adapter / ADAPTER).read_bytes() == (straight.adapter / ADAPTER).read_bytes()


@pytest.mark.parametrize("largest", [ADAPTER, "optimizer.pt"])
def test_full_disk_keeps_the_previous_resume_point(largest, stopped, straight, monkeypatch):
    """The file size limit is below this file's size; the system then reports an error like that of a full disk."""
    run, folder = stopped
    size = (folder.checkpoints / "checkpoint-4" / largest).stat().st_size
    older = {file.name: file.read_bytes() for file in (folder.checkpoints / "checkpoint-4").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Trainer._save_checkpoint

    def full(self, model, trial):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
        try:
            original(self, model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", full)
        with pytest.raises(RunError, match=r"checkpoint-6 cannot be written \(.*free disk space; the same command"):
            experiment.execute(run)
    assert [point.name for point in folder.checkpoints.iterdir()] == ["checkpoint-4"]
    assert older == {file.name: file.read_bytes() for file in (folder.checkpoints / "checkpoint-4").iterdir()}
    assert folder.read()["status"] == "failed"
    assert (finish(run).adapter / ADAPTER).read_bytes() == (straight.adapter / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        ["peft=full_ft", "model.learning_rate=1e-3"],
        ["peft=all_w_emb", "model.keep_epochs=true"],
        ["dataset=cola", "model=tiny", "model.type=SequenceClassification", "dataset.train_size=null"],
    ],
    ids=["every weight", "embeddings", "a head"],
)
def test_every_kind_of_training_resumes_bitwise(changes, tmp_path, llama_folder, monkeypatch):
    if "dataset=cola" in changes:
        rows = [f"x\t{i % 2}\t\tsentence {i} {'good' if i % 2 else 'bad'}" for i in range(48)]
        (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n")
        changes = [*changes, f"dataset.path={tmp_path / 'train.tsv'}", "model.max_length=48"]
    init = ["init=default"] if "peft=full_ft" in changes else []
    whole = finish(small_run(tmp_path / "whole", llama_folder, *CHANGES, *init, *changes))
    run = small_run(tmp_path / "stopped", llama_folder, *CHANGES, *init, *changes)
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        experiment.execute(run)
    monkeypatch.undo()
    folder = finish(run)
    assert folder.read()["train"]["steps"] == whole.read()["train"]["steps"] > 5
    files = [
        file.relative_to(whole.path) for file in whole.path.rglob("*.safetensors") if "checkpoints" not in str(file)
    ]
    assert len(files) >= 1 + ("peft=full_ft" not in changes)
    for file in files:
        assert (folder.path / file).read_bytes() == (whole.path / file).read_bytes(), file


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        (("model.epochs=1.5",), 9),
        (
            ("model.epochs=4", "model.early_stopping_patience=1", "model.learning_rate=1e-30"),
            12,
        ),  # the loss stays equal
    ],
    ids=["within an epoch", "stopped early"],
)
def test_a_run_killed_after_its_last_step_takes_no_further_one(changes, steps, tmp_path, llama_folder, monkeypatch):
    """The Trainer itself would take the next step of the epoch, and forget that it had stopped early."""
    changes = (
        *changes,
        "init=lora",
        "model.eval_epochs=1",
        "model.scheduler=constant",
        "model.warmup=0",
        "model.max_grad_norm=0",
    )
    whole = finish(small_run(tmp_path / "whole", llama_folder, *changes))
    run = small_run(tmp_path / "killed", llama_folder, *changes)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "save", lambda *_: (_ for _ in ()).throw(RunError("killed")))
        with pytest.raises(RunError, match="killed"):
            experiment.execute(run)
    resumed = finish(run)
    expected, found = whole.read(), resumed.read()
    assert found["train"]["steps"] == expected["train"]["steps"] == steps
    assert found["train"]["tokens"] == expected["train"]["tokens"]
    assert found["evaluation"] == expected["evaluation"]
    lines = [[line["step"] for line in read_lines(folder.metrics)] for folder in (whole, resumed)]
    assert lines[0] == lines[1]
    assert (resumed.adapter / ADAPTER).read_bytes() == (whole.adapter / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("told", "job"),
    [
        ("JobId=9 ArrayJobId=4 ArrayTaskId=2 JobName=a\n\nJobId=4 ArrayJobId=4 ArrayTaskId=3 JobName=a\n", "4_3"),
        ("JobId=9 JobName=submitted by a task of array 4\n", "9"),
        (None, "4_3"),
    ],
)
def test_the_variables_of_an_array_are_believed_only_if_slurm_says_so(told, job, monkeypatch):
    """sbatch hands them on to the jobs that a task submits; requeueing <array>_<task> would stop that task."""
    own = "4" if job == "4_3" else "9"
    for name, value in {"JOB": own, "ARRAY_JOB": "4", "ARRAY_TASK": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}_ID", value)
    answer = SimpleNamespace(returncode=0 if told else 1, stdout=told or "")
    monkeypatch.setattr(interruption.subprocess, "run", lambda *_, **__: answer)
    assert interruption.own_job() == job
