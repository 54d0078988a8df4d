"""The import hook's decorator, spared where no array is declared: its checks took half of the time of a small test."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, get_type_hints

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped
_of_arrays: dict[CodeType, bool] = {}


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`jaxtyping.jaxtyped` for functions that declare arrays; of the others plain types are checked, which is quick.

    Left alone are functions without arrays that are made anew at each call of another. Those whose annotations name
    what is imported for mypy only are jaxtyping's too, which takes such a name for anything.
    """

    def decorate(made: Any) -> Any:
        if not inspect.isfunction(made) or _declares_arrays(made):
            return _jaxtyped(made, typechecker=typechecker)
        if "<locals>" in made.__qualname__:
            return made
        if not _resolved(made):
            return _jaxtyped(made, typechecker=typechecker)
        checked = typechecker(made)

        @functools.wraps(made)
        def called(*args: Any, **kwargs: Any) -> Any:
            return (made if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

        return called

    return decorate


def _declares_arrays(made: FunctionType) -> bool:
    """True if an annotation names a type of jaxtyping's, or an alias of one, that its module knows."""
    if made.__code__ not in _of_arrays:
        names = {name for annotation in made.__annotations__.values() for name in re.findall(r"\w+", str(annotation))}
        known = [made.__globals__.get(name) for name in names]
        _of_arrays[made.__code__] = any(_is_array(value) for value in known)
    return _of_arrays[made.__code__]


def _resolved(made: FunctionType) -> bool:
    try:
        get_type_hints(made)
    except NameError:
        return False
    return True


def _is_array(value: Any) -> bool:
    return inspect.isclass(value) and (value.__module__ == "jaxtyping" or issubclass(value, jaxtyping.AbstractArray))
