"""Parsers that take YAML as data: which classes a config may name, and which settings it may give."""

from __future__ import annotations

import collections.abc
import datetime
import enum
import os
import threading
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from inspect import Parameter, isabstract, isclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from jsonargparse._common import parsing_settings  # the library can set them, but not set them back
from jsonargparse.typing import register_type
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from pydantic import BaseModel

from cakeflow.core.config_errors import plain_message
from cakeflow.core.module import EditModule
from cakeflow.errors import ConfigError
from cakeflow.models.base import EditableModel
from cakeflow.plugins import SLOTS, plugin_packages, subclasses
from cakeflow.storage.yaml_text import read_yaml

LIGHTNING = (Callback, Logger, Profiler, Strategy)
"""Lightning's classes whose subclasses a config may name, if they come from one of ``PACKAGES`` or a plugin."""
SLOT_BASES = (EditModule, *(base for slot, base in SLOTS.items() if slot not in ("module", "callback")))
"""Our classes whose subclasses a config may name, if they come from there or were imported before."""
PACKAGES = ("cakeflow", "lightning", "torchmetrics")
"""Packages beside those of the plugins whose classes a config may name."""
TRUST = ("trust_remote_code", "trust_task_code", "allow_all_kernels", "use_kernels", "kernel_config")
"""Settings that let foreign code run; no config may switch one on."""
LEAVES = (str, int, float, types.NoneType, os.PathLike, enum.Enum, datetime.timedelta)
"""Types of single values."""
DENIED = "Add the import path to import_path_allowlist in set_parsing_settings to allow it."
REMEDY = (
    "A config may name the classes of cakeflow, Lightning, torchmetrics and installed plugins, and classes for our "
    "slots that were imported before: import the module in Python, or with --import NAME on the command line."
)
"""What the parser says instead of ``DENIED``, the remedy of jsonargparse."""
CONTAINERS = ("builtins", "collections", "collections.abc")
"""Modules of the types of lists and mappings."""
_parsing = threading.RLock()


class Plain:
    """The type of a setting that holds data of any form: text, numbers, truth values, null, lists and mappings."""


class _Absent:
    """The settable part of a type that no config can give, such as that of a function or a tensor."""


def plain(value: Any) -> Any:
    """Return data with mappings in the place of jsonargparse's namespaces.

    Raises:
        ValueError: If it names a class to build.
    """
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise ValueError(f"only data can stand here, but it names a class, class_path: {value['class_path']!r}")
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


def _is_checked(value: Any, _: type) -> bool:
    return not isinstance(value, (Mapping, Namespace, list))


def _shown(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, list, dict, types.NoneType)) else str(value)


register_type(Plain, serializer=_shown, deserializer=plain, type_check=_is_checked)
set_loader("text", lambda text: text)  # reads nothing: for the settings that Python gives
set_loader("plain_yaml", lambda text: read_yaml(text, get_loader("yaml")), exceptions=(yaml.YAMLError,))


