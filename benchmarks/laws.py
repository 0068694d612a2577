"""Times fits of the Chinchilla form from 4500 starts, and 4000 bootstraps, and compares the optimum with SciPy's.

python benchmarks/laws.py               # writes benchmarks/results/laws.md
python benchmarks/laws.py --scipy 4500  # SciPy from every start; some minutes
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import sys
import time

import jax
import numpy as np
import optax
import scipy.optimize

from qjax import laws
from qjax.laws import _problem, _solver

RESULT = pathlib.Path(__file__).parent / "results" / "laws.md"


def runs():
    """240 runs of the shape of Hoffmann et al.'s, with Laplace noise of 1 % on the published law."""
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7.6, 10.2, 240), 10 ** rng.uniform(9, 11.7, 240)
    loss = laws.CHINCHILLA_REPLICATION.published(N=N, D=D) * np.exp(rng.laplace(scale=0.01, size=240))
    return {"N": N, "D": D, "loss": loss}


def with_scipy(objective, starts):
    """Returns the objective from each start: L-BFGS-B with gradients by JAX, compiled, one start at a time."""
    gradient = jax.jit(jax.value_and_grad(objective))

    def value(z):
        value, slope = gradient(z)
        return float(value), np.asarray(slope)

    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-12}
    return np.array(
        [scipy.optimize.minimize(value, z, jac=True, method="L-BFGS-B", options=options).fun for z in starts]
    )


def with_optax(objective, starts, steps):
    """Returns the objectives after ``steps`` of ``optax.lbfgs`` from all starts at once."""
    solver, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(objective)

    def step(carry, _):
        z, state = carry
        value, slope = value_and_grad(z, state=state)
        updates, state = solver.update(slope, state, z, value=value, grad=slope, value_fn=objective)
        return (optax.apply_updates(z, updates), state), None

    def run(z):
        (z, _), _ = jax.lax.scan(step, (z, solver.init(z)), length=steps)
        return objective(z)

    return jax.jit(jax.vmap(run))(starts)


def timed(function, *arguments):
    """Returns the result and the seconds of the second call: the first compiles."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scipy", type=int, default=100, help="how many starts SciPy gets")
    parser.add_argument("--optax", type=int, default=256, help="how many starts optax.lbfgs gets")
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    options = parser.parse_args()
    data, rows = runs(), []
    fitted, seconds = timed(lambda: laws.fit(laws.CHINCHILLA, data).objective)
    result = laws.fit(laws.CHINCHILLA, data)
    rows.append(("`laws.fit`, its polish and covariance included", 4500, seconds, 20, fitted))
    _, seconds = timed(lambda: laws.bootstrap(result, 4000, key=jax.random.key(0)).samples)
    rows.append(("`laws.bootstrap`, a resampling each", 4000, seconds, 60, None))
    with jax.enable_x64(True):
        columns, log_loss = result.problem.encode(result.runs), np.log(data["loss"])

        def objective(z):
            return jax.numpy.sum(_solver.huber(result.problem.log_prediction(z, columns) - log_loss, 1e-3))

        starts = _problem.starting_points("benchmark", result.problem, {})
        some = np.random.default_rng(1).permutation(starts)
        with np.errstate(all="ignore"):
            start = time.perf_counter()
            ends = with_scipy(objective, some[: options.scipy])
            rows.append(
                ("SciPy, L-BFGS-B, compiled gradients", len(ends), time.perf_counter() - start, None, np.nanmin(ends))
            )
        ends, seconds = timed(with_optax, objective, some[: options.optax], 200)
        rows.append(("`optax.lbfgs`, 200 steps, all at once", len(ends), seconds, None, np.nanmin(ends)))
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("qjax", "jax", "optax", "scipy")]
    lines = [
        "# The speed of fitting scaling laws",
        "",
        f"- {datetime.datetime.now():%Y-%m-%d %H:%M}, `python benchmarks/laws.py --scipy {options.scipy}`",
        f"- {', '.join(packages)}, Python {sys.version.split()[0]}",
        f"- device {jax.devices()[0].platform}; {os.cpu_count()} cores, shared, load {os.getloadavg()[0]:.1f}: "
        "quiet cores are faster",
        "",
        "The Chinchilla form on 240 runs, Huber's delta 1e-3, starts of the published grid (a random part of it where",
        f"there are fewer), after compilation. {result.reached} of the 4500 starts of `laws.fit` reached its optimum.",
        "",
        "| | starts | s | limit | | s for 4500 | least objective |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, count, seconds, limit, least in rows:
        verdict = "" if limit is None else "pass" if seconds <= limit else "**FAIL**"
        scaled = f"{seconds * 4500 / count:.0f}" if least is not None else ""
        value = "" if least is None else f"{least:.10g}"
        lines.append(f"| {name} | {count} | {seconds:.1f} | {limit or ''} | {verdict} | {scaled} | {value} |")
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
