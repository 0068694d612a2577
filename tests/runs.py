"""The runs of test_sweep.py: importable by worker processes. Run as a script, a sweep that is made to be killed."""

import os
import signal
import sys
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# Not fork: pytest has loaded JAX, whose threads a forked process would lack.
PROCESSES = partial(ProcessPoolExecutor, 2, mp_context=get_context("spawn"))


def loss(point):
    return {"loss": point["size"] ** -0.5 + point["seed"] / 3, "steps": 10 * point["size"]}


def counted(folder, point):
    """``loss``, and a new file in a folder at each call."""
    Path(folder, f"{point['size']}-{point['seed']}-{uuid.uuid4()}").touch()
    return loss(point)


def killed(folder, points, times, point):
    """``counted``, but kills its process the first times that one of some points is run."""
    result = counted(folder, point)
    if point in points and len(list(Path(folder).glob(f"{point['size']}-{point['seed']}-*"))) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def held(folder, size, point):
    """``counted``, but the runs of a size and above never end."""
    while point["size"] >= size:
        time.sleep(0.01)
    return counted(folder, point)


if __name__ == "__main__":
    from qjax.sweep import grid, sweep

    _, path, folder, size, sizes = sys.argv
    design = grid(size=range(1, int(sizes)), seed=range(2))
    sweep(partial(held, folder, int(size)), design, path, executor=PROCESSES)
