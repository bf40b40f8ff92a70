"""What the exact allocation (theorem 1, ``Jacobian``) costs beside the identity approximation (``Sequential``).

    python benchmarks/bench_jacobian.py [--json FILE] [--run RUN] [--dense]

Both walk the layers of SmolLM2's config for the same facts with uniform weights: keys and values are read and the
residual is allocated before each layer. Residuals are random, as long as the values that they are added to. Nothing is
edited. ``M - I`` is the root mean square over random directions of ``|(M - I) v| / |v|``; ``difference`` is how far the
exact share lies from the sequential one, relatively. ``--run`` measures the model as a run edited it. ``--dense`` forms
the first layer's systems and counts the steps of the worst fact and of the median one with preconditioners: none, each
system's own diagonal, the mean of all facts' systems, and its inverse's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from cakeflow_theory import sensitivity
from torch import Tensor

from cakeflow import Editor, GradientSearch, Uniform
from cakeflow.allocators import Allocator, Jacobian, LayerContext, Sequential, conjugate_gradients
from cakeflow.core import find_config
from cakeflow.data import Contexts, builtin_facts
from cakeflow.forward import FactReader, ModelJacobian, TextBatch, encode_batch
from cakeflow.models import LanguageModel, Site


class Counting(ModelJacobian):
    """A linear map that counts its products with the transpose."""

    products = 0

    def vjp(self, covector: Tensor) -> list[Tensor]:
        """Count the product and compute it."""
        object.__setattr__(self, "products", self.products + 1)
        return super().vjp(covector)


def walk(
    lm: LanguageModel, batch: TextBatch, layers: list[int], allocator: Allocator
) -> tuple[float, list[Tensor], list[Counting]]:
    """Read and allocate at every layer: seconds, shares and linear maps."""
    weights, value_site = Uniform().weigh(lm, batch, layers), GradientSearch().value_site(layers[-1])
    start, shares, maps = time.perf_counter(), [], []
    reader = FactReader(lm, batch)
    for index, layer in enumerate(layers):
        site = Site(layer, "mlp_out")
        *_, values = reader.read(site, value_site)
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=values.dtype)
        residual = noise * (values.norm(dim=1) / noise.norm(dim=1))[:, None]
        maps.append(Counting(lm, batch, layers[index:], value_site))
        context = LayerContext(site, value_site, index, weights, maps[-1])
        shares.append(allocator.allocate(residual, context))
    return time.perf_counter() - start, shares, maps


def dense(linear_map: ModelJacobian, residual: Tensor) -> Tensor:
    """The systems ``sum_j M_j M_j^T`` of all facts, n x d x d, column by column."""
    columns = []
    for i in range(residual.shape[1]):
        unit = torch.zeros_like(residual)
        unit[:, i] = 1
        columns.append(linear_map.jvp(linear_map.vjp(unit)))
    system = torch.stack(columns, 2).double()
    return (system + system.mT) / 2


def steps_by_preconditioner(system: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Steps of each fact: conjugate gradients on ``L^-1 A L^-T`` for a preconditioner ``L L^T``."""
    mean = system.mean(0)
    inverse = torch.linalg.inv(torch.linalg.inv(system).mean(0))
    ways = {
        "none": torch.eye(len(mean)).to(system).expand_as(system),
        "diagonal": system.diagonal(dim1=1, dim2=2).diag_embed(),
        "mean": mean.expand_as(system),
        "inverse mean": ((inverse + inverse.T) / 2).expand_as(system),
    }
    steps = {}
    for name, each in ways.items():
        half = torch.linalg.inv(torch.linalg.cholesky(each))
        whitened, start = half @ system @ half.mT, torch.einsum("nij,nj->ni", half, right)
        way = partial(torch.einsum, "nij,nj->ni", whitened)
        steps[name] = conjugate_gradients(way, start, Jacobian().tolerance, 2000).steps
    return steps


def main() -> None:
    """Print both costs and how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="facts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--run", type=Path, help="run folder: measure its edited model")
    parser.add_argument("--dense", action="store_true", help="count the steps with preconditioners")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = yaml.safe_load(find_config("model", "smollm2-135m").read_text())["model"]
    editor, layers = Editor.from_pretrained("smollm2-135m"), config["layers"]
    if args.run:
        editor.load(args.run)
    lm = editor.module.lm
    contexts = Contexts(tuple(map(tuple, config["contexts"]["groups"])))
    batch = encode_batch(lm, builtin_facts()[: args.n], contexts)
    ways: dict[str, Allocator] = {"sequential": Sequential(), "jacobian": Jacobian()}
    runs = {name: [walk(lm, batch, layers, way) for _ in range(args.repeats + 1)][1:] for name, way in ways.items()}
    seconds = {name: statistics.median(run[0] for run in repeats) for name, repeats in runs.items()}
    exact, rule = runs["jacobian"][0], runs["sequential"][0]
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(exact[1], rule[1], strict=True)]
    steps = [each.products - 1 for each in exact[2]]
    norms = sensitivity(exact[2][0], exact[1][0])
    print(f"{len(batch)} facts, layers {layers}, {args.threads} threads, medians of {args.repeats}")
    print(f"sequential {seconds['sequential']:.3f} s, jacobian {seconds['jacobian']:.3f} s (keys and values included)")
    for layer, step, norm, far in zip(layers, steps, norms, apart, strict=True):
        print(f"layer {layer:2d}  steps {max(step, 0):3d}  M - I {norm:.3f}  difference {far:.3f}")
    if args.dense:
        residual = torch.randn(len(batch), lm.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for name, count in steps_by_preconditioner(dense(exact[2][0], residual), residual).items():
            print(f"layer {layers[0]:2d}  {name:12s}  steps {int(count.max()):3d} (median {int(count.median()):3d})")
    if args.json:
        figures = {**seconds, "ratio": seconds["jacobian"] / seconds["sequential"]}
        args.json.write_text(json.dumps({**figures, "steps": steps, "m_minus_i": norms, "difference": apart}, indent=1))


if __name__ == "__main__":
    main()
