"""Where media come from: a path, `file://`, `data:` URI, http(s) address or bytes becomes a local file or bytes."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any, Union

from omni.processing.media_budget import as_number

MAX_DOWNLOAD_BYTES = 512 * 1024 * 1024
MAX_DOWNLOAD_S = 60.0
CONNECT_TIMEOUT_S = 10.0
_BLOCK_BYTES = 1 << 20

Source = Union[Path, bytes]


def is_source(value: Any) -> bool:
    """Whether `value` names or holds an encoded file (and is not an array or a picture)."""
    return isinstance(value, (str, Path, bytes, bytearray, memoryview)) or hasattr(value, "read")


def describe(value: Any) -> str:
    """How an error message names a medium."""
    if isinstance(value, (str, Path)):
        text = str(value)
        return text if len(text) <= 200 else text[:80] + "…"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    return f"<{type(value).__name__}>"


def open_source(value: Any, kind: str) -> Source:
    """The file's path or its bytes. `kind` ("audio", "image", "video") names the medium in errors.

    Raises FileNotFoundError for a missing file, OSError for a failed download, ValueError for empty or malformed data.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
    elif isinstance(value, (str, Path)):
        located = _locate(value, kind)
        if isinstance(located, Path):
            return located
        data = located
    else:
        data = value.read()
        if not isinstance(data, bytes):
            raise TypeError(
                f"an {kind} file object must be opened in binary mode, its read() gave {type(data).__name__}"
            )
    if not data:
        raise ValueError(f"{kind} {describe(value)} is empty; give a file with content")
    return data


def as_file(source: Source) -> Any:
    """What Pillow and soundfile open: the path as a string, or a new file object over the bytes."""
    return str(source.absolute()) if isinstance(source, Path) else io.BytesIO(source)


def unpack(value: Any, kind: str) -> Any:
    """The bytes or the path of a dict {"bytes", "path"}, which `datasets` hands out; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    wrong = [key for key in value if key not in ("bytes", "path")]
    if wrong:
        raise ValueError(f"{kind}: a dict must have the keys 'bytes' and 'path', got {wrong[0]!r}")
    found = value.get("path") if value.get("bytes") is None else value["bytes"]
    if found is None:
        raise ValueError(f"{kind}: a dict must have 'bytes' or 'path', both are missing")
    return found


def first_bytes(source: Source, count: int) -> bytes:
    """How a file begins."""
    if isinstance(source, bytes):
        return source[:count]
    with source.open("rb") as file:
        return file.read(count)


def read_part(start: Any, end: Any, kind: str) -> tuple[float, float]:
    """The bounds of a part in seconds; without an end it is infinity. `kind` begins the options' names in errors."""
    bounds = []
    for name, moment in ((f"{kind}_start", start), (f"{kind}_end", math.inf if end is None else end)):
        if isinstance(moment, bool) or not isinstance(moment, Real):
            raise TypeError(f"{name} must be a number of seconds, got {moment!r}")
        bounds.append(as_number(moment))
    first, last = bounds
    if not 0 <= first < last:  # also where one is NaN
        raise ValueError(f"a part of {kind} must have 0 <= {kind}_start < {kind}_end, got {start!r:.50}..{end!r:.50}")
    return first, last


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Too little memory is an OSError that names the medium."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise OSError(f"{what} needs more memory than is free; make it smaller, or give a part of it") from error


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """What another library's decoder raises becomes a ValueError that names the medium, or an OSError for memory."""
    try:
        with enough_memory(name):
            yield
    except (ValueError, TypeError, OSError):
        raise
    except Exception as error:  # torchcodec raises RuntimeError, IndexError and others
        raise ValueError(f"{name} cannot be decoded ({str(error)[:300] or type(error).__name__})") from error


def from_decoder(value: Any) -> Any:
    """What a torchcodec AudioDecoder decodes, as an (array, rate) pair; anything else as it is."""
    if not hasattr(value, "get_all_samples"):
        return value
    with decoding(f"audio {describe(value)}"):
        samples = value.get_all_samples()
        return samples.data.mean(dim=0), int(samples.sample_rate)


