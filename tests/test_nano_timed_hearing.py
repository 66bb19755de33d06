"""Hearing that is told when what is said: phones and subwords found in time, moved with the sound, and learnt."""

from __future__ import annotations

import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "nano"))

import cached_hearing
import find_subwords
import make_start
import timed_clips
import timed_hearing
from engines import PHONES
from find_subwords import ends_of, likely_ends, of_told
from timed_clips import RATE_HZ, Heard, TimedClips, labels_at, said_at, token_starts
from timed_hearing import phones_at

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.encoders.mel import LogMel

BLANK = 99


def test_what_is_said_in_each_moment() -> None:
    """Tokens of 80 ms; a chunk of a second has thirteen, and the next one begins on the second."""
    clip = Heard(torch.zeros(0), [("pau", 0.06), ("aa", 0.16), ("s", 1.1)], [], "")
    starts = token_starts(15, 1.0, 13)
    assert starts.tolist() == pytest.approx([*(0.08 * place for place in range(13)), 1.0, 1.08])
    names = [[PHONES[place] for place in row] for row in phones_at(clip, starts).tolist()]
    assert names[0] == ["pau", "pau", "pau", "aa"] and names[1] == ["aa"] * 4 and names[2] == ["s"] * 4
    assert names[13] == ["s"] * 4 and names[14] == ["s", "pau", "pau", "pau"]
    assert said_at(np.array([0.1, 9.0]), [], "nothing") == ["nothing", "nothing"]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 0.3)), max_size=12),
    st.integers(1, 40),
    st.sampled_from([(0.48, 6), (1.0, 13)]),
)
def test_tokens_spell_the_text(steps: list[tuple[int, float]], tokens: int, chunk: tuple[float, int]) -> None:
    """Repetitions merged and blanks dropped, the tokens read as the subwords, where there is room for them; and where
    nothing is in the way, a subword stands in the token in which it has just ended."""
    ends = list(zip([label for label, _ in steps], itertools.accumulate(wait for _, wait in steps)))
    starts = token_starts(tokens, *chunk)
    labels = labels_at(starts, ends, BLANK)
    read = [label for label in labels.unique_consecutive().tolist() if label != BLANK]
    ids = [label for label, _ in ends]
    if tokens >= len(ids) + sum(a == b for a, b in itertools.pairwise(ids)):
        assert read == ids
    else:
        assert read == ids[: len(read)]
    at = np.flatnonzero(labels.numpy() != BLANK)
    for place, (token, (_, end)) in enumerate(zip(at, ends)):
        alone = all(abs(other - end) > 0.3 for _, other in ends[:place] + ends[place + 1 :])
        if alone and end + 0.3 < starts[-1]:
            assert starts[token] <= end + 0.04 < starts[token + 1]


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 6))
def test_the_likeliest_path_is_the_best_of_all(seed: int, count: int, moments: int) -> None:
    """Every way to share the moments among the phones, optional ones left out or not, tried."""
    rng = np.random.default_rng(seed)
    phones, optional = rng.integers(0, 3, count), rng.random(count) < 0.5
    optional[1:] &= ~optional[:-1]  # no two side by side, as of pauses between words
    if optional.all():
        optional[0] = False
    likely = np.log(rng.dirichlet(np.ones(3), moments)) if moments else np.zeros((0, 3))
    best = -np.inf
    for lengths in itertools.product(range(moments + 1), repeat=count):
        if sum(lengths) == moments and all(length or may for length, may in zip(lengths, optional)):
            best = max(best, likely[range(moments), np.repeat(phones, lengths)].sum())
    found = likely_ends(likely, phones.tolist(), optional.tolist())
    if not np.isfinite(best):
        assert found is None
        return
    assert found is not None and found[-1] == moments
    lengths = np.diff(np.concatenate(([0], found)))
    assert (lengths[~optional] > 0).all()
    assert likely[range(moments), np.repeat(phones, lengths)].sum() == pytest.approx(best)


def test_subwords_end_with_their_share_of_a_word() -> None:
    told = [("pau", 0.1), ("s", 0.2), ("eh", 0.3), ("v", 0.4), ("n", 0.5), ("pau", 0.7), ("aa", 0.9), ("pau", 1.0)]
    said_as = {"seven": ["s", "eh", "v", "n"], "a": ["aa"]}
    found = ends_of("seven a", [(5, " se"), (6, "ven"), (7, " a")], said_as, of_told(told, 1.0))
    assert found is not None
    phones, subwords = found
    assert phones == [(name, pytest.approx(end)) for name, end in told]
    assert subwords == [(5, pytest.approx(0.3)), (6, pytest.approx(0.5)), (7, pytest.approx(0.9))]
    assert ends_of("seven a", [(5, " seven"), (7, " a")], said_as, of_told(told, 0.06)) is None


