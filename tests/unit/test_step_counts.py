"""What a step of tiny does, counted, is what the committed baseline says."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch

from benchmarks.counts import BASELINE, REPRODUCE, count, differences, graph_breaks, release, step_counts
from benchmarks.switches import SWITCHES


def test_no_count_of_a_step_has_changed() -> None:
    baseline = json.loads(BASELINE.read_text())
    same = baseline["torch"] == release()

    changed = differences(step_counts(), baseline["counts"], same)

    assert not changed, "\n".join([*changed, f"If that is meant: {REPRODUCE}, and say why in the commit."])


def test_the_baseline_has_every_switch() -> None:
    rows = json.loads(BASELINE.read_text())["counts"]["replace"]

    assert {f"without: {name}" for name in SWITCHES} <= rows.keys()


def test_one_launch_or_one_flop_more_is_a_difference() -> None:
    old = {"replace": {"ours": {"flops": 100, "launches": 7, "bytes": 9}}}
    for name in ("flops", "launches", "bytes"):
        new = deepcopy(old)
        new["replace"]["ours"][name] += 1

        assert any(f"ours: {name}" in line for line in differences(new, old, same_torch=True))
        assert bool(differences(new, old, same_torch=False)) == (name == "flops")
    assert differences({"replace": {}}, old, True) == ["replace: ours: is no longer counted"]
    assert differences(old, {"replace": {}}, True) == ["replace: ours: is not in the baseline"]


def test_counts_are_those_of_the_arithmetic() -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 2)

    product = count(lambda: (a @ b).t().add_(1))
    attention = count(lambda: torch.nn.functional.scaled_dot_product_attention(*[torch.ones(2, 3, 5, 16)] * 3))

    assert product.flops == 2 * 4 * 8 * 2
    assert product.launches == 2  # the product and the sum, not the view
    assert product.bytes == 4 * (4 * 8 + 8 * 2 + 4 * 2) + 4 * (2 * 8)
    assert attention.flops == 2 * 2 * (2 * 3) * 5 * 5 * 16


def test_a_row_that_is_expanded_is_read_once() -> None:
    row = torch.ones(1, 6)

    assert count(lambda: row.expand(50, 6) * 2).bytes == 4 * (6 + 50 * 6)


def test_a_graph_break_is_seen_and_a_step_that_compiles_nothing_is_refused() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        print(end="")
        torch._dynamo.graph_break()
        return x + 1

    def step_of():
        compiled = torch.compile(broken)
        return lambda: compiled(torch.ones(3))

    assert graph_breaks(step_of) > 0
    with pytest.raises(ValueError, match="saw nothing"):
        graph_breaks(lambda: lambda: None)
