"""The loop against a hand-written one: same batches, same loss, same weights."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from lora_one import peers
from lora_one.data.encode import Encoded, batches_of
from lora_one.errors import RunError, UsageError
from lora_one.files import read_lines
from lora_one.initialization.methods import build_init
from lora_one.initialization.start import attach_adapters
from lora_one.losses import loss_count, loss_sum, targets
from lora_one.optim import build_optimizer, create_scaled_optimizer
from lora_one.records.tracking import Tracker
from lora_one.training.callbacks import Recorder
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train
from lora_one.training.trainer import FineTuner
from tests.helpers.examples import examples
from tests.helpers.models import random_llama, random_t5
from tests.helpers.runs import adaptation_for
from tests.helpers.training import adapted, settings, trained


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("per_device", [1, 3, 6])
def test_equals_a_hand_written_loop(tmp_path, reduction, per_device):
    """One full batch an epoch: AdamW on the mean over the global batch, however it is cut into micro-batches.

    With a large epsilon, so that rounding in a gradient near zero does not become a whole step.
    """
    smooth = "optimizer.eps=1e-3"
    run = settings(f"model.loss={reduction}", f"model.per_device_batch_size={per_device}", "model.epochs=3", smooth)
    data = examples(6)
    factors, losses = trained(run, tmp_path, data)
    model = adapted(run)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, weight_decay=0.0)
    (batch,) = batches_of(data, 6, 0)
    expected = []
    for _ in range(3):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = loss_sum(logits, targets(batch), reduction) / loss_count(targets(batch), reduction)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(factors[name], parameter, rtol=1e-3, atol=1e-4, msg=name)


def test_loraplus_gives_b_its_ratio_of_the_learning_rate(tmp_path):
    run = settings("peft.use_loraplus=true", "peft.loraplus_lr_ratio=4")
    model = adapted(run)
    rates = {id(p): g["lr"] for g in build_optimizer(model, run).param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(4e-2 if "lora_B" in name else 1e-2)


@pytest.mark.parametrize("name", ["adamw", "scaled_adamw", "scaled_gd", "sgd"])
def test_learning_rates_of_all_groups_are_logged(tmp_path, name):
    """Of the very step; `learning_rate` stays the one that the settings name."""
    changes = (f"optimizer={name}", "model.epochs=4", "model.scheduler=linear", "model.prec_reg=1")
    tracker = Tracker(tmp_path / "metrics.jsonl")
    for loraplus in (False, True):
        run = settings(*changes, f"peft.use_loraplus={loraplus}", "peft.loraplus_lr_ratio=4")
        folder = tmp_path / str(loraplus)
        train(
            adapted(run),
            examples(6),
            TrainingJob(run, adaptation_for(run), checkpoints=folder, pad_id=0, tracker=tracker),
        )
    one, two = (read_lines(tracker.path)[start : start + 4] for start in (0, 4))
    assert [line["learning_rate"] for line in one] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert not any(key.startswith("learning_rate_") for line in one for key in line)
    for line, plain in zip(two, one, strict=True):
        assert line["learning_rate"] == line["learning_rate_others"] == plain["learning_rate"]
        assert line["learning_rate_lora_B"] == pytest.approx(4 * line["learning_rate"])


@pytest.mark.parametrize("name", ["lora_pro", "lora_muon", "lora_rite"])
def test_optimizers_of_pairs_step_other_parameters_at_their_own_rate(tmp_path, name):
    """The rate of the pairs is the one that the settings name; DoRA's magnitudes have optimizer.others_lr."""
    changes = (f"optimizer={name}", "optimizer.others_lr=1e-3", "peft=dora", "model.weight_decay=0.1")
    run = settings(*changes, "model.epochs=4", "model.scheduler=linear")
    tracker = Tracker(tmp_path / "metrics.jsonl")
    model = adapted(run)
    train(model, examples(6), TrainingJob(run, adaptation_for(run), checkpoints=tmp_path, pad_id=0, tracker=tracker))
    lines = read_lines(tracker.path)
    for key, first in (("learning_rate", 1e-2), ("learning_rate_pairs", 1e-2), ("learning_rate_others", 1e-3)):
        assert [line[key] for line in lines] == pytest.approx([first * share for share in (1, 0.75, 0.5, 0.25)])
    pairs, others = build_optimizer(model, run).param_groups
    assert pairs["weight_decay"] == others["weight_decay"] == 0.1
    assert {id(p) for p in others["params"]} == {id(p) for n, p in model.named_parameters() if "magnitude" in n}


