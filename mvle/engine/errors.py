"""What can go wrong with a checkpoint. A file of its own, so that naming the error does not import torch's DCP."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be loaded."""
