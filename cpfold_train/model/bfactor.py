"""The head that predicts B-factors (``boltz/model/modules/trunkv2.py``, BFactorModule)."""

from __future__ import annotations

from torch import Tensor, nn

from cpfold_train.model.layers import linear


class BFactorModule(nn.Module):
    """Logits over bins of a token's B-factor."""

    def __init__(self, token_s: int, num_bins: int) -> None:
        super().__init__()
        self.bfactor = linear(token_s, num_bins, "default", bias=True)

    def forward(self, s: Tensor) -> Tensor:
        """(B, N, token_s) to (B, N, num_bins); local, every rank holds all tokens."""
        return self.bfactor(s)
