"""A trained run, or an export of one, for use: `mvle.load(RUN)`.

    run = mvle.load("runs/tiny")
    z_i, z_t = run.encode_images(images), run.encode_texts(texts)       float32 [n, d], unit length: z_i @ z_t.T
    run.match(images, texts)                                            [n] log-odds that each pair belongs together
    run.fill(images, ["a <mask> circle in the top left"])               [["red"]]
    pictures, masks = run.reconstruct(images, texts, ratio=0.75)        rebuilt uint8 pictures, what was masked

Images are PIL images or uint8 arrays of any size, grey, colour or with alpha (laid on white): turned upright, the
shorter side resized, the centre cropped, as in evaluation. Results are numpy arrays. Nothing here trains.

`mvle.load(RUN, step=1000)` and step="best" open another checkpoint than the newest. Where it has an EMA of the weights,
this is what is loaded (`run.run.weights` says which); weights="model" loads those that were trained. An exported
folder (`python -m mvle.export`) holds the weights of one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from mvle_kernels import Packed
from numpy.typing import NDArray
from torch import Tensor

from .engine.errors import RunError as RunError
from .engine.stored import Stored, Weights, find_stored
from .evaluation.split import low_ratio, pack_tokens, patch_masks, to_images

if TYPE_CHECKING:
    from .data.tokenizer import Tokenizer
    from .model.model import MaskVLM

CHUNK = 64  # pairs of one forward
MASK = "<mask>"


@dataclass(frozen=True, eq=False)
class OpenedRun(Stored):
    """What the folder of a run or an export holds, opened: its tokenizer, and its model (in eval, on `device`)."""

    tokenizer: Tokenizer
    model: MaskVLM
    device: torch.device


def open_run(
    folder: str | Path,
    device: str | None = None,
    step: int | Literal["best"] | None = None,
    weights: Weights = "auto",
) -> OpenedRun:
    """Open a run at its newest checkpoint, at that of `step`, or at the best one (checkpoint.best); or an export.

    device: None: as run.device says. weights: auto takes the EMA where the checkpoint has one; OpenedRun.weights says
    what was taken. Raises RunError where something is missing; CheckpointError where no checkpoint is whole or fits, or
    where weights is ema and there is none.
    """
    from .model.model import MaskVLM

    stored = find_stored(folder, step, weights)
    tokenizer = stored.read_tokenizer()
    model = MaskVLM(stored.config, tokenizer.vocabulary, tokenizer.mask_id)
    stored.fill(model)
    where = torch.device(pick_device(device or stored.config.run.device))
    model.eval().requires_grad_(False).to(where)
    return OpenedRun(**vars(stored), tokenizer=tokenizer, model=model, device=where)


def pick_device(name: str) -> str:
    """auto: a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


