"""Talker, residual-code head and load-balancing loss against the reference, module by module."""

from __future__ import annotations

import pytest
import torch
from oracle import VARIANTS, assert_close, converted_model, reference_model

from omni.layers.moe import load_balancing_loss


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_talker_logits_and_hidden_states(name: str) -> None:
    reference, talker = reference_model(name).talker, converted_model(name).talker
    embeds = torch.randn(2, 12, talker.config.text_config.hidden_size)
    positions = torch.rand(3, 2, 12) * 40
    expected = reference.model(inputs_embeds=embeds, attention_mask=torch.ones(2, 12).long(), position_ids=positions)
    ours = talker(embeds, positions)
    assert_close(ours.hidden, expected.last_hidden_state)
    assert_close(ours.logits, reference.codec_head(expected.last_hidden_state))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_residual_code_logits(name: str) -> None:
    """One teacher-forced pass here equals the reference's heads, one call each."""
    predictor, mtp = reference_model(name).talker.code_predictor, converted_model(name).talker.mtp
    residual, codebook = mtp.config.num_code_groups - 1, mtp.config.vocab_size
    hidden, first = torch.randn(2, 6, mtp.config.hidden_size)
    codes = torch.randint(0, codebook, (6, residual))
    ours = mtp(hidden, first, codes)
    embeds = torch.stack((hidden, first), 1)
    for i in range(residual):
        expected = predictor(inputs_embeds=embeds, generation_steps=i).logits[:, -1]
        assert_close(ours[:, i], expected)
        embeds = torch.cat((embeds, predictor.get_input_embeddings()[i](codes[:, i : i + 1])), 1)
    greedy, _ = mtp.generate(hidden, first, lambda logits, _: logits.argmax(-1))
    expected_codes = predictor.generate(
        inputs_embeds=torch.stack((hidden, first), 1), max_new_tokens=residual, do_sample=False
    )
    assert torch.equal(greedy, expected_codes)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss(masked: bool) -> None:
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

    logits = [torch.randn(20, 8) for _ in range(3)]
    mask = (torch.rand(2, 10) > 0.3).long() if masked else None
    expected = load_balancing_loss_func(tuple(logits), 8, 2, mask)
    ours = load_balancing_loss(logits, 2, None if mask is None else mask.flatten().bool())
    torch.testing.assert_close(ours, expected)
