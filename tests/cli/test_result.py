"""A run's result in the terminal."""

from cakeflow.cli.result import show_fit
from cakeflow.core.run import FitResult
from cakeflow.evaluation.outcome import Outcome
from cakeflow.journal import Journal
from cakeflow.journal.schema import FreeAnswer


def answer(topic, prompt, before, after, expected):
    return FreeAnswer(topic=topic, form="completion", prompt=prompt, expected=expected, before=before, after=after)


def test_the_verdict_comes_last_and_what_changed_is_named(lm, tmp_path, capsys):
    answers = [
        answer("fact", "Ann lives in", "Oslo", "Rome", "Rome"),
        answer("neighbor", "Bob lives in", "Lyon", "Rome", "Lyon"),
    ]
    shared = {"before": {"learned": 0.0}, "after": {"learned": 1.0}, "timings": {"keys": 2.0}, "timed": 1, "peaks": {}}
    result = FitResult(
        **shared, logged={}, protocol="clean-v2", journal=Journal(lm), folder=tmp_path, outcome=Outcome(answers)
    )
    show_fit(result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == ("1 of 1 facts learned; 1 of 1 other answers changed: 'Bob lives in' (Lyon -> Rome)")
    assert lines[-1] == f"run folder: {tmp_path}"
    assert any("Other answers that changed" in line for line in lines)
    show_fit(FitResult(**shared, logged={}, protocol="", journal=Journal(lm), folder=None))
    assert "run folder" not in capsys.readouterr().out
