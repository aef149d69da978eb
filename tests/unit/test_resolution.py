"""schedule.resolution: smaller images in phases. The model over smaller images is the model of that size whose
positions are the resampled ones; sizes are a function of the step alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mvle_kernels import mask_of
from pydantic import ValidationError
from torch import Tensor

from benchmarks.nosync import RefuseSyncs, fake_device
from mvle.config import ConfigError, load_config
from mvle.data.config import DataConfig
from mvle.data.decode import decode_window
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.tokenizer import train_bpe
from mvle.engine.schedule import ScheduleConfig, image_size, same_history
from mvle.model.image_encoder import resample_positions
from mvle.model.model import MaskVLM
from mvle.model.queries import View

from ..agreement import MODES, SEED, gradients
from ..helpers import MASK, VOCABULARY, make_batch, make_config, make_model
from .data_files import make_shards

POSITIONS = ("image_encoder.positions", "insert_positions")

# ---- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "to"), [((4, 4), (2, 2)), ((14, 14), (6, 6)), ((7, 5), (3, 4)), ((2, 2), (4, 4))])
def test_positions_are_resampled_as_pixels_are_and_the_class_token_keeps_its_own(
    grid: tuple[int, int], to: tuple[int, int]
) -> None:
    positions = torch.randn(1 + grid[0] * grid[1], 5, generator=torch.Generator().manual_seed(0)).double()

    new = resample_positions(positions, grid, to)

    assert torch.equal(new[0], positions[0])
    pixels = positions[1:].T.reshape(1, 5, *grid)
    expected = F.interpolate(pixels, size=to, mode="bilinear", antialias=True)[0].flatten(1).T
    assert torch.allclose(new[1:], expected, rtol=1e-6, atol=1e-7)  # torch makes its weights in float32


def test_resampling_is_differentiable_keeps_the_dtype_and_leaves_the_full_grid_alone() -> None:
    positions = torch.randn(17, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: resample_positions(p, (4, 4), (3, 2)), positions)
    assert resample_positions(positions, (4, 4), (4, 4)) is positions
    half = resample_positions(torch.ones(17, 3, dtype=torch.bfloat16), (4, 4), (3, 3))
    assert half.dtype == torch.bfloat16 and torch.equal(half, torch.ones_like(half))


# ---- the model ------------------------------------------------------------------------------------------------------


def model_of_size(large: MaskVLM, side: int, mode: str, insert: str) -> MaskVLM:
    """The model built for images of `side` pixels, with the weights of `large` and its positions resampled."""
    sections = make_config(mode, insert, clean_keep=0.5)
    image = sections.model.image.model_copy(update={"size": side})
    model = sections.model.model_copy(update={"image": image})
    small = make_model(type(sections)(model, sections.masking, sections.objectives, sections.kernels))
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            value = large.get_parameter(name)
            parameter.copy_(resampled(value, side) if name in POSITIONS else value)
    return small


def resampled(positions: Tensor, side: int) -> Tensor:
    return resample_positions(positions, (4, 4), (side // 16, side // 16))


@pytest.mark.parametrize("side", [16, 32, 48])
@pytest.mark.parametrize(("mode", "insert"), MODES)
def test_smaller_images_give_the_losses_and_gradients_of_a_model_of_their_size(
    mode: str, insert: str, side: int
) -> None:
    large = make_model(make_config(mode, insert, clean_keep=0.5))
    small, batch = model_of_size(large, side, mode, insert), make_batch(side=side)
    assert torch.equal(large.counts(batch), small.counts(batch))

    ours, theirs = (m(batch, SEED, m.counts(batch)) for m in (large, small))

    for name, value in theirs.report.items():
        assert abs(ours.report[name] - value) <= 1e-10 * abs(value), name
    got, expected = gradients(large, ours.total), gradients(small, theirs.total)
    for name, gradient in expected.items():
        if name in POSITIONS:  # back through the resampling
            whole = large.get_parameter(name)
            (gradient,) = torch.autograd.grad(resampled(whole, side), whole, gradient)
        assert (got[name] - gradient).norm() <= 1e-9 * max(gradient.norm(), 1e-2), name


def test_masks_counts_and_shown_patches_follow_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(make_config("drop", clean_keep=0.5))
    batch = make_batch(side=32, ratios=[0.6, 0.2] * 4)
    choices = model.choose(batch, SEED, frozenset(View))
    assert mask_of(choices.masked, 4).sum(1).tolist() == [3, 1] * 4  # ceil of 0.6 and of 0.2 times 4 cells
    assert choices.clean.lengths == (2,) * 8
    assert model.counts(batch).tolist()[0] == (3 + 1) * 4 * 3 * 16**2
    rows: list[int] = []
    model.image_encoder.register_forward_hook(lambda m, a, out: rows.append(sum(out.lengths)))
    model(batch, SEED, model.counts(batch))
    assert rows == [8 * 3 + 4 * (2 + 4)]


@pytest.mark.parametrize(("mode", "insert"), MODES)
def test_neither_approximation_waits_for_the_device(mode: str, insert: str) -> None:
    with fake_device(backward=True) as device:
        with device:
            model, counts = MaskVLM(make_config(mode, insert, clean_keep=0.5), VOCABULARY, MASK), torch.ones(4)
        batch = make_batch(side=32).to(device)
        with RefuseSyncs():
            model(batch, SEED, counts).total.backward()
            model.contrast_embeddings(batch, SEED)


def test_images_that_do_not_fit_are_refused() -> None:
    model = make_model(make_config(cell=32))
    batch = make_batch(side=48)
    with pytest.raises(ValueError, match="cell must divide the patch grid 3 x 3; got a cell of 2"):
        model(batch, SEED, torch.ones(4))
    with pytest.raises(ValueError, match=r"images must be square, .*; got \(8, 48, 32, 3\)"):
        model.encode_images(batch.images[:, :, :32])


# ---- the schedule ---------------------------------------------------------------------------------------------------


def sizes(**values: object) -> list[int]:
    schedule = ScheduleConfig(**{"steps": 10, "warmup": 0, **values})
    return [image_size(step, schedule, 224) for step in range(schedule.steps)]


def test_phases_end_at_a_share_or_a_number_of_steps_and_the_last_steps_are_of_full_size() -> None:
    assert sizes() == [224] * 10
    assert sizes(resolution=[[112, 0.7]]) == sizes(resolution=[[112, 7]]) == [112] * 7 + [224] * 3
    assert sizes(resolution=[[96, 2], [160, 0.5]]) == [96] * 2 + [160] * 3 + [224] * 5


@pytest.mark.parametrize(
    "resolution",
    [[[112, 0]], [[112, 10]], [[112, 12]], [[96, 5], [160, 0.5]], [[96, 5], [160, 3]], [[112, 0.01]]],
)
def test_phases_that_are_empty_or_leave_no_step_of_full_size_are_refused(resolution: list) -> None:
    with pytest.raises(ValidationError, match="must end one after the other, .* before schedule.steps"):
        sizes(resolution=resolution)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.resolution=[[112,0.5]]"], "multiples of masking.cell (32); got 112. 96 fits."),
        (["schedule.resolution=[[256,0.5]]"], "below model.image.size (224) that are multiples of"),
        (["schedule.resolution=[[224,0.5]]"], "got 224. 192 fits."),
        (["schedule.resolution=[[16,0.5]]"], "got 16. 32 fits."),
        (["schedule.resolution=[[16,0.5]]", "masking.cell=224"], "No side fits: the image is one cell."),
        (["schedule.resolution=[[0,0.5]]"], "a side above 0; got [0, 0.5]"),
        (["schedule.resolution=[[96,2.5]]"], "expected a share below 1 or a whole number of steps; got 2.5"),
        (["schedule.resolution=96"], "schedule.resolution: expected list of [integer, number]; got 96"),
    ],
)
def test_sides_that_do_not_fit_the_model_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert message in str(error.value)


def test_a_run_may_go_on_with_other_phases_if_its_steps_had_the_same_sizes() -> None:
    def schedule(resolution: object, steps: int = 10) -> ScheduleConfig:
        return ScheduleConfig(steps=steps, warmup=0, kind="constant", resolution=resolution)

    before, longer = schedule([[96, 4]]), schedule([[96, 6]])
    assert same_history(longer, 0.1, before, 0.1, 4)
    assert not same_history(longer, 0.1, before, 0.1, 5)
    assert not same_history(schedule([[128, 4]]), 0.1, before, 0.1, 1)
    assert not same_history(schedule([]), 0.1, before, 0.1, 1)
    share = schedule([[96, 0.4]])
    assert same_history(share, 0.1, before, 0.1, 9) and not same_history(schedule([[96, 0.4]], 20), 0.1, share, 0.1, 5)


def test_a_run_with_phases_says_that_it_is_an_approximation() -> None:
    config = load_config("base", ["schedule.resolution=[[96,0.5],[160,300000]]"])
    assert load_config("base").approximations == []
    assert config.approximations == [
        "images of 96 pixels until step 195,000, of 160 pixels until step 300,000 of 390,000, positions resampled "
        "(schedule.resolution)"
    ]


# ---- the loader -----------------------------------------------------------------------------------------------------


def test_the_loader_decodes_the_same_windows_at_the_size_of_each_step(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [13])
    tokenizer = train_bpe([f"picture number {i} again" for i in range(10)] * 3, 320)
    plan = SamplingPlan(shards, seed=0, batch_total=4, slots=4)
    schedule = ScheduleConfig(steps=5, warmup=0, resolution=[[8, 3]])
    for start in (0, 2, 3):  # a run that goes on has the sizes of one that was never interrupted
        loader = Loader(
            DataConfig(), plan, shards, tokenizer, lambda step: image_size(step, schedule, 16), 12, 8,
            start_step=start, steps=5,
        )  # fmt: skip
        batches = list(loader)
        assert [b.images.shape[1] for b in batches] == [8, 8, 8, 16, 16][start:]
        for step, batch in enumerate(batches, start):
            for image, draw in zip(batch.images, plan.draws(plan.positions(step)), strict=True):
                expected = decode_window(shards.image_bytes(draw.row), draw.window, draw.flip, len(image))
                assert np.array_equal(image.numpy(), expected)
