"""Callbacks of the Trainer: metrics, diagnostics, signals, early stopping, progress."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import speed_metrics

from lora_one.adaptation.layers import FactorPairs, factors_of, lora_layers
from lora_one.adaptation.protocol import Adaptation
from lora_one.diagnostics import layer_diagnostics
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.interruption import first_signal
from lora_one.progress import Progress
from lora_one.records.tracking import Tracker


class Recorder(TrainerCallback):
    """Write the logged metrics to the tracker, and stop a run whose loss is not finite."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.rates: dict[str, float] = {}
        self.began, self.tokens_before = time.time(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.tokens_before = time.time(), state.num_input_tokens_seen

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Store the learning rates of several groups; the schedule changes them before they are logged."""
        groups = optimizer.param_groups
        if len(groups) > 1:
            self.rates = {f"learning_rate_{group['name']}": group["lr"] for group in groups}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
            return  # the Trainer's final summary; run.json has its own
        self.tracker.log(state.global_step, logs | self.progress(state, logs))
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} at step {state.global_step}: lower model.learning_rate "
                f"(now {args.learning_rate:g}), raise model.warmup, or lower model.max_grad_norm"
            )

    def progress(self, state: Any, logs: dict[str, Any]) -> dict[str, Any]:
        """Return the tokens seen and, for a training step, the speed and the learning rates of several groups."""
        tokens = {"num_input_tokens_seen": state.num_input_tokens_seen}
        if "learning_rate" not in logs:
            return tokens
        since = state.num_input_tokens_seen - self.tokens_before
        return tokens | speed_metrics("train", self.began, num_tokens=since) | self.rates


class DiagnosticsLogger(TrainerCallback):
    """Log diagnostics of the adapters every ``every`` optimizer steps; only the main process logs.

    gradients: (U_r, Vh_r) of each layer's initial gradient; empty if the start did not use a gradient.
    """

    def __init__(self, model: nn.Module, every: int, gradients: FactorPairs, tracker: Tracker):
        self.model, self.every, self.gradients, self.tracker = model, every, gradients, tracker

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.log(state.global_step)

    def log(self, step: int) -> None:
        """Compute and log the diagnostics of all layers after a step."""
        if self.tracker.active:
            layers = {name: factors_of(layer) for name, layer in lora_layers(self.model).items()}
            diagnostics = {name: layer_diagnostics(pair, self.gradients.get(name)) for name, pair in layers.items()}
            self.tracker.log_layers(step, diagnostics)


class StopOnSignal(TrainerCallback):
    """Stop training with a resume point after the step in which a signal arrived, on any process."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        signals = [number for number in Processes.current().gathered(first_signal()) if number]
        if signals:
            self.signal = signals[0]
            control.should_save = control.should_training_stop = True


class AfterStep(TrainerCallback):
    """Call ``Adaptation.after_step`` after every optimizer step, while the gradients exist."""

    def __init__(self, adaptation: Adaptation):
        self.adaptation = adaptation

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.adaptation.after_step(getattr(model, "module", model), state.global_step)


class EarlyStopping(TrainerCallback):
    """Stop training when patience is `exhausted`, by the Trainer's log, which resume points contain."""

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if exhausted(state.log_history, self.patience):
            control.should_training_stop = True


def exhausted(log: Sequence[dict[str, Any]], patience: int) -> bool:
    """Return whether the last ``patience`` evaluations of a log have not improved on the lowest eval_loss before."""
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


class AfterEpoch(TrainerCallback):
    """Call ``keep(n)`` after the n-th epoch."""

    def __init__(self, epoch_steps: int, keep: Callable[[int], None]):
        self.epoch_steps, self.keep = epoch_steps, keep

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.epoch_steps == 0:
            self.keep(state.global_step // self.epoch_steps)


class TrainingProgress(TrainerCallback):
    """Count the optimizer steps, with the last loss, and print a line for each evaluation."""

    def __init__(self, shown: Progress, accuracy_name: str):
        self.shown, self.accuracy_name = shown, accuracy_name

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.shown.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.shown.facts["loss"] = f"{logs['loss']:.3f}"
        printed = {"eval_loss": "validation loss", "eval_accuracy": self.accuracy_name}
        measured = [f"{name} {logs[key]:.3f}" for key, name in printed.items() if key in logs]
        if measured:
            self.shown.note(f"step {state.global_step} of {state.max_steps}: {', '.join(measured)}")
