"""Work spread over ranks: results in order, errors on all of them, and nobody waits for somebody who is elsewhere."""

import os
import signal
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from many_ranks import in_ranks, start_gloo

from cakeflow import ranks
from cakeflow.errors import Fault, NumericalError, RanksError, RequestError


@dataclass(frozen=True)
class Pair:
    """A tensor and a text."""

    tensor: torch.Tensor
    text: str


def square(number):
    return Pair(torch.full((2,), number**2), f"{number}")


def results(count, work, folder):
    """What each rank returned, all of them without an error, working together."""

    def joined(rank):
        start_gloo()
        with ranks.together():
            return work(rank)

    ended = in_ranks(count, joined, folder)
    assert [each.status for each in ended] == [0] * count, [each.result for each in ended]
    return [each.result for each in ended]


def outcomes(count, work, folder):
    """The error of each rank, none of which came to its end."""

    def joined(rank):
        start_gloo()
        with ranks.together():
            work(rank)

    ended = in_ranks(count, joined, folder)
    assert all(each.status < 0 or (each.status == 1 and each.result is not None) for each in ended)
    return [each.result for each in ended]


def test_the_rank_that_holds_the_store_stays_until_the_others_are_done(tmp_path):
    held = []

    def work(rank):
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, rank == 0, timedelta(seconds=20))
        held.append(store)
        if rank:
            store.wait(["done"])
            time.sleep(0.3)
        store.set("done", "yes")

    assert [each.status for each in in_ranks(2, work, tmp_path)] == [0, 0]


def test_one_process_does_the_work_itself():
    seen = []
    with ranks.together():
        assert (ranks.world_size(), ranks.rank(), ranks.is_first()) == (1, 0, True)
        assert ranks.spread([1, 2], lambda part: seen.append(part) or part) == [1, 2] == seen
        assert ranks.on_first(lambda: seen) is seen
        assert list(ranks.in_rounds([1, 2])) == [[1], [2]]
        ranks.agree(1, "a number")
        ranks.barrier()
        assert ranks.rejoin(ValueError())


@pytest.mark.parametrize("count", [2, 3])
def test_parts_come_back_in_order_on_every_rank(count, tmp_path):
    def work(rank):
        numbers = [range(7), range(1), range(0)]
        spread = [[(p.tensor.tolist(), p.text) for p in ranks.spread(list(each), square)] for each in numbers]
        return spread, ranks.spread([0, 1, 2, 3], lambda _: os.getpid()), list(map(list, ranks.in_rounds(range(4))))

    (first, workers, rounds), *others = results(count, work, tmp_path)
    assert first == [[([n**2] * 2, str(n)) for n in range(size)] for size in (7, 1, 0)]
    assert all(other == (first, workers, rounds) for other in others)
    assert len(set(workers)) == count
    assert [part for each in rounds for part in each] == [0, 1, 2, 3]
    assert len(rounds[0]) == count


def test_a_part_and_what_rank_0_does_are_done_alone(tmp_path):
    def inner(part):
        return ranks.world_size(), ranks.spread([part, part], lambda each: each)

    def work(rank):
        answer = ranks.spread([5, 6, 7], inner), ranks.on_first(lambda: (ranks.world_size(), rank))
        with ranks.alone():
            return *answer, ranks.on_first(lambda: rank), ranks.rank()

    for rank, (parts, first, own, number) in enumerate(results(2, work, tmp_path)):
        assert parts == [(1, [5, 5]), (1, [6, 6]), (1, [7, 7])]
        assert (first, own, number) == ((1, 0), rank, rank)


def test_a_view_is_sent_without_the_rest_of_its_storage(tmp_path):
    def work(rank):
        rows = torch.arange(1000.0)
        return [each.untyped_storage().nbytes() for each in ranks.spread([0, 1], lambda part: rows[part : part + 2])]

    assert results(2, work, tmp_path) == [[8, 8]] * 2


