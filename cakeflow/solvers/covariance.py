"""Second moments of the keys to preserve, with their eigenbasis."""

from __future__ import annotations

from copy import copy
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import NumericalError


class _Spectrum:
    """A second moment and its eigenbasis on their first device; covariances on other devices share it."""

    def __init__(self, moment: Float[Tensor, "d_in d_in"]) -> None:
        self.moment = moment

    @cached_property
    def eigen(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
        values, vectors = torch.linalg.eigh((self.moment + self.moment.T) / 2)
        return values.clamp_min(0), vectors  # rounding gives a singular C slightly negative eigenvalues


class Covariance:
    """Second moment C = E[k k^T] of the keys that an edit should preserve, with its eigenbasis.

    Args:
        moment: C, d_in x d_in, symmetric and positive semi-definite.
        weight: lambda: C counts as this many keys in a least-squares solve (``mom2_update_weight`` in MEMIT's code).
        eigen: Eigenvalues (ascending) and eigenvectors (columns); by default computed on first use.
        threshold: Eigenvalues below it count as null, unless a solver sets its own (``nullspace_threshold``).
        curve: How C settled while it was collected, None if that is not known. Each point, at about twice as many
            tokens as the one before, has the tokens, the change of C since the point before over C (Frobenius norms),
            a threshold, and the number of eigenvalues of C below it.

    Attributes:
        basis: The eigenvectors that were given, whose last bits depend on where they were computed; None if none were.
    """

    def __init__(
        self,
        moment: Float[Tensor, "d_in d_in"],
        weight: float = 1.0,
        eigen: tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]] | None = None,
        threshold: float = 0.02,
        curve: Float[Tensor, "points 4"] | None = None,
    ) -> None:
        self._spectrum, self.curve = _Spectrum(moment.double()), curve
        self.weight, self.threshold, self.device = weight, threshold, moment.device
        self.basis = None if eigen is None else eigen[1]
        if eigen is not None:  # columns contiguous, as eigh leaves them: products with some of them are then fastest
            self._spectrum.__dict__["eigen"] = eigen[0], eigen[1].T.contiguous().T

    def __len__(self) -> int:
        return len(self._spectrum.moment)

    @cached_property
    def moment(self) -> Float[Tensor, "d_in d_in"]:
        """C in float64."""
        return self._spectrum.moment.to(self.device)

    @cached_property
    def eigen(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
        """Eigenvalues, ascending and not below 0, and eigenvectors as columns, in float64."""
        values, vectors = self._spectrum.eigen
        return values.to(self.device), vectors.T.to(self.device).T  # transposed: a copy would lose the columns' layout

    def to(self, device: torch.device | str) -> Covariance:
        """Return the covariance on a device; each part is copied on first use, since most solves need only one."""
        if self.device == torch.device(device):
            return self
        moved = copy(self)
        moved.device = torch.device(device)
        for part in ("moment", "eigen"):  # cached for the old device
            moved.__dict__.pop(part, None)
        return moved

    def weighted(self, times: float) -> Covariance:
        """Return the covariance with ``times`` its weight; it shares moment and eigenbasis."""
        result = copy(self)
        result.weight = times * self.weight
        return result

    def rank(self, threshold: float) -> int:
        """Return the number of directions whose second moment is below the threshold: the size of the null space."""
        return int((self.eigen[0] < threshold).sum())

    def project(self, keys: Float[Tensor, "n d_in"], threshold: float) -> Float[Tensor, "n d_in"]:
        """Project keys on the null space of C: ``K P``, P = U U^T, U the eigenvectors below the threshold."""
        return self.project_on(keys, self.rank(threshold))

    def project_on(self, keys: Float[Tensor, "n d_in"], rank: int) -> Float[Tensor, "n d_in"]:
        """Project keys on the ``rank`` eigenvectors of smallest eigenvalue."""
        vectors = self.eigen[1]
        if rank <= len(vectors) // 2:  # multiply with the smaller part of the basis, since P = I - V V^T as well
            return (keys @ vectors[:, :rank]) @ vectors[:, :rank].T
        return torch.addmm(keys, keys @ vectors[:, rank:], vectors[:, rank:].T, alpha=-1)

    def whiten(self, keys: Float[Tensor, "n d_in"], ridge: float) -> Float[Tensor, "n d_in"]:
        """Compute ``K B`` with ``B B^T = (lambda C + ridge I)^-1``: keys in C's eigenbasis, scaled.

        Raises:
            NumericalError: If that matrix is singular.
        """
        return (keys @ self.eigen[1]) / self._scale(ridge)

    def unwhiten(self, rows: Float[Tensor, "n d_in"], ridge: float) -> Float[Tensor, "n d_in"]:
        """Compute ``U B^T``: after ``whiten`` that is ``K (lambda C + ridge I)^-1``.

        Raises:
            NumericalError: If that matrix is singular.
        """
        return (rows / self._scale(ridge)) @ self.eigen[1].T

    def _scale(self, ridge: float) -> Float[Tensor, " d_in"]:
        """Return the square roots of the eigenvalues of ``lambda C + ridge I``."""
        values = self.eigen[0]
        scale = self.weight * values + ridge
        if scale[0] <= scale[-1] * 1e-15:
            raise NumericalError(
                f"the second moment of the keys is singular (smallest eigenvalue {float(values[0]):.1e}, largest "
                f"{float(values[-1]):.1e}); collect more tokens or set ridge above 0"
            )
        return scale.sqrt()


def rank_below(matrix: Float[Tensor, "d d"], threshold: float) -> int:
    """Return the number of a symmetric matrix's eigenvalues below a threshold, without computing them.

    By Sylvester's law of inertia that is the number of negative eigenvalues of D in ``matrix - threshold I = L D L^T``,
    whose blocks of two have one each: a third of the operations of the tridiagonal form from which eigenvalues come.
    """
    shifted = matrix - threshold * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, pivots = torch.linalg.ldl_factor(shifted)
    in_pairs = pivots < 0
    return int(((factor.diagonal() < 0) & ~in_pairs).sum() + in_pairs.sum() // 2)
