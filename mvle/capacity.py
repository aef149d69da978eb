"""What a config takes on N ranks, found without a GPU: `python -m mvle.capacity CONFIG [key=value …] --ranks 1,8,64`.

Parameters, useful operations, memory of a rank, traffic of a step, and the largest micro-batch that fits. How each is
found is in engine/capacity.py. CONFIG is a YAML file or the name of a recipe; no data and no tokenizer is read.

Exit codes: 0 printed; 2 for a config, ranks or a GPU that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .data.tokenizer import ROBERTA_WORDS

if TYPE_CHECKING:
    from .config import Config
    from .engine.capacity import Capacity, RankPlan
    from .engine.gpus import Gpu

GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: see above."""
    options = parse(arguments)
    from .config import ConfigError, load_config
    from .engine.capacity import capacity
    from .engine.gpus import GPUS
    from .engine.parallel import ParallelError

    gpu = None if options.gpu is None else GPUS.get(options.gpu.lower())
    if options.gpu is not None and gpu is None:
        return refuse(f"--gpu must be one of {', '.join(GPUS)}; got {options.gpu}.")
    try:
        ranks = [int(n) for n in options.ranks.split(",")]
        if min(ranks) < 1:
            raise ValueError
    except ValueError:
        return refuse(f"--ranks must be numbers above 0, such as 1,8,64; got {options.ranks}.")
    try:
        config = load_config(options.config, options.overrides)
        words = config.tokenizer.vocabulary if config.tokenizer.kind == "bpe" else ROBERTA_WORDS
        found = capacity(config, options.vocabulary or words, ranks, gpu.gib if gpu else None)
    except (ConfigError, ParallelError) as error:
        return refuse(str(error))
    if options.json:
        print(json.dumps({"config": options.config, "gpu": options.gpu, **asdict(found)}, indent=1))
    else:
        print(report(options.config, config, found, options.gpu, gpu))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m mvle.capacity", description="What a config takes on N ranks.")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a packaged recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, such as 1,8,64 (default: 1)")
    parser.add_argument("--gpu", help="a GPU whose memory is known, such as h100: then also what fits")
    parser.add_argument(
        "--vocabulary",
        type=int,
        help=f"words (default: tokenizer.vocabulary of a bpe, else {ROBERTA_WORDS:,}, RoBERTa's)",
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON, in bytes and operations")
    return parser.parse_intermixed_args(arguments)


def refuse(message: str) -> int:
    """Say on stderr why there is no answer."""
    print(f"mvle.capacity: {message}", file=sys.stderr)
    return 2


# --- the page --------------------------------------------------------------------------------------------------------


def report(name: str, config: Config, found: Capacity, gpu_name: str | None, gpu: Gpu | None) -> str:
    """Everything, for a reader."""
    parameters, work = found.parameters, found.flops_a_pair
    whole = sum(work.values())
    shares = " · ".join(f"{part} {value / whole:.1%}" for part, value in sorted(work.items(), key=lambda x: -x[1]))
    lines = [
        f"{name}: {sum(parameters.values()) / 1e6:.1f}M parameters, {found.vocabulary:,} words, "
        f"{config.model.image.size} px, masking.mode={config.masking.mode}, captions of {found.tokens:.1f} tokens "
        "(spread as Flickr8k's are)",
        "",
        "parameters   " + " · ".join(f"{part} {value / 1e6:.1f}M" for part, value in parameters.items()),
        f"useful work  {whole / 1e12:.4g} TFLOP a pair, forward and backward, {found.share_of_plain:.2f} of the plain "
        f"graph's with captions padded to {config.model.text.max_tokens}",
        f"             {shares}",
        f"             {found.flops_a_step / 1e12:,.4g} TFLOP a step of {config.batch.total} pairs",
        "",
        *activations(config, found),
        "",
        *memory(found.plans),
        "",
        *moved(found.plans),
        "",
        *what_fits(found, gpu_name, gpu),
        *problems(found.plans),
        "",
        "traced   activations: the real model on fake tensors in bfloat16, attention as on a CPU (ragged",
        "         sequences are padded within a call); another kernel keeps more or less",
        "derived  all else, from shapes: see mvle/engine/capacity.py. Not measured on a GPU",
    ]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned to the right, but for the first column."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]


def activations(config: Config, found: Capacity) -> list[str]:
    """Of each choice of checkpointing."""
    rows = [
        [choice, f"{line.a_pair / 2**20:,.1f}", f"{line.fixed / 2**20:,.0f}", f"{line.at(64) / GIB:,.2f}"]
        for choice, line in found.activations.items()
    ]
    return table(["parallel.activation_checkpointing", "MiB a pair", "MiB more", "GiB at 64 pairs"], rows)


def memory(plans: Sequence[RankPlan]) -> list[str]:
    """Of a rank, beside activations."""
    head = ["ranks, GiB each", "weights", "gradients", "moments", "EMA", "gathered", "whole gradients", "sum"]
    rows = []
    for plan in plans:
        own = plan.memory
        parts = (own.weights, own.gradients, own.moments, own.ema, own.gathered, own.whole_gradients, own.fixed)
        rows.append([ranks(plan), *(f"{part / GIB:.3f}" for part in parts)])
    return table(head, rows)


def moved(plans: Sequence[RankPlan]) -> list[str]:
    """Traffic of a rank."""
    head = ["received a step, GiB", "weights", "gradients", "between copies", "contrast", "sum"]
    rows = []
    for plan in plans:
        own = plan.traffic
        parts = (own.weights, own.gradients, own.copies, own.contrast, own.all)
        rows.append([ranks(plan), *(f"{part / GIB:.3f}" for part in parts)])
    return table(head, rows)


def what_fits(found: Capacity, name: str | None, gpu: Gpu | None) -> list[str]:
    """The step as it is configured, and the largest that a GPU holds."""
    from .engine.capacity import MARGIN

    head = ["ranks", "checkpointing", "pairs a rank", "GiB as configured"]
    if gpu is not None:
        head += [f"largest batch.micro on {name}", "of this batch.total"]
    rows = []
    for plan in found.plans:
        for fit in plan.fits:
            pairs = "-" if plan.micro is None else f"{plan.micro} x {plan.accumulate}"
            row = [ranks(plan), fit.checkpointing, pairs, "-" if fit.total is None else f"{fit.total / GIB:.1f}"]
            if gpu is not None:
                row += [str(fit.largest or "none"), "-" if plan.micro is None else str(fit.micro or "none")]
            rows.append(row)
    lines = table(head, rows)
    if gpu is not None:
        lines.append(f"({name}: {gpu.gib} GiB, of which {MARGIN:.0%} are left free; pairs in whole groups of matching)")
    return lines


def problems(plans: Sequence[RankPlan]) -> list[str]:
    """Why some numbers of ranks cannot run the config as it is."""
    lines = []
    for plan in plans:
        if plan.problem is not None:
            lines += ["", f"{plan.ranks} ranks cannot run it as it is: {plan.problem}"]
    return lines


def ranks(plan: RankPlan) -> str:
    """A number of ranks, and how they share the weights."""
    return str(plan.ranks) if plan.replicate == 1 else f"{plan.ranks} = {plan.replicate} x {plan.shard}"


if __name__ == "__main__":
    sys.exit(main())
