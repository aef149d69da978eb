"""The loader with DALI gives the pairs that it gives with torch, in the same windows, whatever is bad in them."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from mvle.data import decoders, pairs
from mvle.data.batch import Batch
from mvle.data.config import DataConfig
from mvle.data.decode import Window
from mvle.data.errors import DataError
from mvle.data.indexing import index_shard
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer
from mvle.train import FINISHED, UNUSABLE, main

from .data_files import encode, make_shards, number_words, pair, picture, spoil, write_shard
from .faulty_shards import STEPS, loader_of, plan_of
from .photos import forms, forms_for_torch, photo
from .small_run import SMALL
from .small_run import write_shard as write_shapes
from .test_data_foreign import hostile_files

SIZE = 32


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return number_words()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """48 pairs: every form of image, and JPEGs."""
    images = list((forms(61, 83) | forms_for_torch()).values())
    images += [encode(picture(i, 40, 56)) for i in range(48 - len(images))]
    folder = tmp_path_factory.mktemp("mixed")
    paths = []
    for shard in range(2):
        members = [
            (f"s{shard}p{i}", {"jpg": image, "json": pair(i)["json"]}) for i, image in enumerate(images[shard::2])
        ]
        paths.append(str(write_shard(folder / f"part-{shard}.tar", members)))
        assert index_shard(Path(paths[-1])).left_out == []
    return ShardSet.open(paths)


def batches(shards: ShardSet, tokenizer: Tokenizer, decoder: str, **changes: Any) -> list[Batch]:
    config = DataConfig(decoder=decoder, **changes.pop("data", {}))
    return list(loader_of(shards, tokenizer, config=config, **{"image_size": SIZE, **changes}))


def identity(batch: Batch) -> tuple[Any, ...]:
    """Everything but the pixels."""
    return (
        batch.pair_ids.tolist(),
        batch.keys,
        batch.image_ratio,
        batch.text.rows.tolist(),
        batch.image_ids.tolist(),
        batch.text_ids.tolist(),
        batch.replaced,
        batch.truncated,
    )


def assert_alike(one: list[Batch], other: list[Batch]) -> None:
    """The same pairs through the same windows: pixels differ as much as the decoders do, on pictures of hard blocks."""
    assert [identity(batch) for batch in one] == [identity(batch) for batch in other]
    for a, b in zip(one, other, strict=True):
        assert a.images.shape == b.images.shape
        difference = (a.images.double() - b.images.double()).abs().mean((1, 2, 3))
        assert difference.max() < 1.0, a.keys[int(difference.argmax())]


def watch_windows(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, Window, bool], int]:
    """How often each image was shown through each window."""
    seen: dict[tuple[str, Window, bool], int] = {}
    fetch = pairs.fetch

    def watched(*arguments: Any) -> Any:
        image = fetch(*arguments)
        key = image.name, image.window, image.flip
        seen[key] = seen.get(key, 0) + 1
        return image

    monkeypatch.setattr("mvle.data.loader.fetch", watched)
    return seen


def test_both_decoders_give_the_same_pairs_windows_and_texts(
    mixed: ShardSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = []
    for decoder in ("torch", "dali"):
        with monkeypatch.context() as patch:
            seen = watch_windows(patch)
            windows.append((batches(mixed, tokenizer, decoder), seen))
    assert_alike(windows[0][0], windows[1][0])
    assert windows[0][1] == windows[1][1] and len(windows[0][1]) > 70


@pytest.mark.parametrize(("first", "then"), [("torch", "dali"), ("dali", "torch")])
def test_a_run_goes_on_with_the_other_decoder_and_other_ranks(
    mixed: ShardSet, tokenizer: Tokenizer, first: str, then: str
) -> None:
    straight = batches(mixed, tokenizer, first)
    for start, ranks in ((3, 2), (5, 3)):
        parts = [
            batches(mixed, tokenizer, then, start_step=start, rank=rank, ranks=ranks, data={"threads": 1 + rank})
            for rank in range(ranks)
        ]
        for step in range(start, STEPS):
            whole, share = straight[step], [part[step - start] for part in parts]
            assert [key for part in share for key in part.keys] == whole.keys
            assert torch.cat([part.pair_ids for part in share]).tolist() == whole.pair_ids.tolist()
            assert torch.cat([part.text_ids for part in share]).tolist() == whole.text_ids.tolist()
            difference = torch.cat([part.images for part in share]).double() - whole.images.double()
            assert difference.abs().mean((1, 2, 3)).max() < 1.0


def test_bad_images_get_the_same_replacements_with_both(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_shards(tmp_path, [20, 17, 11])
    plan = plan_of(shards)
    for row in {plan.row(15), plan.row(15, 1), 0, 21, 47}:
        spoil(shards, row)
    torchs = batches(shards, tokenizer, "torch")
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        dalis = batches(shards, tokenizer, "dali")
    assert_alike(torchs, dalis)
    assert sum(batch.replaced for batch in dalis) >= 5
    assert caplog.text.count("gets replaced: its bytes are not those that were indexed") == 5


def damaged_shard(folder: Path) -> tuple[ShardSet, set[str]]:
    """48 photos, a third of them cut off, indexed without decoding; and the keys of those. Many windows lie above the
    cut, and a decoder of windows does not look below them."""
    members, bad = [], set()
    for i in range(48):
        data = encode(photo(i, 120, 60))
        if i % 3 == 1:
            data = data[: int(len(data) * (0.6 + 0.02 * (i % 20)))]
            bad.add(f"p{i:02d}")
        members.append((f"p{i:02d}", {"jpg": data, "json": pair(i)["json"]}))
    path = write_shard(folder / "damaged.tar", members)
    assert index_shard(path, verify=False).left_out == []
    return ShardSet.open(str(path)), bad


def test_damage_that_nobody_looked_for_is_met_alike_by_both_decoders_on_any_ranks(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> ShardSet:  # what a set has seen it keeps
        return ShardSet.open(str(tmp_path / "damaged.tar"))

    shards, bad = damaged_shard(tmp_path)
    many = {"max_bad_share": 0.5}
    torchs = batches(shards, tokenizer, "torch", data=many)
    dalis = batches(opened(), tokenizer, "dali", data=many)
    assert_alike(torchs, dalis)
    assert sum(batch.replaced for batch in torchs) > len(bad)
    assert not bad & {key for batch in dalis for key in batch.keys}
    for start in (0, 3):
        shares = [
            batches(opened(), tokenizer, "dali", data=many, rank=rank, ranks=3, start_step=start) for rank in range(3)
        ]
        for step, parts in enumerate(zip(*shares, strict=True)):
            assert [key for part in parts for key in part.keys] == torchs[start + step].keys
            assert sum(part.replaced for part in parts) == torchs[start + step].replaced

    monkeypatch.setattr(ShardSet, "verified", lambda *_: True)
    unseen = batches(opened(), tokenizer, "dali", data=many)
    assert bad & {key for batch in unseen for key in batch.keys}, "DALI alone shows some of them: they are good tests"


def test_each_image_is_decoded_by_torch_once_before_dali_where_nobody_had(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, bad = damaged_shard(tmp_path)
    good = {shards.key(row) for row in range(shards.images)} - bad
    by_torch: list[str] = []
    decode = decoders.decode_one
    monkeypatch.setattr(decoders, "decode_one", lambda one, size: (by_torch.append(one.name), decode(one, size))[1])
    loader = loader_of(
        shards, tokenizer, image_size=SIZE, steps=20, config=DataConfig(decoder="dali", max_bad_share=0.5)
    )
    for step in range(20):  # one after the other, so that none is in flight twice before it is known
        loader.load(step)
    loader.close()
    seen = Counter(name for name in by_torch if name in good)
    assert set(seen) == good and set(seen.values()) == {1}
    assert all(shards.verified(row) == (shards.key(row) in good) for row in range(shards.images))
    assert shards.unverified_shards == 1


def test_what_dali_alone_fails_is_shown_by_torch_or_replaced(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bytes would be that an older torch took for good when they were indexed."""
    shards = make_shards(tmp_path, [48])
    plan, whole = plan_of(shards), shards.image_bytes
    bad = {plan.row(2), plan.row(15), plan.row(16), plan.row(15, 1)}
    monkeypatch.setattr(shards, "image_bytes", lambda row: b"\xff\xd8\xff" + bytes(300) if row in bad else whole(row))
    monkeypatch.setattr(pairs.zlib, "crc32", lambda data: 0)
    monkeypatch.setattr(shards, "image_crc32", lambda row: 0)
    torchs, dalis = batches(shards, tokenizer, "torch"), batches(shards, tokenizer, "dali")
    assert_alike(torchs, dalis)
    names = {shards.key(row) for row in bad}
    assert not names & {key for batch in dalis for key in batch.keys}
    assert sum(batch.replaced for batch in dalis) >= 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_hostile_files_are_shown_replaced_or_left_out_and_end_no_run(
    tmp_path: Path, tokenizer: Tokenizer, verify: bool
) -> None:
    members, good = [], set()
    for name, (data, reason) in hostile_files().items():
        key, suffix = name.partition(".")[0] + name.rpartition(".")[2], name.rpartition(".")[2]
        members.append((key, {suffix: data, "json": json.dumps({"captions": ["a picture"]}).encode()}))
        if reason is None:
            good.add(key)
    path = write_shard(tmp_path / "a.tar", members)
    index_shard(path, verify=verify)

    shown, bad = {}, {}
    for decoder in ("torch", "dali"):
        shards = ShardSet.open(str(path))
        with loader_of(shards, tokenizer, config=DataConfig(decoder=decoder, max_bad_share=0.5), steps=3) as loader:
            shown[decoder], bad[decoder] = list(loader), set(loader.bad)

    assert_alike(shown["torch"], shown["dali"])
    assert bad["torch"] == bad["dali"]
    left_out = {key for key, _ in shards.indexes[0].left_out}
    replaced = {name.partition(" ")[0] for name in bad["dali"]}
    assert {key for batch in shown["dali"] for key in batch.keys} == good
    assert left_out | replaced == {key for key, _ in members} - good and not left_out & replaced
    assert bool(replaced) != verify


