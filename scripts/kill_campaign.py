"""Kill one of several processes of a run again and again, and compare the result with that of an undisturbed run.

python scripts/kill_campaign.py --kills 50 --processes 4 --seed 1

Each run is killed up to three times, at random places of the stages below and in a random process, and started again
with the same command until it ends. Printed: what was killed, how long the others took to end, their message, and
whether the adapter and every loss are those of the undisturbed run, bit for bit. Exit code 1: something differs.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from campaign.forked import Forked, forked

PLACES = {  # stage -> function, and how often a process calls it in the run below, at least
    "data": ("lora_one.data:load_dataset", 1),
    "gradient": ("lora_one.initialization.gradients:BatchSums.add", 8),
    "factorisation": ("lora_one.initialization.low_rank_step:factorised", 4),
    "search for the scale": ("lora_one.initialization.forward_batches:batches_loss", 2),
    "training": ("lora_one.training.trainer:FineTuner.training_step", 10),
    "resume point": ("lora_one.training.trainer:FineTuner._save_checkpoint", 5),
    "validation": ("lora_one.evaluation.validation:Validation.loss", 3),
    "saving": ("lora_one.runs.saving:save", 1),
}
RUN = [
    "wandb.mode=disabled",
    "dataset.train_size=41",
    "dataset.validation_size=8",
    "dataset.accuracy_examples=4",
    "dataset.max_new_tokens=8",
    "model.real_batch_size=8",
    "model.per_device_batch_size=1",
    "model.epochs=3",
    "model.save_steps=2",
]
TIME_OUT_S = 10
LONGEST_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--processes", type=int, default=4, help="a divisor of 8")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the list of kills to this file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    expected = result(finished(options.processes, folder / "undisturbed"))
    print(f"undisturbed: {len(expected['losses'])} losses", flush=True)
    draw, kills, wrong, number = random.Random(options.seed), [], 0, 0
    while len(kills) < options.kills:
        number += 1
        run = folder / str(number)
        for _ in range(min(draw.randint(1, 3), options.kills - len(kills))):
            killed = one_kill(draw, options.processes, run)
            if killed is None:
                break  # the run ended before it came to this place again
            kills.append(killed)
            print(f"kill {len(kills)}: {killed['text']}", flush=True)
            wrong += killed["messages"] != 1
        same = result(finished(options.processes, run)) == expected
        wrong += not same
        print(f"run {number}: {'equal, bit for bit' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(run)
    slowest = max(kill["seconds"] for kill in kills)
    print(f"{len(kills)} kills in {number} runs, {wrong} wrong; the others ended after at most {slowest:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "wrong": wrong, "kills": kills}, indent=1))
    shutil.rmtree(folder)
    return int(wrong > 0)


def one_kill(draw: random.Random, processes: int, run: Path) -> dict[str, Any] | None:
    """Start the run, kill one process at a random place, wait for the others; None: it was not killed."""
    stage = draw.choice(sorted(PLACES))
    place, calls = PLACES[stage]
    victim, call = draw.randrange(processes), draw.randint(1, calls)
    started = start(processes, run, kill=f"{place}:{victim}:{call}")
    died = None
    began = time.monotonic()
    while died is None and started.parent.poll() is None and time.monotonic() - began < LONGEST_S:
        time.sleep(0.05)
        died = time.monotonic() if started.codes().get(victim) == -9 else None
    codes = started.wait(LONGEST_S)
    if codes.get(victim) != -9:
        return None
    seconds = time.monotonic() - (died or time.monotonic())
    messages = len(started.errors)
    return {
        "stage": stage,
        "rank": victim,
        "call": call,
        "seconds": seconds,
        "messages": messages,
        "text": f"{stage} (call {call}), process {victim}; the others ended after {seconds:.1f} s with {messages} "
        f"message: {' | '.join(started.errors)}",
    }


def start(processes: int, run: Path, kill: str = "none") -> Forked:
    attempt = len(list(run.glob("out*"))) if run.exists() else 0
    arguments = [*RUN, f"process_timeout_s={TIME_OUT_S}", f"results_dir={run / 'results'}"]
    return forked(processes, run / f"out{attempt}", *arguments, kill=kill)


def finished(processes: int, run: Path) -> Path:
    """Run the command to its end; return its folder."""
    started = start(processes, run)
    codes = started.wait(LONGEST_S)
    if set(codes.values()) != {0} or len(codes) < processes:
        sys.exit(f"the run did not end as it should ({codes}): {started.errors}")
    return run


def result(run: Path) -> dict[str, Any]:
    """Return the adapter and the losses of a run."""
    (adapter,) = run.rglob("adapter/adapter_model.safetensors")
    (metrics,) = run.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [{key: line[key] for key in ("step", "loss", "eval_loss", "eval_accuracy") if key in line} for line in lines]
    return {"adapter": adapter.read_bytes(), "losses": kept}


if __name__ == "__main__":
    sys.exit(main())
