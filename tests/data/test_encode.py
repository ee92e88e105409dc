"""One encoding: the prompt's tokens are the prefix of the example, and nothing is lost in silence."""

import pytest
import torch

from lora_one.data.encode import Encoded, Encoder, batches_of, collate, prompt_ids, response_ids
from lora_one.errors import RunError
from lora_one.losses import mean_loss
from lora_one.types import Example
from tests.helpers.models import random_llama

EXAMPLES = [
    Example("Q: Tom has 14 apples. How many?\nA: ", "Tom has 14.\n#### 14"),
    Example("Q: Émile paid $1,234.50 for 3 “things”?\nA: ", "Each was $411.50.\n#### 411.50"),
    Example("no question", " leading space"),
    Example("line\n", "\n\nnew lines first"),
]


@pytest.fixture(params=["byte-level", "sentencepiece"])
def any_tokenizer(request):
    return request.getfixturevalue("tokenizer" if request.param == "byte-level" else "sentencepiece_tokenizer")


def test_prompt_tokens_are_exactly_the_prefix(any_tokenizer):
    prompts = prompt_ids(any_tokenizer, [example.prompt for example in EXAMPLES])
    encoded, counts = Encoder(any_tokenizer).encode(EXAMPLES, max_length=512)
    assert (counts.whole, counts.shortened, counts.dropped) == (4, 0, 0)
    for prompt, example in zip(prompts, encoded, strict=True):
        size = len(prompt)
        assert example.input_ids[:size] == prompt
        assert example.labels == [-100] * size + example.input_ids[size:]
        assert example.input_ids[0] == any_tokenizer.bos_token_id
        assert example.input_ids[-1] == any_tokenizer.eos_token_id
        assert example.input_ids.count(any_tokenizer.bos_token_id) == 1


def test_tokens_spell_prompt_and_response_and_nothing_between(any_tokenizer):
    for example in EXAMPLES:
        (prompt,), (response,) = (
            prompt_ids(any_tokenizer, [example.prompt]),
            response_ids(any_tokenizer, [example.response]),
        )
        text = any_tokenizer.decode(prompt + response, skip_special_tokens=True)
        assert text.lstrip(" ") == (example.prompt + example.response).lstrip(" ")


def test_cut_answers_are_counted_and_lost_ones_dropped(tokenizer):
    (size,) = map(len, prompt_ids(tokenizer, [EXAMPLES[0].prompt]))
    longer = Example(EXAMPLES[0].prompt * 3, "7")
    encoded, counts = Encoder(tokenizer).encode([EXAMPLES[0], longer], max_length=size + 2)
    assert (counts.whole, counts.shortened, counts.dropped) == (0, 1, 1)
    assert len(encoded[0].input_ids) == size + 2
    assert encoded[0].input_ids[-1] != tokenizer.eos_token_id, "a cut answer does not end"
    assert sum(label != -100 for label in encoded[0].labels) == 2


def test_exact_fit_is_whole(tokenizer):
    whole, _ = Encoder(tokenizer).encode(EXAMPLES[:1], max_length=512)
    _, counts = Encoder(tokenizer).encode(EXAMPLES[:1], max_length=len(whole[0].input_ids))
    assert (counts.whole, counts.shortened) == (1, 0)


def test_no_example_left_is_an_error_that_says_how_long_they_are(tokenizer):
    (size,) = map(len, prompt_ids(tokenizer, [EXAMPLES[0].prompt]))
    encoded, counts = Encoder(tokenizer).encode(EXAMPLES[:1], max_length=3)
    assert encoded == [] and counts.dropped == 1
    error = Encoder(tokenizer).nothing_left(EXAMPLES[:1], 3)
    assert isinstance(error, RunError) and "max_length=3: the prompts are too long" in str(error)
    assert f"shortest prompt: {size} tokens" in str(error)


def test_empty_answer_is_dropped(tokenizer):
    _, counts = Encoder(tokenizer).encode([EXAMPLES[0], Example("Q: x\nA: ", "")], max_length=512)
    assert (counts.whole, counts.dropped) == (1, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_on_either_side(side):
    short, long = Encoded([5, 6, 7], [-100, 6, 7]), Encoded([1, 2, 3, 4, 5], [-100, -100, 3, 4, 5])
    batch = collate([short, long], pad_id=9, side=side)
    row = {"left": [9, 9, 5, 6, 7], "right": [5, 6, 7, 9, 9]}[side]
    mask = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0]}[side]
    labels = {"left": [-100, -100, -100, 6, 7], "right": [-100, 6, 7, -100, -100]}[side]
    assert batch["input_ids"].tolist() == [row, long.input_ids]
    assert batch["attention_mask"].tolist() == [mask, [1] * 5]
    assert batch["labels"].tolist() == [labels, long.labels]
    assert batch["input_ids"].dtype == torch.int64


def test_chat_format_wraps_the_prompt_once(tokenizer):
    chat = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    chat.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (ids,) = prompt_ids(chat, ["How many?"], chat=True)
    assert chat.decode(ids, skip_special_tokens=True) == "<user>How many?</user><assistant>"
    assert ids.count(chat.bos_token_id) == 1


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_a_loss_on_the_prompt_too_is_that_of_every_token_but_the_first(any_tokenizer, reduction):
    model = random_llama(len(any_tokenizer))
    encoded, _ = Encoder(any_tokenizer, train_on_inputs=True).encode(EXAMPLES, max_length=128)
    losses = []
    for example in EXAMPLES:
        (prompt,), (response,) = (
            prompt_ids(any_tokenizer, [example.prompt]),
            response_ids(any_tokenizer, [example.response]),
        )
        ids = [*prompt, *response, any_tokenizer.eos_token_id]
        with torch.no_grad():
            likelihoods = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses.append(torch.stack([-likelihoods[place, token] for place, token in enumerate(ids[1:])]))
    by_hand = torch.cat(losses).mean() if reduction == "token" else torch.stack([row.mean() for row in losses]).mean()
    found = mean_loss(model, batches_of(encoded, 3, any_tokenizer.eos_token_id), reduction)
    assert found == pytest.approx(by_hand.item(), rel=1e-5)


def test_with_a_loss_on_the_prompt_a_cut_prompt_is_kept(tokenizer):
    _, counts = Encoder(tokenizer, train_on_inputs=True).encode([*EXAMPLES[:1], Example("Q: x\nA: ", "")], max_length=5)
    assert (counts.whole, counts.shortened, counts.dropped) == (0, 1, 1)