def test_scaled_optimizer_of_the_settings_equals_a_hand_written_loop(tmp_path):
    """Clipped first, then preconditioned, with LoRA+ and the keys of conf/optimizer."""
    keys = (
        "optimizer.eps=1e-4",
        "optimizer.damping=relative",
        "optimizer.order=sequential",
        "optimizer.correct_bias=true",
    )
    changes = ("optimizer=scaled_adamw", "model.prec_reg=0.1", "model.weight_decay=0.1", "peft.use_loraplus=true")
    run = settings("model.epochs=3", "model.max_grad_norm=0.1", "init=gaussian", *changes, *keys)
    data = examples(6)
    factors, _ = trained(run, tmp_path, data)
    model = adapted(run)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in named.items() if ("lora_B" in n) == up], "lr": rate}
        for up, rate in ((False, 1e-2), (True, 1.6e-1))
    ]
    options = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "reg": 0.1, "damping": "relative", "order": "sequential"}
    optimizer = create_scaled_optimizer(model, torch.optim.AdamW, params=groups, **options)
    (batch,) = batches_of(data, 6, 0)
    for _ in range(3):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        (loss_sum(logits, targets(batch), "token") / loss_count(targets(batch), "token")).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in named.items():
        torch.testing.assert_close(factors[name], parameter, rtol=1e-3, atol=1e-4, msg=name)


def test_loraplus_without_a_b_that_trains_is_refused():
    run = settings("peft.use_loraplus=true")
    model = adapted(run)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    with pytest.raises(UsageError, match=r"use_loraplus=True .* no lora_B .*: set peft.use_loraplus=false"):
        build_optimizer(model, run)


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path, monkeypatch):
    """The losses equal those of one GPU, and the model always runs under autocast."""
    run = settings("model.bf16=true", "model.per_device_batch_size=2", "model.epochs=2")
    _, expected = trained(run, tmp_path / "one", examples(6))
    autocast = []
    original = LlamaForCausalLM.forward

    def forward(self, *args, **inputs):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return original(self, *args, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    _, losses = trained(run, tmp_path / "two", examples(6))
    assert autocast and all(autocast)
    assert losses == expected


def test_gradient_checkpointing_changes_no_number(tmp_path):
    data = examples(6)
    plain, _ = trained(settings("model.epochs=2"), tmp_path / "plain", data)
    saved, _ = trained(settings("model.epochs=2", "model.gradient_checkpointing=true"), tmp_path / "saved", data)
    for name in plain:
        torch.testing.assert_close(plain[name], saved[name], msg=name)


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize(
    "changes",
    [
        ("model.per_device_batch_size=2",),
        ("model.per_device_batch_size=6",),
        ("model.packing=true",),
        ("model.gradient_checkpointing=true",),
    ],
    ids=lambda changes: changes[0],
)
def test_losses_step_by_step_do_not_depend_on_how_a_batch_is_cut(tmp_path, changes, reduction):
    """Two epochs of batches of 6, 6 and 4, against one example at a time."""
    common = ("model.epochs=2", f"model.loss={reduction}", "model.learning_rate=1e-3")
    one, expected = trained(settings(*common, "model.per_device_batch_size=1"), tmp_path / "one", examples(16))
    many, losses = trained(settings(*common, *changes), tmp_path / "many", examples(16))
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 6
    for name, factor in one.items():
        torch.testing.assert_close(many[name], factor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_resumed_within_an_epoch_ends_with_the_same_bits(tmp_path, monkeypatch, packing):
    """Micro-batches of 2 in batches of 6, 6 and 4; stopped in the second epoch, whose order is another."""
    changes = ("model.per_device_batch_size=2", "model.epochs=3", "model.save_steps=2", "peft.lora_dropout=0.1")
    run = settings(*changes, f"model.packing={packing}")
    straight, losses = trained(run, tmp_path / "straight", examples(16))
    original = Recorder.on_log

    def stop(self, args, state, control, **rest):
        original(self, args, state, control, **rest)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "on_log", stop)
        trained(run, tmp_path / "stopped", examples(16))
    resumed, again = trained(run, tmp_path / "stopped", examples(16))
    assert again == losses
    assert all(torch.equal(resumed[name], factor) for name, factor in straight.items())


def test_seconds_include_those_before_a_resumption(tmp_path, monkeypatch):
    """A resume point says how long training took until then; one of an earlier version counts as 0 seconds."""
    run = settings("model.epochs=2", "model.save_steps=1", "model.per_device_batch_size=2")
    original, took = Recorder.on_log, {}

    def stop(self, args, state, control, **rest):
        original(self, args, state, control, **rest)
        if state.global_step == 3:
            raise KeyboardInterrupt

    for earlier in (1000.0, None):
        folder = tmp_path / str(earlier)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Recorder, "on_log", stop)
            trained(run, folder, examples(16))
        (file,) = folder.glob("checkpoints/checkpoint-*/seconds.json")
        assert 0 < float(file.read_text()) < 600
        file.write_text(str(earlier)) if earlier else file.unlink()
        job = TrainingJob(
            run, adaptation_for(run), checkpoints=folder / "checkpoints", pad_id=0, tracker=Tracker(folder / "m.jsonl")
        )
        took[earlier] = train(adapted(run), examples(16), job)["seconds"]
    assert 1000 < took[1000.0] < 1600 and 0 < took[None] < 600


