"""Statistics of every operand of a program: what they are, where they come from, and that nothing else changes."""

import csv
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import FAST, same, text

import qjax
from qjax import recipes, stats

KEYS = jax.random.split(jax.random.key(0), 6)
X = jax.random.normal(KEYS[0], (8, 32), jnp.float32)
W = jax.random.normal(KEYS[1], (32, 64), jnp.float32) / 8
V = jax.random.normal(KEYS[2], (64, 32), jnp.float32) / 8


def mlp(weights, x):
    w, v = weights
    with jax.named_scope("first"):
        y = jnp.tanh(x @ w)
    with jax.named_scope("second"):
        return jnp.sum(jnp.square(y @ v))


def exact(a: stats.Stats, b: stats.Stats) -> bool:
    """Whether the integers of two statistics are the same, and their sums up to the bound of ``measure``."""
    fields = ("counts", "magnitudes", "errors")
    sums = [(getattr(a, n), getattr(b, n)) for n in ("squares", "fourths", "noise")]
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in fields) and all(
        np.allclose(x, y, rtol=2 * 65 * 2**-24, atol=0) for x, y in sums
    )


def inspected(*args, **kwargs):
    with jax.default_matmul_precision("float32"):
        return stats.inspect(*args, **kwargs)


def test_each_operand_is_measured_along_its_contraction():
    found = inspected(mlp, "mxfp4", (W, V), X)
    y = jnp.tanh(X @ W)
    gradient = jax.grad(lambda out: jnp.sum(jnp.square(out)))(y @ V)
    expected = {
        "forward.lhs": (y, 1), "forward.rhs": (V, 0), "dlhs.lhs": (gradient, 1), "dlhs.rhs": (V, 1), "drhs.lhs": (y, 0),
        "drhs.rhs": (gradient, 0),
    }  # fmt: skip
    assert list(found) == [(path, operand) for path in ("first", "second") for operand in expected]
    for operand, (x, axis) in expected.items():
        # The last axis of a product that is along the others of an operand: the rows are whole blocks or padded ones.
        rows = x if axis == 1 else x.T
        assert exact(found["second", operand], stats.measure(rows, "mxfp4", saturate=True)), operand


def test_operands_of_a_convolution():
    x = jax.random.normal(KEYS[3], (4, 6, 64), jnp.float32)
    kernel = jax.random.normal(KEYS[4], (3, 16, 64), jnp.float32)
    numbers = ("NWC", "WIO", "NWC")

    def conv(kernel, x):
        out = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=4)
        return jnp.sum(jnp.sin(out))

    found = inspected(conv, "mxint8", kernel, x)
    grouped = x.reshape(4, 6, 4, 16)
    assert exact(found["", "forward.lhs"], stats.measure(grouped, "mxint8", saturate=True))
    rows = kernel.transpose(2, 0, 1)
    assert exact(found["", "forward.rhs"], stats.measure(rows, "mxint8", saturate=True))
    assert all(s.count("size") == s.count("size") > 0 for s in found.values())
    assert found["", "drhs.rhs"].count("size") == found["", "dlhs.lhs"].count("size") == 4 * 6 * 64


def test_a_recipe_says_what_each_operand_is_measured_in():
    recipe = qjax.Recipe(qjax.Gemm(qjax.Quantizer("e2m1"), None), qjax.Gemm(qjax.Quantizer("e5m2"), None))
    found = inspected(mlp, {"first": recipe, "second": None}, (W, V), X)
    formats = [s.fmt for s in found.values()]
    assert formats == [qjax.E2M1, qjax.FP32, qjax.E5M2, *9 * [qjax.FP32]]
    assert exact(found["first", "forward.lhs"], stats.measure(X, "e2m1", saturate=True))
    assert all(s.sqnr == np.inf for s in list(found.values())[6:])


def test_rotated_and_stochastic_operands():
    for recipe in (recipes.MXFP4_STOCHASTIC, recipes.mxfp4_hadamard(8)):
        found = inspected(mlp, recipe, (W, V), X, key=KEYS[5])
        again = inspected(mlp, recipe, (W, V), X, key=KEYS[5])
        assert jax.tree.all(jax.tree.map(np.array_equal, found, again))
    # A rotation makes an outlier small: kurtosis is that of what is rounded.
    spiked = X.at[0, 0].set(100.0)
    plain, turned = (
        inspected(mlp, recipe, (W, V), spiked, key=KEYS[5] if recipe.is_stochastic else None)
        for recipe in (recipes.MXFP4_NEAREST, recipes.mxfp4_hadamard(8))
    )
    assert turned["first", "drhs.lhs"].kurtosis < plain["first", "drhs.lhs"].kurtosis / 2


