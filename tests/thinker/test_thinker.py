"""The Thinker and the merging of media, without the reference."""

from __future__ import annotations

import pytest
import torch
from build import fixed, tiny_config

from omni.layers.init import initialise
from omni.layers.packing import PackedBlocks
from omni.thinker.merge import lay_out_taps, merge_embeddings
from omni.thinker.thinker import Thinker

CONFIG = tiny_config().thinker_config


@pytest.fixture(scope="module")
def thinker() -> Thinker:
    with fixed():
        model = Thinker(CONFIG, accept_layer=3).eval()
        initialise(model, lambda _: 0.2)
    return model


def prompt(thinker: Thinker, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 250, (rows, tokens))
    return thinker.embed_tokens(ids).detach(), torch.arange(float(tokens)).expand(3, rows, -1)


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [3, 1, 8]])
def test_chunked_prefill_equals_one_pass(thinker: Thinker, cuts: list[int]) -> None:
    embeds, positions = prompt(thinker, 2, 12)
    taps = torch.randn(2, *embeds.shape)
    whole = thinker(embeds, positions, taps=taps)
    state = thinker.init_state(2, capacity=4)
    at, logits, hidden = 0, [], []
    for n in cuts:
        piece = slice(at, at + n)
        out = thinker(embeds[:, piece], positions[:, :, piece], state, taps=taps[:, :, piece])
        logits.append(out.logits)
        hidden.append(out.hidden)
        at += n
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(hidden, 1), whole.hidden, atol=1e-5, rtol=1e-5)


def test_the_past_does_not_see_the_future(thinker: Thinker) -> None:
    embeds, positions = prompt(thinker, 1, 10)
    changed = embeds.clone()
    changed[:, 7:] += 1
    a, b = thinker(embeds, positions).logits, thinker(changed, positions).logits
    torch.testing.assert_close(a[:, :7], b[:, :7], atol=1e-5, rtol=1e-5)
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-3


