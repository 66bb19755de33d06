"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni.demo import demo_model


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder: the packaged tiny model with random weights, and its processor files."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    demo_model(seed=0).save_pretrained(folder)
    return folder
