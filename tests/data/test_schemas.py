"""Three schemas of entries, and every fault of a whole list reported at once, by index and field."""

import pytest
from records import COUNTERFACT, OWN, SCHEMAS, ZSRE, nested, own

from cakeflow.data import EditRequest, Probe, parse_requests
from cakeflow.errors import ConfigError, EditError, RequestError


def test_own_schema_keeps_every_field():
    (request,) = parse_requests([OWN])
    assert request == EditRequest(
        "The river {} flows into",
        "Elbe",
        "the Black Sea",
        "the North Sea",
        (
            Probe("paraphrase", "The mouth of the Elbe lies at"),
            Probe("neighborhood", "The river Weser flows into", "the sea"),
            Probe("generation", "Ships on the Elbe"),
        ),
        "mouth",
        "The Black Sea lies between Europe and Asia.",
        7,
    )
    assert request.text == "The river Elbe flows into"
    assert request.text[: request.subject_end] == "The river Elbe"


def test_counterfact_schema():
    (request,) = parse_requests([COUNTERFACT])
    assert (request.text, request.target_new, request.target_true) == ("The Blue Tower was built in", "1900", "1889")
    assert (request.relation, request.case_id) == ("P571", 3)
    assert [(probe.kind, probe.prompt) for probe in request.probes] == [
        ("paraphrase", "Work on The Blue Tower ended in"),
        ("neighborhood", "The Red Tower was built in"),
        ("neighborhood", "The Green Tower was built in"),
        ("generation", "The Blue Tower is"),
    ]
    assert all(probe.expected is None for probe in request.probes)


def test_zsre_schema_takes_the_gold_answer_as_new_target():
    (request,) = parse_requests([ZSRE])
    assert (request.prompt, request.subject) == ("Which school did {} attend?", "Anna Berg")
    assert (request.target_new, request.target_true, request.case_id) == ("Uppsala", None, None)
    assert request.probes == (
        Probe("paraphrase", "Where did Anna Berg study?"),
        Probe("neighborhood", "nq question: how deep is the lake?", "40 metres"),
    )


def test_zsre_replaces_only_the_first_occurrence_of_the_subject():
    (request,) = parse_requests([{**ZSRE, "src": "Is Anna Berg the Anna Berg of Oslo?"}])
    assert request.prompt == "Is {} the Anna Berg of Oslo?"
    assert request.text == "Is Anna Berg the Anna Berg of Oslo?"


@pytest.mark.parametrize(
    ("occurrence", "prompt"),
    [
        (None, "Is Annabel, {}, the Ann of Annaberg?"),
        ("first", "Is Annabel, {}, the Ann of Annaberg?"),
        ("last", "Is Annabel, Ann, the {} of Annaberg?"),
    ],
)
def test_a_subject_is_whole_words_the_first_or_by_choice_the_last(occurrence, prompt):
    src = prompt.replace("{}", "Ann")
    (request,) = parse_requests([{**ZSRE, "src": src, "subject": "Ann"}], occurrence=occurrence)
    assert (request.prompt, request.text) == (prompt, src)
    entry = own(prompt=src, subject="Ann")
    if occurrence:
        assert parse_requests([entry], occurrence=occurrence)[0].prompt == prompt
    else:  # ours says which one is meant
        with pytest.raises(RequestError, match=r"the subject occurs 2 times: put \{\} where it is meant"):
            parse_requests([entry])


def test_a_subject_inside_a_longer_word_is_none():
    (request,) = parse_requests([own(prompt="Annabel is a friend of Ann in", subject="Ann")])
    assert request.prompt == "Annabel is a friend of {} in"
    with pytest.raises(RequestError, match=r"occurs only inside a longer word: put \{\} where it is meant"):
        parse_requests([own(prompt="Annabel met Bob in", subject="Ann")])
    with pytest.raises(RequestError, match="must occur in src, not inside a longer word"):
        parse_requests([{**ZSRE, "src": "Who is Annabel?", "subject": "Ann"}])


def test_zsre_takes_the_target_that_is_chosen_and_says_which(caplog):
    with caplog.at_level("INFO", "cakeflow.data.schemas"):
        (gold,), (other,) = parse_requests([ZSRE, OWN])[:1], parse_requests([ZSRE], zsre_target="alt")
    assert (gold.target_new, other.target_new) == ("Uppsala", "a wrong answer")
    assert [record.getMessage() for record in caplog.records] == [
        "1 records of zsRE: their target_new is the first of answers (zsre_target)",
        "1 records of zsRE: their target_new is alt (zsre_target)",
    ]
    with pytest.raises(RequestError, match="entry 1, alt = None: missing"):
        parse_requests([ZSRE, nested(ZSRE, ["alt"], ...)], zsre_target="alt")


