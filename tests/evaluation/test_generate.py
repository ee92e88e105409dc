"""Generation: the same completions whatever the batch, never beyond the context."""

import json

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from lora_one.adaptation.wrapping import wrap
from lora_one.evaluation import command, loading, predictions
from lora_one.evaluation.decoding import Completion, Decoding, before, until
from lora_one.evaluation.generate import Draw, complete
from tests.helpers.models import random_llama, random_t5
from tests.helpers.runs import run_config


def prompts(count=7):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 400, (3 + 5 * i,), generator=generator).tolist() for i in range(count)]


def run(model, tokenizer, batch_size, decoding, given=None):
    found = dict(complete(model, tokenizer, given or prompts(), decoding, batch_size))
    return [found[i] for i in range(len(found))]


@pytest.fixture
def model(tokenizer):
    return random_llama(len(tokenizer))


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_batch_size_changes_nothing(model, tokenizer, batch_size):
    alone = run(model, tokenizer, 1, Decoding(12))
    assert run(model, tokenizer, batch_size, Decoding(12)) == alone
    assert len({completion.text for completion in alone}) > 1


def test_batch_size_changes_nothing_for_an_encoder_with_absolute_positions(tokenizer):
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.5, **sizes
    )
    config.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2})
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    alone = run(model, tokenizer, 1, Decoding(12))
    assert run(model, tokenizer, 7, Decoding(12)) == alone and len({found.text for found in alone}) > 1


def test_greedy_is_the_argmax_of_the_model(model, tokenizer):
    (prompt,) = prompts(1)
    ids = list(prompt)
    for _ in range(8):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in (1, tokenizer.eos_token_id):
            break
        ids.append(token)
    expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert run(model, tokenizer, 1, Decoding(8), [prompt])[0].text == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "num_beams": 2},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "forced_eos_token_id": 1, "max_time": 1e-9},
        {"suppress_tokens": list(range(3, 200))},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("kind", ["llama", "adapter", "t5"])
def test_generation_settings_of_the_checkpoint_are_ignored(kind, settings, tokenizer):
    model = random_t5(len(tokenizer), initializer_factor=3.0) if kind == "t5" else random_llama(len(tokenizer))
    model = wrap(model, run_config("init=default").peft, "fp32").eval() if kind == "adapter" else model
    decodings = (Decoding(12), Decoding(12, beams=3), SAMPLED)
    free = [run(model, tokenizer, 3, decoding) for decoding in decodings]
    model.generation_config.update(**settings)
    assert [run(model, tokenizer, 3, decoding) for decoding in decodings] == free
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items()), "left as it was"


