"""dry_run=true plan.processes=64 plan.hardware=h100: what is printed, and what is refused on one process."""

import doctest
import time
from dataclasses import replace

import pytest

from lora_one.config.hardware import HEADROOM, read_hardware
from lora_one.errors import UsageError
from lora_one.models import load_skeleton
from lora_one.records.folder import RunFolder
from lora_one.runs import experiment, scale_plan
from lora_one.runs.plan import plan
from lora_one.runs.planned_run import PlannedRun
from lora_one.runs.planned_start import planned_start
from lora_one.runs.scale_plan import smallest
from tests.helpers.llama_shapes import PARAMETERS, bases_of, write_config
from tests.helpers.paths import ROOT
from tests.helpers.runs import adaptation_for, run_config

HUB = ("model=llama", "dataset=meta_math", "init=lora_one", "dataset.accuracy_examples=0")


def test_doctests():
    assert doctest.testmod(scale_plan).failed == 0


def printed(capsys, folder, *overrides):
    """What the dry run of a run with a hub's data prints; the folder of its model has no weights and no tokenizer."""
    results = f"results_dir={folder.parent / 'results'}"
    assert experiment.execute(run_config(*HUB, f"model.name={folder}", "dry_run=true", results, *overrides)) is None
    assert not (folder.parent / "results").exists()
    return capsys.readouterr().out


def cells(text):
    """{base: {title: cell}} of the printed table."""
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip() for cell in line] for line in table]
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in rows}


def test_a_folder_with_only_a_config_is_planned_for_64_gpus(tmp_path, capsys):
    folder = write_config(tmp_path, "7B")
    began = time.process_time()
    said = printed(capsys, folder, "plan.processes=64", "plan.hardware=h100", "model.real_batch_size=64")
    assert time.process_time() - began < 15, "seconds of one core"
    assert f"{PARAMETERS['7B']:,} parameters, bf16, on 64 x h100" in said
    assert said.partition("\n\n")[2] in (ROOT / "docs/scale.md").read_text(), "the example of the documentation"
    found = cells(said)
    wide = [f"{sharing}, {kind}" for sharing in ("sharded", "sharded by 8") for kind in ("bf16", "fp32")]
    assert list(found) == ["whole, bf16", "whole, fp32", "whole, nf4", *wide]
    adapters = 4 * 19_988_480 * 2 * 63 / 64 / 1e9  # fp32 gradients in a ring
    assert found["whole, bf16"]["sent/step"] == f"{adapters:.3g} GB"
    assert {line["fits on"] for line in found.values()} == {"1", "2", "8"}
    assert found["sharded, bf16"]["init auto"].endswith("(device)")
    assert "8 batches of examples, so 56 of the processes only wait" in said
    assert "1 at once, 1 times for each step" in said


def test_without_hardware_memory_and_traffic_are_printed(tmp_path, capsys, llama_folder):
    said = printed(capsys, llama_folder, "plan.processes=8", "model.max_length=64")
    found = cells(said)
    assert found["whole, bf16"].keys() == {"training", "init fast", "init low", "sent/step", "sent once"}
    assert "on 8 x unknown hardware" in said


def test_a_base_that_the_method_cannot_use_is_named_with_the_reason(tmp_path, llama_folder, capsys):
    said = printed(capsys, llama_folder, "plan.processes=2", "init=lora_ga", "model.max_length=64")
    assert "whole, nf4: not possible: LoRA-GA changes the base weights" in said
    assert "sharded, bf16: not possible: model.sharded=True does not work with LoRA-GA" in said


def test_an_initialisation_that_is_not_predicted_is_no_zero(tmp_path, llama_folder, capsys):
    keys = ("init=full_step", "peft=full_ft", "model.max_length=64", "plan.processes=4", "plan.hardware=h100")
    said = printed(capsys, llama_folder, *keys)
    row = cells(said)["whole, fp32"]
    assert row["init"] == row["sent once"] == "-" and row["run"] != "-"
    assert "the initialisation by full gradient step is not predicted" in said


