"""masking.clean_keep: in training the clean image view shows a share of its patches. The same mathematics as the plain
graph over those patches, and whole images wherever nothing is learned."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from mvle_kernels import Stream, mask_of, use_backend

from benchmarks.peers.plain import plain_inputs
from mvle.config import load_config
from mvle.data.batch import Batch
from mvle.model import model as model_file
from mvle.model.model import MaskVLM
from mvle.model.queries import View

from ..agreement import MODES, SEED, assert_agrees
from ..helpers import NAMES, make_batch, make_config, make_model, reordered

CLEAN = frozenset({View.IMAGE_CLEAN, View.TEXT_CLEAN})


def shown(model: MaskVLM, batch: Batch, seed: int = SEED) -> torch.Tensor:
    """bool [B, N]: the patches of each clean view."""
    clean = model.choose(batch, seed, CLEAN).clean
    assert clean is not None
    return mask_of(clean, 16)


@pytest.mark.parametrize("keep", [0.5, 0.01, 0.97])  # half; one patch; all of 16, drawn all the same
@pytest.mark.parametrize(("mode", "insert"), MODES)
def test_all_losses_agree_with_the_plain_graph_over_the_same_patches(mode: str, insert: str, keep: float) -> None:
    model, batch = make_model(make_config(mode, insert, (1, 0.7, 1.3, 2), clean_keep=keep)), make_batch()
    assert_agrees(model, batch)


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in combinations(NAMES, n) if w != ("mim",)])
def test_any_subset_of_losses_agrees(wanted: tuple[str, ...]) -> None:
    mode, insert = MODES[len("".join(wanted)) % 3]
    model = make_model(make_config(mode, insert, [float(name in wanted) for name in NAMES], clean_keep=0.4))
    batch = make_batch()
    assert_agrees(model, batch)


def test_the_reference_backend_and_given_masks_agree_too() -> None:
    model, batch = make_model(make_config(weights=(1, 1, 0, 0), clean_keep=0.5)), make_batch((3, 9, 5, 4))
    masks = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    given = Batch(**{**vars(batch), "masks": {"image": masks}})
    with use_backend("reference"):
        assert_agrees(model, given)


def test_the_comparison_notices_other_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(make_config(weights=(0, 1, 1, 0), clean_keep=0.5)), make_batch()
    assert_agrees(model, batch)
    choose = model_file.choose_clean_patches
    monkeypatch.setattr(model_file, "choose_clean_patches", lambda b, seed, *rest: choose(b, seed + 1, *rest))
    with pytest.raises(AssertionError, match="is not|differs"):
        assert_agrees(model, batch)


def test_every_pair_shows_exactly_its_share_whatever_its_batch_and_apart_from_what_is_masked() -> None:
    batch = make_batch(ratios=[0.5] * 8)
    model = make_model(make_config(clean_keep=0.5))
    whole = shown(model, batch)
    assert whole.sum(1).tolist() == [8] * 8
    assert len(whole.unique(dim=0)) > 4
    order = [6, 1, 4]
    other = make_model(make_config("drop", cell=32, row_multiple=64, clean_keep=0.5))
    assert torch.equal(shown(other, reordered(batch, order)), whole[order])
    assert not torch.equal(shown(model, batch, SEED + 1), whole)
    masked = mask_of(model.choose(batch, SEED, frozenset(View)).masked, 16)
    assert not torch.equal(masked, whole) and not torch.equal(masked, ~whole)
    third = make_model(make_config(clean_keep=0.3))
    assert shown(third, batch).sum(1).tolist() == [5] * 8  # ceil(0.3 * 16)
    assert Stream.CLEAN_PATCHES not in (Stream.PATCH_MASK, Stream.SPARE)


def test_the_step_has_fewer_rows_and_those_of_the_shown_patches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of a patch that no view shows reach no loss of the other three."""
    model, batch = make_model(make_config(weights=(0, 1, 1, 1), clean_keep=0.5)), make_batch()
    seen = shown(model, batch).view(8, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
    other = Batch(**{**vars(batch), "images": torch.where(seen[..., None], batch.images, 255 - batch.images)})
    rows: list[int] = []
    model.image_encoder.register_forward_hook(lambda m, a, out: rows.append(sum(out.lengths)))
    first, second = (model(b, SEED, model.counts(b)).report for b in (batch, other))
    assert rows == [8 * 9] * 2
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_does_not_train_sees_whole_images() -> None:
    batch = make_batch()
    whole, short = (make_model(make_config(clean_keep=keep)) for keep in (1.0, 0.5))
    for got, expected in zip(evaluated(short, batch), evaluated(whole, batch), strict=True):
        assert torch.equal(got, expected)
    learning = [m.train()(batch, SEED, m.counts(batch)).report["itc"] for m in (whole, short)]
    assert not torch.equal(*learning)
    assert plain_inputs(short, batch, SEED).clean_left_out_BN is not None
    assert plain_inputs(short.eval(), batch, SEED).clean_left_out_BN is None


@torch.no_grad()
def evaluated(model: MaskVLM, batch: Batch) -> list[torch.Tensor]:
    """Validation's forward, and the entries that evaluation and users call (these in training too)."""
    report = model.eval()(batch, SEED, model.counts(batch)).report
    model.train()
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.text)
    every = torch.arange(len(batch))
    masked = torch.eye(16, dtype=torch.bool)[:8]
    return [
        *(report[name] for name in sorted(report)),
        images.rows.rows,
        model.match(images.rows, texts.rows, every, every),
        model.reconstruct(batch.images, masked, batch.text),
    ]


def test_the_contrast_over_micro_batches_reads_the_same_patches() -> None:
    """First pass without a graph, then each micro-batch with its part: loss and gradients of one forward."""
    model, batch = make_model(make_config(weights=(0, 0, 1, 1), clean_keep=0.5)), make_batch()
    counts = model.counts(batch)
    expected = learned(model, [(batch, None)], counts)
    pieces = [batch.micro(a, a + 4, 8) for a in (0, 4)]
    parts = model.contrast_parts(batch, [model.contrast_embeddings(p, SEED) for p in pieces])
    got = learned(model, list(zip(pieces, parts, strict=True)), counts)
    assert abs(got["itc"] - expected["itc"]) < 1e-12 and abs(got["itm"] - expected["itm"]) < 1e-12
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-10 * max(gradient.norm(), 1e-3), name


def learned(model: MaskVLM, pieces: list[tuple[Batch, Any]], counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses and gradients of a step in pieces."""
    model.zero_grad(set_to_none=True)
    sums: dict[str, Any] = {"itc": 0, "itm": 0}
    for piece, part in pieces:
        losses = model(piece, SEED, counts, part)
        losses.total.backward()
        sums = {name: value + losses.report[name] for name, value in sums.items()}
    return sums | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_run_says_that_it_is_an_approximation_and_an_exact_one_says_nothing() -> None:
    assert load_config("tiny").approximations == []
    assert load_config("tiny", ["masking.clean_keep=0.5"]).approximations == [
        "clean image views show 0.5 of their patches in training (masking.clean_keep)"
    ]
