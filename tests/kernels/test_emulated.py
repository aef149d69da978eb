"""The header that runs CUDA kernels on a CPU: what it finds, and that what is right passes (emulated_kernels.cu)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mvle_kernels import compiled_cuda
from torch import Tensor

SOURCE = Path(__file__).with_name("emulated_kernels.cu")
SEEDS = range(20)
Run = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(kernel, ..., seed=0): tensors and numbers as the kernel takes them. RuntimeError: what was found."""
    build = compiled_cuda.builder()
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    try:
        flags = [*build.emulated_flags(), "-I", str(build.HERE / "cuda")]
    except build.Missing as missing:
        pytest.skip(str(missing))
    build.run([*flags, "-shared", str(SOURCE), "-o", str(library)])
    kernels = ctypes.CDLL(str(library))

    def call(kernel: str, *arguments: Tensor | int, seed: int = 0) -> None:
        start = getattr(kernels, kernel)
        start.restype = ctypes.c_char_p
        given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_uint32(a) for a in arguments]
        if said := start(ctypes.c_uint64(seed), *given):
            raise RuntimeError(said.decode())

    yield call


# ---- the order of threads -------------------------------------------------------------------------------------------


def test_threads_take_turns_in_an_order_that_its_seed_decides(run: Run) -> None:
    def order(seed: int) -> list[int]:
        out = torch.full((128,), -1, dtype=torch.int32)
        run("turns", out, 64, seed=seed)
        assert sorted(out[:64].tolist()) == sorted(out[64:].tolist()) == list(range(64))
        return out.tolist()

    first = order(0)
    assert order(0) == first and order(1) != first and first[:64] != first[64:]


def test_blocks_come_from_either_end_of_the_grid(run: Run) -> None:
    orders = set()
    for seed in SEEDS:
        out = torch.full((5,), -1, dtype=torch.int32)
        run("turns_of_blocks", out, seed=seed)
        orders.add(tuple(out.tolist()))
    assert orders == {(0, 1, 2, 3, 4), (4, 3, 2, 1, 0)}


def test_a_missing_barrier_shows_for_some_seed_and_none_that_is_there(run: Run) -> None:
    expected = torch.arange(1, 65).remainder(64).float().repeat(2)
    some = False
    for seed in SEEDS:
        out = torch.zeros(128)
        run("neighbours", out, 64, 1, seed=seed)
        assert out.equal(expected)
        run("neighbours", out, 64, 0, seed=seed)
        early = out.isnan()  # read before it was written
        assert out[~early].equal(expected[~early])
        some |= bool(early.any())
    assert some


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_sums_of_a_block_are_the_same_in_every_thread_and_order(run: Run, threads: int) -> None:
    values = torch.randn(threads, generator=torch.Generator().manual_seed(0))
    first = None
    for seed in SEEDS:
        out = torch.zeros(2, threads)
        run("two_sums", values, out, threads, seed=seed)
        first = out if first is None else first
        assert out.equal(first) and out.eq(out[:, :1]).all()
    assert first is not None and first[1, 0] == values.max()
    torch.testing.assert_close(first[0, 0], values.sum())


def test_a_maximum_keeps_what_is_not_a_number(run: Run) -> None:
    for at in (0, 31, 50):
        values, out = torch.zeros(96), torch.zeros(2, 96)
        values[at] = float("nan")
        run("two_sums", values, out, 96)
        assert out.isnan().all()


def test_sums_of_a_few_lanes_are_those_of_neighbours(run: Run) -> None:
    values, out = torch.arange(32).float(), torch.zeros(32)
    run("sum_of_groups", values, out)
    assert out.view(4, 8).equal(values.view(4, 8).sum(1, keepdim=True).expand(4, 8))


# ---- who does not come ----------------------------------------------------------------------------------------------


def test_a_barrier_that_some_threads_do_not_reach_is_an_error_that_says_who_waits(run: Run) -> None:
    run("barrier_for_some", 64, 64)
    run("barrier_for_some", 64, 0)
    with pytest.raises(
        RuntimeError,
        match=r"barrier_for_some, block 0: threads wait .*: thread 0 is in __syncthreads; "
        "thread 40 has ended$",
    ):
        run("barrier_for_some", 64, 40)


