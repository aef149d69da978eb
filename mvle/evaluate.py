"""Evaluate a run: `python -m mvle.evaluate retrieval|conditional|all RUN [--data SHARDS ...]`.

    retrieval     R@1/5/10 both ways, by similarity and after the matching head reordered the first k; and how well the
                  matching head tells true pairs from random and hard false ones
    conditional   masked words and masked pixels with the true, a wrong and no partner

Figures are printed as tables and kept in RUN/evaluation.json (or --json FILE). Figures that are there already, for the
same checkpoint, data and settings, are printed again instead of being computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.remote import shown
from .evaluation.tables import PARTS, conditional_tables, retrieval_tables

if TYPE_CHECKING:
    from .data.shards import ShardSet
    from .inference import OpenedRun

HEADER = ("data", "pairs", "captions", "step", "weights", "checkpoint", "fingerprint")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m mvle.evaluate", description=__doc__.split("\n", 1)[0])
    made.add_argument("what", choices=("retrieval", "conditional", "all"))
    made.add_argument("run", metavar="RUN", help="folder of a run")
    made.add_argument(
        "--data", nargs="+", metavar="SHARDS", help="shards (default: data.test of the run, else data.val)"
    )
    made.add_argument(
        "--pairs", type=int, metavar="N", help="images, chosen by evaluation.seed; 0: all (default: evaluation.pairs)"
    )
    made.add_argument(
        "--captions", choices=("all", "first"), help="captions that retrieval ranks (default: as in the run)"
    )
    made.add_argument("--k", type=int, metavar="K", help="candidates that are reranked (default: evaluation.k)")
    add_checkpoint_arguments(made)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: run.device of the run")
    made.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (default: RUN/evaluation.json)")
    return made


def add_checkpoint_arguments(made: argparse.ArgumentParser) -> None:
    """--checkpoint and --weights: what of a run is opened."""
    made.add_argument(
        "--checkpoint",
        type=step_or_best,
        metavar="STEP|best",
        help="the checkpoint of that step, or the best one by checkpoint.best (default: the newest)",
    )
    made.add_argument(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="those that were trained, or their EMA (default: auto, the EMA where the checkpoint has one)",
    )


def step_or_best(text: str) -> int | str:
    """What --checkpoint takes. Raises ArgumentTypeError."""
    if text != "best" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a step (a number) or best; got {text!r}")
    return text if text == "best" else int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a run or data that cannot be used."""
    options = parser().parse_args(arguments)
    from .config import ConfigError
    from .data.errors import DataError
    from .engine.checkpoint import CheckpointError
    from .evaluation.split import SplitError
    from .inference import RunError, open_run

    try:
        if options.pairs is not None and options.pairs < 0:
            raise RunError(f"--pairs must be 0 (all) or more; got {options.pairs}.")
        if options.k is not None and options.k < 1:
            raise RunError(f"--k must be at least 1; got {options.k}.")
        run = open_run(options.run, options.device, options.checkpoint, options.weights)
        evaluate(run, options)
    except (RunError, ConfigError, DataError, CheckpointError, SplitError, OSError) as error:
        print(f"mvle.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(run: OpenedRun, options: argparse.Namespace) -> dict[str, Any]:
    """Compute what is missing, write the file, print the tables; returns the file's content."""
    patterns = options.data or default_data(run)
    shards = open_data(run, patterns)
    evaluation = run.config.evaluation
    pairs = evaluation.pairs if options.pairs is None else options.pairs
    captions = options.captions or evaluation.captions
    k = options.k or evaluation.k
    images = min(pairs or shards.images, shards.images)
    header = {
        "data": list(patterns),
        "pairs": images,
        "captions": captions,
        "step": run.step,
        "weights": run.weights,
        "checkpoint": run.identity,
        "fingerprint": fingerprint(run, shards),
    }
    target = options.json or run.folder / "evaluation.json"
    figures = stored(target, header)
    if options.json is not None:  # the run may know them already
        figures = {**stored(run.folder / "evaluation.json", header), **figures}
    wanted, skipped = trained_parts(run, options.what)
    print(
        f"{run}: {images} images of {shown(' '.join(patterns))}, captions: {captions} for retrieval, "
        "the first one elsewhere"
    )
    for what, why in skipped.items():
        print(f"{what}: skipped, since {why}")
    for what in wanted:
        if figures.get(PARTS[what][0]) and (what != "retrieval" or figures["retrieval"]["k"] == k):
            print(f"{what}: the same checkpoint, data and settings as in {target}; these are its figures:")
        else:
            figures |= compute(what, run, shards, images, captions, k)
        print("\n".join(["", *tables(what, figures)]))
    keep_other_figures(target, header)
    write(target, {**header, **figures})
    print(f"\nwritten to {target}")
    return {**header, **figures}


def trained_parts(run: OpenedRun, asked: str) -> tuple[list[str], dict[str, str]]:
    """The parts of `asked` that this run was trained for, and why each other one is skipped. Raises RunError where
    nothing is left."""
    from .inference import RunError

    weights = run.config.objectives
    needs = {"retrieval": ("itc",), "conditional": ("mlm", "mim")}  # one of them
    wanted = [what for what in PARTS if asked in (what, "all")]
    skipped = {}
    for what in wanted:
        if not any(getattr(weights, name).weight for name in needs[what]):
            keys = " or ".join(f"objectives.{name}.weight" for name in needs[what])
            skipped[what] = f"it needs a run that was trained with {keys} above 0; here it is 0"
    if len(skipped) == len(wanted):
        raise RunError("; ".join(f"{what}: {why}" for what, why in skipped.items()) + ".")
    return [what for what in wanted if what not in skipped], skipped


def compute(what: str, run: OpenedRun, shards: ShardSet, pairs: int, captions: str, k: int) -> dict[str, Any]:
    """The parts of evaluation.json that `what` names."""
    from .evaluation.conditional import conditional
    from .evaluation.matching import matching
    from .evaluation.retrieval import embed, retrieval
    from .evaluation.split import Split, described

    split = Split(run.config, shards, run.tokenizer, pairs)
    if what == "conditional":
        found = conditional(run.model, split, run.config.evaluation.seed, run.device)
        return {"conditional": described(found)}
    itm = bool(run.config.objectives.itm.weight)
    embedded = embed(run.model, split, run.device, captions, keep_rows=itm)
    out = {"retrieval": described(retrieval(run.model, embedded, k, run.device, rerank_too=itm))}
    return out | ({"itm": described(matching(run.model, embedded, split, run.device))} if itm else {})


def tables(what: str, figures: Mapping[str, Any]) -> list[str]:
    """The lines of one part."""
    if what == "conditional":
        return conditional_tables(figures["conditional"])
    return retrieval_tables(figures["retrieval"], figures.get("itm"))


# ---- data and files -------------------------------------------------------------------------------------------------


def default_data(run: OpenedRun) -> list[str]:
    """data.test, else data.val. Raises RunError where the run has neither."""
    from .inference import RunError

    data = run.config.data
    patterns = data.test or data.val
    if not patterns:
        raise RunError(f"{run.folder} names no data.test and no data.val; say --data SHARDS.")
    return list(patterns)


def open_data(run: OpenedRun, patterns: Sequence[str]) -> ShardSet:
    """The shards; shapes:SPLIT is found where the run has it. Raises DataError."""
    from .data.shards import ShardSet

    data = run.config.data
    return ShardSet.open(list(patterns), data.shapes_folder, data.shapes_captions, data.index_folder)


def fingerprint(run: OpenedRun, shards: ShardSet) -> str:
    """What figures stand on, as hex: the data and the weights."""
    return hashlib.blake2b(f"{shards.fingerprint}\n{run.identity}".encode(), digest_size=16).hexdigest()


def stored(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that a file holds for exactly this header; {} for any other, which is then moved aside."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(found, dict) or any(found.get(key) != header[key] for key in HEADER):
        return {}
    return {key: value for key, value in found.items() if key not in HEADER}


def keep_other_figures(path: Path, header: Mapping[str, Any]) -> None:
    """Move figures of another checkpoint, data or setting aside, under a name that says which; nothing is lost."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = all(found.get(key) == header[key] for key in HEADER)
        name = f"{path.stem}.step_{found['step']}.{found['pairs']}_pairs.{found['captions']}.{found['fingerprint'][:8]}"
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError):  # no file of ours: aside with it all the same
        same, name = False, f"{path.stem}.unknown"
    if not same:
        kept = path.replace(path.with_name(f"{name}{path.suffix}"))
        print(f"\n{path} held other figures; they are kept in {kept}")


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """The whole file or none."""
    from .engine.run import write_text

    write_text(path, json.dumps(figures, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
