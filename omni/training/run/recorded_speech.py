"""Which codec encoder a run takes for recorded speech, and the codes that it gives.

Shapes: K codebooks, n frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from omni.model import OmniModel
from omni.training.codec.speech_codes import (
    SpeechEncoder,
    cached_codes,
    find_encoder,
    load_codec_encoder,
    own_encoder,
)
from omni.training.data.failures import RunValueError
from omni.training.run.train_config import TrainConfig


def codec_encoder(config: TrainConfig, model: OmniModel) -> SpeechEncoder | None:
    """The encoder of data.codec, or the one that the checkpoint brings; None where there is neither.

    Warns where a Talker would learn codes of another encoder than its checkpoint brings.
    """
    table, checkpoint = config.data.codec, config.model.checkpoint
    found = find_encoder(table.kind, table.path, checkpoint)
    if found is None:
        return None
    talker = model.config.talker_config
    load = partial(load_codec_encoder, num_codebooks=None if talker is None else talker.num_code_groups)
    encoder = load(*found)
    own = own_encoder(checkpoint) if checkpoint is not None and table.path is not None else None
    learns_codes = config.train.objective != "codec"  # where Code2Wav itself learns, they may be new to it
    if own is not None and learns_codes and load(*own).fingerprint != encoder.fingerprint:
        warnings.warn(
            f"data.codec.path = {table.path!r} is another codec encoder than the one that {checkpoint} brings: its "
            "codes are not those that the model's Code2Wav sounds; leave the path out, or train Code2Wav on them "
            "(objective.decoder_only)",
            stacklevel=2,
        )
    return encoder


def codes_of(config: TrainConfig, model: OmniModel) -> Callable[[Any], Tensor] | None:
    """What encodes a recording to codes int64 [K, n], through the cache; None without a codec (manifests then hold
    codes)."""
    encoder = codec_encoder(config, model)
    if encoder is None:
        return None
    beside = Path(config.data.train[0].manifest).parent  # of a dataset of the Hub there is none
    cache = config.data.codec.cache or str((beside if beside.is_dir() else Path()) / "codes")
    return partial(cached_codes, encoder=encoder, folder=cache)


def no_codec(recording: Any) -> Tensor:
    """In place of an encoder, where the first recording shows that one is needed: the setting is wrong, not the row."""
    raise RunValueError(
        "the rows have recordings of speech, and nothing turns them into codes: set data.codec, for example to "
        "{ kind = 'mimi', path = 'kyutai/mimi' }, or write the codes into the manifest; omni-nano brings its encoder"
    )
