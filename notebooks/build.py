"""Builds every ``NN_name.ipynb`` from the ``NN_name.py`` beside it, executed.

    python notebooks/build.py [NAME ...]           build all, or those whose file name contains a NAME
    python notebooks/build.py [NAME ...] --fast    run them in fast mode and write nothing here
    python notebooks/build.py [NAME ...] --jobs 2  two at a time

Fast mode sets QJAX_FAST=1, in which a study is smaller and saves its figures to a temporary directory. The exit status
is 1 if a study fails. A notebook that is built twice is the same file: cells are numbered, and neither times nor what
progress bars write to stderr are kept.
"""

import argparse
import functools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent


def executed(source: Path) -> nbformat.NotebookNode:
    """Returns the notebook of a source, executed."""
    notebook = nbformat.convert(jupytext.read(source), 4)
    options = {
        "kernel_name": "python3",
        "timeout": 1800,
        "resources": {"metadata": {"path": str(HERE)}},
        "coalesce_streams": True,
        "extra_arguments": ["--IPKernelApp.log_level=ERROR"],
    }
    NotebookClient(notebook, **options).execute()
    return notebook


def stable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Returns a notebook without what differs from one execution to the next."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def build(source: Path, fast: bool) -> bool:
    """Executes a source, writes the notebook unless in fast mode, and returns whether it failed."""
    start, failed = time.perf_counter(), False
    try:
        notebook = stable(executed(source))
    except CellExecutionError as error:
        failed = True
        print(error, file=sys.stderr)
    else:
        if not fast:
            nbformat.write(notebook, source.with_suffix(".ipynb"))
    print(f"{source.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()

    names = arguments.names or [""]
    sources = [s for s in sorted(HERE.glob("[0-9]*_*.py")) if any(name in s.name for name in names)]
    if not sources:
        parser.error(f"no notebook is named {' or '.join(names)}")
    os.environ["QJAX_FAST"] = "1" if arguments.fast else "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))

    # Each has a kernel, a process of its own, that the threads wait for.
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return int(any(list(pool.map(functools.partial(build, fast=arguments.fast), sources))))


if __name__ == "__main__":
    sys.exit(main())
