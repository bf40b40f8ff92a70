"""Side effects of edits on unrelated text."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torchmetrics.text import Perplexity

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.data.builtin import neutral_text
from cakeflow.data.sources import Source, read_documents
from cakeflow.errors import ConfigError
from cakeflow.forward.corpus import token_stream
from cakeflow.forward.packing import logits_bytes, pass_bytes, require_bytes
from cakeflow.metrics.distribution import prediction_shift
from cakeflow.models.language import LanguageModel


class NeutralText(PeriodicCallback):
    """Measures the side effects of edits on unrelated text, with torchmetrics' own metrics.

    Logs ``neutral/perplexity`` and ``neutral/kl``, the mean divergence in nats of the edited model's next-token
    distribution from the unedited model's, KL(unedited | edited), and ``neutral/top1``,
    ``neutral/top5`` and ``neutral/top10``, the shares of the most likely tokens that stay.

    Args:
        source: Source of held-out text, as for ``Statistics``, but never the same text; by default some 900 tokens
            about everyday matters, written for this project.
        tokens: Number of tokens to read.
        window: Length of a window in tokens.
        every: Number of batches between measurements; None measures at both ends of a run only.

    Raises:
        ConfigError: If a number is out of range.
    """

    name = "neutral"
    in_evaluations = True

    def __init__(
        self, source: Source | None = None, tokens: int = 4096, window: int = 128, every: int | None = 1
    ) -> None:
        super().__init__(every)
        if not 2 <= window <= tokens:
            raise ConfigError(f"window must be between 2 and tokens ({tokens}), got {window}")
        self.source, self.tokens, self.window = source, tokens, window

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the text before the expensive work, so that a bad source stops the run at once."""
        module: Any = pl_module
        if not isinstance(module.lm, LanguageModel):  # a model of images reads no text
            return
        source = [neutral_text()] if self.source is None else read_documents(self.source)
        stream, window = token_stream(module.lm, source, self.tokens), min(self.window, module.lm.longest)
        if len(stream) < window:
            raise ConfigError(f"neutral text {self.source!r} has {len(stream)} tokens; a window needs {window}")
        whole = len(stream) // window * window
        self._windows = torch.tensor(stream[:whole], device=module.lm.device).reshape(-1, window)

    def can_measure(self, module: Any) -> bool:
        """Return whether the model reads text."""
        return isinstance(module.lm, LanguageModel)

    @torch.no_grad()
    def measure(self, module: Any) -> dict[str, float]:
        """Return perplexity, divergence and overlaps of the model as it is now."""
        own: dict[str, Any] = {"sync_on_compute": False}
        perplexity, shift = Perplexity(**own), prediction_shift()
        for ids in self._windows.split(self._rows(module)):
            now = self._predictions(module, ids)
            perplexity.update(now, ids[:, 1:].cpu())
            with module.journal.reverted():
                before = self._predictions(module, ids)
            shift.update(before.flatten(0, 1), now.flatten(0, 1))
        return {name: float(each) for name, each in {"perplexity": perplexity.compute(), **shift.compute()}.items()}

    def _rows(self, module: Any) -> int:
        """Return the number of windows in a pass: 4, or as many as fit beside the predictions before and now."""
        if module.max_bytes is None:
            return 4
        length = self._windows.shape[1]
        window = length * (pass_bytes(module.lm) + 2 * logits_bytes(module.lm))
        require_bytes(module.max_bytes, window, f"a window of {length} tokens of neutral text")
        return min(4, int(module.max_bytes / window))

    def _predictions(self, module: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of the next token at all places but the last."""
        logits: torch.Tensor = module.lm(input_ids=ids, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1).cpu()
