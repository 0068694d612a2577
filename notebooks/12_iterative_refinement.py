# %% [markdown]
# # Where does iterative refinement stop converging?
#
# **Question.** A linear system is solved with an LU decomposition in a few bits, and the solution is refined: a
# residual in many bits, a correction from the same LU, an update. Up to which condition number does this work, and what
# accuracy does it reach?
#
# **Method.** Jacobians of the power flow in four electric grids, shifted towards their eigenvalues, give systems on a
# ladder of condition numbers. Everything is emulated operation by operation: the decomposition and its two triangular
# solves in the short format, the solution in fp32, the residuals in fp64. A system counts as solved if the forward
# error comes down to 4 units roundoff of fp32 within 100 steps and stays there.
#
# **Source.** Carson and Higham (2018), *Accelerating the solution of linear systems by iterative refinement in three
# precisions*, <https://doi.org/10.1137/17M1140819>. With unit roundoffs $u_f$ of the decomposition, $u$ of the solution
# and $u_r$ of the residuals: refinement converges if $\kappa_\infty(A)\, u_f < 1$, up to a constant that grows with the
# size, and with $u_r \le u^2$ its relative error ends at about $u$; with $u_r = u$ it ends at about $\kappa_\infty(A)\,
# u$ (section 3 and table 3.1).

# %%
import functools
import math
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from pypower.api import bustypes, case9, case14, case30, case57, dSbus_dV, ext2int, makeSbus, makeYbus
from tqdm import tqdm

import qjax
from qjax import linalg

if "get_ipython" not in globals():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)
FAST = os.environ.get("QJAX_FAST") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path()
FIGURES = Path(tempfile.mkdtemp()) if FAST else HERE / "figures"
GRIDS = (case9, case14) if FAST else (case9, case14, case30, case57)
STEP = 0.5  # of the ladder, in decades
LADDER = np.arange(0.5, 7.6, STEP)
ITERATIONS = 100
U = 2.0**-24  # of fp32
TOLERANCE = 4 * U

# %% [markdown]
# ## Systems
#
# The power flow equations give the powers fed into the nodes of a grid from the angles and magnitudes of its voltages.
# Newton's method solves systems with their Jacobian. The grids are the test cases with 9 to 57 nodes that pypower
# ships, at the voltages it ships.
#
# The rows of the Jacobian J are divided by their largest elements, so that it fits short exponents. Then it is shifted,
# as in inverse iteration: $A = J - \sigma I$ is as ill-conditioned as we like when $\sigma$ is close to an eigenvalue.
# For each real eigenvalue, each side of it and each rung of the ladder there is a system, if $\kappa_\infty(A)$ gets
# that low in half the way to the next eigenvalue; beyond the outermost ones there is no next one, and $\kappa_\infty$
# goes down to 1. A is a matrix of fp32 numbers, and its condition number is that of these. The solution is
# $x = J^{-1} s$ in float64, where s are the powers fed into the grid, and $b = A x$; only residuals see b.


# %%
def to_fp32(x):
    return np.float64(np.float32(x))


def power_flow(case):
    """Returns the Jacobian of a grid with scaled rows, and the voltages that the powers fed in make by it."""
    grid = ext2int(case())
    bus, branches, generators = grid["bus"], grid["branch"], grid["gen"]
    voltages = bus[:, 7] * np.exp(1j * np.deg2rad(bus[:, 8]))
    admittances = makeYbus(grid["baseMVA"], bus, branches)[0]
    magnitude, angle = (d.toarray() for d in dSbus_dV(admittances, voltages))
    _, generating, loaded = bustypes(bus, generators)
    free = np.concatenate([generating, loaded])
    jacobian = np.block(
        [
            [angle[np.ix_(free, free)].real, magnitude[np.ix_(free, loaded)].real],
            [angle[np.ix_(loaded, free)].imag, magnitude[np.ix_(loaded, loaded)].imag],
        ]
    )
    powers = makeSbus(grid["baseMVA"], bus, generators)
    powers = np.concatenate([powers[free].real, powers[loaded].imag])
    return jacobian / np.abs(jacobian).max(1, keepdims=True), np.linalg.solve(jacobian, powers)


