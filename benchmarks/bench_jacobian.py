"""What the exact allocation (theorem 1, ``Jacobian``) costs beside the identity approximation (``Sequential``).

    python benchmarks/bench_jacobian.py [--json FILE]

Both walk the layers of SmolLM2's config for the same facts with uniform weights: keys and values are read and the
residual is allocated before each layer. Residuals are random, as long as the values that they are added to. Nothing is
edited. ``M - I`` is the root mean square over random directions of ``|(M - I) v| / |v|``; ``difference`` is how far the
exact share lies from the sequential one, relatively.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import yaml
from cakeflow_theory import sensitivity
from torch import Tensor

from cakeflow import GradientSearch, Uniform
from cakeflow.allocators import Allocator, Jacobian, LayerContext, Sequential
from cakeflow.core import find_config
from cakeflow.data import Contexts, builtin_facts
from cakeflow.forward import FactReader, ModelJacobian, TextBatch, encode_batch
from cakeflow.models import LanguageModel, Site, load_model


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


def main() -> None:
    """Print both costs and how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="facts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = yaml.safe_load(find_config("model", "smollm2-135m").read_text())["model"]
    lm, layers = load_model("smollm2-135m", dtype="float32"), config["layers"]
    contexts = Contexts(tuple(map(tuple, config["contexts"]["groups"])))
    batch = encode_batch(lm, builtin_facts()[: args.n], contexts)
    ways: dict[str, Allocator] = {"sequential": Sequential(), "jacobian": Jacobian()}
    runs = {name: [walk(lm, batch, layers, way) for _ in range(args.repeats + 1)][1:] for name, way in ways.items()}
    seconds = {name: statistics.median(run[0] for run in found) for name, found in runs.items()}
    exact, rule = runs["jacobian"][0], runs["sequential"][0]
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(exact[1], rule[1], strict=True)]
    steps = [each.products - 1 for each in exact[2]]
    norms = sensitivity(exact[2][0], exact[1][0])
    print(f"{len(batch)} facts, layers {layers}, {args.threads} threads, medians of {args.repeats}")
    print(f"sequential {seconds['sequential']:.3f} s, jacobian {seconds['jacobian']:.3f} s (keys and values included)")
    for layer, step, norm, far in zip(layers, steps, norms, apart, strict=True):
        print(f"layer {layer:2d}  steps {max(step, 0):3d}  M - I {norm:.3f}  difference {far:.3f}")
    if args.json:
        figures = {**seconds, "ratio": seconds["jacobian"] / seconds["sequential"]}
        args.json.write_text(json.dumps({**figures, "steps": steps, "m_minus_i": norms, "difference": apart}, indent=1))


if __name__ == "__main__":
    main()
