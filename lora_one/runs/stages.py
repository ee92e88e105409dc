"""The stages of one run and what each leaves in its folder; run_exp.py says their order."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from statistics import mean
from typing import Any

from torch import nn

from lora_one.adaptation import checkpoints
from lora_one.adaptation import lora as adapters
from lora_one.adaptation.adalora import wrap_adalora
from lora_one.config import RunConfig
from lora_one.data import Splits, head_labels
from lora_one.data.encode import Encoder, pad_id_of
from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.evaluation import glue
from lora_one.evaluation.generate import context_length
from lora_one.evaluation.validation import Validation
from lora_one.initialization.cache import Cache, content_of
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.initialization.methods import build_init
from lora_one.initialization.probe import init_seed, probe_batches
from lora_one.initialization.start import Probe, Start, attach_adapters, probe_loss
from lora_one.initialization.start_warnings import refuse_not_finite, start_warnings
from lora_one.models import (
    DTYPES,
    load_model,
    load_tokenizer,
    local_folder,
    original_weights,
    padded_with,
    refuse_drawn_layers,
)
from lora_one.records.folder import RunFolder
from lora_one.records.provenance import fingerprint, provenance, source_fingerprint
from lora_one.records.tracking import Tracker, read_metrics
from lora_one.reports.curves import plot_run
from lora_one.seeding import seed_everything
from lora_one.training.callbacks import Watcher
from lora_one.training.loop import (
    check_resume_point,
    first_and_last,
    first_step_size,
    last_checkpoint,
    refuse_no_learning,
    total_steps,
    train,
)

STARTED_BY = ("torch", "transformers", "peft", "bitsandbytes")  # packages whose versions a start may depend on
FULL = "full fine-tuning"


@dataclass(frozen=True)
class Experiment:
    """One run as its stages see it: the settings, what they work on, and where it is written."""

    run: RunConfig
    folder: RunFolder
    encoder: Encoder
    splits: Splits
    validation: Validation


@contextmanager
def recorded(run: RunConfig, folder: RunFolder, identity: str, fingerprints: dict[str, str]) -> Iterator[Tracker]:
    """Keep run.json's status true: running, then finished, failed or interrupted; start anew without a resume point."""
    processes = Processes.current()
    resuming = not run.overwrite and last_checkpoint(folder.checkpoints) is not None
    processes.meet()  # all have looked before one clears
    if not resuming and processes.rank == 0:
        folder.clear()
    record = folder.update(
        status="running",
        config=run.to_dict(),
        config_hash=identity,
        provenance=provenance(fingerprints, local_folder(run.model.name)),
        wandb_id=folder.read().get("wandb_id") or secrets.token_hex(6),  # a resumed run goes on in the same W&B run
    )
    processes.meet()
    tracker = Tracker(folder.metrics, main_process=processes.rank == 0)
    try:
        tracker.start_wandb(record, folder.path)
        yield tracker
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # of a full disk; the error that is under way says more
            folder.update(status=status, error=f"{type(error).__name__}: {error}")
        tracker.finish({"status": status}, exit_code=1)
        raise
    record = folder.update(status="finished", error=None)
    final = record["evaluation"].get("final", {})
    tracker.finish({"status": "finished", "train": record.get("train"), "evaluation": record["evaluation"]} | final)


def check_resumable(run: RunConfig, folder: RunFolder) -> None:
    """Raises RunError when there is a resume point to go on from and it is broken."""
    if not run.overwrite:
        check_resume_point(folder.checkpoints)


def load_base(run: RunConfig, encoder: Encoder) -> nn.Module:
    model = run.model
    dtype = "bf16" if model.bf16 and run.peft.use_peft else "fp32"  # 16 bits do not hold an optimizer's steps
    labels = head_labels(model.type, run.dataset.name)
    options = {"dtype": dtype, "quantization": model.quantization, "model_type": model.type, "labels": labels}
    shards = Processes.current().count if model.sharded else 1
    seed_everything(run.training_seed)  # a new head is drawn here
    base = load_model(model.name, model.revision, shards=shards, **options)
    if labels and run.peft.use_peft:
        refuse_drawn_layers(base, model.name)
    return padded_with(base, encoder.pad_id) if labels else base


