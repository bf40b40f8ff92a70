"""Metrics of routes, counted by hand, and the callback that logs them."""

import json

import pytest
import torch
from cakeflow_sidememory import (
    CodebookMemory,
    CodebookSettings,
    FactsInContext,
    OwnAnswers,
    Route,
    RouteCheck,
    RoutingAccuracy,
    RoutingAUC,
    ValueTraining,
    routing_numbers,
)
from cakeflow_sidememory.routing_metrics import _line
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Contexts, Editor, EditRequest, LocateThenEdit
from cakeflow.data import Probe
from cakeflow.errors import ConfigError
from cakeflow.journal import verify

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
FACTS = [
    EditRequest(
        "The first letter of {}", subject, new,
        probes=(Probe("paraphrase", f"In {subject}"), Probe("neighborhood", "The mother tongue of Ann is", true)),
    )
    for subject, new, true in (("Lund", "a", "the"), ("Australia", "the", "a"))
]  # fmt: skip


def route(kind, distance, decision, own, side="above"):
    return Route(0, kind, "x", "place", distance, 1.0, side, decision, own)


ROWS = [
    route("rewrite", 3.0, 1, 1), route("paraphrase", 2.0, 1, 1), route("paraphrase", 0.5, 0, 1),
    route("rewrite", 2.5, 2, 1), route("neighborhood", 0.1, 0, 0), route("neighborhood", 2.2, 1, 0),
    route("rewrite", 9.0, 0, None),
]  # fmt: skip


def test_by_hand():
    """Four of six go where they should; of 4 x 2 pairs 6 are in order; one of two edits has its own answer."""
    assert routing_numbers(ROWS) == pytest.approx({"accuracy": 4 / 6, "auc": 6 / 8, "own": 1 / 2})


def test_distances_to_keys_count_the_other_way():
    rows = [route("rewrite", 0.1, 1, 1, "below"), route("neighborhood", 5.0, 0, 0, "below")]
    assert routing_numbers(rows) == {"accuracy": 1, "auc": 1, "own": 1}
    far = [row._replace(distance=float("inf")) for row in rows]
    assert routing_numbers(far)["auc"] == 0.5


def test_what_cannot_be_computed_is_left_out():
    assert routing_numbers([]) == {}
    assert routing_numbers([route("rewrite", 1.0, 1, None)]) == {}
    assert routing_numbers([route("neighborhood", 1.0, 0, 0)]) == {"accuracy": 1}
    for metric in (RoutingAccuracy(), RoutingAUC(), OwnAnswers()):
        with pytest.warns(UserWarning, match="before the ``update``"):
            assert torch.isnan(metric.compute())


@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4).map(lambda n: 10.0 * n)), min_size=1, max_size=12))
def test_auc_is_the_share_of_pairs_in_order(pairs):
    labels, scores = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    metric = RoutingAUC()
    for at in range(len(pairs)):
        metric.update(labels[at : at + 1], scores[at : at + 1])
    inside, outside = scores[labels], scores[~labels]
    if not len(inside) or not len(outside):
        assert torch.isnan(metric.compute())
        return
    difference = inside[:, None] - outside[None]
    assert float(metric.compute()) == pytest.approx(
        float(((difference > 0) + 0.5 * (difference == 0)).mean()), abs=1e-6
    )


def test_metrics_add_up():
    accuracy, own = RoutingAccuracy(), OwnAnswers()
    accuracy.update(torch.tensor([True, False]), torch.tensor([2, 0]))
    accuracy.update(torch.tensor([True]), torch.tensor([0]))
    own.update(torch.tensor([0, 3]), torch.tensor([0, 3]))
    assert float(accuracy.compute()) == pytest.approx(2 / 3)
    assert float(own.compute()) == 0.5  # an answer of nobody's is not its own


def test_a_run_logs_its_routes(lm, tmp_path):
    check = RouteCheck()
    module = CodebookMemory(lm, 3, codebook=CodebookSettings(1e-3), training=ValueTraining(0.3, 3))
    result = Editor(module, {**QUIET, "callbacks": [check]}).fit(FACTS, 1, run_dir=tmp_path / "run")
    assert "routing/accuracy" not in result.before
    named = {name.removeprefix("routing/"): value for name, value in result.after.items() if "routing/" in name}
    assert named == routing_numbers(check.rows)
    assert named["own"] == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "routes.jsonl").read_text().splitlines()]
    assert lines == [row._asdict() for row in check.rows]
    assert "routing/auc" in (tmp_path / "run" / "metrics.csv").read_text()
    assert not verify(tmp_path / "run").faults
    assert "routes.jsonl" not in verify(tmp_path / "run").unknown


def test_retrieval_is_measured_alike(lm):
    check = RouteCheck()
    Editor(FactsInContext(lm), {**QUIET, "callbacks": [check]}).fit(FACTS, evaluate=True)
    assert [row.decision for row in check.rows] == [1, 1, 0, 2, 2, 0]
    assert routing_numbers(check.rows) == {"accuracy": 1, "auc": 1, "own": 1}
    assert check.rows[0].distance == pytest.approx(1)


def test_infinite_distances_are_null_and_other_methods_are_refused(lm):
    assert json.loads(_line(route("rewrite", float("inf"), 0, None)))["distance"] is None
    module = LocateThenEdit(lm, [1], contexts=Contexts())
    with pytest.raises(ConfigError, match="RouteCheck: LocateThenEdit routes nothing"):
        Editor(module, {**QUIET, "callbacks": [RouteCheck()]}).evaluate(FACTS)
