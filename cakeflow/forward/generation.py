"""Text generation: one sampler for answers, free texts, contexts and corpora."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from cakeflow.data.contexts import Contexts
from cakeflow.errors import ConfigError
from cakeflow.forward.packing import GIB, logits_bytes, pass_bytes, plan, require_bytes
from cakeflow.forward.progress import progress_bar
from cakeflow.forward.tokens import encode_texts, require_readable
from cakeflow.models.language import LanguageModel

SEEDS = ("The", "Therefore", "Because", "I", "You")
"""First words of the generated contexts, as in MEMIT's official code."""


def generate_contexts(lm: LanguageModel, seed: int = 0, length: int = 10) -> Contexts:
    """Sample one short text after each of ``SEEDS`` from the model in its present state.

    Top-k sampling with k = 5 and ``length`` tokens in all, as in MEMIT's code, but reproducible: the same model and
    seed give the same contexts.

    Args:
        lm: The model, not edited yet.
        seed: Seed of the sampling noise.
        length: Tokens of each text, seed word and special tokens included.

    Returns:
        The bare prompt, and a group with the five sampled texts, each followed by ``". {}"``.
    """
    texts = continuations(lm, SEEDS, length, total=True, top_k=5, seed=seed, with_prompt=True)
    clean = [text.replace("{", " ").replace("}", " ").strip() for text in texts]
    return Contexts((("{}",), tuple(f"{text}. {{}}" for text in clean)))


def chat_template(lm: LanguageModel) -> str:
    """Return the template of a chat for ``Contexts``: the prompt as its first question.

    Raises:
        ConfigError: If the tokenizer's template cannot write it.
    """
    try:
        template = lm.user_turn("{}")
    except ConfigError as error:
        raise ConfigError(f"facts cannot be written in a chat: {error}; or set chat to false") from error
    if template.count("{}") != 1:
        raise ConfigError(
            f"facts cannot be written in a chat: the tokenizer's template makes {template!r} of the prompt '{{}}'; set "
            "chat to false, or name contexts.chats"
        )
    return template


