"""What a comparison runs: one recipe, and the product of its worlds, methods and seeds.

A comparison file is YAML with these keys; `vigor compare` also takes a recipe of `vigor train` in its place:

recipe      name or file of the `vigor train` settings that all runs share
settings    settings that override the recipe, in all runs
methods     list of reward specs, "base", or mappings {name: …, any setting: …}
worlds      list of base models, or mappings {name: …, any setting: …}; default: the recipe's own
seeds       list of whole numbers
baseline    the method that the others are compared with
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vigor import recipes
from vigor.reading import check, read_settings

BASE = "base"
"""The model before training: not a run, but what every run is scored as before it starts."""
METHODS = (BASE, "accuracy", "vigor", "self_certainty", "entropy", "majority_vote", "random")
SEEDS = (0, 1, 2)
_SHAPE = {
    "recipe?": str,
    "settings?": (dict, type(None)),
    "methods?": [(str, dict)],
    "worlds?": [(str, dict)],
    "seeds?": [int],
    "baseline?": str,
}
KEYS = ("recipe", "settings", "methods", "worlds", "seeds", "baseline")
OWN = ("seed", "output_dir", "resume", "dry_run", "config")
"""Settings of a run that the comparison sets itself."""


@dataclass(frozen=True)
class Variant:
    """A method or a world: its name, and the settings that make it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One `vigor train`: `settings` is its whole configuration but for the folder."""

    world: str
    method: str
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{slug(self.world)}--{slug(self.method)}--{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison whose names and shape have been checked; the settings are checked by `vigor train`."""

    source: str
    settings: dict[str, Any]
    methods: tuple[Variant, ...]
    worlds: tuple[Variant, ...]
    seeds: tuple[int, ...]
    baseline: str

    @property
    def runs(self) -> list[Run]:
        """Seed by seed, so that a campaign that is cut short has whole comparisons."""
        return [
            Run(world.name, method.name, seed, {**self.settings, **world.settings, **method.settings, "seed": seed})
            for seed, world, method in itertools.product(self.seeds, self.worlds, self.methods)
            if method.name != BASE
        ]


def make_plan(
    config: str,
    *,
    methods: Sequence[Any] | None = None,
    worlds: Sequence[Any] | None = None,
    seeds: Sequence[int] | None = None,
    baseline: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Plan:
    """Reads a comparison file or a recipe; what else is given overrides it.

    Raises:
        ValueError: no such file or recipe, unknown keys, settings that are the comparison's own, a repeated name, a
            baseline that is no method, or nothing to train.
    """
    path, read = _read(config)
    if "methods" in read:
        if unknown := set(read) - set(KEYS):
            raise ValueError(f"{path}: unknown keys {', '.join(sorted(unknown))}; a comparison has {', '.join(KEYS)}.")
        shared = {**(_read(read["recipe"])[1] if "recipe" in read else {}), **(read.get("settings") or {})}
    else:
        shared, read = read, {}
    shared = {name: value for name, value in {**shared, **(settings or {})}.items() if name not in ("run_name", "seed")}
    plan = Plan(
        source=config,
        settings=shared,
        methods=_variants("methods", methods or read.get("methods") or METHODS, _method),
        worlds=_variants("worlds", worlds or read.get("worlds") or [_own_world(shared)], _world),
        seeds=_seeds(seeds or read.get("seeds") or SEEDS),
        baseline=baseline or str(read.get("baseline", "vigor")),
    )
    for variant in (Variant("settings", shared), *plan.methods, *plan.worlds):
        if taken := [name for name in OWN if name in variant.settings]:
            raise ValueError(f"{variant.name}: {taken[0]} is set by the comparison itself; leave it out.")
    names = [method.name for method in plan.methods]
    if plan.baseline not in names:
        raise ValueError(f"--baseline {plan.baseline}: choose one of the methods: {', '.join(names)}.")
    if names == [BASE]:
        raise ValueError("--methods base: nothing would be trained. Name one reward more; its run scores the base too.")
    if repeated := _repeated([run.name for run in plan.runs]):
        raise ValueError(f"two runs would share the folder {repeated[0]}: give the methods and worlds other names.")
    return plan


def slug(name: str) -> str:
    """The name with what file systems and shells dislike replaced by "_"."""
    return re.sub(r"[^A-Za-z0-9.,=+]+", "_", name).strip("_.") or "_"


def _read(config: str) -> tuple[Path, dict[str, Any]]:
    path = recipes.resolve(config, comparisons=True)
    read = read_settings(path)
    if "methods" in read:
        check(read, _SHAPE, str(path))
    return path, read


def _variants(key: str, given: Sequence[Any], make: Any) -> tuple[Variant, ...]:
    found = []
    for entry in given:
        if isinstance(entry, dict):
            if not isinstance(entry.get("name"), str):
                raise ValueError(f"{key}: {entry} needs a `name`, which the table shows.")
            found.append(Variant(entry["name"], {k: v for k, v in entry.items() if k != "name"}))
        else:
            found.append(make(str(entry)))
    if repeated := _repeated([variant.name for variant in found]):
        raise ValueError(f"{key}: {repeated[0]!r} stands there twice.")
    return tuple(found)


def _method(spec: str) -> Variant:
    return Variant(spec) if spec == BASE else Variant(spec, {"reward_funcs": [spec]})


def _world(model: str) -> Variant:
    return Variant(model, {"model_name_or_path": model})


def _own_world(settings: dict[str, Any]) -> str:
    if not settings.get("model_name_or_path"):
        raise ValueError("name the base model: model_name_or_path in the recipe, or --worlds NAME.")
    return str(settings["model_name_or_path"])


def _seeds(given: Sequence[Any]) -> tuple[int, ...]:
    if not all(isinstance(seed, int) for seed in given) or _repeated(given):
        raise ValueError(f"seeds: {list(given)} must be whole numbers, each once.")
    return tuple(given)


def _repeated(names: Sequence[Any]) -> list[Any]:
    return sorted({name for name in names if list(names).count(name) > 1})