def condition(a):
    return np.linalg.norm(a, np.inf, (-2, -1)) * np.linalg.norm(np.linalg.inv(a), np.inf, (-2, -1))


def systems(jacobian):
    """Returns shifted matrices, and the rung of each, as log10 of the condition number."""
    eigenvalues = np.linalg.eigvals(jacobian)
    real = np.sort(eigenvalues[eigenvalues.imag == 0].real)
    matrices, rungs = [], []
    for eigenvalue in real:
        for side in (-1, 1):
            outside = eigenvalue == (real[0] if side < 0 else real[-1])
            furthest = 1e3 if outside else np.sort(np.abs(eigenvalues - eigenvalue))[1] / 2
            distance = 10.0 ** np.arange(-9, math.log10(furthest), 0.02)
            shifts = (eigenvalue + side * distance)[:, None, None]
            shifted = to_fp32(jacobian - shifts * np.eye(len(jacobian)))
            decades = np.log10(condition(shifted))
            for rung in LADDER:
                nearest = np.argmin(np.abs(decades - rung))
                if abs(decades[nearest] - rung) < 0.05:
                    size = np.abs(shifted[nearest]).max()
                    matrices.append(shifted[nearest] / 2 ** np.ceil(np.log2(size)))
                    rungs.append(rung)
    return np.stack(matrices), np.array(rungs)


grids = []
for case in GRIDS:
    jacobian, x = power_flow(case)
    a, rungs = systems(jacobian)
    grids.append((a, a @ x, x, rungs))
    print(f"{case.__name__}: {len(a)} systems of {len(x)} equations, J has kappa = {condition(jacobian):.3g}")
rungs = np.concatenate([grid[-1] for grid in grids])
counts = np.array([(rungs == rung).sum() for rung in LADDER])
print("systems on each rung:", counts)

# %% [markdown]
# ## Three precisions
#
# `qjax.emulate` makes a function one of an arithmetic: the decomposition and the solves are qjax's LU and triangular
# solve in the short format, the update is in fp32, and the residual is plain float64, stored in fp32. All of it runs in
# float64, whose 53 bits make every result of fp32 the exact one, rounded once.
#
# Residuals become as small as one likes, so they are divided by their largest element before the solve, as Higham,
# Pranesh and Zounon (2019) advise for fp16, <https://doi.org/10.1137/18M1229511>.


# %%
def decomposition(a):
    factors, _, permutation = linalg.lu(a)
    return factors, permutation


def correction(factors, permutation, residual):
    y = linalg.triangular_solve(factors, residual[permutation, None], left_side=True, lower=True, unit_diagonal=True)
    return linalg.triangular_solve(factors, y, left_side=True)[:, 0]


def residual(a, b, x):
    return b - a @ x


def update(x, scale, d):
    return x + scale * d


@functools.partial(jax.jit, static_argnums=(0, 1))
def refine(fmt, residual_fmt, a, b):
    """Returns the solution after each step of refinement, from zero."""
    factors, permutation = qjax.emulate(decomposition, fmt)(a)

    def step(found, _):
        r = qjax.chop(qjax.emulate(residual, residual_fmt)(a, b, found), "fp32")
        scale = jnp.max(jnp.abs(r))
        scale = jnp.where(scale == 0, 1, scale)
        d = qjax.emulate(correction, fmt)(factors, permutation, r / scale)
        found = qjax.emulate(update, "fp32")(found, scale, d)
        return found, found

    return jax.lax.scan(step, jnp.zeros_like(b), length=ITERATIONS)[1]


def errors(fmt, residual_fmt="fp64"):
    """Returns the relative errors of all systems after each step."""
    over = jax.vmap(functools.partial(refine, fmt, residual_fmt))
    # In NumPy, for XLA's parallel maximum of NaN alone is -inf.
    return np.concatenate([np.abs(np.asarray(over(a, b)) - x).max(-1) / np.abs(x).max() for a, b, x, _ in grids])


def solved_after(errors):
    """Returns the number of steps until the error is small and stays so; ITERATIONS + 1 if it does not."""
    large = ~(errors <= TOLERANCE)
    return np.where(large.any(1), ITERATIONS + 1 - np.argmax(large[:, ::-1], axis=1), 1)


