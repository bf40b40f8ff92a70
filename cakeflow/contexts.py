"""The texts around a prompt in which an edit must hold: an explicit, seeded, stored part of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cakeflow.errors import ConfigError
from cakeflow.model import LanguageModel

SEEDS = ("The", "Therefore", "Because", "I", "You")
"""First words of the generated contexts, as in MEMIT's official code."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """Groups of templates, each with one ``{}`` for the prompt; the first template is the bare ``{}``.

    A mean over contexts is the mean of the groups' means, as in MEMIT's code: with the bare prompt alone in the first
    group, it has half of the weight.

    Attributes:
        groups: Templates by group.

    Raises:
        ConfigError: If a template lacks its ``{}`` or the first one is not bare.

    Example:
        >>> Contexts((("{}",), ("The sky is. {}", "I am. {}"))).weights
        (0.5, 0.25, 0.25)
    """

    groups: tuple[tuple[str, ...], ...] = (("{}",),)

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups) or self.groups[0][0] != "{}":
            raise ConfigError(f"contexts {self.groups!r}: no group may be empty, and the first template must be '{{}}'")
        if bad := [template for template in self.templates if template.count("{}") != 1]:
            raise ConfigError(f"context {bad[0]!r} needs exactly one {{}} for the prompt")

    @classmethod
    def of(cls, templates: Sequence[str]) -> Contexts:
        """Contexts from a flat list, the bare ``{}`` first: it forms one group, the others the second."""
        groups = (tuple(templates[:1]), tuple(templates[1:]))
        return cls(groups if groups[1] else groups[:1])

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates in order."""
        return tuple(template for group in self.groups for template in group)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each template in a mean over contexts."""
        return tuple(1 / len(self.groups) / len(group) for group in self.groups for _ in group)


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
