"""What happens beside the steps of the training loop: records, looks, signals, budgets, lines on the screen."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from lora_one.adaptation.layers import FactorPairs, factors_of, lora_layers
from lora_one.adaptation.protocol import Adaptation
from lora_one.diagnostics import layer_diagnostics
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.interruption import asked
from lora_one.records.tracking import Tracker

SHOWN = ("loss", "eval_loss", "eval_accuracy")  # of the logged numbers, on the screen


class Recorder(TrainerCallback):
    """Hands every logged number to the tracker and stops a run whose loss is no number any more."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.rates: dict[str, float] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Keep the learning rates of this step, of several groups; the schedule moves on before the log."""
        groups = optimizer.param_groups
        if len(groups) > 1:
            self.rates = {f"learning_rate_{group['name']}": group["lr"] for group in groups}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
            return  # the Trainer's closing summary; run.json has its own
        self.tracker.log(state.global_step, logs | self.rates if "learning_rate" in logs else logs)
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} at step {state.global_step}: lower model.learning_rate "
                f"(now {args.learning_rate:g}), raise model.warmup or lower model.max_grad_norm"
            )


class Watcher(TrainerCallback):
    """Hands what the adapters look like to the tracker every so many optimizer steps; only the main process looks.

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
    """Asked to end by a signal: this step is the last one, and it leaves a resume point."""

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


class EpochEnds(TrainerCallback):
    """Calls ``keep(n)`` when the n-th epoch is through."""

    def __init__(self, an_epoch: int, keep: Callable[[int], None]):
        self.an_epoch, self.keep = an_epoch, keep

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.an_epoch == 0:
            self.keep(state.global_step // self.an_epoch)


class Lines(TrainerCallback):
    """Without a terminal, a line now and then instead of a bar: logs of a batch job stay readable."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        every = max(1, state.max_steps // 20)
        if "eval_loss" in logs or ("loss" in logs and state.global_step % every == 0):
            shown = [f"{name} {logs[name]:.3f}" for name in SHOWN if name in logs]
            print(f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}", flush=True)


class Bar(ProgressCallback):
    """The Trainer's bar with the last loss beside it instead of a line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.3f}" for name in SHOWN if name in logs}
            if shown:
                self.training_bar.set_postfix(shown, refresh=False)
