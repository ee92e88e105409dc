"""Build the model at the start of training: adapters initialised by their method, and a record of the start."""

import dataclasses
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from lora_one.adaptation.checkpoints import save_factors
from lora_one.adaptation.layers import target_layers, trainable_parameters
from lora_one.config import RunConfig
from lora_one.data.encode import batches_of
from lora_one.distributed import Processes
from lora_one.files import write_json
from lora_one.initialization.cache import Cache, Key, content_of
from lora_one.initialization.curvature import curvature_by_layer, largest_curvature
from lora_one.initialization.full_step import full_step
from lora_one.initialization.methods import build_init
from lora_one.initialization.probe import draw
from lora_one.initialization.solution import Start
from lora_one.initialization.start import as_run_errors, attach_adapters, probe_loss
from lora_one.initialization.start_warnings import refuse_not_finite, start_warnings
from lora_one.models import original_weights
from lora_one.optim.cross_term import overshoot_warnings
from lora_one.optim.optimizer_class import optimizer_class
from lora_one.optim.pairs import lora_pairs
from lora_one.records.provenance import source_fingerprint
from lora_one.records.tracking import Tracker
from lora_one.runs.known_evaluations import known_evaluation
from lora_one.runs.parts import RunParts
from lora_one.runs.summary import start_lines
from lora_one.training.callbacks import DiagnosticsLogger

CURVATURE_BATCH = 4  # examples of a batch: a Hessian-vector product keeps about three times what a training step keeps
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")  # whose versions can change a start


def initial_model(parts: RunParts, base: nn.Module, tracker: Tracker) -> nn.Module:
    """Return the model at the start of training; if the run is resumed, the resume point later replaces its values.

    A new start is recorded in run.json: data, trainable parameters, the initialisation, and the evaluations of the
    base and of the start.
    """
    folder, adaptation = parts.folder, parts.adaptation
    own_start = None if parts.init.steps_weights else parts.run.peft.own_start
    if parts.resuming:
        return adaptation.resume(base, parts.steps)
    folder.update(data=parts.splits.counts)
    evaluated, evaluations = partial(known_evaluation, cache_folder(parts) if parts.validation else None), {}
    if parts.validation:
        key = partial(evaluation_key, parts, base)
        evaluations["start"] = evaluated("the pretrained model", key, lambda: parts.validation(base))
    if own_start is not None:
        model, record = adaptation.start(base, parts.steps), {"method": own_start, "seconds": 0.0}
    else:
        model, record = start_by_method(parts, base, tracker)
        if parts.validation or parts.run.model.epochs == 0:
            metrics = evaluations.get("start") if equals_base(parts.run, record) else None
            if metrics is None:
                key = partial(start_key, parts, base)
                metrics = evaluated("the start", key, lambda: parts.validation(model))
            evaluations["init"] = logged_start(parts, metrics, tracker)
    folder.update(trainable_parameters=trainable_parameters(model), init=record, evaluation=evaluations)
    if own_start is None and Processes.current().rank == 0:
        print(start_lines(record))
    return model


def start_by_method(parts: RunParts, base: nn.Module, tracker: Tracker) -> tuple[nn.Module, dict[str, Any]]:
    """Initialise the model by the method; return it and the entry ``init`` of run.json.

    Raises RunError: the loss after the start, or the shift of a layer, is not finite.
    """
    run, init, probe = parts.run, parts.init, parts.probe
    begun = time.perf_counter()
    model, start = stepped(parts, base) if init.steps_weights else with_adapters(parts, base)
    seconds = time.perf_counter() - begun + start.solution.seconds  # what it costs without the cache
    save_start(parts, start)
    if run.wandb.diagnostics_every:
        DiagnosticsLogger(model, run.wandb.diagnostics_every, start.solution.vectors, tracker).log(0)
    after = start.solution.loss
    if after is None and probe is not None:
        after = probe_loss(model, probe)
    shifts = {f"relative shift of {name}": shift for name, shift in start.relative_shift.items()}
    refuse_not_finite(init, init.title, {"loss on the initialisation examples": after} | shifts)
    record = {"method": init.title_with(run.peft.dora), "seconds": seconds} | start_record(start, after)
    if init.sets_ranks:
        record["ranks"] = start.solution.ranks
    record["warnings"] = start_warnings(init, record) + step_warnings(run, model)
    if run.wandb.curvature_examples:
        record["curvature"] = curvature_record(parts, model, tracker)
    eta = 1 / start.solution.gamma if init.steps_weights else getattr(init, "eta", None)
    return model, record | ({} if eta is None else {"eta": eta})


