"""What every test shares: one thread for torch's tiny operations, and a reason for what is skipped.

Tests marked `gpu` are skipped where there is no CUDA device.
"""

from __future__ import annotations

import os

import pytest

# Before torch is imported: a second thread gains nothing at these sizes, and on a busy machine its waiting costs much.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before a kernel is defined: without a GPU Triton's interpreter runs them. NVIDIA's driver makes this file.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))
