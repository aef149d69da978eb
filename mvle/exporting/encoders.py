"""The two encoders as folders that timm and transformers load. Neither library is needed to write them.

image_encoder/   config.json, model.safetensors         timm.create_model("local-dir:DIR", pretrained=True), strictly
text_encoder/    those and the tokenizer's files        RobertaModel.from_pretrained(DIR, add_pooling_layer=False)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..model.layouts import VIT, roberta

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..model.config import ModelConfig

ARCHITECTURE = "vit_base_patch16_224"  # any ViT of timm's: model_args say every size


def write_image_encoder(folder: Path, config: ModelConfig, encoder: nn.Module) -> None:
    """image_encoder/. Its forward gives the class token's row (there is no head); forward_features gives all rows."""
    image = config.image
    stated = {
        "tag": "mvle",
        "custom_load": False,
        "input_size": [3, image.size, image.size],
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(image.mean),
        "std": list(image.std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    arguments = {
        "img_size": image.size,
        "patch_size": image.patch,
        "embed_dim": config.width,
        "depth": image.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": 0,
    }
    whole = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": stated,
    }
    _write(folder, whole, VIT.write(tensors_of(encoder), image.depth))


def write_text_encoder(folder: Path, config: ModelConfig, encoder: nn.Module, tokenizer: Tokenizer) -> None:
    """text_encoder/, with the tokenizer, which in transformers' hands adds begin and end too."""
    text, tensors = config.text, tensors_of(encoder)
    offset = tokenizer.pad_id + 1
    stated = {
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "hidden_size": config.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-5,
        "vocab_size": len(tensors["words.weight"]),
        "max_position_embeddings": text.max_tokens + offset,
        "type_vocab_size": 1,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "dtype": "float32",
    }
    tokenizer.save(folder, max_tokens=text.max_tokens)
    _write(folder, stated, roberta(offset).write(tensors, text.depth))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters by name, float32 on the CPU."""
    # sync: an export copies every weight, no step comes here
    return {name: parameter.detach().float().cpu() for name, parameter in module.named_parameters()}


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(folder / "model.safetensors", tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, readable for whom other new files are (its own writer lets the owner alone read it)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
