"""GSM8K: what counts as an answer, on made-up and on real ones."""

import json
from decimal import Decimal

import pytest

from lora_one.evaluation import BENCHMARKS, gsm8k
from lora_one.evaluation.command import main
from lora_one.evaluation.gsm8k_shots import SHOTS
from tests.helpers.models import folder_of, random_llama
from tests.helpers.paths import shared


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("#### 7", "7"),
        ("####7", "7"),
        ("a\n#### 1,000", "1000"),
        ("#### 1,234,567.50", "1234567.50"),
        ("#### $1,000.", "1000"),
        ("#### -3", "-3"),
        ("#### -$3.5", "-3.5"),
        ("#### $-3.5", "-3.5"),
        ("#### \u22123", "-3"),
        ("#### +3", "3"),
        ("#### .5", "0.5"),
        ("#### 15%", "15"),
        ("#### 12 apples", "12"),
        ("#### 3\n#### 4", "4"),
        ("The answer is 5. #### 6", "6"),
        ("#### 6\nThe answer is: 7", "6"),
        ("The answer is: 8", "8"),
        ("The answer is 8. No: The answer is $9.", "9"),
        ("#### unknown\nThe answer is: 4", "4"),
        ("#### 007", "7"),
        ("The answer is $1{,}450{,}000$.", "1450000"),
        (r"#### 1\,000", "1000"),
        ("The answer is 1\u202f000.", "1000"),
        ("The answer is 1'000", "1000"),
        ("The answer is 20 (of 30)", "20"),
        ("#### 18\n#### ", "18"),
        ("#### Step 1: add\n5+13 = 18\n\n#### 2. Check\nYes.\n\nThe answer is 18.", "18"),
        ("#### 18. So she has 18 left.", "18"),
    ],
)
def test_parses(completion, number):
    assert gsm8k.parse(completion) == Decimal(number)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "I think it is 7",
        "####",
        "#### seven",
        "The answer is unclear",
        "#### 1/2",
        "#### 12,5",
        "#### 1.2.3",
        "#### 3e5",
        "## 7",
        "#### 1 000",
        "#### 3 1/2",
        "#### 10-12",
        "#### 10 - 12",
        "#### 4+5=9",
        "The answer is 5 + 3 = 8.",
        "#### 20 x $5",
        "#### 5\u00bd",
        r"The answer is 2 \times 9 = 18",
        r"The answer is 2\cdot 9 = 18",
        "The answer is 20 \u2212 2 = 18",
        "The answer is 20\u20132 = 18",
        "The answer is 36 \u00f7 2 = 18",
        "The answer is 9(2) = 18",
        "The answer is 10^{3}",
        "The answer is 1 million",
        "#### 12{,}5",
    ],
)
def test_rejects_completions_without_a_clear_number(completion):
    assert gsm8k.parse(completion) is None


def test_completions_after_solved_examples_end_where_lm_eval_ends_them():
    """At 256 tokens, which are its default; a given number is kept."""
    check, options = gsm8k.GSM8K().check, gsm8k.GSM8KOptions
    tokens = [
        check(options(num_fewshot=shots, max_new_tokens=given)).max_new_tokens
        for shots, given in ((0, None), (8, None), (8, 512), (0, 100))
    ]
    assert tokens == [512, 256, 512, 100]


def test_missing_answer_is_not_zero():
    assert not BENCHMARKS["gsm8k"].score(0, "p", "no idea", "0")["correct"]
    assert BENCHMARKS["gsm8k"].score(0, "p", "#### 0", "0")["correct"]


@pytest.mark.parametrize(
    ("completion", "gold", "ours", "published"),
    [
        ("#### 1,234", "1,000", False, True),  # both become 1
        ("#### 1000", "1,000", True, False),
        ("#### -5", "-5", True, True),  # neither is matched: 0 == 0
        ("nothing", "-5", False, True),
        ("#### 4\n#### 5", "5", True, False),  # first, not last
        ("#### 18.00", "18", True, True),
    ],
)
def test_published_score_is_a_separate_metric(completion, gold, ours, published):
    line = BENCHMARKS["gsm8k"].score(0, "p", completion, gold)
    assert (line["correct"], line["correct_official"]) == (ours, published)


