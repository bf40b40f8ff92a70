"""Layer scores from gradients by a layer's state at the subject's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.core import TokenCost
from cakeflow.errors import ConfigError, NumericalError, require_positive
from cakeflow.forward import Row, pad, plan
from cakeflow.models import LanguageModel, Role, Site, capture, frozen, logits_at
from cakeflow.tracing import Attribution, CausalTrace, noise_of

MAX_TOKENS = 2048
"""Most tokens in one forward and backward pass."""

Metric = Literal["log_probability", "probability"]


@dataclass(frozen=True)
class Saliency(Attribution):
    """Norm of the gradient of ``log p(object)`` by a layer's output at the subject's last token (CAKE, appendix F.2).

    Attributes:
        role: Output of the layer: ``block``, ``mlp_out`` or ``attn_out``.
        max_bytes: Most bytes beyond the model, where they allow fewer tokens than ``MAX_TOKENS``; changes no result. A
            run gives it its ``memory_budget``.
    """

    role: Role = "block"
    max_bytes: float | None = field(default=None, repr=False, compare=False)

    def within(self, max_bytes: float | None) -> Saliency:
        """Return the measure within a limit of memory; a limit of its own stays where that is lower."""
        limits = [each for each in (self.max_bytes, max_bytes) if each is not None]
        return replace(self, max_bytes=min(limits, default=None))

    def attribute(self, lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int]) -> Float[Tensor, "n l"]:
        """Return the gradients' norms.

        Raises:
            ConfigError: If the longest prompt does not fit ``max_bytes``.
        """
        sites, scores = [Site(layer, self.role) for layer in layers], torch.zeros(len(rows), len(layers)).double()
        for group in plan([row.target for row in rows], most_tokens(lm, rows, len(layers), self.max_bytes)):
            chosen = [rows[i] for i in group]
            _, gradients = states(lm, chosen, sites, embeddings(lm, chosen), "log_probability")
            scores[group] = gradients.norm(dim=-1).cpu()
        return scores


@dataclass(frozen=True)
class IntegratedGradients(Attribution):
    """``(a_clean - a_corrupted) . mean gradient``: a causal trace to first order, without its restorations.

    The node form of EAP-IG (Hanna et al. 2024; CAKE, appendix F.2): gradients of the object's probability are averaged
    along the line from the corrupted to the clean embeddings. Units are those of a ``CausalTrace``, with the same noise
    draws.

    Attributes:
        steps: Points on the line, the clean end included.
        trace: Settings of the state (``role``), of the noise (``noise``, ``draws``, ``seed``) and of memory
            (``max_bytes``).
    """

    steps: int = 5
    trace: CausalTrace = CausalTrace()

    def __post_init__(self) -> None:
        require_positive("IntegratedGradients", self, "steps")
        if self.trace.window != 1 or self.trace.tokens != "subject":
            raise ConfigError("IntegratedGradients scores single layers at the subject's last token")

    def within(self, max_bytes: float | None) -> IntegratedGradients:
        """Give ``trace`` a limit of memory."""
        return replace(self, trace=self.trace.within(max_bytes))

    def attribute(self, lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int]) -> Float[Tensor, "n l"]:
        """Return the first-order effects, mean over the noise draws.

        Raises:
            ConfigError: If the longest prompt does not fit ``trace.max_bytes``.
        """
        sites, scores = [Site(layer, self.trace.role) for layer in layers], torch.zeros(len(rows), len(layers)).double()
        scale = self.trace.noise_scale(lm, rows)
        most = most_tokens(lm, rows, len(layers), self.trace.max_bytes, self.trace.draws)
        for group in plan([row.target for row in rows], most):
            chosen = [rows[i] for i in group]
            noise = noise_of(lm, chosen, scale, self.trace).to(lm.device, lm.dtype)
            effects = [self._effects(lm, chosen, sites, noise[:, draw]) for draw in range(self.trace.draws)]
            scores[group] = torch.stack(effects).mean(0).cpu()
        return scores

    def _effects(
        self, lm: LanguageModel, rows: Sequence[Row], sites: Sequence[Site], noise: Float[Tensor, "n time width"]
    ) -> Float[Tensor, "n l"]:
        clean, total = embeddings(lm, rows), torch.zeros(())
        corrupted, _ = states(lm, rows, sites, clean + noise, "probability")
        for step in range(1, self.steps + 1):
            reached, gradients = states(lm, rows, sites, clean + (1 - step / self.steps) * noise, "probability")
            total = total + gradients / self.steps
        return ((reached - corrupted) * total).sum(-1)


def most_tokens(lm: LanguageModel, rows: Sequence[Row], layers: int, max_bytes: float | None, draws: int = 0) -> int:
    """Return how many tokens of prompts fit in a pass with gradients by all states of some layers.

    Args:
        lm: The model.
        rows: The facts; a token is predicted at the end of each prompt.
        layers: Number of layers.
        max_bytes: Most bytes beyond the model; None for no limit.
        draws: Number of noise draws that are kept beside.

    Raises:
        ConfigError: If the longest prompt does not fit.
    """
    if max_bytes is None:
        return MAX_TOKENS
    cost = TokenCost.above(lm, None)
    sizes = [(row.target, 1) for row in rows]
    further = (2 * layers + 4 + 2 * draws) * cost.hidden  # states and gradients, inputs, noise
    return cost.most_tokens(sizes, max_bytes, MAX_TOKENS, "gradients by the states of a prompt", further)


def embeddings(lm: LanguageModel, rows: Sequence[Row]) -> Float[Tensor, "n time width"]:
    """Return the input embeddings of the prompts, padded on the right."""
    with torch.no_grad():
        inputs: Tensor = lm.model.get_input_embeddings()(pad([row.ids[: row.target] for row in rows], lm.device))
    return inputs


def states(
    lm: LanguageModel, rows: Sequence[Row], sites: Sequence[Site], inputs: Float[Tensor, "n time width"], metric: Metric
) -> tuple[Float[Tensor, "n l width"], Float[Tensor, "n l width"]]:
    """Return outputs of sites at each subject's last token and the gradients of the metric by them, in float64.

    Args:
        lm: The model.
        rows: n facts; the metric is that of the token at ``target``.
        sites: l sites.
        inputs: Embeddings of the prompts.
        metric: The function to differentiate.

    Raises:
        NumericalError: If a gradient is not finite.
    """
    every = torch.arange(len(rows), device=lm.device)
    at, last, answer = (
        torch.tensor(each, device=lm.device)
        for each in zip(*((row.subject, row.target - 1, row.ids[row.target]) for row in rows), strict=True)
    )
    mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=lm.device)
    with frozen(lm), torch.enable_grad(), capture(lm, sites) as captured, logits_at(lm, every, last):
        inputs = inputs.detach().requires_grad_()  # a graph from the bottom, though the model's weights are frozen
        logits = lm(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits[0]
        value = logits.double().log_softmax(-1)[every, answer]
        value = value.exp() if metric == "probability" else value
        gradients = torch.autograd.grad(value.sum(), [captured[site] for site in sites])
    outputs, slopes = (
        torch.stack([value[every, at] for value in values], 1).detach().double()
        for values in ([captured[site] for site in sites], gradients)
    )
    if not bool(torch.isfinite(slopes).all()):
        raise NumericalError("a gradient is not finite; load the model in float32")
    return outputs, slopes
