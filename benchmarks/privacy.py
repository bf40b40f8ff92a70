"""What an edit gives away: recall of 40 edited subjects among the 531 built-in ones, from the change and C alone.

    python benchmarks/privacy.py --methods memit alphaedit
    python benchmarks/privacy.py --methods memit --decoys 1 --residual 1.0

The attacker has the base model, the edited weights and second moments of its own corpus, and reads the keys of
candidates in the sentence "NAME is a". ``recall`` is by exposure, whether a key lies in the row space of the change;
``recall_by_response`` by how far the change moves the output at a key, over the key's length. Both are means over the
edited layers. ``--decoys N`` writes N other built-in subjects with each fact. ``decoys_kept`` is the share of the true
answers about these (without decoys, about those that ``--decoys 1`` would take) that the model gave before and still
gives, ``others_kept`` that about all other subjects that are not edited.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence

import torch

from cakeflow import Contexts, Editor, EditRequest
from cakeflow.core import choose_decoys
from cakeflow.data import builtin_facts
from cakeflow.evaluation import score_targets
from cakeflow.forward import encode_batch, read_keys
from cakeflow.metrics import SubjectRecall, exposure
from cakeflow.models import LanguageModel, Site
from cakeflow.solvers import Decoys


def main() -> None:
    """Print one line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["memit", "alphaedit"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--decoys", type=int, default=0, help="for each fact")
    parser.add_argument("--residual", type=float, default=1.0, help="of a decoy, in mean residuals of the facts")
    arguments = parser.parse_args()
    options = {name: value for name, value in vars(arguments).items() if name != "methods"}
    for method in arguments.methods:
        start = time.perf_counter()
        numbers = measured(method, **options)
        seconds = round(time.perf_counter() - start)
        print(json.dumps({"method": method, **options, **numbers, "seconds": seconds}), flush=True)


def measured(method: str, seed: int, facts: int, decoys: int, residual: float) -> dict[str, float]:
    """Edit some facts and return the recall of their subjects, that of chance, and what the edit is worth."""
    everything = builtin_facts()
    edited = random.Random(seed).sample(everything, facts)
    editor = Editor.from_pretrained("smollm2-135m", method=method, seed=seed)
    if decoys:
        solver = Decoys(editor.module.solver, decoys, residual)
        editor = Editor.from_pretrained("smollm2-135m", method=method, seed=seed, solver=solver)
    lm, module = editor.module.lm, editor.module
    subjects = list(dict.fromkeys(fact.subject for fact in everything))
    sites = [Site(layer, "mlp_out") for layer in module.layers]
    keys = read_keys(
        lm, encode_batch(lm, [EditRequest("{} is a", each, "name") for each in subjects], Contexts()), sites
    )
    weights = {site: lm.oriented(site).detach().clone() for site in sites}
    names, hidden = (
        {each.subject for each in choose_decoys(edited, each=decoys or 1)},
        {each.subject for each in edited},
    )
    before = right(lm, everything)
    result = editor.fit(edited)
    exposures, responses = torch.zeros(2, len(subjects), dtype=torch.float64)
    for site in sites:
        change = (lm.oriented(site).detach() - weights[site]).double()
        exposures += exposure(change, keys[site], module.covariances[site.layer].moment) / len(sites)
        responses += (keys[site] @ change.T).norm(dim=1) / keys[site].norm(dim=1) / len(sites)
    numbers = {"recall": recall(exposures, subjects, hidden), "recall_by_response": recall(responses, subjects, hidden)}
    numbers["chance"] = len(hidden) / len(subjects)
    rates = ("efficacy", "efficacy_exact", "generalization", "specificity")
    numbers |= {name: round(result.after[name], 4) for name in rates}
    kept = right(lm, everything)
    for name, of_decoys in (("decoys_kept", True), ("others_kept", False)):
        asked = torch.tensor([(f.subject in names) == of_decoys and f.subject not in hidden for f in everything])
        numbers[name] = round(float(kept[asked & before].double().mean()), 4)
    return numbers


def right(lm: LanguageModel, facts: Sequence[EditRequest]) -> torch.Tensor:
    """Return of which facts the true answer is the most likely one, token by token."""
    return score_targets(lm, [fact.text for fact in facts], [str(fact.target_true) for fact in facts])[1] == 1


def recall(scores: torch.Tensor, subjects: Sequence[str], edited: set[str]) -> float:
    """Return the share of the edited subjects among as many candidates of the highest scores."""
    metric = SubjectRecall()
    metric.update(scores, torch.tensor([subject in edited for subject in subjects]))
    return float(metric.compute())


if __name__ == "__main__":
    main()
