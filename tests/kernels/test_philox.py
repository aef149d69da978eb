"""Philox4x32-10: the known answers of Random123, and the same words from torch and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mvle_kernels import Stream, exact_count, philox, uniform, words

ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, answer: kat_vectors of Random123, philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
@pytest.mark.parametrize("make", [lambda v: torch.tensor([v]), lambda v: np.array([v], dtype=np.int64)])
def test_philox_gives_the_known_answers(counter: tuple, key: tuple[int, int], answer: tuple, make: Any) -> None:
    assert tuple(int(word[0]) for word in philox([make(c) for c in counter], key)) == answer


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1, -1])
def test_torch_and_numpy_give_the_same_words(seed: int) -> None:
    ids = [0, 1, 2**31, 2**32 + 5, 2**62 + 9]
    for count in (1, 4, 7):
        ours = words(seed, Stream.CROP, torch.tensor(ids), count)
        twin = words(seed, Stream.CROP, np.array(ids), count)
        assert ours.shape == (5, count) and ours.dtype == torch.int64
        assert twin.dtype == np.int64 and np.array_equal(ours.numpy(), twin)
        assert int(ours.min()) >= 0 and int(ours.max()) <= ONES


def test_word_w_is_lane_w_mod_4_of_block_w_div_4() -> None:
    seed, pair = (5 << 32) | 17, (3 << 32) | 11
    drawn = words(seed, Stream.TOKEN_FATE, torch.tensor([pair]), 10)[0].tolist()
    for w, word in enumerate(drawn):
        counter = [torch.tensor([c]) for c in (w // 4, int(Stream.TOKEN_FATE), 11, 3)]
        assert word == int(philox(counter, (17, 5))[w % 4])


def test_several_streams_at_once_have_the_words_of_each() -> None:
    for ids in (torch.arange(6).view(2, 3) + 2**33, np.arange(6).reshape(2, 3) + 2**33):
        streams = (torch if isinstance(ids, torch.Tensor) else np).arange(8, 11)[:, None, None]
        together = words(5, streams, ids, 7)
        assert together.shape == (3, 2, 3, 7)
        for k, stream in enumerate((Stream.TOKEN_CHOICE, Stream.TOKEN_FATE, Stream.RANDOM_WORD)):
            assert (together[k] == words(5, stream, ids, 7)).all()


def test_seeds_streams_and_ids_give_words_of_their_own() -> None:
    ids = torch.arange(50)
    drawn = [words(seed, stream, ids, 8).flatten() for seed in (0, 1, 2**32) for stream in Stream]
    every = torch.cat(drawn)
    assert len(every.unique()) >= len(every) - 5  # 19,200 of 2^32: a collision is rare, a shared word would be many


def test_stream_numbers_are_those_of_every_saved_run() -> None:
    assert [s.name for s in sorted(Stream)] == [
        *("SHARD_ORDER", "WINDOW_ORDER", "SOURCE", "CAPTION", "CROP", "SPARE", "AUGMENTATION", "PATCH_MASK"),
        *("TOKEN_CHOICE", "TOKEN_FATE", "RANDOM_WORD", "NEGATIVE_IMAGE", "NEGATIVE_TEXT", "EVALUATION"),
        *("INITIAL_WEIGHTS", "CLEAN_PATCHES"),
    ]
    assert [int(s) for s in sorted(Stream)] == list(range(16))


def test_uniform_stays_inside_the_open_interval() -> None:
    ends = uniform(torch.tensor([0, ONES]))
    assert ends.dtype == torch.float64 and 0 < ends[0] < 1e-9 and 1 - 1e-9 < ends[1] < 1
    drawn = uniform(words(0, Stream.SPARE, torch.arange(20_000), 4))
    assert abs(drawn.mean() - 0.5) < 5 * 12**-0.5 / 80_000**0.5
    assert abs(drawn.var() - 1 / 12) < 0.002


@pytest.mark.parametrize(
    ("ratio", "total", "count"),
    [(0.1, 30, 3), (0.3, 10, 3), (0.6, 49, 30), (0.6, 4, 3), (0.05, 4, 1), (1.0, 7, 7), (0.7, 10, 7), (0.5, 0, 0)],
)
def test_exact_count_is_the_ceiling_whatever_the_last_bit(ratio: float, total: int, count: int) -> None:
    assert exact_count(ratio, total) == count