def test_summary_counts_add_up_and_carry_standard_errors():
    lines = [BENCHMARKS["gsm8k"].score(i, "p", c, "2") for i, c in enumerate(["#### 2", "#### 3", "?", "#### 2.0"])]
    metrics, counts = BENCHMARKS["gsm8k"].summarize(lines)
    assert counts == {"correct": 2, "wrong": 1, "unparsed": 1, "total": 4}
    assert metrics["accuracy"] == 0.5 and metrics["accuracy_stderr"] == pytest.approx((0.25 / 4) ** 0.5)


def test_real_gold_answers_score_themselves():
    """All 1,319: 16 of them (14 with commas, 2 negative) are misread by the published regex."""
    examples = gsm8k.test_problems(str(shared("data/gsm8k/test.jsonl")))
    assert len(examples) == 1319
    assert examples[0].prompt.startswith("Q: Janet") and examples[0].prompt.endswith("\nA: ")
    lines = [BENCHMARKS["gsm8k"].score(i, e.prompt, e.response, e.gold) for i, e in enumerate(examples)]
    assert BENCHMARKS["gsm8k"].summarize(lines)[1] == {"correct": 1319, "wrong": 0, "unparsed": 0, "total": 1319}
    misread = [e.gold for e in examples if gsm8k.parse_published(f"#### {e.gold}") != gsm8k.parse(f"#### {e.gold}")]
    assert len(misread) == 16 and sum("," in gold for gold in misread) == 14


def read_lines(file):
    """Split at line feeds alone: a text may hold other line separators."""
    return [json.loads(line) for line in file.read_text().rstrip("\n").split("\n")]


def predictions(folder, completions):
    lines = [
        {"id": i, "prompt": "Q: x\u2028y\nA: ", "completion": c, "gold": g} for i, (c, g) in enumerate(completions)
    ]
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return file


def test_rescore_needs_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_one.evaluation.loading.load_evaluated", None)
    file = predictions(tmp_path, [("#### 1,000", "1000"), ("#### 3", "4"), ("none", "0")])
    before = file.read_bytes()
    assert main("gsm8k", [f"--rescore={file}"]) == 0
    report = json.loads((tmp_path / "rescored/metrics.json").read_text())
    assert report["counts"] == {"correct": 1, "wrong": 1, "unparsed": 1, "total": 3}
    assert file.read_bytes() == before
    scored = read_lines(tmp_path / "rescored/predictions.jsonl")
    assert [line["correct"] for line in scored] == [True, False, False]


