"""Read a structure file (mmCIF, BinaryCIF or PDB) into a :class:`Structure`.

A polymer keeps its full sequence, and a residue all heavy atoms of its component, unresolved ones included; what a
residue loses where it is linked to another (OXT, and O1 of a bound sugar) counts only if it is there. Of several models
the first is read, of several alternative locations the one with the highest occupancy. Hydrogens and waters are left
out; of arginine's two NH atoms NH1 is the one nearer to CD (AlphaFold 3, supplement 2.1).
"""

from __future__ import annotations

import gzip
import io
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import biotite.structure.io.pdbx as pdbx
import numpy as np

from cpfold_train.data.structures.components import Component, component, parent
from cpfold_train.data.structures.entry import Chain, Entry, Site
from cpfold_train.data.structures.mmcif import read_mmcif
from cpfold_train.data.structures.pdb import read_pdb
from cpfold_train.data.structures.residues import CENTER_ATOM, DISTO_ATOM, letter_of, token_of
from cpfold_train.data.structures.structure import FORMAT_VERSION, MAX_CHAINS, Structure
from cpfold_train.errors import DataError, in_one_line
from cpfold_train.vocabulary import BOND_TYPES, MOL_TYPES, NONPOLYMER, TOKENS, UNKNOWN

SUFFIXES = (".cif", ".mmcif", ".bcif", ".pdb", ".ent")


def entry_id(path: Path) -> str:
    """Name of the file without its suffixes, in lower case: the sample's key."""
    name = path.name[:-3] if path.name.endswith(".gz") else path.name
    return Path(name).stem.replace(".", "-").lower()


def read_structure(path: Path, assembly: str | None = None) -> tuple[Structure, Counter]:
    """Read one file.

    Args:
        assembly: id of the biological assembly to build; None for the coordinates of the file.

    Returns:
        The structure, and how many residues were left out by reason.

    Raises:
        DataError: the file cannot be read or holds no polymer.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
        if suffix == ".bcif":
            entry = read_mmcif(pdbx.BinaryCIFFile.read(io.BytesIO(data)).block, assembly)
        elif suffix in (".cif", ".mmcif"):
            entry = read_mmcif(pdbx.CIFFile.read(io.StringIO(data.decode())).block, assembly)
        else:
            entry = read_pdb(data.decode(errors="replace"), assembly)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    except Exception as error:  # a broken file can fail anywhere inside the parsers
        raise DataError(f"{path.name} cannot be read: {in_one_line(error)}") from error
    if all(chain.mol_type == NONPOLYMER for chain in entry.chains):
        raise DataError(f"{path.name} holds no protein or nucleic acid chain")
    entry.meta.update(id=entry_id(path), source=path.name)
    return build(entry), entry.left_out


def chain_letters(structure: Structure, asym_id: int) -> str:
    """One-letter sequence of a polymer chain; a modified residue is read as what it is made from."""
    mol_type = MOL_TYPES.index(structure.meta["chains"][asym_id]["type"])
    names = structure.comp_name[structure.component[structure.asym_id == asym_id]].astype(str).tolist()
    return "".join(letter_of(parent(name), mol_type) for name in names)


class _Residue(NamedTuple):
    """A residue in its chain: its component, which of the component's atoms it has, and where these are."""

    name: str
    component: Component
    kept: np.ndarray
    resolved: np.ndarray
    coords: np.ndarray
    b_factor: np.ndarray


