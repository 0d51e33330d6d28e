"""Callbacks and loggers that report a run; what they write is named and drawn by :mod:`cpfold_train.reports`."""
