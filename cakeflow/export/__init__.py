"""The edited model outside cakeflow: whole, as a delta to its base, or as a LoRA adapter."""

from cakeflow.export.delta import apply_delta
from cakeflow.export.formats import export, export_applied
from cakeflow.export.manifest import Format, Manifest, require_place

__all__ = ["Format", "Manifest", "apply_delta", "export", "export_applied", "require_place"]
