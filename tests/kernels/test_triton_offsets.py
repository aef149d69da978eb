"""Results of more than 2^31 elements: each kernel writes, and reads, where 32 bits cannot count.

On a GPU launches are whole, in memory that is there. On a CPU they have their true grids and sizes too; of a grid the
last programs alone are run, and memory exists where these touch it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from mvle_kernels import launches
from mvle_kernels.triton_support import Launch, captured, launch
from torch import Tensor

from .kernel_checks import DEVICE, far_apart, last_programs, needs_triton, vast
from .test_attention_kernels import plan_of, set_readers, values
from .test_token_loss_kernels import launched

pytestmark = needs_triton
CUDA = DEVICE.type == "cuda"
FAR, KIND, D = 2**31, torch.bfloat16, 256
ints = partial(torch.tensor, dtype=torch.int32, device=DEVICE)
count = partial(torch.arange, dtype=torch.int32, device=DEVICE)


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """What a test took is given back before the next takes as much."""
    yield
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def needs(gib: float) -> None:
    """Skips on a GPU that has not as much free."""
    if CUDA and torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of the GPU's memory; {torch.cuda.mem_get_info()[0] / 2**30:.0f} are free")


def start(one: Launch, arguments: dict[str, Any], programs: int) -> None:
    """The launch; on a CPU its last programs."""
    config, grid = {"num_warps": one.warps, "num_stages": one.stages}, one.grid
    if CUDA:
        launch(one.kernel, grid, config, **arguments)
        return
    programs = min(programs, grid[0])
    with last_programs(grid[0], programs):
        launch(one.kernel, (programs, *[1 for _ in grid[1:]]), config, **arguments)


def run(launcher: Callable[..., object], *arguments: Any, programs: int) -> dict[str, Tensor]:
    """The tensors, by name, that kernels of a launcher are given, behind its launches. The last `programs` of a grid
    are those that the test looks at."""
    shapes = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    real = {id(shape): x for shape, x in zip(shapes, arguments, strict=True) if isinstance(x, Tensor)}
    with captured() as made, launches.target(launches.architecture(DEVICE)):
        launcher(*shapes)
    found = dict[str, Tensor]()
    for one in made:
        tensors = {name: x for name, x in one.arguments.items() if isinstance(x, Tensor)}
        for x in tensors.values():
            if id(x) not in real:
                real[id(x)] = vast(x.shape, x.dtype)
                # at the end stands what no kernel writes: memory that nobody touched would pass for zeros
                real[id(x)].view(-1)[-4096:] = float("nan") if x.is_floating_point() else -7
        found |= {name: real[id(x)] for name, x in tensors.items()}
        start(one, {**one.arguments, **{name: real[id(x)] for name, x in tensors.items()}}, programs)
    assert any(x.numel() > FAR for x in found.values()), "nothing here is far"
    return found


def filled(rows: int, *shape: int, dtype: torch.dtype = KIND, last: int = 32) -> Tensor:
    """[rows, *shape] with random values in its last rows."""
    x = vast((rows, *shape), dtype)
    draw = torch.Generator().manual_seed(rows % 97)
    x[-last:] = torch.randn(last, *shape, generator=draw).to(DEVICE, dtype)
    return x


def by_image(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """A chunk of one image: then sums of chunks are as large as what is summed."""
    monkeypatch.setattr(f"mvle_kernels.{file}.CHUNK", 1)
    rule = {"ROWS": 1, "BLOCK_D": D, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(f"mvle_kernels.{file}.backward_rule", lambda _: rule)


# ---- patches and pixels ---------------------------------------------------------------------------------------------


def test_patches_of_so_many_images() -> None:
    from mvle_kernels.patches_triton import forward

    needs(8)
    B, X = 700_000, 3 * 32 * 32
    images = vast((B, 32, 32, 3), torch.uint8)
    images[-2:] = torch.arange(2 * X, device=DEVICE).remainder(251).view(2, 32, 32, 3)
    scale = [1.0] * 3, [0.0] * 3
    rows = run(forward, images, 16, *scale, KIND, programs=2)["rows"]
    assert torch.equal(rows[-2:], forward(images[-2:].contiguous(), 16, *scale, KIND)) and rows[-2:].any()


@pytest.mark.parametrize("axis", [1, 2])  # rows of pixels far apart, and pixels of a row
def test_pixels_far_apart(axis: int) -> None:
    from mvle_kernels.patches_triton import forward

    images = torch.arange(54, dtype=torch.uint8, device=DEVICE).view(2, 3, 3, 3)
    far = far_apart(images.transpose(0, axis).contiguous()).transpose(0, axis)
    scale = [1.0] * 3, [0.0] * 3
    for patch in (3, 1):  # within a patch, and from patch to patch
        assert torch.equal(forward(far, patch, *scale, KIND), forward(images, patch, *scale, KIND))


def test_the_pixel_loss_of_so_many_rows() -> None:
    from mvle_kernels.pixel_loss_triton import forward

    needs(12)
    R = 2_800_000
    images = torch.arange(3 * 16 * 16, device=DEVICE).remainder(251).to(torch.uint8).view(1, 16, 16, 3)
    prediction, rows = filled(R, 768), torch.zeros(R, dtype=torch.int64, device=DEVICE)
    rest = 16, [1 / 127.5] * 3, [-1.0] * 3, True, True, False, True
    found = run(forward, prediction, images, rows, *rest, programs=4)
    _, slope = forward(prediction[-4:].clone(), images, rows[-4:], *rest)
    assert torch.equal(found["slope"][-4:], slope) and slope.any()


# ---- views, mask tokens, sequences again ----------------------------------------------------------------------------

B, N, P = 2**20 + 4, 8, 9  # images, patches and positions of one


def test_views_of_so_many_images() -> None:
    from mvle_kernels.views_triton import REPLACED, WHOLE, forward

    needs(24)
    end, x, positions = 2 * B * P, filled(B, N, D), filled(P, D, last=P)
    masked, ends = ints([1, 5]), torch.zeros(B + 1, dtype=torch.int32, device=DEVICE)
    ends[-1] = 2  # both of the last image

    def launched(x: Tensor, positions: Tensor, token: Tensor, masked: Tensor, ends: Tensor) -> None:
        forward(x, positions, token, token, [masked, ends], [WHOLE, REPLACED], [0, B * P, end], end + 3)

    found = run(launched, x, positions, positions[0], masked, ends, programs=5)
    rows, place, near = found["rows"], found["place"], [0, 2 * P, 4 * P]
    shared = positions, positions[0], positions[0], [masked, ends[-3:]], [WHOLE, REPLACED]
    last = forward(x[-2:].clone(), *shared, near, 4 * P + 3)[0]
    assert torch.equal(rows[B * P - 2 * P : B * P], last[: 2 * P]) and last[: 4 * P].any(1).all()
    assert torch.equal(rows[end - 2 * P :], last[2 * P :]) and not last[4 * P :].any()
    assert place[0, -1].tolist() == [*range(B * P - P, B * P)] and place[1, -1, 2] == -2 - (end - P + 2)


def test_places_in_two_short_views_of_so_many_images() -> None:
    from mvle_kernels.views_triton import SUBSET, forward

    needs(50)
    images, width = 2**27, 16  # of which a view shows the class token alone: few rows, but places for every patch
    shown, ends = ints([1, 5]), torch.zeros(images + 1, dtype=torch.int32, device=DEVICE)
    ends[-1] = 2  # both of the last image

    def launched(x: Tensor, positions: Tensor, shown: Tensor, ends: Tensor) -> None:
        firsts = [0, images + 2, 2 * (images + 2)]
        forward(x, positions, positions[0], positions[0], [shown, ends] * 2, [SUBSET] * 2, firsts, firsts[-1])

    x, positions = filled(images, N, width), torch.zeros(P, width, dtype=KIND, device=DEVICE)
    found = run(launched, x, positions, shown, ends, programs=5)
    place, rows = found["place"], found["rows"]
    for view, first in enumerate((images - 1, 2 * images + 1)):
        assert place[view, -1].tolist() == [first, -1, first + 1, -1, -1, -1, first + 2, -1, -1]
    assert torch.equal(rows[-2:], x[-1, [1, 5]]) and rows[-2:].any(1).all()


def test_gradients_of_views_of_so_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvle_kernels.views_triton import backward

    needs(48)
    by_image(monkeypatch, "views_triton")
    gradient, place = filled(2 * B * P, D), count(2 * B * P).view(2, B, P)
    place[1, -1, 2] = -2 - place[1, -1, 2]
    found = run(backward, gradient, place, True, KIND, programs=P)
    clean, other = gradient[B * P - P : B * P].float(), gradient[-P:].float()
    covered = torch.zeros_like(other)
    covered[2] = other[2]
    assert found["of_x"].numel() > FAR and found["of_positions"].numel() > FAR and other.any(1).all()
    assert torch.equal(found["of_x"][-1], (clean + other - covered)[1:].to(KIND))
    assert torch.equal(found["of_positions"][-1], clean + other)
    assert torch.equal(found["of_mask_token"][-1], covered)


def test_mask_tokens_of_so_many_images() -> None:
    from mvle_kernels.insert_triton import forward

    needs(14)
    masked, ends = ints([1, 5]), torch.zeros(B + 1, dtype=torch.int32, device=DEVICE)
    ends[-1] = 2
    starts = count(B + 1) * P
    starts[-1] -= 2
    rows, positions = filled(B * P - 2, D), filled(P, D, last=P)
    token = positions[0].contiguous()
    found = run(forward, rows, starts, masked, ends, token, positions, B * P + 3, programs=5)
    last, _ = forward(rows[2 - 2 * P :].clone(), ints([0, P]), masked, ends[-3:], token, positions, 2 * P + 3)
    assert torch.equal(found["out"][-2 * P - 3 :], last) and last[: 2 * P].any(1).all() and not last[2 * P :].any()
    first = B * P - P
    assert found["place"][-1].sub(first).clamp(min=-1).tolist() == [0, 1, -1, 2, 3, 4, -1, 5, 6]


def test_gradients_of_mask_tokens_of_so_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvle_kernels.insert_triton import backward

    needs(24)
    by_image(monkeypatch, "insert_triton")
    gradient, place = filled(B * P, D), count(B * P).view(B, P)
    place[-1, -1] = -1
    starts = count(B + 1) * P
    starts[-1] -= 1
    found = run(
        backward, gradient, place, starts, B * P + 3, KIND, programs=2 * P
    )  # of the last image, and of the tail
    of_rows, of_positions = found["of_rows"], found["of_positions"]
    assert of_positions.numel() > FAR and gradient[-P:].any(1).all()
    assert torch.equal(of_rows[B * P - P : B * P - 1], gradient[-P:-1]) and not of_rows[B * P - 1 :].any()
    assert torch.equal(of_positions[-1, -1], gradient[-1].float()) and not of_positions[-1, :-1].any()


LONG = 500_000  # rows of a sequence, of which there are 17; then one of 3


def test_so_many_sequences_again() -> None:
    from mvle_kernels.expand_triton import backward, forward

    needs(12)
    ends = torch.cat([count(18) * LONG, ints([17 * LONG + 3])])
    total = int(ends[-1])
    rows = filled(total, D)
    out = run(forward, rows, count(18), ends, ends, total + 2, LONG, programs=2)["out"]
    assert torch.equal(out[-5:-2], rows[-3:]) and not out[-2:].any() and rows[-3:].any(1).all()
    del out
    gradient = filled(total + 2, D)
    gradient[-2:] = float("nan")  # of a tail
    of_rows = run(backward, gradient, count(18), ends, ends, total + 4, LONG, programs=2)["of_rows"]
    assert torch.equal(of_rows[-7:-4], gradient[-5:-2]) and not of_rows[-4:].any() and gradient[-5:-2].any(1).all()


# ---- attention ------------------------------------------------------------------------------------------------------


def lengths(rows: int, longest: int) -> Tensor:
    """Offsets: sequences of `longest` rows, until there are `rows` and more, and then one of 3."""
    whole = count(-(-rows // longest) + 1) * longest
    return torch.cat([whole, whole[-1:] + 3])


@pytest.mark.parametrize(
    "heads, width",
    [
        (2, 64),
        (128, 16),  # so many rows and heads that sums of exponentials are as many: on no GPU
    ],
)
def test_attention_of_so_many_rows(heads: int, width: int) -> None:
    from mvle_kernels.attention_triton import forward

    if heads == 128 and CUDA:
        pytest.skip("needs 130 GiB for queries and results")
    needs(14)
    longest, context = 1024, ints([0, 5])
    ends = lengths(2**24, longest)
    T, S = int(ends[-1]), len(ends) - 1
    q, k, v = filled(T + 2, heads, width), *(filled(5, heads, width, last=5) for _ in range(2))
    index = torch.zeros(S, dtype=torch.int32, device=DEVICE)
    found = run(forward, q, k, v, ends, context, index, None, longest, 5, programs=64 + 16 * heads)
    out, lse = forward(q[-5:].clone(), k, v, ints([0, 3]), context, index[:1], None, longest, 5)
    assert torch.equal(found["out"][-5:], out) and out[:3].any(2).all() and not out[3:].any()
    assert torch.equal(found["lse"][:, -5:-2], lse[:, :3]) and lse[:, :3].ne(0).all()
    assert heads != 128 or found["lse"].numel() > FAR


@pytest.mark.parametrize("longest", [64, 1024])  # contexts held whole, and in blocks: another kernel for queries
def test_gradients_of_attention_of_so_many_rows(longest: int) -> None:
    from mvle_kernels.attention_backward_triton import backward

    needs(42)
    ends = lengths(2**24, longest)
    T = int(ends[-1])
    tensors = [filled(T + 2, 2, 64) for _ in range(5)]  # gradient, q, k, v, out
    lse = vast((2, T + 2), torch.float32)
    lse[:, -5:] = 3.0
    found = run(backward, *tensors, lse, ends, ends, None, None, longest, longest, programs=64 + 2 * 16)
    near = [x[-5:].clone() for x in (*tensors, lse.T)]
    near[-1] = near[-1].T.contiguous()
    expected = backward(*near, ints([0, 3]), ints([0, 3]), None, None, longest, longest)
    for name, x in zip(("dq", "dk", "dv"), expected, strict=True):
        assert torch.equal(found[name][-5:], x) and x[:3].any(2).all() and not x[3:].any(), name


def test_sums_of_a_hub_that_lies_far_and_whose_parts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvle_kernels.attention_backward_triton import backward
    from mvle_kernels.attention_triton import forward

    needs(56)
    set_readers(monkeypatch, 1)
    plan = plan_of([2, 1, 2, 3], [4], [0] * 4)
    q, k, v = values(plan, dtype=KIND)
    ends = plan.q.offsets, plan.k.offsets, plan.kv_index, plan.readers, 3, 4
    out, lse = forward(q, k, v, *ends)
    expected = backward(q + 1, q, k, v, out, lse, *ends)
    with captured() as made:
        dq, _, _ = backward(q + 1, q, k, v, out, lse, *ends)
    assert len(made) == 2 and made[0].arguments["part_k"].shape == (4, 4, *k.shape[1:])
    before, a_part = FAR // k[0].numel(), FAR // 2 // k[0].numel()  # rows; the third part begins at 2^31
    far = {name: vast((before + 4, *k.shape[1:]), KIND) for name in ("k", "v", "dk", "dv")}
    far["k"][-4:], far["v"][-4:] = k, v
    far |= {f"part_{name}": vast((4, a_part, *k.shape[1:]), torch.float32) for name in "kv"}
    for one in made:
        given = {name: far.get(name, x) for name, x in one.arguments.items()}
        start(one, {**given, "k_offsets": plan.k.offsets + before, "max_k": a_part}, one.grid[0])
    assert all(map(torch.equal, (dq, far["dk"][-4:], far["dv"][-4:]), expected))
    assert all(x.any() for x in expected) and all(far[f"part_{name}"][2, :4].any() for name in "kv")


# ---- the token loss -------------------------------------------------------------------------------------------------


def test_the_token_loss_of_so_many_logits() -> None:
    from mvle_kernels.token_loss_triton import row_losses

    needs(6)
    C, V = 50304, 50265
    R = FAR // C + 3
    logits, targets = filled(R, C, last=2), torch.tensor([5, V - 1], device=DEVICE).repeat(R)[-R:]
    slope = logits[-2:].clone()
    partial, ranks = torch.empty(R, device=DEVICE), torch.empty(R, dtype=torch.int32, device=DEVICE)
    run(row_losses, logits, targets, partial, ranks, -1, V, True, programs=2)
    near, of = launched(slope, [5, V - 1], V)
    assert torch.equal(logits[-2:], slope) and torch.equal(partial[-2:], near) and torch.equal(ranks[-2:], of)
    assert slope.any(1).all()
