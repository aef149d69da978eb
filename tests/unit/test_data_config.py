"""The section `data`: how shards and sources are named, what is refused, and the set that comes of it."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import pytest
import yaml

from mvle.config import Config, ConfigError, describe, differences, load_config
from mvle.data.bad_images import BadImageError
from mvle.data.config import DataConfig, open_shards
from mvle.data.errors import DataError
from mvle.data.evaluation_batch import evaluation_batch
from mvle.data.indexing import index_shard
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.sources import describe_sources
from mvle.data.tokenizer import train_bpe

from .data_files import make_shards, spoil, write_shard

TWO = "data.train={coco: {shards: a.tar, weight: 1}, cc3m: {shards: [b.tar, c.tar], weight: 3}}"


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """coco/ with shards of 4 and 5 pairs, cc3m/ with one of 30."""
    for name, sizes in (("coco", [4, 5]), ("cc3m", [30])):
        (tmp_path / name).mkdir()
        make_shards(tmp_path / name, sizes)
    return tmp_path


def two_sources(folder: Path, **weights: float | None) -> DataConfig:
    given = {name: {"shards": f"{folder}/{name}/*.tar", "weight": weight} for name, weight in weights.items()}
    return DataConfig.model_validate({"train": given})


# --- reading ---------------------------------------------------------------------------------------------------------


def test_one_pattern_is_a_list_of_one_and_none_is_null() -> None:
    assert DataConfig.model_validate({"train": "shapes:train"}).train == ("shapes:train",)
    assert DataConfig.model_validate({"train": []}).train is None
    assert DataConfig.model_validate({"train": {}}).train is None
    assert DataConfig.model_validate({"train": {"coco": None}}).train is None
    assert [DataConfig().slots_for(total) for total in (32, 512, 48)] == [32, 64, 16]


def test_a_source_may_be_given_by_its_shards_alone() -> None:
    short = load_config(None, ["data.train={coco: a.tar, cc3m: [b.tar, c.tar]}"])
    long = load_config(None, ["data.train={coco: {shards: [a.tar]}, cc3m: {shards: [b.tar, c.tar], weight: null}}"])
    assert short == long
    assert short.data.patterns("train") == ["a.tar", "b.tar", "c.tar"]
    assert short.data.patterns("val") == []


def test_an_override_reaches_into_a_source_adds_one_and_leaves_one_out() -> None:
    config = load_config(
        None, [TWO, "data.train.coco.weight=2", "data.train.sbu={shards: d.tar, weight: 5}", "data.train.cc3m=null"]
    )
    found = config.data.sources("train")
    assert [(name, one.shards, one.weight) for name, one in found.items()] == [
        ("coco", ("a.tar",), 2.0),
        ("sbu", ("d.tar",), 5.0),
    ]


def test_a_list_of_shards_replaces_sources() -> None:
    assert load_config(None, [TWO, "data.train=x.tar"]).data.train == ("x.tar",)


def test_sources_read_back_equal_from_yaml_in_the_same_order(tmp_path: Path) -> None:
    config = load_config(None, [TWO])
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert list(yaml.safe_load(path.read_text())["data"]["train"]) == ["coco", "cc3m"]
    assert Config.from_dict(config.to_dict()) == config


def test_where_sources_lie_may_change_on_resume() -> None:
    assert differences(load_config(None, [TWO]), load_config(None, ["data.train=x.tar"])) == []


def test_help_names_the_keys_of_a_source() -> None:
    text = describe()
    assert "data.train.NAME.shards" in text and "data.train.NAME.weight" in text
    assert "list of text | sections | null" in text


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{coco: {shards: a.tar, wieght: 2}}", "unknown config key data.train.coco.wieght. Did you mean data"),
        ("{coco: {shards: a.tar, weight: 0}}", "data.train.coco.weight: expected number | null above 0; got 0 (int)."),
        ("{coco: {shards: a.tar, weight: true}}", "data.train.coco.weight: expected number | null above 0; got True"),
        ("{coco: {shards: a.tar, weight: .inf}}", "data.train.coco.weight: expected number | null above 0; got inf"),
        ("{coco: {shards: 3}}", "data.train.coco.shards: expected list of text of length at least 1; got 3 (int)."),
        ("{coco: {shards: []}}", "data.train.coco.shards: expected list of text of length at least 1; got []"),
        ("{coco: {weight: 3}}", "data.train.coco.shards: expected the shards of this source; got none."),
        ("{coco: 3}", "data.train.coco: expected shards, or shards and weight; got 3 (int)."),
        ("{a.b: x.tar}", "data.train: expected names of letters, digits, _ and -; got 'a.b'."),
        ("{2017: a.tar}", "data.train: expected names that are text; got 2017 (int). Put it in quotes."),
        (
            "{coco: {shards: a.tar, weight: 3}, sbu: b.tar, cc3m: c.tar}",
            "data.train: expected a weight for each source, or for none; sbu, cc3m got none.",
        ),
        ("3", "data.train: expected list of text | sections | null; got 3 (int)."),
    ],
)  # fmt: skip
def test_a_mistake_in_a_source_is_named(train: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"data.train={train}"])
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0


def test_mistakes_of_several_sources_come_with_those_of_other_sections() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["data.train={coco: {shards: 3, weight: -1}, sbu: 3}", "optim.lr=-1"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "config key data.train.coco.shards",
        "config key data.train.coco.weight",
        "config key data.train.sbu",
        "config key optim.lr",
    ]


def test_there_is_room_for_256_sources() -> None:
    named = {f"s{i}": f"{i}.tar" for i in range(257)}
    with pytest.raises(ValueError, match="expected at most 256 sources; got 257"):
        DataConfig.model_validate({"train": named})
    del named["s0"]
    assert len(DataConfig.model_validate({"train": named}).sources("train")) == 256


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_training_has_several_sources(split: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{split}: expected list of text \| null; got \{{'a': 'x.tar'\}}"):
        load_config(None, [f"data.{split}={{a: x.tar}}"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("crop_scale", [0.5, 1.5], "at most 1"),
        ("crop_scale", [0.9, 0.5], "0 < low <= high"),
        ("crop_aspect", [0, 1], "0 < low <= high"),
        ("fraction", 0, "greater than 0"),
    ],
)
def test_impossible_settings_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({key: value})


# --- the set ---------------------------------------------------------------------------------------------------------


def test_sources_become_one_set_whose_rows_know_their_source(sets: Path) -> None:
    shards = open_shards(two_sources(sets, coco=1, cc3m=3), "train")
    assert [(source.name, source.shards) for source in shards.sources] == [("coco", range(2)), ("cc3m", range(2, 3))]
    assert (shards.images, shards.pairs) == (39, 78)
    assert [shards.name(row) for row in (0, 8, 9, 38)] == ["coco:s0p0", "coco:s1p4", "cc3m:s0p0", "cc3m:s0p29"]
    assert ShardSet.open(f"{sets}/coco/*.tar").name(8) == "s1p4"


def test_the_fingerprint_holds_the_weights_and_neither_names_nor_paths(sets: Path) -> None:
    def fingerprint(**weights: float | None) -> str:
        return open_shards(two_sources(sets, **weights), "train").fingerprint

    listed = ShardSet.open([f"{sets}/coco/*.tar", f"{sets}/cc3m/*.tar"])
    by_hand = blake2b(b"".join(index.identity.encode() + b"\n" for index in listed.indexes), digest_size=16)
    weighted = fingerprint(coco=1, cc3m=3)
    assert listed.fingerprint == by_hand.hexdigest()  # as before there were sources
    assert fingerprint(coco=None, cc3m=None) == listed.fingerprint
    assert weighted == fingerprint(coco=0.1, cc3m=0.3)
    assert len({weighted, listed.fingerprint, fingerprint(coco=1, cc3m=1), fingerprint(cc3m=3, coco=1)}) == 4

    (sets / "coco").rename(sets / "moved")
    moved = {"x": {"shards": f"{sets}/moved/*.tar", "weight": 1}, "y": {"shards": f"{sets}/cc3m/*.tar", "weight": 3}}
    assert open_shards(DataConfig.model_validate({"train": moved}), "train").fingerprint == weighted


def test_shards_that_move_between_sources_change_the_fingerprint(sets: Path) -> None:
    def fingerprint(first: list[str], second: list[str]) -> str:
        named = {"a": {"shards": first, "weight": 1}, "b": {"shards": second, "weight": 1}}
        return open_shards(DataConfig.model_validate({"train": named}), "train").fingerprint

    one, two, three = (f"{sets}/{name}.tar" for name in ("coco/part-000", "coco/part-001", "cc3m/part-000"))
    assert fingerprint([one, two], [three]) != fingerprint([one], [two, three])


def test_a_shard_belongs_to_one_source(sets: Path) -> None:
    named = {"a": f"{sets}/coco/*.tar", "b": f"{sets}/coco/part-000.tar"}
    with pytest.raises(DataError, match=r"one source; .*coco/part-000\.tar is in data\.train\.a and \.b"):
        open_shards(DataConfig.model_validate({"train": named}), "train")


def test_a_source_without_a_usable_image_is_refused(sets: Path) -> None:
    (sets / "none").mkdir()
    path = write_shard(sets / "none" / "x.tar", [("bad", {"jpg": b"no image", "txt": b"a caption"})])
    index_shard(path)
    with pytest.raises(DataError, match=r"hold no usable image \(.*none/x\.tar"):
        open_shards(two_sources(sets, coco=None, none=None), "train")


def test_keys_of_a_batch_name_the_source(sets: Path) -> None:
    config = two_sources(sets, coco=1, cc3m=1)
    shards = open_shards(config, "train")
    plan = SamplingPlan(shards, seed=0, batch_total=12, slots=12)
    tokenizer = train_bpe(["picture number again"] * 3, 300)

    whole = Loader(config, plan, shards, tokenizer, 16, 12).load(3)
    parts = [Loader(config, plan, shards, tokenizer, 16, 12, rank=rank, ranks=4).load(3) for rank in range(4)]

    assert {key.partition(":")[0] for key in whole.keys} == {"coco", "cc3m"}
    assert [key for part in parts for key in part.keys] == whole.keys


def test_a_bad_image_is_named_with_its_source_and_replaced_from_it(sets: Path) -> None:
    config = two_sources(sets, coco=1, cc3m=1)
    shards = open_shards(config, "train")
    plan = SamplingPlan(shards, seed=0, batch_total=12, slots=12)
    bad = next(counter for counter in range(12) if plan.row(counter) < 9)
    spoil(shards, plan.row(bad))
    tokenizer = train_bpe(["picture number again"] * 3, 300)
    loader = Loader(config, plan, shards, tokenizer, 16, 12)

    batch = loader.load(0)

    assert batch.replaced >= 1 and batch.keys[bad].startswith("coco:")
    assert next(iter(loader.bad)).startswith(f"{shards.name(plan.row(bad))} (")
    with pytest.raises(BadImageError, match="coco:s"):
        evaluation_batch(shards, [plan.row(bad)], [0], tokenizer, 16, 12)


def test_the_start_of_a_run_lists_its_sources(sets: Path) -> None:
    def lines(train: object, **options: object) -> list[str]:
        shards = open_shards(DataConfig.model_validate({"train": train}), "train")
        plan = SamplingPlan(shards, seed=0, batch_total=12, slots=12, **options)  # type: ignore[arg-type]
        return describe_sources(shards, plan, 100)

    patterns = {name: f"{sets}/{name}/*.tar" for name in ("coco", "cc3m")}
    head, coco, cc3m = lines({name: {"shards": p, "weight": w} for (name, p), w in zip(patterns.items(), (1, 3))})
    assert head.startswith("39 images, 78 pairs, 3 shards, fingerprint ") and "epochs" not in head
    assert coco == "coco  9 images, 2 shards, weight 1: 25.0% of the pairs, 33.3 epochs"
    assert cc3m == "cc3m  30 images, 1 shards, weight 3: 75.0% of the pairs, 37.5 epochs"  # an epoch shows 24 of 30

    head, coco, cc3m = lines(patterns)
    assert head.endswith("; 33.3 epochs in 100 steps")  # an epoch shows 36 of 39
    assert (coco, cc3m) == ("coco  9 images, 2 shards", "cc3m  30 images, 1 shards")

    (head,) = lines(patterns["cc3m"], fraction=0.5)
    assert " of them by data.fraction=0.5), 60 pairs, 1 shards" in head
    weighted = {name: {"shards": pattern, "weight": 1} for name, pattern in patterns.items()}
    head, *parts = lines(weighted, fraction=0.5)
    used = [int(part.split(" of ")[0].split()[-1]) for part in parts]
    assert sum(used) < 39 and f"39 images ({sum(used)} of them by" in head
