"""The laws of the literature, each one value. Numbers of parameters N, of tokens D, losses in nats a token."""

import dataclasses
import math

from qjax.laws import _equations as equations
from qjax.laws._law import Column, Law, Parameter

_N = Column("N", "parameters of the model")
_D = Column("D", "tokens trained on")

# The grid of Hoffmann et al.: 6 x 6 x 5 x 5 x 5 = 4500 starts of the Chinchilla form.
_A = Parameter("A", tuple(math.exp(a) for a in range(0, 30, 5)), (1e-6, 1e15), needs=("N",))
_B = Parameter("B", tuple(math.exp(b) for b in range(0, 30, 5)), (1e-6, 1e15), needs=("D",))
_E = Parameter("E", tuple(math.exp(e / 2) for e in range(-2, 3)))
_ALPHA = Parameter("alpha", (0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 4.0), log=False, needs=("N",))
_BETA = Parameter("beta", (0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 4.0), log=False, needs=("D",))
# The same five for laws with more parameters, whose full grid would be too large: 2 x 2 x 2 x 2 = 16 starts.
_FEW = {"A": (math.exp(5), math.exp(10)), "B": (math.exp(5), math.exp(10)), "E": (1.5,)}
_FEW_EXPONENTS = (0.25, 0.5)


def _few(*parameters: Parameter) -> tuple[Parameter, ...]:
    return tuple(dataclasses.replace(p, starts=_FEW.get(p.name, _FEW_EXPONENTS)) for p in parameters)


_X = Column("x", "any positive quantity: parameters, tokens, FLOPs")
_POWER = (
    Parameter("c", (1.0, 1e2, 1e4), (1e-9, 1e15), needs=("x",)),
    Parameter("alpha", (0.05, 0.2, 0.5, 1.0), (0.0, 4.0), log=False, needs=("x",)),
)
_KAPLAN = "Kaplan et al. (2020), https://arxiv.org/abs/2001.08361, section 1.2"
POWER = Law("power", "L = c / x^alpha", equations.power, (_X,), _POWER, _KAPLAN)
SATURATING_POWER = Law(
    "saturating_power", "L = c / x^alpha + E", equations.saturating_power, (_X,), (*_POWER, _E), _KAPLAN
)

CHINCHILLA = Law(
    "chinchilla",
    "L = A / N^alpha + B / D^beta + E",
    equations.chinchilla,
    (_N, _D),
    (_A, _B, _E, _ALPHA, _BETA),
    "Hoffmann et al. (2022), https://arxiv.org/abs/2203.15556, approach 3; constants with the digits of its TeX source",
    tuple(
        zip(
            ("A", "B", "E", "alpha", "beta"),
            (math.exp(6.0073404), math.exp(6.0179186), math.exp(0.5267228), 0.33917084, 0.2849083),
            strict=True,
        )
    ),
)
CHINCHILLA_REPLICATION = dataclasses.replace(
    CHINCHILLA,
    name="chinchilla_replication",
    citation="Besiroglu et al. (2024), https://arxiv.org/abs/2404.10102; they fitted the width of the Huber loss too, "
    "which fell to nothing: the constants are those of least absolute deviations, not of delta = 1e-3",
    constants=(("A", 482.01), ("B", 2085.43), ("E", 1.8172), ("alpha", 0.3478), ("beta", 0.3658)),
)

