"""The journal: what is committed is read back, what is torn or damaged is not, and later facts come before earlier."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.loading import journals_of
from ties_dist.errors import OutputError
from ties_dist.output.journal import Journal, Record
from ties_dist.storage.digests import digest
from ties_dist.storage.local_place import LocalPlace
from ties_dist.thresholds import KEEP_ALL, KEEP_NONE, ModelCut, TensorCut, Threshold
from ties_dist.values.items import MergeResult, MergeTask, Range, WorkItem
from ties_dist.values.stretches import Stretch

CUTS = (TensorCut(0x3A83126F, 7), TensorCut(0, 40))
THRESHOLDS = (ModelCut(Threshold(0x3A83126F, 11, 3), "layers.1.weight", 5), ModelCut(KEEP_ALL), ModelCut(KEEP_NONE))

COUNTERS = ("nonfinite[0]", "nonfinite_out", "sign_sum")


def result(start: int, stop: int, *, shard: str = "a", state: str = "s", block: str = "b") -> MergeResult:
    """start, stop: in MiB."""
    return MergeResult(
        item=WorkItem((Range(shard, start << 20, stop << 20),)),
        state_digest=state,
        majority=-1,
        blocks=tuple(f"{block}{i}" for i in range(start, stop)),
        counts={"layers.1.weight": (1, 2, 3), "": (0, 0, -5)},
        dependent=4,
    )


def journal(folder: Path, token: str = "0", *results: MergeResult) -> Journal:
    opened = Journal(LocalPlace(folder.parent), folder.name, token, COUNTERS)
    for each in results:
        opened.merged(each)
    opened.commit()
    return opened


def file_of(opened: Journal) -> Path:
    return Path(str(opened.place), opened.name)


def test_facts_come_back_as_they_were_committed(tmp_path: Path) -> None:
    opened = journal(tmp_path)
    opened.thresholds(THRESHOLDS)
    opened.cuts("lm_head.weight", CUTS)
    opened.sums(Stretch("lm_head.weight", 3, 5), ((0.1, -math.inf), (-0.0, 5e-324)))
    opened.sums(Stretch("lm_head.weight", 0, 1), ((2.0**60, 1.0),))
    opened.merged(result(0, 2))
    opened.merged(result(2, 3, shard="b"))
    opened.publishing()
    opened.commit()
    assert journals_of(tmp_path) == Record(
        merged=[result(0, 2), result(2, 3, shard="b")],
        cuts={"lm_head.weight": CUTS},
        sums={"lm_head.weight": {3: (0.1, -math.inf), 4: (-0.0, 5e-324), 0: (2.0**60, 1.0)}},
        thresholds=THRESHOLDS,
        publishing=True,
    )


def test_a_folder_without_journals_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "journal-0.jsonl.tmp").write_text("{}")
    assert journals_of(tmp_path) == Record()
    assert journals_of(tmp_path / "missing") == Record()


def test_nothing_is_on_the_disk_before_the_commit(tmp_path: Path) -> None:
    opened = Journal(LocalPlace(tmp_path.parent), tmp_path.name, "0", COUNTERS)
    opened.merged(result(0, 1))
    assert os.listdir(tmp_path) == []
    opened.commit()
    assert journals_of(tmp_path).merged == [result(0, 1)]


def test_a_commit_syncs_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    opened = journal(tmp_path, "0", result(0, 1))
    assert synced == [str(tmp_path / "journal-0.jsonl"), str(tmp_path)]
    opened.merged(result(1, 2))
    opened.commit()
    assert synced[2:] == [str(tmp_path / "journal-0.jsonl")]
    opened.commit()  # nothing to say
    assert len(synced) == 3


@pytest.mark.parametrize("lost", range(1, 400, 7))
def test_a_torn_tail_costs_the_torn_lines_only(lost: int, tmp_path: Path) -> None:
    path = file_of(journal(tmp_path, "0", *(result(i, i + 1) for i in range(4))))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    os.truncate(path, len(whole) - lost)
    # A line that misses nothing but its newline is whole.
    assert journals_of(tmp_path).merged == [result(i, i + 1) for i in range(4) if ends[i] - 1 <= len(whole) - lost]


def test_what_follows_a_torn_tail_is_read(tmp_path: Path) -> None:
    opened = journal(tmp_path, "0", result(0, 1), result(1, 2))
    os.truncate(file_of(opened), file_of(opened).stat().st_size - 9)
    for i in (2, 3):
        opened.merged(result(i, i + 1))
    opened.commit()
    # The first new line is glued to the torn one and lost with it: redone, never misread.
    assert journals_of(tmp_path).merged == [result(0, 1), result(3, 4)]


@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_a_damaged_byte_costs_at_most_the_lines_it_touches(
    position: int, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    written = [result(i, i + 1) for i in range(5)]
    path = file_of(journal(folder, "0", *written))
    content = bytearray(path.read_bytes())
    place = position % len(content)
    content[place] ^= flip
    path.write_bytes(content)
    hit = content[:place].count(b"\n")
    read = journals_of(folder).merged
    assert all(each in written for each in read)
    assert [each for i, each in enumerate(written) if i not in (hit, hit + 1)] == [
        each for each in read if each not in (written[hit], written[min(hit + 1, 4)])
    ]


def test_facts_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    opened = Journal(LocalPlace(tmp_path.parent), tmp_path.name, "0", COUNTERS)
    opened._add("sung", {"verse": 3})
    opened.merged(result(0, 1))
    opened.commit()
    assert journals_of(tmp_path) == Record(merged=[result(0, 1)])


def test_the_journals_of_all_drivers_are_read_the_newest_last(tmp_path: Path) -> None:
    for age, (token, start, bits) in enumerate([("f", 0, 1), ("0", 1, 2), ("7", 0, 3)]):
        opened = journal(tmp_path, token, result(start, start + 1, block=token))
        opened.thresholds((ModelCut(Threshold(bits, 1, 1)),))
        opened.commit()
        os.utime(file_of(opened), ns=(0, age * 10**9))
    record = journals_of(tmp_path)
    assert [each.blocks[0] for each in record.merged] == ["f0", "01", "70"]
    assert record.thresholds == (ModelCut(Threshold(3, 1, 1)),)


def test_a_full_disk_is_an_output_error_and_the_lines_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = journal(tmp_path, "0", result(0, 1))
    opened.merged(result(1, 2))

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"the disk is full. Free some space and run the same command again"):
            opened.commit()
    opened.commit()
    assert journals_of(tmp_path).merged[-1] == result(1, 2)


def test_a_cut_from_the_journal_gives_the_state_digest_it_was_merged_with(tmp_path: Path) -> None:
    opened = journal(tmp_path)
    opened.cuts("w", CUTS)
    opened.thresholds(THRESHOLDS)
    opened.commit()
    record = journals_of(tmp_path)

    def state(cuts: tuple[TensorCut, ...]) -> str:
        return MergeTask(item=WorkItem((Range("a", 0, 1),)), cuts={"w": cuts}, majority=1).state_digest

    assert state(record.cuts["w"]) == state(CUTS)
    for tensor in ("a", "layers.1.weight", "z"):
        read, known = ([c.of(tensor, 9) for c in cuts] for cuts in (record.thresholds or (), THRESHOLDS))
        assert state(tuple(read)) == state(tuple(known))


# -- which results count -----------------------------------------------------------------------------------------------


def test_the_newest_result_of_a_range_counts() -> None:
    old, new = result(0, 1, block="old"), result(0, 1, block="new")
    assert Record().covering([old, new]) == [new]
    assert Record().covering([new, old]) == [old]


def test_results_that_do_not_overlap_all_count_in_file_order() -> None:
    results = [result(2, 3), result(0, 2), result(0, 9, shard="b"), result(3, 4)]
    assert Record().covering(results) == [result(0, 2), result(2, 3), result(3, 4), result(0, 9, shard="b")]


@pytest.mark.parametrize("newer", [(0, 1), (3, 5), (7, 8), (0, 8), (2, 9)])
def test_an_older_result_that_a_newer_one_overlaps_does_not_count(newer: tuple[int, int]) -> None:
    # The newer range was merged because the older one was found bad; with other unit sizes it is another range.
    assert Record().covering([result(0, 8), result(*newer)]) == [result(*newer)]


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 6), st.sampled_from("ab")).map(
            lambda t: (t[0], t[0] + t[1], t[2])
        ),
        max_size=15,
    )
)
@settings(max_examples=300, deadline=None)
def test_no_byte_is_counted_twice_and_the_newest_result_always_counts(ranges: list[tuple[int, int, str]]) -> None:
    results = [result(start, stop, shard=shard, block=str(i)) for i, (start, stop, shard) in enumerate(ranges)]
    chosen = Record().covering(results)
    counted = [
        (r.item.ranges[0].file, mib)
        for r in chosen
        for mib in range(r.item.ranges[0].start >> 20, r.item.ranges[0].stop >> 20)
    ]
    assert len(counted) == len(set(counted))
    assert results[-1:] == [r for r in chosen if r is results[-1]]
    for left in (r for r in results if r not in chosen):  # each was left out for a newer one
        later = results[results.index(left) + 1 :]
        assert any(
            r in chosen
            and r.item.ranges[0].file == left.item.ranges[0].file
            and r.item.ranges[0].start < left.item.ranges[0].stop
            and left.item.ranges[0].start < r.item.ranges[0].stop
            for r in later
        )


def test_an_item_of_several_files_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    both = replace(
        result(0, 2), item=WorkItem((Range("a", 0, 2 << 20), Range("b", 0, 1 << 20))), blocks=("a0", "a1", "b0")
    )
    newer = result(0, 1, shard="b", block="new")
    apart = result(2, 3)
    record = journals_of(file_of(journal(tmp_path, "0", both, apart)).parent)
    assert record.merged == [both, apart]
    assert list(record.merged[0].by_range) == [
        (Range("a", 0, 2 << 20), ("a0", "a1")),
        (Range("b", 0, 1 << 20), ("b0",)),
    ]
    assert Record().covering([both, apart, newer]) == [apart, newer]  # its other range goes, too
    assert Record().covering([newer, both, apart]) == [both, apart]


def test_a_line_of_an_earlier_version_names_its_only_range_without_a_list(tmp_path: Path) -> None:
    text = (
        '{"kind":"merged","shard":"a","start":0,"stop":1048576,"state":"s","majority":1,"blocks":["x"],'
        '"counts":{"w":[1]},"dependent":0}'
    )
    (tmp_path / "journal-0.jsonl").write_text(f"{digest(text.encode())[:16]} {text}\n")
    assert journals_of(tmp_path).merged[0].item == WorkItem((Range("a", 0, 1 << 20),))


def test_ranges_that_another_version_counted_are_merged_again_with_the_same_thresholds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Journal(LocalPlace(tmp_path.parent), tmp_path.name, "0", ("nonfinite_out", "nonfinite[0]", "sign_sum"))
    other.merged(result(0, 1))
    other.thresholds(THRESHOLDS)
    other.commit()
    journal(tmp_path, "1", result(1, 2))
    assert journals_of(tmp_path, COUNTERS) == Record(merged=[result(1, 2)], unreadable=1, thresholds=THRESHOLDS)
    assert "1 merged ranges in the journal have the counts of another version: they are merged again" in caplog.text
    assert len(journals_of(tmp_path).merged) == 2  # for those who only want to know what is on the disk


@pytest.mark.parametrize(("row", "taken"), [("[1,2,3]", 1), ("[1]", 0), ("[1,2,3,4,5]", 0)])
def test_rows_of_an_earlier_version_are_taken_where_they_have_as_many_numbers(
    row: str, taken: int, tmp_path: Path
) -> None:
    text = (
        '{"kind":"merged","shard":"a","start":0,"stop":1048576,"state":"s","majority":1,"blocks":["x"],'
        f'"counts":{{"w":{row}}},"dependent":0}}'
    )
    (tmp_path / "journal-0.jsonl").write_text(f"{digest(text.encode())[:16]} {text}\n")
    assert len(journals_of(tmp_path, COUNTERS).merged) == taken


# -- lines that nobody of us wrote -------------------------------------------------------------------------------------

LINE = {
    "kind": "merged", "ranges": [["a", 0, 1 << 20]], "state": "s", "majority": 1, "blocks": ["x"],
    "counters": list(COUNTERS), "counts": {"w": [1, 2, 3]}, "dependent": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"stop": 0}, {"stop": 3}, {"first": -1}, {"first": 2}, {"content": "00"}, {"content": ""}, {"content": "zz" * 16}],
)
def test_sums_that_are_not_as_many_for_each_block_are_passed_over(changes: dict[str, object], tmp_path: Path) -> None:
    line = {"kind": "sums", "tensor": "w", "first": 0, "stop": 2, "content": "00" * 8 + "000000000000f03f"}
    lines = [json.dumps(line), json.dumps({**line, "tensor": "x", **changes})]
    (tmp_path / "journal-0.jsonl").write_text("".join(f"{digest(x.encode())[:16]} {x}\n" for x in lines))
    assert journals_of(tmp_path, COUNTERS).sums == {"w": {0: (0.0,), 1: (1.0,)}}


@pytest.mark.parametrize(
    "changes",
    [
        {"ranges": [["../a", 0, 1 << 20]]},
        {"ranges": [["/etc/passwd", 0, 1 << 20]]},
        {"ranges": [["a\u001b[2J", 0, 1 << 20]]},
        {"ranges": [["", 0, 1 << 20]]},
        {"ranges": []},
        {"ranges": [["a", 0]]},
        {"ranges": [["a", "zero", 1 << 20]]},
        {"ranges": [["a", 1 << 20, 0]]},
        {"ranges": [["a", 512, 1 << 20]]},
        {"ranges": [["a", 0, 1 << 70]]},
        {"blocks": ["x", "y"]},
        {"blocks": None},
        {"counts": {"w": [1, 2, "three"]}},
        {"counts": {"w": [1 << 63, 0, 0]}},
        {"counts": [1, 2, 3]},
        {"dependent": None},
        {"kind": ["merged"]},
    ],
)
def test_a_line_that_makes_no_sense_is_passed_over(changes: dict[str, object], tmp_path: Path) -> None:
    lines = [json.dumps(fact) for fact in (LINE, {**LINE, **changes})] + ["[]", "1", '"merged"', "{"]
    (tmp_path / "journal-0.jsonl").write_text("".join(f"{digest(x.encode())[:16]} {x}\n" for x in lines))
    (found,) = journals_of(tmp_path, COUNTERS).merged
    assert found.item == WorkItem((Range("a", 0, 1 << 20),))