def test_keys_of_the_plan_change_neither_the_other_lines_nor_the_folder(tmp_path, llama_folder):
    """Without them, the plan is that of this machine, as before."""
    keys = ("dataset.train_size=80", "dataset.validation_size=8", "dataset.accuracy_examples=0", "model.epochs=1")
    here, there = (
        plan(run_config(*keys, "dry_run=true", *more), RunFolder(tmp_path)).splitlines()
        for more in ((), ("plan.processes=4", "plan.hardware=a100"))
    )
    names = [line.split()[0] for line in here]
    assert names == ["model", "data", "method", "adapter", "gradient", "steps", "memory", "fits", "output"]
    assert there[1:6] == here[1:6] and here[-1] in there and not any(line.startswith("fits") for line in there)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("plan.processes=7",), "model.real_batch_size=32 is not divisible by 7 processes: set it to a multiple of 7"),
        (("plan.processes=64",), "model.real_batch_size=32 is not divisible by 64 processes"),
        (("plan.processes=32", "dataset.train_size=20"), "32 processes are more than the 20 training examples"),
        (("plan.processes=4", "init.iters=200000"), "init.bsz x init.iters=200000"),
        (("plan.processes=1", "model.sharded=true"), "there is only one: start several"),
        (("plan.processes=32", "model.sharded=node"), "plan.hardware"),
        (("plan.processes=4", "model.sharded=3"), "model.sharded=3 does not divide the 4 processes"),
        (("plan.hardware=b100",), "plan.hardware=b100 is neither a file nor a profile"),
    ],
    ids=str,
)
def test_one_message_on_one_process(overrides, said, tmp_path, capsys):
    folder = write_config(tmp_path, "7B")
    with pytest.raises(UsageError) as error:
        printed(capsys, folder, *overrides)
    assert said in str(error.value)


def test_more_processes_than_local_examples_are_refused(tmp_path):
    run = run_config("dataset.train_size=16", "dataset.validation_size=8", "dry_run=true", "plan.processes=32")
    with pytest.raises(UsageError, match=r"^32 processes are more than the 16 training examples: start at most 16"):
        plan(run, RunFolder(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ("7B", ("1", "1", "2")),
        pytest.param("13B", ("1", "1", "2"), marks=pytest.mark.long),
        ("70B", ("none", "none", "8")),
    ],
)
def test_llama_shapes_on_1_8_and_64_processes(size, fits, tmp_path):
    """Nothing is loaded, so it takes seconds; as whole bases, 70B parameters fit on no GPU of 80 GB."""
    began = time.process_time()
    bases = bases_of(write_config(tmp_path, size), "h100", "init.memory=low")
    whole, small, sharded = planned = [bases[name] for name in ("whole, bf16", "whole, nf4", "sharded, bf16")]
    assert whole.base == 2 * PARAMETERS[size] and 0.25 * whole.base < small.base < 0.33 * whole.base
    assert tuple(smallest(one, ()) for one in planned) == fits
    for one in planned:
        for count in (1, 8, 64) if one is not sharded else (8, 64):
            start, training = planned_start(one, count, "low", ()), one.training_memory(count)
            share = one.base / (count if one is sharded else 1)
            assert share < training < start.memory < share + 0.7 * whole.base, (count, "activations, then the sketch")
    assert sharded.step_seconds(64) > whole.step_seconds(64) > whole.step_seconds(8) / 8 > 0
    assert time.process_time() - began < 20


def test_the_smallest_number_is_the_first_with_enough_memory(llama_folder):
    """More processes compute fewer examples at once, so each needs less."""
    run = run_config(*HUB, f"model.name={llama_folder}", "model.real_batch_size=8", "model.per_device_batch_size=8")
    skeleton, adaptation = load_skeleton(str(llama_folder)), adaptation_for(run)
    h100 = read_hardware("h100")
    planned = PlannedRun(
        replace(run, init=run_config("init=default").init),
        skeleton,
        adaptation.layers(skeleton, run.init),
        adaptation.trainable_parameters(skeleton),
        1000,
        lambda length, _: 10_000 * length,
        h100,
    )
    needed = [planned.training_memory(count) for count in (1, 2, 4, 8)]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 4
    for place, count in enumerate((1, 2, 4, 8)):
        enough = replace(planned, hardware=replace(h100, memory=(needed[place] + 1) / HEADROOM))
        assert smallest(enough, ()) == str(count)
    assert smallest(replace(planned, hardware=replace(h100, memory=needed[-1] / 2)), ()) == "none"
