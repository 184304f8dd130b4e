"""One command in several processes, one per GPU, through torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from genseg.dag.lease import die_with_parent
from genseg.errors import UserError
from genseg.params import Params

_MARK = "GENSEG_LAUNCHED"
"""Environment variable of processes that `launch` has started."""


def processes(params: Params) -> int:
    """How many processes train: one per GPU of `resources.train.gpu`, of those that are visible here (a scheduler or
    `genseg lease` may have given fewer)."""
    import torch

    return 1 if params.device == "cpu" else max(1, min(params.resources["train"].gpu, torch.cuda.device_count()))


def launch(command: list[str], count: int, threads: int) -> None:
    """Run `genseg COMMAND` in `count` processes of this machine until all have ended; they end when this one does.

    Raises:
        UserError: the mistake that the first of them to fail has met, or how it was killed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ[_MARK] = "1"
    logging.disable(logging.ERROR)  # torchrun's own account of a failure is a page
    try:
        main(["--standalone", "--nproc-per-node", str(count), "--module", "genseg", *command])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if isinstance(failure.message, dict):
            raise UserError(failure.message["message"].removeprefix("UserError: ")) from None
        how = f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
        raise UserError(f"process {rank} of {count} {how}; checkpoints are kept: run again") from None
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[_MARK]


@contextlib.contextmanager
def one_of_several() -> Iterator[None]:
    """The work of a process that torchrun, `accelerate launch` or `launch` has started: it ends when they do, and leaves
    telling a mistake, which all of them may have found, to `launch`."""
    die_with_parent()
    try:
        yield
    except UserError as error:
        if _MARK not in os.environ:
            raise
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        sys.exit(2)
