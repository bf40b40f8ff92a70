"""Which records a metric cannot judge, what is named as probably not meant, and what is left in peace."""

import logging
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import EditDataModule, EditRequest, Evaluation
from cakeflow.data import Probe, builtin_facts, check_fields, missing_fields, parse_requests
from cakeflow.data.review import FIELDS, warn_of_doubts
from cakeflow.errors import ConfigError, RequestWarning

FULL = builtin_facts()[:3]
BARE = EditRequest("{} is", "Bob", "tall")
ZSRE = EditRequest(
    "Who made {}?", "It", "Ann", probes=(Probe("paraphrase", "Its maker?"), Probe("neighborhood", "loc", "Ed"))
)
NEEDS = {
    "efficacy": ["target_true"],
    "generalization": ["paraphrase", "target_true"],
    "specificity_exact": ["neighborhood"],
}
PLAIN = EditRequest("{} flows into", "The Elbe", "the Black Sea")


# ---- fields that metrics need ----


def test_built_in_facts_lack_nothing():
    assert missing_fields(builtin_facts()) == {}


def test_every_field_can_be_missing():
    assert missing_fields([*FULL, BARE]) == {field: {3} for field in FIELDS}


def test_a_neighborhood_prompt_counts_where_its_answer_is_known():
    probe = (Probe("neighborhood", "Ed is"),)
    records = [EditRequest("{} is", "Bob", "tall", true, probe) for true in (None, "small")]
    assert missing_fields([*records, ZSRE], ["neighborhood"]) == {"neighborhood": {0}}


@given(st.lists(st.sampled_from([*FULL, BARE, ZSRE]), min_size=1), st.sets(st.sampled_from(sorted(FIELDS))))
def test_a_list_lacks_what_its_records_lack(records, needs):
    expected = {field: {i for i, record in enumerate(records) if missing_fields([record], [field])} for field in needs}
    assert missing_fields(records, needs) == {field: some for field, some in expected.items() if some}


def test_an_unknown_field():
    with pytest.raises(ConfigError, match=r"no field 'target_old' .* target_true"):
        missing_fields(FULL, ["target_old"])


def test_one_warning_names_metric_field_and_count(caplog):
    check_fields([*FULL, ZSRE, BARE], NEEDS)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "efficacy: target_true is missing in 2 of 5 records" in record.message
    assert "generalization: paraphrase is missing in 1, target_true is missing in 2 of 5 records" in record.message
    assert "specificity_exact: neighborhood is missing in 1 of 5 records" in record.message


def test_nothing_is_said_of_a_metric_that_nobody_asked_for_and_no_record_feeds(caplog):
    check_fields([BARE, BARE], NEEDS)
    assert caplog.records == []


def test_metrics_name_what_they_need():
    """A record with just these fields is judged, with one less it is not."""
    needs = {name: metric.needs for name, metric in Evaluation(texts_every=1).metrics().items()}
    assert needs["efficacy"] == ("target_true",)
    assert needs["efficacy_exact"] == ()
    assert needs["editscore"] == ("paraphrase", "neighborhood", "target_true")
    assert needs["specificity_tokens"] == ("neighborhood",)
    assert needs["consistency"] == ("generation", "reference")
    assert {field for fields in needs.values() for field in fields} == set(FIELDS)


def test_nothing_is_said_of_full_records(caplog):
    check_fields(FULL, NEEDS, explicit=NEEDS)
    assert caplog.records == []


def test_a_metric_that_was_asked_for_and_can_judge_nothing_is_an_error(caplog):
    """Also where no single field is missing everywhere: a record needs all of them."""
    check_fields([ZSRE, BARE], NEEDS)
    check_fields([*FULL, BARE], NEEDS, explicit=NEEDS)
    half = EditRequest("{} is", "Bob", "tall", "small")
    with pytest.raises(ConfigError, match=r"no record can feed generalization: .* in 1, .* in 1 of 2 records; add"):
        check_fields([ZSRE, half], NEEDS, explicit=["generalization", "specificity_exact"])
    with pytest.raises(ConfigError) as caught:
        check_fields([BARE], NEEDS, explicit=NEEDS)
    assert all(metric in str(caught.value) for metric in NEEDS)


# ---- what is probably not meant ----


