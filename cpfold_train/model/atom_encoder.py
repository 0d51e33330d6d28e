"""What is known of each atom, and of each two of them in a window, before any attention.

AlphaFold 3, Algorithm 5, lines 1-14; Boltz-2's names and arithmetic (AtomEncoder in
``boltz/model/modules/encodersv2.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.regions import region
from cpfold_train.model.config import AtomConfig
from cpfold_train.model.layers import linear, normed_linear, without_autocast
from cpfold_train.ops.atom_tokens import pairs_in_windows, pick_tokens, token_spans
from cpfold_train.ops.points import linear_of_points
from cpfold_train.ops.window_attention import WINDOW_KEYS, windows_of_keys, with_halo
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import ATOM_WINDOW
from cpfold_train.vocabulary import NUM_ELEMENTS, NUM_NAME_CHARACTERS, NUM_NAME_CODES

FEATURES = (3, 1, NUM_ELEMENTS, NUM_NAME_CHARACTERS * NUM_NAME_CODES)
"""Position, charge, element and the characters of the name: 388 features, of which at most nine are not zero."""


class AtomEncoder(nn.Module):
    """Atoms and their pairs from the reference conformers, an fp32 island.

    Args:
        atoms: sizes.
        token_s: width of the single representation.
        token_z: width of the pair representation.
        structure_prediction: whether it also reads the two, as in the diffusion module; the first encoder, which they
            come from, does not.
    """

    def __init__(self, atoms: AtomConfig, token_s: int, token_z: int, structure_prediction: bool) -> None:
        super().__init__()
        atom_s, atom_z = atoms.atom_s, atoms.atom_z
        self.embed_atom_features = linear(sum(FEATURES), atom_s, "default", bias=True)
        self.embed_atompair_ref_pos = linear(3, atom_z, "default")
        self.embed_atompair_ref_dist = linear(1, atom_z, "default")
        self.embed_atompair_mask = linear(1, atom_z, "default")
        self.structure_prediction = structure_prediction
        if structure_prediction:
            self.s_to_c_trans = nn.Sequential(nn.LayerNorm(token_s), linear(token_s, atom_s, "zero"))
            self.z_to_p_trans = nn.Sequential(nn.LayerNorm(token_z), linear(token_z, atom_z, "zero"))
        self.c_to_p_trans_k = nn.Sequential(nn.ReLU(), linear(atom_s, atom_z, "zero"))
        self.c_to_p_trans_q = nn.Sequential(nn.ReLU(), linear(atom_s, atom_z, "zero"))
        self.p_mlp = nn.Sequential(
            nn.ReLU(),
            linear(atom_z, atom_z, "default"),
            nn.ReLU(),
            linear(atom_z, atom_z, "default"),
            nn.ReLU(),
            linear(atom_z, atom_z, "zero"),
        )

    def forward(
        self, feats: dict[str, Tensor], cp: ContextParallel, s_trunk: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed this rank's atoms.

        Args:
            feats: of the rank's atoms ``ref_pos`` (B, A/P, 3) in Angstrom, ``ref_charge``, ``ref_element``,
                ``ref_space_uid``, ``atom_pad_mask`` and ``atom_to_token`` (B, A/P), ``ref_atom_name_chars``
                (B, A/P, 4); ``token_atom_start`` (B, N + 1).
            cp: the running grid.
            s_trunk: (B, N, token_s), the same on all ranks; read in structure prediction only, as is ``z``.
            z: tile (B, N/R, N/C, token_z).

        Returns:
            ``q`` (B, A/P, atom_s), what is known of each atom alone; ``c`` (B, A/P, atom_s), the same with its token's
            ``s_trunk``; ``p`` (B, A/32P, 32, 128, atom_z), pairs of the queries and keys of each window, meaningless
            where one of the two is padded.
        """
        with without_autocast(feats["ref_pos"]):
            q = c = self._embed(feats)
            pairs = None
            if self.structure_prediction:
                first, stop = token_spans(feats, cp)[cp.all.index]
                own = self.s_to_c_trans(s_trunk[:, first:stop].to(q.dtype))
                c = c + pick_tokens(own, first, feats)
                pairs = pairs_in_windows(normed_linear(z, *self.z_to_p_trans, cp.kernels), feats, cp)
            return q, c, self._pairs(c, pairs, feats, cp)

    def _embed(self, feats: dict[str, Tensor]) -> Tensor:
        """The linear layer of the features, most of which are one-hot: a sum of look-ups in its weight."""
        weight = self.embed_atom_features.weight
        by_position, by_charge, by_element, by_character = weight.T.split(FEATURES)
        c = linear_of_points(feats["ref_pos"].to(weight.dtype), by_position.T, self.embed_atom_features.bias)
        c = c + feats["ref_charge"][..., None].to(weight.dtype) * by_charge
        c = c + F.embedding(feats["ref_element"].long(), by_element)
        characters = feats["ref_atom_name_chars"].long().unbind(-1)
        for code, by_code in zip(characters, by_character.split(NUM_NAME_CODES), strict=True):
            c = c + F.embedding(code, by_code)
        return c

    def _pairs(self, c: Tensor, pairs: Tensor | None, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
        """Pair terms, a few windows at a time; ``pairs`` is what their tokens say, if anything."""
        dtype = c.dtype
        numbers = feats["ref_pos"], feats["ref_space_uid"][..., None], feats["atom_pad_mask"][..., None]
        known = torch.cat([x.to(dtype) for x in numbers], -1)
        k = windows_of_keys(with_halo(torch.cat([known, self.c_to_p_trans_k(c)], -1), cp))
        q = torch.cat([known, self.c_to_p_trans_q(c)], -1).unflatten(1, (-1, ATOM_WINDOW))
        weights = (self.embed_atompair_ref_pos, self.embed_atompair_ref_dist, self.embed_atompair_mask)
        weights += tuple(self.p_mlp[1::2])
        inputs = (q, k) if pairs is None else (q, k, pairs)
        window_bytes = c.shape[0] * ATOM_WINDOW * WINDOW_KEYS * weights[0].weight.shape[0] * c.element_size()
        windows = rows_per_block(window_bytes, c.device)
        function = _pair_terms if pairs is None else _pair_terms_with_tokens
        return by_rows(function, windows, inputs, [layer.weight for layer in weights])


@region
def _pair_terms(q: Tensor, k: Tensor, *weights: Tensor) -> Tensor:
    """Windows (B, w, 32, 5 + atom_z) of position, residue, mask and projection, and keys (B, w, 5 + atom_z, 128), to
    (B, w, 32, 128, atom_z)."""
    return _refined(_offsets(q, k, *weights[:3]) + _of_each(q, k), *weights[3:])


@region
def _pair_terms_with_tokens(q: Tensor, k: Tensor, pairs: Tensor, *weights: Tensor) -> Tensor:
    """As :func:`_pair_terms`, with one more term."""
    return _refined(_offsets(q, k, *weights[:3]) + pairs + _of_each(q, k), *weights[3:])


def _offsets(q: Tensor, k: Tensor, by_offset: Tensor, by_closeness: Tensor, by_mask: Tensor) -> Tensor:
    """What the reference conformer says of two atoms of it; zero for atoms of different residues."""
    q, k = q[..., None, :], k.mT[:, :, None]
    offset = k[..., :3] - q[..., :3]
    closeness = 1 / (1 + offset.square().sum(-1, keepdim=True))
    same = (k[..., 3:4] == q[..., 3:4]) * k[..., 4:5] * q[..., 4:5]
    terms = (offset, by_offset), (closeness, by_closeness), (same, by_mask)
    return same * sum(linear_of_points(x, weight) for x, weight in terms)


def _of_each(q: Tensor, k: Tensor) -> Tensor:
    return q[..., None, 5:] + k.mT[:, :, None, :, 5:]


def _refined(p: Tensor, *weights: Tensor) -> Tensor:
    x = p
    for weight in weights:
        x = F.linear(x.relu(), weight)
    return p + x
