"""Questions that follow from edited facts, asked before and after."""

import pytest

from cakeflow import EditRequest
from cakeflow.callbacks import ConsequenceCheck
from cakeflow.data.text import states, until_stop
from cakeflow.errors import ConfigError
from cakeflow.forward.generation import continuations

from .conftest import fit

FACTS = [EditRequest("{} lives in", name, "Rome") for name in ("Ann", "Bo")]


def record(name, answer, kind="reasoning", side="portability"):
    groups = {side: {kind: {"prompt": [f"The home of {name} is"], "ground_truth": [answer]}}}
    return {"prompt": f"{name} lives in", "subject": name, "target_new": "Rome", **groups}


def test_answers_are_compared_before_and_after(tiny, quiet):
    prompts = ["The home of Ann is", "The home of Bo is"]
    before = [until_stop(text) for text in continuations(tiny, prompts, 32)]
    names = [before[0].split()[0] if before[0].split() else "x", "a name that no model writes"]
    watcher = ConsequenceCheck([record("Ann", names[0]), record("Bo", names[1], "Forgetfulness", "locality")])
    fit(tiny, quiet, [watcher], facts=FACTS)
    after = [until_stop(text) for text in continuations(tiny, prompts, 32)]
    for row, answers in ((watcher.rows[0], before), (watcher.rows[-1], after)):
        values = [float(states(text, name)) for text, name in zip(answers, names, strict=True)]
        assert [row["consequences/reasoning"], row["consequences/forgetfulness"]] == values
    assert watcher.rows[0]["consequences/forgetfulness"] == 0


def test_records_are_counted_from_the_first():
    records = [record("Ann", "Rome"), record("Bo", "Rome")]
    assert [each.case for each in ConsequenceCheck(records).questions] == [0, 1]
    assert [each.case for each in ConsequenceCheck(records, records=1).questions] == [0]
    with pytest.raises(ConfigError, match="records must be a whole number of at least 1, got 0"):
        ConsequenceCheck(records, records=0)


def test_a_chat_without_a_template_is_refused_before_the_edits(lm, quiet):
    lm.tokenizer.chat_template = None
    before = lm.fingerprint()
    with pytest.raises(ConfigError, match="cannot write 'Hello' as a chat"):
        fit(lm, quiet, [ConsequenceCheck([record("Ann", "Rome")], chat=True)], facts=FACTS)
    assert lm.fingerprint() == before
