"""Local frames of points."""

from __future__ import annotations

import torch
from torch import Tensor


def frame_axes(points: Tensor) -> Tensor:
    """Axes (..., 3, 3), one a row, of the frames of three points a, b, c (..., 3, 3), whose origin is b.

    AlphaFold 3, Algorithm 29; ``express_coordinate_in_frame`` in ``boltz/model/loss/confidencev2.py``.
    """
    a, b, c = points.unbind(-2)
    w1, w2 = _unit(a - b), _unit(c - b)
    e1, e2 = _unit(w1 + w2), _unit(w2 - w1)
    return torch.stack([e1, e2, torch.linalg.cross(e1, e2)], -2)


def _unit(v: Tensor) -> Tensor:
    return v / (v.norm(dim=-1, keepdim=True) + 1e-5)
