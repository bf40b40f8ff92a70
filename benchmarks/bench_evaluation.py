"""Time the evaluation of CounterFact records against the way of the official code: one record at a time.

    python benchmarks/bench_evaluation.py --data verbatim_300.json [--records 30] [--only scoring answers ...]

``scoring``: likelihoods of both targets of every prompt. The reference pads a record's prompts with both targets into
one batch and computes all logits. ``generation``: every record's free texts, greedily, up to 100 tokens in all. The
reference gives a record's prompts to ``generate`` as one batch, repeated prompts repeatedly, as the official code does;
how many of them differ is printed. ``answers``: free answers of up to 32 tokens to every prompt, cut where a reader
would end them; ``behind``: those of up to 12 tokens to the facts behind 200 tokens of other text. The reference gives
``generate`` the same prompts, a batch for each record, and all of ``behind`` at once. ``error`` is the largest
difference of a mean log-probability, and the share of texts that differ. The first record alone warms both ways up.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from paired import compare, parser
from torch import Tensor

from cakeflow import EditRequest, read_requests
from cakeflow.data import neutral_text, until_stop
from cakeflow.evaluation import free_answers, free_prompts, score_records, scored_prompts
from cakeflow.forward import continuations, encode_prompts
from cakeflow.models import LanguageModel, load_model

TOTAL = 100
"""Tokens of a text, prompt included."""
ANSWER, SHORT, FRONT = 32, 12, 200
"""New tokens of an answer, of one behind other text, and tokens of that text."""


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


def texts_by_record(lm: LanguageModel, records: list[EditRequest]) -> list[str]:
    """The same, a batch of ``generate`` per record."""
    outputs = []
    for prompts in map(free_prompts, records):
        limits = [TOTAL - len(lm.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        outputs += generated(lm, prompts, limits)
    return outputs


@torch.no_grad()
def generated(lm: LanguageModel, prompts: list[str], limits: list[int]) -> list[str]:
    """Continuations by one batch of ``generate``, each up to its own number of new tokens."""
    rows, end = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts], lm.tokenizer.eos_token_id
    width = max(map(len, rows))
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    output = lm.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max(limits), pad_token_id=end
    )
    new = [line[:limit] for line, limit in zip(output[:, width:], limits, strict=True)]
    return [lm.tokenizer.decode(line, skip_special_tokens=True) for line in new]


def answers(lm: LanguageModel, records: list[EditRequest]) -> list[str]:
    """Free answers to the prompts of the records."""
    return free_answers(lm, [each.prompt for each in scored_prompts(records)], ANSWER)


def answers_by_record(lm: LanguageModel, records: list[EditRequest]) -> list[str]:
    """The same, a batch of ``generate`` per record."""
    prompts = [[each.prompt for each in scored_prompts([record])] for record in records]
    texts = [text for each in prompts for text in generated(lm, each, [ANSWER] * len(each))]
    return [until_stop(text) for text in texts]


def behind(lm: LanguageModel, records: list[EditRequest]) -> list[str]:
    """Free answers to the facts behind other text."""
    return free_answers(lm, late_prompts(lm, records), SHORT)


def behind_at_once(lm: LanguageModel, records: list[EditRequest]) -> list[str]:
    """The same, one batch of ``generate``."""
    prompts = late_prompts(lm, records)
    return [until_stop(text) for text in generated(lm, prompts, [SHORT] * len(prompts))]


def late_prompts(lm: LanguageModel, records: list[EditRequest]) -> list[str]:
    """The facts' prompts behind the first 200 tokens of a text about everyday matters."""
    ids = lm.tokenizer(neutral_text(), add_special_tokens=False)["input_ids"][:FRONT]
    return [f"{lm.tokenizer.decode(ids)} {record.text}" for record in records]


def share(got: list[str], reference: list[str]) -> float:
    """Share of texts that differ."""
    return sum(a != b for a, b in zip(got, reference, strict=True)) / len(reference)


WAYS = {
    "scoring": (scores, scores_by_record, lambda got, want: float((got - want).abs().max()), 1e-4),
    "generation": (texts, texts_by_record, share, 0.0),
    "answers": (answers, answers_by_record, share, 0.0),
    "behind": (behind, behind_at_once, share, 0.0),
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
