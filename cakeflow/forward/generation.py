"""How a model goes on by itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor

from cakeflow.data.contexts import Contexts
from cakeflow.forward.packing import GIB, plan
from cakeflow.models.language import LanguageModel

SEEDS = ("The", "Therefore", "Because", "I", "You")
"""First words of the generated contexts, as in MEMIT's official code."""


def generate_contexts(lm: LanguageModel, seed: int = 0, length: int = 10) -> Contexts:
    """Sample one short text after each of ``SEEDS`` from the model as it is now.

    Top-k sampling with k = 5 and ``length`` tokens in all, as in MEMIT's code, but seeded, so that the same model
    gives the same contexts; the caller's random state is left alone.

    Args:
        lm: The model, not edited yet.
        seed: Of the sampling.
        length: Tokens of each text, seed word and special tokens included.

    Returns:
        The bare prompt, and a group with the five sampled texts, each followed by ``". {}"``.
    """
    texts = []
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), lm.evaluating():
        torch.manual_seed(seed)
        for word in SEEDS:
            encoded = lm.tokenizer(word, return_tensors="pt").to(lm.device)
            output = lm.model.generate(  # type: ignore[operator]
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                do_sample=True,
                top_k=5,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=length - encoded["input_ids"].shape[1],
                pad_token_id=lm.tokenizer.eos_token_id,
            )
            texts.append(str(lm.tokenizer.decode(output[0], skip_special_tokens=True)))
    clean = [text.replace("{", " ").replace("}", " ").strip() for text in texts]
    return Contexts((("{}",), tuple(f"{text}. {{}}" for text in clean)))


STOPS = (".", "\n")
"""Where an answer ends by itself, beside the end-of-text token."""


class TopK(LogitsProcessor):
    """Samples among the ``k`` most likely tokens, each row with noise of its own (the Gumbel-max form of sampling).

    So what a row becomes depends on its seed only, neither on its neighbours in the batch nor on a global random state.

    Args:
        noise: Gumbel noise for each row and step.
        start: Length of the rows before the first step.
    """

    def __init__(self, noise: Float[Tensor, "rows steps k"], start: int) -> None:
        self.noise, self.start = noise, start

    def __call__(
        self, input_ids: Int[Tensor, "rows time"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """0 for the token drawn, minus infinity for all others."""
        best, token = scores.float().topk(self.noise.shape[2])
        drawn = token.gather(1, (best + self.noise[:, input_ids.shape[1] - self.start]).argmax(1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def gumbel(seeds: Sequence[int], steps: int, k: int) -> Float[Tensor, "rows steps k"]:
    """Gumbel noise, each row from its own seed; a row's first steps do not depend on how many follow."""
    rows = [torch.rand(steps, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return -(-torch.stack(rows).clamp_min(1e-300).log()).log()


@torch.no_grad()
def continuations(
    lm: LanguageModel,
    prompts: Sequence[str],
    tokens: int = 12,
    max_tokens: int | None = None,
    *,
    total: bool = False,
    top_k: int = 1,
    seed: int = 0,
) -> list[str]:
    """Continuation of each prompt, all prompts in common batches with cached attention keys and values.

    Args:
        lm: The model.
        prompts: n prompts.
        tokens: Most new tokens, or most tokens in all (``total``).
        max_tokens: Most tokens in one batch, new ones included; by default those whose keys and values take a GiB.
        total: Whether ``tokens`` counts those of the prompt as well, as the official generation tests do.
        top_k: Sample among so many most likely tokens; 1 is greedy, and equal prompts are then continued once.
        seed: Of the sampling; every prompt and every repetition of it draws for itself.

    Returns:
        n texts without their prompts, special tokens left out; they end where the model's positions do.
    """
    max_tokens = max_tokens or max(1, GIB // _cached(lm))
    rows = [tuple(lm.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for row in rows:  # a row and its number among equal ones; greedily all of them are number 0
        keys.append((row, seen[row]))
        seen[row] += top_k > 1
    asked = list(dict.fromkeys(keys))
    rooms = [max(0, min(tokens if total else len(row) + tokens, lm.longest) - len(row)) for row, _ in asked]
    texts: dict[tuple[tuple[int, ...], int], str] = {}
    with tqdm(total=len(asked), desc="generation", unit="text", delay=5, leave=False) as bar:
        for group in plan(
            [len(row) + room for (row, _), room in zip(asked, rooms, strict=True)], max_tokens, slack=max_tokens
        ):
            for part in _within(group, [len(row) for row, _ in asked], rooms, lm.longest):
                seeds = [_seed(seed, *asked[i]) for i in part]
                found = _generate(lm, [asked[i][0] for i in part], max(rooms[i] for i in part), top_k, seeds)
                for i, new in zip(part, found, strict=True):
                    texts[asked[i]] = str(lm.tokenizer.decode(new[: rooms[i]], skip_special_tokens=True))
                bar.update(len(part))
    return [texts[key] for key in keys]


def _cached(lm: LanguageModel) -> int:
    """Bytes of a token's keys and values in all blocks."""
    config, heads = lm.model.config, int(lm.model.config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or lm.width // heads)
    return 2 * lm.depth * int(getattr(config, "num_key_value_heads", None) or heads) * width * lm.dtype.itemsize


def _within(group: list[int], lengths: Sequence[int], rooms: Sequence[int], longest: int) -> list[list[int]]:
    """A group whole, or row by row where its longest row and its largest room together pass the model's positions."""
    fits = max(lengths[i] for i in group) + max(rooms[i] for i in group) <= longest
    return [group] if fits else [[i] for i in group]


def _seed(seed: int, row: tuple[int, ...], number: int) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, row, number)).encode()).digest()[:7], "big")


def _generate(
    lm: LanguageModel, rows: Sequence[tuple[int, ...]], tokens: int, top_k: int, seeds: Sequence[int]
) -> Sequence[Tensor] | Int[Tensor, "rows tokens"]:
    """New tokens of rows of different lengths, which are padded on the left: all end where the new tokens begin."""
    if not tokens:
        return [torch.empty(0, dtype=torch.long)] * len(rows)
    width, end = max(map(len, rows)), lm.tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(row)) + list(row) for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    draw = [TopK(gumbel(seeds, tokens, top_k).to(lm.device), width)] if top_k > 1 else []
    with lm.evaluating():
        output: Tensor = lm.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            pad_token_id=end,
            logits_processor=draw,
        )
    return output[:, width:]


def until_stop(text: str) -> str:
    """A continuation up to where it ends by itself: the first full stop or line break, or the end of the text.

    Example:
        >>> until_stop(" Rome. It is old")
        ' Rome'
    """
    ends = [at for stop in STOPS if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
