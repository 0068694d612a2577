"""``sweep``: the runs of a design through an executor, and what they returned."""

import contextlib
import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from pathlib import Path
from typing import Any

from qjax.sweep import _file
from qjax.sweep._design import Point, Value, checked, key_of, plain

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

# So many executors that each broke with one run, and no run that finished: it is not the runs.
_HOPELESS = 3


def sweep(
    run: Callable[[Point], Mapping[str, Any]],
    design: Sequence[Mapping[str, Value]],
    path: str | os.PathLike,
    *,
    executor: Callable[[], Executor],
    retries: int = 1,
    progress: bool = True,
) -> list[dict[str, Value]]:
    """Returns a row for each point of a design, in its order: the point, and what ``run(point)`` returned.

    Points that ``path`` has a result of are not run again: a sweep that was killed is resumed by the same call, and a
    larger design on the same path runs what is new. Keep a path to one ``run``, and to one sweep at a time.

    Args:
      run: a function of a point that returns a dict of strings, numbers, booleans and None (NumPy and JAX scalars
        become Python's). All it needs is in the point, its seed too. For processes it must be importable.
      design: distinct points, as ``grid`` and ``random`` return them.
      path: a file of JSON lines, made if it is not there. When a run ends, a line is appended and synced to the disk:
        its point, and its ``result`` or the ``error`` of the attempt.
      executor: a function without arguments that returns a ``concurrent.futures.Executor``: a class, a
        ``functools.partial`` of one, ``client.get_executor`` of dask.distributed.
      retries: how often a run that raises, or whose worker dies, is tried again in this call.
      progress: whether to show a bar, if tqdm is installed.

    A worker that dies breaks a ``ProcessPoolExecutor``, and all runs in it are lost. The next executor gets the oldest
    of them alone, the one after it the rest, and only a run that breaks an executor alone is charged with an attempt:
    one that always kills its worker fails by itself.

    Raises:
      RuntimeError: at the end, from the first error, if runs failed in all attempts; ``rows`` returns the others, and
        the same call tries these again. Before the end, if executors break with any run.
      TypeError, ValueError: for wrong arguments, for results that are not as above or have a name of their point, and
        for a file that is not that of a sweep; it is left as it is.

    >>> import tempfile
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from qjax.sweep import grid, sweep
    >>> path = tempfile.mkdtemp() + "/runs.jsonl"
    >>> design = grid(bits=[4, 8])
    >>> sweep(lambda point: {"loss": 2.0 ** -point["bits"]}, design, path, executor=ThreadPoolExecutor, progress=False)
    [{'bits': 4, 'loss': 0.0625}, {'bits': 8, 'loss': 0.00390625}]
    """
    if not callable(run):
        raise TypeError(f"sweep: run must be a function of a point, got {run!r}.")
    if not callable(executor):
        raise TypeError(
            f"sweep: executor must be a function that makes an Executor, got {executor!r}; pass the class, or a "
            "functools.partial of it: a broken executor is replaced."
        )
    if retries < 0:
        raise ValueError(f"sweep: retries must be at least 0, got {retries}.")
    design, path = checked(design), Path(path)
    results, size = _file.read(path)
    waiting = [point for point in design if key_of(point) not in results]
    batches = deque([waiting] if waiting else [])
    attempts: Counter[frozenset] = Counter()
    failed: list[tuple[Point, BaseException]] = []
    finished = broken = 0
    bar = tqdm(total=len(design), initial=len(design) - len(waiting), unit="run") if tqdm and progress else None
    with path.open("ab") as file, contextlib.nullcontext() if bar is None else bar:
        file.truncate(size)
        while batches:
            batch, again = batches.popleft(), []
            with _submitted(run, batch, executor) as futures:
                for future in as_completed(futures):
                    point, error = futures[future], _error(future)
                    if isinstance(error, BrokenExecutor) and len(batch) > 1:
                        continue  # Which of the runs broke it, nobody knows.
                    if error is None:
                        _file.append(file, point, result=_result(point, future.result()))
                        finished += 1
                    else:
                        text = "".join(traceback.format_exception_only(error)).strip()
                        _file.append(file, point, error=text)
                        broken += isinstance(error, BrokenExecutor)
                        if broken == _HOPELESS and not finished:
                            raise RuntimeError(_BROKEN) from error
                        attempts[key_of(point)] += 1
                        if attempts[key_of(point)] <= retries:
                            again.append(point)
                            continue
                        failed.append((point, error))
                    if bar is not None:
                        bar.set_postfix(failed=len(failed), refresh=False)
                        bar.update()
            if len(batch) > 1:
                lost = [point for future, point in futures.items() if isinstance(_error(future), BrokenExecutor)]
                batches.extendleft(filter(None, (lost[1:], lost[:1])))
            if again:
                batches.append(again)
    if failed:
        point, error = failed[0]
        raise RuntimeError(
            f"sweep: {len(failed)} of {len(design)} runs failed in {retries + 1} attempts, the first {point}: "
            f"{error!r}. rows({str(path)!r}, design) returns the others, and the same call tries these again."
        ) from error
    return rows(path, design)


