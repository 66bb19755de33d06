"""Rows on whole answers: time to the first sound (p1), cadence of speech frames (p2), batched speech (p7)."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from omni.bench.checkpoint import prompt
from omni.bench.footprint import code2wav_bytes, decoder_step_bytes, residual_codes_bytes
from omni.bench.result import Row, Series, Table, Verdict
from omni.bench.sides import EXPERTS, GREEDY, GREEDY_CODES, STREAMED, Answer, Peer, answer, default_voice
from omni.bench.timing import seconds_of
from omni.bench.workbench import Workbench
from omni.code2wav.contract import SAMPLE_RATE_HZ
from omni.config.model import OmniConfig
from omni.generation.events import AudioChunk
from omni.generation.streaming_config import StreamingConfig
from omni.model import OmniModel
from omni.packaged.toy import TOY_DATA
from omni.processing.inputs import OmniInputs
from omni.processing.processor import OmniProcessor
from omni.session.session import OmniSession

SHIPPED, BEST = "transformers, as shipped", "transformers, best setting"
EAGER, COMPILED = "omni, eager", "omni, compiled"


def peer_settings(bench: Workbench) -> dict[str, dict[str, Any]]:
    """The public settings that could make transformers faster: experts, and a static cache."""
    experts = EXPERTS if bench.peer.family.experts else ()
    settings: dict[str, dict[str, Any]] = {name: {"experts": name} for name in experts}
    settings |= {} if experts else {"its defaults": {}}
    settings["static cache"] = {"cache": "static"}
    return dict(list(settings.items())[:2]) if bench.options.quick else settings


def check_equal(ours: OmniModel, peer: Peer, inputs: OmniInputs, tokens: int, frames: int) -> None:
    """Greedy ids and codes of both sides must be the same. Raises ValueError with the first difference.

    transformers never reads, and so never speaks, the last token of a reply that is cut: it gets one token more.
    """
    assert ours.config.talker_config is not None
    theirs = peer.answer(inputs, tokens + 1, frames)
    out = ours.generate(
        inputs,
        max_new_tokens=tokens,
        max_frames=max(1, frames),
        return_audio=frames > 0,
        speaker=default_voice(ours.config.talker_config.speaker_id or {}) if frames else None,
        text_sampling=GREEDY,
        audio_sampling=GREEDY_CODES,
        residual_sampling=GREEDY,
    )
    if out.replies[0] != theirs.ids[:tokens] or len(theirs.ids) != tokens + 1:
        raise ValueError(f"the two sides answer differently: {out.replies[0][:20]} here, {theirs.ids[:20]} there")
    if not frames:
        return
    assert out.codes is not None and theirs.codes is not None
    here, there = out.codes[0].cpu(), theirs.codes.cpu()
    if here.shape != there.shape:
        raise ValueError(f"the two sides speak {here.shape[1]} and {there.shape[1]} frames")
    if not torch.equal(here, there):
        frame = (here != there).any(0).nonzero()[0].item()
        raise ValueError(f"the two sides speak differently from frame {frame} on")


def agree(ours: OmniModel, peer: Peer, inputs: OmniInputs, tokens: int, frames: int) -> str:
    """The equality check, which float32 must pass; in a lower precision near ties fall either way -> a remark."""
    try:
        check_equal(ours, peer, inputs, tokens, frames)
    except ValueError as error:
        if ours.dtype == torch.float32:
            raise
        return f"In {str(ours.dtype).removeprefix('torch.')} {error}; float32 answers are equal."
    return f"Both sides gave the same greedy answer before the clock ran: {tokens} ids, {frames} frames."


def agree_all(bench: Workbench, inputs: OmniInputs, tokens: int, frames: int) -> str:
    """`agree` for the main config, eager and, with --compile, compiled too."""
    remark = agree(bench.ours, bench.peer, inputs, tokens, frames)
    if bench.compiled is not None:
        agree(bench.compiled, bench.peer, inputs, tokens, frames)
    return remark


def frame_bytes(config: OmniConfig, value_bytes: int, context: int, batch: int = 1) -> float:
    """Bytes of one speech frame: Talker step, residual codes, codec."""
    talker, codec = config.talker_config, config.code2wav_config
    assert talker is not None and codec is not None
    return (
        decoder_step_bytes(talker.text_config, value_bytes, context, batch)
        + residual_codes_bytes(talker.code_predictor_config, value_bytes, batch)
        + code2wav_bytes(codec, value_bytes, batch)
    )


def first_audio(bench: Workbench) -> Row:
    """p1: from the question to the first sample of a five-second answer, both greedy."""
    tokens, frames = (4, 8) if bench.options.quick else (20, round(5.04 / bench.frame_s))
    inputs = prompt(bench.config, 60)
    row = Row("p1", "Time to the first audio sample")
    row.remarks.append(agree_all(bench, inputs, tokens, frames))
    last: dict[str, Answer] = {}
    totals: dict[str, list[list[float]]] = {}

    def noted(name: str, got: Answer) -> float:
        last[name] = got
        totals.setdefault(name, []).append([got.total_s])
        return got.first_s

    def speak(name: str, model: OmniModel) -> Any:
        return lambda: noted(name, answer(model, inputs, tokens, frames, streaming=STREAMED))

    runs: dict[str, Any] = {EAGER: speak(EAGER, bench.ours)}
    if bench.compiled is not None:
        runs[COMPILED] = speak(COMPILED, bench.compiled)
    runs[SHIPPED] = lambda: noted(SHIPPED, bench.peer.answer(inputs, tokens, frames))
    bench.peer.use()
    sound = f"{frames * bench.frame_s:.1f} s"
    labels = bench.labels(batch=1, prompt=f"{inputs.input_ids.shape[1]} tokens", text=f"{tokens} tokens", speech=sound)
    first = Table("first audio", "s", labels, bench.measure(runs), SHIPPED)
    whole = [Series(name, rounds[-bench.repeats :]) for name, rounds in totals.items()]
    row.tables += [first, Table("whole answer", "s", labels, whole, SHIPPED)]
    for name, got in last.items():
        seconds = got.samples / SAMPLE_RATE_HZ
        step = "" if got.rtf_step is None else f", step {got.rtf_step:.3f}"
        row.remarks.append(f"Real-time factor, {name}: end to end {got.total_s / seconds:.3f}{step}.")
    row.remarks.append("transformers returns the sound of an answer when all of it is there.")
    row.verdicts.append(Verdict("first audio before transformers'", first.ratio(EAGER), ">=", 10.0))
    if bench.hears and not bench.options.quick:
        row.tables.append(_spoken_question(bench, bench.processor))
        row.remarks.append(
            "Spoken question: the packaged 2.3 s, audio window 1 s; the clock starts when it has ended. The session "
            "was fed in pieces of 100 ms and had read what it could."
        )
    if bench.hears and bench.device.type == "cuda":
        row.verdicts.append(Verdict("first audio", first[EAGER].median, "<=", 0.060, "s"))
        session = row.tables[-1]["omni session, read while it was heard"].median
        row.verdicts.append(Verdict("first audio after the end of speech", session, "<=", 0.030, "s"))
    return row


def _spoken_question(bench: Workbench, processor: OmniProcessor) -> Table:
    """First sound after the end of a spoken question: read at once, or read while it was heard."""
    import soundfile

    samples, rate = soundfile.read(TOY_DATA / "question.wav", dtype="float32")
    sound = torch.from_numpy(samples)
    model = bench.ours
    messages = [{"role": "user", "content": [{"type": "audio", "audio": (samples, rate)}]}]
    arguments: dict[str, Any] = {"max_new_tokens": 4, "max_frames": 1, "seed": 0}

    def first_of(events: Any, start: float) -> float:
        for event in events:
            if isinstance(event, AudioChunk):
                seconds = time.perf_counter() - start
                events.close()
                return seconds
        raise AssertionError("the answer had no sound")

    def at_once() -> float:
        start = time.perf_counter()
        return first_of(model.stream(processor(messages), **arguments), start)

    def while_heard() -> float:
        session = OmniSession(model, processor, streaming=StreamingConfig(audio_window_s=1.0))
        for piece in sound.split(rate // 10):
            session.push_audio(piece, rate)
        return first_of(session.respond(**arguments), time.perf_counter())

    runs: dict[str, Any] = {
        "omni stream, read afterwards": at_once,
        "omni session, read while it was heard": while_heard,
    }
    return Table(
        "first audio after a spoken question",
        "s",
        bench.labels(batch=1, question=f"{len(samples) / rate:.1f} s"),
        bench.measure(runs),
        "omni stream, read afterwards",
    )


def frame_cadence(bench: Workbench) -> Row:
    """p2: seconds a speech frame (80 ms of sound) once speech is steady, at a batch of one."""
    bench.need_frames()
    tokens, frames = (4, 12) if bench.options.quick else (8, 48)
    inputs = prompt(bench.config, 60)
    row = Row("p2", "Speech frame cadence: Talker, residual codes, codec")
    row.remarks.append(agree_all(bench, inputs, tokens, frames))
    skip = tokens + 2

    def ours(model: OmniModel) -> Any:
        return lambda: answer(model, inputs, tokens, frames, greedy=False).frame_gaps(skip)

    def theirs() -> list[float]:
        return bench.peer.answer(inputs, tokens, frames, greedy=False).frame_gaps(skip)

    best, remarks = bench.best_setting(bench.peer, peer_settings(bench), theirs)
    setting = bench.peer.setting

    def shipped() -> list[float]:
        bench.peer.use()
        return theirs()

    def at_best() -> list[float]:
        bench.peer.use(**setting)
        return theirs()

    context = inputs.input_ids.shape[1] + frames // 2
    touched = frame_bytes(bench.config, bench.dtype.itemsize, context)
    runs: dict[str, Any] = {EAGER: ours(bench.ours)}
    if bench.compiled is not None:
        runs[COMPILED] = ours(bench.compiled)
    runs |= {SHIPPED: shipped, BEST: at_best}
    labels = bench.labels(batch=1, context=context, frames=frames - skip)
    table = Table("frame, sampled as released", "s", labels, bench.measure(runs, touched), SHIPPED, ("frames/s", 1))
    row.tables.append(table)
    name = COMPILED if bench.compiled is not None else EAGER
    row.verdicts.append(Verdict(f"frame, {name}, over transformers as shipped", table.ratio(name), ">=", 3.0))
    if bench.device.type == "cuda":
        row.verdicts.append(Verdict(f"frame, {name}", table[name].median, "<=", 0.003, "s"))
    row.remarks += [
        *remarks,
        f"The best setting is {best}.",
        "Here the time between two chunks of one frame each, codec included, once the text is over; there the time "
        "between two codes of codebook 0 (the residual codes come in between) plus the codec's time for the whole "
        "sound, divided by its frames.",
    ]
    return row


def batched_speech(bench: Workbench) -> Row:
    """p7: eight prompts of unequal length as one batch, and one by one."""
    rows, tokens, frames = (3, 3, 6) if bench.options.quick else (8, 8, 25)
    model, c = bench.ours, bench.config
    singles = [prompt(c, 16 + 7 * i, seed=i) for i in range(rows)]
    width = max(s.input_ids.shape[1] for s in singles)
    ids = torch.full((rows, width), c.im_end_token_id)
    mask = torch.zeros(rows, width, dtype=torch.int64)
    for i, single in enumerate(singles):
        ids[i, width - single.input_ids.shape[1] :] = single.input_ids[0]
        mask[i, width - single.input_ids.shape[1] :] = 1
    batch = OmniInputs(input_ids=ids, attention_mask=mask)
    arguments: dict[str, Any] = {"max_new_tokens": tokens, "max_frames": frames}

    def together(model: OmniModel) -> Any:
        return model.generate(batch, seed=list(range(rows)), **arguments)

    def apart(model: OmniModel) -> list[Any]:
        return [model.generate(single, seed=i, **arguments).codes[0] for i, single in enumerate(singles)]  # type: ignore[index]

    one_by_one, joint = apart(model), together(model).codes
    different = [i for i in range(rows) if not torch.equal(one_by_one[i], joint[i])]
    if different and bench.dtype == torch.float32:
        raise ValueError(f"rows {different} of the batch have other codes than alone")
    row = Row("p7", f"Speech of {rows} rows of unequal length")
    runs = {
        "one by one": lambda: seconds_of(lambda: apart(model), bench.device),
        "one batch": lambda: seconds_of(lambda: together(model), bench.device),
    }
    if bench.compiled is not None:
        compiled = bench.compiled
        runs["one batch, compiled"] = lambda: seconds_of(lambda: together(compiled), bench.device)
    labels = bench.labels(batch=rows, prompts=f"16 to {width} tokens", text=f"{tokens} tokens", frames=frames)
    sound = rows * frames * bench.frame_s
    table = Table("all rows", "s", labels, bench.measure(runs), "one by one", ("audio s/s", sound))
    row.tables.append(table)
    row.verdicts.append(Verdict("throughput of the batch over single runs", table.ratio("one batch"), ">=", 3.0))
    same = rows - len(different)
    row.remarks.append(
        f"Sampled as released, seeds 0 to {rows - 1}: {same} of {rows} rows have the codes they have alone."
    )
    median = statistics.median(table["one batch"].samples)
    row.remarks.append(f"End-to-end real-time factor of the batch: {median / sound:.3f}.")
    return row
