"""Run all measurements on a GPU with one command, without a network.

    python benchmarks/gpu.py correctness init optimizer train plan eval --out results/gpu
    python benchmarks/gpu.py report --out results/gpu

Every part writes FOLDER/<part>.json and .md after each row, and continues where it was stopped: a row that was measured
with the same settings on the same machine is not measured again. Several parts run one after another in separate
processes, so that a crash of one does not stop the others. A row that fails is listed in the table, and the next one is
measured. --small --device cpu runs the same code on tiny shapes, only to test that it works.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # neither run_exp.py nor the benchmarks are in the package

PARTS = ("correctness", "init", "optimizer", "train", "plan", "eval", "gemma", "distributed")
SECONDS = 500  # time limit of a part, after which no row starts
GRACE = 120  # further seconds, after which one of several parts is killed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="+", metavar="PART", help=f"{', '.join(PARTS)} (gemma:2/6: the second of six slices), or report")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of the results")
    add("--small", action="store_true", help="tiny shapes, a few seconds per row")
    add("--device", help="cuda or cpu (default: cuda; cpu with --small if there is no GPU)")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        help="time limit of a part, after which no row starts (%(default)s)",
    )
    add("--model", type=Path, help="gemma: folder of the model (default: $REAL_MODELS/gemma-3-270m-hf)")
    add("--data", type=Path, help="gemma: folder with gsm8k/train.jsonl.gz and gsm8k/test.jsonl")
    chosen = parser.parse_args(arguments)
    chosen.device = chosen.device or ("cpu" if chosen.small and not on_gpu() else "cuda")
    for part in chosen.parts:
        if part.partition(":")[0] not in (*PARTS, "report"):
            parser.error(f"{part} is not a part; valid: {', '.join(PARTS)}, report")
    chosen.out = chosen.out.resolve()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.parts == ["report"]:
        return report(chosen.out)
    if len(chosen.parts) > 1:
        options = [f"--{name}={getattr(chosen, name)}" for name in ("out", "device", "seconds")]
        options += [f"--{name}={value}" for name in ("model", "data") if (value := getattr(chosen, name))]
        options += ["--small"] if chosen.small else []
        codes = [apart([part, *options], chosen.seconds + GRACE) for part in chosen.parts]
        return max(codes, key=abs)
    return one(chosen.parts[0], chosen)


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def apart(arguments: Sequence[str], seconds: float) -> int:
    """Run gpu.py in a separate process, which is killed with its children after ``seconds``; return the exit code."""
    print(f"== {arguments[0]}", flush=True)
    process = subprocess.Popen([sys.executable, __file__, *arguments], start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"{arguments[0]}: killed after {seconds:.0f} seconds", file=sys.stderr, flush=True)
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def one(name: str, chosen: argparse.Namespace) -> int:
    """Run one part in this process; return the exit code."""
    part, _, slice_ = name.partition(":")
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # otherwise lora_one would use a GPU
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    if part == "correctness":
        from gpu_correctness import main as correctness

        return correctness(chosen)
    import torch
    from common import SHAPES
    from rows import Table

    if chosen.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device found: use --small --device cpu to run the tiny shapes", file=sys.stderr)
        return 2
    if chosen.small:
        torch.set_num_threads(1)
    ranks, shape = ([2, 4], "small") if chosen.small else ([8, 64], "llama2-7b")
    settings = {"shape": shape, "ranks": ranks, "dtype": "float32" if part == "optimizer" else "bfloat16"}
    if part in ("init", "optimizer"):
        table = Table(chosen.out, part, chosen.device, settings, chosen.seconds)
        importlib.import_module(f"gpu_{part}").measure(table, SHAPES[shape], chosen.device, ranks)
        table.write()
        return int(any("error" in row for row in table.rows))
    return importlib.import_module(f"gpu_{part}").main(chosen, slice_)


def report(folder: Path) -> int:
    """Print the tables of all parts that were run as Markdown, and write them to report.md."""
    found = [folder / f"{part}.md" for part in PARTS]
    more = sorted(file for file in folder.glob("*.md") if file not in found and file.name != "report.md")
    text = "\n".join(file.read_text() for file in [*found, *more] if file.exists())
    missing = [part for part in PARTS if not (folder / f"{part}.md").exists()]
    text = "# Measured on a GPU\n\n" + (text or "Nothing was run.\n")
    text += f"\nNot run yet: {', '.join(missing)}.\n" if missing else ""
    (folder / "report.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
