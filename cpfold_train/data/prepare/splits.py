"""Share out the entries between training and validation so that no similar polymer is on both sides."""

from __future__ import annotations

from collections import defaultdict

from cpfold_train.data.prepare.convert import Conversion
from cpfold_train.parallel.random import key_of

Clusters = dict[tuple[str, int], str]


def split(
    results: list[Conversion], clusters: Clusters, val: set[str], after: str | None, fraction: float | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Which entries go to ``train`` and which to ``val``. Ligands do not count as similar: too many share ATP.

    Args:
        clusters: by sample and number of the entity.
        val: keys that go to validation whatever they resemble.
        after: entries released after this date (ISO 8601) are not trained on; those without a polymer that resembles
            one of the training set go to validation.
        fraction: this part of the entries, or a little less, goes to validation, by whole groups of entries that
            share clusters; which ones is the same for the same entries.

    Returns:
        The split by key, and the reasons by key of entries that belong to neither.
    """
    of_entry = {result.key: _polymer_clusters(result, clusters) for result in results}
    chosen = {key: "val" if key in val else "train" for key in of_entry}
    excluded: dict[str, str] = {}
    if after is not None:
        late = {result.key for result in results if (result.release_date or "") > after} - val
        trained = set().union(*(of_entry[key] for key in of_entry.keys() - late - val))
        for key in sorted(late):
            if of_entry[key] & trained:
                excluded[key] = f"released after {after}, and similar to an entry of the training set"
            chosen[key] = "val"
    if fraction is not None:
        room = fraction * len(of_entry)
        for group in _groups(of_entry):
            if len(group) <= room:
                room -= len(group)
                chosen |= dict.fromkeys(group, "val")
    return {key: side for key, side in chosen.items() if key not in excluded}, excluded


def shared_clusters(results: list[Conversion], clusters: Clusters, chosen: dict[str, str]) -> list[str]:
    """Validation entries with a polymer that resembles one of the training set."""
    of_entry = {result.key: _polymer_clusters(result, clusters) for result in results if result.key in chosen}
    trained = set().union(*(found for key, found in of_entry.items() if chosen[key] == "train"))
    return [key for key, found in of_entry.items() if chosen[key] == "val" and found & trained]


def _polymer_clusters(result: Conversion, clusters: Clusters) -> set[str]:
    kinds = enumerate(result.entities)
    return {clusters[result.key, number] for number, entity in kinds if entity["type"] != "nonpolymer"}


def _groups(of_entry: dict[str, set[str]]) -> list[list[str]]:
    """Entries connected by shared clusters, in an order drawn by their names."""
    members = defaultdict(list)
    for key, found in of_entry.items():
        for cluster in found:
            members[cluster].append(key)
    groups, seen = [], set()
    for start in sorted(of_entry):
        group, new = [], [start]
        while new:
            key = new.pop()
            if key not in seen:
                seen.add(key)
                group.append(key)
                new += [other for cluster in sorted(of_entry[key]) for other in members.pop(cluster, [])]
        if group:
            groups.append(sorted(group))
    return sorted(groups, key=lambda group: key_of("split", *group))
