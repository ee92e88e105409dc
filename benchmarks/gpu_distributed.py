"""The part ``distributed`` of gpu.py: a run on all GPUs through accelerate and NCCL, compared with one GPU.

With --device cpu two processes communicate through gloo. With fewer than two GPUs the table says "not run yet".
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rows import Row, Table

from lora_one.files import read_lines
from lora_one.records.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
CHANGES = {"LoRA": ["init=default"], "LoRA-One": ["init=gradient"], "LoRA-One, scaled AdamW": ["init=gradient"]}
AGREE = 1e-3  # largest relative difference of a step's loss: sums in another order in fp32


def main(chosen: argparse.Namespace, _: str) -> int:
    on_cpu = chosen.device == "cpu"
    count = 2 if on_cpu else torch.cuda.device_count()
    settings = {"processes": count, "backend": "gloo" if on_cpu else "nccl", "model": "bundled/tiny"}
    table = Table(chosen.out, "distributed", chosen.device, settings, chosen.seconds)
    if count < 2:
        table.result["rows"] = [{"name": "two or more GPUs", "outcome": "not run yet", "note": f"{count} GPU here"}]
        table.write()
        return 0
    for name in list(CHANGES)[: 1 if chosen.small else None]:
        work = partial(compared, chosen.out / "runs-distributed", name, count, on_cpu)
        table.row(f"{name}, {count} processes", work)
    return int(any("error" in row for row in table.rows))


def compared(out: Path, name: str, count: int, on_cpu: bool) -> Row:
    """Train with several processes and with one; return the times and the largest relative difference of the losses."""
    one, seconds_of_one, _ = trained(out / "one", name, 1, on_cpu)
    losses, seconds, wall = trained(out / "several", name, count, on_cpu)
    difference = max(abs(mine - other) / other for mine, other in zip(losses, one, strict=True))
    if difference > AGREE:
        raise RuntimeError(f"losses {losses} differ from {one} of one process")
    row = {"seconds": seconds, "seconds_of_one_process": seconds_of_one, "loss_difference": difference}
    return row | {
        "loss": losses[0],
        "wall_seconds": wall,
        "note": f"losses of one process within {difference:.1e}",
    }


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def trained(out: Path, name: str, processes: int, on_cpu: bool) -> tuple[list[float], float, float]:
    """Run the command; return the losses by step, the seconds of training, and those of the whole command."""
    overrides = ["dataset=arithmetic", "dataset.train_size=64", "dataset.validation_size=8", "model=tiny"]
    overrides += ["dataset.accuracy_examples=0", "model.real_batch_size=16", "model.per_device_batch_size=4"]
    overrides += ["model.logging_steps=1", "model.learning_rate=2e-4", "dataset.cache=null", "wandb.mode=disabled"]
    overrides += [*CHANGES[name], f"results_dir={out}"] + (["optimizer=scaled_adamw"] if "scaled" in name else [])
    command = [sys.executable]
    if processes > 1:  # accelerate starts them on the CPU if there is no GPU
        config = str(ROOT / "accelerate_config.yaml")
        command += ["-m", "accelerate.commands.launch", f"--config_file={config}", f"--num_processes={processes}"]
        command += [f"--main_process_port={free_port()}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if processes == 1 and not on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    began = time.perf_counter()
    done = subprocess.run(
        [*command, str(ROOT / "run_exp.py"), *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1500:]}")
    wall = time.perf_counter() - began
    last = [line for line in done.stdout.splitlines() if line.startswith("run: ")][-1]
    folder = RunFolder(Path(last.removeprefix("run: ")).parent)
    losses = [line["loss"] for line in read_lines(folder.metrics) if "loss" in line]
    return losses, json.loads(folder.run_json.read_text())["train"]["seconds"], wall
