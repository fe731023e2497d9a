"""The configuration: read into settings, old names renewed, errors in one line, described on a page."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from anisodiff.data.download import to_fetch
from anisodiff.errors import StageError
from anisodiff.experiment.config_text import check_text, plain
from anisodiff.experiment.files import TOY
from anisodiff.experiment.references import check_references, check_toy
from anisodiff.experiment.renames import with_new_names
from anisodiff.experiment.settings import ExperimentSettings, Section
from anisodiff.experiment.training_seeds import check_seeds

PREFIX = "configuration"
S = TypeVar("S", bound=Section)
FOLDERS = ("config", "fetched", "logs", "reference", TOY)  # beside those of the datasets
TITLE = "anisodiff configuration"
KINDS = {
    "string": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "model": "object",
    "list": "array",
}  # fmt: skip  # what pydantic calls a type -> what a schema does


def read(files: Sequence[Path]) -> ExperimentSettings:
    """Settings of configuration files, merged as Snakemake merges them: where two give a key, the later one holds.

    Raises:
        StageError: there is no such file, or what is in it is wrong.
    """
    merged: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise StageError(f"{file}: no such file: give a configuration, --configfile")
        check_text(file)
        text = file.read_text(encoding="utf-8")
        try:
            found = json.loads(text)
        except ValueError:
            found = yaml.safe_load(text)
        if not isinstance(found, dict):
            raise StageError(f"{file}: holds no keys: give a configuration, --configfile")
        merged = _updated(merged, found)
    return resolve(merged)


def _updated(config: Any, changes: dict[Any, Any]) -> dict[Any, Any]:
    """A copy with changes, key by key where both hold keys."""
    made = dict(config) if isinstance(config, dict) else {}
    for key, value in changes.items():
        made[key] = _updated(made.get(key), value) if isinstance(value, dict) else value
    return made


def resolve(config: dict[str, Any]) -> ExperimentSettings:
    """Settings from a configuration: defaults filled in, new names in the place of old ones (each kind said once).

    Args:
        config: as read from YAML.

    Raises:
        StageError: the first thing that is wrong, with the path of its key.
    """
    try:
        config, renamed = with_new_names(plain(config))
        for line in renamed:
            print(f"anisodiff: {PREFIX}: {line}", file=sys.stderr)
        resolved = parse(ExperimentSettings, config)
        try:
            shlex.split(resolved.cluster.options)
        except ValueError as error:
            raise StageError(f"cluster.options: {error}: mend the quotes") from error
        for name, dataset in resolved.datasets.items():
            if name in FOLDERS:
                raise StageError(f"datasets.{name}: a folder has this name: rename the dataset")
            check_references(f"datasets.{name}", dataset)
            check_seeds(f"datasets.{name}", dataset)
        if resolved.toy is not None:
            check_toy("toy", resolved.toy)
        to_fetch(published_files(resolved))
    except StageError as error:
        raise StageError(f"{PREFIX}: {error}") from error
    return resolved


def parse(kind: type[S], values: Any) -> S:
    """Settings of a section from plain data.

    Raises:
        StageError: the first thing that is wrong, with the path of its key.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        errors = sorted(error.errors(include_url=False), key=lambda each: [str(part) for part in each["loc"]])
        raise StageError(_one_line(errors[0], values, kind)) from error


def _one_line(error: Any, values: Any, kind: type[Section]) -> str:
    loc, context, value = [str(part) for part in error["loc"]], error.get("ctx", {}), error["input"]
    where = ".".join(each for each in loc if each != "[key]")
    if loc[-1:] == ["[key]"]:
        where = ".".join(loc[:-2])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; known here: {', '.join(_known(kind, error['loc'][:-1], values))}"
    if error["type"] == "missing":
        return f"{where}: is missing: give it"
    said = _shortened(_message(error["type"], value, context) or error["msg"])
    if error["type"] in ("too_short", "too_long") and 2 in (context.get("min_length"), context.get("max_length")):
        return f"{where}: {context['actual_length']} given, where 2 are needed"
    if error["type"] == "string_type" and not isinstance(value, dict | list | None):
        return f"{where}: {said}: put it in quotes"
    if error["type"] in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        return f"{where}: {said}: YAML wants a point in it, as 5.0e+4, and no quotes around it"
    return f"{where}: {said}" if where else said