# %% [markdown]
# The formats of the question are e5m2, bf16 and fp16. As the theory knows nothing of a format but its unit roundoff,
# eight more are run, with significands of other lengths and the exponents of fp32.
#
# The *limit* of a format is the highest rung up to which all systems of the ladder are solved.

# %%
NAMED = ("e5m2", "bf16", "fp16")
OTHERS = () if FAST else ("e8m3", "e8m4", "e8m5", "e8m8", "e8m12", "e8m14", "e8m16", "e8m18")


def roundoff(name):
    return 2.0 ** -(qjax.format(name).mantissa_bits + 1)


found = {name: errors(name) for name in tqdm(NAMED + OTHERS, desc="refining", unit="format")}
steps = {name: solved_after(found[name]) for name in found}
with_fp32 = {name: errors(name, "fp32") for name in NAMED}


def limit(steps):
    solved = [bool((steps[rungs == rung] <= ITERATIONS).all()) for rung in LADDER]
    return LADDER[solved.index(False) - 1]


limits = {name: limit(steps[name]) for name in found}
print(f"{'format':8}{'1 / u_f':>12}{'limit':>12}{'ratio':>8}")
for name in sorted(limits, key=roundoff, reverse=True):
    found_limit = 10 ** limits[name]
    print(f"{name:8}{1 / roundoff(name):12.3g}{found_limit:12.3g}{found_limit * roundoff(name):8.2f}")

# %%
print(f"share of the systems solved, in %\n{'log10 kappa':8}" + "".join(f"{rung:6.1f}" for rung in LADDER))
for name in NAMED:
    shares = [100 * (steps[name][rungs == rung] <= ITERATIONS).mean() for rung in LADDER]
    print(f"{name:11}" + "".join(f"{share:6.0f}" for share in shares))


# %%
def medians(errors):
    """Returns the median of the last error on each rung, those above 1 as 1."""
    last = np.nan_to_num(errors[:, -1], nan=1.0).clip(max=1.0)
    return np.array([np.median(last[rungs == rung]) for rung in LADDER])


COLORS, GREY = {"e5m2": "#cc79a7", "bf16": "#d55e00", "fp16": "#0072b2"}, "0.35"
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
jitter = np.random.default_rng(0).uniform(-0.05, 0.05, len(rungs))
for place, name in enumerate(NAMED):
    at = 10 ** (rungs + (place - 1) * 0.13 + jitter)
    never = steps[name] > ITERATIONS
    left.plot(at[~never], steps[name][~never], "o", ms=3, alpha=0.5, mew=0, color=COLORS[name])
    spread = np.random.default_rng(1).uniform(170, 260, never.sum())
    left.plot(at[never], spread, "x", ms=3, alpha=0.35, color=COLORS[name])
    middle.plot(10**LADDER, medians(found[name]), "o-", ms=4, lw=1.4, color=COLORS[name])
    middle.plot(10**LADDER, medians(with_fp32[name]), "o--", ms=4, lw=1.2, mfc="white", color=COLORS[name])
    for axes in (left, middle):
        axes.axvline(1 / roundoff(name), color=COLORS[name], lw=1.2, zorder=0)
    style = dict(color=COLORS[name], fontsize=9, ha="right", va="bottom", rotation=90)
    left.text(0.95 / roundoff(name), 1.06, f"{name}: {1 / roundoff(name):g}", **style)
left.text(2, 205, "not solved", color=GREY, fontsize=9, va="center")
left.axhline(130, color=GREY, lw=0.7)
left.set(yscale="log", ylabel=r"steps until the error is $\leq 4u$", title="(a) Each system", ylim=(1, 300))
left.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
middle.axhline(U, color=GREY, lw=1, ls=":")
middle.plot(10**LADDER, 10**LADDER * U, color=GREY, lw=1, ls=":")
middle.text(7e7, 0.85 * U, "$u$ of fp32", color=GREY, fontsize=9, ha="right", va="top")
middle.text(1.5e6, 8e5 * U, r"$\kappa_\infty u$", color=GREY, fontsize=9, va="top")
middle.plot([], [], "ko-", ms=4, lw=1.4, label="residuals in fp64")
middle.plot([], [], "ko--", ms=4, lw=1.2, mfc="white", label="residuals in fp32")
middle.legend(frameon=False, loc=(0.6, 0.16), fontsize=9)
middle.set(
    yscale="log", ylabel="relative error after 100 steps, median", title="(b) The error it ends at", ylim=(2e-8, 3)
)
for axes in (left, middle):
    axes.set(xscale="log", xlabel=r"condition number $\kappa_\infty(A)$", xlim=(1.5, 1e8))