def decode_base64(text: str | bytes, kind: str) -> bytes:
    """Bytes of base64 text, line breaks allowed."""
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"the base64 data of the {kind} must be a string, got {type(text).__name__}")
    try:
        letters = text if isinstance(text, str) else text.decode("ascii")
        return base64.b64decode("".join(letters.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the base64 data of the {kind} is malformed: {error}") from error


def _locate(value: str | Path, kind: str) -> Source:
    text = str(value)
    scheme = text.split(":", 1)[0].lower() if ":" in text[:8] else ""
    if scheme == "data":
        return _read_data_uri(text, kind)
    if scheme in ("http", "https"):
        return _download(text, kind)
    if scheme == "file":
        path = text[len("file:") :]  # "#" and "?" are letters of a file's name
        host, slash, rest = path[2:].partition("/") if path.startswith("//") else ("", "", path)
        if host not in ("", "localhost"):
            raise ValueError(f"{kind} {describe(text)}: a file:// address must name a file on this machine")
        text = urllib.request.url2pathname(slash + rest)
    return _check_path(text, kind)


def _check_path(text: str, kind: str) -> Path:
    try:
        path = Path(text).expanduser()
        exists, is_file = path.exists(), path.is_file()
        size = path.stat().st_size if is_file else 0
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a null byte, or of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise FileNotFoundError(f"{kind} file {describe(text)!r} cannot be looked up: {reason}") from error
    if not exists:
        raise FileNotFoundError(f"{kind} file {describe(text)!r} does not exist; check the path")
    if not is_file:
        raise ValueError(f"{kind} {describe(text)!r} is not a file")
    if size == 0:
        raise ValueError(f"{kind} file {describe(text)!r} is empty (0 bytes)")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{kind} file {describe(text)!r} may not be read by this user; change its permissions")
    return path


def _read_data_uri(text: str, kind: str) -> bytes:
    header, comma, body = text.partition(",")
    if not comma:
        raise ValueError(f"{kind}: a data: URI needs a comma before its data, got {describe(text)!r}")
    if header.replace(" ", "").lower().endswith(";base64"):
        return decode_base64(urllib.parse.unquote(body), kind)
    return urllib.parse.unquote_to_bytes(body)


class _TooLargeError(ValueError):
    """A download exceeds `MAX_DOWNLOAD_BYTES`; told apart from what the web client raises."""


def _download(address: str, kind: str) -> bytes:
    """Fetch over http(s) within the limits on time and size.

    A thread does the work. When the time is over its connections are cut, so that it ends wherever it is: a server that
    sends its headers drop by drop cannot be interrupted otherwise.
    """
    outcome: list[bytes | Exception] = []
    lines = _Lines()

    def work() -> None:
        try:
            outcome.append(_fetch(address, lines))
        except Exception as error:  # handed to the caller below
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True, name="omni download")
    thread.start()
    thread.join(MAX_DOWNLOAD_S)
    done = list(outcome)
    lines.cut()
    result = done[0] if done else TimeoutError(f"it took more than {MAX_DOWNLOAD_S:g} s")
    if isinstance(result, bytes):
        return result
    if isinstance(result, urllib.error.HTTPError):
        reason = f"HTTP {result.code} {result.reason}"
        result.close()
    else:  # URLError, time-outs, broken connections, http.client's own errors
        reason = str(getattr(result, "reason", None) or result or type(result).__name__)
    known = ValueError if isinstance(result, _TooLargeError) else OSError
    raise known(f"{kind} {describe(address)!r} cannot be fetched: {' '.join(reason.split())}") from result


class _Lines:
    """The connections of one download, which another thread can cut."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.over = False

    def cut(self) -> None:
        self.over = True
        for line in self.sockets:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def watched(self, kind: type[http.client.HTTPConnection]) -> Any:
        """Makes connections of a kind, whose sockets are known here."""

        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            made = kind(host, **options)
            connect = made.connect

            def watch() -> None:
                connect()
                self.sockets.append(made.sock)
                if self.over:
                    self.cut()

            made.connect = watch  # type: ignore[method-assign]
            return made

        return connection


class _Web(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens http and https addresses over watched connections."""

    def __init__(self, lines: _Lines) -> None:
        super().__init__()
        self.lines = lines

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self.lines.watched(http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self.lines.watched(http.client.HTTPSConnection), req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.URLError(f"it redirects to {describe(newurl)!r}, which is no http(s) address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(address: str, lines: _Lines) -> bytes:
    """The body behind an address. Spaces and letters beyond ASCII in it are quoted, as browsers do."""
    started = time.monotonic()
    quoted = urllib.parse.quote(address, safe="!#$%&'()*+,/:;=?@[]~")
    request = urllib.request.Request(quoted, headers={"User-Agent": "omni"})
    blocks: list[bytes] = []
    size = 0
    opener = urllib.request.build_opener(_Web(lines), _Redirects)
    with opener.open(request, timeout=CONNECT_TIMEOUT_S) as reply:
        length = reply.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else None
        _check_download(expected or 0)
        while block := reply.read1(_BLOCK_BYTES):
            blocks.append(block)
            size += len(block)
            _check_download(size)
            if time.monotonic() - started > MAX_DOWNLOAD_S:
                raise TimeoutError(f"it took more than {MAX_DOWNLOAD_S:g} s")
    if expected is not None and size < expected:
        raise OSError(f"the connection closed after {size} of {expected} bytes")
    return b"".join(blocks)


def _check_download(size: int) -> None:
    if size > MAX_DOWNLOAD_BYTES:
        raise _TooLargeError(f"it is larger than {MAX_DOWNLOAD_BYTES >> 20} MB; download it and give the file")
