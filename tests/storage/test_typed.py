"""JSON of others as strict types: bounds of numbers and nesting, and errors that say where and what."""

import json
import math

import pytest
from hypothesis import given
from strategies import JSON

from cakeflow.errors import LedgerError, RunFolderError
from cakeflow.storage.typed import DEEPEST, LARGEST, Json, Number, Schema, parse_as, parse_lines, plain, read_as


class Anything(Schema):
    """A type that takes any JSON."""

    value: Json


class Measured(Schema):
    """A type with a number."""

    loss: Number


@given(value=JSON)
def test_plain_data_stays_as_it_is(value):
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value) == plain(plain(value))


def test_plain_data_is_json():
    data = {"a": float("nan"), 3: (1.5, float("inf")), "b": (True, "x", None)}
    assert plain(data) == {"a": None, "3": [1.5, None], "b": [True, "x", None]}
    assert Anything(value={"layers": (1, 2)}).value == {"layers": [1, 2]}


class Shelf(Schema):
    """A type for messages."""

    books: list[dict[str, int]]
    name: str = ""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, r"file, books: Field required; look$"),
        ({"books": [{"a": "x" * 500}]}, r"file, books\.0\.a = 'x+\.\.\.x+': Input should be a valid integer; look$"),
        ({"books": [], "pages": 3}, r"file, pages = 3: .*not permitted; look$"),
        (7, r"file, content = 7: .*; look$"),
    ],
)
def test_an_error_names_place_field_value_and_remedy(data, words):
    with pytest.raises(LedgerError, match=words) as error:
        read_as(Shelf, data, "file", LedgerError, "look")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000, '{"books": [' + "1" * 5000 + "]}"])
def test_text_that_is_no_json_is_an_error_of_the_file(text):
    with pytest.raises(RunFolderError, match=r"^file.*; look$"):
        parse_as(Shelf, text, "file", RunFolderError, "look")


def nested(levels):
    return '{"value":' * levels + "1" + "}" * levels


def test_json_is_nested_up_to_a_bound():
    assert parse_as(Anything, nested(DEEPEST), "file", RunFolderError, "look").value
    wide = json.dumps({"value": [[each] for each in range(10_000)]})
    assert len(parse_as(Anything, wide, "file", RunFolderError, "look").value) == 10_000
    for levels in (DEEPEST + 1, 900, 20_000):
        with pytest.raises(RunFolderError, match=r"^file: .*; look$"):
            parse_as(Anything, nested(levels), "file", RunFolderError, "look")


@pytest.mark.parametrize("text", ["1e101", "-1e308", "1e999"])
def test_numbers_beyond_all_measure_are_refused(text):
    with pytest.raises(RunFolderError, match=f"file: {text} is beyond 1e\\+100"):
        parse_as(Measured, f'{{"loss": {text}}}', "file", RunFolderError, "look")
    with pytest.raises(RunFolderError, match="loss = 1"):
        parse_as(Measured, f'{{"loss": 1{"0" * 400}}}', "file", RunFolderError, "look")


@pytest.mark.parametrize("text", ["null", "NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_nan(text):
    assert math.isnan(parse_as(Measured, f'{{"loss": {text}}}', "file", RunFolderError, "look").loss)
    assert math.isnan(Measured(loss=2 * LARGEST).loss)
    assert Measured(loss=math.inf).to_dict() == {"loss": None}


def test_lines_end_at_line_feeds_only():
    """What else a text may be broken at, ``splitlines`` would break a JSON object at."""
    shelves = [Shelf(books=[], name=f"one{mark}two") for mark in ("\u2028", "\u2029", "\x85", "\x0b", "\r")]
    text = "".join(f"{each.model_dump_json()}\n" for each in shelves)
    assert parse_lines(Shelf, f"\n{text}\n", "file", LedgerError, "look") == shelves
    with pytest.raises(LedgerError, match=r"^file, line 6: .*; look$"):
        parse_lines(Shelf, text + "{", "file", LedgerError, "look")
