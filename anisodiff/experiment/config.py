"""The configuration: validated against its JSON schema, completed with defaults, its references checked."""

import copy
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from anisodiff.data.download import to_fetch
from anisodiff.errors import StageError
from anisodiff.experiment.budgets import budgets, grid_nfe, steps_for_nfe
from anisodiff.experiment.config_text import plain, whole
from anisodiff.experiment.renames import with_new_names
from anisodiff.solvers.costs import ORDERS

PREFIX = "configuration"
TAKEN = {"rho": ("karras", "vp-time"), "last_level": ("path-time", "warped")}  # keys of single grids
FOLDERS = ("config", "fetched", "logs", "reference")  # beside those of the datasets


def load_schema(path: Path | str) -> dict[str, Any]:
    """The schema with every `$ref` put in place, so that properties and defaults can be read off it."""
    schema = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return _expanded({key: value for key, value in schema.items() if key != "$defs"}, schema)


def _expanded(node: Any, root: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_expanded(each, root) for each in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    target: Any = {}
    if reference := node.pop("$ref", None):
        target = root
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
        target = _expanded(target, root)
    own = {key: _expanded(value, root) for key, value in node.items()}
    if own.pop("unevaluatedProperties", True) is False:
        own["additionalProperties"] = False
    merged = copy.deepcopy(target) | own
    if "properties" in target and "properties" in own:
        merged["properties"] = target["properties"] | own["properties"]
    return merged


def resolve(config: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A validated copy with defaults filled in, and new names in the place of old ones (each kind said once).

    Args:
        config: as read from YAML.
        schema: from `load_schema`.

    Raises:
        StageError: the first thing that is wrong, with the path of its key.
    """
    from jsonschema import Draft202012Validator

    try:
        config, renamed = with_new_names(plain(config))
        for line in renamed:
            print(f"anisodiff: {PREFIX}: {line}", file=sys.stderr)
        resolved = whole(_with_defaults(config, schema), schema)
    except StageError as error:
        raise StageError(f"{PREFIX}: {error}") from error
    errors = sorted(Draft202012Validator(schema).iter_errors(resolved), key=lambda error: [str(e) for e in error.path])
    if errors:
        raise StageError(_one_line(errors[0]))
    try:
        shlex.split(resolved["cluster"]["options"])
    except ValueError as error:
        raise StageError(f"{PREFIX}: cluster.options: {error}: mend the quotes") from error
    for name, dataset in resolved["datasets"].items():
        if name in FOLDERS:
            raise StageError(f"{PREFIX}: datasets.{name}: a folder has this name: rename the dataset")
        _check_references(f"{PREFIX}: datasets.{name}", dataset)
    try:
        to_fetch(resolved["datasets"])
    except StageError as error:
        raise StageError(f"{PREFIX}: {error}") from error
    return resolved


def _with_defaults(node: Any, schema: Any) -> Any:
    if not isinstance(node, dict) or not isinstance(schema, dict):
        return node
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    filled = {key: value["default"] for key, value in properties.items() if "default" in value} | node
    return {key: _with_defaults(copy.deepcopy(value), properties.get(key, others)) for key, value in filled.items()}


def _one_line(error: Any) -> str:
    where = ".".join([PREFIX + ":", *(str(each) for each in error.path)]).replace(":.", ": ")
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known))[0]
        return f"{where}{'.' if error.path else ' '}{unknown}: unknown key; known here: {', '.join(known)}"
    message = error.message.splitlines()[0]
    # the value comes first in a message, and may be of any length
    said = message if len(message) <= 300 else f"{message[:100]} ... {message[-150:]}"
    if error.validator in ("minItems", "maxItems") and error.schema.get("minItems") == error.schema.get("maxItems"):
        return f"{where}: {len(error.instance)} given, where {error.validator_value} are needed"
    if error.validator == "type":
        kinds = [error.validator_value] if isinstance(error.validator_value, str) else error.validator_value
        if "string" in kinds and not isinstance(error.instance, dict | list | None):
            return f"{where}: {said}: put it in quotes"
        if isinstance(error.instance, str) and {"integer", "number"} & set(kinds) and _is_number(error.instance):
            return f"{where}: {said}: YAML wants a point in it, as 5.0e+4, and no quotes around it"
    return f"{where}: {said}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_references(where: str, dataset: dict[str, Any]) -> None:
    runs, paths, warps, searches, methods = (dataset[key] for key in ("runs", "paths", "warps", "searches", "methods"))
    networks = {"base", *runs}

    def check(key: str, name: str, known: set[str]) -> None:
        if name not in known:
            raise StageError(f"{where}.{key}: {name!r} is unknown; known here: {', '.join(sorted(known)) or 'none'}")

    for kind in ("paths", "runs"):
        for name, entry in dataset[kind].items():
            if basis := basis_of(entry["subspaces"]):
                check(f"{kind}.{name}.subspaces", basis, set(dataset["bases"]))
            if entry["schedules"] == "class" and not dataset["class_conditional"]:
                raise StageError(
                    f"{where}.{kind}.{name}.schedules: one a class needs labels: set class_conditional to true"
                )
    if clash := sorted((set(runs) & set(paths)) | ({"base"} & set(runs))):
        raise StageError(f"{where}.runs: {clash[0]!r} names a path or the base network too: rename the run")
    trained = {f"runs.{name}": run for name, run in runs.items()} | {
        f"warps.{name}": warp for name, warp in warps.items()
    }
    if "pretrain" in dataset:
        trained["pretrain"] = dataset["pretrain"]
    for key, settings in trained.items():
        if settings["micro_batch"] is not None and settings["batch"] % settings["micro_batch"]:
            raise StageError(
                f"{where}.{key}.micro_batch: {settings['micro_batch']} does not divide the batch of {settings['batch']}"
            )
    for name, run in runs.items():
        check(f"runs.{name}.start", run["start"], networks)
        check(f"runs.{name}.path", run["path"], {*paths, *runs})
        _ancestry(where, runs, name)
    for name, warp in warps.items():
        check(f"warps.{name}.network", warp["network"], networks)
        check(f"warps.{name}.path", warp["path"], {*paths, *runs})
        if (paths | runs)[warp["path"]]["schedules"] == "class":
            raise StageError(f"{where}.warps.{name}.path: {warp['path']!r} has a schedule a class, and no common time")
    for kind in ("searches", "geometry"):
        for name, entry in dataset[kind].items():
            check(f"{kind}.{name}.network", entry["network"], networks)
            check(f"{kind}.{name}.path", entry["path"], {*paths, *runs})
    for name, entry in dataset["geometry"].items():
        on = (paths | runs)[entry["path"]]
        basis = basis_of(on["subspaces"])
        if on["schedules"] == "class" or (basis and dataset["bases"][basis]["per"] != "all"):
            raise StageError(
                f"{where}.geometry.{name}.path: {entry['path']!r} differs between classes: take a shared one"
            )
    for name, method in methods.items():
        check(f"methods.{name}.network", method["network"], networks)
        check(f"methods.{name}.path", method["path"], {*paths, *runs})
        for grid, key, made, said in (
            ("warped", "warp", warps, "the warp of"),
            ("searched", "search", searches, "a search on"),
        ):
            if method["grid"] == grid:
                check(f"methods.{name}.{key}", method.get(key, ""), set(made))
                if made[method[key]]["path"] != method["path"]:
                    raise StageError(f"{where}.methods.{name}.{key}: {method[key]!r} is {said} another path")
            elif key in method:
                raise StageError(f"{where}.methods.{name}.{key}: only the grid {grid!r} takes one: remove it")
        _check_method(where, name, method, budgets(dataset, name), searches.get(method.get("search")))
    for name in dataset["plots"]["strip_methods"] or []:
        check("plots.strip_methods", name, set(methods))
    for name in dataset["ladder"]:
        check("ladder", name, set(methods))
    for name, nfe in dataset["convergence"].items():
        check("convergence", name, set(methods))
        key = f"{where}.convergence.{name}"
        _check_budget(where, key, name, methods[name], nfe, searches.get(methods[name].get("search")))
    if dataset["plots"]["published"] and dataset["features"]["kind"] != "inception":
        raise StageError(f"{where}.plots.published: published values are FIDs, of Inception's features: leave it out")
    known = {str(nfe) for name in methods for nfe in budgets(dataset, name)}
    unknown = sorted(set(dataset["sampling"]["ranges_at"]) - known)
    if unknown:
        raise StageError(f"{where}.sampling.ranges_at.{unknown[0]}: no method has such a budget")
    if dataset["reference"] is not None and dataset["features"]["kind"] != "inception":
        raise StageError(f"{where}.reference: published statistics are of Inception's features: set it to null")
    for name in dataset["plots"]["strip_methods"] or []:
        if (nfe := grid_nfe(dataset)) not in budgets(dataset, name):
            raise StageError(f"{where}.plots.grid_nfe: {nfe} is no budget of {name!r} in strip_methods")


def basis_of(subspaces: str | list) -> str | None:
    """Name of the basis that `subspaces: "basis:NAME"` asks for; None for a partition of the DCT."""
    named = isinstance(subspaces, str) and subspaces.startswith("basis:")
    return subspaces.removeprefix("basis:") if named else None


def _ancestry(where: str, runs: dict[str, Any], name: str) -> None:
    for key in ("start", "path"):
        seen, at = [name], runs[name][key]
        while at in runs:
            if at in seen:
                raise StageError(f"{where}.runs.{name}.{key}: runs start from one another in a circle")
            seen.append(at)
            at = runs[at][key]


def _check_method(
    where: str, name: str, method: dict[str, Any], nfes: list[int], search: dict[str, Any] | None
) -> None:
    if method["order"] is not None and method["solver"] not in ORDERS:
        raise StageError(f"{where}.methods.{name}.order: {method['solver']} has one order: leave it out")
    if (method["order"] or 0) > ORDERS.get(method["solver"], 1):
        most = ORDERS[method["solver"]]
        raise StageError(f"{where}.methods.{name}.order: {method['solver']} has orders 1 to {most}")
    for key, grids in TAKEN.items():
        if method[key] is not None and method["grid"] not in grids:
            raise StageError(
                f"{where}.methods.{name}.{key}: only the grids {' and '.join(grids)} take one: leave it out"
            )
    if search is not None and method["afs"] and search["analytic"] == "images":
        of = lambda each: f"{each['solver']} of order {each['order'] or ORDERS.get(each['solver'], 1)}"  # noqa: E731
        if of(method) != of(search):
            raise StageError(
                f"{where}.methods.{name}.search: {method['search']!r} chooses the analytic step by images of "
                f"{of(search)}, this is {of(method)}: give it a search of its own"
            )
    if (method["grid"] == "given") != (method["levels"] is not None):
        raise StageError(f"{where}.methods.{name}.levels: the grid 'given' needs them, and no other takes them")
    for nfe in nfes:
        _check_budget(where, f"{where}.sampling.nfe", name, method, nfe, search)


def _check_budget(
    where: str, key: str, name: str, method: dict[str, Any], nfe: int, search: dict[str, Any] | None
) -> None:
    """That a method can spend a budget, which was given under `key`."""
    try:
        budget = steps_for_nfe(nfe, method)
    except StageError as error:
        raise StageError(f"{key}: method {name!r}: {error}") from error
    if search is not None and budget.points > search["points"]:
        raise StageError(
            f"{where}.searches.{method['search']}.points: {search['points']} are too few for {nfe} evaluations of "
            f"method {name!r}: give {budget.points} or more"
        )
    if search is not None and method["afs"] and search["analytic"] == "images" and nfe > search["analytic_nfe"]:
        raise StageError(
            f"{where}.searches.{method['search']}.analytic_nfe: {search['analytic_nfe']} is less than the {nfe} of "
            f"method {name!r}: raise it, or choose the analytic step by costs"
        )
    if method["levels"] is not None:
        levels = method["levels"].get(str(nfe), [])
        if len(levels) != budget.steps + 1:
            raise StageError(
                f"{where}.methods.{name}.levels.{nfe}: {len(levels)} levels, this budget needs {budget.steps + 1}"
            )
        if sorted(set(levels), reverse=True) != levels:
            raise StageError(f"{where}.methods.{name}.levels.{nfe}: the levels must fall")


def describe(schema: dict[str, Any]) -> str:
    """The schema as a Markdown page: every key with its description, unit and default."""
    lines = [f"# {schema['title']}", "", schema["description"], ""]
    lines += [
        "Made from `workflow/schemas/config.schema.yaml` by `make config/README.md`. `<name>` is a name of yours.",
        "",
    ]
    lines += ["| key | unit | default | meaning |", "| --- | --- | --- | --- |"]
    for path, node in _leaves("", schema):
        default = (
            f"`{yaml.safe_dump(node['default'], default_flow_style=True).split(chr(10))[0]}`"
            if "default" in node
            else ""
        )
        choices = f" One of: {', '.join(f'`{each}`' for each in node['enum'])}." if "enum" in node else ""
        text = (node.get("description", "") + choices).replace("|", "\\|")
        lines.append(f"| `{path}` | {node.get('unit', '')} | {default} | {text} |")
    return "\n".join(lines) + "\n"


def _leaves(path: str, node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = [(path, node)] if path and ("description" in node or not node.get("properties")) else []
    prefix = f"{path}." if path else ""
    for key, child in node.get("properties", {}).items():
        found += _leaves(prefix + key, child)
    if isinstance(others := node.get("additionalProperties"), dict) and others.get("properties"):
        found += _leaves(f"{prefix}<name>", others)
    return found


def choices(schema: dict[str, Any], key: str) -> str:
    """What a key may be, in words: the values it takes, or else its description.

    Args:
        schema: from `load_schema`.
        key: as `describe` writes it, `<name>` for names.
    """
    node = dict(_leaves("", schema))[key]
    return ", ".join(map(str, node["enum"])) if "enum" in node else node["description"].rstrip(".")
