"""The base of every config section: frozen, keyword-only, and closed to unknown keys.

Sections live beside the code that they configure; mvle/config.py composes them into one root.
Every field carries a description (meaning, unit, range): `python -m mvle.train --help` prints it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen pydantic model without room for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())
