"""Traces against one full forward pass per fact, layer and token."""

import json
import math
from dataclasses import replace

import pytest
import torch

from cakeflow.architecture import Site
from cakeflow.batch import Row
from cakeflow.errors import ConfigError, RequestError
from cakeflow.tracing import PLACES, CausalTrace, Fact, Trace
from cakeflow.tracing.facts import trace_row
from cakeflow.tracing.result import LAST_SUBJECT, place_of
from cakeflow.tracing.trace import noise_of

FACTS = [
    Fact("The mother tongue of {} is", "Danielle Darrieux", "French"),
    Fact("{} plays", "Ann", "tennis"),
    Fact("In the town of {} people speak", "Newport News", "English"),
    Fact("I live in {}", "Lyon", "France"),
]
"""A subject in the middle, at the start, and, the last one, a subject that ends the prompt."""


@pytest.fixture
def rows(tiny):
    return [trace_row(tiny, fact) for fact in FACTS]


def with_first(output, value):
    return (value, *output[1:]) if isinstance(output, tuple) else value


@torch.no_grad()
def plain(lm, row, trace, scale, layer, token):
    """Effect of one restoration, by full passes of this fact alone."""
    noise = noise_of(lm, [row], scale, trace)[0]
    ids = torch.tensor([row.ids[: row.target]])
    embeds = lm.model.get_input_embeddings()(ids)
    sites = [Site(each, trace.role) for each in trace.span(layer, lm.depth)]
    clean = {}

    def chance(values, put):
        handles = []
        for site in sites:

            def hook(_module, _args, output, site=site):
                value = output[0] if isinstance(output, tuple) else output
                if put is None:
                    clean[site] = value.clone()
                    return None
                changed = value.clone()
                changed[:, put] = clean[site][0, put]
                return with_first(output, changed)

            if put is not False:
                handles.append(lm.module(site).register_forward_hook(hook))
        logits = lm.model(inputs_embeds=values, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits.softmax(-1)[:, row.ids[row.target]].mean()

    high = chance(embeds, None)
    noisy = embeds + noise.to(embeds)
    low = chance(noisy, False)
    return float(high), float(low), float(chance(noisy, token) - low)


@pytest.mark.parametrize(("role", "window"), [("block", 1), ("block", 2), ("mlp_out", 3), ("attn_out", 1)])
def test_equals_full_passes(tiny, rows, tmp_path, role, window):
    trace = CausalTrace(role=role, window=window, tokens="all", draws=2, noise=0.5)
    found = trace.run(tiny, rows, folder=tmp_path)
    for i, row in enumerate(rows):
        wanted = torch.zeros(len(PLACES), tiny.depth, dtype=torch.float64)
        count = torch.zeros(len(PLACES), 1)
        for token in range(row.start, row.target):
            each = [plain(tiny, row, trace, 0.5, layer, token) for layer in range(tiny.depth)]
            wanted[place_of(row, token)] += torch.tensor([effect for _, _, effect in each], dtype=torch.float64)
            count[place_of(row, token)] += 1
        assert found.clean[i] == pytest.approx(each[0][0], rel=1e-9)
        assert found.corrupted[i] == pytest.approx(each[0][1], rel=1e-9)
        torch.testing.assert_close(found.effects[i], wanted / count, rtol=0, atol=1e-12, equal_nan=True)
    subject = replace(trace, tokens="subject").run(tiny, rows, folder=tmp_path)
    at_subject = [i for i in range(len(PLACES)) if not subject.effects[:, i].isnan().all()]
    assert at_subject == [LAST_SUBJECT]
    torch.testing.assert_close(subject.effects[:, LAST_SUBJECT], found.effects[:, LAST_SUBJECT], rtol=0, atol=1e-12)


def test_restoring_the_last_block_at_the_end_of_the_prompt_restores_everything(tiny, rows, tmp_path):
    """With the subject at the end, the last block's output decides the prediction alone."""
    found = CausalTrace(noise=0.5).run(tiny, rows[3:], [tiny.depth - 1], tmp_path)
    wanted = float(found.clean - found.corrupted)
    assert abs(wanted) > 1e-6
    assert found.scores[tiny.depth - 1] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_grouping_changes_no_number(tiny, rows, tmp_path, budget):
    settings = {"tokens": "all", "draws": 2, "noise": 0.3}
    one = CausalTrace(**settings).run(tiny, rows, folder=tmp_path / "a")
    other = CausalTrace(**settings, token_budget=budget).run(tiny, rows, folder=tmp_path / "b")
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
    wanted = 3 * float(tiny.embedding.detach()[ids].float().std())
    assert CausalTrace(draws=1).run(tiny, rows, [1], tmp_path).settings["noise"] == pytest.approx(wanted)


def test_the_model_is_left_as_it_was(tiny, rows, tmp_path):
    before = tiny.fingerprint()
    CausalTrace(draws=1).run(tiny, rows, folder=tmp_path)
    assert tiny.fingerprint() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())


# ---- interrupting and going on ----


def test_goes_on_where_it_stopped(tiny, rows, tmp_path, monkeypatch):
    trace = CausalTrace(draws=2, noise=0.4, token_budget=1)  # one fact at a time
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
    rows = [trace_row(lm, FACTS[0])]
    one = CausalTrace(noise=0.4).run(lm, rows, folder=tmp_path)
    with torch.no_grad():
        lm.weight(1).mul_(1.5)
    other = CausalTrace(noise=0.4).run(lm, rows, folder=tmp_path)
    assert one.clean != other.clean


# ---- what comes out ----


def test_scores_errors_and_map(tmp_path):
    nan = math.nan
    effects = torch.full((3, len(PLACES), 2), nan, dtype=torch.float64)
    effects[:, LAST_SUBJECT] = torch.tensor([[0.1, 0.2], [0.3, 0.2], [0.2, 0.5]])
    effects[1, 0] = torch.tensor([0.25, 0.5])
    trace = Trace(torch.ones(3).double(), torch.zeros(3).double(), effects, {"layers": [4, 7], "noise": 1.0})
    assert trace.scores == pytest.approx({4: 0.2, 7: 0.3})
    assert trace.errors == pytest.approx({4: 0.1 / 3**0.5, 7: 0.17320508 / 3**0.5})
    assert trace.map[0].tolist() == [0.25, 0.5]
    assert trace.map[1].isnan().all()
    trace.save(tmp_path / "t.json")
    again = Trace.load(tmp_path / "t.json")
    assert torch.equal(again.effects.nan_to_num(9), effects.nan_to_num(9))
    assert again.settings == trace.settings
    assert torch.equal(again.corrupted, trace.corrupted)
    json.loads((tmp_path / "t.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("text", ["", "{}", '{"effects": 3}', "[1]"])
def test_a_file_that_is_no_trace_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        Trace.load(tmp_path / "x.json")


def test_places():
    row = Row(tuple(range(10)), subject=4, target=8, start=1)
    assert [place_of(row, token) for token in range(1, 8)] == [0, 1, 1, 2, 3, 4, 5]
    assert place_of(Row((1, 2, 3), subject=1, target=2, start=1), 1) == LAST_SUBJECT
    assert place_of(Row((1, 2, 3, 4), subject=1, target=3, start=1), 2) == 5


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
    with pytest.raises(RequestError, match="knows none"):
        CausalTrace().run(tiny, [], folder=tmp_path)


def test_a_row_without_a_subject_is_refused(tiny, rows, tmp_path):
    with pytest.raises(RequestError, match="mark the subject"):
        CausalTrace().run(tiny, [rows[0], Row(rows[1].ids, -1, rows[1].target)], folder=tmp_path)
