"""What must hold on a GPU, against fp64 on the CPU: gradient, start, optimizer, generation, whole runs, resumption.

``python benchmarks/gpu.py correctness --out FOLDER`` runs these on a GPU. With GPU_TESTS_ON=cpu they run on the CPU.
"""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel

from lora_one import initialize_adapters
from lora_one.adaptation import layers as adapters
from lora_one.data import load_dataset
from lora_one.data.encode import Encoded, batches_of, prompt_ids
from lora_one.data.encoders import encoder_for
from lora_one.datasets.arithmetic import PRETRAIN_FAMILIES, generate
from lora_one.datasets.gsm8k import PROMPT
from lora_one.errors import UsageError
from lora_one.evaluation.batches import each_batch
from lora_one.evaluation.choices import log_likelihoods, questions_of
from lora_one.evaluation.command import main as evaluate
from lora_one.evaluation.decoding import Decoding
from lora_one.evaluation.generate import complete
from lora_one.evaluation.validation import Validation
from lora_one.files import read_lines
from lora_one.initialization.gradients import mean_gradients, sums_in_fp32
from lora_one.initialization.gradients import product as product_of_layer
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from lora_one.losses import mean_loss
from lora_one.models import BUNDLED, load_model, load_tokenizer
from lora_one.optim import AdamW, LoraMuon, LoraPro, LoraRite, create_pair_optimizer, create_scaled_optimizer
from lora_one.training.packing import check_packing
from tests.helpers.examples import autograd_gradients, examples, linear_layers
from tests.helpers.models import quantized_llama, random_llama, random_roberta, random_t5
from tests.helpers.paths import ROOT
from tests.helpers.runs import ADAPTER_INITS as CHOICES
from tests.helpers.runs import adaptation_for, finish, run_config, small_run

WHERE = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHERE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device is seen"),
    pytest.mark.usefixtures("attrs_package"),
]
SIZES = {"hidden_size": 128, "intermediate_size": 192}


def made(dtype=torch.float32):
    """The random model on the device, and the same function in fp64 on the CPU."""
    exact = random_llama(**SIZES).to(dtype)
    return copy.deepcopy(exact).to(WHERE), exact.double()


