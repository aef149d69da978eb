"""Encoders as timm and transformers publish them, with random weights, and ours of their shape: what tests of first
weights and exports load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mvle_kernels import Packed
from torch import Tensor, nn

from mvle.model.config import ModelConfig
from mvle.model.image_encoder import ImageEncoder
from mvle.model.pretrained import image_weights, text_weights
from mvle.model.text_encoder import TextEncoder

HALF = (0.5, 0.5, 0.5)
WORDS = 50
SIZES = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of which each matters: no bias is 0, no norm is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.03 if parameter.numel() > 10**5 else 0.1
            parameter.normal_(0, scale, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return module.eval()


def vit(folder: Path | None = None, architecture: str = "vit_base_patch16_224", **arguments: Any) -> Any:
    """A ViT of the tests' size; arguments as timm's create_model takes them. folder: saved there, too."""
    import timm
    from timm.models import save_for_hf

    model = randomised(timm.create_model(architecture, **{**SIZES, "weight_init": "skip", **arguments}))
    if folder is not None:
        save_for_hf(model, folder, safe_serialization=True)
    return model


def roberta(folder: Path | None = None, kind: str = "Roberta", **arguments: Any) -> Any:
    """The same of a RoBERTa, as transformers makes it from its config."""
    import transformers

    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 20,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **arguments})
    model = randomised(getattr(transformers, f"{kind}Model")(config))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def load(module: nn.Module, values: dict[str, Tensor], prefix: str) -> nn.Module:
    """An encoder of ours with given values; what they lack is made random."""
    randomised(module, 1)
    module.load_state_dict({k.removeprefix(prefix): v for k, v in values.items()}, strict=False)
    return module


def pictures(side: int, images: int = 2) -> Tensor:
    """uint8 [images, side, side, 3]."""
    return torch.randint(0, 256, (images, side, side, 3), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


def captions(lengths: tuple[int, ...], vocabulary: int) -> Packed:
    """Ragged captions, without the ids 0..4."""
    generator = torch.Generator().manual_seed(4)
    return Packed.of([torch.randint(5, vocabulary, (n,), generator=generator, dtype=torch.int32) for n in lengths], 16)


@torch.no_grad()
def image_rows(encoder: Any, images: Tensor) -> Tensor:
    """Ours: class token and patches of each image, [B, 1 + N, D]."""
    packed = encoder(images, None, None, ["clean"])
    return torch.stack(packed.unpack())


@torch.no_grad()
def vit_rows(model: Any, images: Tensor, mean: Any, std: Any) -> Tensor:
    """timm's, of the same pictures."""
    pixels = (images.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return model.forward_features(pixels.permute(0, 3, 1, 2))


@torch.no_grad()
def roberta_rows(model: Any, texts: Packed) -> list[Tensor]:
    """transformers', of the same captions: padded to the longest, real rows alone."""
    sequences = [sequence.long() for sequence in texts.unpack()]
    padding = model.config.pad_token_id
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=padding)
    out = model(input_ids=ids, attention_mask=(ids != padding).long()).last_hidden_state
    return [rows[: len(sequence)] for rows, sequence in zip(out, sequences, strict=True)]


def model_config(**values: Any) -> ModelConfig:
    """Of the shape that `vit` and `roberta` have."""
    image = {"size": 64, "depth": 2, **values.pop("image", {})}
    text = {"depth": 2, "max_tokens": 16, **values.pop("text", {})}
    return ModelConfig.model_validate(
        {"width": 32, "heads": 2, "mlp_ratio": 2.0, "image": image, "text": text, **values}
    )


def image_encoder(config: ModelConfig, name: str | Path) -> ImageEncoder:
    return load(ImageEncoder(config, 16), image_weights(config, str(name)).values, "image_encoder.")


def text_encoder(config: ModelConfig, name: str | Path, words: int = WORDS) -> TextEncoder:
    return load(TextEncoder(config, words), text_weights(config, str(name), words, None).values, "text_encoder.")
