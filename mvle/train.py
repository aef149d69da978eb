"""Pre-train: `python -m mvle.train CONFIG [key=value …]`, or the same under torchrun for several ranks.

CONFIG is a YAML file, or the name of a packaged recipe, such as tiny, base or ablation/itc. Starting a command again
goes on where its run stopped. --dry-run builds all, prints all, and makes two steps on made-up data; it needs no data.

Exit codes
     0   finished
     1   failed: a rank failed, hung or died, a disk is full, or an error that nobody expected
     2   the config or the data cannot be used
    75   stopped by SIGTERM, SIGINT or SIGUSR1: saved, and the same command goes on; runs/NAME/stopped says so too
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .engine.parallel import Parallel
    from .engine.signals import StopFlag
    from .engine.watch import Watch

FINISHED, FAILED, UNUSABLE, STOPPED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h

USAGE = """usage: python -m mvle.train CONFIG [--dry-run] [key.sub=value ...]
       torchrun --nproc-per-node 8 -m mvle.train CONFIG [--dry-run] [key.sub=value ...]

CONFIG is a YAML file or the name of a packaged recipe:
{names}
extends=NAME puts CONFIG over that recipe instead of the one that it extends: `ablation/itc extends=tiny`.
--dry-run builds all, prints all, and makes two steps on made-up data.

Exit codes: 0 finished; 1 failed (a rank failed, hung or died); 2 the config or the data cannot be used;
75 stopped by SIGTERM, SIGINT or SIGUSR1: saved, and the same command goes on.

Keys, with type, default and meaning:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: see above."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = {a for a in arguments if a.startswith("-")}
    words = [a for a in arguments if a not in options]
    if options & {"-h", "--help"} or not arguments:
        show_help()
        return FINISHED if arguments else UNUSABLE
    if unknown := options - {"--dry-run"}:
        return refuse(f"options are --dry-run and --help; got {', '.join(sorted(unknown))}. Keys are key.sub=value.")
    if not words:
        return refuse("CONFIG must be a YAML file or the name of a packaged recipe; got none. See --help.")
    from .engine.signals import StopFlag, stop_on_signals

    dry = "--dry-run" in options
    with contextlib.nullcontext(StopFlag()) if dry else stop_on_signals() as stop:
        return train(words[0], words[1:], dry, stop)


def train(name: str, overrides: Sequence[str], dry: bool, stop: StopFlag) -> int:
    """Train, or try whether that would work; returns the exit code, after saying on stderr what went wrong."""
    from .config import ConfigError, load_config, require_data
    from .data.errors import DataError
    from .data.tokenizer import check_tokenizer
    from .engine.errors import CheckpointError, OptimError, RunError
    from .engine.optim import check_optimizer
    from .engine.parallel import Parallel, ParallelError
    from .engine.skips import NotFiniteError
    from .engine.trackers import TrackerError, check_trackers
    from .engine.watch import Watch
    from .evaluation.split import SplitError
    from .model.sources import PretrainedError

    parallel: Parallel | None = None
    watch: Watch | None = None
    try:
        # what needs no model and no other rank is said first, within seconds
        config = load_config(name, overrides)
        check_optimizer(config.optim, config.run.device)
        if not dry:
            from .engine.first_weights import check_first_weights

            require_data(config, f"python -m mvle.train {name}")
            check_tokenizer(config.tokenizer, config.run.folder)
            check_first_weights(config)
            check_trackers(config.metrics)
        with Parallel.start(config.parallel, config.run.device) as parallel, Watch(parallel) as watch:
            if dry:
                from .engine.dry_run import dry_run

                dry_run(config, parallel)
                return FINISHED
            from .engine.trainer import Trainer

            return FINISHED if Trainer(config, parallel, watch, stop).run() else STOPPED
    except NotFiniteError as error:
        return explain(error, watch, FAILED)
    except (
        ConfigError,
        DataError,
        PretrainedError,
        RunError,
        SplitError,
        CheckpointError,
        OptimError,
        ParallelError,
        TrackerError,
        OSError,
    ) as error:
        trained = parallel is not None and parallel.settled  # before the first step it is what the run began with
        return explain(error, watch, FAILED if trained else UNUSABLE)
    except Exception as error:
        return explain(error, watch, FAILED, expected=False)


def explain(error: Exception, watch: Watch | None, code: int, expected: bool = True) -> int:
    """Say what ended this rank: to the user, to the other ranks, and to torchrun; returns `code`."""
    from .engine.watch import lost_a_rank, tell_torchrun

    story = not expected
    if not expected and watch is not None and lost_a_rank(error):
        error.add_note(watch.blame(error))
        story = False  # it is told by the rank that is to blame
    else:
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        if not expected:
            traceback.print_exc()
        refuse(message)
        if watch is not None:
            watch.last_words(message)
    tell_torchrun(error, trace=story)
    return code


def refuse(message: str) -> int:
    """Say on stderr why there is no run, or no more; returns UNUSABLE."""
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"mvle.train: {rank}{message}", file=sys.stderr, flush=True)
    return UNUSABLE


def show_help() -> None:
    """Usage, the packaged recipes and every key."""
    from .config import describe
    from .config_files import config_names

    names = textwrap.fill(", ".join(config_names()), 118, initial_indent=" " * 4, subsequent_indent=" " * 4)
    try:
        print(USAGE.format(names=names))
        print(describe(), flush=True)
    except BrokenPipeError:  # `--help | head` has read enough; nor may the flush at exit fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """End the process with `code`. Among ranks, without torch's teardown of static objects: its threads are sometimes
    still joinable then, and a run that had ended well would end in SIGABRT ("terminate called without an active
    exception", seen with torch 2.14.1 and gloo)."""
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        faulthandler.enable()  # a rank that crashes in C says where
    leave(main())