_BITS = tuple(
    Column(f"P_{x}", f"bits of the {what} in training, inf for full precision")
    for x, what in (("w", "weights"), ("a", "activations"), ("kv", "keys and values"))
)
_OFFSETS = tuple(
    Parameter(f"{letter}_{x}", (0.3, 1.0, 3.0) if letter == "n" else (2.0,), (1e-6, 100.0), needs=(f"P_{x}",))
    for x in ("w", "a", "kv")
    for letter in ("gamma", "n")
)
_PRECISION = {
    "A": 4.299e3,
    "B": 1.806e4,
    "E": 2.7648,
    "alpha": 0.4965,
    "beta": 0.4965,
    "gamma_w": 2.6745,
    "n_w": 0.3037,
    "gamma_a": 2.2102,
    "n_a": 1.4072,
    "gamma_kv": 0.9578,
    "n_kv": 2.4185,
}
PRECISION = Law(
    "precision",
    "L = A / N_eff^alpha + B / D^beta + E,  N_eff = N prod_x (1 - exp(-P_x / gamma_x - n_x)),  x = w, a, kv",
    equations.precision,
    (_N, _D, *_BITS),
    (*_few(_A, _B, _E, _ALPHA, _BETA), *_OFFSETS),
    "Kumar et al. (2024), Scaling laws for precision, https://arxiv.org/abs/2411.04330, section 4; the sign of n_x is "
    "the one that its constants need",
    tuple(_PRECISION.items()),
    (("beta", "alpha"),),
    (("P_w", math.inf), ("P_a", math.inf), ("P_kv", math.inf)),
)
POST_TRAINING = dataclasses.replace(
    PRECISION,
    name="post_training",
    equation=PRECISION.equation + ";  + C_T D^gamma_D / N_eff^gamma_N exp(-P_post / gamma_post) "
    "(1 - exp(-C_w (P_w - P_post)))",
    function=equations.post_training,
    columns=(*PRECISION.columns, Column("P_post", "bits of the weights after training, at most P_w")),
    parameters=(
        *PRECISION.parameters,
        Parameter("C_T", (0.1,), (1e-9, 1e6)),
        Parameter("gamma_D", (0.5,), (0.0, 4.0), log=False, needs=("D",)),
        Parameter("gamma_N", (0.5,), (0.0, 4.0), log=False, needs=("N",)),
        Parameter("gamma_post", (0.5, 1.0), (1e-3, 100.0), needs=("P_post",)),
        Parameter("C_w", (1.0,), (1e-3, 100.0), needs=("P_w",)),
    ),
    citation="Kumar et al. (2024), https://arxiv.org/abs/2411.04330, section 5; weights alone are quantized after "
    "training here, and the constant that the paper prints as b is C_w",
    constants=(
        *_PRECISION.items(),
        ("C_T", 0.0598),
        ("gamma_D", 0.5068),
        ("gamma_N", 0.3439),
        ("gamma_post", 0.5907),
        ("C_w", 1.1277),
    ),
)

FLOAT_QUANTIZATION = Law(
    "float_quantization",
    "L = n / N^alpha + d / D^beta + eps + D^beta log2(B) / (N^alpha gamma (E + 1/2)^delta (M + 1/2)^nu)",
    equations.float_quantization,
    (
        _N,
        _D,
        Column("E", "exponent bits", -0.5),
        Column("M", "mantissa bits, the hidden bit excluded", -0.5),
        Column("B", "elements that share a scale; 2^13.1567 stands for a channel", 1.0),
    ),
    (
        Parameter("n", (1.0, *_FEW["A"]), (1e-6, 1e15), needs=("N",)),
        *_few(_ALPHA),
        Parameter("d", (1.0, *_FEW["B"]), (1e-6, 1e15), needs=("D",)),
        *_few(_BETA),
        Parameter("eps", (1.5,)),
        Parameter("gamma", (10.0, 1e3, 1e5), (1e-6, 1e15)),
        Parameter("delta", (2.0,), (0.0, 20.0), log=False, needs=("E",)),
        Parameter("nu", (2.0,), (0.0, 20.0), log=False, needs=("M",)),
    ),
    "Sun et al. (2025), Scaling laws for floating-point quantization training, https://arxiv.org/abs/2501.02423",
    (
        ("n", 69.2343),
        ("alpha", 0.2368),
        ("d", 68973.0621),
        ("beta", 0.5162),
        ("eps", 1.9061),
        ("gamma", 11334.5197),
        ("delta", 3.1926),
        ("nu", 2.9543),
    ),
    reference=(("E", math.inf), ("M", math.inf)),
)

_QAT = (("A", 237.7042), ("B", 596.2490), ("E", 1.9279), ("alpha", 0.3022), ("beta", 0.3022))