def check_together(run: RunConfig, splits: Splits, base: nn.Module) -> None:
    """What only model and data together can show.

    Raises UsageError: early stopping without validation examples, or a run whose learning rate is always 0.
    """
    refuse_no_learning(len(splits.train), run.model)
    if run.model.early_stopping_patience and not splits.validation:
        raise UsageError(
            f"model.early_stopping_patience={run.model.early_stopping_patience} needs validation examples, there are "
            "none: raise dataset.validation_size, or set it to 0"
        )
    context = context_length(base)
    if run.model.max_length > context:
        print(f"note: model.max_length={run.model.max_length} exceeds the {context} positions of {run.model.name}")


def draw_probe(run: RunConfig, splits: Splits, encoder: Encoder) -> Probe | None:
    """The examples that the method looks at and, for a gradient, how it is taken; None for one that looks at none."""
    if not (run.peft.use_peft and run.init.needs_examples):
        return None
    batches, others = probe_batches(run, splits.train_texts, encoder)
    if not run.init.needs_gradient:
        return Probe(batches, "example")
    settings = StepSettings(
        tolerance=run.init.tolerance, memory=run.init.memory, checkpointing=run.model.gradient_checkpointing
    )
    # the vectors of a transformed gradient are not the gradient's
    vectors = run.wandb.diagnostics_every > 0 and run.init.transform is None
    return Probe(batches, run.init.reduction, settings, vectors, others)


def initialise(experiment: Experiment, base: nn.Module, probe: Probe | None, tracker: Tracker) -> nn.Module:
    """The model with its adapters at the method's start; after a resumption their values come with the checkpoint."""
    run, folder, splits, validation = experiment.run, experiment.folder, experiment.splits, experiment.validation
    if not run.peft.use_peft:
        return begun(experiment, base, FULL, lambda: base.requires_grad_(True))
    if run.peft.adalora:
        steps, seed = total_steps(len(splits.train), run.model), init_seed(run)
        return begun(experiment, base, "AdaLoRA", lambda: wrap_adalora(base, run.peft, run.init.dtype, steps, seed))
    if last_checkpoint(folder.checkpoints) is not None:
        model = adapters.wrap(base, run.peft, run.init.dtype)
        adapters.shift_base(model, checkpoints.load_factors(folder.initial_factors))
        return model
    folder.update(data=splits.counts)
    evaluations = {}
    if validation.asked:
        evaluations["start"] = validation(base)
    init = run.init.completed(lambda: first_step_size(len(splits.train), run.model))
    method = build_init(init)
    cache = None
    if run.init.cache is not None:
        cache = Cache(Path(run.init.cache).expanduser(), cache_key(run, init, probe, folder.read(), base))
    started = time.perf_counter()
    model, start = attach_adapters(
        base,
        run.peft,
        method,
        probe,
        seed=init_seed(run),
        dtype=run.init.dtype,
        originals=original_weights(run.model.name, run.model.revision) if run.model.quantization else None,
        cached=cache,
    )
    seconds = time.perf_counter() - started
    if start.initial_factors and Processes.current().rank == 0:
        checkpoints.save_factors(start.initial_factors, folder.initial_factors)
    if start.solution.vectors and Processes.current().rank == 0:
        checkpoints.save_factors(start.solution.vectors, folder.gradient_vectors)
    if run.wandb.diagnostics_every:
        Watcher(model, run.wandb.diagnostics_every, start.solution.vectors, tracker).look(0)
    after = start.solution.loss
    if after is None and probe is not None:
        after = probe_loss(model, probe)
    refuse_not_finite(init, init.title, {"loss on the initialisation examples": after} | shifts_of(start))
    if validation.asked or run.model.epochs == 0:
        evaluations["init"] = validation(model)
        refuse_not_finite(init, init.title, {"validation loss": evaluations["init"].get("eval_loss")})
        tracker.log(0, evaluations["init"])
    record = {"method": init.title_with(run.peft.dora), "seconds": seconds} | figures(start, after)
    record["warnings"] = start_warnings(init, record)
    if getattr(init, "eta", None) is not None:
        record["eta"] = init.eta
    folder.update(trainable_parameters=adapters.trainable_parameters(model), init=record, evaluation=evaluations)
    if Processes.current().rank == 0:
        print(said_of(record))
    return model


