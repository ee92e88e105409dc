"""What a machine with a GPU is asked, by one command and without a network.

    python benchmarks/gpu.py correctness init optimizer train eval --out results/gpu
    python benchmarks/gpu.py report --out results/gpu

Every part writes FOLDER/<part>.json and .md after each row, and goes on where it was stopped: what was measured with
the same settings on the same machine is not measured again. Several parts run in processes of their own, one after
another, so that none loses another. A row that fails says so in the table, and the next one is measured.
--small --device cpu runs everything on tiny shapes: what is timed there means nothing, but that it runs.
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
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # run_exp.py and the other benchmarks are no part of the package

PARTS = ("correctness", "init", "optimizer", "train", "eval", "gemma", "distributed")
SECONDS = 500  # of a part: no row begins later
GRACE = 120  # seconds more after which a part among several is killed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="+", metavar="PART", help=f"{', '.join(PARTS)} (gemma:2/6 is a slice of it), or report")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where results are written and found again")
    add("--small", action="store_true", help="tiny shapes, a few seconds a row")
    add("--device", help="cuda or cpu; default: cuda, with --small also cpu where there is no GPU")
    add("--seconds", type=float, default=SECONDS, help="of each part; no row begins later (%(default)s)")
    add("--model", type=Path, help="gemma: the model's folder; default: gemma-3-270m-hf in $REAL_MODELS")
    add("--data", type=Path, help="gemma: folder with gsm8k/train.jsonl.gz and gsm8k/test.jsonl")
    chosen = parser.parse_args(arguments)
    chosen.device = chosen.device or ("cpu" if chosen.small and not on_gpu() else "cuda")
    for part in chosen.parts:
        if part.partition(":")[0] not in (*PARTS, "report"):
            parser.error(f"{part} is not a part: {', '.join(PARTS)}, report")
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
    """The exit code of gpu.py with these arguments in a process of its own, killed with its children after seconds."""
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
    """One part in this process."""
    part, _, slice_ = name.partition(":")
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the library takes a GPU where it sees one
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    if part == "correctness":
        from gpu_correctness import main as correctness

        return correctness(chosen)
    import torch
    from common import SHAPES
    from rows import Table

    if chosen.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device is seen: --device cpu runs the small variant", file=sys.stderr)
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
    """Print the Markdown of all parts that were run, and write it to report.md."""
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
