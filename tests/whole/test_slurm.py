"""Under a real SLURM: srun, the batch scripts and arrays of sweep jobs finish their runs, queued again or not."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lora_one.distributed import take_slurm_tasks
from lora_one.errors import RunError
from lora_one.files import read_lines
from lora_one.records.folder import RunFolder
from lora_one.runs import slurm as slurm_jobs
from scripts.campaign import slurm_cluster
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL, finish, small_run

ADAPTER = "adapter_model.safetensors"
STEP = {
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3",
    "SLURM_STEP_NODELIST": "here",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}


def test_tasks_of_a_step_are_processes_of_one_run():
    environment = dict(STEP)
    take_slurm_tasks(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("1", "1", "3")
    assert environment["LOCAL_WORLD_SIZE"] == "3"
    other = STEP | {"SLURM_STEP_ID": "3"}
    take_slurm_tasks(other)
    assert environment["MASTER_PORT"] != other["MASTER_PORT"] and 20000 <= int(other["MASTER_PORT"]) < 40000


@pytest.mark.parametrize(("tasks", "size"), [("4(x2)", "4"), ("4(x2),3", None)])
def test_the_number_of_tasks_on_a_node_is_known_if_all_nodes_have_it(tasks, size, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(stdout="here\n"))
    environment = STEP | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": tasks}
    take_slurm_tasks(environment)
    assert environment.get("LOCAL_WORLD_SIZE") == size


@pytest.mark.parametrize("changed", [{"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_one_task_or_another_launcher_leave_the_environment(changed):
    environment = STEP | changed
    take_slurm_tasks(environment)
    assert environment == STEP | changed


def test_a_shell_of_srun_is_one_task(monkeypatch):
    """Of srun --ntasks=3 --pty bash only the first shell has a terminal; its commands have the variables of three."""
    monkeypatch.setattr("os.isatty", lambda descriptor: descriptor == 0)
    environment = STEP | {"SLURM_TASK_PID": "1"}
    take_slurm_tasks(environment)
    assert "WORLD_SIZE" not in environment
    itself = STEP | {"SLURM_TASK_PID": str(os.getpid())}  # srun --ntasks=3 --pty python run_exp.py
    take_slurm_tasks(itself)
    assert itself["WORLD_SIZE"] == "3"


@pytest.mark.parametrize("inside", [True, False])
def test_a_job_does_not_get_the_variables_of_the_job_that_submits_it(inside, monkeypatch):
    ours = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_MEM_PER_CPU": "100"} | ({"SLURM_JOB_ID": "7"} if inside else {})
    for key, value in (ours | {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "a"}).items():
        monkeypatch.setenv(key, value)
    if not inside:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with slurm_jobs.outside_a_job():
        assert all((key in os.environ) != inside for key in ours)
        assert os.environ["SLURM_CONF"] and os.environ["SBATCH_ACCOUNT"]
    assert all(os.environ[key] == value for key, value in ours.items())


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("error: disk full\nsrun: error: node1: task 0: Exited with exit code 1\n", "disk full"),
        ("srun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE are mutually exclusive.\n", "SLURM_MEM_PER_CPU and"),
        ("srun: error: node1: task 0: Killed\n", "node1: task 0: Killed"),
        ("", "see "),
    ],
)
def test_the_reason_in_a_log_is_not_that_of_srun(log, said, tmp_path):
    (tmp_path / "log").write_text(log)
    job = SimpleNamespace(task=lambda _: SimpleNamespace(paths=SimpleNamespace(stderr=tmp_path / "log")))
    assert slurm_jobs.last_error(job).startswith(said)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = slurm_cluster.why_not()
    if reason:
        pytest.skip(reason)
    if torch.cuda.is_available():
        pytest.skip("the node of the test has no GPUs to give out")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster.environment | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def run(command, environment):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


@pytest.mark.slow
def test_the_published_command_under_srun(slurm, tmp_path):
    """As written, with model, data and precision of this machine."""
    answer = "{i}+{i}\n#### {two}\nThe answer is: {two}"
    rows = [
        {"query": f"How many is {i} and {i}?", "response": answer.format(i=i, two=2 * i), "type": "GSM_AnsAug"}
        for i in range(40)
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    published = "-m ++dataset_name=meta_math model.epochs=1 model.eval_epochs=1 ++model.saving=true +init=gradient "
    published += "++peft.lora_r=8 +peft=all wandb.name=enter-name-here ++init.weight=stable peft.use_rslora=True "
    published += "peft.lora_alpha=16 ++init.stable_gamma=128 model.learning_rate=2e-4 "
    published += "++seed=9 ++init.direction=LoRA-One"
    ours = [f"dataset.path={data}", "model=tiny", "wandb.mode=disabled", f"results_dir={tmp_path}"]
    done = run(["srun", "-n1", sys.executable, "run_exp.py", *published.split(), *ours], slurm)
    assert done.returncode == 0, done.stderr
    (merged,) = tmp_path.glob("lora-one_meta_math/enter-name-here-*/9/merged_checkpoint/config.json")
    assert merged.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["srun", "one_node", "nodes"])
def test_two_tasks_are_one_run(way, slurm, tmp_path):
    results = [*SMALL, f"results_dir={tmp_path / 'two'}"]
    if way == "srun":
        done = run(["srun", "-n2", sys.executable, "run_exp.py", *results], slurm)
    else:
        options = ["--wait", "--gres=none", f"--output={tmp_path / 'log'}"]
        options += ["--ntasks-per-node=1"] if way == "nodes" else []
        done = run(["sbatch", *options, f"scripts/slurm/{way}.sbatch", *results], slurm)
    assert done.returncode == 0, done.stderr + ((tmp_path / "log").read_text() if way != "srun" else "")
    alone = finish(small_run(tmp_path / "one", "bundled/tiny", *SMALL[1:]))
    together = RunFolder(tmp_path / "two" / alone.path.relative_to(tmp_path / "one"))
    assert list(together.path.glob("checkpoints/*/rng_state_1.pth")), "a second process took part"
    losses = [[line["loss"] for line in read_lines(folder.metrics) if "loss" in line] for folder in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 6


@pytest.mark.slow
def test_batch_script_for_one_gpu(slurm, tmp_path):
    options = ["--wait", "--gres=none", f"--output={tmp_path / 'log'}"]
    done = run(["sbatch", *options, "scripts/slurm/one_gpu.sbatch", *SMALL, f"results_dir={tmp_path}"], slurm)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert "finished" in log and log.rstrip().splitlines()[-1].startswith("run: ")


def until(condition, seconds=600):
    """What the condition gives, once that is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.5)
    return found