def test_threads_and_prefetch_do_not_change_what_dali_gives(mixed: ShardSet, tokenizer: Tokenizer) -> None:
    expected = batches(mixed, tokenizer, "dali")
    for data in ({"threads": 1, "prefetch": 1}, {"threads": 3, "prefetch": 4}):
        for got, want in zip(batches(mixed, tokenizer, "dali", data=data), expected, strict=True):
            assert identity(got) == identity(want) and torch.equal(got.images, want.images)


def test_a_batch_that_dali_gave_stays_as_it_is(mixed: ShardSet, tokenizer: Tokenizer) -> None:
    with loader_of(mixed, tokenizer, config=DataConfig(decoder="dali"), image_size=SIZE) as loader:
        iterator = iter(loader)
        first = next(iterator)
        kept = first.images.clone()
        list(iterator)
    assert torch.equal(first.images, kept)


@pytest.mark.gpu
def test_on_a_gpu_the_loader_gives_the_same_pairs_in_its_memory(mixed: ShardSet, tokenizer: Tokenizer) -> None:
    expected = batches(mixed, tokenizer, "torch")
    device = torch.device("cuda", torch.cuda.current_device())
    loader = loader_of(
        mixed, tokenizer, config=DataConfig(decoder="auto"), image_size=SIZE, pin_memory=True, device=device
    )
    assert loader.decoder.name == "dali"
    for batch, want in zip(loader, expected, strict=True):
        assert batch.images.device == device and batch.text.rows.is_pinned()
        assert identity(batch) == identity(want)
        assert (batch.images.cpu().double() - want.images.double()).abs().mean() < 2.0
        assert batch.to(device).images is batch.images