def _message(kind: str, value: Any, context: dict[str, Any]) -> str | None:
    if kind.removesuffix("_type") in KINDS and kind.endswith("_type"):
        return f"{value!r} is not of type {KINDS[kind.removesuffix('_type')]!r}"
    match kind:
        case "string_pattern_mismatch":
            return f"{value!r} does not match {context['pattern']!r}"
        case "literal_error":
            return f"{value!r} is not one of {context['expected'].replace(' or ', ', ')}"
        case "greater_than_equal":
            return f"{value!r} is less than the minimum of {context['ge']:g}"
        case "greater_than":
            return f"{value!r} is not above {context['gt']:g}"
        case "less_than_equal":
            return f"{value!r} is greater than the maximum of {context['le']:g}"
        case "too_short":
            return f"{context['actual_length']} given, where {context['min_length']} or more are needed"
        case "too_long":
            return f"{context['actual_length']} given, where {context['max_length']} at most are needed"
    return None


def _shortened(text: str) -> str:
    """A message of at most one line: the value comes first in it, and may be of any length."""
    line = text.splitlines()[0]
    return line if len(line) <= 300 else f"{line[:100]} ... {line[-150:]}"


def _known(kind: type[BaseModel], loc: tuple[Any, ...], values: Any) -> list[str]:
    """Keys of the section at a place."""
    schema = expanded(kind.model_json_schema())
    for part in loc:
        schema = _section_of(schema)
        schema = schema.get("properties", {}).get(part) or _others(schema)
    return sorted(_section_of(schema)["properties"])


def _section_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The section where a key holds one or null."""
    return next((each for each in schema.get("anyOf", []) if "properties" in each), schema)


def _others(schema: dict[str, Any]) -> dict[str, Any]:
    """What keys of the user's own hold."""
    named = list(schema.get("patternProperties", {}).values()) or [schema.get("additionalProperties")]
    return named[0] if isinstance(named[0], dict) else {}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def published_files(settings: ExperimentSettings) -> list[tuple[str, dict[str, Any]]]:
    """Files that datasets name by address and hash, with the key of each."""
    found = []
    for name, dataset in settings.datasets.items():
        named = {"images": dataset.images, "features": dataset.features, "base": dataset.base}
        named |= {"reference": dataset.reference} if dataset.reference else {}
        named |= {f"tunings.{key}.features": each.features for key, each in dataset.tunings.items() if each.features}
        found += [(f"datasets.{name}.{key}", {"url": file.url} | file.hashes) for key, file in named.items()]
    return found


def expanded(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with every `$ref` put in place."""

    def of(node: Any) -> Any:
        if isinstance(node, list):
            return [of(each) for each in node]
        if not isinstance(node, dict):
            return node
        if reference := node.get("$ref"):
            own = {key: value for key, value in node.items() if key != "$ref"}
            return of(schema["$defs"][reference.rsplit("/", 1)[1]]) | {key: of(value) for key, value in own.items()}
        return {key: of(value) for key, value in node.items() if key != "$defs"}

    return of(schema)


def json_schema() -> str:
    """The JSON schema of a configuration, for editors that complete and check it."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | ExperimentSettings.model_json_schema()

    def closed(node: Any) -> Any:
        """With names of the user's own held to their pattern."""
        if isinstance(node, list):
            return [closed(each) for each in node]
        if not isinstance(node, dict):
            return node
        others = {"additionalProperties": False} if "patternProperties" in node else {}
        return {key: closed(value) for key, value in node.items()} | others

    return json.dumps(closed(made) | {"title": TITLE}, indent=1) + "\n"


def describe() -> str:
    """The page of every key: its description, unit and default, in Markdown."""
    lines = [f"# {TITLE}", "", str(ExperimentSettings.__doc__), ""]
    lines += ["Made from `anisodiff/experiment/settings` by `make config/README.md`. `<name>` is a name of yours.", ""]
    lines += ["| key | unit | default | meaning |", "| --- | --- | --- | --- |"]
    for path, node in _leaves("", expanded(ExperimentSettings.model_json_schema())):
        default = f"`{json.dumps(node['default'])}`" if "default" in node else ""
        options = node.get("enum") or next((each["enum"] for each in node.get("anyOf", []) if "enum" in each), None)
        choices = f" One of: {', '.join(f'`{each}`' for each in options)}." if options else ""
        text = (node.get("description", "") + choices).replace("|", "\\|")
        lines.append(f"| `{path}` | {node.get('unit', '')} | {default} | {text} |")
    return "\n".join(lines) + "\n"


def _leaves(path: str, node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = [(path, node)] if path else []
    prefix = f"{path}." if path else ""
    inner = _section_of(node)
    for key, child in inner.get("properties", {}).items():
        found += _leaves(prefix + key, child)
    if (others := _others(inner)).get("properties"):
        found += _leaves(f"{prefix}<name>", others)[1:]
    return found


def choices(key: str) -> str:
    """What a key may be, in words: the values it takes, or else its description.

    Args:
        key: as `describe` writes it, `<name>` for names.
    """
    node = dict(_leaves("", expanded(ExperimentSettings.model_json_schema())))[key]
    return ", ".join(map(str, node["enum"])) if "enum" in node else node["description"].rstrip(".")
