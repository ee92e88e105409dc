"""The part ``init`` of gpu.py: time and memory of initialisations: ours, the official one, PEFT's, and their passes.

Two references, each for 8 batches of 1 and for 1 batch of 8: the passes alone (gradients of activations only), and the
floor, passes in which autograd also sums the gradients of the target weights in the model's dtype. Ratios are to the
floor.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from bench_init import OFFICIAL_COLUMNS, OFFICIAL_ITERATIONS, Subject, backward, floor, requiring_gradients
from common import Shape
from peft import LoraConfig, get_peft_model
from rows import Row, Table, synchronized, timed
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_one import initialize_adapters
from lora_one.adaptation.wrapping import quiet_peft
from lora_one.initialization.backward import backward_passes
from lora_one.initialization.low_rank_step import StepSettings, factorised, low_rank_steps
from lora_one.initialization.methods.lora_one import descent_factors
from lora_one.linalg import LowRank
from lora_one.losses import Batch

EXAMPLES, SEED = 8, 0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MICRO, WHOLE = "8 batches of 1", "1 batch of 8"


def random_llama(shape: Shape, device: str, dtype: torch.dtype, vocabulary: int | None = None) -> LlamaForCausalLM:
    """Return a Llama of this shape with frozen random weights, created on the device in this dtype."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary or shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(shape.length, 4096),
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def subject(shape: Shape, device: str, dtype: torch.dtype) -> Subject:
    """Return the model and 8 random examples in which every token has a loss, as 8 batches and as one."""
    model = random_llama(shape, device, dtype)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    ids = torch.randint(2, shape.vocabulary, (EXAMPLES, shape.length), device=device)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    micro = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(EXAMPLES)]
    return Subject(model, layers, micro, [whole])


def passes(at: Subject, batches: Sequence[Batch], *, checkpointing: bool = False) -> None:
    """Do forward and backward passes that provide every X and dY, without using them."""
    backward_passes(at.model, at.layers, batches, "example", lambda *_: None, checkpointing=checkpointing)


def steps(at: Subject, batches: Sequence[Batch], rank: int, memory: str, *, checkpointing: bool = False) -> None:
    """Compute gradients, low-rank steps and LoRA-One's factors with lora_one."""

    def consume(_: str, step: LowRank) -> None:
        descent_factors(step, normalize="s0")

    settings = StepSettings(singular=rank, seed=SEED, memory=memory, checkpointing=checkpointing)
    low_rank_steps(at.model, at.layers, batches, "example", settings, consume)


def low_rank_alone(gradients: dict[str, Tensor], rank: int) -> None:
    """Compute the low-rank steps of given gradients."""
    for name, G in gradients.items():
        factorised(name, G, StepSettings(singular=rank, seed=SEED))