def lora(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"} | changes)


def off(found, expected):
    """The relative error of a tensor of any device, in Frobenius' norm."""
    found, expected = (tensor.detach().double().cpu() for tensor in (found, expected))
    return float((found - expected).norm() / expected.norm())


def product(layer):
    """B A of one of PEFT's layers."""
    B, A = (part["default"].weight.detach().double().cpu() for part in (layer.lora_B, layer.lora_A))
    return B @ A


def gradients(model, batches, **options):
    found = {}
    mean_gradients(model, linear_layers(model), batches, "example", found.__setitem__, **options)
    return found


# The gradient and the start
@pytest.mark.parametrize(("hold", "size"), [("device", 2), ("cpu", 2), ("layer", 5)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_in_fp32(hold, size, checkpointing):
    model, exact = made()
    expected = autograd_gradients(exact, examples(), "example")
    for name, G in gradients(model, batches_of(examples(), size, 0), place=hold, checkpointing=checkpointing).items():
        assert off(G, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("size", [1, 5])
def test_gradient_in_bf16(size):
    """Within a few roundings of activations and their gradients, 2^-9 each."""
    model, exact = made(torch.bfloat16)
    expected = autograd_gradients(exact, examples(), "example")
    for name, G in gradients(model, batches_of(examples(), size, 0)).items():
        assert G.dtype == torch.float32 and off(G, expected[name]) <= 0.03, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bit_factors_are_summed_in_fp32(dtype):
    """Over 4,096 tokens, where sums in 16 bit would be off by percents; and added to what is there."""
    generator = torch.Generator().manual_seed(0)
    X, dY = (torch.randn(4096, width, generator=generator).to(dtype) for width in (96, 64))
    exact, before = dY.double().T @ X.double(), torch.randn(64, 96, generator=generator)
    found = product_of_layer(dY.to(WHERE), X.to(WHERE))
    assert found.dtype == torch.float32 and off(found, exact) <= 1e-5
    total = before.clone().to(WHERE)
    assert product_of_layer(dY.to(WHERE), X.to(WHERE), onto=total) is total
    assert off(total, exact + before.double()) <= 1e-5
    if WHERE == "cuda":
        assert sums_in_fp32(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("batches_on", ["cpu", WHERE] if WHERE != "cpu" else ["cpu"])
@pytest.mark.parametrize("method", ["LoRA-One", "LoRA-GA"])
def test_start_in_fp32(method, batches_on):
    """B A of every layer, and LoRA-GA's shifted base."""
    model, exact = made()
    batches = batches_of(examples(), 2, 0)
    fixed = {"examples": None, "method": method, "stable_gamma": 128}  # a searched gamma has the losses' rounding
    others = adapters.lora_layers(initialize_adapters(exact, lora(), batches, **fixed))
    given = [{name: value.to(batches_on) for name, value in batch.items()} for batch in batches]
    found = initialize_adapters(model, lora(), given, **fixed)
    assert next(found.parameters()).device.type == WHERE
    for name, layer in adapters.lora_layers(found).items():
        assert off(product(layer), product(others[name])) <= 1e-4, name
        assert off(layer.get_base_layer().weight, others[name].get_base_layer().weight) <= 1e-5, name


@pytest.mark.parametrize("method", ["LoRA-One", "LoRA-GA"])
def test_start_in_bf16(method):
    """A spans the leading right vectors of the exact gradient, and LoRA-GA's start leaves the function as it is.

    Vectors of close singular values may mix, so what is compared is the energy ||G P||^2, P onto A's rows.
    """
    model, exact = made(torch.bfloat16)
    ids = torch.arange(3, 40, device=WHERE)[None]
    pretrained = model(ids).logits
    expected = autograd_gradients(exact, examples(), "example")
    found = initialize_adapters(model, lora(), batches_of(examples(), 2, 0), examples=None, method=method)
    for name, layer in adapters.lora_layers(found).items():
        basis = torch.linalg.qr(layer.lora_A["default"].weight.detach().double().cpu().T).Q
        best = torch.linalg.svdvals(expected[name])[:4].square().sum()
        assert (expected[name] @ basis).square().sum() >= 0.995 * best, name
    if method == "LoRA-GA":
        assert off(found(ids).logits, pretrained) <= 0.02


@pytest.mark.parametrize("memory", ["auto", "fast", "low"])
@pytest.mark.parametrize("size", [2, 5])
def test_every_way_of_holding_gradients_gives_the_same_steps(memory, size):
    model, exact = made()
    expected = {n: torch.linalg.svd(G) for n, G in autograd_gradients(exact, examples(), "example").items()}
    batches, layers, found = batches_of(examples(), size, 0), linear_layers(model), {}
    settings = StepSettings(singular=4, tolerance=1e-8, memory=memory)
    report = low_rank_steps(model, layers, batches, "example", settings, found.__setitem__)
    assert report.examples == 5
    assert (
        report.memory
        == {
            ("auto", 2): "device",
            ("fast", 2): "device",
            ("low", 2): "sketch",
            ("auto", 5): "layer",
            ("fast", 5): "device",
            ("low", 5): "layer",
        }[memory, size]
    )
    for name, (U, S, Vh) in expected.items():
        step = found[name]
        assert step.U.device.type == WHERE
        assert off(step.U * step.S @ step.Vh, U[:, :4] * S[:4] @ Vh[:4]) <= (2e-3 if memory == "low" else 1e-4), name


@pytest.mark.parametrize("choice", CHOICES)
def test_every_init_starts(choice, tmp_path):
    """Wherever a method draws or computes, its factors are finite and in the model, on the device."""
    run = run_config(f"init={choice}", *(["model.quantization=nf4"] if choice == "loftq" else []))
    try:
        method = build_init(run.init.completed(lambda: 1e-3, 100))
    except UsageError as error:
        pytest.skip(str(error))
    base, originals = random_llama().to(WHERE), None
    if choice == "loftq":
        base, originals = quantized_llama(tmp_path, hidden_size=64, intermediate_size=128)
    probe = Probe(batches_of(examples(), 5, 0), "example")
    model, _ = attach_adapters(base, adaptation_for(run), method, probe, seed=0, originals=originals)
    for name, layer in adapters.lora_layers(model).items():
        assert layer.lora_A["default"].weight.device.type == WHERE, name
        assert layer.lora_A["default"].weight.isfinite().all() and layer.lora_B["default"].weight.isfinite().all(), name
    assert model(torch.arange(3, 40, device=WHERE)[None]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["encoder-decoder", "head"])
def test_other_kinds_of_models_start(kind):
    """As on the CPU."""
    rows = examples(4)
    if kind == "head":
        base, rows = random_roberta(), [Encoded(row.input_ids, index % 2) for index, row in enumerate(rows)]
    else:
        base = random_t5()
        rows = [Encoded(row.input_ids, row.input_ids[:5], decoder_ids=[0, *row.input_ids[:4]]) for row in rows]
    config = lora(
        task_type="SEQ_CLS" if kind == "head" else "SEQ_2_SEQ_LM",
        target_modules=["query", "value"] if kind == "head" else ["q", "v"],
    )
    batches = batches_of(rows, 2, 1)
    expected = initialize_adapters(copy.deepcopy(base).double(), copy.deepcopy(config), batches, examples=None)
    found = adapters.lora_layers(initialize_adapters(base.to(WHERE), config, batches, examples=None))
    for name, layer in adapters.lora_layers(expected).items():
        assert off(product(found[name]), product(layer)) <= 1e-3, name


# The optimizer
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("damping", ["absolute", "relative"])
def test_preconditioned_steps(order, damping):
    """Five steps from the same start, in fp64 on the CPU and in fp32 on the device under autocast and TF32."""
    expected = initialize_adapters(random_llama().double(), lora(), batches_of(examples(), 5, 0), examples=None)
    found = copy.deepcopy(expected).float().to(WHERE)
    before = torch.get_float32_matmul_precision()
    for model, fast in ((expected, False), (found, True)):
        optimizer = create_scaled_optimizer(model, AdamW, lr=1e-3, reg=1e-3, order=order, damping=damping)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)  # the same gradients: what is compared is the step
            for parameter in (p for p in model.parameters() if p.requires_grad):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = drawn.to(parameter)
            torch.set_float32_matmul_precision("high" if fast else before)
            with torch.autocast(WHERE, torch.bfloat16, enabled=fast):
                optimizer.step()
            torch.set_float32_matmul_precision(before)
    for (name, one), two in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert not one.requires_grad or off(one, two) <= 1e-4, name


@pytest.mark.parametrize("kind", [LoraPro, LoraMuon, LoraRite])
def test_steps_of_pairs(kind):
    """Five steps from the same start, in fp64 on the CPU and in fp32 on the device under autocast and TF32."""
    expected = initialize_adapters(random_llama().double(), lora(), batches_of(examples(), 5, 0), examples=None)
    found = copy.deepcopy(expected).float().to(WHERE)
    before = torch.get_float32_matmul_precision()
    for model, fast in ((expected, False), (found, True)):
        optimizer = create_pair_optimizer(model, kind, lr=1e-3)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = drawn.to(parameter)
            torch.set_float32_matmul_precision("high" if fast else before)
            with torch.autocast(WHERE, torch.bfloat16, enabled=fast):
                optimizer.step()
            torch.set_float32_matmul_precision(before)
    for (name, one), two in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert not one.requires_grad or off(one, two) <= 1e-3, name


# Evaluation
def test_a_batch_beyond_the_memory_is_halved():
    """It is halved until it fits, and so are all later batches; on the CPU every batch fits."""
    order, done = list(range(16)), []
    if WHERE == "cuda":
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.1e9) / whole)

    def work(part):
        torch.empty(len(part), 100 if WHERE == "cpu" else 10**8, dtype=torch.uint8, device=WHERE)
        return len(part)

    try:
        for part, size in each_batch(order, 16, work):
            done += part
            assert len(part) == size
    finally:
        if WHERE == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert done == order and (size == 16 if WHERE == "cpu" else size <= 8)


@pytest.fixture(scope="module")
def tiny():
    return load_model("bundled/tiny", where=WHERE), load_tokenizer("bundled/tiny")


@pytest.mark.parametrize(
    "decoding",
    [Decoding(48), Decoding(48, temperature=0.8, top_p=0.9), Decoding(48, stop=("\n",))],
    ids=["greedy", "sampled", "stopped"],
)
def test_generation_in_batches_is_that_of_one_at_a_time(tiny, decoding):
    model, tokenizer = tiny
    prompts = prompt_ids(
        tokenizer, [PROMPT.format(question=row["question"]) for row in generate(PRETRAIN_FAMILIES, 12, 0)]
    )
    together = dict(complete(model, tokenizer, prompts, decoding, 12))
    assert together == dict(complete(model, tokenizer, prompts, decoding, 1))
    assert together == dict(complete(load_model("bundled/tiny", where="cpu"), tokenizer, prompts, decoding, 12))


def test_likelihoods_behind_a_shared_prefix(tiny):
    model, tokenizer = tiny
    prompts = [f"One two three. Question {n}: which?\nAnswer:" for n in range(6)]
    questions = questions_of(tokenizer, prompts, [" 1", " 22", " three"])
    exact = dict(log_likelihoods(load_model("bundled/tiny", where="cpu").double(), questions, 6))
    for size in (1, 4):
        for index, values in log_likelihoods(model, questions, size):
            assert values == pytest.approx(exact[index], rel=1e-4, abs=1e-3)


def test_validation_and_mean_loss(tmp_path, tiny):
    """The loss of the validation examples on the device is that of fp64 on the CPU."""
    run = small_run(tmp_path)
    encoder = encoder_for(run.model, run.dataset)
    splits = load_dataset(run.dataset, encoder, run.model.max_length)
    exact = mean_loss(
        load_model("bundled/tiny", where="cpu").double(),
        batches_of(splits.validation, 3, encoder.pad_id),
        run.model.loss,
    )
    assert Validation(run, splits, encoder)(tiny[0])["eval_loss"] == pytest.approx(exact, rel=1e-4)


# Training
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_examples_keep_apart(dtype):
    """Under SDPA, or flash attention where it is installed and the model is in 16 bit."""
    model = load_model("bundled/tiny", dtype=dtype, where=WHERE)
    check_packing(model, examples(6, vocabulary=300))
    expected = (
        "flash_attention_2" if importlib.util.find_spec("flash_attn") and (WHERE, dtype) == ("cuda", "bf16") else "sdpa"
    )
    assert model.config._attn_implementation == expected


def losses(folder):
    return [line["loss"] for line in read_lines(folder.metrics) if "loss" in line]


def test_packing_changes_no_loss(tmp_path):
    changes = ("model.bf16=false", "dataset.accuracy_examples=0", "model.logging_steps=1", "init=default")
    plain = finish(small_run(tmp_path / "plain", BUNDLED / "tiny", *changes))
    packed = finish(small_run(tmp_path / "packed", BUNDLED / "tiny", "model.packing=true", *changes))
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-3)


def test_micro_batches_change_no_loss(tmp_path):
    changes = ("model.bf16=false", "dataset.accuracy_examples=0", "model.logging_steps=1", "init=default")
    one = finish(small_run(tmp_path / "one", BUNDLED / "tiny", "model.per_device_batch_size=1", *changes))
    eight = finish(small_run(tmp_path / "eight", BUNDLED / "tiny", *changes))
    assert losses(one) == pytest.approx(losses(eight), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        ("init=gradient", "model.bf16=true"),
        ("init=gradient", "init.direction=LoRA-GA", "model.bf16=true", "init.dtype=bf16"),
        ("init=gradient", "optimizer=scaled_adamw", "model.learning_rate=2e-4", "wandb.diagnostics_every=2"),
        ("init=gradient", "init.scale=search", "model.gradient_checkpointing=true", "model.bf16=false"),
        ("peft=adalora", "init=default"),
        ("peft=dora", "init=gradient"),
        ("peft=lora_xs", "init=lora_xs"),
        ("peft=full_ft", "init=default", "model.learning_rate=1e-4"),
    ],
    ids=["LoRA-One", "LoRA-GA in bf16", "scaled", "search", "AdaLoRA", "DoRA", "LoRA-XS", "full"],
)
def test_whole_run(changes, tmp_path):
    """It finishes, its loss falls, and what it wrote is loaded and evaluated."""
    folder = finish(
        small_run(tmp_path, BUNDLED / "tiny", "model.epochs=3", "model.saving=true", "model.logging_steps=1", *changes)
    )
    record = folder.read()
    assert record["status"] == "finished"
    if "model.learning_rate=1e-4" not in changes:
        found = losses(folder)
        assert sum(found[-3:]) < sum(found[:3])
    arguments = [
        f"--model_name={folder.merged}",
        "--limit=4",
        "--max_new_tokens=8",
        f"--output_dir={tmp_path / 'eval'}",
    ]
    rows = tmp_path / "test.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2\\n#### 2"}\n' * 4)
    assert evaluate("gsm8k", [*arguments, f"--data_path={rows}"]) == 0


