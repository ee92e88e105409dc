"""Conversations, and tokenizers with the chat templates of two families of models."""

import copy

from lora_one.models import load_tokenizer
from lora_one.types import Example
from tests.helpers.models import folder_of, random_llama

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ (message['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As reasoning models do: what the assistant thought is removed from all turns except the last one
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{{ message['content'] if loop.last else "
    "message['content'].split('</think>')[-1] }}{{ '\n' }}{% endfor %}"
)
TURNS = (
    ("user", "What is 2 + 3?"),
    ("assistant", "It is 5."),
    ("user", "And twice that?"),
    ("assistant", "\n\nTwice 5 is 10."),
    ("user", "Thanks!"),
)


def with_template(tokenizer, template):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns):
    return Example("", "", messages=turns or TURNS)


def row_of(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns or TURNS]}


def chat_model(place, template=CHATML):
    """The folder of a small random model with the bundled tokenizer and this chat template."""
    tokenizer = with_template(load_tokenizer("bundled/tiny"), template)
    return folder_of(random_llama(len(tokenizer)), tokenizer, place)
