"""The ``cakeflow`` command: Lightning's CLI over ``LocateThenEdit`` and ``EditDataModule``."""

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
from cakeflow.core.config import own_errors
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.core.run import FitResult, run_evaluate, run_fit
from cakeflow.editor import TRAINER_DEFAULTS, default_logger, with_progress_bar
from cakeflow.errors import ConfigError, EditError
from cakeflow.forward.generation import continuations
from cakeflow.plugins import load_plugins
from cakeflow.report import metrics_table, phases_table, texts_table

SHOWN = 5
"""Generations shown before and after."""


class _Trainer(L.Trainer):
    """Lightning's Trainer; ``evaluate`` is the field's word for ``validate``."""

    evaluate = L.Trainer.validate


class EditCLI(LightningCLI):
    """``cakeflow fit`` and ``cakeflow evaluate``; every argument of module, data and Trainer is an option."""

    result: FitResult | dict[str, float]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
            "evaluate": {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only", "verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder: an interrupted run goes on when its command is given again."""
        parser.add_argument("--run", type=str | None, default=None, help="run folder; an interrupted run there goes on")

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
            config["logger"] = default_logger(self._get(self.config_init, "run"))
        elif self._get(self.config_init, "run") is not None:
            raise ConfigError("--run names a folder, and so does trainer.logger; leave out one of them")
        config["callbacks"] = with_progress_bar(config.get("callbacks"), config.get("enable_progress_bar"))
        return with_safe_checkpoints(super().instantiate_trainer(**kwargs))

    def fit(self, model: LocateThenEdit, datamodule: EditDataModule, **_: Any) -> None:
        """Edit, and show what changed."""
        console = Console()
        model.setup()
        prompts = [request.text for request in datamodule.requests[:SHOWN]]
        before = continuations(model.lm, prompts)
        self.result = run = run_fit(self.trainer, model, datamodule)
        after = continuations(model.lm, prompts)
        console.print(metrics_table({"before": run.before, "after": run.after}, run.protocol))
        console.print(phases_table(run.timings, run.peaks, len(datamodule.requests)))
        wanted = [request.target_new for request in datamodule.requests[:SHOWN]]
        console.print(texts_table(prompts, wanted, before, after))
        console.print(f"run folder: {run.folder}", soft_wrap=True)

    def evaluate(self, model: LocateThenEdit, datamodule: EditDataModule, **_: Any) -> None:
        """Measure the model as it is."""
        self.result = run_evaluate(self.trainer, model, datamodule, "now")
        Console().print(metrics_table({"now": self.result}, model.evaluation.id))


class _CommandParser(ArgumentParser):
    """Takes ``runs`` as the words that are left (``compare RUN RUN``), where a list would be one word, and ``-n``."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if args == ("runs",):
            kwargs = {"nargs": "+", "type": Path, "metavar": "RUN", "help": kwargs["help"]}
        if args == ("--n",):
            args = ("-n", "--n")
        return super().add_argument(*args, **kwargs)


def run() -> None:
    """The console script: what ``main`` returns is for Python, not for the shell's exit status."""
    main()


def main(args: Sequence[str] | None = None) -> Any:
    """Run the command line.

    Args:
        args: Words after the program's name; those of the process by default.

    Returns:
        What the command found.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logging.getLogger("cakeflow").setLevel(logging.INFO)
    words = sys.argv[1:] if args is None else list(args)
    try:
        if words[:1] and words[0] in COMMANDS:
            command = COMMANDS[words[0]]
            return auto_cli(command, args=words[1:], prog=f"cakeflow {words[0]}", parser_class=_CommandParser)
        load_plugins()
        cli = EditCLI(
            LocateThenEdit,
            EditDataModule,
            trainer_class=_Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            seed_everything_default=False,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"epilog": f"further commands, each with --help: {', '.join(COMMANDS)}"},
            args=None if args is None else words,
        )
    except EditError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    return cli.result
