"""Whatever `safetensors.safe_open` refuses, the catalogue refuses; what it accepts, the catalogue reads alike.

Mutations of real files against the library itself. The catalogue may be stricter only in the ways named in STRICTER.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from ties_dist.checkpoints.catalogue import open_checkpoint
from ties_dist.dtypes import DTYPE_BITS
from ties_dist.errors import CheckpointError

STRICTER = re.compile(
    r"appears twice in the header|header must start with|expected an object of dtype|unknown dtype \{|"
    r"__metadata__ must map text to text"
)
"""What the library lets through: repeated keys, leading space, unknown fields, fields as a list, enums as objects."""

FEW = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class FolderReader:
    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> Sequence[str]:
        return sorted(path.name for path in self.root.iterdir())

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def read(self, name: str, start: int, stop: int) -> MemorySpan:
        raw = (self.root / name).read_bytes()[start:stop]
        assert len(raw) == stop - start  # the catalogue asks for nothing beyond the file
        return MemorySpan(raw)


class MemorySpan:
    def __init__(self, raw: bytes) -> None:
        self.view = memoryview(raw)

    def release(self) -> None:
        self.view.release()


def agree(folder: Path, raw: bytes) -> bool:
    """Both verdicts on a file; True where both accept, and then agree on every tensor and its bytes."""
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    try:
        with safe_open(path, framework="np") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
    except SafetensorError:
        with pytest.raises(CheckpointError, match=r"checkpoint 'x' .*\n  model\.safetensors: "):
            open_checkpoint(path, name="x", reader=FolderReader)
        return False
    try:
        checkpoint = open_checkpoint(path, name="x", reader=FolderReader)
    except CheckpointError as error:
        assert STRICTER.search(str(error)), error
        return False
    assert set(checkpoint.tensors) == names
    assert checkpoint.metadata == metadata
    for name, stored in deserialize(raw):
        entry = checkpoint.tensors[name]
        assert (entry.dtype, list(entry.shape)) == (stored["dtype"], stored["shape"])
        assert raw[entry.start : entry.stop] == bytes(stored["data"])
    return True


SAMPLES = [
    save({}),
    save({"a": np.zeros(3, np.float32)}),
    save({"a": np.ones((2, 3), np.float16), "b": np.zeros(0, np.float64), "c.d": np.arange(5)}, {"format": "pt"}),
    save({"\U0001f600": np.array(1, np.int8), "b": np.array([True, False]), 'q"\\': np.zeros((1, 0, 2), np.uint16)}),
]

# Values that read differently in Python's json and in Rust's, or that sit at a limit.
ODD = [b"-0", b"-1", b"1.0", b"1e0", b"true", b"null", b"NaN", b"Infinity", b"1e999", b"01", b"18446744073709551616"]
ODD += [b"18446744073709551615", b"4294967296", b'"\\ud800"', b'"\\ud83d\\ude00"', b"[]", b"{}", b'{"F32": null}', b"0"]
ODD += [b"2305843009213693952", b'"F4"', b'"F32"', b'"\x01"', b'"\xff"', b'"\\u0000"', b" ", b"\x00", b"9" * 400]
PIECES = [b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b",", b":", b"[", b"]", b"{", b"}", b'"', b"\\"]


@pytest.mark.parametrize("raw", SAMPLES)
def test_files_of_the_library_are_accepted_by_both(tmp_path: Path, raw: bytes) -> None:
    assert agree(tmp_path, raw)


@pytest.mark.parametrize("dtype", [*DTYPE_BITS, "I4", "U4", "F8_E3M4", "C128", "F128", "f32", ""])
@pytest.mark.parametrize("numel", [0, 1, 4])
def test_every_dtype_has_the_size_the_library_gives_it(tmp_path: Path, dtype: str, numel: int) -> None:
    accepted = []
    for nbytes in sorted({bits * numel // 8 for bits in (1, 4, 6, 8, 16, 32, 64, 128)} | {1}):
        header = json.dumps({"a": {"dtype": dtype, "shape": [numel], "data_offsets": [0, nbytes]}}).encode()
        if agree(tmp_path, len(header).to_bytes(8, "little") + header + bytes(nbytes)):
            accepted.append(nbytes)
    bits = DTYPE_BITS.get(dtype, 1) * numel
    assert accepted == ([bits // 8] if dtype in DTYPE_BITS and bits % 8 == 0 else [])


@FEW
@given(raw=st.sampled_from(SAMPLES), draw=st.data())
def test_a_file_cut_or_continued_anywhere_is_judged_alike(tmp_path: Path, raw: bytes, draw: st.DataObject) -> None:
    cut = raw[: draw.draw(st.integers(0, len(raw)), label="kept")]
    agree(tmp_path, cut + draw.draw(st.binary(max_size=9), label="more"))


@FEW
@given(raw=st.sampled_from(SAMPLES), draw=st.data())
def test_changed_bytes_are_judged_alike(tmp_path: Path, raw: bytes, draw: st.DataObject) -> None:
    changed = bytearray(raw)
    for at in draw.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3), label="at"):
        changed[at] = draw.draw(st.integers(0, 255), label="byte")
    agree(tmp_path, bytes(changed))


@FEW
@given(raw=st.sampled_from(SAMPLES), draw=st.data())
def test_headers_with_text_replaced_are_judged_alike(tmp_path: Path, raw: bytes, draw: st.DataObject) -> None:
    """Pieces of JSON are put in the place of other pieces, the length field kept right so that parsing goes on."""
    length = int.from_bytes(raw[:8], "little")
    tokens = re.findall(rb'"(?:[^"\\]|\\.)*"|[0-9]+|[^\s]|\s+', raw[8 : 8 + length])
    for _ in range(draw.draw(st.integers(1, 2), label="edits")):
        at = draw.draw(st.integers(0, len(tokens) - 1), label="at")
        new = draw.draw(st.sampled_from([*ODD, *PIECES, b""]) | st.sampled_from(tokens), label="new")
        keep = draw.draw(st.booleans(), label="keep what was there")
        tokens[at] = new + tokens[at] if keep else new
    header = b"".join(tokens)
    agree(tmp_path, len(header).to_bytes(8, "little") + header + raw[8 + length :])


NUMBERS = st.integers(0, 24) | st.sampled_from([2**16, 2**32, 2**61, 2**63, 2**64 - 1, 2**64])
DECLARED = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F31"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | st.lists(NUMBERS, max_size=3),
    }
)


@FEW
@given(header=st.dictionaries(st.sampled_from("abcd"), DECLARED), nbytes=st.integers(0, 48))
def test_declared_shapes_and_offsets_are_judged_alike(tmp_path: Path, header: dict[str, object], nbytes: int) -> None:
    raw = json.dumps(header).encode()
    agree(tmp_path, len(raw).to_bytes(8, "little") + raw + bytes(nbytes))


@FEW
@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=5), draw=st.data())
def test_tensors_in_any_order_and_one_shifted_are_judged_alike(
    tmp_path: Path, sizes: list[int], draw: st.DataObject
) -> None:
    """Contiguous tensors, empty ones among them, listed in any order; then one offset is moved, or none."""
    spans, at = [], 0
    for size in sizes:
        spans.append([at, at + size])
        at += size
    moved = draw.draw(st.integers(0, len(spans) - 1), label="moved")
    by = draw.draw(st.integers(-2, 2), label="by")
    spans[moved] = [max(0, spans[moved][0] + by), max(0, spans[moved][1] + by)]
    named = [(f"t{i}", {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]}) for i, (a, b) in enumerate(spans)]
    listed = draw.draw(st.permutations(named), label="listed")
    raw = json.dumps(dict(listed)).encode()
    accepted = agree(tmp_path, len(raw).to_bytes(8, "little") + raw + bytes(range(at)))
    if by == 0:
        assert accepted


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{},"__metadata__":{}}',
        b'{"__m\\u0065tadata__":{"a":"b"}}',
        b'{"__metadata__":null}',
        b'{"a":["F32",[1],[0,4]]}',
        b'{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1e999}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + b"[" * 900 + b"]" * 900 + b"}}",
        b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"null",
        b"[]",
        b"\xef\xbb\xbf{}",
        b"\n{}",
    ],
)
@pytest.mark.parametrize("body", [b"", bytes(4)])
def test_known_traps_are_judged_alike(tmp_path: Path, header: bytes, body: bytes) -> None:
    agree(tmp_path, len(header).to_bytes(8, "little") + header + body)
