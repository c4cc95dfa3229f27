"""Publishing dies at every step there is, and OUT is never anything but no model, the old one or the new one, whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import ties_dist
from tests.drills.jobs import late_majority, write_job
from tests.loading import Version, standing, version_of
from ties_dist.errors import LockedError, OutputError
from ties_dist.output.folder import OutFolder
from ties_dist.output.manifest import Manifest, Origin, Shard
from ties_dist.output.publish import Finished, give_names
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import INDEX_NAME, Layout, TensorSpec, lay_out
from ties_dist.storage.local_place import LocalPlace

STEPS = ("replace", "unlink", "rmdir", "fsync", "fdatasync")
"""What a process may die before: everything that changes which files there are, or makes bytes durable."""


class Killed(BaseException):
    """Nothing in the product catches it, as nothing catches a SIGKILL."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Die before the `step`-th (from 1) of the calls named in STEPS, and do none of them from then on.

    Gives a function that says how many there were.
    """
    calls = [0]

    def mortal(call: Callable[..., object]) -> Callable[..., object]:
        def dying(*arguments: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] >= step:
                raise Killed
            return call(*arguments, **options)

        return dying

    with monkeypatch.context() as patched:
        for name in STEPS:
            patched.setattr(os, name, mortal(getattr(os, name)))
        yield lambda: calls[0]


@contextmanager
def suppressed() -> Iterator[list[bool]]:
    """Whether the block died."""
    died: list[bool] = []
    try:
        yield died
    except Killed:
        died.append(True)


# -- publishing alone --------------------------------------------------------------------------------------------------


def layout_of(shards: int) -> Layout:
    specs = [
        TensorSpec(name=f"t{i}", dtype="F32", shape=(i + 1,), merged=True, source=f"t{i}", counted=True)
        for i in range(6)
    ]
    files = {f"t{i}": f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i in range(6)}
    return lay_out(specs, files)


def report_of(fingerprint: str) -> MergeReport:
    return MergeReport(
        method="ties",
        semantics="paper",
        experts=(),
        conflict_fraction=None,
        elements=21,
        bytes_read=0,
        bytes_written=0,
        elapsed_seconds=0.0,
        peak_rss_bytes=0,
        projected_bytes=0,
        units=1,
        resumed_units=0,
        redone_units=0,
        kernel="eager",
        executor="local",
        threads=1,
        unit_bytes=1 << 20,
        output_digest=fingerprint,
        fingerprint=fingerprint,
    )


class Model:
    """One finished merge, told from another by the byte it is filled with."""

    def __init__(self, fingerprint: str, shards: int, companions: Sequence[str]) -> None:
        self.fingerprint, self.layout = fingerprint, layout_of(shards)
        self.companions = {name: f"{name} of {fingerprint}".encode() for name in ("config.json", *companions)}

    def merge(self, out: Path) -> OutFolder:
        """Everything before publishing."""
        folder = OutFolder(place=LocalPlace(out), fingerprint=self.fingerprint)
        folder.place.make(folder.parts)
        for shard in self.layout.shards:
            filled = shard.header.ljust(shard.size, self.fingerprint[:1].encode())
            (out / folder.partial(shard.name)).write_bytes(filled)
        return folder

    def publish(self, folder: OutFolder, check: Callable[[], None] = lambda: None) -> None:
        manifest = Manifest(
            fingerprint=self.fingerprint,
            output_digest=self.fingerprint,
            companions=tuple(sorted(self.companions)),
            origin=Origin(),
            shards={shard.name: Shard(size=shard.size, blocks=("digest",)) for shard in self.layout.shards},
        )
        report = report_of(self.fingerprint)
        give_names(
            folder, Finished(layout=self.layout, manifest=manifest, report=report, companions=self.companions), check
        )

    def version(self, tmp_path: Path) -> Version:
        alone = tmp_path / f"{self.fingerprint} alone"
        self.publish(self.merge(alone))
        return version_of(alone)


def path_of(folder: OutFolder) -> Path:
    return Path(str(folder.place))


CASES = [(None, 1), (None, 3), (1, 1), (1, 3), (3, 1), (3, 3), (3, 2), (2, 3)]


def setting(tmp_path: Path, old: int | None, new: int) -> tuple[OutFolder, Model, Mapping[str, Version]]:
    """A merge that is ready to be published, over the finished model of another one unless `old` is None."""
    models = {"new": Model("new", new, ["vocab.txt", "LICENSE"])}
    if old is not None:
        models["old"] = Model("old", old, ["merges.txt", "LICENSE"])
    versions = {name: model.version(tmp_path) for name, model in models.items()}
    if old is not None:
        models["old"].publish(models["old"].merge(tmp_path / "out"))
    return models["new"].merge(tmp_path / "out"), models["new"], versions


@pytest.mark.parametrize(("old", "new"), CASES)
def test_publishing_that_dies_anywhere_shows_a_whole_model_or_none_and_can_be_repeated(
    old: int | None, new: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, step, died = set(), 0, [True]
    while died:
        step += 1
        root = tmp_path / str(step)
        root.mkdir()
        folder, model, versions = setting(root, old, new)
        with suppressed() as died, killed_at(step, monkeypatch):
            model.publish(folder)
        shown = standing(path_of(folder), versions)
        finished = folder.finished()
        assert (finished.fingerprint if finished else None) == shown
        seen.add(shown)
        if shown != "new":
            assert shown != "old" or len(folder.place.list(folder.parts)) == len(model.layout.shards)
            model.publish(folder)
        assert standing(path_of(folder), versions) == "new"
        assert version_of(path_of(folder)) == versions["new"]  # nothing of an older run, no temporary file
        assert folder.finished() == report_of("new")
        assert (root / "out" / ".ties_dist" / "manifest.json").exists()
    assert step > 15
    assert seen == {None, "new"} | ({"old"} if old else set())


class Fence:
    """Up from the `number`-th check on; remembers what OUT was then."""

    def __init__(self, number: int, out: Path) -> None:
        self.left, self.out = number, out
        self.seen: Version = {}

    def __call__(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.seen = version_of(self.out)
            raise LockedError("this run lost OUT")


@pytest.mark.parametrize(("old", "new"), CASES)
def test_publishing_that_is_fenced_off_anywhere_changes_nothing_from_then_on(
    old: int | None, new: int, tmp_path: Path
) -> None:
    last = False
    for number in range(1, 100):
        root = tmp_path / str(number)
        root.mkdir()
        folder, model, versions = setting(root, old, new)
        fence = Fence(number, path_of(folder))
        try:
            model.publish(folder, fence)
            last = True
            break
        except LockedError:
            unnamed = {name for name in fence.seen if name.endswith(".tmp")}  # removed: it never got its name
            assert version_of(path_of(folder)) == {n: d for n, d in fence.seen.items() if n not in unnamed}
        assert standing(path_of(folder), versions) in ("old", None)
    assert last
    assert number >= 2 + new + (new > 1)  # before the removal, each rename, and the index


@pytest.mark.parametrize(("old", "new"), CASES)
def test_no_name_is_given_or_taken_without_a_look_at_the_lock_just_before(
    old: int | None, new: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, _ = setting(tmp_path, old, new)
    looked, changes = [False], []

    def guarded(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def change(path: str | Path, *arguments: object, **options: object) -> object:
            if "retired-" in str(path) or "staged-" in str(arguments):  # a name of this driver's own
                return call(path, *arguments, **options)
            moved_out = "retired-" in str(arguments)
            assert name == "replace" or Path(path).suffix == ".tmp", f"{path}: by then another's file may be called so"
            changes.append(("retire" if moved_out else name, Path(path).name))
            assert looked[0] or not Path(path).exists(), changes
            looked[0] &= not Path(path).exists()
            return call(path, *arguments, **options)

        return change

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(os, name, guarded(name, getattr(os, name)))
        patched.setattr("ties_dist.storage.local_place.shutil.rmtree", lambda *_, **__: None)
        model.publish(folder, lambda: looked.__setitem__(0, True))
    assert [what for what, _ in changes].count("replace") == new + (new > 1) + 2 + len(model.companions)


@pytest.mark.parametrize("name", [INDEX_NAME, "model-00001-of-00002.safetensors", "merges.txt"])
def test_a_driver_stopped_in_the_middle_of_a_removal_harms_nobody_who_took_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused between its look at the lock and the system call's effect, until the successor has published."""
    folder, model, versions = setting(tmp_path, 2, 2)
    real, lost = os.replace, [False]

    def late(source: str | Path, target: str | Path) -> None:
        if Path(source) == path_of(folder) / name and not lost[0]:
            lost[0] = True
            folder.fence()  # as `claim` does
            model.publish(folder)
        real(source, target)

    def check() -> None:
        if lost[0]:
            raise LockedError("this run lost OUT")

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(LockedError, match="lost OUT"):
        model.publish(folder, check)
    assert lost[0]
    assert version_of(path_of(folder)) == versions["new"]
    assert folder.finished() is not None


