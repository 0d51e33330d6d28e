"""Imports go one way: a package imports only what stands before it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cpfold_train"
ORDER = [
    {"bounds", "errors", "dry_run", "memory", "whole_file", "tables", "paths", "processes", "spatial", "vocabulary"}
    | {"interrupts"},
    {"parallel"},
    {"kernels", "devices"},
    {"ops"},
    {"model"},
    {"losses"},
    {"data"},
    {"checkpoints"},
    {"reports"},
    {"config"},
    {"faults"},
    {"training"},
    {"evaluate"},
    {"predict"},
    {"simulate"},
    {"plan"},
    {"testing"},
    {"gpu_check"},
    {"cli", "__main__"},
    {"api"},
]
"""Within a set, too, no two packages import each other."""
OF_DATA = ["structures", "alignments", "schema", "features", "stream", "prepare", "inputs", "inspect"]


def imported() -> list[tuple[list[str], list[str]]]:
    """Each module and each module of the project that it imports, wherever in the file."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        module = list(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
                names = [[*node.module.split(".")[1:], alias.name] for alias in node.names]
                # What the project's own __init__ has is of no package.
                found += [(module, name) for name in names if name[0] in set().union(*ORDER)]
    return found


def test_imports_go_one_way():
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    upward = [(a, b) for a, b in imported() if a[0] != b[0] and level[b[0]] > level[a[0]]]
    assert not upward
    beside = {(a[0], b[0]) for a, b in imported() if a[0] != b[0] and level[b[0]] == level[a[0]]}
    assert not {(b, a) for a, b in beside} & beside


def test_every_package_has_its_place():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names - {"__init__"} == set().union(*ORDER)


def test_imports_within_data_go_one_way():
    level = {name: i for i, name in enumerate(OF_DATA)}
    inside = [(a, b) for a, b in imported() if a[0] == b[0] == "data" and a[1] != b[1]]
    assert inside and not [(a, b) for a, b in inside if level[b[1]] > level[a[1]]]


def test_prediction_does_not_need_training():
    assert not [(a, b) for a, b in imported() if a[0] == "predict" and b[0] == "training"]
