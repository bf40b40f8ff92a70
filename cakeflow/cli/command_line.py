"""The ``cakeflow`` command: Lightning's CLI over ``EditModule`` and ``EditDataModule``."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console
from rich.markup import escape

from cakeflow.cli.console import LogHandler, plain_warnings
from cakeflow.cli.editors import with_record
from cakeflow.cli.evaluate import EditedModel, take_run
from cakeflow.cli.loading import take_loading, take_options, with_loading, with_trust, without_token
from cakeflow.cli.result import require_clean, show_fit
from cakeflow.cli.runs import COMMANDS, FURTHER
from cakeflow.cli.words import expand_names, options_in, values_of, with_flags
from cakeflow.core.checkpoint import with_safe_checkpoints
from cakeflow.core.config import (
    load_with,
    method_of,
    module_defaults,
    own_errors,
    read_config,
)
from cakeflow.core.config_parser import ConfigParser, PlainArguments, only_known_classes, refuse_trust
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.folder import run_folder
from cakeflow.core.loggers import names_folder, with_run_folder
from cakeflow.core.module import EditModule
from cakeflow.core.progress import with_progress_bar
from cakeflow.core.run import EvaluationResult, FitResult, go_on_from, run_evaluate, run_fit
from cakeflow.core.strategy import jointly
from cakeflow.core.trainer import check_settings, quiet, with_ranks
from cakeflow.editor import TRAINER_DEFAULTS, default_logger, with_checks
from cakeflow.errors import ConfigError, EditError, command_line, did_you_mean
from cakeflow.models.loading import Loading
from cakeflow.plugins import load_plugins
from cakeflow.report import metrics_table

INTERRUPTED = 130
"""Exit status after Ctrl+C, as a shell has it."""
NAMES_HELP = (
    "Shipped configs are chosen by name: --method NAME --model NAME --data NAME, e.g. --method cake --model "
    "smollm2-135m --data builtin. A model may also be a folder, a GGUF file or a hub id; data may be a file, a URL or "
    "a hub data set. Options of the method: cakeflow fit --model.help. A config is data: --import NAME imports a "
    "module of yours whose classes it names, --trust_remote_code runs the Python of the model's folder, and "
    "--trust_task_code that of lm-eval's task files."
)
LOADING_HELP = f"{', '.join(each.name for each in fields(Loading)[:-2])} ..."
RUN_HELP = (
    "--run RUN evaluates the edited model of a run, on the run's own facts unless --data names others; nothing is "
    "written into the run's folder, and --model names the unedited model only if it has moved."
)
EPILOG = f"{NAMES_HELP} Further commands, each with --help: {', '.join(COMMANDS)}."


class _Trainer(L.Trainer):
    """Lightning's Trainer: accelerator, loggers, callbacks, profiler.

    The docstrings of its methods are the help texts of the commands.
    """

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Edit facts in a model, and show metrics, times and generated texts before and after."""
        super().fit(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Measure how a model answers requests, without editing it."""
        return super().validate(*args, **kwargs)


class _FitParser(PlainArguments, LightningArgumentParser):  # type: ignore[misc]
    """Parser of ``fit`` and ``evaluate``, whose configs are data."""


class _SaveConfig(SaveConfigCallback):
    """Writes the config into the run folder; without one it would go to the working directory."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it when a run begins."""
        if run_folder(trainer) is not None:
            super().setup(trainer, pl_module, stage)


class EditCLI(LightningCLI):
    """``cakeflow fit`` and ``cakeflow evaluate``; every argument of module, data and Trainer is an option.

    Args:
        trusted: Those of ``loading.TRUST_OPTIONS`` that the command has.
        edited: The run whose edited model is evaluated, in place of the model that is named.
        loading: How the model is loaded.
        words: The command as it was typed, after the program's name.
        *args: Arguments of ``LightningCLI``.
        **kwargs: Further ones.
    """

    result: FitResult | EvaluationResult

    def __init__(
        self,
        *args: Any,
        trusted: Collection[str] = (),
        edited: EditedModel | None = None,
        loading: Loading = Loading(),
        words: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.trusted, self.edited, self.loading, self.words = trusted, edited, loading, words
        self.defaults = module_defaults(values_of("--method", words))
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, each with the arguments of the Trainer's method that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
            "evaluate": {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only", "verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run and the default class of the edit module."""
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Run folder. An interrupted run in it is resumed."
        )
        parser.add_argument(
            "--from_run", "--from", type=Path | None, default=None, help="Finished run to go on from; its edits stay."
        )
        parser.add_argument(
            "--strict",
            action="store_true",
            help="Exit status 1 unless every fact was learned and side effects are within the budget.",
        )
        parser.set_defaults(self.defaults)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse options and configs, and turn errors that jsonargparse lets through into ``ConfigError``."""
        try:
            with (
                only_known_classes(),
                warnings.catch_warnings(),
            ):  # the words are those of the process, with names replaced by options
                warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
                super().parse_arguments(parser, args)
        except (UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"a config file cannot be read: {error}; check the files given as --config") from error
        options = self.config.get(self.config.subcommand)
        refuse_trust(options)
        if self.config.subcommand == "evaluate" and (options.get("from_run") or options.get("strict")):
            raise ConfigError("--from and --strict belong to fit; to measure the edited model of a run: --run RUN")

    def instantiate_classes(self) -> None:
        """Create the module, the data and the Trainer, whose settings are checked before the others are read."""
        self._plain_config = with_loading(self.config, self.loading)
        self.config = with_trust(self.config, self.trusted)
        with own_errors(), only_known_classes():
            check_settings(self._get(self.config, "trainer"))
            super().instantiate_classes()
            load_with(self.model, self.loading.arguments())
            self.model.method = method_of(self._parser(self.subcommand), self._plain_config[self.subcommand])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Return a Trainer with a progress bar and, unless the user configures a logger, a run folder."""
        self.config = self._plain_config  # the one that the run folder gets
        config, run_dir = self._get(self.config_init, "trainer"), self._get(self.config_init, "run_dir")
        if config.get("logger") in (None, True):
            config["logger"] = default_logger(run_dir)
        elif run_dir is not None and names_folder(config["logger"]):
            raise ConfigError("--run_dir and trainer.logger both name a folder; leave out one of them")
        config["strategy"] = with_ranks(config).get("strategy", "auto")
        config["callbacks"] = with_progress_bar(with_checks(config.get("callbacks")), config.get("enable_progress_bar"))
        with quiet():
            trainer = super().instantiate_trainer(**kwargs)
        return with_safe_checkpoints(with_run_folder(trainer, partial(default_logger, run_dir)))

    def resuming(self, folder: Path) -> str:
        """Return the command that goes on with an interrupted run: the one that was typed, with its folder."""
        own = self._get(self._plain_config, "trainer").get("logger") not in (None, True)  # it names the folder
        stated = own or "--run_dir" in options_in(self.words)
        return command_line([*without_token(self.words), *(() if stated else ("--run_dir", str(folder)))])

    def fit(self, model: EditModule, datamodule: EditDataModule, **_: Any) -> None:
        """Edit the facts, and print metrics, times, answers and the verdict."""
        if (start := self._get(self.config_init, "from_run")) is not None:
            jointly(self.trainer, lambda: go_on_from(start, model, run_folder(self.trainer)))
        self.result = result = run_fit(self.trainer, model, datamodule, goes_on=self.resuming)
        if self.trainer.is_global_zero:
            show_fit(result)
        if self._get(self.config_init, "strict"):
            require_clean(result)

    def evaluate(self, model: EditModule, datamodule: EditDataModule, **_: Any) -> None:
        """Evaluate the model as it is, or as a run edited it, and print the metrics."""
        if (edited := self.edited) is not None:
            jointly(self.trainer, lambda: edited.load_into(model, run_folder(self.trainer), self.loading))
            datamodule = edited.data(vars(self._get(self.config, "data"))) if edited.own_data else datamodule
        self.result = result = run_evaluate(self.trainer, model, datamodule, "now")
        Console(quiet=not self.trainer.is_global_zero).print(metrics_table({"now": result.metrics}, result.protocol))


class _CommandParser(ConfigParser):
    """Parser of the plain commands: ``runs``, ``parts`` and ``texts`` are lists, some options have a second name."""

    def add_function_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a command; the fields of its options are named, and explained on pages of the docs."""
        names = super(PlainArguments, self).add_function_arguments(*args, **kwargs)
        for action in self._actions:
            if action.dest.startswith(("loading", "options.")) or action.dest == "options":
                action.help = SUPPRESS
        for group in self._action_groups:
            group.description = LOADING_HELP if str(group.title).startswith("--loading") else group.description
            if parts := [each.dest[8:] for each in group._group_actions if each.dest.startswith("options.")]:
                group.title, group.description = f"--options.NAME: {', '.join(parts)}", None
        return names

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if args in (("runs",), ("parts",)):
            metavar = {"runs": "RUN", "parts": "FOLDER"}[args[0]]
            kwargs = {"nargs": "+", "type": Path, "metavar": metavar, "help": kwargs["help"]}
        if args == ("texts",):
            kwargs = {"nargs": "*", "type": str, "metavar": "SENTENCE ANSWER", "help": kwargs["help"]}
        args = {("--n",): ("-n", "--n"), ("--from_run",): ("--from_run", "--from")}.get(args, args)
        action = super().add_argument(*args, **kwargs)
        if args[0] in ("--config", "--print_config"):  # they work, but the page is about the command
            action.help = SUPPRESS
        return action


def run_command(words: Sequence[str]) -> Any:
    """Run one command.

    Args:
        words: Those after the program's name, at least one; the help pages are the console script's.

    Returns:
        The command's result.
    """
    logging.basicConfig(level=logging.WARNING, handlers=[LogHandler()])
    logging.getLogger("cakeflow").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        with plain_warnings():
            return _run([*words])
    except EditError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(INTERRUPTED)


def _refuse_trust_in_files(words: Sequence[str]) -> None:
    """Refuse config files of a plain command that let foreign code run: that is said on the command line."""
    for path in map(Path, values_of("--config", words)):
        if path.is_file():
            refuse_trust(read_config(path))


def _run(words: list[str]) -> Any:
    names = ("fit", "evaluate", *COMMANDS)
    if not words[0].startswith("-") and words[0] not in names:
        raise ConfigError(f"there is no command {words[0]!r}{did_you_mean(words[0], names)}\nsee cakeflow --help")
    if words[0] != "plugins":  # which shows those that cannot be used
        load_plugins()  # a run folder may hold changes of a plugin's kind
    if words[0] in COMMANDS:
        length = 2 if " ".join(words[:2]) in FURTHER else 1
        name = " ".join(words[:length])
        command, (rest, trusted) = {**COMMANDS, **FURTHER}[name], take_options(words[length:])
        rest += [f"--loading.{name}=true" for name in trusted]
        _refuse_trust_in_files(rest)
        with only_known_classes():
            return auto_cli(
                command, args=with_flags(rest, command), prog=f"cakeflow {name}", parser_class=_CommandParser
            )
    rest, trusted = take_options(["--help" if word == "--help_all" else word for word in words])
    rest, options = take_loading(with_record(rest))
    loading = Loading(**options, trust_remote_code="trust_remote_code" in trusted)
    rest, edited = take_run(rest)
    return EditCLI(
        EditModule,
        EditDataModule,
        subclass_mode_model=True,
        parser_class=_FitParser,
        trainer_class=_Trainer,
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        seed_everything_default=False,
        save_config_callback=_SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "cakeflow",
            "description": "Edit facts in transformer language models.",
            "epilog": EPILOG,
            "fit": {"epilog": NAMES_HELP},
            "evaluate": {"epilog": f"{RUN_HELP} {NAMES_HELP}"},
        },
        args=expand_names(rest),
        trusted=trusted,
        edited=edited,
        loading=loading,
        words=words,
    ).result
