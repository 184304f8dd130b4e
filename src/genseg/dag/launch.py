"""One command in several processes, one per GPU, through torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

from genseg.dag.lease import die_with_parent
from genseg.errors import UserError
from genseg.params import Params

_TOLD = 2
"""Exit code of a process that has told its user's mistake."""
_HEAD_START_SECONDS = 5.0


def processes(study: Params) -> int:
    """How many processes train: one per GPU of `resources.train.gpu`, of those that are visible here (a scheduler or
    `genseg lease` may have given fewer)."""
    import torch

    return 1 if study.device == "cpu" else max(1, min(study.resources["train"].gpu, torch.cuda.device_count()))


def launch(command: list[str], count: int, threads: int) -> int:
    """Run `genseg COMMAND` in `count` processes of this machine until all have ended; they end when this one does.

    Returns:
        exit code: 0, 2 when one of them has told a user's mistake, else 1.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.disable(logging.ERROR)  # torchrun's own account of a failure: a page
    try:
        main(["--standalone", "--nproc-per-node", str(count), "--module", "genseg", *command])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == _TOLD:
            return _TOLD
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"process {rank} of {count} ended with {how}; checkpoints are kept, run again", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def one_of_several() -> Iterator[None]:
    """The work of a process that torchrun, `accelerate launch` or `launch` has started: it ends when they do, and a mistake
    that all processes find is told by the first (the others wait, and are ended)."""
    die_with_parent()
    try:
        yield
    except UserError:
        if os.environ["RANK"] != "0":
            time.sleep(_HEAD_START_SECONDS)
        raise
