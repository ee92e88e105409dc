"""A cache of the hub with commits of one model."""

import shutil
from pathlib import Path

import pytest

from lora_one.models import BUNDLED


class HubModel:
    """some/model in an empty cache: the bundled model in each of its commits, of which the branch main is one."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
        self.repository = cache / "models--some--model"
        (self.repository / "refs").mkdir(parents=True)

    def commit(self, name: str) -> Path:
        """The folder of a commit; a new one is made."""
        folder = self.repository / "snapshots" / name
        return folder if folder.exists() else shutil.copytree(BUNDLED / "tiny", folder)

    def move(self, name: str) -> None:
        """Let main be this commit."""
        self.commit(name)
        (self.repository / "refs/main").write_text(name)
