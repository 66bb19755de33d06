"""Rows on one step: the residual codes of a frame (p3), and the decode of the Thinker (p4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omni.bench import units
from omni.bench.checkpoint import only, parameter_bytes, prompt
from omni.bench.footprint import decoder_step_bytes, residual_codes_bytes
from omni.bench.result import Row, Series, Table, Verdict
from omni.bench.rows_speech import BEST, COMPILED, EAGER, SHIPPED, agree, agree_all, peer_settings
from omni.bench.sides import Peer, answer
from omni.bench.timing import enough_calls, seconds_of
from omni.bench.workbench import Workbench
from omni.generation.graphs import cuda_graph
from omni.generation.rows import Rows
from omni.generation.runner import Runner
from omni.model import OmniModel

CAPTURED = "omni, CUDA graph"
# Measured on CPU at full width in both precisions; on a GPU the released one alone.
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def residual_codes(bench: Workbench) -> Row:
    """p3: the 15 residual codes of one frame at the released size."""
    bench.drop_models()
    row = Row("p3", "Residual codes of one frame, released size")
    config = only("mtp", bench.options.config if bench.options.quick else bench.options.released)
    assert config.talker_config is not None
    mtp = config.talker_config.code_predictor_config
    for dtype in _DTYPES[bench.device.type][: 1 if bench.options.quick else None]:
        with bench.pair(config, dtype) as (ours, peer, _), torch.no_grad():
            compiled = bench.compiled_twin(ours, "inductor")
            table, remark = _residual_table(bench, ours, peer, compiled, dtype)
        row.tables.append(table)
        row.remarks.append(remark)
        name, sides = str(dtype).removeprefix("torch."), [series.name for series in table.series]
        side = next(side for side in (CAPTURED, COMPILED, EAGER) if side in sides)
        row.verdicts.append(Verdict(f"{name}, {side}, over transformers as shipped", table.ratio(side), ">=", 1.8))
        if bench.device.type == "cuda":
            row.verdicts.append(Verdict(f"{name}, {side}, one frame", table[side].median, "<=", 0.002, "s"))
        touched = residual_codes_bytes(mtp, dtype.itemsize)
        floor = touched / bench.ceilings.bytes_s
        row.remarks.append(
            f"{name}: {touched / 1e9:.2f} GB a frame, at this machine's bandwidth {1000 * floor:.3g} ms."
        )
    return row


def _residual_table(
    bench: Workbench, ours: OmniModel, peer: Peer, compiled: OmniModel | None, dtype: torch.dtype
) -> tuple[Table, str]:
    """Both sides' codes compared, then timed with the released sampling."""
    mtp, predictor = ours.require("talker").mtp, peer.model.talker.code_predictor
    steps, width = mtp.config.num_code_groups - 1, mtp.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden, first = torch.randn(2, 1, width, generator=generator).to(bench.device, dtype)
    embeds = torch.stack((hidden, first), dim=1)
    here = mtp.generate(hidden, first, lambda logits, _: logits.argmax(-1))[0]
    there = predictor.generate(inputs_embeds=embeds, max_new_tokens=steps, do_sample=False)
    same = int((here == there).sum())
    if dtype == torch.float32 and same < steps:
        raise ValueError(f"the two sides draw different residual codes: {here.tolist()} here, {there.tolist()} there")

    def theirs(**setting: Any) -> Callable[[], Any]:
        # as the Talker calls it for every frame
        return lambda: predictor.generate(
            inputs_embeds=embeds,
            max_new_tokens=steps,
            do_sample=True,
            top_k=50,
            top_p=0.8,
            output_hidden_states=True,
            return_dict_in_generate=True,
            **setting,
        )

    work: dict[str, Callable[[], Any]] = {EAGER: units.residual_codes(ours, 1, hidden, first)}
    if compiled is not None:
        work[COMPILED] = units.residual_codes(compiled, 1, hidden, first)
    if bench.device.type == "cuda":
        work[CAPTURED] = cuda_graph(work[COMPILED] if compiled is not None else work[EAGER])
    work |= {SHIPPED: theirs(), BEST: theirs(cache_implementation="static")}
    try:
        work[BEST]()
    except Exception:  # a static cache that does not run here leaves the shipped setting as the best one
        del work[BEST]
    runs: dict[str, Any] = {
        name: lambda job=job: [seconds_of(job, bench.device) for _ in range(1 if bench.options.quick else 5)]
        for name, job in work.items()
    }
    touched = residual_codes_bytes(mtp.config, dtype.itemsize)
    name = str(dtype).removeprefix("torch.")
    labels = bench.labels(batch=1) | {"dtype": name}
    remark = f"{name}: {same} of {steps} greedy codes equal transformers'; the best setting tried is a static cache."
    return Table(f"one frame, {name}", "s", labels, bench.measure(runs, touched), SHIPPED), remark


