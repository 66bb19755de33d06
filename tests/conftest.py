"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.packaged.toy import toy_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder: the packaged tiny model with random weights, and its processor files."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    toy_model(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> OmniModel:
    """The tiny random model, far enough from uniform that greedy choices differ between prompts, with its processor."""
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_pretrained(ROOT / "configs" / "tiny.json"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and not name.startswith("code2wav"):
                p.mul_(10)
    model.processor = OmniProcessor.from_pretrained(ROOT / "omni" / "packaged" / "toy_data")
    return model
