"""The peers of the step: each trains, and does what its paper says where that decides what it costs."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Provider, albef, compiled_plain, flava
from benchmarks.peers.flops import COUNTS
from benchmarks.peers.plain import Plain, PlainInputs, plain_inputs
from benchmarks.peers.training import Sized
from benchmarks.shapes import make_batch as random_batch
from mvle.config import Config, load_config
from mvle.engine.optim import build_optimizer, clip_and_step
from mvle.model.model import MaskVLM

from ..helpers import MASK, VOCABULARY, make_batch

CPU = torch.device("cpu")
LENGTHS = (3, 11, 6, 8, 4, 4, 16, 5)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="FLAVA is transformers', which is not installed"
)


def small(*overrides: str) -> Config:
    """Width 32, two heads, 16 patches of 64 px; two blocks an encoder."""
    sizes = ("width=32", "heads=2", "projection=16", "text.max_tokens=16")
    return load_config("tiny", [*(f"model.{s}" for s in sizes), "objectives.itm.group=4", "batch.total=8", *overrides])


def inputs_of(config: Config, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> PlainInputs:
    return plain_inputs(Sized(config, VOCABULARY, MASK), make_batch(lengths, equal_images=(), seed=seed), 0)


def albef_model(config: Config, queue: int = 64) -> albef.Albef:
    model = albef.Albef(config, VOCABULARY, queue)
    model.init_weights(0)
    return model


# ---- every provider -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "provider",
    [
        pytest.param(albef.PROVIDER, id="albef"),
        pytest.param(flava.PROVIDER, id="flava", marks=needs_transformers),
        pytest.param(flava.WITH_CODEBOOK, id="flava with its codebook", marks=needs_transformers),
    ],
)
def test_a_peers_steps_lower_each_of_its_losses_on_a_fixed_batch(provider: Provider) -> None:
    config = small("optim.lr=3e-3")
    batch = make_batch(LENGTHS[:4] if provider is flava.WITH_CODEBOOK else LENGTHS, equal_images=())
    assert provider.skip(CPU) is None

    step = provider.make(config, VOCABULARY, MASK, batch, CPU, torch.float32)
    many = 4 if provider is flava.WITH_CODEBOOK else 25
    losses = [step() for _ in range(many)]

    assert all(float(found["skipped"]) == 0 for found in losses)
    for name in losses[0].keys() - {"skipped"}:
        assert losses[-1][name] < losses[0][name], name


@needs_transformers
def test_where_transformers_is_missing_flava_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flava.PROVIDER.skip(CPU) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install transformers" in (flava.PROVIDER.skip(CPU) or "")


def test_without_a_compiler_compiled_plain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "install g++" in (compiled_plain.PROVIDER.skip(CPU) or "")
    assert compiled_plain.PROVIDER.skip(torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("make", "weight"), [(albef.make, "mlm"), (flava.make, "mim"), (flava.make, "mlm")], ids=["albef", "flava", "flava"]
)
def test_a_peer_whose_masks_are_not_drawn_is_refused(make: Any, weight: str) -> None:
    config = small(f"objectives.{weight}.weight=0")
    with pytest.raises(ValueError, match=rf"objectives\.{weight}\.weight.*must be above 0"):
        make(config, VOCABULARY, MASK, make_batch(), CPU, torch.float32)


def test_a_peer_sees_whole_images_where_our_clean_view_shows_less() -> None:
    config = small("masking.clean_keep=0.5")
    torch.manual_seed(0)
    shortened = albef_model(config).losses(inputs_of(config))

    torch.manual_seed(0)
    expected = albef_model(small()).losses(inputs_of(small()))

    assert inputs_of(config).clean_left_out_BN is not None
    assert all(torch.equal(shortened[name], expected[name]) for name in expected)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------

# What one more block of an encoder costs, in its forwards: a backward is two of them.
IMAGE_PASSES = {"plain": 2 * 3, "ALBEF": 3 + 1, "FLAVA": 2 * 3}  # clean and masked; clean and momentum's
TEXT_PASSES = {"plain": 2 * 3, "ALBEF": 2 * (3 + 1), "FLAVA": 2 * 3}


@pytest.mark.parametrize("name", ["plain", "ALBEF", pytest.param("FLAVA", marks=needs_transformers)])
def test_a_block_more_costs_its_flops_once_for_each_pass_of_the_peer(name: str) -> None:
    pairs, tokens, padded = 2, 7, 12
    batch = random_batch(small(), VOCABULARY, (tokens,) * pairs)

    def flops(*overrides: str) -> int:
        config = small("objectives.itm.group=2", *overrides)
        inputs = plain_inputs(Sized(config, VOCABULARY, MASK), batch, 0, padded)
        return COUNTS[name](config, VOCABULARY, inputs)

    def block(rows: int, width: int = 32, inner: int = 64) -> int:
        return pairs * rows * 2 * (4 * width**2 + 2 * width * inner + 2 * rows * width)

    whole = flops()
    assert flops("model.image.depth=3") - whole == IMAGE_PASSES[name] * block(1 + 16)
    assert flops("model.text.depth=3") - whole == TEXT_PASSES[name] * block(padded)


# ---- ALBEF ----------------------------------------------------------------------------------------------------------


def test_albefs_copies_follow_by_the_papers_momentum_and_learn_nothing_themselves() -> None:
    model = albef_model(small())
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter += 1
    before = {name: p.clone() for name, p in model.momentum.named_parameters()}

    sum(model.losses(inputs_of(small())).values()).backward()  # type: ignore[union-attr]

    fast = dict(model.towers.named_parameters())
    for name, slow in model.momentum.named_parameters():
        assert torch.allclose(slow, 0.995 * before[name] + 0.005 * fast[name], atol=1e-6), name
        assert slow.grad is None and fast[name].grad is not None, name


def test_albefs_queue_forgets_the_oldest_embeddings_first() -> None:
    model = albef_model(small(), queue=6)
    rows = torch.arange(1.0, 13.0)[:, None].expand(-1, 16)

    for first in (0, 4, 8):
        model.enqueue(rows[first : first + 4], -rows[first : first + 4])

    assert model.image_queue[:, 0].tolist() == [7, 8, 9, 10, 11, 12]
    assert torch.equal(model.text_queue, -model.image_queue)
    assert model.oldest == 0
    with pytest.raises(ValueError, match="at most 6 pairs.*got 7.*longer"):
        model.enqueue(rows[:7], rows[:7])


def test_albef_contrasts_with_soft_targets_over_the_copys_embeddings_and_the_queue() -> None:
    torch.manual_seed(0)
    model = albef_model(small(), queue=5)
    z_i, z_t, slow_i, slow_t = (torch.randn(3, 16) for _ in range(4))

    loss, (image_to_text, text_to_image) = model.contrast((z_i, z_t), (slow_i, slow_t))

    expected = []
    for asks, slow, answers, queue in (
        (z_i, slow_i, slow_t, model.text_queue),
        (z_t, slow_t, slow_i, model.image_queue),
    ):
        for own in range(3):
            keys = torch.cat([answers, queue])
            target = 0.4 * (keys @ slow[own] / 0.07).softmax(0) + 0.6 * F.one_hot(torch.tensor(own), 8)
            expected.append(-(target * (keys @ asks[own] / 0.07).log_softmax(0)).sum())
    assert torch.allclose(loss, torch.stack(expected).mean(), rtol=1e-4)
    assert torch.allclose(image_to_text, z_i @ slow_t.T / 0.07, atol=1e-3)
    assert torch.allclose(text_to_image, z_t @ slow_i.T / 0.07, atol=1e-3)


def test_albef_keeps_the_copys_embeddings_of_the_batch_in_the_queue() -> None:
    torch.manual_seed(0)
    config = small()
    model, inputs = albef_model(config, queue=16), inputs_of(config)
    with torch.no_grad():  # apart from its copy, as after some steps
        for parameter in model.towers.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    kept = model.image_queue.clone()

    model.losses(inputs)

    assert torch.equal(model.image_queue[8:], kept[8:])
    slow = model.momentum
    pixels = albef.normalised(inputs.batch.images, config.model.image)
    z, _ = slow.embed(slow.encode_image(pixels), slow.encode_text(inputs.tokens_BL, inputs.real_BL))
    assert torch.allclose(model.image_queue[:8], z, atol=1e-6)


def test_albefs_hard_negatives_are_never_the_own_pair_and_follow_the_similarity() -> None:
    torch.manual_seed(0)
    similarity = torch.tensor([[50.0, 1, 0], [0, 50, 0], [-50, 0, 50]])

    drawn = torch.stack([albef.draw_other(similarity) for _ in range(4000)])

    assert not (drawn == torch.arange(3)).any()
    assert abs((drawn[:, 0] == 1).double().mean() - torch.sigmoid(torch.tensor(1.0))) < 0.03
    assert abs((drawn[:, 1] == 0).double().mean() - 0.5) < 0.03
    assert (drawn[:, 2] == 1).all()


def test_one_pair_alone_has_no_negative_in_albefs_matching() -> None:
    model = albef_model(small())
    image, text, real = torch.randn(1, 17, 32), torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.bool)
    alone = torch.zeros(1, 1)

    loss = model.matching(image, text, real, (alone, alone))

    own = model.match(model.towers.fuse(text, real, image)[:, 0])
    assert torch.allclose(loss, -own.log_softmax(1)[0, 1])


def test_padding_changes_none_of_albefs_losses() -> None:
    config = small()
    batch = make_batch((5, 9), equal_images=())

    def losses(length: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return albef_model(config).losses(plain_inputs(Sized(config, VOCABULARY, MASK), batch, 0, length))

    short, long = losses(9), losses(16)
    assert all(torch.allclose(short[name], long[name], atol=1e-5) for name in short)


def test_albef_at_base_has_the_parameters_of_its_parts() -> None:
    config = load_config("base", [])
    with torch.device("meta"):
        model = albef.Albef(config, 50265)

    D, norm = 768, 2 * 768
    vit = 4 * (D * D + D) + 2 * 4 * D * D + 5 * D + 2 * norm
    image = 12 * vit + 3 * 16**2 * D + D + 197 * D + D + norm
    text = 12 * vit + 50265 * D + 32 * D + norm
    fusion = 6 * (vit + 4 * (D * D + D) + norm)
    heads = 2 * (D * 256 + 256) + D * D + D + norm + 50265
    assert sum(p.numel() for p in model.towers.parameters()) == image + text + fusion + heads
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learned == image + text + fusion + heads + 2 * D + 2 + 1
    assert sum(p.numel() for p in model.parameters()) == learned + image + text + fusion + heads
    assert model.image_queue.shape == model.text_queue.shape == (65536, 256)


# ---- FLAVA ----------------------------------------------------------------------------------------------------------


@needs_transformers
def test_flava_with_fused_attention_is_transformers_flava() -> None:
    config = small()
    inputs = flava.flava_inputs(inputs_of(config), config.model, 0)
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = flava.build(config.model, VOCABULARY, codebook=False, fused=fused)
        losses = flava.losses(model, inputs, config.model)
        torch.stack(list(losses.values())).sum().backward()
        found.append((losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))

    (losses, gradients), (expected, expected_gradients) = found
    assert losses.keys() == {"global_contrastive", "itm", "mmm_image", "mmm_text"}
    assert all(torch.allclose(losses[n], expected[n], atol=1e-5) for n in losses)
    assert gradients.keys() == expected_gradients.keys()
    assert all(torch.allclose(g, expected_gradients[n], atol=1e-4) for n, g in gradients.items())
    # 7; with transformers' own first weights, which have rows of zeros, 3e5, and infinity at tiny
    assert torch.stack([g.norm() for g in gradients.values()]).norm() < 100


def test_every_tenth_pair_of_flava_has_the_next_pairs_caption() -> None:
    config = small()
    plain = inputs_of(config, lengths=(5,) * 12)

    inputs = flava.flava_inputs(plain, config.model, 0)

    given = inputs.arguments
    assert (given["itm_labels"] == 0).nonzero().flatten().tolist() == [0, 10]
    other = torch.tensor([1, *range(1, 10), 11, 11])
    assert torch.equal(given["input_ids"], plain.tokens_BL[other])
    assert plain.token_masked_BL is not None and plain.masked_tokens_BL is not None
    assert torch.equal(given["input_ids_masked"], plain.masked_tokens_BL[other])
    assert torch.equal(given["mlm_labels"] >= 0, plain.token_masked_BL[other])
    assert inputs.code_images.shape == (12, 3, 32, 32)


@needs_transformers
def test_flavas_encoders_are_as_deep_as_ours_and_its_multimodal_one_as_both_cross_encoders() -> None:
    config = load_config("base", ["model.image.depth=5", "model.text.depth=4", "model.cross_depth=3"])
    with torch.device("meta"):
        model: Any = flava.build(config.model, 50265, codebook=False).flava

    parts = (model.image_model, model.text_model, model.multimodal_model)
    assert [len(part.encoder.layer) for part in parts] == [5, 4, 6]
    for part in parts:
        layer = part.encoder.layer[0]
        assert layer.attention.attention.num_attention_heads == 12
        assert layer.intermediate.dense.weight.shape == (3072, 768)
    assert model.image_model.embeddings.position_embeddings.shape == (1, 197, 768)
    assert model.text_model.embeddings.word_embeddings.weight.shape == (50265, 768)


# ---- compiled plain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "drop"])
@pytest.mark.parametrize(
    ("one_graph", "backend"), [(False, "aot_eager"), (True, "eager")], ids=["block by block", "one graph"]
)
def test_compiled_plain_takes_the_steps_of_plain(one_graph: bool, backend: str, mode: str) -> None:
    config, batch = small(f"masking.mode={mode}"), make_batch(equal_images=())
    make = partial(compiled_plain.make, one_graph=one_graph, backend=backend)
    step = make(config, VOCABULARY, MASK, batch, CPU, torch.float32)
    losses = [step() for _ in range(2)]

    model = MaskVLM(config, VOCABULARY, MASK)
    model.init_weights(config.run.seed)
    optimizer = build_optimizer(model, config.optim)
    weights = {o.name: o.weight for o in model.objectives}
    inputs = plain_inputs(model, batch, config.run.seed)
    for found in losses:
        expected = Plain(model).losses(inputs)
        assert all(torch.allclose(found[name], loss, rtol=1e-4) for name, loss in expected.items())
        optimizer.zero_grad()
        sum(weights[name] * loss for name, loss in expected.items()).backward()  # type: ignore[union-attr]
        clip_and_step(optimizer, config.optim.clip)


def test_all_layers_of_a_kind_share_one_compiled_block() -> None:
    def graphs(*overrides: str) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = small(*overrides)
        compiled_plain.make(config, VOCABULARY, MASK, make_batch(), CPU, torch.float32, backend="eager")()
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    few = graphs()
    # image, text, image cross and decoder, text cross; pixel head, word head
    assert few == 6
    assert graphs("model.image.depth=4", "model.text.depth=3", "model.cross_depth=3", "model.decoder_depth=2") == few
