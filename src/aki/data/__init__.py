"""Chats with pictures: from files, lists or DigitScenes to batches of a model's inputs.

Files are read by `aki.data.sources.open_source`.
"""

from aki.data.collate import ChatCollator
from aki.data.pack import pack
from aki.data.report import BadSample
from aki.data.schema import Sample, assistant, user

__all__ = ["BadSample", "ChatCollator", "Sample", "assistant", "pack", "user"]
