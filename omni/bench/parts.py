"""`--parts`: the pieces of a step timed alone, with the bytes each must touch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from omni.bench import units
from omni.bench.footprint import (
    attention_values,
    code2wav_bytes,
    decoder_step_bytes,
    layer_values,
    moe_values,
    residual_codes_bytes,
)
from omni.bench.result import Row, Series, Table
from omni.bench.rows import PARTS
from omni.bench.timing import enough_calls, seconds_of, take_turns
from omni.bench.workbench import Workbench

Part = tuple[str, Callable[[], units.Step], int, float | None]


def parts(bench: Workbench) -> Row:
    """The chosen parts at a batch of one; those of the decoders per layer, each layer in turn."""
    model, config, size = bench.ours, bench.config, bench.dtype.itemsize
    text: Any = config.thinker.text_config
    talker, codec = config.talker_config, config.code2wav_config
    assert talker is not None and codec is not None
    speech, framed = talker.text_config, codec.by_frames
    context = 32 if bench.options.quick else 512
    sides = (("Thinker", model.thinker, text), ("Talker", model.talker, speech))
    layers = [(f"{name} {{}}", decoder, c.num_hidden_layers, c) for name, decoder, c in sides]
    # part -> (name, what builds it, calls in one, bytes of one)
    table: dict[str, list[Part]] = {
        "thinker": [
            ("Thinker step", partial(units.thinker_step, model, 1, context), 1, decoder_step_bytes(text, size, context))
        ],
        "talker": [
            ("Talker step", partial(units.talker_step, model, 1, context), 1, decoder_step_bytes(speech, size, context))
        ],
        "layers": [
            (name.format("layer"), partial(units.each_layer, d), n, size * layer_values(c, 0))
            for name, d, n, c in layers
        ],
        "attention": [
            (name.format("attention"), partial(units.each_layer, d, "self_attn"), n, size * float(attention_values(c)))
            for name, d, n, c in layers
        ],
        "encoder": [("audio encoder, 1 s", partial(units.audio_encoding, model, 1.0), 1, None)],
    }
    if framed:  # the family with experts and residual codes
        table["experts"] = [
            (name.format("experts"), partial(units.each_layer, d, "mlp"), n, size * moe_values(c))
            for name, d, n, c in layers
        ]
        codes = residual_codes_bytes(talker.code_predictor_config, size)
        table["residual_codes"] = [("residual codes", partial(units.residual_codes, model), 1, codes)]
        table["codec"] = [("codec frame", partial(units.codec_frame, model), 1, code2wav_bytes(codec, size))]
    absent = [part for part in bench.options.parts if part not in table]
    if absent:
        raise ValueError(f"{bench.options.config} has no {absent[0]}; its parts are {', '.join(table)}")
    series = []
    with torch.no_grad():
        for part in bench.options.parts or [part for part in PARTS if part in table]:
            for name, build, calls, touched in table[part]:
                step = build()
                number = enough_calls(step, bench.device, most=100)
                rounds = take_turns(
                    {name: partial(seconds_of, step, bench.device, number)}, bench.repeats, 1, bench.say
                )
                each = [[seconds / calls for seconds in samples] for samples in rounds[name]]
                series.append(Series(name, each, touched))
    row = Row("parts", "Parts alone, eager")
    row.tables.append(Table("one of each", "s", bench.labels(batch=1, context=context), series))
    row.remarks.append("Shares above 100 % mean that the weights stayed in a cache.")
    return row
