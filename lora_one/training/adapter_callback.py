"""A callback of the Trainer, and of TRL's trainers, that saves the adapter for the original base."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_one.adaptation.checkpoints import folder_for_an_adapter, save_adapter
from lora_one.adaptation.origin import allow_plain_saving, is_wrapped, warn_of_plain_saving
from lora_one.adaptation.resuming import check_start, write_start
from lora_one.errors import UsageError


class AdapterCallback(TrainerCallback):
    """Write the adapter as plain LoRA for the original base, with each checkpoint and at the end of training.

    The checkpoints of the Trainer contain the factors that are trained, as resuming needs them. For a method that
    changes the base or trains a core, they are not for the original base; this folder is. If the base was changed,
    (B0, A0) are added to each checkpoint, and resuming with another base raises RunError; see ``start_of_checkpoint``.

    path: the folder, not the Trainer's output_dir or one above it; None: ``adapter`` in the Trainer's output_dir.
    data: for the model card, see ``save_adapter``.
    """

    def __init__(self, path: Path | str | None = None, data: str | None = None):
        self.path, self.data = path, data

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if is_wrapped(model):
            self.folder(args)
            if state.global_step > 0:
                check_start(model, checkpoint_of(args, state))
            allow_plain_saving(model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and is_wrapped(model):
            write_start(model, checkpoint_of(args, state))
        self.save(args, state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.save(args, state, model)
        if is_wrapped(model):
            warn_of_plain_saving(model)

    def save(self, args: Any, state: Any, model: Any) -> None:
        """Write the folder, in the first process only."""
        if state.is_world_process_zero and is_wrapped(model):
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            results = {"optimizer steps": state.global_step}
            if losses:
                results |= {"first logged training loss": f"{losses[0]:.4g}", "last": f"{losses[-1]:.4g}"}
            save_adapter(model, self.folder(args), data=self.data, results=results)

    def folder(self, args: Any) -> Path:
        """Return the folder. Raises UsageError: it contains the Trainer's own adapter, or other files."""
        output = Path(args.output_dir).resolve()
        folder = folder_for_an_adapter(output / "adapter" if self.path is None else self.path)
        if folder == output or folder in output.parents:
            raise UsageError(
                f"AdapterCallback: path={self.path} is the Trainer's output_dir={args.output_dir}, or a folder above "
                "it, where the Trainer writes its own files: pass another folder, or None for output_dir/adapter"
            )
        return folder


def checkpoint_of(args: Any, state: Any) -> Path:
    """Return the Trainer's checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
