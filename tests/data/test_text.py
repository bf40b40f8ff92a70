"""Rules of written text, by the examples that a reader of each language would give."""

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.data import builtin_facts
from cakeflow.data.text import is_over, join, occurrences, plain, separator, states, until_any_stop, until_stop

GERMAN_OPEN, GERMAN_CLOSE, OPEN, CLOSE, APOSTROPHE = "\u201e", "\u201c", "\u201c", "\u201d", "\u2019"


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("a", "b", "a b"),
        ("a ", "b", "a b"),
        ("a", " b", "a b"),
        ("a\n", "b", "a\nb"),
        ("a ", " b", "a  b"),
        ("'", "b", "'b"),
        ("", "b", "b"),
    ],
)
def test_join(prompt, target, text):
    assert join(prompt, target) == text


SOLID = [
    ("法国的首都是", "巴黎"),
    ("法国的首都是", "Paris"),
    ("谁写了Hamlet", "莎士比亚"),
    ("我用 Python 编程", "很多年"),
    ("フランスの首都は", "パリ"),
    ("問：日本の首都は？答:", "Tokyo"),
    ("他说：\u201c", "Hello"),
    ("我爱Python", "，很好"),
    ("2024年", "5月"),
    ("เมืองหลวงของไทยคือ", "กรุงเทพ"),
    ("ປະເທດ", "ລາວ"),
    ("རྒྱལ་ས་", "ལྷ་ས"),
]
"""Prompts and targets that meet in a script without spaces."""
SPACED = [
    ("The Chinese word for history is", "历史"),
    ("The capital of 中国", "is"),
    ("Who wrote 日本書紀?", "東京"),
    ("谁写了Hamlet", "Shakespeare"),
    ("我用 Python 编程", "Java"),
    ("한국의 수도는", "부산"),
    ("عاصمة مصر هي", "القاهرة"),
    ("बिहार की राजधानी", "पटना"),
    ("The sign means", "🚀"),
]
"""Those that meet in a script with spaces, though one of them has words of the other kind."""


@pytest.mark.parametrize(("between", "pair"), [*product([""], SOLID), *product([" "], SPACED)])
def test_the_script_decides_on_the_space(between, pair):
    assert separator(*pair) == between


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('{"river": "Elbe", "ends": "', "sea"),
        ('{"a","', "b"),
        ('He said:"', "no"),
        ("It is called '", "the land'"),
        (f"It is called {OPEN}", "the land"),
        (f"Der Film {GERMAN_OPEN}", "Nosferatu"),
        ("Das Drama »", "Faust«"),
        ("He lives (", "in Rome)"),
        ("f(", "x)"),
        ("\u201c'", "x"),
        ("Il habite à l'", "Oslo"),
        (f"Il sait qu{APOSTROPHE}", "Oslo"),
        ("Vive nell'", "isola"),
        ("Conan O'", "Brien"),
        ("a well-", "known man"),
        ("either and/", "or"),
        ("Write to @", "rome"),
        ("It costs $", "5"),
        ("The Elbe", ", a river"),
        ("He asked why", "?"),
        ("This is Ann", "'s mother"),
        ("(He lives in Rome", ")"),
        (f"{OPEN}He lives in Rome", CLOSE),
    ],
)
def test_no_space_where_punctuation_ties(prompt, target):
    assert separator(prompt, target) == ""


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('He said "yes"', "loudly"),
        ('"Hello,"', "she said"),
        ("It is 'good'", "to go"),
        (f"{GERMAN_OPEN}Nosferatu{GERMAN_CLOSE}", "ist"),
        ("«Faust»", "is"),
        ('a pipe of 5"', "length"),
        ("the dogs'", "home"),
        ("James'", "mother"),
        ("He lives (in Rome)", "now"),
        ("Paris -", "Rome"),
        ("It costs 5 €", "more"),
        ("I write C#", "daily"),
        ("The capital is ____", "Paris"),
        ("Who is Ann?", "Bob"),
        ("I use", ".NET"),
        ("It is", "'good'"),
        ("It is", '"good"'),
        ("It is", "(perhaps) Rome"),
        ("It grew by", "3.5 million"),
    ],
)
def test_a_space_where_punctuation_does_not_tie(prompt, target):
    assert separator(prompt, target) == " "


def test_a_request_may_say_it_otherwise():
    assert join("首都是", "巴黎", True) == "首都是 巴黎"
    assert join("It is", "so", False) == "It isso"


def test_english_facts_are_joined_by_a_space():
    for fact in builtin_facts():
        assert separator(fact.text, fact.target_new) == separator(fact.text, str(fact.target_true)) == " "


