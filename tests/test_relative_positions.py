"""Offsets of residues in chains longer than any fixed period."""

from __future__ import annotations

import pytest
import torch

from cpfold_train.model.embedding import Positions, RelativePositionEncoder


@pytest.mark.parametrize("period, same_bin", [(0, 1), (10_000, -1), (6_001, -1)])
def test_only_cyclic_chains_wrap(period: int, same_bin: int) -> None:
    """Residue 6,001 follows residue 1 far behind in a linear chain, and stands before or on it in a cyclic one."""
    encoder = RelativePositionEncoder(4).double()
    same, weight = torch.ones(1, 1, 1, dtype=torch.long), encoder.linear_layer.weight

    def token(residue: int) -> Positions:
        values = {"residue_index": same * residue, "token_index": same * residue, "cyclic_period": same * period}
        return Positions(*(values.get(name, same) for name in Positions._fields))

    def encode(ahead: int) -> torch.Tensor:
        return encoder._encode(token(1 + ahead), weight, token(1))

    far = encode(6_000)
    assert torch.equal(far, encode(40)) == (same_bin == 1)
    if period == 6_001:
        assert torch.equal(far, encode(-1))
