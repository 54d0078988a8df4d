"""VigorConfig: one coherent set of defaults, and refusals that say what, where, why and the remedy."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import dataset, lab_tokenizer, tiny_model
from trl import GRPOConfig, GRPOTrainer

from vigor import VigorConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make(**settings: Any) -> VigorConfig:
    return VigorConfig(**{"output_dir": "unused", "use_cpu": True, **settings})


def test_defaults_are_one_distribution_and_no_tracker() -> None:
    args = make()
    assert (args.temperature, args.top_p, args.top_k) == (1.0, 1.0, 0)
    assert (args.min_p, args.repetition_penalty) == (None, 1.0)
    assert args.report_to in ("none", [])
    assert args.log_completions
    assert args.num_completions_to_print == 0
    assert args.logging_steps == 1
    assert args.truncated == "score"
    assert args.num_generations == 8


def test_bf16_is_off_on_a_cpu_and_stays_as_asked() -> None:
    assert make().bf16 is False
    assert make(bf16=True).bf16 is True
    assert make(bf16=False).bf16 is False
    assert VigorConfig("unused").bf16 is torch.cuda.is_available()


def test_the_config_is_made_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        make()


def test_it_is_a_grpo_config_for_trl_itself(tmp_path: Path) -> None:
    args = make(
        output_dir=str(tmp_path), max_steps=1, num_generations=2, per_device_train_batch_size=2, save_strategy="no",
        max_completion_length=4, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    assert isinstance(args, GRPOConfig)
    trainer = GRPOTrainer(
        tiny_model(),
        lambda completions, **_: [float(len(c)) for c in completions],
        args,
        train_dataset=dataset(),
        processing_class=lab_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_it_writes_itself_as_json() -> None:
    assert '"truncated": "worst"' in make(truncated="worst").to_json_string()


# Truncation


@pytest.mark.parametrize(("truncated", "masked"), [("score", False), ("worst", False), ("mask", True)])
def test_truncated_sets_the_mask_of_trl(truncated: str, masked: bool) -> None:
    assert make(truncated=truncated).mask_truncated_completions is masked


def test_the_mask_of_trl_sets_truncated() -> None:
    assert make(mask_truncated_completions=True).truncated == "mask"


def test_an_unknown_truncated_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("truncated='drop': choose one of score, worst, mask.")):
        make(truncated="drop")


def test_worst_and_mask_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"Set mask_truncated_completions=False, or truncated='mask'\."):
        make(truncated="worst", mask_truncated_completions=True)


# Batches


@pytest.mark.parametrize("size", [1, 0, None])
def test_a_group_takes_two(size: int | None) -> None:
    with pytest.raises(ValueError, match=rf"num_generations={size}: .* at least 2\. The paper uses 8"):
        make(num_generations=size, per_device_train_batch_size=8)


def test_a_batch_of_broken_groups_is_refused_with_the_numbers_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"18 completions \(1 processes × 6 rows × 3 rounds\)") as caught:
        make(per_device_train_batch_size=6, gradient_accumulation_steps=3)
    message = str(caught.value)
    assert "num_generations=8" in message
    assert "18 / 8 = 2.25 prompts" in message
    assert "24 = 3 prompts" in message


def test_processes_count_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"12 completions \(3 processes × 4 rows × 1 rounds\)"):
        make(per_device_train_batch_size=4)


def test_steps_per_generation_counts_instead_of_accumulation() -> None:
    with pytest.raises(ValueError, match=r"12 completions \(1 processes × 4 rows × 3 rounds\)"):
        make(per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=3)


def test_a_generation_batch_of_broken_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"20 completions \(generation_batch_size\).*20 / 8 = 2\.50 prompts"):
        make(per_device_train_batch_size=4, generation_batch_size=20)


def test_whole_groups_pass() -> None:
    args = make(per_device_train_batch_size=6, gradient_accumulation_steps=4)
    assert args.generation_batch_size == 24


# Sampling


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_sampling_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature={temperature}: must be positive.* 8 equal completions"):
        make(temperature=temperature)


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 50), ("top_p", 0.9), ("min_p", 0.1), ("repetition_penalty", 1.1)]
)
def test_restricted_sampling_warns_and_goes_on(name: str, value: float) -> None:
    with pytest.warns(UserWarning, match=rf"restricted by {name}={value}, but loss and reward use the whole"):
        args = make(**{name: value})
    assert getattr(args, name) == value


def test_all_restrictions_are_named_at_once() -> None:
    with pytest.warns(UserWarning, match=r"top_p=0\.9, top_k=50"):
        make(top_k=50, top_p=0.9)


def test_a_min_p_of_zero_restricts_nothing_and_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(min_p=0.0)
