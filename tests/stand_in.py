"""A model that knows the truth, for the commands around a model: its samples are the truth with noise."""

from pathlib import Path

import torch
from torch import nn

import cpfold_train.__main__
from cpfold_train.checkpoints import load as checkpoint
from cpfold_train.vocabulary import CORRECTED


class StandIn(nn.Module):
    """The form of the model's ``predict``; confidence is made up, and greatest for the sample with the least noise."""

    def __init__(self, kind):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.confident, self.broken = kind != "plain", kind == "broken"

    def predict(self, feats, cp, *, recycling_steps, sampling_steps, samples, draws):
        if self.broken and cp.all.index == cp.all.size - 1:
            raise MemoryError("nothing is left")
        n, a = feats["token_pad_mask"].shape[1], feats["coords"].shape[1] * cp.grid.cp_size
        start, stop = cp.grid.atoms(a)
        own = [draws.at("noise", sample).normal(3 * start, 3 * stop) for sample in range(samples)]
        # Sample 1 has the least noise.
        size = torch.tensor([0.1 if sample == 1 else 1.0 + sample for sample in range(samples)])
        coords = feats["coords"] + size[:, None, None] * torch.cat(own).unflatten(1, (-1, 3))
        coords = coords + 100 * (1 - feats["atom_pad_mask"])[..., None]
        if not self.confident:
            return {"coords": coords}
        rows, cols = (torch.arange(*bounds) for bounds in (cp.grid.row_tokens(n), cp.grid.col_tokens(n)))
        pae = (rows[:, None] * 1000 + cols).float() + size[:, None, None]
        plddt = (1 - size[:, None] / 10) * (1 - torch.arange(n) / (2 * n))
        score = 1 / size
        return {
            "coords": coords,
            "plddt": plddt,
            "pae": pae,
            "pde": pae + 0.5,
            "ptm": score / 2,
            "iptm": score / 3,
            "complex_plddt": plddt.mean(1),
            "confidence_score": score,
        }


def main():
    """The command line, with the stand-in whatever the checkpoint.

    One called ``plain`` has no confidence, and one called ``broken`` fails on the last rank.
    """
    checkpoint.load_model = lambda path, weights: StandIn(Path(path).name)
    checkpoint.choose_weights = lambda path, weights: checkpoint.Weights(str(path), 7, weights or "raw", path.name)
    checkpoint.choose_features = lambda path, typed: (typed or CORRECTED, None)
    return cpfold_train.__main__.main()
