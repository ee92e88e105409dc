"""Log-likelihoods with a shared prefix: those of the model on each text alone, for every kind of cache."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
)

from lora_one.errors import RunError
from lora_one.evaluation.choices import Question, log_likelihoods, most_tokens, question_of
from tests.helpers.models import random_llama

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
ARCHITECTURES = {
    "learned positions": GPT2Config(n_head=4, n_positions=64, **SMALL),
    "sliding window": MistralConfig(sliding_window=8, **SMALL, **HEADS),
    "both kinds of layer, capped logits": Gemma2Config(sliding_window=8, head_dim=8, **SMALL, **HEADS),
    "biases by distance": BloomConfig(n_head=4, **SMALL),
    "convolution states": Lfm2Config(layer_types=["conv", "full_attention"], **SMALL, **HEADS),
    "no keys and values": MambaConfig(state_size=4, **SMALL),
}


def draws(generator, *sizes):
    return [torch.randint(3, 64, (size,), generator=generator).tolist() for size in sizes]


def questions():
    """Twenty shared tokens, then 1 to 14 of their own; answers of 1 to 3 tokens, some beginning alike."""
    generator = torch.Generator().manual_seed(1)
    (shared,) = draws(generator, 20)
    own = draws(generator, 1, 14, 5, 9, 2, 7, 3)
    found = [Question(shared + rest, draws(generator, 1, 1, 2, 3)) for rest in own]
    letters = [[5], [6], [7, 9], [7, 8], [7, 9, 4], [11, 5]]
    return [*found, Question(shared + own[2][:3], letters)]


@torch.no_grad()
def alone(model, question):
    """One forward pass for each answer, without a cache."""
    found = []
    for answer in question.answers:
        log_p = model(torch.tensor([question.context + answer])).logits[0].float().log_softmax(-1)
        begin = len(question.context) - 1
        found.append(sum(float(log_p[begin + i, token]) for i, token in enumerate(answer)))
    return found


@pytest.fixture(scope="module", params=["llama", *ARCHITECTURES])
def model(request):
    if request.param == "llama":
        return random_llama(64)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[request.param]).eval()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_the_model_on_each_text_alone(model, batch_size):
    asked = questions()
    found = dict(log_likelihoods(model, asked, batch_size))
    assert sorted(found) == list(range(len(asked)))
    for index, question in enumerate(asked):
        assert found[index] == pytest.approx(alone(model, question), abs=1e-4)


def test_questions_without_a_common_prefix_and_no_questions():
    model = random_llama(64)
    asked = [Question([5, 6, 7], [[8], [9]]), Question([6], [[8, 3], [9]])]
    found = dict(log_likelihoods(model, asked, 2))
    for index, question in enumerate(asked):
        assert found[index] == pytest.approx(alone(model, question), abs=1e-4)
    assert list(log_likelihoods(model, [], 2)) == []


def test_finished_questions_are_skipped_without_changing_the_others():
    model, asked = random_llama(64), questions()
    whole = dict(log_likelihoods(model, asked, 3))
    assert dict(log_likelihoods(model, asked, 3, {1, 2, 6})) == {i: whole[i] for i in (0, 3, 4, 5, 7)}
    assert list(log_likelihoods(model, asked, 3, set(range(8)))) == []


def test_numbers_that_are_not_finite_are_refused():
    model = random_llama(64)
    model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(RunError, match=r"nan.*--dtype=fp32"):
        list(log_likelihoods(model, questions(), 3))


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece_tokenizer"])
def test_an_answer_is_what_really_follows_the_prompt(name, request):
    tokenizer = request.getfixturevalue(name)
    question = question_of(tokenizer, "Two and two?\nAnswer:", [" A", " B", " four", "\n4"])
    for answer, tokens in zip([" A", " B", " four", "\n4"], question.answers, strict=True):
        assert tokens and question.context + tokens == tokenizer(f"Two and two?\nAnswer:{answer}")["input_ids"]
    assert question.context == tokenizer("Two and two?\nAnswer:")["input_ids"]


def test_prompt_token_merged_with_the_answer_is_scored_with_it():
    class Pairs:
        """Two characters a token, <s> in front."""

        eos_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[1] + [hash(text[i : i + 2]) for i in range(0, len(text), 2)] for text in texts]}

    question = question_of(Pairs(), "abc", ["d", "e"])
    assert question == Question([1, hash("ab")], [[hash("cd")], [hash("ce")]])


def test_tokens_after_the_shared_ones_count_once_for_each_answer():
    """Contexts 1 2 3 | 4 and 1 2 3 | 5 6: the second reads 5 6 with each of its answers, all but their last tokens."""
    first, second = Question([1, 2, 3, 4], [[9]]), Question([1, 2, 3, 5, 6], [[7, 8, 9], [8]])
    assert most_tokens([first, second]) == 2 * 4 and most_tokens([first]) == 1 and most_tokens([]) == 1
    assert most_tokens([Question([0], [[1] * 10]), Question([0], [[1] * 4])]) == 10, "windows of a text"
