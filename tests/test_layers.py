"""Rooms import what stands left of them, as the map in docs/design.md says."""

import ast

import pytest
from conftest import ROOT

ORDER = [
    {"types", "errors", "files", "interruption"},
    {"datasets", "model_kinds"},
    {"config", "linalg", "seeding", "losses", "distributed", "diagnostics"},
    {"models", "optim"},
    {"data", "records"},
    {"adaptation"},
    {"initialization"},
    {"training", "evaluation", "reports"},
    {"runs", "__init__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
ONLY = {
    "hydra": {"runs/cli"},
    "peft": {"adaptation", "initialization/start", "initialization/library", "initialization/methods/peft_methods"},
    "wandb": {"records/tracking"},
    "matplotlib": {"reports"},
}
FILES = sorted((ROOT / "lora_one").rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path):
    place = path.relative_to(ROOT / "lora_one").with_suffix("")
    room = place.parts[0]
    for module in imported(path):
        first, *rest = module.split(".")
        if first in ONLY:
            assert ONLY[first] & {room, place.as_posix()}, f"{first} belongs in {ONLY[first]}"
        if first == "lora_one" and rest and rest[0] != room:
            left = RANK[rest[0]] < RANK[room]
            neighbours = (room, rest[0]) in NEIGHBOURS
            assert left or neighbours, f"{room} imports {rest[0]}"


NEIGHBOURS = {
    ("data", "models"),
}
