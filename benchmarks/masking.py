"""What a mask over the prompt undoes of each edited fact, and what a rollback does beside it.

    python benchmarks/masking.py --method memit --facts 12

Edits built-in facts, or those of a file, in one batch, and prints ``KnowledgeCheck``'s table: for each fact whether
hiding 4, 8, 12 or 15 % of the prompt's positions, wherever they are, makes the old answer the likelier one again (our
reading of One Mask, 2605.28839), and whether a rollback brings its likelihood back bit for bit. Below it the shares,
those of reversed facts too, before and after the edits.
"""

from __future__ import annotations

import argparse
import json

from cakeflow import Editor
from cakeflow.callbacks import KnowledgeCheck
from cakeflow.data import read_requests


def main() -> None:
    """Edit, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--facts", type=int, default=12)
    arguments = parser.parse_args()
    check = KnowledgeCheck(limit=None)
    trainer = {"callbacks": [check], "logger": False}
    editor = Editor.from_pretrained(arguments.model, arguments.method, trainer=trainer)
    editor.fit(read_requests(arguments.data)[: arguments.facts], evaluate=False)
    print(check.table())
    for name, row in (("before", check.rows[0]), ("after", check.rows[-1])):
        print(json.dumps({name: {key: round(value, 4) for key, value in row.items()}}))


if __name__ == "__main__":
    main()