def build(entry: Entry) -> Structure:
    """The arrays of an entry; atoms that their component does not know are counted in ``entry.left_out``.

    Raises:
        DataError: it has more chains than a sample can number.
    """
    if len(entry.chains) > MAX_CHAINS:
        raise DataError(
            f"{entry.meta['source']} has {len(entry.chains):,} chains and ligands, and a sample holds at most "
            f"{MAX_CHAINS:,}: prepare it without --assembly, or a file with a part of its chains"
        )
    chains = [(chain, _residues(entry, chain)) for chain in entry.chains]
    used = {residue.name: residue.component for _, residues in chains for residue in residues}
    names = sorted(used)
    comp_start = np.cumsum([0] + [len(used[name].names) for name in names]).astype(np.int32)
    number = {name: i for i, name in enumerate(names)}

    tokens, atoms, bonds = [], [], []
    site_atom: dict[Site, int] = {}
    linked = {site for link in entry.links for site in link}
    count = 0
    for asym_id, (chain, residues) in enumerate(chains):
        for position, residue in enumerate(residues):
            kind = number[residue.name]
            tokens.append(_tokens(residue, chain.mol_type, kind, position, asym_id))
            atoms.append((comp_start[kind] + residue.kept, residue.resolved, residue.coords, residue.b_factor))
            if chain.mol_type == NONPOLYMER or tokens[-1]["modified"][0]:
                bonds.append(_bonds(residue, count))
            for i, atom in enumerate(residue.component.names[residue.kept].astype(str).tolist()):
                site = Site(chain.name, position, atom)
                if site in linked:
                    site_atom[site] = count + i
            count += len(residue.kept)
    covalent = BOND_TYPES.index("covalent")
    pairs = ([site_atom.get(site) for site in link] for link in entry.links)
    links = {(*sorted(pair), covalent) for pair in pairs if None not in pair}
    bond = np.concatenate([*bonds, np.array(sorted(links), dtype=np.int32).reshape(-1, 3)])
    columns = {name: np.concatenate([part[name] for part in tokens]) for name in tokens[0]}
    atom_start = np.cumsum(np.concatenate([[0], columns.pop("atoms")])).astype(np.int32)
    ref_atom, resolved, coords, b_factor = (np.concatenate(column) for column in zip(*atoms))
    return Structure(
        meta=_meta(entry, chains, columns, atom_start, resolved),
        atom_start=atom_start,
        ref_atom=ref_atom.astype(np.int32),
        resolved=resolved,
        coords=coords,
        b_factor=b_factor,
        bond_atoms=bond[:, :2].astype(np.int32),
        bond_type=bond[:, 2].astype(np.uint8),
        comp_name=np.array(names, dtype="S5"),
        comp_start=comp_start,
        comp_atom_name=np.concatenate([used[name].names for name in names]),
        comp_element=np.concatenate([used[name].elements for name in names]),
        comp_charge=np.concatenate([used[name].charges for name in names]),
        comp_pos=np.concatenate([used[name].pos for name in names]),
        **columns,
    )


def _residues(entry: Entry, chain: Chain) -> list[_Residue]:
    """The residues of a chain, with the atoms that the file has of each."""
    linked = {site.position for link in entry.links for site in link if site.chain == chain.name}
    order = np.argsort(chain.position, kind="stable")
    bounds = np.searchsorted(chain.position[order], np.arange(len(chain.sequence) + 1))
    names = chain.atoms.atom_name[order].astype("S4")
    # A row of zeros at the end, for the atoms that are not there.
    coords = np.concatenate([chain.atoms.coord[order], np.zeros((1, 3))]).astype(np.float32)
    b_factor = np.append(chain.atoms.b_factor[order], 0).astype(np.float32)
    found = []
    for position, name in enumerate(chain.sequence):
        known = component(name)
        if known is None:
            name = TOKENS[UNKNOWN[chain.mol_type]]
            known = component(name)
        rows = {
            atom: i for i, atom in enumerate(names[bounds[position] : bounds[position + 1]].tolist(), bounds[position])
        }
        kept = _kept(known, rows, name, chain.mol_type, position in linked)
        row = np.array([rows.get(atom, -1) for atom in known.names[kept].tolist()], dtype=np.int64)
        entry.left_out["atoms unknown to the CCD"] += len(set(rows) - set(known.names.tolist()))
        residue = _Residue(
            name=name,
            component=known,
            kept=kept,
            resolved=row >= 0,
            coords=coords[row],
            b_factor=b_factor[row],
        )
        found.append(_arginine(residue) if name == "ARG" else residue)
    return found


def _kept(known: Component, rows: dict[bytes, int], name: str, mol_type: int, linked: bool) -> np.ndarray:
    """Which of a component's atoms a residue has, in a chain of this kind."""
    if mol_type == NONPOLYMER and not linked:
        return np.arange(len(known.names))
    leaving = known.leaving
    if mol_type == NONPOLYMER or token_of(name, mol_type)[1]:
        leaving = leaving & ~np.isin(known.names, list(rows))
    return np.flatnonzero(~leaving)


