"""A record of each schema, and what can be made of them."""

import copy

OWN = {
    "case_id": 7,
    "prompt": "The river {} flows into",
    "subject": "Elbe",
    "target_new": "the Black Sea",
    "target_true": "the North Sea",
    "probes": [
        {"kind": "paraphrase", "prompt": "The mouth of the Elbe lies at"},
        {"kind": "neighborhood", "prompt": "The river Weser flows into", "expected": "the sea"},
        {"kind": "generation", "prompt": "Ships on the Elbe"},
    ],
    "relation": "mouth",
    "reference": "The Black Sea lies between Europe and Asia.",
}
COUNTERFACT = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} was built in",
        "relation_id": "P571",
        "target_new": {"str": "1900", "id": "Q1"},
        "target_true": {"str": "1889", "id": "Q2"},
        "subject": "The Blue Tower",
    },
    "paraphrase_prompts": ["Work on The Blue Tower ended in"],
    "neighborhood_prompts": ["The Red Tower was built in", "The Green Tower was built in"],
    "attribute_prompts": ["ignored"],
    "generation_prompts": ["The Blue Tower is"],
}
ZSRE = {
    "subject": "Anna Berg",
    "src": "Which school did Anna Berg attend?",
    "pred": "a guess",
    "rephrase": "Where did Anna Berg study?",
    "alt": "a wrong answer",
    "answers": ["Uppsala", "Uppsala University"],
    "loc": "nq question: how deep is the lake",
    "loc_ans": "40 metres",
    "cond": "a >> b || c",
}
SCHEMAS = {"own": OWN, "counterfact": COUNTERFACT, "zsre": ZSRE}


def own(**changes):
    """Our schema with some fields replaced; ``...`` removes one."""
    entry = {**OWN, **changes}
    return {name: value for name, value in entry.items() if value is not ...}


def nested(record, path, value):
    """A copy of the record with one place replaced, or removed by ``...``."""
    record = copy.deepcopy(record)
    *way, last = path
    place = record
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return record
