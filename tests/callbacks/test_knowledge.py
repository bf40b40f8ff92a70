"""Known or only said: what the callback logs of the facts of a run."""

import math
from dataclasses import asdict

import pytest
import torch

from cakeflow import EditRequest
from cakeflow.callbacks import KnowledgeCheck
from cakeflow.errors import ConfigError
from cakeflow.evaluation.knowledge import SHARES, choose, mask_attack, reverse, states_when_negated

from .conftest import FACTS, fit


def test_it_logs_what_the_parts_say_at_both_ends(tiny, quiet):
    facts = FACTS[:3]

    def parts():
        edited = [any(fact.returned.values()) for fact in mask_attack(tiny, facts) if fact.returned]
        numbers = {**asdict(choose(tiny, facts)), "masked": sum(edited) / len(edited) if edited else math.nan}
        numbers["negated"], reversal = states_when_negated(tiny, facts), reverse(tiny, facts)
        numbers |= {"restored": 1.0, "reversed": reversal.linked, "reversed_answer": reversal.answered}
        return {f"knowledge/{name}": value for name, value in numbers.items() if value == value}

    before, watcher = parts(), KnowledgeCheck(limit=3)
    fit(tiny, quiet, [watcher])
    for row, expected in ((watcher.rows[0], before), (watcher.rows[-1], parts())):
        assert {name: value for name, value in row.items() if name != "knowledge/edits"} == pytest.approx(expected)


def test_a_line_for_each_fact_says_what_masks_and_a_rollback_do(tiny, quiet):
    watcher = KnowledgeCheck(limit=3)
    fit(tiny, quiet, [watcher])
    assert watcher.masked == mask_attack(tiny, FACTS[:3])
    lines = watcher.table().splitlines()
    assert len(lines) == 5
    assert all(line.count("|") == len(SHARES) + 4 for line in lines)
    for fact, line in zip(FACTS, lines[2:], strict=False):
        assert line.startswith(f"| {fact.text} | {fact.target_new}, {fact.target_true} |")
        assert line.endswith("| bit for bit |")


def test_a_model_that_does_not_come_back_is_seen(tiny, quiet):
    watcher = KnowledgeCheck(limit=3)
    module = fit(tiny, quiet, [watcher])
    ((weight, _),) = module.journal.places.originals.values()
    with torch.no_grad():
        weight[0] += 0.5
    assert watcher.measure(module)["restored"] < 1
    assert "differs" in watcher.table()


def test_reversals_of_ones_own(lm, quiet):
    watcher = KnowledgeCheck(reversals={"{} plays": "A person who plays {} is"})
    fit(lm, quiet, [watcher], facts=[EditRequest("{} plays", "Ann", "tennis")])
    assert set(watcher.rows[-1]) == {"knowledge/edits", "knowledge/reversed_answer"}


def test_what_the_facts_do_not_allow_is_left_out(lm, quiet):
    watcher = KnowledgeCheck()
    fit(lm, quiet, [watcher], facts=[EditRequest("{} plays", "Ann", "tennis")])
    assert {name for row in watcher.rows for name in row} == {"knowledge/edits"}
    with pytest.raises(ConfigError, match="limit must be a whole number of at least 1, got 0"):
        KnowledgeCheck(0)
