"""Checkpoint folders that are broken or hostile end in one plain sentence, at once; good ones are read by header."""

import json
import struct
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from omni.checkpoint import reading
from omni.checkpoint.shards import INDEX, WEIGHTS, read_headers, tensor_files


def index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.zeros(2, 3), "e": torch.zeros(0)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors")
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(tmp_path, {"a": one, "e": one, "b": two})
    return tmp_path


def test_headers_of_shards_and_of_one_file(sharded, tmp_path):
    headers = read_headers(sharded)
    assert {key: (info.shape, info.dtype, info.shard.name[:11]) for key, info in headers.items()} == {
        "a": ((2, 3), "F32", "model-00001"),
        "e": ((0,), "F32", "model-00001"),
        "b": ((4,), "BF16", "model-00002"),
    }
    assert headers["b"].bytes == 8
    single = tmp_path / "single"
    single.mkdir()
    save_file({"x": torch.zeros((), dtype=torch.int64)}, single / WEIGHTS, metadata={"format": "pt"})
    assert read_headers(single)["x"][:2] == ((), "I64")


def test_only_the_files_that_are_needed_are_opened(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert set(read_headers(sharded, ["a"])) == {"a", "e"}
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing though the index"):
        read_headers(sharded)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "..", "", "a\\b.safetensors", "sub/x.safetensors", 3, None]
)
def test_index_may_not_point_outside(sharded, name):
    index(sharded, {"a": name})
    with pytest.raises(ValueError, match="not a file of its folder"):
        tensor_files(sharded)


def test_index_with_pickles(sharded):
    index(sharded, {"a": "pytorch_model-00001-of-00002.bin"})
    with pytest.raises(ValueError, match=r"only \.safetensors files are read"):
        tensor_files(sharded)


@pytest.mark.parametrize(
    "text", ["", "no json", "[1]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\udcff"]
)
def test_index_without_a_table(sharded, text):
    (sharded / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=INDEX.replace(".", r"\.")):
        tensor_files(sharded)


def test_index_that_names_a_tensor_twice(sharded):
    (sharded / INDEX).write_text('{"weight_map": {"a": "model.safetensors", "a": "model-2.safetensors"}}')
    with pytest.raises(ValueError, match="names 'a' twice"):
        tensor_files(sharded)


def test_index_and_shards_that_disagree(sharded):
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(sharded, {"a": one, "e": one, "b": two, "c": two})
    with pytest.raises(ValueError, match="lacks tensor 'c'"):
        read_headers(sharded)
    index(sharded, {"a": one, "b": two})
    with pytest.raises(ValueError, match="holds tensor 'e' but the index does not name it"):
        read_headers(sharded)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, sharded / two)
    index(sharded, {"a": one, "e": one, "b": two})
    with pytest.raises(ValueError, match=f"holds tensor 'a' but the index places it in {one}"):
        read_headers(sharded)


def test_folders_without_readable_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        tensor_files(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle.*convert"):
        tensor_files(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / WEIGHTS)  # a pickle under the right name
    with pytest.raises(ValueError, match="is a pickle and not safetensors"):
        tensor_files(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / WEIGHTS, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is a pickle and not safetensors"):
        tensor_files(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match=f"no {INDEX}"):
        tensor_files(tmp_path)


LIES = {
    "length beyond the file": lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "empty file": lambda p: p.write_bytes(b""),
    "no JSON": lambda p: raw(p, b"hello"),
    "a list": lambda p: raw(p, b"[]"),
    "nested without end": lambda p: raw(p, b"[" * 200_000),
    "the same key twice": lambda p: raw(p, b'{"a": 1, "a": 2}'),
    "entry is no table": lambda p: raw(p, {"a": 5}),
    "unknown dtype": lambda p: raw(p, {"a": entry("F31")}, bytes(8)),
    "shape against offsets": lambda p: raw(p, {"a": entry(shape=(3,))}, bytes(8)),
    "a huge shape": lambda p: raw(p, {"a": entry(shape=(10**9, 10**9))}, bytes(8)),
    "a negative shape": lambda p: raw(p, {"a": entry(shape=(-2, -1))}, bytes(8)),
    "a fractional shape": lambda p: raw(p, {"a": entry(shape=(2.0,))}, bytes(8)),
    "data beyond the file": lambda p: raw(p, {"a": entry()}, bytes(4)),
    "more data than described": lambda p: raw(p, {"a": entry()}, bytes(12)),
    "overlapping tensors": lambda p: raw(p, {"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "a hole": lambda p: raw(p, {"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused_at_once(tmp_path, lie):
    LIES[lie](tmp_path / WEIGHTS)
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        read_headers(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 1 and peak < 50e6
    assert "again" in str(error.value) and "\n" not in str(error.value)


def test_truncated_shard(sharded):
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model-00001.* has \d+ bytes but its header describes"):
        read_headers(sharded)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_a_header_length_that_begins_like_a_pickle_or_a_zip(tmp_path, length):
    """The first two bytes of a sound file are the low bytes of its header's length, and may be any."""
    text = json.dumps({"a": entry()}).encode().ljust(length)
    raw(tmp_path / WEIGHTS, text, b"\0" * 8)
    assert (tmp_path / WEIGHTS).read_bytes()[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5", b"PK")
    assert read_headers(tmp_path)["a"].shape == (2,)


def test_reading_in_place_and_through_the_staging_buffer(tmp_path, monkeypatch):
    """The same values whether read in place or converted piece by piece, from whatever place in the file."""
    monkeypatch.setattr(reading, "_STAGING_BYTES", 64)
    tensors = {"a": torch.randn(3, 40), "b": torch.tensor(7), "c": torch.randn(33).bfloat16(), "d": torch.zeros(0)}
    save_file(tensors, tmp_path / WEIGHTS)
    headers = read_headers(tmp_path)
    with reading.ShardReader(tmp_path / WEIGHTS) as file:
        for key, expected in tensors.items():
            for dtype in (expected.dtype, torch.float64):
                target = torch.empty(expected.shape, dtype=dtype)
                file.read(headers[key], target)
                assert torch.equal(target, expected.to(dtype)), (key, dtype)


def test_a_file_that_shrinks_while_it_is_read(sharded):
    info = read_headers(sharded)["b"]
    info.shard.write_bytes(info.shard.read_bytes()[:-3])
    with reading.ShardReader(info.shard) as file, pytest.raises(ValueError, match="ends early"):
        file.read(info, torch.empty(4, dtype=torch.bfloat16))
