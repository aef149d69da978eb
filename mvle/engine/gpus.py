"""GPUs whose speed and memory are known: what utilisation is measured against, and what capacity is planned for.

Peaks are of dense bfloat16 products with float32 sums; where NVIDIA quotes them with sparsity they are halved. Names
are those of `torch.cuda.get_device_name`, whole: a part of a card (MIG) has more behind it, and no peak here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """names: as the driver has them · tflops: peak, 10^12 operations a second · gib: memory that torch finds, rounded
    down · source of the peak."""

    names: tuple[str, ...]
    tflops: float
    gib: int
    source: str


GPUS = {
    "a100": Gpu(
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        312.0,
        79,
        "NVIDIA A100 data sheet (2021): 312 TFLOPS, 624 with sparsity",
    ),
    "a100-40gb": Gpu(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312.0, 39, "the same data sheet"),
    "h100": Gpu(("NVIDIA H100 80GB HBM3",), 989.4, 79, "NVIDIA H100 data sheet (2022), SXM: 1,979 with sparsity"),
    "h100-pcie": Gpu(("NVIDIA H100 PCIe",), 756.0, 79, "NVIDIA H100 data sheet (2022), PCIe: 1,513 with sparsity"),
    "h200": Gpu(("NVIDIA H200",), 989.4, 139, "NVIDIA H200 data sheet (2023), SXM: 1,979 with sparsity"),
    "b200": Gpu(("NVIDIA B200",), 2250.0, 178, "NVIDIA DGX B200 data sheet (2024): 8 GPUs 36 PFLOPS with sparsity"),
}


def known_gpu(device_name: str) -> Gpu | None:
    """The GPU of that name (`torch.cuda.get_device_name`); None where its peak is not known."""
    return next((gpu for gpu in GPUS.values() if device_name in gpu.names), None)


def peak_tflops(device: torch.device) -> float | None:
    """The device's peak, 10^12 operations a second; None where it is not known, as on a CPU: nothing is guessed."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.tflops
