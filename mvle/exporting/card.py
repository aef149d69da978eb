"""The model card of an export, README.md: what the model is, what was measured, how to load it. Markdown, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..evaluation.tables import (
    PARTS,
    Rows,
    likelihood_rows,
    matching_rows,
    number,
    pixel_rows,
    retrieval_rows,
    word_rows,
)

if TYPE_CHECKING:
    from ..config import Config
    from ..inference import OpenedRun

EVALUATE = "python -m mvle.evaluate"
HEAD = """\
---
library_name: mvle
tags: [vision-language, masked-modelling, maskvlm]
---

# {name}

A masked vision-and-language model (MaskVLM, Kwon et al., ICLR 2023), trained and exported by mvle.
"""
USE = """\
```python
import mvle
from PIL import Image

model = mvle.load("{name}")
images, texts = [Image.open("picture.png")], ["{caption}"]
similarity = model.encode_images(images) @ model.encode_texts(texts).T
odds = model.match(images, texts)  # log-odds that they belong together
words = model.fill(images, ["{masked}"])
pictures, masks = model.reconstruct(images, texts, ratio=0.75)
```

The encoders alone, without mvle. In timm (`forward` gives the row of the class token, `forward_features` all rows):

```python
encoder = timm.create_model("local-dir:{name}/image_encoder", pretrained=True)
```

In transformers:

```python
tokenizer = AutoTokenizer.from_pretrained("{name}/text_encoder")
encoder = RobertaModel.from_pretrained("{name}/text_encoder", add_pooling_layer=False)
```
"""


def card(name: str, run: OpenedRun, figures: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """The whole file. figures: evaluation.json of exactly these weights, or {}; validation: the row that training wrote
    after this step, or {}."""
    parts = [
        HEAD.format(name=run.config.run.name),
        markdown([["", ""], *facts(run)]),
        "## Figures\n",
        *figures_of(figures, validation),
        "## Use\n",
        USE.format(name=name, caption="a caption of the picture", masked="a <mask> of the picture"),
    ]
    return "\n".join(parts)


def facts(run: OpenedRun) -> Rows:
    """What the model is and what it was made of."""
    config, meta = run.config, run.meta
    image, text, masking, kinds = config.model.image, config.model.text, config.masking, config.objectives
    parameters = sum(p.numel() for p in run.model.parameters())
    low, high = masking.ratio_range
    share = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    weights = ", ".join(f"{k} {getattr(kinds, k).weight:g}" for k in ("mim", "mlm", "itc", "itm"))
    sources = {
        "model.init_from": config.model.init_from,
        "model.image.pretrained": image.pretrained,
        "model.text.pretrained": text.pretrained,
    }
    first = (
        ", ".join(f"{key}={value}" for key, value in sources.items() if value) or f"drawn from seed {config.run.seed}"
    )
    versions = {**meta.get("versions", {}), "mvle": __version__}
    rows = [
        ["parameters", f"{parameters / 1e6:.2f}M"],
        ["weights", "EMA of the weights" if run.weights == "ema" else "as trained"],
        ["step", f"{run.step:,} of {config.schedule.steps:,}"],
        ["pairs seen", f"{meta.get('pairs_seen', run.step * config.batch.total):,}"],
        ["trained on", f"{trained_on(config)}; fingerprint {fingerprint(meta)}"],
        ["first weights", first],
        ["images", f"{image.size} px, patches of {image.patch}, mean {list(image.mean)}, std {list(image.std)}"],
        ["captions", f"at most {text.max_tokens} tokens of {run.tokenizer.vocabulary:,}"],
        ["encoders", f"width {config.model.width}, {image.depth} and {text.depth} blocks, {config.model.heads} heads"],
        ["masked", f"{share} of {masking.cell}-pixel cells, {masking.text_ratio:g} of a caption's tokens"],
        ["masking", f"{masking.mode}, context {masking.context}"],
        ["weights of losses", weights],
        ["versions", ", ".join(f"{what} {version}" for what, version in versions.items())],
    ]
    if config.approximations:
        rows.append(["approximations", "; ".join(config.approximations)])
    return rows


def trained_on(config: Config) -> str:
    """The shards of each source, its weight, and which share of the images."""
    said = []
    for name, source in config.data.sources("train").items():
        weight = "" if source.weight is None else f" (weight {source.weight:g})"
        said.append(f"{name}{weight}: {' '.join(source.shards)}" if name else " ".join(source.shards))
    share = config.data.fraction
    return "; ".join(said) + (f"; data.fraction {share:g} of the images" if share < 1 else "")


def fingerprint(meta: Mapping[str, Any]) -> str:
    """Of the data, as the checkpoint has it."""
    return str(meta.get("fingerprints", {}).get("data", "not stored"))[:12]


def figures_of(figures: Mapping[str, Any], validation: Mapping[str, Any]) -> list[str]:
    """Every figure that is known of these weights, as tables; or that none is."""
    parts = []
    if figures:
        ran = [what for what, keys in PARTS.items() if keys[0] in figures]
        what = ran[0] if len(ran) == 1 else "all"
        parts.append(
            f"`{EVALUATE} {what}` on {figures['pairs']:,} images of {' '.join(figures['data'])}, captions: "
            f"{figures['captions']} for retrieval, the first one elsewhere.\n"
        )
        parts += [markdown(rows) for rows in evaluation_rows(figures)]
    if validation:
        rows = [[k, number(v, 4)] for k, v in validation.items() if k not in ("step", "kind")]
        parts += [f"Validation while training, after step {validation['step']:,}:\n", markdown([["", ""], *rows])]
    return parts or [f"None were measured of these weights. `{EVALUATE} all RUN` measures them; export again then.\n"]


def evaluation_rows(figures: Mapping[str, Any]) -> list[Rows]:
    """The tables of evaluation.json."""
    tables = []
    if "retrieval" in figures:
        tables.append(retrieval_rows(figures["retrieval"]))
    if "itm" in figures:
        tables.append(matching_rows(figures["itm"]))
    conditional = figures.get("conditional", {})
    if "mlm" in conditional:
        tables.append(word_rows(conditional["mlm"]))
    if "mim" in conditional:
        tables.append(pixel_rows(conditional["mim"]))
    if likelihoods := likelihood_rows(conditional):
        tables.append(likelihoods)
    return tables


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table. First row = heads."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"