def two_tones(speed: float) -> tuple[np.ndarray, list[list[Any]]]:
    """A tone of 500 Hz and one of 2000 Hz behind 0.2 s of silence, called "aa" and "s", as long as the speed says."""
    length = round(RATE_HZ * 0.3 / speed)
    hz = np.repeat((0.0, 500.0, 2000.0), (3200, length, length))
    ends = (np.cumsum((3200, length, length)) / RATE_HZ).tolist()
    samples = 0.5 * np.sin(2 * np.pi * np.cumsum(hz) / RATE_HZ).astype(np.float32) * (hz > 0)
    return samples, [list(phone) for phone in zip(("pau", "aa", "s"), ends)]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Twelve clips of "ten one", said as aa and s."""
    rows = []
    for number in range(12):
        samples, phones = two_tones(1 + number / 12)
        soundfile.write(tmp_path / f"{number}.wav", samples, RATE_HZ)
        rows.append({"audio": f"{number}.wav", "text": "ten one", "phones": phones})
    path = tmp_path / "heard_clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hz_at(samples: np.ndarray, second: float) -> float:
    part = samples[int((second - 0.03) * RATE_HZ) : int((second + 0.03) * RATE_HZ)]
    return float(np.fft.rfftfreq(len(part), 1 / RATE_HZ)[np.abs(np.fft.rfft(part * np.hanning(len(part)))).argmax()])


def test_what_is_said_moves_with_the_sound(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier where it is faster, later behind a silence."""
    monkeypatch.setattr(timed_clips, "_PLACES", timed_clips.Surroundings())
    speeds = set()
    for clip in TimedClips([manifest], "phones").draw(random.Random(1), 20):
        (_, silent), (_, first), (_, second) = clip.phones
        samples = clip.samples.numpy()
        low, high = hz_at(samples, (silent + first) / 2), hz_at(samples, (first + second) / 2)
        assert 400 < low < 650 and high == pytest.approx(4 * low, rel=0.15)
        assert hz_at(samples, first - 0.035) < 2 * low < hz_at(samples, first + 0.035)
        speeds.add(round(low, -1))
    assert len(speeds) >= 3


def test_some_clips_are_kept(manifest: Path) -> None:
    trained, kept = TimedClips([manifest], "phones"), TimedClips([manifest], "phones", kept=True)
    sounds = [{row["audio"] for rows in clips.rows for row in rows} for clips in (trained, kept)]
    assert len(sounds[0]) == len(sounds[1]) == 6 and not sounds[0] & sounds[1]
    assert [clip.phones[0][1] for clip in kept.all()] == pytest.approx([0.2] * 6)
    assert not TimedClips([manifest], "subwords").rows[0]


