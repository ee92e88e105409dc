"""What a dry run says beside its memory: see test_memory_forecast.py for that."""

import pytest

from lora_one.distributed import Processes
from lora_one.initialization.curvature import LIMIT
from lora_one.records.folder import RunFolder
from lora_one.runs.plan import plan
from tests.helpers.runs import run_config


def lines_of(tmp_path, *overrides):
    run = run_config("dataset.train_size=80", "dataset.validation_size=8", *overrides)
    return dict(line.split(maxsplit=1) for line in plan(run, RunFolder(tmp_path)).splitlines())


@pytest.mark.parametrize(("by_layer", "said"), [("false", "adapters, on 4"), ("true", "each of the 21 layers alone")])
def test_the_curvature_that_will_be_measured(by_layer, said, tmp_path):
    line = lines_of(tmp_path, "wandb.curvature_examples=4", f"wandb.curvature_by_layer={by_layer}")["curvature"]
    assert said in line and "4 training examples" in line and f"at most {LIMIT} products" in line


def test_without_a_curvature_there_is_no_line(tmp_path):
    assert "curvature" not in lines_of(tmp_path)


@pytest.mark.parametrize("init", ["lora_one", "lora_da"])
def test_a_plan_waits_for_no_other_process(init, tmp_path, monkeypatch):
    """Only the first process makes it."""

    def fail(*_):
        raise AssertionError("the other processes do not answer")

    for name in ("gathered", "total", "meet"):
        monkeypatch.setattr(Processes, name, fail)
    assert "init at most" in lines_of(tmp_path, f"init={init}", "init.memory=auto", "init.iters=8")["memory"]
