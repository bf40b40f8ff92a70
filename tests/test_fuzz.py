"""Whatever is given as requests: nothing but request errors, and what is good comes back as it was."""

from hypothesis import given, settings
from hypothesis import strategies as st
from records import COUNTERFACT, OWN, SCHEMAS, ZSRE, nested, own

from cakeflow.data.request import EditRequest, Probe
from cakeflow.data.schemas import parse_requests
from cakeflow.data.text import occurrences
from cakeflow.errors import RequestError

NAMES = sorted({*OWN, *COUNTERFACT, *COUNTERFACT["requested_rewrite"], *ZSRE, "kind", "expected", "str"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8) | st.just("{}")
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=6)
        | st.dictionaries(st.integers(), inner, max_size=2)
    ),
    max_leaves=12,
)


def places(value, path=()):
    """Every path into nested data."""
    result = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return result + [place for key, inner in items for place in places(inner, (*path, key))]


PLACES = [(name, path) for name, record in SCHEMAS.items() for path in places(record)]


def outcome(entries):
    """Requests, or the problems they have; anything else escapes."""
    try:
        return parse_requests(entries), ()
    except RequestError as error:
        return [], error.faults


@settings(deadline=None, max_examples=300)
@given(st.lists(JUNK, max_size=4))
def test_junk_raises_nothing_but_request_errors(entries):
    requests, problems = outcome(entries)
    assert bool(requests) != bool(problems)
    assert len(requests) in (0, len(entries))
    assert all(0 <= problem.index < max(1, len(entries)) for problem in problems)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(PLACES), JUNK | st.just(...))
def test_records_with_one_bad_place_raise_nothing_but_request_errors(place, value):
    name, path = place
    requests, problems = outcome([nested(SCHEMAS[name], path, value)])
    assert bool(requests) != bool(problems)
    assert all(parse_requests([request.to_dict()]) == [request] for request in requests)


LETTERS = st.text("abé\u0301{} 🙂\u200dא", min_size=1, max_size=6)


@given(LETTERS, LETTERS, LETTERS)
def test_a_prompt_in_full_is_taken_only_where_its_subject_is_certain(before, subject, after):
    prompt = before + subject + after
    requests, _ = outcome([own(prompt=prompt, subject=subject)])
    places = occurrences(prompt, subject)
    slots, seen = prompt.count("{}"), subject.strip(" \u200d") != "" and subject == subject.strip()
    assert bool(requests) == (seen and (slots or len(places)) == 1)
    if requests and not slots:
        assert (requests[0].text, requests[0].subject_end) == (prompt, places[0] + len(subject))


TEXT = st.text(min_size=1, max_size=12).filter(
    lambda text: (
        text.strip() == text and "{}" not in text and any(char.isprintable() and not char.isspace() for char in text)
    )
)
PROBES = st.builds(Probe, st.sampled_from(["paraphrase", "neighborhood", "generation"]), TEXT, st.none() | TEXT)


@settings(deadline=None)
@given(
    st.builds(
        EditRequest,
        prompt=TEXT.map("{} ".__add__),
        subject=TEXT,
        target_new=TEXT.map("new ".__add__),
        target_true=st.none() | TEXT.map("old ".__add__),
        probes=st.lists(PROBES, max_size=3).map(tuple),
        relation=st.none() | TEXT,
        reference=st.none() | TEXT,
        case_id=st.none() | st.integers() | TEXT,
    )
)
def test_round_trip_of_any_good_request(request):
    assert parse_requests([request.to_dict()]) == [request]
    assert request.text[: request.subject_end] == request.subject
