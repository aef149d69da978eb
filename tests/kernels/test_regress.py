"""The regression check catches what it is there for, and its baseline is that of the kernels as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from mvle_kernels import compiled, regress
from mvle_kernels.compiled import FIGURES, instructions, resources
from mvle_kernels.triton_support import launch

from .kernel_checks import needs_triton

ROOT = Path(__file__).resolve().parents[2]
NAME = "file / variant / kernel / sm_90 aligned"
LOOSE = "file / variant / kernel / sm_90 unaligned"


def python(*command: str, seconds: int = 300, **settings: str) -> subprocess.CompletedProcess[str]:
    """A process without the interpreter of kernels, but for what the settings say."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")} | settings
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """What the check finds in planted_triton.py."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = python("-c", "from tests.kernels import planted_triton; planted_triton.main()")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of(found: dict[str, Any], *words: str) -> Any:
    """The figures of the only name that has all of these words in it."""
    (name,) = [n for n in found["figures"] if all(word in n for word in words)]
    return found["figures"][name]


def some(**figures: int) -> dict[str, int]:
    return {**dict.fromkeys(FIGURES, 0), "registers": 100, "shared": 1024, **figures}


# ---- the rules, on figures made up ----------------------------------------------------------------------------------


def said(before: dict[str, int], now: dict[str, int] | str, name: str = NAME) -> str:
    return "\n".join(regress.differences({name: before}, {name: now}))


def test_the_same_figures_are_no_difference() -> None:
    everything = some(load16=4, load8=2, load1=3, store16=1, store8=1, store1=1, mma=8, wgmma=4, warps=4, BLOCK_K=64)
    assert regress.differences({NAME: everything}, {NAME: everything}) == []


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({}, {"stack": 8}, "stack 8 bytes: registers spill"),
        ({"stack": 8}, {"stack": 8}, "stack 8 bytes: registers spill"),  # no baseline excuses it
        ({}, {"shared": 227 * 1024 + 1}, "shared 232449 bytes: sm_90 has 232448"),
        ({}, {"tmem": 513}, "tmem 513 columns: sm_90 has 512"),
        ({}, {"registers": 111}, "registers 100 -> 111: more than a tenth up"),
        ({"load16": 4}, {"load16": 3}, "load16 4 -> 3: vector accesses are lost"),
        ({"load16": 4}, {"load8": 8}, "load16 4 -> 0: vector accesses are lost"),  # more of them, and narrower
        ({"load8": 4}, {}, "load16 and load8 32 -> 0 bytes: vector accesses are lost"),
        ({"load8": 8, "load16": 1}, {"load16": 2}, "load16 and load8 80 -> 32 bytes: vector accesses are lost"),
        ({"store8": 4}, {"store16": 1}, "store16 and store8 32 -> 16 bytes: vector accesses are lost"),
        ({"load16": 4, "load1": 10}, {"load16": 4, "load1": 12}, "load1 10 -> 12 beside 64 -> 64 bytes: more accesses"),
        ({"store16": 4}, {"store16": 8, "store1": 1}, "store1 0 -> 1 beside 64 -> 128 bytes: more accesses are narrow"),
        ({"store16": 2}, {"store16": 1, "store8": 2}, "store16 2 -> 1: vector accesses are lost"),
        ({"mma": 8}, {"mma": 7}, "mma 8 -> 7: tensor-core instructions are lost"),
        ({"wgmma": 4}, {"mma": 64}, "wgmma 4 -> 0: tensor-core instructions are lost"),  # an older kind in its place
        ({"BLOCK_K": 64}, {"BLOCK_K": 256}, "launch changed: BLOCK_K 64 -> 256. If that is meant: python -m"),
        ({"warps": 4, "WHOLE": 1}, {"warps": 2}, "launch changed: WHOLE 1 -> 0, warps 4 -> 2. If"),
    ],
)
def test_each_rule_catches_its_loss(before: dict[str, int], now: dict[str, int], expected: str) -> None:
    found = said(some(**before), some(**now))
    assert found.startswith(f"{NAME}: {expected}") and "\n" not in found


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"registers": 110}),  # a tenth
        ({"registers": 100}, {"registers": 40}),
        ({"load8": 4, "load1": 3}, {"load16": 2, "load1": 3}),  # wider
        ({"load16": 4, "load1": 10}, {"load16": 4, "load1": 11}),
        ({"load16": 4, "load1": 10}, {"load16": 8, "load1": 20}),  # twice unrolled
        ({"load1": 10}, {"load1": 20}),  # no vectors to be lost
        ({"load16": 2}, {"load16": 4}),
        ({"mma": 8}, {"wgmma": 2}),  # a newer kind
        ({"stack": 8}, {}),
    ],
)
def test_what_is_no_worse_passes(before: dict[str, int], now: dict[str, int]) -> None:
    assert said(some(**before), some(**now)) == ""


def test_only_what_a_step_launches_must_not_spill() -> None:
    assert said(some(stack=8), some(stack=8), LOOSE) == ""
    assert said(some(), some(stack=8), LOOSE).endswith("stack 0 -> 8 bytes: more than before")
    assert said(some(shared=1024), some(shared=4096)).endswith("shared 1024 -> 4096 bytes: more than before")


def test_what_is_new_or_gone_or_does_not_compile_fails() -> None:
    assert "is in the baseline and launched no more" in "".join(regress.differences({NAME: some()}, {}))
    new = regress.differences({}, {NAME: some(stack=16)})
    assert len(new) == 2 and "stack 16" in new[0] and "not in the baseline" in new[1] and "--write" in new[1]
    assert "does not compile: CompilationError: why" in said(some(), "CompilationError: why")


# ---- what is read from a binary -------------------------------------------------------------------------------------


def test_instructions_are_counted_by_width_and_kind() -> None:
    found = instructions(
        """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.L2::cache_hint.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ], %rd9;
        ld.global.v2.b64 { %rd1, %rd2 }, [ %rd3 ];  ld.global.v2.b16 { %rs1, %rs2 }, [ %rd3 ];
        ld.global.b32 %r1, [ %rd1 ];
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
        cp.async.cg.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x10, %r10;
        cp.async.ca.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x8, 0x8;
        cp.async.ca.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x4, 0x4;
        st.global.b16 [ %rd1 + 0 ], { %rs1 };  st.global.L1::evict_last.b8 [ %rd1 + 0 ], { %rs1 };
        st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {};
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {};  wgmma.wait_group.sync.aligned 0;
        tcgen05.mma.cta_group::1.kind::f16 [ %r1 ];  tcgen05.ld.sync.aligned.32x32b.x64.b32 {};
        """
    )
    tensor = {"mma": 1, "wgmma": 1, "tcgen05": 1}
    loads, stores = {"load16": 3, "load8": 2, "load1": 3}, {"store16": 1, "store8": 0, "store1": 2}
    assert found == loads | stores | tensor


def test_registers_and_stack_are_read() -> None:
    usage = " Function k:\n  REG:56 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:464 TEXTURE:0"
    assert resources(usage) == {"registers": 56, "stack": 24}


def test_each_architecture_multiplies_by_its_own_instruction(planted: dict[str, Any]) -> None:
    for architecture, kind in (("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        found = of(planted, "/ product /", f"{architecture} aligned")
        assert [name for name in ("mma", "wgmma", "tcgen05") if found[name]] == [kind]
        assert found["load16"] > 0 and found["store16"] > 0 and found["shared"] > 0 and found["stack"] == 0
        assert (found["tmem"] > 0) == (architecture == "sm_100")


def test_hints_are_those_of_a_launch_and_the_unaligned_has_none(planted: dict[str, Any]) -> None:
    assert planted["constants"] == ["step", "T"]  # a number that is 1; `total` is 1 too, and asked not to be one
    assert planted["hinted"] == ["a", "b", "out", "stride_a", "stride_b", "stride_out"]
    assert of(planted, "/ product /", "sm_90 unaligned")["load16"] == 0


def test_what_a_choice_decides_is_told_of_a_launch(planted: dict[str, Any]) -> None:
    assert planted["launched"] == {"warps": 4, "stages": 3, "programs": 1, "T": 64}


def test_equal_launches_are_compiled_once(planted: dict[str, Any]) -> None:
    names = planted["figures"]
    twice = [name for name in names if "the same product" in name]
    assert len(twice) == 4 and planted["different"] == len(names) - len(twice)
    assert all(names[name] == names[name.replace("the same product", "product")] for name in twice)


def test_names_are_of_one_variant_each_and_variants_launch() -> None:
    idle = SimpleNamespace(__name__="a.b_triton", variants=lambda: [("idle", lambda: None)])
    with pytest.raises(ValueError, match="'b_triton / idle' launches nothing"):
        list(regress.sources([idle]))
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="k"))
    call = lambda: [launch(kernel, (1,), {}) for _ in range(2)]  # noqa: E731
    busy = SimpleNamespace(__name__="a.b_triton", variants=lambda: [("busy", call), ("busy", call)])
    with pytest.raises(ValueError, match="two variants are called 'b_triton / busy'"):
        list(regress.sources([busy], only="none of them"))
    assert [name for name, _ in regress._launches(call, "sm_90")] == ["k", "k 2"]


# ---- what is planted is caught --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """Stands for a source."""

    key: str
    launched: ClassVar = {"warps": 4, "BLOCK": 8192}


@pytest.fixture
def checked(planted: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The whole check over the good part of what is planted, with any more, as if compiled again."""

    def run(*also: str, **options: Any) -> int:
        now = {
            n: f for n, f in planted["figures"].items() if "product" in n or "eight" in n or any(a in n for a in also)
        }
        only = options.get("only", "")
        monkeypatch.setattr(regress, "sources", lambda *_: ((n, Made(n)) for n in now if only in n))
        monkeypatch.setattr(regress, "compile_all", lambda wanted: [now[item.key] for item in wanted])
        return regress.check([], tmp_path, **options)

    return run


