"""VigorTrainer with the update taken from the scoring pass: the same training, step for step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import same_weights, save_tiny, tiny_model, trainer, weights
from peft import LoraConfig

from vigor import fusion
from vigor.fusion import decide
from vigor.gradnorm import FusedNorms
from vigor.gradnorm.memory import FusedBytes, fused_bytes

EOS = 1
COMPLETIONS = [[40 + row, 20 + row % 5, 50 - row, *([] if row in (0, 5) else [EOS])] for row in range(16)]
COMPLETIONS[3] = COMPLETIONS[6] = [44, EOS]


def run(folder: Path, fused: str, **changes: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    made = trainer(folder, fused=fused, max_steps=2, completions=COMPLETIONS, **changes)
    made.train()
    return weights(made.model), [log for log in made.state.log_history if "loss" in log]


def close(folder: Path, fused: str, **changes: Any) -> None:
    """Two steps with the fused update and two without end in the same weights and the same logs."""
    plain, plain_logs = run(folder / "off", "off", **changes)
    got, logs = run(folder / fused, fused, **changes)
    start = weights(trainer(folder / "start", **changes).model)
    moved = sum((plain[name] - start[name]).square().sum() for name in plain).sqrt()
    off = sum((got[name] - plain[name]).square().sum() for name in plain).sqrt()
    assert moved > 1e-3
    assert off < 1e-4 * moved, (off, moved)
    for a, b in zip(logs, plain_logs, strict=True):
        names = {name for name in a if not name.startswith(("time/", "step_time"))}
        assert names == {name for name in b if not name.startswith(("time/", "step_time"))}
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-6), name


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("fused", ["keep", "retain"])
def test_the_same_steps(tmp_path: Path, fused: str, loss_type: str) -> None:
    close(tmp_path, fused, loss_type=loss_type)


@pytest.mark.parametrize("fused", ["keep", "retain"])
@pytest.mark.parametrize(("rows", "accumulated", "rounds"), [(4, 2, 2), (2, 4, 4), (4, 4, 2)])
def test_gradient_accumulation(tmp_path: Path, fused: str, rows: int, accumulated: int, rounds: int) -> None:
    """The last has two generation batches an optimizer step. The rows of a round are shuffled."""
    changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    close(tmp_path, fused, steps_per_generation=rounds, max_grad_norm=0.1, **changes)


@pytest.mark.parametrize("fused", ["keep", "retain"])
def test_adapters(tmp_path: Path, fused: str) -> None:
    def lora() -> LoraConfig:
        return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)

    torch.manual_seed(0)
    plain, _ = run(tmp_path / "off", "off", peft_config=lora())
    torch.manual_seed(0)
    got, _ = run(tmp_path / fused, fused, peft_config=lora())
    for name, weight in plain.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2e-5, msg=name)


def test_a_kl_term_takes_the_graph(tmp_path: Path) -> None:
    close(tmp_path, "retain", beta=0.5, model=str(save_tiny(tmp_path / "model")))


@pytest.mark.parametrize("loss_type", ["cispo", "sapo"])
def test_other_losses_take_the_graph(tmp_path: Path, loss_type: str) -> None:
    close(tmp_path, "retain", loss_type=loss_type)


def test_masked_completions_and_other_rewards(tmp_path: Path) -> None:
    close(tmp_path, "keep", truncated="mask", reward_funcs=["vigor", "self_certainty"], reward_weights=[1.0, 0.5])


@pytest.mark.parametrize("fused", ["keep", "retain"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of a method that TRL calls
def test_gradient_checkpointing(tmp_path: Path, fused: str) -> None:
    close(tmp_path, fused, gradient_checkpointing=True)


def test_a_step_runs_the_decoder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, max_steps=1, completions=COMPLETIONS)
    calls: list[int] = []
    made.model.model.embed_tokens.register_forward_pre_hook(lambda *_: calls.append(1))
    made.train()
    assert len(calls) == 3  # one for all rows; two for the self-check's rows, the first time only
    assert "fused update: keep (one forward and one backward a step; holds about" in capsys.readouterr().out


def test_evaluation_is_not_fused(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, completions=COMPLETIONS)
    made.eval_dataset = made.train_dataset
    made.train()
    before = weights(made.model)
    calls: list[int] = []
    made.model.model.embed_tokens.register_forward_pre_hook(lambda *_: calls.append(1))
    made.evaluate()
    assert len(calls) >= 2  # the norms and the loss have a forward pass each
    assert same_weights(weights(made.model), before)


def test_what_was_kept_is_freed_with_the_step(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, fused="keep", completions=COMPLETIONS)
    made.train()
    fused = made._fusion._fused
    assert isinstance(fused, FusedNorms)
    with pytest.raises(RuntimeError, match=r"has run already, or release\(\)"):
        fused.token_logps([0]).sum().backward()


@pytest.mark.parametrize(
    ("fused", "changes", "message"),
    [
        ("keep", {"reward_funcs": "self_certainty"}, "no reward takes the gradient norm"),
        ("keep", {"reward_funcs": "vigor(parameters=head)"}, "no reward takes the gradient norm"),
        ("retain", {"num_iterations": 2}, "more than one optimizer step"),
        ("keep", {"steps_per_generation": 2}, "more than one optimizer step"),
        ("keep", {"beta": 0.1}, "needs one weight a row: beta=0.1 weighs tokens"),
        ("keep", {"loss_type": "cispo"}, "needs one weight a row: loss_type='cispo'"),
        ("keep", {"top_entropy_quantile": 0.5}, "leaves tokens out"),
        ("retain", {"entropy_coef": 0.01}, "entropy bonus"),
        ("keep", {"cast_lm_head_to_fp32": True}, "changes the head for the update only"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, fused: str, changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    reward = changes.pop("reward_funcs", "vigor")
    model = str(save_tiny(tmp_path / "model"))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, reward, fused=fused, model=model, **changes)
    trainer(tmp_path, reward, fused="auto", model=model, **changes)


def test_dropout_is_not_dropped_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])
    made = trainer(tmp_path, max_steps=1, completions=COMPLETIONS, peft_config=lora)
    made.train()
    assert "fused update: off (the update would train without the model's dropout of 0.1" in capsys.readouterr().out


def test_a_model_that_cannot_be_scored_so_is_trained_without(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.weight = inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight.clone().mul_(2))

    model = tiny_model()
    model.model.layers[0].mlp.up_proj = Scaled(model.model.layers[0].mlp.up_proj)
    with pytest.warns(UserWarning, match=r"up_proj.*not fused"), pytest.warns(UserWarning, match="back to the loop"):
        run(tmp_path / "auto", "auto", model=model)
    with pytest.raises(ValueError, match="up_proj"):
        run(tmp_path / "keep", "keep", model=model)


def test_the_ladder() -> None:
    small, large = FusedBytes(keep=100, retain=200), FusedBytes(keep=10**12, retain=10**11)
    assert decide("auto", None, None, small, 10**9).mode == "keep"
    assert decide("auto", None, "beta=0.1 weighs tokens", small, 10**9).mode == "retain"
    assert decide("auto", None, None, large, 10**12).mode == "retain"
    assert decide("auto", None, None, large, 10**9).mode == "off"
    assert decide("auto", "no reward", None, small, 10**9).mode == "off"
    assert decide("off", None, None, small, 10**9).mode == "off"
    assert decide("retain", None, None, large, 10**9).mode == "retain"
    reason = decide("auto", None, None, large, 10**9).reason
    assert "931.3 GiB" in reason and "954 MiB free" in reason


def test_the_estimate_is_near_what_is_held(tmp_path: Path) -> None:
    """Counted on the tensors themselves: within a factor of two, and not below."""
    from vigor.gradnorm import fused_grad_norms

    model = tiny_model(hidden_size=64, intermediate_size=176, num_attention_heads=4)
    ids = torch.randint(3, 30, (4, 40))
    completion = torch.ones_like(ids)
    completion[:, :20] = 0
    fused = fused_grad_norms(model, ids, torch.ones_like(ids), completion, mode="keep")
    held: dict[int, int] = {}
    for scored, _ in fused._passes:
        kept = scored.capture.kept
        for use in (use for uses in kept.linear.values() for use in uses):
            for x in vars(use).values():
                if isinstance(x, torch.Tensor):
                    held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        for _, d in (rows for uses in kept.rows.values() for rows in uses):
            held[d.untyped_storage().data_ptr()] = d.untyped_storage().nbytes()
    estimate = fused_bytes(model, torch.full((4,), 40), torch.full((4,), 20), dtype=torch.float32)
    assert sum(held.values()) <= estimate.keep <= 2 * sum(held.values())


def test_free_memory_is_of_this_machine() -> None:
    assert 2**20 < fusion.free_bytes(torch.device("cpu")) < 2**50
