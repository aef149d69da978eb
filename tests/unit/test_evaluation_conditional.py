"""The conditionals: what true, wrong and no partner mean, which masks, which pixels, which words."""

from __future__ import annotations

import pytest
import torch
from mvle_kernels import patchify

from mvle.data.shapes import BACKGROUND
from mvle.evaluation.conditional import (
    background_colour,
    class_ids,
    conditional,
    laplace_nats,
    mask_each,
    object_values,
    pixel_difference,
)
from mvle.evaluation.split import Split, SplitError, mask_words, patch_masks, patch_values, to_images

from .small_run import IMAGES, small_parts, write_shard


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return small_parts(write_shard(tmp_path_factory.mktemp("set") / "pairs.tar"))


@pytest.fixture(scope="module")
def split(parts):
    config, shards, tokenizer, _ = parts
    return Split(config, shards, tokenizer, 0)


class Painter:
    """Rebuilds the true image where the caption is the true one, white elsewhere; knows each word if it sees the image
    of its caption, and else says word 0."""

    def __init__(self, split):
        self.config = split.config
        batch = split.batch(range(len(split)))
        self.images, self.texts = batch.images, [t.tolist() for t in batch.text.unpack()]

    def caption_of(self, image):
        return self.texts[next(i for i, known in enumerate(self.images) if torch.equal(known, image))]

    def reconstruct(self, images, masked, text):
        values = patchify(images, 16, (0, 0, 0), (1, 1, 1))
        given = [[]] * len(images) if text is None else [t.tolist() for t in text.unpack()]
        assert not any(given) or all(given), "captions of one kind in a call"
        for i, image in enumerate(images):
            if given[i] != self.caption_of(image):
                values[i][masked[i]] = 2.0  # clipped to white
        return values

    def fill(self, text, positions, images):
        logits = torch.zeros(sum(positions.lengths), 1000)
        logits[:, 0] = 1.0
        at = 0
        for i, caption in enumerate(text.unpack()):
            for _ in range(positions.lengths[i]):
                if images is not None:
                    truth = self.caption_of(images[i])
                    if len(truth) == len(caption):
                        spot = int(positions.rows[at]) - int(text.offsets[i])
                        logits[at, truth[spot]] = 20.0
                at += 1
        return logits


def test_the_true_partner_is_told_from_a_wrong_one_and_from_none(split):
    found = conditional(Painter(split), split, seed=1, device="cpu")
    mim, mlm = found["mim"], found["mlm"]
    assert max(mim["true"], mim["objects"]["true"], mim["caption_alone"]["true"]) < 1e-6
    assert mim["wrong"] == mim["none"] == pytest.approx(mim["caption_alone"]["wrong"], abs=0.05)
    assert mim["wrong"] > 0.75, "white on a dark picture, over masked pixels alone"
    assert 0 < mim["background"] < mim["objects"]["background"]
    assert mlm["true"]["accuracy"] == 1 and mlm["true"]["classes"] == {"colour": 1, "shape": 1}
    assert mlm["wrong"]["accuracy"] < 1 and mlm["none"]["accuracy"] == 0
    assert mlm["true"]["loss"] < 0.01 < mlm["wrong"]["loss"]


def test_each_word_of_a_class_is_masked_once_and_alone(parts, split):
    tokenizer = parts[2]
    batch = split.batch(range(5))
    ids = class_ids(split, {"red", "green", "blue", "yellow", "purple", "cyan"})

    masked, pairs = mask_each(batch.text, ids, tokenizer.mask_id)

    captions = batch.text.unpack()
    assert len(masked.targets) == 5 * 2, "two objects a picture"
    assert pairs.tolist() == sorted(list(range(5)) * 2)
    assert masked.text.rows[masked.positions.rows.long()].tolist() == [tokenizer.mask_id] * 10
    for caption, pair, target in zip(masked.text.unpack(), pairs.tolist(), masked.targets.tolist(), strict=True):
        changed = (caption != captions[pair]).nonzero().flatten()
        assert len(changed) == 1 and captions[pair][changed] == target and target in ids


