"""bfloat16 weights of a model that one GPU holds whole, over the float32 ones that are trained.

A forward and its backward see copies in bfloat16, in the same places of the same modules; outside, the model has its
float32 parameters, which optimizer, average and checkpoint know. What FSDP's mixed precision does, without its ranks:
with one rank it would still gather and cast each parameter by itself, twice a step, and run its hooks around every
block, and a GPU that finishes a block in a millisecond then waits for the host.

Cost     P parameters: weights are cast in one launch (6 P bytes), gradients are put end to end in bfloat16 and cast in
         one (10 P bytes, in a few launches): 1.7 ms for 334M at 3 TB/s, whatever their number.
Memory   2 P bytes beside the float32 weights; a backward adds 2 P for its gradients, and its end 6 P for a moment, when
         nothing else is kept.
Exact    as FSDP with param_dtype=bfloat16 and reduce_dtype=float32 on one rank, bit for bit: weights are rounded to
         nearest, a micro-batch's gradient is bfloat16, micro-batches are added up in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 64  # values: a copy that begins at such a multiple can be read 16 bytes at a time, and by tensor cores


class HalfWeights:
    """Copies in `dtype` of every floating-point parameter of a model but those of modules with `full_precision = True`.

    methods: those of the model by which a forward begins. Inside `training` a backward may follow. Outside, the model
    has its copies for the call alone, and a backward would lose gradients: `forward` raises RuntimeError there, unless
    autograd is off. Made before the model has memory; the copies are made when they are first needed.
    """

    def __init__(self, model: nn.Module, methods: Iterable[str], dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self._places = list(_places(model))
        self._masters: list[nn.Parameter] = []
        self._copies: list[nn.Parameter] = []
        self._slots: list[int] = []  # of each place, which copy
        self._addresses: list[int] = []  # of each master, where it was put
        self._whole = self._flat = torch.empty(0)  # all masters end to end, all copies likewise
        self._inside = False
        for name in methods:
            if hasattr(model, name):
                setattr(model, name, self._entering(getattr(model, name), name))

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around a forward and its backward; behind it the float32 parameters have the gradients, added to those that
        they had."""
        self._enter()
        try:
            yield
            self._collect()
        finally:
            self._leave()

    def _entering(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def entered(*arguments: Any, **keywords: Any) -> Any:
            if self._inside:
                return method(*arguments, **keywords)
            if name == "forward" and torch.is_grad_enabled():
                raise RuntimeError(
                    "a forward with gradients must run inside Parallel.accumulating, which hands them to the float32 "
                    "weights; without gradients wrap it in torch.no_grad()."
                )
            self._enter()
            try:
                return method(*arguments, **keywords)
            finally:
                self._leave()

        return entered

    # --- the copies ---

    def _enter(self) -> None:
        if self._inside:
            raise RuntimeError("a forward with bfloat16 weights is under way; another cannot begin inside it.")
        with torch.inference_mode(False), torch.no_grad():
            if self._moved():
                self._make()
            self._flat.copy_(self._whole)
        for (module, name), slot in zip(self._places, self._slots, strict=True):
            module._parameters[name] = self._copies[slot]
        self._inside = True

    def _leave(self) -> None:
        for (module, name), slot in zip(self._places, self._slots, strict=True):
            module._parameters[name] = self._masters[slot]
        for copy in self._copies:
            copy.grad = None
        self._inside = False

    @torch.no_grad()
    def _collect(self) -> None:
        """Gradients of the copies, cast, to their masters."""
        pairs = [(m, c.grad) for m, c in zip(self._masters, self._copies, strict=True) if c.grad is not None]
        if not pairs:
            return
        ends = torch.cat([grad.flatten() for _, grad in pairs]).to(torch.float32)
        new = [part.view_as(m) for (m, _), part in zip(pairs, ends.split([m.numel() for m, _ in pairs]), strict=True)]
        old: list[Tensor] = []
        more: list[Tensor] = []
        for (master, _), grad in zip(pairs, new, strict=True):
            if master.grad is None:
                master.grad = grad
            else:
                old.append(master.grad)
                more.append(grad)
        if old:
            torch._foreach_add_(old, more)

    def _now(self) -> list[nn.Parameter]:
        """Each parameter once, in the order of the flat buffers."""
        found = {id(p): p for module, name in self._places if (p := module._parameters[name]) is not None}
        # those first that keep the next one aligned
        return sorted(found.values(), key=lambda p: p.numel() % ALIGNED != 0)

    def _moved(self) -> bool:
        """Whether the weights do not lie where they were put: at first, and after a `to` or an assignment."""
        now = self._now()
        return [id(m) for m in now] != [id(m) for m in self._masters] or [m.data_ptr() for m in now] != self._addresses

    def _make(self) -> None:
        """Put the float32 weights end to end, and copies of them likewise."""
        self._masters = self._now()
        sizes = [m.numel() for m in self._masters]
        self._whole = torch.cat([m.detach().flatten() for m in self._masters])
        for master, part in zip(self._masters, self._whole.split(sizes), strict=True):
            master.data = part.view_as(master)
        self._addresses = [m.data_ptr() for m in self._masters]
        self._flat = torch.empty_like(self._whole, dtype=self.dtype)
        parts = zip(self._masters, self._flat.split(sizes), strict=True)
        self._copies = [nn.Parameter(part.view_as(m), requires_grad=m.requires_grad) for m, part in parts]
        slot = {id(m): i for i, m in enumerate(self._masters)}
        self._slots = [slot[id(module._parameters[name])] for module, name in self._places]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, name) of every parameter that is to have a copy."""
    full = {id(m) for top in model.modules() if getattr(top, "full_precision", False) for m in top.modules()}
    for module in model.modules():
        if id(module) in full:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                yield module, name
