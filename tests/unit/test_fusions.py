"""What a hand-written kernel could save over torch.compile is counted, and is what docs/decisions.md rests on."""

from __future__ import annotations

import pytest
import torch

from benchmarks.counts import release
from benchmarks.fusions import MARGIN, ROWS, Row, fusions, lines, planned, table

needs_torch = pytest.mark.skipif(
    release() != "2.14", reason=f"what inductor plans is known of torch 2.14; this is {torch.__version__}"
)
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
    assert [name for name, row in found.items() if row.over > MARGIN] == ["bias + GELU, backward"]
    assert found["bias + GELU, backward"].over < 1.3  # d_u is read once more, for the sum over its rows
    assert found["residual + LayerNorm"].gpu[0] == found["bias + GELU"].gpu[0] == 1


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
