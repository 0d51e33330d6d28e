"""Run the stock Boltz cropper from given seed tokens and neighbourhood sizes; needs only the ``boltz`` package.

    python boltz_crop.py IN.npz OUT.npz

IN.npz holds ``tokens`` (L,), a structured array in the package's fields, and ``cases`` (K, 4): seed token,
neighbourhood size, most tokens and most atoms; OUT.npz gets ``crop_0`` ... ``crop_K-1``, the tokens of each.
"""

import sys
from types import SimpleNamespace

import numpy as np
from boltz.data.crop.boltz import BoltzCropper
from boltz.data.types import Tokenized


class Told:
    """Draws what it is told."""

    def __init__(self, size, index):
        self.size, self.index = size, index

    def choice(self, options):
        assert self.size in options
        return self.size

    def randint(self, stop):
        return self.index


def main(given, out):
    arrays = np.load(given)
    tokens = arrays["tokens"]
    structure = SimpleNamespace(
        mask=np.ones(1, dtype=bool),
        chains=np.zeros(1, dtype=[("asym_id", np.int32)]),
        interfaces=np.zeros(0, dtype=[("chain_1", np.int32), ("chain_2", np.int32)]),
    )
    bonds = np.zeros(0, dtype=[("token_1", np.int32), ("token_2", np.int32)])
    crops = {}
    for k, (seed, size, max_tokens, max_atoms) in enumerate(arrays["cases"].tolist()):
        chain = int(tokens["asym_id"][seed])
        own = tokens[tokens["resolved_mask"] & (tokens["asym_id"] == chain)]
        told = Told(size, int(np.flatnonzero(own["token_idx"] == seed)[0]))
        data = Tokenized(tokens, bonds, structure, {})
        cropped = BoltzCropper().crop(data, max_tokens, told, max_atoms, chain_id=chain)
        crops[f"crop_{k}"] = cropped.tokens["token_idx"]
    np.savez(out, **crops)


if __name__ == "__main__":
    main(*sys.argv[1:])
