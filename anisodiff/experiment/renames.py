"""Old names of keys and values, which configurations may use for one version more."""

from typing import Any

RUN = {"share": "probe_fraction", "gradient": "path_gradient"}
KEYS: dict[tuple[str, ...], dict[str, str]] = {
    ("datasets", "*"): {"labels": "class_conditional"},
    ("datasets", "*", "pretrain"): RUN,
    ("datasets", "*", "runs", "*"): RUN,
    ("datasets", "*", "methods", "*"): {"to_zero": "append_zero"},
}  # where -> old key -> new key
GRIDS = {"uniform": "path-time", "time-uniform": "vp-time"}
VALUES: dict[tuple[str, ...], dict[str, str]] = {
    ("datasets", "*", "methods", "*", "grid"): GRIDS,
    ("datasets", "*", "searches", "*", "grid"): GRIDS,
}  # where -> old value -> new value


def with_new_names(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put new names in the place of old ones.

    A key that is given by both names keeps the old one, which the schema then refuses.

    Args:
        config: plain data, not yet validated.

    Returns:
        the configuration with new names, and a line for each kind of old name that it had.
    """
    found: dict[str, str] = {}
    return _renamed(config, (), found), list(found.values())


def _renamed(node: Any, where: tuple[str, ...], found: dict[str, str]) -> Any:
    if isinstance(node, str):
        new = _names(VALUES, where).get(node, node)
        if new != node:
            found.setdefault(node, _line(where, repr(node), repr(new)))
        return new
    if not isinstance(node, dict):
        return node
    renamed = {}
    for key, value in node.items():
        new = _names(KEYS, where).get(key, key)
        if new in node:
            new = key
        if new != key:
            found.setdefault(key, _line((*where, key), key, str(new)))
        renamed[new] = _renamed(value, (*where, str(new)), found)
    return renamed


def _names(table: dict[tuple[str, ...], dict[str, str]], where: tuple[str, ...]) -> dict[str, str]:
    return next((names for pattern, names in table.items() if _fits(where, pattern)), {})


def _fits(where: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(where) == len(pattern) and all(part in ("*", own) for own, part in zip(where, pattern, strict=True))


def _line(where: tuple[str, ...], old: str, new: str) -> str:
    return f"{'.'.join(where)}: {old} is called {new} now; the old name goes with the next version"
