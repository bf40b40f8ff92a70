"""Requests: contradictions among them, and their form as plain data."""

import json

import pytest
from records import COUNTERFACT, OWN, SCHEMAS, ZSRE, nested, own

from cakeflow.data import EditRequest, contradictions, parse_requests
from cakeflow.data.request import normal_form_hint, request_faults


@pytest.mark.parametrize(
    ("second", "contradicts"),
    [
        (own(target_new="the Baltic Sea"), True),
        (own(target_new="the Baltic Sea", prompt="{} ends in"), True),  # same relation, other words
        (own(), False),  # a repetition
        (own(target_new=" the Black Sea"), False),  # differs in white space only
        (own(target_new="the Baltic Sea", relation="source"), False),
        (own(target_new="the Baltic Sea", subject="Oder"), False),
        (own(target_new="the Baltic Sea", relation=None), False),  # then the prompt stands for the relation
    ],
)
def test_contradictions(second, contradicts):
    result = contradictions(parse_requests([OWN, own(subject="Rhine"), second]))
    assert [(problem.index, problem.field) for problem in result] == ([(2, "target_new")] if contradicts else [])
    assert all("contradicts entry 0" in problem.remedy for problem in result)


def test_without_a_relation_the_prompt_tells_contradictions():
    requests = parse_requests([own(relation=...), own(relation=..., target_new="the Baltic Sea")])
    assert [problem.index for problem in contradictions(requests)] == [1]


def test_contradictions_among_some_requests_in_their_sequence():
    requests = parse_requests([own(target_new=sea) for sea in ("the Baltic Sea", "the Black Sea", "the Red Sea")])
    (problem,) = contradictions(requests, [2, 0])
    assert problem.index == 0
    assert "contradicts entry 2" in problem.remedy
    assert contradictions(requests, [1]) == []


@pytest.mark.parametrize("case", [0, 7, "7", "a-3"])
def test_case_ids_are_kept_and_tell_no_requests_apart(case):
    entries = [own(case_id=case), nested(COUNTERFACT, ["case_id"], case), {**ZSRE, "case_id": case}]
    requests = parse_requests(entries)
    assert [request.case_id for request in requests] == [case] * 3
    assert [request.to_dict()["case_id"] for request in requests] == [case] * 3
    assert contradictions(parse_requests([own(case_id=1), own(case_id=2, target_new="the Baltic Sea")]))


@pytest.mark.parametrize("name", SCHEMAS)
def test_to_dict_is_json_and_reads_back(name):
    (request,) = parse_requests([SCHEMAS[name]])
    assert parse_requests([json.loads(json.dumps(request.to_dict()))]) == [request]


def test_to_dict_leaves_empty_fields_out():
    request = EditRequest("{} is", "a", "b")
    assert request.to_dict() == {"prompt": "{} is", "subject": "a", "target_new": "b"}


def test_the_hint_is_given_only_where_the_normal_form_differs():
    assert "unicodedata.normalize('NFC'" in normal_form_hint("In Malm\u00f6", "Malmo\u0308")
    for text, part in (("In Malm\u00f6", "Lund"), (5, "Lund"), ("Lund", None), ("Lund", " ")):
        assert normal_form_hint(text, part) == ""


def test_faults_of_one_request_carry_its_index():
    faults = request_faults(EditRequest("no slot", "Elbe ", "", relation=3), 7)
    fields = [(fault.index, fault.field) for fault in faults]
    assert fields == [(7, "target_new"), (7, "relation"), (7, "prompt"), (7, "subject")]
    assert request_faults(EditRequest("{} is", "a", "b"), 7) == []


@pytest.mark.parametrize("space", [True, False])
def test_a_space_is_part_of_a_request(space):
    (request,) = parse_requests([own(space=space)])
    assert request.space is space
    assert request.to_dict()["space"] is space
    assert parse_requests([request.to_dict()]) == [request]
    assert "space" not in parse_requests([OWN])[0].to_dict()  # the hash of a request that does not say so stays


@pytest.mark.parametrize("value", [1, 0, "no", []])
def test_a_space_is_true_or_false(value):
    (fault,) = request_faults(EditRequest("{} is", "a", "b", space=value), 2)
    assert (fault.index, fault.field) == (2, "space")
