"""The demo set: no scene in two splits, captions that say what the pictures show, drawn once."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from mvle.data import shapes
from mvle.data.decode import decode_image
from mvle.data.errors import DataError
from mvle.data.evaluation_batch import evaluation_batch
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set with few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", few())
        folder = tmp_path_factory.mktemp("shapes")
        shapes.shape_shards("train", folder)
        yield folder


def few() -> dict[str, tuple[int, tuple[float, float, float]]]:
    return {split: (24 if split == "train" else 12, shares) for split, (_, shares) in shapes.SPLITS.items()}


def opened(home: Path, split: str) -> ShardSet:
    return ShardSet.open(sorted(str(path) for path in (home / "sentence").glob(f"{split}-*.tar")))


def test_no_scene_is_in_two_splits_and_held_out_ones_do_not_repeat() -> None:
    scenes = {split: {tuple(s) for s in found.tolist()} for split, found in shapes.split_scenes().items()}
    assert not scenes["train"] & scenes["val"]
    assert not scenes["train"] & scenes["test"]
    assert not scenes["val"] & scenes["test"]
    assert len(scenes["val"]) == len(scenes["test"]) == 256


def test_splits_have_the_promised_sizes_and_shares() -> None:
    for split, scenes in shapes.split_scenes().items():
        count, shares = shapes.SPLITS[split]
        objects = (scenes >= 0).sum(axis=1)
        assert len(scenes) == count
        assert np.allclose(np.bincount(objects, minlength=4)[1:] / count, shares, atol=0.005)


def test_captions_name_every_object_and_nothing_else(home: Path) -> None:
    shards = opened(home, "train")
    for row in range(shards.images):
        objects = json.loads(shards.extra(row, "scene.json") or b"")["objects"]
        phrases = {f"a {o['size']} {o['colour']} {o['shape']} in the {o['place']}" for o in objects}
        captions = shards.captions(row)
        assert all(set(caption.split(" and ")) == phrases for caption in captions)
        assert len(set(captions)) == min(len(objects), 2)


def test_pictures_show_the_colour_where_the_scene_says(home: Path) -> None:
    shards = opened(home, "val")
    for row in range(shards.images):
        pixels = decode_image(shards.image_bytes(row)).astype(int)
        for o in json.loads(shards.extra(row, "scene.json") or b"")["objects"]:
            centre = pixels[int(o["y"]), int(o["x"])]
            assert np.abs(centre - shapes.COLOURS[o["colour"]]).max() <= shapes.NOISE


def test_the_mask_is_where_the_picture_is_not_background(home: Path) -> None:
    shards = opened(home, "val")
    for row in range(shards.images):
        pixels = decode_image(shards.image_bytes(row)).astype(int)
        mask = decode_image(shards.extra(row, "objects.png") or b"")[:, :, 0] > 0
        away = np.abs(pixels - shapes.BACKGROUND).max(axis=2)
        assert (away[mask] > 10).all()
        assert np.median(away[~mask]) <= shapes.NOISE
        assert 0.01 < mask.mean() < 0.6


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_no_object_touches_another_quadrant(shape: str) -> None:
    o = {"colour": "red", "shape": shape, "size": "large", "radius": 13.0, "x": 16 + 1.5, "y": 48 - 1.5}
    _, masks = shapes.draw([[o]], np.array([0]))
    assert masks[0, 32:, :32].any()
    assert not masks[0, :32].any() and not masks[0, :, 32:].any()


def test_captions_without_filler_words_are_another_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shapes, "SPLITS", few())
    shards = ShardSet.open("shapes:test", str(tmp_path), "short")
    first = shards.captions(0)[0].split()
    assert not {"a", "in", "the", "and"} & set(first)
    assert first[0] in shapes.SIZES and first[1] in shapes.COLOURS and first[2] in shapes.SHAPES


def test_the_set_is_drawn_once_and_again_when_its_parameters_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shapes, "SPLITS", few())
    (path,) = shapes.shape_shards("val", tmp_path)
    first = path.stat().st_mtime_ns
    assert shapes.shape_shards("val", tmp_path)[0].stat().st_mtime_ns == first
    monkeypatch.setattr(shapes, "NOISE", 1)
    assert shapes.shape_shards("val", tmp_path)[0].stat().st_mtime_ns > first
    assert {p.name for p in tmp_path.iterdir()} == {"sentence", ".sentence.lock"}


def test_two_that_ask_at_once_get_one_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shapes, "SPLITS", few())
    found: list[list[Path]] = []
    threads = [threading.Thread(target=lambda: found.append(shapes.shape_shards("val", tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert ShardSet.open([str(found[0][0])]).images == 12


def test_the_same_bytes_are_drawn_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    monkeypatch.setattr(shapes, "SPLITS", few())
    (again,) = shapes.shape_shards("train", tmp_path)
    assert again.read_bytes() == (home / "sentence" / again.name).read_bytes()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sentence").mkdir()
    (tmp_path / "sentence" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"data\.shapes_folder: .* holds something else"):
        shapes.shape_shards("val", tmp_path)
    assert os.listdir(tmp_path / "sentence") == ["thesis.txt"]


def test_an_unknown_split_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one of test, train, val; got shapes:training"):
        ShardSet.open("shapes:training", str(tmp_path))


def test_evaluation_brings_masks_and_scenes_in_pixels_of_the_batch(home: Path) -> None:
    shards = opened(home, "test")
    tokenizer = train_bpe(shards.captions(0), 320)
    rows = range(shards.images)
    batch = evaluation_batch(shards, rows, [0] * len(rows), tokenizer, 32, 40, extras=True)
    assert batch.extras["objects"].shape == (12, 32, 32)
    for mask, scene, row in zip(batch.extras["objects"], batch.extras["scene"], rows, strict=True):
        stored = json.loads(shards.extra(row, "scene.json") or b"")
        assert scene["words"]["shape"] == list(shapes.SHAPES)
        for o, before in zip(scene["objects"], stored["objects"], strict=True):
            assert (o["x"], o["y"], o["radius"]) == (before["x"] / 2, before["y"] / 2, before["radius"] / 2)
            assert mask[int(o["y"]), int(o["x"])] == 1
