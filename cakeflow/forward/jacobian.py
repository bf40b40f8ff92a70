"""Linear maps from changes at several blocks to the value site: the model's Jacobian at the subject's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cakeflow.errors import ArchitectureError
from cakeflow.forward.suffix import Suffixes, cut, take
from cakeflow.forward.tokens import TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import inject
from cakeflow.models.language import LanguageModel
from cakeflow.models.shards import gathered


@dataclass(frozen=True, eq=False)
class ModelJacobian:
    """``M_j = d h_L / d delta_j``: delta_j added to block j's output, h_L read at the value site, fact by fact.

    Both sides are at the last token of the subject in the bare prompt. A change there reaches h_L through that position
    alone, so the linearised part is one token wide over attention keys and values of a frozen prefix. The model is
    linearised at its weights on first use; after that a product costs a backward pass of one token.

    Attributes:
        lm: The model.
        batch: n facts.
        layers: Blocks whose outputs change, ascending; the last one is the value site's.
        value_site: Site at which the effect is read.
        max_tokens: Most tokens in one pass.
    """

    lm: LanguageModel
    batch: TextBatch
    layers: Sequence[int]
    value_site: Site
    max_tokens: int = 1024

    def vjp(self, covector: Float[Tensor, "n d_out"]) -> list[Float[Tensor, "n d_out"]]:
        """Compute ``M_j^T covector`` of every layer, in one backward pass."""
        parts = [group.vjp(covector[group.fact]) for group in self._groups]
        return [self._in_order(pieces).to(covector) for pieces in zip(*parts, strict=True)]

    def jvp(self, tangents: Sequence[Float[Tensor, "n d_out"]]) -> Float[Tensor, "n d_out"]:
        """Compute ``sum_j M_j tangent_j``, in one forward-mode pass."""
        pieces = [group.jvp([tangent[group.fact] for tangent in tangents]) for group in self._groups]
        return self._in_order(pieces).to(tangents[0])

    def _in_order(self, pieces: Sequence[Tensor]) -> Tensor:
        """Join the rows of all groups in the order of the facts."""
        return torch.cat(list(pieces))[torch.cat([group.fact for group in self._groups]).argsort()]

    @cached_property
    def _groups(self) -> list[_Linearization]:
        prompts = [rows[0] for rows in self.batch.rows]
        start = Site(self.layers[0])
        groups, _ = cut(self.lm, prompts, range(len(prompts)), [start], self.max_tokens, read_first=True)
        return [_Linearization.of(self.lm, group, [*map(Site, self.layers[:-1]), self.value_site]) for group in groups]


@dataclass(frozen=True, eq=False)
class _Linearization:
    """Linearization for some facts: the value site as a function of the changes, and its derivative as a graph."""

    fact: Int[Tensor, " rows"]
    output: Float[Tensor, "rows d_out"]
    changes: list[Float[Tensor, "rows d_out"]]
    covector: Float[Tensor, "rows d_out"]
    gradients: Sequence[Float[Tensor, "rows d_out"]]
    blocks: Sequence[nn.Module]

    @classmethod
    @torch.enable_grad()
    def of(cls, lm: LanguageModel, suffixes: Suffixes, sites: Sequence[Site]) -> _Linearization:
        """Linearise around changes of zero; the last site is the value site.

        Raises:
            ArchitectureError: If the model's operations cannot be differentiated twice.
        """
        width = suffixes.hidden.shape[-1]
        zeros = [suffixes.hidden.new_zeros(len(suffixes.fact), width, requires_grad=True) for _ in sites]
        changes = [inject(lm, site, each, suffixes.changed_column) for site, each in zip(sites, zeros, strict=True)]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                output = take(suffixes.output(lm, sites[-1], *changes), suffixes.changed_column[:, None])[:, 0]
                covector = torch.zeros_like(output, requires_grad=True)
                blocks = [lm.module(Site(layer)) for layer in range(sites[0].layer, sites[-1].layer + 1)]
                with gathered(blocks):
                    gradients = torch.autograd.grad(output, zeros, covector, create_graph=True)
            linearization = cls(suffixes.fact, output, zeros, covector, gradients, blocks)
            consistent = linearization._products_agree()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise _no_forward_mode(lm, str(error)) from error
        if not consistent:
            raise _no_forward_mode(lm, "products with M and with its transpose disagree")
        return linearization

    def _products_agree(self) -> bool:
        """Test ``<M u, v> = <u, M^T v>``: an operation without a second derivative may drop out without an error."""
        gen = torch.Generator().manual_seed(0)
        v, *u = (torch.randn(self.output.shape, generator=gen).to(self.output) for _ in range(1 + len(self.changes)))
        left = (self.jvp(u) * v).sum()
        right = torch.stack([(a * b).sum() for a, b in zip(u, self.vjp(v), strict=True)]).sum()
        scale = v.norm() * torch.stack([each.norm() for each in u]).norm()
        return bool((left - right).abs() <= torch.finfo(v.dtype).eps ** 0.5 * scale)

    def vjp(self, covector: Tensor) -> Sequence[Tensor]:
        """Compute ``M_j^T covector`` of every site: one backward pass."""
        with gathered(self.blocks):
            return torch.autograd.grad(self.output, self.changes, covector.to(self.output), retain_graph=True)

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """Compute ``sum_j M_j tangent_j`` by a backward pass through the backward pass, linear in its covector."""
        ready = [tangent.to(self.output) for tangent in tangents]
        with gathered(self.blocks):
            return torch.autograd.grad(self.gradients, self.covector, ready, retain_graph=True)[0]


def _no_forward_mode(lm: LanguageModel, reason: str) -> ArchitectureError:
    remedy = (
        "shard it by data_parallel_size alone" if lm.sharded else "load it with attn_implementation='eager'"
    )  # the sums of tensor parallelism are not differentiated twice
    return ArchitectureError(
        f"{type(lm.model).__name__}: the exact allocation needs forward-mode derivatives, which an operation of this "
        f"model lacks ({reason}); {remedy} or allocate by Sequential"
    )


class LinearMap(Protocol):
    """Map from output changes at the layers still to edit to the value site: products with M_j, one per layer and fact.

    ``M_j`` is the derivative of the value site's value by a change of layer j's output, at the model's present weights;
    that of the last layer is the identity.
    """

    def vjp(self, covector: Float[Tensor, "n d_out"]) -> list[Float[Tensor, "n d_out"]]:
        """Compute ``M_j^T covector`` for every layer j."""

    def jvp(self, tangents: Sequence[Float[Tensor, "n d_out"]]) -> Float[Tensor, "n d_out"]:
        """Compute ``sum_j M_j tangent_j``."""
