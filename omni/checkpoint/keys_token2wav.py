"""How Token2Wav's tensors are named: this library's modules and the Hub's files of the Qwen2.5-Omni family."""

from __future__ import annotations

from omni.checkpoint.keys import KeyTable

_DIT, _BIGVGAN = "token2wav.code2wav_dit_model.", "token2wav.code2wav_bigvgan_model."

TOKEN2WAV_RENAMES = (
    ("token2wav.dit.code_embed.", f"{_DIT}text_embed.codec_embed."),
    ("token2wav.dit.input_proj.", f"{_DIT}input_embed.proj."),
    ("token2wav.dit.speaker_encoder.", f"{_DIT}input_embed.spk_encoder."),
    ("token2wav.dit.blocks.", f"{_DIT}transformer_blocks."),
    ("token2wav.dit.", _DIT),
    ("token2wav.bigvgan.", _BIGVGAN),
)
TOKEN2WAV_DERIVED = (".rotary_embed.inv_freq", ".upsample.filter", ".downsample.filter")

TOKEN2WAV = KeyTable(
    renames=TOKEN2WAV_RENAMES,
    also_read=(),
    derived=TOKEN2WAV_DERIVED,
    parts=("token2wav",),
)