def test_a_model_has_the_form_of_the_results_file(parts, split):
    found = conditional(parts[3], split, seed=1, device="cpu")
    assert set(found) == {"mlm", "mim"}
    assert set(found["mlm"]) == {"true", "wrong", "none"}
    for figures in found["mlm"].values():
        assert set(figures) == {"loss", "accuracy", "image_alone", "classes", "together"}
        assert set(figures["classes"]) == set(figures["together"]) == {"colour", "shape"}
    assert set(found["mim"]) == {"true", "wrong", "none", "background", "objects", "caption_alone", "nats"}
    assert set(found["mim"]["objects"]) == {"true", "wrong", "background"}
    every = {"true", "wrong", "none", "background"}
    assert set(found["mim"]["caption_alone"]) == set(found["mim"]["nats"]["masked"]) == every
    for name, difference in found["mim"]["caption_alone"].items():
        assert found["mim"]["nats"]["caption_alone"][name] == laplace_nats(difference)
        assert found["mim"]["nats"]["masked"][name] == laplace_nats(found["mim"][name])


def test_figures_do_not_depend_on_the_chunk(parts, split, monkeypatch):
    whole = conditional(parts[3], split, seed=1, device="cpu")
    monkeypatch.setattr(Split, "chunks", lambda self, size=5: (range(i, min(i + 5, 12)) for i in range(0, 12, 5)))
    chunked = conditional(parts[3], split, seed=1, device="cpu")
    assert chunked["mlm"]["true"]["loss"] == pytest.approx(whole["mlm"]["true"]["loss"], rel=1e-5)
    for name in ("true", "wrong", "none", "background"):
        assert chunked["mim"][name] == pytest.approx(whole["mim"][name], rel=1e-5)


def test_a_set_without_scenes_has_no_classes_and_no_objects(tmp_path):
    config, shards, tokenizer, model = small_parts(write_shard(tmp_path / "plain.tar", 6, extras=False))
    found = conditional(model, Split(config, shards, tokenizer, 0), 1, "cpu")
    assert set(found["mlm"]["true"]) == {"loss", "accuracy", "image_alone"} and "objects" not in found["mim"]


@pytest.mark.parametrize("off, left", [("mlm", "mim"), ("mim", "mlm")])
def test_what_was_not_trained_is_left_out(tmp_path, off, left):
    shard = write_shard(tmp_path / "pairs.tar", 6)
    config, shards, tokenizer, model = small_parts(shard, objectives={off: {"weight": 0}, "itm": {"group": 4}})
    assert set(conditional(model, Split(config, shards, tokenizer, 0), 1, "cpu")) == {left}


def test_a_wrong_partner_shares_neither_image_nor_caption(tmp_path):
    config, shards, tokenizer, _ = small_parts(write_shard(tmp_path / "pairs.tar", 4, repeat_first=True))
    assert Split(config, shards, tokenizer, 0).partners() == [1, 2, 3, 1], "3 equals 0, so it goes on to 1"


def test_a_wrong_partner_shares_no_caption_though_its_image_differs(parts):
    config, shards, tokenizer, _ = parts
    split = Split(config, shards, tokenizer, 4)
    split.text_ids[1] = [77, split.text_ids[0][1]]
    assert split.partners() == [2, 2, 3, 0]


def test_a_split_of_equal_pairs_has_no_wrong_partner(tmp_path):
    config, shards, tokenizer, _ = small_parts(write_shard(tmp_path / "pairs.tar", 2, repeat_first=True))
    with pytest.raises(SplitError, match="pair0000 shares its image or a caption with all 2 images"):
        Split(config, shards, tokenizer, 0).partners()


def test_fewer_pairs_are_the_same_ones_with_the_same_masks(parts, split):
    config, shards, tokenizer, _ = parts
    few = Split(config, shards, tokenizer, 5)
    assert len(few) == 5 and set(few.rows) < set(split.rows)
    ids, all_ids = few.batch(range(5)).pair_ids, split.batch(range(IMAGES)).pair_ids
    masks, all_masks = patch_masks(config, 1, ids, 0.6), patch_masks(config, 1, all_ids, 0.6)
    assert torch.equal(masks, all_masks[ids])
    assert masks.sum(1).tolist() == [10] * 5, "ceil(.6 of 16)"


