"""Picks a backend for each call of an op, and can say why each other one was refused.

An op is a name and an ordered list of backends; a backend is a function and a `refuse(*args)` that returns why it
cannot take these arguments, or None. The first that does not refuse is chosen. A demand comes before the choice, in
this order: `set_backend` (a config key), the environment variable MVLE_BACKEND, the dispatcher. A demand that cannot
be met is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

OPS: dict[str, Op] = {}
_demanded: str | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation: `run(*args)` computes, `refuse(*args)` says why it cannot (None: it can)."""

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None]
    why: str


@dataclass
class Op:
    """A named op with its backends in order of preference."""

    name: str
    backends: list[Backend] = field(default_factory=list)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def register(
        self, name: str, why: str, refuse: Callable[..., str | None] = lambda *a, **k: None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: add a backend, behind those registered before it. `why` is the reason to choose it."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends.append(Backend(name, run, refuse, why))
            return run

        return add

    def judge(self, *args: Any, **kwargs: Any) -> tuple[Backend, list[tuple[str, str]]]:
        """The chosen backend, and (name, reason) for every backend in order. Raises ValueError if none can run."""
        demand, source = demanded()
        names = [b.name for b in self.backends]
        if demand and demand not in names:
            raise ValueError(f"{source} demands backend {demand!r} of {self.name}, which has {names}.")
        chosen: Backend | None = None
        reasons = []
        for backend in self.backends:
            if demand and backend.name != demand:
                reasons.append((backend.name, f"refused: {source} demands {demand}"))
                continue
            refusal = backend.refuse(*args, **kwargs)
            if refusal:
                reasons.append((backend.name, f"refused: {refusal}"))
            elif chosen is None:
                chosen = backend
                reasons.append((backend.name, f"chosen: {source + ' demands it' if demand else backend.why}"))
            else:
                reasons.append((backend.name, f"not needed: {chosen.name} comes first"))
        if chosen is None:
            raise ValueError(f"no backend of {self.name} takes these arguments: " + "; ".join(map(": ".join, reasons)))
        return chosen, reasons

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.judge(*args, **kwargs)[0].run(*args, **kwargs)


def demanded() -> tuple[str | None, str]:
    """The backend demanded for every op, and by whom (a config key, or the environment); (None, "") if nobody did."""
    if _demanded:
        return _demanded, "kernels.backend"
    if name := os.environ.get("MVLE_BACKEND"):
        return name, "MVLE_BACKEND"
    return None, ""


def set_backend(name: str | None) -> None:
    """Demand one backend for every op (None or "auto": let each call choose). Raises ValueError for an unknown name."""
    global _demanded
    known = sorted({b.name for op in OPS.values() for b in op.backends})
    if name not in (None, "auto", *known):
        raise ValueError(f"kernels.backend must be auto or one of {known}; got {name!r}.")
    _demanded = None if name == "auto" else name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """`set_backend` for the length of a with block."""
    global _demanded
    before = _demanded
    set_backend(name)
    try:
        yield
    finally:
        _demanded = before


def explain(op: str | Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> str:
    """Which backend a call would take, and why each other one would not.

    explain("ragged_attention", q, k, ...) or explain(ragged_attention, q, k, ...) judges that call; without arguments
    the line says the order in which backends are asked; without an op, so for every op.
    """
    if op is None:
        return "\n".join(explain(name) for name in sorted(OPS))
    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}; the ops are {sorted(OPS)}.")
    if args or kwargs:
        _, reasons = OPS[name].judge(*args, **kwargs)
        return f"{name}: " + "; ".join(f"{backend} {reason}" for backend, reason in reasons)
    demand, source = demanded()
    order = " > ".join(f"{b.name} ({b.why})" for b in OPS[name].backends)
    return f"{name}: {source + ' demands ' + demand if demand else order}"
