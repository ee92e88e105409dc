"""The command line: published spellings, exit codes, and answers that need no torch."""

import re
import subprocess
import sys
from contextlib import suppress

import pytest

import run_exp
from lora_one.config import RunConfig
from lora_one.datasets import glue, super_glue
from lora_one.runs import cli
from lora_one.runs.overrides import translate
from tests.helpers.paths import ROOT
from tests.helpers.runs import PUBLISHED, composed, run_config


@pytest.mark.parametrize("command", PUBLISHED.values(), ids=PUBLISHED)
def test_published_commands_compose(command):
    run = RunConfig.from_hydra(composed(*translate(command.split())))
    assert run.init.title == "LoRA-One" and run.init.gamma == 128 and run.peft.use_rslora


def test_published_meta_math_command_says_what_the_paper_ran():
    run = RunConfig.from_hydra(composed(*translate(PUBLISHED["meta_math"].split())))
    assert (run.dataset.name, run.model.name, run.seed) == ("meta_math", "meta-llama/Llama-2-7b-hf", 9)
    assert (run.peft.lora_r, run.peft.lora_alpha, run.init.scale) == (8, 16, "stable")
    assert (run.model.real_batch_size, run.model.max_length, run.model.learning_rate) == (32, 1024, 2e-4)
    assert run.init.bsz * run.init.iters == 8 and run.model.saving


def every_choice():
    return [
        f"{folder.name}={file.stem}"
        for folder in sorted((ROOT / "conf").iterdir())
        if folder.is_dir() and folder.name not in ("hydra", "experiment", "hardware")
        for file in sorted(folder.glob("[!_]*.yaml"))
    ]


@pytest.mark.parametrize("choice", every_choice())
def test_every_choice_composes_and_is_read_to_the_last_key(choice, tmp_path):
    needs = {"dataset=json": [f"dataset.path={tmp_path}"], "peft=lora_xs": ["init=lora_xs"]}
    needs["dataset=commonsense_reasoning"] = needs["dataset=chat"] = needs["dataset=json"]
    needs |= {"init=loftq": ["model.quantization=nf4"], "init=full_step": ["peft=full_ft"]}
    needs["model=roberta_large"] = ["dataset=cola"]
    section, _, name = choice.partition("=")
    run = run_config(choice, *needs.get(choice, []))
    assert getattr(run, section) is not None
    if section == "dataset":
        assert run.dataset.name == name
        usual = {"arithmetic": "bundled/tiny"} | dict.fromkeys((*glue.TASKS, *super_glue.TASKS), "google-t5/t5-base")
        assert run.model.name == usual.get(name, "meta-llama/Llama-2-7b-hf")


def test_named_model_wins_over_the_data_set_s_usual_one(tmp_path):
    assert run_config("dataset=gsm8k", "model=tiny").model.name == "bundled/tiny"
    assert run_config("model=tinyllama", "dataset=meta_math").model.learning_rate == 1e-5


@pytest.mark.parametrize("file", sorted((ROOT / "conf/experiment").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_experiment_composes(file, tmp_path):
    local = [f"dataset.path={tmp_path}"] if "commonsense_reasoning" in file.read_text() else []
    assert run_config(f"experiment={file.stem}", *local).model.name != "bundled/tiny"


@pytest.mark.parametrize("arguments", [("--help",), ("--cfg", "job")])
def test_help_needs_no_torch(arguments):
    command = [sys.executable, "-X", "importtime", "run_exp.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "learning_rate" in done.stdout
    assert not imported & {"torch", "transformers", "peft", "datasets", "wandb", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "setting", "message"),
    [
        (("-m", "hydra/launcher=slurm"), {"plugin": None}, "pip install 'lora-one[slurm]'"),
        (("hydra/launcher=slurm",), {}, "add -m"),
        (("-m", "hydra/launcher=slurm", "dry_run=true"), {}, "would submit jobs that only print plans"),
        (("-m", "hydra/launcher=slurm"), {"PATH": ""}, "needs sbatch, not found here"),
        (("-m", "hydra/launcher=slurm"), {"WORLD_SIZE": "2"}, "without srun or a launcher"),
        (("-m", "hydra/launcher=slurm", "hydra.launcher.foo=1"), {}, "hydra.launcher.additional_parameters={option"),
    ],
)
def test_unusable_slurm_gives_one_line(arguments, setting, message, tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\nexit 9\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", setting.pop("PATH", str(sbatch.parent)))
    found = setting.pop("plugin", "there")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: found)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")
    monkeypatch.setattr(sys, "argv", ["run_exp.py", *arguments, "seed=1,2", f"results_dir={tmp_path / 'results'}"])
    assert cli.launch(run_exp.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("arguments", [["--help"], ["-sc", "query=bash"]], ids=["help", "completion"])
def test_files_that_others_include_are_not_offered(arguments, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "run_exp.py init=")
    monkeypatch.setattr(sys, "argv", ["run_exp.py", *arguments])
    with suppress(SystemExit):  # Hydra ends the process after --help
        cli.launch(run_exp.main)
    said = capsys.readouterr().out
    assert "lora_one" in said and not re.findall(r"(?<!\w)_\w+", said)


def test_flags_after_overrides_reach_hydra(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_exp.py", "seed=7", "--cfg", "job", "model.epochs=2"])
    assert cli.launch(run_exp.main) == 0
    said = capsys.readouterr().out
    assert "seed: 7" in said and "epochs: 2" in said


def test_given_key_that_is_not_read_is_said(tmp_path, monkeypatch, capsys):
    keys = ["model=tiny", "init=lora", "++model.prec_reg=0.1", "model.real_batch_size=8", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["run_exp.py", *keys, "wandb.mode=disabled", f"results_dir={tmp_path}"])
    assert cli.launch(run_exp.main) == 0
    note = "note: this run does not read model.prec_reg: optimizer=adamw has no preconditioners\n"
    assert note in capsys.readouterr().out
