"""Sampling: per-row settings, reproducible streams, the right distribution."""

from __future__ import annotations

import pytest
import torch

from omni.generation.sampling import CODE_STREAM, TEXT_STREAM, RowSampling, SamplingConfig, gumbel_noise

GREEDY = SamplingConfig(temperature=0)


def rows(configs: list[SamplingConfig], seeds: list[int], stream: int = TEXT_STREAM) -> RowSampling:
    return RowSampling.of(configs, torch.tensor(seeds), stream)


def draws(config: SamplingConfig, logits: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    sampling = rows([config] * count, [seed] * count)
    return sampling.draw(logits.expand(count, -1), torch.arange(count))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.1),
     ("repetition_penalty", 0)],
)  # fmt: skip
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingConfig(**{field: value})  # type: ignore[arg-type]


def test_a_misspelt_setting_names_the_right_one() -> None:
    with pytest.raises(ValueError, match="temperature"):
        SamplingConfig.of({"temprature": 1.0})
    with pytest.raises(TypeError, match="SamplingConfig"):
        SamplingConfig.of(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [1, None, ("top_k",), b"top_k"], ids=str)
def test_a_setting_whose_name_is_no_text_is_refused(key) -> None:
    with pytest.raises(ValueError, match=r"SamplingConfig has no field .*(it has|did you mean)"):
        SamplingConfig.of({key: 1})


def test_noise_is_a_function_of_seed_stream_step_and_index() -> None:
    noise = gumbel_noise(torch.tensor([7, 7, 8]), TEXT_STREAM, torch.tensor([3, 4, 3]), 1000)
    assert torch.equal(noise[:1], gumbel_noise(torch.tensor([7]), TEXT_STREAM, torch.tensor([3]), 1000))
    assert torch.equal(noise[0, :10], gumbel_noise(torch.tensor([7]), TEXT_STREAM, torch.tensor([3]), 10)[0])
    others = (noise[1], noise[2], gumbel_noise(torch.tensor([7]), CODE_STREAM, torch.tensor([3]), 1000)[0])
    for other in others:
        assert torch.corrcoef(torch.stack((noise[0], other)))[0, 1].abs() < 0.15
    large = gumbel_noise(torch.arange(64), TEXT_STREAM, torch.zeros(64, dtype=torch.int64), 4096)
    assert large.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert large.var().item() == pytest.approx(1.6449, abs=0.02)  # pi^2 / 6
    assert torch.isfinite(large).all()


def test_neutral_sampling_draws_the_model_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    counts = torch.bincount(draws(SamplingConfig(), logits, 20000), minlength=4) / 20000
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=0.012, rtol=0)


def test_temperature_top_k_and_top_p_follow_the_reference_order() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 40) * 3
    config = SamplingConfig(temperature=0.7, top_k=12, top_p=0.8)
    expected = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    counts = torch.bincount(draws(config, logits, 20000), minlength=40) / 20000
    torch.testing.assert_close(counts, expected[0].softmax(-1), atol=0.012, rtol=0)
    assert (counts[expected[0] == -float("inf")] == 0).all()


def test_top_p_keeps_at_least_one_and_top_k_may_exceed_the_vocabulary() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    assert set(draws(SamplingConfig(top_p=1e-6), logits, 50).tolist()) == {1}
    assert set(draws(SamplingConfig(top_k=1), logits, 50).tolist()) == {1}
    assert set(draws(SamplingConfig(top_k=99, temperature=5.0), logits, 500).tolist()) == {0, 1, 2}


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.4]])
    seen = torch.tensor([[True, False, True, False]])
    greedy = SamplingConfig(temperature=0, repetition_penalty=1.5)
    sampling = rows([greedy], [0])
    assert sampling.draw(logits, torch.zeros(1), seen).item() == 1
    assert sampling.draw(logits, torch.zeros(1), torch.zeros_like(seen)).item() == 0
    low = torch.tensor([[-9.0, -9.0, -1.0, -1.4]])
    assert sampling.draw(low, torch.zeros(1), seen).item() == 3


def test_banned_tokens_are_never_drawn() -> None:
    banned = torch.tensor([False, True, False])
    sampling = rows([SamplingConfig()] * 200, [0] * 200)
    got = sampling.draw(torch.tensor([[0.0, 20.0, 0.0]]).expand(200, -1), torch.arange(200), banned=banned)
    assert set(got.tolist()) == {0, 2}


def test_every_row_has_its_own_settings_and_does_not_see_its_neighbours() -> None:
    logits = torch.randn(4, 30)
    configs = [GREEDY, SamplingConfig(), SamplingConfig(0.5, 5), SamplingConfig(1.2, 0, 0.6, 1.3)]
    seen = torch.rand(4, 30) > 0.5
    steps = torch.tensor([0, 5, 2, 9])
    together = rows(configs, [1, 2, 3, 4]).draw(logits, steps, seen)
    for i in range(4):
        alone = rows(configs[i : i + 1], [i + 1]).draw(logits[i : i + 1], steps[i : i + 1], seen[i : i + 1])
        assert alone.item() == together[i].item()
    assert together[0] == logits[0].argmax()
