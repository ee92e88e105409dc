"""Compare the engines of the evaluations: examples per second of transformers in batches, and of a server with vLLM.

    python benchmarks/bench_engines.py --model <folder> --data_path <gsm8k folder> --json bench_engines.json --markdown

GSM8K with 8 solved examples in front of each problem, or generated problems without, greedy decoding. vLLM is started
by this script (--vllm, as of the evaluations) or runs already (--base_url). Each engine answers a few problems first,
which are not timed. Loading the model and starting the server are not timed either. Both engines have the machine for
themselves in turn.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import set_threads, write_result

from lora_one.datasets.arithmetic import PRETRAIN_FAMILIES, generate
from lora_one.errors import UsageError
from lora_one.evaluation.decoding import Decoding
from lora_one.evaluation.engines import SERVER, TRANSFORMERS, engine_class
from lora_one.evaluation.engines.serving import serving
from lora_one.evaluation.gsm8k import STOP, GSM8KOptions, test_problems
from lora_one.types import Example

FIGURES = {
    "examples": ("examples", "{}"),
    "seconds": ("seconds", "{:.1f}"),
    "examples_per_second": ("examples per second", "{:.2f}"),
    "equal": ("completions equal to transformers'", "{}"),
}
SEED = 0
WARM = 2  # problems that are not timed


def timed(options: GSM8KOptions, examples: Sequence[Example]) -> tuple[float, list[str]]:
    """Return the seconds of an engine for these examples, and the texts of its completions."""
    decoding = Decoding(options.max_new_tokens, stop=STOP)
    with closing(engine_class(options.engine).start(options)) as engine:
        prompts = engine.encoder.prompts(examples)
        list(engine.generate(prompts[:WARM], decoding, [str(place) for place in range(WARM)]))
        began = time.perf_counter()
        found = dict(engine.generate(prompts, decoding, [str(place) for place in range(len(prompts))]))
        return time.perf_counter() - began, [found[place].text for place in range(len(prompts))]


def row(name: str, seconds: float, texts: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    equal = sum(one == other for one, other in zip(texts, expected, strict=True))
    return {
        "name": name,
        "examples": len(texts),
        "seconds": seconds,
        "examples_per_second": len(texts) / seconds,
        "equal": equal,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled/tiny", help="folder of a causal model (%(default)s)")
    parser.add_argument("--data_path", help="folder or test file of GSM8K (default: generated problems)")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--batch_size", type=int, help="of transformers (default: 16 on a CPU, else as many as fit)")
    parser.add_argument("--base_url", help="address of a running server (default: start vLLM)")
    parser.add_argument("--vllm", help="program or environment of vLLM")
    parser.add_argument("--device", default="cpu", help="of transformers (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: chosen by torch)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table and the ratios as Markdown at the end")
    given = parser.parse_args(arguments)
    set_threads(given)
    options = GSM8KOptions(
        model_name=given.model,
        max_new_tokens=given.max_new_tokens,
        dtype=given.dtype,
        batch_size=given.batch_size,
        device=given.device,
    )
    with TemporaryDirectory() as folder:
        path, shots = (given.data_path, 8) if given.data_path else (generated(Path(folder), given.examples), 0)
        examples = test_problems(path, shots)[: given.examples]
        seconds, expected = timed(replace(options, engine=TRANSFORMERS), examples)
        rows, ratios = [row("transformers, in batches", seconds, expected, expected)], {}
        print(json.dumps(rows[-1]), flush=True)
        server = replace(options, engine=SERVER, base_url=given.base_url, vllm=given.vllm)
        try:
            with nullcontext(server) if given.base_url else serving(server, Path(folder)) as reachable:
                seconds, texts = timed(reachable, examples)
        except UsageError as error:  # vLLM is not installed
            print(f"vLLM was not measured: {error}", flush=True)
        else:
            rows.append(row("vLLM", seconds, texts, expected))
            print(json.dumps(rows[-1]), flush=True)
            ratios["examples per second, vLLM / transformers"] = rows[0]["seconds"] / rows[1]["seconds"]
    write_result(given, {"rows": rows, "ratios": ratios}, FIGURES)


def generated(folder: Path, count: int) -> str:
    """Write a test file of generated problems; return its path."""
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in generate(PRETRAIN_FAMILIES, count, SEED)))
    return str(file)


if __name__ == "__main__":
    main()
