"""A run trained with a chat template is evaluated with it; likelihoods and heads have no prompt to wrap."""

import json

import pytest

from lora_one.data import load_dataset
from lora_one.data.chat_template import DATE, TODAY, end_of_turn
from lora_one.data.conversations import tokens_of
from lora_one.data.encode import prompt_ids
from lora_one.data.encoders import encoder_for
from lora_one.errors import UsageError
from lora_one.evaluation.command import main
from lora_one.evaluation.decoding import Decoding
from lora_one.evaluation.engines import local
from lora_one.evaluation.engines.local import Transformers
from lora_one.evaluation.loading import load_evaluated
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.validation import Validation
from lora_one.files import read_lines
from lora_one.models import load_tokenizer
from lora_one.reports.scores import difference_of_settings, score_in
from tests.helpers.chat import CHATML, GEMMA, chat_model, with_template
from tests.helpers.models import folder_of, random_llama
from tests.helpers.runs import finish, run_config, small_run

PROBLEMS = ("Tom has 3 apples and buys 2 more. How many?", "Ann has 4 pens and loses 1. How many?")


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"question": text, "answer": "#### 5"}) + "\n" for text in PROBLEMS))
    return file


@pytest.fixture
def prompts(monkeypatch):
    """The token ids of all prompts that are completed."""
    asked, original = [], Transformers.generate

    def generate(self, prompts, *arguments):
        asked.extend(map(list, prompts))
        return original(self, prompts, *arguments)

    monkeypatch.setattr(Transformers, "generate", generate)
    return asked


def test_a_run_is_evaluated_as_it_was_trained(problems, prompts, tmp_path, capsys):
    model = chat_model(tmp_path / "model")
    short = ("dataset.chat_template=true", "model.epochs=0.2", "model.warmup=0", "model.max_length=128")
    run = finish(small_run(tmp_path / "results", model, *short))
    options = [f"--adapter={run.path}", f"--data_path={problems}", "--max_new_tokens=4"]
    assert main("gsm8k", options) == 0
    assert "warning" not in capsys.readouterr().err
    report = json.loads((run.path / "eval/gsm8k/metrics.json").read_text())
    assert report["settings"]["chat_template"] is True
    texts = [line["prompt"] for line in read_lines(run.path / "eval/gsm8k/predictions.jsonl")]
    tokenizer = load_tokenizer(str(model))
    assert prompts == prompt_ids(tokenizer, texts, chat=True)
    assert tokenizer.decode(prompts[0]).endswith("<|im_end|>\n<|im_start|>assistant\n")

    prompts.clear()
    assert main("gsm8k", [*options, "--chat_template=false"]) == 2
    assert "(--chat_template is True there and False here)" in capsys.readouterr().err
    assert main("gsm8k", [*options, "--chat_template=false", f"--output_dir={tmp_path / 'plain'}"]) == 0
    assert "was trained with dataset.chat_template=true, but the prompts of this" in capsys.readouterr().err
    assert prompts == prompt_ids(tokenizer, texts)


def test_rescored_answers_keep_the_settings_of_their_prompts(problems, tmp_path):
    """So that a comparison with answers to other prompts says so."""
    model = chat_model(tmp_path / "model")
    scores = []
    for template in ("true", "false"):
        folder = tmp_path / template
        given = (f"--model_name={model}", f"--data_path={problems}", "--max_new_tokens=2", f"--output_dir={folder}")
        assert main("gsm8k", [*given, f"--chat_template={template}"]) == 0
        for rescored in (folder, folder / "rescored"):  # also what was rescored before
            assert main("gsm8k", [f"--rescore={rescored / 'predictions.jsonl'}"]) == 0
            scores.append(score_in(rescored / "rescored"))
    with_template, again, without, _ = scores
    assert difference_of_settings(with_template, again) is None
    assert difference_of_settings(with_template, without) == "--chat_template is True there and False here"


def test_likelihoods_beside_generated_answers_have_no_template(prompts, tmp_path):
    """--likelihood adds a second metric; the answers are those without it."""
    model, data = chat_model(tmp_path / "model"), tmp_path / "boolq"
    data.mkdir()
    row = {
        "instruction": "Is it so? Answer format: true/false",
        "answer": "true",
        "output": "the correct answer is true",
    }
    (data / "test.json").write_text(json.dumps([row]))
    given = ["--dataset=boolq", "--greedy", f"--model_name={model}", f"--data_path={tmp_path}", "--max_new_tokens=2"]
    asked, completions = [], []
    for more in ([], ["--likelihood"]):
        prompts.clear()
        folder = tmp_path / f"out{len(more)}"
        assert main("commonsense", [*given, *more, "--chat_template=true", f"--output_dir={folder}"]) == 0
        asked.append(list(prompts))
        completions.append([line["completion"] for line in read_lines(folder / "predictions.jsonl")])
    assert asked[0] == asked[1] and completions[0] == completions[1]
    assert load_tokenizer(str(model)).decode(asked[0][0]).endswith("<|im_start|>assistant\n")


