"""The ops that can be timed, at Boltz-2's widths, by name."""

from cpfold_train.simulate.bench.loss_cases import LOSSES
from cpfold_train.simulate.bench.structure_cases import STRUCTURE
from cpfold_train.simulate.bench.trunk_cases import TRUNK

CASES = TRUNK | STRUCTURE | LOSSES