def test_saved_adapter_in_plain_peft(tmp_path):
    """The run's adapter on the untouched base gives the run's merged model."""
    run = small_run(
        tmp_path, BUNDLED / "tiny", "init=gradient", "init.direction=LoRA-GA", "model.bf16=false", "model.saving=true"
    )
    folder = finish(run)
    ids = torch.arange(3, 40, device=WHERE)[None]
    merged = load_model(str(folder.merged), where=WHERE)(ids).logits
    plain = PeftModel.from_pretrained(load_model("bundled/tiny", where=WHERE), str(folder.adapter)).eval()(ids).logits
    assert off(plain, merged) <= 1e-4


def test_cached_start_is_the_same(tmp_path):
    """Factors read from disk lie on the CPU, the model on the device."""
    changes = ("init=gradient", f"init.cache={tmp_path / 'cache'}", "model.epochs=0", "dataset.accuracy_examples=0")
    first = finish(small_run(tmp_path / "first", BUNDLED / "tiny", *changes))
    second = finish(small_run(tmp_path / "second", BUNDLED / "tiny", *changes))
    assert second.read()["init"]["cached"] and not first.read()["init"]["cached"]
    name = "adapter_model.safetensors"
    assert (first.adapter / name).read_bytes() == (second.adapter / name).read_bytes()


