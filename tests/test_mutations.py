"""The table of mutations keeps up with the package; ``python -m benchmarks.mutations`` runs them."""

import ast
from pathlib import Path

import pytest

from benchmarks.mutations import MUTATIONS, ROOT, occurrences


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_has_its_place_and_its_tests(name: str) -> None:
    mutation = MUTATIONS[name]
    assert occurrences(mutation) == 1
    assert mutation.replacement != mutation.text
    assert mutation.tests
    for test in mutation.tests:
        file, function = test.split("[")[0].split("::")
        tree = ast.parse(Path(ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
