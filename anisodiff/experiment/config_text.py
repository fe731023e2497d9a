"""The configuration as text: what YAML takes for something else than it looks like is refused, or mended."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from anisodiff.errors import StageError

MOST, DEEPEST = 20_000, 40  # values, and levels of them: aliases in YAML multiply what a file holds
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # characters that no name and no option has


def check_text(file: Path) -> None:
    """Refuse keys that are given twice, and plain numbers in sixties (2:00:00) or in eights (010), of YAML or JSON.

    Raises:
        StageError: the first of them, with its file and key.
    """
    try:
        text = file.read_text(encoding="utf-8")
        try:
            json.loads(text, object_pairs_hook=lambda pairs: _once(file, pairs))
        except ValueError:
            _check_yaml(file, yaml.compose(text, Loader=yaml.SafeLoader))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise StageError(f"{file}: is no YAML ({' '.join(str(error).split())}): mend it") from error


def _once(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in made if keys.count(key) > 1)
        raise StageError(f"{file}: {twice}: given twice: remove one")
    return made


def _check_yaml(file: Path, root: yaml.Node | None) -> None:
    seen, waiting = set(), [("", root)]
    while waiting:
        where, node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{where}{index}.", each) for index, each in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines:
                    raise StageError(
                        f"{file}: {where}{name}: given twice, in lines {lines[name]} and {line}: remove one"
                    )
                lines[name] = line
                waiting += [(f"{where}{name}.", key), (f"{where}{name}.", value)]
        elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag.endswith((":int", ":float")):
            said = f"{file}: {where[:-1]}: YAML reads {node.value} (line {node.start_mark.line + 1})"
            if ":" in node.value:
                raise StageError(f"{said} in sixties: give minutes, or another single number; put text in quotes")
            if re.fullmatch("[-+]?0[0-7_]+", node.value):
                raise StageError(f"{said} in eights: leave out the leading 0; put text in quotes")


def plain(config: Any) -> Any:
    """A copy whose keys are text, whose numbers are finite and whose texts can be seen.

    Args:
        config: as read from YAML; whole numbers may be keys.

    Raises:
        StageError: something else is in it, or more than a configuration holds.
    """
    left = MOST

    def copied(node: Any, where: tuple[str, ...]) -> Any:
        nonlocal left
        left -= 1
        at = ".".join(where)
        if left < 0 or len(where) > DEEPEST:
            raise StageError(f"{at[:80]}: holds too much: aliases of aliases grow without end: write it out")
        if isinstance(node, dict):
            made = {}
            for key, value in node.items():
                if type(key) not in (str, int):
                    raise StageError(f"{at}{'.' if at else ''}{key}: is not text to YAML: put the key in quotes")
                if str(key) in made:
                    raise StageError(f"{at}{'.' if at else ''}{key}: given twice, as text and as a number: remove one")
                _check_text_of(str(key), at)
                made[str(key)] = copied(value, (*where, str(key)))
            return made
        if isinstance(node, list):
            return [copied(each, (*where, str(index))) for index, each in enumerate(node)]
        if isinstance(node, str):
            _check_text_of(node, at)
        # the second also refuses whole numbers that no 64 bits hold
        if (isinstance(node, float) and not math.isfinite(node)) or (isinstance(node, int) and abs(node) >= 2**63):
            raise StageError(f"{at}: is no finite number that a run can use: give another")
        return node

    return copied(config, ())


def _check_text_of(text: str, where: str) -> None:
    if UNSEEN.search(text):
        raise StageError(f"{where}: {text[:80]!r} holds a line break or another character that is not seen: remove it")
