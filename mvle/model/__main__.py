"""`python -m mvle.model CONFIG [key=value …]`: builds the model on meta (shapes without memory) and prints its size."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..data.tokenizer import ROBERTA_WORDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 printed, 2 for a config that cannot be used."""
    parser = argparse.ArgumentParser("python -m mvle.model", description="Build a model on meta and print its size.")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a packaged recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument(
        "--vocabulary",
        type=int,
        help=f"words (default: tokenizer.vocabulary of a bpe, else {ROBERTA_WORDS:,}, RoBERTa's)",
    )
    options = parser.parse_args(arguments)
    import torch

    from ..config import ConfigError, load_config
    from .model import MaskVLM, parameter_counts

    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(f"mvle.model: {error}", file=sys.stderr)
        return 2
    words = config.tokenizer.vocabulary if config.tokenizer.kind == "bpe" else ROBERTA_WORDS
    words = options.vocabulary or words
    with torch.device("meta"):
        counts = parameter_counts(MaskVLM(config, words, mask_id=4))
    width = max(map(len, counts))
    print(f"{options.config}: {words:,} words, {config.model.image.size} px, masking.mode={config.masking.mode}")
    for name, count in {**counts, "all": sum(counts.values())}.items():
        print(f"    {name:<{width}}  {count:>13,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
