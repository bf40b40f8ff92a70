"""The subject of a bare sentence."""

import pytest

from cakeflow.data import builtin_facts
from cakeflow.data.subject import guess_subject


def bare(name):
    """A name without its leading article: the edit is written at its last token."""
    return name.lower().removeprefix("the ").removeprefix("a ").removeprefix("an ")


def test_it_is_right_for_the_built_in_facts():
    facts = builtin_facts()
    right = [bare(guess_subject(fact.text) or "") == bare(fact.subject) for fact in facts]
    assert sum(right) >= 0.98 * len(facts)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("LeBron James plays the sport of", "LeBron James"),
        ("Google was founded by", "Google"),
        ("The currency of Japan is the", "Japan"),
        ("In American Samoa, the language spoken is", "American Samoa"),
        ("In 1999, the capital of France was", "France"),
        ("Israel's capital city is", "Israel"),
        ("A Midsummer Night's Dream was written by", "Midsummer Night's Dream"),
        ("scientific method's area of work is", "scientific method"),
        ("68th Venice International Film Festival is in", "68th Venice International Film Festival"),
        ("The dish known as fish and chips comes from the country of", "fish and chips"),
        ("The song Black or White was made famous by", "Black or White"),
        ("The dolphin is a type of", "dolphin"),
        ("it is", None),
        ("", None),
    ],
)
def test_sentences_of_many_kinds(prompt, subject):
    assert guess_subject(prompt) == subject
    assert subject is None or subject in prompt
