"""The edited model outside cakeflow: whole, as a delta, as a LoRA adapter, or as the modules that were put in place."""

from cakeflow.export.delta import apply_delta
from cakeflow.export.formats import export, export_applied
from cakeflow.export.hub import export_to_hub, push_to_hub
from cakeflow.export.manifest import Format, Manifest, require_place
from cakeflow.export.memory import apply_memory
from cakeflow.export.options import ExportOptions
from cakeflow.export.signing import require_signature, sign

__all__ = [
    "ExportOptions",
    "Format",
    "Manifest",
    "apply_delta",
    "apply_memory",
    "export",
    "export_applied",
    "export_to_hub",
    "push_to_hub",
    "require_place",
    "require_signature",
    "sign",
]
