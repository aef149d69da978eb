"""What can go wrong with a checkpoint. A file of its own, so that naming an error does not import torch's DCP."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be loaded."""


class RunError(ValueError):
    """A folder that holds no run, and no export of one, that can be opened."""


class OptimError(ValueError):
    """What optim.backend names cannot be used here."""


def first_cause(error: BaseException) -> str:
    """Kind and first line of what went wrong, from inside DCP's wrapping."""
    for inner, *_ in getattr(error, "failures", {}).values():
        return first_cause(inner)
    causes = [error]
    while (above := causes[-1].__cause__ or causes[-1].__context__) is not None and above not in causes:
        causes.append(above)
    cause = next((c for c in causes if isinstance(c, OSError)), error)  # a full disk hides behind torch's own error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"
