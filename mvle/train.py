"""Pre-train: `python -m mvle.train CONFIG [key=value …]`, or the same under torchrun for several ranks.

CONFIG is a YAML file, or the name of a packaged recipe (tiny, flickr8k, base, large). Starting a command again goes on
where its run stopped.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

USAGE = """usage: python -m mvle.train CONFIG [key.sub=value ...]
       torchrun --nproc-per-node 8 -m mvle.train CONFIG [key.sub=value ...]

CONFIG is a YAML file or the name of a packaged recipe. Keys, with type, default and meaning:
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 finished or stopped cleanly by a signal, 2 for a config or data that cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        from .config import describe

        print(USAGE)
        print(describe())
        return 0 if arguments else 2
    from .config import ConfigError, load_config, require_data
    from .data.errors import DataError
    from .data.tokenizer import check_tokenizer
    from .engine.checkpoint import CheckpointError
    from .engine.parallel import Parallel, ParallelError

    try:
        # what needs no model and no other rank is said first, within seconds
        config = load_config(arguments[0], arguments[1:])
        require_data(config, f"python -m mvle.train {arguments[0]}")
        check_tokenizer(config.tokenizer, config.run.folder)

        from .engine.trainer import Trainer

        with Parallel.start(config.parallel, config.run.device) as parallel:
            Trainer(config, parallel).run()
    except (ConfigError, DataError, CheckpointError, ParallelError, OSError) as error:
        print(f"mvle.train: {error}", file=sys.stderr)
        return 2
    return 0


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
    leave(main())
