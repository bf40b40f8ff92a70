"""Models to edit: loading, structure, weights by name, and hooks."""

from cakeflow.models.architecture import Architecture, Role, Site, find_architecture, is_transposed
from cakeflow.models.hooks import capture, frozen, inject, logits_at, patch, start_at
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model
from cakeflow.models.products import has_fast_products, product
from cakeflow.models.routing import RoutedModule, Rows, Scope, prompt_lengths

__all__ = [
    "Architecture", "LanguageModel", "Role", "RoutedModule", "Rows", "Scope", "Site", "capture", "find_architecture",
    "frozen", "has_fast_products", "inject", "is_transposed", "load_model", "logits_at", "patch", "product",
    "prompt_lengths", "start_at",
]  # fmt: skip