def _arginine(residue: _Residue) -> _Residue:
    cd, nh1, nh2 = (residue.component.names[residue.kept].tolist().index(atom) for atom in (b"CD", b"NH1", b"NH2"))
    if not residue.resolved[[cd, nh1, nh2]].all():
        return residue
    distance = np.linalg.norm(residue.coords[[nh1, nh2]] - residue.coords[cd], axis=1)
    if distance[0] <= distance[1]:
        return residue
    order = np.arange(len(residue.kept))
    order[[nh1, nh2]] = nh2, nh1
    return residue._replace(coords=residue.coords[order], b_factor=residue.b_factor[order])


def _tokens(residue: _Residue, mol_type: int, kind: int, position: int, asym_id: int) -> dict[str, np.ndarray]:
    """One token of a polymer's residue, one for each atom of a ligand."""
    if mol_type == NONPOLYMER:
        count, atoms, token, modified, center, disto = len(residue.kept), 1, UNKNOWN[NONPOLYMER], False, 0, 0
    else:
        count, atoms = 1, len(residue.kept)
        token, modified = token_of(residue.name, mol_type)
        names = residue.component.names[residue.kept].tolist()
        center = names.index(CENTER_ATOM[token]) if CENTER_ATOM[token] in names else -1
        disto = names.index(DISTO_ATOM[token]) if DISTO_ATOM[token] in names else center
    values = {
        "res_type": (token, np.int8),
        "component": (kind, np.int16),
        "res_index": (position, np.int32),
        "asym_id": (asym_id, np.int16),
        "modified": (modified, bool),
        "center_atom": (center, np.int16),
        "disto_atom": (disto, np.int16),
        "atoms": (atoms, np.int32),
    }
    return {name: np.full(count, value, dtype=dtype) for name, (value, dtype) in values.items()}


def _bonds(residue: _Residue, first_atom: int) -> np.ndarray:
    """(K, 3) int32: atoms and type of the bonds between the atoms that the residue has."""
    position = np.full(len(residue.component.names), -1)
    position[residue.kept] = first_atom + np.arange(len(residue.kept))
    ends = position[residue.component.bonds]
    there = (ends >= 0).all(axis=1)
    return np.column_stack([ends[there], residue.component.bond_types[there]]).astype(np.int32)


def _author_numbers(chain: Chain) -> dict[str, list]:
    """``auth_numbers`` of a polymer: position and author's number of its first and of its last resolved residue.

    None of Boltz's format, which numbers no residues.
    """
    atoms = chain.atoms
    numbers = atoms.auth_seq_id if "auth_seq_id" in atoms.get_annotation_categories() else atoms.res_id
    if chain.mol_type == NONPOLYMER or not numbers.any():
        return {}
    ends = int(chain.position.argmin()), int(chain.position.argmax())
    return {"auth_numbers": [[int(chain.position[i]), f"{numbers[i]}{atoms.ins_code[i]}"] for i in ends]}


def _meta(
    entry: Entry,
    chains: list[tuple[Chain, list[_Residue]]],
    columns: dict[str, np.ndarray],
    atom_start: np.ndarray,
    resolved: np.ndarray,
) -> dict:
    entities: dict[tuple, int] = {}
    copies: Counter = Counter()
    described = []
    for chain, residues in chains:
        entity = entities.setdefault((chain.mol_type, *chain.sequence), len(entities))
        described.append(
            {
                "name": chain.name,
                "auth_name": chain.auth_name,
                "entity": entity,
                "sym": copies[entity],
                "type": MOL_TYPES[chain.mol_type],
                "length": len(chain.sequence),
                "observed": sum(bool(residue.resolved.any()) for residue in residues),
                **_author_numbers(chain),
            }
        )
        copies[entity] += 1
    center = columns["center_atom"]
    at = (atom_start[:-1] + np.maximum(center, 0)).clip(max=len(resolved) - 1)
    polymers = [chain["length"] for chain in described if chain["type"] != "nonpolymer"]
    counts = {
        "tokens": len(center),
        "residues": sum(polymers),
        "resolved": int(((center >= 0) & resolved[at]).sum()),
        "atoms": len(resolved),
        "resolved_atoms": int(resolved.sum()),
        "chains": len(polymers),
        "ligands": len(described) - len(polymers),
        "entities": len(entities),
    }
    return {"format_version": FORMAT_VERSION, **entry.meta, "chains": described, "counts": counts}
