"""The value tables of posits and takums, whose precision tapers off from one."""

import math
from collections.abc import Callable

Tables = tuple[list[float], list[float], int]


def _posit(code: int, bits: int, es: int) -> float:
    """Returns the value of a positive posit code: regime, exponent, fraction after the sign bit."""
    digits = f"{code:0{bits}b}"[1:]
    run = len(digits) - len(digits.lstrip(digits[0]))
    regime = run - 1 if digits[0] == "1" else -run
    tail = digits[run + 1 :]
    exponent = int(tail[:es].ljust(es, "0") or "0", 2)
    fraction = tail[es:]
    return math.ldexp(2 ** len(fraction) + int(fraction or "0", 2), regime * 2**es + exponent - len(fraction))


def _takum(code: int, bits: int) -> float:
    """Returns the value of a positive linear takum code: direction, regime, characteristic, mantissa after the sign."""
    digits = f"{code:0{bits}b}".ljust(12, "0")
    regime = int(digits[2:5], 2)
    length = regime if digits[1] == "1" else 7 - regime
    characteristic = int(digits[5 : 5 + length] or "0", 2) + (
        2**length - 1 if digits[1] == "1" else 1 - 2 ** (length + 1)
    )
    mantissa = digits[5 + length :]
    return math.ldexp(2 ** len(mantissa) + int(mantissa or "0", 2), characteristic - len(mantissa))


def _tables(value: Callable[[int, int], float], bits: int) -> Tables:
    """Returns (values, boundaries, first code) of a format whose codes are in two's complement order.

    The boundary between two neighbours is the value of one bit more between them, and zero next to zero.
    """
    positive = [value(code, bits) for code in range(1, 2 ** (bits - 1))]
    between = [value(2 * code + 1, bits + 1) for code in range(1, 2 ** (bits - 1) - 1)]
    values = [-v for v in reversed(positive)] + [0.0] + positive
    boundaries = [-b for b in reversed(between)] + [0.0, 0.0] + between
    return values, boundaries, 2 ** (bits - 1) + 1


def posit_tables(bits: int, es: int) -> Tables:
    """Returns (values, boundaries, first code) of a posit format.

    >>> values, boundaries, first_code = posit_tables(8, 2)
    >>> values[-1] == 2.0**24, len(values), first_code
    (True, 255, 129)
    """
    if not (2 <= bits <= 16 and 0 <= es <= 3):
        raise ValueError(f"posit: expected 2 to 16 bits and es from 0 to 3, got {bits} and {es}.")
    return _tables(lambda code, width: _posit(code, width, es), bits)


def takum_tables(bits: int) -> Tables:
    """Returns (values, boundaries, first code) of a linear takum format.

    >>> values, boundaries, first_code = takum_tables(16)
    >>> values[-1] == 2.0**254 * (1 + 15 / 16), len(values)
    (True, 65535)
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"takum: expected 2 to 16 bits, got {bits}.")
    return _tables(_takum, bits)
