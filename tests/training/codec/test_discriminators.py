"""Discriminators: waves of any length, what is quiet counts in levels, they learn and teach the codec."""

from __future__ import annotations

import math

import pytest
import torch
from build import fixed
from test_codec_training import RATE, make_codec, mean, noise, sounds
from torch import Tensor

from omni.training.codec.codec_losses import discriminator_loss, feature_matching_loss, generator_loss
from omni.training.codec.discriminators import Discriminators


def small_discriminators() -> Discriminators:
    with fixed(1):
        return Discriminators(width=4, periods=(3,), scales=(2,), windows=(128,), levels=(128,))


@pytest.mark.parametrize("samples", [1, 97, 1000])
def test_discriminators_take_waves_of_any_length(samples: int) -> None:
    judgements = small_discriminators()(noise(2, samples))
    assert len(judgements) == 4
    for logits, features in judgements:
        assert logits.dim() == 2 and len(logits) == 2 and logits.numel() >= 2
        assert len(features) >= 4 and all(len(f) == 2 for f in features)
    with pytest.raises(ValueError, match="multiple of 4"):
        Discriminators(width=6)
    with pytest.raises(ValueError, match="at least one"):
        Discriminators(periods=(), scales=(), windows=())


def test_levels_are_judged_however_quiet() -> None:
    """A change far below the loudest sound changes what is judged of levels by much more than of the spectrum."""
    (judge,) = Discriminators(width=4, periods=(), scales=(), windows=(), levels=(256,)).parts
    (plain,) = Discriminators(width=4, periods=(), scales=(), windows=(256,)).parts
    loud = torch.sin(2 * math.pi * 300 * torch.arange(2400) / RATE)[None] * 0.5
    views = []
    for part in (judge, plain):
        seen: list[Tensor] = []
        part.layers[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            part(loud)
            part(loud + 1e-3 * noise(1, 2400))
        views.append(float((seen[0] - seen[1]).square().mean().sqrt() / seen[0].std()))
    assert views[0] > 20 * views[1] and views[0] > 0.05


def test_discriminators_learn_and_teach_the_codec() -> None:
    codec, judges = make_codec(), small_discriminators()
    real = sounds(0.1)
    fake = codec(real).wave
    real = real[:, : fake.shape[1]]
    optimizer = torch.optim.AdamW(judges.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        true, false = judges(real), judges(fake.detach())
        loss = mean(discriminator_loss([j.logits for j in true], [j.logits for j in false]))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in judges.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    judges.requires_grad_(False)
    true, false = judges(real), judges(fake)
    adversarial = mean(generator_loss([j.logits for j in false]))
    matching = mean(feature_matching_loss([j.features for j in false], [j.features for j in true]))
    for loss in (adversarial, matching):
        codec.zero_grad()
        loss.backward(retain_graph=True)
        silent = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == ["code2wav.code_embedding.weight"]  # learns from the codebook loss alone
