"""Recipes: YAML files of flat keys, one a (model, method). `vigor train --config NAME` finds them here."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def resolve(name_or_path: str) -> Path:
    """The file that `--config` means: a path that exists, or the name of a shipped recipe.

    Raises:
        ValueError: neither, with the names there are.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if name_or_path in names():
        return _folder() / f"{name_or_path}.yaml"
    raise ValueError(
        f"--config {name_or_path}: neither a file nor a recipe. The recipes are: {', '.join(names())} "
        "(see `vigor recipes`)."
    )


def summary(name: str) -> str:
    """The first comment line of a recipe: what it is."""
    return resolve(name).read_text("utf-8").splitlines()[0].lstrip("# ")


def _folder() -> Path:
    return Path(str(resources.files("vigor.recipes")))
