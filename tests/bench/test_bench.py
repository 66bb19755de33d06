"""`omni bench`: every row runs at the smallest sizes, byte counts are true, reports say what was measured."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build import config_values
from rich.console import Console
from test_parity_token2wav import BIGVGAN, DIT

from omni import OmniModel
from omni.bench import footprint
from omni.bench.ceilings import measure_ceilings
from omni.bench.checkpoint import only, parameter_bytes, prompt, random_model, read_config
from omni.bench.report import END, START, markdown, plot, quantity, read_rows, show, update_page, write_json
from omni.bench.result import Growth, Row, Series, Table, Verdict
from omni.bench.rows_speech import check_equal
from omni.bench.sides import answer
from omni.bench.timing import paired_ratio, peak_memory, percentile, take_turns
from omni.bench.workbench import Options, Workbench
from omni.cli import bench as command
from omni.config.model import OmniConfig
from omni.model import OmniModel as Model

ROOT = Path(__file__).parents[2]
TINY, RELEASED = ROOT / "configs" / "tiny.json", ROOT / "configs" / "qwen3_omni_30b_a3b.json"
CPU = torch.device("cpu")
LONG = ("p2", "p5", "p6", "p7", "p11", "growth")  # ten seconds or more each
IN_PROCESS = [
    pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
    for name in command.ROWS
    if name not in ("p9", "p12")  # these start processes of their own
]
measured = functools.cache(command.measure)


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    with Workbench(Options(TINY, RELEASED, CPU, repeats=1, quick=True, command="omni bench")) as bench:
        yield bench


# rows


@pytest.fixture(scope="module")
def second_family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """A tiny Qwen2.5-Omni in the place of the main config."""
    values = config_values(5, audio={}, vision={}, vocabulary=512)  # without encoders the other side's are full size
    values["token2wav_config"] = {"dit_config": {**DIT, "num_embeds": 319}, "bigvgan_config": BIGVGAN}
    values["talker_config"] |= {"vocab_size": 320, "tts_codec_pad_token_id": 300, "tts_codec_start_token_id": 301}
    values["talker_config"] |= {"tts_codec_end_token_id": 302, "tts_codec_mask_token_id": 304}
    path = tmp_path_factory.mktemp("config") / "tiny25.json"
    path.write_text(json.dumps(values))
    with Workbench(Options(path, RELEASED, CPU, repeats=1, quick=True, command="omni bench")) as bench:
        yield bench


@pytest.mark.parametrize("name", ["p1", "p4", "p7", "p11"])
def test_rows_of_the_second_family(second_family: Workbench, name: str) -> None:
    """Equal answers before the clock, as everywhere; both sides are measured."""
    row = measured(second_family, name)
    assert row.tables and all(min(series.samples) > 0 for table in row.tables for series in table.series)
    assert name in ("p7", "p11") or "the same greedy answer" in " ".join(row.remarks)


@pytest.mark.parametrize("name", ["p2", "p3", "p8", "p10", "growth"])
def test_rows_that_need_frames_say_so(second_family: Workbench, name: str) -> None:
    with pytest.raises(ValueError, match=r"windows of codes|residual codes|another family"):
        measured(second_family, name)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_row_runs(bench: Workbench, name: str) -> None:
    """It measures something positive, renders, and survives JSON."""
    row = measured(bench, name)
    assert row.name == name and (row.tables or row.growths) and row.remarks
    for table in row.tables:
        assert table.labels["dtype"] == "float32" and len(table.series) >= 1
        assert all(series.samples and min(series.samples) > 0 for series in table.series)
    for growth in row.growths:
        assert len(growth.x) == len(set(growth.x)) and all(len(v) == len(growth.x) for v in growth.curves.values())
    assert all(math.isfinite(verdict.value) for verdict in row.verdicts)
    assert row.run["torch"] == torch.__version__ and row.run["seconds"] >= 0
    again = Row.from_dict(json.loads(json.dumps(row.to_dict())))
    assert markdown([again]) == markdown([row]) and row.title in markdown([row])
    show(Console(quiet=True), row)


@pytest.mark.slow
def test_both_sides_are_compared_where_they_should(bench: Workbench) -> None:
    names = {series.name for series in measured(bench, "p2").tables[0].series}
    assert names == {"omni, eager", "transformers, as shipped", "transformers, best setting"}


def test_loading_and_importing_in_processes(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of the rows that start processes; the processes themselves are stood in for."""
    from omni.bench import rows_process

    seconds = {"omni": 1.0, "transformers": 2.0}
    monkeypatch.setattr(
        rows_process, "probe", lambda what, side, **_: {"seconds": seconds[side], "peak": 150, "kept": 100}
    )
    row = rows_process.loading(bench)
    assert row.tables[0].ratio("omni") == 2.0
    assert [(v.value, v.met) for v in row.verdicts] == [(0.5, True), (1.5, False)]
    took = {"import torch": 2.0, "import omni": 0.1, "from omni import OmniModel": 2.75}
    monkeypatch.setattr(rows_process, "import_seconds", took.__getitem__)
    row = rows_process.importing(bench)
    assert [(v.value, v.met) for v in row.verdicts] == [(pytest.approx(-1.9), True), (0.75, False)]


