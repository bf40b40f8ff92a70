"""What an edit gives away: recall of 40 edited subjects among the 531 built-in ones, from the change and C alone.

    python benchmarks/privacy.py --methods memit alphaedit

The attacker has the base model, the edited weights and second moments of its own corpus, and reads the keys of
candidates in the sentence "NAME is a". Exposure is the mean over the edited layers.
"""

from __future__ import annotations

import argparse
import json
import random

import torch

from cakeflow import Contexts, Editor, EditRequest
from cakeflow.data import builtin_facts
from cakeflow.forward import encode_batch, read_keys
from cakeflow.metrics import SubjectRecall, exposure
from cakeflow.models import Site

FACTS = 40


def main() -> None:
    """Print one line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["memit", "alphaedit"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for method in arguments.methods:
        print(json.dumps({"method": method, "seed": arguments.seed, **measured(method, arguments.seed)}))


def measured(method: str, seed: int) -> dict[str, float]:
    """Edit some facts and return the recall of their subjects, that of chance, and the efficacy."""
    facts = builtin_facts()
    edited = random.Random(seed).sample(facts, FACTS)
    editor = Editor.from_pretrained("smollm2-135m", method=method)
    lm, module = editor.module.lm, editor.module
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    requests = [EditRequest("{} is a", subject, "name") for subject in subjects]
    sites = [Site(layer, "mlp_out") for layer in module.layers]
    keys = read_keys(lm, encode_batch(lm, requests, Contexts()), sites)
    weights = {site: lm.oriented(site).detach().clone() for site in sites}
    result = editor.fit(edited)
    scores = torch.zeros(len(subjects), dtype=torch.float64)
    for site in sites:
        change = lm.oriented(site).detach() - weights[site]
        scores += exposure(change, keys[site], module.covariances[site.layer].moment) / len(sites)
    metric, names = SubjectRecall(), {fact.subject for fact in edited}
    metric.update(scores, torch.tensor([subject in names for subject in subjects]))
    chance = len(names) / len(subjects)
    return {"recall": float(metric.compute()), "chance": chance, "efficacy": result.after["efficacy"]}


if __name__ == "__main__":
    main()
