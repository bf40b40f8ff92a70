"""A pass over numbered blocks: exact, resumable, the same bits however it is parted."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from many_ranks import in_ranks, start_gloo
from second_moments import MLP, TEXT, at, direct, interrupt_after, passes, rewritten

import cakeflow.core.moments as module
import cakeflow.core.statistics as statistics
from cakeflow import Statistics, ranks
from cakeflow.errors import StatisticsError
from cakeflow.storage import tensor_hash


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return Statistics(path, tokens=500, window=20, batch_tokens=60)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_goes_on_to_the_same_bits(tiny, settings, tmp_path, monkeypatch, error):
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    expected = settings.collect(tiny, at(1, 3), tmp_path / "whole")
    count = passes(tiny)
    handle = interrupt_after(tiny, 5, error)
    with pytest.raises(error):
        settings.collect(tiny, at(1, 3), tmp_path / "broken")
    handle.remove()
    assert [path.name for path in (tmp_path / "broken").rglob("*.safetensors")] == ["partial.safetensors"]
    count.clear()
    result = settings.collect(tiny, at(1, 3), tmp_path / "broken")
    assert len(count) == -(-(500 // 20) // 3) - 5  # went on, did not start again
    for layer in (1, 3):
        assert torch.equal(result[MLP[layer]].moment, expected[MLP[layer]].moment)
        assert torch.equal(result[MLP[layer]].eigen[0], expected[MLP[layer]].eigen[0])
        assert torch.equal(result[MLP[layer]].curve, expected[MLP[layer]].curve)
    assert not list((tmp_path / "broken").rglob("partial*"))


def test_a_partial_pass_over_other_layers_is_not_used(lm, settings, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    handle = interrupt_after(lm, 5, RuntimeError)
    with pytest.raises(RuntimeError):
        settings.collect(lm, at(1, 3))
    handle.remove()
    result = settings.collect(lm, at(2, 3))
    torch.testing.assert_close(result[MLP[3]].moment, direct(lm, 3), rtol=0, atol=1e-12)


def stopped(lm, settings, folder, moment, monkeypatch):
    """Partial sums of layers 1 and 3, left by a pass that was stopped at the first or second eigenbasis."""
    finish, count = module.Course._finish, []

    def stop(*args):
        count.append(1)
        if len(count) == moment:
            raise KeyboardInterrupt
        finish(*args)

    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    monkeypatch.setattr(module.Course, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        settings.collect(lm, at(1, 3), folder)
    monkeypatch.setattr(module.Course, "_finish", finish)
    return next(folder.rglob("partial.safetensors"))


@pytest.mark.parametrize("moment", [1, 2])
def test_a_pass_that_was_stopped_before_its_eigenbases_goes_on_from_its_sums(
    tiny, settings, tmp_path, monkeypatch, moment
):
    expected = settings.collect(tiny, at(1, 3), tmp_path / "whole")
    partial = stopped(tiny, settings, tmp_path / "broken", moment, monkeypatch)
    assert len(list(partial.parent.glob("layer-*"))) == moment - 1
    count = passes(tiny)
    resumed = settings.collect(tiny, at(1, 3), tmp_path / "broken")
    assert not count
    assert not partial.exists()
    for site in at(1, 3):
        assert torch.equal(resumed[site].moment, expected[site].moment)
        assert torch.equal(resumed[site].curve, expected[site].curve)


PARTIAL_FAULTS = {
    "sum/layer-1-mlp_out holds no whole numbers": {"sum/layer-1-mlp_out": torch.ones(193, 192)},
    "earlier/layer-3-mlp_out is not finite": {"earlier/layer-3-mlp_out": torch.full((192, 192), float("nan"))},
    r"no sum/layer-1-mlp_out of shape \(193, 192\)": {"sum/layer-1-mlp_out": torch.ones(3, 3)},
    r"no earlier/layer-3-mlp_out of shape \(192, 192\)": {"earlier/layer-3-mlp_out": None},
    "sums of 1000000 blocks out of 9": {"done": torch.tensor(10**6)},
    "sums of -3 blocks out of 9": {"done": torch.tensor(-3)},
    "sums of 0 blocks out of 9": {"done": torch.tensor(0)},
    r"no done of shape \(\)": {"done": torch.ones(2)},
    r"no curve/layer-3-mlp_out of shape \(0, 4\)": {"curve/layer-3-mlp_out": None},
}


@pytest.mark.parametrize("fault", PARTIAL_FAULTS)
def test_partial_sums_that_cannot_be_are_named_and_stay(lm, settings, tmp_path, monkeypatch, fault):
    partial = stopped(lm, settings, tmp_path, 1, monkeypatch)
    rewritten(partial, **PARTIAL_FAULTS[fault])
    before = partial.read_bytes()
    with pytest.raises(StatisticsError, match=rf"partial.safetensors is damaged \({fault}\); delete it"):
        settings.collect(lm, at(1, 3), tmp_path)
    assert partial.read_bytes() == before


@pytest.mark.parametrize("file", ["layer-1-mlp_out", "partial"])
def test_every_flipped_byte_of_the_cache_is_noticed(lm, settings, tmp_path, monkeypatch, file):
    partial = stopped(lm, settings, tmp_path, 2, monkeypatch)
    path = partial.with_stem(file)
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(StatisticsError, match=rf"{file}.safetensors is damaged"):
            settings.collect(lm, at(1, 3), tmp_path)


def test_who_comes_second_waits_and_finds_what_the_first_one_collected(lm, settings, tmp_path, monkeypatch):
    """As two first runs of a sweep do; else each would write over the partial sums of the other."""
    usual, calls, other, second = statistics.pass_over, [], copy.deepcopy(lm), []

    def collect(*arguments):
        calls.append(arguments)
        thread = threading.Thread(target=lambda: second.append(settings.collect(other, at(1), tmp_path)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        usual(*arguments)
        threads.append(thread)

    threads = []
    monkeypatch.setattr(statistics, "pass_over", collect)
    first = settings.collect(lm, at(1), tmp_path)
    threads[0].join()
    assert len(calls) == len(threads) == 1
    assert torch.equal(first[MLP[1]].moment, second[0][MLP[1]].moment)


def test_a_partial_pass_over_other_blocks_is_not_used(lm, settings, tmp_path, monkeypatch):
    stopped(lm, settings, tmp_path / "broken", 1, monkeypatch)
    other = replace(settings, batch_tokens=40)
    expected = other.collect(lm, at(1, 3), tmp_path / "whole")
    resumed = other.collect(lm, at(1, 3), tmp_path / "broken")
    assert all(torch.equal(resumed[site].moment, expected[site].moment) for site in at(1, 3))


def test_keys_that_are_too_large_for_the_sums_are_named(lm, settings, cache):
    with torch.no_grad():
        lm.model.transformer.h[1].mlp.c_fc.weight.mul_(1e9)
    with pytest.raises(StatisticsError, match=r"layer-1-mlp_out: the second moment has a sum of squares of .* limit"):
        settings.collect(lm, at(1))
    assert not list(cache.rglob("layer-*"))


def plan(**changes):
    numbers = {"key": "0" * 64, "windows": 100, "rows": 7, "length": 20, "threshold": 0.02, "widths": {"a": 192}}
    return module.Plan(**{**numbers, **changes})


def test_more_blocks_than_the_sums_have_room_for_are_refused():
    plan(windows=2**17, rows=1).check()
    with pytest.raises(StatisticsError, match=r"of 131073 blocks, .*raise statistics.batch_tokens to at least 40"):
        plan(windows=2**17 + 1, rows=1).check()


@pytest.mark.parametrize("count", [1, 2, 3, 15])
def test_parts_of_a_plan_have_every_block_once_and_are_cut_at_the_points_of_the_curve(count):
    assert len(plan()) == 15
    assert plan().ends() == [2, 4, 8, 15]  # 13, 25 and 50 windows; fewer have fewer keys than they are wide
    assert plan(windows=2800).ends() == [50, 100, 200, 400]  # ranks meet there: not more, however many blocks
    parts = [plan().blocks(number, count) for number in range(1, count + 1)]
    assert [block for part in parts for block in part] == [*range(15)]
    stretches = [each for part in parts for each in plan().stretches(part)]
    assert {2, 4, 8, 15} <= {each.stop for each in stretches}
    assert [block for each in stretches for block in each] == [*range(15)]
    assert sum(plan().tokens(each.stop) - plan().tokens(each.start) for each in stretches) == 100 * 20


def contents(folder):
    """Name -> bytes of all files of second moments."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def on_ranks(count, settings, lm, folder, tmp_path):
    """Collect on so many ranks; each returns the hashes of its second moments, and the number of ranks."""

    def work(rank):
        start_gloo()
        with ranks.together():
            result = settings.collect(lm, at(1, 3), folder)
            return {site.layer: tensor_hash(each.moment) for site, each in result.items()}, ranks.world_size()

    return in_ranks(count, work, tmp_path)


