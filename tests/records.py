"""A record of each schema, what can be made of them, and a small file of each schema."""

import copy
import gzip
import json

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
COUNTERFACT_SAMPLE = [
    {
        "case_id": case,
        "pararel_idx": 100 + case,
        "requested_rewrite": {
            "prompt": "{} keeps its archive in",
            "relation_id": "P276",
            "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": "Lund", "id": "Q2"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"It rained. The archive of {subject} is in", f"{subject} stores its papers in"],
        "neighborhood_prompts": ["The Old Mill keeps its archive in"],
        "attribute_prompts": ["The New Mill keeps its archive in"],
        "generation_prompts": [f"Visitors of {subject}"],
    }
    for case, (subject, new) in enumerate([("The Paper Guild", "Turku"), ("Café Söder", "Malmö")])
]
ZSRE_SAMPLE = [
    {
        "subject": "The Slow Train",
        "src": "Who directed The Slow Train?",
        "pred": "Nobody",
        "rephrase": "By whom was The Slow Train directed?",
        "alt": "Nils Holm",
        "answers": ["Ida Dahl"],
        "loc": "nq question: who wrote the long song",
        "loc_ans": "Per Ek",
        "cond": "Nobody >> Nils Holm || Who directed The Slow Train?",
    }
]
OWN_SAMPLE = [
    {"prompt": "{} is made of", "subject": "The bell", "target_new": "tin", "target_true": "bronze", "probes": None},
    {"prompt": "{} is made of", "subject": "Kærnhuset", "target_new": "木", "probes": [
        {"kind": "neighborhood", "prompt": "The barn is made of", "expected": "oak"}]},
]  # fmt: skip
SAMPLES = {"counterfact": COUNTERFACT_SAMPLE, "zsre": ZSRE_SAMPLE, "own": OWN_SAMPLE}
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


def as_json(records):
    return json.dumps(records, ensure_ascii=False, indent=1)


def as_lines(records):
    return "\n".join(["", *(json.dumps(record, ensure_ascii=False) for record in records), " ", ""])


def write_records(path, records):
    """Write a JSON or JSON lines file, as its name says."""
    return write(path, (as_lines if ".jsonl" in path.name else as_json)(records))


def write(path, text):
    """Write a text file, packed if it is called so."""
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
