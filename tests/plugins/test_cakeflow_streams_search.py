"""Guards of the search: a rule on numbers made up for it and in a search, and norms against what the MLP writes."""

import warnings
from dataclasses import replace

import lightning as L
import pytest
import torch
from cakeflow_streams import NormFeedback, SolvedTimes, typical_norm
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Contexts, EditDataModule, EditRequest, GradientSearch, LocateThenEdit
from cakeflow.errors import ConfigError, TargetNormWarning
from cakeflow.forward import encode_batch
from cakeflow.models import Site
from cakeflow.models.hooks import capture
from cakeflow.targets import LossBelow, ObjectiveValue, TargetLikelihood
from cakeflow.testing import TargetSearchContract

CONTEXTS = Contexts.of(["{}", "I am. {}"])
INNER = GradientSearch(steps=4, lr=0.3)
LAYER = 3


# ---- the rule ----


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=5), st.integers(1, 4))
def test_hits_or_the_inner_rule(rows, times):
    loss, hits = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    nothing = torch.zeros(len(rows), 1, 4)
    value = ObjectiveValue(nothing, nothing, loss, hits > 0, {}, hits)
    low = [each < 0.3 for each in loss.tolist()]
    expected = [a or b >= times for a, b in zip(low, hits.tolist(), strict=True)]
    assert SolvedTimes(times, LossBelow(0.3)).met(value).tolist() == expected
    assert SolvedTimes(None, LossBelow(0.3)).met(value).tolist() == low


def test_it_stops_a_search_and_without_a_number_it_does_not(tiny):
    batch = encode_batch(tiny, [EditRequest("I live in {}", "Lyon", "the")], CONTEXTS)
    search = GradientSearch(steps=30, lr=0.05, clamp=9.0)
    stops = [SolvedTimes(1), SolvedTimes(3), SolvedTimes(None), SolvedTimes(99), LossBelow()]
    once, thrice, *neutral = (replace(search, stop=stop).search(tiny, batch, 4) for stop in stops)
    assert int(once.steps) + 2 == int(thrice.steps) < 30
    assert bool(once.converged)
    assert once.probability < thrice.probability
    assert all(torch.equal(each.values, neutral[-1].values) for each in neutral)


@pytest.mark.parametrize("times", [0, -1])
def test_bad_times(times):
    with pytest.raises(ConfigError, match=f"SolvedTimes.times must be above 0, got {times}"):
        SolvedTimes(times)
    with pytest.raises(ConfigError, match=r"TargetLikelihood.solved_in must be one of all, sampled"):
        TargetLikelihood(solved_in="bare")


# ---- one norm ----


@pytest.fixture
def batch(tiny, requests):
    return encode_batch(tiny, requests[:4], CONTEXTS)


def written(lm, batch):
    """Output of the MLP at each fact's token in the bare prompt, from full passes."""
    outputs = []
    for row, *_ in batch.rows:
        with capture(lm, [Site(LAYER, "mlp_out")]) as seen, torch.no_grad():
            lm(input_ids=torch.tensor([row.ids]))
        outputs.append(seen[Site(LAYER, "mlp_out")][0, row.fact])
    return torch.stack(outputs)


def searched(lm, batch, site):
    """The search by itself, what the MLP writes, and v*."""
    targets = replace(INNER, site=site).search(lm, batch, LAYER)
    output = written(lm, batch)
    return targets, output, output + targets.values - targets.initial


