"""Second moments: one pass equals direct outer products, is kept by content and goes on after an interrupt."""

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

import cakeflow.core.statistics as module
from cakeflow import Statistics
from cakeflow.core.statistics import points_of
from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.hashing import tensor_hashes

SENTENCE = "the sea was calm and every small boat came home before night while the old town slept under rain"
WORDS = SENTENCE.split()
TEXT = " ".join(WORDS[(7 * i + i * i // 3) % len(WORDS)] for i in range(400))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def settings(corpus):
    return Statistics(corpus, tokens=500, window=20, batch_tokens=60)


MLP = {layer: Site(layer, "mlp_out") for layer in range(4)}


def at(*layers):
    """The MLP output projections of layers."""
    return [MLP[layer] for layer in layers]


def passes(lm):
    """Count forward passes of the real model."""
    count = []
    lm.model.register_forward_pre_hook(lambda *_a: count.append(1))
    return count


@torch.no_grad()
def direct(lm, layer, tokens=500, window=20):
    ids = lm.tokenizer(TEXT)["input_ids"][:tokens]
    total, n = 0, 0
    for start in range(0, len(ids) - window + 1, window):
        with capture(lm, [Site(layer, "mlp_out")], side="in") as seen:
            lm.model(input_ids=torch.tensor([ids[start : start + window]]), use_cache=False)
        for key in seen[Site(layer, "mlp_out")][0]:
            total, n = total + torch.outer(key, key), n + 1
    return total / n


def test_one_pass_equals_direct_outer_products(tiny, settings):
    found = settings.collect(tiny, at(1, 3))
    assert list(found) == at(1, 3)
    for site, covariance in found.items():
        torch.testing.assert_close(covariance.moment, direct(tiny, site.layer), rtol=0, atol=1e-12)
        values, vectors = covariance.eigen
        torch.testing.assert_close((vectors * values) @ vectors.T, covariance.moment, rtol=0, atol=1e-10)
        assert covariance.weight == 15_000


def test_several_rows_at_once_change_nothing(lm, settings, corpus):
    one = settings.collect(lm, at(2))[MLP[2]].moment
    other = Statistics(corpus, 500, 20, batch_tokens=1).collect(lm, at(2), corpus.parent / "fresh")[MLP[2]].moment
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_second_call_reads_the_cache(lm, settings, cache):
    first = settings.collect(lm, at(1, 2))
    count = passes(lm)
    again = settings.collect(lm, at(1, 2))
    assert not count
    assert torch.equal(first[MLP[1]].moment, again[MLP[1]].moment)
    assert torch.equal(first[MLP[1]].eigen[1], again[MLP[1]].eigen[1])
    assert [path.name for path in sorted((cache / "statistics").rglob("*.safetensors"))] == [
        "layer-1-mlp_out.safetensors",
        "layer-2-mlp_out.safetensors",
    ]


def test_a_given_folder_is_used(lm, settings, tmp_path):
    settings.collect(lm, at(1), tmp_path / "here")
    assert len(list((tmp_path / "here").rglob("layer-1-mlp_out.safetensors"))) == 1


def test_the_weight_of_the_covariance_is_not_part_of_the_key(lm, corpus, settings):
    settings.collect(lm, at(1))
    count = passes(lm)
    assert Statistics(corpus, 500, 20, cov_weight=3.0).collect(lm, at(1))[MLP[1]].weight == 3
    assert not count


def change_weights(lm, corpus):
    with torch.no_grad():
        lm.weight(Site(0, "mlp_out"))[0, 0] += 1
    return Statistics(corpus, 500, 20)


def change_tokenizer(lm, corpus):
    lm.tokenizer.add_tokens(["calm and never"])
    return Statistics(corpus, 500, 20)


def change_text(lm, corpus):
    corpus.write_text("now " + TEXT)
    return Statistics(corpus, 500, 20)


def change_dtype(lm, corpus):
    lm.model.float()
    return Statistics(corpus, 500, 20)


@pytest.mark.parametrize(
    "change",
    [
        change_weights,
        change_tokenizer,
        change_text,
        change_dtype,
        lambda _lm, corpus: Statistics(corpus, 480, 20),
        lambda _lm, corpus: Statistics(corpus, 500, 25),
    ],
    ids=["weights", "tokenizer", "text", "dtype", "tokens", "window"],
)
def test_what_decides_the_values_decides_the_key(lm, corpus, settings, change):
    settings.collect(lm, at(1))
    other = change(lm, corpus)
    count = passes(lm)
    other.collect(lm, at(1))
    assert count


def test_weights_above_the_last_layer_do_not_matter(lm, settings):
    settings.collect(lm, at(1, 2))
    with torch.no_grad():
        lm.weight(Site(3, "mlp_out"))[0, 0] += 1
    count = passes(lm)
    settings.collect(lm, at(1, 2))
    assert not count


def interrupt_after(lm, passes_done, error):
    count = []

    def hook(*_args):
        count.append(1)
        if len(count) == passes_done + 1:
            raise error

    return lm.model.register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_goes_on_to_the_same_bits(tiny, settings, tmp_path, monkeypatch, error):
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    wanted = settings.collect(tiny, at(1, 3), tmp_path / "whole")
    count = passes(tiny)
    handle = interrupt_after(tiny, 5, error)
    with pytest.raises(error):
        settings.collect(tiny, at(1, 3), tmp_path / "broken")
    handle.remove()
    assert [path.name for path in (tmp_path / "broken").rglob("*.safetensors")] == ["partial.safetensors"]
    count.clear()
    found = settings.collect(tiny, at(1, 3), tmp_path / "broken")
    assert len(count) == -(-(500 // 20) // 3) - 5  # went on, did not start again
    for layer in (1, 3):
        assert torch.equal(found[MLP[layer]].moment, wanted[MLP[layer]].moment)
        assert torch.equal(found[MLP[layer]].eigen[0], wanted[MLP[layer]].eigen[0])
        assert torch.equal(found[MLP[layer]].curve, wanted[MLP[layer]].curve)
    assert not list((tmp_path / "broken").rglob("partial*"))


def test_a_partial_pass_over_other_layers_is_not_used(lm, settings, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    handle = interrupt_after(lm, 5, RuntimeError)
    with pytest.raises(RuntimeError):
        settings.collect(lm, at(1, 3))
    handle.remove()
    found = settings.collect(lm, at(2, 3))
    torch.testing.assert_close(found[MLP[3]].moment, direct(lm, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("early", "late"), [([3], [1, 3]), ([1, 3], [3])])
def test_layers_share_a_folder_only_where_their_values_agree(lm, settings, early, late):
    settings.collect(lm, at(*early))
    found = settings.collect(lm, at(*late))
    assert list(found) == at(*late)
    for layer in late:
        torch.testing.assert_close(found[MLP[layer]].moment, direct(lm, layer), rtol=0, atol=1e-12)


def test_the_curve_shows_how_second_moments_settle(lm, settings, cache):
    found = Statistics(settings.source, 500, 20, batch_tokens=20, null_threshold=0.01).collect(lm, at(1))[MLP[1]]
    path = next(cache.rglob("layer-1-mlp_out.safetensors"))
    before, half = torch.zeros_like(found.moment), direct(lm, 1, tokens=260)
    points = []
    for moment, tokens in ((half, 260), (found.moment, 500)):  # a quarter has fewer tokens than keys are wide
        null = int((torch.linalg.eigvalsh(moment) < 0.01).sum())
        points.append([tokens, float((moment - before).norm() / moment.norm()), 0.01, null])
        before = moment
    torch.testing.assert_close(found.curve, torch.tensor(points, dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.equal(settings.collect(lm, at(1))[MLP[1]].curve, found.curve)  # read from the cache
    assert set(load_file(path)) == {"moment", "eigenvalues", "eigenvectors", "curve"}
    assert [each.model_dump() for each in points_of(found)] == [
        dict(zip(("tokens", "change", "threshold", "null"), point, strict=True)) for point in found.curve.tolist()
    ]


def test_files_without_a_curve_are_read(lm, settings, cache):
    moment = settings.collect(lm, at(1))[MLP[1]].moment
    path = next(cache.rglob("layer-1-mlp_out.safetensors"))
    tensors = load_file(path)
    del tensors["curve"]
    write_tensors(path, tensors, tensor_hashes(tensors))
    found = settings.collect(lm, at(1))[MLP[1]]
    assert torch.equal(found.moment, moment)
    assert found.curve is None
    assert points_of(found) == []


def test_too_few_tokens_are_refused(lm, corpus):
    with pytest.raises(StatisticsError, match=r"has 100 tokens; at least 192 are needed for keys 192 wide"):
        Statistics(corpus, tokens=100, window=20).collect(lm, at(1))
    with pytest.raises(StatisticsError, match="at least 250"):
        Statistics(corpus, tokens=200, window=250).collect(lm, at(1))


def test_a_row_is_no_longer_than_the_models_positions(lm, corpus):
    assert Statistics(corpus, tokens=600, window=100_000).windows(lm, 1).shape == (2, lm.longest)


def test_values_that_are_not_finite_are_refused_and_not_cached(lm, settings, cache):
    with torch.no_grad():
        lm.model.transformer.h[1].mlp.c_fc.weight.fill_(float("inf"))
    with pytest.raises(StatisticsError, match="layer-1-mlp_out: the second moment is not finite"):
        settings.collect(lm, at(1))
    assert not list(cache.rglob("layer-*"))


def test_a_beginning_of_text_token_stands_before_every_window(lm, settings):
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert lm.tokenizer("")["input_ids"] == [0]
    windows = settings.windows(lm, 1)
    assert windows.shape == (500 // 19, 20)
    assert (windows[:, 0] == 0).all()
    assert not (windows[:, 1:] == 0).any()


def test_an_end_of_text_token_stands_nowhere(lm, settings):
    plain = settings.windows(lm, 1)
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert torch.equal(settings.windows(lm, 1), plain)


def test_a_corpus_with_a_token_beyond_the_embedding_is_refused(lm, settings):
    lm.tokenizer.add_tokens(["calm"])
    with pytest.raises(ConfigError, match="the corpus has the token 'calm', number 600"):
        settings.collect(lm, at(1))


def test_without_a_source_the_model_samples_its_own(lm):
    found = Statistics(tokens=400, window=16, batch_tokens=400).collect(lm, at(0))
    assert torch.isfinite(found[MLP[0]].moment).all()
    assert float(found[MLP[0]].moment.diagonal().min()) > 0


def stopped(lm, settings, folder, moment, monkeypatch):
    """Partial sums of layers 1 and 3, left by a pass that was stopped at the first or second eigenbasis."""
    finish, count = module._finish, []

    def stop(*args):
        count.append(1)
        if len(count) == moment:
            raise KeyboardInterrupt
        finish(*args)

    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    monkeypatch.setattr(module, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        settings.collect(lm, at(1, 3), folder)
    monkeypatch.setattr(module, "_finish", finish)
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


def rewritten(path, **changes):
    """Other tensors in a file, with the hashes that fit them."""
    tensors = {**load_file(path), **changes}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_tensors(path, tensors, tensor_hashes(tensors))


NAN = torch.full((192, 192), float("nan"), dtype=torch.float64)
PARTIAL_FAULTS = {
    "sum/layer-1-mlp_out is not finite": {"sum/layer-1-mlp_out": NAN},
    r"no sum/layer-1-mlp_out of shape \(192, 192\)": {"sum/layer-1-mlp_out": torch.ones(3, 3)},
    r"no earlier/layer-3-mlp_out of shape \(192, 192\)": {"earlier/layer-3-mlp_out": None},
    "sums of 1000000 windows out of 25": {"done": torch.tensor(10**6)},
    "sums of -3 windows out of 25": {"done": torch.tensor(-3)},
    "sums of 0 windows out of 25": {"done": torch.tensor(0)},
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


@pytest.mark.parametrize("name", ["moment", "eigenvalues", "eigenvectors", "curve"])
def test_statistics_that_are_not_finite_are_not_used(lm, settings, cache, name):
    settings.collect(lm, at(1))
    path = next(cache.rglob("layer-1-*"))
    rewritten(path, **{name: torch.full_like(load_file(path)[name], float("inf"))})
    with pytest.raises(StatisticsError, match=f"{name} is not finite"):
        settings.collect(lm, at(1))


def test_statistics_stay_as_they_were_read(lm, settings, cache):
    collected = settings.collect(lm, at(1))[MLP[1]]
    before = collected.moment.clone()
    next(cache.rglob("layer-1-*")).write_bytes(b"")
    assert torch.equal(collected.moment, before)


@pytest.mark.parametrize("name", ["tokens", "window", "cov_weight", "batch_tokens"])
def test_bad_settings(name):
    with pytest.raises(ConfigError, match=rf"statistics\.{name} must be above 0"):
        Statistics(**{name: 0})


def test_who_comes_second_waits_and_finds_what_the_first_one_collected(lm, settings, tmp_path, monkeypatch):
    """As two first runs of a sweep do; else each would write over the partial sums of the other."""
    usual, calls, other, second = module._collect, [], copy.deepcopy(lm), []

    def collect(*arguments):
        calls.append(arguments)
        thread = threading.Thread(target=lambda: second.append(settings.collect(other, at(1), tmp_path)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        usual(*arguments)
        threads.append(thread)

    threads = []
    monkeypatch.setattr(module, "_collect", collect)
    first = settings.collect(lm, at(1), tmp_path)
    threads[0].join()
    assert len(calls) == len(threads) == 1
    assert torch.equal(first[MLP[1]].moment, second[0][MLP[1]].moment)
