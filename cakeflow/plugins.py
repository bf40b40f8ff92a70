"""Plugins: classes that other packages add through entry points of the group ``cakeflow.plugins``.

An entry is ``ClassName = module:ClassName``. Configs name an imported class by its short name; a full ``class_path``
needs no entry point.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

import lightning as L
import torchmetrics

from cakeflow.allocators.base import Allocator
from cakeflow.errors import PluginError
from cakeflow.evaluation.judges import Judge
from cakeflow.journal.changes import Change
from cakeflow.solvers.base import Solver
from cakeflow.targets.base import TargetSearch
from cakeflow.targets.objective import ObjectiveTerm
from cakeflow.targets.stop import StopRule
from cakeflow.tracing.attribution import Attribution
from cakeflow.weighters.base import Weighter

GROUP = "cakeflow.plugins"
SLOTS: dict[str, type] = {
    "weighter": Weighter,
    "allocator": Allocator,
    "solver": Solver,
    "targets": TargetSearch,
    "objective": ObjectiveTerm,
    "stop": StopRule,
    "attribution": Attribution,
    "metric": torchmetrics.Metric,
    "judge": Judge,
    "change": Change,
    "module": L.LightningModule,  # EditModule itself stands above this file
    "callback": L.Callback,
}
"""Kinds of plugins: slot -> base class."""


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        name: Short name in configs.
        path: ``module:Class``.
        package: Package that provides it, with its version.
        slot: Key of ``SLOTS``; empty if it fits none.
        problem: Reason why it cannot be used; empty if it can.
    """

    name: str
    path: str
    package: str
    slot: str = ""
    problem: str = ""

    def __str__(self) -> str:
        return f"plugin {self.name} ({self.path}, from {self.package})"


def find_plugins() -> list[Plugin]:
    """Import and check every installed plugin; return them sorted by name."""
    plugins = [_examine(entry) for entry in entry_points(group=GROUP)]
    ours = {kind.__name__ for base in SLOTS.values() for kind in subclasses(base) if _is_ours(kind)}
    count = Counter([plugin.name for plugin in plugins] + list(ours))
    clash = "another one has the same name; rename one or uninstall its package"
    checked = [replace(each, problem=each.problem or (clash if count[each.name] > 1 else "")) for each in plugins]
    return sorted(checked, key=lambda plugin: (plugin.name, plugin.package))


def load_plugins() -> list[Plugin]:
    """Import every installed plugin, so that configs can use its short name.

    Raises:
        PluginError: Naming each plugin that cannot be used and the reason.
    """
    plugins = find_plugins()
    if bad := [plugin for plugin in plugins if plugin.problem]:
        raise PluginError("\n  ".join(f"{plugin}: {plugin.problem}" for plugin in bad))
    return plugins


def _examine(entry: EntryPoint) -> Plugin:
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
    plugin = Plugin(entry.name, entry.value, package)
    try:
        kind = entry.load()
    except Exception as error:  # importing foreign code can raise anything
        return replace(plugin, problem=f"cannot be imported: {type(error).__name__}: {error}; fix or uninstall it")
    slots = [slot for slot, base in SLOTS.items() if inspect.isclass(kind) and issubclass(kind, base)]
    if not slots:
        bases = ", ".join(f"{base.__module__}.{base.__qualname__}" for base in SLOTS.values())
        return replace(plugin, problem=f"is not a subclass of any of {bases}")
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        return replace(plugin, slot=slots[0], problem=f"does not define {missing}")
    if kind.__name__ != entry.name:
        problem = f"its class is called {kind.__name__}; give the entry point that name, which configs use"
        return replace(plugin, slot=slots[0], problem=problem)
    return replace(plugin, slot=slots[0])


def subclasses(base: type) -> set[type]:
    """Return all imported subclasses of a class."""
    children: list[type] = base.__subclasses__()
    return {kind for child in children for kind in {child, *subclasses(child)}}


def plugin_packages() -> set[str]:
    """Return the packages of the installed plugins."""
    return {entry.module.split(".")[0] for entry in entry_points(group=GROUP)}


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "cakeflow"
