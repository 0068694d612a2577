"""Measures the tiles of the kernels on the device at hand, and writes the fastest to qjax/_kernels/tiles.json.

    python benchmarks/tune_kernels.py --processes 16

For every kind of operands, and for codes of weights every number of rows below: one number of the tiles after the other
takes the value that is fastest, until none is better than what there is. Processes compile side by side, and take turns
on the device. Rows of other devices stay as they are; those of this one are written as they come.
"""

import argparse
import datetime
import fcntl
import json
import math
import multiprocessing
import random
import time
from statistics import median

import jax

from qjax._kernels import _tiles
from qjax._kernels._accumulate import kernels_for
from qjax._kernels._cases import CASES

SHAPES = {None: (4096, 4096, 4096), 32: (16, 28672, 8192), 8: (1, 28672, 8192), 128: (64, 28672, 8192)}
# Where a search starts, and the values of each number, as the modules have them: rows, columns and depth on a TPU;
# warpgroups, columns, bytes, stages and splits on a GPU.
START = {"tpu": (256, 256, 1024), "gpu": (2, 64, 128, 4, 1)}
VALUES = {
    "tpu": ((32, 128, 256, 512), (128, 256, 512, 1024), (512, 1024, 2048)),
    "gpu": ((1, 2, 3), (8, 16, 32, 64, 128, 192, 256), (128, 256, 512), (2, 3, 4, 6, 8, 12), (1, 2, 4, 8)),
}
CALLS = 5  # at a time, so that the device does not wait for the next


def seconds_of(run, candidates: set, path, rounds: int) -> dict:
    """Returns the medians of the candidates, interleaved, infinite for those that do not compile."""
    times = {}
    for candidate in candidates:
        try:
            run(candidate).block_until_ready()
            times[candidate] = []
        except Exception:  # too large for the chip, or for the compiler
            pass
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for _ in range(rounds):
            for candidate in random.sample(list(times), len(times)):
                start = time.perf_counter()
                for _ in range(CALLS):
                    result = run(candidate)
                result.block_until_ready()
                times[candidate].append((time.perf_counter() - start) / CALLS)
    return dict.fromkeys(candidates, math.inf) | {candidate: median(found) for candidate, found in times.items()}


def searched(run, start: tuple, values: tuple, path, rounds: int) -> tuple[tuple, float]:
    """Returns the fastest tiles and their seconds."""
    found = seconds_of(run, {start}, path, rounds)
    best, before = start, None
    while best != before:
        before = best
        for place, choices in enumerate(values):
            line = {(*best[:place], choice, *best[place + 1 :]) for choice in choices}
            if new := line - found.keys():
                found |= seconds_of(run, new | {best}, path, rounds)
            best = min(line | {best}, key=found.__getitem__)
    return best, found[best]


def tuned(job) -> dict:
    """Returns the row of a kind of operands."""
    number, most, rounds = job
    case = CASES[number]
    lhs, rhs, given = case.operands(*SHAPES[most])
    module = kernels_for(lhs, rhs, case.accumulator, given.get("scales"))

    def run(tiles):
        return module.accumulate(lhs, rhs, case.accumulator, tiles=module.Tiles(*tiles), **given)

    platform, device = jax.default_backend(), jax.devices()[0].device_kind
    best, seconds = searched(run, START[platform], VALUES[platform], _tiles.PATH, rounds)
    when = f"{datetime.date.today()}, {seconds:.2e} s"
    kind = _tiles.kind_of(lhs, rhs, case.accumulator)
    return dict(device=device, kind=kind, most_rows=most, tiles=best, measured=when)


def jobs(rounds: int) -> list[tuple]:
    """Returns a case of every kind that has a kernel, by its number, and the most rows."""
    kinds = {}
    for number, case in enumerate(CASES):
        lhs, rhs, given = case.operands(8, 64, 512)
        if not isinstance(kernels_for(lhs, rhs, case.accumulator, given.get("scales")), str):
            kinds.setdefault(_tiles.kind_of(lhs, rhs, case.accumulator), number)
    few = [number for number in kinds.values() if CASES[number].weights]  # which a decoder multiplies by few rows
    return [(number, most, rounds) for most in SHAPES for number in (kinds.values() if most is None else few)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:  # the process at hand starts no device, whose memory it would hold
        work = pool.apply(jobs, (options.rounds,))
    if not work:
        raise SystemExit("There are no kernels to tune here; run this on a TPU or a Hopper GPU.")
    # A process of its own for each: after a failed launch a process cannot use the device.
    with context.Pool(options.processes, maxtasksperchild=1) as pool:
        for job, result in [(job, pool.apply_async(tuned, (job,))) for job in work]:
            try:
                row = result.get()
            except Exception as error:
                print(f"{job}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            print(f"{row['kind']}, {row['most_rows']}: {row['tiles']}, {row['measured']}", flush=True)
            place = ("device", "kind", "most_rows")
            rows = [old for old in json.loads(_tiles.PATH.read_text()) if any(old[k] != row[k] for k in place)]
            rows.append(row)
            rows.sort(key=lambda r: (r["device"] == "TPU", r["device"], r["kind"] or "", r["most_rows"] or math.inf))
            _tiles.PATH.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
