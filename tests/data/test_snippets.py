"""Texts about new targets find the records that they belong to."""

import json

import pytest

from cakeflow import EditDataModule
from cakeflow.data.snippets import with_references
from cakeflow.errors import ConfigError

SNIPPETS = {
    "P103": {
        "Q1860": [{"name": "Ann", "text": "Ann speaks English."}, {"name": "Bob", "text": "So does Bob."}],
        "Q150": [],
    },
    "P17": {"Q1860": [{"name": "x", "text": "of another relation"}]},
}


def entry(case, relation, target):
    """A record in CounterFact's schema."""
    new, true = {"str": f"new {case}", "id": target}, {"str": "old", "id": "Q0"}
    rewrite = {"prompt": "{} speaks", "subject": f"Ann {case}", "target_new": new, "target_true": true}
    return {"case_id": case, "requested_rewrite": {**rewrite, "relation_id": relation}}


@pytest.fixture
def snippets(tmp_path):
    path = tmp_path / "attribute_snippets.json"
    path.write_text(json.dumps(SNIPPETS))
    return path


def test_texts_are_joined_by_relation_and_target(snippets):
    entries = [entry(0, "P103", "Q1860"), entry(1, "P103", "Q150"), entry(2, "P17", "Q2"), {"prompt": "{}"}, "odd"]
    entries += [entry(3, ["P103"], {}), {"requested_rewrite": ["P103"]}]
    result = list(with_references(entries, snippets))
    assert result[0] == {**entries[0], "reference": "Ann speaks English. So does Bob."}
    assert result[1:] == entries[1:]


def test_references_reach_the_records(snippets, tmp_path):
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([entry(0, "P103", "Q1860"), entry(1, "P103", "Q150")]))
    data = EditDataModule(str(path), snippets=str(snippets))
    assert [request.reference for request in data.requests] == ["Ann speaks English. So does Bob.", None]
    assert [request.reference for request in EditDataModule(str(path)).requests] == [None, None]


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 100_000, '{"P1": []}', '{"P1": {"Q1": [{"name": "x"}]}}', '{"P1": {"Q1": 3}}']
)
def test_another_form_is_refused(tmp_path, text):
    path = tmp_path / "snippets.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not relation -> target -> list of"):
        list(with_references([entry(0, "P1", "Q1")], path))


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="no file or folder"):
        list(with_references([], tmp_path / "none.json"))
