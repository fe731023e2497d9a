"""What sections of settings are made of: keys with descriptions and units, and the kinds of values."""

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A section of the configuration. Unknown keys are refused, and nothing in it changes.

    Raises:
        pydantic.ValidationError: a value that a key does not take; `config.parse` puts it in one line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def changed(self: S, **values: Any) -> S:
        """A copy with other values, checked."""
        return type(self).model_validate(self.model_dump() | values)

    def as_json(self, without: Iterable[str] = ()) -> str:
        """JSON with its keys in order, which a stage takes; rules see a change of settings by a change of this text."""
        return json.dumps(self.model_dump(exclude=set(without)), sort_keys=True)


def key(description: str, default: Any = ..., *, unit: str | None = None, **bounds: Any) -> Any:
    """A key of a section.

    Args:
        description: what it means, for the page of every key.
        default: the value where none is given; left out, the key must be given.
        unit: of the value.
        bounds: `ge`, `gt`, `le`, `min_length`, `max_length`, as pydantic's `Field` takes them.
    """
    extra = {"json_schema_extra": {"unit": unit}} if unit else {}
    return Field(default, description=description, validate_default=False, **extra, **bounds)


def section(description: str, **bounds: Any) -> Any:
    """A key that holds a section, or sections by name: empty where none is given."""
    return Field(default_factory=dict, description=description, validate_default=True, **bounds)


class OneOf:
    """A text that is one of some names, as a registry or a list has them: `Annotated[str, OneOf(SOLVERS)]`.

    Args:
        names: those that are taken.
    """

    def __init__(self, names: Iterable[str]):
        self.names = list(names)

    def _check(self, value: str) -> str:
        if value not in self.names:
            said = {"value": repr(value), "known": str(self.names)}
            raise PydanticCustomError("one_of", "{value} is not one of {known}", said)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": self.names}


def whole_number(value: Any) -> Any:
    """A whole number where it is written as a fraction, as YAML reads 5.0e+4; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unique(values: list[Any]) -> list[Any]:
    for index, each in enumerate(values):
        if each in values[:index]:
            raise PydanticCustomError("unique", "{value} is given twice: remove one", {"value": repr(each)})
    return values


Whole = Annotated[int, BeforeValidator(whole_number)]
Unique = AfterValidator(_unique)
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,63}$")]
SEED_MARK = "@"  # between the name of an entry and the index of its training seed
Named = Annotated[str, StringConstraints(pattern=rf"^[a-z][a-z0-9-]{{0,63}}({SEED_MARK}[1-9][0-9]{{0,2}})?$")]
Seen = Annotated[str, StringConstraints(pattern=r"\S")]
Digits = Annotated[str, StringConstraints(pattern=r"^[0-9]+$")]
Budgets = Annotated[list[Annotated[Whole, Field(ge=1)]], Field(min_length=1), Unique]
Seeds = Annotated[Whole, Field(ge=1, le=100)]
SEEDS = (
    "Trainings, with seed, seed + 1, ...: rows that depend on one are made for each, and tables show their mean and "
    "its standard error. All numbers above 1 that meet in a row are the same."
)
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Md5 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


def basis_of(subspaces: str | list[list[int]]) -> str | None:
    """Name of the basis that `subspaces: "basis:NAME"` asks for; None for a partition of the DCT."""
    if isinstance(subspaces, str) and subspaces.startswith("basis:"):
        return subspaces.removeprefix("basis:")
    return None


def turns(subspaces: str | list[list[int]]) -> bool:
    """Whether the basis can be learned: `separable:J` and `dense:J`."""
    return isinstance(subspaces, str) and subspaces.startswith(("separable:", "dense:"))


SUBSPACES = re.compile(r"(whole|block|(radial|separable|dense):[0-9]+|basis:[a-z][a-z0-9-]*)\Z")


def _subspaces(value: Any) -> Any:
    if isinstance(value, str):
        if not SUBSPACES.match(value):
            raise PydanticCustomError("subspaces", "{value} is none of the subspaces", {"value": repr(value)})
    elif not isinstance(value, list) or not all(
        isinstance(row, list) and all(type(each) is int for each in row) for row in value
    ):
        raise PydanticCustomError("subspaces", "{value} is neither text nor a table", {"value": repr(value)})
    return value


Subspaces = Annotated[
    str | list[list[int]],
    BeforeValidator(_subspaces),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{SUBSPACES.pattern}".replace(r"\Z", "$")},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