KILLED = """
import os, signal, sys
import torch
torch.use_deterministic_algorithms({deterministic})
sys.path.insert(0, {root!r})
from tests.helpers.runs import small_run
from lora_one.runs import experiment
from lora_one.training.trainer import FineTuner
original, calls = FineTuner.compute_loss, []
def fatal(self, *arguments, **options):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **options)
FineTuner.compute_loss = fatal
experiment.execute(small_run({results!r}, {model!r}, *{changes!r}))
"""


@pytest.fixture
def kernels(request):
    """Whether torch is held to kernels that add in a fixed order."""
    if request.param == "deterministic" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        pytest.skip("deterministic kernels need CUBLAS_WORKSPACE_CONFIG=:4096:8, which gpu.py sets")
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield request.param
    torch.use_deterministic_algorithms(False)


KERNELS = ["deterministic", "usual"] if WHERE == "cuda" else ["usual"]  # on the CPU they are the same


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("bf16", ["true", "false"], ids=["bf16", "fp32"])
def test_killed_and_resumed_ends_with_the_same_bytes(bf16, kernels, tmp_path):
    """Killed by SIGKILL within a step, in a process of its own. CUDA's usual kernels promise no fixed order of sums."""
    model, adapter = str(BUNDLED / "tiny"), "adapter_model.safetensors"
    changes = ["model.epochs=2", "model.save_steps=2", "peft.lora_dropout=0.1", "dataset.accuracy_examples=0"]
    changes += ["init=gradient", f"model.bf16={bf16}"]
    straight = finish(small_run(tmp_path / "straight", model, *changes))
    given = {
        "deterministic": kernels == "deterministic",
        "root": str(ROOT),
        "model": model,
    }
    program = KILLED.format(**given, results=str(tmp_path / "killed"), changes=changes)
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = finish(small_run(tmp_path / "killed", model, *changes))
    assert len(losses(resumed)) == len(losses(straight))
    same = (resumed.adapter / adapter).read_bytes() == (straight.adapter / adapter).read_bytes()
    if not same and kernels == "usual" and WHERE == "cuda":
        pytest.xfail("not the same bytes: some of the usual kernels add in no fixed order")
    assert same


