"""The laws from a shell.

    python -m qjax.laws list
    python -m qjax.laws fit runs.csv --law quartet --fix eff_N[bf16]=1 --fix eff_D[bf16]=1
    python -m qjax.laws ask split bits=8
    python -m qjax.laws ask loss N=1e9 D=2e10 --law chinchilla
    python -m qjax.laws ask allocation flops=1e21 bits=4 G=128 --law qat_w4a4

Questions are asked of the published constants, or of those that --set replaces.
"""

import argparse
import warnings

import numpy as np

from qjax import laws

_LAWS: dict[str, laws.Law] = {law.name: law for law in vars(laws).values() if isinstance(law, laws.Law)}
_QUESTIONS = {
    "loss": lambda model, **given: model(given),
    "split": laws.optimal_split,
    "critical-data": laws.critical_data_size,
    "precision": laws.optimal_precision,
    "allocation": laws.optimal_allocation,
    "effective-parameters": lambda model, **given: laws.effective_parameters(model, given),
    "iso-loss": laws.iso_loss,
}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}")
    return name, value


def _number(text: str) -> float | int | str:
    """Returns the number that a text is, or the text: a level."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _numbers(pairs: list[tuple[str, str]]) -> dict:
    return {name: _number(value) for name, value in pairs}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m qjax.laws", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the laws")
    fit = commands.add_parser("fit", help="fit a law to the runs in a CSV file")
    fit.add_argument("runs", help="a CSV file with a header")
    fit.add_argument("--law", required=True, choices=_LAWS)
    fit.add_argument("--loss", default="loss", help="the column of losses")
    fit.add_argument("--column", action="append", default=[], type=_pair, metavar="NAME=CSV", help="where names differ")
    fit.add_argument("--fix", action="append", default=[], type=_pair, metavar="PARAMETER=VALUE")
    fit.add_argument("--tie", action="append", default=None, type=_pair, metavar="A=B", help="in place of the law's ties")
    fit.add_argument("--delta", type=float, default=1e-3, help="Huber's width; inf is least squares, 0 the L1 limit")
    ask = commands.add_parser("ask", help="ask a law")
    ask.add_argument("question", choices=_QUESTIONS)
    ask.add_argument("given", nargs="*", type=_pair, metavar="name=value", help="what the question's function takes")
    ask.add_argument("--law", default="float_quantization", choices=_LAWS)
    ask.add_argument("--set", action="append", default=[], type=_pair, metavar="PARAMETER=VALUE", help="other constants")
    return main


def main(arguments: list[str] | None = None) -> None:
    commands = parser()
    options = commands.parse_args(arguments)
    try:
        if options.command == "list":
            for law in _LAWS.values():
                print(f"{law.name}\n    {law.equation}\n    {law.citation}")
        elif options.command == "fit":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # The table has them.
                result = laws.fit(
                    _LAWS[options.law],
                    options.runs,
                    loss=options.loss,
                    columns=dict(options.column),
                    delta=options.delta,
                    fixed=_numbers(options.fix),
                    tied=None if options.tie is None else dict(options.tie),
                )
            print(result)
        else:
            law = _LAWS[options.law]
            constants = {**dict(law.constants), **_numbers(options.set)}
            print(_answer(_QUESTIONS[options.question](law.model(**constants), **_numbers(options.given))))
    except (TypeError, ValueError, OSError) as error:
        commands.error(str(error))


def _answer(value) -> str:
    if hasattr(value, "_asdict"):
        return "  ".join(f"{name} {item:.6g}" for name, item in value._asdict().items())
    return f"{np.asarray(value):.6g}"


if __name__ == "__main__":
    main()