def start(folder: Path, layers: int = 1) -> OmniModel:
    """A model whose hearing is learnt in moments."""
    make_start.write_files(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["thinker_config"]["audio_config"] |= {"encoder_layers": layers, "d_model": 64, "encoder_ffn_dim": 64,
                                                 "downsample_hidden_size": 8}  # fmt: skip
    config["thinker_config"]["text_config"]["num_hidden_layers"] = 1
    config["talker_config"]["accept_hidden_layer"] = 0
    torch.manual_seed(0)
    made = OmniModel(OmniConfig.from_dict(config))
    make_start.draw_hearing(made.audio_encoder)
    made.processor = OmniProcessor.from_pretrained(folder)
    return made


def test_hearing_is_learnt_and_training_goes_on(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phones; then, found by them, subwords; what is interrupted ends in the same weights."""
    monkeypatch.setattr(timed_hearing, "_BATCH", 4)
    monkeypatch.setattr(timed_hearing, "NAMING", 0)
    learning = replace(timed_hearing._LEARNING, rate=3e-3, warmup=2, saved=6)
    monkeypatch.setattr(timed_hearing, "_LEARNING", learning)
    monkeypatch.setattr(timed_clips, "_PLACES", timed_clips.Surroundings())
    monkeypatch.setattr(timed_clips, "_SILENCE_S", ((0.0, 0.2), (0.0, 0.2)))
    monkeypatch.setattr(find_subwords, "_said_by_flite", lambda word: {"ten": ["aa"], "one": ["s"]}[word])
    whole = start(tmp_path / "start")
    assert timed_hearing.train(whole, [manifest], tmp_path / "phones", 40)["right"] > 0.8
    head = timed_hearing.phone_head(tmp_path / "phones", whole.audio_encoder)
    assert timed_hearing.phones_right(whole, head, manifest) > 0.8

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    unnamed = tmp_path / "heard_unnamed.jsonl"
    unnamed.write_text("".join(json.dumps({**row, "phones": None}) + "\n" for row in rows).replace('"phones"', '"_"'))
    for path in (manifest, unnamed):
        assert find_subwords.find(whole, head, path) == len(rows)
        timed = path.with_name(path.name.replace("heard", "timed"))
        for row, found in zip(rows, map(json.loads, timed.read_text().splitlines())):
            assert [end for _, end in found["subwords"]] == pytest.approx(
                [end for _, end in row["phones"][1:]], abs=0.1
            )
            assert whole.processor.decode([label for label, _ in found["subwords"]]) == " ten one"

    timed = [tmp_path / "timed_clips.jsonl", tmp_path / "timed_unnamed.jsonl"]
    shown = timed_hearing.train(whole, timed, tmp_path / "whole", 90, subwords=True)
    assert shown["right"] > 0.7
    assert timed_hearing.words_wrong(whole, timed[0]) < 0.3
    real, kept = torch.save, []

    def save(value: Any, path: Path) -> None:
        real(value, path)
        kept.append(path)
        raise KeyboardInterrupt

    before = tmp_path / "phones/model"
    first, again = (OmniModel.from_pretrained(before, parts=["thinker"], dtype="float32") for _ in range(2))
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        timed_hearing.train(first, timed, tmp_path / "half", 90, subwords=True)
    monkeypatch.setattr(torch, "save", real)
    kept[0].rename(tmp_path / "half/state.pt")
    timed_hearing.train(again, timed, tmp_path / "half", 90, subwords=True)
    for name, value in again.audio_encoder.state_dict().items():
        torch.testing.assert_close(value, whole.audio_encoder.state_dict()[name], msg=name)


def test_upper_layers_learn_from_what_the_lower_ones_gave(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses on a cache are those on its clips; training it moves the upper layers alone."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    timed = tmp_path / "timed.jsonl"
    ends = [{"subwords": [(300, row["phones"][1][1]), (301, row["phones"][2][1])]} for row in rows]
    timed.write_text("".join(json.dumps(row | more) + "\n" for row, more in zip(rows, ends)))
    monkeypatch.setattr(cached_hearing, "LOWER", 1)
    monkeypatch.setattr(timed_hearing, "NAMING", 1)
    model = start(tmp_path / "start", layers=3)
    cached_hearing.make_cache(model, [timed], tmp_path / "cache.safetensors", 16)
    cache = cached_hearing.Cache(tmp_path / "cache.safetensors")
    assert len(cache.windows) == 16 and sum(cache.windows[3]) == len(cache.tokens[0][3])

    rng = random.Random("cached 0")
    clips, chunk_s = TimedClips([timed], "subwords").draw(rng, 16), rng.choice(timed_hearing.CHUNKS_S)
    window_s, encoder = timed_hearing.draw_window(rng, chunk_s), model.audio_encoder
    heads = timed_hearing.subword_heads(model)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), encoder.layers[1].register_forward_hook(lambda _, __, hidden: seen.append(hidden)):
        mel = LogMel(num_mels=encoder.config.num_mel_bins)
        out, starts = timed_hearing.hear(encoder, mel, clips, chunk_s, window_s, masks=1)
        hidden = timed_hearing.in_order(seen[0], timed_hearing.windows_of(encoder, out.lengths, chunk_s, window_s))
        _, wanted = timed_hearing.losses(heads, out.embeds, hidden, clips, starts)
    lower, *said = (torch.cat(part) for part in cache.tokens)
    windows = [window for clip in cache.windows for window in clip]
    with torch.no_grad():
        embeds, hidden = cached_hearing.above(encoder, lower, windows)
        _, found = timed_hearing.subword_losses(heads, embeds, hidden, *(one.long() for one in said))
    for name in wanted:
        assert float(found[name]) == pytest.approx(float(wanted[name]), abs=0.02)

    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    shown = cached_hearing.train(model, tmp_path / "cache.safetensors", tmp_path / "upper", 30)
    assert shown["subwords"] < float(wanted["subwords"]) / 2
    moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("layers.2.") for name in moved) and "proj2.weight" in moved
    assert not any(name.startswith(("layers.0.", "conv")) for name in moved)


def test_words_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(find_subwords, "_said_by_flite", lambda word: asked.append(word) or [word])
    file = tmp_path / "said.json"
    assert find_subwords.pronunciations({"one", "two"}, file) == {"one": ["one"], "two": ["two"]}
    assert find_subwords.pronunciations({"one", "six"}, file)["six"] == ["six"]
    assert sorted(asked) == ["one", "six", "two"]


def test_a_layer_is_read_in_the_order_of_the_clips(tmp_path: Path) -> None:
    """What the last layer gives, normed and projected, is what the encoder gives."""
    encoder = start(tmp_path / "start").audio_encoder
    mel, noise = LogMel(num_mels=encoder.config.num_mel_bins), torch.Generator().manual_seed(0)
    clips = [Heard(torch.randn(count, generator=noise) * 0.1, [], [], "") for count in (9000, 40_000, 20_000, 5000)]
    seen: list[torch.Tensor] = []
    with encoder.layers[-1].register_forward_hook(lambda _, __, hidden: seen.append(hidden)):
        out, _ = timed_hearing.hear(encoder, mel, clips, 0.48, 0.96)
    hidden = timed_hearing.in_order(seen[0], timed_hearing.windows_of(encoder, out.lengths, 0.48, 0.96))
    assert not torch.equal(hidden, seen[0])
    with torch.autocast("cpu", torch.bfloat16):
        again = encoder.proj2(torch.nn.functional.gelu(encoder.proj1(encoder.ln_post(hidden)))).float()
    torch.testing.assert_close(again, out.embeds, rtol=0.02, atol=0.02 * float(out.embeds.detach().std()))
