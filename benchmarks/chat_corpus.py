"""Texts for second moments that protect chat answers: the model's own answers to the built-in facts as questions.

    python benchmarks/chat_corpus.py --out chat.txt

Each text is a whole chat in the model's template, so that ``statistics.source`` can name the file beside natural text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cakeflow.data import builtin_facts
from cakeflow.forward import continuations
from cakeflow.models import load_model


def main() -> None:
    """Write one chat per built-in fact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    arguments = parser.parse_args()
    lm = load_model(arguments.model)
    turns = [lm.user_turn(fact.text) for fact in builtin_facts()]
    end = lm.tokenizer.eos_token or ""
    answers = continuations(lm, turns, arguments.tokens)
    chats = (f"{turn}{answer}{end}" for turn, answer in zip(turns, answers, strict=True))
    arguments.out.write_text("\n\n".join(chats), encoding="utf-8")


if __name__ == "__main__":
    main()