class TopK(LogitsProcessor):
    """Gumbel-max sampling among the ``k`` most likely tokens, with separate noise for each row.

    A row's text depends on its own seed only, neither on its neighbours in the batch nor on the global random state.

    Args:
        noise: Gumbel noise for each row and step.
        start: Length of the rows before the first step.
    """

    def __init__(self, noise: Float[Tensor, "rows steps k"], start: int) -> None:
        self.noise, self.start = noise, start

    def __call__(
        self, input_ids: Int[Tensor, "rows time"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Return 0 for the sampled token and minus infinity for all others."""
        best, token = scores.float().topk(self.noise.shape[2])
        sample = token.gather(1, (best + self.noise[:, input_ids.shape[1] - self.start]).argmax(1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, sample, 0.0)


class _Progress(StoppingCriteria):
    """Advances a progress bar by the rows that grow at each step; never stops the generation."""

    def __init__(self, bar: Any, limits: Sequence[int], start: int) -> None:
        self.bar, self.limits, self.start = bar, limits, start

    def __call__(self, input_ids: Int[Tensor, "rows time"], scores: Any, **_: Any) -> Bool[Tensor, " rows"]:
        """Count the new tokens of rows within their limits."""
        step = input_ids.shape[1] - self.start
        self.bar.update(sum(limit >= step for limit in self.limits))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def gumbel(seeds: Sequence[int], steps: int, k: int) -> Float[Tensor, "rows steps k"]:
    """Gumbel noise, each row from its own seed; a row's first steps do not depend on how many follow."""
    rows = [torch.rand(steps, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return -(-torch.stack(rows).clamp_min(1e-300).log()).log()  # the clamp keeps the logarithm of a 0 finite


@torch.no_grad()
def continuations(
    lm: LanguageModel,
    prompts: Sequence[str],
    tokens: int = 12,
    max_tokens: int | None = None,
    *,
    max_bytes: float | None = None,
    total: bool = False,
    top_k: int = 1,
    seed: int = 0,
    endless: bool = False,
    with_prompt: bool = False,
    title: str = "generation",
) -> list[str]:
    """Continue each prompt, in common batches with cached attention keys and values.

    The result depends neither on the composition of the batches nor on the global random state.

    Args:
        lm: The model.
        prompts: n prompts.
        tokens: Most new tokens, or most tokens in all (``total``).
        max_tokens: Most tokens in one batch, new ones included; by default those whose keys and values take a GiB.
        max_bytes: Most bytes beyond the model.
        total: Count the prompt's tokens as well, as the official generation tests do.
        top_k: Number of most likely tokens to sample from; 1 is greedy, and equal prompts are then continued once.
        seed: Seed of the sampling noise; every prompt and every repetition of it has noise of its own.
        endless: Suppress the end-of-text token, so that every continuation has its full length.
        with_prompt: Return each prompt with its continuation, decoded as one text.
        title: Label of the progress bar, which counts new tokens.

    Returns:
        n texts without special tokens; they end where the model's positions do.

    Raises:
        ConfigError: If the longest text does not fit ``max_bytes``.
        RequestError: If a prompt has a token that the model cannot read.
    """
    rows = encode_texts(lm.tokenizer, prompts)
    require_readable(lm, rows, prompts)
    repeats: Counter[tuple[int, ...]] = Counter()
    keys = []
    for row in rows:  # a row and its number among equal ones; greedily all of them are number 0
        keys.append((row, repeats[row]))
        repeats[row] += top_k > 1
    unique = list(dict.fromkeys(keys))
    lengths = [len(row) for row, _ in unique]
    limits = [max(0, min(tokens if total else n + tokens, lm.longest) - n) for n in lengths]
    sums = [sum(pair) for pair in zip(lengths, limits, strict=True)]
    budget = max_tokens or max(1, GIB // cached_bytes(lm))
    budget = budget if max_bytes is None else min(budget, _most_tokens(lm, sums, max_bytes))
    texts: dict[tuple[tuple[int, ...], int], str] = {}
    with progress_bar(sum(limits), title, "token") as bar:
        for group in plan(sums, budget, slack=budget):
            for part in _within(group, lengths, limits, lm.longest):
                chosen, steps = [unique[i] for i in part], [limits[i] for i in part]
                noise = gumbel([_seed(seed, *key) for key in chosen], max(steps), top_k) if top_k > 1 else None
                end = bar.n + sum(steps)
                new = _generate(lm, [row for row, _ in chosen], steps, noise, endless, bar)
                bar.update(end - bar.n)  # rows that ended early
                for key, ids, limit in zip(chosen, new, steps, strict=True):
                    ids = [*(key[0] if with_prompt else ()), *ids[:limit].tolist()]
                    texts[key] = str(lm.tokenizer.decode(ids, skip_special_tokens=True))
    return [texts[key] for key in keys]


def cached_bytes(lm: LanguageModel) -> int:
    """Bytes of a token's keys and values in all blocks."""
    config = lm.config.to_dict()  # where layers differ, attributes of the object raise
    heads = lm.config.num_attention_heads
    width = int(config.get("head_dim") or lm.width // heads)
    return 2 * lm.depth * int(config.get("num_key_value_heads") or heads) * width * lm.dtype.itemsize


def _most_tokens(lm: LanguageModel, lengths: Sequence[int], max_bytes: float) -> int:
    """Return how many tokens fit in rows of these lengths: keys, values, a first pass, and two copies of logits."""
    row, longest = 2 * logits_bytes(lm), max(lengths, default=1)
    token = cached_bytes(lm) + pass_bytes(lm)
    require_bytes(max_bytes, row + longest * token, f"writing a text of {longest} tokens")
    return max(longest, int(max_bytes / (token + row / max(1, min(lengths, default=1)))))


def _within(group: list[int], lengths: Sequence[int], limits: Sequence[int], longest: int) -> list[list[int]]:
    """Split a group row by row where its longest row and its largest limit together exceed the model's positions."""
    fits = max(lengths[i] for i in group) + max(limits[i] for i in group) <= longest
    return [group] if fits else [[i] for i in group]


def _seed(seed: int, row: tuple[int, ...], number: int) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, row, number)).encode()).digest()[:7], "big")


def _generate(
    lm: LanguageModel,
    rows: Sequence[tuple[int, ...]],
    limits: Sequence[int],
    noise: Float[Tensor, "rows tokens k"] | None,
    endless: bool,
    bar: Any,
) -> Int[Tensor, "rows tokens"]:
    """Return new tokens of rows of different lengths, as many as the largest limit unless all rows end earlier."""
    if not (tokens := max(limits)):
        return torch.empty(len(rows), 0, dtype=torch.long)
    # padded on the left, so that all rows end where the new tokens begin
    width, filler = max(map(len, rows)), lm.tokenizer.eos_token_id or 0
    ids = torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    with lm.running():
        output: Tensor = lm.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,  # sampling is the processor's task: generate's own draws from the global random state
            repetition_penalty=1.0,
            min_new_tokens=tokens if endless else None,
            max_new_tokens=tokens,
            pad_token_id=filler,
            logits_processor=[] if noise is None else [TopK(noise.to(lm.device), width)],
            stopping_criteria=[_Progress(bar, limits, width)],
        )
    return output[:, width:]