class Pretrained:
    """The model of a run. See the head of the file; every method works in chunks and without gradients."""

    def __init__(self, run: OpenedRun) -> None:
        self.run = run
        self.config, self.tokenizer, self.model, self.device = run.config, run.tokenizer, run.model, run.device

    @staticmethod
    def open(
        folder: str | Path,
        device: str = "cpu",
        step: int | Literal["best"] | None = None,
        weights: Weights = "auto",
    ) -> Pretrained:
        """What `mvle.load` calls; see `open_run`. device: cpu, cuda, auto. Raises RunError, CheckpointError."""
        return Pretrained(open_run(folder, device, step, weights))

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """float32 [n, d], unit length."""
        pixels = self._pixels(images)
        return _joined([self.model.encode_images(pixels[c]).z for c in _chunks(len(pixels))], self._width)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [n, d], unit length. Raises ValueError for a text that is too long."""
        ids = self._ids(texts)
        return _joined([self.model.encode_texts(self._packed(ids[c])).z for c in _chunks(len(ids))], self._width)

    def match(self, images: Sequence[Any], texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [n]: log-odds that image i and text i belong together."""
        pixels, ids = self._pixels(images), self._ids(texts)
        _same_number(len(pixels), len(ids))
        parts = []
        for c in _chunks(len(ids)):
            index = torch.arange(len(ids[c]), device=self.device)
            image, text = self.model.encode_images(pixels[c]).rows, self.model.encode_texts(self._packed(ids[c])).rows
            parts.append(self.model.match(image, text, index, index))
        return _joined(parts)

    def fill(self, images: Sequence[Any] | None, texts: Sequence[str]) -> list[list[str]]:
        """The likeliest word for each <mask> of each text, in order. images None: from the words around it alone."""
        ids = self._ids(texts)
        pixels = None if images is None else self._pixels(images)
        if pixels is not None:
            _same_number(len(pixels), len(ids))
        mask_id = self.tokenizer.mask_id
        for text, tokens in zip(texts, ids, strict=True):
            if mask_id not in tokens:
                raise ValueError(f"each text needs at least one {MASK} to fill; got {text!r}.")
        words: list[list[str]] = []
        for c in _chunks(len(ids)):
            found = self._fill(ids[c], None if pixels is None else pixels[c])
            words += [[self.tokenizer.word(i) for i in filled] for filled in found]
        return words

    def reconstruct(
        self,
        images: Sequence[Any],
        texts: Sequence[str] | None,
        ratio: float | None = None,
        masks: Any = None,
        seed: int = 0,
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """(pictures uint8 [n, height, width, 3], masks bool [n, N], True = masked and rebuilt).

        texts None: no captions. ratio: share of cells to mask, 0..1 (None: that of the run, or the low end of its
        range), drawn from (seed, number of the image). masks: bool [n, N] over the patches row by row, instead.
        """
        pixels = self._pixels(images)
        ids = None if texts is None else self._ids(texts)
        if ids is not None:
            _same_number(len(pixels), len(ids))
        masked = self._masks(len(pixels), ratio, masks, seed)
        image = self.config.model.image
        pictures = []
        for c in _chunks(len(pixels)):
            text = None if ids is None else self._packed(ids[c])
            rebuilt = self.model.reconstruct(pixels[c], masked[c].to(self.device), text)
            pictures.append(to_images(rebuilt, image.patch, image.grid).cpu())
        shape = (0, image.size, image.size, 3)
        return (torch.cat(pictures) if pictures else torch.zeros(shape, dtype=torch.uint8)).numpy(), masked.numpy()

    # ---- inputs -----------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return self.config.model.projection

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        listed = hasattr(images, "__len__") and hasattr(images, "__getitem__")  # a PIL image has neither
        if not listed or isinstance(images, str | bytes | dict):
            raise TypeError(f"images must be a list of PIL images or uint8 arrays; got {type(images).__name__}.")
        size = self.config.model.image.size
        ready = [prepare_image(image, size) for image in images]
        stacked = np.stack(ready) if ready else np.zeros((0, size, size, 3), np.uint8)
        return torch.from_numpy(stacked).to(self.device)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts must be a list of str; got {texts!r}.")
        longest = self.config.model.text.max_tokens
        ids, cut = self.tokenizer.encode(list(texts), longest) if texts else ([], 0)
        if cut:
            for text in texts:
                if self.tokenizer.encode([text], longest)[1]:
                    raise ValueError(
                        f"a text may have at most {longest} tokens (model.text.max_tokens), begin and end included; "
                        f"this one has more: {text!r}."
                    )
        return ids

    def _packed(self, ids: list[list[int]]) -> Packed:
        return pack_tokens(ids, self.config.kernels.row_multiple).to(self.device)

    def _fill(self, ids: list[list[int]], pixels: Tensor | None) -> list[list[int]]:
        """Token ids for every mask of every text."""
        tokenizer = self.tokenizer
        text, positions = self._packed(ids), []
        start = 0
        for tokens in ids:
            at = [start + i for i, token in enumerate(tokens) if token == tokenizer.mask_id]
            positions.append(torch.tensor(at, dtype=torch.int32, device=self.device))
            start += len(tokens)
        logits = self.model.fill(text, Packed.of(positions), pixels)
        specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id, tokenizer.unk_id}
        logits[:, sorted(i for i in specials if i is not None)] = -torch.inf  # never an answer
        best = iter(logits.argmax(1).tolist())
        return [[next(best) for _ in at] for at in positions]

    def _masks(self, images: int, ratio: float | None, masks: Any, seed: int) -> Tensor:
        patches = self.config.model.image.grid[0] * self.config.model.image.grid[1]
        if masks is not None:
            if ratio is not None:
                raise ValueError("give ratio or masks, not both.")
            given = np.asarray(masks)
            if given.dtype != np.bool_ or given.shape != (images, patches):
                raise ValueError(
                    f"masks must be bool of shape [{images}, {patches}]; got {given.dtype} {list(given.shape)}."
                )
            return torch.from_numpy(given.copy())
        if ratio is None:
            ratio = low_ratio(self.config)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be a share of cells in 0..1; got {ratio}.")
        return patch_masks(self.config, seed, torch.arange(images), ratio)


def prepare_image(image: Any, size: int) -> NDArray[np.uint8]:
    """A PIL image or uint8 array [height, width] or [height, width, 1 | 3 | 4] -> uint8 [size, size, 3], as evaluation
    sees it. Raises TypeError for anything else."""
    from PIL import Image, ImageOps

    from .data.decode import prepare_pixels

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        channels = array.shape[2] if array.ndim == 3 else 1
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
            raise TypeError(
                "an image must be a PIL image or a uint8 array [height, width] or [height, width, 1 | 3 | 4]; got "
                f"{type(image).__name__} of {array.dtype} {list(array.shape)}."
            )
        image = Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)
    return prepare_pixels(ImageOps.exif_transpose(image), size)


def _same_number(images: int, texts: int) -> None:
    if images != texts:
        raise ValueError(f"images and texts must be as many, pair by pair; got {images} images and {texts} texts.")


def _chunks(total: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, total, CHUNK))


def _joined(parts: list[Tensor], width: int | None = None) -> NDArray[np.float32]:
    """Chunks as one numpy array; no chunk: [0] or [0, width]."""
    if not parts:
        return np.zeros((0,) if width is None else (0, width), np.float32)
    return torch.cat(parts).float().cpu().numpy()
