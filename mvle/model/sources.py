"""Where published encoders come from: by name through timm and the Hugging Face hub, or from a local folder or file.

What is read is tensors and JSON. A .bin or .pth file goes through torch.load(weights_only=True), which makes tensors
and nothing else. safetensors files are mapped into memory, not copied.

    a name       timm: vit_base_patch16_224.augreg_in21k · the hub: roberta-base
    a folder     with config.json and model.safetensors (or pytorch_model.bin), as timm and transformers save them
    a file       .safetensors, .bin, .pth, .pt: tensors alone, so what only a config says cannot be checked
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hub import HubError, fetch
from .layouts import ROBERTA_OFFSET

FILES = (".safetensors", ".bin", ".pth", ".pt")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ROBERTAS = ("roberta", "xlm-roberta", "camembert")  # one architecture under three names
# Arguments of timm's create_model that would read or fetch something; a config.json has no say in that.
NOT_OF_A_SHAPE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "device")
NESTED = ("model", "state_dict", "model_state_dict")  # where files of training programs keep the weights


class PretrainedError(ValueError):
    """First weights that cannot be had, or do not fit; the message names the config key."""


@dataclass(frozen=True)
class Facts:
    """What a config says and tensors do not show.

    mean, std   of pixels, as the encoder expects them; None: not said
    offset      RoBERTa: the row of the first position
    other       what makes it another architecture than this model's, a phrase each
    """

    heads: int
    eps: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    offset: int = ROBERTA_OFFSET
    other: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Published:
    """An encoder as it is published. facts: None for a file of tensors alone. tokenizer: a name or folder that
    Tokenizer.load takes, if the source may have one."""

    key: str  # the config key that names it
    name: str
    tensors: Mapping[str, Tensor]
    facts: Facts | None = None
    tokenizer: str | None = field(default=None)

    def __str__(self) -> str:
        return f"{self.key}={self.name}"


# ---- the image encoder ----------------------------------------------------------------------------------------------

Refuse = Callable[[Published], None]


def published_image(key: str, name: str, refuse: Refuse) -> Published:
    """A ViT. refuse: raises PretrainedError for one that does not fit; a ViT known by name is shown to it before its
    weights are fetched, with tensors on meta. Raises PretrainedError."""
    if (file := _file(key, name)) is not None:
        return Published(key, name, read_tensors(key, file))
    if (folder := _folder(key, name)) is not None:
        config, weights = _config_and_weights(key, folder)
        return Published(key, name, read_tensors(key, weights), _facts_of_timm(key, _from_config(key, folder, config)))
    timm = _timm(key)
    _check_name(key, name, timm)
    with torch.device("meta"):
        shown = timm.create_model(name)
    facts = _facts_of_timm(key, shown)
    refuse(Published(key, name, shown.state_dict(), facts))
    weights = _fetched(key, name, *_hub_file(key, name, timm))[0]
    tensors = read_tensors(key, weights)  # by ourselves, so that nothing else is unpickled
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": tensors})
    except (RuntimeError, KeyError) as error:
        raise PretrainedError(f"{key}={name}: timm cannot load {weights}: {_first_line(error)}") from error
    return Published(key, name, model.state_dict(), facts)


def _timm(key: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise PretrainedError(
            f"{key} by name, or from a folder with a config.json, needs timm: pip install 'mvle[vision]'. A file "
            "(.safetensors) of a ViT is read without it."
        ) from error
    return timm


def _check_name(key: str, name: str, timm: Any) -> None:
    try:
        if timm.is_model(name) and timm.models.get_pretrained_cfg(name) is not None:
            return
    except RuntimeError:  # an architecture that it knows, and a tag that it does not
        pass
    near = difflib.get_close_matches(name, timm.list_models("vit*", pretrained=True), n=3)
    raise PretrainedError(
        f"{key}={name}: expected a ViT that timm has weights for, or a local folder or file; timm does not know "
        f"that name, and there is no such path." + (f" Did you mean {' or '.join(near)}?" if near else "")
    )


def _hub_file(key: str, name: str, timm: Any) -> tuple[str, tuple[str, ...]]:
    """Repository on the hub, and the names that its weights may have."""
    found = timm.models.get_pretrained_cfg(name)
    if not found.hf_hub_id:
        tagged = ", ".join(timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)[:8]) or "none"
        raise PretrainedError(f"{key}={name}: timm has no weights on the hub for it. With weights: {tagged}.")
    return found.hf_hub_id, (found.hf_hub_filename,) if found.hf_hub_filename else WEIGHTS


def _from_config(key: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """The timm model of a folder, on meta."""
    timm = _timm(key)
    if "architecture" not in config:
        kind = config.get("model_type", "nothing that says what it is")
        raise PretrainedError(f"{key}={folder}: config.json must be one that timm saved; it is of {kind}.")
    stated = config.get("pretrained_cfg", config)
    arguments = {"num_classes": config.get("num_classes", stated.get("num_classes")), **config.get("model_args", {})}
    arguments = {name: value for name, value in arguments.items() if name not in NOT_OF_A_SHAPE}
    known = ("mean", "std", "input_size", "fixed_input_size", "num_classes")
    overlay = {name: stated[name] for name in known if stated.get(name) is not None}
    try:
        with torch.device("meta"):
            return timm.create_model(config["architecture"], pretrained_cfg_overlay=overlay, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise PretrainedError(f"{key}={folder}: timm cannot build config.json's model: {_first_line(error)}") from error


def _facts_of_timm(key: str, model: Any) -> Facts:
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise PretrainedError(f"{key} must be a ViT (timm's VisionTransformer); got a {type(model).__name__}.")
    blocks: Any = model.blocks
    block = blocks[0]
    other = []
    if type(block) is not Block:
        other.append(f"blocks that are no plain pre-norm blocks ({type(block).__name__})")
    mlp = getattr(block, "mlp", None)
    activation = getattr(mlp, "act", None)
    if type(activation).__name__ != "GELU" or getattr(activation, "approximate", "none") != "none":
        other.append(f"another activation than GELU ({activation})")
    rows, columns = getattr(model.patch_embed, "grid_size", None) or (0, 0)
    if rows != columns:
        other.append(f"a grid of {rows}x{columns} patches, which is no square")
    heads = getattr(getattr(block, "attn", None), "num_heads", 0)
    norm = getattr(block, "norm1", None)
    stated: Any = model.pretrained_cfg
    mean, std = (tuple(map(float, stated[k])) if stated.get(k) else None for k in ("mean", "std"))
    return Facts(int(heads), float(getattr(norm, "eps", 0.0)), mean, std, other=tuple(other))


# ---- the text encoder -----------------------------------------------------------------------------------------------


def published_text(key: str, name: str) -> Published:
    """A RoBERTa. Raises PretrainedError."""
    if (file := _file(key, name)) is not None:
        return Published(key, name, read_tensors(key, file))
    folder = _folder(key, name)
    if folder is not None:
        config, weights = _config_and_weights(key, folder)
        has_tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        tokenizer = str(folder) if has_tokenizer else None
    else:
        config = _json(key, _fetched(key, name, name, ("config.json",))[0])
        _facts_of_roberta(key, name, config)  # another architecture is said before its weights are fetched
        weights, tokenizer = _fetched(key, name, name, WEIGHTS)[0], name
    return Published(key, name, read_tensors(key, weights), _facts_of_roberta(key, name, config), tokenizer)


def _facts_of_roberta(key: str, name: str, config: Mapping[str, Any]) -> Facts:
    kind = config.get("model_type", f"none ({config.get('architecture', 'no architecture')})")
    if kind not in ROBERTAS:
        raise PretrainedError(f"{key}={name} must be a RoBERTa (model_type {', '.join(ROBERTAS)}); got {kind}.")
    other = []
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        other.append(f"another activation than GELU ({activation})")
    if (positions := config.get("position_embedding_type", "absolute")) != "absolute":
        other.append(f"{positions} positions")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        other.append("a decoder's attention")
    heads, eps = int(config.get("num_attention_heads", 12)), float(config.get("layer_norm_eps", 1e-12))
    padding = config.get("pad_token_id", ROBERTA_OFFSET - 1)
    return Facts(heads, eps, offset=int(padding) + 1, other=tuple(other))


# ---- reading --------------------------------------------------------------------------------------------------------


def _file(key: str, name: str) -> Path | None:
    """A local file by its name; None where the name is no file's."""
    if not name.endswith(FILES):
        if Path(name).is_file():
            raise PretrainedError(f"{key}={name} must be a folder or a file named {', '.join(FILES)}.")
        return None
    if not Path(name).is_file():
        raise PretrainedError(f"{key}={name}: there is no such file.")
    return Path(name)


