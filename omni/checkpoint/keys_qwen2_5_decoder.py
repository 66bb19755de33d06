"""The names of Qwen2.5-Omni's Thinker and Talker: rows of its rename table (`KeyTable.renames`, ours and the Hub's)."""

from __future__ import annotations

from omni.checkpoint.keys import KeyTable

DECODER_RENAMES = (
    ("thinker.lm_head.", "thinker.lm_head."),
    ("thinker.", "thinker.model."),
    ("talker.input_projection.", "talker.thinker_to_talker_proj."),
    ("talker.codec_head.", "talker.codec_head."),
    ("talker.codec_embedding.", "talker.model.embed_tokens."),
    ("talker.", "talker.model."),
)
# the names that transformers 5 uses in memory, and writes with save_original_format=False
DECODER_ALSO_READ = (("thinker.", "thinker.model.language_model."),)

QWEN2_5_OMNI = KeyTable(
    renames=(
        ("audio_encoder.", "thinker.audio_tower."),
        ("vision_encoder.", "thinker.visual."),
        *DECODER_RENAMES,
        ("code2wav.", "token2wav."),
    ),
    also_read=(
        ("audio_encoder.", "thinker.model.audio_tower."),
        ("vision_encoder.", "thinker.model.visual."),
        *DECODER_ALSO_READ,
    ),
    derived=(".inv_freq", ".positional_embedding.positional_embedding", ".audio_bos_eos_token.weight"),
    parts=("thinker", "talker", "token2wav"),
)
