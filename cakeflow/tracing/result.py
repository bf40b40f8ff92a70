"""Results of a trace: stored fact by fact while it runs, then one table of effects."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError
from cakeflow.forward.tokens import Row
from cakeflow.models.language import LanguageModel
from cakeflow.ranks import on_first
from cakeflow.storage.atomic import write_text
from cakeflow.storage.cache import cache_folder, content_key, require_writable
from cakeflow.storage.locks import locked
from cakeflow.storage.typed import SHA256, Schema, parse_as

PLACES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first further token",
    "further tokens",
    "last token",
)
"""Rows of the layer x token map (ROME, figure 2); a fact's tokens of one kind are averaged."""

LAST_SUBJECT = PLACES.index("last subject token")


def place_of(row: Row, token: int) -> int:
    """Return the index in ``PLACES`` of a token of a traced fact; a subject of one token counts as its last."""
    if token == row.subject:
        return LAST_SUBJECT
    if token < row.subject:
        return 0 if token == row.start else 1
    if token == row.target - 1:
        return 5
    return 3 if token == row.subject + 1 else 4


@dataclass(frozen=True, slots=True)
class Effect:
    """One fact's trace.

    Attributes:
        clean: Probability of the object's first token in the clean run.
        corrupted: Mean probability in the corrupted runs, over the draws.
        effects: Gain of each restoration over ``corrupted``, by place and layer; None for places without a token.
    """

    clean: float
    corrupted: float
    effects: list[list[float] | None]


class _CacheLine(Schema):
    """A fact's effects in the cache, with the hash of the rest of the line."""

    fact: str
    clean: float
    corrupted: float
    effects: list[list[float] | None]
    hash: SHA256


class TraceCache:
    """Effects by fact, in a file that grows line by line, so that an interrupted trace keeps its results."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._effects: dict[str, Effect] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            with suppress(ConfigError):  # a line cut off by the death of a process is skipped: its fact is traced again
                entry = parse_as(_CacheLine, line, str(path), ConfigError, "").to_dict()
                if entry.pop("hash") == content_key(entry):
                    fact = entry.pop("fact")
                    self._effects[fact] = Effect(**entry)

    @classmethod
    def of(cls, lm: LanguageModel, settings: dict[str, Any], folder: Path | None) -> TraceCache:
        """Open the cache of a model (weights and tokenizer) and of the settings that decide the numbers.

        Of several ranks the first one reads and writes the file.
        """
        key = content_key(lm.fingerprint(), str(lm.dtype), settings)
        path = (folder or cache_folder() / "traces") / f"{key[:16]}.jsonl"
        return on_first(lambda: cls(path))

    @staticmethod
    def _name(row: Row) -> str:
        """Hash all that a fact's effects depend on: its tokens up to the object's first, and the subject's position."""
        return content_key(row.ids[: row.target + 1], row.start, row.subject)[:24]

    def __contains__(self, row: Row) -> bool:
        return self._name(row) in self._effects

    def __getitem__(self, row: Row) -> Effect:
        return self._effects[self._name(row)]

    def add(self, rows: Sequence[Row], effects: Sequence[Effect]) -> None:
        """Store the effects of some facts, in memory and on disk."""
        self._effects |= dict(zip(map(self._name, rows), effects, strict=True))
        on_first(lambda: self._write(rows, effects))

    def _write(self, rows: Sequence[Row], effects: Sequence[Effect]) -> None:
        require_writable(self._path.parent)
        with locked(self._path, wait=True), self._path.open("a", encoding="utf-8") as handle:
            handle.write("\n" if self._torn else "")
            self._torn = False
            for row, effect in zip(rows, effects, strict=True):
                entry = {"fact": self._name(row), **asdict(effect)}
                handle.write(json.dumps(entry | {"hash": content_key(entry)}) + "\n")


@dataclass(frozen=True, eq=False)
class Trace:
    """Indirect effects of n facts.

    Attributes:
        clean: Probability of the object in the clean run.
        corrupted: Probability of the object in the corrupted runs.
        effects: Indirect effect of each fact, place (see ``PLACES``) and layer; nan where there is no such place.
        settings: Settings of the trace, with the resolved noise and the layers.
    """

    clean: Float[Tensor, " n"]
    corrupted: Float[Tensor, " n"]
    effects: Float[Tensor, "n places l"]
    settings: dict[str, Any]

    @classmethod
    def of(cls, facts: Sequence[Effect], settings: dict[str, Any]) -> Trace:
        """Collect the facts' effects."""
        absent = [math.nan] * len(settings["layers"])
        effects = [[place or absent for place in effect.effects] for effect in facts]
        runs = torch.tensor([[effect.clean, effect.corrupted] for effect in facts], dtype=torch.float64)
        return cls(runs[:, 0], runs[:, 1], torch.tensor(effects, dtype=torch.float64), settings)

    @property
    def layers(self) -> list[int]:
        """Indices of the traced layers."""
        return list(self.settings["layers"])

    @property
    def scores(self) -> dict[int, float]:
        """Layer -> AIE at the subject's last token, in the form for ``Scores`` (CAKE eq. 69)."""
        return dict(zip(self.layers, self.effects[:, LAST_SUBJECT].mean(0).tolist(), strict=True))

    @property
    def errors(self) -> dict[int, float]:
        """Layer -> standard error of its score over the facts; nan for a single fact."""
        spread = self.effects[:, LAST_SUBJECT].std(0) / len(self.effects) ** 0.5
        return dict(zip(self.layers, spread.tolist(), strict=True))

    @property
    def map(self) -> Float[Tensor, "places l"]:
        """AIE by place and layer (ROME, figure 2); nan for places that were not traced."""
        return self.effects.nanmean(0)

    def save(self, path: Path) -> None:
        """Write scores, errors, settings and the effects of each fact as JSON."""
        content = {
            "scores": self.scores,
            "errors": self.errors,
            "facts": len(self.effects),
            "clean": float(self.clean.mean()),
            "corrupted": float(self.corrupted.mean()),
            "settings": self.settings,
            "effects": [asdict(effect) for effect in self._facts()],
        }
        write_text(path, json.dumps(content))

    def _facts(self) -> Iterator[Effect]:
        for clean, corrupted, effects in zip(self.clean, self.corrupted, self.effects, strict=True):
            places = [place.tolist() if bool(torch.isfinite(place).all()) else None for place in effects]
            yield Effect(float(clean), float(corrupted), places)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a file of ``save``.

        Raises:
            ConfigError: If the file is not a trace.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            trace = cls.of([Effect(**entry) for entry in content["effects"]], content["settings"])
            if trace.effects.shape[1:] != (len(PLACES), len(trace.layers)):
                raise ValueError(f"effects of shape {tuple(trace.effects.shape)}")
            return trace
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            raise ConfigError(f"{path} is no saved trace: {error}") from error
