"""Every op and block whose results must not depend on grid and device, by name."""

from cpfold_train.testing.atom_cases import ATOM
from cpfold_train.testing.diffusion_cases import DIFFUSION
from cpfold_train.testing.parity import Case
from cpfold_train.testing.step_case import STEP
from cpfold_train.testing.trunk_cases import TRUNK

CASES: dict[str, Case] = TRUNK | ATOM | DIFFUSION | STEP