def test_choices_of_reading_are_checked():
    with pytest.raises(ConfigError, match="occurrence must be one of first, last, got 'second'"):
        parse_requests([OWN], occurrence="second")
    with pytest.raises(ConfigError, match="zsre_target must be one of answers, alt, got 'pred'"):
        parse_requests([OWN], zsre_target="pred")


def test_schemas_and_objects_mix_in_one_list_and_keep_their_order():
    ready = EditRequest("{} is", "a", "b")
    entries = [ZSRE, OWN, ready, COUNTERFACT]
    assert [request.subject for request in parse_requests(entries)] == ["Anna Berg", "Elbe", "a", "The Blue Tower"]
    assert parse_requests(entries)[2] is ready


def test_probes_may_be_missing_none_or_objects():
    probe = Probe("generation", "Ships")
    for probes, expected in ((..., ()), (None, ()), ([], ()), ([probe], (probe,))):
        assert parse_requests([own(probes=probes)])[0].probes == expected


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("The river Elbe flows into", "Elbe", "The river {} flows into"),
        ("Elbe", "Elbe", "{}"),
        ('{"river": "Elbe", "ends": ', "Elbe", '{"river": "{}", "ends": '),
        ("The {name} of {Elbe} is", "{Elbe}", "The {name} of {} is"),
        ("بلد حيفا في", "حيفا", "بلد {} في"),
        ("👩‍👧 means", "👩‍👧", "{} means"),
    ],
)
def test_a_prompt_given_in_full_becomes_a_template(prompt, subject, template):
    (request,) = parse_requests([own(prompt=prompt, subject=subject)])
    assert (request.prompt, request.text) == (template, prompt)
    assert request.text[: request.subject_end].endswith(subject)


def test_a_template_wins_over_a_subject_that_occurs_too():
    (request,) = parse_requests([own(prompt="The Elbe, I mean {}, flows into")])
    assert request.text == "The Elbe, I mean Elbe, flows into"
    assert request.subject_end == len("The Elbe, I mean Elbe")


MALFORMED = [
    ("a string", "entry"),
    (None, "entry"),
    (7, "entry"),
    (["prompt", "subject"], "entry"),
    ({}, "prompt"),
    (own(prompt=...), "prompt"),
    (own(subject=...), "subject"),
    (own(target_new=...), "target_new"),
    (own(prompt="no placeholder"), "prompt"),
    (own(prompt="{} and {}"), "prompt"),
    (own(prompt=""), "prompt"),
    (own(prompt=5), "prompt"),
    (own(prompt=None), "prompt"),
    (own(subject=""), "subject"),
    (own(subject=" \t"), "subject"),
    (own(subject=" Elbe"), "subject"),
    (own(subject="Elbe\n"), "subject"),
    (own(subject=["Elbe"]), "subject"),
    (own(target_new=""), "target_new"),
    (own(target_new="  "), "target_new"),
    (own(target_new={"str": "x"}), "target_new"),
    (own(target_new="the North Sea"), "target_new"),
    (own(target_true=""), "target_true"),
    (own(target_true=3.5), "target_true"),
    (own(relation=""), "relation"),
    (own(relation=31), "relation"),
    (own(reference=[]), "reference"),
    (own(target="the Black Sea"), "target"),
    (own(probes="a prompt"), "probes"),
    (own(probes=3), "probes"),
    (own(probes={"kind": "paraphrase", "prompt": "x"}), "probes"),
    (own(probes=["a prompt"]), "probes"),
    (own(probes=[{"kind": "paraphrase"}]), "probes"),
    (own(probes=[{"kind": "paraphrase", "prompt": "x", "answer": "y"}]), "probes"),
    (own(probes=[{"kind": "paraphrases", "prompt": "x"}]), "probes.kind"),
    (own(probes=[{"kind": ["paraphrase"], "prompt": "x"}]), "probes.kind"),
    (own(probes=[{"kind": "paraphrase", "prompt": " "}]), "probes.prompt"),
    (own(probes=[{"kind": "paraphrase", "prompt": None}]), "probes.prompt"),
    (own(probes=[{"kind": "paraphrase", "prompt": "x", "expected": ""}]), "probes.expected"),
    (own(probes=[{"kind": "paraphrase", "prompt": "x", "expected": 4}]), "probes.expected"),
    ({1: 2}, "prompt"),
    (own(extra=1), "extra"),
    (own(case_id=True), "case_id"),
    (own(case_id=7.0), "case_id"),
    (own(case_id=[7]), "case_id"),
    (nested(COUNTERFACT, ["case_id"], {}), "case_id"),
    (own(subject="Elbe\ud800"), "subject"),  # half a surrogate pair, as JSON escapes allow: no tokenizer takes it
    (EditRequest("{} is", "c", "d", probes=None), "probes"),
    (EditRequest("{} is", "c", "d", probes=({"kind": "paraphrase", "prompt": "x"},)), "probes"),
    (nested(COUNTERFACT, ["requested_rewrite"], None), "prompt"),
    (nested(COUNTERFACT, ["requested_rewrite", "subject"], ...), "subject"),
    (nested(COUNTERFACT, ["requested_rewrite", "target_new"], "1900"), "target_new.str"),
    (nested(COUNTERFACT, ["requested_rewrite", "target_true", "str"], ...), "target_true.str"),
    (nested(COUNTERFACT, ["requested_rewrite", "target_true", "str"], "1900"), "target_new"),
    (nested(COUNTERFACT, ["paraphrase_prompts"], "one string"), "paraphrase_prompts"),
    (nested(COUNTERFACT, ["neighborhood_prompts"], [None]), "probes.prompt"),
    (nested(ZSRE, ["subject"], "Somebody Else"), "subject"),
    (nested(ZSRE, ["subject"], ...), "subject"),
    (nested(ZSRE, ["src"], 5), "subject"),
    (nested(ZSRE, ["answers"], []), "answers"),
    (nested(ZSRE, ["answers"], None), "answers"),
    (nested(ZSRE, ["answers"], ...), "answers"),
    (nested(ZSRE, ["answers"], "Uppsala"), "answers"),
    (nested(ZSRE, ["answers"], [1]), "target_new"),
    (nested(ZSRE, ["rephrase"], ["x"]), "probes.prompt"),
    (nested(ZSRE, ["loc"], ["x"]), "probes.prompt"),
    (nested(ZSRE, ["loc_ans"], 40), "probes.expected"),
]


