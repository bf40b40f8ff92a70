"""Second moments by several jobs: merged they have the bits of one, and what does not go together is named."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from second_moments import TEXT, at, interrupt_after, passes, rewritten

import cakeflow.core.moment_parts as module
from cakeflow import Statistics
from cakeflow.core.moment_parts import Part, SumFile, collect_part, merge
from cakeflow.core.moments import combine, sums_of
from cakeflow.errors import ConfigError, LockedError, StatisticsError
from cakeflow.storage.locks import locked

SITES = at(1, 3)


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return Statistics(path, tokens=500, window=20, batch_tokens=40)  # 13 blocks, a point of the curve behind the 7th


@pytest.fixture
def corpus(lm, settings):
    return settings.corpus(lm, SITES)


@pytest.fixture
def parts(corpus, tmp_path):
    """Collects all of several parts, and returns their folders."""

    def collect(count, name="part", corpus=corpus):
        folders = [tmp_path / f"{name}-{number}" for number in range(1, count + 1)]
        for number, folder in enumerate(folders, 1):
            collect_part(corpus, Part(number, count), folder)
        return folders

    return collect


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("layer-*.safetensors")}


def tensors(moments):
    return [(c.moment, *c.eigen, c.curve) for c in moments.values()]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 13])
def test_parts_merged_in_any_order_have_the_bits_of_one_job(tiny, settings, parts, cache, tmp_path, count):
    one = settings.collect(tiny, SITES, tmp_path / "one")
    home = merge(parts(count, corpus=settings.corpus(tiny, SITES))[::-1])
    assert home.parent == cache / "statistics"
    assert contents(home) == contents(next((tmp_path / "one").iterdir()))
    count_passes = passes(tiny)
    merged = settings.collect(tiny, SITES)  # finds them
    assert not count_passes
    for ours, theirs in zip(tensors(merged), tensors(one), strict=True):
        assert all(torch.equal(each, other) for each, other in zip(ours, theirs, strict=True))
    assert len(ours[-1]) >= 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_blocks_dealt_to_ranks_in_turn_have_the_bits_of_one(corpus, ranks):
    whole = sums_of(corpus, range(len(corpus.plan)))
    dealt = combine(sums_of(corpus, range(rank, len(corpus.plan), ranks)) for rank in reversed(range(ranks)))
    assert dealt.keys() == whole.keys() == corpus.plan.widths.keys()
    for label, each in whole.items():
        assert torch.equal(dealt[label].words, each.words)


def test_a_part_that_was_interrupted_goes_on_to_the_same_bits(lm, corpus, parts, tmp_path, monkeypatch):
    expected = parts(2)
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    broken = tmp_path / "broken"
    for blocks in (2, 3, 1):  # the part has six
        handle = interrupt_after(lm, blocks, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            collect_part(corpus, Part(1, 2), broken)
        handle.remove()
        assert [path.name for path in broken.glob("*.safetensors")] == ["partial.safetensors"]
        if blocks == 3:
            break
    count = passes(lm)
    (path,) = collect_part(corpus, Part(1, 2), broken)
    assert len(count) == 6 - 5
    assert torch.equal(SumFile.read(path).sums()["layer-1-mlp_out"].words, first_words(expected[0]))
    count.clear()
    assert collect_part(corpus, Part(1, 2), broken) == [path]
    assert not count


def first_words(folder):
    (file,) = [SumFile.read(path) for path in folder.glob("blocks-*")]
    return file.sums()["layer-1-mlp_out"].words


def test_a_missing_or_unfinished_part_is_named(lm, corpus, parts, tmp_path, monkeypatch):
    first, second, third = parts(3)
    missing = r"blocks 4 to 7 of 13 are in none of the folders: part 2/3 is missing or not finished"
    with pytest.raises(StatisticsError, match=missing):
        merge([first, third])
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    shutil.rmtree(second)
    handle = interrupt_after(lm, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        collect_part(corpus, Part(2, 3), second)
    handle.remove()
    with pytest.raises(StatisticsError, match=missing):
        merge([first, second, third])
    with pytest.raises(StatisticsError, match="no part is finished"):
        merge([second])
    with pytest.raises(StatisticsError, match=r"nothing has no sums; name the folders"):
        merge([first, tmp_path / "nothing"])


def test_blocks_that_two_folders_have_are_named(parts, tmp_path):
    first, second, third = parts(3)
    other = parts(2, "other")[0]
    with pytest.raises(StatisticsError, match=r"part-1/blocks-0-4.*other-1/blocks-0-6.* both have block 0; leave out"):
        merge([first, second, third, other])
    merge([first, first, second, third])  # one folder named twice


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 480}, "another model, type of weights or corpus"),
        ({"batch_tokens": 60}, r"blocks of 3 windows, not 2 \(statistics.batch_tokens\)"),
        ({"null_threshold": 0.1}, r"the threshold 0.1, not 0.02 \(statistics.null_threshold\)"),
    ],
)
def test_a_part_of_another_pass_is_named(lm, settings, parts, tmp_path, change, reason):
    first, second = parts(2)
    shutil.rmtree(second)
    collect_part(replace(settings, **change).corpus(lm, SITES), Part(2, 2), second)
    with pytest.raises(StatisticsError, match=rf"part-2/.* does not go with .*part-1/.*: it is of {reason}; leave it"):
        merge([first, second])


def test_a_part_of_other_layers_is_named(lm, settings, parts, tmp_path):
    first, second = parts(2)
    shutil.rmtree(second)
    collect_part(settings.corpus(lm, at(2, 3)), Part(2, 2), second)
    with pytest.raises(StatisticsError, match=r"it is of layer-2-mlp_out, layer-3-mlp_out, not layer-1-mlp_out"):
        merge([first, second])


def test_a_folder_with_another_part_is_refused(corpus, parts):
    first, _ = parts(2)
    with pytest.raises(StatisticsError, match=r"blocks-0-6.safetensors has sums of part 1/2 of this pass; .*--out"):
        collect_part(corpus, Part(2, 2), first)


@pytest.mark.parametrize("stage", ["merge", "collect"])
def test_every_flipped_byte_is_noticed_and_named(corpus, parts, stage):
    folders = parts(2)
    path = next(folders[0].glob("blocks-*"))
    whole = path.read_bytes()
    for place in [*range(0, 1400, 35), *range(1400, len(whole), len(whole) // 20)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(StatisticsError, match=rf"{re.escape(str(path))} is damaged.*; delete it, and run its part"):
            merge(folders) if stage == "merge" else collect_part(corpus, Part(1, 2), folders[0])


def test_sums_that_are_no_whole_numbers_are_refused(parts):
    folders = parts(1)
    for path in folders[0].glob("blocks-*"):
        file = SumFile.read(path)
        rewritten(path, **{"layer-1-mlp_out": torch.ones(193, 192)})
        with pytest.raises(StatisticsError, match="is damaged"):
            file.sums()


def test_two_jobs_do_not_write_one_folder(corpus, tmp_path):
    with locked(tmp_path / "a"), pytest.raises(LockedError):
        run_elsewhere(lambda: collect_part(corpus, Part(1, 2), tmp_path / "a"))


def run_elsewhere(work):
    """Run in another thread, as locks are a thread's."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "1/0", "a/b", "1/3/5", "-1/3", "1/3 "])
def test_a_part_is_one_of_so_many(text):
    with pytest.raises(ConfigError, match="part must be a number of so many, such as 1/3"):
        Part.parse(text)
    assert str(Part.parse("2/3")) == "2/3"


def test_more_parts_than_blocks_are_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="part 1/14: the corpus has 13 blocks"):
        collect_part(corpus, Part(1, 14), tmp_path)
