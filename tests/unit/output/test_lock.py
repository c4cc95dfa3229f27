"""One driver per OUT: who is replaced at once, who after a while, who never; and what the replaced one is told."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ties_dist.errors import LockedError, OutputError, StoppedError
from ties_dist.output import holder as holder_module
from ties_dist.output.holder import Holder
from ties_dist.output.lock import RunLock
from ties_dist.storage import local_place
from ties_dist.storage.local_place import LocalPlace

LEASE_SECONDS = 0.4
ELSEWHERE = {"host": "node-7", "boot": "another", "namespace": "pid:[1]"}


def held_by(folder: Path, holder: Holder, lease: str | None = "0") -> Path:
    """Leave a lock behind; returns its lease."""
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps(asdict(holder)))
    path = folder / f"lease-{holder.token}"
    if lease is not None:
        path.write_text(lease)
    return path


@contextmanager
def beating(lease: Path, seconds: float = 0.05) -> Iterator[None]:
    """Somebody writes a lease again and again."""
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(seconds):
            beats += 1
            lease.write_text(str(beats))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out" / ".ties_dist"


@pytest.fixture
def open_lock(folder: Path) -> Iterator[Callable[..., RunLock]]:
    opened: list[RunLock] = []

    def make(lease_seconds: float = LEASE_SECONDS, **changes: object) -> RunLock:
        holder = replace(Holder.myself(), **changes)  # type: ignore[arg-type]
        opened.append(RunLock(LocalPlace(folder.parent), lease_seconds=lease_seconds, me=holder))
        return opened[-1]

    yield make
    for each in opened:
        each.release()


OpenLock = Callable[..., RunLock]


# -- holding and releasing ---------------------------------------------------------------------------------------------


def test_a_lock_names_its_holder(folder: Path, open_lock: OpenLock) -> None:
    held = open_lock()
    held.acquire()
    found = json.loads((folder / "lock").read_text())
    assert (found["host"], found["pid"], found["token"]) == (socket.gethostname(), os.getpid(), held.token)
    assert held.holder() == held.me
    assert str(held.holder()).startswith(f"process {os.getpid()} on {socket.gethostname()}, since 20")
    held.check()


def test_a_released_lock_leaves_nothing_that_names_anyone(folder: Path, open_lock: OpenLock) -> None:
    held = open_lock()
    held.acquire()
    held.release()
    assert os.listdir(folder) == ["lock.guard"]
    open_lock().acquire()


def test_the_lease_moves_while_the_lock_is_held(folder: Path, open_lock: OpenLock) -> None:
    held = open_lock()
    held.acquire()
    lease = folder / f"lease-{held.token}"
    before = lease.read_text()
    deadline = time.monotonic() + 5
    while lease.read_text() in (before, "") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads(lease.read_text())["beats"] > json.loads(before)["beats"]


def test_a_release_is_quiet_where_the_folder_is_gone(folder: Path, open_lock: OpenLock) -> None:
    held = open_lock()
    held.acquire()
    folder.rename(folder.with_name("moved"))
    held.release()


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write .*Not a directory"):
        RunLock(LocalPlace(tmp_path / "out")).acquire()


# -- a holder on this machine ------------------------------------------------------------------------------------------


def test_a_living_holder_is_named_and_never_replaced(folder: Path, open_lock: OpenLock) -> None:
    open_lock().acquire()
    began = time.monotonic()
    with pytest.raises(LockedError, match=rf"process {os.getpid()} on .*`--wait` does"):
        open_lock(lease_seconds=60).acquire()
    assert time.monotonic() - began < 5  # at once: the process is seen to live
    assert len(list(folder.glob("lease-*"))) == 1


def test_a_living_holder_keeps_its_lock_though_its_lease_stands_still(folder: Path, open_lock: OpenLock) -> None:
    folder.mkdir(parents=True)
    holder = Holder.myself()
    held_by(folder, holder)
    with pytest.raises(LockedError, match="another run is merging"):
        open_lock(lease_seconds=0.01).acquire()
    assert open_lock().holder() == holder


def ended_process() -> subprocess.Popen[bytes]:
    """A process that has ended; a zombie until it is waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def test_a_holder_whose_process_is_gone_is_replaced_at_once(folder: Path, open_lock: OpenLock) -> None:
    process = ended_process()
    process.wait()
    folder.mkdir(parents=True)
    lease = held_by(folder, replace(Holder.myself(), pid=process.pid))
    taker = open_lock(lease_seconds=60)
    began = time.monotonic()
    taker.acquire()
    assert time.monotonic() - began < 5
    assert taker.holder() == taker.me
    assert not lease.exists()
    assert not taker.doubts  # the dead write nothing


