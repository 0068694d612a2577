"""What MkDocs does not do by itself: pages from outside docs/, the tables of formats, included results.

In a page, ``<!-- formats: Float -->`` becomes the table of the named formats of that class, ``<!-- notebooks -->`` the
list of notebooks, and ``<!-- include: path -->`` the text of a file of the repository, its headings two levels deeper.
"""

import json
import math
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

import qjax

ROOT = pathlib.Path(__file__).parents[1]

IEEE = "[IEEE 754-2019](https://doi.org/10.1109/IEEESTD.2019.8766229), section 3.6"
FP8 = "[Micikevicius et al. 2022](https://arxiv.org/abs/2209.05433); [OCP OFP8 1.0](https://www.opencompute.org/documents/ocp-8-bit-floating-point-specification-ofp8-revision-1-0-2023-12-01-pdf-1)"
MX = "[OCP MX 1.0](https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf)"
ML_DTYPES = "[ml_dtypes](https://github.com/jax-ml/ml_dtypes)"
FNUZ = f"[Noune et al. 2022](https://arxiv.org/abs/2206.02915); {ML_DTYPES}"
DFP = "[Das et al. 2018](https://arxiv.org/abs/1802.00930)"

# The source of every named format. A name without one fails the build.
SOURCES = {
    "fp64": IEEE,
    "fp32": IEEE,
    "tf32": "[NVIDIA A100 whitepaper](https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf)",
    "bf16": "[Kalamkar et al. 2019](https://arxiv.org/abs/1905.12322)",
    "fp16": IEEE,
    "dlfloat16": "[Agrawal et al. 2019](https://doi.org/10.1109/ARITH.2019.00023)",
    "e5m2": FP8,
    "e4m3": FP8,
    "e3m4": ML_DTYPES,
    "e3m2": MX,
    "e2m3": MX,
    "e2m1": MX,
    "e8m0": f"{MX}, section 5.4.1",
    "ue5m3": "[Hu, Luschi, Balanca 2025](https://arxiv.org/abs/2509.17791)",
    "float8_e4m3": ML_DTYPES,
    "float8_e4m3b11fnuz": ML_DTYPES,
    "float8_e4m3fnuz": FNUZ,
    "float8_e5m2fnuz": FNUZ,
    "nf4": "[Dettmers et al. 2023](https://arxiv.org/abs/2305.14314) (QLoRA), appendix E",
    "ternary": "[Li et al. 2016](https://arxiv.org/abs/1605.04711)",
    "binary": "[Courbariaux et al. 2016](https://arxiv.org/abs/1602.02830)",
    "mxfp8_e4m3": MX,
    "mxfp8_e5m2": MX,
    "mxfp6_e2m3": MX,
    "mxfp6_e3m2": MX,
    "mxfp4": MX,
    "mxint8": MX,
    "nvfp4": "[NVIDIA 2025](https://arxiv.org/abs/2509.25149)",
    "dfp8": DFP,
    "dfp16": DFP,
}


def number(x: float) -> str:
    """Returns a number as a reader likes it: as a power of two if far from 1, exact if short, else to 5 digits."""
    mantissa, exponent = math.frexp(x)
    if mantissa == 0.5 and not -5 < exponent < 20:
        return f"2^{exponent - 1}"
    short = repr(x).removesuffix(".0")
    return short if len(short) <= 11 and "e" not in short else f"{x:.5g}".replace("e+", "e")


def specials(fmt: qjax.Float) -> str:
    zeros = "±0" if fmt.has_negative_zero else "0" if fmt.has_zero else ""
    infinities = "±inf" if fmt.signed else "inf"
    return ", ".join(filter(None, [zeros, infinities * fmt.has_inf, "NaN" * fmt.has_nan]))


def float_row(fmt: qjax.Float) -> list[str]:
    values = map(number, (fmt.max, fmt.min_normal, fmt.smallest_subnormal, fmt.eps))
    return [str(fmt.bits), *values, specials(fmt), f"`{fmt.dtype}`" if fmt.dtype else ""]


def codebook_row(fmt: qjax.Codebook) -> list[str]:
    return [str(fmt.bits), str(len(fmt.table)), number(fmt.min), number(fmt.max), number(fmt.smallest_subnormal)]


def scaled_row(fmt: qjax.Scaled) -> list[str]:
    innermost = fmt.element.element if isinstance(fmt.element, qjax.Scaled) else fmt.element
    dtype = innermost.dtype
    return [f"{fmt.bits:g}", number(innermost.max), number(fmt.max), fmt.rule, f"`{dtype}`" if dtype else ""]


TABLES = {
    "Float": ("bits, max, min normal, smallest positive, eps, specials, dtype", float_row),
    "Codebook": ("bits, values, min, max, smallest positive", codebook_row),
    "Scaled": ("bits an element, max of the element, max, rule, dtype of the element", scaled_row),
}


def format_table(kind: str) -> str:
    """Returns the table of the named formats of a class; names of equal formats share a row."""
    names: dict[qjax.Format, list[str]] = {}
    for name in qjax.format_names():
        names.setdefault(qjax.format(name), []).append(name)
    columns, row = TABLES[kind]
    head = ["name", *columns.split(", "), "prints as", "source"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for fmt, aliases in names.items():
        if type(fmt).__name__ == kind:
            shown = f"`format({aliases[0]!r})`" if len(repr(fmt)) > 150 else f"`{fmt!r}`"
            cells = ["<br>".join(f"`{name}`" for name in aliases), *row(fmt), shown, SOURCES[aliases[0]]]
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def pages() -> list[str]:
    return [f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def title(notebook: str) -> str:
    """Returns the first heading of a notebook."""
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    heading = re.search(r"^# *(.+)$", text, re.MULTILINE)
    return heading[1] if heading else pathlib.Path(notebook).stem


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = [entry for entry in config.nav or [] if "Studies" not in entry]
    config.nav.append({"Studies": ["notebooks.md", *({title(page): page} for page in pages())]})
    if (ROOT / "CHANGELOG.md").exists():
        config.nav.append({"Changes": "CHANGELOG.md"})
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in [*pages(), "CHANGELOG.md"]:
        if (ROOT / page).exists():
            files.append(File(page, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def included(path: str) -> str:
    if not (ROOT / path).exists():
        return f"*There is no `{path}` in this checkout.*"
    return re.sub(r"^(#+ )", r"##\1", (ROOT / path).read_text(), flags=re.MULTILINE)


def on_page_markdown(markdown: str, **kwargs) -> str:
    listing = "\n".join(f"- [{title(page)}]({page})" for page in pages()) or "*There is none in this checkout.*"
    markdown = markdown.replace("<!-- notebooks -->", listing)
    markdown = re.sub(r"<!-- formats: (\w+) -->", lambda match: format_table(match[1]), markdown)
    return re.sub(r"<!-- include: (\S+) -->", lambda match: included(match[1]), markdown)
