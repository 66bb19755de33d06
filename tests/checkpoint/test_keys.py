"""The key table: both directions are inverse, and the released names land where the modules are."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni.checkpoint.keys import KeyTable, Slot
from omni.config.qwen3_omni import QWEN3_OMNI

KEYS = KeyTable.of(QWEN3_OMNI)
word = st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True)
tail = st.lists(st.one_of(word, st.integers(0, 127).map(str)), min_size=1, max_size=5).map(".".join)

# one released key of every kind, and where it belongs
RELEASED = {
    "thinker.audio_tower.layers.31.self_attn.q_proj.bias": "audio_encoder.layers.31.self_attn.q_proj.bias",
    "thinker.visual.merger_list.2.mlp.0.weight": "vision_encoder.merger_list.2.mlp.0.weight",
    "thinker.model.embed_tokens.weight": "thinker.embed_tokens.weight",
    "thinker.model.layers.47.mlp.gate.weight": "thinker.layers.47.mlp.gate.weight",
    "thinker.model.norm.weight": "thinker.norm.weight",
    "thinker.lm_head.weight": "thinker.lm_head.weight",
    "talker.model.codec_embedding.weight": "talker.codec_embedding.weight",
    "talker.model.layers.19.mlp.shared_expert_gate.weight": "talker.layers.19.mlp.shared_expert_gate.weight",
    "talker.text_projection.linear_fc1.bias": "talker.text_projection.linear_fc1.bias",
    "talker.hidden_projection.linear_fc2.weight": "talker.hidden_projection.linear_fc2.weight",
    "talker.codec_head.weight": "talker.codec_head.weight",
    "talker.code_predictor.model.codec_embedding.14.weight": "talker.mtp.codec_embedding.14.weight",
    "talker.code_predictor.model.layers.4.mlp.up_proj.weight": "talker.mtp.layers.4.mlp.up_proj.weight",
    "talker.code_predictor.model.norm.weight": "talker.mtp.norm.weight",
    "talker.code_predictor.lm_head.14.weight": "talker.mtp.lm_head.14.weight",
    "code2wav.decoder.5.alpha": "code2wav.decoder.5.alpha",
}


@pytest.mark.parametrize("key", RELEASED)
def test_released_names(key):
    assert KEYS.from_hub(key) == RELEASED[key]
    assert KEYS.to_hub(RELEASED[key]) == key
    assert KEYS.slot(key) == Slot(RELEASED[key])


@given(st.sampled_from([hub for _, hub in KEYS.renames]), tail)
def test_hub_names_survive_the_round_trip(prefix, rest):
    key = prefix + rest
    if any(key.startswith(other) for _, other in KEYS.also_read):
        return  # spellings that are read but not written
    assert KEYS.to_hub(KEYS.from_hub(key)) == key


@given(st.sampled_from([ours for ours, _ in KEYS.renames]), tail)
def test_our_names_survive_the_round_trip(prefix, rest):
    name = prefix + rest
    hub = KEYS.to_hub(name)
    if re.match(r"thinker\.model\.(audio_tower|visual|language_model)\.", hub):
        return  # no module of ours is called so
    assert KEYS.from_hub(hub) == name


@given(st.sampled_from(KEYS.also_read), tail)
def test_in_memory_names_of_the_reference_are_read(pair, rest):
    ours, hub = pair
    assert KEYS.from_hub(hub + rest) == ours + rest


def test_unknown_prefix_has_no_place():
    assert KEYS.slot("thinker.audio_towers.conv.weight") is None
    assert KEYS.slot("model.layers.0.weight") is None


def test_experts_are_pieces_of_stacked_parameters():
    key = "thinker.model.layers.3.mlp.experts.{}.{}_proj.weight"
    gate_up, down = "thinker.layers.3.mlp.experts.gate_up_proj", "thinker.layers.3.mlp.experts.down_proj"
    assert KEYS.slot(key.format(12, "up")) == Slot(gate_up, 12, "up")
    assert KEYS.slot(key.format(0, "down")) == Slot(down, 0, "down")
    assert list(KEYS.separate(gate_up, 2)) == [
        (key.format(e, piece), Slot(gate_up, e, piece)) for e in (0, 1) for piece in ("gate", "up")
    ]
    stacked = torch.arange(2 * 6 * 2).reshape(2, 6, 2)  # [E, 2I, D]
    assert torch.equal(Slot(gate_up, 1, "gate").of(stacked), stacked[1, :3])
    assert torch.equal(Slot(gate_up, 1, "up").of(stacked), stacked[1, 3:])
    assert torch.equal(Slot(down, 1, "down").of(stacked), stacked[1])
    assert Slot(gate_up).of(stacked) is stacked
