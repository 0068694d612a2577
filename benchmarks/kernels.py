"""Times the sums of products of ``qjax.kernels``: reference, XLA, Pallas, and a plain product, interleaved in one run.

    python benchmarks/kernels.py                        # writes benchmarks/results/kernels-<device>.json, .md
    python benchmarks/kernels.py --only '^a.*chunk64'   # a part; writes with --output

It runs anywhere; where there is no kernel its column is empty. Every implementation must first give the bits of the
reference on operands whose sums are exact. The percentage is that of the roofline: the operations and the bytes a
second of the device's datasheet. The kinds of operands are those of the tests.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import random
import re
import shlex
import sys
import time
from statistics import median, quantiles
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax._kernels._accumulate import accumulate, kernels_for
from qjax._kernels._cases import CASES, Case
from qjax._kernels._operands import Coded, Unrounded, carried
from qjax._kernels._reference import dot

RESULTS = pathlib.Path(__file__).parent / "results"
APART = 100e6  # bytes of operands that calls touch in turn: more than a cache holds
COLUMNS = ("reference", "xla", "pallas", "plain")


class Target(NamedTuple):
    """A least ratio of the times of two columns."""

    least: float
    slow: str
    fast: str


class Work(NamedTuple):
    """Cases, by a pattern of their names, on shapes (m, n, k)."""

    pattern: str
    shapes: tuple[tuple[int, int, int], ...]
    target: Target | None = None


CUBE, DECODE = ((4096, 4096, 4096),), ((1, 28672, 8192), (16, 28672, 8192), (64, 28672, 8192))
ACCELERATOR = (
    Work("^a-bfloat16.*nearest_even-chunk64$", CUBE, Target(5, "xla", "pallas")),
    Work("^b-.*-int4", DECODE[1:2], Target(2.2, "plain", "pallas")),
    Work("^c-.*-wrap32-.*chunk64$", CUBE, Target(3, "xla", "pallas")),
    Work("^a-", CUBE),
    Work("^b-", DECODE),
    Work("^[cde]-", CUBE),
)
ON_CPU = (256, 1024, 1024), (2048, 2048, 2048)
CPU = (
    Work("^a-bfloat16.*(nearest_even|toward_zero)-chunk64$", ON_CPU, Target(1 / 1.5, "plain", "xla")),
    Work("^a-", ON_CPU[:1]),
    Work("^b-", ((16, 1024, 1024),)),
    Work("^[cde]-", ON_CPU[:1]),
)
# Operations of 16 bits and of 8 bits, and bytes, a second.
PEAKS = {
    "H100": (989e12, 1979e12, 3.35e12),
    "H200": (989e12, 1979e12, 4.8e12),
    "TPU v5 lite": (197e12, 394e12, 0.82e12),
    "TPU v6 lite": (918e12, 1836e12, 1.64e12),
}


def implementations(case: Case, operands) -> dict:
    """Returns the functions of (lhs, rhs, options) that the device has, by the names of their columns."""

    def named(name, lhs, rhs, options):
        arrays = carried(lhs, rhs)
        return accumulate(*arrays, case.accumulator, made=lambda: (lhs, rhs), implementation=name, **options)

    def plain(lhs, rhs, options):
        """A product of this shape in one piece: of float32 on a CPU, else of the operands, weights in bfloat16."""
        x, y = (z.x if isinstance(z, Unrounded) else z for z in (lhs, rhs))
        if jax.default_backend() == "cpu":
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return dot(x, y)

    lhs, rhs, options = operands
    found = {name: functools.partial(named, name) for name in COLUMNS[:2]}
    if not isinstance(kernels_for(lhs, rhs, case.accumulator, options.get("scales")), str):
        found["pallas"] = functools.partial(named, "pallas")
    return {name: jax.jit(fn) for name, fn in (found | {"plain": plain}).items()}


def disagreeing(case: Case, functions: dict) -> list[str]:
    """Returns the implementations that differ from the reference where no order of sums makes a difference."""
    lhs, rhs, options = case.operands(256, 256, 1024, exact=True)
    wanted, apart = np.asarray(functions["reference"](lhs, rhs, options)), case.apart(lhs, rhs, **options)
    outs = {name: np.asarray(fn(lhs, rhs, options)) for name, fn in functions.items() if name in COLUMNS[1:3]}
    differs = lambda out: np.any(np.abs(out - wanted) > apart) or np.any(np.isnan(out) != np.isnan(wanted))  # noqa: E731
    return [name for name, out in outs.items() if differs(out)]


def roofline(case: Case, shape, size: int) -> float | None:
    """Returns the least seconds that the device needs by its datasheet, None if that is not known."""
    peaks = next((peaks for kind, peaks in PEAKS.items() if kind in jax.devices()[0].device_kind), None)
    if peaks is None:
        return None
    operations = 2 * math.prod(shape) * (4 if case.dtype == "int16" else 1)
    rate = peaks[case.weights is None and bool(re.match("int|float8", case.dtype))]
    return max(operations / rate, (size + 4 * shape[0] * shape[1]) / peaks[2])


def measured(case: Case, shape, rounds: int) -> dict:
    """Returns the medians and quartiles of the seconds of each column, and the roofline."""
    operands = case.operands(*shape)
    functions = implementations(case, operands)
    if wrong := disagreeing(case, functions):
        raise SystemExit(f"{case.name}: {', '.join(wrong)} differ from the reference.")
    size = sum(x.nbytes for x in jax.tree.leaves(operands[:2]))
    on_cpu = jax.default_backend() == "cpu"
    copies = 1 if on_cpu else min(max(1, round(APART / size)), 16)
    calls = 1 if on_cpu else 20  # at a time, so that an accelerator does not wait for the next
    sets = {name: [operands] for name in functions}
    if isinstance(operands[1], Coded):
        weights = jax.random.normal(jax.random.key(0), operands[1].shape).astype(jnp.bfloat16)
        sets["plain"] = [(operands[0], weights, {})]
    sets = {name: [jax.tree.map(jnp.copy, some[0]) for _ in range(copies)] for name, some in sets.items()}
    seconds = {name: [] for name in functions}
    for number in range(-1, rounds):
        for name in random.sample(list(functions), len(functions)):
            start = time.perf_counter()
            for call in range(calls):
                result = functions[name](*sets[name][(number + call) % copies])
            jax.block_until_ready(result)
            if number >= 0:
                seconds[name].append((time.perf_counter() - start) / calls)
    least = roofline(case, shape, size)
    spread = {name: [median(times), *quantiles(times, n=4)[::2]] for name, times in seconds.items()}
    return {"case": case.name, "shape": shape, "seconds": spread, "roofline": least}


def line(row: dict, target: Target | None) -> str:
    """Returns a row of the table: medians in milliseconds."""
    times = {name: found[0] for name, found in row["seconds"].items()}
    cells = [f"{1e3 * times[name]:.3g}" if name in times else "" for name in COLUMNS]
    share = f"{100 * row['roofline'] / times['pallas']:.0f} %" if row["roofline"] and "pallas" in times else ""
    verdict = ""
    if target and {target.slow, target.fast} <= set(times):
        ratio = times[target.slow] / times[target.fast]
        verdict = f"{target.slow} / {target.fast} {ratio:.2f} (>= {target.least:.2f}) "
        verdict += "pass" if ratio >= target.least else "**FAIL**"
    return f"| {row['case']} | {' x '.join(map(str, row['shape']))} | {' | '.join(cells)} | {share} | {verdict} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    device, work = jax.devices()[0], CPU if jax.default_backend() == "cpu" else ACCELERATOR
    name = re.sub(r"\W+", "-", device.device_kind.lower())
    packages = {package: importlib.metadata.version(package) for package in ("qjax", "jax", "jaxlib")}
    report = {
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
        **packages,
        "rounds": options.rounds,
        "rows": [],
    }
    packages = ", ".join(f"{key} {report[key]}" for key in ("qjax", "jax", "jaxlib"))
    lines = [
        f"# Sums of products on {name}",
        "",
        f"- {report['date']}, `python {shlex.join(sys.argv)}`",
        f"- {packages}, Python {report['python']}",
        f"- device {report['device']}; {report['cores']} cores, load {report['load']}",
        "",
        "Medians in milliseconds. Plain is the product in one piece: of float32 on a CPU, else of the operands' dtype.",
        "",
        f"| operands and accumulator | m x n x k | {' | '.join(COLUMNS)} | roofline | |",
        f"|{'---|' * 8}",
    ]
    print("\n".join(lines), flush=True)
    output = options.output or (None if options.only else RESULTS / f"kernels-{name}.json")
    done = set()
    for part in work:
        for case in (
            case for case in CASES if re.search(part.pattern, case.name) and re.search(options.only, case.name)
        ):
            for shape in part.shapes:
                if (case.name, shape) in done:
                    continue
                done.add((case.name, shape))
                row = measured(case, shape, options.rounds)
                report["rows"].append(row)
                lines.append(line(row, part.target))
                print(lines[-1], flush=True)
                if output:
                    output.write_text(json.dumps(report, indent=1) + "\n")
                    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
