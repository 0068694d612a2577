"""The named formats, one row each, and the grammar of names."""

import ast
import difflib
import functools
import re

from qjax.formats._codebook import Codebook, dynamic, midrise, posit, powers_of_two, takum
from qjax.formats._fixed import Fixed
from qjax.formats._float import Float
from qjax.formats._scaled import Rms, Scaled

Format = Float | Fixed | Codebook | Scaled

FP64 = Float(11, 52)
FP32 = Float(8, 23)
TF32 = Float(8, 10)
BF16 = Float(8, 7)
FP16 = Float(5, 10)
DLFLOAT16 = Float(6, 9, specials="fn", subnormals="normal")
E5M2 = Float(5, 2)
E4M3 = Float(4, 3, specials="fn")
E3M4 = Float(3, 4)
E3M2 = Float(3, 2, specials="finite")
E2M3 = Float(2, 3, specials="finite")
E2M1 = Float(2, 1, specials="finite")
E8M0 = Float(8, 0, specials="fn", signed=False, subnormals="normal")
UE5M3 = Float(5, 3, signed=False)
# The NormalFloat of QLoRA: Dettmers et al. (2023), https://arxiv.org/abs/2305.14314, appendix E, in float32.
NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "nf4",
)
TERNARY = Codebook((-1.0, 0.0, 1.0), "ternary")
# The code is the sign bit, so zero, on the boundary, goes to the even code of +1.
BINARY = Codebook((-1.0, 1.0), "binary", first_code=1)

MXFP8_E4M3 = Scaled(E4M3, E8M0, 32)
MXFP8_E5M2 = Scaled(E5M2, E8M0, 32)
MXFP6_E2M3 = Scaled(E2M3, E8M0, 32)
MXFP6_E3M2 = Scaled(E3M2, E8M0, 32)
MXFP4 = Scaled(E2M1, E8M0, 32)
MXINT8 = Scaled(Fixed(8, 6, symmetric=True), E8M0, 32)
NVFP4 = Scaled(Scaled(E2M1, E4M3, 16), FP32, None)
DFP8 = Scaled(Fixed(8), E8M0, None)
DFP16 = Scaled(Fixed(16), E8M0, None)

_NAMED: dict[str, Format] = {
    "fp64": FP64,
    "fp32": FP32,
    "tf32": TF32,
    "bf16": BF16,
    "fp16": FP16,
    "dlfloat16": DLFLOAT16,
    "e5m2": E5M2,
    "e4m3": E4M3,
    "e3m4": E3M4,
    "e3m2": E3M2,
    "e2m3": E2M3,
    "e2m1": E2M1,
    "e8m0": E8M0,
    "ue8m0": E8M0,
    "ue5m3": UE5M3,
    "float64": FP64,
    "float32": FP32,
    "bfloat16": BF16,
    "float16": FP16,
    "float8_e3m4": E3M4,
    "float8_e4m3": Float(4, 3),
    "float8_e4m3b11fnuz": Float(4, 3, bias=11, specials="fnuz"),
    "float8_e4m3fn": E4M3,
    "float8_e4m3fnuz": Float(4, 3, specials="fnuz"),
    "float8_e5m2": E5M2,
    "float8_e5m2fnuz": Float(5, 2, specials="fnuz"),
    "float8_e8m0fnu": E8M0,
    "float6_e2m3fn": E2M3,
    "float6_e3m2fn": E3M2,
    "float4_e2m1fn": E2M1,
    "nf4": NF4,
    "ternary": TERNARY,
    "binary": BINARY,
    "mxfp8_e4m3": MXFP8_E4M3,
    "mxfp8_e5m2": MXFP8_E5M2,
    "mxfp6_e2m3": MXFP6_E2M3,
    "mxfp6_e3m2": MXFP6_E3M2,
    "mxfp4": MXFP4,
    "mxint8": MXINT8,
    "nvfp4": NVFP4,
    "dfp8": DFP8,
    "dfp16": DFP16,
}


def _float(unsigned: str, exponent: str, mantissa: str, bias: str, specials: str, flush: str) -> Float:
    return Float(
        int(exponent),
        int(mantissa),
        bias=int(bias) if bias else None,
        specials=specials or ("ieee" if int(mantissa) else "fn"),  # type: ignore[arg-type]
        signed=not unsigned,
        subnormals=not flush,
    )


def _p3109(bits: str, precision: str, sign: str, domain: str) -> Float:
    k, p, signed = int(bits), int(precision), sign == "s"
    exponent_bits = k - p + (not signed)
    specials = "extended" if domain == "e" else "fnuz" if signed else "fn"
    return Float(exponent_bits, p - 1, bias=2 ** (exponent_bits - 1), specials=specials, signed=signed)


def _integer(unsigned: str, bits: str) -> Fixed:
    return Fixed(int(bits), signed=not unsigned)


def _q(unsigned: str, integer: str, fraction: str) -> Fixed:
    return Fixed(int(integer) + int(fraction), int(fraction), signed=not unsigned)