def thinker_decode(bench: Workbench) -> Row:
    """p4: seconds a text token of the Thinker, at the config's width and at the released one cut to a few layers."""
    row = Row("p4", "Thinker decode")
    tokens = 8 if bench.options.quick else 32
    inputs = prompt(bench.config, 60)
    row.remarks.append(agree_all(bench, inputs, tokens, 0))
    text = bench.config.thinker.text_config
    touched = decoder_step_bytes(text, bench.dtype.itemsize, 60)
    table = _decode_table(bench, row, bench.ours, bench.peer, bench.compiled, tokens, touched)
    table.title = f"{text.num_hidden_layers} layers of {text.hidden_size}"
    name = COMPILED if bench.compiled is not None else EAGER
    if bench.device.type == "cpu":
        row.verdicts.append(Verdict(f"narrow, {name}, over transformers' best", table.ratio(name, BEST), ">=", 2.0))
    else:
        row.verdicts.append(Verdict(f"{name}, a second", 1 / table[name].median, ">=", 400, "tok/s"))
    if bench.options.quick:
        return row
    bench.drop_models()
    layers = 2
    config = only("thinker", bench.options.released, layers)
    wide: Any = config.thinker.text_config
    with bench.pair(config, torch.bfloat16) as (ours, peer, _):
        row.remarks.append(f"Full width: {agree(ours, peer, inputs, tokens, 0)}")
        compiled = bench.compiled_twin(ours)
        touched = decoder_step_bytes(wide, 2, 60)
        table = _decode_table(bench, row, ours, peer, compiled, tokens, touched)
        weights = parameter_bytes(ours.require("thinker")) / 1e9
    table.labels["dtype"] = "bfloat16"
    table.title = f"{layers} layers of {wide.hidden_size}, {wide.num_experts} experts, {wide.vocab_size} words"
    name = COMPILED if compiled is not None and table[COMPILED].median < table[EAGER].median else EAGER
    row.verdicts.append(Verdict(f"full width, {name}, over transformers' best", table.ratio(name, BEST), ">=", 1.0))
    row.remarks.append(f"Full width: {weights:.1f} GB of weights, {touched / 1e6:.0f} MB of them for a token.")
    return row


