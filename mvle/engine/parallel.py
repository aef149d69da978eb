"""Ranks: the process group, the mesh, how the model is sharded, and the few words that ranks exchange.

One rank needs none of this: no process group, no sharding (sharding it costs a third of a small step and does nothing).
From two ranks on the model is sharded by FSDP2. On a GPU weights are bfloat16 in a forward: by the policy of FSDP, or
on one rank by half_weights.py, which does the same in a few launches.

Gradients: FSDP averages over ranks. A loss that is already divided by global counts must therefore be multiplied by
`Parallel.ranks` before its backward.

How long ranks wait for one another: parallel.first_timeout until the first step is done, then parallel.timeout. Over
that watches `Watch`, which names who is late; the process group's own timeout comes MARGIN later and names nobody.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from ..section import Section
from .half_weights import HalfWeights
from .host_memory import hold_freed_memory

MARGIN = 30.0  # seconds that a process group waits longer than the watch over ranks does
# entries of the model beside `forward`
FORWARD_METHODS = ("encode_images", "encode_texts", "match", "fill", "reconstruct", "contrast_embeddings")
# What a cluster wants of CUDA and NCCL, where nobody has set it. NCCL's flight recorder is on by default (2000 events).
CUDA_ENVIRONMENT = {
    ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"): "expandable_segments:True",  # rows of packed batches vary
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",  # what the flight recorder holds, to a file
}


class ParallelError(ValueError):
    """Ranks, mesh and machine that do not fit one another."""


class BatchConfig(Section):
    """How many pairs make a step."""

    total: int = Field(512, gt=0, description="pairs of one optimizer step, over all ranks")
    micro: int | None = Field(
        None, gt=0, description="pairs of one forward on one rank; null: all that the rank has of batch.total"
    )


class ParallelConfig(Section):
    """How ranks share the model. Without torchrun there is one rank."""

    shard: int | None = Field(
        None, gt=0, description="ranks that share one copy of the weights; null: ranks / parallel.replicate"
    )
    replicate: int = Field(1, gt=0, description="copies of the weights; shard x replicate is the number of ranks")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what a block computes again in its backward to save memory: nothing; all but matrix products and "
        "attention; everything",
    )
    first_timeout: float = Field(
        30,
        gt=0,
        description="minutes that ranks wait for a late one until the first step is done, and in saves and validation",
    )
    timeout: float = Field(5, gt=0, description="minutes that they wait afterwards; then the late rank is named")


class Parallel:
    """This process among its ranks. Make it with `Parallel.start`; as a context manager it ends cleanly.

    rank, ranks   number of this process, and how many there are
    device        where this rank computes
    mesh          the device mesh; None for one rank, which runs unsharded
    start_name    of this start of all ranks: no earlier one has used it for keys in their store
    first_timeout, timeout    seconds that ranks wait for one another before and after the first step
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        device: torch.device,
        shape: tuple[int, int] = (1, 1),
        first_timeout: float = 1800.0,
        timeout: float = 300.0,
    ) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.first_timeout, self.timeout = first_timeout, timeout
        self.settled = False  # whether the first step is done
        self.start_name = ""
        self.mesh: Any = None
        self.cpu_group: Any = None  # votes travel here, so that they never wait for a GPU
        if ranks > 1:
            self._join(shape)

    @classmethod
    def start(cls, config: ParallelConfig, device: str = "auto") -> Parallel:
        """Read torchrun's environment (none: one rank) and join the others.

        device is run.device. Raises ParallelError, before anything is joined, where the config does not fit the ranks
        or the machine, or where a process group exists already.
        """
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", rank))
        shape = mesh_shape(config, ranks)
        limits = (config.first_timeout * 60, config.timeout * 60)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            found = torch.cuda.device_count()
            if local >= found:
                raise ParallelError(
                    f"run.device=cuda needs a GPU for each rank of a machine; got rank {local} and {found} GPUs. Start "
                    f"{max(found, 1)} ranks a machine, or set run.device=cpu."
                )
            prepare_cuda()
            torch.cuda.set_device(local)
            return cls(rank, ranks, torch.device("cuda", local), shape, *limits)
        if ranks == 1:  # malloc may be told so only while no other thread is at it, and gloo has threads
            hold_freed_memory()
        return cls(rank, ranks, torch.device("cpu"), shape, *limits)

    def _join(self, shape: tuple[int, int]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        if dist.is_initialized():
            raise ParallelError("a process group exists already; Parallel makes its own and must be the only one.")
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        long = timedelta(seconds=self.first_timeout + MARGIN)
        store, self.start_name = meet(self.rank, self.ranks, long)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.ranks, timeout=long)
        self.cpu_group = dist.new_group(backend="gloo", timeout=long) if backend == "nccl" else dist.group.WORLD
        if shape[0] > 1:
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        else:
            self.mesh = init_device_mesh(self.device.type, (self.ranks,), mesh_dim_names=("shard",))
        self.set_timeouts(self.first_timeout)  # the groups of a mesh begin with torch's own

    # --- how long ranks wait ---

    def shorten_timeouts(self) -> None:
        """The first step is done on this rank: parallel.timeout from now on."""
        self.settled = True
        self.set_timeouts(self.timeout)

    def set_timeouts(self, seconds: float) -> None:
        """What is sent to other ranks from now on may take `seconds` and MARGIN."""
        if self.mesh is None:
            return
        # public since torch 2.14; before, a private function of the same meaning
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        for group in {dist.group.WORLD, self.cpu_group, *self.mesh.get_all_groups()}:
            set_timeout(timedelta(seconds=seconds + MARGIN), group)

    # --- the model ---

    @property
    def sharded(self) -> bool:
        """Whether `shard` does anything."""
        return self.mesh is not None

    def shard(self, model: nn.Module) -> nn.Module:
        """Shard the model in place, before its optimizer is built; returns it. One rank: it stays whole.

        Each of model.blocks_to_shard() is a unit of its own, and what is left is the root's. On a GPU weights are
        bfloat16 in a forward and gradients are reduced in float32; a module with `full_precision = True` stays in
        float32, as everything does on a CPU. Inputs are never cast: the model makes them in its weights' dtype.
        """
        if not self.sharded:
            if self.device.type == "cuda":
                model.half_weights = HalfWeights(model, ("forward", *FORWARD_METHODS))  # type: ignore[assignment]
            return model
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        full = MixedPrecisionPolicy(cast_forward_inputs=False)
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if self.device.type == "cuda" else full
        # 1) innermost first: a unit takes what is below it and not yet in another
        for module in model.modules():
            if getattr(module, "full_precision", False):
                fully_shard(module, mesh=self.mesh, mp_policy=full)
        # 2) blocks, so that one is gathered while another computes
        for block in model.blocks_to_shard():  # type: ignore[operator]
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        # 3) the root: embeddings, heads, what is small
        fully_shard(model, mesh=self.mesh, mp_policy=policy)
        for name in FORWARD_METHODS:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
        return model

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward: gradients are reduced over ranks in the last one alone."""
        if not self.sharded:
            half = getattr(model, "half_weights", None)
            with half.training() if half is not None else contextlib.nullcontext():
                yield
            return
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)  # type: ignore[operator]

    @staticmethod
    def reshard(model: nn.Module) -> None:
        """After a forward without backward (evaluation): give the root's parameters back their sharded form, without
        which neither optimizer nor checkpoint knows them."""
        if (reshard := getattr(model, "reshard", None)) is not None:
            reshard()

    # --- words between ranks ---

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place; it lives on `device`. The host does not wait."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_on_cpu(self, tensor: Tensor) -> Tensor:
        """A CPU tensor, of one shape everywhere, summed over ranks, in place; equal on every rank."""
        if self.ranks > 1:
            dist.all_reduce(tensor, group=self.cpu_group)
        return tensor

    def vote(self, flag: bool) -> bool:
        """True on every rank where it is true on any."""
        return bool(self.agree(int(flag)))

    def agree(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        if self.ranks == 1:
            return number
        ballot = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return int(ballot.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        self.agree(0)

    def stop(self) -> None:
        """Leave the process group."""
        if self.cpu_group is not None and dist.is_initialized():
            dist.destroy_process_group()
        self.mesh = self.cpu_group = None

    def __enter__(self) -> Parallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.barrier()  # rank 0 holds the store: it must not leave first
        elif self.ranks > 1:
            return  # the process is about to end: until then others may read in the store why
        self.stop()


def meet(rank: int, ranks: int, timeout: timedelta) -> tuple[dist.Store, str]:
    """The store of all ranks, below a name that no earlier start of them has used; and that name.

    torchrun keeps its store when it starts ranks again, and torch would find in it the addresses of those that died.
    Nothing that torchrun tells a rank is new and the same for all (TORCHELASTIC_RESTART_COUNT is counted by each
    machine for itself). So rank 0 makes a name up, and hands it to whoever asks with a name of its own.
    """
    from torch.distributed.rendezvous import rendezvous

    store = dist.PrefixStore("mvle", next(rendezvous("env://", rank, ranks, timeout=timeout))[0])
    mine = secrets.token_hex(8)
    if rank > 0:
        store.set(f"ask/{rank}", mine)
        name = store.get(f"name/{mine}").decode()  # waits for it
        store.set(f"{name}/came/{rank}", "")
        return dist.PrefixStore(name, store), name
    until = time.monotonic() + timeout.total_seconds()
    answered: dict[int, bytes] = {}
    missing = list(range(1, ranks))
    while missing := [other for other in missing if not store.check([f"{mine}/came/{other}"])]:
        for other in missing:
            if store.check([f"ask/{other}"]) and (asked := store.get(f"ask/{other}")) != answered.get(other):
                answered[other] = asked  # perhaps by a rank of an earlier start: then the new one asks again
                store.set(f"name/{asked.decode()}", mine)
        if time.monotonic() > until:
            raise RuntimeError(f"waited {timeout} for all {ranks} ranks to start; these did not come: {missing}.")
        time.sleep(0.02)
    return dist.PrefixStore(mine, store), mine


def prepare_cuda() -> None:
    """Set CUDA_ENVIRONMENT, before CUDA is used."""
    for names, value in CUDA_ENVIRONMENT.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def mesh_shape(config: ParallelConfig, ranks: int) -> tuple[int, int]:
    """(replicate, shard) for a number of ranks. Raises ParallelError where they do not multiply to it."""
    replicate = config.replicate
    if ranks % replicate:
        raise ParallelError(
            f"parallel.replicate must divide the number of ranks ({ranks}); got {replicate}. Without torchrun there is "
            "one rank."
        )
    shard = config.shard or ranks // replicate
    if replicate * shard != ranks:
        other = f"parallel.replicate={ranks // shard} or " if ranks % shard == 0 else ""
        raise ParallelError(
            f"parallel.replicate x parallel.shard must be the number of ranks ({ranks}); got {replicate} x {shard}. "
            f"Set {other}parallel.shard={ranks // replicate}, which is what null means."
        )
    return replicate, shard
