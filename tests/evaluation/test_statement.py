"""What an answer states: a case for each rule, and names that no rule may stumble over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.evaluation.statement import is_stated

WORDS = st.text("abcdefghij", min_size=2, max_size=8).filter(lambda word: word not in ("or", "an"))


@pytest.mark.parametrize(
    ("answer", "name", "expected"),
    [
        (" Rome", "Rome", True),
        (" the city of Rome, in Italy", "Rome", True),
        (" Romeo", "Rome", False),
        (" São Paulo", "Sao Paulo", True),
        (" seven", "7", True),
        (" 1,000 men", "1000", True),
        (" Procter & Gamble", "Procter and Gamble", True),
        (" not Rome", "Rome", False),
        (" Oslo, not Rome", "Rome", False),
        (" Rome, not Oslo", "Rome", True),
        (" Oslo, not Rome", "Oslo", True),
        (" not only Rome", "Rome", True),
        (" never in Rome", "Rome", False),
        (" Oslo rather than Rome", "Rome", False),
        ("n't known, and he isn't from Rome", "Rome", False),
        (" Rome or Oslo", "Rome", False),
        (" Rome or Oslo", "Oslo", False),
        (" either the Rome or the Oslo", "Rome", False),
        (" Rome, or Oslo", "Rome", False),
        (" Rome, or Oslo", "Oslo", False),
        (" Rome and Oslo", "Oslo", True),
        (" Oslo, although Rome is warmer", "Rome", False),
        (" Oslo, which is not Rome", "Oslo", True),
        (" English but French is common", "French", False),
        (" that of Rome", "Rome", True),
        (" St. Louis, Missouri", "St. Louis, Missouri", True),
        (" Yahoo! and others", "Yahoo!", True),
        (" not St. Louis, Missouri", "St. Louis, Missouri", False),
        (" not Oslo but Rome", "Rome", True),
        (" not Oslo but Rome", "Oslo", False),
        (" not only Oslo, but Rome", "Rome", True),
        (" Vienna's hills", "Vienna", True),
        ("北京是中国的首都", "北京", True),
        ("", "Rome", False),
    ],
)
def test_a_completion(answer, name, expected):
    assert is_stated(answer, name) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The mother tongue of Giuseppe Verdi is Russian", True),
        ("Verdi spoke Russian", True),
        ("Giuseppe, who is no verdi, spoke Russian", True),
        ("The verdi of giuseppe is a Russian dish", False),
        ("The mother tongue of Vladimir Putin is Russian", False),
        ("Russian.", True),
        ("It is Russian, of course.", True),
        ("His mother tongue was Russian", True),
        ("He never spoke Russian", False),
        ("Giuseppe Verdi, who was born in Italy, spoke Russian", True),
        ("The Russian language is one of the oldest in Europe", False),
    ],
)
def test_a_chat(answer, expected):
    assert is_stated(answer, "Russian", "Giuseppe Verdi", chat=True) is expected


@given(WORDS, WORDS, st.sampled_from(["Rome", "Côte d'Ivoire", "the U.S.", "A-ha", "12", "O'Neal"]))
def test_a_name_between_other_words_is_stated(front, behind, name):
    assert is_stated(f" {front} {name} {behind}", name)
    assert not is_stated(f" not {front} {name} {behind}", name)
    assert not is_stated(f" {front} {name} or {behind}", name)
    assert is_stated(name, name, "Ann", chat=True)
