"""The bytes of a base and of what an initialisation holds, against real models, batches and spaces."""

import pytest
import torch

from lora_one.initialization.forward_batches import regrouped
from lora_one.linalg import OVERSAMPLING, KrylovSpace
from lora_one.models import load_skeleton
from lora_one.runs.rank_memory import forward_rows, gathered_bytes, held_bytes, multiplied, stored_bytes
from tests.helpers.models import quantized_llama, random_llama

SIZES = {"hidden_size": 128, "intermediate_size": 192}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_in_one_dtype(dtype):
    model = random_llama().to(dtype)
    assert stored_bytes(model, dtype, None) == sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind, tmp_path):
    """Weights as bitsandbytes stores them, and for nf4 their scales; int8 has one scale for each row."""
    model, _ = quantized_llama(tmp_path / "llama", kind, **SIZES)
    real = sum(weight.nbytes for weight in model.parameters())
    states = [weight.quant_state for weight in model.parameters() if getattr(weight, "quant_state", None) is not None]
    real += sum(state.absmax.nbytes for state in states)
    assert bool(states) == (kind == "nf4")
    skeleton = load_skeleton(str(tmp_path / "llama"))
    assert stored_bytes(skeleton, torch.float32, kind) == pytest.approx(real, rel=0.01)


def test_two_blocks_are_gathered_at_once_and_tokens_meet_every_matrix():
    model = random_llama()
    block = sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert gathered_bytes(model, torch.bfloat16) == 2 * 2 * max(block, model.model.embed_tokens.weight.numel())
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    assert multiplied(model) == sum(weight.numel() for weight in matrices)


def test_what_is_held_for_each_place():
    shapes = [(300, 280), (280, 300), (400, 300)]
    sums = sum(4 * m * n for m, n in shapes)
    largest = 4 * 400 * 300
    assert held_bytes("layer", shapes, 8, 4) == held_bytes("cpu", shapes, 8, 4) == (0, largest)
    assert held_bytes("device", shapes, 8, 4) == (sums, largest)
    assert held_bytes("device", shapes, 8, 4, room=700_000) == (700_000, largest)
    assert held_bytes("device", shapes, 8, 4, room=1) == (largest, largest), "a larger layer is a group alone"


def test_what_a_sketch_holds_is_the_space_of_every_layer():
    """Eleven products: six blocks of Q and five of P; beside them the probes, and the block that is multiplied next."""
    shape, rank, width = (300, 280), 8, 8 + OVERSAMPLING
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    space = KrylovSpace(shape, rank, 1e-3)
    block = space.add_left(matrix @ space.start(torch.Generator().manual_seed(0)))
    for _ in range(5):
        block = space.add_left(matrix @ space.add_right(matrix.T @ block))
    probes = 4 * 300 * 8
    assert held_bytes("sketch", [shape], rank, 8)[1] == space.Q.nbytes + space.P.nbytes + probes + 4 * 300 * width
    assert held_bytes("sketch", [shape], rank, 8)[0] == 8 * 300 * width


@pytest.mark.parametrize(
    ("examples", "length", "outputs", "processes"), [(12, 1024, 64, 1), (12, 64, 64, 4), (6, 2048, 40_000, 1)]
)
def test_batches_without_gradients(examples, length, outputs, processes):
    ids = torch.zeros(1, length, dtype=torch.long)
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batches = regrouped([one] * examples, 0, outputs, processes)
    assert forward_rows(examples, length, outputs, processes) == max(len(batch["labels"]) for batch in batches)
