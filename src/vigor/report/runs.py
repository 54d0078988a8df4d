"""What a report shows of a run, read from its folder: a finished run, one that still goes on, or one that died."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor.reading import ReadError, check
from vigor.runfolder import RunFolder

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_NOT_THE_METHOD = frozenset({"seed", "data_seed", "output_dir", "run_name", "logging_dir", "resume", "dry_run", "env"})


TokenRow = list[tuple[str, float, float]]
"""Text, log-probability and entropy (nats) of each token of a completion."""
Tokens = dict[tuple[int, str, str], TokenRow]
"""By step, prompt and completion."""


@dataclass(frozen=True)
class RunData:
    """A run folder's contents."""

    folder: RunFolder
    label: str
    """Runs of one label are seeds of one method."""
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any]
    completions: pd.DataFrame
    """A row a completion: those of one prompt follow each other; `group` numbers them within a step."""
    tokens: Tokens
    """Of a few completions."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.path.name

    @property
    def seed(self) -> Any:
        """As the settings have it, None where they do not."""
        return self.config.get("seed")

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards in the order of the logs; a name may hold slashes."""
        keys = [key for key in (self.metrics[-1] if self.metrics else {}) if _is_reward_mean(key)]
        return [key.removeprefix("rewards/").removesuffix("/mean") for key in keys]


@dataclass(frozen=True)
class Series:
    """The runs of one label, and how the page shows them."""

    label: str
    runs: list[RunData]
    number: int


def read_runs(paths: Sequence[Path], labels: Sequence[str] | None = None) -> list[RunData]:
    """Reads run folders; without labels, they are named after what their settings differ in.

    Raises:
        ValueError: a folder that holds no run, or a file in one that is not what a run writes there.
    """
    folders = [RunFolder(Path(path)) for path in paths]
    for folder in folders:
        if not (folder.path / "config.yaml").is_file():
            raise ValueError(f"{folder.path} holds no config.yaml, so it is no run folder of `vigor train`.")
    configs = [_config(folder) for folder in folders]
    named = labels or names(configs)
    return [_read(folder, label, config) for folder, label, config in zip(folders, named, configs, strict=True)]


def series(runs: Sequence[RunData]) -> list[Series]:
    """The runs by label, in order of first appearance."""
    found = dict.fromkeys(run.label for run in runs)
    return [Series(label, [run for run in runs if run.label == label], i) for i, label in enumerate(found)]


def names(configs: Sequence[dict[str, Any]]) -> list[str]:
    """A label for each run: its rewards, and every other setting in which the runs differ, seeds and folders aside."""
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [
        key
        for key in keys
        if key not in _NOT_THE_METHOD | {"reward_funcs"} and any(c.get(key) != configs[0].get(key) for c in configs)
    ]
    found = []
    for config in configs:
        rewards = " + ".join(config["reward_funcs"]) if config.get("reward_funcs") else "run"
        found.append(", ".join([rewards, *(f"{key}={config.get(key)}" for key in differing)]))
    return found


def text_of(value: Any) -> str:
    """A prompt or completion as text: of a conversation the contents of its messages."""
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def _read(folder: RunFolder, label: str, config: dict[str, Any]) -> RunData:
    return RunData(
        folder=folder,
        label=label,
        config=config,
        environment=_json(folder, "environment.json", {}),
        metrics=folder.read_metrics(),
        results=_results(folder),
        completions=_completions(folder, max(1, config.get("num_generations") or 1)),
        tokens=_tokens(folder),
    )


def _config(folder: RunFolder) -> dict[str, Any]:
    config = folder.read_config()
    shape = {"reward_funcs?": [str], "num_generations?": (int, type(None))}
    check(config, shape, str(folder.path / "config.yaml"))
    return config


def _results(folder: RunFolder) -> dict[str, Any]:
    results = _json(folder, "results.json", {"before": {}, "after": {}})
    for task in results["after"]:
        for when in ("before", "after"):
            where = f"{folder.path / 'results.json'}: {when}: {task}"
            if task not in results[when]:
                raise ReadError(f"{where} is missing.")
            for name in ("greedy_interval", "sampled_interval"):
                if len(results[when][task].get(name, ())) != 2:
                    raise ReadError(f"{where}: {name} must be two numbers.")
    return results


def _json(folder: RunFolder, name: str, missing: dict[str, Any]) -> dict[str, Any]:
    """The file's contents; what a run that still goes on or was killed has not written is `missing`."""
    try:
        return folder.read_json(name)
    except FileNotFoundError:
        return missing


def _tables(folder: Path) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in sorted(path for path in folder.glob("*.parquet") if path.is_file()):
        try:
            yield pq.read_table(path, partitioning=None)
        except (OSError, pa.ArrowException):
            continue  # cut off by a kill: the resumed run writes that step again


def _tokens(folder: RunFolder) -> Tokens:
    from vigor.tokenlog import FOLDER

    return {
        (row["step"], row["prompt"], row["completion"]): list(
            zip(row["tokens"], row["logps"], row["entropies"], strict=True)
        )
        for table in _tables(folder.path / FOLDER)
        for row in table.to_pylist()
    }


def _completions(folder: RunFolder, group_size: int) -> pd.DataFrame:
    import pandas as pd

    frames = [table.to_pandas() for table in _tables(folder.path / "completions")]
    if not frames:
        return pd.DataFrame({"step": [], "group": [], "prompt": [], "completion": []})
    frame = pd.concat(frames, ignore_index=True)
    for column in ("prompt", "completion"):
        frame[column] = [text_of(value) for value in frame[column]]
    frame["group"] = frame.groupby("step").cumcount() // group_size
    return frame


def _is_reward_mean(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")
