"""Recipes by name, as files and as dictionaries."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Union

from selfsup import _native
from selfsup._images import KEYS, plain

RecipeLike = Union[str, "os.PathLike[str]", Mapping[str, Any]]
"""A built-in recipe's name, a recipe file, or a complete recipe as a dictionary."""

Policies = Union[Mapping[str, Any], Sequence[Mapping[str, Any]]]
"""Policies of augmentation: dictionaries with the keys of a recipe's ``augment`` tables."""


def recipes() -> list[str]:
    """The names of the built-in recipes."""
    return _native.recipe_names()


def recipe(name: str | os.PathLike[str], set: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A built-in recipe or a recipe file as a dictionary.

    ``set`` overrides settings by their path: ``{"train.epochs": 20}``.

    Raises :class:`selfsup.Error` if there is no such recipe, or a setting is unknown or out of range.
    """
    return _native.recipe_dict(text_of(os.fspath(name), set))


def text_of(recipe: RecipeLike, set: Mapping[str, Any] | None = None) -> str:
    """A recipe as TOML, with settings on top."""
    if isinstance(recipe, Mapping):
        return _native.recipe_of_dict(without_none(recipe), settings(set))
    return _native.load_recipe(os.fspath(recipe), settings(set))


def policies_of(what: RecipeLike | Policies, normalise: bool) -> list[dict[str, Any]]:
    """The policy of each view."""
    if isinstance(what, Mapping) and "augment" not in what:
        found = [dict(without_none(what))]
    elif isinstance(what, (str, os.PathLike, Mapping)):
        found = _native.recipe_policies(text_of(what))
    else:
        found = [dict(without_none(policy)) for policy in what]
    if not normalise:
        for policy in found:
            policy.pop("normalise", None)
    # The engine reads no null.
    return [without_none(policy) for policy in found]


def reading_of(what: RecipeLike | Policies) -> dict[str, Any]:
    """How a recipe reads images; nothing for policies alone."""
    data: Any = {}
    if isinstance(what, Mapping):
        data = what.get("data") or {}
    elif isinstance(what, (str, os.PathLike)):
        data = _native.recipe_dict(text_of(what))["data"]
    return {key: data[key] for key in KEYS if data.get(key) is not None}


def settings(set: Mapping[str, Any] | None) -> list[str]:
    """``key=value`` as the program's ``--set`` takes it."""
    return [f"{key}={_toml(value)}" for key, value in (set or {}).items()]


def without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table without keys that hold nothing, at any depth: TOML has no null. NumPy's numbers become Python's."""

    def clean(value: Any) -> Any:
        value = plain(value)
        if isinstance(value, Mapping):
            return without_none(value)
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return value

    return {key: clean(value) for key, value in table.items() if value is not None}


def _toml(value: Any) -> str:
    value = plain(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, os.PathLike)):
        return json.dumps(os.fspath(value), ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {_toml(inner)}' for key, inner in value.items())}}}"
    raise TypeError(f"a setting is a number, a string, a bool or a list, not {value!r}")
