"""The ``cakeflow`` command: Lightning's CLI over ``EditModule`` and ``EditDataModule``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from cakeflow.cli.runs import COMMANDS
from cakeflow.core.checkpoint import with_safe_checkpoints
from cakeflow.core.config import MODULE_DEFAULTS, find_config, own_errors, shipped
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.module import EditModule
from cakeflow.core.run import EvaluationResult, FitResult, run_evaluate, run_fit
from cakeflow.editor import TRAINER_DEFAULTS, default_logger, with_progress_bar
from cakeflow.errors import ConfigError, EditError
from cakeflow.forward.generation import continuations
from cakeflow.plugins import load_plugins
from cakeflow.report import metrics_table, phases_table, texts_table

EXAMPLES = 5
"""Number of texts that are shown before and after."""
NAMED = ("method", "model", "data")
"""Options of ``fit`` and ``evaluate`` that take the name of a shipped config."""


EPILOG = (
    "cakeflow fit --method NAME --model NAME --data NAME takes shipped configs by name; a model may also be a folder, a "
    "GGUF file or a hub id. Options of the method: cakeflow fit --model.help. Further commands, each with --help: "
    + ", ".join(COMMANDS)
)


class _Trainer(L.Trainer):
    """Lightning's Trainer; ``evaluate`` is the field's word for ``validate``."""

    evaluate = L.Trainer.validate


class EditCLI(LightningCLI):
    """``cakeflow fit`` and ``cakeflow evaluate``; every argument of module, data and Trainer is an option."""

    result: FitResult | EvaluationResult

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
            "evaluate": {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only", "verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder, and the edit module's default class."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="run folder; an interrupted run goes on")
        parser.set_defaults(MODULE_DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read options and configs; of configs that are no YAML at all, jsonargparse says so for most, not for all."""
        try:
            super().parse_arguments(parser, args)
        except (UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"a config file cannot be read: {error}; look at the files after --config") from error

    def instantiate_classes(self) -> None:
        """Make the module, the data and the Trainer; a value that does not fit is an error of ours."""
        with own_errors():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A Trainer with a progress bar that leaves room for ours, and a run folder unless the user says otherwise."""
        config = self._get(self.config_init, "trainer")
        if config.get("logger") in (None, True):
            config["logger"] = default_logger(self._get(self.config_init, "run_dir"))
        elif self._get(self.config_init, "run_dir") is not None:
            raise ConfigError("--run_dir names a folder, and so does trainer.logger; leave out one of them")
        config["callbacks"] = with_progress_bar(config.get("callbacks"), config.get("enable_progress_bar"))
        return with_safe_checkpoints(super().instantiate_trainer(**kwargs))

    def fit(self, model: EditModule, datamodule: EditDataModule, **_: Any) -> None:
        """Edit, and show what changed."""
        console = Console()
        model.setup()
        prompts = [request.text for request in datamodule.requests[:EXAMPLES]]
        before = continuations(model.lm, prompts)
        self.result = result = run_fit(self.trainer, model, datamodule)
        after = continuations(model.lm, prompts)
        console.print(metrics_table({"before": result.before, "after": result.after}, result.protocol))
        console.print(phases_table(result.timings, result.peaks, len(datamodule.requests)))
        targets = [request.target_new for request in datamodule.requests[:EXAMPLES]]
        console.print(texts_table(prompts, targets, before, after))
        console.print(f"run folder: {result.folder}", soft_wrap=True)

    def evaluate(self, model: EditModule, datamodule: EditDataModule, **_: Any) -> None:
        """Evaluate the model as it is."""
        self.result = result = run_evaluate(self.trainer, model, datamodule, "now")
        Console().print(metrics_table({"now": result.metrics}, result.protocol))


class _CommandParser(ArgumentParser):
    """Takes ``runs`` as the words that are left (``compare RUN RUN``), where a list would be one word, and ``-n``."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if args == ("runs",):
            kwargs = {"nargs": "+", "type": Path, "metavar": "RUN", "help": kwargs["help"]}
        if args == ("--n",):
            args = ("-n", "--n")
        return super().add_argument(*args, **kwargs)


def expand_names(words: Sequence[str]) -> list[str]:
    """The words of ``fit`` or ``evaluate`` with ``--method``, ``--model`` and ``--data`` as options that configs know.

    A shipped name or a YAML file becomes a ``--config``; any other model or data source is passed on as
    ``--model.base`` or ``--data.source``. The method's config comes first, then the model's, then the data's, so that
    whatever else is given wins over them.

    Raises:
        ConfigError: If there is no such method.

    Example:
        >>> expand_names(["fit", "--model", "org/name", "--model.layers", "[3, 4]"])
        ['fit', '--model.base', 'org/name', '--model.layers', '[3, 4]']
    """
    names: dict[str, str] = {}
    rest: list[str] = []
    remaining = iter(words[1:])
    for word in remaining:
        option, joined, value = word.partition("=")
        if option.removeprefix("--") in NAMED and option.startswith("--"):
            names[option.removeprefix("--")] = value if joined else next(remaining, "")
        else:
            rest.append(word)
    options = [option for kind in NAMED if kind in names for option in _as_options(kind, names[kind])]
    return [*words[:1], *options, *rest]


def _as_options(kind: str, name: str) -> list[str]:
    configs = shipped(kind)
    if kind == "method" or name in configs or name.endswith((".yaml", ".yml")):
        return ["--config", str(find_config(kind, name))]
    return ["--model.base" if kind == "model" else "--data.source", name]


def main() -> None:
    """Run the console script; a command's result is for Python, not for the shell's exit status."""
    run_command()


def run_command(args: Sequence[str] | None = None) -> Any:
    """Run one command.

    Args:
        args: Words after the program's name; those of the process by default.

    Returns:
        The command's result.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logging.getLogger("cakeflow").setLevel(logging.INFO)
    words = sys.argv[1:] if args is None else list(args)
    try:
        if words[:1] != ["plugins"]:  # which shows those that cannot be used
            load_plugins()  # a run folder may hold changes of a plugin's kind
        if words[:1] and words[0] in COMMANDS:
            command = COMMANDS[words[0]]
            return auto_cli(command, args=words[1:], prog=f"cakeflow {words[0]}", parser_class=_CommandParser)
        cli = EditCLI(
            EditModule,
            EditDataModule,
            subclass_mode_model=True,
            trainer_class=_Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            seed_everything_default=False,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"epilog": EPILOG},
            args=expand_names(words),
        )
    except EditError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    return cli.result
