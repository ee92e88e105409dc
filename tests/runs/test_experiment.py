"""Whole experiments in this process: what they leave, and that nothing finished is redone or lost."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from peft import PeftModel

from lora_one.adaptation import checkpoints
from lora_one.errors import RunError
from lora_one.evaluation.validation import Validation
from lora_one.models import load_model
from lora_one.runs import experiment, fine_tuning, initial_model
from tests.helpers.models import quantized_llama
from tests.helpers.runs import LOGITS, finish, logits_at_saving, small_run, straight_and_resumed


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama_folder):
    run = small_run(tmp_path_factory.mktemp("results"), llama_folder, "model.saving=true", "model.eval_epochs=0.5")
    return run, finish(run)


def test_others_may_read_a_run_as_far_as_the_umask_allows(finished):
    _, folder = finished
    os.umask(umask := os.umask(0))
    files = [path for path in folder.path.rglob("*") if path.is_file() and "wandb" not in path.parts]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".png"}
    assert [path for path in files if path.stat().st_mode & 0o666 & ~umask != 0o666 & ~umask] == []


def test_run_json_says_what_was_done(finished):
    run, folder = finished
    record = json.loads(folder.run_json.read_text())
    assert record["status"] == "finished"
    assert (
        folder.path.name == "42"
        and folder.path.parent.name == f"LoRA-One-r8-a16-search-lr0.005-{record['config_hash'][:8]}"
    )
    assert folder.path.parent.parent.name == "lora-one_arithmetic"
    assert record["config"] == run.published()
    init, train, evaluation = record["init"], record["train"], record["evaluation"]
    assert (init["method"], init["examples"]) == ("LoRA-One", 8) and init["tokens"] > 8 and init["seconds"] > 0
    assert 0 < init["captured_energy"]["min"] <= init["captured_energy"]["mean"] <= 1
    assert init["loss_after"] < init["loss_before"], "the first step goes downhill"
    assert init["memory"] == "device"
    assert len(init["relative_shift"]) == 14 and all(value > 0 for value in init["relative_shift"].values())
    assert train["steps"] == 6 and train["tokens"] > 6 * 8 * 20 and train["seconds"] > 0
    assert record["trainable_parameters"] == sum(
        8 * (m + n) for m, n in 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    )
    assert {"start", "init", "final"} <= evaluation.keys()
    assert record["provenance"]["versions"]["torch"] == version("torch")
    assert set(record["provenance"]["fingerprints"]) == {"model.name"}
    for artifact in record["artifacts"].values():
        assert (folder.path / artifact).exists()


def test_metrics_have_a_line_a_step(finished):
    _, folder = finished
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all({"epoch", "learning_rate", "grad_norm"} <= line.keys() for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]
    record = json.loads(folder.run_json.read_text())
    losses = [line["loss"] for line in steps]
    assert record["train"]["first_loss"] == pytest.approx(sum(losses[:3]) / 3)
    assert record["train"]["last_loss"] == pytest.approx(sum(losses[3:]) / 3)
    assert losses[-1] < losses[0]


def test_plain_peft_in_a_fresh_process_gives_the_trained_model_bitwise(tmp_path, llama_folder, monkeypatch):
    """The adapter that was trained, not merely one that reloads equal to itself."""
    trained = logits_at_saving(monkeypatch, torch.arange(2, 40).reshape(1, -1))
    folder = finish(small_run(tmp_path, llama_folder))
    arguments = [str(llama_folder), str(folder.adapter), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", LOGITS, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), trained["trained"])


def test_merged_checkpoint_is_the_trained_model(finished, llama_folder):
    _, folder = finished
    ids = torch.arange(2, 40).reshape(1, -1)
    adapted = checkpoints.load_adapter(load_model(str(llama_folder), dtype="fp32"), folder.adapter).eval()
    merged = load_model(str(folder.merged), dtype="auto")
    assert merged.dtype == torch.float32
    with torch.no_grad():
        one, two, base = adapted(ids).logits, merged(ids).logits, load_model(str(llama_folder))(ids).logits
    largest = one.abs().max()
    assert (one - two).abs().max() <= 1e-4 * largest
    assert (one - base).abs().max() > 1e-2 * largest, "training changed something"


def test_the_same_command_again_does_nothing(finished, monkeypatch, capsys):
    run, folder = finished
    before = {
        file: file.stat().st_mtime_ns for file in folder.path.rglob("*") if file.is_file() and file.name != ".lock"
    }
    monkeypatch.setattr("lora_one.models.load_model", None)
    finish(run)
    assert "already finished" in (printed := capsys.readouterr().out)
    assert printed.rstrip().endswith(f"run: {folder.run_json}")
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_saving_a_finished_run_merges_without_training(tmp_path, llama_folder, monkeypatch):
    folder = finish(small_run(tmp_path, llama_folder))
    assert not folder.merged.exists()
    monkeypatch.setattr(fine_tuning, "train", None)
    again = finish(small_run(tmp_path, llama_folder, "model.saving=true"))
    assert again.path == folder.path and (folder.merged / "model.safetensors").exists()
    assert folder.read()["artifacts"]["merged_checkpoint"] == "merged_checkpoint"


def test_overwrite_runs_again_with_the_same_result(finished, llama_folder, tmp_path):
    """Same configuration, same seed, another folder: bit for bit the same adapter."""
    _, folder = finished
    run = small_run(tmp_path, llama_folder, "model.eval_epochs=0.5")
    one = finish(run)
    first = (one.adapter / "adapter_model.safetensors").read_bytes()
    two = finish(small_run(tmp_path, llama_folder, "model.eval_epochs=0.5", "overwrite=true"))
    assert one.path == two.path
    assert first == (two.adapter / "adapter_model.safetensors").read_bytes()
    assert first == (folder.adapter / "adapter_model.safetensors").read_bytes()


def test_epochs_zero_leaves_the_spectral_initialisation_itself(tmp_path, llama_folder, capsys):
    """The paper's one-step row: W + s B A with the factors of Algorithm 1."""
    run = small_run(tmp_path, llama_folder, "model.epochs=0")
    folder = finish(run)
    record = folder.read()
    assert record["train"]["steps"] == 0 and record["train"]["first_loss"] is None
    assert record["evaluation"]["final"] == record["evaluation"]["init"]
    said = capsys.readouterr().out
    assert "after the initialisation alone" in said and "after training" not in said
    model = checkpoints.load_adapter(load_model(str(llama_folder), dtype="fp32"), folder.adapter)
    gamma = record["init"]["searched"]["gamma"]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            A = model.get_parameter(name.replace("lora_B", "lora_A"))
            assert torch.linalg.matrix_norm(parameter @ A, 2) == pytest.approx(1 / gamma, rel=1e-4), name


