"""``initialize_adapters``: the start for people with their own training loop."""

import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from peft import LoHaConfig, LoraConfig, PeftModel
from torch.utils.data import DataLoader

from lora_one import AdapterFactors, initialize_adapters, save_adapter
from lora_one.adaptation import layers as adapters
from lora_one.config.defaults import choices_of_init, defaults_of
from lora_one.data.encode import Encoded, batches_of
from lora_one.errors import RunError, UsageError
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from lora_one.training.arguments import CHECKPOINTING
from tests.helpers.examples import autograd_gradients, examples
from tests.helpers.models import random_deepseek, random_llama, random_mixtral, random_roberta, random_t5
from tests.helpers.paths import ROOT
from tests.helpers.runs import adaptation_for, composed, run_config

TARGETS = ["q_proj", "down_proj"]
IDS = torch.arange(3, 40).reshape(1, -1)


def lora(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": TARGETS} | changes)


def batches(count=5, size=2):
    return batches_of(examples(count), size, 0)


def factors_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def test_gives_the_factors_of_a_run():
    """The same factors, bit for bit, as run_exp.py's own way with the same settings."""
    run = run_config(f"peft.lora_target_modules=[{','.join(TARGETS)}]", "peft.lora_r=4", "peft.lora_alpha=8")
    expected, _ = attach_adapters(
        random_llama(), adaptation_for(run), build_init(run.init), Probe(batches(), "example"), seed=3
    )
    found = initialize_adapters(random_llama(), lora(), batches(), examples=None, seed=3)
    assert isinstance(found, PeftModel) and factors_of(found).keys() == factors_of(expected).keys()
    assert all(torch.equal(value, factors_of(expected)[name]) for name, value in factors_of(found).items())


def test_takes_numbers_of_numpy():
    plain = initialize_adapters(random_llama(), lora(), batches(), examples=None, stable_gamma=16.0, seed=3)
    found = initialize_adapters(
        random_llama(), lora(), batches(), examples=None, stable_gamma=np.float64(16), seed=np.int64(3)
    )
    assert all(torch.equal(value, factors_of(plain)[name]) for name, value in factors_of(found).items())


@pytest.mark.parametrize("method", ["LoRA-One", "LoRA-GA"])
@pytest.mark.parametrize("memory", ["auto", "low"])
def test_autocast_around_the_call_changes_nothing(method, memory):
    """The same factors and the same base, bit for bit, as outside of the region."""
    config = lora(target_modules="all-linear")

    def start():
        return initialize_adapters(random_llama(), config, batches(), examples=None, method=method, memory=memory)

    expected = start().state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = start().state_dict()
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_defaults_are_those_of_the_configuration():
    init = OmegaConf.load(ROOT / "conf/init/gradient.yaml")
    parameters = inspect.signature(initialize_adapters).parameters
    assert parameters["examples"].default == init.bsz * init.iters and parameters["method"].default == init.direction
    for path in sorted((ROOT / "conf/init").glob("[!_]*.yaml")):
        if path.stem in choices_of_init().values():
            composed_init = OmegaConf.to_container(composed(f"init={path.stem}").init)
            assert defaults_of(path.stem) == composed_init, path.stem


@pytest.mark.parametrize(("memory", "held"), [("fast", "device"), ("low", "sketch")])
def test_memory_and_tolerance_arrive_at_layers_of_any_size(memory, held):
    """Also where a layer is too large for an exact SVD."""
    found = []
    initialize_adapters(
        random_llama(hidden_size=272, intermediate_size=288),
        lora(),
        batches(),
        examples=None,
        memory=memory,
        on_start=found.append,
    )
    assert found[0].solution.examples.memory == held


@torch.no_grad()
def test_each_layer_has_its_own_rank_and_scaling():
    """s B A = s/gamma [-G]_r / sigma_1(G) with the r and s that PEFT gives that layer."""
    config = lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})
    with torch.enable_grad():
        gradients = autograd_gradients(random_llama(), examples(), "example")
    model = initialize_adapters(random_llama(), config, batches(), examples=None, stable_gamma=64)
    for name, layer in adapters.lora_layers(model).items():
        r, alpha = (2, 8) if "q_proj" in name else (4, 3)
        U, S, Vh = torch.linalg.svd(-gradients[name], full_matrices=False)
        expected = alpha / r**0.5 / 64 * (U[:, :r] * S[:r] @ Vh[:r]) / S[0]
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert A.shape[0] == r
        torch.testing.assert_close(layer.scaling["default"] * B @ A, expected, rtol=1e-3, atol=1e-6, msg=name)


