"""What several processes decide together; the tests with real processes are beside the code that they share."""

import pytest

from lora_one.distributed import Processes
from lora_one.errors import UsageError


def refuse():
    raise UsageError("mine")


@pytest.mark.parametrize(
    ("check", "everywhere", "said"),
    [
        (lambda: None, ["", "", ""], None),
        (lambda: None, ["", "", "of process 2"], "of process 2"),
        (refuse, ["mine", "of process 1", ""], "mine"),
    ],
)
def test_a_refusal_of_one_process_is_that_of_all(check, everywhere, said, monkeypatch):
    """Otherwise the others would wait for it, or do another job of a sweep."""
    given = []
    monkeypatch.setattr(Processes, "gathered", lambda _, message: given.append(message) or everywhere)
    if said is None:
        Processes(0, 3).refuse_together(check)
    else:
        with pytest.raises(UsageError, match=said):
            Processes(0, 3).refuse_together(check)
    assert given == everywhere[:1]
