"""Facts behind other text, along a run and in an evaluation that belongs to none."""

import lightning as L
import pytest

from cakeflow import EditDataModule, EditRequest
from cakeflow.callbacks import ContextCheck
from cakeflow.core import run_evaluate
from cakeflow.errors import ConfigError
from cakeflow.evaluation import states_in_contexts

from .conftest import FACTS, fit


def test_it_logs_what_the_model_states_at_both_ends(tiny, quiet):
    before = states_in_contexts(tiny, FACTS[:3], (4, 9))
    watcher = ContextCheck(limit=3, lengths=(4, 9))
    fit(tiny, quiet, [watcher])
    after = states_in_contexts(tiny, FACTS[:3], (4, 9))
    for row, expected in ((watcher.rows[0], before), (watcher.rows[-1], after)):
        assert row == {"context/edits": row["context/edits"], **{f"context/{name}": v for name, v in expected.items()}}


def test_an_evaluation_of_the_model_as_it_is_has_it_too(lm, quiet):
    watcher = ContextCheck(lengths=(4,))
    module = fit(lm, quiet, [watcher])
    trainer = L.Trainer(**quiet, callbacks=[ContextCheck(lengths=(4,))])
    data = EditDataModule(FACTS[1:3])
    result = run_evaluate(trainer, module, data, "now")
    expected = states_in_contexts(lm, FACTS[1:3], (4,))
    assert {name: result.metrics[f"context/{name}"] for name in expected} == expected
    assert watcher.rows  # the run's own are along it, not in its evaluations
    assert not any(name.startswith("context") for name in run_evaluate(trainer, module, data, "after").metrics)


def test_a_text_that_is_too_short_stops_a_run_at_once(lm, quiet):
    with pytest.raises(ConfigError, match="lengths must be from 1 to the"):
        fit(lm, quiet, [ContextCheck(lengths=(500,), text="Too short.")])
    assert ContextCheck(lengths=()).measure(None) == {}


@pytest.mark.parametrize(
    ("values", "message"), [({"limit": 0}, "limit must be"), ({"lengths": (0,)}, "lengths must be a whole number")]
)
def test_bad_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        ContextCheck(**values)


def test_facts_of_any_kind_are_asked(lm, quiet):
    watcher = ContextCheck(lengths=(4,))
    fit(lm, quiet, [watcher], facts=[EditRequest("{} plays", "Ann", "tennis")])
    assert "context/text_4" in watcher.rows[-1]
