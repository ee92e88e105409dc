"""Data, models and folders that cannot be used: one line on stderr, an exit code, and no results in pieces.

Everything goes through the real entry, run_exp.py as a program in this process; 2 is for what was wrongly asked
for, 1 for what failed on the way.
"""

import fcntl
import shutil

import pytest

from lora_one import models
from lora_one.errors import RunError
from lora_one.records.folder import folder_of
from lora_one.records.provenance import config_hash, local_fingerprints
from tests.helpers.bad_input import FAILURE, USAGE, is_one_line
from tests.helpers.runs import small_run

HEAD = "model=tiny model.type=SequenceClassification dataset=cola "
CHAT = "dataset=chat model=tiny dataset.path={files}/gsm8k.jsonl "
JSON = "dataset=json model=tiny dataset.path={files}/"

# Found when data, names and shapes are read; still before any weight, and nothing is on record.
READING = [
    ("dataset.families=[gian]", USAGE, "dataset.families: gian is not a family", "did you mean gain?"),
    ("dataset.families=[]", USAGE, "dataset.families=[]", "must name at least one of gain"),
    (
        "init.direction=LoRA-GA peft.lora_r=65",
        USAGE,
        "peft.lora_r=65 x 2",
        "exceeds the smaller dimension 128",
        "lower peft.lora_r",
    ),
    (
        "init=lora_ga_peft peft.lora_r=65",
        USAGE,
        "peft.lora_r=65 x 2 (lora_ga_peft needs 2 r vectors)",
        "lower peft.lora_r",
    ),
    (
        "init=loram peft.lora_r=1",
        USAGE,
        "peft.lora_r=1 gives zero factors with init=loram",
        "set peft.lora_r=2 or more",
    ),
    (
        "init.shuffle=spectrum peft.lora_r=1",
        USAGE,
        "init.shuffle=spectrum changes the order of peft.lora_r=1 singular value",
        "init.shuffle=directions",
    ),
    (
        "init=gora peft.lora_r=3",
        USAGE,
        "peft.lora_r=3 is the mean rank that the budget of init=gora pays for",
        "[init.min_rank=4, init.max_rank=32]: change one of the three",
    ),
    (
        "peft.lora_r=5000",
        USAGE,
        "peft.lora_r=5000 exceeds the smaller dimension 128 of model.layers.0",
        "lower peft.lora_r",
    ),
    ("peft.lora_target_modules=[q_prj]", USAGE, "q_prj matches no linear layer", "did you mean q_proj?"),
    (
        "dataset.chat_template=true",
        USAGE,
        "dataset.chat_template=true",
        "no chat template",
        "dataset.chat_template=false",
    ),
    (
        JSON + "word.jsonl model.name={files}/grown",
        USAGE,
        "token id 425, but the model has only 425 embeddings",
    ),
    (
        JSON + "json.jsonl model.name={files}/grown-padding",
        USAGE,
        "token id 425, but the model has",
        "resize",
    ),
    ("model.max_length=4", FAILURE, "none of the 48 examples", "max_length=4", "increase model.max_length"),
    ("dataset.max_tokens=2", FAILURE, "dataset.max_tokens=2", "increase dataset.max_tokens"),
    (JSON + "gsm8k.jsonl", USAGE, "no column prompt, response; its columns are question, answer", "dataset.prompt="),
    (JSON + "hello.txt", USAGE, "hello.txt has an unknown format", "json, jsonl, csv"),
    (
        JSON + "untrained",
        USAGE,
        "no file whose name begins with 'train'",
        "contains test.jsonl",
        "pass the path of the file",
    ),
    (JSON + "twice", USAGE, "several files for 'train' (train.csv, train.jsonl)", "pass the path of one of them"),
    (JSON + "empty.jsonl", FAILURE, "empty.jsonl has no rows", "pass a file with examples"),
    (JSON + "empty.jsonl.gz", FAILURE, "empty.jsonl.gz has no rows", "pass a file with examples"),
    (JSON + "header.csv", FAILURE, "header.csv has no rows", "pass a file with examples"),
    (JSON + "random.jsonl", FAILURE, "random.jsonl cannot be read as json", "check the file"),
    (JSON + "cut.jsonl", FAILURE, "/cut.jsonl cannot be read as json", "line 2", "check the file"),
    (JSON + "cut.jsonl.gz", FAILURE, "cut.jsonl.gz cannot be read as json", "check the file"),
    ("dataset=gsm8k model=tiny", FAILURE, "openai/gsm8k cannot be loaded from the hub", "dataset.path="),
    ("model.name=nobody/nothing", FAILURE, "model nobody/nothing cannot be loaded", "pass a local folder"),
    (
        "init.bsz=10 init.iters=10",
        USAGE,
        "init.bsz x init.iters=100 exceeds the number of training examples, 48",
        "lower it",
    ),
    (
        "init=eva init.iters=7",
        USAGE,
        "init.bsz x init.iters=56 exceeds the number of training examples, 48",
        "lower it",
    ),
    (
        "init.do_subsampling=true init.sub_size=49",
        USAGE,
        "init.sub_size=49 exceeds the number of training examples, 48",
        "lower it",
    ),
    ("init=lora_da", USAGE, "init.bsz x init.iters=256 exceeds the number of training examples, 48", "lower it"),
    (
        "init=lora_da dry_run=true",
        USAGE,
        "init.bsz x init.iters=256 exceeds the number of training examples",
        "lower it",
    ),
    (
        "wandb.curvature_examples=49",
        USAGE,
        "wandb.curvature_examples=49 exceeds the number of training",
        "48: lower it",
    ),
    ("init.max_length=3", FAILURE, "max_length=3", "init.max_length"),
    ("dataset.train_size=3000000", USAGE, "size=3000008 exceeds the maximum of 100000 per family", "lower it"),
    ("model.name={files}/cut-header", FAILURE, "not a valid safetensors file", "download it again"),
    ("dataset.decontaminate=humaneval", FAILURE, "openai_humaneval cannot be loaded", "dataset.decontaminate="),
    ("dataset.decontaminate={files}/header.csv", FAILURE, "header.csv has no rows", "pass a file with examples"),
    (
        "dataset.decontaminate={files}/empty",
        USAGE,
        "no file whose name begins with 'test'",
        "pass the path of the file",
    ),
    ("model.type=ConditionalGeneration", USAGE, "is not possible for bundled/tiny", "use model.type=CausalLM"),
    (HEAD + "dataset.path={files}/json.jsonl", USAGE, "no column sentence, label; its columns are prompt, response"),
    (HEAD + "dataset.path={files}/labels.tsv", USAGE, "row 2: the label '7' is not one of", "with labels"),
    (
        HEAD + "dataset.path={files}/words.tsv model.max_length=2 init.bsz=4 init.iters=4",
        USAGE,
        "exceeds the number of training examples, 2",
        "lower",
    ),
]


