"""Experiments as YAML: shipped configs by name, merged and checked by jsonargparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cakeflow.core.config_errors import plain_message
from cakeflow.core.config_parser import ConfigParser, class_names, only_known_classes, refuse_trust
from cakeflow.core.module import EditModule
from cakeflow.errors import ConfigError, EditError, did_you_mean
from cakeflow.plugins import load_plugins
from cakeflow.storage.yaml_text import read_yaml

MODULE_DEFAULTS = {"model": {"class_path": "cakeflow.core.locate_then_edit.LocateThenEdit"}}
"""Defaults of every parser that builds an edit module."""


def shipped(kind: str) -> dict[str, Path]:
    """Return the shipped configs of a kind (``method``, ``model``, ``targets``, ``data``): name -> file."""
    folder = Path(str(files("cakeflow_configs"))) / kind
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


def build_module(configs: list[Path], **values: Any) -> EditModule:
    """Build an edit module from config files and arguments; later files override earlier ones, arguments override all.

    Args:
        configs: YAML files with a ``model:`` section, as for ``cakeflow fit --config``. Its ``class_path`` names the
            class of the module, ``LocateThenEdit`` by default.
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
    try:
        with only_known_classes():  # without the defaults of the classes, which they have themselves
            config = parser.parse_object(MODULE_DEFAULTS, defaults=False)
            config = parser.parse_args([f"--config={path}" for path in configs], config, defaults=False)
            refuse_trust(config)
            parser.parser_mode = "text"
            config = parser.parse_object({"model": {"init_args": plain}}, config, defaults=False)
    except EditError:
        raise
    except Exception as error:
        reason = plain_message(str(error), (), class_names())
        raise ConfigError(f"configuration {', '.join(path.name for path in configs)}: {reason}") from error

    def make(kind: type[EditModule], *args: Any, **kwargs: Any) -> EditModule:
        if unknown := sorted(set(objects) - set(signature(kind).parameters)):
            names = signature(kind).parameters
            raise ConfigError(
                f"{kind.__name__} has no argument {unknown[0]!r}{did_you_mean(unknown[0], names)}\nit has "
                f"{', '.join(names)}"
            )
        return kind(*args, **{**kwargs, **objects})

    with own_errors(), only_known_classes():
        return parser.instantiate(config, instantiators=[(make, EditModule, True)]).model  # type: ignore[no-any-return]


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