def test_results_from_before_the_option_are_those_without_a_template(problems, tmp_path, capsys):
    options = ["--model_name=bundled/tiny", f"--data_path={problems}", "--max_new_tokens=2", f"--output_dir={tmp_path}"]
    assert main("gsm8k", options) == 0
    file = tmp_path / "metrics.json"
    report = json.loads(file.read_text())
    assert report["settings"].pop("chat_template") is False
    file.write_text(json.dumps(report))
    assert main("gsm8k", options) == 0
    assert "already exists" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["mmlu"],
        ["text"],
        ["humaneval"],
        ["commonsense", "--dataset=boolq", "--protocol=lm_eval"],
    ],
)
def test_answers_that_do_not_follow_a_prompt_have_no_template(arguments, problems, capsys):
    task, *more = arguments
    given = ["--model_name=bundled/tiny", f"--data_path={problems}", "--chat_template=true"]
    assert main(task, [*more, *given]) == 2
    assert "--chat_template=true is not possible here" in capsys.readouterr().err


def test_a_tokenizer_without_a_template_is_one_message_before_the_weights(problems, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lora_one.models.load_model", None)
    options = ["--model_name=bundled/tiny", f"--data_path={problems}", f"--output_dir={tmp_path / 'out'}"]
    assert main("gsm8k", [*options, "--chat_template=true"]) == 2
    assert "--chat_template=true, but the model's tokenizer has no chat template" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main("gsm8k", [*options, "--chat_template=perhaps"])
    assert "invalid true_or_false value: 'perhaps'" in capsys.readouterr().err


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day():
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    tokenizer = with_template(load_tokenizer("bundled/tiny"), dated)
    assert tokenizer.decode(prompt_ids(tokenizer, ["x"], chat=True)[0]).startswith("Today: 26 Jul 2024\n")
    ids, _ = tokens_of(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    assert tokenizer.decode(ids).startswith("Today: 26 Jul 2024\n")


def test_generation_stops_at_the_end_of_a_turn(problems, tmp_path, monkeypatch):
    """Models that were trained on conversations write it instead of the tokenizer's EOS."""
    tokenizer = with_template(load_tokenizer("bundled/tiny"), CHATML)
    assert end_of_turn(tokenizer) is None  # not a token of its own
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert end_of_turn(tokenizer) == "<|im_end|>"
    assert end_of_turn(with_template(tokenizer, GEMMA)) is None
    model = folder_of(random_llama(len(tokenizer)), tokenizer, tmp_path / "model")
    ended = []
    monkeypatch.setattr(local, "complete", lambda model, tokenizer, prompts, decoding, *_: ended.append(decoding.stop))
    loaded = load_evaluated(EvaluationOptions(model_name=str(model), chat_template=True))
    local.Transformers(loaded).generate([[1]], Decoding(4, stop=("Q:",)), ["0"])
    assert ended == [("Q:", "<|im_end|>")]
    validated = run_config(f"model.name={model}", "dataset.accuracy_examples=2", "dataset.chat_template=true")
    encoder = encoder_for(validated.model, validated.dataset)
    splits = load_dataset(validated.dataset, encoder, validated.model.max_length)
    assert Validation(validated, splits, encoder).decoding.stop == ("<|im_end|>",)


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("strftime_now('%d %b %Y')", "'26 Jul 2024'"),
        ('strftime_now( "%Y-%m-%d" )', "'2024-07-26'"),
        ("strftime_now('%d' if short else '%d %B')", None),
        ("strftime_now(form)", None),
    ],
)
def test_only_a_plain_date_is_replaced(written, becomes):
    assert TODAY.sub(lambda found: repr(DATE.strftime(found["format"])), written) == (becomes or written)


def test_a_template_that_refuses_a_prompt_is_one_message():
    tokenizer = with_template(load_tokenizer("bundled/tiny"), "{{ raise_exception('system first') }}")
    with pytest.raises(UsageError, match=r"chat template refuses a conversation \(system first\)"):
        prompt_ids(tokenizer, ["x"], chat=True)
