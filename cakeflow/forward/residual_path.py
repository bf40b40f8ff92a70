"""Path of a change from a projection's output to the output of its block.

Most decoders add the MLP's output to the residual stream as it is. Some multiply it by a number or a gate (Granite), or
put a norm behind it (Gemma 2, OLMo 2) or behind the sum (OPT-350m). There a change of the block's output has to be
converted into one of the projection's output. The path is measured, so the code names no family.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cakeflow.errors import ArchitectureError
from cakeflow.forward.keys import PromptStream
from cakeflow.models.architecture import Site, is_norm
from cakeflow.models.language import LanguageModel

CENTRED = 1e-3
"""Change of a norm's output by a constant added to its input, over the output, below which it takes off the mean."""
FORM_TOLERANCE = 1e-2
"""Largest distance of a norm's output from what its form gives, over the output."""
CLOSED = 1e-6
"""Part of the largest gain below which a coordinate counts as closed: nothing can be written there."""


class ResidualPath:
    """The path of most models: a change of the projection's output is the change of the block's output."""

    def reached(self, delta: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Return the change of the block's output by a change of the projection's output."""
        return delta

    def required(self, change: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Return the change of the projection's output that changes the block's output so, or as nearly as it can."""
        return change


@dataclass(frozen=True, eq=False)
class ScaledPath(ResidualPath):
    """A path that multiplies: by one number, or by a gate of its own for each fact.

    Attributes:
        gate: Factor of each coordinate.
    """

    gate: Float[Tensor, "n d_out"]

    def reached(self, delta: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Return the change times the gate."""
        return self.gate * delta

    def required(self, change: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Return the change divided by the gate; nothing where the gate is closed."""
        closed = self.gate.abs() <= CLOSED * self.gate.abs().amax(1, keepdim=True)
        return torch.where(closed, 0.0, change / torch.where(closed, 1.0, self.gate))


@dataclass(frozen=True, eq=False)
class NormPath(ResidualPath):
    """A path through a norm: ``block(delta) = block(0) + outer (N(a + inner delta) - N(a))``.

    A norm's output lies on an ellipsoid, so not every change can be reached: ``required`` takes the direction of the
    changed output and keeps mean and scale of the norm's input.

    Attributes:
        output: Present output of the block.
        norm: The norm N.
        entering: Its present input a.
        leaving: Its present output.
        inner: Factor in front of the norm.
        outer: Factor behind it.
    """

    output: Float[Tensor, "n d_out"]
    norm: nn.Module
    entering: Float[Tensor, "n d_out"]
    leaving: Float[Tensor, "n d_out"]
    inner: float
    outer: float

    def reached(self, delta: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Return the change behind the norm."""
        return self.outer * (_apply(self.norm, self.entering + self.inner * delta) - self.leaving)

    def required(self, change: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Return the change in front of the norm."""
        form = _NormForm.of(self.norm, self.entering)
        return (form.inverse(self.leaving + change / self.outer, self.entering) - self.entering) / self.inner


@dataclass(frozen=True, eq=False)
class _NormForm:
    """A norm as ``bias + gain (x - mean) / scale``; ``centred`` says whether the mean is taken off."""

    gain: Float[Tensor, " d_out"]
    bias: Float[Tensor, " d_out"]
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, example: Float[Tensor, "n d_out"]) -> _NormForm:
        """Read gain and bias off three inputs, and compare with the norm on an example.

        Raises:
            ArchitectureError: If the norm has another form.
        """
        places = torch.arange(example.shape[1], device=example.device)
        signs = torch.where(places % 2 == 0, 1.0, -1.0).to(example)[None]
        plus, minus, shifted = (_apply(norm, x)[0] for x in (signs, -signs, signs + 1))
        centred = bool((shifted - plus).norm() < CENTRED * plus.norm())
        form = cls((plus - minus) / 2 / signs[0], (plus + minus) / 2, centred)
        output = _apply(norm, example)
        if bool((form.apply(example) - output).norm() > FORM_TOLERANCE * output.norm()):
            raise ArchitectureError(
                f"{type(norm).__name__} behind the edited projection is no RMS or layer norm, so a change of the "
                "residual stream cannot be converted into one of the projection's output; search target values there: "
                "targets.site: mlp_out"
            )
        return form

    def apply(self, entering: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Return the norm's output."""
        mean, scale = self._moments(entering)
        return self.bias + self.gain * (entering - mean) / scale

    def inverse(
        self, leaving: Float[Tensor, "n d_out"], entering: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "n d_out"]:
        """Return the input with mean and scale of ``entering`` whose output points to ``leaving``."""
        mean, scale = self._moments(entering)
        closed = self.gain.abs() <= CLOSED * self.gain.abs().max()
        direction = torch.where(
            closed, (entering - mean) / scale, (leaving - self.bias) / torch.where(closed, 1.0, self.gain)
        )
        middle, length = self._moments(direction)
        return mean + scale * (direction - middle) / length

    def _moments(self, x: Float[Tensor, "n d_out"]) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
        mean = x.mean(1, keepdim=True) if self.centred else torch.zeros_like(x[:, :1])
        return mean, (x - mean).square().mean(1, keepdim=True).sqrt()


def _apply(norm: nn.Module, x: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
    """Run a norm in its own type and on its own device; the result is float64."""
    parameter = next(norm.parameters(), x)
    with torch.no_grad():
        return norm(x.to(parameter)).to(x)  # type: ignore[no-any-return]


class ResidualPaths:
    """Paths of the projections of one model, measured for the facts at hand where they are not direct.

    Args:
        lm: The model.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._direct: set[Site] = set()

    def at(self, stream: PromptStream, site: Site) -> ResidualPath:
        """Return the path of a projection for the rows of a stream that was read up to its layer."""
        path = ResidualPath() if site in self._direct else measure_path(stream, site)
        if type(path) is ResidualPath:
            self._direct.add(site)
        return path

    def ahead(self, stream: PromptStream, site: Site) -> ResidualPath:
        """Return the path of a projection for a stream that was not read yet; if need be, its rows are run up to it."""
        if site in self._direct:
            return ResidualPath()
        stream.read(site)
        return self.at(stream, site)


def measure_path(stream: PromptStream, site: Site) -> ResidualPath:
    """Measure how the outputs of a projection reach its block's output, at the last token of each row.

    A vector of random signs is added to the projection's output. The factors are read off the changes that it makes
    behind the block, and in front of and behind a norm that runs after the projection.

    Args:
        stream: Prompts, read up to the projection's layer.
        site: The projection.

    Raises:
        ArchitectureError: If the change arrives in another way.
    """
    lm, block, norm = stream.lm, Site(site.layer), _norm_behind(stream, site)
    norms = [norm] if norm else []
    nothing = torch.zeros(stream.size, lm.width, dtype=torch.float64, device=lm.device)
    entering, leaving = stream.probe(site, nothing, norms, [*norms, block])
    size = leaving[block].norm(dim=1, keepdim=True) / lm.width**0.5
    generator = torch.Generator().manual_seed(0)
    one, other = (size * (2.0 * torch.randint(2, nothing.shape, generator=generator).to(nothing) - 1) for _ in range(2))
    inputs, outputs = stream.probe(site, one, norms, [*norms, block])
    change = outputs[block] - leaving[block]
    tolerance = torch.finfo(lm.dtype).eps ** 0.5
    if norm:
        inner = _factor(inputs[norm] - entering[norm], one)
        outer = _factor(change, outputs[norm] - leaving[norm])
        path: ResidualPath = NormPath(leaving[block], lm.module(norm), entering[norm], leaving[norm], inner, outer)
    elif _far(change, one, _factor(change, one)) <= tolerance:
        factor = _factor(change, one)
        path = ResidualPath() if abs(factor - 1) <= 4 * tolerance**2 else ScaledPath(torch.full_like(one, factor))
    else:
        path = ScaledPath(change / one)
    _, outputs = stream.probe(site, other, [], [block])
    if (distance := _far(outputs[block] - leaving[block], path.reached(other), 1.0)) > tolerance:
        raise ArchitectureError(
            f"{lm.architecture.path(site)} of {type(lm.model).__name__} reaches its block's output neither by a factor "
            f"nor by one norm (a test change is off by {distance:.1%}), so a change of the residual stream cannot be "
            "converted into one of its output; search target values there: targets.site: mlp_out"
        )
    return path


def _norm_behind(stream: PromptStream, site: Site) -> Site | None:
    """Return the last norm of the block that runs after the projection, or None."""
    lm, block = stream.lm, stream.lm.module(Site(site.layer))
    order = stream.calls(site.layer)
    path = lm.architecture.path(site).removeprefix(lm.architecture.path(Site(site.layer)) + ".")
    behind = order[len(order) - order[::-1].index(path) :]
    norms = [each for each in behind if is_norm(block.get_submodule(each))]
    return Site(site.layer, norms[-1]) if norms else None


def _factor(change: Float[Tensor, "n d_out"], cause: Float[Tensor, "n d_out"]) -> float:
    """Return the number that makes the cause most like the change."""
    return float((change * cause).sum() / cause.square().sum())


def _far(change: Float[Tensor, "n d_out"], cause: Float[Tensor, "n d_out"], factor: float) -> float:
    """Return the distance of a change from the cause times a factor, over the change."""
    return float((change - factor * cause).norm() / change.norm())
