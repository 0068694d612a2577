"""Measures the tiles of the kernels on the device at hand, and writes the fastest to qjax/_kernels/tiles.json.

    python benchmarks/tune_kernels.py --rounds 11

For every kind of operands and every number of rows below, all candidates that compile are timed, interleaved. Rows of
other devices stay as they are.
"""

import argparse
import datetime
import itertools
import json
import random
import time
from statistics import median

import jax

from qjax._kernels import _tiles
from qjax._kernels._accumulate import kernels_for
from qjax._kernels._cases import CASES

# (m, n, k), and the most rows that the tiles are then taken for.
SHAPES = (((1, 28672, 8192), 8), ((16, 28672, 8192), 32), ((64, 28672, 8192), 128), ((4096, 4096, 4096), None))
# As the modules have them: rows, columns and depth on a TPU; warpgroups, columns, bytes, stages and splits on a GPU.
CANDIDATES = {
    "tpu": list(itertools.product((32, 128, 256, 512), (128, 256, 512, 1024), (512, 1024, 2048))),
    "gpu": list(itertools.product((1, 2, 3), (8, 16, 32, 64, 128), (128, 256), (3, 4, 8), (1, 2, 4))),
}


def seconds_of(function, tiles: list, rounds: int) -> dict:
    """Returns the medians of the candidates that compile."""
    times = {candidate: [] for candidate in tiles}
    for number in range(-1, rounds):
        for candidate in random.sample(list(times), len(times)):
            start = time.perf_counter()
            try:
                jax.block_until_ready(function(candidate))
            except Exception as error:  # too large for the chip, or for the compiler
                print(f"  {candidate}: {type(error).__name__}", flush=True)
                del times[candidate]
                continue
            if number >= 0:
                times[candidate].append(time.perf_counter() - start)
    return {candidate: median(found) for candidate, found in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    platform, device = jax.default_backend(), jax.devices()[0].device_kind
    if platform not in CANDIDATES:
        raise SystemExit(f"There are no kernels to tune on a {platform}; run this on a TPU or a Hopper GPU.")
    rows = [row for row in _tiles.table() if row["device"] != device]
    for shape, most in SHAPES:
        done = set()
        for case in CASES:
            lhs, rhs, given = case.operands(*shape)
            kind = _tiles.kind_of(lhs, rhs, case.accumulator)
            module = kernels_for(lhs, rhs, case.accumulator, given.get("scales"))
            if isinstance(module, str) or kind in done:
                continue
            done.add(kind)

            def run(tiles, case=case, module=module, lhs=lhs, rhs=rhs, given=given):
                return module.accumulate(lhs, rhs, case.accumulator, tiles=module.Tiles(*tiles), **given)

            found = seconds_of(run, CANDIDATES[platform], options.rounds)
            best = min(found, key=found.get)
            print(f"{shape} {kind}: {best} in {1e6 * found[best]:.0f} us", flush=True)
            when = f"{datetime.date.today()}, {found[best]:.2e} s"
            rows.insert(0, dict(device=device, kind=kind, most_rows=most, tiles=best, measured=when))
    rows.sort(key=lambda row: (row["device"] != device, row["most_rows"] or 2**31))
    _tiles.PATH.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
