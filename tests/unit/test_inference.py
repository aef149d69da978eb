"""`mvle.load`: what it gives, which images it takes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import mvle
from mvle.evaluation.retrieval import embed
from mvle.evaluation.split import Split
from mvle.inference import RunError

from .small_run import small_parts, small_run

TEXTS = ["a small red circle in the top left", "a large blue cross in the bottom right", "green square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("load") / "run")


@pytest.fixture(scope="module")
def run(folder):
    return mvle.load(str(folder.path))


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))


def test_embeddings_have_unit_length_and_do_not_depend_on_their_company(run, images):
    z_i, z_t = run.encode_images(images), run.encode_texts(TEXTS)
    assert z_i.shape == z_t.shape == (3, 16) and z_i.dtype == z_t.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([z_i, z_t]), axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(run.encode_images(images[1:2])[0], z_i[1], atol=1e-5)
    np.testing.assert_allclose(run.encode_texts(TEXTS[1:2])[0], z_t[1], atol=1e-5)


def test_a_loaded_run_sees_what_evaluation_sees(run, folder):
    _, shards, tokenizer, model = small_parts(folder.path.parent / "pairs.tar")
    split = Split(run.config, shards, tokenizer, 0)
    found = embed(model, split, "cpu", "first", keep_rows=False)
    pictures = [Image.fromarray(p) for p in split.batch(range(len(split))).images.numpy()]
    np.testing.assert_allclose(run.encode_images(pictures), found.image_z.numpy(), atol=1e-5)
    np.testing.assert_allclose(run.encode_texts([c[0] for c in split.captions]), found.text_z.numpy(), atol=1e-5)


def test_images_of_every_kind_are_taken(run, images):
    grey = np.full((80, 50), 200, np.uint8)
    alpha = np.dstack([images[0], np.full((64, 64), 255, np.uint8)])
    kinds = [grey, grey[:, :, None], alpha, Image.fromarray(images[0]).convert("P"), Image.fromarray(grey), images[0]]
    z = run.encode_images(kinds)
    np.testing.assert_allclose(z[0], z[1], atol=1e-6)
    np.testing.assert_allclose(z[2], z[5], atol=1e-6)
    np.testing.assert_allclose(z[0], z[4], atol=1e-6)
    np.testing.assert_allclose(run.encode_images(np.stack(images)), run.encode_images(images), atol=1e-6)


def test_a_turned_photo_is_turned_upright(run, images):
    turned = Image.fromarray(np.rot90(images[0], -1).copy())  # as a camera stores it, on its side
    turned.getexif()[0x0112] = 8
    np.testing.assert_allclose(run.encode_images([turned]), run.encode_images(images[:1]), atol=1e-6)


def test_match_goes_pair_by_pair(run, images):
    odds = run.match(images, TEXTS)
    assert odds.shape == (3,) and np.isfinite(odds).all()
    np.testing.assert_allclose(run.match(images[2:], TEXTS[2:]), odds[2:], atol=1e-5)


def test_fill_gives_one_word_a_mask(run, images):
    texts = ["a <mask> circle in the <mask> left", "<mask>", "a large <mask>"]
    words = run.fill(images, texts)
    assert [len(w) for w in words] == [2, 1, 1]
    assert [len(w) for w in run.fill(None, texts)] == [2, 1, 1]
    assert run.fill(images[2:], texts[2:]) == words[2:]


def test_fill_never_answers_with_a_special_token_even_if_the_model_prefers_it(folder, images):
    run = mvle.load(str(folder.path))
    run.model.heads.tokens.bias[list(run.tokenizer.special_ids)] = 100.0
    words = run.fill(images, ["a <mask> circle"] * 3)
    assert not {w for own in words for w in own} & {"<mask>", "<s>", "</s>", "<pad>", "<unk>"}


def test_reconstruct_changes_masked_patches_alone(run, images):
    pictures, masks = run.reconstruct(images, TEXTS, ratio=0.5, seed=3)
    assert pictures.shape == (3, 64, 64, 3) and pictures.dtype == np.uint8
    assert masks.shape == (3, 16) and masks.dtype == np.bool_ and masks.sum(1).tolist() == [8, 8, 8]
    visible = np.repeat(np.repeat(~masks.reshape(3, 4, 4), 16, 1), 16, 2)
    np.testing.assert_array_equal(pictures[visible], np.stack(images)[visible])
    assert (pictures[~visible] != np.stack(images)[~visible]).mean() > 0.9


def test_reconstruct_takes_masks_or_draws_them_from_the_seed(run, images):
    given = np.zeros((3, 16), bool)
    given[:, 5] = True
    _, masks = run.reconstruct(images, TEXTS, masks=given)
    np.testing.assert_array_equal(masks, given)
    _, first = run.reconstruct(images, TEXTS, seed=1)
    _, again = run.reconstruct(images, None, seed=1)
    _, other = run.reconstruct(images, TEXTS, seed=2)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and first.sum(1).tolist() == [10, 10, 10], "the low end of the run's range"


def test_nothing_gives_nothing(run):
    assert run.encode_images([]).shape == (0, 16) and run.match([], []).shape == (0,) and run.fill([], []) == []


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda r, i: r.match(i, TEXTS[:2]), ValueError, "3 images and 2 texts"),
        (lambda r, i: r.reconstruct(i, TEXTS[:2]), ValueError, "3 images and 2 texts"),
        (lambda r, i: r.fill(i, TEXTS), ValueError, "at least one <mask>"),
        (lambda r, i: r.encode_texts(["red " * 60]), ValueError, "at most 40 tokens"),
        (lambda r, i: r.encode_texts("red"), TypeError, "list of str"),
        (lambda r, i: r.encode_texts([3]), TypeError, "list of str"),
        (lambda r, i: r.encode_images([i[0].astype(np.float32)]), TypeError, "uint8 array"),
        (lambda r, i: r.encode_images([i[0][:, :, :2]]), TypeError, r"\[64, 64, 2\]"),
        (lambda r, i: r.encode_images(Image.fromarray(i[0])), TypeError, "a list of PIL images"),
        (lambda r, i: r.encode_images(["photo.jpg"]), TypeError, "an image must be"),
        (lambda r, i: r.reconstruct(i, TEXTS, ratio=1.5), ValueError, "0..1; got 1.5"),
        (lambda r, i: r.reconstruct(i, TEXTS, masks=np.zeros((3, 9), bool)), ValueError, r"\[3, 16\]"),
        (lambda r, i: r.reconstruct(i, TEXTS, masks=np.zeros((3, 16))), ValueError, "must be bool"),
        (lambda r, i: r.reconstruct(i, TEXTS, 0.5, np.zeros((3, 16), bool)), ValueError, "not both"),
    ],
)
def test_a_wrong_call_says_what_was_expected(run, images, call, error, words):
    with pytest.raises(error, match=words):
        call(run, images)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="must be the folder of a run"):
        mvle.load(str(tmp_path))


def test_nothing_asks_for_gradients(run):
    assert not any(p.requires_grad for p in run.model.parameters()) and not run.model.training
