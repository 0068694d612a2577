"""Times ``qjax.chop`` against a jitted ``x * c`` and against other libraries, interleaved in one run.

    python benchmarks/chop.py                          # everything; writes to benchmarks/results
    python benchmarks/chop.py --quick                  # a look in a minute; writes nothing
    python benchmarks/chop.py --only 'e4m3 .*qjax' --sizes 1000000 --rounds 31

A new measurement is a row of ``ARG_SPECS``; another library is a function that returns its rounding function, and a row
of ``IMPLEMENTATIONS``. ``--only`` is matched with "format rounding implementation". Partial runs write with --output.
"""

import argparse
import compileall
import datetime
import functools
import gc
import importlib.metadata
import os
import pathlib
import random
import re
import subprocess
import sys
import time
import timeit
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import jax
import jax.numpy as jnp
import numpy as np

import qjax

# A thread that hands a call over and goes to sleep is in the way: while it is awake, Linux puts both threads of a loop
# on the other core, in every second call. Set before the first use of a device.
jax.config.update("jax_cpu_enable_async_dispatch", False)

SHAPES = {10**4: (25, 400), 10**6: (625, 1600), 10**7: (3125, 3200), 10**8: (31250, 3200)}
ON_CPU = jax.default_backend() == "cpu"
SIZES = tuple(SHAPES)[:3] if ON_CPU else tuple(SHAPES)
CALLS = 1 if ON_CPU else 10  # each on the last one's result, so that a GPU does not wait
JUDGED = 10**7  # smaller arrays are bound by the cost of a call and noise: reported, not judged
AT_MEMORY_SPEED = 1.5  # times a donated x * c
KEY = jax.random.key(1)
DEVICE = "" if ON_CPU else "-" + re.sub(r"\W+", "-", jax.devices()[0].device_kind.lower())
RESULT = pathlib.Path(__file__).parent / "results" / f"chop{DEVICE}.md"


@dataclass(frozen=True)
class ArgSpec:
    format: str
    rounding: str = "nearest_even"
    sizes: tuple[int, ...] = SIZES
    peers: bool = True
    flat: bool = False  # an array of one axis; reported, not judged

    @property
    def case(self) -> tuple[str, str]:
        return self.format, self.rounding + ", flat" * self.flat

    @property
    def target(self) -> tuple[str, float]:
        """Returns the class of operations and its largest accepted ratio to a donated ``x * c``."""
        if self.format == "mxfp4":
            return "MXFP4", 3.0
        if self.rounding == "stochastic":
            return "stochastic", 2.0
        if self.rounding == "nearest_even" and isinstance(qjax.format(self.format), qjax.Float):
            return "nearest_even, every Float", 1.2
        return "other deterministic", 1.4


ROUNDINGS = ("nearest_even", "toward_zero", "toward_positive", "to_odd", "nearest_away", "stochastic")
OTHER_FLOATS = "fp32 fp16 tf32 dlfloat16 e3m4 e3m2 e2m3 e2m1 e8m0 ue5m3".split()
OTHER_FLOATS += "float8_e4m3 float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2fnuz".split()
ARG_SPECS = (
    *(ArgSpec(fmt, rounding) for fmt in ("e4m3", "e5m2", "bf16", "q8.8", "mxfp4") for rounding in ROUNDINGS),
    *(ArgSpec(fmt, sizes=(10**7,), peers=False) for fmt in OTHER_FLOATS),
    *(ArgSpec(fmt, "stochastic", sizes=(10**7,), peers=False, flat=True) for fmt in ("e4m3", "mxfp4")),
)


# The implementations: each returns f(x) or f(x, key=key), or None if the library does not offer the operation.

PEER_FORMATS = {"e4m3": (4, 3, "float8_e4m3fn"), "e5m2": (5, 2, "float8_e5m2"), "bf16": (8, 7, "bfloat16")}


def chop(arg: ArgSpec):
    fmt = qjax.format(arg.format)
    return lambda x, key=None: qjax.chop(x, fmt, arg.rounding, key=key)


def reduce_precision(arg: ArgSpec):
    if arg.format in PEER_FORMATS and arg.rounding == "nearest_even":
        return lambda x: jax.lax.reduce_precision(x, *PEER_FORMATS[arg.format][:2])


def cast(arg: ArgSpec):
    if arg.format in PEER_FORMATS and arg.rounding == "nearest_even":
        return lambda x: x.astype(jnp.dtype(PEER_FORMATS[arg.format][2])).astype(np.float32)


