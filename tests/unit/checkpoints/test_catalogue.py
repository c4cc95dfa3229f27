"""The catalogue: which files are a checkpoint, what their headers say, and every way in which they can be wrong.

Files are written byte by byte here, so that nothing but the format text decides what a valid one is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

from ties_dist.checkpoints.catalogue import MAX_HEADER_BYTES, Checkpoint, open_checkpoint
from ties_dist.checkpoints.header import TensorEntry
from ties_dist.errors import CheckpointError
from ties_dist.recipe.references import Location, locate


class MemorySpan:
    def __init__(self, raw: bytes) -> None:
        self.view = memoryview(raw)

    def release(self) -> None:
        self.view.release()


class FolderReader:
    """The smallest Reader; `requested` counts the bytes asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requested = 0

    def names(self) -> Sequence[str]:
        return sorted(path.name for path in self.root.iterdir() if path.is_file())

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def read(self, name: str, start: int, stop: int) -> MemorySpan:
        self.requested += stop - start
        with (self.root / name).open("rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
        if len(raw) < stop - start:
            raise CheckpointError(f"{name} ends before byte {stop}")
        return MemorySpan(raw)


def safetensors(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from a header (an object, or its raw JSON) and the bytes behind it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


def tensor(dtype: str = "F32", shape: Sequence[int] = (1,), offsets: Sequence[int] = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def floats(*names: str, numel: int = 1) -> bytes:
    """A file of float32 vectors of zeros."""
    header = {name: tensor(shape=[numel], offsets=[4 * numel * i, 4 * numel * (i + 1)]) for i, name in enumerate(names)}
    return safetensors(header, bytes(4 * numel * len(names)))


def folder(root: Path, files: Mapping[str, bytes | object]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return root


def catalogue(path: Path, name: str = "math") -> Checkpoint:
    return open_checkpoint(path, name=name, reader=FolderReader)


def index(weight_map: object, **metadata: object) -> dict[str, object]:
    return {"metadata": metadata, "weight_map": weight_map}


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


# -- what a checkpoint is ---------------------------------------------------------------------------------------------


def test_a_single_file_in_a_directory_is_read(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": tensor("BF16", [2, 3], [4, 16]),
        "a": tensor("F32", [], [0, 4]),
        "c": tensor("I64", [0, 7], [16, 16]),
    }
    raw = json.dumps(header).encode() + b"   "
    body = bytes(range(16))
    checkpoint = catalogue(folder(tmp_path, {"model.safetensors": safetensors(raw, body), "config.json": {"x": 1}}))
    start = 8 + len(raw)
    file = "model.safetensors"
    assert checkpoint.tensors == {
        "a": TensorEntry(name="a", dtype="F32", shape=(), file=file, start=start, stop=start + 4),
        "b": TensorEntry(name="b", dtype="BF16", shape=(2, 3), file=file, start=start + 4, stop=start + 16),
        "c": TensorEntry(name="c", dtype="I64", shape=(0, 7), file=file, start=start + 16, stop=start + 16),
    }
    assert [(entry.numel, entry.nbytes) for entry in checkpoint.tensors.values()] == [(1, 4), (6, 12), (0, 0)]
    assert checkpoint.shards == (file,)
    assert (checkpoint.files[file].size, checkpoint.files[file].data_start) == (start + 16, start)
    assert checkpoint.files[file].header_digest == xxh3_128_hexdigest(raw)
    assert checkpoint.files[file].identity == f"{xxh3_128_hexdigest(raw)}-{start + 16}"
    assert (checkpoint.name, checkpoint.config, checkpoint.metadata) == ("math", {"x": 1}, {"format": "pt"})
    assert (checkpoint.index_file, checkpoint.index_metadata, checkpoint.notes) == (None, {}, ())
    assert checkpoint.nbytes == 16


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    files = {TWO: floats("b", "c"), ONE: floats("a"), INDEX: index({"a": ONE, "b": TWO, "c": TWO}, total_size=12)}
    checkpoint = catalogue(folder(tmp_path, files))
    assert checkpoint.shards == (ONE, TWO)
    assert {name: entry.file for name, entry in checkpoint.tensors.items()} == {"a": ONE, "b": TWO, "c": TWO}
    assert (checkpoint.index_file, checkpoint.index_metadata) == (INDEX, {"total_size": 12})
    assert checkpoint.notes == ()


def test_only_headers_are_read(tmp_path: Path) -> None:
    raw = floats("a", numel=100_000)
    checkpoint = catalogue(folder(tmp_path, {"model.safetensors": raw}))
    assert isinstance(checkpoint.opened.readers[0], FolderReader)
    assert checkpoint.opened.readers[0].requested == len(raw) - 400_000


def test_a_file_given_directly_is_the_whole_checkpoint(tmp_path: Path) -> None:
    folder(tmp_path, {"a.safetensors": floats("a"), "b.safetensors": b"broken", "config.json": b"broken"})
    checkpoint = catalogue(tmp_path / "a.safetensors")
    assert checkpoint.shards == ("a.safetensors",)
    assert checkpoint.config is None


def test_a_shard_given_directly_is_taken_at_its_word(tmp_path: Path) -> None:
    folder(tmp_path, {ONE: floats("a")})
    assert set(catalogue(tmp_path / ONE).tensors) == {"a"}


def test_any_single_safetensors_file_will_do(tmp_path: Path) -> None:
    checkpoint = catalogue(folder(tmp_path, {"weights.safetensors": floats("a"), "pytorch_model.bin": b"old"}))
    assert checkpoint.shards == ("weights.safetensors",)


def test_the_index_wins_over_stray_files_and_says_so(tmp_path: Path) -> None:
    files = {ONE: floats("a"), "consolidated.safetensors": b"stray", "old.safetensors": b"", INDEX: index({"a": ONE})}
    checkpoint = catalogue(folder(tmp_path, files))
    assert checkpoint.shards == (ONE,)
    assert checkpoint.notes == (
        "'math': files that are not part of the model are left aside: consolidated.safetensors, old.safetensors",
    )


def test_model_safetensors_wins_even_over_an_index_beside_it(tmp_path: Path) -> None:
    """As transformers loads (tests/conformance/test_transformers.py): either may be the stale one."""
    files = {"model.safetensors": floats("a"), ONE: floats("b"), INDEX: index({"b": ONE})}
    checkpoint = catalogue(folder(tmp_path, files))
    assert (checkpoint.shards, checkpoint.index_file, set(checkpoint.tensors)) == (("model.safetensors",), None, {"a"})
    assert checkpoint.notes == (
        f"'math': model.safetensors is read, as transformers does, and not what {INDEX} names",
        f"'math': files that are not part of the model are left aside: {ONE}",
    )


def test_model_safetensors_wins_over_its_neighbours_and_says_so(tmp_path: Path) -> None:
    checkpoint = catalogue(folder(tmp_path, {"model.safetensors": floats("a"), "model.fp16.safetensors": floats("a")}))
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.notes[0].endswith("left aside: model.fp16.safetensors")


def test_another_index_is_used_where_it_is_the_only_one(tmp_path: Path) -> None:
    files = {"x.safetensors": floats("a"), "diffusion.safetensors.index.json": index({"a": "x.safetensors"})}
    assert catalogue(folder(tmp_path, files)).index_file == "diffusion.safetensors.index.json"


def test_the_usual_index_wins_over_a_variants_index(tmp_path: Path) -> None:
    files = {ONE: floats("a"), INDEX: index({"a": ONE}), "model.fp16.safetensors.index.json": b"broken"}
    assert catalogue(folder(tmp_path, files)).index_file == INDEX


@pytest.mark.parametrize("raw", [safetensors({}), safetensors(b'{"__metadata__": null}'), safetensors(b"{ \t\r\n }  ")])
def test_a_checkpoint_without_tensors_is_valid(tmp_path: Path, raw: bytes) -> None:
    checkpoint = catalogue(folder(tmp_path, {"model.safetensors": raw}))
    assert (checkpoint.tensors, checkpoint.nbytes) == ({}, 0)


def test_a_header_may_list_tensors_in_any_order_with_empty_ones_between(tmp_path: Path) -> None:
    header = {"c": tensor(offsets=(4, 8)), "b": tensor(shape=[0], offsets=(4, 4)), "a": tensor()}
    checkpoint = catalogue(folder(tmp_path, {"model.safetensors": safetensors(header, bytes(8))}))
    assert list(checkpoint.tensors) == ["a", "b", "c"]


def test_a_zero_extent_before_a_huge_one_is_empty(tmp_path: Path) -> None:
    raw = safetensors({"a": tensor(shape=[0, 2**64 - 1, 2**64 - 1], offsets=[0, 0])})
    assert catalogue(folder(tmp_path, {"model.safetensors": raw})).tensors["a"].numel == 0


def test_a_wrong_total_size_is_only_said(tmp_path: Path) -> None:
    checkpoint = catalogue(folder(tmp_path, {ONE: floats("a"), INDEX: index({"a": ONE}, total_size=5)}))
    assert checkpoint.notes == (f"'math': {INDEX} says total_size 5, the shards hold 4",)


def test_an_index_needs_no_metadata(tmp_path: Path) -> None:
    assert catalogue(folder(tmp_path, {ONE: floats("a"), INDEX: {"weight_map": {"a": ONE}}})).index_metadata == {}


def test_the_first_shards_metadata_wins(tmp_path: Path) -> None:
    one = safetensors({"__metadata__": {"format": "pt"}, "a": tensor()}, bytes(4))
    two = safetensors({"__metadata__": {"format": "np", "more": "x"}, "b": tensor()}, bytes(4))
    checkpoint = catalogue(folder(tmp_path, {ONE: one, TWO: two, INDEX: index({"a": ONE, "b": TWO})}))
    assert checkpoint.metadata == {"format": "pt", "more": "x"}


def test_infinity_in_a_config_is_accepted(tmp_path: Path) -> None:
    files = {"model.safetensors": floats("a"), "config.json": b'{"time_step_limit": [0.0, Infinity]}'}
    assert catalogue(folder(tmp_path, files)).config == {"time_step_limit": [0.0, float("inf")]}


def test_odd_names_are_kept_as_they_are(tmp_path: Path) -> None:
    names = ["", "a b", "\U0001f600", "x\ny", "weight\\1"]
    assert list(catalogue(folder(tmp_path, {"model.safetensors": floats(*names)})).tensors) == names


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        (["model.embed", "lm_head"], "model.embed", "model.embed"),
        (["model.embed", "lm_head"], "embed", "model.embed"),  # the body's own name, of a model with a head
        (["embed"], "model.embed", "embed"),
        (["encoder.embed", "decoder.embed"], "embed", None),  # which of them is not known
        (["encoder.embed", "embed"], "embed", "embed"),
        (["", "x"], "embed", None),
        (["a.b.c"], "c", None),
    ],
)
def test_a_parameter_is_found_with_and_without_the_word_of_its_head(
    stored: list[str], asked: str, found: str | None, tmp_path: Path
) -> None:
    assert catalogue(folder(tmp_path, {"model.safetensors": floats(*stored)})).find(asked) == found


def test_files_that_differ_in_values_only_have_one_identity(tmp_path: Path) -> None:
    raw = floats("a")
    folder(tmp_path, {"a.safetensors": raw, "b.safetensors": raw[:-1] + b"\x01", "c.safetensors": floats("b")})
    one, two, other = (catalogue(tmp_path / f"{n}.safetensors").files[f"{n}.safetensors"].identity for n in "abc")
    assert one == two != other


# -- what is no checkpoint --------------------------------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint 'math': .*nowhere is neither a directory nor a file"):
        catalogue(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no \.safetensors file among 0 files"),
        ({"config.json": {}, "notes.txt": b""}, r"no \.safetensors file among 2 files"),
        (
            {"a.safetensors": b"", "b.safetensors": b""},
            r"2 \.safetensors files \(a\.safetensors, b\.safetensors\) and no",
        ),
        ({ONE: b"", TWO: b""}, r"2 \.safetensors files .* and no safetensors\.index\.json: which of them"),
        ({"pytorch_model.bin": b""}, r"pytorch_model\.bin: only safetensors are read; convert it first"),
        ({"model.gguf": b"", "x.pt": b""}, r"model\.gguf: holds rounded weights for llama\.cpp"),
        ({"a.safetensors.index.json": {}, "b.safetensors.index.json": {}}, r"2 indexes \(a\.safet.*\): keep the one"),
    ],
)
def test_a_directory_that_is_no_checkpoint_says_why(tmp_path: Path, files: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        catalogue(folder(tmp_path, files))


def test_a_folder_of_checkpoints_names_them_and_each_can_be_named(tmp_path: Path) -> None:
    below = [folder(tmp_path / "run" / name, {"model.safetensors": floats("a")}) for name in ("step-2", "step-10")]
    (tmp_path / "run" / "logs").mkdir()
    with pytest.raises(CheckpointError, match=r"models are below it \(step-10, step-2\).* the one .*: 'run/step-10'\."):
        catalogue(tmp_path / "run")
    assert all(catalogue(path).tensors for path in below)


def test_a_pipeline_names_its_parts(tmp_path: Path) -> None:
    folder(tmp_path / "sd" / "unet", {"diffusion_pytorch_model.safetensors": floats("a")})
    folder(tmp_path / "sd", {"model_index.json": {"_class_name": "Any"}})
    with pytest.raises(CheckpointError, match=r"a pipeline of diffusers: models are its parts \(unet\).*: 'sd/unet'"):
        catalogue(tmp_path / "sd")
    assert catalogue(tmp_path / "sd" / "unet").tensors


@pytest.mark.parametrize("index", [True, False])
def test_links_to_nothing_are_named_and_what_they_lack_can_be_copied_there(tmp_path: Path, index: bool) -> None:
    there = folder(tmp_path / "there", {"x": floats("a")}) / "x"
    here = folder(tmp_path / "here", {INDEX: {"weight_map": {"a": ONE}}} if index else {})
    (here / ONE).symlink_to("../lost")
    with pytest.raises(CheckpointError, match=rf"{ONE}: is a link to what is not there \(\.\./lost\)\. Copy the files"):
        catalogue(here)
    (here / ONE).unlink()
    shutil.copy(there, here / (ONE if index else "model.safetensors"))
    assert set(catalogue(here).tensors) == {"a"}


def test_a_lost_blob_of_the_hubs_cache_is_fetched_by_the_hubs_name(tmp_path: Path) -> None:
    snapshot = folder(tmp_path / "hub/models--some-org--a.model/snapshots/0123ab", {"config.json": {}})
    (snapshot / "model.safetensors").symlink_to("../../blobs/ff")
    with pytest.raises(CheckpointError, match=r"Write 'some-org/a\.model@0123ab' in the recipe instead") as caught:
        catalogue(snapshot)
    asked = re.search(r"Write '(\S+)' in", str(caught.value))
    assert asked is not None
    found = locate(asked[1], [tmp_path])
    assert isinstance(found, Location) and found.identity == ("some-org/a.model", "0123ab")


@pytest.mark.slow
def test_a_pickle_is_converted_as_the_advice_says(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"`AutoModelForCausalLM\.from_pretrained\(.*`save_pretrained` into a new"
    ):
        catalogue(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    assert catalogue(tmp_path / "new").tensors["transformer.wte.weight"].shape == (20, 8)


def test_a_lone_shard_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is shard 1 of 2; the others and the index are missing"):
        catalogue(folder(tmp_path, {ONE: floats("a")}))


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.bin", r"model\.bin: only safetensors are read; convert"), (INDEX, "is an index; name the directory")],
)
def test_a_file_that_is_not_safetensors_is_refused_by_its_name(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        catalogue(folder(tmp_path, {name: floats("a")}) / name)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"a": 1,}', b"\xef\xbb\xbf{}", b"[" * 100_000])
def test_a_config_that_is_not_json_is_an_error(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        catalogue(folder(tmp_path, {"model.safetensors": floats("a"), "config.json": raw}))


def test_a_config_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: must be a JSON object, found \[1, 2\]"):
        catalogue(folder(tmp_path, {"model.safetensors": floats("a"), "config.json": [1, 2]}))


# -- headers ----------------------------------------------------------------------------------------------------------


def info(fields: str) -> bytes:
    return b'{"a": {%s}}' % fields.encode()


BAD_HEADERS = {
    "empty file": (b"", r"0 bytes, too short for the 8-byte length"),
    "seven bytes": (b"\x00" * 7, r"7 bytes, too short"),
    "no header": (safetensors(b""), r"header must start with '\{', found b''"),
    "length beyond the file": (safetensors({}, length=3), r"truncated: header ends at byte 11, the file at 10"),
    "huge length": (
        safetensors({}, length=2**64 - 1),
        r"header of 18,446,744,073,709,551,615 bytes, at most 100,000,000",
    ),
    "above the limit": (safetensors({}, length=MAX_HEADER_BYTES + 1), r"header of 100,000,001 bytes, at most"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", r"is a git-lfs pointer"),
    "invalid UTF-8": (safetensors(b'{"\xff": 1}'), r"header is not valid JSON: 'utf-8' codec"),
    "invalid JSON": (safetensors(b'{"a": }'), r"header is not valid JSON: Expecting value"),
    "NUL padding": (safetensors(b"{}\x00"), r"header is not valid JSON: Extra data"),
    "leading space": (safetensors(b" {}"), r"header must start with '\{', found b' '"),
    "byte order mark": (safetensors(b"\xef\xbb\xbf{}"), r"header must start with"),
    "a list": (safetensors(b"[]"), r"header must start with"),
    "lone surrogate": (safetensors(b'{"__metadata__": {"a": "\\ud800"}}'), r"header is not valid JSON: .*surrogates"),
    "deep nesting": (safetensors(b'{"a": ' + b"[" * 100_000), r"header is not valid JSON"),
    "NaN": (safetensors(b'{"a": NaN}'), r"NaN is not JSON"),
    "endless integer": (safetensors(b'{"a": %s}' % (b"1" * 5000)), r"header is not valid JSON"),
    "duplicate tensor": (safetensors(b'{"a": {}, "a": {}}'), r"key a appears twice in the header"),
    "duplicate field": (safetensors(info('"dtype": "F32", "dtype": "F32"')), r"key dtype appears twice in the header"),
    "duplicate metadata": (
        safetensors(b'{"__metadata__": {"k": "1", "k": "2"}}'),
        r"key k appears twice in the header",
    ),
    "metadata of numbers": (safetensors({"__metadata__": {"k": 1}}), r"__metadata__ must map text to text"),
    "metadata text": (safetensors({"__metadata__": "k"}), r"__metadata__ must map text to text"),
    "null tensor": (safetensors({"a": None}), r"a: expected an object of dtype, shape and data_offsets, found null"),
    "missing field": (safetensors({"a": {"dtype": "F32", "shape": []}}), r"a: expected an object of dtype, shape and"),
    "unknown field": (safetensors({"a": {**tensor(), "scale": 1}}, bytes(4)), r"a: expected an object of dtype, shape"),
    "unknown dtype": (safetensors({"a": tensor("F31")}, bytes(4)), r"a: unknown dtype 'F31'"),
    "lower-case dtype": (safetensors({"a": tensor("f32")}, bytes(4)), r"a: unknown dtype 'f32'"),
    "dtype of no text": (
        safetensors(info('"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]')),
        r"unknown dtype \[",
    ),
    "negative extent": (
        safetensors({"a": tensor(shape=[-1])}, bytes(4)),
        r"a: shape must be a list of integers .*\[-1",
    ),
    "negative zero": (
        safetensors(info('"dtype": "F32", "shape": [1], "data_offsets": [-0, 4]'), bytes(4)),
        r"a: data_off",
    ),
    "float extent": (
        safetensors(info('"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]'), bytes(4)),
        r"a: shape",
    ),
    "boolean extent": (
        safetensors(info('"dtype": "F32", "shape": [true], "data_offsets": [0, 4]'), bytes(4)),
        r"a: shape",
    ),
    "extent of 2^64": (safetensors({"a": tensor(shape=[0, 2**64], offsets=[0, 0])}), r"a: shape must be .* to 2\^64-1"),
    "shape of no list": (
        safetensors(info('"dtype": "F32", "shape": 1, "data_offsets": [0, 4]')),
        r"a: shape .* found 1",
    ),
    "three offsets": (
        safetensors({"a": tensor(offsets=[0, 4, 8])}, bytes(4)),
        r"a: data_offsets must be \[start, stop\]",
    ),
    "backwards": (safetensors({"a": tensor(offsets=[4, 0])}, bytes(4)), r"a: data_offsets must be .* found \[4, 0\]"),
    "wrong size": (
        safetensors({"a": tensor(offsets=[0, 8])}, bytes(8)),
        r"a: shape \[1\] of F32 needs 4 bytes, .*span 8",
    ),
    "half a byte": (safetensors({"a": tensor("F4", [3], [0, 1])}, bytes(1)), r"of F4 needs 12 bits"),
    "overflow": (safetensors({"a": tensor(shape=[2**32, 2**32, 0], offsets=[0, 0])}), r"of F32 overflows 64 bits"),
    "overflow in bits": (safetensors({"a": tensor("F64", [2**59], [0, 2**62])}), r"of F64 overflows 64 bits"),
    "gap at the start": (
        safetensors({"a": tensor(offsets=[4, 8])}, bytes(8)),
        r"a: leaves a gap .* byte 4, expected 0",
    ),
    "gap": (
        safetensors({"a": tensor(), "b": tensor(offsets=[5, 9])}, bytes(9)),
        r"b: leaves a gap .* byte 5, expected 4",
    ),
    "overlap": (
        safetensors({"a": tensor(), "b": tensor(offsets=[3, 7])}, bytes(7)),
        r"b: overlaps .* byte 3, expected 4",
    ),
    "the same bytes": (safetensors({"a": tensor(), "b": tensor()}, bytes(4)), r"b: overlaps the tensor before"),
    "truncated": (safetensors({"a": tensor()}, bytes(3)), r"truncated: the tensors end at byte 73, the file at 72"),
    "trailing byte": (
        safetensors({"a": tensor()}, bytes(5)),
        r"trailing bytes: the tensors end at byte 73, the file at 74",
    ),
    "trailing bytes, no tensor": (
        safetensors({}, b"xyz"),
        r"trailing bytes: the tensors end at byte 10, the file at 13",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_malformed_header_is_refused_naming_checkpoint_file_and_fault(tmp_path: Path, case: str) -> None:
    raw, message = BAD_HEADERS[case]
    with pytest.raises(
        CheckpointError, match=r"checkpoint 'math' \(.*\) has .*problem.*:\n  model\.safetensors: "
    ) as error:
        catalogue(folder(tmp_path, {"model.safetensors": raw}))
    assert re.search(rf"\n  model\.safetensors: .*{message}", str(error.value)), error.value


def test_a_header_above_the_limit_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, MAX_HEADER_BYTES + 9)  # sparse: costs no disk
    reader = FolderReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"header of 100,000,001 bytes"):
        open_checkpoint(tmp_path, name="math", reader=lambda _: reader)
    assert reader.requested == 8


def test_all_problems_of_a_checkpoint_are_in_one_error(tmp_path: Path) -> None:
    files = {
        ONE: safetensors({"a": tensor("F31"), "b": tensor(offsets=[0, 5])}, bytes(4)),
        TWO: floats("c")[:-1],
        INDEX: index({"a": ONE, "b": ONE, "c": TWO, "d": "model-00003-of-00003.safetensors"}),
        "config.json": b"{",
    }
    with pytest.raises(CheckpointError, match=r"has 5 problems:") as error:
        catalogue(folder(tmp_path, files))
    for part in (
        "config.json: not",
        f"{ONE}: a: unknown",
        f"{ONE}: b: shape",
        f"{TWO}: truncated",
        "model-00003-of-00003.safetensors: is named in the index but missing",
    ):
        assert f"\n  {part}" in str(error.value)


def test_a_file_that_shrinks_while_it_is_read_is_a_problem_of_the_checkpoint(tmp_path: Path) -> None:
    class Shrinking(FolderReader):
        def size(self, name: str) -> int:
            return super().size(name) + 1000

    folder(tmp_path, {"model.safetensors": safetensors({}, length=500)})
    with pytest.raises(
        CheckpointError, match=r"\n  model\.safetensors: cannot be read: model\.safetensors ends before"
    ):
        open_checkpoint(tmp_path, name="math", reader=Shrinking)


def test_a_name_that_could_disturb_a_terminal_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(r"'\x1b[2J': unknown dtype")):
        catalogue(folder(tmp_path, {"model.safetensors": safetensors({"\x1b[2J": tensor("F31")})}))


# -- indexes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "..\\x.safetensors",
        "sub/x.safetensors",
        "./x.safetensors",
        "C:x.safetensors",
        "\\\\host\\x.safetensors",
        "x\x00.safetensors",
        "x.bin",
        "..",
        ".",
        "",
    ],
)
def test_an_index_entry_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    folder(tmp_path, {"x.safetensors": floats("a")})
    folder(inside, {ONE: floats("b"), INDEX: index({"a": name, "b": ONE})})
    with pytest.raises(
        CheckpointError, match=re.escape(f"{INDEX}: {name!r} is not the plain name of a .safetensors file")
    ):
        catalogue(inside)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", r"not valid JSON"),
        (b"[]", r"must be a JSON object, found \[\]"),
        (b"{}", r"'weight_map' must map tensor names to files, found null"),
        (b'{"weight_map": []}', r"'weight_map' must map tensor names to files, found \[\]"),
        (b'{"weight_map": {}}', r"'weight_map' must map tensor names to files, found \{\}"),
        (b'{"weight_map": {"a": 1}}', r"a must name a file, found 1"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', r"key a appears twice"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json: {message}"):
        catalogue(folder(tmp_path, {INDEX: raw, ONE: floats("a")}))


def test_a_missing_shard_is_named_once_and_its_tensors_are_not_listed(tmp_path: Path) -> None:
    weight_map = {"a": ONE, **{f"b{i}": TWO for i in range(50)}}
    with pytest.raises(CheckpointError, match=rf"has a problem:\n  {TWO}: is named in the index but missing\.$"):
        catalogue(folder(tmp_path, {ONE: floats("a"), INDEX: index(weight_map)}))


def test_a_tensor_that_no_shard_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{ONE}: b should be here according to {INDEX}; no shard has it"):
        catalogue(folder(tmp_path, {ONE: floats("a"), INDEX: index({"a": ONE, "b": ONE})}))


def test_a_tensor_in_another_shard_than_the_index_says_is_an_error(tmp_path: Path) -> None:
    files = {ONE: floats("a"), TWO: floats("b", "c"), INDEX: index({"a": ONE, "b": ONE, "c": TWO})}
    with pytest.raises(CheckpointError, match=rf"has a problem:\n  {ONE}: b should be here .*; it is in {TWO}"):
        catalogue(folder(tmp_path, files))


def test_a_stored_tensor_that_the_index_does_not_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{ONE}: holds b, which {INDEX} does not list"):
        catalogue(folder(tmp_path, {ONE: floats("a", "b"), INDEX: index({"a": ONE})}))


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    files = {ONE: floats("a", "b"), TWO: floats("b", "c"), INDEX: index({"a": ONE, "b": ONE, "c": TWO})}
    with pytest.raises(CheckpointError, match=rf"has a problem:\n  {ONE}, {TWO}: b is stored 2 times"):
        catalogue(folder(tmp_path, files))


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_twenty_thousand_tensors_are_read_in_a_moment(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.w.weight" for i in range(200) for j in range(100)]
    weight_map = {name: (ONE if i < 10_000 else TWO) for i, name in enumerate(names)}
    files = {ONE: floats(*names[:10_000]), TWO: floats(*names[10_000:]), INDEX: index(weight_map)}
    folder(tmp_path, files)
    start = time.process_time()
    assert len(catalogue(tmp_path).tensors) == 20_000
    assert time.process_time() - start < 2.0  # 0.2 s on a quiet machine; quadratic would be minutes


@pytest.mark.alone
def test_twenty_thousand_problems_are_found_in_a_moment_and_told_in_twenty_lines(tmp_path: Path) -> None:
    header = {f"t{i:05}": tensor(offsets=[8 * i, 8 * i + 4]) for i in range(20_000)}
    repeated = json.dumps(header)[:-1] + "," + json.dumps(header)[1:]
    folder(tmp_path, {ONE: safetensors(header, bytes(160_000)), TWO: safetensors(repeated.encode())})
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"has 20000 problems:(\n.*){20}\n  \.\.\. and 19980 more$"):
        catalogue(tmp_path / ONE)
    with pytest.raises(CheckpointError, match=r"has 20000 problems:"):
        catalogue(tmp_path / TWO)
    assert time.process_time() - start < 4.0


def test_the_catalogue_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, ties_dist.checkpoints.catalogue; print({'torch', 'numpy'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "set()\n"
