"""What people look at after a run: tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.table import Table
from rich.text import Text

from cakeflow.model import LanguageModel


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Metrics in percent, one column per stage."""
    table = Table(title="Metrics (%)", title_justify="left")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in next(iter(columns.values()), {}):
        table.add_row(metric, *(f"{100 * column[metric]:.1f}" for column in columns.values()))
    return table


def timings_table(timings: Mapping[str, float], edits: int) -> Table:
    """Seconds per phase, in all and per edit."""
    table = Table(title="Time", title_justify="left")
    for name in ("phase", "seconds", "per edit"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, seconds in timings.items():
        table.add_row(phase, f"{seconds:.1f}", f"{seconds / edits:.2f}")
    return table


def texts_table(prompts: Sequence[str], wanted: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Table:
    """Prompts with their continuations before and after."""
    table = Table(title="Generations", title_justify="left", show_lines=True)
    for name in ("prompt", "new target", "before", "after"):
        table.add_column(name)
    for row in zip(prompts, wanted, before, after, strict=True):
        table.add_row(*(Text(text) for text in row))
    return table


def continuations(lm: LanguageModel, prompts: Sequence[str], tokens: int = 12) -> list[str]:
    """Greedy continuation of each prompt."""
    texts = []
    for prompt in prompts:
        encoded = lm.tokenizer(prompt, return_tensors="pt").to(lm.device)
        with torch.no_grad():
            output = lm.model.generate(  # type: ignore[operator]
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=lm.tokenizer.eos_token_id,
            )
        new = output[0, encoded["input_ids"].shape[1] :]
        texts.append(" ".join(str(lm.tokenizer.decode(new, skip_special_tokens=True)).split()))
    return texts
