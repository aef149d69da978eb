"""The three losses: dense equals reference, both equal the plain formula, and gradients match finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mvle_kernels import contrastive_loss, masked_pixel_loss, masked_token_loss, patchify, use_backend
from torch import Tensor

from .compare import BACKENDS, assert_backends_agree, random, results

# ---- pixels ---------------------------------------------------------------------------------------------------------

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
ROWS = torch.tensor([7, 0, 11, -1, 3, 7, -1], dtype=torch.int32)


def photos() -> Tensor:
    return torch.randint(0, 256, (2, 8, 12, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("kind", ["l1", "mse", "l1+mse"])
@pytest.mark.parametrize("per_patch", [False, True])
def test_pixel_loss_is_the_sum_of_distances_to_the_named_patches(kind: str, per_patch: bool) -> None:
    images, prediction = photos(), random(7, 48)

    def run(p: Tensor) -> Tensor:
        return masked_pixel_loss(p, images, ROWS, 4, MEAN, STD, kind, per_patch)

    total = 0.0
    for r, row in enumerate(ROWS.tolist()):
        if row < 0:
            continue
        b, n = divmod(row, 6)
        top, left = 4 * (n // 3), 4 * (n % 3)
        target = images[b, top : top + 4, left : left + 4].double() / 255
        target = ((target - target.new_tensor(MEAN)) / target.new_tensor(STD)).flatten()
        if per_patch:  # MAE: (x - mean) / sqrt(var + 1e-6), var with N - 1
            mean = target.sum() / 48
            variance = ((target - mean) ** 2).sum() / 47
            target = (target - mean) / (variance + 1e-6) ** 0.5
        d = prediction[r] - target
        total += float({"l1": d.abs(), "mse": d**2, "l1+mse": d.abs() + d**2}[kind].sum())
    for backend in BACKENDS:
        out, (gradient,) = results(run, [prediction], backend)
        assert abs(float(out) - total) <= 1e-12 * total
        assert not gradient[ROWS < 0].any() and gradient[ROWS >= 0].all()
    assert_backends_agree(run, [prediction])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_perfect_prediction_costs_nothing(backend: str) -> None:
    images = photos()
    rows = torch.arange(12)
    with use_backend(backend):
        target = patchify(images, 4, MEAN, STD, torch.float64).flatten(0, 1)
        assert masked_pixel_loss(target, images, rows, 4, MEAN, STD, "l1+mse") < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixel_loss_has_the_gradient_of_finite_differences(backend: str) -> None:
    prediction = random(7, 48).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda p: masked_pixel_loss(p, photos(), ROWS, 4, MEAN, STD, "l1+mse", True), [prediction]
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixel_loss_of_no_rows_or_of_ignored_rows_is_zero_and_finite(backend: str) -> None:
    none = torch.full((3,), -1)
    broken = torch.full((3, 48), float("nan"), dtype=torch.float64)
    out, (gradient,) = results(lambda p: masked_pixel_loss(p, photos(), none, 4, MEAN, STD), [broken], backend)
    assert out == 0 and not gradient.any()
    out, _ = results(lambda p: masked_pixel_loss(p, photos(), none[:0], 4, MEAN, STD), [broken[:0]], backend)
    assert out == 0


def test_pixel_loss_sums_half_precision_in_float32_and_refuses_what_does_not_fit() -> None:
    prediction = random(7, 48)
    loss = masked_pixel_loss(prediction.bfloat16(), photos(), ROWS, 4, MEAN, STD)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, masked_pixel_loss(prediction, photos(), ROWS, 4, MEAN, STD).float(), rtol=0.01)
    with pytest.raises(ValueError, match="kind must be one of"):
        masked_pixel_loss(prediction, photos(), ROWS, 4, MEAN, STD, "l2")
    with pytest.raises(ValueError, match=r"prediction must be \[7, 48\]"):
        masked_pixel_loss(prediction[:, :47], photos(), ROWS, 4, MEAN, STD)


# ---- words ----------------------------------------------------------------------------------------------------------

TARGETS = torch.tensor([3, -1, 0, 9, 3, -1])


def token_inputs() -> list[Tensor]:
    return [random(6, 5), random(16, 5, seed=1), random(16, seed=2)]


@pytest.mark.parametrize("vocabulary", [None, 10])
def test_token_loss_is_the_cross_entropy_of_the_rows_with_a_target(vocabulary: int | None) -> None:
    rows, weight, bias = token_inputs()
    C = vocabulary or 16
    kept = TARGETS >= 0
    z = rows[kept] @ weight[:C].T + bias[:C]
    expected = F.cross_entropy(z, TARGETS[kept], reduction="sum")
    for backend in BACKENDS:
        with use_backend(backend):
            loss, count, correct = masked_token_loss(rows, weight, bias, TARGETS, vocabulary=vocabulary)
        assert abs(loss - expected) < 1e-12 * expected
        assert count == 4 and correct == (z.argmax(1) == TARGETS[kept]).sum()
    assert_backends_agree(lambda *x: masked_token_loss(*x, TARGETS, vocabulary=vocabulary)[0] * 0.7, token_inputs())
    assert_backends_agree(
        lambda r, w: masked_token_loss(r, w, None, TARGETS, vocabulary=vocabulary)[0], token_inputs()[:2]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_padded_vocabulary_is_never_scored_and_never_learns(backend: str) -> None:
    rows, weight, bias = token_inputs()
    weight[10:], bias[10:] = 1e6, 1e6
    out, grads = results(lambda *x: masked_token_loss(*x, TARGETS, vocabulary=10)[0], [rows, weight, bias], backend)
    assert out.isfinite() and out < 1e3
    assert not grads[1][10:].any() and not grads[2][10:].any()
    assert grads[1][:10].any(1).all() and grads[2][:10].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_cost_and_learn_nothing(backend: str) -> None:
    rows, weight, bias = token_inputs()
    _, grads = results(lambda *x: masked_token_loss(*x, TARGETS)[0], [rows, weight, bias], backend)
    assert not grads[0][TARGETS < 0].any() and grads[0][TARGETS >= 0].all()
    for targets, read in ((torch.full((6,), -1), rows), (TARGETS[:0], rows[:0])):
        with use_backend(backend):
            loss, count, correct = masked_token_loss(read, weight, bias, targets)
        assert loss == 0 and count == 0 and correct == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_loss_has_the_gradient_of_finite_differences(backend: str) -> None:
    leaves = [x.requires_grad_() for x in token_inputs()]
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *x: masked_token_loss(*x, TARGETS, vocabulary=10)[0], leaves)


def test_token_loss_takes_part_of_the_inputs_without_gradient() -> None:
    for learns in range(3):
        inputs = token_inputs()
        inputs[learns].requires_grad_()
        masked_token_loss(*inputs, TARGETS)[0].backward()
        assert inputs[learns].grad is not None
    masked_token_loss(*token_inputs(), TARGETS)  # and of none at all


def test_token_loss_refuses_what_does_not_fit() -> None:
    rows, weight, bias = token_inputs()
    with pytest.raises(ValueError, match="one target each"):
        masked_token_loss(rows, weight, bias, TARGETS[:4])
    with pytest.raises(ValueError, match=r"vocabulary must lie in 1\.\.16"):
        masked_token_loss(rows, weight, bias, TARGETS, vocabulary=17)
    with pytest.raises(ValueError, match="ignore must fit into 32 bits, as kernels compare it; got 1099511627776"):
        masked_token_loss(rows, weight, bias, TARGETS, ignore=2**40)


# ---- contrast -------------------------------------------------------------------------------------------------------

IMAGE_IDS = torch.tensor([1, 2, 1, 4, 5])
TEXT_IDS = torch.tensor([7, 8, 9, 8, 6])


def contrast_inputs() -> list[Tensor]:
    return [F.normalize(random(5, 4), dim=1), F.normalize(random(5, 4, seed=1), dim=1), torch.tensor([0.3]).double()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrast_is_the_plain_formula_without_equal_images_or_captions(backend: str) -> None:
    image, text, temperature = contrast_inputs()
    expected, right = 0.0, 0
    for i in range(5):
        rivals = [j for j in range(5) if j == i or (IMAGE_IDS[j] != IMAGE_IDS[i] and TEXT_IDS[j] != TEXT_IDS[i])]
        assert len(rivals) == (5 if i == 4 else 4)
        for query, answers in ((image[i], text), (text[i], image)):
            scores = {j: float(query @ answers[j] / temperature) for j in rivals}
            expected += float(torch.tensor(list(scores.values()), dtype=torch.float64).logsumexp(0)) - scores[i]
            right += max(scores, key=scores.__getitem__) == i
    with use_backend(backend):
        loss, correct = contrastive_loss(image, text, temperature, IMAGE_IDS, TEXT_IDS)
    assert abs(float(loss) - expected) < 1e-12 * expected and int(correct) == right
    assert_backends_agree(lambda *x: contrastive_loss(*x, IMAGE_IDS, TEXT_IDS)[0], contrast_inputs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrast_has_the_gradient_of_finite_differences(backend: str) -> None:
    leaves = [x.requires_grad_() for x in contrast_inputs()]
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, IMAGE_IDS, TEXT_IDS)[0], leaves)


def test_a_batch_of_equal_pairs_has_nothing_to_contrast() -> None:
    image, text, temperature = contrast_inputs()
    same = torch.zeros(5, dtype=torch.int64)
    loss, correct = contrastive_loss(image, text, temperature, same, TEXT_IDS)
    assert abs(loss) < 1e-12 and correct == 10


def test_contrast_refuses_sides_of_different_shape() -> None:
    image, text, temperature = contrast_inputs()
    with pytest.raises(ValueError, match=r"must both be \[b, d\]"):
        contrastive_loss(image[:3], text, temperature, IMAGE_IDS, TEXT_IDS)
