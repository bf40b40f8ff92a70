"""Settings, grouping, resuming and refusals of a trace; its numbers are tested with the runs."""

import math

import pytest
import torch

from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward.tokens import Row
from cakeflow.models import Site
from cakeflow.tracing import CausalTrace, Fact, noise_of
from cakeflow.tracing.facts import trace_row
from cakeflow.tracing.runs import TraceRuns


@pytest.mark.parametrize("max_tokens", [1, 60, 100_000])
def test_grouping_changes_no_number(tiny, rows, tmp_path, max_tokens):
    settings = {"tokens": "all", "draws": 2, "noise": 0.3}
    one = CausalTrace(**settings).run(tiny, rows, folder=tmp_path / "a")
    other = CausalTrace(**settings, max_tokens=max_tokens).run(tiny, rows, folder=tmp_path / "b")
    torch.testing.assert_close(one.effects, other.effects, rtol=0, atol=1e-12, equal_nan=True)


def test_a_fact_sees_the_same_draws_whichever_others_are_traced(tiny, rows, tmp_path):
    trace = CausalTrace(noise=0.4)
    together, alone = trace.run(tiny, rows, folder=tmp_path / "a"), trace.run(tiny, rows[2:3], folder=tmp_path / "b")
    torch.testing.assert_close(together.effects[2:3], alone.effects, rtol=0, atol=1e-12, equal_nan=True)


def test_other_seeds_draw_other_noise(tiny, rows, tmp_path):
    effects = [CausalTrace(noise=0.4, seed=seed).run(tiny, rows, folder=tmp_path).effects for seed in (0, 1)]
    assert not torch.allclose(effects[0], effects[1], equal_nan=True)


def test_noise_is_three_deviations_of_the_subjects_embeddings(tiny, rows, tmp_path):
    ids = torch.tensor([token for row in rows for token in row.ids[row.start : row.subject + 1]])
    expected = 3 * float(tiny.embedding.detach()[ids].float().std())
    assert CausalTrace(draws=1).run(tiny, rows, [1], tmp_path).settings["noise"] == pytest.approx(expected)


def test_the_model_is_left_as_it_was(tiny, rows, tmp_path):
    before = tiny.fingerprint()
    CausalTrace(draws=1).run(tiny, rows, folder=tmp_path)
    assert tiny.fingerprint() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())


# ---- interrupting and going on ----


def test_goes_on_where_it_stopped(tiny, rows, tmp_path, monkeypatch):
    trace = CausalTrace(draws=2, noise=0.4, max_tokens=1)  # one fact at a time
    whole = trace.run(tiny, rows, folder=tmp_path / "whole")
    real, calls = CausalTrace._effects, []

    def twice(self, *args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return real(self, *args)

    monkeypatch.setattr(CausalTrace, "_effects", twice)
    with pytest.raises(KeyboardInterrupt):
        trace.run(tiny, rows, folder=tmp_path / "parts")
    (ledger,) = (tmp_path / "parts").iterdir()
    ledger.write_text(ledger.read_text() + '{"fact": "ab')  # killed while a line was written
    calls.clear()
    again = trace.run(tiny, rows, folder=tmp_path / "parts")
    assert len(calls) == 2
    assert torch.equal(again.effects.nan_to_num(9), whole.effects.nan_to_num(9))
    calls.clear()
    trace.run(tiny, rows, folder=tmp_path / "parts")
    assert not calls


def test_the_line_after_a_broken_one_is_kept(tiny, rows, tmp_path, monkeypatch):
    trace = CausalTrace(draws=1, noise=0.4)
    trace.run(tiny, rows[:1], folder=tmp_path)
    (ledger,) = tmp_path.iterdir()
    ledger.write_text(ledger.read_text() + '{"fact": "ab')
    trace.run(tiny, rows[1:2], folder=tmp_path)
    monkeypatch.setattr(CausalTrace, "_effects", lambda *_: pytest.fail("traced again"))
    trace.run(tiny, rows[:2], folder=tmp_path)


@pytest.mark.parametrize("change", [{"draws": 2}, {"seed": 1}, {"window": 2}, {"role": "mlp_out"}, {"noise": 0.5}])
def test_other_settings_share_nothing(tiny, rows, tmp_path, change):
    settings = {"draws": 1, "noise": 0.4}
    CausalTrace(**settings).run(tiny, rows, folder=tmp_path)
    CausalTrace(**{**settings, **change}).run(tiny, rows, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_other_weights_share_nothing(lm, tmp_path):
    rows = [trace_row(lm, Fact("I live in {}", "Lyon", "France"))]
    one = CausalTrace(noise=0.4).run(lm, rows, folder=tmp_path)
    with torch.no_grad():
        lm.weight(Site(1, "mlp_out")).mul_(1.5)
    other = CausalTrace(noise=0.4).run(lm, rows, folder=tmp_path)
    assert one.clean != other.clean


# ---- bad input ----


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 0},
        {"draws": 0},
        {"noise": 0.0},
        {"noise": -1.0},
        {"noise": math.nan},
        {"role": "mlp"},
        {"tokens": "x"},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"trace.{next(iter(settings))}|trace.role"):
        CausalTrace(**settings)


