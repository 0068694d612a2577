"""The statistics of a checkpoint, from a shell.

    python -m qjax.stats model.safetensors --formats e4m3,mxfp4,int8_channel
    python -m qjax.stats model.safetensors --formats nvfp4 --tensors '.*attention.*weight' --csv nvfp4.csv

Every float tensor is rounded to each format, with blocks along its last axis, and read a piece at a time. Names without
a scale mean none: int8 are the integers from -128 to 127; int8_channel and int8_tensor have scales.
"""

import argparse
import csv

from qjax._safetensors import opened
from qjax.stats._files import chosen, measure_file, size_of
from qjax.stats._report import table

COLUMNS = ("sqnr", "underflows", "saturations", "error_median", "error_99", "rms", "kurtosis", "outliers")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m qjax.stats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    main.add_argument("file", help="a safetensors file")
    main.add_argument("--formats", default="e4m3,mxfp4,int8_channel", help="names, with commas between them")
    main.add_argument("--tensors", default=".*", metavar="REGEX", help="measure those of which it matches the name")
    main.add_argument("--csv", metavar="FILE", help="write all statistics to a CSV file, too")
    return main


def main(arguments: list[str] | None = None) -> None:
    from tqdm import tqdm

    command = parser()
    options = command.parse_args(arguments)
    try:
        with opened("measure_file", options.file) as file:
            slices = [file.get_slice(name) for name in chosen(file, options.file, options.tensors)]
            shapes = [list(s.get_shape()) for s in slices]
        # To stderr, and only to a terminal.
        with tqdm(unit="B", unit_scale=True, disable=None, total=sum(map(size_of, slices))) as bar:
            formats = options.formats.split(",")
            found = measure_file(options.file, formats, tensors=options.tensors, progress=bar.update)
    except (TypeError, ValueError, OSError, ImportError) as error:
        command.error(str(error))
    named = dict(zip(dict.fromkeys(name for name, _ in found), shapes, strict=True))
    rows = [
        {"tensor": name, "shape": "x".join(map(str, named[name])) or "scalar", "format": label, **s.summary()}
        for (name, label), s in found.items()
    ]
    print(table(rows, ("tensor", "shape", "format", *COLUMNS)))
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
