"""The equations of the laws: functions of (parameters, data), in jax.numpy."""

import jax.numpy as jnp


def _raise(x, exponent):
    """Returns x^exponent for x > 0; XLA vectorizes exp and hoists the logarithm of data, but calls pow one by one."""
    return jnp.exp(exponent * jnp.log(x))


def _unless(full, x, function):
    """Returns function(x), and 0 in rows of full precision, where its derivatives would be NaN: 0 times infinity."""
    return jnp.where(full, 0.0, function(jnp.where(full, 1.0, x)))


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
        bits = d[f"P_{x}"]
        lost = _unless(jnp.isinf(bits), bits, lambda bits, x=x: jnp.exp(-(bits / p[f"gamma_{x}"] + p[f"n_{x}"])))
        share = share * (1 - lost)
    return d["N"] * share


def post_training(p, d):
    size = p["C_T"] * _raise(d["D"], p["gamma_D"]) * _raise(effective(p, d), -p["gamma_N"])
    fewer = d["P_w"] - d["P_post"]
    kept = _unless(jnp.isinf(fewer), fewer, lambda fewer: jnp.exp(-p["C_w"] * fewer))
    return precision(p, d) + size * jnp.exp(-d["P_post"] / p["gamma_post"]) * (1 - kept)


def float_quantization(p, d):
    parameters, tokens = _raise(d["N"], -p["alpha"]), _raise(d["D"], p["beta"])
    bits = 1.0
    for x, exponent in (("E", "delta"), ("M", "nu")):
        bits = bits * _unless(jnp.isinf(d[x]), d[x] + 0.5, lambda x, exponent=exponent: _raise(x, -p[exponent]))
    error = tokens * parameters * jnp.log2(d["B"]) * bits / p["gamma"]
    return p["n"] * parameters + p["d"] / tokens + p["eps"] + error


def qat(p, d):
    group = _unless(d["G"] == 1, jnp.log2(d["G"]), lambda log_G: _raise(log_G, p["gamma_G"]))
    error = _raise(d["D"], p["gamma_D"]) * group * _raise(d["N"], -p["gamma_N"])
    return chinchilla(p, d) + p["k"] * error


def quest(p, d):
    return chinchilla(p, {**d, "N": d["N"] * p["eff"][d["format"]]})


def quartet(p, d):
    parameters, tokens = d["N"] * p["eff_N"][d["forward"]], d["D"] * p["eff_D"][d["backward"]]
    inner = p["A"] * _raise(parameters, -p["alpha"]) + p["B"] * _raise(tokens, -p["beta"])
    return _raise(inner, p["gamma"]) + p["E"]
