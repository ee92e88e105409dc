"""The start as a whole: its figures, the search for gamma, the cache, and DoRA-One."""

import json
import shutil

import pytest
import torch

from lora_one.data.encode import batches_of
from lora_one.errors import RunError
from lora_one.initialization import start as start_room
from lora_one.initialization.cache import Cache, content_of
from lora_one.runs import initial_model
from tests.helpers.examples import examples
from tests.helpers.runs import attach_llama, finish, lora_tensors, small_run


# the cache
def never():
    raise AssertionError("it was in the cache")


@pytest.mark.parametrize(
    "overrides",
    [
        ("init.direction=LoRA-One",),
        ("init.scale=search",),
        ("init.direction=LoRA-GA",),
        ("init.direction=LoRA-SB",),
        ("init=pissa",),
    ],
)
def test_cached_start_is_bitwise_the_same(tmp_path, monkeypatch, overrides):
    """Bit for bit, adapters and base; nothing is computed the second time."""
    said = []
    cache = Cache(tmp_path, {"method": overrides[0]}, said.append)
    model, start = attach_llama(*overrides, cached=cache)
    monkeypatch.setattr(start_room, "solve", lambda *_: never())
    monkeypatch.setattr(start_room, "solve_by_peft", lambda *_: never())
    again, known = attach_llama(*overrides, cached=cache)
    assert known.solution.seconds > start.solution.seconds == 0  # what it cost when it was computed
    for (name, one), two in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    for name in ("energies", "examples", "predicted_decrease", "searched"):
        assert getattr(known.solution, name) == getattr(start.solution, name), name
    # the factors have one layout in memory, so that the sums of their products have one order
    assert known.relative_shift == start.relative_shift
    assert known.initial_factors.keys() == start.initial_factors.keys()
    computed = f"init.cache: computed, because {tmp_path} contains no initialisation yet"
    assert said == [computed, f"init.cache: read from {cache.file}"]


def test_changed_key_is_recomputed_with_a_reason(tmp_path):
    said = []
    one = {"init.seed": 1, "init.gamma": 64.0, "model.name": "a"}
    attach_llama(cached=Cache(tmp_path, one, said.append))
    attach_llama(cached=Cache(tmp_path, one | {"init.seed": 2, "model.name": "b", "init.gamma": 3}, said.append))
    attach_llama(cached=Cache(tmp_path, one | {"init.seed": 2}, said.append))
    assert (
        said[2]
        == f"init.cache: computed, because the most similar entry of {tmp_path} differs in init.seed (1 there, 2 here)"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_truncated_entry_is_recomputed(tmp_path, suffix):
    said = []
    cache = Cache(tmp_path, {"seed": 1}, said.append)
    model, _ = attach_llama(cached=cache)
    cache.file.with_suffix(suffix).write_bytes(cache.file.with_suffix(suffix).read_bytes()[:40])
    again, _ = attach_llama(cached=cache)
    assert said[1].startswith("init.cache: computed")
    attach_llama(cached=cache)
    assert said[2].startswith("init.cache: read from")
    assert all(torch.equal(value, lora_tensors(again)[name]) for name, value in lora_tensors(model).items())


def test_two_jobs_may_write_the_same_entry(tmp_path):
    """The second one finishes and writes while the first one still computes."""
    said, key = [], {"seed": 1}
    inner = Cache(tmp_path, key, said.append)

    def solve_slowly():
        attach_llama(cached=inner)
        return inner.read()

    model, _ = attach_llama(cached=lambda solve: Cache(tmp_path, key, said.append)(solve_slowly))
    again, start = attach_llama(cached=inner)
    assert [text.split(",")[0] for text in said[:2]] == ["init.cache: computed"] * 2
    assert start.solution.cached and sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert all(torch.equal(value, lora_tensors(again)[name]) for name, value in lora_tensors(model).items())


def test_cache_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"init\.cache=.*file cannot be written .*another folder"):
        Cache(tmp_path / "file", {}, lambda text: None)(never)  # before the work, not after it


