"""The value tables of posits and linear takums, whose precision tapers off away from one."""

import math
from collections.abc import Callable

Tables = tuple[list[float], list[float], int]


def _posit(code: int, bits: int, es: int) -> float:
    """Returns the value of a positive posit code.

    After the sign: a run of equal bits and the bit that ends it, ``es`` exponent bits, the fraction. Bits that do not
    fit are zero. A run of k ones means the regime k - 1, a run of k zeros -k.
    """
    ones = code >> (bits - 2)
    run = bits - 1 - (code ^ ones * (2 ** (bits - 1) - 1)).bit_length()
    regime = run - 1 if ones else -run
    left = max(bits - 2 - run, 0)
    fraction_bits = max(left - es, 0)
    tail = code % 2**left << max(es - left, 0)
    exponent, fraction = divmod(tail, 2**fraction_bits)
    return math.ldexp(2**fraction_bits + fraction, regime * 2**es + exponent - fraction_bits)


def _takum(code: int, bits: int) -> float:
    """Returns the value of a positive linear takum code.

    After the sign: the direction D, 3 regime bits R, the characteristic, the mantissa. The characteristic has r bits, R
    of them if D = 1 and 7 - R if D = 0, which count up from ``2^r - 1`` or from ``1 - 2^(r + 1)``. A code of fewer than
    12 bits is extended with zeros.
    """
    width = max(bits, 12)
    code <<= width - bits
    up, regime = divmod(code >> (width - 5), 8)
    length = regime if up else 7 - regime
    fraction_bits = width - 5 - length
    count, fraction = divmod(code % 2 ** (width - 5), 2**fraction_bits)
    characteristic = count + (2**length - 1 if up else 1 - 2 ** (length + 1))
    return math.ldexp(2**fraction_bits + fraction, characteristic - fraction_bits)


def _tables(value: Callable[[int, int], float], bits: int) -> Tables:
    """Returns (values, boundaries, first code), given the value of a positive code of some width.

    Codes are in two's complement order, so negation mirrors both tables. The boundary between two neighbours is the
    number of one bit more between them. Next to zero it is zero: nothing else rounds to zero.
    """
    positive = [value(code, bits) for code in range(1, 2 ** (bits - 1))]
    between = [value(2 * code + 1, bits + 1) for code in range(1, 2 ** (bits - 1) - 1)]
    values = [-v for v in reversed(positive)] + [0.0] + positive
    boundaries = [-b for b in reversed(between)] + [0.0, 0.0] + between
    return values, boundaries, 2 ** (bits - 1) + 1


def posit_tables(bits: int, es: int) -> Tables:
    """Returns the tables of a posit format; all numbers are exact.

    Args:
      bits: the width of a code, 2 to 16.
      es: the number of exponent bits, 0 to 3; 2 in the standard, other values in its drafts.

    Returns:
      values: the values but NaR, ascending.
      boundaries: ``boundaries[i]`` is where rounding to nearest changes from ``values[i]`` to ``values[i + 1]``.
      first_code: the code of ``values[0]``, the one after NaR.

    Raises:
      ValueError: if an argument is out of range.

    >>> values, boundaries, first_code = posit_tables(8, 2)
    >>> values[-1] == 2.0**24, values[128] == 2.0**-24, len(values), first_code
    (True, True, 255, 129)
    >>> boundaries[-1] == 2.0**22
    True

    Source: Posit Working Group (2022), Standard for Posit Arithmetic, sections 3 and 4.1.
    """
    if not (2 <= bits <= 16 and 0 <= es <= 3):
        raise ValueError(f"posit: expected 2 to 16 bits and es from 0 to 3, got {bits} and {es}.")
    return _tables(lambda code, width: _posit(code, width, es), bits)


def takum_tables(bits: int) -> Tables:
    """Returns the tables of a linear takum format; all numbers are exact.

    Args:
      bits: the width of a code, 2 to 16.

    Returns:
      The values, boundaries and first code, as in ``posit_tables``.

    Raises:
      ValueError: if ``bits`` is out of range.

    >>> values, boundaries, first_code = takum_tables(16)
    >>> values[-1] == 2.0**254 * (1 + 15 / 16), len(values), first_code
    (True, 65535, 32769)

    Source: Hunhold (2024), Beating Posits at Their Own Game: Takum Arithmetic, https://arxiv.org/abs/2404.18603.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"takum: expected 2 to 16 bits, got {bits}.")
    return _tables(_takum, bits)
