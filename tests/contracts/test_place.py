"""What every `Place` promises to an output; a new back end subclasses `PlaceContract`."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.places import DictPlace
from ties_dist.engine import run as engine
from ties_dist.engine.verify import verify
from ties_dist.errors import BugError, LockedError, OutputError
from ties_dist.executors.local import LocalExecutor
from ties_dist.output.report import MergeReport
from ties_dist.output.status import status
from ties_dist.planning.options import Resources, RunOptions
from ties_dist.planning.prepare import Job, prepare
from ties_dist.progress import LogProgress, Silent
from ties_dist.storage.local_place import LocalPlace
from ties_dist.storage.place import Place, partial_name
from ties_dist.values.items import MergeTask

SHAPES = {"a.weight": (1024, 640), "b.weight": (1024, 640), "c.weight": (300, 11)}


def forbidden() -> None:
    raise LockedError("another run has taken over")


class PlaceContract:
    """Subclasses give `place`, an empty one that is made."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        raise NotImplementedError

    def test_what_was_put_is_there_whole(self, place: Place) -> None:
        place.put("a", b"one")
        place.put("a", memoryview(b"longer"))
        assert (place.read("a"), place.size("a"), place.read("b"), place.size("b")) == (b"longer", 6, None, None)

    def test_a_put_that_is_checked_in_vain_leaves_what_was_there(self, place: Place) -> None:
        place.put("a", b"one")
        with pytest.raises(LockedError, match="taken over"):
            place.put("a", b"two", forbidden)
        with pytest.raises(LockedError, match="taken over"):
            place.put("new", b"two", forbidden)
        assert (place.read("a"), place.read("new")) == (b"one", None)

    def test_nothing_but_make_makes_a_folder(self, place: Place) -> None:
        with pytest.raises(OutputError, match="cannot write"):
            place.put("deep/er/a", b"")
        place.make("deep/er")
        place.put("deep/er/a", b"1")
        place.make("deep/er")
        assert place.read("deep/er/a") == b"1"

    def test_a_folder_lists_what_lies_directly_in_it(self, place: Place) -> None:
        place.make("f/g")
        place.put("x", b"12")
        place.put("f/y", b"345")
        place.put("f/g/z", b"")
        listed = {folder: [(e.name, e.size) for e in place.list(folder)] for folder in ("", "f", "f/g", "none")}
        assert listed == {"": [("f", None), ("x", 2)], "f": [("g", None), ("y", 3)], "f/g": [("z", 0)], "none": []}

    def test_of_two_files_the_later_is_newer(self, place: Place) -> None:
        place.put("first", b"")
        place.append("second", b"")
        changed = {e.name: e.changed for e in place.list()}
        assert changed["first"] <= changed["second"]

    def test_a_swap_is_of_what_was_expected_or_not_at_all(self, place: Place) -> None:
        assert place.swap("lock", None, b"me", patience=1.0)
        assert not place.swap("lock", None, b"you", patience=1.0)
        assert not place.swap("lock", b"somebody", b"you", patience=1.0)
        assert place.read("lock") == b"me"
        assert place.swap("lock", b"me", b"you", patience=1.0)
        assert place.swap("lock", b"you", None, patience=1.0)
        assert place.read("lock") is None

    def test_of_many_swaps_at_once_one_wins(self, place: Place) -> None:
        won: list[bytes] = []

        def take(name: bytes) -> None:
            if place.swap("lock", None, name, patience=5.0):
                won.append(name)

        takers = [threading.Thread(target=take, args=(bytes([65 + i]),)) for i in range(8)]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        assert [place.read("lock")] == won

    def test_a_file_may_come_in_pieces(self, place: Place) -> None:
        buffer = bytearray(2)

        def pieces() -> Iterator[memoryview]:
            for piece in (b"ab", b"cd"):
                buffer[:] = piece  # the one before is done with
                yield memoryview(buffer)

        place.put("x", pieces())
        place.put("empty", iter(()))
        assert (place.read("x"), place.read("empty")) == (b"abcd", b"")

    def test_a_folder_goes_with_the_last_file_that_is_retired(self, place: Place) -> None:
        place.make("run")
        for folder in ("a", "b"):
            place.make(folder)
            place.put(f"{folder}/config.json", b"{}")
        place.put("b/mine", b"")
        place.retire(["a/config.json", "b/config.json", "c/none"], "run/retired", lambda: None)
        assert [e.name for e in place.list()] == ["b", "run"]
        assert [e.name for e in place.list("b")] == ["mine"]

    def test_appends_add_to_the_end(self, place: Place) -> None:
        place.append("journal", b"one\n")
        place.append("journal", b"two\n")
        assert place.read("journal") == b"one\ntwo\n"

    def test_a_partial_file_gets_its_name_once(self, place: Place) -> None:
        place.make("run/parts")
        writer = place.writer("run/parts")
        writer.create("model.safetensors", 10)
        writer.write("model.safetensors", 4, memoryview(b"abc"))
        writer.sync(["model.safetensors"])
        assert place.read("model.safetensors") is None
        assert [e.name for e in place.list("run/parts")] == [partial_name("model.safetensors")]
        place.publish(f"run/parts/{partial_name('model.safetensors')}", "model.safetensors")
        place.sync()
        assert place.read("model.safetensors") == b"\0\0\0\0abc\0\0\0"
        again = place.writer("run/parts")
        assert bytes(again.read("model.safetensors", 4, 7)) == b"abc"  # under its name, too
        writer.close()
        again.close()

    def test_a_writer_is_fenced(self, place: Place) -> None:
        place.make("parts")
        writer = place.writer("parts", forbidden)
        writer.create("a", 4)
        with pytest.raises(LockedError, match="taken over"):
            writer.write("a", 0, memoryview(b"abcd"))
        assert bytes(writer.read("a", 0, 4)) == bytes(4)
        writer.close()

    def test_ranges_of_files_are_read(self, place: Place) -> None:
        place.make("f")
        place.put("f/a", b"0123456789")
        span = place.reader("f").read("a", 3, 6)
        assert bytes(span.view) == b"345"
        span.release()

    def test_a_copy_of_itself_is_another_file(self, place: Place) -> None:
        place.put("a", b"old")
        place.copy("a", "a")
        place.copy("a", "b")
        assert (place.read("a"), place.read("b")) == (b"old", b"old")

    def test_who_has_the_old_one_open_does_not_reach_a_copy(self, place: Place) -> None:
        place.make("parts")
        late = place.writer("parts")
        late.create("a", 4)
        late.write("a", 0, memoryview(b"done"))
        place.copy(f"parts/{partial_name('a')}", f"parts/{partial_name('a')}")
        late.write("a", 0, memoryview(b"late"))
        late.close()
        assert place.read(f"parts/{partial_name('a')}") == b"done"

    def test_what_is_retired_is_gone_and_the_rest_stays(self, place: Place) -> None:
        for name in ("a", "b", "c"):
            place.put(name, name.encode())
        place.make("run")
        place.retire(["a", "b", "missing"], "run/retired", lambda: None)
        assert [e.name for e in place.list() if e.size is not None] == ["c"]
        with pytest.raises(LockedError, match="taken over"):
            place.retire(["c"], "run/retired-2", forbidden)
        assert place.read("c") == b"c"

    def test_a_cleared_folder_is_gone_with_all_in_it(self, place: Place) -> None:
        place.make("run/parts")
        place.put("run/parts/a", b"1")
        place.put("kept", b"2")
        place.clear("run")
        place.clear("run")
        assert (place.list("run"), place.read("run/parts/a"), place.read("kept")) == ([], None, b"2")

    def test_removing_twice_is_no_fault(self, place: Place) -> None:
        place.put("a", b"")
        place.remove("a")
        place.remove("a")
        assert place.read("a") is None

    # A whole merge

    @pytest.fixture
    def job(self, merge_job: Checkpoints) -> Callable[[], Job]:
        models = random_models(SHAPES, experts=2, dtype=torch.bfloat16)
        recipe = merge_job(models, shards=2, options={"zero_sign": "majority"})
        return lambda: prepare(recipe, resources=Resources(unit_bytes=1 << 20, threads=1))

    def test_a_merge_that_was_stopped_by_an_error_is_resumed(
        self, place: Place, job: Callable[[], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = ties_dist.merge(tmp_path / "recipe.yml", tmp_path / "elsewhere").output_digest
        monkeypatch.setattr("ties_dist.engine.passes.COMMIT_SECONDS", -1.0)
        writer = type(place.writer(".ties_dist"))
        write, calls = writer.write, [0]

        def failing(*given: object) -> None:
            calls[0] += 1
            if calls[0] == 4:  # the first is a rehearsal
                raise ZeroDivisionError("a bug, in the middle")
            write(*given)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(writer, "write", failing)
            with pytest.raises(BugError, match="in the middle"):
                self.merge(place, job())
        assert status(place, watched_seconds=0.0).state == "interrupted"
        assert [e.name for e in place.list() if e.name.endswith(".safetensors")] == []
        report = self.merge(place, job())
        assert report.output_digest == expected
        assert report.resumed_units in ((2, 3) if place.reads_parts else (0,))  # what was under way was written, too
        assert self.merge(place, job()).already_done
        assert status(place, watched_seconds=0.0).state == "finished"
        checked = verify(place, RunOptions(), sample=1.0, progress=Silent())
        assert checked.remerged_units == checked.units == 2

    def test_what_a_lost_worker_may_still_write_reaches_no_file_in_use(
        self, place: Place, job: Callable[[], Job], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When all is merged, just before names are given, and after the end; the guess has been corrected since."""
        executor, prepared = LocalExecutor(1), job()
        item = next(iter(prepared.plan.items()))
        late, give_names = place.writer(f".ties_dist/{prepared.plan.fingerprint}/parts"), engine.give_names

        def arrive() -> None:
            late.write(item.ranges[0].file, 0, memoryview(b"merged with a guess that was wrong"))

        def merged(run: engine.Run) -> None:
            executor.usage.unanswered[1] = (MergeTask(item=item, cuts={}, majority=1),)
            arrive()

        def naming(*given: Any) -> None:
            arrive()
            give_names(*given)

        monkeypatch.setattr(engine, "_check_inputs", merged)
        monkeypatch.setattr(engine, "give_names", naming)
        engine.run(prepared, place, executor=executor, progress=Silent())
        arrive()
        late.close()
        assert verify(place, RunOptions(), sample=1.0, progress=Silent()).skipped is None  # nor damaged

    def merge(self, place: Place, job: Job) -> MergeReport:
        return engine.run(job, place, executor=LocalExecutor(1), progress=LogProgress())


class TestLocalPlace(PlaceContract):
    def test_a_place_that_travels_is_the_same_elsewhere(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place.put("a", b"here")
        sent = pickle.dumps(place)
        monkeypatch.chdir(tmp_path)
        assert pickle.loads(sent).read("a") == b"here"

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        place = LocalPlace(tmp_path / "out")
        place.make()
        return place


class TestLocalPlaceNamedFromHere(TestLocalPlace):
    """A relative path, as a user gives it."""

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        place = LocalPlace(Path("out"))
        place.make()
        return place


class TestDictPlace(PlaceContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return DictPlace()


class TestPlaceWhosePartsCannotBeRead(PlaceContract):
    """As of an open upload."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return DictPlace(reads_parts=False)
