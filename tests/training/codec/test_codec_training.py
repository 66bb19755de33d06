"""The trainable codec: encoder, quantiser on Code2Wav's table, losses, discriminators, and that all of it learns."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from build import fixed, seeded, tiny_config
from torch import Tensor, nn

from omni import OmniModel
from omni.code2wav.code2wav import Code2Wav
from omni.config.qwen3_omni import Code2WavConfig
from omni.training.codec.codec import Codec, CodecEncoder, CodeUsage, draw_weights, nearest_codes
from omni.training.codec.codec_losses import (
    multi_scale_mel_loss,
)
from omni.training.objectives.losses import Loss

ROOT = Path(__file__).parents[3]
RATE = 24000
SIZES = {
    "codebook_size": 32,
    "num_quantizers": 4,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "sliding_window": 8,
    "decoder_dim": 32,
    "upsample_rates": [5, 4, 3],
    "upsampling_ratios": [2, 2],
}
SMALL: dict[str, Any] = {
    "codebook_size": 6,
    "num_quantizers": 2,
    "hidden_size": 4,
    "intermediate_size": 4,
    "decoder_dim": 4,
    "upsample_rates": (2, 3),
    "upsampling_ratios": (2,),
}


def make_codec(dtype: torch.dtype = torch.float32, strict_causal: bool = False, **changes: Any) -> Codec:
    with fixed():
        code2wav = Code2Wav(Code2WavConfig.from_dict(SIZES).replace(**changes), strict_causal=strict_causal)
        draw_weights(code2wav)
    return Codec(code2wav.to(dtype))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def sounds(seconds: float = 0.2) -> Tensor:
    """A tone and two vowel-like sounds: harmonics of a pitch under the peaks of formants [3, n]."""
    t = torch.arange(int(seconds * RATE)) / RATE
    waves = [0.3 * torch.sin(2 * math.pi * 440 * t)]
    for pitch, formants in ((120, (700, 1200, 2500)), (200, (300, 2300, 3000))):
        wave = torch.zeros_like(t)
        for h in range(1, 5000 // pitch):
            level = 0.02 + sum(math.exp(-(((pitch * h - peak) / 200) ** 2)) for peak in formants)
            wave += level * torch.sin(2 * math.pi * pitch * h * t + h)
        waves.append(0.4 * wave / wave.abs().max())
    return torch.stack(waves)


def mean(loss: Loss) -> Tensor:
    return loss.total / loss[1]


# ---- the encoder


@pytest.mark.parametrize("samples", [1, 239, 240, 241, 2400])
def test_a_frame_for_each_hop_begun(samples: int) -> None:
    codec = make_codec()
    out = codec(noise(2, samples))
    frames = math.ceil(samples / 240)
    assert out.codes.shape == (2, 4, frames)
    assert out.wave.shape == (2, min(samples, 240 * frames - codec.code2wav.lookahead))
    assert out.codes.min() >= 0 and out.codes.max() < 32


@torch.no_grad()
def test_the_encoder_is_causal_and_each_sample_counts() -> None:
    encoder = make_codec(torch.float64).encoder
    wave = noise(1, 2400, dtype=torch.float64)
    latents = encoder(wave)
    for sample in (0, 239, 240, 1000, 2399):
        changed = wave.clone()
        changed[0, sample] += 0.5
        differs = (encoder(changed) != latents).any(1)[0]
        first = sample // 240
        assert not differs[:first].any() and differs[first]


@torch.no_grad()
def test_pieces_of_a_recording_equal_the_whole() -> None:
    encoder = make_codec(torch.float64).encoder
    wave = noise(2, 240 * 12, dtype=torch.float64)
    state = encoder.init_state(2)
    pieces = [encoder.step(part, state) for part in wave.split([240, 720, 240 * 7, 240], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), encoder(wave))
    with pytest.raises(ValueError, match="whole frames of 240 samples"):
        encoder.step(wave[:, :100], state)


@torch.no_grad()
def test_a_long_recording_is_encoded_as_a_short_one_is() -> None:
    codec = make_codec(torch.float64, **SMALL)
    wave = noise(1, 300 * 12 + 5, dtype=torch.float64)  # more than the 256 frames encoded at once
    assert torch.equal(codec.encode(wave), codec.quantiser.encode(codec.encoder(wave)))


def test_bad_waves_and_encoders_are_named() -> None:
    codec = make_codec()
    for wave in (torch.zeros(5), torch.zeros(1, 0), torch.zeros(1, 9, dtype=torch.int64)):
        with pytest.raises(ValueError, match="floating samples"):
            codec(wave)
    with pytest.raises(ValueError, match="frames of 12 samples"):
        Codec(codec.code2wav, CodecEncoder(codec.code2wav.config.replace(**SMALL)))
    with pytest.raises(ValueError, match="width"):
        CodecEncoder(codec.code2wav.config, width=0)


# ---- the quantiser


def test_what_training_hears_is_what_the_codes_decode_to() -> None:
    for strict_causal in (False, True):
        codec = make_codec(torch.float64, strict_causal)
        wave = noise(2, 2000, dtype=torch.float64)
        out = codec(wave)
        assert torch.equal(out.codes, codec.encode(wave))
        decoded = codec.decode(out.codes)
        torch.testing.assert_close(out.wave, decoded[:, : out.wave.shape[1]], rtol=0, atol=1e-12)
        state = codec.code2wav.init_state(2)
        streamed = torch.cat([codec.code2wav.step(out.codes[..., [t]], state) for t in range(out.codes.shape[2])], 1)
        torch.testing.assert_close(out.wave, streamed[:, : out.wave.shape[1]], rtol=0, atol=1e-12)


@torch.no_grad()
def test_codes_are_the_nearest_to_what_remains() -> None:
    codec = make_codec(torch.float64, **SMALL)
    latents = noise(2, 4, 7, dtype=torch.float64)
    codes = codec.quantiser.encode(latents)
    table = codec.code2wav.code_embedding.weight.view(2, 6, 4)
    for b in range(2):
        for t in range(7):
            rest = latents[b, :, t].clone()
            for k in range(2):
                assert codes[b, k, t] == (table[k] - rest).square().sum(1).argmin()
                rest -= table[k, codes[b, k, t]]
    torch.testing.assert_close(codec.quantiser.embed(codes), codec.code2wav._embed(codes))


def test_codebook_and_commitment_losses_have_their_closed_forms() -> None:
    """The codebook loss moves each code to the mean of what it stands for, the commitment loss latents to codes."""
    codec = make_codec(torch.float64, **SMALL)
    latents = noise(2, 4, 9, dtype=torch.float64).requires_grad_()
    table = codec.code2wav.code_embedding.weight
    codes, commitment, codebook = codec.quantiser(latents)
    assert commitment[1] == codebook[1] == 18
    (d_table,) = torch.autograd.grad(codebook.total, table, retain_graph=True)
    (d_latents,) = torch.autograd.grad(commitment.total, latents)
    books = table.detach().view(2, 6, 4)
    rest = latents.detach().transpose(1, 2).flatten(0, 1)
    by_row, by_latent, distance = torch.zeros_like(books), torch.zeros_like(rest), 0.0
    for k in range(2):
        chosen = codes[:, k].flatten()
        error = rest - books[k, chosen]
        by_row[k].index_add_(0, chosen, -2 * error / 8)
        by_latent += 2 * error / 8
        distance += float(error.square().sum() / 8)
        rest = error
    torch.testing.assert_close(d_table, by_row.flatten(0, 1))
    torch.testing.assert_close(d_latents, by_latent.view(2, 9, 4).transpose(1, 2))
    assert math.isclose(float(commitment.total.detach()), distance) and math.isclose(
        float(codebook.total.detach()), distance
    )


def test_gradients_go_straight_through_the_quantiser() -> None:
    """The waveform's gradient in the latents is that of a decoder which read latents / K, at the quantised point."""
    codec = make_codec(torch.float64, **SMALL)
    wave = noise(1, 60, dtype=torch.float64)
    latents = codec.encoder(wave)
    shift = torch.zeros_like(latents, requires_grad=True)
    codec.encoder.forward = lambda _: latents.detach() + shift  # type: ignore[method-assign]
    heard = codec(wave).wave
    direction = noise(*heard.shape, seed=1, dtype=torch.float64)
    (found,) = torch.autograd.grad((heard * direction).sum(), shift)
    read = codec.quantiser.embed(codec.quantiser.encode(latents)).detach()

    def unquantised(moved: Tensor) -> Tensor:
        x = codec.code2wav.pre_transformer(read + moved.transpose(1, 2) / 2).transpose(1, 2)
        return (codec.code2wav.decoder(codec.code2wav.upsample(x))[:, 0, : heard.shape[1]] * direction).sum()

    zero = torch.zeros_like(latents, requires_grad=True)
    (expected,) = torch.autograd.grad(unquantised(zero), zero)
    torch.testing.assert_close(found, expected)
    # attention scores and rotation are computed in fp32, hence the wide steps
    assert torch.autograd.gradcheck(unquantised, (zero,), eps=1e-3, atol=1e-4, rtol=1e-2)


