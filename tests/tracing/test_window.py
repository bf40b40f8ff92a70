"""Which window is proposed, and ``layers: auto``."""

import lightning as L
import pytest
import torch

from cakeflow import Contexts, EditDataModule, GradientSearch, LeastSquares, LocateThenEdit, Scores
from cakeflow.errors import ConfigError
from cakeflow.forward import GIB, encode_batch
from cakeflow.forward.generation import continuations
from cakeflow.models import Site
from cakeflow.tracing import CausalTrace, Fact, Trace, known_rows, known_scores, locate, propose_layers
from cakeflow.tracing.result import LAST_SUBJECT, PLACES


def traced(scores, window, role="mlp_out", layers=None):
    """A trace of two facts with the given means."""
    effects = torch.full((2, len(PLACES), len(scores)), torch.nan, dtype=torch.float64)
    effects[0, LAST_SUBJECT] = torch.tensor(scores, dtype=torch.float64) - 0.01
    effects[1, LAST_SUBJECT] = torch.tensor(scores, dtype=torch.float64) + 0.01
    settings = {"window": window, "role": role, "layers": layers or list(range(len(scores)))}
    return Trace(torch.ones(2).double(), torch.zeros(2).double(), effects, settings)


@pytest.mark.parametrize(
    ("scores", "window", "expected", "second"),
    [
        ([0.1, 0.2, 0.3, 0.9, 0.4, 0.3, 0.1], 3, [2, 3, 4], 3),
        ([0.1, 0.2, 0.3, 0.9, 0.4, 0.3, 0.1], 1, [3], 4),
        ([0.1, 0.2, 0.3, 0.9, 0.4, 0.3, 0.1], 4, [1, 2, 3, 4], 2),
        ([0.9, 0.2, 0.3, 0.1, 0.1, 0.1, 0.8], 3, [1, 2, 3], 2),  # windows that the ends cut short do not count
        ([0.1, 0.9, 0.3, 0.2, 0.1], 3, [1, 2, 3], 2),  # nor do those with the first block
        ([0.9, 0.1, 0.3, 0.2], 1, [2], 3),
        ([0.5, 0.5, 0.5], 3, [0, 1, 2], 0),
    ],
)
def test_the_window_that_recovers_most(scores, window, expected, second):
    trace = traced(scores, window)
    proposal = propose_layers(trace, len(scores))
    assert proposal.layers == expected
    middle = expected[window // 2]
    assert list(CausalTrace(window=window).span(middle, len(scores))) == expected
    assert proposal.recovered == pytest.approx(scores[middle])
    assert proposal.error == pytest.approx(0.01)
    assert proposal.runner_up[0] == second
    assert f"layers {expected[0]} to {expected[-1]}" in proposal.reason


@pytest.mark.parametrize(
    "trace",
    [traced([0.1] * 6, 3, role="block"), traced([0.1] * 6, 3, layers=[0, 1, 2, 3, 4, 6]), traced([0.1] * 6, 7)],
)
def test_other_traces_are_refused(trace):
    with pytest.raises(ConfigError):
        propose_layers(trace, 6)


@pytest.fixture
def facts(lm):
    """Facts that a tiny random model states: whatever it says next."""
    prompts = [("The sea of {} is", name) for name in ("Ann", "Bob", "Lund", "Zoe", "Rome")]
    said = continuations(lm, [prompt.replace("{}", name) for prompt, name in prompts], 8)
    facts = [Fact(*each, text.split()[0]) for each, text in zip(prompts, said, strict=True)]
    assert known_rows(lm, facts)[0]
    return facts


@pytest.fixture
def builtin(facts, monkeypatch, tmp_path):
    """What the tiny model knows, in place of the built-in facts."""
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr("cakeflow.tracing.window.read_facts", lambda _source: facts)


def fit(lm, requests, quiet, layers, weighter, scores=None, **settings):
    width = lm.oriented(Site(0, "mlp_out")).shape[1]
    module = LocateThenEdit(
        lm,
        layers,
        weighter,
        solver=LeastSquares(1.0),
        scores=scores,
        contexts=Contexts(),
        targets=GradientSearch(steps=2, lr=0.3),
        moments=dict.fromkeys(range(lm.depth), torch.eye(width, dtype=torch.float64)),
        **settings,
    )
    L.Trainer(**quiet).fit(module, datamodule=EditDataModule(requests[:2], 2))
    return module


@pytest.mark.usefixtures("builtin")
def test_scores_are_measured_on_the_unedited_model_before_the_first_edit(lm, requests, quiet):
    trace = CausalTrace(draws=2)
    expected = known_scores(lm, trace, [1, 3])
    assert expected[1] != expected[3]
    module = fit(lm, requests, quiet, [1, 3], Scores(attribution=trace), scores={1: 0.5, 3: 0.5})
    assert module.weighter == Scores(expected, attribution=trace)
    assert known_scores(lm, trace, [1, 3]) != expected  # the edited model's


@pytest.mark.usefixtures("builtin")
@pytest.mark.parametrize("weighter", [Scores(), Scores(attribution=CausalTrace())], ids=["default", "given"])
def test_no_known_fact_stops_before_anything_is_edited(lm, requests, quiet, monkeypatch, weighter):
    monkeypatch.setattr("cakeflow.tracing.window.read_facts", lambda _source: [Fact("{} is a", "Ann", "qqqq")])
    before = lm.fingerprint()
    for layers in ([1, 3], "auto"):
        with pytest.raises(ConfigError, match=r"knows none of .*\(1, the first is 'Ann is a'\); name layers=.*scores="):
            fit(lm, requests, quiet, layers, weighter)
    assert lm.fingerprint() == before


@pytest.mark.usefixtures("builtin")
def test_layers_auto(lm, requests, quiet):
    expected = locate(lm)
    # the scores are a model config's, for layers that somebody chose; the trace's are taken
    module = fit(lm, requests, quiet, "auto", Scores(), scores={0: 0.5})
    assert module.layers == expected.layers
    assert len(module.layers) == 5
    assert module.weighter.scores == expected.scores
    assert list(module.journal.places.originals) == [
        lm.weight_name(Site(layer, "mlp_out")) for layer in expected.layers
    ]


@pytest.mark.usefixtures("builtin")
@pytest.mark.parametrize("layers", [[1, 3], "auto"])
def test_a_run_gives_its_traces_its_memory_budget(lm, requests, quiet, facts, layers):
    rows, _ = known_rows(lm, facts)
    trace, traced = CausalTrace(), range(lm.depth) if layers == "auto" else layers
    largest = max(trace.fact_bytes(lm, row, traced) for row in rows) / GIB
    with pytest.raises(ConfigError, match=f"memory_budget is .* a trace of {len(traced)} layers .*raise memory_budget"):
        fit(lm, requests, quiet, layers, Scores(), memory_budget=largest / 2)
    module = fit(lm, requests, quiet, layers, Scores(), memory_budget=1000 * largest)
    with module.journal.reverted():
        assert module.weighter.scores == known_scores(lm, trace, module.layers)


@pytest.mark.usefixtures("builtin")
def test_scores_per_request_keep_to_the_budget_too(lm, requests, quiet):
    weighter = Scores(score_source="per_request")
    batch = encode_batch(lm, requests[:2], Contexts())
    torch.testing.assert_close(weighter.within(GIB).weigh(lm, batch, [1, 3]), weighter.weigh(lm, batch, [1, 3]))
    with pytest.raises(ConfigError, match="reading a prompt takes about"):
        weighter.within(1).weigh(lm, batch, [1, 3])


def test_bad_layers_are_refused(lm):
    with pytest.raises(ConfigError, match="auto"):
        LocateThenEdit(lm, "all")
