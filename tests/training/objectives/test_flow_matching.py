"""The flow-matching loss: its value, dropped conditions, padding, gradients; a tiny DiT learns two clips."""

from __future__ import annotations

import pytest
import torch
from build import SIZES, fixed, make_token2wav, seeded

from omni.code2wav.dit import DiT
from omni.code2wav.ode_sampler import ODEConfig, position_noise, sample_mel
from omni.config.token2wav import Token2WavConfig
from omni.layers.init import initialise
from omni.training.objectives.flow_matching import FlowBatch, FlowDraw, draw_flow, flow_matching_loss


def make_dit(width: int = 16) -> DiT:
    config = Token2WavConfig.from_dict(SIZES).dit_config.replace(hidden_size=width, head_dim=width // 2, dropout=0.0)
    with fixed():
        dit = DiT(config)
        initialise(dit, lambda name: 0.1)
    return dit


def make_batch(rows: int = 2, codes: int = 8, lengths: torch.Tensor | None = None) -> FlowBatch:
    rng = seeded(0)
    return FlowBatch(
        mel=torch.randn(rows, 2 * codes, 5, generator=rng),
        codes=torch.randint(1, 20, (rows, codes), generator=rng),
        speaker=torch.randn(rows, 3, generator=rng),
        reference_mel=torch.randn(rows, 9, 5, generator=rng),
        lengths=lengths,
    )


def draw_for(batch: FlowBatch, drop_rate: float = 0.2) -> FlowDraw:
    return draw_flow(batch.mel, seeded(1), drop_rate)


def randomise(dit: DiT) -> DiT:
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return dit


def test_loss_of_the_untrained_dit_is_the_velocitys_power() -> None:
    """It starts at velocity zero."""
    batch = make_batch()
    draw = draw_for(batch)
    expected = (batch.mel - draw.noise).square().mean()
    torch.testing.assert_close(flow_matching_loss(make_dit(), batch, draw), expected)


def test_dropped_rows_hear_no_condition() -> None:
    dit, batch = randomise(make_dit()), make_batch()
    other = make_batch(codes=8)
    other = FlowBatch(batch.mel, (other.codes + 1) % 20, -other.speaker, other.reference_mel + 1)
    for dropped in (True, False):
        draw = FlowDraw(torch.tensor([0.2, 0.7]), torch.randn(2, 16, 5), torch.full((2,), dropped))
        same = torch.allclose(flow_matching_loss(dit, batch, draw), flow_matching_loss(dit, other, draw))
        assert same == dropped
    assert draw_for(batch, 1.0).dropped.all() and not draw_for(batch, 0.0).dropped.any()


def test_padding_does_not_count() -> None:
    dit, lengths = randomise(make_dit()), torch.tensor([8, 3])
    batch = make_batch(lengths=lengths)
    draw = draw_for(batch)
    loss = flow_matching_loss(dit, batch, draw)
    mel = batch.mel.clone()
    mel[1, 6:] = 100
    torch.testing.assert_close(flow_matching_loss(dit, FlowBatch(mel, *list(vars(batch).values())[1:]), draw), loss)
    total = torch.zeros(())
    for row, n in enumerate(lengths.tolist()):
        one = FlowBatch(
            batch.mel[row : row + 1, : 2 * n],
            batch.codes[row : row + 1, :n],
            batch.speaker[row : row + 1],
            batch.reference_mel[row : row + 1],
        )
        part = FlowDraw(*(x[row : row + 1] for x in (draw.time, draw.noise[:, : 2 * n], draw.dropped)))
        total = total + n * flow_matching_loss(dit, one, part)
    torch.testing.assert_close(loss, total / lengths.sum())


def test_draws_repeat_and_bad_input_is_named() -> None:
    batch = make_batch()
    assert all(torch.equal(a, b) for a, b in zip(vars(draw_for(batch)).values(), vars(draw_for(batch)).values()))
    with pytest.raises(ValueError, match="drop_rate"):
        draw_flow(batch.mel, drop_rate=1.5)
    wrong = FlowBatch(batch.mel[:, 1:], batch.codes, batch.speaker, batch.reference_mel)
    with pytest.raises(ValueError, match="8 codes need 16 mel frames"):
        flow_matching_loss(make_dit(), wrong, draw_for(batch))


def test_gradients_reach_every_parameter() -> None:
    dit, batch = make_token2wav().dit, make_batch()
    draw = draw_for(batch, 0.0)
    flow_matching_loss(dit, batch, draw).backward()
    silent = [name for name, p in dit.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent, silent
    assert all(p.grad.isfinite().all() for p in dit.parameters() if p.grad is not None)


def test_a_tiny_dit_learns_two_clips() -> None:
    """The loss falls to a fraction, and sampling then gives each clip back, told apart by its codes and voice."""
    dit, batch = make_dit(width=32), make_batch()
    rng = seeded(2)
    rows = [0, 1] * 6
    many = FlowBatch(batch.mel[rows], batch.codes[rows], batch.speaker[rows], batch.reference_mel[rows])
    optimiser = torch.optim.AdamW(dit.parameters(), lr=4e-3)
    losses = []
    for _ in range(180):
        loss = flow_matching_loss(dit, many, draw_flow(many.mel, rng, drop_rate=0.1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0], (losses[0], losses[-20:])
    with torch.no_grad():
        reference = dit.encode_reference(torch.cat((batch.reference_mel, torch.zeros(2, 9, 5))))
        condition = dit.condition(batch.codes, batch.speaker, reference[:2])
        null = dit.condition(torch.zeros_like(batch.codes), torch.zeros(2, 3), reference[2:])
        mel = sample_mel(dit, position_noise([0, 1], 0, 16, 5), condition, null, ODEConfig(num_steps=6))
    error = (mel - batch.mel).square().mean((1, 2))
    swapped = (mel - batch.mel.flip(0)).square().mean((1, 2))
    assert (error < 0.5).all() and (swapped > 3 * error).all(), (error, swapped)
