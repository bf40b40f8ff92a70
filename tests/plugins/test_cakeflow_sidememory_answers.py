"""SR-S, SR-1, GSR and LSR on cases by hand."""

import pytest
import torch
from cakeflow_sidememory.answers import (
    AnswerCoverage,
    AnswerStability,
    ParaphraseSuccess,
    SequenceSuccess,
    answer_pattern,
    gives_in_place,
    same_words,
    share_given,
)

from cakeflow.errors import ConfigError

TOGETHER, IN_ORDER = [["Syria", "Iran"]], [["Syria"], ["Iran"]]


@pytest.mark.parametrize(
    ("text", "together", "in_order", "share"),
    [
        (" Syria, Iran", True, True, 1),
        (" Iran, Syria", True, False, 1),  # wrong order
        (" Syria, Syria, Iran", False, False, 1),  # one answer twice
        (" Syria, Syria", False, False, 0.5),
        (" Iraq, Syria, Iran", False, False, 1),  # a wrong answer before the right ones
        (" Syria, Iraq, Iran", False, False, 1),  # and between them
        (" Syria, Iran, Iraq", True, True, 1),  # behind them it does not count
        (" Syria and Iran.", True, True, 1),
        (' "SYRIA"; iran', True, True, 1),
        (" Syrian, Iran", False, False, 0.5),  # a longer word is another one
        (" the Syria, Iran", False, False, 1),
        (" Syria", False, False, 0.5),
        ("", False, False, 0),
    ],
)
def test_places_and_shares(text, together, in_order, share):
    assert gives_in_place(text, TOGETHER) is together
    assert gives_in_place(text, IN_ORDER) is in_order
    assert share_given(text, TOGETHER) == share_given(text, IN_ORDER) == share


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (" AlexanderStadler, LauraNunnink", ["Laura Nunnink", "Alexander Stadler"]),
        (" Alexander Stadler", ["AlexanderStadler"]),
        (" And Then There Were None, Ulysses", ["Ulysses", "And Then There Were None"]),
        (" New York City, New York", ["New York", "New York City"]),
        (" Georgia (country), Iran", ["Iran", "Georgia (country)"]),
        (" 's-Hertogenbosch and Go West Young Man", ["Go West, Young Man", "'s-Hertogenbosch"]),
        (" Washington D.C.", ["Washington D.C."]),
    ],
)
def test_answers_are_compared_as_words(text, answers):
    spaced = answers[0] == "AlexanderStadler"  # what was written without spaces has lost its words
    assert gives_in_place(text, [answers]) is not spaced
    assert share_given(text, [answers]) == (not spaced)


def test_an_answer_without_words_is_refused():
    with pytest.raises(ConfigError, match="has no word"):
        answer_pattern(" ,()")


@pytest.mark.parametrize(
    ("before", "after", "score"),
    [
        ("a b c d", "a b c d", 1),
        ("A, b. c", "a b c", 1),
        ("a b c d", "a c x", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # a, c: 2 of 3 and 2 of 4
        ("a b c", "c b a", 1 / 3),
        ("a", "", 0),
        ("", " .", 1),
        ("Åre är här", "åre är där", 2 / 3),
    ],
)
def test_stability_is_rouge_l(before, after, score):
    assert same_words(before, after) == pytest.approx(score)
    assert same_words(after, before) == pytest.approx(score)


def test_metrics_are_means_over_questions():
    texts, expected = [" Syria, Iran", " Iran, Syria", " Iraq"], [TOGETHER, IN_ORDER, TOGETHER]
    success, coverage = SequenceSuccess(), AnswerCoverage()
    for metric in (success, coverage):
        metric.update(texts[:1], expected[:1])
        metric.update(texts[1:], expected[1:])
    assert float(success.compute()) == pytest.approx(1 / 3)
    assert float(coverage.compute()) == pytest.approx(2 / 3)
    paraphrases = ParaphraseSuccess()
    paraphrases.update([[" Syria, Iran", " Iraq", " Iran"], [], [" Iran, Syria"]], [TOGETHER] * 3)
    assert float(paraphrases.compute()) == pytest.approx((1 / 3 + 1) / 2)
    stability = AnswerStability()
    stability.update(["a b", "c"], ["a b", "d"])
    assert float(stability.compute()) == 0.5


@pytest.mark.parametrize("metric", [SequenceSuccess, AnswerCoverage, ParaphraseSuccess, AnswerStability])
def test_no_question_is_no_number(metric):
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert torch.isnan(metric().compute())


def test_texts_need_their_answers():
    for metric in (SequenceSuccess(), AnswerCoverage(), ParaphraseSuccess()):
        with pytest.raises(ConfigError, match="1 texts and 2 lists"):
            metric.update([" Syria"], [TOGETHER, TOGETHER])
        for groups in ([], [[]], ["Syria"], "Syria"):
            with pytest.raises(ConfigError, match="text 0 has the answers"):
                metric.update([" Syria"], [groups])
    with pytest.raises(ConfigError, match="1 answers before and 0 after"):
        AnswerStability().update(["a"], [])