def pychop(arg: ArgSpec):
    from pychop.jx import fixed_point, lightchop

    mode = dict(nearest_even=1, toward_positive=2, toward_zero=4, stochastic=5, nearest_away=8, to_odd=9)[arg.rounding]
    if arg.format == "q8.8" and mode <= 5:
        return fixed_point.FPRound_(8, 8, mode).quantize
    if arg.format in PEER_FORMATS:
        quantizer = lightchop.LightChop_(*PEER_FORMATS[arg.format][:2], rmode=mode)
        # Its own key would be a constant of the compiled program.
        return lambda x, key=None: setattr(quantizer, "rng_key", key) or quantizer(x)


def gfloat(arg: ArgSpec):
    from gfloat import RoundMode, formats, round_ndarray

    name = dict(e4m3="ocp_e4m3", e5m2="ocp_e5m2", bf16="bfloat16").get(arg.format)
    modes = dict(nearest_even="TiesToEven", nearest_away="TiesToAway", toward_zero="TowardZero")
    modes |= dict(toward_positive="TowardPositive", stochastic="StochasticFastest")
    if name and arg.rounding in modes:
        info, mode = getattr(formats, f"format_info_{name}"), RoundMode[modes[arg.rounding]]
        draw = lambda key, shape: (jax.random.bits(key, shape) >> 9).astype(int)  # noqa: E731
        return lambda x, key=None: round_ndarray(info, x, mode, False, None if key is None else draw(key, x.shape), 23)


@dataclass(frozen=True)
class Implementation:
    build: Callable
    donate: bool = True
    numpy: bool = False
    every: int = 1  # measured in one round of so many


IMPLEMENTATIONS = {
    "qjax": Implementation(chop),
    "qjax, kept": Implementation(chop, donate=False),
    "reduce_precision": Implementation(reduce_precision),
    "XLA cast": Implementation(cast),
    "NumPy cast": Implementation(cast, numpy=True, every=3),
    "pychop": Implementation(pychop, every=3),
    "gfloat": Implementation(gfloat, every=3),
    "x * c": Implementation(lambda arg: lambda x: x * np.float32(1.0009765625)),
    "x * c, kept": Implementation(lambda arg: lambda x: x * np.float32(1.0009765625), donate=False),
}
COLUMNS, MULTIPLY, MULTIPLY_KEPT = list(IMPLEMENTATIONS)[:-2], ("", "", "x * c"), ("", "", "x * c, kept")


def prepare(size: int, fresh: Callable, options):
    """Returns {(format, rounding, implementation): f(x)}, compiled and called once, and {the same: a remark}."""
    functions, remarks, correct = {}, {}, {}
    cases = []
    for arg in ARG_SPECS:
        columns = COLUMNS[: 1 if not arg.peers else 2 if options.no_peers else None]
        cases += [(arg, (*arg.case, name)) for name in columns if size in arg.sizes]
    cases = [(arg, case) for arg, case in cases if re.search(options.only, " ".join(case))]
    for arg, case in [(None, MULTIPLY), (None, MULTIPLY_KEPT), *cases]:
        implementation = IMPLEMENTATIONS[case[2]]
        try:
            if not (function := implementation.build(arg)):
                continue
            if not implementation.numpy:
                function = jax.jit(function, donate_argnums=(0,) if implementation.donate else ())
            functions[case] = functools.partial(function, key=KEY) if case[1].startswith("stochastic") else function
            result = np.asarray(functions[case](fresh(case)))
        except Exception as error:
            if case[2] not in COLUMNS[2:]:
                raise
            functions.pop(case, None)
            remarks[case] = "not installed" if isinstance(error, ImportError) else type(error).__name__
            continue
        if case[2] == "qjax":
            correct = {case[:2]: result}
        elif case[:2] in correct and case[1] != "stochastic":
            differ = 100 * np.mean(~np.isclose(result, correct[case[:2]], 0, 0, equal_nan=True))
            remarks[case] = f"≠ {differ:.2g} %" if differ else ""
    return functions, remarks


