"""Train: ``python train.py KEY=VALUE ...``; the keys are explained in ``conf``."""

from cpfold_train.cli.start import main

if __name__ == "__main__":
    main()
