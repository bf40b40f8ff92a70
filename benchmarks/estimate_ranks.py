"""Estimate on paper what ranks give for a large model: memory of a rank, bytes that it receives, and time of a batch.

    python benchmarks/estimate_ranks.py [--facts 100] [--steps 25] [--passes 1] [--rate 4e14] [--node 3e11]
        [--network 4e10]

Nothing is timed. The shape is that of Llama-3.1-70B in bfloat16; the facts are the built-in ones in three contexts,
counted in SmolLM2's tokens, and operations and bytes follow from them. ``rate`` is multiply-adds per second of a GPU,
``node`` and ``network`` are bytes per second that a GPU receives within a node and between nodes. Attention, the norms
and the overlap of exchange and work are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cakeflow import Contexts
from cakeflow.data import builtin_facts
from cakeflow.forward import encode_batch
from cakeflow.models import load_model

CONTEXTS = Contexts((("{}",), ("Therefore, the answer is not that. {}", "I am a student in the field of. {}")))
SHAPE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
VALUE_LAYER, EDITED, ITEM, GB = 8, 5, 2, 1e9
"""Layer whose output is searched for, number of edited layers, bytes of a weight in bfloat16, and of a gigabyte."""


@dataclass(frozen=True)
class Work:
    """What a batch computes, counted.

    Attributes:
        blocks: Weights of all blocks.
        whole: Weights that every rank has: embedding, head, norms.
        tokens: Tokens of all suffixes in one step.
    """

    blocks: int
    whole: int
    tokens: int

    @classmethod
    def of(cls, facts: int) -> Work:
        """Count weights of the shape on the meta device, and tokens of so many facts."""
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        blocks = sum(each.numel() for each in model.model.layers.parameters())
        requests = (builtin_facts() * 2)[:facts]
        rows = encode_batch(load_model("smollm2-135m"), requests, CONTEXTS).rows
        tokens = sum(len(row.ids) - 1 - row.fact for each in rows for row in each)
        return cls(blocks, sum(each.numel() for each in model.parameters()) - blocks, tokens)

    def memory(self, shards: int) -> float:
        """Bytes of weights on a rank: its part, what is whole, a gathered block, float32 copies of what is edited."""
        edited = 4 * EDITED * SHAPE["hidden_size"] * SHAPE["intermediate_size"]
        return ITEM * (self.blocks / shards + self.whole + self.blocks / SHAPE["num_hidden_layers"]) + edited

    def operations(self, steps: int) -> float:
        """Multiply-adds of the search: forward and backward by the inputs through the blocks above, and the head."""
        above = self.blocks * (1 - (VALUE_LAYER + 1) / SHAPE["num_hidden_layers"]) + self.whole / 2
        return 2 * steps * self.tokens * above


def rows_of(work: Work, options: argparse.Namespace) -> Iterator[Sequence[str]]:
    """Yield one row per way to spread the model: memory, bytes that a rank receives, and seconds of a search."""
    width, layers = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    whole = work.operations(options.steps) / options.rate
    ways = [
        ("a GPU alone", 1, 1, 0.0),
        ("FSDP2, 8 GPUs", 8, 1, options.node),
        ("FSDP2, 64 GPUs", 64, 1, options.network),
    ]
    ways += [("tensor parallel, 8 GPUs", 1, 8, options.node), ("both, 8 x 8 GPUs", 8, 8, options.network)]
    for name, shards, split, speed in ways:
        gathered = ITEM * work.blocks / split * (shards - 1) / shards  # of one pass, through every block
        summed = 2 * (split - 1) / split * 2 * layers * work.tokens * width * ITEM  # two sums of a block's outputs
        moved = 2 * options.steps * ((options.passes * gathered if shards > 1 else 0) + summed)
        seconds = whole / split + (moved / speed if speed else 0)
        memory = work.memory(shards * split)
        yield name, f"{memory / GB:.0f}", f"{moved / GB:,.0f}", f"{whole / split:.1f}", f"{seconds:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--passes", type=int, default=1, help="groups of suffixes in a step")
    parser.add_argument("--rate", type=float, default=4e14)
    parser.add_argument("--node", type=float, default=3e11)
    parser.add_argument("--network", type=float, default=4e10)
    options = parser.parse_args()
    work = Work.of(options.facts)
    print(f"{work.blocks / GB:.1f} + {work.whole / GB:.1f} billion weights; {work.tokens} tokens a step")
    print(
        "| way | GB of weights on a rank | GB received in a search | s of work | s with exchanges |\n"
        + "|---" * 5
        + "|"
    )
    for row in rows_of(work, options):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