def test_a_run_says_which_decoder_it_has_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_shapes(tmp_path / "shapes.tar")
    arguments = [f"data.train={shard}", "data.val=null", "evaluation.every=0", f"run.folder={tmp_path / 'run'}"]
    assert main(["tiny", *SMALL, *arguments, "data.decoder=dali"]) == FINISHED
    out = capsys.readouterr().out
    assert re.search(r"^decoder     dali: DALI [\d.]+ on the CPU$", out, re.MULTILINE), out
    assert "step 2/2" in out

    index_shard(shard, verify=False)
    arguments[-1] = f"run.folder={tmp_path / 'other'}"
    assert main(["tiny", *SMALL, *arguments, "data.decoder=dali"]) == FINISHED
    first = r" on the CPU; torch decodes each image of 1 of 1 shards first, once a rank \(indexed with --no-verify\)$"
    assert re.search(first, capsys.readouterr().out, re.MULTILINE)


def test_a_run_that_cannot_have_dali_ends_before_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mvle.data.decoders._find_dali", lambda: (None, "DALI is not installed: pip install …"))
    shard = write_shapes(tmp_path / "shapes.tar")
    arguments = [f"data.train={shard}", f"data.val={shard}", f"run.folder={tmp_path / 'run'}", "data.decoder=dali"]
    assert main(["tiny", *SMALL, *arguments]) == UNUSABLE
    said = capsys.readouterr()
    assert "data.decoder=dali needs DALI; DALI is not installed: pip install" in said.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_dali_that_is_demanded_and_not_there_is_told_before_any_step(
    mixed: ShardSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvle.data.decoders._find_dali", lambda: (None, "DALI is not installed: pip install …"))
    with pytest.raises(DataError, match=r"data\.decoder=dali needs DALI; .* pip install"):
        loader_of(mixed, tokenizer, config=DataConfig(decoder="dali"))
    assert np.array_equal(
        batches(mixed, tokenizer, "auto")[0].images.numpy(), batches(mixed, tokenizer, "torch")[0].images.numpy()
    )
