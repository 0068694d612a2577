"""``Coverage``: the sites of a program as a table."""

import functools
import itertools
from collections.abc import Iterator, Sequence

from qjax._modes import Rounding
from qjax._quantizer import Quantizer
from qjax._recipe import Gemm, Recipe
from qjax._sites import Site
from qjax.formats import Codebook, Fixed, Float, Format, Scaled, format, format_names

HEADER = ("path", "operation", "shapes", "forward", "dlhs", "drhs", "accumulator")


class Coverage(tuple[Site, ...]):
    """The dot products and convolutions of a program, in its order; ``str`` of it is a table.

    An operand that stays in full precision is shown as "-".
    """

    @property
    def uncovered(self) -> "Coverage":
        """The sites in which nothing is quantized."""
        return Coverage(site for site in self if not site.is_quantized)

    def __str__(self) -> str:
        return f"{table([HEADER, *map(_row, self)])}\n{self._summary()}"

    def _summary(self) -> str:
        done = [site for site in self if site.is_quantized]
        total = sum(site.multiply_adds for site in self)
        share = sum(site.multiply_adds for site in done) / total if total else 0
        return f"{len(done)} of {len(self)} dots quantized, {100 * share:.1f} % of the multiply-adds"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of text, the header first, as a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-|-".join("-" * n for n in widths))
    return "\n".join(lines)


def _row(site: Site) -> tuple[str, ...]:
    shapes = f"{_array_text(site.lhs)} x {_array_text(site.rhs)}"
    if site.times > 1:
        shapes += f", {site.times} times"
    recipe = site.recipe or Recipe()
    gemms = (recipe.forward, recipe.dlhs, recipe.drhs)
    accumulators = ["-" if gemm.accumulator is None else _accumulator_text(gemm.accumulator) for gemm in gemms]
    accumulator = accumulators[0] if len(set(accumulators)) == 1 else ", ".join(accumulators)
    return (site.path, site.operation, shapes, *map(_gemm_text, gemms), accumulator)


def _array_text(x) -> str:
    return f"{x.dtype}".replace("float", "f") + f"[{','.join(map(str, x.shape))}]"


def _gemm_text(gemm: Gemm) -> str:
    rotated = any((gemm.rotate, gemm.rotate_lhs, gemm.rotate_rhs))
    if gemm.lhs is None and gemm.rhs is None and not rotated:
        return "-"
    return f"{_quantizer_text(gemm.lhs)} x {_quantizer_text(gemm.rhs)}" + (", rotated" if rotated else "")


def _quantizer_text(quantizer: Quantizer | None) -> str:
    if quantizer is None:
        return "-"
    faults = "" if quantizer.faults is None else f" with {quantizer.faults.kind} faults"
    return _shown(quantizer.fmt) + _rounding_text(quantizer.rounding) + faults


def _shown(fmt: Format) -> str:
    """Returns ``format_text``; what has no name is written with the names of its parts."""
    text, part = format_text(fmt), fmt
    while isinstance(part, Scaled):
        text, part = text.replace(repr(part.scale), format_text(part.scale)), part.element
    if isinstance(part, Codebook):
        text = text.replace(repr(part), part.name or f"Codebook of {len(part.table)}")
    return text


def _rounding_text(rounding: Rounding) -> str:
    return "" if rounding is Rounding.NEAREST_EVEN else f" {rounding.value}"


def _accumulator_text(accumulator) -> str:
    text = format_text(accumulator.fmt) + _rounding_text(accumulator.rounding)
    if accumulator.chunk != 1:
        text += f" chunk {accumulator.chunk}"
    return text + (f" promote {accumulator.promote}" if accumulator.promote else "")


@functools.lru_cache(maxsize=256)
def format_text(fmt: Format) -> str:
    """Returns a name that ``format`` takes for a format, or how it is written if it has none."""
    return next((name for name in itertools.chain(format_names(), _composed(fmt)) if format(name) == fmt), repr(fmt))


def _composed(fmt: Format) -> Iterator[str]:
    if isinstance(fmt, Float):
        yield f"{'' if fmt.signed else 'u'}e{fmt.exponent_bits}m{fmt.mantissa_bits}"
    elif isinstance(fmt, Fixed):
        u = "" if fmt.signed else "u"
        yield f"{u}int{fmt.bits}"
        yield f"{u}q{fmt.bits - fmt.fraction_bits}.{fmt.fraction_bits}"
    elif isinstance(fmt, Scaled):
        block = fmt.block
        suffix = (
            "tensor"
            if block is None
            else "channel"
            if block == "axis"
            else f"g{block}"
            if isinstance(block, int)
            else "x".join(map(str, block))
        )
        elements = [fmt.element]
        if isinstance(fmt.element, Fixed):  # the grammar makes signed integers symmetric
            elements.append(Fixed(fmt.element.bits, fmt.element.fraction_bits, signed=fmt.element.signed))
        yield from (f"{format_text(element)}_{suffix}" for element in elements if "(" not in format_text(element))
