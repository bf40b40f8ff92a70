"""Public files about consequences: records as they are published become requests and questions."""

import copy
import json

import pytest

from cakeflow.data import Probe, read_consequences, read_entries, read_requests
from cakeflow.data.public_files import Consequence, consequences, unfold
from cakeflow.errors import ConfigError, RequestError

KNOWEDIT = {
    "case_id": 4,
    "prompt": "The country of Ann Berg is",
    "subject": "Ann Berg ",
    "target_new": "Peru",
    "portability": {
        "Subject_Aliasing": {"prompt": ["The country of A. Berg is"], "ground_truth": ["Peru"]},
        "reasoning": {"prompt": ["The capital of Ann Berg's country is"], "ground_truth": ["Lima"]},
        "Logical_Generalization": {"prompt": ["Ann Berg is a"], "ground_truth": ["Peruvian"]},
    },
    "locality": {
        "Relation_Specificity": {"prompt": ["The mother of Ann Berg is"], "ground_truth": ["Eva Berg"]},
        "Forgetfulness": {"prompt": ["The country of Ann Berg, which is not Peru, is"], "ground_truth": ["Chile"]},
    },
}
LISTED = {
    **KNOWEDIT,
    "subject": "Ann Berg",
    "ground_truth": "Chile",
    "rephrase": "Ann Berg's country is",
    "portability": {"Reasoning": [{"prompt": "The capital of Ann Berg's country is", "ground_truth": [["Lima"]]}]},
    "locality": {
        "Relation_Specificity": [{"prompt": "The mother of Ann Berg is", "ground_truth": [["Eva Berg", "E."]]}]
    },
}
MQUAKE = {
    "case_id": 9,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": "Chile", "id": "Q2"},
            "subject": name,
            "question": f"What is the country of {name}?",
        }
        for name, new in (("Ann Berg", "Peru"), ("Bo Ek", "Cuba"))
    ],
    "questions": ["Where do Ann and Bo meet?", "What is their place?"],
    "answer": "Lund",
    "answer_alias": [],
    "new_answer": "Lima",
    "new_answer_alias": ["Ciudad de los Reyes"],
    "single_hops": [],
}
PEAK = {
    "case_id": 2,
    "requested_rewrite": {
        "prompt": "{} borders",
        "relation_id": "P47",
        "target_new": {"str": "Peru"},
        "target_true": {"str": "Syria"},
        "subject": "Turkey",
    },
    "postive_list": ["Syria", "Iran"],
    "negtive_list": ["Zambia"],
    "para_add_prompts": ["Turkey is adjacent to"],
    "neighborhood_prompts": [["Ann is a citizen of", "Iran"]],
    "negtive_random_list": [],
}


def edit(new, old, subject="Ann"):
    return {
        "relation": {"id": "P1", "prompt": "The pupil of {} is", "query": "?", "label": "pupil"},
        "subject": {"id": "Q1", "label": subject},
        "object": {"id": "Q2", "label": old},
        "new_object": {"id": "Q3", "label": new},
    }


CONFLICT = {"triples": [], "prerequisites": [], "type": "coverage", "edits": [edit("Bo", "Al"), edit("Cy", "Bo")]}
ROUND = {"type": "1-2@P1", "edit": edit("Bo", "Al"), "true_objects": [{"id": "Q2", "label": "Al"}]}


@pytest.mark.parametrize("record", [KNOWEDIT, LISTED, MQUAKE, PEAK, CONFLICT, ROUND])
def test_reading_changes_nothing_of_a_record(record):
    before = copy.deepcopy(record)
    read_requests([record])
    consequences([record])
    assert record == before


def test_knowedit():
    (request,) = read_requests([KNOWEDIT])
    assert (request.prompt, request.subject, request.target_new) == ("The country of {} is", "Ann Berg", "Peru")
    assert (request.target_true, request.case_id) == (None, 4)
    assert request.probes == (
        Probe("paraphrase", "The country of A. Berg is", "Peru"),
        Probe("neighborhood", "The mother of Ann Berg is", "Eva Berg"),
        Probe("neighborhood", "The country of Ann Berg, which is not Peru, is", "Chile"),
    )
    assert [(each.topic, each.answers) for each in consequences([{}, KNOWEDIT])] == [
        ("aliases", ("Peru",)), ("reasoning", ("Lima",)), ("logic", ("Peruvian",)),
        ("relations", ("Eva Berg",)), ("forgetfulness", ("Chile",)),
    ]  # fmt: skip
    assert {each.case for each in consequences([{}, KNOWEDIT])} == {1}


def test_knowedit_with_questions_in_lists():
    (request,) = read_requests([LISTED])
    assert request.target_true == "Chile"
    assert request.probes == (
        Probe("paraphrase", "Ann Berg's country is"),
        Probe("neighborhood", "The mother of Ann Berg is", "Eva Berg"),
    )
    assert consequences([LISTED]) == [
        Consequence("reasoning", ("The capital of Ann Berg's country is",), ("Lima",), 0),
        Consequence("relations", ("The mother of Ann Berg is",), ("Eva Berg", "E."), 0),
    ]


def test_mquake_has_a_request_for_each_edit_and_one_question_with_its_wordings():
    first, second = read_requests([MQUAKE])
    assert (first.text, first.target_new, second.text, second.target_new) == (
        "Ann Berg is a citizen of", "Peru", "Bo Ek is a citizen of", "Cuba"
    )  # fmt: skip
    assert (first.target_true, first.relation, first.case_id, second.case_id) == ("Chile", "P27", 9, 9)
    assert first.probes == (Probe("paraphrase", "What is the country of Ann Berg?"),)
    wordings = ("Where do Ann and Bo meet?", "What is their place?")
    assert consequences([MQUAKE]) == [Consequence("multi_hop", wordings, ("Lima", "Ciudad de los Reyes"), 0)]


