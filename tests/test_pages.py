"""Pages of docs/ that are made from the code are current."""

from __future__ import annotations

import runpy

import pytest

from cpfold_train.config.check_bounds import keys_of
from cpfold_train.config.schema import TrainConfig
from cpfold_train.paths import CHECKOUT

PAGES = runpy.run_path(str(CHECKOUT / "docs" / "write_pages.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_current(name):
    assert (CHECKOUT / "docs" / name).read_text() == PAGES[name](), "type: python docs/write_pages.py"


def test_every_key_has_a_row():
    rows = PAGES["configuration.md"]().splitlines()
    assert not [key for key, *_ in keys_of(TrainConfig()) if not any(row.startswith(f"| `{key}` |") for row in rows)]
