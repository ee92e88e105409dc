"""Log-likelihoods at other batch sizes: equal to 1e-5 in fp32, and within the rounding of a 16-bit model's dtype."""

import random

import pytest
import torch

from lora_one.evaluation.choices import log_likelihoods, questions_of
from lora_one.models import load_model, load_tokenizer
from tests.helpers.paths import real_model

# the largest difference from one question at a time, as a share of the value (of 1 nat for smaller values)
LIMITS = {"fp32": 1e-5, "bf16": 2**-5}
ANSWERS = [" the correct answer is true", " false", " the river and the old house by the mat", " A"]


def prompts(count):
    """Prompts of 5 to 42 words, so every batch has padding."""
    rng = random.Random(0)
    words = ("cat", "sat", "on", "mat", "and", "looked", "the", "old", "red", "house", "river", "while", "rain", "fell")
    return [f"Question: {' '.join(rng.choices(words, k=rng.randint(3, 40)))}?\nAnswer:" for _ in range(count)]


def relative_differences(name, dtype, sizes, count):
    """Largest |x - y| / max(1, |y|) for each batch size, y: one question at a time."""
    model, tokenizer = load_model(name, dtype=dtype).eval(), load_tokenizer(name)
    asked = questions_of(tokenizer, prompts(count), ANSWERS)
    alone = torch.tensor([values for _, values in sorted(log_likelihoods(model, asked, 1))], dtype=torch.float64)
    assert alone.shape == (count, len(ANSWERS)) and (alone < 0).all()
    found = []
    for size in sizes:
        batched = [values for _, values in sorted(log_likelihoods(model, asked, size))]
        differences = (torch.tensor(batched, dtype=torch.float64) - alone).abs() / alone.abs().clamp_min(1.0)
        found.append(float(differences.max()))
    return found


@pytest.mark.parametrize("dtype", LIMITS)
def test_bundled_model(dtype):
    assert max(relative_differences("bundled/tiny", dtype, [2, 5, 12], 12)) <= LIMITS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_real_model(dtype):
    assert max(relative_differences(str(real_model("gemma-3-270m-hf")), dtype, [4, 8], 8)) <= LIMITS[dtype]
