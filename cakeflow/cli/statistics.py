"""``cakeflow statistics``: second moments ahead of a run, by one job or by several whose sums are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from cakeflow.cli.console import say
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.core.moment_parts import Part, collect_part, merge
from cakeflow.core.statistics import home_of, points_of
from cakeflow.editor import Editor
from cakeflow.errors import ConfigError
from cakeflow.models.architecture import Site
from cakeflow.models.loading import Loading
from cakeflow.report.tables import rows_table
from cakeflow.solvers.covariance import Covariance

HOME = Path("runs") / "statistics"
"""Folder of the parts, unless the command names one."""


def run_statistics(
    model: str = "smollm2-135m",
    method: str = "cake",
    model_config: str | None = None,
    layers: list[int] | None = None,
    source: str | list[str] | None = None,
    tokens: int | None = None,
    batch_tokens: int | None = None,
    part: str | None = None,
    out: Path | None = None,
    accelerator: str = "auto",
    loading: Loading = Loading(),
) -> Path:
    """Collect second moments ahead of a run: what fit would collect, so that it finds them in the cache.

    An interrupted job goes on when it is started again. Several jobs, --part 1/3 to 3/3 on one machine or on three,
    are joined by cakeflow statistics merge FOLDER FOLDER FOLDER, to the same bits.

    Args:
        model: An embedded name, a hub id, a folder or a GGUF file.
        method: A shipped recipe or a YAML file.
        model_config: Tuned numbers for the model, by name or as a YAML file.
        layers: Layers to edit, for a model without them.
        source: Texts, a file or a hub data set, or a list of these; by default those of the config.
        tokens: Number of their tokens.
        batch_tokens: Most tokens in one forward pass.
        part: Which of several jobs this is, such as 1/3.
        out: Folder of the part; by default one under runs/statistics.
        accelerator: cpu, gpu, mps or auto.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If the method has no second moments, or ``part`` is none.
        StatisticsError: If the texts are too few, or a file is damaged.
    """
    share = None if part is None else Part.parse(part)
    if share is None and out is not None:
        raise ConfigError(
            f"--out {out} is for a --part; without one, second moments go into the cache (CAKEFLOW_CACHE)"
        )
    chosen = {"source": source, "tokens": tokens, "batch_tokens": batch_tokens}
    values: dict[str, Any] = {"statistics": {name: value for name, value in chosen.items() if value is not None}}
    values["model_kwargs"] = loading.arguments()
    editor = Editor.from_pretrained(model, method, config=model_config, layers=layers, **values)
    module = editor.module
    if not isinstance(module, LocateThenEdit):
        raise ConfigError(f"{method!r} is a {type(module).__name__}, which collects nothing; name a recipe of layers")
    if not module.lm.dispatched:
        module.to(L.Fabric(accelerator=accelerator, devices=1).device)
    sites = [Site(layer, module.site) for layer in module.find_layers()]
    corpus = module.statistics.corpus(module.lm, sites)
    if share is None:
        moments = module.statistics.collect(module.lm, sites, max_bytes=module.max_bytes, windows=corpus.windows)
        _show({site.layer: covariance for site, covariance in moments.items()})
        folder = home_of(corpus.plan.key)
        say(f"in the cache: {folder}")
        return folder
    folder = out or HOME / f"part-{share.number}-of-{share.count}"
    collect_part(corpus, share, folder)
    blocks = corpus.plan.blocks(share.number, share.count)
    say(f"part {share}: {len(blocks)} of {len(corpus.plan)} blocks summed in {folder}")
    say("when all parts are done: cakeflow statistics merge FOLDER FOLDER ...")
    return folder


def run_merge(parts: list[Path]) -> Path:
    """Merge the parts of second moments into the cache, where fit finds them: the same bits as by one job.

    Args:
        parts: Folders that cakeflow statistics --part wrote, all of them, in any order.

    Raises:
        StatisticsError: If a part is missing, unfinished, there twice, of another model or corpus, or damaged.
    """
    folder = merge(parts)
    say(f"{len(parts)} folders merged; in the cache: {folder}")
    return folder


def _show(moments: dict[int, Covariance]) -> None:
    points = {layer: points_of(covariance)[-1] for layer, covariance in moments.items()}
    rows = [
        {
            "layer": str(layer),
            "width": str(len(moments[layer])),
            "tokens": str(point.tokens),
            "change since half": f"{point.change:.2%}",
            f"eigenvalues below {point.threshold}": str(point.null),
        }
        for layer, point in points.items()
    ]
    Console().print(rows_table(rows, "Second moments"))