def measure(size: int, options):
    """Returns {case: seconds in each round} and {case: a remark} for one size.

    A round runs all cases in a new random order, both x * c among them often. The input of each is copied before
    the clock starts, so that a donated result goes to pages that exist.
    """
    generator = np.random.default_rng(0)
    x_numpy = (generator.standard_normal(size) * 2.0 ** generator.uniform(-10, 8, size)).astype(np.float32)
    x_numpy = x_numpy.reshape(SHAPES.get(size, size))
    x_jax, x_flat = jnp.asarray(x_numpy), jnp.asarray(x_numpy.reshape(-1))

    def fresh(case):
        if IMPLEMENTATIONS[case[2]].numpy:
            return x_numpy.copy()
        return jax.block_until_ready(jnp.copy(x_flat if case[1].endswith("flat") else x_jax))

    functions, remarks = prepare(size, fresh, options)
    seconds = {case: [] for case in functions}
    order, shuffled = [case for case in functions if case not in (MULTIPLY, MULTIPLY_KEPT)], random.Random(0)
    order += [MULTIPLY, MULTIPLY_KEPT] * (1 + len(order) // 6)
    gc.disable()
    for number in range(options.rounds * (1 if size >= JUDGED else 4)):
        shuffled.shuffle(order)
        for case in order:
            if number % IMPLEMENTATIONS[case[2]].every == 0:
                x = fresh(case)
                start = time.perf_counter()
                for _ in range(CALLS):
                    x = functions[case](x)
                jax.block_until_ready(x)
                seconds[case].append((time.perf_counter() - start) / CALLS)
                del x
        gc.collect()
    gc.enable()
    return seconds, remarks


def milliseconds(function, repeats: int, rounds: int = 21) -> float:
    """Returns the median time of a call, over rounds of some calls each."""
    times = timeit.repeat(lambda: jax.block_until_ready(function()), number=repeats, repeat=rounds + 1)
    return 1e3 * median(times[1:]) / repeats


def compile_chop(arg: ArgSpec):
    """Traces, lowers and compiles one chop, with JAX's caches empty."""
    jax.clear_caches()
    key = [KEY] if arg.rounding == "stochastic" else []
    jax.jit(chop(arg)).lower(jax.ShapeDtypeStruct((10**6,), jnp.float32), *key).compile()


def import_milliseconds(runs: int = 9) -> float:
    """Returns the time of ``import qjax``, compiled as pip installs it, in new processes that have imported jax."""
    compileall.compile_dir(pathlib.Path(qjax.__file__).parent, quiet=1)
    code = "import jax, jax.numpy, time; t = time.perf_counter(); import qjax; print(time.perf_counter() - t)"
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(qjax.__file__).parents[1])}
    times = [subprocess.check_output([sys.executable, "-c", code], env=environment) for _ in range(runs + 1)]
    return 1e3 * median(map(float, times[1:]))


def memory_speed(seconds: dict, case) -> bool:
    """Returns whether a case was measured and takes little longer than a donated ``x * c``."""
    return case in seconds and median(seconds[case]) <= AT_MEMORY_SPEED * median(seconds[MULTIPLY])


def targets(results: dict, options):
    """Yields (target, what was measured, value, limit): at most the limit, or at least it for speed-ups."""
    for size, (seconds, _) in results.items():
        for arg in ARG_SPECS if size >= JUDGED else ():
            case, stochastic = arg.case, arg.rounding == "stochastic"
            if (*case, "qjax") not in seconds or arg.flat:
                continue
            ours, where = median(seconds[*case, "qjax"]), f"{arg.format} {arg.rounding}, {size:,} elements"
            yield f"{arg.target[0]}: ratio to x * c", where, ours / median(seconds[MULTIPLY]), arg.target[1]
            if (*case, "qjax, kept") in seconds and size >= 10**7 and arg.target[1] < 2:
                kept = median(seconds[*case, "qjax, kept"]) / median(seconds[MULTIPLY_KEPT])
                yield "not donated: ratio to a kept x * c", where, kept, 1.1
            for peer, speedup in (("pychop", 25 if stochastic else 15), ("gfloat", 25 if stochastic else 5)):
                if (*case, peer) in seconds and arg.rounding in ("nearest_even", "stochastic"):
                    theirs = median(seconds[*case, peer])
                    # No one is 15 times faster than memory: a peer at its speed is reported in the table, not judged.
                    if not memory_speed(seconds, (*case, peer)):
                        yield f"faster than {peer} under jit, {arg.rounding}", where, theirs / ours, speedup
    # What was measured so far is no garbage of theirs.
    gc.collect()
    gc.freeze()
    for arg in ARG_SPECS:
        if re.search(options.only, f"{arg.format} {arg.rounding} qjax") and not arg.flat:
            took = milliseconds(lambda arg=arg: compile_chop(arg), repeats=1, rounds=5)
            yield "compile one chop, ms", f"{arg.format} {arg.rounding}", took, 150
    x, fmt = jnp.linspace(-4, 4, 1000, dtype=jnp.float32), qjax.format("e4m3")
    ours, add = milliseconds(lambda: qjax.chop(x, fmt), 100), milliseconds(lambda: jnp.add(x, x), 100)
    yield "eager, 1000 elements: ratio to jnp.add", f"e4m3, {1e3 * ours:.1f} µs", ours / add, 5
    yield "import qjax after jax, ms", "", import_milliseconds(), 50


