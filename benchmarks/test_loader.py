"""Two questions: what does the plan cost a pair, and augmentation a batch?

    pytest benchmarks/test_loader.py --benchmark-only

How many images a second come out of loaders is another run: python -m benchmarks.loader. Shape: 256 pairs of a set of
512 for the plan; 16 images of 224 pixels for augmentation, as data.augment has it, on one thread. The peer of
augmentation is torchvision's own, image by image, as a DataLoader's worker would make it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvle.data.augment import augment
from mvle.data.augment_config import AugmentConfig

from .loader import plan_step
from .loader_data import make_shards, photo

pytestmark = pytest.mark.usefixtures("one_thread")

FACTOR = {"probability": 1.0, "strength": 0.4}
SECTIONS: dict[str, dict[str, Any]] = {
    "brightness": {"brightness": FACTOR},
    "contrast": {"contrast": FACTOR},
    "saturation": {"saturation": FACTOR},
    "grey": {"grey": {"probability": 1.0}},
    "blur": {"blur": {"probability": 1.0, "strength": 2.0}},
    "randaugment": {"randaugment": {"ops": 2, "magnitude": 7}},
}


def by_torchvision(name: str) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    makes: dict[str, Callable[[], Any]] = {
        "brightness": lambda: v2.ColorJitter(brightness=0.4),
        "contrast": lambda: v2.ColorJitter(contrast=0.4),
        "saturation": lambda: v2.ColorJitter(saturation=0.4),
        "grey": lambda: v2.RandomGrayscale(1.0),
        "blur": lambda: v2.GaussianBlur(13, (0.1, 2.0)),
        "randaugment": lambda: v2.RandAugment(2, 21),
    }
    return makes[name]()  # type: ignore[no-any-return]


@pytest.mark.benchmark(group="the plan, 256 pairs")
def test_plan(benchmark: Any, tmp_path: Path) -> None:
    benchmark(plan_step(make_shards(tmp_path, 32, 512, 4)))


@pytest.mark.parametrize("way", ["ours", "torchvision"])
@pytest.mark.parametrize("name", SECTIONS)
def test_augmentation(benchmark: Any, name: str, way: str) -> None:
    benchmark.group = f"{name}, 16 images of 224 pixels"
    images = torch.stack([torch.from_numpy(photo(seed, 224, 224)) for seed in range(16)])
    if way == "ours":
        words = torch.randint(2**32, (16, 5)) * torch.tensor([1, 1, 1, 1, 0])
        config = AugmentConfig.model_validate(SECTIONS[name])
        benchmark(lambda: augment(images, words, config))
    else:
        op, planes = by_torchvision(name), images.permute(0, 3, 1, 2).contiguous()
        benchmark(lambda: [op(one) for one in planes])
