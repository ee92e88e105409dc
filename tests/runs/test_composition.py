"""From overrides to a checked configuration: the micro-batch that fits, in the folder of the same experiment."""

import pytest

from lora_one.errors import UsageError
from lora_one.runs.composition import compose


@pytest.mark.parametrize(
    ("overrides", "micro"),
    [
        (["model.real_batch_size=8"], 8),
        (["model.real_batch_size=48"], 24),
        (["model.real_batch_size=64"], 32),
        (["model=t5base", "dataset=mrpc", "model.real_batch_size=16"], 16),
        (["model=llama", "model.real_batch_size=8"], 1),
        (["model.real_batch_size=8", "model.per_device_batch_size=4"], 4),
    ],
    ids=str,
)
def test_micro_batch_of_a_file_is_lowered_to_a_divisor_of_the_batch(overrides, micro):
    assert compose(overrides).model.per_device_batch_size == micro


@pytest.mark.parametrize("size", ["++model.per_device_batch_size=32", "model.per_device_batch_size=32"])
def test_micro_batch_of_the_command_line_is_not_changed(size):
    with pytest.raises(UsageError, match=r"real_batch_size=8 is not divisible by model\.per_device_batch_size=32"):
        compose(["model.real_batch_size=8", size])


@pytest.mark.parametrize("value", ["0", "-8", "many", "null", "true", "${nothing}"])
def test_a_batch_that_is_no_number_is_refused_as_such(value):
    with pytest.raises(UsageError, match=r"real_batch_size|nothing"):
        compose([f"model.real_batch_size={value}"])
