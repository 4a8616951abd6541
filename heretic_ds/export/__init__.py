"""Writing the edited model: full checkpoint, model card, manifest."""

from heretic_ds.export.card import CardFacts, model_card
from heretic_ds.export.checkpoint import ExportResult, export_model, model_bytes
from heretic_ds.export.manifest import build_manifest, package_versions
from heretic_ds.export.names import public_model_name
from heretic_ds.export.target import check_export_target

__all__ = [
    "CardFacts",
    "ExportResult",
    "build_manifest",
    "check_export_target",
    "export_model",
    "model_bytes",
    "model_card",
    "package_versions",
    "public_model_name",
]
