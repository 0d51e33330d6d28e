"""Train: ``python train.py KEY=VALUE ...``; the keys are explained in ``conf``."""

from cpfold_train.config.world import is_first_rank
from cpfold_train.interrupts import quit_on_interrupt

if __name__ == "__main__":
    quit_on_interrupt(is_first_rank)
    from cpfold_train.cli.train import main

    main()
