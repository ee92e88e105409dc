"""Under a real SLURM: srun with one task and with two, and the batch scripts, each finish a run."""

import json
import subprocess
import sys

import pytest
import slurm_cluster
import torch
from conftest import ROOT, finish, small_run
from test_launch import SMALL

from lora_one.distributed import take_slurm_tasks
from lora_one.run_folder import RunFolder
from lora_one.tracking import read_metrics

STEP = {
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "1",
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
    other = STEP | {"SLURM_STEP_ID": "3"}
    take_slurm_tasks(other)
    assert environment["MASTER_PORT"] != other["MASTER_PORT"] and 20000 <= int(other["MASTER_PORT"]) < 40000


@pytest.mark.parametrize("changed", [{"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_one_task_or_another_launcher_leave_the_environment(changed):
    environment = STEP | changed
    take_slurm_tasks(environment)
    assert environment == STEP | changed


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = slurm_cluster.why_not()
    if reason:
        pytest.skip(reason)
    if torch.cuda.is_available():
        pytest.skip("the node of the test has no GPUs to give out")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def run(command, environment):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


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


@pytest.mark.parametrize("way", ["srun", "sbatch"])
def test_two_tasks_are_one_run(way, slurm, tmp_path):
    results = [*SMALL, f"results_dir={tmp_path / 'two'}"]
    if way == "srun":
        done = run(["srun", "-n2", sys.executable, "run_exp.py", *results], slurm)
    else:
        options = ["--wait", "--gres=none", f"--output={tmp_path / 'log'}"]
        done = run(["sbatch", *options, "scripts/slurm/one_node.sbatch", *results], slurm)
    assert done.returncode == 0, done.stderr + ((tmp_path / "log").read_text() if way == "sbatch" else "")
    alone = finish(small_run(tmp_path / "one", "bundled/tiny", *SMALL[1:]))
    together = RunFolder(tmp_path / "two" / alone.path.relative_to(tmp_path / "one"))
    assert list(together.path.glob("checkpoints/*/rng_state_1.pth")), "a second process took part"
    losses = [[line["loss"] for line in read_metrics(folder.metrics) if "loss" in line] for folder in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 6


def test_batch_script_for_one_gpu(slurm, tmp_path):
    options = ["--wait", "--gres=none", f"--output={tmp_path / 'log'}"]
    done = run(["sbatch", *options, "scripts/slurm/one_gpu.sbatch", *SMALL, f"results_dir={tmp_path}"], slurm)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert "finished" in log and log.rstrip().splitlines()[-1].startswith("run: ")