def _folder(key: str, name: str) -> Path | None:
    """A local folder; None where the name is none's. What can only be a path is not taken for a name."""
    if Path(name).is_dir():
        return Path(name)
    if os.path.isabs(name) or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise PretrainedError(f"{key}={name}: there is no such folder.")
    return None


def _config_and_weights(key: str, folder: Path) -> tuple[dict[str, Any], Path]:
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if not (folder / "config.json").is_file() or weights is None:
        cut = " Its weights are cut into several files: join them." if list(folder.glob("*.index.json")) else ""
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise PretrainedError(
            f"{key}={folder} must hold config.json and {' or '.join(WEIGHTS)}; it holds {found}.{cut} (A folder of a "
            "run or of an export is for model.init_from.)"
        )
    return _json(key, folder / "config.json"), weights


def _json(key: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PretrainedError(f"{key}: {path} must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise PretrainedError(f"{key}: {path} must hold a JSON object; got {type(found).__name__}.")
    return found


def _fetched(key: str, name: str, repository: str, *wanted: tuple[str, ...]) -> list[Path]:
    try:
        return fetch(repository, *wanted)
    except HubError as error:
        raise PretrainedError(
            f"{key}={name} cannot be had. {error}\nName a local folder or file ({key}=PATH), fetch it once where "
            f"there is a network, or start from weights that are drawn: {key}=null"
        ) from error.reason


def read_tensors(key: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, in memory or mapped. Raises PretrainedError where it holds anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = _load(path)
    except pickle.UnpicklingError as error:
        raise PretrainedError(
            f"{key}: {path} is refused: it holds more than tensors, and nothing else is unpickled: {_first_line(error)}"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise PretrainedError(f"{key}: {path} cannot be read: {_first_line(error)}") from error
    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise PretrainedError(f"{key}: {path} must hold named tensors; got {type(found).__name__}.")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _load(path: Path) -> Any:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"  # older files cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