def test_the_steps_of_a_scan_are_together():
    weights = jnp.stack([W[:, :32], V[:32]])

    def loss(weights):
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), X, weights)
        return jnp.sum(out)

    found = inspected(loss, "e4m3", weights)
    whole = stats.total([stats.measure(w, "e4m3", saturate=True) for w in weights])
    assert exact(found["", "forward.rhs"], whole)


def test_applied_formats_change_the_operands_that_follow():
    quantizer = qjax.Quantizer("e2m1")
    recipe = qjax.Recipe(*3 * [qjax.Gemm(quantizer, quantizer)])
    found = inspected(mlp, "e2m1", (W, V), X, apply=True)
    y = jnp.tanh(qjax.dot_general(X, W, (((1,), (0,)), ((), ())), recipe=recipe))
    assert exact(found["second", "forward.lhs"], stats.measure(y, "e2m1", saturate=True))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="inner")(x))
        return nn.Dense(4, name="outer")(x)


class Module(nnx.Module):
    def __init__(self):
        self.inner, self.norm = nnx.Linear(32, 16, rngs=nnx.Rngs(0)), nnx.BatchNorm(16, rngs=nnx.Rngs(0))
        self.outer = nnx.Linear(16, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.outer(nnx.relu(self.norm(self.inner(x))))


def test_linen_and_nnx_give_the_paths():
    net = Net()
    variables = net.init(KEYS[0], X)
    found = stats.inspect(lambda v, x: jnp.mean(net.apply(v, x) ** 2), "e4m3", variables, X)
    assert list(dict.fromkeys(path for path, _ in found)) == ["inner", "outer"]
    module = Module()
    before = jax.tree.map(jnp.array, nnx.state(module))
    forward = stats.inspect(lambda m, x: m(x), "e4m3", module, X, backward=False)
    assert list(forward) == [(path, f"forward.{side}") for path in ("inner", "outer") for side in ("lhs", "rhs")]
    assert same(jax.tree.leaves(before), jax.tree.leaves(nnx.state(module)))


def test_forward_alone_is_the_forward_of_all_in_the_order_of_the_program():
    def fn(w, x):
        for name in ("second", "first"):
            with jax.named_scope(name):
                x = jnp.tanh(x @ w)
        return jnp.sum(x)

    w = jnp.eye(X.shape[-1], dtype=jnp.float32)
    both, forward = (stats.inspect(fn, "e4m3", w, X, backward=backward) for backward in (True, False))
    assert [path for path, _ in forward] == ["second", "second", "first", "first"]
    assert list(forward) == [key for key in both if key[1].startswith("forward")]
    assert all(same(jax.tree.leaves(both[key]), jax.tree.leaves(forward[key])) for key in forward)


def test_values_gradients_and_state_are_as_without():
    def both(fn, *args):
        zeros = stats.probes(fn, "e4m3", *args)

        def observed(first, zeros):
            return stats.observe(fn, "e4m3", zeros)(first, *args[1:])

        value, (gradient, _) = jax.jit(jax.value_and_grad(observed, argnums=(0, 1)), compiler_options=FAST)(
            args[0], zeros
        )
        return value, gradient

    plain = jax.jit(jax.value_and_grad(mlp), compiler_options=FAST)((W, V), X)
    assert same(both(mlp, (W, V), X), plain)

    module, twin = Module(), Module()

    def loss(m, x):
        return jnp.mean(m(x) ** 2)

    zeros = stats.probes(loss, "e4m3", module, X)

    def observed(m, zeros, x):
        return stats.observe(loss, "e4m3", zeros)(m, x)

    value, (gradient, seen) = nnx.jit(nnx.value_and_grad(observed, argnums=(0, 1)))(module, zeros, X)
    expected = nnx.jit(nnx.value_and_grad(loss))(twin, X)
    assert np.array_equal(value, expected[0])
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-7)  # XLA fuses what is around the products differently
    # The running mean of the batch norm has moved, as without.
    assert np.array_equal(module.norm.mean[...], twin.norm.mean[...]) and np.any(np.asarray(module.norm.mean[...]))
    assert stats.report(seen)["outer", "forward.lhs"].count("size") == 8 * 16