def _decode_table(
    bench: Workbench,
    row: Row,
    ours: OmniModel,
    peer: Peer,
    compiled: OmniModel | None,
    tokens: int,
    touched: float,
) -> Table:
    inputs = prompt(bench.config, 60)

    def theirs() -> list[float]:
        return peer.answer(inputs, tokens).token_gaps()

    best, remarks = bench.best_setting(peer, peer_settings(bench), theirs)
    setting = peer.setting

    def set_to(**values: Any) -> Callable[[], list[float]]:
        def run() -> list[float]:
            peer.use(**values)
            return theirs()

        return run

    runs: dict[str, Any] = {EAGER: lambda: answer(ours, inputs, tokens).token_gaps()}
    if compiled is not None:
        runs[COMPILED] = lambda: answer(compiled, inputs, tokens).token_gaps()
    runs |= {SHIPPED: set_to(), BEST: set_to(**setting)}
    row.remarks += [*remarks, f"The best setting is {best}."]
    labels = bench.labels(batch=1, context=inputs.input_ids.shape[1] + tokens // 2)
    series = bench.measure(runs, touched)
    table = Table("token", "s", labels, series, SHIPPED, ("tok/s", 1))
    row.tables.append(table)
    return table


def codec(bench: Workbench) -> Row:
    """p6: Code2Wav frame by frame beside one call, at the config's size and at the released one."""
    row = Row("p6", "Code2Wav frame by frame")
    sizes = {bench.options.config.stem: bench.options.config}
    if not bench.options.quick:
        sizes["released size"] = bench.options.released
    bench.drop_models()
    for name, path in sizes.items():
        frames = 8 if bench.options.quick else 60 if path == bench.options.config else 24
        with bench.pair(only("code2wav", path), bench.dtype) as (ours, peer, _), torch.no_grad():
            _codec_table(bench, row, ours, bench.compiled_twin(ours, "inductor"), peer, name, frames)
    row.remarks.append("Each series decodes the same codes to the same number of samples.")
    return row


def _codec_table(
    bench: Workbench, row: Row, ours: OmniModel, compiled: OmniModel | None, peer: Peer, name: str, frames: int
) -> None:
    code2wav: Any = ours.code2wav
    config = code2wav.config
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.codebook_size, (1, config.num_quantizers, frames), generator=generator).to(
        bench.device
    )

    def streamed(runner: Runner) -> Tensor:
        state = code2wav.init_state(1)
        return torch.cat([runner.decode(codes[:, :, i : i + 1], state) for i in range(frames)], dim=1)

    def whole() -> Tensor:
        return code2wav(codes)

    def theirs() -> Tensor:
        return peer.model.code2wav.chunked_decode(codes)

    sides = {"omni, frame by frame": Rows(ours, 1).runner}
    if compiled is not None:
        sides[f"{COMPILED}, frame by frame"] = Rows(compiled, 1).runner
    reference, other = whole().float(), theirs().float()[:, 0]
    waves = [streamed(side).float() for side in sides.values()]
    error = max(
        float((wave - reference).abs().max()) if wave.shape == reference.shape else float("inf") for wave in waves
    )
    if other.shape == reference.shape:
        row.remarks.append(f"{name}: largest difference to transformers {float((other - reference).abs().max()):.1e}.")
    jobs: dict[str, Callable[[], Tensor]] = {title: partial(streamed, side) for title, side in sides.items()}
    jobs |= {"omni, one call": whole, SHIPPED: theirs}
    runs: dict[str, Any] = {title: lambda job=job: seconds_of(job, bench.device) for title, job in jobs.items()}
    labels = bench.labels(batch=1, frames=frames, sound=f"{frames * 0.08:.2f} s")
    table = Table(f"{frames} frames, {name}", "s", labels, bench.measure(runs), "omni, one call", ("frames/s", frames))
    row.tables.append(table)
    row.verdicts.append(Verdict(f"{name}: largest difference, streamed to one call", error, "<=", 1e-5, ""))
    if bench.device.type == "cpu":
        for title in sides:
            row.verdicts.append(Verdict(f"{name}: {title}, over one call", 1 / table.ratio(title), "<=", 1.3))
        return
    state = code2wav.init_state(1)
    code2wav.step(codes[:, :, :1], state)

    def frame() -> Tensor:
        return code2wav.step(codes[:, :, 1:2], state)

    number = enough_calls(frame, bench.device)
    each = bench.measure({"omni, steady frame": lambda: seconds_of(frame, bench.device, number)})
    row.tables.append(Table(f"steady frame, {name}", "s", bench.labels(batch=1), _touching(each, code2wav)))
    row.verdicts.append(Verdict(f"{name}: one frame", each[0].median, "<=", 0.0005, "s"))


def _touching(series: list[Series], module: torch.nn.Module) -> list[Series]:
    """The series with the bytes of the module's weights, its embedding left out."""
    embedding: Any = module.code_embedding
    for one in series:
        one.bytes_touched = parameter_bytes(module) - parameter_bytes(embedding)
    return series
