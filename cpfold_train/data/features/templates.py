"""Template structures laid on a sample's tokens: how a shard holds them, and their features under Boltz-2's names."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from cpfold_train.data.structures.structure import Structure
from cpfold_train.vocabulary import BOLTZ2, CORRECTED, PROTEIN, UNKNOWN


@dataclass(frozen=True)
class Template:
    """What one template structure shows of P tokens of the sample, in the template's own coordinates in Angstrom.

    Attributes:
        token: (P,) int32 tokens of the sample, ascending.
        res_type: (P,) int8 what the template has there.
        backbone: (P, 3, 3) float32 N, CA and C, zero unless all three are resolved.
        frame_known: (P,) bool, all three are resolved.
        center: (P, 3) float32 C-alpha, zero where unresolved.
        disto_center: (P, 3) float32 the distogram's atom, zero where unresolved.
        disto_known: (P,) bool.
    """

    token: np.ndarray
    res_type: np.ndarray
    backbone: np.ndarray
    frame_known: np.ndarray
    center: np.ndarray
    disto_center: np.ndarray
    disto_known: np.ndarray


def pack_templates(templates: list[Template]) -> dict[str, np.ndarray]:
    """Arrays ``FIELD_K`` of each template K, for ``templates.npz``, the optional member of a sample."""
    return {
        f"{field.name}_{number}": getattr(template, field.name)
        for number, template in enumerate(templates)
        for field in fields(Template)
    }


def unpack_templates(arrays: dict[str, np.ndarray]) -> list[Template]:
    """The inverse of :func:`pack_templates`."""
    count = sum(name.startswith("token_") for name in arrays)
    return [
        Template(**{field.name: arrays[f"{field.name}_{number}"] for field in fields(Template)})
        for number in range(count)
    ]


def draw_templates(templates: list[Template], most: int, rng: np.random.Generator) -> list[Template]:
    """Choose min(k, most) templates, k uniform from none to all (AlphaFold 3, supplement 2.4)."""
    count = min(int(rng.integers(0, len(templates) + 1)), most)
    return [templates[number] for number in rng.permutation(len(templates))[:count]]


def template_features(
    templates: list[Template], structure: Structure, tokens: np.ndarray, t: int, features: str = CORRECTED
) -> dict[str, np.ndarray]:
    """Features of a crop's tokens in ``t`` templates, of which those past the given ones are empty.

    With the features ``boltz2``, a modified residue of a template has no frame.

    Returns:
        ``template_restype`` (t, n) uint8, which the package has one-hot; ``template_frame_rot`` (t, n, 3, 3), with the
        axes in columns; ``template_frame_t``, ``template_cb`` and ``template_ca`` (t, n, 3); ``template_mask_frame``,
        ``template_mask_cb`` and ``template_mask`` (t, n) float32; ``visibility_ids`` (t, n) int32, equal for tokens
        that are seen together: those of all chains that the template covers, else those of one chain.
    """
    n = len(tokens)
    shapes = {"frame_rot": (3, 3), "frame_t": (3,), "cb": (3,), "ca": (3,), "mask_cb": (), "mask_frame": (), "mask": ()}
    made = {f"template_{name}": np.zeros((t, n, *shape), np.float32) for name, shape in shapes.items()}
    made["template_restype"] = np.zeros((t, n), np.uint8)
    made["visibility_ids"] = np.zeros((t, n), np.int32)
    asym_id = structure.asym_id[tokens].astype(np.int32)
    position = np.full(len(structure), -1)
    position[tokens] = np.arange(n)
    for number, template in enumerate(templates):
        inside = position[template.token] >= 0
        own = position[template.token[inside]]
        framed = template.frame_known
        if features == BOLTZ2:
            framed = framed & (template.res_type != UNKNOWN[PROTEIN])
        known = framed[inside]
        values = {
            "template_restype": template.res_type,
            "template_cb": template.disto_center,
            "template_ca": template.center,
            "template_mask_cb": template.disto_known,
            "template_mask_frame": framed,
        }
        for name, value in values.items():
            made[name][number, own] = value[inside]
        made["template_frame_rot"][number, own] = np.where(
            known[:, None, None], _axes(template.backbone[inside]), np.eye(3, dtype=np.float32)
        )
        made["template_frame_t"][number, own] = np.where(known[:, None], template.backbone[inside, 1], 0)
        made["template_mask"][number, own] = 1
        covered = np.isin(asym_id, structure.asym_id[template.token])
        made["visibility_ids"][number] = np.where(covered, number, -1 - asym_id)
    return made


def _axes(backbone: np.ndarray) -> np.ndarray:
    """(P, 3, 3) axes, in columns, of frames of N, CA and C: to C, to N, normal (AlphaFold 2, Algorithm 21)."""
    to_n, to_c = backbone[:, 0] - backbone[:, 1], backbone[:, 2] - backbone[:, 1]
    first = to_c / (np.linalg.norm(to_c, axis=1, keepdims=True) + 1e-10)
    second = to_n - first * (first * to_n).sum(axis=1, keepdims=True)
    second /= np.linalg.norm(second, axis=1, keepdims=True) + 1e-10
    return np.stack([first, second, np.cross(first, second)], axis=-1)
