"""How the encoders of Qwen2.5-Omni are named: this library's modules beside the Hub's files, for a `KeyTable`.

Below these prefixes every name is the same on both sides.
"""

from __future__ import annotations

# ours -> the released files'
ENCODER_RENAMES = (
    ("audio_encoder.", "thinker.audio_tower."),
    ("vision_encoder.", "thinker.visual."),
)
# the names that transformers 5 uses in memory, and writes with save_original_format=False
ENCODER_ALSO_READ = (
    ("audio_encoder.", "thinker.model.audio_tower."),
    ("vision_encoder.", "thinker.model.visual."),
)
# tables that some writers store and the model computes
ENCODER_DERIVED = (".inv_freq", ".positional_embedding.positional_embedding")
