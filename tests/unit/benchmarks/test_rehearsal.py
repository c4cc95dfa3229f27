"""The rehearsal's storage back end: checkpoints that are made up as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.rehearsal import DELTA_SCALES, DiscardingWriter, Pools, Stage, SynthesisingReader, merge, synthesise
from ties_dist.checkpoints.catalogue import Checkpoint, open_checkpoint
from ties_dist.errors import CheckpointError, OutputError
from ties_dist.planning.options import Resources

TENSORS = {"b.weight": (300, 50), "a.norm.weight": (7,), "c.weight": (64, 64), "d.weight": (90, 90)}
SHARD_BYTES = 40_000
FILE = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def pools() -> Pools:
    return Pools(2, elements=4999)  # shorter than two of the tensors


@pytest.fixture(scope="module")
def readers(pools: Pools) -> Sequence[SynthesisingReader]:
    return [synthesise(TENSORS, SHARD_BYTES, pools, model) for model in range(3)]


def read(reader: SynthesisingReader, file: str, start: int, stop: int) -> bytes:
    span = reader.read(file, start, stop)
    try:
        return bytes(span.view)
    finally:
        span.release()


def opened(reader: SynthesisingReader, folder: Path) -> Checkpoint:
    return open_checkpoint(folder, name="made up", reader=lambda _: reader)


def values(reader: SynthesisingReader, checkpoint: Checkpoint, tensor: str) -> np.ndarray:
    """(n,) float32."""
    entry = checkpoint.tensors[tensor]
    bits = np.frombuffer(read(reader, entry.file, entry.start, entry.stop), dtype="<u2")
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_the_catalogue_opens_what_is_made_up(readers: Sequence[SynthesisingReader], tmp_path: Path) -> None:
    checkpoint = opened(readers[0], tmp_path)
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == TENSORS
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.shards == (FILE, "model-00002-of-00002.safetensors")
    assert not checkpoint.notes


@pytest.mark.parametrize("step", [1, 7, 4096, 9998, 30_001])  # 9,998 bytes are one round of the pool
def test_bytes_are_the_same_at_any_cut(readers: Sequence[SynthesisingReader], step: int) -> None:
    for file in readers[1].names():
        size = readers[1].size(file)
        pieces = [read(readers[1], file, at, min(size, at + step)) for at in range(0, size, step)]
        assert b"".join(pieces) == read(readers[1], file, 0, size)


def test_the_same_request_gives_the_same_bytes(readers: Sequence[SynthesisingReader], pools: Pools) -> None:
    again = synthesise(TENSORS, SHARD_BYTES, Pools(2, elements=pools.elements), 2)
    for file in again.names():
        assert read(again, file, 0, again.size(file)) == read(readers[2], file, 0, again.size(file))


def test_models_differ_by_deltas_whose_scale_is_the_tensors(
    readers: Sequence[SynthesisingReader], tmp_path: Path
) -> None:
    base, *experts = ({n: values(r, opened(r, tmp_path), n) for n in TENSORS} for r in readers)
    for name in TENSORS.keys() - {"a.norm.weight"}:
        deltas = [expert[name] - base[name] for expert in experts]
        # Rounding to bfloat16 loses small deltas and enlarges others, within a factor of two.
        assert all(DELTA_SCALES[0] / 2 < delta.std() < DELTA_SCALES[-1] * 2 for delta in deltas)
        assert not np.array_equal(*deltas)
        assert base[name].std() == pytest.approx(0.02, rel=0.1)


def test_long_tensors_repeat_the_pool(readers: Sequence[SynthesisingReader], tmp_path: Path) -> None:
    long = values(readers[0], opened(readers[0], tmp_path), "b.weight")
    np.testing.assert_array_equal(long[:100], long[4999 : 4999 + 100])


def test_bytes_past_the_end_and_files_that_are_not_there_are_errors(readers: Sequence[SynthesisingReader]) -> None:
    with pytest.raises(CheckpointError, match="bytes where at least"):
        readers[0].read(FILE, 0, readers[0].size(FILE) + 1)
    with pytest.raises(FileNotFoundError, match="other"):
        readers[0].size("other.safetensors")
    with pytest.raises(OutputError, match="nothing is kept"):
        DiscardingWriter().read(FILE, 0, 1)


def test_a_rehearsed_merge_reads_every_input_byte(tmp_path: Path) -> None:
    resources = Resources(threads=1, kernel="eager", unit_bytes=1 << 20)
    stage = Stage(
        folder=tmp_path,
        tensors=TENSORS,
        shard_bytes=SHARD_BYTES,
        experts=2,
        resources=resources,
        pool_elements=4999,
    )
    plan = stage.plan().plan
    assert plan.input_bytes == 3 * 2 * (300 * 50 + 7 + 64 * 64 + 90 * 90)
    passes = stage.passes(plan)
    assert merge(passes)
    assert passes.worker.requested_bytes >= plan.input_bytes
