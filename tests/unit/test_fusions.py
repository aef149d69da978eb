"""What a hand-written kernel could save over torch.compile is counted, and is what docs/decisions.md rests on."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch

from benchmarks.counts import release
from benchmarks.fusions import MARGIN, ROWS, Row, backward_of, count, fusions, lines, planned, table

needs_torch = pytest.mark.skipif(
    release() != "2.14", reason=f"what inductor plans is known of torch 2.14; this is {torch.__version__}"
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
MIB, D, INNER = 2**20, 768, 3072


@needs_torch
def test_one_piece_alone_is_further_from_the_floor_than_a_kernel_is_worth() -> None:
    found = {row.name: row for row in table(ROWS)}

    floors = {name: row.floor[1] / (2 * ROWS) for name, row in found.items()}  # values of 2 bytes a row
    assert floors["residual + LayerNorm"] == pytest.approx(4 * D, rel=0.01)  # x, y; their sum, its norm
    assert floors["residual + LayerNorm, backward"] == pytest.approx(4 * D, rel=0.01)  # two gradients, the sum; one
    assert floors["bias + GELU"] == pytest.approx(2 * INNER, rel=0.01)
    assert floors["bias + GELU, backward"] == pytest.approx(4 * INNER, rel=0.01)  # gradient, u; GELU, d_u
    assert all(row.over >= 1 and row.eager[1] >= row.floor[1] for row in found.values())
    far = [name for name, row in found.items() if row.over > MARGIN and not name.startswith("views")]
    assert far == ["bias + GELU, backward"]
    assert found["bias + GELU, backward"].over < 1.3  # d_u is read once more, for the sum over its rows
    assert found["residual + LayerNorm"].gpu[0] == found["bias + GELU"].gpu[0] == 1


@needs_torch
@needs_triton
def test_our_views_stand_beside_what_is_generated_and_save_in_the_backward() -> None:
    found = {row.name: row for row in map(partial(count, rows=ROWS), fusions()[4:])}

    for name in ("views, whole and covered", "views, whole and dropped"):
        forward, backward = found[name], found[f"{name}, backward"]
        assert forward.ours is not None and backward.ours is not None
        assert forward.ours[0] == 1 and forward.ours[1] == pytest.approx(forward.floor[1], rel=0.01)
        assert forward.gpu == (1, forward.floor[1])  # as good: written so that all of it is one pointwise kernel
        assert backward.ours[0] == 3  # and two sums over chunks of images
        assert backward.ours[1] < 1.05 * backward.floor[1] < 0.8 * backward.gpu[1]
        assert "saves nothing" in lines([forward])[1] and "of the bytes" in lines([backward])[1]


def test_the_backward_is_that_of_autograd_and_reads_no_leaf() -> None:
    x, weight, gradient = torch.randn(5, 3), torch.randn(3), torch.randn(5, 3)
    piece = backward_of(lambda a, b, scale: (a + b) * scale, [x, weight], [gradient, x])

    of_x, of_weight = piece(gradient, x)

    torch.testing.assert_close(of_x, gradient * x)
    torch.testing.assert_close(of_weight, (gradient * x).sum(0))
    assert "add" not in str(piece.graph)  # type: ignore[attr-defined]


@needs_torch
def test_a_pass_more_is_counted() -> None:
    x = torch.ones(512, 64, device="meta")

    assert planned(lambda x: (x + 1,), [x], "cuda") == (1, 2 * x.nbytes)
    launches, size = planned(lambda x: (x + 1, x.sum(0)), [x], "cuda")
    assert launches > 1 and size >= 3 * x.nbytes


def test_the_table_says_where_a_kernel_could_save() -> None:
    row = Row("a piece", (4, 40 * MIB), (3, 30 * MIB), (2, 25 * MIB), (1, 20 * MIB))
    text = "\n".join(lines([row, Row("another", (2, MIB), (1, MIB), (1, MIB), (1, MIB))]))

    assert "1.25  a kernel could save 20% of the bytes" in text and "1.00  nothing to gain" in text
    assert [f.name for f in fusions()][:2] == ["residual + LayerNorm", "residual + LayerNorm, backward"]
