"""The package as a whole: who imports whom, what `import qjax` costs, what compiles once."""

import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import qjax

PACKAGE = pathlib.Path(qjax.__file__).parent

# A module may import those above it. Modules of one row do not see each other.
LAYERS = (
    ("laws", "sweep", "linalg"),
    ("formats", "_carrier", "_mesh", "unit_scaling", "_patterns", "_safetensors"),
    ("_elementwise", "_modes", "_to_odd"),
    ("_grid",),
    ("_rounding",),
    ("_blocks", "_codebook"),
    ("_split",),
    ("_random",),
    ("_scaled",),
    ("_chop",),
    ("_packing",),
    ("_encode", "_hadamard"),
    ("_faults",),
    ("_quantizer",),
    ("_accumulator", "_stored", "optim", "collectives", "checkpoints"),
    ("_operand", "_jaxpr"),
    ("_kernels", "_recipe", "_rows"),
    ("_accumulated",),
    ("_product", "_sites", "_custom"),
    ("_dot", "_coverage", "_rules", "_sums", "recipes"),
    ("_program", "_params", "memory", "kernels"),
    ("_arithmetic",),
    ("_emulate",),
    ("_operations", "_significance"),
    ("linen", "nnx"),
    ("stats",),
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
# Who else may import what.
ONLY = {"flax": {"linen", "nnx"}, "optax": {"optim", "laws"}, "matplotlib": {"stats", "_plots"}}


def imports(path: pathlib.Path) -> set[str]:
    """Returns the modules that a file imports, the parts of qjax as qjax.part."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"qjax.{a.name}" for a in node.names} if node.module == "qjax" else {node.module}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part, stem = path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path.stem
    for module in imports(path):
        top, *rest = module.split(".")
        assert {part, stem} & ONLY.get(top, {part}), f"{part} imports {top}"
        if top == "qjax" and rest and part not in ("__init__", rest[0]):
            assert LAYER[rest[0]] < LAYER[part], f"{part} imports {rest[0]}"


def test_import_is_light():
    code = "import sys, qjax; print(*{'flax', 'optax', 'matplotlib', 'scipy', 'chex'} & {*sys.modules})"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()


def test_public_names_are_sorted_and_there():
    assert sorted(set(qjax.__all__)) == sorted(qjax.__all__)
    assert all(hasattr(qjax, name) for name in qjax.__all__)


def test_equal_formats_trace_once():
    traces = []

    @jax.jit
    def f(x, fmt):
        traces.append(fmt)
        return qjax.chop(x, fmt)

    x = jnp.ones(4, jnp.float32)
    for fmt in (qjax.Float(4, 3, specials="fn"), qjax.Float(4, 3, bias=7, specials="fn"), qjax.format("E4M3")):
        f(x, fmt)
    assert len(traces) == 1
    f(x, qjax.E5M2)
    assert len(traces) == 2


@pytest.mark.parametrize("name", ["e4m3", "mxfp4", "nf4", "q8.8"])
def test_equal_calls_compile_once(name):
    from qjax import _chop

    x = jnp.ones((2, 64), jnp.float32)
    qjax.chop(x, name)
    before = _chop._chop._cache_size()
    qjax.chop(x + 1, qjax.format(name), "nearest_even")
    qjax.chop(x, eval(repr(qjax.format(name)), dict(vars(qjax))), qjax.Rounding.NEAREST_EVEN)
    assert _chop._chop._cache_size() == before


def test_the_example_of_the_readme_prints_what_it_says():
    text = (PACKAGE.parent / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    shown = [line.split("  # ")[1] for line in code.splitlines() if "  # " in line]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert run.stdout.splitlines() == shown
