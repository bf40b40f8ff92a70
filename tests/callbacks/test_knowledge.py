"""Known or only said: what the callback logs of the facts of a run."""

from dataclasses import asdict

import pytest

from cakeflow import EditRequest
from cakeflow.callbacks import KnowledgeCheck
from cakeflow.errors import ConfigError
from cakeflow.evaluation.knowledge import choose, returns_when_masked, states_when_negated

from .conftest import FACTS, fit


def test_it_logs_what_the_parts_say_at_both_ends(tiny, quiet):
    facts = FACTS[:3]

    def parts():
        numbers = {**asdict(choose(tiny, facts)), "masked": returns_when_masked(tiny, facts)}
        numbers["negated"] = states_when_negated(tiny, facts)
        return {f"knowledge/{name}": value for name, value in numbers.items() if value == value}

    before, watcher = parts(), KnowledgeCheck(limit=3)
    fit(tiny, quiet, [watcher])
    for row, expected in ((watcher.rows[0], before), (watcher.rows[-1], parts())):
        assert {name: value for name, value in row.items() if name != "knowledge/edits"} == pytest.approx(expected)


def test_what_the_facts_do_not_allow_is_left_out(lm, quiet):
    watcher = KnowledgeCheck()
    fit(lm, quiet, [watcher], facts=[EditRequest("{} plays", "Ann", "tennis")])
    assert {name for row in watcher.rows for name in row} == {"knowledge/edits"}
    with pytest.raises(ConfigError, match="limit must be at least 1 fact, got 0"):
        KnowledgeCheck(0)
