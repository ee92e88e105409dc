"""What the documents say is in the tree."""

import re
import subprocess

import pytest

from tests.helpers.paths import ROOT

DEFECTS = (ROOT / "docs/defects.md").read_text()


def test_all_36_defects_have_their_row():
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", DEFECTS, re.MULTILINE)] == list(range(1, 37))


@pytest.mark.parametrize(
    "row", [line for line in DEFECTS.splitlines() if re.match(r"\| \d", line)], ids=lambda r: r[2:5].strip()
)
def test_named_tests_exist(row):
    file = None
    for reference in re.findall(r"`((?:[\w/]+\.py)?(?:::\w+)?)`", row):
        name, _, function = reference.partition("::")
        file = name or file
        if not file:
            continue
        path = ROOT / "tests" / file if (ROOT / "tests" / file).exists() else ROOT / "lora_one" / file
        assert path.exists(), reference
        assert not function or f"def {function}(" in path.read_text(), reference


def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.splitlines() if (ROOT / name).is_file()]


def test_no_placeholder_is_left():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"\b[A-Z]+_TABLE\b|\bTBD\b", path.read_text()), path.name


def test_no_token_is_in_the_tree():
    token = re.compile(
        rb"hf_[A-Za-z0-9]{30,}|\b[0-9a-f]{40}\b(?=.{0,20}wandb)|wandb.{0,20}\b[0-9a-f]{40}\b|gh[pousr]_[A-Za-z0-9]{30,}"
    )
    assert [path.name for path in tracked() if token.search(path.read_bytes())] == []


def test_bundled_files_stay_small():
    sizes = {path.name: path.stat().st_size for path in tracked() if "assets" in path.parts}
    assert sizes["model.safetensors"] <= 6e6 and sum(sizes.values()) <= 7e6


def test_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in set(
        re.findall(r"\b(?:eval|scripts|docs|conf|lora_one|benchmarks|tests)/[\w/.-]+\.(?:py|md|yaml|sh)\b", text)
    ):
        assert (ROOT / name).exists() or f"{name}: not built" in text.replace("`", ""), name
