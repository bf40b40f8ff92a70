"""What edits do to the predictions at neighborhood prompts, without asking which answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.data.request import EditRequest
from cakeflow.errors import require_count
from cakeflow.forward.packing import logits_bytes, pad, pass_bytes, require_bytes
from cakeflow.forward.tokens import encode_texts
from cakeflow.metrics.distribution import prediction_shift

ROWS = 16
"""Prompts in a pass."""


class NeighborShift(PeriodicCallback):
    """Compares the next-token distributions of neighborhood prompts with the unedited model's.

    Logs ``neighbors/kl``, the mean KL(unedited | edited) in nats, and ``neighbors/top1``, ``neighbors/top5`` and
    ``neighbors/top10``, the shares of the most likely tokens that stay. Nothing is logged where the requests have no
    neighbors.

    Args:
        limit: Most prompts, from the first facts on; None takes all.
        every: Number of batches between measurements; None measures at both ends of a run only.

    Raises:
        ConfigError: If a number is out of range.
    """

    name = "neighbors"
    in_evaluations = True
    needs = dict.fromkeys(("kl", "top1", "top5", "top10"), ("neighborhood",))

    def __init__(self, limit: int | None = 200, every: int | None = None) -> None:
        super().__init__(every)
        require_count("limit", limit, 1, optional=True)
        self.limit = limit
        self._prompts: list[tuple[int, ...]] = []

    def begin(self, module: Any, requests: Sequence[EditRequest]) -> None:
        """Read the neighbors of all facts."""
        edited = {request.text for request in requests}
        probes = [probe.prompt for each in requests for probe in each.probes if probe.kind == "neighborhood"]
        prompts = [prompt for prompt in dict.fromkeys(probes) if prompt not in edited]
        self._prompts = encode_texts(module.lm.tokenizer, prompts[: self.limit])

    @torch.no_grad()
    def measure(self, module: Any) -> dict[str, float]:
        """Return divergence and overlaps of the model as it is now; nothing without neighbors."""
        if not self._prompts:
            return {}
        metrics, rows = prediction_shift(), self._rows(module)
        for start in range(0, len(self._prompts), rows):
            part = self._prompts[start : start + rows]
            now = _predictions(module.lm, part)
            with module.journal.reverted():
                before = _predictions(module.lm, part)
            metrics.update(before, now)
        return {name: float(value) for name, value in metrics.compute().items()}

    def _rows(self, module: Any) -> int:
        """Return the number of prompts in a pass: 16, or as many as fit."""
        if module.max_bytes is None:
            return ROWS
        longest = max(map(len, self._prompts))
        row = longest * (pass_bytes(module.lm) + logits_bytes(module.lm)) + 2 * logits_bytes(module.lm)
        require_bytes(module.max_bytes, row, f"a neighborhood prompt of {longest} tokens")
        return min(ROWS, int(module.max_bytes / row))


def _predictions(lm: Any, rows: list[tuple[int, ...]]) -> Float[Tensor, "rows vocabulary"]:
    """Return the log-probabilities of the token behind each prompt."""
    logits: Tensor = lm(input_ids=pad(rows, lm.device), use_cache=False).logits
    last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
    return logits[torch.arange(len(rows), device=logits.device), last].float().log_softmax(-1).cpu()
