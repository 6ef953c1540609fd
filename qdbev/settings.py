"""Typed settings: builds frozen dataclasses from plain JSON values, and changes single values from the command line."""

import ast
import copy
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""Turns saved values of one format into values of the next."""


class ConfigError(ValueError):
    """Raised for a setting that does not exist or has the wrong type or value."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def build(kind: type[T], values: Any, path: str = "") -> T:
    """Build an instance of the dataclass `kind` from plain values, as `dataclasses.asdict` and JSON return them.

    Nested dataclasses are built too. Where a field's type is a union of dataclasses, the value's `kind` entry selects the member whose
    own `kind` field has that literal. Integers become floats and lists become tuples where the annotation asks for it; nothing else is
    converted. `path` is the position of `values` in the whole config, for messages: empty, or dotted names with a final dot.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    require(isinstance(values, dict), f"{path.rstrip('.') or 'config'} must be a mapping, got {values!r}")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    for key in values:
        require(key in fields, f"{path}{key} is no setting; known: {', '.join(fields)}")
    built = {key: _coerce(value, hints[key], f"{path}{key}") for key, value in values.items()}
    needed = [name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in built]
    require(not missing, f"{path.rstrip('.') or 'config'} lacks {', '.join(missing)}")
    return kind(**built)


def override(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Apply settings `a.b=value`, a Python literal or else text, in place. Raises ConfigError if one has no '=' or names no setting."""
    for setting in settings:
        path, separator, text = setting.partition("=")
        require(bool(separator), f"--set {setting!r}: expected name=value, for example train.epochs=2")
        *parents, leaf = path.strip().split(".")
        node: Any = values
        for depth, name in enumerate([*parents, leaf]):
            known = isinstance(node, dict) and name in node
            where = ".".join(parents[:depth]) or "the config"
            choices = ", ".join(sorted(node)) if isinstance(node, dict) else "nothing"
            require(known, f"--set {setting!r}: {where} has no {name!r}; it has {choices}")
            if depth < len(parents):
                node = node[name]
        require(not isinstance(node[leaf], dict), f"--set {setting!r}: {path} is a group; name one of its settings")
        node[leaf] = _parse(text.strip())
    return values


def migrate(values: Any, migrations: tuple[Migration, ...], what: str) -> dict[str, Any]:
    """A copy of saved values in the present format, without their entry `format`, which is 1 if it is missing.

    Step k of `migrations` leads from format k + 1 to format k + 2. `what` names the values in messages.

    Raises:
        ConfigError: The values are of a later format, or do not have the form of the format that they name.
    """
    found = check_format(values, migrations, what)
    values = copy.deepcopy(values)
    values.pop("format", None)
    for version, step in enumerate(migrations[found - 1 :], found):
        try:
            values = step(values)
        except (AttributeError, LookupError, TypeError) as error:  # a step reads values that nothing has checked yet
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"the {what} does not have the form of format {version} ({reason}); it is damaged or was edited") from error
    return values


def check_format(values: Any, migrations: tuple[Migration, ...], what: str) -> int:
    """The format of saved values. Raises ConfigError if it is later than the present one or no version."""
    require(isinstance(values, dict), f"a {what} must be a mapping, got {values!r}")
    found, present = values.get("format", 1), len(migrations) + 1
    says = f"the {what} is of format {found!r}, this version of qdbev reads formats 1 to {present}"
    require(type(found) is int and found >= 1, f"{says}; the file is damaged or was edited")
    require(found <= present, f"{says}; the file was made by a later version: update qdbev to open it")
    return found


def require_positive(owner: Any, path: str, *names: str, least: int = 1) -> None:
    """Raise ConfigError if one of the integer fields `names` of a dataclass, or an entry of one that is a tuple, is below `least`."""
    for name in names:
        value = getattr(owner, name)
        smallest = min(value, default=least) if isinstance(value, tuple) else value
        require(smallest >= least, f"{path}.{name} is {value}, must be {least} or more")


def require_finite(values: Any, path: str = "") -> None:
    """Raise ConfigError if a number in nested plain values is NaN or infinite; Python's JSON reads both."""
    if isinstance(values, float):
        require(math.isfinite(values), f"{path} is {values}, must be a finite number")
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list | tuple) else ()
    for key, value in entries:
        require_finite(value, f"{path}.{key}" if path else str(key))


def _parse(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # literal_eval raises all of them for wrong text
        return text


def _coerce(value: Any, hint: Any, path: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        return build(typing.cast(type, hint), value, f"{path}.")
    if origin is Literal:
        require(value in get_args(hint), f"{path} is {value!r}, must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, get_args(hint), path)
    if origin is dict:
        require(isinstance(value, dict), f"{path} is {value!r}, must be a mapping")
        key_kind, value_kind = get_args(hint)
        return {_coerce(k, key_kind, f"key of {path}"): _coerce(v, value_kind, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{path} is {value!r}, must be a list")
        args = get_args(hint)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        require(len(kinds) == len(value), f"{path} is {value!r}, must have {len(kinds)} values")
        return tuple(_coerce(v, k, f"{path}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 1 << 1023, f"{path} is an integer of {value.bit_length()} bits, too large for a float")
        return float(value)
    require(type(value) is hint, f"{path} is {value!r} ({type(value).__name__}), must be {getattr(hint, '__name__', hint)}")
    return value


def _coerce_union(value: Any, members: tuple[Any, ...], path: str) -> Any:
    """Convert to None, to the only other member of the union, or to the dataclass that the value's `kind` selects."""
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _coerce(value, members[0], path)
    if isinstance(value, members):
        return value
    by_kind = {get_args(get_type_hints(member)["kind"])[0]: member for member in members}
    require(isinstance(value, dict), f"{path} must be a mapping, got {value!r}")
    chosen = value.get("kind")
    require(isinstance(chosen, str) and chosen in by_kind, f"{path}.kind is {chosen!r}, must be one of {', '.join(map(repr, by_kind))}")
    return build(by_kind[chosen], value, f"{path}.")
