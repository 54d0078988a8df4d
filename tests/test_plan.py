"""The plan of a run: exact parameter counts, estimates that move the right way, a text with what one must know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_trainer import lab_tokenizer, tiny_config, tiny_model
from peft import LoraConfig

from vigor import VigorConfig
from vigor.plan import describe, estimate_memory
from vigor.planner.memory import Memory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config-only")
    tiny_config().save_pretrained(path)
    return path


def arguments(**settings: Any) -> VigorConfig:
    return VigorConfig(
        **{
            "output_dir": "unused",
            "use_cpu": True,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 16,
            **settings,
        }
    )


def estimate(
    folder: Path, *, dtype: str | None = None, prompt_length: int = 20, peft: Any = None, **settings: Any
) -> Memory:
    return estimate_memory(
        str(folder), arguments(**settings), dtype=dtype, prompt_length=prompt_length, peft_config=peft
    )


def test_the_parameters_are_counted_exactly_from_the_config_alone(folder: Path) -> None:
    memory = estimate(folder)
    # V·h tied embedding; a layer: q and o h·h, k and v h·16, three feed-forward h·48, two norms of h; a last norm.
    h, vocabulary = 32, len(lab_tokenizer())
    assert memory.parameters == vocabulary * h + 2 * (2 * h * h + 2 * h * 16 + 3 * h * 48 + 2 * h) + h
    assert memory.parameters == sum(p.numel() for p in tiny_model().parameters())
    assert memory.trainable == memory.parameters


def test_weights_gradients_and_optimizer_take_the_bytes_of_their_type(folder: Path) -> None:
    for dtype, size in ((None, 4), ("auto", 4), ("float32", 4), ("bfloat16", 2)):
        memory = estimate(folder, dtype=dtype)
        assert memory.resident == {
            "weights": memory.parameters * size,
            "gradients": memory.parameters * size,
            "optimizer (AdamW)": 2 * memory.parameters * size,
        }


def test_an_adapter_trains_its_own_parameters_only(folder: Path) -> None:
    whole = estimate(folder)
    memory = estimate(folder, peft=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    adapters = 2 * ((32 * 4 + 4 * 32) + (32 * 4 + 4 * 16))
    assert memory.trainable == adapters
    assert memory.parameters == whole.parameters + adapters
    assert memory.resident["gradients"] == adapters * 4
    assert memory.peak < whole.peak


def test_a_reference_model_is_counted_where_there_is_one(folder: Path) -> None:
    memory = estimate(folder, beta=0.1)
    assert memory.resident["reference model"] == memory.parameters * 4
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert "reference model" not in estimate(folder, beta=0.1, peft=adapter).resident


def test_every_part_is_positive_and_the_peak_is_their_worst_case(folder: Path) -> None:
    memory = estimate(folder)
    assert len(memory.phases) == 3
    assert all(part > 0 for part in {**memory.resident, **memory.phases}.values())
    assert memory.peak == sum(memory.resident.values()) + max(memory.phases.values())
    assert memory.dominant in {**memory.resident, **memory.phases}


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"max_completion_length": 64}, {"max_completion_length": 640}),
        ({"prompt_length": 10}, {"prompt_length": 500}),
        ({"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 64}),
        ({"gradient_checkpointing": True, "max_completion_length": 2000}, {"max_completion_length": 2000}),
    ],
)
def test_more_work_never_takes_less_memory(folder: Path, less: dict[str, Any], more: dict[str, Any]) -> None:
    small, large = estimate(folder, **less), estimate(folder, **more)
    assert all(large.phases[name] >= small.phases[name] for name in small.phases)
    assert large.phases != small.phases
    assert large.peak >= small.peak


def test_a_wide_vocabulary_shows_in_the_reward(tmp_path: Path) -> None:
    """The loss never holds the logits (TRL's head is fused); the gradient norm holds those of one sequence."""
    tiny_config(vocab_size=150_000).save_pretrained(tmp_path)
    memory = estimate(tmp_path, max_completion_length=256)
    reward = next(amount for name, amount in memory.phases.items() if name.startswith("reward"))
    assert reward >= 256 * 150_000 * 8


def test_the_dominant_part_is_the_largest(folder: Path, tmp_path: Path) -> None:
    assert estimate(folder, max_completion_length=100_000, per_device_train_batch_size=64).dominant.startswith("update")
    tiny_config(hidden_size=512, intermediate_size=2048).save_pretrained(tmp_path)
    assert estimate(tmp_path, max_completion_length=1, prompt_length=1).dominant == "optimizer (AdamW)"


def text(memory: Memory | str = "unknown here", n_prompts: int = 100, **settings: Any) -> dict[str, str]:
    described = describe(
        arguments(**settings),
        n_prompts=n_prompts,
        longest_prompt=20,
        rewards={"vigor": 1.0, "accuracy": 0.0},
        memory=memory,
    )
    lines = (line.partition(" ") for line in described.splitlines() if not line.startswith(" "))
    return {head: rest.strip() for head, _, rest in lines}


def test_the_text_says_prompts_steps_tokens_and_memory(folder: Path) -> None:
    memory = estimate(folder)
    said = text(
        memory,
        n_prompts=1000,
        gradient_accumulation_steps=4,
        max_completion_length=100,
        num_train_epochs=2,
        max_steps=-1,
    )
    assert "64 completions = 8 prompts × 8" in said["generation"]
    assert "1 processes × 16 rows × 4 accumulated = 64 completions" in said["batch"]
    assert said["steps"].startswith("250 optimizer steps (2.00 epochs)")
    assert "1,600,000 generated in 16,000 completions" in said["tokens"]
    assert said["rewards"] == "vigor × 1, accuracy × 0 (watched only)"
    assert f"{memory.parameters:,} parameters" in said["model"]
    assert memory.dominant in said["memory"]
    assert "MiB" in said["memory"]


def test_max_steps_counts_updates(folder: Path) -> None:
    said = text(n_prompts=1000, max_steps=50, max_completion_length=10)
    assert said["steps"].startswith("50 optimizer steps (0.10 epochs), 1 per generation")
    assert "8,000 generated in 800 completions" in said["tokens"]


def test_updates_that_reuse_a_generation_generate_less() -> None:
    said = text(n_prompts=1000, max_steps=50, num_iterations=2, steps_per_generation=2, max_completion_length=10)
    assert "4 per generation" in said["steps"]
    # 50 updates at 4 a generation: 13 generations are begun.
    assert "in 416 completions" in said["tokens"]


def test_an_unknown_memory_says_why() -> None:
    assert text("no config.json")["memory"] == "unknown: no config.json"
