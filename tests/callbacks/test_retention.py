"""Retention of earlier edits, against their scores."""

from dataclasses import replace

import pytest
from tiny_runs import editor_of

from cakeflow.callbacks import Retention
from cakeflow.errors import ConfigError
from cakeflow.evaluation.scoring import score_records

from .conftest import FACTS, fit


@pytest.mark.parametrize("form", ["exact", "tokens", "probability"])
def test_retention_scores_every_edit_so_far(lm, quiet, form):
    watcher = Retention(every=2, form=form)
    fit(lm, quiet, [watcher], batch_size=1)
    assert [len(curve) for curve in watcher.curves] == [2, 4, 5]
    assert watcher.rows[0] == {"retention/edits": 0.0}
    scores = score_records(lm, FACTS)
    own = scores.kind == 0
    expected = {"exact": scores.correct, "tokens": scores.tokens, "probability": scores.expected > scores.rival}[form][
        own
    ].float()
    assert watcher.curves[-1] == pytest.approx(expected.tolist())
    assert watcher.rows[-1]["retention/mean"] == pytest.approx(float(expected.mean()))
    assert watcher.rows[-1]["retention/first"] == pytest.approx(float(expected[0]))


def test_a_fact_whose_value_a_later_one_replaced_is_not_scored(lm, requests, tmp_path):
    watcher = Retention()
    editor = editor_of(lm, {"callbacks": [watcher]})
    second = [replace(requests[0], target_new="Lisbon"), requests[2]]
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "first")
    editor.fit(second, evaluate=False, run_dir=tmp_path / "second")
    records = [replace(request, probes=()) for request in (requests[1], *second)]
    scores = score_records(lm, records).correct.double()
    assert watcher.rows[-1]["retention/edits"] == editor.journal.edits == 3
    assert watcher.curves[-1] == [float(scores[0]), float(scores[1:].mean())]


def test_a_first_batch_that_was_replaced_as_a_whole_has_no_retention(lm, requests):
    watcher = Retention()
    editor = editor_of(lm, {"callbacks": [watcher], "logger": False})
    editor.fit(requests[:1], evaluate=False)
    editor.fit([replace(requests[0], target_new="Lisbon")], evaluate=False)
    assert watcher.rows[-1].keys() == {"retention/edits", "retention/mean"}


@pytest.mark.parametrize("form", ["answer", "contained", "judged"])
def test_retention_generates_no_free_answers(form):
    with pytest.raises(ConfigError, match="'exact', 'tokens' or 'probability'"):
        Retention(form=form)
