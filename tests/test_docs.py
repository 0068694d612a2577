"""The pages: every public name is there, every link leads somewhere."""

import pathlib
import re

import flax.linen
import flax.nnx
import pytest

import qjax
import qjax.laws
import qjax.linen
import qjax.nnx
import qjax.optim
import qjax.stats
import qjax.sweep
import qjax.unit_scaling

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FORMATS = qjax.Float | qjax.Fixed | qjax.Codebook | qjax.Scaled


@pytest.mark.parametrize("name", qjax.__all__)
def test_every_public_name_is_documented(name):
    reference, thing = (ROOT / "docs" / "api.md").read_text(), getattr(qjax, name)
    if isinstance(thing, FORMATS):
        assert f"`{name}`" in reference
        assert qjax.format(name.lower()) is thing
        assert name.lower() in qjax.format_names()
    elif f"### `{name}`" not in reference:
        assert f"\n::: qjax.{name}\n" in reference
        assert thing.__doc__ and thing.__module__.startswith("qjax")
        assert not thing.__doc__.startswith(f"{name}("), "the docstring is the one that dataclass writes"


@pytest.mark.parametrize("name", getattr(qjax.optim, "__all__", ()))
def test_every_optimizer_is_documented(name):
    assert f"\n::: qjax.optim.{name}\n" in (ROOT / "docs" / "api.md").read_text()
    assert getattr(qjax.optim, name).__doc__


@pytest.mark.parametrize("name", qjax.laws.__all__)
def test_every_part_of_laws_is_documented(name):
    reference, thing = (ROOT / "docs" / "api.md").read_text(), getattr(qjax.laws, name)
    if isinstance(thing, qjax.laws.Law):
        assert f"`{name}`" in reference and f"`{name}`" in (ROOT / "docs" / "laws.md").read_text()
        assert "https://" in thing.citation
    else:
        assert f"\n::: qjax.laws.{name}\n" in reference
        assert thing.__doc__


@pytest.mark.parametrize("name", qjax.sweep.__all__)
def test_every_part_of_a_sweep_is_documented(name):
    assert f"\n::: qjax.sweep.{name}\n" in (ROOT / "docs" / "api.md").read_text()
    assert getattr(qjax.sweep, name).__doc__


@pytest.mark.parametrize("name", qjax.stats.__all__)
def test_every_statistic_is_documented(name):
    reference = (ROOT / "docs" / "api.md").read_text()
    assert f"\n::: qjax.stats.{name}\n" in reference or f"`stats.{name}`" in reference
    assert getattr(qjax.stats, name).__doc__


@pytest.mark.parametrize("name", qjax.unit_scaling.__all__)
def test_every_unit_scaled_operation_is_documented(name):
    assert f"\n::: qjax.unit_scaling.{name}\n" in (ROOT / "docs" / "api.md").read_text()
    assert getattr(qjax.unit_scaling, name).__doc__


@pytest.mark.parametrize("name", qjax.kernels.__all__)
def test_every_kernel_is_documented(name):
    assert f"\n::: qjax.kernels.{name}\n" in (ROOT / "docs" / "api.md").read_text()
    assert getattr(qjax.kernels, name).__doc__


@pytest.mark.parametrize("name", qjax.checkpoints.__all__)
def test_every_kind_of_checkpoint_is_documented(name):
    assert f"\n::: qjax.checkpoints.{name}\n" in (ROOT / "docs" / "api.md").read_text()
    assert getattr(qjax.checkpoints, name).__doc__


@pytest.mark.parametrize("module, flax_module", [(qjax.linen, flax.linen), (qjax.nnx, flax.nnx)], ids=["linen", "nnx"])
def test_every_layer_is_listed(module, flax_module):
    page = (ROOT / "docs" / "flax.md").read_text()
    own = {name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__}
    layers = [name for name in own if isinstance(getattr(module, name), type) and hasattr(flax_module, name)]
    assert len(layers) >= 10
    for name in layers:
        assert f"`{name}`" in page
        assert "Flax" in getattr(module, name).__doc__


def test_the_reference_names_nothing_else():
    reference, modules = (
        (ROOT / "docs" / "api.md").read_text(),
        {"collectives", "laws", "linalg", "linen", "memory", "nnx", "optim", "stats", "sweep", "unit_scaling"},
    )
    assert set(re.findall(r"^(?:::: qjax\.|### `)(\w+)", reference, re.MULTILINE)) <= {*qjax.__all__, *modules}


def anchors(page: pathlib.Path) -> set[str]:
    """Returns what a link to a page may end in: its headings as MkDocs writes them, and its API entries."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]*)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