def test_a_dead_holder_for_whom_others_wrote_is_replaced_at_once_and_its_files_with_it(
    folder: Path, open_lock: OpenLock
) -> None:
    process = ended_process()
    process.wait()
    folder.mkdir(parents=True)
    held_by(folder, replace(Holder.myself(elsewhere=True), pid=process.pid))
    taker = open_lock(lease_seconds=60)
    taker.acquire()
    assert taker.holder() == taker.me
    assert taker.doubts  # its workers may live, on whatever machine


def test_a_killed_holder_that_nobody_has_reaped_is_replaced_at_once(folder: Path, open_lock: OpenLock) -> None:
    process = ended_process()
    try:
        folder.mkdir(parents=True)
        held_by(folder, replace(Holder.myself(), pid=process.pid, started=holder_module._started(os.getpid())))
        taker = open_lock(lease_seconds=60)
        taker.acquire()
        assert taker.holder() == taker.me
    finally:
        process.wait()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls exit(2) by its number")
def test_a_process_whose_first_thread_has_ended_is_alive_while_another_runs() -> None:
    # A killed process is a zombie already while one of its threads ends a write.
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    stat = Path(f"/proc/{process.pid}/stat")
    try:
        while " (python" in stat.read_text() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        mine = Holder.myself()
        holder = replace(mine, pid=process.pid, started=float(stat.read_text().rpartition(")")[2].split()[19]))
        assert not holder.is_dead(mine)
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert holder.is_dead(mine)
    process.wait()


def test_a_recycled_process_id_does_not_keep_a_dead_holder_alive(folder: Path, open_lock: OpenLock) -> None:
    folder.mkdir(parents=True)
    mine = Holder.myself()
    held_by(folder, replace(mine, started=mine.started - 1.0))  # an earlier process with the id of this one
    taker = open_lock(lease_seconds=60)
    taker.acquire()
    assert taker.holder() == taker.me


def test_an_adjusted_clock_does_not_make_a_living_holder_look_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder.myself()
    monkeypatch.setattr(holder_module.psutil.Process, "create_time", lambda self: time.time() + 3600)
    assert not holder.is_dead(Holder.myself())


def test_a_process_of_another_user_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(holder_module, "_started", lambda pid: None)  # hidden, as with hidepid=2
    assert not Holder(**asdict(HOLDER)).is_dead(HOLDER)


HOLDER = Holder(token="t", host="h", boot="b", namespace="n", pid=1, started=1.0, since="now")


@pytest.mark.parametrize("field", ["host", "boot", "namespace"])
def test_a_process_id_of_elsewhere_proves_nothing(field: str) -> None:
    # The boot too: cloned machines share their names, so another boot need not be an earlier one of this machine.
    dead = replace(Holder.myself(), pid=2**22 + 1)  # larger than any process id
    assert dead.is_dead(Holder.myself())
    assert not replace(dead, **{field: "another"}).is_dead(Holder.myself())  # type: ignore[arg-type]


def test_a_damaged_lock_is_nobodys(folder: Path, open_lock: OpenLock) -> None:
    folder.mkdir(parents=True)
    for content in ("", "{", "[]", '{"token": 1}'):
        (folder / "lock").write_text(content)
        taker = open_lock()
        taker.acquire()
        assert taker.holder() == taker.me
        taker.release()