@pytest.mark.parametrize(("entry", "field"), MALFORMED, ids=[f"{i}-{field}" for i, (_, field) in enumerate(MALFORMED)])
def test_malformed_entry_is_named_by_index_and_field(entry, field):
    with pytest.raises(RequestError, match="nothing was changed") as caught:
        parse_requests([EditRequest("{} is", "a", "b"), entry])
    result = [problem for problem in caught.value.faults if problem.field == field]
    assert result, str(caught.value)
    assert {problem.index for problem in caught.value.faults} == {1}
    assert f"entry 1, {field} = " in str(caught.value)
    assert result[0].remedy


def test_every_fault_of_every_entry_is_reported_at_once():
    entries = [own(), own(prompt="none", subject=" x", target_true=1), "junk", own(relation=""), own(target_new="")]
    with pytest.raises(RequestError) as caught:
        parse_requests(entries)
    assert [(problem.index, problem.field) for problem in caught.value.faults] == [
        (1, "target_true"),
        (1, "prompt"),
        (1, "subject"),
        (2, "entry"),
        (3, "relation"),
        (4, "target_new"),
    ]
    assert str(caught.value).startswith("6 problem(s)")


def test_message_names_value_and_remedy_and_shortens_long_values():
    with pytest.raises(RequestError) as caught:
        parse_requests([own(subject=" Elbe"), own(prompt="x" * 5000)])
    assert "subject = ' Elbe': remove the white space around it" in str(caught.value)
    assert "found 0" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_error_belongs_to_both_families():
    with pytest.raises(EditError) as caught:
        parse_requests([own(), own(prompt="")])
    assert isinstance(caught.value, ValueError)
    assert {problem.index for problem in caught.value.faults} == {1}


def test_empty_list_is_refused():
    with pytest.raises(RequestError, match="at least one request"):
        parse_requests([])


@pytest.mark.parametrize("name", SCHEMAS)
def test_fields_of_none_are_missing_as_when_a_data_set_holds_several_schemas(name):
    columns = dict.fromkeys({*OWN, *COUNTERFACT, *ZSRE})
    assert parse_requests([columns | SCHEMAS[name]]) == parse_requests([SCHEMAS[name]])


def test_an_entry_of_no_schema_is_told_its_fields():
    with pytest.raises(RequestError, match=r"CounterFact's or zsRE's .* found \['label', 'text'\]"):
        parse_requests([{"text": "a", "label": 1}])
