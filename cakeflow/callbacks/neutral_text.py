"""What edits do to text that has nothing to do with them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torchmetrics import KLDivergence
from torchmetrics.text import Perplexity

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.data.sources import read_texts
from cakeflow.errors import ConfigError
from cakeflow.forward.corpus import token_stream


class NeutralText(PeriodicCallback):
    """What edits do to text that is not about them, with torchmetrics' own metrics.

    Logs ``neutral/perplexity`` and ``neutral/kl``, the mean divergence in nats of the edited model's next-token
    distribution from the unedited model's, KL(unedited | edited).

    Args:
        source: Held-out text: as for ``Statistics``, but never the same.
        tokens: How much of it is read.
        window: Tokens read together.
        every: Batches between measurements.

    Raises:
        ConfigError: If a number is out of range.
    """

    name = "neutral"

    def __init__(self, source: Any, tokens: int = 4096, window: int = 128, every: int = 1) -> None:
        super().__init__(every)
        if not 2 <= window <= tokens:
            raise ConfigError(f"window must be between 2 and tokens ({tokens}), got {window}")
        self.source, self.tokens, self.window = source, tokens, window

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the text, before anything expensive is done."""
        module: Any = pl_module
        stream = token_stream(module.lm, read_texts(self.source), self.tokens)
        if len(stream) < self.window:
            raise ConfigError(f"neutral text {self.source!r} has {len(stream)} tokens; a window needs {self.window}")
        whole = len(stream) // self.window * self.window
        self._windows = torch.tensor(stream[:whole], device=module.lm.device).reshape(-1, self.window)

    @torch.no_grad()
    def measure(self, module: Any) -> dict[str, float]:
        """See ``PeriodicCallback``."""
        perplexity, divergence = Perplexity(), KLDivergence(log_prob=True)
        for ids in self._windows.split(4):
            now = self._predictions(module, ids)
            perplexity.update(now, ids[:, 1:].cpu())
            with module.journal.reverted():
                before = self._predictions(module, ids)
            divergence.update(before.flatten(0, 1), now.flatten(0, 1))
        return {"perplexity": float(perplexity.compute()), "kl": float(divergence.compute())}

    def _predictions(self, module: Any, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the token after each but the last."""
        logits: torch.Tensor = module.lm(input_ids=ids, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1).cpu()