def test_a_layer_out_of_range_is_refused(tiny, rows, tmp_path):
    with pytest.raises(ConfigError, match=f"layer {tiny.depth} is not in the model"):
        CausalTrace().run(tiny, rows, [1, tiny.depth], tmp_path)


def test_no_fact_is_refused(tiny, tmp_path):
    with pytest.raises(RequestError, match="at least one fact"):
        CausalTrace().run(tiny, [], folder=tmp_path)


def test_a_row_without_a_subject_is_refused(tiny, rows, tmp_path):
    with pytest.raises(RequestError, match="mark the subject"):
        CausalTrace().run(tiny, [rows[0], Row(rows[1].ids, -1, rows[1].target)], folder=tmp_path)


@pytest.mark.parametrize("special", [False, True])
def test_a_subject_that_is_the_whole_prompt_is_refused(tiny, rows, tmp_path, special):
    bare = trace_row(tiny, Fact("{}", "Lyon", "France"))
    if special:  # as tokenizers that begin every text with a token of their own give it
        first = tiny.tokenizer.all_special_ids[0]
        bare = Row((first, *bare.ids), bare.subject + 1, bare.target + 1, bare.start + 1)
    with pytest.raises(RequestError, match=r"entry 1, prompt = .*Lyon.*the subject is the whole prompt"):
        CausalTrace().run(tiny, [rows[0], bare], folder=tmp_path)


# ---- the memory budget ----


@pytest.mark.parametrize("tokens", ["subject", "all"])
def test_facts_are_traced_together_as_far_as_the_budget_allows(tiny, rows, tmp_path, monkeypatch, tokens):
    real, groups = CausalTrace._effects, []

    def note(self, lm, chosen, layers, noise):
        groups.append(chosen)
        return real(self, lm, chosen, layers, noise)

    monkeypatch.setattr(CausalTrace, "_effects", note)
    trace, layers = CausalTrace(draws=2, noise=0.3, tokens=tokens), list(range(tiny.depth))
    needed = {row: trace.fact_bytes(tiny, row, layers) for row in rows}
    whole = trace.run(tiny, rows, folder=tmp_path / "a")
    assert len(groups) < len(set(rows))  # some facts together
    groups.clear()
    one = trace.within(largest := max(needed.values())).run(tiny, rows, folder=tmp_path / "b")
    assert all(sum(needed[row] for row in group) <= largest for group in groups)
    torch.testing.assert_close(one.effects, whole.effects, rtol=0, atol=1e-12, equal_nan=True)
    assert one.settings == whole.settings
    with pytest.raises(ConfigError, match=f"a trace of {tiny.depth} layers with 2 draws.*raise memory_budget"):
        trace.within(largest - 1).run(tiny, rows, folder=tmp_path / "c")


def test_the_estimate_has_room_for_what_is_held(tiny, rows):
    trace, layers = CausalTrace(draws=3, noise=0.3), [0, 2]
    for row in rows:
        spans = [[Site(layer, "block")] for layer in layers]
        runs = TraceRuns.of(tiny, [row], spans, noise_of(tiny, [row], 0.3, trace))
        held = [*runs.outputs.values(), *runs.noisy.outputs.values(), runs.noisy.tokens]
        held += [part for pair in runs.noisy.cache or () for part in pair]
        assert sum(part.nbytes for part in held) < trace.fact_bytes(tiny, row, layers)


def test_the_lower_of_two_limits_holds():
    assert CausalTrace(max_bytes=5).within(9).max_bytes == CausalTrace(max_bytes=9).within(5).max_bytes == 5
    assert CausalTrace(max_bytes=5).within(None) == CausalTrace(max_bytes=5)
    with pytest.raises(ConfigError, match=r"trace\.max_bytes must be above 0"):
        CausalTrace(max_bytes=0)