@pytest.mark.parametrize(
    ("text", "part", "places"),
    [
        ("Is Annabel a friend of Ann?", "Ann", [23]),
        ("Annabel met Bob in", "Ann", []),
        ("Joann and Ann", "Ann", [10]),
        ("Ann's mother met Ann", "Ann", [0, 17]),
        ("in (St. John's)", "St. John's", [4]),
        ("{Elbe} of {Elbe}", "{Elbe}", [0, 10]),
        ("Elbe2 Elbe_ Elbe", "Elbe", [12]),
        ("我们学习的历史是历史", "历史", [5, 8]),
        ("JR東日本の", "東日本", [2]),
        ("Annさんは", "Ann", [0]),
        ("서울은 한국의 수도", "서울", [0]),
        ("남서울은 서울에", "서울", [5]),
        ("Ann은", "Ann", [0]),
        ("Cafe\u0301 or Cafe", "Cafe", [9]),
        ("Cafe\u0301s", "Cafe\u0301", []),
        ("Москвич из Москвы, Москва", "Москв", []),
        ("👩\u200d👧 means 👩", "👩", [10]),
        ("👍🏽 👍", "👍", [3]),
        ("aba aba aba", "aba aba", [0, 4]),
        ("banana", "ana", []),
        ("banana", "x", []),
        ("a a", " ", []),
        ("a", "", []),
    ],
)
def test_occurrences(text, part, places):
    assert occurrences(text, part) == places


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Rome", " Rome"),
        (" Rome. It is old", " Rome"),
        (" Rome.", " Rome"),
        (" Rome.\nIt", " Rome"),
        (" Rome\r\nIt", " Rome"),
        ("\nRome", ""),
        (" Rome! It is", " Rome"),
        (" Rome? Yes", " Rome"),
        (" Rome... It is", " Rome"),
        (" Rome.It is old", " Rome"),
        (" Rome.[1] It", " Rome"),
        (' (Rome.) It', " (Rome"),
        (" St. Petersburg. It is", " St. Petersburg"),
        (" St.Petersburg. It is", " St.Petersburg"),
        (" 3.5 million. It is", " 3.5 million"),
        (" in 1999. Then", " in 1999"),
        (" J. K. Rowling. It is", " J. K. Rowling"),
        (" J.R.R. Tolkien. He", " J.R.R. Tolkien"),
        (" Apple Inc. It is", " Apple Inc"),
        (" Apple Inc. and others. It", " Apple Inc. and others"),
        (" Apple Inc.. It is", " Apple Inc"),
        (" the U.S. Navy. The", " the U.S. Navy"),
        (" the U.S. It is", " the U.S"),
        (" vitamin C. It is", " vitamin C"),
        (" George V. His", " George V"),
        (" Dr. Who?", " Dr. Who"),
        (" Node.js. It", " Node.js"),
        (" example.com", " example.com"),
        (" Yahoo! is big. It", " Yahoo! is big"),
        (" no. 5 of them. It", " no. 5 of them"),
        (" no. Paris is", " no"),
        (" on Dec. 5, 1999. He", " on Dec. 5, 1999"),
        ("北京。中国", "北京"),
        ("東京！", "東京"),
        ("谁？我", "谁"),
        ("３．５％。", "３．５％"),
        (" दिल्ली। वह", " दिल्ली"),
        (" القاهرة؟ نعم", " القاهرة"),
        ("", ""),
    ],
)  # fmt: skip
def test_until_stop(text, answer):
    assert until_stop(text) == answer


@pytest.mark.parametrize("cut", [until_stop, until_any_stop])
@given(
    st.text(alphabet="abT .!?\n。1", max_size=20), st.sampled_from(["", " The", " St", " 3", "\n"]), st.text(max_size=9)
)
def test_what_follows_an_answer_that_is_over_does_not_matter(cut, text, further, more):
    """Neither the stop nor what was taken for none depends on it."""
    said = f"{text}{further} b a."
    if is_over(said, cut):
        assert cut(said + more) == cut(said)
    assert not is_over(cut(said), cut)


@given(st.text(alphabet="ab .!?\n。St1", max_size=20))
def test_an_answer_is_the_beginning_of_its_text_and_ends_before_a_stop(text):
    answer = until_stop(text)
    assert text.startswith(answer)
    assert "\n" not in answer
    assert "。" not in answer
    assert answer == text or text[len(answer)] in ".!?\n。"


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_texts_are_joined_by_one_space_or_none(prompt, target):
    assert separator(prompt, target) in ("", " ")
    assert all(prompt[at:].startswith(target) for at in occurrences(prompt, target))


@pytest.mark.parametrize("text", ['"' * 50_000, "a." * 50_000, "的" * 50_000, "-" * 50_000], ids=lambda text: text[:2])
def test_long_texts_take_no_time(text):
    """Every rule looks at an end of the text, or goes through it once."""
    assert json.dumps([separator(text, "a"), separator("a", text), until_stop(text)[:1], occurrences(text, "b")])


def test_plain_keeps_what_is_an_article_only():
    assert plain("The") == "the" != plain("A")
    assert plain("a U.S. state") == "us state"
    assert plain("!") == "!" != plain("?")
    assert plain("２０２４年") == plain("“2024年”") == "2024年"
    assert plain("Ça") == plain("C\u0327a")


@pytest.mark.parametrize(
    ("answer", "name", "expected"),
    [
        (" Steve Jobs and Steve Wozniak", "steve jobs", True),
        (" St. Petersburg, Russia", "St. Petersburg", True),
        (" Romeo and Juliet", "Rome", False),
        (" Vienna's borders", "Vienna", True),
        (" the U.S. state", "US", True),
        (" PBS.com", "PBS", True),
        (" BBC1 on Monday", "BBC", False),
        (" Jean-Paul Sartre", "Jean Paul Sartre", True),
        ("巴黎是法国的首都", "巴黎", True),
        (" the Netherlands", "Netherlands", True),
        ("", "Rome", False),
    ],
)
def test_an_answer_states_a_name_as_whole_words(answer, name, expected):
    assert states(answer, name) is expected