def test_plain_torch_loop():
    """The README's example: wrap, start, train; the base stays what it was, and plain PEFT saves and loads it."""
    data = DataLoader(examples(16), batch_size=4, collate_fn=lambda rows: batches_of(rows, 4, 0)[0])
    base = random_llama()
    weights = {name: value.clone() for name, value in base.named_parameters()}
    model = initialize_adapters(base, lora(target_modules="all-linear"), data)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        for batch in data:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    for name, value in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, weights[name.replace(".base_layer", "")]), name


def test_takes_as_many_examples_as_asked_for():
    """Eight of the first batches, the last one cut, and eight more for the search if there are so many."""
    drawn, found = [], []

    def loader(count):
        drawn.clear()
        for batch in batches(count, 3):
            drawn.append(batch)
            yield batch

    fixed = {"stable_gamma": 128, "on_start": found.append}
    one = initialize_adapters(random_llama(), lora(), loader(12), **fixed)
    assert len(drawn) == 3 and found[0].solution.examples.examples == 8
    two = initialize_adapters(random_llama(), lora(), batches_of(examples(12)[:8], 8, 0), examples=None, **fixed)
    for count, taken, others in ((24, 6, 8), (12, 4, 0)):
        initialize_adapters(random_llama(), lora(), loader(count), on_start=found.append)
        assert len(drawn) == taken and found[-1].solution.searched_on == others
    for name, value in factors_of(one).items():
        torch.testing.assert_close(value, factors_of(two)[name], rtol=1e-3, atol=1e-5, msg=name)
    with pytest.warns(UserWarning, match="batches contains 5 examples, fewer than examples=8"):
        initialize_adapters(random_llama(), lora(), batches())


def test_a_model_in_training_with_checkpointing_gets_the_same_start():
    expected = factors_of(initialize_adapters(random_llama(), lora(), batches(), examples=None))
    base = random_llama(attention_dropout=0.3).train()
    getattr(base, f"{CHECKPOINTING}_enable")()
    base.enable_input_require_grads()
    for own in (True, False):
        model = initialize_adapters(base, lora(lora_dropout=0.3), batches(), examples=None, checkpointing=own)
        assert model.training and base.is_gradient_checkpointing
        assert all(torch.equal(value, expected[name]) for name, value in factors_of(model).items())
        base = model.unload()


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": False, "rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"use_rslora": False, "alpha_pattern": {"down_proj": 3}},
        {"use_dora": True},
    ],
)
def test_lora_ga_keeps_the_function_and_is_saved_for_the_original_base(tmp_path, config):
    found = []
    settings = {"examples": None, "method": "LoRA-GA", "on_start": found.append}
    model = initialize_adapters(random_llama(), lora(**config), batches(), **settings)
    original = random_llama()(IDS).logits
    torch.testing.assert_close(model.eval()(IDS).logits, original, rtol=1e-4, atol=1e-4)
    for layer in adapters.lora_layers(model).values():
        layer.lora_B["default"].weight += 0.05
    save_adapter(model, str(tmp_path / "adapter"), found[0].initial_factors)
    loaded = PeftModel.from_pretrained(random_llama(), str(tmp_path / "adapter")).eval()(IDS).logits
    trained = model(IDS).logits
    assert (loaded - trained).abs().max() <= 1e-4 * trained.abs().max()
    assert (trained - original).abs().max() > 1e-2 * trained.abs().max()


@torch.no_grad()
def test_dora_and_the_search_come_with_it():
    found = []
    model = initialize_adapters(
        random_llama(), lora(use_dora=True), batches(), examples=None, scale="search", on_start=found.append
    )
    losses = found[0].solution.searched
    assert min(losses.values()) < found[0].solution.examples.loss and 2 <= len(losses) <= 4
    for layer in adapters.lora_layers(model).values():
        moved = layer.get_base_layer().weight + layer.scaling["default"] * (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, moved.norm(dim=1))


def test_adapters_that_are_not_linear_start_as_peft_starts_them():
    model = initialize_adapters(
        random_llama(), lora(target_modules=["q_proj", "embed_tokens"]), batches(), examples=None
    )
    words = model.get_base_model().model.embed_tokens
    assert not words.lora_embedding_A["default"].any() or not words.lora_embedding_B["default"].any()
    assert len(adapters.lora_layers(model)) == 2


