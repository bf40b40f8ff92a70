"""Exports are loaded and asked again before they count as written: what gives other answers is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from cakeflow.errors import EditError, ExportError
from cakeflow.export.delta import apply_delta, require_base
from cakeflow.export.gguf import load_gguf
from cakeflow.export.lora import Adapted, factors_of, parts_of
from cakeflow.export.manifest import Manifest
from cakeflow.export.memory import apply_memory
from cakeflow.export.questions import answers_of, difference
from cakeflow.journal.journal import Journal
from cakeflow.models.base import EditableModel
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import without_progress_bars


def check_model(lm: EditableModel, folder: Path, texts: Sequence[str]) -> None:
    """Load an exported model and compare it with the one in memory: weights, tokens and logits, bit for bit.

    Args:
        lm: The model in memory.
        folder: The export.
        texts: Questions.

    Raises:
        ExportError: If it does not load, or anything differs.
    """
    loaded, state = _loaded(lm, folder), lm.model.state_dict()
    read = loaded.model.state_dict()
    for name in sorted(state.keys() | read.keys()):
        if name not in state or name not in read or not torch.equal(read[name], state[name].cpu()):
            raise _unlike(f"{name} is another one", "export a delta")
    # the same numbers elsewhere in memory may give other last bits, so both are asked with the same tensors
    loaded.model.load_state_dict(state, assign=True)
    if not lm.dispatched:
        loaded.model.to(lm.device)
    if not all(map(torch.equal, answers_of(loaded, texts), answers_of(lm, texts))):
        raise _unlike("logits differ", "export a delta")


def _loaded(lm: EditableModel, folder: Path) -> EditableModel:
    options: dict[str, Any] = {"attn_implementation": lm.attention} if lm.attention else {}
    if lm.dispatched and hasattr(lm.model, "hf_device_map"):
        options["device_map"] = lm.model.hf_device_map
    read: Any = type(lm.model)
    try:
        with without_progress_bars():
            model = read.from_pretrained(folder, **options)
            preprocessor = type(lm.preprocessor).from_pretrained(folder)
    except Exception as error:  # the libraries raise errors of many types
        raise _unlike(f"it does not load: {error}", "export a delta") from error
    return lm.exchanged(model, preprocessor)


def check_delta(journal: Journal, folder: Path, texts: Sequence[str]) -> None:
    """Apply an exported delta to the unedited weights: the same logits, bit for bit.

    Raises:
        ExportError: If other logits come out, or weights beside the edited ones were changed.
    """
    lm = cast(LanguageModel, journal.model)
    with _asked(journal, texts):
        apply_delta(lm, folder)


def check_gguf(journal: Journal, folder: Path, texts: Sequence[str]) -> None:
    """Load an exported GGUF file by transformers: weights and logits are the model's, but for what the manifest states.

    The file's tokenizer must have the same tokens; the model is asked in tokens of the edited one's.

    Raises:
        ExportError: If it does not load, or anything else differs.
    """
    lm, manifest = cast(LanguageModel, journal.model), Manifest.read(folder)
    try:
        loaded = load_gguf(lm, folder)
    except Exception as error:  # the libraries raise errors of many types
        raise _unlike(f"it does not load: {error}", "export the model") from error
    state, read = lm.model.state_dict(), loaded.model.state_dict()
    lossy = set(manifest.weights) if manifest.tolerance else set()
    for name in sorted(state.keys() | read.keys()):
        if name not in state or name not in read or not (name in lossy or torch.equal(read[name], state[name].cpu())):
            raise _unlike(f"{name} is another one", "export the model")
    if not lm.tokenizer.get_vocab().items() <= loaded.tokenizer.get_vocab().items():
        raise _unlike("tokens are missing, or have other numbers", "export the model")
    if not lossy:  # the same numbers elsewhere in memory may give other last bits
        loaded.model.load_state_dict(state, assign=True)
    asked = replace(loaded, tokenizer=lm.tokenizer)
    cast(nn.Module, asked.model).to(lm.device)
    off = difference(answers_of(asked, texts), answers_of(lm, texts))
    if not off <= manifest.tolerance * 1.01:  # nan too
        raise _unlike(f"logits differ by {off:.1e} of the largest", "export the model")


def check_memory(journal: Journal, folder: Path, texts: Sequence[str]) -> None:
    """Put exported modules into the unedited model: the same logits, bit for bit.

    Raises:
        ExportError: As ``check_delta``.
    """
    with _asked(journal, texts):
        apply_memory(journal.model, folder)


@torch.no_grad()
def check_lora(journal: Journal, folder: Path, texts: Sequence[str]) -> None:
    """Add an exported adapter to the unedited model, as PEFT does: logits within the manifest's tolerance.

    Raises:
        ExportError: As ``check_delta``.
    """
    lm = cast(LanguageModel, journal.model)
    parts = [factors_of(load_file(path)) for path in parts_of(folder)]
    manifest = Manifest.read(folder)
    with _asked(journal, texts, manifest.tolerance):
        require_base(lm, manifest, folder)
        for path, (down, up) in (pair for part in parts for pair in part.items()):
            lm.put(path, Adapted(lm.module(path), down, up))


@contextmanager
def _asked(journal: Journal, texts: Sequence[str], tolerance: float = 0.0) -> Iterator[None]:
    """Ask the edited model, then the unedited one with what the body puts into it, and compare; all is put back."""
    lm = journal.model
    expected = answers_of(lm, texts)
    with journal.reverted():
        originals = {part.place: (part, part.read(lm)) for part in reversed(journal.changes)}
        paths = {place.removesuffix(".weight").removesuffix(".bias") for place in originals}
        modules = {path: lm.module(path) for path in paths}
        try:
            yield
            answers = answers_of(lm, texts)
        except EditError as error:
            raise _unlike(str(error), "if weights were changed beside edits, export the model") from error
        finally:
            for path, module in modules.items():
                lm.put(path, module)
            for part, content in originals.values():
                part.undo(lm, content)
    for answer, other in zip(answers, expected, strict=True):
        off = difference([answer], [other])
        if not (off <= tolerance if tolerance else torch.equal(answer, other)):
            raise _unlike(f"logits differ by {off:.1e} of the largest", "export the delta or the model")


def _unlike(reason: str, remedy: str) -> ExportError:
    return ExportError(f"the export does not give the edited model again: {reason}; it was not kept; {remedy}")
