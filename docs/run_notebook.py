"""Run docs/notebook.ipynb, and keep what it prints and draws in it.

python docs/run_notebook.py            in a temporary directory; writes docs/notebook.ipynb
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "notebook.ipynb"


def execute(folder: Path, instead: Mapping[str, str] | None = None) -> nbformat.NotebookNode:
    """Run the notebook in ``folder/docs``, beside the data of the checkout.

    Args:
        folder: an empty one.
        instead: texts of cells, and what stands there instead of them.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(PAGE, as_version=4)
    for cell in notebook.cells:
        for old, new in (instead or {}).items():
            cell.source = cell.source.replace(old, new)
    (folder / "docs").mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    client = NotebookClient(
        notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(folder / "docs")}}
    )
    return client.execute()


def main() -> None:
    """Write the notebook."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder))
    for cell in notebook.cells:
        # When each ran.
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, PAGE)


if __name__ == "__main__":
    main()
