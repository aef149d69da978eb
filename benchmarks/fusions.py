"""What a hand-written kernel saves, or could save, over torch.compile in the encoders, by count: launches and bytes.

A kernel that does the same passes as a generated one is more to maintain and saves nothing. So before one is written
for an elementwise piece of a block, this says what eager torch, torch.compile and the best kernel possible read and
write on the same work. Views of images have a kernel (mvle_kernels/views_triton.py): what it does stands beside.

    python -m benchmarks.fusions                 a table, at the widths of base; views of 256 images
    python -m benchmarks.fusions --rows 50432    rows of 256 images; all bytes but those of weights grow with them

eager      ops as they come, bytes as benchmarks/counts.py counts them
CPU, GPU   what inductor plans for a CPU and for an H100, by its own account: kernels after fusion, and the buffers that
           each reads and writes. It plans without generating code, so neither a GPU nor a C++ compiler is needed: the
           tensors are fake and the device's properties are told. How it plans is its own affair: this is known to work
           under torch 2.14
ours       launches that our kernel makes, and the tensors that each is given; then what torch adds up of what it gave
floor      each input read once, each output written once: no kernel does less. Two launches where rows are summed in a
           fixed order (partial sums, then theirs), else one
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from mvle_kernels.recipes import RECIPES
from mvle_kernels.triton_support import INSTALLED, captured
from torch import Tensor

from .counts import Work, size_of
from .plain_ops import dropped_views, replaced_views

aten = torch.ops.aten
ROWS = 8192  # inductor fuses sums of both directions from 5 Mi elements on
MARGIN = 1.05  # less than this over the floor is not worth a kernel
Piece = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Fusion:
    """A piece of a block in one direction: what it computes of which tensors, and launches of the best kernel."""

    name: str
    compute: Piece
    inputs: Callable[[int], list[Tensor]]
    launches: int
    ours: str | None = None  # which launch of views_triton.variants, where there is one


@dataclass(frozen=True)
class Row:
    """(launches, bytes) of one fusion: eager, as inductor plans it for a CPU and a GPU, floor, our kernel (if any)."""

    name: str
    eager: tuple[int, int]
    cpu: tuple[int, int]
    gpu: tuple[int, int]
    floor: tuple[int, int]
    ours: tuple[int, int] | None = None

    @property
    def over(self) -> float:
        """Bytes of what is compiled for a GPU, as a multiple of the floor."""
        return self.gpu[1] / self.floor[1]


# ---- the pieces -----------------------------------------------------------------------------------------------------


def residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """x + y, and its LayerNorm with the statistics that its backward reads."""
    total = x + y
    return total, *aten.native_layer_norm(total, [total.shape[1]], weight, bias, 1e-6)


def residual_norm_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the sum (x and y have the same one), of the weight and of the bias."""
    shape, wanted = [total.shape[1]], [True, True, True]
    d_x, d_weight, d_bias = aten.native_layer_norm_backward(grad, total, shape, mean, rstd, weight, bias, wanted)
    return d_x + grad_total, d_weight, d_bias