# -- a holder elsewhere ------------------------------------------------------------------------------------------------


def test_a_lease_that_stands_still_for_lease_seconds_by_our_own_clock_is_taken_over(
    folder: Path, open_lock: OpenLock
) -> None:
    folder.mkdir(parents=True)
    lease = held_by(folder, replace(Holder.myself(), **ELSEWHERE))
    os.utime(lease, (0, 0))  # its own time says nothing: clocks differ
    taker, began = open_lock(), time.monotonic()
    taker.acquire()
    assert LEASE_SECONDS <= time.monotonic() - began < 10 * LEASE_SECONDS
    assert taker.holder() == taker.me
    assert not lease.exists()
    assert taker.doubts  # it may be alive, and write: its files have to be replaced


def test_a_lease_that_is_missing_stands_still(folder: Path, open_lock: OpenLock) -> None:
    folder.mkdir(parents=True)
    held_by(folder, replace(Holder.myself(), **ELSEWHERE), lease=None)
    open_lock().acquire()


def test_a_lease_that_moves_is_a_living_holder(folder: Path, open_lock: OpenLock) -> None:
    folder.mkdir(parents=True)
    holder = replace(Holder.myself(), **ELSEWHERE)
    lease, taker = held_by(folder, holder), open_lock(lease_seconds=5)
    began = time.monotonic()
    with beating(lease), pytest.raises(LockedError, match=r"process \d+ on node-7, since .*`--wait` does"):
        taker.acquire()
    assert time.monotonic() - began < 5  # as soon as it moved
    assert taker.holder() == holder
    assert lease.exists()
    assert not (folder / f"lease-{taker.token}").exists()


def test_one_who_waits_takes_over_when_the_lease_stops_moving(folder: Path, open_lock: OpenLock) -> None:
    folder.mkdir(parents=True)
    lease, taker = held_by(folder, replace(Holder.myself(), **ELSEWHERE)), open_lock()
    done = threading.Event()

    def wait() -> None:
        taker.acquire(wait=True)
        done.set()

    thread = threading.Thread(target=wait)
    with beating(lease):
        thread.start()
        assert not done.wait(3 * LEASE_SECONDS)
    thread.join(20 * LEASE_SECONDS)
    assert done.is_set()
    assert taker.holder() == taker.me


def test_one_who_waits_gets_a_released_lock(open_lock: OpenLock) -> None:
    first, second = open_lock(), open_lock()
    first.acquire()
    threading.Timer(0.2, first.release).start()
    second.acquire(wait=True)
    assert second.holder() == second.me


def test_one_who_waits_can_be_stopped(folder: Path, open_lock: OpenLock) -> None:
    first, second, stop = open_lock(), open_lock(), threading.Event()
    first.acquire()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(StoppedError, match="stopped while waiting for the other run"):
        second.acquire(wait=True, stop=stop)
    assert first.holder() == first.me
    assert not (folder / f"lease-{second.token}").exists()


# -- who was replaced --------------------------------------------------------------------------------------------------


def test_a_holder_that_was_paused_and_replaced_is_told_at_its_next_check(folder: Path, open_lock: OpenLock) -> None:
    paused = open_lock(**ELSEWHERE)
    paused.acquire()
    paused._stop.set()  # its lease stands still
    taker = open_lock()
    taker.acquire()
    with pytest.raises(
        LockedError, match=rf"this run lost .* to process {os.getpid()} on .*goes on with the same work"
    ):
        paused.check()
    paused.release()
    assert taker.holder() == taker.me  # a lock that is not one's own is left alone
    taker.check()


def test_a_check_of_a_lock_that_somebody_removed_raises(folder: Path, open_lock: OpenLock) -> None:
    held = open_lock()
    held.acquire()
    (folder / "lock").unlink()
    with pytest.raises(LockedError, match=r"lost .* to another run"):
        held.check()


# -- two at once -------------------------------------------------------------------------------------------------------


