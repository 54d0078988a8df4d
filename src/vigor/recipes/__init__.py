"""Recipes: YAML files of flat keys, one a (model, method). `vigor train --config NAME` finds them here.

The folder `compare` holds comparisons for `vigor compare --config NAME`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def names() -> list[str]:
    """The names of the shipped recipes."""
    return _names(_folder())


def comparisons() -> list[str]:
    """The names of the shipped comparisons."""
    return _names(_folder() / "compare")


def resolve(name_or_path: str, *, comparisons: bool = False) -> Path:
    """The file that `--config` means: a path that exists, or the name of a shipped recipe.

    Args:
        name_or_path: what the user wrote.
        comparisons: the names of comparisons are known too.

    Raises:
        ValueError: neither, with the names there are.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.exists():
        raise ValueError(f"--config {name_or_path} is no file. Name a YAML file, or a recipe (see `vigor recipes`).")
    folders = [_folder(), *([_folder() / "compare"] if comparisons else [])]
    for folder in folders:
        if name_or_path in _names(folder):
            return folder / f"{name_or_path}.yaml"
    listed = ", ".join(name for folder in folders for name in _names(folder))
    raise ValueError(
        f"--config {name_or_path}: neither a file nor a recipe. The recipes are: {listed} (see `vigor recipes`)."
    )


def summary(name: str, *, comparisons: bool = False) -> str:
    """The first comment line of a recipe, or of a comparison: what it is."""
    return resolve(name, comparisons=comparisons).read_text("utf-8").splitlines()[0].lstrip("# ")


def _names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def _folder() -> Path:
    return Path(str(resources.files("vigor.recipes")))
