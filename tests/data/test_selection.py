"""The algebra of choosing records, and published orders."""

import json
import logging
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.core.datamodule import EditDataModule
from cakeflow.data import parse_requests, select
from cakeflow.data.request import EditRequest, contradictions
from cakeflow.data.selection import read_order
from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward.tokens import EditBatch

RECORDS = [EditRequest("{} is number", f"Item {i}", str(i), case_id=100 + i) for i in range(6)]


@st.composite
def lists(draw):
    """Records with case ids of their own; few subjects and targets, so that many contradict each other."""
    facts = draw(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("rs"), st.sampled_from("xyz")), min_size=1))
    return [EditRequest("{} is", s, new, relation=rel, case_id=i) for i, (s, rel, new) in enumerate(facts)]


@st.composite
def settings(draw):
    """Records, and a sequence of theirs by order, by seed, or as they stand."""
    records = draw(lists())
    ids = st.lists(st.sampled_from(range(len(records))), unique=True, min_size=1)
    way = draw(
        st.fixed_dictionaries({"order": ids}) | st.fixed_dictionaries({"shuffle_seed": st.integers()}) | st.just({})
    )
    return records, way


def fact(request):
    return request.subject, request.relation


@given(settings(), st.integers(1, 30))
def test_a_limit_takes_a_prefix(setting, limit):
    records, way = setting
    whole = select(records, **way, conflicts="drop")
    assert select(records, **way, conflicts="drop", limit=limit) == whole[:limit]


@given(lists(), st.integers())
def test_a_seed_permutes_and_repeats(records, seed):
    records = select(records, conflicts="drop")
    shuffled = select(records, shuffle_seed=seed)
    assert Counter(shuffled) == Counter(records)
    assert select(records, shuffle_seed=seed) == shuffled


@given(settings())
def test_dropping_leaves_no_contradiction_and_keeps_the_first_of_each_fact(setting):
    records, way = setting
    kept = select(records, **way, conflicts="drop")
    assert contradictions(kept) == []
    sequence = [records[i] for i in way["order"]] if "order" in way else records
    if "shuffle_seed" not in way:
        firsts = {}
        for record in sequence:
            firsts.setdefault(fact(record), record.target_new)
        assert kept == [record for record in sequence if firsts[fact(record)] == record.target_new]
    assert select(kept, conflicts="drop") == select(kept) == kept


@given(settings(), st.integers(1, 30))
def test_an_error_names_just_what_dropping_would_leave_out(setting, limit):
    """Only the chosen records count: contradictions behind the limit do not disturb."""
    records, way = setting
    begun = [records[i] for i in way["order"]] if "order" in way else records
    if "shuffle_seed" in way:
        begun = select([EditRequest("{} is", f"s{i}", "x", case_id=i) for i in range(len(records))], **way)
        begun = [records[each.case_id] for each in begun]
    wrong = {begun[problem.index].case_id for problem in contradictions(begun[:limit])}
    if not wrong:
        assert select(records, **way, limit=limit) == begun[:limit]
        return
    with pytest.raises(RequestError) as caught:
        select(records, **way, limit=limit)
    assert {problem.index for problem in caught.value.faults} == wrong  # case ids are places in the source here


@given(st.integers(1, 30), st.none() | st.integers(1, 40), st.none() | st.integers())
def test_a_stream_covers_the_records_in_sequence(count, batch_size, seed):
    records = [EditRequest("{} is", f"s{i}", "x") for i in range(count)]
    data = EditDataModule(records, batch_size, shuffle_seed=seed)
    batches = [batch.requests for batch in EditBatch(data.requests).split(data.batch_size)]
    assert [request for batch in batches for request in batch] == select(records, shuffle_seed=seed)
    sizes = [len(batch) for batch in batches]
    assert all(size == (batch_size or count) for size in sizes[:-1])
    assert 1 <= sizes[-1] <= (batch_size or count)


def test_smaller_samples_begin_larger_ones():
    samples = [select(RECORDS, shuffle_seed=5, limit=limit) for limit in range(1, 7)]
    assert all(larger[:-1] == smaller for smaller, larger in pairwise(samples))


def test_dropped_records_are_counted(caplog):
    records = [EditRequest("{} is", "Ann", target) for target in ("tall", "small", "tall", "old")]
    with caplog.at_level(logging.INFO, "cakeflow"):
        assert [record.target_new for record in select(records, conflicts="drop", limit=1)] == ["tall"]
    assert "2 of 4 records contradict" in caplog.text


