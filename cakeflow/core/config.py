"""Experiments as YAML: shipped configs by name, merged and checked by jsonargparse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from cakeflow.core.config_errors import arguments_of, plain_message
from cakeflow.core.config_parser import ConfigParser, class_names, only_known_classes, refuse_trust
from cakeflow.core.module import EditModule
from cakeflow.errors import ConfigError, EditError, did_you_mean
from cakeflow.plugins import load_plugins
from cakeflow.storage.yaml_text import read_yaml

MODULE_DEFAULTS = {"model": {"class_path": "cakeflow.core.locate_then_edit.LocateThenEdit"}}
"""Defaults of every parser that builds an edit module."""

OF_THE_MODEL = ("base", "model_kwargs")
"""Arguments of an edit module that say which model is edited and how it is loaded; a token may be among them."""


def shipped(kind: str) -> dict[str, Path]:
    """Return the shipped configs of a kind (``method``, ``model``, ``targets``, ``data``): name -> file."""
    folder = Path(str(resources.files("cakeflow_configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(kind: str, name: str | Path) -> Path:
    """Find a shipped config by name, or any YAML file by path.

    Raises:
        ConfigError: If there is neither; the message lists the shipped names.
    """
    configs = shipped(kind)
    if str(name) in configs:
        return configs[str(name)]
    if Path(name).is_file():
        return Path(name)
    raise ConfigError(
        f"no {kind} config {str(name)!r}{did_you_mean(name, configs)}\nshipped: {', '.join(configs)}; or give the path "
        "of a YAML file"
    )


def read_config(path: Path) -> Any:
    """Return what a YAML file holds; None if it cannot be read, for the parser to say why."""
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def model_kind(method: Path) -> str:
    """Return the folder of shipped model configs that fit a method: their numbers are arguments of its class.

    Those of ``LocateThenEdit`` are in ``model``, those of another class in a folder of its name below.
    """
    name = module_class(method).rpartition(".")[2]
    return "model" if name in ("", "LocateThenEdit") else f"model/{name}"


def module_class(method: Path) -> str:
    """Return the class that a method's config names; empty if it leaves that open."""
    content = read_config(method)
    model = content.get("model") if isinstance(content, dict) else None
    name = model.get("class_path") if isinstance(model, dict) else None
    return "" if name is None else str(name)


def module_defaults(methods: Sequence[str]) -> dict[str, Any]:
    """Return the default class of the edit module for a command: the one that the last recipe names, if it names one.

    The arguments of another class would stay beside those of the recipe's.

    Args:
        methods: The recipes that the command names.
    """
    kind = module_class(find_config("method", methods[-1])) if methods else ""
    return {"model": {"class_path": kind}} if kind else MODULE_DEFAULTS


def configs_of(
    method: str | Path, model: str, config: str | Path | None = None, has_layers: bool = False, targets: Any = None
) -> list[Path]:
    """Return the config files of a method for a model: the recipe, the model's numbers, a shipped search of targets.

    Args:
        method: A shipped recipe or a YAML file.
        model: Name of the model; a shipped config of this name has its numbers.
        config: The numbers instead: a shipped name or a YAML file.
        has_layers: Whether the layers to edit come from elsewhere, so that numbers are not needed.
        targets: Name of a shipped search; a search that is an object or a mapping has no config.

    Raises:
        ConfigError: If a name is unknown, or the method needs layers and nothing names them.
    """
    recipe = find_config("method", method)
    kind = model_kind(recipe)
    config = config or (model if model in shipped(kind) else None)
    search = [find_config("targets", targets)] if isinstance(targets, str) else []
    if config is not None:
        return [recipe, find_config(kind, config), *search]
    if kind == "model" and not has_layers:
        names = ", ".join(shipped(kind))
        raise ConfigError("no shipped model config for this model: name the layers to edit, layers=[...], let a "
                          f"trace find them, layers='auto', or give config=FILE; shipped: {names}")  # fmt: skip
    return [recipe, *search]


def method_of(parser: Any, config: Any) -> dict[str, Any]:
    """Return the method of a parsed config as data: class and arguments, without the model and how it was loaded.

    Args:
        parser: The parser of the config.
        config: What it parsed; the method stands under ``model``.
    """
    method: dict[str, Any] = read_yaml(parser.dump(config, skip_none=False))["model"]
    arguments = method.get("init_args") or {}
    return {**method, "init_args": {name: each for name, each in arguments.items() if name not in OF_THE_MODEL}}


