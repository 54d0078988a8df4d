"""What must not change a step: how its batch is cut, checkpointing, padding; and the golden trajectories of lab steps.

One process against two: tests/test_distributed.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import trainer, weights

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from trajectory import first_difference, trajectory  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

COMPLETIONS = [[40 + i, *range(50, 50 + i), 1] for i in range(8)]
"""Of different lengths, so that padding differs with the micro-batch."""
REFERENCE = {"per_device_train_batch_size": 8, "fused": "off", "optim": "sgd", "learning_rate": 0.1}
"""Plain gradient descent: the first step of Adam is the gradient's sign, which says nothing of its size."""


def step(folder: Path, **settings: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The log of one optimizer step on fixed completions, and the weights after it."""
    made = trainer(folder, ["vigor", "entropy"], completions=COMPLETIONS, max_completion_length=12, **settings)
    made.train()
    (log,) = [log for log in made.state.log_history if "loss" in log]
    kept = ("loss", "grad_norm", "reward", "rewards/", "scores/")  # TRL's `entropy` is a mean over micro-batches
    return {name: value for name, value in log.items() if name.startswith(kept)}, weights(made.model)


WAYS: dict[str, dict[str, Any]] = {
    "4 × 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "2 × 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "8 × 1, update from the scoring pass": {"fused": "keep"},
    "2 × 4, update from the scoring pass": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "fused": "retain",
    },
    "activation checkpointing": {"gradient_checkpointing": True},
    "padding to a multiple of 16": {"pad_to_multiple_of": 16},
}  # fmt: skip


@pytest.fixture(scope="module", params=["dapo", "grpo"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    log, after = step(tmp_path_factory.mktemp("reference"), **REFERENCE, loss_type=request.param)
    return request.param, log, after


@pytest.mark.parametrize("way", WAYS)
def test_the_same_loss_gradient_and_rewards(reference: Any, way: str, tmp_path: Path) -> None:
    loss_type, log, after = reference
    found, moved = step(tmp_path, **{**REFERENCE, **WAYS[way]}, loss_type=loss_type)
    assert found.keys() == log.keys()
    for name, value in log.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-7), name
    for name, weight in after.items():
        torch.testing.assert_close(moved[name], weight, rtol=0, atol=2e-5, msg=name)


def test_a_step_moves_something_and_its_gradient_is_not_nothing(reference: Any, tmp_path: Path) -> None:
    """Else the test above could not fail."""
    _, log, after = reference
    assert log["grad_norm"] > 1e-3
    assert log["loss"] != 0
    start = weights(trainer(tmp_path).model)
    assert max((after[name] - start[name]).abs().max().item() for name in after) > 1e-3


# Golden trajectories


def test_the_first_difference_is_found() -> None:
    golden = [{"step": 1, "loss": 0.5, "reward": 1.0}, {"step": 2, "loss": 0.25, "reward": None}]
    assert first_difference(golden, golden, 0.0) is None
    assert first_difference(golden, [golden[0], {**golden[1], "loss": 0.25001}], 1e-4) is None
    assert first_difference(golden, [golden[0], {**golden[1], "loss": 0.26}], 1e-4) == (2, "loss", 0.25, 0.26)
    assert first_difference(golden, [golden[0], {**golden[1], "reward": 1.0}], 1e-4) == (2, "reward", None, 1.0)
    assert first_difference(golden, [{"step": 1, "loss": 0.5}], 1e-4) == (1, "reward", 1.0, "not logged")
    assert first_difference(golden, [{**golden[0], "auc": 0.5}], 1e-4) == (1, "auc", "not logged", 0.5)


@pytest.mark.parametrize("method", ["vigor", "self_certainty"])
def test_the_first_lab_steps_are_the_recorded_ones(method: str) -> None:
    golden = json.loads((ROOT / "docs/results/trajectories.json").read_text("utf-8"))["methods"][method]
    assert first_difference(golden, trajectory(method, 5), 1e-3) is None
