"""Questions to an edited model and its export, and how far their logits lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cakeflow.errors import ExportError
from cakeflow.journal.journal import Journal
from cakeflow.models.base import EditableModel
from cakeflow.models.language import LanguageModel
from cakeflow.models.vision import VisionModel

MOST_QUESTIONS = 8
"""Prompts that a model and its export are asked."""


def questions(journal: Journal) -> list[str]:
    """Return the prompts of the facts that were edited last; some words if their texts are not known."""
    texts = [request.text for step in journal for request in step.requests]
    return texts[-MOST_QUESTIONS:] or ["The"]


@torch.no_grad()
def answers_of(lm: EditableModel, texts: Sequence[str]) -> list[Tensor]:
    """Return the logits at every token of every text, 1 x tokens x vocabulary.

    A model of images, whose ledger has no pixels, is asked about images of noise: their logits, images x labels.
    """
    if isinstance(lm, VisionModel):
        return [lm.logits(lm.noise(MOST_QUESTIONS))]
    if not isinstance(lm, LanguageModel):
        raise ExportError(f"a {type(lm).__name__} cannot be asked, and so no export of it can be checked")
    rows = [torch.tensor([lm.tokenizer(text)["input_ids"] or [0]], device=lm.device) for text in texts]
    return [lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits for ids in rows]


def difference(answers: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of logits, relative to the largest of them; nan where one is not a number.

    Example:
        >>> difference([torch.tensor([1.0, 4.0])], [torch.tensor([2.0, 4.0])])
        0.25
    """
    pairs = zip(answers, expected, strict=True)
    return float(torch.stack([(a.double() - b.double()).abs().max() / b.abs().max() for a, b in pairs]).max())