def small() -> list[str]:
    """Defaults of a small experiment, for what is found on the way."""
    sizes = ["dataset.train_size=48", "dataset.validation_size=8", "dataset.accuracy_examples=0"]
    return [*sizes, "model.epochs=0"]


@pytest.mark.parametrize(
    ("line", "expected", "fragments"), [(*row[:2], row[2:]) for row in READING], ids=lambda x: str(x)[:40]
)
def test_wrong_data_names_and_shapes(line, expected, fragments, program, no_weights):
    code, said, left = program(line, *small())
    is_one_line(said, fragments, alone=False)
    assert code == expected
    assert not any(path.name == "run.json" for path in left)


def test_weights_that_do_not_load(program):
    code, said, left = program("model.name={files}/cut-weights", *small())
    is_one_line(said, ("/cut-weights cannot be loaded", "pass a local folder"), alone=False)
    assert code == FAILURE and not any(path.name == "run.json" for path in left)


def test_overwrite_keeps_the_finished_run_until_the_new_one_can_begin(tmp_path, program, files, monkeypatch):
    """The data cannot be read this time, so the finished run is kept."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(files / "gsm8k.jsonl", rows)
    line = f"dataset=gsm8k model=tiny dataset.path={rows} model.epochs=0 model.real_batch_size=32"
    assert program(line)[0] == 0
    (record,) = (tmp_path / "results").rglob("run.json")
    before = record.read_bytes()
    monkeypatch.setattr(models, "load_model", lambda *_, **__: (_ for _ in ()).throw(RunError("no memory")))
    assert program(line + " overwrite=true")[0] == FAILURE
    assert record.read_bytes() == before and (record.parent / "adapter").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_results_that_cannot_be_written(place, tmp_path, program, no_weights):
    """Below a regular file, which not even root can write to."""
    (tmp_path / "file").write_text("precious")
    code, said, _ = program(f"results_dir={tmp_path / place}")
    is_one_line(said, (str(tmp_path / place), "cannot be written", "set results_dir=<a writable folder>"), alone=True)
    assert code == FAILURE and (tmp_path / "file").read_text() == "precious"


def test_a_run_folder_held_by_another_process(tmp_path, program, no_weights):
    run = small_run(tmp_path / "results")
    identity = config_hash(run.published(), local_fingerprints(run.to_dict(), models.local_folder(run.model.name)))
    folder = folder_of(run, identity)
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = f"model.name={run.model.name} dataset.train_size=48 dataset.validation_size=8 model.real_batch_size=8"
        code, said, _ = program(f"{line} model.per_device_batch_size=8")
    is_one_line(said, ("another process is running in", str(folder), "wait until it ends"), alone=True)
    assert code == FAILURE and not (folder / "run.json").exists()
