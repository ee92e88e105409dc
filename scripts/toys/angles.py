"""T5: principal angles to the one-step gradient over the steps, LoRA and LoRA-One on a real model.

A BERT encoder (MiniLM-L6) with a new head on MRPC. The reference is the best rank-r approximation of the mean gradient
over the first 128 training examples, for every linear layer of the encoder before training. LoRA-One starts from the
same examples and searches its scale on the next 128. Both methods train on the same batches with AdamW. All settings
are ours: the paper's figure is of T5-base, and its settings could not be found.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, TaskType

import lora_one
from lora_one.adaptation.layers import factors_of, lora_layers
from lora_one.config.defaults import dataset_settings
from lora_one.data.order import order_of
from lora_one.datasets import DATASETS, labels_of
from lora_one.diagnostics import Vectors, by_kind, layer_diagnostics
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.losses import Batch
from lora_one.models import load_model, load_tokenizer
from lora_one.progress import progress
from lora_one.reports.figures import COLORS, empty, legend
from lora_one.seeding import seed_everything, seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("LoRA", "LoRA-One")
RANK, RATE, BATCH, STEPS, EVERY, EXAMPLES, LENGTH, SEED = 8, 1e-3, 32, 60, 3, 128, 128, 42
DATA, KIND = "mrpc", "SequenceClassification"
CAPTION = "Principal angles to the one-step gradient, MiniLM on MRPC"


class Row(NamedTuple):
    """kind: last part of the layers' names; the angles, in degrees, are means over the layers of that kind.

    loss: of the last training batch; at step 0, of the first.  B_..., A_...: between the columns of B and of U_r, and
    between the rows of A and of Vh_r. Empty: the factor is zero and spans nothing.
    """

    method: str
    step: int
    loss: float
    kind: str
    B_mean: float | None
    B_max: float | None
    A_mean: float | None
    A_max: float | None


def rows(model: Path, data: Path, seed: int = SEED, steps: int = STEPS, every: int = EVERY) -> list[Row]:
    """Train with both methods; return a row per method, measured step and kind of layer.

    model: folder of a BERT encoder.  data: folder of MRPC.
    """
    found, vectors = [], {}
    for method in METHODS:
        base, batches = prepared(model, data, seed, max(steps, 2 * EXAMPLES // BATCH))
        vectors = vectors or leading_vectors(base, batches[: EXAMPLES // BATCH], seed)
        adapted = with_adapters(base, batches, method, seed, sorted(vectors))
        with progress(f"training {method}", steps, "steps") as shown:
            for step, loss in trained(adapted, batches, steps, seed):
                if step % every == 0 or step == steps:
                    found += [Row(method, step, loss, *measured) for measured in angles(adapted, vectors)]
                shown.advance(int(step > 0))
    return found


def prepared(model: Path, data: Path, seed: int, steps: int) -> tuple[Any, list[Batch]]:
    """Return the model with a new head, the same for each method, and its training batches in a seeded order."""
    seed_everything(seed)
    tokenizer = load_tokenizer(str(model), model_type=KIND)
    loaded = load_model(
        str(model), dtype="fp32", model_type=KIND, labels=labels_of(DATA), pad_id=tokenizer.pad_token_id
    )
    examples = list(DATASETS[DATA].train(dataset_settings(DATA, str(data))))
    epochs = range(-(-steps * BATCH // len(examples)))
    order = [place for epoch in epochs for place in order_of(len(examples), seed, epoch).tolist()]
    chosen = [examples[place] for place in order[: steps * BATCH]]
    return loaded, lora_one.encode_batches(loaded, tokenizer, chosen, batch_size=BATCH, max_length=LENGTH)


def leading_vectors(model: Any, batches: Sequence[Batch], seed: int) -> dict[str, Vectors]:
    """Return U_r (m, r) and Vh_r (r, n) of the mean gradient of each linear layer of the encoder."""
    layers = {
        name: layer
        for name, layer in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(layer, torch.nn.Linear) and ".encoder." in name
    }
    vectors: dict[str, Vectors] = {}

    def keep(name: str, step: Any) -> None:
        vectors[name] = (step.U, step.Vh)

    low_rank_steps(model, layers, batches, "example", StepSettings(singular=RANK, seed=seed), keep)
    return vectors


def with_adapters(base: Any, batches: Sequence[Batch], method: str, seed: int, layers: list[str]) -> PeftModel:
    """Return the model with adapters of these layers, initialised by the method with the project's defaults."""
    config = LoraConfig(r=RANK, lora_alpha=16, use_rslora=True, target_modules=layers, task_type=TaskType.SEQ_CLS)
    with seeded(seed):
        return lora_one.initialize_adapters(base, config, batches, method=method, examples=EXAMPLES, seed=seed)


def trained(model: PeftModel, batches: Sequence[Batch], steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Train with AdamW at a rate that falls linearly to 0; yield (step, loss) before the first step and after each."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    torch.manual_seed(seed)  # of dropout
    model.train()
    for step, batch in enumerate(batches[:steps]):
        loss = model(**batch).loss
        if step == 0:
            yield 0, loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step + 1, loss.item()


def angles(model: PeftModel, vectors: dict[str, Vectors]) -> Iterator[tuple[str, float | None, ...]]:
    """Yield each kind of layer with its mean and largest angles of B and of A, None where a factor is zero."""
    layers = lora_layers(model)
    means = by_kind({name: layer_diagnostics(factors_of(layer), vectors[name]) for name, layer in layers.items()})
    for kind in sorted({name.rpartition(".")[2] for name in layers}):
        yield kind, *(means.get(f"{kind}/{factor}_angle_{what}") for factor in "BA" for what in ("mean", "max"))


def figure(found: Sequence[Row]) -> "Figure":
    """Plot the mean angle of B and of A over the steps: a line for each kind of layer."""
    drawn, axes = empty(3.6, 2)
    methods, kinds = (list(dict.fromkeys(getattr(row, field) for row in found)) for field in ("method", "kind"))
    for method, kind in dict.fromkeys((row.method, row.kind) for row in found):
        line = [row for row in found if (row.method, row.kind) == (method, kind)]
        style = {"color": COLORS[1 - methods.index(method)], "linestyle": ("-", "--", ":", "-.")[kinds.index(kind) % 4]}
        for part, factor in zip(axes, "BA", strict=True):
            points = [(row.step, getattr(row, f"{factor}_mean")) for row in line]
            points = [(step, angle) for step, angle in points if angle is not None]
            part.plot(*zip(*points, strict=True), label=f"{method}, {kind}", linewidth=1.3, **style)
            part.set(xlabel="step", ylabel=f"mean angle of {factor} (degrees)", ylim=(0, 92), yticks=range(0, 91, 15))
    legend(drawn, axes[0])
    return drawn
