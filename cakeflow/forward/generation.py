"""Text generation: one sampler for answers, free texts, contexts and corpora."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, StoppingCriteria

from cakeflow.data.contexts import Contexts
from cakeflow.errors import ConfigError
from cakeflow.forward.packing import GIB, alike, logits_bytes, pass_bytes, plan, require_bytes
from cakeflow.forward.progress import progress_bar
from cakeflow.forward.tokens import encode_texts, require_readable
from cakeflow.models.language import LanguageModel

SEEDS = ("The", "Therefore", "Because", "I", "You")
"""First words of the generated contexts, as in MEMIT's official code."""
PART = 8
"""New tokens after which texts that have ended leave a batch."""
LEAST_SHARED = 16
"""Tokens with which all rows of a batch begin from which on they are run once."""


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
    ends: Callable[[str], bool] = lambda _: False,
    title: str = "generation",
) -> list[str]:
    """Continue each prompt, in common batches with cached attention keys and values.

    The result depends neither on the composition of the batches nor on the global random state. What all rows of a
    batch begin with is run once, and of greedy texts those that have ended leave it.

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
        ends: Whether nothing that may follow a continuation matters; it is asked after every few tokens of a greedy
            text, which may then be returned without the rest.
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
                new = _Batch(lm, [row for row, _ in chosen], steps, noise, endless, ends).generate(bar)
                bar.update(end - bar.n)  # rows that ended early
                for key, ids in zip(chosen, new, strict=True):
                    ids = [*(key[0] if with_prompt else ()), *ids]
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


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Leave out what a model's folder says of how to generate (penalties, beams, caches), but for where texts end."""
    settings = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = settings


class _Batch:
    """Rows of different lengths that are continued together; what they begin with alike is run once.

    Args:
        lm: The model.
        rows: Token ids of each row.
        limits: Most new tokens of each.
        noise: What is sampled with; None continues greedily.
        endless: Whether to suppress the end-of-text token.
        ends: Whether nothing that may follow a continuation matters.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Sequence[tuple[int, ...]],
        limits: Sequence[int],
        noise: Float[Tensor, "rows tokens k"] | None,
        endless: bool,
        ends: Callable[[str], bool],
    ) -> None:
        self.lm, self.rows, self.limits, self.endless, self.ends = lm, rows, limits, endless, ends
        self.noise = None if noise is None else noise.to(lm.device)
        # decisions about a row belong to its place in a cache
        self.in_parts = noise is None and lm.scope in (None, "token") and lm.frees_rows
        self.filler = lm.tokenizer.eos_token_id or 0
        end = lm.model.generation_config.eos_token_id
        self.end = torch.tensor([] if end is None else end, dtype=torch.long, device=lm.device).reshape(-1)
        self.new: list[list[int]] = [[] for _ in rows]

    def generate(self, bar: Any) -> list[list[int]]:
        """Return new tokens of each row, at most its limit; ``bar`` counts them."""
        places = list(range(len(self.rows)))
        if not max(self.limits):
            return self.new
        with self.lm.running(), _own_settings(self.lm.model):
            cache, ids, mask = self._begin()
            while places:
                start, left = ids.shape[1], [self.limits[place] - len(self.new[place]) for place in places]
                tokens = min(PART, max(left)) if self.in_parts else max(left)
                output = self._run(ids, mask, tokens, cache, _Progress(bar, left, start))
                stay = self._take(places, output.sequences[:, start:])
                ids, cache = output.sequences, output.past_key_values
                mask = F.pad(mask, (0, ids.shape[1] - start), value=1)
                if 0 < len(stay) < len(places):  # what has ended leaves
                    chosen = torch.tensor(stay)  # on the CPU: the parts of a cache may be on several devices
                    ids, mask = ids[chosen], mask[chosen]
                    cache.batch_select_indices(chosen)
                places = [places[i] for i in stay]
        return self.new

    def _begin(self) -> tuple[Cache | None, Int[Tensor, "rows time"], Int[Tensor, "rows time"]]:
        """Return what the rows share, as keys and values, and the rows and their mask, so that all end together."""
        shared = alike(min(self.rows)[:-1], max(self.rows)[:-1]) if self._may_have_gaps() else 0
        shared = shared if shared >= LEAST_SHARED else 0
        cache, width = None, max(map(len, self.rows))
        gaps = [width - len(row) for row in self.rows]
        pairs = list(zip(self.rows, gaps, strict=True))
        ids = torch.tensor([[*row[:shared], *[self.filler] * gap, *row[shared:]] for row, gap in pairs])
        mask = torch.tensor([[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps])
        ids, mask = ids.to(self.lm.device), mask.to(self.lm.device)
        if shared:
            cache = self._run(ids[:1, :shared], mask[:1, :shared], 1).past_key_values  # the new token is not in it
            cache.batch_repeat_interleave(len(self.rows))
        return cache, ids, mask

    def _may_have_gaps(self) -> bool:
        """True if the rows may be run in two parts, with padding between them."""
        longest = max(map(len, self.rows)) + max(self.limits)
        return self.in_parts and len(self.rows) > 1 and self.lm.sees_all(longest) and self.lm.rotates_alike(longest)

    def _take(self, places: Sequence[int], new: Int[Tensor, "rows time"]) -> list[int]:
        """Append new tokens to the rows of these places, and return which of them, by number, go on."""
        ended = torch.isin(new, self.end).any(1).tolist()
        for place, tokens in zip(places, new.tolist(), strict=True):
            self.new[place] = [*self.new[place], *tokens][: self.limits[place]]
        return [i for i, place in enumerate(places) if not (ended[i] or self._is_over(place))]

    def _is_over(self, place: int) -> bool:
        """True if a row has all of its tokens, or what may follow does not matter."""
        new = self.new[place]
        return len(new) == self.limits[place] or self.ends(str(self.lm.tokenizer.decode(new, skip_special_tokens=True)))

    def _run(
        self,
        ids: Int[Tensor, "rows time"],
        mask: Int[Tensor, "rows time"],
        tokens: int,
        cache: Cache | None = None,
        *progress: StoppingCriteria,
    ) -> Any:
        """Return the library's output for ``tokens`` more of each row, or fewer if all rows end earlier."""
        sampling = [] if self.noise is None else [TopK(self.noise, ids.shape[1])]
        return self.lm.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            return_dict_in_generate=True,
            do_sample=False,  # sampling is the processor's task: generate's own draws from the global random state
            min_new_tokens=tokens if self.endless else None,
            max_new_tokens=tokens,
            pad_token_id=self.filler,
            logits_processor=sampling,
            stopping_criteria=[*progress],
        )