def field(job, name, environment):
    """Of what SLURM shows of a job."""
    return run(["scontrol", "show", "job", job], environment).stdout.partition(f"{name}=")[2].split()[0]


def completed(job, log, environment):
    """Whether a job is over; another end than a successful one fails the test."""
    state = field(job, "JobState", environment)
    assert state in {"PENDING", "RUNNING", "COMPLETING", "COMPLETED"}, (state, log.read_text()[-2000:])
    return state == "COMPLETED"


def queued_again(job, environment):
    assert field(job, "JobState", environment) != "COMPLETED", "the job finished before the signal: make it longer"
    return field(job, "Reason", environment) == "BeginTime"


def start_soon(job, environment):
    """Wait until a job is in the queue again, and let it start in 5 seconds instead of in 2 minutes.

    In the second of its requeue SLURM would refuse to start it ("Job credential revoked").
    """
    until(lambda: queued_again(job, environment))
    assert run(["scontrol", "update", f"jobid={job}", "StartTime=now+5"], environment).returncode == 0


def logged(results, run):
    """Steps that a run has in its metrics so far."""
    files = list(results.glob(f"lora-one_arithmetic/{run}/metrics.jsonl"))
    return [line["step"] for line in read_lines(files[0]) if "loss" in line] if files else []


# 180 steps, each with an evaluation: long enough that a signal sent after the first step finds the job running, even on
# a machine that is so busy that sending it takes seconds
LONGER = [*SMALL, "model.epochs=30"]


