"""What the commands print is text, whoever wrote it."""

import logging
import sys
import warnings

import pytest

from cakeflow.cli.console import LogHandler, plain_warnings, say

BAD = "Ann\x1b[3A\x1b[2Kinnocent\x1b]0;title\x07\u202e\x9b8m\x7f [red]"


def test_texts_are_shown_and_not_obeyed(capsys):
    say(BAD)
    say(f"a\nb {BAD}", end="")
    printed = capsys.readouterr().out
    assert printed == (
        "Ann\\u001b[3A\\u001b[2Kinnocent\\u001b]0;title\\u0007\\u202e\\u009b8m\\u007f [red]\n"
        "a\\nb Ann\\u001b[3A\\u001b[2Kinnocent\\u001b]0;title\\u0007\\u202e\\u009b8m\\u007f [red]"
    )


@pytest.mark.parametrize("text", ["plain", f"first\nsecond {BAD}", "long " * 100])
def test_log_messages_keep_their_lines_only(text, capsys):
    LogHandler().handle(logging.LogRecord("x", logging.INFO, "x", 1, "%s", (text,), None))
    shown = capsys.readouterr().err.removesuffix("\n")
    assert shown.count("\n") == text.count("\n")
    assert all(line.isprintable() for line in shown.split("\n"))


def test_a_warning_is_one_message_without_its_place_in_the_source(capsys):
    logging.getLogger("cakeflow.of_a_test").addHandler(handler := LogHandler())
    before = warnings.formatwarning
    try:
        logging.getLogger("cakeflow.of_a_test").warning("a log message")
    finally:
        logging.getLogger("cakeflow.of_a_test").removeHandler(handler)
    with plain_warnings():
        sys.stderr.write(warnings.formatwarning("a fact\x1b[2K did not take", UserWarning, "file.py", 3))
    assert capsys.readouterr().err == "warning: a log message\nwarning: a fact\\u001b[2K did not take\n"
    assert warnings.formatwarning is before
