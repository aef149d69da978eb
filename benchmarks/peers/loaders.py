"""Loaders by name: ours, and what one would take instead, each as its documentation recommends.

All read the same shards on the same number of threads or processes, take a random window of 20% to 100% of the area
and 3/4 to 4/3 as wide as high, bring it to size x size with an antialiased bilinear filter, mirror half of them, and
give endless batches of uint8. Ours also looks at checksums, and makes tokens of captions where the others give text.

    webdataset      github.com/webdataset/webdataset: shards drawn with replacement, a shuffle buffer of encoded pairs,
                    batches made in the workers, torch's DataLoader with batch_size=None and persistent workers
    DALI            docs.nvidia.com/deeplearning/dali: fn.readers.webdataset, decoders.image_random_crop, which decodes
                    the window alone, resize, flip; two batches ahead
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mvle.data.config import DataConfig
from mvle.data.errors import DataError
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import all_captions, train_bpe

from ..loader_data import PhotoShards

SCALE, ASPECT = (0.2, 1.0), (3 / 4, 4 / 3)
BUFFER = 256  # encoded pairs in the shuffle buffers of webdataset and DALI
AHEAD = 4  # batches that a worker of torch's DataLoader makes ahead


@dataclass(frozen=True)
class Setup:
    """batch: images · workers: threads or processes that decode · size: side of the windows, pixels."""

    batch: int = 64
    workers: int = 2
    size: int = 224


class Missing(Exception):
    """A loader that cannot be measured here; the message says why."""


Batches = Iterator[Tensor]
Open = Callable[[PhotoShards, Setup], Batches]


# ---- ours -----------------------------------------------------------------------------------------------------------


def _ours(decoder: str) -> Open:
    def batches(shards: PhotoShards, setup: Setup) -> Batches:
        values = {"threads": setup.workers, "decoder": decoder, "crop_scale": SCALE, "crop_aspect": ASPECT}
        try:
            config = DataConfig.model_validate(values)
        except ValidationError as error:
            raise Missing(f"data.decoder={decoder} is refused: {error.errors()[0]['msg']}") from error
        found = ShardSet.open(shards.paths)
        plan = SamplingPlan(found, seed=0, batch_total=setup.batch, slots=setup.batch, crop_scale=SCALE)
        tokenizer = train_bpe(all_captions(found), 400)
        try:
            loader = Loader(config, plan, found, tokenizer, image_size=setup.size, max_tokens=32)
        except DataError as error:
            raise Missing(str(error)) from error
        with loader:
            for batch in loader:
                yield batch.images

    return batches


# ---- webdataset and torch's DataLoader ------------------------------------------------------------------------------


def decode_by_torchvision(key: str, data: bytes) -> Tensor | None:
    """A decoder in webdataset's form: None for what it does not decode."""
    from torchvision.io import ImageReadMode, decode_jpeg

    if not key.endswith("jpg"):
        return None
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def _webdataset(pillow: bool) -> Open:
    def batches(shards: PhotoShards, setup: Setup) -> Batches:
        _needs("webdataset")
        import webdataset
        from torch.utils.data import DataLoader
        from torchvision.transforms import v2

        steps: list[Any] = [
            v2.RandomResizedCrop(setup.size, scale=SCALE, ratio=ASPECT, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
        transform = v2.Compose([*steps, v2.PILToTensor()] if pillow else steps)
        pairs = (
            webdataset.WebDataset(list(shards.paths), resampled=True, shardshuffle=False)
            .shuffle(BUFFER)
            .decode("pil" if pillow else decode_by_torchvision)
            .to_tuple("jpg", "txt")
            .map_tuple(transform)
            .batched(setup.batch, partial=False)
        )
        loader = DataLoader(
            pairs, batch_size=None, num_workers=setup.workers, persistent_workers=True, prefetch_factor=AHEAD
        )
        for images, _ in loader:
            yield images

    return batches


# ---- DALI -----------------------------------------------------------------------------------------------------------


def _dali(shards: PhotoShards, setup: Setup) -> Batches:
    _needs("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=setup.batch, num_threads=setup.workers, device_id=None, prefetch_queue_depth=2, seed=0)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        encoded, caption = fn.readers.webdataset(
            paths=list(shards.paths),
            ext=["jpg", "txt"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=BUFFER,
        )
        images = fn.decoders.image_random_crop(
            encoded, output_type=types.RGB, random_area=SCALE, random_aspect_ratio=ASPECT
        )
        images = fn.resize(images, size=(setup.size, setup.size), interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), caption

    pipeline = graph()
    pipeline.build()
    while True:
        images, _ = pipeline.run()
        yield torch.from_dlpack(images.as_tensor())


def _needs(package: str) -> None:
    top = package.split(".", maxsplit=1)[0]
    if find_spec(top) is None or find_spec(package) is None:
        raise Missing(f"the package {package} is not installed")


PILLOW, TORCHVISION = "webdataset, Pillow", "webdataset, torchvision"
LOADERS: dict[str, Open] = {
    "ours, torch": _ours("torch"),
    "ours, DALI": _ours("dali"),
    TORCHVISION: _webdataset(pillow=False),
    PILLOW: _webdataset(pillow=True),
    "DALI's webdataset reader": _dali,
}