def test_every_chosen_word_becomes_the_mask_token_and_no_special_does(parts, split):
    config, _, tokenizer, _ = parts
    batch = split.batch(range(IMAGES))
    masked = mask_words(config, 1, batch.pair_ids, batch.text, tokenizer.mask_id, tokenizer.vocabulary)
    chosen = masked.positions.rows[: len(masked.targets)].long()
    assert (masked.text.rows[chosen] == tokenizer.mask_id).all()
    assert torch.equal(batch.text.rows[chosen].long(), masked.targets)
    changed = (masked.text.rows != batch.text.rows).nonzero().squeeze(1)
    assert torch.equal(changed, chosen.sort().values)
    assert not set(masked.targets.tolist()) & set(tokenizer.special_ids)


def test_the_background_is_the_colour_outside_the_objects(split):
    colour = background_colour(split) * 255
    assert torch.allclose(colour, torch.tensor(BACKGROUND, dtype=torch.float32), atol=1.5)


def test_object_values_are_pixels_of_objects(split):
    batch = split.batch(range(3), extras=True)
    inside = object_values(batch, 16)
    values = patch_values(batch.images, 16)
    assert inside.shape == values.shape
    assert values[inside].float().mean() > 3 * values[~inside].float().mean()


def test_patches_and_pixels_are_each_others_inverse(split):
    images = split.batch(range(3)).images
    assert torch.equal(to_images(patch_values(images, 16).float() / 255, 16, (4, 4)), images)
    torch.testing.assert_close(patch_values(images, 16).float() / 255, patchify(images, 16, (0, 0, 0), (1, 1, 1)))


def test_predictions_are_clipped_before_they_are_compared():
    images = torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    assert pixel_difference(torch.full((1, 1, 768), 7.0), images, 16).max() == 0
    assert pixel_difference(torch.full((1, 1, 768), -7.0), images, 16).min() == 1


def test_with_all_words_masked_bos_and_eos_alone_are_left(parts, split):
    tokenizer, batch = parts[2], split.batch(range(3))
    masked = mask_words(parts[0], 0, batch.pair_ids, batch.text, tokenizer.mask_id, tokenizer.vocabulary, ratio=1.0)
    at = 0
    for caption, truth in zip(masked.text.unpack(), batch.text.unpack(), strict=True):
        assert caption.tolist() == [tokenizer.bos_id, *[tokenizer.mask_id] * (len(truth) - 2), tokenizer.eos_id]
        assert masked.targets[at : at + len(truth) - 2].tolist() == truth[1:-1].tolist()
        at += len(truth) - 2


def test_a_model_that_knows_only_how_often_words_come_needs_their_entropy(parts, split):
    """With every word masked it pays, a word, the entropy of that distribution, and a caption the sum of its words."""
    tokenizer = parts[2]
    words = torch.cat([caption[1:-1].long() for caption in split.batch(range(len(split))).text.unpack()])
    share = torch.bincount(words, minlength=tokenizer.vocabulary).double() / len(words)
    entropy = -(share * share.log())[share > 0].sum().item()

    class Frequencies(Painter):
        def fill(self, text, positions, images):
            return share.clamp(min=1e-30).log().float().expand(sum(positions.lengths), -1)

    figures = conditional(Frequencies(split), split, seed=1, device="cpu")["mlm"]

    for partner in ("true", "wrong", "none"):
        alone = figures[partner]["image_alone"]
        assert alone["loss"] == pytest.approx(entropy, rel=1e-5)
        assert alone["caption"] == pytest.approx(entropy * len(words) / len(split), rel=1e-5)
        assert alone["accuracy"] == pytest.approx(share.max().item())


def test_pixels_as_nats_are_a_laplace_density_at_its_likeliest_scale():
    x = torch.distributions.Laplace(0.0, 0.3).sample((20_000,)).double()
    d = x.abs().mean().item()
    likeliest = min(
        -torch.distributions.Laplace(0.0, scale).log_prob(x).mean().item() for scale in (0.9 * d, d, 1.1 * d)
    )
    assert laplace_nats(d) == pytest.approx(likeliest, rel=1e-6)
    assert laplace_nats(0.0) is None and laplace_nats(None) is None
