"""How a model is made: initial weights by name, groups of parameters, and the sizes of the recipes on meta."""

from __future__ import annotations

import math

import pytest
import torch

from mvle.config import load_config
from mvle.model.__main__ import main
from mvle.model.model import MaskVLM

from ..helpers import MASK, VOCABULARY, make_config


def built(seed: int = 0, **kw: object) -> MaskVLM:
    model = MaskVLM(make_config(**kw), VOCABULARY, MASK)
    model.init_weights(seed)
    return model


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first = dict(built().named_parameters())
    other = dict(built(mode="drop", cross_depth=3, decoder_depth=2).named_parameters())
    common = [n for n in first if n in other and first[n].shape == other[n].shape]
    assert len(common) > 0.9 * len(first)
    assert all(torch.equal(first[n], other[n]) for n in common)
    reseeded = dict(built(seed=1).named_parameters())
    drawn = [n for n in first if first[n].unique().numel() > 1]
    assert len(drawn) > 20 and not any(torch.equal(first[n], reseeded[n]) for n in drawn)


def test_no_two_parameters_start_alike() -> None:
    model = built()
    blocks = [dict(b.named_parameters()) for b in model.image_encoder.blocks]
    assert not torch.equal(blocks[0]["attn.qkv.weight"], blocks[1]["attn.qkv.weight"])
    assert not torch.equal(model.image_cross.blocks[0].mlp.fc1.weight, model.text_cross.blocks[0].mlp.fc1.weight)


def test_initial_weights_are_normal_cut_at_two_deviations_norms_one_biases_zero() -> None:
    model = built(mode="drop")
    std = model.config.model.initial_std
    for name, parameter in model.state_dict().items():
        if name == "heads.temperature.log_value":
            assert parameter.tolist() == pytest.approx([math.log(0.07)])
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.abs().max() <= 2 * std + 1e-6, name
            if parameter.numel() > 1000:
                assert parameter.std() == pytest.approx(std * 0.8796, rel=0.1), name
                assert parameter.mean().abs() < 0.15 * std, name


def test_weight_decay_takes_matrices_of_linear_layers_alone() -> None:
    model = built(mode="drop")
    decayed = {n for n, p in model.named_parameters() if model.decay(n, p)}
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert decayed == linears


def test_encoder_parameters_are_those_of_the_two_encoders() -> None:
    model = built()
    encoder = {n for n, _ in model.named_parameters() if model.is_encoder(n)}
    both = [*model.image_encoder.parameters(), *model.text_encoder.parameters()]
    assert len(encoder) == len(both)


def test_modules_to_shard_hold_every_block_and_share_nothing() -> None:
    model = built(decoder_depth=2)
    parts = model.blocks_to_shard()
    owned = [id(p) for part in parts for p in part.parameters()]
    assert len(owned) == len(set(owned))
    blocks = {id(p) for n, p in model.named_parameters() if ".blocks." in n or ".context." in n}
    assert set(owned) == blocks


def test_the_temperature_is_kept_in_its_range() -> None:
    model = built()
    for value, kept in ((1e-9, 0.001), (0.2, 0.2), (3.0, 0.5)):
        model.heads.temperature.log_value.data.fill_(math.log(value))
        model.clamp_temperature()
        assert model.heads.temperature().item() == pytest.approx(kept)


@pytest.mark.parametrize(("name", "low", "high"), [("base", 297, 336), ("large", 810, 862)])
def test_recipes_build_on_meta_with_the_size_of_the_paper(name: str, low: int, high: int) -> None:
    with torch.device("meta"):
        model = MaskVLM(load_config(name), 50265, 50264)
    assert all(p.is_meta for p in model.parameters())
    assert low <= sum(p.numel() for p in model.parameters()) / 1e6 <= high


def test_every_parameter_of_an_encoder_has_a_counterpart_in_vit_and_roberta_size() -> None:
    """ViT-B/16 has 85.8M parameters without its classifier, RoBERTa-base 124M with 512 positions and a pooler."""
    with torch.device("meta"):
        model = MaskVLM(load_config("base"), 50265, 50264)
    image = sum(p.numel() for p in model.image_encoder.parameters())
    text = sum(p.numel() for p in model.text_encoder.parameters())
    assert image - 768 == 85_798_656  # a mask token more
    assert text == 124_645_632 - 768 * (514 - 32) - 768 - 768 * 769  # positions, token type, pooler less


def test_the_size_of_a_recipe_is_printed_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["base"]) == 0

    lines = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    sizes = {name: int(count.replace(",", "")) for name, count in lines.items()}
    assert sizes.pop("all") == sum(sizes.values())
    assert sizes["image_encoder"] == pytest.approx(86e6, rel=0.01)  # ViT-B/16
