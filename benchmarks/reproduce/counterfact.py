"""Edit CounterFact records in one batch, once per method and setting, and report the metrics before and after.

    python benchmarks/reproduce/counterfact.py --data verbatim_300.json --corpus valid.txt test.txt [--json FILE]
    python benchmarks/reproduce/counterfact.py --data verbatim_300.json --corpus valid.txt test.txt --first 100 \
        --methods alphaedit --settings sweep.yaml --json FILE

Target values of the unedited model are the same for every method, so they are found once per setting of their own; the
time that this took is counted for each. Between rows the model is rolled back.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from sweep import parser, show, start


def main() -> None:
    """Print one row per method and setting."""
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", default=["memit", "alphaedit", "cake_paper", "cake"])
    options.add_argument("--settings", type=Path, help="YAML list of arguments of LocateThenEdit, one setting each")
    args = options.parse_args()
    settings = yaml.safe_load(args.settings.read_text()) if args.settings else [{}]
    row = start(args)
    show("before", row("before"))
    for setting in settings:
        for method in args.methods:
            name = f"{method} {json.dumps(setting)}".removesuffix(" {}")
            show(name, row(name, method, **setting))


if __name__ == "__main__":
    main()
