"""Which records a metric cannot judge is said before anything is scored."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Evaluation
from cakeflow.data import builtin_facts, check_fields, missing_fields
from cakeflow.data.fields import FIELDS
from cakeflow.data.request import EditRequest, Probe
from cakeflow.errors import ConfigError

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
    wanted = {field: {i for i, record in enumerate(records) if missing_fields([record], [field])} for field in needs}
    assert missing_fields(records, needs) == {field: some for field, some in wanted.items() if some}


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
