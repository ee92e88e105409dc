"""Kill one of several processes of a run again and again, and compare the result with that of an undisturbed run.

python scripts/kill_campaign.py --kills 50 --processes 4 --seed 1

Each run, or evaluation of its adapter, is killed up to three times, at random places of the stages below and in a
random process, and started again with the same command until it ends. Printed: what was killed, how long the others
took to end, their message, and whether adapter and losses, or metrics and predictions, are those of the undisturbed
one, bit for bit. Exit code 1: something differs, or there was not exactly one message, which names the process.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign.forked import Fault, Forked, Forking

TRAINER = "lora_one.training.trainer:FineTuner"
PLACES = {  # stage -> function, how often a process calls it below, at least, and whether only the first process does
    "data": ("lora_one.data:load_dataset", 1, False),
    "gradient": ("lora_one.initialization.gradients:BatchSums.add", 8, False),
    "factorisation": ("lora_one.initialization.low_rank_step:factorised", 4, False),
    "search for the scale": ("lora_one.initialization.forward_batches:batches_loss", 2, False),
    "training": (f"{TRAINER}.training_step", 20, False),
    "resume point": (f"{TRAINER}._save_checkpoint", 4, False),
    "writing a file": ("lora_one.files:synced_entry", 30, True),
    "validation": ("lora_one.evaluation.validation:Validation.loss", 3, False),
    "saving": ("lora_one.runs.saving:save", 1, False),
    "evaluation": ("lora_one.evaluation.generate:BatchGenerator.__call__", 3, False),
}
RUN = [
    "wandb.mode=disabled",
    "dataset.cache=null",
    "dataset.train_size=41",
    "dataset.validation_size=8",
    "dataset.accuracy_examples=4",
    "dataset.max_new_tokens=4",
    "model.real_batch_size=8",
    "model.per_device_batch_size=1",
    "model.epochs=2",
    "model.eval_epochs=1",
    "model.save_steps=3",
    "init.cache=null",
]
QUESTIONS = 24  # of the evaluation, in batches of 2
LOSSES = ("step", "loss", "eval_loss", "eval_accuracy")
TIME_OUT_S = 16
LONGEST_S = 900


@dataclass(frozen=True)
class Work:
    """A command in a folder of its own. adapter: what is evaluated; None: the command is a training."""

    folder: Path
    start: Forking
    processes: int
    adapter: Path | None = None

    def begin(self, fault: Fault | None = None) -> Forked:
        """Start the processes of the command."""
        outputs = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        if self.adapter is None:
            arguments = [*RUN, f"process_timeout_s={TIME_OUT_S}", f"results_dir={self.folder / 'results'}"]
            return self.start(self.processes, outputs, *arguments, fault=fault)
        arguments = [
            "--model_name=bundled/tiny",
            f"--adapter={self.adapter}",
            f"--data_path={self.adapter.parent / 'questions.jsonl'}",
        ]
        arguments += ["--max_new_tokens=6", "--batch_size=2", f"--output_dir={self.folder / 'results'}"]
        return self.start(self.processes, outputs, *arguments, program="eval/eval_gsm8k.py", fault=fault)

    def finish(self) -> dict[str, Any]:
        """Run the command to its end; return its results."""
        started = self.begin()
        codes = started.wait(LONGEST_S)
        if set(codes.values()) != {0} or len(codes) < self.processes:
            sys.exit(f"the run did not end as it should ({codes}): {started.errors}; its output: {started.folder}")
        if self.adapter is not None:
            metrics = json.loads((self.folder / "results/metrics.json").read_text())
            predictions = (self.folder / "results/predictions.jsonl").read_text()
            return {"metrics": metrics["metrics"], "counts": metrics["counts"], "predictions": predictions}
        (metrics,) = self.folder.rglob("metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses = [{key: line[key] for key in LOSSES if key in line} for line in lines]
        return {"adapter": (adapter_in(self.folder) / "adapter_model.safetensors").read_bytes(), "losses": losses}


def adapter_in(folder: Path) -> Path:
    """Return the adapter of a finished run."""
    (file,) = folder.rglob("adapter/adapter_model.safetensors")
    return file.parent


def one_kill(draw: random.Random, work: Work, stage: str) -> dict[str, Any] | None:
    """Start a command, kill one process at a random call of the stage; None: it ended before it came there."""
    place, calls, first = PLACES[stage]
    fault = Fault(place, 0 if first else draw.randrange(work.processes), draw.randint(1, calls))
    started, killed, began = work.begin(fault), None, time.monotonic()
    while killed is None and started.running and time.monotonic() - began < LONGEST_S:
        time.sleep(0.05)
        killed = time.monotonic() if started.codes().get(fault.rank) == -9 else None
    codes = started.wait(LONGEST_S)
    if codes.get(fault.rank) != -9:
        return None
    others = {code for rank, code in codes.items() if rank != fault.rank}
    names = (f"process {fault.rank} (pid {started.pids[fault.rank]}", "process 0, which" if fault.rank == 0 else "none")
    right = len(started.errors) == 1 and any(name in started.errors[0] for name in names) and others == {1}
    right = right and len(codes) == work.processes
    return {
        "stage": stage,
        "rank": fault.rank,
        "call": fault.call,
        "seconds": time.monotonic() - (killed or time.monotonic()),
        "messages": started.errors,
        "codes": codes,
        "right": right,
    }


def disturbed(draw: random.Random, work: Work, stages: list[str], kills: list[dict[str, Any]], most: int) -> None:
    """Kill a command up to three times, and add what was killed to ``kills``, which shall have at most ``most``."""
    for _ in range(min(draw.randint(1, 3), most - len(kills))):
        killed = one_kill(draw, work, draw.choice(stages))
        if killed is None:
            return
        kills.append(killed)
        said = " | ".join(killed["messages"])
        print(
            f"kill {len(kills)}: {killed['stage']} (call {killed['call']}), process {killed['rank']}; the others ended "
            f"after {killed['seconds']:.1f} s{'' if killed['right'] else ', WRONG ' + str(killed['codes'])}: {said}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--processes", type=int, default=4, help="a divisor of 8")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the list of kills to this file")
    options = parser.parse_args()
    folder, draw, began = Path(tempfile.mkdtemp(prefix="kills-")), random.Random(options.seed), time.monotonic()
    kills: list[dict[str, Any]] = []
    number = differing = 0
    with Forking() as start:
        training = Work(folder / "undisturbed", start, options.processes)
        expected = {"training": training.finish()}
        adapter = adapter_in(training.folder)
        rows = [{"question": f"How many is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(QUESTIONS)]
        (adapter.parent / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        expected["evaluation"] = Work(folder / "evaluated", start, options.processes, adapter).finish()
        print(f"undisturbed: {len(expected['training']['losses'])} lines of losses, {QUESTIONS} answers", flush=True)
        while len(kills) < options.kills:
            number += 1
            kind = "evaluation" if draw.randrange(len(PLACES)) == 0 else "training"
            stages = [stage for stage in PLACES if (stage == "evaluation") == (kind == "evaluation")]
            work = Work(folder / str(number), start, options.processes, adapter if kind == "evaluation" else None)
            disturbed(draw, work, stages, kills, options.kills)
            same = work.finish() == expected[kind]
            differing += not same
            print(f"{kind} {number}: {'equal, bit for bit' if same else 'DIFFERENT'}", flush=True)
            shutil.rmtree(work.folder)
            if options.json:
                content = {"seed": options.seed, "runs": number, "differing": differing, "kills": kills}
                options.json.write_text(json.dumps(content, indent=1))
    wrong = sum(not kill["right"] for kill in kills)
    counts = ", ".join(f"{stage} {count}" for stage, count in Counter(kill["stage"] for kill in kills).most_common())
    seconds, minutes = sorted(kill["seconds"] for kill in kills), (time.monotonic() - began) / 60
    print(
        f"seed {options.seed}: {len(kills)} kills in {number} runs of {options.processes} processes ({counts}):\n"
        f"{differing} results differ, {wrong} kills without exactly one right message; the others ended after "
        f"{seconds[len(seconds) // 2]:.0f} s (median), {seconds[-1]:.0f} s at most; all took {minutes:.0f} min"
    )
    shutil.rmtree(folder)
    return int(wrong + differing > 0)


if __name__ == "__main__":
    sys.exit(main())
