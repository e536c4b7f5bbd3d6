"""The checkpoint to ship, written and then checked by loading it as a stranger would."""

from stillhouse.export.checkpoint import ReplayResult, ReplayText, export_checkpoint

__all__ = ["ReplayResult", "ReplayText", "export_checkpoint"]