def test_sides_that_differ_are_not_timed(bench: Workbench) -> None:
    other = random_model(bench.config, CPU, torch.float32, seed=1)
    with pytest.raises(ValueError, match="the two sides"):
        check_equal(other, bench.peer, prompt(bench.config, 20), 4, 4)


def test_one_set_of_weights_can_serve_both_sides() -> None:
    options = Options(TINY, RELEASED, CPU, repeats=1, quick=True, share=True)
    with Workbench(options) as bench:
        assert bench.peer.model.talker.codec_head.weight.data_ptr() == bench.ours.talker.codec_head.weight.data_ptr()
        check_equal(bench.ours, bench.peer, prompt(bench.config, 20), 4, 4)
        assert not list(bench._folder.iterdir())


def test_settings_that_fail_are_recorded(bench: Workbench) -> None:
    best, remarks = bench.best_setting(bench.peer, {"good": {}, "odd": {"experts": "no_such"}}, lambda: 0.5)
    assert best == "good" and bench.peer.setting == {}
    assert "with odd does not run here" in remarks[0] and "good 500 ms" in remarks[1]


# byte counts


@pytest.fixture(scope="module", params=["tiny.json", "bench.json", "qwen3_omni_30b_a3b.json"])
def meta(request: pytest.FixtureRequest) -> Model:
    """A model without memory, which counts its own parameters."""
    with torch.device("meta"):
        return OmniModel(read_config(ROOT / "configs" / request.param))


def numel(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_bytes_of_a_step_equal_the_parameters(meta: Model) -> None:
    """With every expert chosen a step reads all parameters once, but one row of the embedding."""
    text, talker = meta.config.thinker_config.text_config, meta.config.talker_config
    assert talker is not None
    all_text = replace(text, num_experts_per_tok=text.num_experts)
    expected = numel(meta.thinker) - (text.vocab_size - 1) * text.hidden_size
    assert footprint.decoder_step_bytes(all_text, 1) == pytest.approx(expected, rel=1e-12)
    speech = replace(talker.text_config, num_experts_per_tok=talker.text_config.num_experts)
    rest = (meta.talker.mtp, meta.talker.text_projection, meta.talker.hidden_projection)
    expected = numel(meta.talker) - sum(map(numel, rest)) - (speech.vocab_size - 1) * speech.hidden_size
    assert footprint.decoder_step_bytes(speech, 2) == pytest.approx(2 * expected, rel=1e-12)


def test_bytes_of_a_frame_equal_the_parameters(meta: Model) -> None:
    mtp, codec = meta.talker.mtp, meta.code2wav
    c = mtp.config
    once = numel(mtp.layers) + numel(mtp.norm)
    rows = (c.num_code_groups - 1) * c.hidden_size
    expected = (c.num_code_groups - 1) * once + numel(mtp.lm_head) + rows
    assert footprint.residual_codes_bytes(c, 1) == expected
    expected = numel(codec) - numel(codec.code_embedding) + codec.num_codebooks * codec.config.hidden_size
    assert footprint.code2wav_bytes(codec.config, 4) == 4 * expected


def test_bytes_of_the_released_model() -> None:
    """bf16, context 1000: 6.18 GB a Thinker token, 0.60 a Talker step, 2.42 the residual codes, 0.37 the codec."""
    config = OmniConfig.from_pretrained(RELEASED)
    assert config.talker_config is not None and config.code2wav_config is not None
    found = (
        footprint.decoder_step_bytes(config.thinker_config.text_config, 2, 1000),
        footprint.decoder_step_bytes(config.talker_config.text_config, 2, 1000),
        footprint.residual_codes_bytes(config.talker_config.code_predictor_config, 2),
        footprint.code2wav_bytes(config.code2wav_config, 2),
    )
    assert [value / 1e9 for value in found] == pytest.approx([6.18, 0.60, 2.42, 0.37], rel=0.03)


def test_experts_reached_by_a_batch() -> None:
    text = OmniConfig.from_pretrained(RELEASED).thinker_config.text_config
    assert [round(footprint.distinct_experts(text, n)) for n in (1, 4, 16, 64)] == [8, 29, 82, 126]


# the models that are measured


def test_random_models_answer_in_full_and_with_sound() -> None:
    config = read_config(TINY)
    model = random_model(config, CPU, torch.float32)
    got = answer(model, prompt(config, 20), tokens=5, frames=7)
    assert len(got.ids) == 5 and got.samples == 7 * 1920 - 555 and len(got.frame_times) == 7
    assert got.frame_times == sorted(got.frame_times) and got.frame_gaps(2) and got.first_s == got.frame_times[0]
    with torch.no_grad():
        wave = model.code2wav(torch.randint(64, (1, 4, 10)))
    assert 1e-3 < float(wave.abs().max()) < 1
    same = random_model(config, CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))


