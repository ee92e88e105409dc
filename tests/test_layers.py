"""Each room of lora_one imports only rooms below it; files and functions are short; names stay in their rooms."""

import ast
import re
import runpy

import pytest

from lora_one.config.methods import METHODS
from lora_one.evaluation import BENCHMARKS
from tests.helpers.paths import ROOT

ORDER = [  # from the bottom
    {"types", "errors", "invocation", "progress", "quiet"},
    {"interruption", "files", "datasets", "model_kinds", "peers"},
    {"config", "linalg", "seeding", "losses", "distributed", "diagnostics", "statistics"},
    {"models", "optim"},
    {"data", "records"},
    {"adaptation"},
    {"initialization"},
    {"training", "evaluation", "reports"},
    {"runs", "__init__"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
ONLY = {
    "hydra": {"runs/cli", "runs/composition", "runs/explanations", "runs/planned_jobs", "runs/sweep_compositions"},
    "peft": {"adaptation"}
    | {f"initialization/{file}" for file in ("start", "scale_search", "library", "methods/peft_methods")},
    "wandb": {"records/tracking"},
    "matplotlib": {"reports"},
    "scipy": {"statistics"},
}
FILES = sorted((ROOT / "lora_one").rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lora_one":
            yield from (f"lora_one.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    place = path.relative_to(ROOT / "lora_one").with_suffix("")
    room = place.parts[0]
    for module in imported(path):
        first, *rest = module.split(".")
        if first in ONLY:
            assert ONLY[first] & {room, place.as_posix()}, f"{first} belongs in {ONLY[first]}"
        if first == "lora_one" and rest and rest[0] != room:
            assert RANK[rest[0]] < RANK[room], f"{room} imports {rest[0]}"


def test_the_picture_shows_the_rooms_as_they_are():
    script = runpy.run_path(str(ROOT / "scripts/draw_rooms.py"))
    assert (ROOT / "docs/rooms.svg").read_text() == script["drawing"](script["graph_of_rooms"]()), "run the script"


ELSEWHERE = {"benchmarks", "contracts", "docs", "helpers", "scripts", "whole"}  # of tests/, not rooms of lora_one
TESTS = sorted(
    path
    for path in (ROOT / "tests").rglob("*.py")
    if path.name not in ("__init__.py", "conftest.py", "test_layers.py")
    and path.relative_to(ROOT / "tests").parts[0] not in ELSEWHERE
)


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_mirror_the_rooms(path):
    """tests/<room>/test_<file>[_<aspect>].py tests lora_one/<room>/<file>.py, or lora_one/<room>/__init__.py."""
    folder = ROOT / "lora_one" / path.relative_to(ROOT / "tests").parent
    rooms = {file.stem for file in [*folder.glob("*.py"), *folder.glob("*/__init__.py")]}
    rooms |= {file.parent.name for file in folder.glob("*/__init__.py")} | {folder.name}
    name = path.stem.removeprefix("test_")
    assert any(name == room or name.startswith(f"{room}_") for room in rooms), "named after no file of that room"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_tests_share_is_in_tests_helpers(path):
    for module in imported(path):
        assert not module.startswith("tests.") or module.startswith("tests.helpers"), module


def code_lines(function):
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    return lines - (first.end_lineno - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    """At most 300 lines a file and 60 a function, docstring aside."""
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= 60, node.name


OWNERS = (
    "config/methods",
    "config/aliases",
    "initialization/methods",
    "initialization/library",
    "datasets",
    "evaluation",
)
WORDS = {"chat", "default", "gradient", "lora", "lora_xs", "json", "math", "text"}  # also the names of other things
CHOICES = {path.stem for group in ("init", "dataset") for path in (ROOT / "conf" / group).glob("[!_]*.yaml")}
NAMES = ((CHOICES | set(BENCHMARKS)) - WORDS) | {f"eval_{name}.py" for name in BENCHMARKS}
TITLES = {method.title for method in METHODS.values() if "-" in method.title or method.title == "LoftQ"}
SHARED = {"__init__", "description", "questions", "settings", "sources"}
FILES_OF_CHOICES = {f"datasets.{path.stem}" for path in (ROOT / "lora_one/datasets").glob("*.py")}
FILES_OF_CHOICES -= {f"datasets.{name}" for name in SHARED}
FILES_OF_CHOICES |= {f"evaluation.{name}" for name in BENCHMARKS}
OTHERS = [path for path in FILES if not path.relative_to(ROOT / "lora_one").as_posix().startswith(OWNERS)]


def strings(tree):
    """Yield (line, text) of each string, and of each part of an f-string, except docstrings."""
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(node.body[0].value) for node in documented if node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_method_data_set_or_benchmark_is_named_outside_its_room(path):
    """Neither as a string, nor as a word of a message (dataset=squad, eval_mmlu.py), nor by an import of its file."""
    tree = ast.parse(path.read_text())
    for line, text in strings(tree):
        assert not NAMES.intersection(re.findall(r"[\w./]+", text)), line
        assert not [title for title in TITLES if title in text], line
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            assert not FILES_OF_CHOICES & {module.removeprefix("lora_one.") for module in modules}, node.lineno
