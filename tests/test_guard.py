"""The guard: what is not finite never reaches a weight, stops or is left out, and can be computed again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import same_weights, tiny_model, trainer, weights
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from vigor.cli import main
from vigor.commands.replay import close
from vigor.guard import REPLAYED, NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

DISTINCT = [[40 + i, 50 - i, 1] for i in range(8)]


def poison_rewards(step: int, value: float) -> Any:
    """A reward function whose first value is not finite at one call."""
    calls = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        calls.append(1)
        return [value if len(calls) == step and i == 0 else float(i % 3) for i in range(len(completions))]

    return reward


def poison_gradient(made: Any, step: int, value: float = math.nan) -> None:
    """One gradient is not finite after the backward pass of one step, the loss being fine."""
    parameter = made.model.model.layers[0].mlp.up_proj.weight
    calls = []

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * value if len(calls) == step else gradient

    parameter.register_hook(hook)


def poison_loss(made: Any, step: int) -> None:
    """The advantage of one row is NaN, as a shaping gone wrong would have it."""
    real, calls = made._generate_and_score_completions, []

    def score(inputs: Any) -> Any:
        output = real(inputs)
        calls.append(1)
        if len(calls) == step:
            output["advantages"][3] = math.nan
        return output

    made._generate_and_score_completions = score


def after_each_step(made: Any) -> list[dict[str, torch.Tensor]]:
    """The weights after each step, the start first."""

    class Keep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(weights(made.model))

    seen = [weights(made.model)]
    made.add_callback(Keep())
    return seen


@pytest.mark.parametrize("kind", ["loss", "gradient", "inf reward", "-inf reward"])
def test_the_first_stops_the_run_before_a_weight_moves(tmp_path: Path, kind: str) -> None:
    values = {"inf reward": math.inf, "-inf reward": -math.inf}
    made = trainer(tmp_path, [poison_rewards(2 if kind in values else 99, values.get(kind, 0.0))], max_steps=3)
    if kind == "loss":
        poison_loss(made, 2)
    if kind == "gradient":
        poison_gradient(made, 2)
    seen = after_each_step(made)
    why = {"loss": "the loss is nan in 1 of 1 micro-batches", "gradient": "the gradient norm is nan"}
    expected = why.get(kind, "reward 'reward' is infinite for 1 of 8 completions")
    with pytest.raises(NonFiniteError, match=rf"step 2: {expected}.*weights are untouched.*vigor replay"):
        made.train()
    assert len(seen) == 2
    assert not same_weights(seen[0], seen[1])
    assert same_weights(seen[1], weights(made.model))
    assert json.loads((tmp_path / "dumps" / "step-2" / "dump.json").read_text())["step"] == 2


@pytest.mark.parametrize("kind", ["loss", "gradient", "reward"])
@pytest.mark.parametrize("momentum", [True, False])
def test_an_update_left_out_moves_no_weight_and_the_run_goes_on(
    tmp_path: Path, kind: str, momentum: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(
        tmp_path,
        [poison_rewards(2 if kind == "reward" else 99, math.inf)],
        max_steps=3,
        max_skipped_updates=1,
        weight_decay=0.1,
        max_grad_norm=1.0 if momentum else 0.0,
    )
    if kind == "loss":
        poison_loss(made, 2)
    if kind == "gradient":
        poison_gradient(made, 2)
    seen = after_each_step(made)
    made.train()
    assert not same_weights(seen[0], seen[1])
    assert same_weights(seen[1], seen[2])
    assert not same_weights(seen[2], seen[3])
    assert all(torch.isfinite(tensor).all() for tensor in seen[3].values())
    assert "This update is left out, 1 of at most 1." in capsys.readouterr().out


def test_no_more_are_left_out_than_allowed_resumed_or_not(tmp_path: Path) -> None:
    def make(folder: Path) -> Any:
        made = trainer(folder, [poison_rewards(99, 0)], max_steps=6, max_skipped_updates=2, save_steps=1,
                       save_strategy="steps")  # fmt: skip
        for step in (1, 2, 4):
            poison_gradient(made, step)
        return made

    with pytest.raises(NonFiniteError, match=r"step 4: .*2 updates were left out before, as many as allowed"):
        make(tmp_path / "first").train()
    resumed = trainer(tmp_path / "second", [poison_rewards(99, 0)], max_steps=6, max_skipped_updates=2)
    poison_gradient(resumed, 1)
    with pytest.raises(NonFiniteError, match=r"step 3: .*2 updates were left out before"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoints" / "checkpoint-2"))
    assert sorted(path.name for path in (tmp_path / "first" / "dumps").iterdir()) == ["step-1", "step-4"]


def test_a_guarded_run_is_the_run_it_was(tmp_path: Path) -> None:
    """Nothing is left out: the guard only looks."""
    ends = []
    for limit in (0, 5):
        made = trainer(tmp_path / str(limit), "vigor", max_steps=2, max_skipped_updates=limit)
        made.train()
        assert made._guard.skipped == 0
        ends.append(weights(made.model))
    assert same_weights(*ends)


def test_rewards_of_one_generation_spoil_all_its_updates(tmp_path: Path) -> None:
    """Two updates a generation: the second reads the same rewards as the first."""
    made = trainer(tmp_path, [poison_rewards(1, math.inf)], num_iterations=2, max_steps=3, max_skipped_updates=5)
    seen = after_each_step(made)
    made.train()
    assert same_weights(seen[0], seen[2])
    assert not same_weights(seen[2], seen[3])


@pytest.mark.parametrize("fused", ["keep", "retain", "off"])
def test_a_diverged_policy_is_told_by_its_reward_however_the_update_is_taken(tmp_path: Path, fused: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    made = trainer(tmp_path, "vigor", model=model, completions=DISTINCT, fused=fused)
    with pytest.raises(NonFiniteError, match=r"step 1: reward 'vigor' is nan for 8 of 8"):
        made.train()


def test_an_evaluation_is_stopped_at_once(tmp_path: Path) -> None:
    made = trainer(tmp_path, "vigor", completions=DISTINCT)
    made.model.eval()
    with torch.no_grad():
        made.model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="evaluation at step 0: reward 'vigor' is nan"):
        made._generate_and_score_completions([{"prompt": "Q:1+1\nA:"}] * 4 + [{"prompt": "Q:1+2\nA:"}] * 4)


def test_senseless_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_skipped_updates=-1: give 0"):
        trainer(tmp_path, "vigor", max_skipped_updates=-1)


# Replay


def stopped(folder: Path, kind: str, **settings: Any) -> Path:
    made = trainer(folder, [poison_rewards(2 if kind == "reward" else 99, math.inf)], max_steps=3, **settings)
    if kind == "loss":
        poison_loss(made, 2)
    if kind == "gradient":
        poison_gradient(made, 2)
    with pytest.raises(NonFiniteError):
        made.train()
    return folder / "dumps" / "step-2"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("loss", {}),
        ("reward", {"loss_type": "grpo"}),
        (
            "loss",
            {
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 4,
                "loss_type": "bnpo",
                "temperature": 0.8,
            },
        ),
        ("loss", {"peft": True}),
    ],
)
def test_a_step_that_was_stopped_is_reproduced(
    tmp_path: Path, kind: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**settings}
    if settings.pop("peft", False):
        settings["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        made = tiny_model()
        made.save_pretrained(tmp_path / "base")
        settings["model"] = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    dump = stopped(tmp_path / "run", kind, **settings)
    capsys.readouterr()
    assert main(["replay", str(dump)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 2: ")
    assert out.endswith("\nreproduced\n")


def test_a_finite_step_is_computed_again_to_the_last_digits_that_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guard is told that a reward is bad, so that it dumps a step whose numbers are all finite."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    made = trainer(tmp_path, "self_certainty", max_steps=1, loss_type="dapo", **settings)
    real = made._guard.new_rollouts
    made._guard.new_rollouts = lambda: (real(), made._guard.reward_trouble("as told"))[0]  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(NonFiniteError, match="step 1: as told"):
        made.train()
    dump = tmp_path / "dumps" / "step-1"
    assert main(["replay", str(dump)]) == 0
    rows = re.findall(r"^(?:gradient norm|loss \d) +(\S+) +(\S+)$", capsys.readouterr().out, flags=re.M)
    assert len(rows) == 3
    for then, now in rows:
        assert float(then) == pytest.approx(float(now), rel=1e-4)
        assert float(then) != 0


def test_what_the_dump_does_not_explain_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gradient that a hook spoiled: neither weights nor batch hold the reason."""
    dump = stopped(tmp_path, "gradient")
    capsys.readouterr()
    assert main(["replay", str(dump)]) == 1
    assert "not reproduced" in capsys.readouterr().out


def test_what_is_no_dump_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "is no dump" in capsys.readouterr().err


def test_near_is_near_and_not_finite_is_not_finite() -> None:
    assert close(1.0, 1.0005)
    assert not close(1.0, 1.01)
    assert close(math.nan, math.inf)
    assert not close(math.nan, 1.0)


def test_the_settings_of_a_dump_exist(tmp_path: Path) -> None:
    assert set(REPLAYED) <= set(vars(trainer(tmp_path, "vigor").args))
