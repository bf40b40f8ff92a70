"""The command ``cakeflow tune``."""

from __future__ import annotations

from pathlib import Path

from cakeflow.cli.console import say
from cakeflow.cli.loading import loading_words
from cakeflow.errors import ConfigError, command_line
from cakeflow.models.loading import Loading, load_model
from cakeflow.storage.atomic import write_text
from cakeflow.tuning import Trial, Tuning, tune


def run_tune(
    model: str,
    out: Path,
    data: str = "builtin",
    edits: int = 400,
    facts: int = 20,
    source: list[str] | None = None,
    tokens: int | None = None,
    overwrite: bool = False,
    loading: Loading = Loading(),
) -> Tuning:
    """Find layers, learning rate, steps and statistics for a model, and write them as its config.

    Each trial edits facts that the model knows in one batch, measures, and takes them back. The trials lie beside the
    config, so that the same command goes on where it was interrupted.

    Args:
        model: An embedded name, a hub id, a folder or a GGUF file.
        out: The config, a YAML file for --model of fit and --model_config of edit.
        data: Facts with true targets; those are taken that the model states.
        edits: Most edits of all trials.
        facts: Facts of one trial.
        source: Texts for second moments; by default sentences about names.
        tokens: Number of their tokens; ten times the width of the keys by default.
        overwrite: Replace a config that is there.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If the config is there already, or the model states too few of the facts.
    """
    if out.suffix not in (".yaml", ".yml") or out.is_dir():
        raise ConfigError(f"out={str(out)!r} is no YAML file; name one, such as {out.with_suffix('.yaml').name}")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already; name another file, or give --overwrite")
    result = tune(
        load_model(model, **loading.arguments()),
        model,
        out.with_suffix(".trials.jsonl"),
        data=data,
        edits=edits,
        facts=facts,
        source=source,
        tokens=tokens,
        notify=_show,
    )
    write_text(out, result.config())
    before, after = result.checks
    say(f"on facts that the choice was not made on: score {before.result} with the first numbers, {after.result} now")
    if result.left_out:
        say(f"the budget of {edits} edits did not reach: {', '.join(result.left_out)}; give more --edits")
    use = ["fit", "--method", "cake", "--model", str(out), "--data", "builtin", *loading_words(loading)]
    say(f"written to {out}; use it with: {command_line(use)}")
    return result


def _show(trial: Trial) -> None:
    say(f"{trial.recipe}, {trial.name}: score {trial.result}, {trial.seconds:.0f} s")