def _qat_law(name: str, what: str, k: float, gamma_N: float, gamma_D: float, gamma_G: float) -> Law:
    return Law(
        name,
        "L = A / N^alpha + B / D^beta + E + k D^gamma_D log2(G)^gamma_G / N^gamma_N",
        equations.qat,
        (_N, _D, Column("G", "elements that share a scale", 1.0)),
        (
            *_few(_A, _B, _E, _ALPHA, _BETA),
            Parameter("k", (0.1, 1.0), (1e-9, 1e6)),
            Parameter("gamma_N", (0.2, 0.4), (0.0, 4.0), log=False, needs=("N",)),
            Parameter("gamma_D", (0.05,), (0.0, 4.0), log=False, needs=("D",)),
            Parameter("gamma_G", (0.3, 1.0), (0.0, 10.0), log=False, needs=("G",)),
        ),
        f"Chen et al. (2025), Scaling law for quantization-aware training, https://arxiv.org/abs/2505.14302; {what}",
        (*_QAT, ("k", k), ("gamma_N", gamma_N), ("gamma_D", gamma_D), ("gamma_G", gamma_G)),
        (("beta", "alpha"),),
        (("G", 1.0),),
    )


QAT_W4A4 = _qat_law("qat_w4a4", "4-bit weights and activations", 0.1582, 0.2186, 0.0745, 0.7779)
QAT_W4A16 = _qat_law("qat_w4a16", "4-bit weights", 0.2522, 0.3589, 0.1610, 0.3533)
QAT_W16A4 = _qat_law("qat_w16a4", "4-bit activations", 0.1004, 0.1816, 0.0331, 0.9812)
QAT_W4A4_FC2_8BIT = _qat_law("qat_w4a4_fc2_8bit", "4 bits, the input of FC2 in 8", 0.3519, 0.2637, 0.0964, 0.3407)
QAT_W16A4_FC2_8BIT = _qat_law(
    "qat_w16a4_fc2_8bit",
    "4-bit activations, the input of FC2 in 8; gamma_G is that of the table, the text has .4471",
    0.1273,
    0.2347,
    0.0827,
    0.4491,
)

QUEST = Law(
    "quest",
    "L = A / (N eff[format])^alpha + B / D^beta + E",
    equations.quest,
    (_N, _D, Column("format", "what weights and activations are rounded to", category=True)),
    (*_few(_A, _B, _E, _ALPHA, _BETA), Parameter("eff", (0.5,), (1e-3, 4.0), per="format")),
    "Panferov et al. (2025), QuEST, https://arxiv.org/abs/2502.05003, section 4; constants: least squares on the logs "
    "of the losses of its 104 public runs, of which only the efficiencies are well determined",
    tuple(
        {
            "A": 8.134,
            "B": 86.44,
            "E": 0.0,
            "alpha": 0.0627,
            "beta": 0.2413,
            "eff[bf16]": 1.0,
            "eff[w8a8]": 1.0162,
            "eff[w4a4]": 0.6919,
            "eff[w3a3]": 0.4332,
            "eff[w2a2]": 0.1519,
            "eff[w1a1]": 0.0205,
            "eff[fp4]": 0.6297,
            "eff[w4a4_2:4]": 0.3812,
            "eff[w4]": 0.8405,
            "eff[w3]": 0.6531,
            "eff[w2]": 0.4137,
            "eff[w1]": 0.1384,
        }.items()
    ),
)
QUARTET = Law(
    "quartet",
    "L = (A / (N eff_N[forward])^alpha + B / (D eff_D[backward])^beta)^gamma + E",
    equations.quartet,
    (
        _N,
        _D,
        Column("forward", "format of the forward pass", category=True),
        Column("backward", "format of the backward pass", category=True),
    ),
    (
        *_few(_A, _B, _E, _ALPHA, _BETA),
        Parameter("gamma", (0.3, 1.0), (1e-2, 10.0)),
        Parameter("eff_N", (0.5,), (1e-3, 4.0), per="forward"),
        Parameter("eff_D", (0.5,), (1e-3, 4.0), per="backward"),
    ),
    "Castro et al. (2025), Quartet, https://arxiv.org/abs/2505.14669, section 4 and table 6",
    tuple(
        {
            "A": 1.5237e5,
            "B": 5.2546e5,
            "E": 1.3481,
            "alpha": 0.5886,
            "beta": 0.5440,
            "gamma": 0.2739,
            "eff_N[bf16]": 1.0,
            "eff_N[quest]": 0.6478,
            "eff_N[nearest]": 0.6076,
            "eff_N[stochastic]": 0.4353,
            "eff_D[bf16]": 1.0,
            "eff_D[nearest]": 0.9270,
            "eff_D[stochastic]": 0.8918,
        }.items()
    ),
)
