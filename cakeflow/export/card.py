"""The model card of an edited model: Markdown in which no text from a request or a ledger is anything but text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from cakeflow.errors import LedgerError
from cakeflow.export.manifest import MANIFEST, Manifest
from cakeflow.journal.ledger import Entry
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.store import LEDGER

SHOWN = 50
"""Most edits that are listed."""


def model_card(manifest: Manifest, entries: Sequence[Entry]) -> str:
    """The card.

    Args:
        manifest: What the model was made from.
        entries: Of the run's ledger, without the batches that were taken back; none if no ledger is at hand.

    Returns:
        Markdown after a YAML header, as the Hugging Face hub reads it.

    Raises:
        LedgerError: If the entries are not of the form that cakeflow writes.
    """
    try:
        parts = [_header(manifest), _identity(manifest, entries), *_account(entries), _verify(manifest)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LedgerError(f"not what cakeflow writes into a ledger ({error!r}); take it from a copy") from error
    return "\n".join(parts)


def _header(manifest: Manifest) -> str:
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-editing", "cakeflow"],
    }
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", manifest.model, re.ASCII):  # the hub takes nothing else
        header |= {"base_model": manifest.model, "base_model_relation": "finetune"}
    return f"---\n{yaml.safe_dump(header)}---\n"


def _identity(manifest: Manifest, entries: Sequence[Entry]) -> str:
    run = _last(entries, "run")
    versions = run["versions"] if run else circumstances()["versions"]
    rows = {
        "base model": manifest.model,
        "its SHA-256": manifest.fingerprint,
        "type of the weights": manifest.dtype.removeprefix("torch."),
        "facts edited": manifest.edits,
        "weights changed": ", ".join(manifest.weights) or "none",
        "head of the ledger": manifest.ledger or "no ledger was kept",
        "made with": ", ".join(f"{name} {found}" for name, found in sorted(versions.items())),
    }
    head = f"# {escape(manifest.model)}, edited\n\nFacts in this model were changed by knowledge editing.\n"
    return f"{head}\n{_table([['', ''], *([name, escape(value)] for name, value in rows.items())])}"


def _account(entries: Sequence[Entry]) -> Iterator[str]:
    """What the ledger tells: how it was edited, what was measured, and the edits."""
    run = _last(entries, "run")
    if run is None:
        yield "No ledger is at hand here, so method, measurements and edits are not told.\n"
        return
    batch = f"batches of {run['batch_size']}" if run["batch_size"] else "one batch"
    yield f"## Method\n\n{_block([f'{name}: {value}' for name, value in run['settings'].items()])}"
    yield f"Facts were edited in {escape(batch)}.\n"
    yield f"## Metrics\n\n{_metrics(entries)}"
    yield f"## Edits\n\n{_edits(entries)}"


def _metrics(entries: Sequence[Entry]) -> str:
    told = {entry.body["stage"]: entry for entry in entries if entry.kind == "evaluation"}
    found = [told[stage] for stage in ("before", "after") if stage in told]
    if not found:
        return "Nothing was measured.\n"
    names = sorted({n for entry in found for n, value in entry.body["metrics"].items() if value is not None})
    rows = [["metric", *(escape(f"{entry.body['stage']}, {entry.body['edits']} edits") for entry in found)]]
    rows += [[escape(name), *(_number(entry.body["metrics"].get(name)) for entry in found)] for name in names]
    protocols = ", ".join(sorted({str(entry.body["protocol"]) for entry in found}))
    text = f"{_table(rows)}\nMeasured under the protocol {escape(protocols)}; others are not comparable.\n"
    changed = max((entry.number for entry in entries if entry.kind in ("batch", "rollback")), default=-1)
    stale = "after" not in told or told["after"].number < changed
    return text + ("\nThe weights were changed after the last measurement.\n" if stale else "")


def _edits(entries: Sequence[Entry]) -> str:
    batches = [entry.body for entry in entries if entry.kind == "batch"]
    requests = [request for body in batches for request in body.get("requests", ())]
    if not requests:
        return "The ledger has hashes of the requests, not their texts.\n"
    lines = [json.dumps(request, ensure_ascii=False) for request in requests[:SHOWN]]
    more = len(requests) - SHOWN
    return _block(lines) + (f"and {more} more, which the ledger has.\n" if more > 0 else "")


def _verify(manifest: Manifest) -> str:
    ledger = (
        f"The run's `journal/{LEDGER}` must end with the entry of the hash above; every entry has the hash of the one "
        "before, so that none can be changed, added or left out unnoticed.\n"
    )
    return (
        f"## How to verify\n\n`{MANIFEST}` has the SHA-256 of each file of tensors (`sha256sum *.safetensors`), of the "
        "base model, and of each changed weight before and after, as cakeflow takes them "
        f"(`LanguageModel.fingerprint`, `cakeflow.record.tensor_hash`).\n{ledger if manifest.ledger else ''}"
    )


def escape(value: object) -> str:
    r"""A value as plain words in a line of Markdown or a cell of its tables.

    Example:
        >>> print(escape("<b>|`a_b`"))
        \<b\>\|\`a\_b\`
    """
    return re.sub(r"([!-+/:-@\[-`{-~]|(?<=[wW])\.)", r"\\\1", _visible(str(value)))


def _visible(text: str) -> str:
    """No line ends, control characters, or marks that turn the direction of writing: their escapes instead."""
    return "".join(sign if sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)


def _block(lines: Sequence[str]) -> str:
    """Lines as they are, within a fence longer than any in them."""
    shown = [_visible(line) for line in lines]
    fence = "`" * (1 + max([2, *(len(run) for line in shown for run in re.findall("`+", line))]))
    return "\n".join([fence, *shown, fence, ""])


def _table(rows: Sequence[Sequence[str]]) -> str:
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _last(entries: Sequence[Entry], kind: str) -> Mapping[str, Any] | None:
    found = [entry.body for entry in entries if entry.kind == kind]
    return found[-1] if found else None
