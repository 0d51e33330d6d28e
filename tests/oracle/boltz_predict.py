"""Run ``boltz predict`` on a checkpoint without anything from the network; needs only the package.

    python boltz_predict.py FOLDER

FOLDER holds ``input.yaml``, ``tuned.ckpt`` and ``components.json``: the heavy atoms of each residue as [name, atomic
number, charge, x, y, z]. The package's own files of residues are written from these. Predictions go to FOLDER/out.
"""

import json
import pickle
import sys
from pathlib import Path

from boltz.main import cli
from rdkit import Chem
from rdkit.Geometry import Point3D


def molecule(atoms):
    """Of a residue, with its one conformer."""
    mol, conformer = Chem.RWMol(), Chem.Conformer(len(atoms))
    for name, element, charge, *position in atoms:
        atom = Chem.Atom(element)
        atom.SetFormalCharge(charge)
        atom.SetProp("name", name)
        conformer.SetAtomPosition(mol.AddAtom(atom), Point3D(*position))
    mol.AddConformer(conformer)
    return mol


def main(folder):
    cache = folder / "cache"
    (cache / "mols").mkdir(parents=True)
    Chem.SetDefaultPickleProperties(Chem.PropertyPickleOptions.AllProps)
    for name, atoms in json.loads((folder / "components.json").read_text()).items():
        (cache / "mols" / f"{name}.pkl").write_bytes(pickle.dumps(molecule(atoms)))
    # What is there is not downloaded.
    for name in ("mols.tar", "boltz2_conf.ckpt", "boltz2_aff.ckpt"):
        (cache / name).touch()
    options = {"checkpoint": folder / "tuned.ckpt", "cache": cache, "out_dir": folder / "out", "accelerator": "cpu"}
    options |= {"sampling_steps": 2, "recycling_steps": 0, "num_workers": 0}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    cli(["predict", str(folder / "input.yaml"), *arguments, "--no_kernels"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
