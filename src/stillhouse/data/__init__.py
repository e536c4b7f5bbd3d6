"""Text and chats made into windows of tokens: sources, loss masks, split, packing, preview."""

from stillhouse.data.build import DataSummary, build
from stillhouse.data.preview import preview
from stillhouse.data.windows import Windows, WindowsInfo, collate, open_windows

__all__ = [
    "DataSummary",
    "Windows",
    "WindowsInfo",
    "build",
    "collate",
    "open_windows",
    "preview",
]