# Quantised bases
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_base(kind, tmp_path):
    """The gradient is that of the dequantised model in fp64; LoRA-One starts from it."""
    model, _ = quantized_llama(tmp_path, kind, hidden_size=64, intermediate_size=128)
    assert next(model.parameters()).device.type == WHERE
    plain = random_llama(hidden_size=64, intermediate_size=128)
    for name, layer in linear_layers(plain).items():
        layer.weight.copy_(adapters.wide_weight(model.get_submodule(name)))
    expected = autograd_gradients(plain.double(), examples(), "example")
    for name, G in gradients(model, batches_of(examples(), 2, 0)).items():
        assert off(G, expected[name]) <= {"nf4": 1e-4, "int8": 0.1}[kind], name
    started = initialize_adapters(model, lora(), batches_of(examples(), 2, 0), examples=None)
    assert started(torch.arange(3, 40, device=WHERE)[None]).logits.isfinite().all()


def test_quantised_run(tmp_path):
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    folder = finish(
        small_run(
            tmp_path,
            BUNDLED / "tiny",
            "init=gradient",
            "model.quantization=nf4",
            "model.epochs=2",
            "model.logging_steps=1",
        )
    )
    found = losses(folder)
    assert folder.read()["status"] == "finished" and sum(found[-3:]) < sum(found[:3])