@pytest.fixture
def test_file(tmp_path):
    rows = [{"question": f"How many is {i} and {i}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in range(7)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_evaluation_of_a_checkpoint_writes_its_files(tmp_path, llama_folder, test_file, capsys):
    output = tmp_path / "out"
    command = [f"--model_name={llama_folder}", f"--data_path={test_file}", "--limit=5", "--max_new_tokens=6"]
    assert main("gsm8k", [*command, f"--output_dir={output}", "--batch_size=2"]) == 0
    report = json.loads((output / "metrics.json").read_text())
    counts = report["counts"]
    assert counts["correct"] + counts["wrong"] + counts["unparsed"] == counts["total"] == 5
    assert set(report) == {"task", "metrics", "counts", "remarks", "model", "settings", "seconds", "provenance"}
    assert set(report["metrics"]) == {"accuracy", "accuracy_stderr", "accuracy_official", "accuracy_official_stderr"}
    lines = read_lines(output / "predictions.jsonl")
    assert [line["id"] for line in lines] == list(range(5))
    assert {"id", "prompt", "completion", "prediction", "gold", "correct"} <= lines[0].keys()
    # the same again does nothing; other settings do not overwrite; another batch size is the same evaluation
    written = (output / "metrics.json").stat().st_mtime_ns
    assert main("gsm8k", [*command, f"--output_dir={output}", "--batch_size=5"]) == 0
    assert "already exists" in capsys.readouterr().out
    assert main("gsm8k", [*command[:-1], "--max_new_tokens=7", f"--output_dir={output}"]) == 2
    assert (output / "metrics.json").stat().st_mtime_ns == written


def test_adapter_unmerged_gives_the_merged_predictions(tmp_path, llama_folder, test_file):
    """Through a run's own folder, where its evaluations lie by default."""
    from tests.helpers.runs import finish, small_run

    folder = finish(small_run(tmp_path / "results", llama_folder, "model.saving=true"))
    common = [f"--data_path={test_file}", "--max_new_tokens=12"]
    assert main("gsm8k", [f"--adapter={folder.adapter}", f"--output_dir={tmp_path / 'unmerged'}", *common]) == 0
    assert main("gsm8k", [f"--model_name={folder.merged}", *common]) == 0
    merged = folder.path / "eval/gsm8k/predictions.jsonl"
    assert merged.read_text() == (tmp_path / "unmerged/predictions.jsonl").read_text()


@pytest.mark.parametrize(
    ("completion", "gold", "ours", "strict", "flexible"),
    [
        (" 2 + 3 = 5. The answer is 5.", "5", True, True, True),
        (" The answer is 16", "16", True, False, True),  # the strict pattern wants a character behind the number
        (" The answer is $16.", "16", True, False, True),
        (" The answer is 1,000.", "1000", True, True, True),
        (" The answer is 4. No. The answer is 5.", "5", True, False, True),  # first, not last
        (" It is 5", "5", False, False, True),
        (" nothing", "5", False, False, False),
        (" The answer is -3.", "-3", True, True, True),
    ],
)
def test_scores_after_examples_are_lm_eval_s(completion, gold, ours, strict, flexible):
    line = BENCHMARKS["gsm8k"].score(0, SHOTS[0].text + "Q: x\nA:", completion, gold)
    assert (line["correct"], line["correct_official"], line["correct_flexible"]) == (ours, strict, flexible)


@pytest.mark.parametrize("shots", [1, 8])
def test_few_shot_prompt_settings_and_rescoring(shots, tmp_path, llama_folder, test_file):
    output = tmp_path / "out"
    command = [f"--model_name={llama_folder}", f"--data_path={test_file}", "--limit=2", "--max_new_tokens=3"]
    assert main("gsm8k", [*command, f"--num_fewshot={shots}", f"--output_dir={output}"]) == 0
    report = json.loads((output / "metrics.json").read_text())
    assert report["settings"]["num_fewshot"] == shots
    assert {"accuracy", "accuracy_official", "accuracy_flexible"} <= report["metrics"].keys()
    prompt = read_lines(output / "predictions.jsonl")[0]["prompt"]
    assert prompt.count("The answer is") == shots and prompt.startswith("Q: There are 15 trees in the grove.")
    assert prompt.endswith(".\n\nQ: How many is 0 and 0?\nA:")
    assert main("gsm8k", [f"--rescore={output / 'predictions.jsonl'}"]) == 0
    assert json.loads((output / "rescored/metrics.json").read_text())["metrics"] == report["metrics"]


@pytest.mark.parametrize("number", [-1, 9])
def test_rejects_num_fewshot_out_of_range(number, llama_folder, capsys):
    assert main("gsm8k", [f"--model_name={llama_folder}", f"--num_fewshot={number}"]) == 2
    assert f"--num_fewshot={number} must be between 0 and 8" in capsys.readouterr().err


def test_completions_cut_by_the_context_are_counted(tmp_path, tokenizer):
    """256 positions: the second prompt has less room than asked for, the third none."""
    base = folder_of(random_llama(len(tokenizer)), tokenizer, tmp_path / "base")
    rows = [{"question": "x" * size, "answer": "#### 1"} for size in (3, 230, 400)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    options = [f"--model_name={base}", f"--data_path={tmp_path / 'test.jsonl'}", "--max_new_tokens=64"]
    assert main("gsm8k", [*options, f"--output_dir={output}"]) == 0
    lines = read_lines(output / "predictions.jsonl")
    read = len(tokenizer(lines[1]["prompt"])["input_ids"])
    assert 192 < read < 256
    assert [line.get("room") for line in lines] == [None, 256 - read, None]
    assert ["too_long" in line for line in lines] == [False, False, True]
    cut = [line.get("cut_off") for line in lines]
    assert isinstance(cut[0], bool) and isinstance(cut[1], bool) and cut[2] is None
    counts = {"too_long": 1, "cut_to_context": 1, "cut_off": cut[0] + cut[1]}
    assert json.loads((output / "metrics.json").read_text())["remarks"] == counts
    assert main("gsm8k", [f"--rescore={output / 'predictions.jsonl'}"]) == 0
    assert json.loads((output / "rescored/metrics.json").read_text())["remarks"] == counts
