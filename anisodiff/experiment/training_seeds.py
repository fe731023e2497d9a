"""Training seeds: what is trained several times becomes an entry for each, and so does all that depends on it.

The first keeps its name, the others are `name@1`, `name@2`, ...: files, rules and tables need no other axis.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from anisodiff.errors import StageError
from anisodiff.experiment.settings import DatasetSettings
from anisodiff.experiment.settings.base import SEED_MARK

T = TypeVar("T")
# section -> key of its entries -> section that the key names an entry of; a name of no such entry has no seeds
NAMES = {
    "runs": {"start": "runs", "path": "runs"},
    "warps": {"network": "runs", "path": "runs"},
    "searches": {"network": "runs", "path": "runs"},
    "likelihoods": {"network": "runs", "path": "runs"},
    "tunings": {"start": "methods", "teacher": "methods"},
    "methods": {
        "network": "runs", "path": "runs", "warp": "warps", "search": "searches", "tuning": "tunings",
    },
}  # fmt: skip


def with_seed(name: str, index: int) -> str:
    """Name of an entry made with its training seed of this index."""
    return f"{name}{SEED_MARK}{index}" if index else name


def without_seed(name: str) -> tuple[str, int]:
    """What `with_seed` made a name of: name and index."""
    plain, _, index = name.partition(SEED_MARK)
    return plain, int(index or 0)


def first_of(names: Iterable[str]) -> list[str]:
    """Names of first seeds alone, in their order: what a figure of one training shows."""
    return [name for name in names if SEED_MARK not in name]


def seeds_of(dataset: DatasetSettings, section: str, name: str) -> int:
    """Number of training seeds of an entry: its own `seeds`, or those of what it depends on.

    Raises:
        StageError: two numbers meet that differ, and neither is 1.
    """
    entries: Mapping[str, Any] = getattr(dataset, section)
    if name not in entries:
        return 1
    found = {getattr(entries[name], "seeds", 1): "seeds"}
    for key, of in NAMES[section].items():
        named = getattr(entries[name], key)
        if named is not None:
            found.setdefault(seeds_of(dataset, of, named), f"{key} {named!r}")
    several = sorted(found.keys() - {1})
    if len(several) > 1:
        said = " and ".join(f"{count} of {found[count]}" for count in several)
        raise StageError(f"{section}.{name}: training seeds differ, {said}: give the same number, or 1")
    return several[0] if several else 1


def check_seeds(where: str, dataset: DatasetSettings) -> None:
    """Refuse numbers of training seeds that do not go together.

    Args:
        where: the dataset's key.
        dataset: its settings, its references checked.

    Raises:
        StageError: what is wrong, with the path of its key.
    """
    for section in NAMES:
        for name in getattr(dataset, section):
            try:
                seeds_of(dataset, section, name)
            except StageError as error:
                raise StageError(f"{where}.{error}") from error


def replicated(dataset: DatasetSettings) -> DatasetSettings:
    """Settings in which every training seed is an entry of its own, of one seed.

    A run, a warp and a tuning of index i have `seed + i`, a tuning pairs of its own besides; entries on trained ones
    follow them, the i-th on the i-th, and what was trained once is shared.

    Args:
        dataset: its settings as configured, references checked.

    Raises:
        StageError: as `seeds_of`.
    """
    counts = {
        (section, name): seeds_of(dataset, section, name) for section in NAMES for name in getattr(dataset, section)
    }
    made: dict[str, dict[str, Any]] = {}
    for section, names in NAMES.items():
        made[section] = {}
        for name, entry in getattr(dataset, section).items():
            for index in range(counts[section, name]):
                made[section][with_seed(name, index)] = _replica(entry, names, counts, index)
    return dataset.model_copy(update=made)


def _replica(entry: Any, names: Mapping[str, str], counts: Mapping[tuple[str, str], int], index: int) -> Any:
    """An entry's copy of a training seed."""
    changes: dict[str, Any] = {}
    for key, of in names.items():
        named = getattr(entry, key)
        changes[key] = with_seed(named, index) if counts.get((of, named), 1) > 1 else named
    if hasattr(entry, "seeds"):
        changes |= {"seeds": 1, "seed": entry.seed + index}
    if hasattr(entry, "first_seed"):
        changes["first_seed"] = entry.first_seed + index * (entry.pairs + entry.heldout)
    return entry.model_copy(update=changes)