@pytest.mark.parametrize(
    "start", ["init=gradient", "init=gradient peft=dora", "init=pissa", "init=lora_ga_peft", "model.quantization=nf4"]
)
def test_resumes_bitwise_after_a_kill_between_checkpoints(tmp_path, llama_folder, monkeypatch, start):
    """Two epochs with dropout, stopped after the first one's checkpoint; also where the base was changed."""
    if "quantization" in start:
        quantized_llama(llama_folder)  # or skip
    changes = (*start.split(), "model.epochs=2", "peft.lora_dropout=0.1")
    straight, resumed = straight_and_resumed(tmp_path, llama_folder, changes, monkeypatch)
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()
    lines = [[json.loads(line) for line in f.metrics.read_text().splitlines()] for f in (resumed, straight)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert [line.get("loss") for line in lines[0]] == [line.get("loss") for line in lines[1]]
    assert resumed.read()["init"]["loss_before"] == straight.read()["init"]["loss_before"]


@pytest.mark.parametrize(
    "optimizer", ["scaled_adamw", "scaled_gd optimizer.momentum=0.9", "sgd optimizer.momentum=0.9"]
)
def test_every_optimizer_resumes_bitwise_after_a_kill(tmp_path, llama_folder, monkeypatch, optimizer):
    """adamw: above. With LoRA+, so with two groups."""
    changes = (*f"optimizer={optimizer}".split(), "model.prec_reg=1e-3", "peft.use_loraplus=true", "model.epochs=2")
    short = ("model.learning_rate=1e-3",)
    straight, resumed = straight_and_resumed(tmp_path, llama_folder, (*changes, *short), monkeypatch)
    assert f"-{optimizer.split()[0]}-" in straight.path.parent.name
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()
    lines = [json.loads(line) for line in resumed.metrics.read_text().splitlines()]
    assert [line.get("learning_rate_lora_B") for line in lines] == [
        line.get("learning_rate_lora_B") for line in map(json.loads, straight.metrics.read_text().splitlines())
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["lora_pro", "lora_muon", "lora_rite"])
def test_optimizers_of_pairs_resume_bitwise_after_a_kill(tmp_path, llama_folder, monkeypatch, optimizer, dtype):
    """With DoRA's magnitudes as a second group. The state of bf16 factors is fp32 and must stay so."""
    changes = (f"optimizer={optimizer}", "peft=dora", f"init.dtype={dtype}", "model.weight_decay=0.1")
    short = ("model.learning_rate=1e-3", "model.epochs=2")
    straight, resumed = straight_and_resumed(tmp_path, llama_folder, (*changes, *short), monkeypatch)
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()


@pytest.mark.parametrize("asked", [0, 4])
def test_a_diverging_loss_stops_the_run_and_is_recorded(asked, tmp_path, llama_folder):
    """Also where a validation that would generate comes before the next step's loss."""
    far = ("model.learning_rate=1e30", "model.max_grad_norm=0", "model.eval_epochs=0.1")
    run = small_run(tmp_path, llama_folder, *far, f"dataset.accuracy_examples={asked}")
    with pytest.raises(RunError, match=r"loss became nan at step \d+: lower model.learning_rate"):
        experiment.execute(run)
    (record,) = (json.loads(file.read_text()) for file in tmp_path.rglob("run.json"))
    assert record["status"] == "failed" and "learning_rate" in record["error"]


def test_vanilla_lora_runs_and_starts_at_the_pretrained_function(tmp_path, llama_folder):
    folder = finish(small_run(tmp_path, llama_folder, "init=default"))
    record = folder.read()
    assert record["init"]["method"] == "LoRA" and record["init"]["captured_energy"] is None
    assert all(shift == 0 for shift in record["init"]["relative_shift"].values())
    assert record["evaluation"]["start"]["eval_loss"] == pytest.approx(
        record["evaluation"]["init"]["eval_loss"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("init", "examples"), [("pissa", 0), ("olora", 0), ("eva", 8), ("corda init.iters=16", 16), ("lora_ga_peft", 8)]
)
def test_peft_s_own_initialisations_run(tmp_path, llama_folder, init, examples, attrs_package):
    """On record by their names, each from the pretrained function, and plain PEFT loads what they trained."""
    name = init.split()[0]
    run = small_run(tmp_path, llama_folder, *f"init={init}".split(), "model.saving=true")
    folder = finish(run)
    record = folder.read()
    assert folder.path.parent.name.startswith(f"{name}-r8-a16-") and record["init"]["method"] == name
    assert record["init"]["examples"] == examples and record["init"]["seconds"] > 0
    if examples:
        assert record["init"]["tokens"] > examples
        assert record["init"]["loss_after"] == pytest.approx(record["init"]["loss_before"], rel=1e-5)
    assert len(record["init"]["relative_shift"]) == 14
    assert all((shift > 0) == (name != "eva") for shift in record["init"]["relative_shift"].values())
    assert record["train"]["steps"] == 6 and record["train"]["last_loss"] > 0
    ids = torch.arange(2, 40).reshape(1, -1)
    with torch.no_grad():
        base = load_model(str(llama_folder), dtype="fp32")
        adapted = PeftModel.from_pretrained(base, str(folder.adapter)).eval()(ids).logits
        merged = load_model(str(folder.merged), dtype="auto")(ids).logits
    assert (adapted - merged).abs().max() <= 1e-4 * adapted.abs().max()


def test_bf16_base_keeps_fp32_adapters_and_merges_to_bf16(tmp_path, llama_folder):
    from safetensors.torch import load_file

    folder = finish(small_run(tmp_path, llama_folder, "model.bf16=true", "model.saving=true"))
    adapter = load_file(folder.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    merged = load_file(folder.merged / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    # rounded once: the fp32 sum of the bf16 base and s B A
    name = "model.layers.0.mlp.up_proj"
    A, B = (adapter[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    W = load_model(str(llama_folder), dtype="bf16").get_parameter(f"{name}.weight").float()
    assert torch.equal(merged[f"{name}.weight"], (W + 16 / 8**0.5 * B @ A).bfloat16())


def test_plan_is_printed_and_nothing_is_made(tmp_path, llama_folder, capsys, monkeypatch):
    monkeypatch.setattr("lora_one.models.load_model", None)
    experiment.execute(small_run(tmp_path / "results", llama_folder, "dry_run=true"))
    printed = capsys.readouterr().out
    for word in ("random-llama", "arithmetic", "LoRA-One-r8", "6 of 8 examples", "GB", "48 training"):
        assert word in printed
    assert not (tmp_path / "results").exists()


ONE_STEP = ("dataset.accuracy_examples=4", "model.epochs=0.1", "model.warmup=0")


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        (("init=lora",), 1),
        (("init=lora", "peft.lora_target_modules=[q_proj]", "model.bf16=true"), 1),
        (("init=lora", "peft=dora"), 0),
        (("init=lora_ga",), 0),
        (("init=lora_one",), 0),
    ],
    ids=str,
)
def test_a_start_that_adds_nothing_has_the_evaluation_of_the_base(changes, saved, tmp_path, llama_folder, monkeypatch):
    """It is not measured a second time, and a measurement would give the same, to the last bit."""
    calls, original = [], Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, model: calls.append(1) or original(self, model))
    found = finish(small_run(tmp_path / "a", llama_folder, *ONE_STEP, *changes)).read()["evaluation"]
    times = len(calls)
    monkeypatch.setattr(initial_model, "equals_base", lambda *_: False)
    again = finish(small_run(tmp_path / "b", llama_folder, *ONE_STEP, *changes))
    assert again.read()["evaluation"] == found
    assert len(calls) - times == times + saved