def begun(experiment: Experiment, base: nn.Module, method: str, trained: Callable[[], nn.Module]) -> nn.Module:
    """A start that looks at no examples and leaves the function as it is: what ``trained`` makes of the base.

    After a resumption the values come with the checkpoint, and run.json has its record.
    """
    folder, validation = experiment.folder, experiment.validation
    fresh = last_checkpoint(folder.checkpoints) is None
    evaluations = {"start": validation(base)} if fresh and validation.asked else {}
    model = trained()
    if fresh:
        folder.update(
            data=experiment.splits.counts,
            trainable_parameters=adapters.trainable_parameters(model),
            init={"method": method, "seconds": 0.0},
            evaluation=evaluations,
        )
    return model


def figures(start: Start, loss_after: float | None) -> dict[str, Any]:
    """What run.json tells of a start: examples, energies, losses there, and how far each layer was moved."""
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


def shifts_of(start: Start) -> dict[str, float]:
    return {f"relative shift of {name}": shift for name, shift in start.relative_shift.items()}


def said_of(record: dict[str, Any]) -> str:
    """The start in a line or two, for the screen."""
    shifts = list(record["relative_shift"].values())
    parts = [f"init: {record['method']}, {record['seconds']:.1f} s"]
    if record["captured_energy"]:
        parts.append(
            f"rank-r energy {record['captured_energy']['mean']:.3f} (least {record['captured_energy']['min']:.3f})"
        )
    parts.append(f"||s B A|| / ||W|| {min(shifts):.2g} to {max(shifts):.2g}")
    lines = [", ".join(parts)]
    if record["loss_after"] is not None:
        before, after = record["loss_before"], record["loss_after"]
        fall = f"init: loss on its {record['examples']} examples {before:.4f} -> {after:.4f}"
        if record["predicted_decrease"]:
            change = f"fell by {before - after:.4f}" if after <= before else f"rose by {after - before:.4f}"
            fall += f" ({change}; the first order predicts a fall by {record['predicted_decrease']:.4f})"
        lines.append(fall)
    if record["searched"]:
        losses = sorted(record["searched"]["losses"].items())
        tried = ", ".join(f"{gamma:.4g}: " + (f"{loss:.4f}" if loss is not None else "nan") for gamma, loss in losses)
        others = record["searched"]["other_examples"]
        where = f"{others} other training examples" if others else "these examples"
        lines.append(f"init: searched gamma = {record['searched']['gamma']:.4g}, the lowest loss on {where} ({tried})")
    lines += [f"WARNING: {warning}" for warning in record["warnings"]]
    return "\n".join(lines)


def cache_key(
    run: RunConfig, init: Any, probe: Probe | None, record: dict[str, Any], base: nn.Module
) -> dict[str, Any]:
    """Everything that a start's factors depend on, by the names of the configuration."""
    origin = record["provenance"]
    settings = dataclasses.asdict(dataclasses.replace(init, seed=init_seed(run)))
    adapter = ("lora_r", "lora_alpha", "use_rslora", "lora_target_modules", "lora_xs", "dora")
    return {
        "model.name": origin["fingerprints"].get("model.name", run.model.name),
        "model.revision": getattr(base.config, "_commit_hash", None) or run.model.revision,
        "model.bf16": run.model.bf16,
        "model.type": run.model.type,
        "model.quantization": run.model.quantization,
        "model.seed": run.training_seed if run.model.type == "SequenceClassification" else None,  # of a new head
        **{f"peft.{name}": getattr(run.peft, name) for name in adapter},
        **{f"init.{name}": value for name, value in settings.items() if name not in {"cache", "memory"}},
        "examples": content_of([*probe.batches, *(probe.search or ())]) if probe else None,
        "with the gradient's vectors": probe.vectors if probe else False,
        **{f"version of {name}": origin["versions"][name] for name in STARTED_BY},
        "code": source_fingerprint(),
    }


