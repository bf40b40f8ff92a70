"""The model card of an edited model: Markdown in which texts from requests and the ledger are never markup."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from cakeflow.errors import visible
from cakeflow.export.delta_layout import Layouts, summary
from cakeflow.export.manifest import MANIFEST, Manifest, utc
from cakeflow.journal.ledger import Entry, bodies, requests_in_force
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.schema import BatchBody, EndBody, EvaluationBody, RollbackBody, RunBody
from cakeflow.journal.store import LEDGER

MOST_EDITS = 50
"""Edits that are listed at most."""
LIBRARIES = {"model": "transformers", "lora": "peft", "delta": "cakeflow", "memory": "cakeflow", "gguf": "llama.cpp"}
"""Format -> what loads it."""
USES = {
    "model": "AutoModelForCausalLM.from_pretrained(FOLDER)  # transformers",
    "lora": "AutoPeftModelForCausalLM.from_pretrained(FOLDER)  # peft",
    "delta": "cakeflow apply FOLDER BASE EDITED",
    "memory": "cakeflow.export.apply_memory(cakeflow.models.load_model(BASE), FOLDER)",
    "gguf": "ollama create NAME --file FOLDER/Modelfile",
}
"""Format -> how it is used."""


def model_card(manifest: Manifest, entries: Sequence[Entry], task: str = "text-generation", base: str = "") -> str:
    """Return the card of an export in any format.

    Args:
        manifest: Its manifest.
        entries: Entries of the run's ledger, without batches that were rolled back; empty if there is no ledger.
        task: What the model is for, in the hub's words (``pipeline_tag``).
        base: Hub id of the base model, if its name in the manifest is none.

    Returns:
        Markdown after a YAML header, as the Hugging Face hub reads it.
    """
    runs = bodies(entries, RunBody)
    parts = [_header(manifest, entries, task, base), _identity(manifest, entries), _use(manifest, task)]
    parts += [*_warning(entries), *_rollbacks(manifest)]
    parts += (
        _history(entries, runs[-1]) if runs else ["There is no ledger here: method, metrics and edits are unknown.\n"]
    )
    return "\n".join([*parts, *_privacy(manifest, runs), _verify(manifest)])


def _header(manifest: Manifest, entries: Sequence[Entry], task: str, base: str) -> str:
    """Return the card's data as the hub reads them; a base model only if its name can be one of the hub's."""
    name = base or manifest.model
    known = bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII)) and not Path(name).exists()
    data = ModelCardData(
        base_model=name if known else None,
        base_model_relation=("finetune" if manifest.format in ("model", "gguf") else "adapter") if known else None,
        library_name=LIBRARIES[manifest.format],
        pipeline_tag=task,
        tags=["knowledge-editing", "cakeflow"],
        model_name=f"{name.split('/')[-1]}, edited" if known else "edited model",
        eval_results=_results(entries, task),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _results(entries: Sequence[Entry], task: str) -> list[EvalResult] | None:
    """Return the metrics of the edited model for the hub's tables; None without any, or where weights changed since."""
    after = [body for body in bodies(entries, EvaluationBody) if body.stage == "after"]
    plain = re.compile(r"[\w./+ -]+", re.ASCII)
    if not after or _has_changed(entries) or not plain.fullmatch(after[-1].protocol):
        return None
    return [
        EvalResult(
            task_type=task,
            dataset_type="edit-requests",
            dataset_name=f"{after[-1].edits} edited facts, protocol {after[-1].protocol}",
            metric_type=name,
            metric_value=value,
        )
        for name, value in after[-1].metrics.items()
        if math.isfinite(value) and plain.fullmatch(name)
    ] or None


def _use(manifest: Manifest, task: str) -> str:
    """Return how the export is loaded."""
    text = USES[manifest.format]
    if task != "text-generation":
        text = text.replace("ForCausalLM", "ForImageClassification")
    return f"## How to use\n\n{_block([text])}"


def _identity(manifest: Manifest, entries: Sequence[Entry]) -> str:
    runs = bodies(entries, RunBody)
    versions: dict[str, str] = runs[-1].versions if runs else circumstances().versions
    rows = {
        "base model": manifest.model,
        "its SHA-256": manifest.fingerprint,
        "type of the weights": manifest.dtype.removeprefix("torch."),
        "facts edited": manifest.edits,
        "weights changed": ", ".join(manifest.weights) or "none",
        **_stored(manifest),
        **(
            {"modules put in place": ", ".join(change.place for change in manifest.changes)} if manifest.changes else {}
        ),
        "last hash of the ledger": manifest.ledger or "no ledger",
        **_occasion(entries),
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    }
    head = f"# {escape(manifest.model)}, edited\n\nFacts in this model were changed by knowledge editing.\n"
    return f"{head}\n{markdown_table([['', ''], *([name, str(value)] for name, value in rows.items())])}"


def _stored(manifest: Manifest) -> dict[str, str]:
    """Return how a delta holds the weights, and what that saves."""
    if manifest.format != "delta" or not manifest.details:
        return {}
    return {"stored": summary(Layouts.model_validate(manifest.details).layouts)}


def _occasion(entries: Sequence[Entry]) -> dict[str, str]:
    """Return who edited and when, as far as a ledger says it."""
    rows: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry.body, RunBody):
            rows = {"edited by": entry.body.who, "started": utc(entry.time), "ended": "not ended"}
        elif isinstance(entry.body, EndBody):
            rows["ended"] = utc(entry.time)
    return rows