def settable(kind: Any) -> Any:
    """Return the part of a type that a config can give.

    What takes any value becomes ``Plain``. Of classes, those stay whose subclasses a config may name, single values and
    records; functions, types, tensors, models and all other classes fall away.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind in (Any, object, Parameter.empty) or isinstance(kind, (typing.TypeVar, typing.ForwardRef, str)):
        return Plain
    if kind in (list, tuple, dict):
        return {list: list[Plain], tuple: tuple[Plain, ...], dict: dict[str, Plain]}[kind]
    if origin is Annotated:
        return settable(parts[0])
    if origin in (Union, types.UnionType):
        members = [part for part in map(settable, parts) if part is not _Absent]
        return Union[tuple(members)] if set(members) - {types.NoneType} else _Absent  # noqa: UP007 (of any length)
    if isclass(origin) and origin.__module__ in CONTAINERS and issubclass(origin, collections.abc.Iterable):
        members = [part if part is Ellipsis else settable(part) for part in parts]
        return _Absent if _Absent in members else origin[tuple(members)]  # type: ignore[index]
    return kind if origin is Literal or (isclass(kind) and _is_settable(kind)) else _Absent


def _is_settable(kind: type) -> bool:
    record = is_dataclass(kind) or issubclass(kind, BaseModel)
    return issubclass(kind, (*LEAVES, *SLOT_BASES, *LIGHTNING, Plain)) or (
        (record or _is_slot_of_plugin(kind)) and not issubclass(kind, EditableModel)
    )


def _is_slot_of_plugin(kind: type) -> bool:
    """True for an abstract class of an installed plugin: a slot of its own, for the parts of its methods."""
    return isabstract(kind) and kind.__module__.split(".")[0] in plugin_packages()


class _SettableArguments:
    """Adds arguments of classes with the settable part of their types; jsonargparse calls it for each of them."""

    def _add_signature_parameter(self, container: Any, nested_key: Any, param: Any, *args: Any, **kwargs: Any) -> None:
        kind = settable(param.annotation)
        if kind is not _Absent:
            param = replace(param, annotation=kind)
            super()._add_signature_parameter(container, nested_key, param, *args, **kwargs)  # type: ignore[misc]
        elif param.default is Parameter.empty and param.name not in (kwargs.get("skip") or ()):
            raise ValueError(f"{param.parent or param.component} needs {param.name}, which no config can give")


class PlainArguments(_SettableArguments):
    """Mixin of a jsonargparse parser whose configs are data.

    The parsers of the classes that a config names are of the same class, so this holds on every level.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": "plain_yaml", **kwargs})
        self._group_class: type = type("Group", (_SettableArguments, self._group_class), {})

    def add_function_arguments(self, function: Any, *_: Any, **__: Any) -> list[str]:
        """Refuse a function where a class can be named, as jsonargparse would take one that returns its objects.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{function.__name__} is a function; only a class can be named here")

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise a ``ConfigError`` with a plain message; the inner parsers, of a class, raise what the library reads."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message.replace(DENIED, REMEDY), ex)  # type: ignore[misc]
        parser: Any = getattr(ex, "subcommand_parser", self)
        reason = plain_message(message.replace(DENIED, REMEDY), _options(parser), class_names())
        raise ConfigError(f"{reason}\nsee {parser.prog.replace(' [options]', '')} --help") from ex


class ConfigParser(PlainArguments, ArgumentParser):  # type: ignore[misc]
    """A jsonargparse parser whose configs are data."""


def class_names() -> dict[str, type]:
    """Return the imported classes that a config may name: short name -> class."""
    return {kind.__name__: kind for base in (*SLOT_BASES, *LIGHTNING) for kind in subclasses(base)}


def import_words(*configs: Any) -> list[str]:
    """Return the words of a command that import the modules of the classes that configs name, where one must say so.

    Args:
        configs: Parsed configs, or parts of them.

    Example:
        >>> import_words({"allocator": {"class_path": "mylab.Squared"}, "solver": {"class_path": "LeastSquares"}})
        ['--import', 'mylab']
    """
    modules = dict.fromkeys(_modules(configs, class_names()))
    own = (*PACKAGES, *plugin_packages())
    return [word for each in modules if each and each.partition(".")[0] not in own for word in ("--import", each)]


def _modules(config: Any, kinds: Mapping[str, type]) -> Iterator[str]:
    """Yield the modules of all classes that a config names."""
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from _modules(part, kinds)
    elif isinstance(config, Mapping):
        if isinstance(name := config.get("class_path"), str):
            yield kinds[name].__module__ if name in kinds else name.rpartition(".")[0]
        yield from _modules(list(config.values()), kinds)


def _options(parser: Any) -> set[str]:
    """Return the options of a parser and of its commands."""
    choices = getattr(parser._subcommands_action, "choices", None) or {}
    return {*parser._option_string_actions}.union(*map(_options, choices.values()))


@contextmanager
def only_known_classes() -> Iterator[None]:
    """Let a config name classes of cakeflow, Lightning, torchmetrics, the plugins, and slots that were imported before.

    Nothing else is imported. The settings are those of the whole process, so one thread at a time parses.
    """
    kinds = {kind for base in SLOT_BASES for kind in subclasses(base)}
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if "<" not in kind.__qualname__]
    with _parsing:
        before = dict(parsing_settings)
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=[*PACKAGES, *plugin_packages(), *names],
            instantiate_subclass_spec_in_any=False,
        )
        try:
            yield
        finally:
            parsing_settings.update(before)


def refuse_trust(config: Any, where: str = "") -> None:
    """Refuse a parsed config that lets foreign code run.

    Raises:
        ConfigError: Naming the setting.
    """
    if isinstance(config, (Mapping, Namespace)):
        for name, value in (vars(config) if isinstance(config, Namespace) else config).items():
            if name in TRUST and value not in (False, None):
                raise ConfigError(
                    f"{where}{name} is {value!r}, but a config may not let foreign code run; say --{name} on the "
                    f"command line, or {name}=True in Python"
                )
            refuse_trust(value, f"{where}{name}.")
    elif isinstance(config, (list, tuple)):
        for value in config:
            refuse_trust(value, where)