def step_warnings(run: RunConfig, model: nn.Module) -> list[str]:
    """Return a warning if the first steps of an optimizer of pairs are too large for this start; otherwise []."""
    if not run.optimizer.steps_pairs or run.model.epochs == 0:
        return []
    optimizer, name = optimizer_class(run.optimizer), run.optimizer.name
    return overshoot_warnings(optimizer, name, lora_pairs(model), run.model.learning_rate)


def curvature_record(parts: RunParts, model: nn.Module, tracker: Tracker) -> dict[str, Any]:
    """Measure the largest eigenvalue of the loss's Hessian in the adapters, for run.json and W&B.

    Raises RunError: a product with the Hessian is not finite.
    """
    run, texts = parts.run, parts.splits.train_texts
    wanted = run.wandb.curvature_examples
    drawn = draw(texts, wanted, run.model.max_length, run.init_seed, parts.encoder, "examples of the curvature")
    batches = batches_of(drawn, CURVATURE_BATCH, parts.encoder.pad_id)
    with as_run_errors():
        largest = largest_curvature(model, batches, run.model.loss, run.init_seed)
        layers = (
            curvature_by_layer(model, batches, run.model.loss, run.init_seed) if run.wandb.curvature_by_layer else {}
        )
    tracker.log(0, {"curvature/largest eigenvalue": largest.value})
    return {
        "largest_eigenvalue": largest.value,
        "error": largest.error,
        "products": largest.products,
        "converged": largest.converged,
        "examples": len(drawn),
        "layers": {name: found.value for name, found in layers.items()},
        "layers_not_converged": {name: found.error for name, found in layers.items() if not found.converged},
    }


def with_adapters(parts: RunParts, base: nn.Module) -> tuple[nn.Module, Start]:
    """Attach adapters that the method initialises."""
    run = parts.run
    return attach_adapters(
        base,
        parts.adaptation,
        build_init(parts.init),
        parts.probe,
        seed=run.init_seed,
        originals=original_weights(base, run.model.name, run.model.revision) if run.model.quantization else None,
        cached=cache_for(parts, base),
    )


def stepped(parts: RunParts, base: nn.Module) -> tuple[nn.Module, Start]:
    """Take one step with the full gradient in the target layers, then train every weight."""
    start = full_step(base, target_layers(base, parts.run.peft), parts.probe, parts.init.eta)
    return parts.adaptation.start(base, parts.steps), start


def equals_base(run: RunConfig, record: dict[str, Any]) -> bool:
    """Return whether the start computes what the base does: every s B A is 0, so nothing is added to any output.

    record: the entry ``init`` of run.json. DoRA divides by a norm, so its outputs differ by rounding even then.
    """
    shifts = record["relative_shift"]
    return bool(shifts) and not any(shifts.values()) and not run.peft.dora


def logged_start(parts: RunParts, metrics: dict[str, float], tracker: Tracker) -> dict[str, float]:
    """Log and return the metrics of the model before training. Raises RunError: its validation loss is not finite."""
    refuse_not_finite(parts.init, parts.init.title, {"validation loss": metrics.get("eval_loss")})
    tracker.log(0, metrics)
    return metrics