def test_quantised_base(tmp_path):
    """4 bit: the gradient goes through the quantised weights, which stay as they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes: pip install -e .[quant]")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    random_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=kind, dtype=torch.float32)
    weights = {name: layer.weight.clone() for name, layer in adapters.target_layers(base, run_config().peft).items()}
    found = []
    model = initialize_adapters(base, lora(), batches(), examples=None, on_start=found.append)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    (batch,) = batches(size=5)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0] and found[0].solution.predicted_decrease > 0
    for name, layer in adapters.lora_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, weights[name]), name


def test_trl_trains_from_the_start(tmp_path, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl", reason="needs trl: pip install -e .[trl]")
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in examples(16)]
    model = initialize_adapters(random_llama(), lora(), batches_of(examples(16), 4, 0))
    start = factors_of(model)
    settings = SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=16, learning_rate=1e-2, report_to="none",
        use_cpu=True, save_strategy="no", logging_steps=1, bf16=False, **{CHECKPOINTING: False},
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, lr_scheduler_type="constant",
    )  # fmt: skip

    def collate(rows):
        return batches_of([Encoded(row["input_ids"], row["labels"]) for row in rows], len(rows), 0)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            data_collator=collate,
        )  # fmt: skip
        at_start = factors_of(trainer.model)
        trainer.train()
    assert all(torch.equal(value, at_start[name]) for name, value in start.items()), "TRL trains from these factors"
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert any(not torch.equal(value, start[name]) for name, value in factors_of(trainer.model).items())


def test_an_own_method_has_a_first_order_decrease_where_the_step_tells_it():
    """<G, s B A> is known if B is in the span of U, whatever A is; of factors elsewhere it is not known."""

    def within(layer, step):
        return AdapterFactors(
            step.U @ drawn(layer, step.U.shape[1], layer.rank), drawn(layer, layer.rank, layer.shape[1])
        )

    def elsewhere(layer, step):
        return AdapterFactors(drawn(layer, layer.shape[0], layer.rank), drawn(layer, layer.rank, layer.shape[1]))

    def drawn(layer, rows, columns):
        return torch.randn(rows, columns, generator=layer.generator)

    found = []
    options = {"examples": None, "on_start": found.append}
    model = initialize_adapters(random_llama(), lora(), batches(), method=within, **options)
    initialize_adapters(random_llama(), lora(), batches(), method=elsewhere, **options)
    G = autograd_gradients(random_llama(), examples(), "example")
    pairs = [(G[name], layer) for name, layer in adapters.lora_layers(model).items()]
    moved = sum(
        (g * (p.scaling["default"] * p.lora_B["default"].weight @ p.lora_A["default"].weight)).sum() for g, p in pairs
    )
    assert found[0].solution.predicted_decrease == pytest.approx(-moved.item(), rel=1e-3)
    assert found[1].solution.predicted_decrease is None


@pytest.mark.parametrize("task", ["MaskedLM", "TokenClassification"])
def test_a_model_with_labels_of_another_task_is_refused_by_methods_with_batches(task):
    """Its labels would be taken for a causal model's, one position later."""
    model = getattr(transformers, f"AutoModelFor{task}").from_config(random_roberta().config).requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(UsageError, match=f"model is a RobertaFor{task}, whose loss is not known here.*no batches"):
        initialize_adapters(model, config, {"input_ids": IDS, "labels": IDS})
    initialize_adapters(model, config, method="pissa")


def test_regression_is_refused():
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(UsageError, match=r"labels are torch.float32, .*regression is not supported"):
        initialize_adapters(random_roberta(), config, {"input_ids": IDS, "labels": torch.tensor([0.5])})


