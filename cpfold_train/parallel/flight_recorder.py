"""What torch remembers of the latest exchanges of each rank (its flight recorder): who is in which, when one never
ends.

Format of a dump, and what torch sets up by itself: torch/csrc/distributed/c10d/FlightRecorder.hpp and
ProcessGroupNCCL.hpp of torch 2.11 to 2.13. gloo's recorder knows collectives only; NCCL's also messages from rank to
rank, each of which it records before the group of messages that it is part of.
"""

from __future__ import annotations

import ast
import os
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

PREFIX = "nccl_trace_rank_"
"""Start of the names of dumps, as torch's own ``torchfrtrace --prefix`` wants to know it; the rank follows."""

_MESSAGE = re.compile(r"\w+:(?:send \d+->|recv \d+<-)(\d+)")
_MESSAGES = "messages from rank to rank"
Dump = dict[str, Any]


class Standing(NamedTuple):
    """The first exchange of a rank that is not over."""

    op: str
    """The collective, or ``messages from rank to rank``."""
    group: str
    """Description of its process group, as ``cp_col``, or ``all ranks``."""
    ranks: frozenset[int]
    """Global ranks that take part in it: the members of the group, or the rank and those that it exchanges with."""
    since: float
    """When the host posted it, of ``time.time()``."""


def keep_dumps_in(folder: Path) -> None:
    """Have NCCL's recorder on, and its own dumps, at a timeout that nobody came before, where ours go. Whoever has set
    these variables is left alone. To be called before the process group is started.

    Args:
        folder: is made where it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), str(folder / PREFIX)),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    ):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def write_dump(folder: Path, rank: int) -> Path:
    """Write what this rank remembers, with the lines of code that posted it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{PREFIX}{rank}"
    path.write_bytes(_dump(stack_traces=True))
    return path


def read_dump(folder: Path, rank: int) -> Dump:
    """What :func:`write_dump`, or torch itself, has written of a rank. Dumps are pickles: read only your own."""
    return pickle.loads((folder / f"{PREFIX}{rank}").read_bytes())


def standing_here(rank: int, world_size: int) -> Standing | None:
    """The first exchange of this rank that is not over, None where there is none or the recorder is off."""
    return standing(pickle.loads(_dump(stack_traces=False)), rank, world_size)


def _dump(stack_traces: bool) -> bytes:
    from torch._C import _distributed_c10d as c10d

    ask = c10d._dump_nccl_trace if dist.get_backend() == "nccl" else c10d._dump_fr_trace
    return ask(True, stack_traces, False)


def standing(dump: Dump, rank: int, world_size: int) -> Standing | None:
    """The first exchange in a dump that is not over.

    Args:
        dump: of a rank, without what it has forgotten because of newer ones.
        rank: its global rank.
        world_size: number of ranks.
    """
    messages: list[dict[str, Any]] = []
    for entry in dump.get("entries", []):
        if _MESSAGE.match(entry["profiling_name"]):
            messages.append(entry)
            continue
        # Nobody updates the state of single messages: they are over when the group that follows them is.
        parts, messages = messages, []
        if not _is_over(entry):
            return _standing(entry, parts, dump, rank, world_size)
    return None


def summary(dumps: dict[int, Dump], world_size: int) -> str | None:
    """In a sentence, which ranks are in which exchange, and which have not joined it; None where no rank is in one.

    Args:
        dumps: by global rank; a rank that gave none counts as one that has not joined.
        world_size: number of ranks.
    """
    found = {rank: position for rank in sorted(dumps) if (position := standing(dumps[rank], rank, world_size))}
    told = []
    together: dict[tuple[str, str, frozenset[int]], list[int]] = {}
    for rank, position in found.items():
        if position.op == _MESSAGES:
            missing = [p for p in sorted(position.ranks - {rank}) if not _exchanges_with(found.get(p), rank)]
            told.append(_tell([rank], f"exchanges messages with {_ranks(position.ranks - {rank})}", missing, dumps))
        else:
            together.setdefault(position[:3], []).append(rank)
    for (op, group, ranks), inside in together.items():
        missing = sorted(ranks - set(inside))
        told.append(_tell(inside, f"{'is' if len(inside) == 1 else 'are'} in {op} of {group}", missing, dumps))
    return "; ".join(told) or None


def _standing(entry: dict, messages: list[dict], dump: Dump, rank: int, world_size: int) -> Standing:
    name, description = entry["process_group"]
    is_world = description == "default_pg"
    # gloo's recorder does not know who is in a group.
    members = ast.literal_eval(dump["pg_config"].get(name, {}).get("ranks", "[]"))
    members = members or (list(range(world_size)) if is_world else [])
    if messages:
        op = _MESSAGES
        ranks = {rank, *(members[int(_MESSAGE.match(message["profiling_name"])[1])] for message in messages)}
    else:
        op = entry["profiling_name"].partition(":")[2]
        ranks = set(members)
    return Standing(op, "all ranks" if is_world else description, frozenset(ranks), entry["time_created_ns"] / 1e9)


def _is_over(entry: dict[str, Any]) -> bool:
    # gloo's recorder retires what is over and leaves its state.
    return entry["state"] == "completed" or entry["retired"]


def _exchanges_with(position: Standing | None, rank: int) -> bool:
    return position is not None and position.op == _MESSAGES and rank in position.ranks


def _tell(inside: list[int], where: str, missing: list[int], dumps: dict[int, Dump]) -> str:
    sentence = f"{_ranks(inside)} {where}"
    if missing:
        sentence += f", which {_ranks(missing)} {'has' if len(missing) == 1 else 'have'} not joined"
    if silent := [rank for rank in missing if rank not in dumps]:
        sentence += f" ({_ranks(silent)} left no trace)"
    return sentence


def _ranks(ranks: list[int] | frozenset[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
