"""Output files: headers other people's readers accept, offsets and cuts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ties_dist.checkpoints.forms.plain import Plain
from ties_dist.errors import PlanError
from ties_dist.messages import readable
from ties_dist.methods import Linear, Ties
from ties_dist.planning.layout import INDEX_NAME, TensorSpec, lay_out
from ties_dist.planning.memory import fit, fit_unit_bytes
from ties_dist.planning.options import Resources
from ties_dist.planning.plan import cut, gaps
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.values.inputs import Input
from ties_dist.values.items import Range, WorkItem


def spec(name: str, *shape: int, dtype: str = "F32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape, merged=True, source=name, counted=True)


def test_safetensors_reads_a_laid_out_file(tmp_path: Path) -> None:
    specs = [spec("b", 2, 3, dtype="BF16"), spec("a", 4), spec("empty", 0, 5), spec("scalar")]
    layout = lay_out(sorted(specs, key=lambda s: s.name), dict.fromkeys(["a", "b", "empty", "scalar"], "x.safetensors"))
    (shard,) = layout.shards
    path = tmp_path / shard.name
    path.write_bytes(shard.header + bytes(shard.size - len(shard.header)))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"a", "b", "empty", "scalar"}
        assert file.get_tensor("b").dtype == torch.bfloat16
        assert file.get_tensor("empty").shape == (0, 5)
        assert file.metadata() == {"format": "pt"}


def test_data_start_at_4096_and_the_widest_dtype_comes_first() -> None:
    specs = [spec("a", 3, dtype="U8"), spec("b", 5, dtype="BF16"), spec("c", 7), spec("d", 1, dtype="I64")]
    (shard,) = lay_out(specs, dict.fromkeys("abcd", "x.safetensors")).shards
    assert len(shard.header) % 4096 == 0
    assert [t.name for t in shard.tensors] == ["d", "c", "b", "a"]
    assert [s - len(shard.header) for s in shard.starts] == [0, 8, 36, 46]


def test_segments_of_cuts_tile_every_tensor() -> None:
    specs = [spec("big", 700_001), spec("mid", 300_000, dtype="BF16"), spec("none", 0), spec("one", 1, dtype="BF16")]
    (shard,) = lay_out(specs, dict.fromkeys(("big", "mid", "none", "one"), "x.safetensors")).shards
    seen: dict[str, list[tuple[int, int]]] = {}
    for unit in cut(shard.name, 0, shard.size, BLOCK_BYTES):
        position = max(unit.start, len(shard.header))
        for segment in shard.segments(unit.start, unit.stop):
            assert segment.offset == position
            position += segment.nbytes
            seen.setdefault(segment.tensor.name, []).append((segment.start, segment.stop))
        assert position == unit.stop
    assert seen["mid"] == [(0, 300_000)] or seen["mid"][0][0] == 0
    for name, numel in (("big", 700_001), ("mid", 300_000), ("one", 1)):
        bounds = [0, *(stop for _, stop in seen[name])]
        assert seen[name] == list(itertools.pairwise(bounds))
        assert bounds[-1] == numel
    assert "none" not in seen


def test_shards_follow_the_base_and_keep_its_names() -> None:
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    layout = lay_out([spec("a", 4), spec("b", 4)], files)
    assert [s.name for s in layout.shards] == sorted(files.values())
    assert INDEX_NAME in layout.indexes
    assert '"total_size": 32' in layout.indexes[INDEX_NAME]
    renamed = lay_out([spec("a", 4), spec("b", 4)], {"a": "x.safetensors", "b": "y.safetensors"})
    assert [s.name for s in renamed.shards] == sorted(files.values())


def test_max_shard_size_cuts_greedily_in_name_order() -> None:
    specs = [spec(name, 10) for name in "abcde"]
    layout = lay_out(specs, dict.fromkeys("abcde", "x.safetensors"), max_shard_bytes=80)
    assert [[t.name for t in s.tensors] for s in layout.shards] == [["a", "b"], ["c", "d"], ["e"]]
    alone = lay_out(specs, dict.fromkeys("abcde", "x.safetensors"), max_shard_bytes=8)
    assert len(alone.shards) == 5
    assert INDEX_NAME == "model.safetensors.index.json"


def test_a_model_without_tensors_has_one_empty_shard() -> None:
    (shard,) = lay_out([], {}).shards
    assert shard.size == len(shard.header)


def test_gaps_are_what_ranges_leave() -> None:
    assert list(gaps([(4, 6), (0, 2)], 10)) == [(2, 4), (6, 10)]
    assert list(gaps([], 3)) == [(0, 3)]
    assert list(gaps([(0, 3)], 3)) == []


def test_units_end_at_absolute_multiples_so_that_resumed_ranges_fit() -> None:
    assert [(u.start, u.stop) for u in cut("s", 3, 25, 10)] == [(3, 10), (10, 20), (20, 25)]


def test_a_budget_too_small_says_what_would_do() -> None:
    with pytest.raises(PlanError, match=r"--memory-budget 1MiB is too small.*to at least \d"):
        fit_unit_bytes(
            asked=None,
            budget=1 << 20,
            threads=2,
            method=Ties(),
            layout=lay_out([], {}),
            operands=[],
            units=1,
            outputs=1,
        )
    with pytest.raises(PlanError, match="--unit-size 4KiB is too small"):
        fit_unit_bytes(
            asked=4096,
            budget=1 << 30,
            threads=2,
            method=Linear(),
            layout=lay_out([], {}),
            operands=[],
            units=1,
            outputs=1,
        )


def test_the_most_slices_of_a_unit_are_those_that_begin_in_it_and_one_more() -> None:
    layout = lay_out([spec(f"t{i:04}", 256) for i in range(3000)], {f"t{i:04}": "x.safetensors" for i in range(3000)})
    (shard,) = layout.shards
    for unit in (1 << 20, 2 << 20, 8 << 20):
        counted = [len(list(shard.segments(u.start, u.stop))) for u in cut(shard.name, 0, shard.size, unit)]
        assert max(counted) <= layout.most_segments(unit) <= max(counted) + 1


def test_units_of_very_many_tensors_are_smaller_and_their_slices_are_projected() -> None:
    views = {f"t{i:05}": Plain("f", 0, "F32") for i in range(50_000)}
    layout = lay_out([spec(name, 16) for name in views], dict.fromkeys(views, "x.safetensors"))
    models = [Input(name="m", path="p", views=views, identity="i")] * 9
    memory = fit(Linear(), layout, models, {}, Resources(threads=1))
    few = fit(Linear(), lay_out([spec("t", 800_000)], {"t": "x.safetensors"}), [
        Input(name="m", path="p", views={"t": Plain("f", 0, "F32")}, identity="i")
    ] * 9, {}, Resources(threads=1))  # fmt: skip
    assert (memory.unit_bytes, few.unit_bytes) == (1 << 20, 8 << 20)
    # Five units under way, 16,384 slices of 64 bytes in each, eight operands and a result: 1 KiB each.
    of_slices = memory.projected_bytes - few.projected_bytes + 5 * (7 << 20) * 9
    assert 0.99 * 5 * 16_384 * 9 * 1024 <= of_slices <= 1.01 * 5 * 16_384 * 9 * 1024


def test_sizes_read_as_a_person_writes_them() -> None:
    assert [readable(n) for n in (0, 1023, 1536, 2 << 30, 3 << 40)] == ["0B", "1023B", "1.5KiB", "2GiB", "3TiB"]


def test_the_slices_of_an_item_lie_behind_each_other_in_its_buffer() -> None:
    layout = lay_out([spec("a", 4), spec("b", 3)], {"a": "x.safetensors", "b": "y.safetensors"})
    first, second = layout.shards
    item = WorkItem((Range(first.name, 0, first.size), Range(second.name, 4096, second.size)))
    assert [(s.tensor.name, s.start, s.stop, at) for s, at in layout.placed(item)] == [
        ("a", 0, 4, 4096),
        ("b", 0, 3, first.size),
    ]


def test_what_cannot_be_cut_is_refused_with_its_number() -> None:
    @dataclass(frozen=True)
    class Turned(Plain):
        grain: int = 4096  # type: ignore[misc]

    model = Input(name="fused", path="p", views={"w": Turned("f", 0, "F32")}, identity="i")
    layout = lay_out([spec("w", 8)], {"w": "x.safetensors"})
    with pytest.raises(PlanError, match=r"w of 'fused' can be read 4,096 elements at a time only"):
        fit(Linear(), layout, [model, model], {}, Resources())
