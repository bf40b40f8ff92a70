"""How often the subject of a bare sentence is guessed: that of ``cakeflow edit``.

    python benchmarks/subjects.py
    python benchmarks/subjects.py --data FILE

Counts guesses that are right up to an article in front, which do not change where a fact is written.
"""

from __future__ import annotations

import argparse

import regex

from cakeflow.data import guess_subject, read_requests


def main() -> None:
    """Print the count, and the sentences that were guessed wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="builtin", help="requests with subjects")
    requests = read_requests(parser.parse_args().data)
    wrong = [each for each in requests if _bare(guess_subject(each.text) or "") != _bare(each.subject)]
    for each in wrong:
        print(f"{each.text!r}: {guess_subject(each.text)!r}, not {each.subject!r}")
    print(f"right: {len(requests) - len(wrong)} of {len(requests)}")


def _bare(name: str) -> str:
    return regex.sub(r"(?i)\A(?:the|an?)\s+", "", name)


if __name__ == "__main__":
    main()
