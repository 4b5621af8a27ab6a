"""Every mutant of `make mutants` applies, and its test exists."""

import ast
from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, applied

TESTS = {
    f"{path.parent.name}/{path.name}::{node.name}"
    for path in Path(__file__).parent.parent.glob("*/test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_names_a_test(mutant):
    text = applied(mutant, (ROOT / mutant.file).read_text())
    if mutant.file.endswith(".py"):
        compile(text, mutant.file, "exec")
    assert mutant.test.split("[")[0] in TESTS


def test_names_of_mutants_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
