"""Texts that look the same have a normal form in common."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.data.normal_forms import LOOKALIKES, normal_forms, pattern_forms


@given(st.text(st.characters(codec="utf-8")))
def test_forms_do_not_change_any_more(text):
    first, *others = normal_forms(text)
    assert normal_forms(first)[0] == first
    assert len(others) == len(pattern_forms("x")) - 1


@given(
    st.text("abcXYZ 09-'"), st.lists(st.sampled_from("\u200b\u00ad\u034f\ufe0f\u2066\U000e0041\x00\x1b"), max_size=5)
)
def test_invisible_characters_make_no_difference(text, invisible):
    spread = text
    for index, character in enumerate(invisible):
        at = index * 7 % (len(spread) + 1)
        spread = spread[:at] + character + spread[at:]
    assert normal_forms(spread) == normal_forms(text)


@pytest.mark.parametrize("plain", "aeopcxyijs")
def test_letters_of_other_scripts_are_those_that_they_look_like(plain):
    others = [letter for letter, like in LOOKALIKES.items() if like == plain]
    assert others
    assert all(plain in {form.casefold() for form in normal_forms(letter)} or letter for letter in others)
    assert any(plain in normal_forms(letter)[1:] for letter in others)


def test_marks_that_make_a_word_stay():
    for text in ("\u0939\u093f\u0928\u094d\u0926\u0940", "\ud55c\uad6d", "\u4e2d\u56fd"):
        assert set(normal_forms(text)) == {text}


def test_a_pattern_keeps_its_syntax():
    assert pattern_forms(r"(?i)^\bA|b\d{2}$") == (r"(?i)^\bA|b\d{2}$",) * 3
    assert pattern_forms("\u2019")[1] == "'"
