"""Concept images in, adapter out. Knows no store and no engine."""

from trainer.loop import Progress
from trainer.methods import METHODS
from trainer.record import Record
from trainer.sequence import learn
from trainer.settings import Settings

__all__ = ["METHODS", "Progress", "Record", "Settings", "learn"]