def test_an_initialisation_that_cannot_be_stored_is_not_lost(tmp_path, monkeypatch):
    def full(tensors, file):
        raise OSError("No space left on device")

    monkeypatch.setattr("lora_one.initialization.cache.save_file", full)
    said = []
    _, start = attach_llama(cached=Cache(tmp_path, {"seed": 1}, said.append))
    assert start.solution.factors and not start.solution.cached and not list(tmp_path.iterdir())
    assert said[1] == f"note: init.cache: the initialisation cannot be stored in {tmp_path} (No space left on device)"


@pytest.mark.parametrize("content", ["[{}]", "null", '{"key": "k"}', '{"key": {"seed": 1}, "layers": 3}', "{"])
def test_other_files_in_the_folder_are_passed_over(tmp_path, content):
    said, key = [], {"seed": 1}
    cache = Cache(tmp_path, key, said.append)
    (tmp_path / "other.json").write_text(content)
    cache.file.with_suffix(".json").write_text(content)
    attach_llama(cached=cache)
    assert said[0].startswith("init.cache: computed, because ")
    attach_llama(cached=cache)
    assert said[1].startswith("init.cache: read from")


def test_an_entry_with_the_name_of_another_is_not_read(tmp_path):
    said = []
    one, other = (Cache(tmp_path, {"seed": seed}, said.append) for seed in (1, 2))
    attach_llama(cached=one)
    for suffix in (".json", ".safetensors"):
        shutil.copy(one.file.with_suffix(suffix), other.file.with_suffix(suffix))
    assert one.read() is not None and other.read() is None


def test_key_contains_where_and_how_it_is_computed(tmp_path, llama_folder):
    """Sums of other kernels, or of parts in another order, differ in the last digits."""
    cache = ("model.epochs=0", f"init.cache={tmp_path / 'cache'}", "overwrite=true")
    finish(small_run(tmp_path, llama_folder, *cache))
    key = json.loads(next((tmp_path / "cache").glob("*.json")).read_text())["key"]
    assert (key["device"], key["processes"], key["attention"], key["model.sharded"]) == ("cpu", 1, "sdpa", False)


def test_key_contains_what_the_factors_depend_on(tmp_path, llama_folder, capsys):
    """Learning rate and rank of the processes do not matter; examples, rank, seed and gamma do."""
    changes = {
        "model.learning_rate=1e-3": None,
        "init.memory=low overwrite=true": None,
        "init.stable_gamma=64": "init.stable_gamma",
        "peft.lora_r=4": "peft.lora_r",
        "init.max_length=40": "init.max_length",
        "dataset.data_seed=7": "examples",
        "init.seed=5": "init.seed",
        "peft=qv": "peft.lora_target_modules",
        "model.bf16=true": "model.bf16",
        "init.dtype=bf16": "init.dtype",
    }
    cache = ("model.epochs=0", f"init.cache={tmp_path / 'cache'}")
    finish(small_run(tmp_path, llama_folder, *cache))
    for change, key in changes.items():
        capsys.readouterr()
        finish(small_run(tmp_path, llama_folder, *cache, *change.split()))
        shown = capsys.readouterr().out
        told = next(
            (line for line in shown.splitlines() if line.startswith(("init.cache: read", "init.cache: comp"))), shown
        )
        assert ("read from" in told) if key is None else ("computed" in told and key in told), (change, told)


def test_changed_code_is_another_key(tmp_path, llama_folder, monkeypatch, capsys):
    cache = ("model.epochs=0", f"init.cache={tmp_path / 'cache'}")
    finish(small_run(tmp_path, llama_folder, *cache))
    monkeypatch.setattr(initial_model, "source_fingerprint", lambda: "other")
    finish(small_run(tmp_path, llama_folder, *cache, "overwrite=true"))
    assert "differs in code (" in capsys.readouterr().out


def test_content_tells_batches_apart():
    one, two = batches_of(examples(), 2, 0), batches_of(examples(), 2, 0)
    assert content_of(one) == content_of(two) != content_of(one[:2])
    two[1]["labels"][0, -1] += 1
    assert content_of(one) != content_of(two)