ends = np.array([1, 1e7])
right.fill_between(ends, ends / 10**STEP, ends * 10**STEP, color="k", alpha=0.08, lw=0)
right.plot(ends, ends, color=GREY, lw=1)
right.text(1.3e6, 1.6e6, r"$\kappa_\infty u_f = 1$", color=GREY, fontsize=9, ha="right", va="bottom")
for name, rung in limits.items():
    right.plot(1 / roundoff(name), 10**rung, "o", ms=6, color=COLORS.get(name, "k"))
    offset, align = ((0, 9), "right") if name in (*NAMED, "e8m16") else ((6, -6), "left")
    style = dict(textcoords="offset points", color=COLORS.get(name, "k"), fontsize=8, ha=align, va="center")
    right.annotate(name, (1 / roundoff(name), 10**rung), offset, **style)
right.set(xscale="log", yscale="log", xlim=(2, 4e6), ylim=(1, 1e7))
right.set(xlabel=r"theory: $1 / u_f$", ylabel=r"limit found: all systems solved up to this $\kappa_\infty(A)$")
right.set(title="(c) Limits; grey: one step of the ladder")
for axes in (left, middle, right):
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
path = FIGURES / "12_iterative_refinement.png"
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=150)

# %% [markdown]
# (a) A dot is a system, a cross one that is not solved within 100 steps; colours lie side by side on a rung. Vertical
# lines are at $1/u_f$. (b) The median over the systems of a rung.
#
# ## Reading it
#
# **The limit is $1 / u_f$**, for significands of 3 to 19 bits, with a factor between 0.4 and 2.5. That is more than the
# theory promises: its constant has the size of the matrix in it, and is a worst case.
#
# **It is a limit of what is sure, no wall.** Beyond it most systems are still solved, up to ten or a hundred times
# $1/u_f$, in more and more steps. Close to an eigenvalue one small singular value makes A ill-conditioned. The errors
# of the decomposition move it: upwards, each step takes off a part of the error, however small a part; downwards, it
# may become zero or change its sign, and refinement diverges. The theory bounds the size of the errors, and cannot know
# the sign.
#
# **The short format costs steps, not accuracy.** Up to the limit, fp16, bf16 and even e5m2 all end at u of fp32, as
# long as residuals are in fp64. With residuals in fp32 the error grows with the condition number instead, whatever the
# decomposition; it stays below $\kappa_\infty u$, by a factor of up to 100, for not all of a residual points in the
# direction that the inverse magnifies most.
#
# **What this does not show.** Scaling by rows keeps these systems inside the range of e5m2 and fp16; for matrices whose
# elements differ more, overflow and underflow come before precision (Higham and Pranesh 2019, cited above). With GMRES
# in the place of the triangular solves the theory promises more, $\kappa_\infty < u^{-1/2} u_f^{-1}$; with 14 to 106
# unknowns it would end after as many steps in any case, so it is not tried here.
#
# ## Conclusion, asserted
#
# 1. For every format the limit is $1/u_f$ to within one step of the ladder, $10^{0.5}$.
# 2. Up to its limit, the median error that a format of the question ends at is at most $u$.
# 3. On the rung at the limit of fp16, the median error with fp32 residuals is at least five times that with fp64
#    residuals, and below $\kappa_\infty u$.

# %%
for name, rung in limits.items():
    assert abs(rung + math.log10(roundoff(name))) <= STEP, name
for name in NAMED:
    assert medians(found[name])[limits[name] >= LADDER].max() <= U, name
at_limit = limits["fp16"] == LADDER
fine, coarse = medians(found["fp16"])[at_limit].item(), medians(with_fp32["fp16"])[at_limit].item()
print(f"fp16, at its limit: error {fine / U:.2f} u with fp64 residuals, {coarse / U:.1f} u with fp32 residuals")
assert 5 * fine < coarse < 10 ** limits["fp16"] * U
print(path)