def test_sampling_is_seeded(model, tokenizer):
    draws = [run(model, tokenizer, 3, Decoding(12, temperature=1.5, top_p=0.95, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_completion_ends_where_the_context_does(tokenizer):
    """Each by its own prompt's length, also beside shorter ones in one batch; a prompt that fills it is too long."""
    model = random_llama(len(tokenizer), max_position_embeddings=32)
    model.generation_config.eos_token_id = None
    given = [list(range(3, 3 + size)) for size in (32, 40, 28, 5)]

    class NoEnd:
        eos_token_id = None
        pad_token_id = 0

        def decode(self, tokens, **_):
            return str(len(tokens))

    found = run(model, NoEnd(), 4, Decoding(20), given)
    assert [c.too_long for c in found] == [True, True, False, False]
    assert [c.text for c in found[2:]] == ["4", "20"]
    assert [c.cut_off for c in found] == [None, None, True, True]


def test_row_that_fills_its_positions_does_not_stop_the_others(tokenizer):
    """GPT-2 has no positions beyond its context, while the rest of a batch continues."""
    ends = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2, **ends)
    model = GPT2LMHeadModel(settings).eval()
    given = [prompt[:31] for prompt in prompts()]
    alone = run(model, tokenizer, 1, Decoding(20), given)
    assert run(model, tokenizer, 7, Decoding(20), given) == alone
    assert not any(completion.too_long for completion in alone)


@torch.no_grad()
def greedy(model, prompt, count):
    """Return the next tokens, one forward pass each, whatever they are."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_whether_the_limit_ended_a_completion(model, tokenizer, batch_size):
    """Not where EOS is its last token or an earlier one, or where it contains a stop text."""
    rows = [greedy(model, prompt, 12) for prompt in prompts()]
    ends = {rows[0][4], rows[3][11]}
    model.generation_config.eos_token_id = sorted(ends)
    expected = [not (ends | {tokenizer.eos_token_id}).intersection(row) for row in rows]
    assert not expected[0] and not expected[3] and sum(expected) > 1
    found = run(model, tokenizer, batch_size, Decoding(12))
    assert [completion.cut_off for completion in found] == expected
    place = expected.index(True)
    stop = (found[place].text[3:5],)
    stopped = run(model, tokenizer, batch_size, Decoding(12, stop=stop))
    assert [c.cut_off for c in stopped] == [
        cut and stop[0] not in c.text for c, cut in zip(found, expected, strict=True)
    ]
    assert not stopped[place].cut_off


def test_beams_say_it_too(model, tokenizer):
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 3))
    found = run(model, tokenizer, 7, Decoding(4, beams=3))
    alone = [run(model, tokenizer, 1, Decoding(4, beams=3), [prompt])[0] for prompt in prompts()]
    assert [c.cut_off for c in found] == [c.cut_off for c in alone] and not all(c.cut_off for c in found)


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_beams_near_the_end_of_the_context_do_not_depend_on_the_batch(tokenizer, batch_size):
    """Each prompt leaves another room; the beams of transformers for one prompt and its room are the reference."""
    model = random_llama(len(tokenizer), max_position_embeddings=40)
    ends = sorted({tokenizer.eos_token_id, *range(0, len(tokenizer), 40)})
    model.generation_config.eos_token_id = ends
    given = prompts()
    found = run(model, tokenizer, batch_size, Decoding(16, beams=3), given)
    assert [completion.room for completion in found] == [None] * 5 + [12, 7]
    for prompt, completion in zip(given, found, strict=True):
        room = min(16, 40 - len(prompt))
        row = model.generate(
            torch.tensor([prompt]), max_new_tokens=room, num_beams=3, do_sample=False, eos_token_id=ends, pad_token_id=0
        )[0, len(prompt) :]
        assert completion.text == tokenizer.decode(until(row.tolist(), ends), skip_special_tokens=True)


def test_until():
    assert until([5, 6, 2, 7, 2], [2]) == [5, 6] and until([5], [2]) == [5] and until([2], [1, 2]) == []


SAMPLED = Decoding(12, temperature=1.5, top_p=0.95, seed=3)


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_samples_do_not_depend_on_the_batch(model, tokenizer, batch_size):
    """A killed evaluation, which generates only the missing ones, then gives the same samples."""
    given = prompts()
    alone = run(model, tokenizer, 1, SAMPLED, given)
    assert run(model, tokenizer, batch_size, SAMPLED, given) == alone
    found = dict(complete(model, tokenizer, given[2:5], SAMPLED, batch_size, ["2", "3", "4"]))
    assert [found[i] for i in range(3)] == alone[2:5]


def test_streams_of_one_prompt_differ(model, tokenizer):
    given = prompts(3)[-1:] * 6
    found = dict(complete(model, tokenizer, given, SAMPLED, 6, [f"0:{sample}" for sample in range(6)]))
    assert len({completion.text for completion in found.values()}) > 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3)])
def test_draws_follow_the_softmax_cut_at_top_p(temperature, top_p):
    """Frequencies over 20,000 streams against the distribution, by the definition of nucleus sampling."""
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, -torch.inf, 1.9])
    probabilities = (logits.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    kept, held = [], 0.0
    for token in order.tolist():
        if held < (1.0 if top_p is None else top_p):
            kept.append(token)
            held += probabilities[token].item()
    expected = torch.zeros(6, dtype=torch.double)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()

    rows = 20_000
    draw = Draw(Decoding(2, temperature, top_p), ["a"], prompt_length=3)
    draw.numbers = torch.rand(rows, 2, generator=torch.Generator().manual_seed(0))
    scores = draw(torch.zeros(rows, 4, dtype=torch.long), logits.expand(rows, -1))
    assert (scores.isfinite().sum(-1) == 1).all()
    frequencies = torch.bincount(scores.argmax(-1), minlength=6) / rows
    assert (frequencies[expected == 0] == 0).all()
    deviation = 5 * (expected * (1 - expected) / rows).sqrt()
    assert ((frequencies - expected).abs() <= deviation).all()


def test_draws_stay_in_the_support_at_the_ends():
    draw = Draw(Decoding(1, 1.0), ["a"], prompt_length=0)
    for number, token in ((0.0, 1), (1.0, 2)):
        draw.numbers = torch.tensor([[number]])
        scores = draw(torch.zeros(1, 0, dtype=torch.long), torch.tensor([[-torch.inf, 2.0, 1.0, -torch.inf]]))
        assert scores.argmax().item() == token


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_stop_text_ends_only_its_own_row(model, tokenizer, batch_size):
    """The completion is the one without stop texts, cut there, whatever stops beside it."""
    whole = [completion.text for completion in run(model, tokenizer, 1, Decoding(12))]
    stop = (whole[0][3:5], whole[4][4:6])
    expected = [before(text, stop) for text in whole]
    assert [c.text for c in run(model, tokenizer, batch_size, Decoding(12, stop=stop))] == expected
    assert len(expected[0]) <= 3 and len(expected[4]) <= 4


def test_generation_stops_at_the_text(model, tokenizer):
    (prompt,) = prompts(1)
    whole = run(model, tokenizer, 1, Decoding(12), [prompt])[0].text
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    run(model, tokenizer, 1, Decoding(12, stop=(whole[:1],)), [prompt])
    assert len(calls) < 4


def test_before():
    assert before("a Q: b</s>", ("</s>", "Q:")) == "a " and before("a", ("Q:",)) == before("a", ()) == "a"


@pytest.mark.parametrize("stopped", [False, True])
def test_another_engine_can_replace_the_model(stopped, tmp_path, monkeypatch):
    """It gets only the missing prompts, in any order, and no model is loaded."""
    asked = []

    class Letters:
        @classmethod
        def start(cls, options):
            return cls()

        @property
        def encoder(self):
            return self

        def prompts(self, examples):
            return [[ord(letter) for letter in example.prompt] for example in examples]

        def close(self):
            pass

        def generate(self, prompts, decoding, streams, done=()):
            assert decoding.max_new_tokens == 9
            for index in reversed(range(len(prompts))):
                if stopped and len(asked) == 3:
                    raise KeyboardInterrupt
                asked.append(streams[index])
                yield index, Completion(f"#### {len(prompts[index])}")

    rows = [{"question": "x" * size, "answer": f"#### {size + 7}"} for size in (4, 1, 9, 2, 7)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(predictions, "engine_class", lambda name: Letters)
    monkeypatch.setattr(loading, "load_evaluated", None)
    options = ["--model_name=not/loaded", f"--data_path={tmp_path / 'test.jsonl'}", "--max_new_tokens=9"]
    if stopped:
        assert command.main("gsm8k", [*options, f"--output_dir={tmp_path / 'out'}"]) == 130
        stopped = False
    assert command.main("gsm8k", [*options, f"--output_dir={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]["accuracy"] == 1.0
    assert asked == [f"{index}:0" for index in (4, 3, 2, 1, 0)]