def test_the_earliest_error_is_raised_on_every_rank(tmp_path):
    def run(part):
        if part >= 2:
            raise NumericalError(f"part {part}")
        return part

    errors = outcomes(3, lambda rank: ranks.spread(range(6), run), tmp_path)
    assert [(type(each), str(each)) for each in errors] == [(NumericalError, "part 2")] * 3


@pytest.mark.parametrize("error", [RequestError([Fault(3, "prompt", "x", "mend it")]), KeyboardInterrupt()], ids=str)
def test_errors_travel_whole(error, tmp_path):
    def fail():
        raise error

    for each in outcomes(2, lambda rank: ranks.on_first(fail), tmp_path):
        assert type(each) is type(error)
        assert str(each) == str(error)


def test_an_error_that_cannot_be_sent_comes_as_its_words(tmp_path):
    class LocalError(Exception):
        """A class that no other process can import."""

    def run(part):
        if part:
            raise LocalError("no way")

    def work(rank):
        try:
            ranks.spread([0, 1], run)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    first, second = outcomes(2, work, tmp_path)
    assert str(first) == "RanksError: LocalError: no way"
    assert str(second) == "LocalError: no way"


def test_a_difference_is_named_on_every_rank(tmp_path):
    def work(rank):
        ranks.agree({"a": 1, "b": [2]}, "nothing")
        ranks.agree({"a": 1, "b": rank % 2, "c": rank}, "the settings")

    for each in outcomes(3, work, tmp_path):
        assert isinstance(each, RanksError)
        assert "ranks differ in the settings: b is 0 on rank 0 and 1 on rank 1 (c differ too)" in str(each)


def test_ranks_that_went_apart_learn_it(tmp_path):
    def work(rank):
        if rank:
            ranks.barrier("the end")
        else:
            ranks.spread([1, 2, 3], square)

    for each in outcomes(2, work, tmp_path):
        assert isinstance(each, RanksError)
        assert "went apart: rank 0 at 3 parts, rank 1 at the end" in str(each)


def test_an_error_of_one_rank_is_heard_by_the_others_wherever_they_are(tmp_path):
    def work(rank):
        try:
            if rank == 1:
                raise NumericalError("alone")
            ranks.spread([1], square)
            ranks.barrier("never")
        except NumericalError as error:
            return str(error), ranks.rejoin(error), ranks.on_first(lambda: "on together")
        return None

    assert results(3, work, tmp_path) == [("alone", True, "on together")] * 3


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_missed_at_once(victim, tmp_path):
    def work(rank):
        ranks.barrier()
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(RanksError, match="lost another one at the end") as caught:
            ranks.barrier("the end")
        if not ranks.rejoin(caught.value):
            raise caught.value

    errors = outcomes(3, work, tmp_path)
    assert errors.pop(victim) is None
    for each in errors:
        assert isinstance(each, RanksError)
        assert "lost another one at the end" in str(each)


def test_a_folder_has_to_be_shared(tmp_path):
    def work(rank):
        ranks.require_shared(tmp_path / "new" / "common", "cache")
        ranks.require_shared(tmp_path / f"own-{rank}", "cache")

    for each in outcomes(2, work, tmp_path):
        assert isinstance(each, RanksError)
        assert "own-0 of rank 0 is not that of rank 1" in str(each)
    assert [*(tmp_path / "new" / "common").iterdir(), *(tmp_path / "own-0").iterdir()] == []


def test_warnings_come_from_the_first_rank_alone(tmp_path):
    def run(part):
        warnings.warn(f"part {part}", UserWarning, stacklevel=1)

    def work(rank):
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            with ranks.together():
                warnings.warn("all", UserWarning, stacklevel=1)
                ranks.spread([0, 1], run)
        return sorted(str(each.message) for each in records)

    assert results(2, work, tmp_path) == [["all", "part 0", "part 1"], []]