WRONG = [
    ({"method": "LoRA-Two"}, "method=LoRA-Two is not an initialisation; .*valid: .*LoRA-One.*pissa"),
    ({"method": "LoRA-SB"}, "method=LoRA-SB needs eta"),
    ({"method": "pissa", "eta": 1.0}, "eta=1.0 is not used by method=pissa; .*valid: dtype, niter, tolerance"),
    ({"bsz": 4}, "bsz=4 is a setting of a run: pass batches and examples="),
    ({"method": "loftq"}, "method=loftq is not possible here: .*not quantised.*Possible methods: .*lora_one.*pissa"),
    ({"method": "eva", "batches": None}, "method=eva is not possible here: it uses training examples"),
    ({"method": "lora_xs", "config": lora(use_dora=True)}, "method=lora_xs is not possible here: .*remove use_dora"),
    ({"method": "lora_xs", "config": lora(lora_bias=True)}, "method=lora_xs is not possible here: .*remove lora_bias"),
    ({"method": "eva", "config": lora(lora_bias=True)}, "method=eva is not possible here: .*remove lora_bias"),
    ({"method": "eva", "config": lora(layer_replication=[[0, 2], [0, 1]])}, "remove layer_replication"),
    ({"method": "olora", "config": lora(rank_pattern={"q_proj": 2})}, "method=olora is not possible here: .*one rank"),
    ({"method": lambda layer, step: None}, "returned a NoneType for model.layers.0.*return lora_one.AdapterFactors"),
    ({"method": lambda layer, step: AdapterFactors(step.U, step.U)}, r"returned A of shape .*must be \(4, 32\)"),
    ({"batches": ["a text"]}, "a batch is a str, but it must be a dictionary of tensors"),
    ({"scale": "stabel"}, "init.scale=stabel is not a choice"),
    ({"stable_gamma": -1.0}, "init.stable_gamma=-1.0 is out of range: it must be positive"),
    ({"scale": "search", "method": "LoRA-GA"}, "init.scale=search .*set init.scale=stable"),
    ({"config": lora(r=64)}, "^r=64 exceeds the smaller dimension 32 of .*: lower r"),
    ({"config": lora(r=20), "method": "LoRA-GA"}, "^r=20 x 2 .* exceeds the smaller dimension 32"),
    (
        {"config": lora(init_lora_weights="pissa")},
        "LoraConfig.init_lora_weights='pissa' selects another initialisation",
    ),
    ({"config": lora(target_modules=["embed_tokens"])}, "matches no linear layer"),
    ({"config": lora(target_modules=["no_such"])}, "LoraConfig: .*no_such"),
    ({"config": lora(target_modules=["q_proj", "embed_tokens"]), "method": "LoRA-GA"}, "layers that are not linear"),
    ({"config": lora(target_modules=["q_proj", "embed_tokens"]), "method": "lora_xs"}, "layers that are not linear"),
    ({"config": LoHaConfig(target_modules=TARGETS)}, "config is a LoHaConfig"),
    ({"examples": 0}, "examples=0 is out of range: it must be at least 1"),
    ({"batches": [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}]}, "every label is -100"),
    ({"batches": [{"input_ids": IDS, "labels": torch.tensor([1])}]}, r"labels have shape \(1,\)"),
    ({"batches": []}, "batches contains no examples"),
    ({"batches": [{"input_ids": IDS}]}, "a batch has input_ids but no labels"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_use_is_one_message_and_leaves_the_model_alone(changes, message):
    base = random_llama()
    names = list(dict(base.named_modules()))
    settings = {"config": lora(), "batches": batches(), "examples": None} | changes
    with pytest.raises(UsageError, match=message):
        initialize_adapters(base, settings.pop("config"), settings.pop("batches"), **settings)
    assert list(dict(base.named_modules())) == names


@pytest.mark.parametrize("kind", ["t5", "head"])
def test_encoder_decoders_and_heads_start_from_their_own_loss(kind):
    """Batches as a collator of transformers makes them; G is autograd's of the model's own mean loss."""
    base = random_t5(64) if kind == "t5" else random_roberta(64)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(3, 64, (3, 9), generator=generator)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = torch.tensor([1, 0, 1]) if kind == "head" else torch.randint(3, 64, (3, 5), generator=generator)
    targets = ["q", "wo"] if kind == "t5" else ["query"]
    base.requires_grad_(True)
    base(**batch).loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in base.named_parameters() if weight.grad is not None}
    base.zero_grad()
    config = lora(target_modules=targets, task_type="SEQ_2_SEQ_LM" if kind == "t5" else "SEQ_CLS")
    few = "ignore:.*1 of 2 layers have fewer usable" if kind == "head" else "error"  # 3 examples, 3 first tokens
    with warnings.catch_warnings():
        warnings.filterwarnings(few.partition(":")[0], message=few.partition(":")[2])
        model = initialize_adapters(base.requires_grad_(False), config, [batch], examples=None, stable_gamma=64)
    for name, layer in adapters.lora_layers(model).items():
        U, S, Vh = torch.linalg.svd(-gradients[f"{name}.weight"], full_matrices=False)
        expected = 8 / 4**0.5 / 64 * (U[:, :4] * S[:4] @ Vh[:4]) / S[0]
        found = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(found.detach(), expected, rtol=2e-3, atol=1e-6, msg=name)