def test_clipped_samples_still_learn() -> None:
    codec = make_codec()
    with torch.no_grad():
        codec.code2wav.decoder[-1].conv.bias.fill_(3.0)
    out = codec(sounds(0.1))
    assert out.wave.max() == 1
    (gradient,) = torch.autograd.grad(out.wave.sum(), codec.code2wav.decoder[-1].conv.bias)
    assert gradient.item() == out.wave.numel()


@torch.no_grad()
def test_codebooks_from_a_first_batch_fit_it_and_repeat() -> None:
    codec = make_codec()
    latents = codec.encoder(noise(4, 240 * 50))
    before = mean(codec.quantiser(latents).commitment)
    tables = []
    for _ in range(2):
        codec.quantiser.initialise_codebooks(latents, generator=seeded(3))
        tables.append(codec.code2wav.code_embedding.weight.clone())
    assert torch.equal(*tables)
    assert mean(codec.quantiser(latents).commitment) < 0.3 * before
    few = codec.encoder(noise(1, 240 * 3))  # 3 frames for 32 codes
    codec.quantiser.initialise_codebooks(few)
    assert torch.isfinite(codec.code2wav.code_embedding.weight).all()
    assert mean(codec.quantiser(few).commitment) < 1e-3


@torch.no_grad()
def test_dead_codes_restart_where_latents_are() -> None:
    codec = make_codec()
    codec.code2wav.code_embedding.weight.view(4, 32, 32)[:, 1:] += 100  # far from every latent
    latents = codec.encoder(noise(2, 240 * 40))
    usage = CodeUsage.start(codec, decay=0.5)
    for _ in range(8):
        usage.update(codec.quantiser.encode(latents))
    torch.testing.assert_close(usage.shares.mean(1), torch.ones(4))
    before, kept = mean(codec.quantiser(latents).commitment), codec.quantiser.books[:, 0].clone()
    generator = seeded(0)
    assert codec.quantiser.restart_dead_codes(latents, usage, generator=generator) == 4 * 31
    assert torch.equal(codec.quantiser.books[:, 0], kept)  # the live ones stay
    out = codec.quantiser(latents)
    assert mean(out.commitment) < 0.5 * before
    assert len(out.codes[:, 0].unique()) > 16
    assert codec.quantiser.restart_dead_codes(latents, usage) == 0  # they have time to be chosen


