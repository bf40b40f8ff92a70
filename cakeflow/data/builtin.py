"""The facts that ship with the package: 16 relations, each record with probes, a reference text and a way back."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from itertools import zip_longest
from typing import Any

import yaml

from cakeflow.data.request import EditRequest, Probe


def builtin_facts() -> list[EditRequest]:
    """Return all built-in records, relations interleaved so that the first N cover many relations.

    The new target of a fact is another target of its relation. Neighborhood prompts are about other subjects that share
    the true target, so a good edit leaves their answers alone.

    Example:
        >>> facts = builtin_facts()
        >>> len(facts) >= 240, len({fact.relation for fact in facts[:40]}) >= 12
        (True, True)
    """
    groups = zip_longest(*(list(_records(relation)) for relation in builtin_relations()))
    return [record for group in groups for record in group if record is not None]


def builtin_relations() -> list[dict[str, Any]]:
    """Return the relations of the built-in facts as the file has them: wordings, and subjects by their target."""
    relations: list[dict[str, Any]] = yaml.safe_load(
        files("cakeflow.data").joinpath("facts.yaml").read_text(encoding="utf-8")
    )
    return relations


def reversed_prompts() -> dict[str, str]:
    """Return relation -> prompt that asks for the subject: ``{}`` is the object, for our own facts and CounterFact's.

    Example:
        >>> reversed_prompts()["P36"].replace("{}", "Oslo")
        'Oslo is the capital of'
    """
    prompts: dict[str, str] = yaml.safe_load(
        files("cakeflow.data").joinpath("reversed.yaml").read_text(encoding="utf-8")
    )
    return prompts


def neutral_text() -> str:
    """Return some 900 tokens about everyday matters, written for this project; no built-in fact is in them."""
    return files("cakeflow.data").joinpath("neutral.txt").read_text(encoding="utf-8")


def _records(relation: dict[str, Any]) -> Iterator[EditRequest]:
    """Yield the records of one relation, true targets interleaved."""
    targets = relation["targets"]
    names = list(targets)
    for place in range(max(len(target["subjects"]) for target in targets.values())):
        for index, true in enumerate(names):
            subjects = targets[true]["subjects"]
            if place < len(subjects):
                shift = 1 + place % (len(names) - 1)
                new = names[(index + shift) % len(names)]
                yield _record(relation, subjects[place], true, new, [s for s in subjects if s != subjects[place]])


def _record(relation: dict[str, Any], subject: str, true: str, new: str, others: list[str]) -> EditRequest:
    probes = [Probe("paraphrase", text.replace("{}", subject)) for text in relation["paraphrases"][:2]]
    probes += [Probe("neighborhood", relation["prompt"].replace("{}", other)) for other in others]
    probes += [Probe("generation", text.replace("{}", subject)) for text in relation["generation"][:2]]
    return EditRequest(
        prompt=relation["prompt"],
        subject=subject,
        target_new=new,
        target_true=true,
        probes=tuple(probes),
        relation=relation["relation"],
        reference=relation["targets"][new]["reference"].strip(),
    )
