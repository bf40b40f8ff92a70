"""What the commands print is text, whoever wrote it."""

import logging

import pytest

from cakeflow.cli.console import PlainFormatter, say

BAD = "Ann\x1b[3A\x1b[2Kinnocent\x1b]0;title\x07\u202e\x9b8m\x7f [red]"


def test_texts_are_shown_and_not_obeyed(capsys):
    say(BAD)
    say(f"a\nb {BAD}", end="")
    printed = capsys.readouterr().out
    assert printed == (
        "Ann\\u001b[3A\\u001b[2Kinnocent\\u001b]0;title\\u0007\\u202e\\u009b8m\\u007f [red]\n"
        "a\\nb Ann\\u001b[3A\\u001b[2Kinnocent\\u001b]0;title\\u0007\\u202e\\u009b8m\\u007f [red]"
    )


@pytest.mark.parametrize("text", ["plain", f"first\nsecond {BAD}"])
def test_log_messages_keep_their_lines_only(text):
    record = logging.LogRecord("x", logging.INFO, "x", 1, "%s", (text,), None)
    shown = PlainFormatter("%(message)s").format(record)
    assert shown.count("\n") == text.count("\n")
    assert all(line.isprintable() for line in shown.split("\n"))