def fine_tune(experiment: Experiment, model: nn.Module, tracker: Tracker) -> None:
    """Train, unless epochs=0, and evaluate what came out."""
    run, folder, validation = experiment.run, experiment.folder, experiment.validation
    processes = Processes.current()
    begun = folder.read()
    tracker.summarize({name: begun.get(name) for name in ("trainable_parameters", "init")})
    done = {"steps": 0, "seconds": 0.0, "tokens": 0}
    if run.model.epochs > 0:
        done = train(
            model,
            experiment.splits.train,
            run,
            evaluate=validation if validation else None,
            checkpoints=folder.checkpoints,
            pad_id=experiment.encoder.pad_id,
            tracker=tracker,
            processes=processes.count,
            keep=partial(keep_epoch, experiment, model) if run.model.keep_epochs else None,
            gradients=checkpoints.load_factors(folder.gradient_vectors),
        )
    lines = read_metrics(folder.metrics)
    last = processes.gathered(next((line for line in reversed(lines) if "eval_loss" in line), {}))[0]
    if last.get("step") == done["steps"]:
        final = {name: value for name, value in last.items() if name.startswith("eval_")}
    else:
        final = validation(model)
        tracker.log(done["steps"], final)
    if processes.rank > 0:
        return
    losses = [line["loss"] for line in lines if "loss" in line]
    folder.update(
        train=done | first_and_last(losses),
        evaluation=folder.read()["evaluation"] | {"final": final},
    )


def keep_epoch(experiment: Experiment, model: nn.Module, epoch: int) -> None:
    """epochs/<n>: what adapter/ would be if training ended here; of full fine-tuning its weights, in fp32."""
    if Processes.current().rank > 0:
        return
    folder, place = experiment.folder, experiment.folder.epochs / str(epoch)
    if experiment.run.peft.use_peft:
        checkpoints.save_adapter(model, place, checkpoints.load_factors(folder.initial_factors))
    else:
        checkpoints.save_merged(model, experiment.encoder.tokenizer, place)


def save(experiment: Experiment, model: nn.Module) -> None:
    """adapter/, the plot and, if asked for, merged_checkpoint/; the first of several processes writes them."""
    if Processes.current().rank > 0:
        return
    run, folder = experiment.run, experiment.folder
    artifacts = {"plot": "curves.png"}
    if run.peft.use_peft:
        checkpoints.save_adapter(model, folder.adapter, checkpoints.load_factors(folder.initial_factors))
        artifacts["adapter"] = folder.adapter.name
    plot_run(read_metrics(folder.metrics), folder.path / "curves.png", folder.path.parent.name)
    if not run.peft.use_peft:
        model = model.to(DTYPES["bf16"]) if run.model.bf16 else model
        checkpoints.save_merged(model, experiment.encoder.tokenizer, folder.merged)
        artifacts["merged_checkpoint"] = folder.merged.name
    elif run.model.saving:
        if folder.initial_factors.exists():  # the base in memory is W - s B0 A0, rounded; the adapter belongs on W
            model.to("meta")  # free the first copy before the second is loaded
            merge(folder, *original(folder))
        else:
            merge(folder, checkpoints.bare(model), experiment.encoder.tokenizer)
        artifacts["merged_checkpoint"] = folder.merged.name
    folder.update(artifacts=artifacts)


