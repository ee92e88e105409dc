"""The model card of a saved adapter: its README.md, as the Hugging Face hub expects it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_one.model_kinds import BY_TASK_TYPE, CAUSAL, CLASSIFIER
from lora_one.records.provenance import versions

PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}  # only the certain ones
SHOWN_VERSIONS = ("python", "lora-one", "torch", "transformers", "peft", "datasets")


@dataclass(frozen=True)
class CardFacts:
    """What the card says beyond the adapter's configuration. Empty parts are left out.

    method: its title.  initialisation, data, training: short facts, by name.  results: tables' rows; the first is the
    heading.  settings: all keys.  versions: of packages; None: those that are installed.
    base, revision: of the base model, if they are known better than from the adapter's configuration.
    """

    method: str | None = None
    initialisation: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Sequence[str]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] | None = None
    base: str | None = None
    revision: str | None = None
    labels: int | None = None
    notes: Sequence[str] = ()


def model_card(config: Mapping[str, Any], facts: CardFacts) -> str:
    """Return the text of README.md. config: the content of adapter_config.json."""
    base = facts.base or config.get("base_model_name_or_path") or None
    name = facts.method or "LoRA"
    found = versions() if facts.versions is None else facts.versions
    parts = [
        front_matter(base, config.get("task_type"), facts.method),
        f"# {name} adapter" + (f" for {short(base)}" if base else ""),
        f"A plain LoRA adapter (PEFT) that was initialised with {name}. It is for the original base model and "
        "needs nothing but PEFT to load."
        if facts.method
        else "A plain LoRA adapter (PEFT). It is for the original base model and needs nothing but PEFT to load.",
        *facts.notes,
        bullets("Model", base_lines(base, facts.revision) | adapter_lines(config)),
        bullets("Initialisation", facts.initialisation),
        bullets("Data", facts.data),
        bullets("Training", facts.training),
        table("Results", facts.results),
        "## How to load\n\n" + loading(config, base, facts),
        settings(facts.settings),
        bullets("Versions", {package: found[package] for package in SHOWN_VERSIONS if package in found}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def on_hub(base: str | None) -> bool:
    """Return whether a name can be a repository of the hub: ``owner/name`` or ``name``, and no local path."""
    return bool(base) and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)) and not Path(base).exists()


def front_matter(base: str | None, task: str | None, method: str | None) -> str:
    """Return the YAML block. The hub accepts only its own names in base_model, so a local path is left out."""
    tags = ["lora", "transformers"]
    data: dict[str, Any] = {}
    if on_hub(base):
        data["base_model"] = base
        tags.insert(0, f"base_model:adapter:{base}")
    if method:
        tags.append(re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-"))
    data["library_name"] = "peft"
    if task in PIPELINES:
        data["pipeline_tag"] = PIPELINES[task]
    data["tags"] = list(dict.fromkeys(tags))
    missing = "" if on_hub(base) else "# base_model: add the hub name of the base model before you upload this folder\n"
    return f"---\n{missing}{yaml.safe_dump(data, sort_keys=False)}---"


def short(base: str) -> str:
    """Return the name of a model, without the folders of a local path."""
    return base if on_hub(base) else Path(base).name


def base_lines(base: str | None, revision: str | None) -> dict[str, Any]:
    """Return the facts about the base model."""
    if base is None:
        return {"base model": "not recorded: the model had no name when the adapter was saved"}
    where = f"[{base}](https://huggingface.co/{base})" if on_hub(base) else f"local folder `{base}`"
    return {"base model": where + (f", revision `{revision}`" if revision else "")}


def adapter_lines(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about the adapter."""
    targets = config.get("target_modules") or ()
    kinds = [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if config.get(key)]
    ranks = (config.get("rank_pattern") or {}).values()
    names = [targets] if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets})
    return {
        "rank": f"{config.get('r')}, except {len(ranks)} layers with {min(ranks)} to {max(ranks)}"
        if ranks
        else config.get("r"),
        "alpha": f"{config.get('lora_alpha'):g}" + (f", with {' and '.join(kinds)}" if kinds else ""),
        "adapted layers": ", ".join(f"`{name}`" for name in names),
    }


def bullets(title: str, facts: Mapping[str, Any]) -> str:
    """Return a section with one line for each fact; "" without facts."""
    lines = [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    return f"## {title}\n\n" + "\n".join(lines) if lines else ""


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a section with a table; "" without rows."""
    if len(rows) < 2:
        return ""
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return f"## {title}\n\n" + "\n".join(lines)


def loading(config: Mapping[str, Any], base: str | None, facts: CardFacts) -> str:
    """Return the code that loads the base and the adapter."""
    kind = BY_TASK_TYPE.get(config.get("task_type"), CAUSAL)
    head = f", num_labels={facts.labels}" if kind is CLASSIFIER and facts.labels else ""
    revision = f', revision="{facts.revision}"' if facts.revision else ""
    name = base or "<the base model>"
    return "\n".join(
        [
            "```python",
            "from peft import PeftModel",
            f"from transformers import {kind.auto_class}, AutoTokenizer",
            "",
            f'base = {kind.auto_class}.from_pretrained("{name}"{revision}{head})',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{revision})',
            'model = PeftModel.from_pretrained(base, "<this folder, or its name on the hub>")',
            "```",
        ]
    )


def settings(keys: Mapping[str, Any]) -> str:
    """Return a section with all keys; "" without keys."""
    if not keys:
        return ""
    return f"## Settings\n\n```yaml\n{yaml.safe_dump(dict(keys), sort_keys=False)}```"