def test_what_no_derivative_reaches_has_no_elements():
    def loss(w):
        return jnp.sum(X @ w) + jnp.sum(jax.lax.stop_gradient(X @ W))

    found = inspected(loss, "e4m3", W)
    assert [found[path, "forward.lhs"].count("size") for path in ("", "#2")] == [8 * 32, 0]


def test_a_report_as_text_csv_frame_and_pytree(tmp_path):
    pandas = pytest.importorskip("pandas")
    found = inspected(mlp, "e4m3", (W, V), X)
    lines = str(found).splitlines()
    assert lines[0].split()[:5] == ["path", "|", "operand", "|", "format"] and len(lines) == 2 + 12
    assert lines[2].split(" | ")[0].strip() == "first"
    found.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["sqnr"]) == found["first", "forward.lhs"].sqnr
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[("second", "dlhs.lhs"), "underflows"] == found["second", "dlhs.lhs"].share("underflows")
    doubled = jax.tree.map(lambda x: x * 2, found)
    assert isinstance(doubled, stats.Report) and doubled["first", "drhs.rhs"].count("size") == 2 * 8 * 64


def test_watch_is_nothing_when_it_is_off():
    step = jnp.int32(3)

    def plain(step, w, x):
        return jax.value_and_grad(mlp)(w, x)

    for every in (None, 0):
        watch = stats.Watch("e4m3", every, print)
        off = watch.value_and_grad(mlp)
        lowered = [jax.jit(f).lower(step, (W, V), X).as_text() for f in (plain, off)]
        assert lowered[0].replace("jit_plain", "jit_watched") == lowered[1]
        assert text(off, step, (W, V), X) == text(plain, step, (W, V), X)
    # So it is in a step without a report.
    watch = stats.Watch("e4m3", 10, print)
    assert text(lambda w: watch.value_and_grad(mlp)(3, w, X), (W, V)) == text(
        lambda w: jax.value_and_grad(mlp)(w, X), (W, V)
    )


def test_watch_writes_lines(tmp_path):
    watch = stats.Watch("e4m3", 2, stats.JsonLines(tmp_path / "run.jsonl"))

    @jax.jit
    def train(weights):
        def step(weights, i):
            value, gradient = watch.value_and_grad(mlp)(i, weights, X)
            return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradient), value

        return jax.lax.scan(step, weights, jnp.arange(4))

    _, values = train((W, V))
    jax.effects_barrier()
    assert values[3] < values[0]
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows}) == [0, 2] and len(rows) == 2 * 12
    first = next(row for row in rows if (row["step"], row["path"], row["operand"]) == (0, "first", "forward.rhs"))
    assert first["underflows"] == stats.measure(W, "e4m3").share("underflows")
    assert first["kurtosis"] == pytest.approx(stats.measure(W, "e4m3").kurtosis)
    exactly = stats.measure(W, "fp32").summary()
    stats.JsonLines(tmp_path / "other")(7, stats.Report({("w", "forward.rhs"): stats.measure(W, "fp32")}))
    assert json.loads((tmp_path / "other").read_text())["sqnr"] == "inf" and exactly["sqnr"] == np.inf


def test_watch_divides_the_products_among_reports():
    seen = {}
    watch = stats.Watch("e4m3", 3, lambda step, found: seen.update({step: {path for path, _ in found}}), parts=2)
    assert watch.period == 6
    for i in range(9):
        watch.value_and_grad(mlp)(i, (W, V), X)
    jax.effects_barrier()
    assert seen == {0: {"first"}, 3: {"second"}, 6: {"first"}}


def test_watch_takes_nnx_modules():
    seen = []
    watch = stats.Watch("e4m3", 2, lambda step, found: seen.append((step, [p for p, o in found if o == "dlhs.lhs"])))
    module, twin = Module(), Module()

    def loss(m, x):
        return jnp.mean(m(x) ** 2)

    value, gradient = nnx.jit(lambda m, i, x: watch.value_and_grad(loss)(i, m, x))(module, jnp.int32(4), X)
    expected, _ = nnx.value_and_grad(loss)(twin, X)
    jax.effects_barrier()
    assert seen == [(4, ["inner", "outer"])]
    assert np.allclose(value, expected, rtol=1e-6) and isinstance(gradient, nnx.State)