def _scaled(element: str, block: str) -> Scaled:
    shape = (
        "axis"
        if block == "channel"
        else None
        if block == "tensor"
        else int(block[1:])
        if block[0] == "g"
        else tuple(map(int, block.split("x")))
    )
    inner = format(element)
    if isinstance(inner, Fixed) and inner.signed:
        inner = Fixed(inner.bits, inner.fraction_bits, symmetric=True)
    return Scaled(inner, FP32, shape, zero_point=inner if isinstance(inner, Fixed) and not inner.signed else None)  # type: ignore[arg-type]


# Each row: a pattern of names, and the function from its groups to the format.
_GRAMMAR = (
    (r"(u?)e(\d+)m(\d+)(?:b(-?\d+))?(ieee|fnuz|fn|finite|extended)?(_nosub)?", _float),
    (r"binary(\d+)p(\d+)([su])([ef])", _p3109),
    (r"(u?)int(\d+)", _integer),
    (r"(u?)q(\d+)\.(\d+)", _q),
    (r"posit(\d+)(?:es(\d))?", lambda bits, es: posit(int(bits), int(es or 2))),
    (r"takum(\d+)", lambda bits: takum(int(bits))),
    (r"pow2_(\d+)", lambda bits: powers_of_two(int(bits))),
    (r"midrise(\d)", lambda bits: midrise(int(bits))),
    (r"(u?)dynamic(\d)", lambda unsigned, bits: dynamic(int(bits), not unsigned)),
    (r"(.+)_(channel|tensor|g\d+|\d+(?:x\d+)+)", _scaled),
)


def format(name: "str | Format") -> Format:
    """Returns the format of a name; a format is returned as it is.

    Names: those of ml_dtypes (``float8_e4m3fn``, ``bfloat16``, ``int4``); short ones (``e4m3`` and the other OCP
    formats, ``bf16``, ``fp16``, ``tf32``, ``mxfp4``, ``nvfp4``, ``nf4``, ``dfp16`` ...); and the grammar

    - ``[u]eXmY[bB][ieee|fn|fnuz|finite|extended][_nosub]``: X exponent and Y mantissa bits, bias B, u for unsigned,
      _nosub without subnormals; "ieee" if nothing is said ("fn" if Y is 0), but for the OCP names above;
    - ``binary{k}p{p}{s|u}{e|f}``: IEEE P3109, k bits, precision p, signed or unsigned, extended or finite;
    - ``[u]intN`` and ``[u]qM.N``: integers, and fixed point of M + N bits, the sign counted in M;
    - ``positN[esE]``, ``takumN``, ``pow2_N``, ``midriseN``, ``[u]dynamicN``: N bits;
    - a name followed by ``_channel``, ``_tensor``, ``_gN`` (groups of N) or ``_AxB`` (tiles): float32 scales from the
      largest magnitude; intN elements are symmetric, uintN ones have a zero point.

    What a format prints stands for it too, and is read without being run: ``"Fixed(4, symmetric=True)"``.

    Raises:
      ValueError: for an unknown name, with the nearest known ones.
      TypeError: if ``name`` is neither a name nor a format.

    >>> import qjax
    >>> qjax.format("e4m3")
    Float(4, 3, specials='fn')
    >>> qjax.format("int4_g128")
    Scaled(Fixed(4, symmetric=True), Float(8, 23), 128)
    """
    if isinstance(name, Float | Fixed | Codebook | Scaled):
        return name
    if not isinstance(name, str):
        raise TypeError(f"format: expected a name or a format, got {name!r}.")
    return _resolve(name)


@functools.cache
def _resolve(name: str) -> Format:
    lower = name.lower()
    if lower in _NAMED:
        return _NAMED[lower]
    for pattern, build in _GRAMMAR:
        if match := re.fullmatch(pattern, lower):
            return build(*(group or "" for group in match.groups()))
    if "(" in name:
        return _printed(name)
    near = difflib.get_close_matches(lower, _NAMED, n=4, cutoff=0.3) or ["e4m3", "bf16", "mxfp4", "int8"]
    raise ValueError(
        f"format: unknown name {name!r}; the nearest are {', '.join(near)}. "
        "See qjax.format for the grammar (eXmY, qM.N, intN, binary8p3se ...)."
    )


_PRINTED = {"Float": Float, "Fixed": Fixed, "Codebook": Codebook, "Scaled": Scaled, "Rms": Rms, "format": format}


def _printed(text: str) -> Format:
    """Returns the format that prints a text."""

    def value(node: ast.expr):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in _PRINTED:
                options = {keyword.arg or "": value(keyword.value) for keyword in node.keywords}
                return _PRINTED[name](*map(value, node.args), **options)
            case ast.Tuple():
                return tuple(map(value, node.elts))
        return ast.literal_eval(node)

    try:
        fmt = value(ast.parse(text, mode="eval").body)
        if not isinstance(fmt, Format):
            raise TypeError("it is no format")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"format: {text[:100]!r} is not what a format prints: {error}.") from None
    return fmt


def format_names() -> tuple[str, ...]:
    """Returns the names that are listed one by one; the grammar of ``format`` has many more.

    >>> import qjax
    >>> "mxfp4" in qjax.format_names()
    True
    """
    return tuple(_NAMED)
