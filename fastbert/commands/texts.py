"""Real texts without a download: the docstrings of Python's standard library, from one word to long pages."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

# Tests have little prose, and installed packages differ between machines.
_SKIPPED = {"test", "tests", "site-packages", "dist-packages"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(limit: int | None = None) -> list[str]:
    """The first `limit` distinct docstrings (None: all), in the order of the files' paths.

    The sources are parsed, not imported. A version of Python gives the same texts on every machine.
    """
    return list(islice(_distinct_docstrings(), limit))


def _distinct_docstrings() -> Iterator[str]:
    seen = set()
    for path in _sources(Path(sysconfig.get_path("stdlib"))):
        for text in _docstrings_of(path):
            if text not in seen:
                seen.add(text)
                yield text


def _sources(folder: Path) -> Iterator[Path]:
    """The Python files below a folder, lazily: with installed packages there may be tens of thousands."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in _SKIPPED and not path.is_symlink():
                yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _docstrings_of(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            return
    nodes = (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    yield from filter(None, map(ast.get_docstring, nodes))
