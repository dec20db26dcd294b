"""Where trials run: in processes of one BLAS thread each, or, for a single job, here."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from dsa_portable.conformance.judging.process import ONE_THREAD, cores

_T = TypeVar("_T")


class Here(Executor):
    """Runs what is submitted at once."""

    def submit(self, run: Callable[..., _T], /, *given: Any, **named: Any) -> Future[_T]:
        """A future that is done."""
        future: Future[_T] = Future()
        future.set_result(run(*given, **named))
        return future


def pool(jobs: int | None) -> Executor:
    """So many processes, or one for each core; spawned, since a BLAS that was forked has the threads it had."""
    jobs = jobs or cores()
    if jobs == 1:
        return Here()
    os.environ.update(ONE_THREAD)
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