def test_trackers_get_scalars(tmp_path, monkeypatch):
    import sys
    import types

    found = inspected(mlp, "e4m3", (W, V), X)
    logged = []
    module = types.SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    monkeypatch.setitem(sys.modules, "wandb", module)
    stats.Wandb()(5, found)
    assert logged == [(stats.scalars(found), 5)]
    assert logged[0][0]["second/dlhs.lhs/sqnr"] == found["second", "dlhs.lhs"].sqnr


def test_tensorboard_events(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found = inspected(mlp, "e4m3", (W, V), X)
    stats.TensorBoard(tmp_path)(5, found)
    (file,) = tmp_path.iterdir()
    events = [event for event in loader.LegacyEventFileLoader(str(file)).Load() if event.HasField("summary")]
    values = {value.tag: value.simple_value for value in events[0].summary.value}
    assert events[0].step == 5
    assert values["first/forward.lhs/rms"] == np.float32(found["first", "forward.lhs"].rms)


def test_errors_grow_from_the_first_product_on():
    errors = stats.growth(mlp, {"first": recipes.MXFP4_NEAREST, "second": None}, (W, V), X)
    assert errors["first"]["lhs"] == errors["first"]["rhs"] == errors["second"]["rhs"] == 0
    recipe = recipes.MXFP4_NEAREST
    a = np.asarray(jnp.tanh(X @ W), np.float64)
    b = np.asarray(jnp.tanh(qjax.dot_general(X, W, (((1,), (0,)), ((), ())), recipe=recipe)), np.float64)
    assert errors["second"]["lhs"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-4)
    assert errors["second"]["gradient"] > 0


def test_pictures():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = inspected(mlp, "e4m3", (W, V), X)
    s = found["second", "dlhs.lhs"]
    axes = stats.plot_exponents(s)
    bars = [p for p in axes.patches if p.get_width() == 1]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["e4m3", "its subnormals"]
    # Of e4m3: normal numbers from 2^-6 to 2^8, subnormal ones from 2^-9; a block ends where its tensor does.
    from qjax.stats._plots import _range

    assert _range(qjax.E4M3, 3) == (-9, -6, 8)
    assert _range(qjax.format("mxfp4"), 3) == (0, 1, 3)
    assert _range(qjax.format("int8_channel"), 3) == (-3, 3, 3)
    assert _range(qjax.format("nf4"), 3) == (-4, -4, 0)
    grid = stats.plot_heat_map(found, "underflows").images[0].get_array()
    assert grid.shape == (2, 6) and grid[1, 2] == s.share("underflows")
    lines = stats.plot_growth(stats.growth(mlp, "e4m3", (W, V), X), label="e4m3").lines
    assert [line.get_label() for line in lines] == ["e4m3 activations", "e4m3 gradients"]
    matplotlib.pyplot.close("all")


def looped(w):
    return jnp.sum(jax.lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x @ w, X))


@pytest.mark.parametrize(
    "message, call",
    [
        (
            "probes: there is no dot product or convolution that can be observed.",
            lambda: stats.probes(jnp.sum, "e4m3", X),
        ),
        ("that can be observed: it is inside a while", lambda: stats.probes(looped, "e4m3", W[:, :32])),
        (
            "probes: the recipe of 'first' has delayed scaling",
            lambda: stats.probes(mlp, recipes.FP8_DELAYED, (W, V), X),
        ),
        (
            "inspect|observe: a recipe is stochastic; pass key",
            lambda: inspected(mlp, recipes.MXFP4_STOCHASTIC, (W, V), X),
        ),
        ("observe: key was given, but no recipe", lambda: inspected(mlp, "e4m3", (W, V), X, key=KEYS[0])),
        (
            "observe: the probes are those of another function: there is no product 'third', but 'first', 'second'",
            lambda: stats.observe(mlp, "e4m3", {"third": {}})((W, V), X),
        ),
        ("probes: pattern 'third' matches no site", lambda: stats.probes(mlp, {"third": None, ".*": None}, (W, V), X)),
        ("growth: rule must be a Recipe", lambda: stats.growth(mlp, 3, (W, V), X)),
        ("Watch: expected every >= 0 .* and parts >= 1, got 3 and 0", lambda: stats.Watch("e4m3", 3, print, parts=0)),
        ("plot_heat_map: 'snr' is no statistic; there are size, sqnr", lambda: stats.plot_heat_map(REPORT, "snr")),
    ],
)
def test_refusals(message, call):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


REPORT = stats.Report({("w", "forward.rhs"): stats.measure(W, "e4m3")})