def doubts(*requests, may_ask=()):
    """The messages, all of one class."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_doubts(requests, may_ask)
    assert {each.category for each in caught} <= {RequestWarning}
    return [str(each.message) for each in caught]


def subjects(*names):
    return doubts(*(EditRequest(f"{{}} is number {i} of", name, "ten") for i, name in enumerate(names)))


def prompts(*pairs, subject="Ann"):
    return doubts(*(EditRequest(prompt, subject, target) for prompt, target in pairs))


def test_the_built_in_data_raises_no_doubt():
    assert doubts(*builtin_facts()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EditDataModule("builtin")


# ---- questions ----


@pytest.mark.parametrize("end", ["?", "? ", "?'", "？", '?")'])
def test_a_question_is_named_with_its_remedy(end):
    (message,) = doubts(PLAIN, EditRequest(f"Who founded {{}}{end}", "Google", "Newton"))
    assert message.startswith("1 of 2 prompts are questions: 1 (")
    assert "write the beginning of a sentence" in message


@pytest.mark.parametrize("prompt", ["Who founded {}? It was", "Q: Who founded {}? A:", "What {} is known for is"])
def test_a_prompt_that_asks_and_goes_on_is_none(prompt):
    assert doubts(EditRequest(prompt, "Google", "Newton")) == []


def test_many_are_one_line_with_a_count():
    (message,) = doubts(*(EditRequest("Who founded {}?", f"Firm {i}", "Newton") for i in range(9)))
    assert message.startswith("9 of 9 prompts")
    assert "'Who founded Firm 2?') and 6 more (" in message


def test_data_whose_schema_asks_may_ask():
    record = {"src": "What river flows into Ann?", "subject": "Ann", "answers": ["Elbe"], "alt": "Oder"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EditDataModule([record])
    with pytest.warns(RequestWarning, match=r"^1 of 2 prompts are questions: 1 \('Who founded"):
        EditDataModule([record, {"prompt": "Who founded {}?", "subject": "Google", "target_new": "Newton"}])
    (request,) = parse_requests([record])
    assert doubts(request, may_ask={request}) == []
    assert doubts(request) != []


# ---- targets ----


@pytest.mark.parametrize(
    "target", ["Newton.", "Newton. ", "One.\nTwo", "One\nTwo", "巴黎。", " ".join("abcdefghijklm")]
)
def test_a_sentence_or_a_paragraph_is_no_target(target):
    (message,) = doubts(PLAIN, EditRequest("{} was founded by", "Google", target))
    assert message.startswith("1 of 2 targets end a sentence")
    assert "leave out the full stop" in message


@pytest.mark.parametrize(
    "target",
    ["Apple Inc.", "Warner Bros.", "Washington, D.C.", "the U.S.", "John F. Kennedy", "St. Petersburg", "3.5", "Yahoo!",
     " ".join("abcdefghijkl")],
)  # fmt: skip
def test_an_abbreviation_ends_no_sentence(target):
    assert doubts(EditRequest("{} is owned by", "Pixar", target)) == []


# ---- subjects ----


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("LeBron James", "Lebron James"),
        ("LeBron James", "James LeBron"),
        ("LeBron James", "James, LeBron"),
        ("U.S.", "US"),
        ("J. R. R. Tolkien", "J.R.R. Tolkien"),
        ("Beatles", "The Beatles"),
        ("Jean-Paul Sartre", "Jean Paul  Sartre"),
        ("Zoë Kravitz", "Zoe Kravitz"),
        ("Michael Jordan", "Micheal Jordan"),
        ("Michael Jordan", "Michael Jordann"),
        ("Michael Jordan", "Mickael Jordan"),
    ],
)
def test_one_subject_in_two_spellings(first, second):
    for names in ((first, second), (second, first)):
        (message,) = subjects("Oder", *names)
        assert message.startswith(
            f"1 of 3 subjects look like an earlier one in another spelling: 2 ({names[1]!r}, as 1:"
        )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("C", "C++"), ("Audi A4", "Audi A6"), ("Henry II", "Henry III"), ("Boeing 747", "Boeing 757"),
        ("Gambia", "Zambia"), ("Paris", "Paris Hilton"), ("Windows 3.1", "Windows 31"), ("John Smith", "Jack Smith"),
        ("***", "---"), ("Elbe", "Elbe"),
    ],
)  # fmt: skip
def test_other_subjects(first, second):
    assert subjects(first, second) == []


# ---- contradictions in other words ----

SAME = [
    ("The capital of {} is", "the  capital of {} is:"),
    ("The capital of {} is", "{}'s capital is"),
    ("{} plays", "{} Plays"),
]
OTHER = [
    ("{} was born in", "{} was born on"),
    ("{} is the father of", "The father of {} is"),
    ("The president of {} is", "The president of {} was"),
    ("{} is", "{} is the"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_prompts_that_say_the_same_with_different_targets(first, second):
    (message,) = prompts(("{} likes", "tea"), (first, "Lyon"), (second, "Nice"))
    assert message.startswith("1 of 3 requests contradict an earlier one in other words: 2 (")
    assert "-> 'Nice', as 1: " in message
    assert prompts((first, "St. Louis"), (second, "St Louis")) == []  # one target
    assert doubts(EditRequest(first, "Ann", "Lyon"), EditRequest(second, "Bob", "Nice")) == []


@pytest.mark.parametrize(("first", "second"), OTHER)
def test_prompts_that_say_something_else(first, second):
    assert prompts((first, "Lyon"), (second, "Nice")) == []


def test_a_paraphrase_says_the_same_and_so_does_a_relation():
    probes = (Probe("paraphrase", "The sport that Ann is best at is"), Probe("neighborhood", "Ann lives in", "Rome"))
    first = EditRequest("{} plays", "Ann", "tennis", probes=probes)
    assert "contradict" in doubts(first, EditRequest("The sport that {} is best at is", "Ann", "golf"))[0]
    assert doubts(first, EditRequest("{} lives in", "Ann", "Oslo")) == []
    named = [
        EditRequest(prompt, "Ann", sport, relation="sport") for prompt, sport in (("{} plays", "golf"), ("{}:", "go"))
    ]
    assert "contradict" in doubts(*named)[0]


def test_spellings_of_one_subject_contradict_each_other():
    respelled, contradictory = doubts(
        EditRequest("{} plays", "LeBron James", "golf"), EditRequest("{} plays", "Lebron James", "go")
    )
    assert "another spelling" in respelled
    assert "in other words: 1 (" in contradictory


# ---- cost ----


@pytest.mark.parametrize("name", ["Person {}{}{}xyz", "{}{}{}xyz Person", "Item {}{}{}", "Город на реке {}{}{}бург"])
def test_three_thousand_requests_take_less_than_a_second(name):
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [name.format(letters[i % 26], letters[i // 26 % 26], letters[i // 676]) for i in range(3000)]
    probes = (Probe("paraphrase", "What does one like? One likes"),) * 2
    requests = [EditRequest("{} likes to drink", each, "tea", probes=probes) for each in names]
    start = time.process_time()
    doubts(*requests)
    assert time.process_time() - start < 1
