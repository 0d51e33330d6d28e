"""Featurize samples with the stock ``boltz`` package; needs only that package.

    python boltz_features.py IN.npz OUT.npz [IN.npz OUT.npz ...]

IN.npz holds the arrays of a structure in this project's format, ``meta`` (its JSON), ``tokens`` (of the crop),
``templates`` (JSON, a list of [query chain, template chain] of one template that is the structure itself) and, for each
entity E with an alignment, ``tokens_E``, ``deletions_E`` and ``keys_E``. OUT.npz gets the features of the crop, one-hot
ones as indices.

What the package draws may be given: ``max_rows`` of an alignment; with ``drawn``, the rows of the alignment but the
first, it makes features for training; ``turns`` (residues, 3, 3) and ``shifts`` (residues, 3) move the conformers.
"""

import json
import sys
from dataclasses import replace

import numpy as np
import torch
from boltz.data import const
from boltz.data.feature import featurizerv2
from boltz.data.feature.featurizerv2 import Boltz2Featurizer
from boltz.data.tokenize.boltz2 import Boltz2Tokenizer
from boltz.data.types import (
    MSA,
    AtomV2,
    BondV2,
    Chain,
    Coords,
    Ensemble,
    Input,
    Interface,
    MSADeletion,
    MSAResidue,
    MSASequence,
    Record,
    Residue,
    StructureInfo,
    StructureV2,
    TemplateInfo,
)
from boltz.model.modules.utils import center_random_augmentation
from rdkit import Chem
from rdkit.Geometry import Point3D

MOL_TYPES = ["protein", "dna", "rna", "nonpolymer"]
ONE_HOT = """
res_type contact_conditioning disto_target ref_element ref_atom_name_chars atom_to_token token_to_rep_atom
token_to_center_atom r_set_to_rep_atom template_restype
"""


def structure_of(given, meta):
    """The package's tables of a whole structure.

    Of a modified residue they say what its parsers do (``parse_ccd_residue``): an unknown amino acid, even in a nucleic
    acid, with its first atom as center and representative atom.
    """
    asym_id, res_index, start = given["asym_id"], given["res_index"], given["atom_start"]
    ligand = np.array([chain["type"] == "nonpolymer" for chain in meta["chains"]])[asym_id]
    first = np.flatnonzero((np.diff(asym_id, prepend=-1) != 0) | (np.diff(res_index, prepend=-1) != 0))
    stop = np.append(first[1:], len(asym_id))
    residues = []
    for a, b in zip(first, stop):
        atom, end, modified = start[a], start[b], given["modified"][a]
        center, disto = (0, 0) if modified else (given["center_atom"][a], given["disto_atom"][a])
        residues.append((
            given["comp_name"][given["component"][a]].decode(),
            const.token_ids["UNK"] if modified else given["res_type"][a], res_index[a], atom, end - atom,
            atom + center, atom + disto, not (ligand[a] or modified), given["resolved"][atom:end].any(),
        ))  # fmt: skip
    chains = []
    for number, chain in enumerate(meta["chains"]):
        own = np.flatnonzero(asym_id[first] == number)
        atoms = start[first[own[0]]], start[stop[own[-1]]]
        chains.append((
            chain["name"], MOL_TYPES.index(chain["type"]), chain["entity"], chain["sym"], number, atoms[0],
            atoms[1] - atoms[0], own[0], len(own), 0,
        ))  # fmt: skip
    names = given["comp_atom_name"][given["ref_atom"]].astype(str)
    columns = (names, given["coords"], given["resolved"], given["b_factor"], np.zeros(len(names)))
    atoms = np.zeros(len(names), dtype=AtomV2)
    for (field, _), column in zip(AtomV2, columns):
        atoms[field] = column
    token = np.repeat(np.arange(len(asym_id)), np.diff(start))
    residue = np.repeat(np.arange(len(first)), stop - first)
    bonds = [
        (asym_id[token[i]], asym_id[token[j]], residue[token[i]], residue[token[j]], i, j, kind)
        for (i, j), kind in zip(given["bond_atoms"], given["bond_type"])
    ]
    coords = np.zeros(len(names), dtype=Coords)
    coords["coords"] = given["coords"]
    return StructureV2(
        atoms, np.array(bonds, dtype=BondV2), np.array(residues, dtype=Residue), np.array(chains, dtype=Chain),
        np.array([], dtype=Interface), np.ones(len(chains), bool), coords, np.array([(0, len(names))], dtype=Ensemble),
    )  # fmt: skip


