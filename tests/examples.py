"""The examples of README and the pages run: ``make check``, which runs those of docstrings too."""

import doctest
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page):
    """The pycon blocks of a page are one session."""
    text = page.read_text()
    blocks = re.finditer(r"^```pycon\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    runner, parser, names = doctest.DocTestRunner(verbose=False, optionflags=OPTIONS), doctest.DocTestParser(), {}
    report: list[str] = []
    for block in blocks:
        test = parser.get_doctest(block[1], names, page.name, str(page), text[: block.start(1)].count("\n"))
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs
    assert not runner.failures, "".join(report)
