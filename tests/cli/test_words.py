"""Words of a command: options are taken with their values wherever they stand, and the rest keeps its order."""

import pytest

from cakeflow.cli.words import take, values_of, with_flags


@pytest.mark.parametrize(
    ("words", "rest", "taken"),
    [
        ([], [], []),
        (["fit", "--run"], ["fit"], [("--run", "")]),
        (["fit", "--run="], ["fit"], [("--run", "")]),
        (["--run", "a=b", "x", "--run=c=d"], ["x"], [("--run", "a=b"), ("--run", "c=d")]),
        (["--run", "--data", "x"], ["x"], [("--run", "--data")]),
        (["--run_dir", "a", "--runs=b"], ["--run_dir", "a", "--runs=b"], []),
        (["--part.a", "1", "--part", "--parts.b=2"], ["--part", "--parts.b=2"], [("--part.a", "1")]),
    ],
)
def test_options_are_taken_with_their_values(words, rest, taken):
    assert take(words, "--run", "--part.") == (rest, taken)
    assert values_of("--run", words) == [value for option, value in taken if option == "--run"]


def test_a_switch_that_stands_alone_gets_a_value_and_only_options_lose_hyphens():
    def command(texts: list[str], *, strict: bool = False) -> None:
        """Take texts."""

    assert with_flags(["a", "--strict", "false", "--strict"], command) == ["a", "--strict", "false", "--strict=true"]
    assert with_flags(["--strict=true", "--some-thing=a-b"], command) == ["--strict=true", "--some_thing=a-b"]
