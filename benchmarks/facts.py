"""How many of the built-in facts the unedited model knows.

    python benchmarks/facts.py

Prints the share of records whose true target is more likely than the new one, and of those whose true target is the
arg-max token by token, per relation and in all.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from cakeflow.data import builtin_facts
from cakeflow.evaluation import score_targets
from cakeflow.models import load_model


def main() -> None:
    """Print one row per relation."""
    lm, facts = load_model("smollm2-135m"), builtin_facts()
    prompts = [fact.text for fact in facts]
    true, right = score_targets(lm, prompts, [str(fact.target_true) for fact in facts])
    new, _ = score_targets(lm, prompts, [fact.target_new for fact in facts])
    rows = defaultdict(list)
    for fact, preferred, said in zip(facts, (true > new).tolist(), (right == 1).tolist(), strict=True):
        for name in (str(fact.relation), "all"):
            rows[name].append((float(preferred), float(said)))
    for name in [*(name for name in rows if name != "all"), "all"]:
        share, said = (100 * torch.tensor(rows[name]).mean(0)).tolist()
        print(f"{name:20s} {len(rows[name]):4d} facts, true target preferred {share:5.1f} %, said {said:5.1f} %")


if __name__ == "__main__":
    main()