def test_ranks_share_the_blocks_and_leave_the_same_files(lm, settings, tmp_path):
    one = settings.collect(lm, at(1, 3), tmp_path / "one")
    hashes = {site.layer: tensor_hash(each.moment) for site, each in one.items()}
    for count in (2, 3):
        ended = on_ranks(count, settings, lm, tmp_path / str(count), tmp_path)
        assert [(each.status, each.result) for each in ended] == [(0, (hashes, count))] * count
        assert contents(tmp_path / str(count)) == contents(tmp_path / "one")


def test_more_ranks_than_blocks(lm, settings, tmp_path):
    few = replace(settings, batch_tokens=10**6)
    one = few.collect(lm, at(1, 3), tmp_path / "one")
    assert len(few.corpus(lm, at(1, 3)).plan) < 3
    (first, *_) = on_ranks(3, few, lm, tmp_path / "three", tmp_path)
    assert first.result[0] == {site.layer: tensor_hash(each.moment) for site, each in one.items()}
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_ranks_go_on_with_what_one_process_left(lm, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    settings.collect(lm, at(1, 3), tmp_path / "whole")
    handle = interrupt_after(lm, 4, RuntimeError)
    with pytest.raises(RuntimeError):
        settings.collect(lm, at(1, 3), tmp_path / "broken")
    handle.remove()
    ended = on_ranks(2, settings, lm, tmp_path / "broken", tmp_path)
    assert [each.status for each in ended] == [0, 0]
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_an_overflow_on_any_rank_is_an_error_on_all(lm, settings, tmp_path, monkeypatch):
    gram = module.gram
    monkeypatch.setattr(module, "gram", lambda keys: gram(keys) * (float("inf") if ranks.rank() == 1 else 1.0))
    ended = on_ranks(2, settings, lm, tmp_path / "two", tmp_path)
    assert [each.status for each in ended] == [1, 1]
    assert all(isinstance(each.result, StatisticsError) for each in ended)
    assert all("the second moment is not finite" in str(each.result) for each in ended)
    assert not contents(tmp_path / "two")
