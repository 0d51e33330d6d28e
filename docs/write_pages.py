"""Write the pages of docs/ that are made from the code: ``python docs/write_pages.py``."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from cpfold_train.config import reference  # noqa: E402
from cpfold_train.data.inspect.features_page import features_page  # noqa: E402
from cpfold_train.reports import metrics  # noqa: E402

PAGES = {"metrics.md": metrics.page, "configuration.md": reference.page, "features.md": features_page}
"""What makes the text of each page."""

if __name__ == "__main__":
    for name, text in PAGES.items():
        (DOCS / name).write_text(text())