@torch.no_grad()
def test_perplexity_counts_the_codes_in_use() -> None:
    codec = make_codec()
    wave = noise(1, 240 * 30)
    codec.quantiser.books[0].fill_(0.0)  # all equal: the first is taken
    out = codec(wave)
    assert out.perplexity[0] == 1
    for k in range(4):
        p = torch.bincount(out.codes[0, k], minlength=32) / 30
        assert math.isclose(
            float(out.perplexity[k]), math.exp(-sum(x * math.log(x) for x in p.tolist() if x)), rel_tol=1e-5
        )


def test_distances_of_many_latents_are_compared_in_parts() -> None:
    vectors, book = noise(9000, 3, dtype=torch.float64), noise(7, 3, seed=1, dtype=torch.float64)
    assert torch.equal(nearest_codes(vectors, book), torch.cdist(vectors, book).argmin(1))


def test_under_autocast_codes_are_those_of_the_latents_in_fp32() -> None:
    codec = make_codec()
    with torch.autocast("cpu", torch.bfloat16):
        out = codec(sounds(0.1))
    assert torch.equal(out.codes, codec.quantiser.encode(out.latents.float()))
    (mean(multi_scale_mel_loss(out.wave, sounds(0.1)[:, : out.wave.shape[1]], RATE)) + mean(out.commitment)).backward()
    assert all(torch.isfinite(p.grad).all() for p in codec.encoder.parameters() if p.grad is not None)


