"""What of Lightning's inside this project depends on is there, and is used in one file alone."""

from __future__ import annotations

import ast
import inspect
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer import Trainer

from cpfold_train.paths import CHECKOUT
from cpfold_train.training import lightning_loop

CALLS = {
    _TrainingEpochLoop.run: ("self.advance(data_fetcher)", "self.on_advance_end(data_fetcher)"),
    _TrainingEpochLoop.advance: ("self._broadcast_sigterm_tensor()",),
    _TrainingEpochLoop.on_advance_end: ("self.val_loop.run()", "self._should_check_val_fx(data_fetcher)"),
    Trainer._run: ("self._signal_connector.register_signal_handlers()",),
    _SubprocessScriptLauncher.launch: ("self._call_children_scripts()", "_set_num_threads_if_needed("),
    DDPStrategy._configure_launcher: ("self._launcher =",),
}
"""Where Lightning calls what is replaced, and what our own launcher does as Lightning's does."""


def test_nothing_is_missing():
    assert lightning_loop.missing() == []


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.delattr(_TrainingEpochLoop, "_should_accumulate")
    monkeypatch.setitem(lightning_loop.ATTRIBUTES, "fit_loop.old_loop", _TrainingEpochLoop)
    told = ["_TrainingEpochLoop._should_accumulate", "Trainer.fit_loop.old_loop, a _TrainingEpochLoop"]
    assert lightning_loop.missing() == told


@pytest.mark.parametrize("caller", CALLS, ids=lambda caller: caller.__qualname__)
def test_lightning_calls_what_is_replaced(caller):
    source = inspect.getsource(caller)
    assert [call for call in CALLS[caller] if call not in source] == []


def test_a_method_that_nobody_calls_is_not_put_in_place():
    with pytest.raises(AttributeError, match="advance"):
        lightning_loop._replace(SimpleNamespace(), "advance", print)


def test_no_other_file_uses_private_names_of_lightning():
    found = []
    for path in (CHECKOUT / "cpfold_train").rglob("*.py"):
        if path.name == "lightning_loop.py":
            continue
        text = path.read_text()
        found += [(path.name, name) for name in re.findall(r"\b(?:trainer|loop|strategy|launcher)\._[a-z]\w*", text)]
        found += [(path.name, name) for name in re.findall(r"epoch_loop|fit_loop", text)]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
                found += [(path.name, alias.name) for alias in node.names if alias.name.startswith("_")]
    assert not found
