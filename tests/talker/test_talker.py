"""The Talker, its residual-code head and its conditioning, without the reference."""

from __future__ import annotations

import pytest
import torch
from build import fixed, tiny_config

from omni.layers.init import initialise
from omni.talker.layout import turn_layout
from omni.talker.talker import Talker

OMNI = tiny_config()
CONFIG = OMNI.talker_config
assert CONFIG is not None
WIDTH = CONFIG.text_config.hidden_size
RESIDUAL = CONFIG.num_code_groups - 1


@pytest.fixture(scope="module")
def talker() -> Talker:
    with fixed():
        model = Talker(CONFIG).eval()
        initialise(model, lambda _: 0.2)
    return model


def greedy(logits: torch.Tensor, i: int) -> torch.Tensor:
    return logits.argmax(-1)


def test_teacher_forced_logits_equal_the_incremental_ones(talker: Talker) -> None:
    hidden, first = torch.randn(2, 5, WIDTH)
    seen = []

    def record(logits: torch.Tensor, i: int) -> torch.Tensor:
        seen.append(logits)
        return logits.argmax(-1)

    codes, total = talker.mtp.generate(hidden, first, record)
    forced = talker.mtp(hidden, first, codes)
    torch.testing.assert_close(forced, torch.stack(seen, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, talker.mtp.embed_residual(codes).sum(1))
    assert codes.shape == (5, RESIDUAL)


def test_residual_codes_of_a_batch_are_those_of_its_rows(talker: Talker) -> None:
    hidden, first = torch.randn(2, 8, WIDTH)
    codes, _ = talker.mtp.generate(hidden, first, greedy)
    for row in range(8):
        alone, _ = talker.mtp.generate(hidden[row : row + 1], first[row : row + 1], greedy)
        assert torch.equal(alone[0], codes[row])


def test_nothing_of_a_frame_reaches_the_next(talker: Talker) -> None:
    hidden, first = torch.randn(2, 1, WIDTH)
    cache = talker.mtp.init_cache(1)
    fresh, _ = talker.mtp.generate(hidden, first, greedy)
    talker.mtp.generate(torch.randn(1, WIDTH), torch.randn(1, WIDTH), greedy, cache)
    again, _ = talker.mtp.generate(hidden, first, greedy, cache)
    assert torch.equal(fresh, again)


def test_every_head_and_table_learns_but_the_last_table(talker: Talker) -> None:
    hidden, first = torch.randn(2, 3, WIDTH)
    codes = torch.randint(0, 64, (3, RESIDUAL))
    talker.mtp(hidden, first, codes).square().sum().backward()
    for head in talker.mtp.lm_head:
        assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0
    tables = [table.weight.grad for table in talker.mtp.codec_embedding]
    assert all(g is not None and g.abs().sum() > 0 for g in tables[:-1])
    assert tables[-1] is None or tables[-1].abs().sum() == 0  # it is read by the Talker, not by the head
    talker.zero_grad()


def test_frame_embedding_is_the_sum_over_codebooks(talker: Talker) -> None:
    codes = torch.tensor([[7, 1, 2, 3]])
    expected = talker.codec_embedding.weight[7] + sum(
        table.weight[code] for table, code in zip(talker.mtp.codec_embedding, (1, 2, 3))
    )
    torch.testing.assert_close(talker.embed_frames(codes)[0], expected)


def test_only_codes_and_the_end_of_speech_may_be_drawn(talker: Talker) -> None:
    allowed = (~talker.suppressed()).nonzero().flatten().tolist()
    assert allowed == [*range(64), CONFIG.codec_eos_token_id]


def test_assistant_prefix_has_nine_slots(talker: Talker) -> None:
    header, (pad, bos, first) = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    table = talker.codec_embedding.weight
    c = CONFIG
    layout = turn_layout(OMNI)
    text = torch.stack((*header, pad, bos, first))[list(layout.prefix_texts)]
    slots = talker.prefix_vectors(text, talker.codec_embedding(torch.tensor(layout.prefix_codes(318))))
    golden = [
        header[0],
        header[1],
        header[2],
        pad + table[c.codec_nothink_id],
        pad + table[c.codec_think_bos_id],
        pad + table[c.codec_think_eos_id],
        pad + table[318],
        bos + table[c.codec_pad_id],
        first + table[c.codec_bos_id],
    ]
    assert len(golden) == layout.prefix_length
    torch.testing.assert_close(slots, torch.stack(golden))


def test_text_enters_by_embedding_and_media_by_hidden_state(talker: Talker) -> None:
    embeds, hidden = torch.randn(2, 4, 32)
    media = torch.tensor([False, True, True, False])
    out = talker.prompt_vectors(embeds, hidden, media)
    torch.testing.assert_close(out[~media], talker.text_projection(embeds[~media]))
    torch.testing.assert_close(out[media], talker.hidden_projection(hidden[media]))


def test_user_turns_of_all_the_conversation() -> None:
    ids = [1, 8, 3, 1, 2, 4, 4, 1, 9, 5, 1, 2, 6, 1]
    layout = turn_layout(OMNI.replace(im_start_token_id=1, user_token_id=2))
    assert layout.spans(ids) == [(3, 7), (10, 13)]
    assert layout.spans([4, 5]) == layout.spans([]) == []


def test_chunked_prefill_equals_one_pass(talker: Talker) -> None:
    embeds = torch.randn(1, 11, WIDTH)
    positions = torch.arange(11.0).expand(3, 1, -1)
    whole = talker(embeds, positions)
    for cuts in ([4, 7], [1] * 11):
        state, at, pieces = talker.init_state(1, 2), 0, []
        for n in cuts:
            pieces.append(talker(embeds[:, at : at + n], positions[:, :, at : at + n], state).logits)
            at += n
        torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, atol=1e-5, rtol=1e-5)
