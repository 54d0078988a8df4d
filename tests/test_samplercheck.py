"""The check after each push of weights: a sampler that is not the policy stops the run; continuous batching."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import same_weights, spy, tiny_model, trainer, weights

from vigor import VigorConfig, VigorTrainer
from vigor.samplercheck import SamplerMismatchError, differences

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

COMPLETIONS = [[10, 11, 1], [12, 1], [13, 14, 15, 1], [16, 1], [17, 1], [18, 19, 1], [20, 1], [21, 1]]
SAMPLED = sum(map(len, COMPLETIONS))


def own_logps(made: VigorTrainer, prompts: list[list[int]]) -> list[list[float]]:
    """log p of the completions under the trainer's weights as they are, one row at a time, temperature included."""
    model = made.accelerator.unwrap_model(made.model)
    found = []
    for prompt, completion in zip(prompts, COMPLETIONS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / made.args.temperature).log_softmax(-1)
        found.append(logps.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist())
    return found


class FakeVLLM:
    """Stands for TRL's VLLMGeneration: the policy's own log-probabilities, or those of what it was made with."""

    def __init__(self, made: VigorTrainer, *, stale: bool = False, shift: float = 0.0, unknown: bool = False) -> None:
        self.made, self.stale, self.shift, self.unknown = made, stale, shift, unknown
        self.pushes = 0
        self.old: list[list[float]] | None = None

    def sync_weights(self) -> None:
        self.pushes += 1

    def generate(self, prompts: list[list[int]], **_: Any) -> Any:
        if self.old is None or not self.stale:
            self.old = own_logps(self.made, prompts)
        logps: Any = [[[x + self.shift] for x in row] for row in self.old]
        if self.unknown:
            logps = [[[None] for _ in row] for row in self.old]
        return prompts, [list(row) for row in COMPLETIONS], logps, None


def with_vllm(folder: Path, *, stale: bool = False, shift: float = 0.0, unknown: bool = False, **changes: Any) -> Any:
    """A trainer that believes to sample with vLLM."""
    made = trainer(folder, "vigor", **changes)
    made.use_vllm = made.args.use_vllm = True
    made.vllm_generation = FakeVLLM(made, stale=stale, shift=shift, unknown=unknown)
    made._last_loaded_step = -1
    return made


def test_a_sampler_that_is_the_policy_passes_and_the_difference_is_logged(tmp_path: Path) -> None:
    made = with_vllm(tmp_path, max_steps=2)
    made.train()
    assert made.vllm_generation.pushes == 2
    logged = [log["sampling/mismatch"] for log in made.state.log_history if "sampling/mismatch" in log]
    assert len(logged) == 2 and all(0 <= value < 1e-5 for value in logged)


@pytest.mark.parametrize("correction", [True, False])
def test_wrong_log_probabilities_stop_the_run_with_the_numbers(tmp_path: Path, correction: bool) -> None:
    made = with_vllm(tmp_path, shift=0.25, vllm_importance_sampling_correction=correction)
    before = weights(made.model)
    with pytest.raises(SamplerMismatchError) as stopped:
        made.train()
    compared = SAMPLED if correction else sum(map(len, COMPLETIONS[:4]))
    assert f"by 0.25 nats on average ({compared} tokens; the largest by 0.25), allowed are 0.1" in str(stopped.value)
    assert str(stopped.value).startswith("step 1: ")
    assert same_weights(before, weights(made.model))


def test_weights_that_never_arrive_are_noticed_once_the_policy_has_moved(tmp_path: Path) -> None:
    made = with_vllm(tmp_path, stale=True, max_steps=40, learning_rate=3e-2)
    with pytest.raises(SamplerMismatchError, match=r"step \d+: vLLM's log-probabilities"):
        made.train()
    assert 1 <= made.state.global_step < 40


def test_the_threshold_is_the_users_and_inf_turns_it_off(tmp_path: Path) -> None:
    with_vllm(tmp_path / "wide", shift=0.25, max_sampler_mismatch=0.3).train()
    off = with_vllm(tmp_path / "off", shift=5.0, max_sampler_mismatch=math.inf)
    off.train()
    assert not any("sampling/mismatch" in log for log in off.state.log_history)


def test_a_sampler_without_log_probabilities_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(SamplerMismatchError, match="reported no log-probability"):
        with_vllm(tmp_path, unknown=True).train()


def test_without_vllm_nothing_is_compared(tmp_path: Path) -> None:
    trained = []
    for name, allowed in (("default", 0.1), ("strict", 1e-9)):
        made = trainer(tmp_path / name, "vigor", completions=COMPLETIONS, max_sampler_mismatch=allowed)
        made.train()
        assert not any("sampling/mismatch" in log for log in made.state.log_history)
        trained.append(weights(made.model))
    assert same_weights(*trained)


def test_the_mean_is_over_counted_tokens_that_the_sampler_scored() -> None:
    sampler = torch.tensor([[-1.0, -2.0, math.nan], [-3.0, 7.0, 7.0]])
    policy = torch.tensor([[-1.5, -2.0, -9.0], [-2.0, -1.0, -1.0]])
    counted = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert differences(sampler, policy, counted).tolist() == [0.5, 0.0, 1.0]


def test_defaults_and_their_limits() -> None:
    args = VigorConfig("unused", use_cpu=True)
    assert args.max_sampler_mismatch == 0.1
    assert args.vllm_importance_sampling_correction is True
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"max_sampler_mismatch=.*must be positive"):
            VigorConfig("unused", use_cpu=True, max_sampler_mismatch=value)


def test_continuous_batching_samples_for_the_trainer_and_keeps_prompts_and_completions_together(tmp_path: Path) -> None:
    small = {"num_blocks": 8, "max_batch_tokens": 64}  # of its cache, which would else take half of the memory
    settings = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": small}
    made = trainer(tmp_path, "vigor", temperature=1e-3, **settings)
    seen: list[Any] = []
    spy(made, "_generate_single_turn", lambda result, prompts, *_: seen.append((prompts, result[0])))
    greedy = tiny_model()
    made.train()
    assert made.state.global_step == 1
    ((prompts, completions),) = seen
    for prompt, completion in zip(prompts, completions, strict=True):  # at this temperature sampling is greedy
        expected = greedy.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=1)
        assert expected[0, len(prompt) :].tolist() == list(completion)


def test_continuous_batching_may_not_round_the_weights(tmp_path: Path) -> None:
    settings = {"use_transformers_continuous_batching": True, "bf16": True}
    with pytest.raises(ValueError, match=r"are float32, to bfloat16 before each generation.*dtype=bfloat16"):
        trainer(tmp_path, "vigor", **settings)
    trainer(tmp_path, "vigor", model=tiny_model().to(torch.bfloat16), **settings)
