"""The model card of a saved adapter."""

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig

from lora_one import initialize_adapters, save_adapter
from lora_one.data.encode import batches_of
from lora_one.records.model_card import CardFacts, front_matter, model_card
from tests.helpers.examples import examples
from tests.helpers.models import random_llama

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT's, offline
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def saved(folder, name="", **more):
    base = random_llama()
    base.name_or_path = name
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = initialize_adapters(base, config, batches_of(examples(), 5, 0), examples=None, method="lora_ga")
    save_adapter(model, folder, **more)
    return model


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "gpt2"])
def test_front_matter_is_what_the_hub_expects(tmp_path, name):
    saved(tmp_path / "adapter", name)
    data = ModelCard.load(tmp_path / "adapter/README.md").data.to_dict()
    assert data["base_model"] == name and data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert {f"base_model:adapter:{name}", "lora", "lora-ga"} <= set(data["tags"])
    assert "license" not in data


def test_a_local_base_is_no_name_on_the_hub(tmp_path):
    data = yaml.safe_load(front_matter(str(tmp_path), "SEQ_CLS", None).strip("-"))
    assert "base_model" not in data and data["pipeline_tag"] == "text-classification"


def test_the_card_says_what_is_known_and_has_no_gaps(tmp_path):
    saved(tmp_path / "adapter", "someone/base", data="five random rows", results={"accuracy": 0.5})
    text = (tmp_path / "adapter/README.md").read_text()
    for known in (
        "LoRA-GA",
        "five random rows",
        "| accuracy | 0.5 |",
        "stable_gamma",
        'from_pretrained("someone/base")',
    ):
        assert known in text
    assert "rank: 8" in text, "of the saved adapter, which is for the original base"
    assert "More Information Needed" not in text and "None" not in text


def test_parts_without_facts_are_left_out():
    text = model_card(CONFIG, CardFacts(versions={"peft": "1"}))
    assert "## Results" not in text and "## Data" not in text and "None" not in text
    assert "- peft: 1" in text


def test_the_code_of_the_card_is_python():
    text = model_card(CONFIG | {"base_model_name_or_path": "a/b"}, CardFacts(revision="main"))
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'revision="main"' in code
