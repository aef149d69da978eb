"""Words: training repeats, bos and eos stay, masks are kept, and what cannot be fetched is said within seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mvle.data.tokenizer import (
    SPECIALS,
    Tokenizer,
    TokenizerConfig,
    TokenizerError,
    build_tokenizer,
    check_tokenizer,
    train_bpe,
)

from .data_files import make_shards

CAPTIONS = ["A small red circle in the top left", "a large blue square, on its own", "Zwei große Hunde"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(CAPTIONS, 400)


def test_special_tokens_come_first_in_robertas_order(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert [tokenizer.word(i) for i in range(5)] == list(SPECIALS)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert 261 < tokenizer.vocabulary <= 400


def test_a_frequent_word_is_one_token_wherever_it_stands_and_however_written(tokenizer: Tokenizer) -> None:
    (first, second, third), _ = tokenizer.encode(["red", "a red", "A RED"], 8)
    assert first[1:-1] == second[2:-1] == third[2:-1]
    assert tokenizer.word(first[1]) == "red"


def test_any_text_comes_back_lower_case(tokenizer: Tokenizer) -> None:
    text = "Zwei GROSSE Hunde — 你好, naïve 🐕!"
    ids, cut = tokenizer.encode([text], 200)
    assert tokenizer.decode(ids[0]) == text.lower() and cut == 0


def test_a_long_caption_is_cut_and_keeps_bos_and_eos(tokenizer: Tokenizer) -> None:
    ids, cut = tokenizer.encode([CAPTIONS[0], "red"], 5)
    assert cut == 1
    assert len(ids[0]) == 5 and ids[0][0] == tokenizer.bos_id and ids[0][-1] == tokenizer.eos_id
    assert len(ids[1]) == 3


def test_the_literal_mask_is_the_mask_token(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer.encode(["a small <mask> circle"], 12)
    assert ids[0].count(tokenizer.mask_id) == 1
    assert tokenizer.decode(ids[0]) == "a small <mask> circle"
    assert len(ids[0]) == len(tokenizer.encode(["a small red circle"], 12)[0][0])


def test_an_empty_caption_is_bos_and_eos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode([""], 8) == ([[0, 2]], 0)


def test_training_twice_gives_one_vocabulary_in_any_process(tokenizer: Tokenizer) -> None:
    code = (
        "from mvle.data.tokenizer import train_bpe; from tests.unit.test_data_tokenizer import CAPTIONS;"
        "print(train_bpe(CAPTIONS, 400).fingerprint)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join([root, *sys.path])},
    )
    assert done.stdout.strip() == tokenizer.fingerprint


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(CAPTIONS, 9) == tokenizer.encode(CAPTIONS, 9)


def test_a_run_keeps_the_tokenizer_that_it_has(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [4])
    first = build_tokenizer(TokenizerConfig(kind="bpe", vocabulary=320), shards, tmp_path / "run" / "tokenizer")
    again = build_tokenizer(TokenizerConfig(kind="bpe", vocabulary=9000), shards, tmp_path / "run" / "tokenizer")
    assert first.fingerprint == again.fingerprint
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["tokenizer"]


def test_transformers_reads_a_saved_tokenizer_and_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tokenizer.save(tmp_path / "tokenizer")
    (folder / "mvle_tokenizer.json").unlink()  # now it is a folder like any other
    wrapped = Tokenizer.load(folder)
    assert wrapped.encode(CAPTIONS, 9) == tokenizer.encode(CAPTIONS, 9)
    assert wrapped.special_ids == tokenizer.special_ids


def test_a_published_tokenizer_without_mask_token_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tokenizer.save(tmp_path / "tokenizer")
    (folder / "mvle_tokenizer.json").unlink()
    note = json.loads((folder / "tokenizer_config.json").read_text())
    del note["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(note))
    with pytest.raises(TokenizerError, match=r"has no mask token.*tokenizer\.kind=bpe"):
        Tokenizer.load(folder)


def test_without_a_network_the_key_and_the_way_out_are_named_within_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mvle.hub.reachable", lambda host, port: False)
    started = time.perf_counter()
    with pytest.raises(
        TokenizerError, match=r"(?s)tokenizer\.name=nobody/nothing .*Tried the local cache and .*tokenizer\.kind=bpe"
    ):
        check_tokenizer(TokenizerConfig(name="nobody/nothing"), tmp_path)
    assert time.perf_counter() - started < 60  # transformers by itself would retry for minutes


def test_what_is_there_already_needs_no_network(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mvle.data.tokenizer._from_transformers", lambda name: pytest.fail("asked the network"))
    tokenizer.save(tmp_path / "tokenizer")
    check_tokenizer(TokenizerConfig(name="roberta-base"), tmp_path)
    check_tokenizer(TokenizerConfig(kind="bpe"), tmp_path / "new")


def test_a_vocabulary_too_small_for_words_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 320"):
        TokenizerConfig(vocabulary=256)
