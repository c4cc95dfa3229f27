"""Who gets what: affinity to shards, and what becomes of items that failed."""

from __future__ import annotations

from ties_dist.executors.board import Board


def board(*shards: int) -> Board:
    """Shards of so many items of 10 bytes each."""
    groups = [f"s{i}" for i, count in enumerate(shards) for _ in range(count)]
    return Board([10] * len(groups), groups)


def take(
    b: Board, worker: str, node: str = "n", *, idle: bool = True, want: float = 0, nodes: tuple[str, ...] = ("n",)
) -> tuple[int, ...]:
    return b.take(worker, node, idle=idle, want_bytes=want, nodes=nodes)


def test_workers_take_shards_of_their_own_and_the_heaviest_first() -> None:
    b = board(2, 5, 3)
    assert take(b, "one") == (2,)
    assert take(b, "two") == (7,)
    assert take(b, "three") == (0,)  # all of s0 is as much as half of what is left of s1
    assert take(b, "one") == (3,)


def test_a_worker_goes_through_its_shard_in_file_order_and_then_helps_where_most_is_left() -> None:
    b = board(3, 8)
    assert [take(b, "one", want=40), take(b, "two")] == [(3, 4, 5, 6), (0,)]
    assert [take(b, "two"), take(b, "two")] == [(1,), (2,)]
    assert take(b, "two") == (7,)


def test_an_order_has_at_least_one_item_and_no_more_bytes_than_wanted() -> None:
    b = board(5)
    assert take(b, "one", want=0) == (0,)
    assert take(b, "one", want=25) == (1, 2)
    assert take(b, "one", want=1000) == (3, 4)
    assert take(b, "one", want=1000) == ()


def test_what_was_put_back_comes_next_and_is_handed_out_once() -> None:
    b = board(4)
    taken = take(b, "one", want=20)
    b.put_back(taken)
    assert b.waiting_bytes == 40
    assert [take(b, "two") for _ in range(5)] == [(0,), (1,), (2,), (3,), ()]


def test_what_is_done_is_not_put_back() -> None:
    b = board(2)
    assert take(b, "one", want=20) == (0, 1)
    b.finish((0,))
    b.put_back((0, 1))
    assert take(b, "two", want=20) == (1,)
    assert b.unfinished == {1}


def test_what_failed_goes_out_alone_and_to_another_node() -> None:
    b = board(4)
    take(b, "one", "a", want=20)
    assert b.fail(1, "a") == 1
    assert take(b, "two", "a", want=20, nodes=("a", "b")) == (2, 3)
    assert take(b, "three", "b", want=20, nodes=("a", "b")) == (1,)


def test_what_failed_on_every_node_goes_out_all_the_same() -> None:
    b = board(1)
    take(b, "one", "a")
    b.fail(0, "a")
    assert take(b, "one", "a", nodes=("a",)) == (0,)


def test_what_failed_twice_gets_a_worker_for_itself() -> None:
    b = board(6)
    take(b, "one")
    b.fail(0, "x")
    take(b, "one")
    b.fail(0, "x")
    assert take(b, "one", idle=False) == ()  # it is kept free from now on
    assert take(b, "two", idle=True) == (1,)  # and one worker is enough
    assert take(b, "one", idle=False) == ()
    assert take(b, "one", idle=True) == (0,)
    assert take(b, "one", idle=False) == (2,)


def test_a_worker_kept_free_that_is_lost_blocks_nothing() -> None:
    b = board(2)
    take(b, "one")
    b.fail(0, "x")
    take(b, "one")
    b.fail(0, "x")
    assert take(b, "one", idle=False) == ()
    b.leave("one")
    assert take(b, "two", idle=True) == (0,)


def test_an_item_that_was_done_meanwhile_does_not_fail_any_more() -> None:
    b = board(1)
    take(b, "one")
    b.finish((0,))
    assert b.fail(0, "a") == 0
    assert take(b, "two") == ()