def molecules_of(given):
    """One molecule a component, with its one conformer."""
    molecules = {}
    for name, a, b in zip(given["comp_name"], given["comp_start"][:-1], given["comp_start"][1:]):
        molecule, conformer = Chem.RWMol(), Chem.Conformer(int(b - a))
        for i in range(a, b):
            atom = Chem.Atom(int(given["comp_element"][i]))
            atom.SetFormalCharge(int(given["comp_charge"][i]))
            atom.SetProp("name", given["comp_atom_name"][i].decode())
            conformer.SetAtomPosition(molecule.AddAtom(atom), Point3D(*map(float, given["comp_pos"][i])))
        molecule.AddConformer(conformer)
        molecules[name.decode()] = molecule
    return molecules


def alignments_of(given, meta):
    """The package's alignment of each chain."""
    entities = [int(name[7:]) for name in given if name.startswith("tokens_")]
    taxa = {key: i for i, key in enumerate(np.unique(np.concatenate([given[f"keys_{e}"] for e in entities] or [[]])))}
    taxa[-1] = -1
    found = {}
    for entity in entities:
        tokens, deletions = given[f"tokens_{entity}"], given[f"deletions_{entity}"]
        length, listed, sequences = tokens.shape[1], [], []
        for row, key in enumerate(given[f"keys_{entity}"].tolist()):
            before = len(listed)
            listed += [(place, deletions[row, place]) for place in np.flatnonzero(deletions[row])]
            sequences.append((row, taxa[key], row * length, (row + 1) * length, before, len(listed)))
        found[entity] = MSA(
            sequences=np.array(sequences, dtype=MSASequence),
            deletions=np.array(listed, dtype=MSADeletion),
            residues=tokens.ravel().astype(MSAResidue),
        )
    return {i: found[chain["entity"]] for i, chain in enumerate(meta["chains"]) if chain["entity"] in found}


class Draws:
    """In place of a generator: the first conformer, the number of rows that is given, and those rows."""

    def __init__(self, drawn):
        self.drawn = drawn

    def random(self):
        return 1.0

    def integers(self, low, high):
        assert low <= 1 + len(self.drawn) < high
        return 1 + len(self.drawn)

    def choice(self, candidates, size=None, replace=True):
        if size is None:
            return candidates[0]
        assert size == len(self.drawn) and not replace and np.isin(self.drawn, candidates).all()
        return self.drawn


def move_conformers(given):
    """Let the package move the conformers as it is told; it does so residue by residue, and centres them itself."""
    tokens, start = given["tokens"], given["atom_start"]
    asym_id, res_index = given["asym_id"][tokens], given["res_index"][tokens]
    residue = np.cumsum((np.diff(asym_id, prepend=-1) != 0) | (np.diff(res_index, prepend=-1) != 0)) - 1
    known = np.array([given["resolved"][start[token] : start[token + 1]].any() for token in tokens])
    moved = iter([number for number in range(residue[-1]) if known[residue == number].any()])

    def move(coords, mask, centering):
        number = next(moved)
        turn, shift = (torch.from_numpy(given[name][number]).to(coords) for name in ("turns", "shifts"))
        centred = center_random_augmentation(coords, mask, augmentation=False, centering=centering)
        return centred @ turn.T + shift

    featurizerv2.center_random_augmentation = move


def main(source, target):
    given = dict(np.load(source))
    if "turns" in given:
        move_conformers(given)
    meta, covered = json.loads(str(given["meta"])), json.loads(str(given["templates"]))
    structure = structure_of(given, meta)
    names = [chain["name"] for chain in meta["chains"]]
    templates = [TemplateInfo("self", names[q], 0, 0, names[t], 0, 0) for q, t in covered]
    record = Record(meta["id"], StructureInfo(method=meta["method"]), [], [], templates=templates)
    known = {"self": structure} if covered else None
    data = Boltz2Tokenizer().tokenize(Input(structure, alignments_of(given, meta), record, templates=known))
    kept = given["tokens"]
    bonds = data.bonds[np.isin(data.bonds["token_1"], kept) & np.isin(data.bonds["token_2"], kept)]
    features = Boltz2Featurizer().process(
        replace(data, tokens=data.tokens[kept], bonds=bonds),
        Draws(given["drawn"]) if "drawn" in given else np.random.default_rng(0),
        molecules_of(given),
        training="drawn" in given,
        msa_sampling="drawn" in given,
        max_seqs=int(given.get("max_rows", 16384)),
        compute_frames=True,
    )
    out = {name: value.numpy() for name, value in features.items()}
    out |= {f"{name}_empty": out[name].sum(-1) == 0 for name in ("atom_to_token", "token_to_rep_atom")}
    np.savez(target, **out | {name: out[name].argmax(-1) for name in ONE_HOT.split()})


if __name__ == "__main__":
    for pair in zip(sys.argv[1::2], sys.argv[2::2]):
        main(*pair)
