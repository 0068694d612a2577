"""The equations of the laws: functions of (parameters, data), in jax.numpy."""

import jax.numpy as jnp


def _raise(x, exponent):
    """Returns x^exponent for x > 0; XLA vectorizes exp and hoists the logarithm of data, but calls pow one by one."""
    return jnp.exp(exponent * jnp.log(x))


def chinchilla(p, d):
    return p["A"] * _raise(d["N"], -p["alpha"]) + p["B"] * _raise(d["D"], -p["beta"]) + p["E"]


def power(p, d):
    return p["c"] * _raise(d["x"], -p["alpha"])


def saturating_power(p, d):
    return power(p, d) + p["E"]


def precision(p, d):
    return chinchilla(p, {**d, "N": effective(p, d)})


def effective(p, d):
    share = 1.0
    for x in ("w", "a", "kv"):
        share = share * -jnp.expm1(-(d[f"P_{x}"] / p[f"gamma_{x}"] + p[f"n_{x}"]))
    return d["N"] * share


def post_training(p, d):
    size = p["C_T"] * _raise(d["D"], p["gamma_D"]) * _raise(effective(p, d), -p["gamma_N"])
    return precision(p, d) - size * jnp.exp(-d["P_post"] / p["gamma_post"]) * jnp.expm1(
        -p["C_w"] * (d["P_w"] - d["P_post"])
    )


def float_quantization(p, d):
    parameters, tokens = _raise(d["N"], -p["alpha"]), _raise(d["D"], p["beta"])
    bits = _raise(d["E"] + 0.5, -p["delta"]) * _raise(d["M"] + 0.5, -p["nu"])
    error = tokens * parameters * jnp.log2(d["B"]) * bits / p["gamma"]
    return p["n"] * parameters + p["d"] / tokens + p["eps"] + error


def qat(p, d):
    error = _raise(d["D"], p["gamma_D"]) * _raise(jnp.log2(d["G"]), p["gamma_G"]) * _raise(d["N"], -p["gamma_N"])
    return chinchilla(p, d) + p["k"] * error


def quest(p, d):
    return chinchilla(p, {**d, "N": d["N"] * p["eff"][d["format"]]})


def quartet(p, d):
    parameters, tokens = d["N"] * p["eff_N"][d["forward"]], d["D"] * p["eff_D"][d["backward"]]
    inner = p["A"] * _raise(parameters, -p["alpha"]) + p["B"] * _raise(tokens, -p["beta"])
    return _raise(inner, p["gamma"]) + p["E"]
