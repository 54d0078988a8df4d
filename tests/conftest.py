"""Shared set-up: shape annotations of the pure maths are checked, threads and seeds are fixed."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from helpers_checked import jaxtyped

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a network

# Before vigor is imported: functions of these modules then check the shapes and dtypes that they declare.
jaxtyping.jaxtyped = jaxtyped
jaxtyping.install_import_hook(
    ["vigor.gradnorm", "vigor.groupmetrics", "vigor.rollouts", "vigor.shaping", "vigor.signals", "vigor.tokenstats"],
    "beartype.beartype",
)

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What lives on between files is no garbage: the collector, which each training run calls, looks at it no more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As for users: no annotation is checked, so bad arguments reach the functions' own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Reports with empty charts."""
    from helpers_report import empty_charts

    with empty_charts():
        yield


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """Skips what needs the sandbox where it cannot run."""
    from vigor.evaluation.sandbox import SandboxUnavailable, check

    try:
        check()
    except SandboxUnavailable as reason:
        pytest.skip(f"no sandbox on this machine: {str(reason)[:300]}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets."""
    folder = os.environ.get("VIGOR_DATA_DIR")
    if not folder:
        pytest.skip("VIGOR_DATA_DIR is not set: the folder with gsm8k_train.jsonl, math_train.jsonl and others")
    return Path(folder)