def test_a_merge_whose_files_were_removed_since_may_be_merged_again_unasked(tmp_path: Path) -> None:
    folder, model, _ = setting(tmp_path, 3, 2)
    model.publish(folder)
    shard = path_of(folder) / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    assert folder.holds() == "this merge, with files missing"
    shard.write_bytes(content[:-1])
    assert folder.holds() == "model files that no finished merge left"
    shard.unlink()
    (path_of(folder) / "mine.safetensors").touch()
    assert folder.holds() == "model files that no finished merge left"


def test_nothing_of_an_abandoned_half_published_model_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, died = 0, [True]
    while died:
        step += 1
        root = tmp_path / str(step)
        root.mkdir()
        folder, model, versions = setting(root, 2, 3)
        with suppressed() as died, killed_at(step, monkeypatch):
            model.publish(folder)
        last = Model("last", 1, ["notes.txt"])
        versions = {**versions, "last": last.version(root)}
        last.publish(last.merge(path_of(folder)))  # as after --fresh --overwrite
        assert standing(path_of(folder), versions) == "last"
        left = version_of(path_of(folder)).keys() - versions["last"].keys()
        assert {name for name in left if not name.endswith(".tmp")} == set()


def test_publishing_without_all_shards_touches_nothing(tmp_path: Path) -> None:
    folder, model, versions = setting(tmp_path, 2, 3)
    (path_of(folder) / folder.partial("model-00002-of-00003.safetensors")).unlink()
    with pytest.raises(OutputError, match=r"model-00002-of-00003\.safetensors vanished from"):
        model.publish(folder)
    assert standing(path_of(folder), versions) == "old"