def target_table(rows: list[tuple]) -> list[str]:
    """Returns the table of targets: how many measurements miss each, and the one that is worst."""
    lines = ["\n## Targets\n", "| target | limit | worst | where | missed | |", "|---|---|---|---|---|---|"]
    for target in dict.fromkeys(row[0] for row in rows):
        sign, at_least = (-1, "≥") if "faster" in target else (1, "≤")
        mine = [row[1:] for row in rows if row[0] == target]
        where, worst, limit = max(mine, key=lambda row: sign * row[1])
        missed = sum(sign * value > sign * limit for _, value, _ in mine)
        judged = "**FAIL**" if missed else "pass"
        lines.append(f"| {target} | {at_least} {limit} | {worst:.3g} | {where} | {missed} of {len(mine)} | {judged} |")
    return lines


def size_table(size: int, seconds: dict, remarks: dict) -> list[str]:
    base, kept = median(seconds[MULTIPLY]), median(seconds[MULTIPLY_KEPT])
    lines = [
        f"\n## {size:,} elements\n",
        f"x * c: donated {1e9 * base / size:.3f} ns an element, the ratio 1; kept {kept / base:.2f}.\n",
        f"| format | rounding | ns/element | quartiles | limit | | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 6) + "|",
    ]
    for arg in ARG_SPECS:
        row = [(*arg.case, name) for name in COLUMNS]
        ratios = [f"{median(seconds[case]) / base:.2f} " if case in seconds else "" for case in row]
        cells = [ratio + remarks.get(case, "") for ratio, case in zip(ratios, row, strict=True)]
        cells = [
            cell + (" at memory speed" if case[2] in COLUMNS[-2:] and memory_speed(seconds, case) else "")
            for cell, case in zip(cells, row, strict=True)
        ]
        judged = "| " * 3
        if row[0] in seconds:
            low, middle, high = (quartile / base for quartile in quantiles(seconds[row[0]]))
            word = "not judged" if size < JUDGED or arg.flat else "pass" if middle <= arg.target[1] else "**FAIL**"
            judged = f"{1e9 * middle * base / size:.3f} | {low:.2f}, {high:.2f} | {arg.target[1]} | {word}"
        if any(cells):
            lines.append(f"| {arg.format} | {arg.case[1]} | {judged} | {' | '.join(cells)} |")
    return lines


def header() -> str:
    names = ("qjax", "jax", "jaxlib", "numpy", "ml_dtypes", "pychop", "gfloat")
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions()} | {"qjax": qjax.__version__}
    cpu = pathlib.Path("/proc/cpuinfo")
    cpu = re.findall("model name.*: (.*)", cpu.read_text())[0] if cpu.exists() else sys.platform
    environment = " ".join(f"{name}={os.environ.get(name, '')!r}" for name in ("XLA_FLAGS", "GLIBC_TUNABLES"))
    return f"""# The speed of chop

- {datetime.datetime.now():%Y-%m-%d %H:%M}, `python {" ".join(sys.argv)}`
- {", ".join(f"{name} {found.get(name, 'not installed')}" for name in names)}, Python {sys.version.split()[0]}
- device {jax.devices()[0].device_kind}; {cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {environment}

How to read it: times are medians, as ratios to the median of a jitted `x * c` with a donated float32 input (memory
traffic and nothing else) in the same rounds; a round runs all cases in random order, each on a fresh copy of the input{
        "" if ON_CPU else f", {CALLS} times in a row"
    }.
Dispatch is synchronous. Arrays are matrices, but for those that are `flat`: of one axis, whose elements XLA counts with
64 bits, which random bits pay for. `kept`: the input is not donated, so the time is that of getting new memory; compare
it with the kept `x * c`. Peers run under jit with a donated input, except `NumPy cast`; `reduce_precision` is that of
lax, the casts go to the ml_dtypes type and back. `≠ p %`: the value differs from that of qjax in p % of the elements.
`at memory speed`: the peer takes at most {AT_MEMORY_SPEED} times the product, so that nothing can be many times faster;
no speed-up over it is judged. An empty cell: not offered."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="e4m3 and mxfp4, 10^6 elements, 5 rounds")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.rounds, options.only = [10**6], 5, options.only or "^(e4m3|mxfp4) "
    whole = not options.only and not options.no_peers and tuple(options.sizes) == SIZES
    warnings.filterwarnings("ignore")  # gfloat asks for int64

    results = {size: measure(size, options) for size in options.sizes}
    sizes = [line for size, result in results.items() for line in size_table(size, *result)]
    report = "\n".join([header(), *target_table(list(targets(results, options))), *sizes]) + "\n"
    print(report)
    if output := options.output or (RESULT if whole else None):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(report)


if __name__ == "__main__":
    main()
