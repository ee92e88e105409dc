"""Record the results of small runs bit for bit, before and after a change of the code, and compare the recordings.

python scripts/record_behaviour.py record FOLDER [--repository PATH] [--inputs FOLDER] [--jobs N]
python scripts/record_behaviour.py compare BEFORE.json AFTER.json [--folders-may-differ]

``record`` runs the command lines in recording/runs.txt with the code of a repository (default: this one), on the CPU
with one thread each, and writes FOLDER/behaviour.json. Models and data are created once, in FOLDER/../inputs, and
reused. ``compare`` prints one line per difference, with those of folders and configuration hashes listed separately;
its exit code is 1 if there are any. This script imports nothing from lora_one.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from itertools import zip_longest
from pathlib import Path
from typing import Any

from recording.content import LEFT_OUT, content_of, fingerprint, read, versions
from recording.inputs import make_inputs

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LIST = Path(__file__).parent / "recording" / "runs.txt"
WRONG = "wrong"  # group of commands that must fail; only their exit codes are recorded


def commands() -> dict[str, dict[str, list[str]]]:
    """Return group -> name -> words of the command; a line without a name has the command as its name."""
    settings: dict[str, list[str]] = {}
    groups: dict[str, dict[str, list[str]]] = {}
    group: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, LIST.read_text().splitlines())):
        if line.startswith("["):
            group = groups.setdefault(line.strip("[]"), {})
        elif setting := re.fullmatch(r"([A-Z0-9]+) = (.*)", line):
            settings[setting[1]] = setting[2].split()
        elif not line.startswith("#"):
            name, _, command = line.partition(": ")
            group[name] = words_of(command or line, settings)
    return groups


def words_of(command: str, settings: dict[str, list[str]]) -> list[str]:
    """Return the words of a command: the script, or torchrun (run_exp.py on two processes), then its arguments."""
    words = [part for word in command.split() for part in settings.get(word, [word])]
    if words[0].endswith(".py"):
        return words
    script = words.pop(0) if words[0] == "torchrun" else "run_exp.py"
    sweep = ["-m"] if "-m" in words else []
    return [script, *sweep, *settings["SMALL"], *(word for word in words if word != "-m")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True, metavar="record or compare")
    recorder, comparer, worker = (ways.add_parser(name) for name in ("record", "compare", "work"))
    for made in (recorder, worker):
        made.add_argument("folder", type=Path, help="new or empty folder for the recording")
        made.add_argument(
            "--repository", type=Path, default=Path(__file__).parents[1], help="repository whose code is run"
        )
        made.add_argument("--inputs", type=Path, help="models and data (default: inputs, next to the recording)")
    recorder.add_argument("--jobs", type=int, default=2, help="number of parallel processes (%(default)s)")
    worker.add_argument("--group", required=True)
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    comparer.add_argument(
        "--folders-may-differ", action="store_true", help="return exit code 0 if only folders and hashes differ"
    )
    options = parser.parse_args()
    if options.way == "compare":
        return compare(options.before, options.after, options.folders_may_differ)
    options.folder, options.repository = options.folder.resolve(), options.repository.resolve()
    options.inputs = (options.inputs or options.folder.parent / "inputs").resolve()
    return record(options) if options.way == "record" else work(options)


def record(options: argparse.Namespace) -> int:
    """Run all groups in parallel processes and write behaviour.json; return the exit code."""
    folder, started = options.folder, time.perf_counter()
    if folder.exists() and any(folder.iterdir()):
        print(f"error: {folder} is not empty: pass a new folder", file=sys.stderr)
        return 2
    for name in ("outcomes", "logs", "runs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not options.inputs.exists():
        make_inputs(options.inputs, options.repository)
    groups = commands()
    arguments = [str(folder), f"--repository={options.repository}", f"--inputs={options.inputs}"]

    def start(group: str) -> None:
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(options.repository)}
        with (folder / "logs" / f"{group}.txt").open("w") as log:
            command = [sys.executable, __file__, "work", *arguments, f"--group={group}"]
            code = subprocess.run(command, env=environment, cwd=folder, stdout=log, stderr=log).returncode
        print(f"{time.perf_counter() - started:4.0f} s  {group} ({len(groups[group])})" + f", exit {code}" * bool(code))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, groups))
    found = {"left_out": LEFT_OUT, "inputs": fingerprint(options.inputs), "versions": versions()}
    runs: dict[str, dict[str, Any]] = {}
    for group, named in groups.items():
        outcomes = read(folder / "outcomes" / f"{group}.json") or {}
        for name in named:
            outcome = outcomes.get(name, {"exit": "none: the process ended before"})
            whole = outcome | content_of(results(folder, name))
            runs[f"{group}/{name}"] = {"exit": outcome["exit"]} if group == WRONG else whole
    text = json.dumps(found | {"runs": runs}, indent=1)
    for place, path in (("inputs", options.inputs), ("folder", folder), ("repository", options.repository)):
        text = text.replace(str(path), f"<{place}>")
    (folder / "behaviour.json").write_text(text + "\n")
    for name, run in runs.items():
        if "error" in run:
            print(f"failed: {name}: exit {run['exit']}, {run['error']}")
    print(f"{len(runs)} runs in {time.perf_counter() - started:.0f} s: {folder / 'behaviour.json'}")
    return 0


def work(options: argparse.Namespace) -> int:
    """Run the commands of one group in order; write each outcome before the next command starts."""
    folder, outcomes = options.folder, {}
    for name, words in commands()[options.group].items():
        log = folder / "logs" / f"{options.group}-{len(outcomes):02d}.txt"
        try:
            words = [filled(word, options, results(folder, name)) for word in words]
        except ValueError as error:
            outcomes[name] = {"exit": "none", "error": str(error)}
        else:
            outcomes[name] = outcome(words, options.repository, log)
        (folder / "outcomes" / f"{options.group}.json").write_text(json.dumps(outcomes))
    here = Path(sys.modules["lora_one"].__file__).resolve()
    if not here.is_relative_to(options.repository):
        raise SystemExit(f"error: lora_one was imported from {here}, not from {options.repository}")
    return 0


def results(folder: Path, name: str) -> Path:
    """Return the results folder of a command: its name without characters that Hydra treats specially."""
    return folder / "runs" / re.sub(r"[^\w.-]+", "_", name)


def filled(word: str, options: argparse.Namespace, here: Path) -> str:
    """Replace the placeholders in a word. Raises ValueError: the named command did not write exactly one run.json."""
    for name, path in (("{inputs}", options.inputs), ("{folder}", options.folder), ("{here}", here)):
        word = word.replace(name, str(path))
    if wanted := re.search(r"\{run:(.+)\}", word):
        found = list(results(options.folder, wanted[1]).rglob("run.json"))
        if len(found) != 1:
            raise ValueError(f"{wanted[1]} wrote {len(found)} runs instead of one")
        word = word.replace(wanted[0], str(found[0].parent))
    return word


def outcome(words: list[str], repository: Path, log: Path) -> dict[str, Any]:
    """Run a command in this process, or in two others with torchrun; return its exit code and the last error line."""
    script, *arguments = words
    with log.open("w") as said:
        print(shlex.join(words), file=said, flush=True)
        if script == "torchrun":
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            command = [sys.executable, *launcher, str(repository / "run_exp.py"), *arguments]
            code: Any = subprocess.run(command, stdout=said, stderr=said).returncode
        else:
            sys.argv = [str(repository / script), *arguments]
            with redirect_stdout(said), redirect_stderr(said):
                try:
                    runpy.run_path(sys.argv[0], run_name="__main__")
                    code = 0
                except SystemExit as stop:
                    code = stop.code or 0
                except Exception as error:
                    code = 1
                    print(f"error: {type(error).__name__}: {error}")
    if not code:
        return {"exit": 0}
    lines = [line for line in log.read_text().splitlines() if re.match(r"error: |\w*(Error|Exception)\b", line)]
    error = lines[-1] if lines else None
    return {"exit": "not here" if "not installed" in str(error) else code, "error": error}


def compare(before: Path, after: Path, folders_may_differ: bool) -> int:
    """Print the differences of two recordings; return the exit code."""
    one, two = (json.loads(file.read_text()) for file in (before, after))
    every = list(differences(one, two, ""))
    places = [line for path, line in every if "/place/" in path]
    others = [line for path, line in every if "/place/" not in path]
    if places:
        print(f"{len(places)} differences of runs' folders and configuration hashes:", *places, sep="\n")
    if others:
        print(f"{len(others)} differences of content:", *others, sep="\n")
    elif not places:
        print(f"identical: {len(one['runs'])} runs")
    else:
        print(f"content identical: {len(one['runs'])} runs")
    return 1 if others or (places and not folders_may_differ) else 0


def differences(one: Any, two: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, line with the path and both values) for each difference."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in {**one, **two}:
            yield from differences(one.get(key, "(nothing)"), two.get(key, "(nothing)"), f"{path}/{key}")
    elif isinstance(one, list) and isinstance(two, list):
        for index, (left, right) in enumerate(zip_longest(one, two, fillvalue="(nothing)")):
            yield from differences(left, right, f"{path}/{index}")
    elif one != two or type(one) is not type(two):
        yield path, f"{path}: {json.dumps(one)[:100]} -> {json.dumps(two)[:100]}"


if __name__ == "__main__":
    sys.exit(main())