def test_eva_is_refused_for_an_encoder_decoder():
    with pytest.raises(
        UsageError, match="method=eva is not possible here: it works only with causal models"
    ) as refusal:
        initialize_adapters(random_t5(64), lora(target_modules=["q"]), [{}], method="eva")
    assert "eva" not in str(refusal.value).split("Possible methods: ")[1]


def test_labels_of_another_kind_of_model_are_refused():
    with pytest.raises(UsageError, match=r"labels have shape \(5, \d+\), but this kind of model needs \(batch,\)"):
        initialize_adapters(random_roberta(), lora(target_modules=["query"]), batches(size=5), examples=None)


@pytest.mark.parametrize("further", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"bias": "lora_only"}])
def test_what_trains_beside_the_adapters_keeps_the_base_s_dtype(further):
    """bf16 base, fp32 adapters: the model still runs."""
    base = random_llama(attention_bias=True).bfloat16()
    model = initialize_adapters(base, lora(**further), batches(), examples=None)
    for name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("scale", ["stable", "search"])
def test_training_mode_of_every_module_is_kept(scale):
    base = random_llama(attention_dropout=0.3)
    base.model.layers[0].train()
    before = {name: part.training for name, part in base.named_modules()}
    model = initialize_adapters(base, lora(), batches(), examples=None, scale=scale).get_base_model()
    for name, training in before.items():
        assert model.get_submodule(name).training == training or name.endswith(tuple(TARGETS)), name


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT's own, when it converts the targets
@pytest.mark.parametrize("make", [random_mixtral, random_deepseek])
def test_experts_which_no_method_initialises_are_refused(make):
    """PEFT adapts them for all-linear, by its own rule; the caller's configuration keeps its targets."""
    config, base = lora(target_modules="all-linear"), make()
    with (
        pytest.warns(UserWarning, match=r"not adapted: 2 tensors of fused experts"),
        pytest.raises(UsageError, match=r"adapts the fused experts .*pass target_modules=\[.*'o_proj'.*\], its linear"),
    ):
        initialize_adapters(base, config, batches(), examples=None)
    assert config.target_modules == "all-linear" and not config.target_parameters
    assert not any("lora" in name for name, _ in base.named_modules())
    with pytest.warns(UserWarning, match="2 tensors of fused experts"):
        model = initialize_adapters(base, lora(target_modules=["o_proj"]), batches(), examples=None)
    assert all(name.endswith(".o_proj") for name in adapters.lora_layers(model))


def test_failure_leaves_the_model_unchanged():
    base = random_llama().requires_grad_(True)
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    names = list(dict(base.named_modules()))
    with pytest.raises(RunError, match="the loss on the initialisation examples is nan"):
        initialize_adapters(base, lora(), batches(), examples=None)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert list(dict(base.named_modules())) == names
    wrapped = initialize_adapters(random_llama(), lora(), batches(), examples=None)
    with pytest.raises(UsageError, match="model is already a PeftModel"):
        initialize_adapters(wrapped, lora(), batches(), examples=None)


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, lora_one; print(lora_one.__all__, {'torch', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "initialize_adapters" in done.stdout and "set()" in done.stdout


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_one", "olora"])
def test_a_model_without_weights_is_refused(method):
    with torch.device("meta"):
        base = random_llama()
    with pytest.raises(UsageError, match="q_proj is on the meta device, so it has no values: load the model"):
        initialize_adapters(base, lora(), batches(), examples=None, method=method)
    assert not any("lora" in name for name, _ in base.named_modules())


@pytest.mark.filterwarnings("ignore:input of type .* could not be moved")  # of PEFT, for EVA
@pytest.mark.parametrize("method", ["lora_one", "eva", "corda", "lora_ga_peft", "lora_ga"])
@pytest.mark.usefixtures("attrs_package")
def test_values_of_a_batch_that_are_not_tensors_are_passed_on(method):
    found = []
    for further in ({}, {"output_hidden_states": False}):
        given = [batch | further for batch in batches()]
        model = initialize_adapters(random_llama(), lora(use_rslora=False), given, examples=3, method=method)
        found.append(factors_of(model))
    for name, value in found[0].items():  # close, not equal: several threads need not add in the same order twice
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5 * float(value.abs().max()))
