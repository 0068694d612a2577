"""Designs, and sweeps that are killed, interrupted and crashed, against the rows of a plain loop."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from runs import PROCESSES, counted, killed, loss
from scipy import stats

import qjax.sweep._sweep
from qjax.sweep import grid, random, rows, sweep

THREADS = partial(ThreadPoolExecutor, 2)
DESIGN = grid(size=range(1, 5), seed=range(2))
ROWS = [point | loss(point) for point in DESIGN]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(run, path, design=DESIGN, executor=THREADS, **options):
    return sweep(run, design, path, executor=executor, progress=False, **options)


def test_a_grid_is_the_product_of_its_axes():
    axes = {"fmt": ["e4m3", "mxfp4"], "rate": np.array([0.1, 0.2]), "clip": [None, True], "seed": np.arange(2)}
    design = grid(**axes)
    assert design == [
        {"fmt": f, "rate": r, "clip": c, "seed": s}
        for f in axes["fmt"]
        for r in (0.1, 0.2)
        for c in (None, True)
        for s in (0, 1)
    ]
    assert {type(value) for point in design for value in point.values()} == {str, float, type(None), bool, int}


def test_random_points_follow_their_distributions():
    def draw(n, seed=0):
        return random(
            n, seed=seed, fmt=("e4m3", "mxfp4"), rate=stats.loguniform(1e-4, 1e-2), layers=stats.randint(1, 4)
        )

    design = draw(1000)
    assert draw(10) == design[:10] != draw(10, seed=1)
    assert len({point["seed"] for point in design}) == 1000
    assert stats.kstest([np.log10(point["rate"]) for point in design], stats.uniform(-4, 2).cdf).pvalue > 0.01
    assert stats.chisquare(np.unique_counts([point["layers"] for point in design]).counts).pvalue > 0.01
    assert stats.chisquare(np.unique_counts([point["fmt"] for point in design]).counts).pvalue > 0.01
    assert {type(value) for point in design for value in point.values()} == {str, float, int}


@pytest.mark.parametrize("executor", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_rows_are_those_of_a_loop(executor, path):
    assert quiet(loss, path, executor=executor) == ROWS == rows(path, DESIGN)
    assert sorted(map(str, lines(path))) == sorted(str({"point": p, "result": loss(p)}) for p in DESIGN)


def test_rows_do_not_depend_on_the_order(path):
    backwards = quiet(loss, path, DESIGN[::-1])
    assert backwards == ROWS[::-1]
    assert rows(path, DESIGN) == ROWS
    assert rows(path, [dict(reversed(point.items())) for point in DESIGN]) == ROWS


def test_scalars_of_arrays_become_numbers_and_survive_the_file(path):
    values = {
        "a": jnp.float32(0.1),
        "b": np.float64(0.1),
        "c": np.inf,
        "d": jnp.bfloat16(3),
        "e": np.int8(2),
        "f": True,
    }
    (row,) = quiet(lambda point: values | {"text": "ä\n\r\u2028", "g": None}, path, [{"x": 0.1}])
    assert row == {"x": 0.1, "a": float(np.float32(0.1)), "b": 0.1, "c": np.inf, "d": 3.0, "e": 2, "f": True} | {
        "text": "ä\n\r\u2028",
        "g": None,
    }
    (row,) = quiet(lambda point: {"loss": jnp.nan}, path, [{"x": 0.2}])
    assert row["loss"] != row["loss"]


def test_a_larger_design_runs_what_is_new(path, tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    quiet(partial(counted, calls), path, DESIGN[:3])
    assert quiet(partial(counted, calls), path) == ROWS
    assert len(list(calls.iterdir())) == len(DESIGN)
    assert quiet(partial(counted, calls), path, DESIGN[2:4]) == ROWS[2:4]
    assert len(list(calls.iterdir())) == len(DESIGN)
    assert quiet(loss, path, []) == []


def test_a_file_that_is_cut_anywhere_is_completed(path):
    quiet(loss, path, DESIGN[:2])
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        before = rows(path, DESIGN)
        assert len(before) == data[:size].count(b"\n")
        assert quiet(loss, path, DESIGN[:3]) == ROWS[:3]
        assert len(lines(path)) == 3


def test_a_killed_sweep_resumes_and_ends_with_the_same_rows(path, tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    # The runs of sizes 3 and 4 never end, so that the kill comes when the four others have.
    command = [sys.executable, str(Path(__file__).with_name("runs.py")), str(path), str(calls), "3", "5"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while len(path.read_bytes().split(b"\n") if path.exists() else b"") <= 4:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # The workers too.
        process.wait()
    with path.open("ab") as file:
        file.write(b'{"point": {"size": 3, "se')
    assert rows(path, DESIGN) == ROWS[:4]
    assert quiet(partial(counted, calls), path, executor=PROCESSES) == ROWS
    assert len(list(calls.iterdir())) == len(DESIGN)
    assert len(lines(path)) == len(DESIGN)


def test_a_worker_that_is_killed_costs_no_attempt_but_a_run(path, tmp_path):
    assert quiet(partial(killed, tmp_path, DESIGN[3:4], 1), path, executor=PROCESSES, retries=0) == ROWS
    assert not [line for line in lines(path) if "error" in line]


def test_a_run_that_always_kills_its_worker_fails_alone(path, tmp_path):
    text = re.escape("sweep: 2 of 8 runs failed in 2 attempts, the first {'size': 2, 'seed': ")
    with pytest.raises(RuntimeError, match=text):
        quiet(partial(killed, tmp_path, DESIGN[2:4], 99), path, executor=PROCESSES)
    assert rows(path, DESIGN) == ROWS[:2] + ROWS[4:]
    errors = [line for line in lines(path) if "error" in line]
    assert sorted(line["point"]["seed"] for line in errors if line["point"]["size"] == 2) == [0, 0, 1, 1]
    assert len(errors) == 4
    assert all(line["error"].startswith("concurrent.futures.process.BrokenProcessPool: ") for line in errors)
    assert quiet(loss, path) == ROWS


def fails(times, error):
    """Returns ``loss``, but it raises an error the first times that a point with seed 1 is run."""
    calls = []

    def run(point):
        calls.append(point)
        if point["seed"] == 1 and calls.count(point) <= times:
            raise error
        return loss(point)

    return run


@pytest.mark.parametrize("error", [ValueError("too\nlarge"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_run_that_raises_is_recorded_and_tried_again(error, path):
    assert quiet(fails(2, error), path, retries=2) == ROWS
    errors = [line for line in lines(path) if "error" in line]
    assert len(errors) == 2 * 4
    assert {line["error"] for line in errors} == {f"{type(error).__name__}: {error}".removesuffix(": ")}


def test_a_run_that_fails_keeps_the_others_and_the_cause(path):
    error = ValueError("too large")
    text = rf"sweep: 4 of 8 runs failed in 1 attempts, the first .* ValueError\('too large'\). rows\('{path}', design\)"
    with pytest.raises(RuntimeError, match=text) as raised:
        quiet(fails(1, error), path, retries=0)
    assert raised.value.__cause__ is error
    assert rows(path, DESIGN) == ROWS[::2]
    assert quiet(loss, path) == ROWS


class Breaking(Executor):
    """Runs at once what is submitted, and is broken from a number of submissions on."""

    def __init__(self, good, cancelled=()):
        self.good, self.cancelled = good, cancelled

    def submit(self, run, point):
        self.good -= 1
        if self.good < 0:
            raise BrokenExecutor("a worker died")
        future = Future()
        if point in self.cancelled:
            future.cancel()
            future.set_running_or_notify_cancel()
        else:
            future.set_result(run(point))
        return future


def test_an_executor_may_break_while_runs_are_submitted(path):
    assert quiet(loss, path, executor=partial(Breaking, 3), retries=0) == ROWS


def test_a_run_that_its_cluster_cancels_has_failed(path):
    with pytest.raises(RuntimeError, match=r"1 of 8 runs failed in 2 attempts, the first .*CancelledError"):
        quiet(loss, path, executor=partial(Breaking, 99, DESIGN[:1]))
    assert rows(path, DESIGN) == ROWS[1:]


def test_executors_that_break_with_every_run_end_the_sweep(path):
    with pytest.raises(RuntimeError, match=r"sweep: 3 executors broke with one run each, and no run finished. .* cell"):
        quiet(loss, path, executor=partial(Breaking, 0))
    assert len(lines(path)) == 3


def test_an_interrupt_cancels_what_has_not_begun(path, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(qjax.sweep._sweep._file, "append", interrupt)
    begun = []
    with pytest.raises(KeyboardInterrupt):
        quiet(
            lambda point: begun.append(point) or time.sleep(0.05) or loss(point),
            path,
            grid(size=range(1, 200), seed=[0]),
        )
    assert len(begun) < 199


def test_dask(path, tmp_path):
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path / "dask"
    )
    with cluster, distributed.Client(cluster) as client:
        assert quiet(partial(counted, tmp_path), path, DESIGN[:5], client.get_executor) == ROWS[:5]
        assert quiet(partial(counted, tmp_path), path, DESIGN, client.get_executor) == ROWS
    assert len(list(tmp_path.glob("?-?-*"))) == len(DESIGN)


def test_the_bar_counts_runs_and_failures(path, capsys, monkeypatch):
    quiet(loss, path, DESIGN[:2])
    with pytest.raises(RuntimeError):
        sweep(fails(9, ValueError()), DESIGN, path, executor=THREADS)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "8/8" in last and "failed=3" in last
    monkeypatch.setattr(qjax.sweep._sweep, "tqdm", None)
    assert sweep(loss, DESIGN, path, executor=THREADS) == ROWS
    assert not capsys.readouterr().err


X = [{"x": 1}]
REFUSALS = {
    "grid: axis 'fmt' must be a list of values, got 'e4m3'; write ['e4m3'].": lambda path: grid(fmt="e4m3"),
    "grid: axis 'size' must be a list of values, got 8; write [8].": lambda path: grid(size=8),
    "grid: axis 'size' has no values; leave it out": lambda path: grid(size=[]),
    "grid: 'fmt' must be a string, a number, a boolean or None, got Float(4, 3, specials='fn'); give a format by": (
        lambda path: grid(fmt=[qjax.E4M3])
    ),
    "random: n must be at least 0, got -1": lambda path: random(-1, seed=0),
    "random: axis 'fmt' must be a list of values or a frozen scipy.stats distribution, got 'e4m3'": (
        lambda path: random(1, seed=0, fmt="e4m3")
    ),
    "random: axis 'fmt' must be a list of values or a frozen scipy.stats distribution, got []": (
        lambda path: random(1, seed=0, fmt=[])
    ),
    "random: 'x' must be a string, a number, a boolean or None, got (1, 2)": lambda path: random(1, seed=0, x=[(1, 2)]),
    "sweep: run must be a function of a point, got 3": lambda path: quiet(3, path),
    "sweep: executor must be a function that makes an Executor, got <concurrent.futures.thread": (
        lambda path: quiet(loss, path, executor=ThreadPoolExecutor(1))
    ),
    "sweep: executor must return a concurrent.futures.Executor, got dict; docs/sweep.md": (
        lambda path: quiet(loss, path, executor=dict)
    ),
    "sweep: retries must be at least 0, got -1": lambda path: quiet(loss, path, retries=-1),
    "sweep: design must be a list of dicts, got {'size': [1, 2]}; grid(...) makes one": (
        lambda path: quiet(loss, path, {"size": [1, 2]})
    ),
    "sweep: design must be a list of dicts, got [1]": lambda path: rows(path, [1]),
    "sweep: the names in a row must be strings, got 1": lambda path: quiet(loss, path, [{1: 2}]),
    "sweep: 'x' must be a string, a number, a boolean or None, got [1]": lambda path: quiet(loss, path, [{"x": [1]}]),
    "sweep: design has NaN in {'x': nan}, which no point of a file equals; use None": (
        lambda path: quiet(loss, path, [{"x": float("nan")}])
    ),
    "sweep: design has {'x': 1} 2 times; give each repetition a seed": lambda path: quiet(loss, path, [*X, {"x": 1.0}]),
    "sweep: run must return a dict of results, got 0.5 for {'x': 1}": lambda path: quiet(lambda point: 0.5, path, X),
    "sweep: run returned ['x'], names of the point {'x': 1}; return them under others": (
        lambda path: quiet(lambda point: point, path, X)
    ),
    "sweep: 'y' must be a string, a number, a boolean or None, got array([1, 2]); give": (
        lambda path: quiet(lambda point: {"y": np.array([1, 2])}, path, X)
    ),
    "rows: there is no file": lambda path: rows(path.with_name("none"), X),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text, path):
    path.touch()
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=re.escape(text)):
        REFUSALS[text](path)


LINE = b'{"point": {"size": 1, "seed": 0}, "error": "x"}\n'


@pytest.mark.parametrize(
    "number, data",
    [
        (1, b"size,loss\n1,2\n"),
        (1, b"\x80weights"),
        (2, LINE + b"\n" + LINE),
        (2, LINE + b'{"size": 1}\n'),
        (2, LINE + b'{"point": [1]}\n'),
        (2, LINE + b"[1]\n"),
        (2, LINE + b'{"point": {"x": [1]}}\n'),
        (2, LINE + bytes(9)),
    ],
)
def test_a_file_that_is_not_that_of_a_sweep_is_left_alone(number, data, path):
    path.write_bytes(data)
    for call in (quiet, lambda _, path: rows(path, DESIGN)):
        with pytest.raises(ValueError, match=f"sweep: line {number} of {path} is not one of a sweep: b.* another path"):
            call(loss, path)
    assert path.read_bytes() == data
