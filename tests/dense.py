"""A chain whose Jacobians are given matrices."""

from dataclasses import dataclass

import torch


@dataclass
class DenseChain:
    """One matrix per layer and fact: l tensors n x d x d."""

    matrices: list

    def pull(self, covector):
        return [torch.einsum("nij,ni->nj", m, covector) for m in self.matrices]

    def push(self, tangents):
        return sum(torch.einsum("nij,nj->ni", m, t) for m, t in zip(self.matrices, tangents, strict=True))