# ---- published orders ----


@pytest.mark.parametrize("order", [[103, 100, 105], ["103", 100, "105"], (103, 100, 105)])
def test_an_order_names_records_and_sequence(order):
    assert select(RECORDS, order=order) == [RECORDS[3], RECORDS[0], RECORDS[5]]
    assert select(RECORDS, order=order, limit=2) == [RECORDS[3], RECORDS[0]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("o.json", "[103, 100,\n105]"),
        ("o.txt", "103\n\n 100\n105\n"),
        ("o.order", "103\r\n100\r\n105"),
        ("o.json", '["103", 100, 105]'),
    ],
)
def test_an_order_from_a_file(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    for order in (tmp_path / name, str(tmp_path / name)):
        assert select(RECORDS, order=order) == [RECORDS[3], RECORDS[0], RECORDS[5]]


@given(st.permutations(range(6)))
def test_orders_compose_like_permutations(places):
    order = [RECORDS[place].case_id for place in places]
    permuted = select(RECORDS, order=order)
    assert [record.case_id for record in permuted] == order
    assert select(permuted, order=[record.case_id for record in RECORDS]) == RECORDS


def test_every_fault_of_an_order_is_named():
    records = [*RECORDS, RECORDS[1]]
    with pytest.raises(ConfigError) as caught:
        select(records, order=[100, 7, "x", 100, 101, 7])
    message = str(caught.value)
    assert "no record has 7, x;" in message
    assert "named more than once 100, 7;" in message
    assert message.endswith("several records have 101")


def test_long_lists_of_faults_are_shortened():
    with pytest.raises(ConfigError, match=r"9 and 90 more$"):
        select(RECORDS, order=[*range(100)])


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([], "empty"),
        ([True], "found True"),
        ([1.5, 100], "found 1.5"),
        ([None], "found None"),
        ("none.json", "no file 'none.json'"),
    ],
)
def test_what_is_no_order(order, words):
    with pytest.raises(ConfigError, match=words):
        select(RECORDS, order=order)


@pytest.mark.parametrize(("text", "words"), [("[]", "empty"), ('{"a": 1}', "found {'a'"), ("[1.5]", "found 1.5")])
def test_json_that_holds_no_order(text, words, tmp_path):
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_order(tmp_path / "o.json")


def test_an_empty_and_a_broken_order_file(tmp_path):
    (tmp_path / "o.txt").write_text(" \n\n")
    with pytest.raises(ConfigError, match="empty"):
        read_order(tmp_path / "o.txt")
    (tmp_path / "o.json").write_text("[1,\n2")
    with pytest.raises(RequestError, match=r"o.json, line 2"):
        read_order(tmp_path / "o.json")


def test_an_order_needs_case_ids():
    with pytest.raises(ConfigError, match="no record here has one"):
        select([EditRequest("{} is", "a", "b")], order=[1])


def test_an_order_and_a_seed_exclude_each_other():
    with pytest.raises(ConfigError, match=r"data\.order and data\.shuffle_seed"):
        select(RECORDS, order=[100], shuffle_seed=1)


def test_an_unknown_word_for_conflicts():
    with pytest.raises(ConfigError, match="error, drop, keep, got 'first'"):
        select(RECORDS, conflicts="first")


def test_an_order_is_json_ready():
    assert json.loads(json.dumps([record.to_dict()["case_id"] for record in RECORDS])) == read_order([*range(100, 106)])


@pytest.mark.parametrize("case", ["a\nb", "  ", "", "\0", "../../x", "=1+1", "a\x1b[2J", "a|b", "x" * 300, -(10**99)])
def test_a_case_id_of_any_text_names_its_record(case):
    facts = parse_requests(
        [{"prompt": f"{{}} is {i}", "subject": "Ann", "target_new": "x", "case_id": i} for i in "ab"]
    )
    chosen = [*facts, replace(facts[0], prompt="{} was", case_id=case)]
    assert select(chosen, order=[case]) == chosen[2:]
    with pytest.raises(ConfigError) as error:
        select(facts, order=[case])
    assert str(error.value).isprintable()


@pytest.mark.parametrize("case", [10**5000, "a\ud800", None, 1.5], ids=["endless", "surrogate", "none", "fraction"])
def test_an_order_holds_ids_only(case):
    with pytest.raises(ConfigError, match="must hold case ids") as error:
        read_order([1, case])
    assert str(error.value).isprintable()