def test_ragged_rows_decode_as_if_alone(thinker: Thinker) -> None:
    embeds, positions = prompt(thinker, 2, 9)
    lengths = [9, 4]
    state = thinker.init_state(2)
    out = thinker(embeds, positions, state, lengths=lengths, logits="last")
    state.next_position = torch.tensor(lengths).float()
    ids = torch.tensor([5, 6])
    together = [out.logits[:, 0], thinker.step(ids, state), thinker.step(ids, state)]
    for row, length in enumerate(lengths):
        alone = thinker.init_state(1)
        first = thinker(embeds[row : row + 1, :length], positions[:, :1, :length], alone, logits="last")
        alone.next_position = torch.tensor([float(length)])
        one = ids[row : row + 1]
        steps = [first.logits[:, 0], thinker.step(one, alone), thinker.step(one, alone)]
        for a, b in zip(together, steps):
            torch.testing.assert_close(a[row], b[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_read_by_prefill_is_a_token_read_by_decode(thinker: Thinker) -> None:
    embeds, positions = prompt(thinker, 2, 6)
    token = torch.tensor([5, 6])
    logits = []
    for decodes in (True, False):
        state = thinker.init_state(2)
        thinker(embeds, positions, state)
        state.next_position.fill_(6)
        if decodes:
            logits.append(thinker.step(token, state))
        else:
            logits.append(thinker(thinker.embed_tokens(token)[:, None], state.step_positions(), state).logits[:, 0])
        assert state.cache.lengths == state.cache.length.tolist() == [7, 7]
    assert torch.equal(*logits)


def test_a_packed_row_takes_no_state(thinker: Thinker) -> None:
    embeds, positions = prompt(thinker, 1, 6)
    blocks = PackedBlocks([4, 2], embeds.device, causal=True)
    with pytest.raises(ValueError, match=r"packed row \(here of 2 sequences\) .* pass blocks or state, not both"):
        thinker(embeds, positions, thinker.init_state(1), blocks=blocks)
    whole = thinker(embeds, positions, blocks=blocks).logits
    alone = [thinker(embeds[:, part], positions[:, :, part]).logits for part in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(whole, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_two_interleaved_states_equal_two_separate_runs(thinker: Thinker) -> None:
    embeds, positions = prompt(thinker, 1, 6)
    separate = []
    for shift in (0, 1):
        state = thinker.init_state(1)
        thinker(embeds + shift, positions, state)
        state.next_position = torch.tensor([6.0])
        separate.append([thinker.step(torch.tensor([i]), state) for i in (1, 2)])
    states = [thinker.init_state(1), thinker.init_state(1)]
    for shift, state in enumerate(states):
        thinker(embeds + shift, positions, state)
        state.next_position = torch.tensor([6.0])
    for step, token in enumerate((1, 2)):
        for row, state in enumerate(states):
            assert torch.equal(thinker.step(torch.tensor([token]), state), separate[row][step])


def test_taps_enter_at_visual_tokens_only_and_zero_taps_change_nothing(thinker: Thinker) -> None:
    embeds, positions = prompt(thinker, 1, 8)
    plain = thinker(embeds, positions)
    zero = thinker(embeds, positions, taps=torch.zeros(2, *embeds.shape))
    assert torch.equal(plain.logits, zero.logits)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, 3:5] = True
    taps = lay_out_taps([torch.ones(2, 32), torch.ones(2, 32)], mask)
    first = Thinker(CONFIG, accept_layer=1)
    first.load_state_dict(thinker.state_dict())
    second = Thinker(CONFIG, accept_layer=2)
    second.load_state_dict(thinker.state_dict())
    assert torch.equal(first(embeds, positions, taps=taps).hidden, first(embeds, positions).hidden)
    moved = (second(embeds, positions, taps=taps).hidden - second(embeds, positions).hidden).abs().amax(-1)[0]
    assert (moved[:3] < 1e-5).all() and (moved[3:5] > 0.5).all()


def test_merge_puts_features_at_placeholders_in_order() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    merged = merge_embeddings(torch.zeros(2, 3, 4), mask, torch.arange(3.0)[:, None].expand(3, 4) + 1)
    assert merged[..., 0].tolist() == [[0, 1, 2], [3, 0, 0]]
    with pytest.raises(ValueError, match="2 media embeddings do not fit 3"):
        merge_embeddings(torch.zeros(2, 3, 4), mask, torch.zeros(2, 4))


def test_a_rotary_scheme_of_ones_own() -> None:
    def no_rotation(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*positions.shape[1:], 16)
        return torch.ones(shape), torch.zeros(shape)

    model = Thinker(CONFIG, rope=no_rotation).eval()
    initialise(model, lambda _: 0.2)
    embeds, positions = prompt(model, 1, 5)
    assert torch.equal(model(embeds, positions).logits, model(embeds, positions * 3 + 1).logits)


def test_long_context_keeps_its_accuracy() -> None:
    """A query at position 4095 attends as it does at 0, and the cache takes what the formula says."""
    model = Thinker(CONFIG).eval()
    initialise(model, lambda _: 0.2)
    embeds = model.embed_tokens(torch.randint(0, 250, (1, 4096))).detach()
    positions = torch.arange(4096.0).expand(3, 1, -1)
    with torch.no_grad():
        state = model.init_state(1, 4096)
        for start in range(0, 4096, 1024):
            piece = slice(start, start + 1024)
            out = model(embeds[:, piece], positions[:, :, piece], state, logits="last")
        tail = model(embeds[:, -300:], positions[:, :, :300], logits="last")
        far = model(embeds[:, -300:], positions[:, :, -300:], logits="last")
    assert torch.isfinite(out.logits).all()
    torch.testing.assert_close(tail.logits, far.logits, atol=2e-3, rtol=2e-3)
    text = CONFIG.text_config
    per_token = text.num_hidden_layers * text.num_key_value_heads * text.head_size * 2 * 4
    assert (state.cache.keys.nbytes + state.cache.values.nbytes) == 4096 * per_token