def test_an_early_exit_before_a_barrier_is_an_error(run: Run) -> None:
    with pytest.raises(RuntimeError, match="early_exit, block 1: .* thread 17 has ended; thread 18 is in __sync"):
        run("early_exit", 17)
    run("early_exit", 64)  # nobody; and behind an error all is as before


def test_a_warp_of_which_some_are_at_a_barrier_and_some_in_a_shuffle_waits_for_ever(run: Run) -> None:
    with pytest.raises(RuntimeError, match="thread 0 is in __syncthreads; thread 40 is in __shfl_sync"):
        run("barrier_and_shuffle")


def test_a_shuffle_reads_lanes_that_are_in_its_mask_and_in_the_block_alone(run: Run) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    run("shuffle", out, 64, 2**32 - 1, 7)
    assert out.view(2, 32).tolist() == [[7] * 32, [39] * 32]
    run("shuffle", out, 16, 2**16 - 1, 3)
    assert out[:16].eq(3).all()
    for lane, said in ((20, "lane 20"), (2**32 - 1, "lane -1"), (32, "lane 32")):
        with pytest.raises(RuntimeError, match=f"shuffle, block 0: __shfl_sync reads {said}, which is not in the mask"):
            run("shuffle", out, 16, 2**16 - 1, lane)
    with pytest.raises(RuntimeError, match="__shfl_sync: the mask names a lane that the block lacks"):
        run("shuffle", out, 16, 2**32 - 1, 3)
    with pytest.raises(RuntimeError, match="__shfl_sync: a lane names a mask without itself"):
        run("shuffle", out, 32, 2**16 - 1, 3)


def test_lanes_that_meet_must_be_in_one_operation_with_one_mask(run: Run) -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=r"lanes of a warp meet in different operations: thread \d+ is in __"):
            run("different_operations", seed=seed)
        with pytest.raises(RuntimeError, match="different operations|names a mask without itself|do not come"):
            run("different_masks", seed=seed)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [0, 1, 4095])
@pytest.mark.parametrize("size", [0, 4, 100])
def test_shared_memory_written_behind_its_end_is_an_error_that_says_how_far(run: Run, size: int, behind: int) -> None:
    with pytest.raises(RuntimeError, match=f"write_behind, block 0: shared memory is written {behind} bytes behind"):
        run("write_behind", size, behind)


def test_shared_memory_is_not_a_number_before_every_block(run: Run) -> None:
    out = torch.zeros(32)
    run("inherit", out)
    assert out.isnan().all()


def test_a_vector_at_an_address_that_is_none_of_its_size_is_an_error(run: Run) -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 16 :]
    for what, name, size in (
        (0, "load16", 16),
        (1, "store16", 16),
        (2, "load8", 8),
        (3, "load16", 16),
        (4, "store16", 16),
    ):
        run("vectors", memory, what)
        with pytest.raises(RuntimeError, match=f"vectors, block 0: {name}: the address is not a multiple of {size}"):
            run("vectors", memory[4:], what)
    run("vectors", memory[8:], 2)


def test_a_copy_of_nothing_is_zeros_and_reads_no_memory(run: Run) -> None:
    out = torch.ones(4)
    run("copy_nothing", out)
    assert out.eq(0).all()


def test_what_no_device_could_launch_is_an_error(run: Run) -> None:
    run("nothing", 1024, 163 << 10)
    for threads, size in ((0, 0), (1025, 0), (32, (163 << 10) + 1)):
        with pytest.raises(RuntimeError, match=f"no device takes a launch of {threads} threads, {size} bytes"):
            run("nothing", threads, size)


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [0, 1])
def test_a_product_of_a_warp_is_the_plain_one_whoever_loaded_its_fragments(run: Run, by_hand: int) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=draw).bfloat16() for n in (16, 8))
    for seed in range(3):
        d = torch.zeros(16, 8)
        run("product", a, b, d, by_hand, seed=seed)
        torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_product_needs_the_whole_warp_and_matrices_lie_in_shared_memory(run: Run) -> None:
    with pytest.raises(RuntimeError, match="thread 0 is in mma.m16n8k16; thread 16 has ended"):
        run("product_of_half_a_warp")
    with pytest.raises(RuntimeError, match="ldmatrix: a row is not in shared memory"):
        run("matrices_of_global_memory", torch.zeros(64, dtype=torch.bfloat16))
