"""Hardware profiles: those of conf/ are complete, and a wrong one is refused in one line with its field and file."""

import pytest
from omegaconf import OmegaConf

from lora_one.config.hardware import read_hardware
from lora_one.errors import UsageError
from tests.helpers.paths import ROOT

PROFILES = sorted((ROOT / "conf/hardware").glob("*.yaml"))


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_every_profile_is_valid_and_says_where_its_efficiency_comes_from(file):
    assert read_hardware(file.stem) == read_hardware(str(file))
    comment = file.read_text().partition("training_efficiency:")[0].rpartition("\n#")
    assert "measured" in comment[0] + comment[2]


def test_a_ring_is_as_fast_as_its_slowest_link():
    h100 = read_hardware("h100")
    assert [h100.link(count) for count in (2, 8, 9, 64)] == [450e9, 450e9, 50e9, 50e9]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": None}, "memory=null has the wrong type: it must be float"),
        ({"memory": 0}, "memory=0.0 is out of range: it must be positive"),
        ({"memory": float("nan")}, "memory=nan is out of range: it must be positive"),
        ({"link_between_nodes": -1e9}, "link_between_nodes=-1000000000.0 is out of range"),
        ({"training_efficiency": 1.5}, "training_efficiency=1.5 is out of range: it must be in (0, 1]"),
        ({"devices_per_node": 7.5}, "devices_per_node=7.5 has the wrong type: it must be int"),
        ({"bf16_flops": "fast"}, "bf16_flops='fast' has the wrong type"),
        ({"memroy": 1.0}, "unknown key memroy; did you mean memory? valid: bf16_flops"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_file(changes, said, tmp_path):
    file = tmp_path / "mine.yaml"
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(OmegaConf.load(PROFILES[0])) | changes), file)
    with pytest.raises(UsageError) as error:
        read_hardware(str(file))
    assert f"plan.hardware={file}" in str(error.value) and said in str(error.value)


def test_a_missing_field_is_named_with_its_file(tmp_path):
    file = tmp_path / "mine.yaml"
    lines = PROFILES[0].read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith("host_memory")))
    with pytest.raises(UsageError, match=r"mine.yaml: host_memory is missing: set host_memory=<value>"):
        read_hardware(str(file))


@pytest.mark.parametrize("text", ["memory: [", "- 1\n- 2\n", "hello", "\x00"], ids=repr)
def test_a_file_without_keys_is_named(text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"mine.yaml"):
        read_hardware(str(file))


def test_an_unknown_name_lists_the_profiles():
    with pytest.raises(UsageError, match=r"plan.hardware=h10 is neither .* did you mean h100\? valid: a100, h100"):
        read_hardware("h10")
