"""The dense Thinker of the second family against the reference's decoder, on random tiny configs."""

from __future__ import annotations

import pytest
import torch
from build import CONFIGS, config_values
from oracle import assert_close
from oracle_qwen2_5 import converted_parts, reference_parts

from omni.checkpoint.keys import KeyTable
from omni.config.model import OmniConfig
from omni.config.qwen2_5_omni import QWEN2_5_OMNI
from omni.layers.init import MetaBuild
from omni.talker.single_codebook import SingleCodebookTalker
from omni.thinker.thinker import Thinker

KEYS = KeyTable.of(QWEN2_5_OMNI)

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_logits_and_states_of_a_padded_batch(seed: int) -> None:
    (reference, _), (thinker, _) = reference_parts(seed), converted_parts(seed)
    ids, lengths = torch.randint(0, 320, (2, 11)), [11, 8]
    mask = (torch.arange(11) < torch.tensor(lengths)[:, None]).long()
    positions = torch.randint(0, 60, (3, 2, 11))
    expected = reference.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    ours = thinker(thinker.embed_tokens(ids), positions.float(), lengths=lengths)
    for row, length in enumerate(lengths):
        assert_close(ours.hidden[row, :length], expected[row, :length])
        assert_close(ours.logits[row, :length], reference.lm_head(expected[row, :length]))
    assert ours.hidden is ours.final, "the Talker reads the states after the final norm"


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_greedy_decoding_after_a_prompt_with_media_positions(seed: int) -> None:
    (reference, _), (thinker, _) = reference_parts(seed), converted_parts(seed)
    embeds, positions = torch.randn(1, 9, thinker.config.text_config.hidden_size), torch.randint(0, 40, (3, 1, 9))
    following = int(positions.max()) + 1
    past = reference.model(inputs_embeds=embeds, position_ids=positions, use_cache=True)
    logits = reference.lm_head(past.last_hidden_state[:, -1])
    state = thinker.init_state(1)
    ours = thinker(embeds, positions.float(), state, logits="last").logits[:, 0]
    state.next_position.fill_(following)
    for step in range(6):
        assert_close(ours, logits)
        token = logits.argmax(-1)
        assert torch.equal(ours.argmax(-1), token)
        place = torch.full((3, 1, 1), following + step)
        past = reference.model(token[:, None], position_ids=place, past_key_values=past.past_key_values, use_cache=True)
        logits = reference.lm_head(past.last_hidden_state[:, -1])
        ours = thinker.step(token, state)


def test_key_names_are_those_of_the_files() -> None:
    for name, ours, reference in zip(("thinker", "talker"), converted_parts(0), reference_parts(0)):
        keys = {KEYS.to_hub(f"{name}.{key}") for key in ours.state_dict()}
        assert keys == {f"{name}.{key}" for key in reference.state_dict()}
        assert {KEYS.from_hub(key).partition(".")[0] for key in keys} == {name}


@pytest.mark.parametrize(
    ("size", "model", "head", "talker"),
    [("7b", 7_070_619_136, 544_997_376, 1_351_360_256), ("3b", 3_085_938_688, 311_164_928, 384_604_928)],
)
def test_released_parameter_counts(size: str, model: int, head: int, talker: int) -> None:
    """The counts of the released files (FACTS 3.9), on the meta device."""
    config = OmniConfig.from_pretrained(CONFIGS / f"qwen2_5_omni_{size}.json")
    with MetaBuild():
        parts = Thinker(config.thinker_config), SingleCodebookTalker(config.talker_config)
    thinker_count, talker_count = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert parts[0].lm_head.weight.numel() == head
    assert (thinker_count, talker_count) == (model + head, talker)


def test_own_ties_follow_the_thinker_not_its_text_config() -> None:
    values = config_values(0)
    values["thinker_config"]["text_config"]["tie_word_embeddings"] = True
    thinker = Thinker(OmniConfig.from_dict(values).thinker_config)
    assert thinker.lm_head.weight is not thinker.embed_tokens.weight