@pytest.mark.parametrize("site", ["block", "mlp_out"])
def test_values_have_the_norm_and_far_ones_stay_as_they_are(tiny, batch, site):
    """The formula of NAS: v* rho / |v*|, and the present output where ``|v*|`` is above 2 rho."""
    targets, output, value = searched(tiny, batch, site)
    length = value.norm(dim=1)
    norm = float(length.sort().values[2:].mean() / 2)  # the longest is above twice, the second one below
    search = NormFeedback(norm, replace(INNER, site=site))
    with pytest.warns(TargetNormWarning) as record:
        scaled = search.search(tiny, batch, LAYER)
    dropped = length > 2 * norm
    assert 0 < int(dropped.sum()) < len(batch)
    expected = torch.where(dropped[:, None], output, norm * value / length[:, None])
    torch.testing.assert_close(scaled.values - scaled.initial, expected - output, rtol=0, atol=1e-9)
    assert torch.equal(scaled.initial, targets.initial)
    assert torch.equal(scaled.values[dropped], targets.initial[dropped])
    texts = [str(each.message) for each in record if each.category is TargetNormWarning]
    assert any(batch.name(dropped.nonzero()[:, 0].tolist()) in text and "dropped" in text for text in texts)
    plain = INNER.measure(tiny, batch, LAYER)
    for name in ("loss", "probability"):
        torch.testing.assert_close(getattr(scaled, name)[dropped], getattr(plain, name)[dropped])
        assert torch.equal(getattr(scaled, name)[~dropped], getattr(targets, name)[~dropped])
    assert torch.equal(scaled.steps, targets.steps)


def test_a_value_of_that_norm_stays_and_nobody_is_warned(tiny, batch):
    one = batch.part([1])
    targets, _, value = searched(tiny, one, "block")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TargetNormWarning)
        scaled = NormFeedback(float(value.norm()), INNER).search(tiny, one, LAYER)
    torch.testing.assert_close(scaled.values, targets.values, rtol=0, atol=1e-12)


def test_facts_that_become_much_stronger_are_named(tiny, batch):
    _, _, value = searched(tiny, batch, "block")
    norm = 2.5 * float(value.norm(dim=1).max())
    with pytest.warns(TargetNormWarning, match="more than twice as strong") as record:
        NormFeedback(norm, INNER).search(tiny, batch, LAYER)
    assert batch.name(range(4)) in str(record[0].message)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_typical_norm_is_a_mean_without_the_largest(tiny, batch, size):
    length = searched(tiny, batch, "block")[2].norm(dim=1).sort().values
    assert typical_norm(INNER, tiny, batch, LAYER, 0.0, size) == pytest.approx(float(length.mean()), rel=1e-9)
    assert typical_norm(INNER, tiny, batch, LAYER, 0.25, size) == pytest.approx(float(length[:3].mean()), rel=1e-9)
    assert typical_norm(INNER, tiny, batch, LAYER, 0.24, size) == pytest.approx(float(length.mean()), rel=1e-9)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_norm(norm):
    with pytest.raises(ConfigError, match=r"NormFeedback: norm must be a number above 0.*typical_norm"):
        NormFeedback(norm)


def test_other_sites_are_refused(tiny, batch):
    with pytest.raises(ConfigError, match=r"targets\.site is 'attn_out'"):
        NormFeedback(1.0, replace(INNER, site="attn_out")).search(tiny, batch, LAYER)
    with pytest.raises(ConfigError, match="trim must lie"):
        typical_norm(INNER, tiny, batch, LAYER, 1.0)


def test_dropped_facts_are_logged_in_a_fit(lm, requests, quiet):
    _, _, value = searched(lm, encode_batch(lm, requests[:4], CONTEXTS), "block")
    norm = float(value.norm(dim=1).sort().values[2:].mean() / 2)
    width = lm.key_width(Site(LAYER, "mlp_out"))
    module = LocateThenEdit(
        lm,
        [LAYER],
        contexts=CONTEXTS,
        targets=NormFeedback(norm, INNER),
        moments={LAYER: 1e-5 * torch.eye(width, dtype=torch.float64)},
        max_relative_update=float("inf"),
    )
    trainer = L.Trainer(**quiet)
    with pytest.warns(TargetNormWarning, match="dropped"):
        trainer.fit(module, datamodule=EditDataModule(requests[:4], 4))
    assert float(trainer.callback_metrics["target/unchanged"]) == 0.25
    values = module.journal[0].values[LAYER]
    assert float(trainer.callback_metrics["target/norm"]) == pytest.approx(float(values.norm(dim=1).mean()))


@pytest.mark.filterwarnings("ignore::cakeflow.errors.TargetNormWarning")
class TestNormFeedback(TargetSearchContract):
    search = NormFeedback(0.5, GradientSearch(steps=3))