def save_start(parts: RunParts, start: Start) -> None:
    """Write what a resumed run needs: the factors that changed the base, the gradient's vectors for diagnostics, and
    the ranks that the method chose.
    """
    if Processes.current().rank == 0:
        if start.initial_factors:
            save_factors(start.initial_factors, parts.folder.initial_factors)
        if start.solution.vectors:
            save_factors(start.solution.vectors, parts.folder.gradient_vectors)
        if parts.init.sets_ranks:
            write_json(parts.adaptation.ranks_file, start.solution.ranks)


def cache_folder(parts: RunParts) -> Path | None:
    """Return the folder ``init.cache``; None: nothing is stored."""
    return None if parts.init.cache is None else Path(parts.init.cache).expanduser()


def cache_for(parts: RunParts, base: nn.Module) -> Cache | None:
    """Return the cache of starts in ``init.cache``; None: no cache is configured."""
    folder = cache_folder(parts)
    return None if folder is None else Cache(folder, cache_key(parts, base))


def cache_key(parts: RunParts, base: nn.Module) -> Key:
    """Return everything that the factors of a start depend on, with the names of the configuration."""
    run, probe = parts.run, parts.probe
    settings = dataclasses.asdict(dataclasses.replace(parts.init, seed=run.init_seed))
    adapter = ("lora_r", "lora_alpha", "use_rslora", "lora_target_modules", "lora_xs", "dora")
    return base_key(parts, base) | {
        **{f"peft.{name}": getattr(run.peft, name) for name in adapter},
        **{f"init.{name}": value for name, value in settings.items() if name not in {"cache", "memory"}},
        "examples": content_of([*probe.batches, *(probe.search or ())]) if probe else None,
        "with the gradient's vectors": probe.vectors if probe else False,
    }


def base_key(parts: RunParts, base: nn.Module) -> Key:
    """Return everything that the base model and all results computed from it depend on, to the last digit."""
    run, provenance = parts.run, parts.folder.read()["provenance"]
    return {
        "model.name": provenance["fingerprints"].get("model.name", run.model.name),
        "model.revision": getattr(base.config, "_commit_hash", None) or run.model.revision,
        "model.bf16": run.model.bf16,
        "model.type": run.model.type,
        "model.quantization": run.model.quantization,
        "model.seed": run.training_seed if base.drawn_at_random else None,
        "model.sharded": run.model.sharded,
        "attention": getattr(base.config, "_attn_implementation", None),
        "device": next(base.parameters()).device.type,
        "processes": Processes.current().count,
        **{f"version of {name}": provenance["versions"][name] for name in PACKAGES},
        "code": source_fingerprint(),
    }


def evaluation_key(parts: RunParts, base: nn.Module) -> Key:
    """Return everything that the metrics of the base depend on."""
    return base_key(parts, base) | {
        "validation": parts.validation.content,
        "dtype": str(next(base.parameters()).dtype),  # with full fine-tuning, that of the base is fp32
    }


def start_key(parts: RunParts, base: nn.Module) -> Key:
    """Return everything that the metrics of the start depend on."""
    peft = {f"peft.{name}": value for name, value in dataclasses.asdict(parts.run.peft).items()}
    return evaluation_key(parts, base) | cache_key(parts, base) | peft


def start_record(start: Start, loss_after: float | None) -> dict[str, Any]:
    """Return a start for run.json: examples, energies, losses, and the relative shift of each layer."""
    solution, energies = start.solution, list(start.solution.energies.values())
    return {
        "examples": solution.examples.examples if solution.examples else 0,
        "tokens": solution.examples.tokens if solution.examples else 0,
        "captured_energy": {"min": min(energies), "mean": mean(energies), "layers": solution.energies}
        if energies
        else None,
        "memory": solution.examples.memory if solution.examples else None,
        "loss_before": solution.examples.loss if solution.examples else None,
        "loss_after": loss_after,
        "predicted_decrease": solution.predicted_decrease,
        "searched": {"gamma": solution.gamma, "losses": solution.searched, "other_examples": solution.searched_on}
        if solution.searched
        else None,
        "cached": solution.cached,
        "relative_shift": start.relative_shift,
    }
