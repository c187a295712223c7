"""Where independent tasks run: in this process, in local processes, or on a Dask cluster. All are `concurrent.futures` executors.

A task is a function of a `Study` and plain arguments. The study goes to each worker once; its results are the same wherever they
are computed, so that numbers do not depend on the number of workers. Scheduling, retries and the loss of a worker are the
executor's business.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qcompile.errors import InputError, PassError
from qcompile.probing import Study

T = TypeVar("T")
_PATIENCE = "10s"  # until a scheduler must have answered
_HERE: dict[str, Study] = {}  # of a worker process: the study that it was started with


class InProcess(Executor):
    """Runs a task when it is submitted."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """A future that is done."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # a future carries whatever was raised to `result`
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        return future


class Workers:
    """An executor and the study as its tasks take it."""

    def __init__(self, executor: Executor, study: Any, count: int) -> None:
        self.executor, self.count = executor, count
        self._study = study

    def submit(self, task: Callable[..., T], *arguments: Any) -> Future[T]:
        """`task(study, *arguments)` somewhere."""
        return self.executor.submit(_call, task, self._study, arguments)

    def map(self, task: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
        """The results of all `calls`, in order. Raises PassError where worker processes died."""
        futures = [self.submit(task, *call) for call in calls]
        return [result_of(future) for future in futures]


def result_of(future: Future[T]) -> T:
    """Its result; PassError where the processes died."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise PassError("a worker process died (out of memory?); use fewer with --workers") from error


@contextmanager
def workers(study: Study, count: int = 1, scheduler: str | None = None) -> Iterator[Workers]:
    """`count` local processes (1: this one), or the cluster whose scheduler is at `scheduler`.

    Raises InputError for both at once, where the extra `cluster` is missing or no scheduler answers.
    """
    if count < 1:
        raise InputError(f"--workers {count}: give a whole number of at least 1")
    if scheduler is not None:
        if count != 1:
            raise InputError("--workers and --scheduler: a cluster has its own workers; give one of them")
        with _cluster(study, scheduler) as found:
            yield found
    elif count == 1:
        yield Workers(InProcess(), study, 1)
    else:
        with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
            path = Path(folder) / "study"
            path.write_bytes(pickle.dumps(study))
            # Spawned, not forked: onnxruntime's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(str(path),)) as executor:
                try:
                    yield Workers(executor, None, count)
                except BaseException:
                    executor.shutdown(wait=False, cancel_futures=True)
                    raise


@contextmanager
def _cluster(study: Study, address: str) -> Iterator[Workers]:
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError('--scheduler needs Dask; pip install "qcompile[cluster]"') from error
    try:
        client = Client(address, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--scheduler {address}: no Dask scheduler answers there ({' '.join(str(error).split())})") from error
    with client:
        known = client.scheduler_info()["workers"]
        if not known:
            raise InputError(f"--scheduler {address}: the cluster has no workers; start some")
        shared = client.scatter(study, broadcast=True)
        # Retries are Dask's: a task whose worker is lost runs again on another.
        yield Workers(client.get_executor(retries=2), shared, len(known))


def _start(path: str) -> None:
    _HERE["study"] = pickle.loads(Path(path).read_bytes())


def _call(task: Callable[..., T], study: Study | None, arguments: tuple[Any, ...]) -> T:
    return task(_HERE["study"] if study is None else study, *arguments)
