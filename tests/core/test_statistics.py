"""Second moments: one pass equals direct outer products, and is kept by content."""

import pytest
import torch
from safetensors.torch import load_file
from second_moments import MLP, TEXT, at, direct, passes, rewritten
from tokenizers.processors import TemplateProcessing

from cakeflow import Statistics
from cakeflow.core.statistics import points_of
from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.hashing import tensor_hashes


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def settings(corpus):
    return Statistics(corpus, tokens=500, window=20, batch_tokens=60)


def test_one_pass_equals_direct_outer_products(tiny, settings):
    result = settings.collect(tiny, at(1, 3))
    assert list(result) == at(1, 3)
    for site, covariance in result.items():
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
        lm.weight(MLP[0])[0, 0] += 1
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
        lm.weight(MLP[3])[0, 0] += 1
    count = passes(lm)
    settings.collect(lm, at(1, 2))
    assert not count


@pytest.mark.parametrize(("early", "late"), [([3], [1, 3]), ([1, 3], [3])])
def test_layers_share_a_folder_only_where_their_values_agree(lm, settings, early, late):
    settings.collect(lm, at(*early))
    result = settings.collect(lm, at(*late))
    assert list(result) == at(*late)
    for layer in late:
        torch.testing.assert_close(result[MLP[layer]].moment, direct(lm, layer), rtol=0, atol=1e-12)


def test_the_curve_shows_how_second_moments_settle(lm, settings, cache):
    result = Statistics(settings.source, 500, 20, batch_tokens=20, null_threshold=0.01).collect(lm, at(1))[MLP[1]]
    path = next(cache.rglob("layer-1-mlp_out.safetensors"))
    before, half = torch.zeros_like(result.moment), direct(lm, 1, tokens=260)
    points = []
    for moment, tokens in ((half, 260), (result.moment, 500)):  # a quarter has fewer tokens than keys are wide
        null = int((torch.linalg.eigvalsh(moment) < 0.01).sum())
        points.append([tokens, float((moment - before).norm() / moment.norm()), 0.01, null])
        before = moment
    torch.testing.assert_close(result.curve, torch.tensor(points, dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.equal(settings.collect(lm, at(1))[MLP[1]].curve, result.curve)  # read from the cache
    assert set(load_file(path)) == {"moment", "eigenvalues", "eigenvectors", "curve"}
    assert [each.model_dump() for each in points_of(result)] == [
        dict(zip(("tokens", "change", "threshold", "null"), point, strict=True)) for point in result.curve.tolist()
    ]


def test_files_without_a_curve_are_read(lm, settings, cache):
    moment = settings.collect(lm, at(1))[MLP[1]].moment
    path = next(cache.rglob("layer-1-mlp_out.safetensors"))
    tensors = load_file(path)
    del tensors["curve"]
    write_tensors(path, tensors, tensor_hashes(tensors))
    result = settings.collect(lm, at(1))[MLP[1]]
    assert torch.equal(result.moment, moment)
    assert result.curve is None
    assert points_of(result) == []


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
    result = Statistics(tokens=400, window=16, batch_tokens=400).collect(lm, at(0))
    assert torch.isfinite(result[MLP[0]].moment).all()
    assert float(result[MLP[0]].moment.diagonal().min()) > 0


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