@needs_triton
def test_no_baseline_is_a_failure_that_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert regress.check([], tmp_path) == 1
    assert "missing" in (text := capsys.readouterr().out) and "python -m mvle_kernels.regress --write" in text


def test_a_baseline_passes_until_one_of_its_figures_is_lost(
    checked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(rewrite=True) == 0 and checked() == 0
    (file,) = tmp_path.glob("triton-*.json")
    good = regress.read(file)
    for figure, change, words in (
        ("registers", 0.5, "more than a tenth up"),
        ("load16", 2, "vector accesses are lost"),
        ("wgmma", 2, "tensor-core instructions are lost"),
        ("BLOCK", 0.5, "launch changed: BLOCK 4096 -> 8192"),
    ):
        name = next(n for n in good if "product" in n and n.endswith("sm_90 aligned"))
        regress.write(file, good | {name: good[name] | {figure: int(good[name][figure] * change)}})
        capsys.readouterr()
        assert checked() == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and lines[2].startswith(f"{name}: ") and figure in lines[2] and words in lines[2]


def test_a_spill_is_caught_and_no_baseline_excuses_it(checked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(rewrite=True) == 0
    assert checked("one warp") == 1
    assert "registers spill" in (text := capsys.readouterr().out) and "not in the baseline" in text
    assert checked("one warp", rewrite=True) == 1 and checked("one warp") == 1
    assert "not in the baseline" not in (text := capsys.readouterr().out) and "registers spill" in text


def test_what_does_not_compile_is_never_written(
    checked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked("broken", rewrite=True) == 1
    assert "does not compile: CompileTimeAssertionFailure: BLOCK must be 3" in capsys.readouterr().out
    (file,) = tmp_path.glob("triton-*.json")
    assert not any("broken" in name for name in regress.read(file))


def test_a_part_alone_leaves_the_rest_of_the_baseline(checked: Any, tmp_path: Path) -> None:
    assert checked(rewrite=True) == 0
    (file,) = tmp_path.glob("triton-*.json")
    whole = file.read_text()
    assert checked(only="eight", rewrite=True) == 0 and file.read_text() == whole
    assert checked(only="eight") == 0 and checked(only="nothing of that name") == 1
    gone = {"file / row of eight warps, once / kernel / sm_90 aligned": some()}
    regress.write(file, regress.read(file) | gone)
    assert checked(only="eight") == 1
    assert checked(only="eight", rewrite=True) == 0 and file.read_text() == whole


def test_a_list_shows_every_figure(checked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(show=True) == 1  # there is no baseline
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert head == [*FIGURES, "launch"] and len(rows) == 10
    assert all(row[-2] == "warps=4" and row[-1] == "BLOCK=8192" and row[-len(head) - 1].isdigit() for row in rows)


def test_a_compiler_that_dies_is_named_and_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compiled, "figures", lambda item: os._exit(1) if item.key == "b" else {"registers": ord(item.key)}
    )
    found = compiled.compile_all([Made(key) for key in "abcda"], processes=2)  # type: ignore[misc]
    assert found == [{"registers": 97}, "the compiler died", {"registers": 99}, {"registers": 100}, {"registers": 97}]


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(regress, "INSTALLED", False)
    assert regress.main([]) == 1 and "triton is not installed" in capsys.readouterr().out


# ---- the kernels ----------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_as_well_as_its_baseline_says() -> None:
    # with the interpreter demanded, as in `make test`: the check has to begin again without it
    done = python("-m", "mvle_kernels.regress", seconds=900, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "binaries" in done.stdout
