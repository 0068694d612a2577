"""The tables of posits and takums against decoders that read the digits as the papers write them."""

import itertools
import math
from bisect import bisect
from fractions import Fraction

import pytest

from qjax.formats import _tapered

TABLES = [(f"posit{n}es{es}", n, es) for n in (2, 3, 4, 5, 8, 10) for es in (0, 1, 2, 3)] + [("posit16", 16, 2)]
TABLES += [(f"takum{n}", n, None) for n in (2, 3, 4, 5, 8, 11, 12, 16)]
all_tables = pytest.mark.parametrize(("bits", "es"), [row[1:] for row in TABLES], ids=[row[0] for row in TABLES])


def tables(bits: int, es: int | None):
    return _tapered.takum_tables(bits) if es is None else _tapered.posit_tables(bits, es)


def bit_string(code: int, bits: int) -> str:
    return format(code % 2**bits, f"0{bits}b")


def posit(digits: str, es: int) -> Fraction:
    """The value of a posit by the formula ((1 - 3s) + f) 2^((1 - 2s) (2^es r + e + s)), digits as stored."""
    s, rest = int(digits[0]), digits[1:]
    k = len(rest) - len(rest.lstrip(rest[0]))
    r = -k if rest[0] == "0" else k - 1
    exponent_and_fraction = rest[k + 1 :] + "0" * es
    e = int("0" + exponent_and_fraction[:es], 2)
    f = Fraction(int("0" + exponent_and_fraction[es:], 2), 2 ** len(exponent_and_fraction[es:]))
    return ((1 - 3 * s) + f) * Fraction(2) ** ((1 - 2 * s) * (2**es * r + e + s))


def takum(digits: str) -> Fraction:
    """The value of a linear takum by the formula ((1 - 3S) + m) 2^((1 - 2S) (c + S)), digits as stored."""
    digits += "0" * (12 - len(digits))
    s = int(digits[0])
    smallest = {"0": [-255, -127, -63, -31, -15, -7, -3, -1], "1": [0, 1, 3, 7, 15, 31, 63, 127]}
    regime = int(digits[2:5], 2)
    r = regime if digits[1] == "1" else 7 - regime
    c = smallest[digits[1]][regime] + int("0" + digits[5 : 5 + r], 2)
    m = Fraction(int("0" + digits[5 + r :], 2), 2 ** len(digits[5 + r :]))
    return ((1 - 3 * s) + m) * Fraction(2) ** ((1 - 2 * s) * (c + s))


def decode(code: int, bits: int, es: int | None) -> Fraction:
    """The value of a code, negative ones by the formula for negative codes, never by negation."""
    if code % 2**bits == 0:
        return Fraction(0)
    digits = bit_string(code, bits)
    return takum(digits) if es is None else posit(digits, es)


@all_tables
def test_values(bits, es):
    values, _, first_code = tables(bits, es)
    assert len(values) == 2**bits - 1
    assert bit_string(first_code - 1, bits) == "1" + "0" * (bits - 1), "the code before the first is NaR"
    assert [Fraction(v) for v in values] == [decode(first_code + i, bits, es) for i in range(len(values))]


@all_tables
def test_ascending_and_symmetric(bits, es):
    values, boundaries, _ = tables(bits, es)
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values == [-v for v in reversed(values)]
    assert boundaries == [-b for b in reversed(boundaries)]
    assert values[len(values) // 2] == 0.0


@all_tables
def test_boundaries_are_the_values_of_one_bit_more(bits, es):
    values, boundaries, first_code = tables(bits, es)
    for i, (low, boundary, high) in enumerate(zip(values, boundaries, values[1:], strict=False)):
        if 0 in (low, high):
            assert boundary == 0, "nothing but zero rounds to zero"
        else:
            assert low < boundary < high
            assert Fraction(boundary) == decode(2 * (first_code + i) + 1, bits + 1, es), "exact in float64"


@all_tables
def test_one_bit_more_keeps_the_values(bits, es):
    if bits < 16:
        assert set(tables(bits, es)[0]) <= set(tables(bits + 1, es)[0])


def test_the_midpoint_is_arithmetic_where_only_fraction_bits_are_lost():
    values, boundaries, _ = _tapered.posit_tables(16, 2)
    one = values.index(1.0)
    assert boundaries[one] == 1 + 2.0**-12 and values[one + 1] == 1 + 2.0**-11
    assert boundaries[-1] == 2.0**54, "between 2^52 and 2^56 the extra bit is an exponent bit: the geometric mean"


@pytest.mark.parametrize(
    ("table", "code", "value"),
    [
        # Posit Standard 2022, table 2: minPos and maxPos are 2^-+(4n - 8), es = 2.
        (("posit", 8, 2), 0x01, Fraction(1, 2**24)),
        (("posit", 8, 2), 0x7F, 2**24),
        (("posit", 16, 2), 0x0001, Fraction(1, 2**56)),
        (("posit", 16, 2), 0x7FFF, 2**56),
        (("posit", 8, 2), 0x40, 1),
        (("posit", 8, 2), 0xC0, -1),
        # Gustafson and Yonemoto (2017), Beating Floating Point at its Own Game, figure 5: 16 bits, es = 3.
        (("posit", 16, 3), 0b0000110111011101, Fraction(477, 134217728)),
        # Value tables of Stillwater's universal: posit<4,0> and posit<4,1>.
        (("posit", 4, 0), 0b0111, 4),
        (("posit", 4, 0), 0b0011, Fraction(3, 4)),
        (("posit", 4, 0), 0b1011, Fraction(-3, 2)),
        (("posit", 4, 1), 0b0111, 16),
        (("posit", 4, 1), 0b0001, Fraction(1, 16)),
        # takum_linear8_to_float64 and takum_linear16_to_float64 of libtakum 1.0.1, which agree on all codes.
        (("takum", 8), 0x01, Fraction(1, 2**239)),
        (("takum", 8), 0x7F, 2**239),
        (("takum", 8), 0x40, 1),
        (("takum", 8), 0xC0, -1),
        (("takum", 16), 0x0001, Fraction(17, 16) / 2**255),
        (("takum", 16), 0x7FFF, Fraction(31, 16) * 2**254),
        (("takum", 16), 0x8001, -Fraction(31, 16) * 2**254),
    ],
)
def test_published_values(table, code, value):
    kind, bits, *es = table
    values, _, first_code = tables(bits, es[0] if kind == "posit" else None)
    assert Fraction(values[(code - first_code) % 2**bits]) == value


@pytest.mark.parametrize(
    ("bits", "x", "code"), [(8, math.pi, 74), (16, math.pi, 19016), (8, math.tau, 78), (16, math.tau, 20040)]
)
def test_rounding_agrees_with_the_constants_of_libtakum(bits, x, code):
    _, boundaries, first_code = _tapered.takum_tables(bits)
    assert (first_code + bisect(boundaries, x)) % 2**bits == code


@pytest.mark.parametrize(("bits", "es"), [(1, 2), (17, 2), (8, -1), (8, 4)])
def test_posit_refuses(bits, es):
    with pytest.raises(ValueError, match=f"posit: expected 2 to 16 bits and es from 0 to 3, got {bits} and {es}"):
        _tapered.posit_tables(bits, es)


@pytest.mark.parametrize("bits", [1, 17])
def test_takum_refuses(bits):
    with pytest.raises(ValueError, match=f"takum: expected 2 to 16 bits, got {bits}"):
        _tapered.takum_tables(bits)