@pytest.mark.slow
def test_a_batch_job_told_of_its_end_queues_itself_again_and_finishes(slurm, tmp_path):
    options = ["--parsable", "--gres=none", f"--output={tmp_path / 'log'}"]
    results = tmp_path / "results"
    asked = ["sbatch", *options, "scripts/slurm/one_gpu.sbatch", *LONGER, "seed=1", f"results_dir={results}"]
    job = run(asked, slurm).stdout.strip()
    until(lambda: logged(results, "*/1"))
    run(["scancel", "--signal=USR1", job], slurm)
    start_soon(job, slurm)
    until(lambda: completed(job, tmp_path / "log", slurm))
    log = (tmp_path / "log").read_text()
    assert f"SLURM job {job} is queued again" in log and log.rstrip().splitlines()[-1].startswith("run: ")
    assert field(job, "Restarts", slurm) == "1" and log.count("init: LoRA-One") == 1, "what was initialised is kept"
    (folder,) = (RunFolder(file.parent) for file in results.rglob("run.json"))
    straight = finish(small_run(tmp_path / "straight", "bundled/tiny", *LONGER[1:], "seed=1"))
    assert (folder.adapter / ADAPTER).read_bytes() == (straight.adapter / ADAPTER).read_bytes()


class Job:
    """What our launcher asks of a job of submitit's."""

    def __init__(self, folder, job_id):
        self.job_id = job_id
        self.paths = SimpleNamespace(result_pickle=folder / f"{job_id}_result", stderr=folder / f"{job_id}_log")

    def task(self, number):
        return self


def test_does_not_wait_for_jobs_that_left_the_slurm_queue(tmp_path, monkeypatch, capsys):
    """It must be missing twice: results may come late, and a queue that does not answer proves nothing."""
    one, both = {"5_0": "running"}, {"5_0": "running", "5_1": "pending (Priority)"}
    answers = iter([both, one, None, both, one, one, {}])
    asked = []

    def in_queue(ids):
        asked.append(ids)
        if len(asked) == 7:
            (tmp_path / "5_0_result").touch()
        return next(answers)

    for name, value in (("ASK_S", 0), ("LOOK_S", 0), ("in_queue", in_queue)):
        monkeypatch.setattr(slurm_jobs, name, value)
    ended = slurm_jobs.wait_for([Job(tmp_path, "5_0"), Job(tmp_path, "5_1")])
    lost = next(ended)
    assert (lost.job_id, len(asked)) == ("5_1", 6)
    lost.paths.stderr.write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=5.0.\nmore\n")
    with pytest.raises(RunError, match=r"job 5_1 did not finish \(Detected 1 oom_kill event in .*the same command"):
        slurm_jobs.outcome_of(lost)
    never = "SLURM job 5_1 is not queued again: its start number 4 saved nothing to continue from; raise its time limit"
    lost.paths.stderr.write_text(f"error: stopped by SIGUSR2: the same command continues from the last ...; {never}\n")
    with pytest.raises(RunError) as stopped:
        slurm_jobs.outcome_of(lost)
    assert str(stopped.value) == f"job 5_1 did not finish (stopped by SIGUSR2): {never}"
    assert [job.job_id for job in ended] == ["5_0"] and len(asked) == 7
    changes = ["1 pending (Priority), 1 running", "1 running", "1 pending (Priority), 1 running", "1 running"]
    assert capsys.readouterr().out.splitlines() == [f"SLURM: {states}" for states in changes]


def test_a_pending_job_is_listed_with_slurms_reason(monkeypatch):
    """As squeue prints a job of an array that runs, one that waits, and one of another command."""
    lines = "CLUSTER: alpha\n7_0|RUNNING|None\n7_1|PENDING|AssocGrpCpuLimit\n7_9|PENDING|Priority\n"
    answer = SimpleNamespace(returncode=0, stdout=lines, stderr="")
    monkeypatch.setattr(slurm_jobs.subprocess, "run", lambda *_, **__: answer)
    assert slurm_jobs.in_queue({"7_0", "7_1", "7_2"}) == {"7_0": "running", "7_1": "pending (AssocGrpCpuLimit)"}


