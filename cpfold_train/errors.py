"""Errors whose text is meant for the person at the keyboard."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one sentence that says what to type instead."""


class DataError(ValueError):
    """Input data that cannot be used. The message names the file or sample and what is wrong with it."""


class RunError(RuntimeError):
    """A run that cannot go on. The message is one sentence that says why, and what can be done."""


class DiskFullError(RunError):
    """There is no room for a file that the run has to write."""


def in_one_line(error: BaseException) -> str:
    """Kind and first line of an error that is not ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
