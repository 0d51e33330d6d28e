"""Pages of docs/ that are made from the code are current."""

from __future__ import annotations

import runpy

import pytest

from cpfold_train.paths import CHECKOUT

PAGES = runpy.run_path(str(CHECKOUT / "docs" / "write_pages.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_current(name):
    assert (CHECKOUT / "docs" / name).read_text() == PAGES[name](), "type: python docs/write_pages.py"