@pytest.mark.parametrize("damage", ["missing", "short", "without its index", "report", "manifest", "{}", "[]"])
def test_a_damaged_model_does_not_count_as_finished(damage: str, tmp_path: Path) -> None:
    model = Model("new", 3, [])
    folder = model.merge(tmp_path / "out")
    model.publish(folder)
    shard = path_of(folder) / "model-00002-of-00003.safetensors"
    match damage:
        case "missing":
            shard.unlink()
        case "short":
            os.truncate(shard, 4097)
        case "without its index":
            (path_of(folder) / "model.safetensors.index.json").unlink()
        case "report" | "manifest":
            (path_of(folder) / ".ties_dist" / f"{damage}.json").unlink()
        case other:
            (path_of(folder) / ".ties_dist" / "manifest.json").write_text(other)
    assert folder.finished() is None


def test_where_a_shard_is_depends_on_whether_publishing_began(tmp_path: Path) -> None:
    folder, model, _ = setting(tmp_path, 3, 3)
    shard = model.layout.shards[0]
    part = folder.partial(shard.name)
    assert folder.part(shard, publishing=False) == folder.part(shard, publishing=True) == part
    (path_of(folder) / part).unlink()
    assert folder.part(shard, publishing=False) is None  # what has the final name is the old model's
    assert folder.part(shard, publishing=True) == shard.name
    os.truncate(path_of(folder) / shard.name, shard.size - 1)
    assert folder.part(shard, publishing=True) is None