# ---- training


def codec_loss(codec: Codec, wave: Tensor) -> tuple[Tensor, Tensor, Any]:
    out = codec(wave)
    reference = wave[:, : out.wave.shape[1]]
    mel = mean(multi_scale_mel_loss(out.wave, reference, RATE, [(512, 60)]))
    return 5 * mel + 0.25 * mean(out.commitment) + mean(out.codebook), mel, out


def test_a_codec_learns_tones_and_vowels() -> None:
    """From random weights, without an adversary: the mel distance falls to less than half, and codes stay in use."""
    codec, wave = make_codec(), sounds()
    generator = torch.Generator().manual_seed(0)  # of one run: how many codes it uses depends on these draws
    codec.quantiser.initialise_codebooks(codec.encoder(wave), generator=generator)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3, betas=(0.8, 0.99), weight_decay=0)
    usage, losses = CodeUsage.start(codec, decay=0.8), []
    for step in range(40):
        loss, mel, out = codec_loss(codec, wave)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()] == []
        nn.utils.clip_grad_norm_(codec.parameters(), 5.0)
        optimizer.step()
        usage.update(out.codes)
        if step in (9, 19, 29):
            codec.quantiser.restart_dead_codes(out.latents, usage, generator=generator)
        losses.append(mel.item())
    assert losses[-1] < 0.5 * losses[0]
    assert out.perplexity[0] > 3  # three sounds at least
    decoded = codec.decode(codec.encode(wave))
    mel = mean(multi_scale_mel_loss(decoded, wave[:, : decoded.shape[1]], RATE, [(512, 60)]))
    assert mel < 0.5 * losses[0]


def test_two_runs_from_one_seed_are_equal() -> None:
    @fixed(5)
    def run() -> dict[str, Tensor]:
        codec = make_codec(**SMALL)
        optimizer = torch.optim.AdamW(codec.parameters(), lr=1e-2)
        for seed in range(3):
            loss, _, _ = codec_loss(codec, noise(2, 480, seed=seed))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return codec.state_dict()

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- copies and saving


def test_a_copy_is_independent() -> None:
    codec = make_codec()
    twin, wave = copy.deepcopy(codec), noise(1, 1000)
    codes = codec.encode(wave)
    with torch.no_grad():
        for p in codec.parameters():
            p.mul_(2)
    assert torch.equal(twin.encode(wave), codes)
    assert twin.quantiser.code2wav is twin.code2wav


def test_the_decoder_stays_the_models_own_part(tmp_path: Path) -> None:
    model = OmniModel(tiny_config())
    assert model.code2wav is not None
    names = list(model.state_dict())
    codec = Codec(model.code2wav)
    wave = noise(1, 6000)
    out = codec(wave)
    (out.wave.square().mean() + mean(out.codebook)).backward()
    torch.optim.SGD(codec.parameters(), lr=1e-2).step()
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "model")
    codec.save(tmp_path / "codec")
    again = OmniModel.from_pretrained(tmp_path / "model", device="cpu")
    assert again.code2wav is not None
    codes = codec.encode(wave)
    assert torch.equal(again.code2wav(codes), codec.decode(codes))
    joined = Codec.load(tmp_path / "codec", again.code2wav)
    assert joined.code2wav is again.code2wav and torch.equal(joined.encode(wave), codes)


def test_a_saved_codec_opens_alone_and_damage_is_named(tmp_path: Path) -> None:
    codec = make_codec(strict_causal=True)
    wave = noise(2, 1000)
    codec.save(tmp_path)
    again = Codec.load(tmp_path)
    assert torch.equal(again.encode(wave), codec.encode(wave))
    assert torch.equal(again(wave).wave, codec(wave).wave)
    rounded = Code2Wav(codec.code2wav.config).to(torch.bfloat16)
    rounded.load_state_dict(codec.code2wav.state_dict())
    assert Codec.load(tmp_path, rounded).encoder.to_latents.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="code table"):
        other = Code2Wav(codec.code2wav.config)
        Codec.load(tmp_path, other)
    (tmp_path / "codec.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        Codec.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no codec\.json"):
        Codec.load(tmp_path / "elsewhere")
