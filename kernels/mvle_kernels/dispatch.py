"""Picks a backend for each call of an op, and can say why each other one was refused.

An op is a name and an ordered list of backends; a backend is a function, a `refuse(*args)` that returns why it cannot
take these arguments, or None, and an `unasked(*args)`: why it does not take them of itself, though it could. The first
with neither is chosen. A demand comes before the choice, for each op in this order: `set_backend` (a config key), the
environment variable MVLE_BACKEND, the dispatcher. A demand is "triton", for every op that has such a backend, or
"ragged_attention=dense,patchify=triton", for those alone: of another op the next in order is asked. "triton|dense"
takes the first of them that can. A demand that cannot be met is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

OPS: dict[str, Op] = {}
Demand = dict[str, tuple[str, ...]]  # op -> backends, the first that can; EVERY: of all ops that have one of them
EVERY = "*"
_demanded: Demand = {}


def never(*args: Any, **kwargs: Any) -> None:
    """Nothing speaks against a backend."""


@dataclass(frozen=True)
class Backend:
    """One implementation: `run(*args)` computes, `refuse(*args)` says why it cannot (None: it can), `unasked(*args)`
    why it waits for a demand."""

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None]
    why: str
    unasked: Callable[..., str | None] = never


@dataclass
class Op:
    """A named op with its backends in order of preference."""

    name: str
    backends: list[Backend] = field(default_factory=list)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def register(
        self,
        name: str,
        why: str,
        refuse: Callable[..., str | None] = never,
        unasked: Callable[..., str | None] = never,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: add a backend, behind those registered before it. `why` is the reason to choose it."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends.append(Backend(name, run, refuse, why, unasked))
            return run

        return add

    def judge(self, *args: Any, **kwargs: Any) -> tuple[Backend, list[tuple[str, str]]]:
        """The chosen backend, and (name, reason) for every backend in order. Raises ValueError if none can run."""
        demand, source = demanded(self.name, [b.name for b in self.backends])
        wanted = "|".join(demand)
        refusals = {
            b.name: f"{source} demands {wanted}" if demand and b.name not in demand else b.refuse(*args, **kwargs)
            for b in self.backends
        }
        shy = {} if demand else {b.name: b.unasked(*args, **kwargs) for b in self.backends if not refusals[b.name]}
        able = [b for b in self.backends if not refusals[b.name] and not shy.get(b.name)]
        if demand:
            able.sort(key=lambda b: demand.index(b.name))
        reasons = []
        for backend in self.backends:
            name = backend.name
            if refusals[name]:
                reasons.append((name, f"refused: {refusals[name]}"))
            elif shy.get(name):
                reasons.append((name, f"not asked: {shy[name]}"))
            elif backend is able[0]:
                reasons.append((name, f"chosen: {source + ' demands it' if demand else backend.why}"))
            else:
                reasons.append((name, f"not needed: {able[0].name} comes first"))
        if not able:
            raise ValueError(f"no backend of {self.name} takes these arguments: " + "; ".join(map(": ".join, reasons)))
        return able[0], reasons

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.judge(*args, **kwargs)[0].run(*args, **kwargs)


def read_demand(text: str | None, source: str) -> Demand:
    """What "auto", "triton", "triton|dense" or "op=backend,…" demands of each op. Raises ValueError for an unknown
    name."""
    if text in (None, "", "auto"):
        return {}
    assert text is not None
    found: Demand = {}
    for part in text.split(","):
        op, _, names = part.rpartition("=")
        op, backends = op.strip() or EVERY, tuple(name.strip() for name in names.split("|"))
        if op != EVERY and op not in OPS:
            raise ValueError(f"{source} demands a backend of op {op!r}; the ops are {sorted(OPS)}.")
        known = sorted({b.name for o in OPS.values() if op in (EVERY, o.name) for b in o.backends})
        for backend in backends:
            if backend not in known:
                whose = "" if op == EVERY else f" for {op}"
                raise ValueError(f"{source} must be auto or one of {known}{whose}, or op=backend,…; got {backend!r}.")
        if op in found:
            raise ValueError(
                f"{source} names {'all ops' if op == EVERY else op} twice in {text!r}; write a|b for either."
            )
        found[op] = backends
    return found


def demanded(op: str, backends: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The backends demanded of an op, and by whom (a config key, or the environment where that says nothing of this
    op); ((), "") if nobody did. What every op should take and this one does not have says nothing of it."""

    def of(demand: Demand) -> tuple[str, ...]:
        return tuple(name for name in demand.get(op, demand.get(EVERY, ())) if name in backends)

    if names := of(_demanded):
        return names, "kernels.backend"
    if names := of(read_demand(os.environ.get("MVLE_BACKEND"), "MVLE_BACKEND")):
        return names, "MVLE_BACKEND"
    return (), ""


def set_backend(name: str | None) -> None:
    """Demand a backend of every op that has it, the first of several, or "op=backend,…" (None or "auto": let each call
    choose). Raises ValueError for an unknown name."""
    global _demanded
    _demanded = read_demand(name, "kernels.backend")


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
    demand, source = demanded(name, [b.name for b in OPS[name].backends])
    order = " > ".join(f"{b.name} ({b.why})" for b in OPS[name].backends)
    return f"{name}: {source + ' demands ' + '|'.join(demand) if demand else order}"