@pytest.mark.parametrize("part", ["thinker", "mtp", "code2wav"])
def test_full_size_parts_stand_alone(part: str) -> None:
    """The part has its released shape, the rest next to nothing."""
    with torch.device("meta"):
        model = OmniModel(only(part, RELEASED))
        whole = OmniModel(read_config(RELEASED), parts=("thinker",)) if part == "thinker" else None
    size = parameter_bytes(model)
    kept = {"thinker": model.thinker, "mtp": model.talker.mtp, "code2wav": model.code2wav}[part]
    assert parameter_bytes(kept) > 0.9 * size
    if whole is not None:
        assert numel(model.thinker.layers[0]) == numel(whole.thinker.layers[0])


def test_config_without_speech_is_refused(tmp_path: Path) -> None:
    values = json.loads(TINY.read_text()) | {"enable_audio_output": False}
    del values["talker_config"], values["code2wav_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="without speech"):
        read_config(tmp_path)


# numbers


def test_ratios_are_paired_by_round() -> None:
    """A machine that slows down between rounds does not change the ratio."""
    table = Table("t", "s", {}, [Series("a", [[1.0, 1.0], [10.0], [3.0]]), Series("b", [[2.0], [20.0], [6.0]])], "b")
    assert table.ratio("a") == 2.0 and table.ratio("b") == 1.0
    assert paired_ratio([[1.0], [9.0]], [[1.0], [3.0]]) == 2.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0 and percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs: dict[str, Any] = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert take_turns(runs, 2, warm_up=1) == {"a": [[1.0], [1.0]], "b": [[1.0], [1.0]]}
    assert order == list("ababab")


def test_exponents() -> None:
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    curves: dict[str, list[float | None]] = {
        "flat": [5.0] * 5,
        "square": [n * n for n in x],
        "late": [7.0, 7.0, 4.0, 8.0, 16.0],
        "gaps": [None, None, None, None, 1.0],
    }
    growth = Growth("g", "n", "s", {}, x, curves)
    assert [growth.exponent(name) for name in ("flat", "square", "late")] == pytest.approx([0, 2, 1], abs=1e-9)
    assert math.isnan(growth.exponent("gaps"))


def test_ceilings_and_memory() -> None:
    ceilings = measure_ceilings(CPU, torch.float32, size_bytes=1 << 16)
    assert min(ceilings.copy_bytes_s, ceilings.read_bytes_s, ceilings.flops_s) > 0
    gc.collect()  # what earlier tests left must not be freed while the meter runs
    with peak_memory(CPU) as memory:
        held = torch.ones(16 << 20)
    assert memory.peak is None or held.numel() * 4 * 0.9 < memory.peak < held.numel() * 4 * 2


# reports


def a_row(name: str = "p2", ratio: float = 4.0) -> Row:
    series = [Series("omni, eager", [[0.002]], 4e6), Series("theirs", [[0.002 * ratio]], 4e6)]
    table = Table("frame", "s", {"batch": "1"}, series, "theirs", ("frames/s", 1))
    return Row(name, "Cadence", [table], verdicts=[Verdict("faster", ratio, ">=", 3.0)], remarks=["so it was"])


def test_markdown() -> None:
    row = a_row()
    row.run = {
        "command": "omni bench p2", "config": "tiny.json", "device": "CPU", "dtype": "float32", "threads": "1",
        "cores": 2, "python": "3.11", "torch": "2.13", "transformers": "5.23",
        "ceilings": {"copy_bytes_s": 1e10, "read_bytes_s": 5e9, "flops_s": 1e11},
    }  # fmt: skip
    text = markdown([row])
    assert "| p2 | faster | 4.00x | >= 3.00x | met |" in text
    assert "| omni, eager | 2.00 ms | 2.00 ms | 500 | 4.00x | 20.0% |" in text  # 4 MB at 10 GB/s is 0.4 ms of 2
    assert "`omni bench p2`: tiny.json, CPU, float32, 1 of 2 cores" in text and "- so it was" in text
    assert "NOT met" in markdown([a_row(ratio=2.0)])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0021, "s", "2.10 ms"), (61.0, "s", "61.0 s"), (2.5e9, "B", "2.50 GB"), (1.234, "x", "1.23x"), (None, "s", "")],
)
def test_quantities(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_page_keeps_what_is_around_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text(f"# Mine\n\n{START}\nold\n{END}\nafter\n")
    update_page(page, [a_row()], "results.png")
    text = page.read_text()
    assert text.startswith("# Mine\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "![" in text and "Cadence" in text
    update_page(page, [a_row()], "results.png")
    assert page.read_text() == text


def test_json_round_trip_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert read_rows(path) == []
    write_json(path, [a_row()])
    assert markdown(read_rows(path)) == markdown([a_row()])
    assert json.loads(path.read_text())["rows"][0]["tables"][0]["series"][0]["ratio"] == 4.0
    for text in ("{}", "no json", '{"rows": [{"name": 1}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="results of `omni bench`"):
            read_rows(path)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    growth = Row("growth", "g", growths=[Growth("time", "rows", "s", {}, [1.0, 2.0], {"step": [0.1, None]})])
    assert plot(tmp_path / "results.png", [a_row(), growth])
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not plot(tmp_path / "none.png", [])


# the command line


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser("omni bench")
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grwth"], "there is no row 'grwth'; did you mean 'growth'?"),
        (["p22"], "did you mean 'p2'?"),
        (["--parts", "expert"], "did you mean 'experts'?"),
        (["p2", "--repeats", "0"], "'0' is not a whole number"),
        (["p2", "--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


def test_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.run(parse())
    assert "name a row" in capsys.readouterr().err


def test_impossible_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        command.run(parse("p2", "--out", str(tmp_path / "none")))
    with pytest.raises(ValueError, match="use cpu or cuda"):
        command.run(parse("p2", "--device", "meta"))
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(ValueError, match="holds no results"):
        command.run(parse("p2", "--out", str(tmp_path)))
    import transformers

    monkeypatch.setattr(transformers, "Qwen3OmniMoeForConditionalGeneration", None)
    with pytest.raises(ValueError, match="has no Qwen3-Omni to compare with; install transformers>="):
        command.run(parse("p2"))


def test_a_run_writes_and_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "results.json", [a_row("p7")])
    words = ["--quick", "--repeats", "1", "--config", str(TINY), "--device", "cpu", "--out", str(tmp_path)]
    command.run(parse("--parts", "codec", "experts", *words))
    rows = read_rows(tmp_path / "results.json")
    assert [row.name for row in rows] == ["p7", "parts"]
    names = [series.name for series in rows[1].tables[0].series]
    assert names == ["codec frame", "Thinker experts", "Talker experts"]
    assert "codec frame" in (tmp_path / "RESULTS.md").read_text()
    out = capsys.readouterr()
    assert "Parts alone" in out.out and "codec frame" in out.out
    before = (tmp_path / "RESULTS.md").read_text()
    command.run(parse("--out", str(tmp_path)))
    assert (tmp_path / "RESULTS.md").read_text() == before