def test_peak():
    (request,) = read_requests([PEAK])
    assert (request.text, request.target_new, request.target_true) == ("Turkey borders", "Peru", "Syria")
    assert request.probes == (
        Probe("paraphrase", "Turkey is adjacent to"),
        Probe("neighborhood", "Ann is a citizen of", "Iran"),
    )
    assert consequences([PEAK]) == []


@pytest.mark.parametrize(
    ("record", "targets"), [(CONFLICT, [("Bo", "Al"), ("Cy", "Bo")]), (ROUND, [("Bo", "Al"), ("Al", "Bo")])]
)
def test_edits_that_belong_behind_each_other(record, targets):
    requests = read_requests([record])
    assert [(each.target_new, each.target_true) for each in requests] == targets
    assert {(each.text, each.relation) for each in requests} == {("The pupil of Ann is", "P1")}


def test_a_record_whose_targets_are_equal_loses_the_true_one():
    (request,) = read_requests([{**CONFLICT, "edits": [edit("Bo", "Bo")]}])
    assert (request.target_new, request.target_true) == ("Bo", None)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**MQUAKE, "requested_rewrite": ["text"]}, "missing in this schema"),
        ({**CONFLICT, "edits": [{**edit("Bo", "Al"), "new_object": {}}]}, "target_new = None: missing"),
        ({**ROUND, "edit": {}}, "missing"),
        ({**KNOWEDIT, "subject": "Zoe"}, "the subject does not occur either"),
        ({**PEAK, "neighborhood_prompts": [[3, "Iran"]]}, "probes.prompt = 3: must be a string"),
        ({**PEAK, "neighborhood_prompts": [{"a": 1, "b": 2}]}, "neighborhood_prompts = .*list of .prompt, answer"),
        ({**PEAK, "neighborhood_prompts": [["Ann is"]]}, "neighborhood_prompts = .*list of .prompt, answer"),
        ({**PEAK, "para_add_prompts": 5}, "para_add_prompts = 5: give a list of valid texts"),
        ({**PEAK, "para_add_prompts": "text"}, "para_add_prompts = 'text': give a list"),
        ({**CONFLICT, "edits": [5]}, "edits = .*give a list of {relation"),
    ],
)
def test_broken_records_are_named(record, words):
    with pytest.raises(RequestError, match=f"entry 0, .*{words}"):
        read_requests([record])


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({**MQUAKE, "questions": 5}, "questions"),
        ({**MQUAKE, "questions": "text"}, "questions"),
        ({**MQUAKE, "questions": ["a\ud800"]}, "questions"),
        ({**MQUAKE, "new_answer": ["Lima"]}, "new_answer"),
        ({**MQUAKE, "new_answer_alias": "Lima"}, "new_answer_alias"),
        ({**KNOWEDIT, "portability": {"Reasoning": 5}}, "portability.Reasoning"),
        ({**KNOWEDIT, "portability": {"=a\x1b[2J": []}}, "portability"),
        ({**KNOWEDIT, "portability": {"a\ud800": []}}, "portability"),
        ({**KNOWEDIT, "portability": {"Reasoning": [5]}}, "portability.Reasoning"),
        ({**KNOWEDIT, "locality": {"a": {"prompt": "text", "ground_truth": ["b"]}}}, "locality.a"),
        ({**KNOWEDIT, "locality": {"a": {"prompt": ["\ud800"], "ground_truth": ["b"]}}}, "locality.a"),
    ],
)
def test_questions_of_another_shape_are_named_and_never_read_letter_by_letter(record, field):
    for read in (read_requests, read_consequences):
        with pytest.raises(RequestError, match=rf"entry 1, {field} = "):
            read([KNOWEDIT, record])


def test_answers_nested_deeper_than_any_file_has_them_are_left_out():
    deep = ["Lima"]
    for _ in range(2000):
        deep = [deep]
    record = {**KNOWEDIT, "locality": {}, "portability": {"Reasoning": [{"prompt": "q", "ground_truth": deep}]}}
    assert consequences([record]) == []


@pytest.mark.parametrize("entry", [3, None, {"prompt": "{} is"}, {"requested_rewrite": {"prompt": "{} is"}}])
def test_other_entries_stay_as_they_are(entry):
    assert (unfold(entry) if isinstance(entry, dict) else read_entries([entry])) == [entry]


def test_questions_come_from_a_file_and_a_file_without_any_says_so(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([MQUAKE, KNOWEDIT]), encoding="utf-8")
    assert [each.topic for each in read_consequences(path)][:2] == ["multi_hop", "aliases"]
    with pytest.raises(ConfigError, match="has no questions that follow from its facts: KnowEdit's"):
        read_consequences([PEAK])


def test_records_of_zsre_have_a_portability_of_their_own_which_is_left_alone():
    record = {
        "subject": "Lund",
        "src": "Where is Lund?",
        "answers": ["Sweden"],
        "alt": "Norway",
        "rephrase": "In which country is Lund?",
        "portability": {
            "Recalled Relation": "(Lund, country)",
            "New Question": "Who rules there?",
            "New Answer": "Ann",
        },
    }
    (request,) = read_requests([record])
    assert (request.text, request.target_new, request.probes[0].kind) == ("Where is Lund?", "Sweden", "paraphrase")
    assert consequences([record]) == []