_BROKEN = (
    f"sweep: {_HOPELESS} executors broke with one run each, and no run finished. With processes, run must be "
    "importable from a module (no cell of a notebook), and a script that starts them needs `if __name__ == "
    "'__main__':`. If it is the runs that kill their workers, put others before them."
)


def rows(path: str | os.PathLike, design: Sequence[Mapping[str, Value]]) -> list[dict[str, Value]]:
    """Returns the rows that the file of a sweep has of a design, in its order; points without a result are left out.

    It may be called while the sweep is running.

    Raises:
      FileNotFoundError: if there is no such file.
      TypeError, ValueError: for a design or a file that ``sweep`` refuses.

    >>> import pathlib, tempfile
    >>> from qjax.sweep import grid, rows
    >>> path = pathlib.Path(tempfile.mkdtemp(), "runs.jsonl")
    >>> _ = path.write_text('{"point": {"bits": 8}, "result": {"loss": 0.5}}\\n')
    >>> rows(path, grid(bits=[4, 8]))
    [{'bits': 8, 'loss': 0.5}]
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"rows: there is no file {path}; sweep makes it.")
    results, _ = _file.read(path)
    return [point | results[key_of(point)] for point in checked(design) if key_of(point) in results]


@contextlib.contextmanager
def _submitted(run, points: list[Point], executor) -> Iterator[dict[Future, Point]]:
    """Gives the futures of runs, in the order of their points; at the end those that have not begun are cancelled."""
    pool = executor()
    if not isinstance(pool, Executor):
        raise TypeError(
            f"sweep: executor must return a concurrent.futures.Executor, got {type(pool).__name__}; docs/sweep.md "
            "shows how to use what is none, such as submitit."
        )
    with pool:
        futures = {}
        try:
            for point in points:
                futures[_submit(pool, run, point)] = point
            yield futures
        finally:
            for future in futures:
                future.cancel()


def _submit(pool: Executor, run, point: Point) -> Future:
    try:
        return pool.submit(run, point)
    except BrokenExecutor as error:  # A worker died while runs were still being submitted.
        future: Future = Future()
        future.set_exception(error)
        return future


def _error(future: Future) -> BaseException | None:
    # Not by result(), which would raise a SystemExit of the run here.
    return CancelledError() if future.cancelled() else future.exception()


def _result(point: Point, result: Any) -> Point:
    """Returns the results of a run as plain data."""
    if not isinstance(result, Mapping):
        raise TypeError(f"sweep: run must return a dict of results, got {result!r:.80} for {point}.")
    if shared := sorted(point.keys() & result.keys()):
        raise ValueError(f"sweep: run returned {shared}, names of the point {point}; return them under others.")
    return {name: plain("sweep", name, value) for name, value in result.items()}
