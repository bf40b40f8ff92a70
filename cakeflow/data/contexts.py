"""Texts around a prompt in which an edit must hold; they are stored with a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cakeflow.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Contexts:
    """Groups of templates, each with one ``{}`` for the prompt; the first template is the bare ``{}``.

    A mean over contexts is the mean of the groups' means, as in MEMIT's code: with the bare prompt alone in the first
    group, it has half of the weight. In a chat a fact has a key of its own, but the same target value.

    Attributes:
        groups: Templates by group.
        chats: Templates of a chat, up to where the answer begins.

    Raises:
        ConfigError: If a template lacks its ``{}`` or the first one is not bare.

    Example:
        >>> Contexts((("{}",), ("The sky is. {}", "I am. {}"))).weights
        (0.5, 0.25, 0.25)
    """

    groups: tuple[tuple[str, ...], ...] = (("{}",),)
    chats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups) or self.groups[0][0] != "{}":
            raise ConfigError(f"contexts {self.groups!r}: no group may be empty, and the first template must be '{{}}'")
        if bad := [template for template in self.templates if template.count("{}") != 1]:
            raise ConfigError(f"context {bad[0]!r} needs exactly one {{}} for the prompt")

    @classmethod
    def of(cls, templates: Sequence[str]) -> Contexts:
        """Build contexts from a flat list: the bare ``{}``, which comes first, is one group, all others the second."""
        groups = (tuple(templates[:1]), tuple(templates[1:]))
        return cls(groups if groups[1] else groups[:1])

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates in order, those of a chat last."""
        return (*(template for group in self.groups for template in group), *self.chats)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each template in the mean of its key."""
        plain = [1 / len(self.groups) / len(group) for group in self.groups for _ in group]
        return (*plain, *(1 / len(self.chats) for _ in self.chats))

    @property
    def keys(self) -> tuple[int, ...]:
        """For each template the key that it belongs to: 0, or 1 in a chat."""
        return (*(0 for group in self.groups for _ in group), *(1 for _ in self.chats))
