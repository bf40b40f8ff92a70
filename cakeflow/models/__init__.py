"""Models to edit: loading, structure, weights by name, and hooks."""

from cakeflow.models.architecture import Architecture, Role, Site, find_architecture, is_transposed
from cakeflow.models.base import EditableModel
from cakeflow.models.hooks import (
    add_to_output,
    capture,
    frozen,
    inject,
    logits_at,
    patch,
    read_inputs,
    replace_columns,
    start_at,
)
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_editable, load_model, load_vision_model
from cakeflow.models.products import gram, has_fast_products, product
from cakeflow.models.routing import RoutedModule, Rows, Scope, forced_decisions, prompt_lengths, routed
from cakeflow.models.vision import VisionModel

__all__ = [
    "Architecture", "EditableModel", "LanguageModel", "Role", "RoutedModule", "Rows", "Scope", "Site", "VisionModel",
    "add_to_output", "capture", "find_architecture", "forced_decisions", "frozen", "gram", "has_fast_products",
    "inject", "is_transposed", "load_editable", "load_model", "load_vision_model", "logits_at", "patch", "product",
    "prompt_lengths", "read_inputs", "replace_columns", "routed", "start_at",
]  # fmt: skip
