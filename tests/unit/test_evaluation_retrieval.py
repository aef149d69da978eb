"""Retrieval: ranks, Karpathy's protocol, equal captions and images, reranking, matching."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mvle.evaluation import retrieval as module
from mvle.evaluation.matching import balanced_accuracy, hard_captions
from mvle.evaluation.retrieval import Embedded, best_rank, contrastive_ranks, recalls, reranked_ranks, retrieval


def embedded(image_z, text_z, owner, image_ids=None, text_ids=None):
    """An Embedded from plain lists; ids all different unless given."""
    owner = torch.tensor(owner)
    images = len(image_z)
    text_ids = torch.tensor(text_ids or list(range(100, 100 + len(text_z))))
    own = [text_ids[owner == i].tolist() for i in range(images)]
    most = max(map(len, own))
    return Embedded(
        image_z=torch.as_tensor(image_z, dtype=torch.float32),
        text_z=torch.as_tensor(text_z, dtype=torch.float32),
        owner=owner,
        image_ids=torch.tensor(image_ids or list(range(images))),
        text_ids=text_ids,
        known=torch.tensor([ids + ids[:1] * (most - len(ids)) for ids in own]),
        image_rows=[torch.full((2, 1), float(i)) for i in range(images)],
        text_rows=[torch.full((3, 1), float(c)) for c in range(len(text_z))],
    )


def random_set(images=7, captions=2, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return embedded(
        torch.randn(images, d, generator=g),
        torch.randn(images * captions, d, generator=g),
        [i for i in range(images) for _ in range(captions)],
    )


def test_an_image_is_found_by_its_best_caption_and_every_caption_asks():
    # image 0: its captions score 1 and 0.2, caption 3 (of image 1) 0.9: rank 0; caption 1 prefers the other image
    found = embedded([[1, 0], [0, 1]], [[1, 0], [0.2, 0.8], [0, 1], [0.9, 0.5]], [0, 0, 1, 1])
    to_text, to_image = contrastive_ranks(found)
    assert to_text.tolist() == [0, 0]
    assert to_image.tolist() == [0, 1, 0, 1]


def test_ranks_equal_a_plain_count_in_both_directions():
    found = random_set()
    scores = found.image_z @ found.text_z.T
    to_text, to_image = contrastive_ranks(found)
    for i in range(7):
        best = max(scores[i, 2 * i], scores[i, 2 * i + 1])
        assert to_text[i] == sum(scores[i, c] > best for c in range(14) if c // 2 != i)
    for c in range(14):
        assert to_image[c] == sum(scores[i, c] > scores[c // 2, c] for i in range(7))
    assert to_text.tolist() != to_image[::2].tolist(), "the case must tell the directions apart"


def test_an_equal_caption_of_another_image_is_right():
    # caption 1 belongs to image 1 but reads as image 0's does
    found = embedded([[1, 0], [0, 1]], [[0.5, 0], [1, 0]], [0, 1], text_ids=[7, 7])
    to_text, to_image = contrastive_ranks(found)
    assert to_text.tolist() == [0, 0] and to_image.tolist() == [0, 0]
    to_text, _ = contrastive_ranks(embedded([[1, 0], [0, 1]], [[0.5, 0], [1, 0]], [0, 1]))
    assert to_text.tolist() == [1, 1], "unequal captions are wrong"


def test_any_of_an_images_captions_may_be_the_equal_one():
    # caption 2 of image 1 equals the *second* caption of image 0, which is the nearer one
    found = embedded([[1, 0], [0.5, 0]], [[0, 1], [0, 1], [1, 0], [0, 1]], [0, 0, 1, 1], text_ids=[1, 2, 2, 3])
    assert contrastive_ranks(found)[1][2] == 0
    assert contrastive_ranks(found)[0][0] == 0


def test_an_image_with_the_same_bytes_is_right():
    same = embedded([[0.5, 0], [1, 0]], [[1, 0], [1, 0]], [0, 1], image_ids=[3, 3])
    assert contrastive_ranks(same)[1].tolist() == [0, 0]
    different = embedded([[0.5, 0], [1, 0]], [[1, 0], [1, 0]], [0, 1])
    assert contrastive_ranks(different)[1].tolist() == [1, 0]


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_a_model_that_says_the_same_of_all_pairs_finds_nothing(value):
    right = torch.eye(20, dtype=torch.bool)
    assert recalls(best_rank(torch.full((20, 20), value), right)) == {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def test_one_nan_candidate_counts_against_the_query():
    scores = torch.tensor([[0.9, float("nan"), 0.1], [float("nan"), 0.5, 0.1]])
    right = torch.tensor([[True, False, False], [True, False, False]])
    assert best_rank(scores, right).tolist() == [1, 2]


def test_ranks_do_not_depend_on_the_chunk(monkeypatch):
    found, whole = random_set(), contrastive_ranks(random_set())
    monkeypatch.setattr(module, "slices", lambda n, size=3: [slice(i, min(i + 3, n)) for i in range(0, n, 3)])
    for a, b in zip(contrastive_ranks(found), whole, strict=True):
        assert torch.equal(a, b)


class Oracle:
    """A matching head that knows: odds of `value` for true pairs, 0 for others. Remembers what it was asked."""

    def __init__(self, value: float) -> None:
        self.value, self.asked, self.largest = value, [], 0
        self.heads = SimpleNamespace(temperature=lambda: torch.tensor([0.1]))

    def match(self, image_rows, text_rows, image_index, text_index):
        images = torch.stack([r[0, 0] for r in image_rows.unpack()])[image_index]
        texts = torch.stack([r[0, 0] for r in text_rows.unpack()])[text_index]
        self.asked += list(zip(images.tolist(), texts.tolist(), strict=True))
        self.largest = max(self.largest, len(images))
        return torch.where(texts // 2 == images, self.value, 0.0)


def test_reranking_moves_a_true_partner_to_the_front_only_from_within_k():
    found = random_set(images=20)
    plain = contrastive_ranks(found)
    for k in (1, 4, 100):
        again = reranked_ranks(Oracle(1000.0), found, k, 0.1, "cpu")
        for before, after in zip(plain, again, strict=True):
            assert torch.equal(after, torch.where(before < k, 0, before))


def test_a_matching_head_without_an_opinion_leaves_the_order():
    found = random_set(images=20)
    for before, after in zip(contrastive_ranks(found), reranked_ranks(Oracle(0.0), found, 5, 0.1, "cpu"), strict=True):
        assert torch.equal(before, after)


def test_every_pair_is_matched_once_and_few_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "MATCHES", 16)
    oracle = Oracle(1.0)
    reranked_ranks(oracle, random_set(images=20), 5, 0.1, "cpu")
    assert len(oracle.asked) == len(set(oracle.asked)) <= 20 * 5 + 40 * 5
    assert oracle.largest <= 16


def test_retrieval_has_the_form_of_the_results_file():
    out = retrieval(Oracle(1.0), random_set(), 3, "cpu")
    assert set(out) == {"k", "itc", "reranked"}
    for order in ("itc", "reranked"):
        assert set(out[order]) == {"image_to_text", "text_to_image"}
        assert all(set(figures) == {"r1", "r5", "r10"} for figures in out[order].values())
    assert "reranked" not in retrieval(Oracle(1.0), random_set(), 3, "cpu", rerank_too=False)


def test_a_hard_negative_is_the_most_similar_caption_that_is_not_right():
    found = embedded([[1, 0], [0, 1], [1, 1]], [[1, 0], [0, 1], [0.9, 0.1]], [0, 1, 2], text_ids=[5, 6, 5])
    assert hard_captions(found).tolist() == [1, 2, 1]


def test_balanced_accuracy_weighs_both_sides_alike():
    assert balanced_accuracy(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 1.0, 2.0, 3.0])) == pytest.approx(0.625)
    assert balanced_accuracy(torch.zeros(4), torch.zeros(4)) == 0, "no opinion is no right answer"