def _take(folder: str, together: object, outcome: object) -> None:
    """In a process of its own: take the lock with the others, hold it until told to end."""
    held = RunLock(LocalPlace(Path(folder).parent), lease_seconds=30)
    together.wait()  # type: ignore[attr-defined]
    try:
        held.acquire()
        outcome.put(("took", os.getpid()))  # type: ignore[attr-defined]
        signal.pause()
    except LockedError as error:
        outcome.put((str(error), os.getpid()))  # type: ignore[attr-defined]


def test_of_several_processes_that_take_a_dead_holders_lock_at_once_one_wins(folder: Path) -> None:
    process = ended_process()
    process.wait()
    folder.mkdir(parents=True)
    held_by(folder, replace(Holder.myself(), pid=process.pid))
    context = multiprocessing.get_context("forkserver")
    together, outcome = context.Barrier(4), context.Queue()
    takers = [context.Process(target=_take, args=(str(folder), together, outcome)) for _ in range(4)]
    try:
        for taker in takers:
            taker.start()
        outcomes = [outcome.get(timeout=60) for _ in takers]
        winners = [pid for what, pid in outcomes if what == "took"]
        assert len(winners) == 1
        assert all(f"process {winners[0]} on" in what for what, _ in outcomes if what != "took")
        os.kill(winners[0], signal.SIGKILL)
        next(t for t in takers if t.pid == winners[0]).join()
        last = RunLock(LocalPlace(folder.parent))
        last.acquire()  # a killed winner is replaced at once, too
        last.release()
    finally:
        for taker in takers:
            taker.kill()
            taker.join()
        outcome.close()


@pytest.mark.parametrize("guarded", [True, False], ids=["flock", "no_flock"])
def test_of_several_threads_that_take_an_expired_lock_at_once_one_wins(
    guarded: bool, folder: Path, open_lock: OpenLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not guarded:  # a file system without flock

        def refuse(file: object, how: int) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(local_place.fcntl, "flock", refuse)
    folder.mkdir(parents=True)
    held_by(folder, replace(Holder.myself(), **ELSEWHERE))
    takers, won, together = [open_lock() for _ in range(4)], [], threading.Barrier(4)

    def take(taker: RunLock) -> None:
        together.wait()
        with suppress(LockedError):
            taker.acquire()
            won.append(taker)

    threads = [threading.Thread(target=take, args=(taker,)) for taker in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holder = takers[0].holder()
    standing = [taker for taker in won if taker.me == holder]
    assert len(standing) == 1
    standing[0].check()
    for taker in won:
        if taker is not standing[0]:  # without flock two may believe they won, until their first check
            assert not guarded
            with pytest.raises(LockedError, match="this run lost"):
                taker.check()


def test_a_process_that_was_stopped_inside_the_guard_holds_nobody_up_for_ever(
    folder: Path, open_lock: OpenLock
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock.guard", "wb") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        lock = open_lock(lease_seconds=0.3)
        began = time.monotonic()
        lock.acquire()
        assert 0.3 <= time.monotonic() - began < 5
    lock.check()


# -- locks that nobody of us wrote -------------------------------------------------------------------------------------


def a_dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_token_that_leaves_the_folder_removes_nothing(folder: Path, open_lock: OpenLock) -> None:
    victim = folder.parent.parent / "victim"
    victim.write_text("mine")
    (folder / "lease-x").mkdir(parents=True)
    named = replace(Holder.myself(), pid=a_dead_process(), token="x/../../../victim")
    (folder / "lock").write_text(json.dumps(asdict(named)))
    assert (folder / f"lease-{named.token}").resolve() == victim
    held = open_lock()
    held.acquire()
    held.check()
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("pid", ["text", 0, -1, 1 << 31, 1 << 70, 1.5, None])
def test_a_lock_whose_process_is_no_number_of_one_holds_nobody(pid: object, folder: Path, open_lock: OpenLock) -> None:
    folder.mkdir(parents=True)
    (folder / "lock").write_text(json.dumps({**asdict(Holder.myself()), "pid": pid}))
    held = open_lock()
    held.acquire()
    assert held.holder() == held.me
