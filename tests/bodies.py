"""Bodies of ledger entries, complete but for what a test changes."""

import hashlib
import json

from cakeflow.journal.schema import BODIES

HERE = {"who": "ann@host", "versions": {"cakeflow": "0.2.0"}, "threads": 1}
EXAMPLES = {
    "model": {"fingerprint": "ab12", "dtype": "torch.float32"},
    "run": {**HERE, "model": "tiny", "settings": {}, "edits": 4, "batch_size": 2, "data": "0" * 64, "format": 2},
    "evaluation": {"stage": "after", "edits": 4, "protocol": "clean-v1", "metrics": {"efficacy": 0.5}},
    "batch": {"batch": 0, "files": {}, "hashes": [], "targets": [], "numbers": {}, "changes": []},
    "rollback": {**HERE, "batches": [0], "places": {"block.0.weight": "0" * 64}},
    "policy": {"outcome": "held", "faults": [], "policy": "0" * 64},
    "end": {"files": {"run.json": "0" * 64}},
}


def body(kind, **changes):
    """A body of a kind."""
    return BODIES[kind].model_validate(EXAMPLES[kind] | changes)


def raw(path):
    """Kind and body of every entry of a ledger, as they stand in the file."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [(line["kind"], line["body"]) for line in lines]


def forge(path, entries):
    """Write any bodies into a ledger whose hashes are sound."""
    text, previous = b"", ""
    for number, (kind, content) in enumerate(entries):
        line = {"number": number, "kind": kind, "time": "", "body": content, "previous": previous, "hash": ""}
        previous = line["hash"] = hashlib.sha256(dumps(line)).hexdigest()
        text += dumps(line) + b"\n"
    path.write_bytes(text)


def dumps(line):
    """JSON as a ledger has it."""
    return json.dumps(line, sort_keys=True, separators=(",", ":")).encode()