ARRAY = ["-m", "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]


@pytest.mark.slow
def test_a_sweep_is_an_array(slurm, tmp_path):
    """Two jobs are submitted to SLURM, equal runs once; wrong settings are reported before."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install -e .[slurm]")
    results = tmp_path / "array"
    done = run([sys.executable, "run_exp.py", *ARRAY, *SMALL, "seed=1,2,1,-1", f"results_dir={results}"], slurm)
    assert done.returncode == 2 and "seed=-1 is out of range" in done.stderr, done.stderr
    assert f": 2 jobs, logs in {results}/.submitit" in done.stdout
    alone = finish(small_run(tmp_path / "alone", "bundled/tiny", *SMALL[1:], "seed=1"))
    there = RunFolder(results / alone.path.relative_to(tmp_path / "alone"))
    assert (there.adapter / ADAPTER).read_bytes() == (alone.adapter / ADAPTER).read_bytes()
    files = [sorted(str(f.relative_to(run.path)) for f in run.path.rglob("*")) for run in (there, alone)]
    assert files[0] == files[1] and there.path.parent.name == alone.path.parent.name, "a run is what it is anywhere"
    (table,) = results.glob("sweep-*.md")
    row = table.read_text().splitlines()[2]
    assert there.path.parent.name in row and row.split("|")[1].strip() == "2"


@pytest.mark.slow
def test_array_with_a_failed_and_a_requeued_job(slurm, tmp_path):
    """SLURM gives the last job the number of the array, with which all jobs would be queued again."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install -e .[slurm]")
    results = tmp_path / "array"
    command = [sys.executable, "run_exp.py", *ARRAY, *LONGER, "model.max_grad_norm=0", f"results_dir={results}"]
    rates = "model.learning_rate=5e-3,1e30,4e-3"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, rates], **streams, cwd=ROOT, env=slurm) as sweep:
        array = sweep.stdout.readline().split()[2].rstrip(":")
        last = f"{array}_2"
        until(lambda: logged(results, "*-lr0.004-*/42"))
        assert field(last, "JobId", slurm) == array
        run(["scancel", "--signal=USR2", last], slurm)
        start_soon(last, slurm)
        out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1, err
    assert f"{array}_1 model.learning_rate=1e+30: the loss became nan" in err
    assert [field(f"{array}_{number}", "Restarts", slurm) for number in range(3)] == ["0", "0", "1"]
    until(lambda: field(last, "JobState", slurm) == "COMPLETED", seconds=60)
    assert [field(f"{array}_{number}", "ExitCode", slurm) for number in range(3)] == ["0:0", "1:0", "0:0"]
    assert f"{last} model.learning_rate=0.004: finished" in out
    (table,) = results.glob("sweep-*.md")
    lines = table.read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["0.005", "1e+30", "0.004"]
    assert lines[-1].startswith("- model.learning_rate=1e+30, failed: the loss became nan")
    (folder,) = results.glob("*/*-lr0.004-*/42")
    straight = small_run(
        tmp_path / "straight", "bundled/tiny", *LONGER[1:], "model.max_grad_norm=0", "model.learning_rate=4e-3"
    )
    assert (folder / "adapter" / ADAPTER).read_bytes() == (finish(straight).adapter / ADAPTER).read_bytes()

    again = run([*command, "model.learning_rate=5e-3,4e-3"], slurm)
    assert again.returncode == 0 and table.read_text() in again.stdout
    logs = [log.read_text() for log in results.glob(".submitit/*/*_log.out")]
    assert sum("already finished: " in log for log in logs) == 2


@pytest.mark.slow
@pytest.mark.long
def test_a_comparison_is_an_array_for_each_stage(slurm, tmp_path):
    """Tuning, chosen points and untrained runs: three arrays; what is finished is not submitted again."""
    pytest.importorskip("submitit", reason="pip install -e .[slurm]")
    content = {
        "title": "Two methods under SLURM",
        "common": [*SMALL, "model.name=bundled/tiny", f"results_dir={tmp_path / 'results'}"],
        "test": ["dataset.data_seed=1"],
        "test_examples": 8,
        "tuning_seeds": [1],
        "seeds": [1, 2],
        "shared_seeds": "fewer runs",
        "grid": {"model.learning_rate": [1e-3]},
        "methods": {"LoRA": ["init=lora"], "LoRA-One": ["init=lora_one"]},
        "launcher": "slurm",
        "slurm": {"gpus_per_node": None, "cpus_per_task": 1},
    }
    (tmp_path / "file.json").write_text(json.dumps(content))  # JSON is YAML
    command = [sys.executable, "scripts/compare.py", str(tmp_path / "file.json"), f"--output={tmp_path / 'out'}"]
    done = run(command, slurm)
    assert done.returncode == 0, done.stderr
    arrays = [line for line in done.stdout.splitlines() if line.startswith("SLURM array")]
    assert [line.partition(": ")[2].split()[0] for line in arrays] == ["2", "4", "4"]
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["seeds"] for row in record["rows"]] == [2, 2]
    assert all(run["test_loss"] is not None for run in record["runs"] if run["stage"] != "tuning")
    again = run(command, slurm)
    assert again.returncode == 0 and "SLURM array" not in again.stdout
