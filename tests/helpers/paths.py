"""Where the project, the shared data and the real models are."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


def shared(path: str) -> Path:
    """A file of the real data beside the project, or a skip."""
    if not (SHARED / path).exists():
        pytest.skip(f"real data not here: {SHARED / path}")
    return SHARED / path


def real_model(name: str) -> Path:
    """A real pretrained model that ../shared/models/fetch_real.sh makes, or a skip."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "real_models"
    folder = Path(os.environ.get("REAL_MODELS") or default) / name
    if not (folder / "config.json").exists():
        pytest.skip(f"real model not here: {folder}; ../shared/models/fetch_real.sh makes it")
    return folder