def bias_gelu(u: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """GELU of what a product without bias made: the input of the second linear layer. u is kept."""
    return (torch.nn.functional.gelu(u + bias),)


def bias_gelu_backward(grad: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """As feed_forward (kernels/mvle_kernels/feed_forward.py) has it: GELU once more, for the gradient of the second
    weight; the gradient of u, and its sum over rows, that of the bias."""
    z = u + bias
    d_u = aten.gelu_backward(grad, z)
    return torch.nn.functional.gelu(z), d_u, d_u.sum(0)


def _empty(rows: int, *widths: int) -> list[Tensor]:
    """A tensor [rows, width] of each width, [-width] of each negative one, in bfloat16 and without memory."""
    return [torch.empty((rows, w) if w > 0 else (-w,), dtype=torch.bfloat16, device="meta") for w in widths]


def fusions() -> list[Fusion]:
    """The pieces at the widths of base."""
    D, inner = RECIPES["base"].width, RECIPES["base"].mlp

    def norm_backward(rows: int) -> list[Tensor]:
        grad, grad_total, x, y, weight, bias = _empty(rows, D, D, D, D, -D, -D)
        total, _, mean, rstd = residual_norm(x, y, weight, bias)
        return [grad, grad_total, total, mean, rstd, weight, bias]

    blocks = [
        Fusion("residual + LayerNorm", residual_norm, lambda n: _empty(n, D, D, -D, -D), 1),
        Fusion("residual + LayerNorm, backward", residual_norm_backward, norm_backward, 2),
        Fusion("bias + GELU", bias_gelu, lambda n: _empty(n, inner, -inner), 1),
        Fusion("bias + GELU, backward", bias_gelu_backward, lambda n: _empty(n, inner, inner, -inner), 2),
    ]
    return [*blocks, *_views()]


def _views() -> list[Fusion]:
    """Both views of an image as one packed buffer, at the pairs of base whatever the rows."""
    size = RECIPES["base"]
    B, N, D, V = size.pairs, size.patches, size.width, size.patches - size.masked
    make = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    leaves = [make(B, N, D), make(N + 1, D), make(D), make(D)]
    covered = torch.empty(B, N + 1, dtype=torch.bool, device="meta")
    shown = torch.empty(B, V + 1, dtype=torch.int64, device="meta")
    found = []
    for name, mode, view, own, index in (
        ("views, whole and covered", "replace", replaced_views, leaves, covered),
        ("views, whole and dropped", "drop", dropped_views, leaves[:3], shown),
    ):
        gradient = make(B * (N + 1) + index.numel(), D)
        back = backward_of(view, own, [gradient, index])
        given, taken = [*own, index], [gradient, index]
        found.append(Fusion(name, partial(_one, view), lambda _, x=given: x, 1, f"base, {mode}, forward"))
        found.append(Fusion(f"{name}, backward", back, lambda _, x=taken: x, 2, f"base, {mode}, backward"))
    return found


def _one(compute: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor]:
    return (compute(*inputs),)


def backward_of(forward: Callable[..., Tensor], leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> Piece:
    """The ops that autograd makes for the gradients of `leaves`, with none of the forward that they do not read.

    inputs: the gradient of what forward(*leaves, *others) gives, then the others.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def compute(gradient: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            made = [gradient.new_empty(t.shape).requires_grad_() for t in leaves]
            return torch.autograd.grad(forward(*made, *others), made, gradient)

    with FakeTensorMode():
        graph = make_fx(compute)(*[torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in inputs])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


# ---- counting -------------------------------------------------------------------------------------------------------


class _PlannedError(Exception):
    """Thrown where code would be generated: the plan is known by then."""


@contextmanager
def _told_of_an_h100() -> Iterator[None]:
    """What inductor asks a GPU before it plans for it."""
    import torch._inductor.compile_fx as compiler
    import torch._inductor.scheduler as scheduler
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties

    known = {"major": 9, "multi_processor_count": 132, "warp_size": 32, "max_threads_per_block": 1024}
    known |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048}
    properties = SimpleNamespace(**known, minor=0, total_memory=80 * 2**30, name="H100")
    with (
        mock.patch.object(DeviceProperties, "create", lambda d: DeviceProperties("cuda", 0, cc=90, **known)),
        mock.patch.object(CudaInterface, "get_device_properties", lambda *_: properties),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", lambda *_: properties),
        mock.patch("torch.cuda.get_device_properties", lambda *_: properties),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.device_count", lambda: 1),
        mock.patch.object(compiler, "_check_triton_bf16_support", lambda _: None),
        mock.patch.object(scheduler, "has_triton", lambda *_: True),
    ):
        yield


def planned(compute: Piece, inputs: list[Tensor], device: str) -> tuple[int, int]:
    """Kernels that inductor would generate for this call on a device ("cpu" or "cuda"), and bytes that they read and
    write. Not inductor's count of generated kernels: on a CPU that has the ones which it tries and throws away too."""
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    found: list[tuple[int, int]] = []

    def stop(graph: GraphLowering) -> None:
        graph._update_scheduler()
        size, nodes, _ = graph.count_bytes()
        found.append((len(nodes), size))
        raise _PlannedError

    with torch.no_grad(), FakeTensorMode(), torch._inductor.config.patch(fx_graph_cache=False), ExitStack() as told:
        if device == "cuda":
            told.enter_context(_told_of_an_h100())
        fake = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in inputs]
        graph = make_fx(compute, decomposition_table=select_decomp_table())(*fake)
        with mock.patch.object(GraphLowering, "compile_to_module", stop):
            try:
                compile_fx_inner(graph, fake)
            except Exception as error:  # inductor wraps what it meets; anything but our own stop goes on
                if not _is_planned(error):
                    raise
    return found[0]


class _Beside(Work):
    """What a launcher asks of torch; promote_types is an op there, and touches nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.promote_types.default:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def ours(name: str) -> tuple[int, int] | None:
    """Launches and bytes of a call of our own kernel for views; None without triton. Each launch reads or writes once
    what it is given, and arguments that share memory (a tensor standing for one that is not needed) count once."""
    if not INSTALLED:
        return None
    from mvle_kernels.views_triton import variants

    call = dict(variants())[name]
    with captured() as launches, _Beside() as beside:
        call()
    size = beside.bytes
    for launch in launches:
        of_storage: dict[int, int] = {}
        for t in launch.arguments.values():
            if isinstance(t, Tensor):
                storage = t.untyped_storage()._cdata
                of_storage[storage] = max(size_of(t), of_storage.get(storage, 0))
        size += sum(of_storage.values())
    return len(launches) + beside.launches, size


def _is_planned(error: BaseException | None) -> bool:
    """Whether an error is the one that stops after planning, or was raised because of it."""
    while error is not None and not isinstance(error, _PlannedError):
        error = error.__cause__ or error.__context__
    return error is not None


def count(fusion: Fusion, rows: int) -> Row:
    """All counts of one fusion."""
    inputs = fusion.inputs(rows)
    with torch.no_grad(), Work() as eager:
        outputs = fusion.compute(*inputs)
    read = inputs[: -1 if fusion.compute is residual_norm_backward else None]  # whose last, the bias, is only asked for
    floor = sum(map(size_of, [*read, *outputs]))
    plans = [planned(fusion.compute, inputs, device) for device in ("cpu", "cuda")]
    by_hand = ours(fusion.ours) if fusion.ours else None
    return Row(fusion.name, (eager.launches, eager.bytes), *plans, (fusion.launches, floor), by_hand)


def table(rows: int) -> list[Row]:
    """Of all fusions."""
    return [count(fusion, rows) for fusion in fusions()]


def lines(found: list[Row]) -> list[str]:
    """The table as text."""
    width = max(len(row.name) for row in found)
    heads = "".join(f"{head:>18}" for head in ("eager", "CPU", "GPU", "ours", "floor"))
    out = [f"{'launches | MiB':{width}}{heads}   GPU / floor"]
    for row in found:
        columns = (row.eager, row.cpu, row.gpu, row.ours, row.floor)
        cells = ("" if c is None else f"{c[0]} | {c[1] / 2**20:.1f}" for c in columns)
        out.append(f"{row.name:{width}}{''.join(f'{c:>18}' for c in cells)}   {row.over:.2f}  {verdict(row)}")
    return out


def verdict(row: Row) -> str:
    """What a kernel saves of the bytes of what torch.compile plans for a GPU, or could save."""
    if row.ours is not None:
        saved = 1 - row.ours[1] / row.gpu[1]
        return "our kernel saves nothing" if saved < MARGIN - 1 else f"our kernel saves {saved:.0%} of the bytes"
    return "nothing to gain" if row.over <= MARGIN else f"a kernel could save {1 - 1 / row.over:.0%} of the bytes"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Launches and bytes of the encoders' elementwise pieces.")
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {options.rows} rows in bfloat16")
    print("\n".join(lines(table(options.rows))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
