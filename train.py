"""Train: ``python train.py KEY=VALUE ...``; the keys are explained in ``conf``."""

from cpfold_train.training.entry import main

if __name__ == "__main__":
    main()
