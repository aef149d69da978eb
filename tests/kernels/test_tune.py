"""The tuner: what it tries, what it drops, what it writes. Only the time is made up; kernels run where they can."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mvle_kernels import launches, tune
from mvle_kernels.triton_support import Launch, captured, interpreting
from mvle_kernels.tune import Bench, candidates, merged, same

from .kernel_checks import DEVICE, needs_triton

KEY = "double float32 x24"
RULE = {"BLOCK_X": 32, "num_warps": 2, "num_stages": 1}


def toy(*rows: int) -> Any:
    """A file of kernels with one kernel, launched on so many rows of 24 values."""
    from .planted_triton import doubled

    def variants(device: str = "meta") -> Any:
        for n in rows:
            x = torch.ones(n, 24, device=device)
            yield f"{n} rows", lambda x=x: doubled(x)

    return SimpleNamespace(__name__="toy_triton", variants=variants)


def bench(
    cost: Callable[[Launch], float], fits: Callable[[Launch], bool] = lambda _: True, calls: list[Launch] | None = None
) -> Bench:
    """Times by a formula, on this device."""

    def seconds(call: Callable[[], object]) -> float:
        with captured() as made:
            call()
        if calls is not None:
            calls.extend(made)
        return cost(made[0])

    def all_fit(made: Sequence[Sequence[Launch]]) -> list[bool]:
        return [all(map(fits, launched)) for launched in made]

    return Bench("sm_90", str(DEVICE), seconds, all_fit)


def block(launch: Launch) -> int:
    return launch.arguments["BLOCK_X"]


# ---- what is tried --------------------------------------------------------------------------------------------------


def test_the_rule_is_tried_first_and_each_block_halved_and_doubled_alone() -> None:
    near = candidates({"BLOCK_Q": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2})
    assert near[0] == {"BLOCK_Q": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    assert {(c["BLOCK_Q"], c["BLOCK_K"]) for c in near} == {(64, 16), (32, 16), (128, 16), (64, 32)}  # 8 is too small
    assert {c["num_warps"] for c in near} == {1, 2, 4, 8} and {c["num_stages"] for c in near} == {1, 2, 3}
    assert len(near) == len({tuple(c.items()) for c in near}) == 4 * 4 * 3


def test_other_values_of_a_config_stay() -> None:
    assert {c["SPLITS"] for c in candidates({"SPLITS": 8, "BLOCK_X": 32})} == {8}


# ---- what is dropped ------------------------------------------------------------------------------------------------


def test_results_agree_to_roundings_and_in_what_is_not_a_number() -> None:
    x = torch.tensor([1.0, 2.0, float("nan")])
    assert same((x, None), (x + 1e-6, None)) and same([x.bfloat16()], [x.bfloat16() + 2**-7])
    assert not same(x, x + 1e-2) and not same(x, x.nan_to_num()) and not same(x, x[:2]) and not same(x, x.double())
    assert same(torch.arange(3), torch.arange(3)) and not same(torch.arange(3), torch.arange(1, 4))
    assert not same(None, x)


@needs_triton
def test_a_block_that_no_longer_holds_a_row_is_dropped_however_fast(tmp_path: Path) -> None:
    tune.tune([toy(3)], bench(cost=lambda made: block(made)), tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == {}


@needs_triton
def test_a_config_that_is_wrong_in_one_variant_is_dropped_though_right_in_another(tmp_path: Path) -> None:
    from .planted_triton import doubled

    def variants(device: str = "meta") -> Any:
        x = torch.ones(3, 24, device=device)
        yield "right", lambda: doubled(x)
        # a result that shows the config: equal to the rule's with its own block alone
        chosen = lambda: launches.config("double", x.device, x.dtype, {"x": 24}, RULE)  # noqa: E731
        yield "wrong", lambda: (doubled(x), torch.full((1,), chosen()["BLOCK_X"]))

    two = SimpleNamespace(__name__="two_triton", variants=variants)
    tune.tune([two], bench(lambda made: 1 / block(made)), tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == {}


@needs_triton
def test_what_does_not_fit_is_never_timed(tmp_path: Path) -> None:
    timed: list[Launch] = []
    fast = bench(lambda made: 1 / made.warps, fits=lambda made: made.warps < 8, calls=timed)
    tune.tune([toy(3)], fast, tmp_path / "t.json")
    assert {made.warps for made in timed} == {1, 2, 4}
    assert json.loads((tmp_path / "t.json").read_text())["sm_90"][KEY]["num_warps"] == 4


def test_a_compiled_call_fits_if_all_its_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ((0, 227 * 1024, 512), (4, 0, 0), (0, 227 * 1024 + 1, 0), (0, 0, 1024))
    good, spilled, large, long = ({"stack": s, "shared": m, "tmem": t} for s, m, t in limits)
    monkeypatch.setattr(tune, "source", lambda launch, architecture, aligned: (launch, architecture, aligned))
    monkeypatch.setattr(tune, "compile_all", lambda wanted: [launch for launch, _, _ in wanted])
    calls: Any = [[good], [good, spilled], [large], [long], ["does not compile"], [good, good]]
    assert tune.compiled_well("sm_90", calls) == [True, False, False, False, False, True]
    assert tune.compiled_well("sm_89", [calls[0]]) == [False]


# ---- what is chosen and written -------------------------------------------------------------------------------------


@needs_triton
def test_the_fastest_right_config_is_written_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "launches.json"
    monkeypatch.setattr(launches, "TABLE", file)
    best = {"BLOCK_X": 64, "num_warps": 8, "num_stages": 3}
    cost = lambda made: 2 - (block(made) == 64) * (made.warps == 8) * (made.stages == 3)  # noqa: E731
    assert tune.tune([toy(3)], bench(cost), file) == 0
    assert json.loads(file.read_text()) == {"sm_90": {KEY: best}}
    with launches.target("sm_90"):
        assert launches.config("double", DEVICE, torch.float32, {"x": 24}, RULE) == best
    launches.table.cache_clear()


@needs_triton
def test_two_percent_are_not_worth_an_entry(tmp_path: Path) -> None:
    tune.tune([toy(3, 5)], bench(lambda made: 0.98 if made.warps == 4 else 1), tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == {}


@needs_triton
def test_variants_of_one_key_are_judged_together(tmp_path: Path) -> None:
    # 4 warps halve the time of 3 rows and treble that of 5; 8 warps gain a little in both
    factors = {(3, 4): 0.5, (5, 4): 3, (3, 8): 0.9, (5, 8): 0.9}
    cost = lambda made: factors.get((made.grid[0], made.warps), 1)  # noqa: E731
    tune.tune([toy(3, 5)], bench(cost), tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["sm_90"][KEY]["num_warps"] == 8


@needs_triton
def test_configs_take_turns_and_the_median_decides(tmp_path: Path) -> None:
    timed: list[Launch] = []
    # each fifth run is disturbed, so each config's in turn, and 4 warps are faster in all others
    cost = lambda made: 100 if len(timed) % 5 == 0 else 0.5 if made.warps == 4 else 1  # noqa: E731
    tune.tune(
        [toy(3)], bench(cost, fits=lambda made: made.stages == 1 and block(made) == 32, calls=timed), tmp_path / "t"
    )
    assert [made.warps for made in timed] == [2, 1, 4, 8] * tune.ROUNDS
    assert json.loads((tmp_path / "t").read_text())["sm_90"][KEY]["num_warps"] == 4


def test_a_table_keeps_other_architectures_and_other_keys() -> None:
    table = {"sm_80": {"a": {"B": 1}}, "sm_90": {"a": {"B": 2}, "b": {"B": 3}, "c": {"B": 4}}}
    found = merged(table, "sm_90", {"b": {"B": 5}, "c": None})
    assert found == {"sm_80": {"a": {"B": 1}}, "sm_90": {"a": {"B": 2}, "b": {"B": 5}}}
    assert merged({}, "sm_90", {"a": None}) == {}


@needs_triton
def test_files_without_tensors_of_a_device_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = SimpleNamespace(__name__="old_triton", variants=list)
    assert tune.tune([old, toy(3)], bench(lambda _: 1), tmp_path / "t.json", only="nothing") == 1
    said = capsys.readouterr().out
    assert "old_triton: variants() takes no device" in said and "no key has 'nothing' in it" in said


@needs_triton
def test_variants_that_ask_for_one_key_are_one_entry() -> None:
    from mvle_kernels import pixel_loss_triton

    found = tune.entries([pixel_loss_triton], "sm_90")
    (entry,) = found.values()
    assert list(found) == ["pixel_loss bfloat16 x768"] and len(entry.variants) == 4


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 1 and "needs a GPU" in capsys.readouterr().out


@pytest.mark.gpu
@needs_triton
def test_it_tunes_on_the_gpu_that_is_there(tmp_path: Path) -> None:
    assert not interpreting()
    assert tune.tune([toy(1000)], tune.on_gpu(), tmp_path / "t.json") == 0