def merge_run(folder: RunFolder) -> None:
    """Write merged_checkpoint/ of a finished run; full fine-tuning has left it.

    Raises RunError: it is not finished, or that is gone.
    """
    record = folder.read()
    if record.get("status") != "finished":
        raise RunError(f"{folder.path} is no finished run (status {record.get('status')}): run it first, then merge")
    if not record["config"]["peft"]["use_peft"] and folder.merged.exists():
        print(f"nothing to merge: every weight was trained, and {folder.merged} holds them")
        return
    if not record["config"]["peft"]["use_peft"]:
        raise RunError(f"every weight was trained, and {folder.merged} is gone: overwrite=true trains anew")
    merge(folder, *original(folder))
    folder.update(artifacts=record["artifacts"] | {"merged_checkpoint": folder.merged.name})
    print(f"merged: {folder.merged}")


def merge(folder: RunFolder, base: nn.Module, tokenizer: Any) -> None:
    """Write merged_checkpoint/, the original base with adapter/. Every merge, in a run or after it, is done here."""
    model = checkpoints.load_adapter(checkpoints.dequantized(base), folder.adapter)
    checkpoints.save_merged(checkpoints.merge_adapter(model), tokenizer, folder.merged)


def original(folder: RunFolder) -> tuple[nn.Module, Any]:
    """Load the base and the tokenizer that a run began with, by its run.json.

    Raises RunError: the model's folder has other content now.
    """
    record = folder.read()
    model, origin = record["config"]["model"], record["provenance"]
    name = origin["model_folder"] or model["name"]
    if origin["model_folder"] and fingerprint(Path(name)) != origin["fingerprints"]["model.name"]:
        raise RunError(f"the model in {name} is no longer the one that {folder.path} was trained on: put that one back")
    dtype = "bf16" if model["bf16"] else "fp32"
    labels = head_labels(model["type"], record["config"]["dataset"]["name"])
    options = {"dtype": dtype, "quantization": model["quantization"], "model_type": model["type"], "labels": labels}
    tokenizer = load_tokenizer(name, model["revision"], model["type"])
    base = load_model(name, model["revision"], **options)
    return (padded_with(base, pad_id_of(tokenizer)) if labels else base), tokenizer


def close(run: RunConfig, folder: RunFolder) -> None:
    """Say what was done, where it lies, and what comes next."""
    if Processes.current().rank > 0:
        return
    record = folder.read()
    print(f"\n{record['init']['method']} on {run.dataset.name}, {run.model.name}, seed {run.seed}: finished")
    for name, title in (
        ("start", "pretrained"),
        ("init", "after the initialisation alone"),
        ("final", "after training"),
    ):
        result = record["evaluation"].get(name, {})
        trained = name != "final" or record["train"]["steps"] > 0
        if "eval_accuracy" in result and trained:
            error = 100 * result["eval_accuracy_stderr"]
            print(f"  exact match, {title:31s} {100 * result['eval_accuracy']:6.2f} +- {error:.2f} %")
    if record["train"]["first_loss"] is not None:
        done = record["train"]
        fall = f"{done['first_loss']:.3f} -> {done['last_loss']:.3f}"
        print(f"  training loss {fall} in {done['steps']} steps, {done['seconds']:.0f} s")
    if "eval_loss" in record["evaluation"]["final"]:
        print(f"  validation loss {record['evaluation']['final']['eval_loss']:.3f}")
    for warning in record["init"].get("warnings", ()):
        print(f"  WARNING: {warning}")
    for name, place in record["artifacts"].items():
        print(f"  {name:18s} {folder.path / place}")
    if run.model.quantization:
        print(f"  note: adapter/ belongs on the base quantised to {run.model.quantization} by bitsandbytes, as here")
    if "merged_checkpoint" in record["artifacts"]:
        script = f"eval_glue.py --dataset={run.dataset.name}" if run.dataset.name in glue.SETS else "eval_gsm8k.py"
        print(f"  next: python eval/{script} --model_name={quote(str(folder.merged))}")
    else:
        print(f"  next: python scripts/merge.py {quote(str(folder.path))}")
    print(f"run: {folder.run_json}")