def load_with(module: EditModule, arguments: Mapping[str, Any]) -> EditModule:
    """Have a module load the model that it names with these arguments of ``load_model``, and return the module.

    Args:
        module: The module of any method, whose model is not loaded yet.
        arguments: They win over the module's own.
    """
    module._loading = {**module._loading, **arguments}
    return module


def build_module(configs: Sequence[Path | Mapping[str, Any]], **values: Any) -> EditModule:
    """Build an edit module from config files and arguments; later files override earlier ones, arguments override all.

    Args:
        configs: YAML files with a ``model:`` section, as for ``cakeflow fit --config``. Its ``class_path`` names the
            class of the module, ``LocateThenEdit`` by default. Or the section itself, as ``method_of`` gave it.
        values: Arguments of that class. A mapping is merged into the configured part of that name.

    Raises:
        ConfigError: If a name or value does not fit.
    """
    plain = {name: value for name, value in values.items() if _is_plain(value)}
    objects = {name: value for name, value in values.items() if name not in plain}
    load_plugins()  # the parser resolves short names among the imported classes
    parser = ConfigParser(exit_on_error=False)
    parser.add_subclass_arguments(EditModule, "model", required=False)
    parser.add_argument("--config", action="config")
    config = _parsed(parser, configs, plain)

    def make(kind: type[EditModule], *args: Any, **kwargs: Any) -> EditModule:
        names = arguments_of(kind)
        if unknown := sorted(set(objects) - set(names)):
            raise ConfigError(
                f"{kind.__name__} has no argument {unknown[0]!r}{did_you_mean(unknown[0], names)}\nit has "
                f"{', '.join(names)}"
            )
        return kind(*args, **{**kwargs, **objects})

    with own_errors(), only_known_classes():
        module: EditModule = parser.instantiate(config, instantiators=[(make, EditModule, True)]).model
        parser.parser_mode = "plain_yaml"  # or it writes parts as texts
        module.method = method_of(parser, config) if objects.keys() <= {"base"} else {}
    return module


def build_callbacks(parts: Sequence[Mapping[str, Any]]) -> list[Callback]:
    """Build callbacks from config data.

    Args:
        parts: For each its ``class_path``, the class or its short name, and perhaps ``init_args``.

    Raises:
        ConfigError: If a class is unknown, or an argument does not fit it.
    """
    load_plugins()
    parser = ConfigParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    try:
        with own_errors(), only_known_classes():
            config = parser.parse_object({"callbacks": [dict(part) for part in parts]})
            callbacks: list[Callback] = parser.instantiate(config).callbacks
    except EditError:
        raise
    except Exception as error:
        raise ConfigError(f"callbacks: {plain_message(str(error), (), class_names())}") from error
    return callbacks


def _parsed(parser: ConfigParser, configs: Sequence[Path | Mapping[str, Any]], plain: Mapping[str, Any]) -> Any:
    """Merge config files, sections on record and arguments, in this order."""
    files = [path for path in configs if isinstance(path, Path)]
    sections = [dict(part) for part in configs if not isinstance(part, Path)]
    try:
        with only_known_classes():  # without the defaults of the classes, which they have themselves
            config = parser.parse_object(MODULE_DEFAULTS, defaults=False)
            config = parser.parse_args([f"--config={path}" for path in files], config, defaults=False)
            parser.parser_mode = "text"
            for section in sections:
                config = parser.parse_object({"model": section}, config, defaults=False)
            refuse_trust(config)
            return parser.parse_object({"model": {"init_args": plain}}, config, defaults=False)
    except EditError:
        raise
    except Exception as error:
        reason = plain_message(str(error), (), class_names())
        names = ", ".join([*(path.name for path in files), *["on record" for _ in sections]])
        raise ConfigError(f"configuration {names}: {reason}") from error


@contextmanager
def own_errors() -> Iterator[None]:
    """Turn what jsonargparse and Lightning raise for a part into the ``EditError`` behind it, or a new one."""
    try:
        yield
    except (ValueError, MisconfigurationException) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, EditError):
            cause = cause.__cause__
        raise cause or ConfigError(f"the configuration cannot be built: {error}") from error


def _is_plain(value: object) -> bool:
    """Return True if a config file could hold the value."""
    if isinstance(value, (list, dict)):
        return all(part is None or _is_plain(part) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, (str, int, float))
