"""The loss of a run's result, or of its base, on examples that were used neither for training nor for choices."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lora_one.adaptation.checkpoints import load_adapter
from lora_one.config import RunConfig
from lora_one.data import head_labels, read_examples
from lora_one.data.encode import batches_of
from lora_one.data.encoders import encoder_for
from lora_one.datasets.settings import DatasetConfig
from lora_one.errors import RunError
from lora_one.files import write_json
from lora_one.losses import batch_count, mean_loss
from lora_one.models import commit_of, load_model, local_folder
from lora_one.records.folder import base_of, revision_of
from lora_one.records.provenance import config_hash, local_fingerprints, provenance
from lora_one.seeding import seed_everything
from lora_one.statistics.means import weighted_mean


class HeldOut:
    """Measures the mean loss on held-out examples: ``held_out(place, trained)``.

    Examples are encoded and averaged as in the run's validation.
    run: its model, maximal length and loss are used.  dataset: the source of the examples, of which the first ``limit``
    are used.  trained: the folder of an adapter, or of the whole model after full fine-tuning; None: the base, whose
    new head is drawn with the run's seed.
    The report is written to ``<place>/loss-<hash8>/metrics.json``, with a hash over model, data and settings. If this
    file exists, nothing is computed.
    Raises RunError: no example has a response token within model.max_length, or the loss is not finite.
    """

    def __init__(self, run: RunConfig, dataset: DatasetConfig, limit: int):
        self.model, self.dtype = run.model, "bf16" if run.model.bf16 else "fp32"
        self.labels = head_labels(run.model.type, dataset.name)
        self.seed = run.training_seed
        encoder = encoder_for(run.model, dataset)
        self.texts = read_examples(dataset, encoder)[0][:limit]
        encoded, counts = encoder.encode(self.texts, run.model.max_length)
        if not encoded:
            raise encoder.nothing_left(self.texts, run.model.max_length)
        self.pad_id = encoder.pad_id
        self.batches = batches_of(encoded, 1, encoder.pad_id)  # one example each, for the standard error
        self.counts = {"examples": len(encoded), "shortened": counts.shortened, "dropped": counts.dropped}
        self.counts["tokens"] = sum(batch_count(batch, "token") for batch in self.batches)
        model = {key: getattr(run.model, key) for key in ("name", "revision", "type", "max_length", "loss")}
        model |= {"quantization": run.model.quantization} if run.model.quantization else {}
        self.settings = {"dataset": asdict(dataset), "model": model, "examples": limit, "dtype": self.dtype}
        self.fingerprints = local_fingerprints(self.settings, local_folder(run.model.name))
        self.identity = config_hash(self.settings, self.fingerprints)

    def __call__(self, place: Path, trained: Path | None = None) -> float:
        """Return the mean loss; it is computed only if there is no report yet."""
        file = self.file(place)
        if not file.exists():
            report = self.report(trained)
            if not math.isfinite(report["metrics"]["loss"]):
                instead = "check model.name and test" if trained is None else "lower model.learning_rate"
                raise RunError(f"the loss on the test data is {report['metrics']['loss']}: {instead}")
            write_json(file, report)
        return json.loads(file.read_text())["metrics"]["loss"]

    def file(self, place: Path) -> Path:
        """Return the path of the report, which exists if the loss was measured before."""
        return place / f"loss-{self.identity[:8]}" / "metrics.json"

    def loaded(self, trained: Path | None) -> nn.Module:
        """Load the adapter on its base, the whole model, or (None) the base."""
        whole = trained is not None and not (trained / "adapter_config.json").exists()
        name, revision = (str(trained), None) if whole else (self.model.name, self.revision(trained))
        options = {"dtype": self.dtype, "model_type": self.model.type, "labels": self.labels, "pad_id": self.pad_id}
        if trained is None and self.model.quantization:
            options["quantization"] = self.model.quantization
        seed_everything(self.seed)
        model = load_model(name, revision, **options | (base_of(trained) if not whole else {}))
        return model if whole or trained is None else load_adapter(model, trained).eval()

    def revision(self, trained: Path | None) -> str | None:
        """Return the commit with which an adapter was trained, or the configured revision of the base."""
        return revision_of(trained, self.model.name) or self.model.revision

    def commit(self, trained: Path | None) -> str | None:
        """Return the commit of the hub's base that was loaded; None: it is local."""
        return commit_of(self.model.name, self.revision(trained))

    def report(self, trained: Path | None) -> dict[str, Any]:
        """Measure the loss; return it with its standard error in the form of every evaluation's metrics.json."""
        started = time.perf_counter()
        model = self.loaded(trained)
        weights = [batch_count(batch, self.model.loss) for batch in self.batches]
        losses = [mean_loss(model, [batch], self.model.loss) for batch in self.batches]
        loss, error = weighted_mean(losses, weights)
        return {
            "task": "loss",
            "metrics": {"loss": loss, "loss_stderr": error},
            "counts": self.counts,
            "model": str(trained or self.model.name),
            "settings": self.settings,
            "seconds": time.perf_counter() - started,
            "provenance": provenance(self.fingerprints, local_folder(self.model.name), self.commit(trained)),
        }
