"""Time the evaluation of CounterFact records against the way of the official code: one record at a time.

    python benchmarks/bench_evaluation.py --data verbatim_300.json [--records 30] [--only scoring generation]

``scoring``: likelihoods of both targets of every prompt. The reference pads a record's prompts with both targets into
one batch and computes all logits. ``generation``: every record's free texts, greedily, up to 100 tokens in all. The
reference gives a record's prompts to ``generate`` as one batch, repeated prompts repeatedly, as the official code does;
how many of them differ is printed. ``error`` is the largest difference of a mean log-probability, and the share of
texts that differ. The first record alone warms both ways up.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from paired import compare, parser
from torch import Tensor

from cakeflow import EditRequest, read_requests
from cakeflow.evaluation import free_prompts, score_records, scored_prompts
from cakeflow.forward import continuations, encode_prompts
from cakeflow.models import LanguageModel, load_model

TOTAL = 100
"""Tokens of a text, prompt included."""


def scores(lm: LanguageModel, records: list[EditRequest]) -> Tensor:
    """Mean log-probabilities of wanted and rival targets, 2 x prompts."""
    result = score_records(lm, records)
    return torch.stack([result.expected, result.rival])


@torch.no_grad()
def scores_by_record(lm: LanguageModel, records: list[EditRequest]) -> Tensor:
    """The same, a padded batch per record."""
    batches = []
    for record in records:
        asked = list(scored_prompts([record]))
        prompts, targets = [q.prompt for q in asked] * 2, [q.expected for q in asked] + [str(q.rival) for q in asked]
        rows = encode_prompts(lm.tokenizer, prompts, targets)
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows])
        mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
        logprobs = lm.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        means = [
            logprobs[i, range(row.target - 1, len(row.ids) - 1), list(row.ids[row.target :])].mean()
            for i, row in enumerate(rows)
        ]
        batches.append(torch.stack(means).reshape(2, -1))
    return torch.cat(batches, 1)


def texts(lm: LanguageModel, records: list[EditRequest]) -> list[str]:
    """Continuations of the records' prompts for free texts."""
    return continuations(lm, [prompt for record in records for prompt in free_prompts(record)], TOTAL, total=True)


@torch.no_grad()
def texts_by_record(lm: LanguageModel, records: list[EditRequest]) -> list[str]:
    """The same, a batch of ``generate`` per record."""
    outputs, end = [], lm.tokenizer.eos_token_id
    for record in records:
        rows = [lm.tokenizer(prompt)["input_ids"] for prompt in free_prompts(record)]
        width = max(map(len, rows))
        ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        most = TOTAL - min(map(len, rows))
        output = lm.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=end
        )
        new = [line[: TOTAL - len(row)] for line, row in zip(output[:, width:], rows, strict=True)]
        outputs += [lm.tokenizer.decode(line, skip_special_tokens=True) for line in new]
    return outputs


WAYS = {
    "scoring": (scores, scores_by_record, lambda got, want: float((got - want).abs().max()), 1e-4),
    "generation": (
        texts,
        texts_by_record,
        lambda got, want: sum(a != b for a, b in zip(got, want, strict=True)) / len(want),
        0.0,
    ),
}
"""Name -> ours, reference, difference, bar."""


def main() -> int:
    """Evaluate both ways; the exit status."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--data", type=Path, required=True, help="CounterFact records")
    options.add_argument("--records", type=int, default=30)
    options.add_argument("--only", choices=WAYS, nargs="+", default=[*WAYS])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    lm, records = load_model("smollm2-135m", dtype="float32"), read_requests(args.data)[: args.records]
    free = [prompt for record in records for prompt in free_prompts(record)]
    print(f"{len(records)} records; {len(free)} free texts, {len(set(free))} different prompts")
    ways = {name: (partial(ours, lm), partial(other, lm), *bar) for name, (ours, other, *bar) in WAYS.items()}
    return compare({name: ways[name] for name in args.only}, records, args)


if __name__ == "__main__":
    sys.exit(main())