def _rollbacks(manifest: Manifest) -> Iterator[str]:
    """Yield which batches of the run are not in the model, because they were taken back."""
    if manifest.rollbacks:
        lines = [f"- {escape(each)}\n" for each in manifest.rollbacks]
        yield f"**A part of the run was taken back and is not in this model:**\n\n{''.join(lines)}"


def _warning(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield a warning if the last run did not come to its end."""
    runs = [entry for entry in entries if isinstance(entry.body, RunBody)]
    own = [entry for entry in entries if runs and entry.number > runs[-1].number]
    planned = sum(run.edits for run in bodies(runs[-1:], RunBody))  # none of a page, whose run never ends
    if planned and not bodies(own, EndBody):
        edited = sum(len(body.hashes) for body in bodies(own, BatchBody))
        yield f"**The run was stopped before its end: {edited} of its {planned} facts are edited.**\n"


def _history(entries: Sequence[Entry], run: RunBody) -> Iterator[str]:
    """Yield the method, the metrics and the edits, as the ledger has them."""
    batch = f"batches of {run.batch_size}" if run.batch_size else "one batch"
    yield f"## Method\n\n{_block([f'{name}: {value}' for name, value in run.settings.items()])}"
    yield f"Facts were edited in {escape(batch)}.\n"
    yield f"## Metrics\n\n{_metrics(entries)}"
    yield f"## Edits\n\n{_edits(entries)}"


def _metrics(entries: Sequence[Entry]) -> str:
    stages = {body.stage: body for body in bodies(entries, EvaluationBody)}
    columns = [stages[stage] for stage in ("before", "after") if stage in stages]
    if not columns:
        return "Nothing was measured.\n"
    names = sorted({name for each in columns for name, value in each.metrics.items() if not math.isnan(value)})
    rows = [["metric", *(f"{each.stage}, {each.edits} edits" for each in columns)]]
    rows += [[name, *(_number(each.metrics.get(name, math.nan)) for each in columns)] for name in names]
    protocols = ", ".join(sorted({each.protocol for each in columns}))
    text = f"{markdown_table(rows)}\nMeasured under the protocol {escape(protocols)}; others are not comparable.\n"
    note = "The weights were changed after the last measurement: the metrics are those of the model before that."
    return text + (f"\n{note}\n" if _has_changed(entries) else "")


def _has_changed(entries: Sequence[Entry]) -> bool:
    """Return whether the weights were changed after the last measurement of the edited model."""
    changed = [each.number for each in entries if isinstance(each.body, (BatchBody, RollbackBody))]
    measured = [each.number for each in entries if isinstance(each.body, EvaluationBody) and each.body.stage == "after"]
    return max(measured, default=-1) < max(changed, default=-1)


def _edits(entries: Sequence[Entry]) -> str:
    requests = requests_in_force(entries)
    if not requests:
        return "The ledger has hashes of the requests, not their texts.\n"
    lines = [json.dumps(request, ensure_ascii=False) for request in requests[:MOST_EDITS]]
    more = len(requests) - MOST_EDITS
    return _block(lines) + (f"and {more} more, which the ledger has.\n" if more > 0 else "")


def _privacy(manifest: Manifest, runs: Sequence[RunBody]) -> Iterator[str]:
    """Yield what the changed weights give away, whether or not the ledger has the texts."""
    if not manifest.weights:
        return
    text = (
        "Whoever has the base model and these weights can test of any name whether it was edited: the row space of the "
        "change holds the keys of its subjects (`cakeflow.metrics.exposure`)."
    )
    if any("Decoys(" in str(run.settings.get("solver")) for run in runs):
        text += (
            " Names that were not edited were written with them as decoys, so that a name found there need not be one "
            "of the edited ones; how far the change moves each of them may still tell."
        )
    yield f"## Privacy\n\n{text}\n"


def _verify(manifest: Manifest) -> str:
    ledger = (
        f"The run's `journal/{LEDGER}` must end with the entry of the hash above; every entry has the hash of the one "
        "before, so that none can be changed, added or left out unnoticed.\n"
    )
    return (
        f"## How to verify\n\n`{MANIFEST}` has the SHA-256 of each file of tensors (`sha256sum *.safetensors`), of the "
        "base model, and of each changed weight before and after, as cakeflow computes them "
        f"(`LanguageModel.fingerprint`, `cakeflow.storage.tensor_hash`).\n{ledger if manifest.ledger else ''}"
    )


def escape(value: object) -> str:
    r"""Return a value as plain words for a line of Markdown or a cell of its tables.

    Example:
        >>> print(escape("<b>|`a_b`"))
        \<b\>\|\`a\_b\`
    """
    return re.sub(r"([!-+/:-@\[-`{-~]|(?<=[wW])\.)", r"\\\1", visible(str(value)))


def _block(lines: Sequence[str]) -> str:
    """Return lines as they are, within a fence longer than any in them."""
    texts = [visible(line) for line in lines]
    fence = "`" * (1 + max([2, *(len(run) for line in texts for run in re.findall("`+", line))]))
    return "\n".join([fence, *texts, fence, ""])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of a head and further rows of plain words."""
    cells = [[*map(escape, row)] for row in rows]
    ruled = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