# -- whole merges ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "older_shards"),
    [({"trim_scope": "tensor", "tie_policy": "exact_k"}, 1), ({}, 2)],
    ids=["tensor", "model"],
)
def test_a_merge_that_dies_at_any_step_is_finished_by_the_same_command(
    options: dict[str, str], older_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = late_majority(9 * 64 * 8)
    recipe = write_job(tmp_path / "new", models, shards=3, options=options)
    older = write_job(tmp_path / "old", models, shards=older_shards, density=0.9)
    versions, digests = {}, {}
    for name, source in (("old", older), ("new", recipe)):
        digests[name] = ties_dist.merge(source, tmp_path / name / "out").output_digest
        versions[name] = version_of(tmp_path / name / "out")
    monkeypatch.setattr("ties_dist.engine.passes.COMMIT_SECONDS", 0.0)

    step, died, resumed = 0, [True], 0
    out = tmp_path / "new" / "here"
    while died:
        step += 1
        out.mkdir()
        ties_dist.merge(older, out)
        with suppressed() as died, killed_at(step, monkeypatch):
            ties_dist.merge(recipe, out, overwrite=True)
        shown = standing(out, versions)
        publishing = any('"publishing"' in p.read_text() for p in out.glob(".ties_dist/*/journal-*"))
        assert shown == "old" or (shown is None and publishing) or shown == "new"
        (out / ".ties_dist" / "lock").unlink(missing_ok=True)  # its process, this one, is dead by agreement
        report = ties_dist.merge(recipe, out, overwrite=True)
        resumed += report.resumed_units
        assert report.output_digest == digests["new"]
        assert version_of(out) == versions["new"]
        assert sorted(p.name for p in (out / ".ties_dist").iterdir() if p.is_dir()) == []
        out.rename(tmp_path / "new" / f"done-{step}")
    assert step > 60
    assert resumed > 0


# -- what is replaced, and what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vocab.txt", "manifest.json", "report.json", INDEX_NAME])
def test_the_old_model_stays_where_a_file_of_the_new_one_cannot_be_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, versions = setting(tmp_path, 2, 3)
    before = version_of(path_of(folder))
    contents = {**model.companions, "report.json": report_of("new").to_json().encode()}
    real = LocalPlace.put

    def full(self: LocalPlace, target: str, content: bytes, *rest: object, **how: object) -> None:
        wanted = contents.get(name)
        if content == wanted or (
            wanted is None and (b'"weight_map"' if name == INDEX_NAME else b'"shards"') in content
        ):
            raise OutputError("the disk is full")
        real(self, target, content, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalPlace, "put", full)
    with pytest.raises(OutputError, match="the disk is full"):
        model.publish(folder)
    assert version_of(path_of(folder)) == before
    assert standing(path_of(folder), versions) == "old"


@pytest.mark.parametrize("stray", ["other.safetensors", "consolidated.safetensors", "adapter_config.json",
                                   "x.safetensors.index.json"])  # fmt: skip
def test_weights_of_nobody_are_kept_and_nothing_is_published_beside_them(stray: str, tmp_path: Path) -> None:
    folder, model, versions = setting(tmp_path, 2, 3)
    (path_of(folder) / stray).write_text("mine")
    (path_of(folder) / "notes.txt").write_text("no loader reads this")
    with pytest.raises(OutputError, match=rf"holds {stray}, of no merge of ties_dist, .*Move it away"):
        model.publish(folder)
    assert (path_of(folder) / stray).read_text() == "mine"
    (path_of(folder) / stray).rename(tmp_path / "away")
    model.publish(folder)
    assert standing(path_of(folder), versions) == "new"
    assert (path_of(folder) / "notes.txt").exists()


def test_a_model_without_its_manifest_goes_by_its_index(tmp_path: Path) -> None:
    folder, model, versions = setting(tmp_path, 3, 1)
    (path_of(folder) / ".ties_dist" / "manifest.json").write_text("{")
    (path_of(folder) / "merges.txt").unlink()  # of the old model: which nobody can tell any more
    model.publish(folder)
    assert standing(path_of(folder), versions) == "new"
