"""Callbacks of the training: records, diagnostics, signals, early stopping, lines on the screen."""

import math
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import speed_metrics

from lora_one.adaptation.layers import FactorPairs, factors_of, lora_layers
from lora_one.adaptation.protocol import Adaptation
from lora_one.diagnostics import layer_diagnostics
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.interruption import asked
from lora_one.records.tracking import Tracker

SHOWN = ("loss", "eval_loss", "eval_accuracy")  # of the logged numbers, on the screen


class Recorder(TrainerCallback):
    """Writes every logged number to the tracker, and ends a run whose loss is not finite."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.rates: dict[str, float] = {}
        self.began, self.tokens_before = time.time(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.tokens_before = time.time(), state.num_input_tokens_seen

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Keep the learning rates of this step, if of several groups; the schedule moves on before the log."""
        groups = optimizer.param_groups
        if len(groups) > 1:
            self.rates = {f"learning_rate_{group['name']}": group["lr"] for group in groups}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
            return  # the Trainer's closing summary; run.json has its own
        self.tracker.log(state.global_step, logs | self.seen(state, logs))
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} at step {state.global_step}: lower model.learning_rate "
                f"(now {args.learning_rate:g}), raise model.warmup or lower model.max_grad_norm"
            )

    def seen(self, state: Any, logs: dict[str, Any]) -> dict[str, Any]:
        """Return the tokens seen and, of a training step, its speed and the learning rates of several groups."""
        tokens = {"num_input_tokens_seen": state.num_input_tokens_seen}
        if "learning_rate" not in logs:
            return tokens
        since = state.num_input_tokens_seen - self.tokens_before
        return tokens | speed_metrics("train", self.began, num_tokens=since) | self.rates


class Watcher(TrainerCallback):
    """Writes diagnostics of the adapters to the tracker every so many optimizer steps, in the main process only.

    gradients: (U_r, Vh_r) by layer, as the start saw them; empty where it saw no gradient.
    """

    def __init__(self, model: nn.Module, every: int, gradients: FactorPairs, tracker: Tracker):
        self.model, self.every, self.gradients, self.tracker = model, every, gradients, tracker

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.look(state.global_step)

    def look(self, step: int) -> None:
        if self.tracker.active:
            layers = {name: factors_of(layer) for name, layer in lora_layers(self.model).items()}
            found = {name: layer_diagnostics(factors, self.gradients.get(name)) for name, factors in layers.items()}
            self.tracker.log_layers(step, found)


class Stopper(TrainerCallback):
    """Ends training after the step in which a signal came, with a resume point."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        signals = [number for number in Processes.current().gathered(asked()) if number]
        if signals:
            self.signal = signals[0]
            control.should_save = control.should_training_stop = True


class AfterStep(TrainerCallback):
    """Lets the adaptation act after every optimizer step, while the gradients exist."""

    def __init__(self, adaptation: Adaptation):
        self.adaptation = adaptation

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.adaptation.after_step(getattr(model, "module", model), state.global_step)


class EarlyStopping(TrainerCallback):
    """Ends training when the last ``patience`` evaluations have not improved on the lowest eval_loss before them.

    The evaluations are read from the Trainer's log, which resume points contain.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if since_best >= self.patience:
            control.should_training_stop = True


class EpochEnds(TrainerCallback):
    """Calls ``keep(n)`` after the n-th epoch."""

    def __init__(self, an_epoch: int, keep: Callable[[int], None]):
        self.an_epoch, self.keep = an_epoch, keep

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.an_epoch == 0:
            self.keep(state.global_step // self.an_epoch)


class Lines(TrainerCallback):
    """Prints about twenty lines in all, in place of a bar, where there is no terminal, as in a batch job."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        every = max(1, state.max_steps // 20)
        if "eval_loss" in logs or ("loss" in logs and state.global_step % every == 0):
            shown = [f"{name} {logs[name]:.3f}" for name in SHOWN if name in logs]
            print(f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}", flush=True)


class Bar(ProgressCallback):
    """The Trainer's progress bar, which shows the last loss instead of printing a line for every step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.3f}" for name in SHOWN if name in logs}
            if shown:
                self.training_bar.set_postfix(shown, refresh=False)
