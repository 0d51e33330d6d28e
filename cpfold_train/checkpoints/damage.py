"""Whether a checkpoint is as it was written, to the last byte, by the checksums that torch writes beside each tensor.

Reading one does not compare them: weights that a disk has changed are loaded without a word.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO

from cpfold_train.checkpoints.sharded import INDEX, read_index

UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, LookupError, EOFError, RuntimeError, AttributeError, ImportError),
    *(struct.error, zipfile.BadZipFile, pickle.UnpicklingError),
)
"""What reading a damaged file may end in."""


def is_undamaged(path: Path) -> bool:
    """Read all of a checkpoint, a file or the directory of a run with FSDP, and compare its checksums.

    It takes a second for each 2 GB that are in memory already, and as long as reading takes for others.
    """
    try:
        return _directory_holds(path) if path.is_dir() else _file_holds(path)
    except UNREADABLE:
        return False


def _file_holds(file: Path | IO[bytes]) -> bool:
    # The table of contents is at the end: a file that is cut short has none.
    with zipfile.ZipFile(file) as contents:
        return contents.testzip() is None


def _directory_holds(path: Path) -> bool:
    if not _file_holds(path / INDEX):
        return False
    # Its import takes half as long as torch's.
    from torch.distributed.checkpoint import FileSystemReader

    shards = path / read_index(path)["shards"]
    for part in FileSystemReader(shards).read_metadata().storage_data.values():
        with (shards / part.relative_path).open("rb") as file:
            file.seek(part.offset)
            # Each tensor is a file of torch within that of its rank.
            if not _file_holds(io.BytesIO(file.read(part.length))):
                return False
    return True