def products(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Compute dY^T X of some layers, as ``mean_gradients`` does with tensors of this dtype."""
    for X, dY in pairs:
        dY.to(dtype).T @ X.to(dtype)


def by_the_library(at: Subject, rank: int, **options: Any) -> Row:
    """Measure ``initialize_adapters``; the adapters are removed after each run."""
    found: list[Any] = []

    def once() -> None:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM")
        with quiet_peft():
            model = initialize_adapters(at.model, config, at.micro, on_start=found.append, **options)
        model.unload()

    row = timed(once)
    solution = found[-1].solution
    energies = solution.energies.values()
    row |= {"loss": solution.examples.loss, "least_energy": min(energies), "gamma": solution.gamma}
    return row | {"searched": {f"{gamma:g}": loss for gamma, loss in solution.searched.items()} or None}


def by_peft(at: Subject, rank: int) -> Row:
    """Measure PEFT's LoRA-GA on 8 batches of 1. Each run changes the base a little, which does not change the time."""
    from peft import LoraGAConfig  # not in older versions
    from peft.tuners.lora import preprocess_loraga

    def once() -> None:
        ga = LoraGAConfig()
        config = LoraConfig(
            r=rank, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=ga, task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            preprocess_loraga(at.model, config, lambda: backward(at.model, at.micro))
            get_peft_model(at.model, config).unload()
        for layer in at.layers.values():
            vars(layer).pop("_peft_loraga_grad", None)
        at.model.requires_grad_(False)

    return timed(once)


def official(at: Subject, measured: int, sample: int) -> Row:
    """Measure the official setting: gradients of all parameters, summed on the CPU after each example, then
    svd_lowrank(q=512, niter=16). Only ``measured`` examples and ``sample`` matrices per shape are timed and scaled up.
    """
    totals: dict[str, Tensor] = {}
    turns: list[float] = []
    with requiring_gradients(list(at.model.parameters())):
        for batch in at.micro[:measured]:
            began = synchronized()
            at.model(**batch, use_cache=False).loss.backward()
            for name, parameter in at.model.named_parameters():
                gradient = parameter.grad.cpu()
                totals[name] = totals[name].add_(gradient) if name in totals else gradient
                parameter.grad = None
            turns.append(synchronized() - began)
    later = turns[-1]  # the first one is the warm-up and sums nothing
    gradients = turns[0] + (len(at.micro) - 1) * later
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, layer in at.layers.items():
        by_shape.setdefault(tuple(layer.weight.shape), []).append(name)
    decompositions = 0.0
    for shape, names in by_shape.items():
        began = synchronized()
        for name in names[:sample]:
            G = (totals[f"{name}.weight"] / len(at.micro)).float().to(at.model.device)
            torch.svd_lowrank(G, q=min(OFFICIAL_COLUMNS, *shape), niter=OFFICIAL_ITERATIONS)
        decompositions += (synchronized() - began) / len(names[:sample]) * len(names)
    note = f"scaled up from {measured} of {len(at.micro)} examples and {sample} matrices of each shape"
    row = {"seconds": gradients + decompositions, "gradient_seconds": gradients, "svd_seconds": decompositions}
    return row | {"turns": turns, "note": note}


def gradients_of(at: Subject) -> dict[str, Tensor]:
    """Return the gradients of the target weights over the 8 batches, in the model's dtype."""
    found: dict[str, Tensor] = {}
    weights = {name: layer.weight for name, layer in at.layers.items()}
    with requiring_gradients(list(weights.values())):
        backward(at.model, at.micro)
        found.update({name: weight.grad for name, weight in weights.items()})
    return found


def measure(table: Table, shape: Shape, device: str, ranks: Sequence[int]) -> None:
    """Measure all rows, the most important ones first."""
    at = subject(shape, device, torch.bfloat16)
    one_batch = {MICRO: at.micro, WHOLE: at.whole}
    first, *others = ranks

    def run(name: str, work: Callable[[], Any], **options: Any) -> None:
        table.row(name, partial(timed, work, **options))
        table.write(ratios=ratios(table, ranks))

    def our(rank: int, of: str, memory: str, *, checkpointing: bool = False) -> None:
        name = f"ours, {memory}{', checkpointing' if checkpointing else ''}, {of}, r={rank}"
        run(name, lambda: steps(at, one_batch[of], rank, memory, checkpointing=checkpointing))

    def alone(rank: int) -> Row:
        gradients = {name: G.float() for name, G in gradients_of(at).items()}
        return timed(lambda: low_rank_alone(gradients, rank), repeats=2)

    run(f"passes, {MICRO}", lambda: passes(at, at.micro))
    run(f"floor, {MICRO}", lambda: floor(at, at.micro))
    our(first, MICRO, "auto")
    table.row(f"low-rank steps alone, r={first}", lambda: alone(first))
    table.row(f"initialize_adapters, {MICRO}, r={first}", lambda: by_the_library(at, first, stable_gamma=128.0))
    table.row("official, scaled up", lambda: official(at, 2, 2))
    table.row(
        f"initialize_adapters, scale=search, {MICRO}, r={first}", lambda: by_the_library(at, first, scale="search")
    )
    run(f"passes, {WHOLE}", lambda: passes(at, at.whole))
    run(f"floor, {WHOLE}", lambda: floor(at, at.whole, drop=True))
    our(first, WHOLE, "auto")
    table.row(f"PEFT LoRA-GA, {MICRO}, r={first}", lambda: by_peft(at, first))
    for rank in others:
        our(rank, MICRO, "auto")
        table.row(f"low-rank steps alone, r={rank}", partial(alone, rank))
        our(rank, WHOLE, "auto")
        table.row(f"PEFT LoRA-GA, {MICRO}, r={rank}", partial(by_peft, at, rank))
    table.row(
        f"ours, low, {MICRO}, r={first}",
        lambda: timed(lambda: steps(at, at.micro, first, "low"), repeats=1, warm_up=False),
    )
    run(f"passes, checkpointing, {WHOLE}", lambda: passes(at, at.whole, checkpointing=True))
    our(first, WHOLE, "auto", checkpointing=True)
    product_rows(table, at)
    small_rows(table, shape, device, ranks)
    table.write(ratios=ratios(table, ranks))


def product_rows(table: Table, at: Subject) -> None:
    """Measure dY^T X in fp32 and in bf16 for one decoder layer, times the number of decoder layers."""
    blocks = len(at.layers) // len(TARGETS)
    tokens = at.whole[0]["input_ids"].numel()
    generator = torch.Generator(at.model.device).manual_seed(SEED)

    def pairs() -> list[tuple[Tensor, Tensor]]:
        options = {"generator": generator, "device": at.model.device, "dtype": torch.bfloat16}
        return [
            tuple(torch.randn(tokens, width, **options) for width in reversed(layer.weight.shape))
            for layer in list(at.layers.values())[: len(TARGETS)]
        ]

    for dtype in (torch.float32, torch.bfloat16):

        def product(dtype: torch.dtype = dtype) -> Row:
            found = timed(partial(products, pairs(), dtype))
            return found | {
                "seconds": blocks * found["seconds"],
                "note": f"one decoder layer of {tokens} tokens x {blocks}",
            }

        table.row(f"dY^T X of all layers in {str(dtype).removeprefix('torch.')}", product)


def small_rows(table: Table, shape: Shape, device: str, ranks: Sequence[int]) -> None:
    """Measure the small operations of a low-rank step (dozens per layer), as the mean of 20 calls."""
    for rank in ranks:
        columns = rank + 8
        block = torch.randn(shape.hidden, columns, device=device)
        square = torch.randn(4 * columns, 4 * columns, device=device)
        wide = torch.randn(shape.intermediate, shape.hidden, device=device)
        operations: dict[str, Callable[[], Any]] = {
            f"Householder QR, {shape.hidden} x {columns}": lambda block=block: torch.linalg.qr(block),
            f"Cholesky QR in fp64, {shape.hidden} x {columns}": lambda block=block: cholesky_qr(block),
            f"SVD, {4 * columns} x {4 * columns}": lambda square=square: torch.linalg.svd(square),
            f"eigh in fp64 on the CPU, with the copy, {4 * columns} x {4 * columns}": lambda square=square: (
                torch.linalg.eigh(square.double().cpu())
            ),
            f"product {shape.intermediate} x {shape.hidden} x {columns} in fp32": lambda a=wide, b=block: a @ b,
        }
        for name, operation in operations.items():
            table.row(name, partial(each_of, operation))


def each_of(operation: Callable[[], Any], calls: int = 20) -> Row:
    row = timed(lambda: [operation() for _ in range(calls)], repeats=2)
    return row | {"seconds": row["seconds"] / calls, "milliseconds": 1e3 * row["seconds"] / calls}


def cholesky_qr(block: Tensor) -> Tensor:
    """Orthonormalise the columns with the Cholesky factor of their Gram matrix, in fp64."""
    wide = block.double()
    triangle, _ = torch.linalg.cholesky_ex(wide.mT @ wide)
    return torch.linalg.solve_triangular(triangle.mT, wide, upper=True, left=False).float()


def ratios(table: Table, ranks: Sequence[int]) -> dict[str, float | None]:
    """Return the ratios to the floor, and of the official setting to ours."""
    found: dict[str, float | None] = {}

    def ratio(one: str, other: str) -> None:
        above, below = table.value(one), table.value(other)
        if above and below:
            found[f"{one} / {other}"] = above / below

    for row in table.rows:
        name = row["name"]
        for of in (MICRO, WHOLE):
            if of in name and name.startswith(("ours", "initialize", "PEFT")):
                ratio(name, f"floor, {of}")
                below = table.value(f"floor, {of}")
                row["ratio_to_floor"] = row["seconds"] / below if below and "seconds" in row else None
    for rank in ranks:
        for of in (MICRO, WHOLE):
            ratio("official, scaled up", f"ours, auto, {of}, r={rank}")
        ratio("official, scaled up", f"initialize_adapters, {MICRO}, r={rank}")
    return found
