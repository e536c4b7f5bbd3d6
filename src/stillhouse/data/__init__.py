"""Text and chats made into windows of tokens: sources, loss masks, split, packing, preview."""

from stillhouse.data.build import DataSummary, build
from stillhouse.data.preview import preview
from stillhouse.data.shift import IGNORED, predicting, supervised_rows, supervised_targets
from stillhouse.data.windows import Windows, WindowSet, WindowsInfo, collate, open_windows

__all__ = [
    "IGNORED",
    "DataSummary",
    "WindowSet",
    "Windows",
    "WindowsInfo",
    "build",
    "collate",
    "open_windows",
    "predicting",
    "preview",
    "supervised_rows",
    "supervised_targets",
]