class Casts(TorchDispatchMode):
    """How many tensors were copied to another dtype."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **keywords or {})
        if operation.overloadpacket.__name__ == "_to_copy":
            self.count += result.dtype != arguments[0].dtype
        return result


def narrow_run(monkeypatch, folder, model, changes, *, casting):
    """Factors, losses and casts of three steps on a base in bf16; casting: PEFT casts as it does by itself."""
    casts, step = Casts(), FineTuner.training_step

    def watched(self, *arguments, **rest):
        self.without_casts = [] if casting else self.without_casts
        with casts:
            return step(self, *arguments, **rest)

    run = settings("model.bf16=true", "model.epochs=3", *changes)
    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "training_step", watched)
        model = attach_adapters(model.bfloat16(), adaptation_for(run), build_init(run.init), None, seed=0)[0]
        tracker = Tracker(folder / "metrics.jsonl")
        train(
            model,
            examples(6),
            TrainingJob(run, adaptation_for(run), checkpoints=folder / "points", pad_id=0, tracker=tracker),
        )
    factors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return factors, [line["loss"] for line in read_lines(tracker.path)], casts.count


@pytest.mark.parametrize("changes", [(), ("model.gradient_checkpointing=true",), ("init=gaussian",)], ids=str)
def test_autocast_causes_no_redundant_casts_of_adapter_inputs(tmp_path, monkeypatch, changes):
    """Bitwise equal. In each of 6 micro-batches, every layer saves two casts forward and two backward.

    Only the first block's q, k and v have no input to give a gradient to.
    """
    factors, losses, casts = narrow_run(monkeypatch, tmp_path / "ours", random_llama(), changes, casting=False)
    expected, before, more = narrow_run(monkeypatch, tmp_path / "peft", random_llama(), changes, casting=True)
    assert losses == before
    assert all(torch.equal(factors[name], factor) for name, factor in expected.items())
    assert more - casts >= 6 * (14 * 2 + (14 - 3) * 2)


@pytest.mark.parametrize("changes", [("peft.lora_dropout=0.1",), ("peft=dora",)], ids=str)
def test_casts_that_change_the_result_are_kept(tmp_path, monkeypatch, changes):
    casts = [
        narrow_run(monkeypatch, tmp_path / str(casting), random_llama(), changes, casting=casting)[2]
        for casting in (False, True)
    ]
    assert casts[0] == casts[1]


def test_outside_of_training_steps_adapters_take_any_input(tmp_path):
    """A model that generates during the evaluation runs without autocast."""
    run = settings("model.bf16=true")
    model = attach_adapters(random_llama().bfloat16(), adaptation_for(run), build_init(run.init), None, seed=0)[0]
    seen = []

    def evaluate(model):
        seen.append(model.get_base_model()(input_ids=torch.tensor([[2, 3, 4]])).logits)
        return {"eval_loss": 1.0}

    tracker = Tracker(tmp_path / "metrics.jsonl")
    train(
        model,
        examples(6),
        TrainingJob(
            run, adaptation_for(run), evaluate=evaluate, checkpoints=tmp_path / "points", pad_id=0, tracker=tracker
        ),
    )
    assert seen[0].dtype == torch.bfloat16


class Waits(TorchDispatchMode):
    """Names of the operations whose result the host would wait for, were their tensors on a GPU."""

    READ = ("_local_scalar_dense", "nonzero", "is_nonzero", "bincount", "unique", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.overloadpacket.__name__
        chosen = arguments[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(tensor is not None and tensor.dtype == torch.bool for tensor in chosen)
        if by_mask or name.strip("_").startswith(self.READ) or name in self.READ:
            self.found.append(name)
        return operation(*arguments, **keywords or {})


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("per_device", [1, 3])
def test_training_step_does_not_synchronise_with_the_device(tmp_path, monkeypatch, reduction, per_device):
    """Counts and positions come from the collator; results on the device are never read."""
    waits = Waits()

    def watch(name):
        original = getattr(FineTuner, name)

        def watched(self, *arguments, **rest):
            with waits:
                return original(self, *arguments, **rest)

        monkeypatch.setattr(FineTuner, name, watched)

    watch("training_step")
    watch("count_batches")
    run = settings("model.epochs=2", f"model.loss={reduction}", f"model.per_device_batch_size={per_device}")
    trained(run, tmp_path, examples(16))
    assert waits.found == []


def test_tokens_of_an_encoder_decoder_are_those_of_both_sides(tmp_path):
    data = [Encoded(e.input_ids, e.input_ids[:4], [0, *e.input_ids[:3]]) for e in examples(6)]
    run = settings("model.type=ConditionalGeneration", "init=default")
    model = attach_adapters(random_t5(), adaptation_for(run), build_init(run.init), None, seed=0)[0]
    tracker = Tracker(tmp_path / "metrics.jsonl")
    done = train(
        model, data, TrainingJob(run, adaptation_for(run), checkpoints=tmp_path / "points", pad_id=0, tracker=tracker)
    )
    assert done["tokens"] == sum(len(e.input_ids) + 4 for e in data)


def test_tokens_are_counted_without_padding(tmp_path):
    data = examples(16)
    for packing in (False, True):
        folder = tmp_path / str(packing)
        run = settings("model.epochs=2", f"model.packing={packing}")
        tracker = Tracker(tmp_path / f"{packing}.jsonl")
        done = train(
            adapted(run), data, TrainingJob(run, adaptation_for(run), checkpoints=folder, pad_id=0, tracker=tracker)
        )
        assert done["tokens"] == 2 * sum(len(example.input_ids) for example in data)


def test_a_lost_process_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    """The processes meet after the writing of a resume point, where they notice that one is gone."""
    trainer = object.__new__(FineTuner)
    trainer.args = SimpleNamespace(output_dir=str(tmp_path), should_save=False)
    trainer.state, trainer.model, trainer.checkpoints = SimpleNamespace(global_step=3), None, tmp_path
    trainer.adaptation = SimpleNamespace(saving_state=lambda model: nullcontext())
    monkeypatch.setattr(peers, "_peers", [None])
    for text, kind in (("[gloo] Connection closed by peer", RuntimeError), ("unexpected pos 22 vs 23", RunError)):

        def lost(*_, text=text):
            raise RuntimeError(text)

        monkeypatch.setattr(Trainer, "_save_checkpoint", lost)
        with pytest.raises(RuntimeError) as caught:
            trainer._save_checkpoint(None, None)
        assert type(caught.value) is kind
