"""Token2Wav: block attention, the sampler, noise by position, voices, configs, precision, batches, bad input."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from build import FAST, SIZES, make_token2wav, make_voice, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni.checkpoint.keys import KeyTable
from omni.code2wav.bigvgan import BigVGAN
from omni.code2wav.block_attention import block_attention, block_mask
from omni.code2wav.dit import DiT
from omni.code2wav.ode_sampler import EVALUATIONS, ODEConfig, integrate, position_noise, time_grid
from omni.code2wav.voices import Voice, choose_voice, load_voices, save_voices
from omni.config.qwen2_5_omni import QWEN2_5_OMNI
from omni.config.token2wav import BigVGANConfig, DiTConfig, Token2WavConfig
from omni.layers.attention_backends import plain_attention
from omni.layers.init import initialise

KEYS = KeyTable.of(QWEN2_5_OMNI)


def draw(codes: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 21, (rows, 1, codes), generator=seeded(codes))


# ---- attention ----


def test_block_mask_shape() -> None:
    """Four blocks in the field of one evaluation of the release: two back, the own one, one ahead."""
    mask = block_mask(10, 4, back=1)
    assert mask[5].tolist() == [True] * 8 + [False] * 2 and mask[0].tolist() == [True] * 4 + [False] * 6
    frames, block, seen = 240, 24, torch.eye(240)
    sizes = DiTConfig()
    for layer in range(sizes.num_hidden_layers):
        back, ahead = int(layer in sizes.look_backward_layers), int(layer in sizes.look_ahead_layers)
        seen = block_mask(frames, block, back, ahead).float() @ seen
    blocks = seen[5 * block].view(10, block).sum(1) > 0
    assert blocks.tolist() == [False] * 3 + [True] * 4 + [False] * 3


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 23), st.integers(1, 7), st.integers(0, 2), st.integers(0, 2))
def test_block_attention_is_dense_attention_under_the_mask(frames: int, block: int, back: int, ahead: int) -> None:
    q, k, v = torch.randn(3, 2, 2, frames, 4, generator=seeded(frames))
    dense = plain_attention(q, k, v, block_mask(frames, block, back, ahead))
    ours = block_attention(q, k, v, block=block, back=back, ahead=ahead)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=0)
    lengths = torch.tensor([frames, max(1, frames // 2)])
    padded = block_attention(q, k, v, block=block, back=back, ahead=ahead, lengths=lengths)
    assert padded.isfinite().all()
    for row, n in enumerate(lengths.tolist()):
        alone = plain_attention(*(x[row : row + 1, :, :n] for x in (q, k, v)), block_mask(n, block, back, ahead))
        torch.testing.assert_close(padded[row : row + 1, :, :n], alone, atol=1e-5, rtol=0)


# ---- sampler ----


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_solvers_reach_their_order_with_the_evaluations_they_state(solver: str, order: int) -> None:
    calls = 0

    def slope(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * t.cos()

    errors = []
    for points in (9, 17):
        times = torch.linspace(0, 1, points, dtype=torch.float64)
        end = integrate(slope, torch.ones(1, dtype=torch.float64), times, solver)
        errors.append((end - torch.tensor(1.0).double().sin().exp()).abs().item())
    assert calls == (8 + 16) * EVALUATIONS[solver]
    assert abs(torch.tensor(errors[0] / errors[1]).log2().item() - order) < 0.5


def test_time_grid() -> None:
    t = time_grid(10, -1.0)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all() and t[1] < 0.02
    torch.testing.assert_close(t, 1 - torch.cos(torch.pi / 2 * torch.linspace(0, 1, 10)))
    torch.testing.assert_close(time_grid(10, None), torch.linspace(0, 1, 10))


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_evaluations_of_the_released_settings(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """36 evaluations, of the doubled batch where guided; the speaker encoder runs once."""
    model = make_token2wav()
    rows: list[int] = []
    encoded: list[int] = []
    model.dit.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    model.dit.speaker_encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape[0]))
    ode = ODEConfig(guidance_scale=guidance)
    model.sample_mel(draw(5)[:, 0], make_voice(), ode=ode)
    assert rows == [2 if guidance else 1] * 36 and ode.evaluations == 36 and encoded == [2]


def test_noise_is_a_function_of_seed_and_position() -> None:
    whole = position_noise([3, 4], 0, 50, 5)
    assert torch.equal(position_noise([4], 17, 31, 5), whole[1:, 17:31])
    assert torch.equal(position_noise([3], 0, 50, 3), whole[:1, :, :3])
    assert (whole[0] - whole[1]).abs().min() > 0
    assert position_noise([-1, 2**64 - 1], 0, 3, 2).diff(dim=0).abs().max() == 0, "seeds count modulo 2**64"
    many = position_noise([0], 0, 4000, 80)[0]
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01 and abs(many.pow(4).mean() - 3) < 0.1
    for other in (many[1:] * many[:-1], many[:, 1:] * many[:, :-1]):  # neighbours are independent
        assert abs(other.mean()) < 0.01


@torch.no_grad()
def test_seeded_runs_repeat_and_differ_between_seeds() -> None:
    model, voice, codes = make_token2wav(), make_voice(), draw(6)
    first = model(codes, voice, seed=1, ode=FAST)
    assert torch.equal(first, model(codes, voice, noise=position_noise([1], 0, 12, 5), ode=FAST))
    assert (first - model(codes, voice, seed=2, ode=FAST)).abs().max() > 1e-3
    assert first.shape == (1, 6 * model.hop_length) and first.dtype == torch.float32 and first.abs().max() <= 1


# ---- the model ----


def test_released_properties() -> None:
    config = Token2WavConfig()
    assert config.hop_length == 480 and config.dit_config.block_codes == 12
    model = make_token2wav()
    assert model.num_codebooks == 1 and model.sample_rate == 24000 and model.frame_rate == 24000 / 12


@torch.no_grad()
def test_a_batch_equals_its_rows() -> None:
    model, voices = make_token2wav(), [make_voice(1), make_voice(2, frames=14)]
    codes = draw(9, rows=2)
    ode = ODEConfig(num_steps=3)
    mel = model.sample_mel(codes[:, 0], voices, seed=[5, 6], ode=ode, lengths=torch.tensor([9, 4]))
    for row, n in ((0, 9), (1, 4)):
        alone = model.sample_mel(codes[row : row + 1, 0, :n], voices[row], seed=5 + row, ode=ode)
        torch.testing.assert_close(mel[row : row + 1, : 2 * n], alone, atol=3e-5, rtol=0)
    both = model(codes, model.embed_voice(voices, 2), seed=[5, 6], ode=ode)
    torch.testing.assert_close(both[:1], model(codes[:1], voices[0], seed=5, ode=ode), atol=3e-5, rtol=0)


@torch.no_grad()
def test_it_stays_in_fp32() -> None:
    model, voice, codes = make_token2wav(), make_voice(), draw(4)
    expected = model(codes, voice, ode=FAST)
    holder = torch.nn.ModuleDict({"token2wav": copy.deepcopy(model), "other": torch.nn.Linear(2, 2)}).bfloat16()
    assert holder["other"].weight.dtype == torch.bfloat16
    assert {p.dtype for p in holder["token2wav"].parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(holder["token2wav"](codes, voice, ode=FAST), expected)


def test_gradients_reach_every_parameter() -> None:
    model = make_token2wav()
    voice, codes = make_voice(), draw(6)[:, 0]
    for name, part in (("dit", model.dit), ("bigvgan", model.bigvgan)):
        if name == "dit":
            condition = model.dit.condition(codes, voice.cond, model.dit.encode_reference(voice.ref_mel))
            model.dit(torch.randn(1, 12, 5), torch.tensor([0.3]), condition).square().mean().backward()
        else:
            mel = torch.randn(1, 12, 5, requires_grad=True)
            model.bigvgan(mel - 4).square().mean().backward()
            assert mel.grad is not None and mel.grad.abs().max() > 0
        silent = [key for key, p in part.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        assert not silent, silent


def test_every_parameter_is_initialised() -> None:
    """The DiT starts at velocity zero, whatever its input."""
    model = make_token2wav()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
        initialise(model, lambda name: 0.02)
        assert all(p.isfinite().all() for p in model.parameters())
        condition = model.dit.condition(draw(4)[:, 0], make_voice().cond, torch.randn(1, 4))
        assert model.dit(torch.randn(1, 8, 5), torch.tensor([0.5]), condition).abs().max() == 0


def test_bad_codes_noise_and_voices() -> None:
    model, voice = make_token2wav(), make_voice()
    cases = [
        ((draw(3)[:, 0], voice), {}, ValueError, r"\[rows, 1 codebook, codes\]"),
        ((draw(3).float(), voice), {}, TypeError, "int64"),
        ((torch.full((1, 1, 2), 21), voice), {}, ValueError, "code 21 at row 0, position 0 lies outside 0..20"),
        ((draw(61), voice), {}, ValueError, "122 mel frames.*decode_chunked"),
        ((draw(3), [voice, voice]), {}, ValueError, "2 voices for 1 rows"),
        ((draw(3), voice), {"seed": [1, 2]}, ValueError, "2 seeds for 1 rows"),
        ((draw(3), voice), {"noise": torch.zeros(1, 5, 5)}, ValueError, r"\[1, 6, 5\]"),
        ((draw(3), Voice(torch.zeros(1, 4), voice.ref_mel)), {}, ValueError, "cond is 4 wide, this model's is 3"),
        ((draw(3), Voice(voice.cond, torch.zeros(1, 2, 5))), {}, ValueError, "at least 4 frames"),
    ]
    for args, kwargs, kind, message in cases:
        with pytest.raises(kind, match=message):
            model(*args, ode=FAST, **kwargs)
    for changes in ({"num_steps": 1}, {"guidance_scale": -1.0}, {"sway_coefficient": -2.0}, {"solver": "heun"}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            ODEConfig(**changes)
    assert model(draw(0), voice, ode=FAST).shape == (1, 0)


# ---- config and names ----


def test_config_round_trip_in_the_released_spelling() -> None:
    """The released file says dim, depth and heads, and carries switches with one supported value."""
    dit = {"dim": 32, "depth": 2, "heads": 2, "enc_lin_neurons": 192, "enc_global_context": True, "dropout": 0.1}
    released = {
        "dit_config": dit,
        "bigvgan_config": {"use_bias_at_final": False},
        "model_type": "qwen2_5_omni_token2wav",
    }
    config = Token2WavConfig.from_dict(released)
    assert (config.dit_config.hidden_size, config.dit_config.num_hidden_layers) == (32, 2)
    written = config.to_dict()
    assert dit.items() <= written["dit_config"].items() and "hidden_size" not in written["dit_config"]
    assert Token2WavConfig.from_dict(json.loads(json.dumps(written))) == config
    assert config.bigvgan_config == BigVGANConfig(use_bias_at_final=False)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("dit_config", {"hidden_sise": 4}, "did you mean 'hidden_size'"),
    ("dit_config", {"dim": 4, "hidden_size": 8}, "contradicts"),
    ("dit_config", {"block_size": 5}, "whole codes"),
    ("dit_config", {"enc_channels": [4, 4, 4, 9]}, "sum"),
    ("dit_config", {"enc_channels": [4, 4, 8]}, "equally long"),
    ("dit_config", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ("dit_config", {"mel_dim": 6}, "must equal"),
    ("bigvgan_config", {"upsample_kernel_sizes": [6, 4]}, "even number"),
    ("bigvgan_config", {"resblock_kernel_sizes": [4]}, "odd"),
    ("bigvgan_config", {"resblock_dilation_sizes": [[1, 3]]}, "three positive integers"),
    ("bigvgan_config", {"use_bias_at_final": True}, "not supported"),
]


@pytest.mark.parametrize(("part", "changes", "message"), BAD)
def test_bad_configs(part: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Token2WavConfig.from_dict({**SIZES, part: {**SIZES[part], **changes}})


def test_names_survive_the_round_trip() -> None:
    for key in make_token2wav().state_dict():
        hub = KEYS.to_hub(f"code2wav.{key}")
        assert KEYS.from_hub(hub) == f"code2wav.{key}" and not KEYS.is_derived(hub)
    hub = "token2wav.code2wav_dit_model.transformer_blocks.21.attn.to_out.0.bias"
    assert KEYS.from_hub(hub) == "code2wav.dit.blocks.21.attn.to_out.0.bias"
    assert KEYS.is_derived("token2wav.code2wav_dit_model.rotary_embed.inv_freq")


# ---- voices ----


def test_voices_on_disk(tmp_path: Path) -> None:
    voices = {"Chelsie": make_voice(1), "Ethan v1.2": Voice(make_voice(2).cond.double(), make_voice(2).ref_mel)}
    for target in (tmp_path / "spk_dict.pt", tmp_path / "new", tmp_path / "mine.safetensors"):
        path = save_voices(voices, target)
        for back in (load_voices(path), load_voices(path.parent)):
            assert back.keys() == voices.keys()
            for name, voice in voices.items():
                assert torch.equal(back[name].cond, voice.cond) and torch.equal(back[name].ref_mel, voice.ref_mel)
                assert back[name].bos_token == voice.bos_token and back[name].cond.dtype == torch.float32
    assert not list(tmp_path.rglob(".*")), "no temporary file stays"
    released = torch.load(tmp_path / "spk_dict.pt", weights_only=True)
    assert set(released["Chelsie"]) == {"cond", "ref_mel", "bos_token"}
    assert choose_voice(voices, "chelsie") is voices["Chelsie"]
    with pytest.raises(ValueError, match=r"Chelsie, Ethan v1\.2; did you mean 'Chelsie'"):
        choose_voice(voices, "Chelsea")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_broken_voice_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"spk_dict\.pt"):
        load_voices(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="holds no voices"):
        load_voices(tmp_path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    (tmp_path / "b.pt").write_bytes(b"nonsense")
    (tmp_path / "c.safetensors").write_bytes(b"nonsense")
    torch.save(Malicious(), tmp_path / "d.pt")
    torch.save([1, 2], tmp_path / "e.pt")
    torch.save({}, tmp_path / "f.pt")
    torch.save({"Ann": {"cond": torch.zeros(1, 3)}}, tmp_path / "g.pt")
    torch.save({"Ann": {"cond": torch.zeros(3), "ref_mel": torch.zeros(1, 4, 5)}}, tmp_path / "h.pt")
    torch.save({"Ann": torch.zeros(3)}, tmp_path / "i.pt")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=path.name):
            load_voices(path)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="no voice to save"):
        save_voices({}, tmp_path)


def test_parts_stand_alone() -> None:
    config = Token2WavConfig.from_dict(SIZES)
    assert isinstance(DiT(config.dit_config), torch.nn.Module)
    with pytest.raises(ValueError, match="5 bins"):
        BigVGAN(config.bigvgan_config)(torch.zeros(1, 3, 6))
