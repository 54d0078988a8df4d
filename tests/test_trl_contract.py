"""What VigorTrainer relies on in TRL's GRPOTrainer; each test names what a new TRL changed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import PROMPTS, config, dataset, lab_tokenizer, tiny_model
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

COMPLETIONS = [[10, 11, 1], [12, 1], [13, 14, 15, 1], [16, 1], [17, 1], [18, 19, 1], [20, 1], [21, 1]]
REWARDS = [0.0, 1.0, 0.5, 2.0, 3.0, 3.0, 3.0, 3.0]


def parameters(method: str) -> list[str]:
    return list(inspect.signature(inspect.unwrap(getattr(GRPOTrainer, method))).parameters)


class Spy(GRPOTrainer):
    """A plain GRPOTrainer that keeps what the methods we override were given and returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, Any] = {"generate_calls": 0, "grad": []}

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        self.seen["tokenized"] = super()._tokenize_prompts(prompts)
        return self.seen["tokenized"]

    def _generate(self, prompts: list[Any]) -> Any:
        self.seen["generate_calls"] += 1
        self.seen["generated"] = super()._generate(prompts)
        return self.seen["generated"]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        self.seen["grad"].append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        self.seen["reward_inputs"] = inputs, prompts, completions, completion_ids_list
        self._log_completion_extra("extra_column", list(range(len(prompts))))
        self._log_metric("extra_metric", 2.5)
        self.seen["rewards"] = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self.seen["rewards"]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        logged = len(self._logs["advantages"])
        self.seen["output"] = super()._generate_and_score_completions(inputs)
        self.seen["appended"] = list(self._logs["advantages"])[logged:]
        return self.seen["output"]

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return [list(ids) for ids in COMPLETIONS], None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Spy:
    folder = tmp_path_factory.mktemp("contract")
    made = config(folder)
    args = GRPOConfig(
        **{name: getattr(made, name) for name in ("output_dir", "use_cpu", "max_steps", "num_generations")},
        per_device_train_batch_size=8,
        max_completion_length=8,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=0,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
    )
    spy = Spy(
        tiny_model(),
        lambda completions, **_: list(REWARDS),
        args,
        train_dataset=dataset(),
        processing_class=lab_tokenizer(),
    )
    spy.train()
    return spy


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("_tokenize_prompts", ["self", "prompts"]),
        ("_generate", ["self", "prompts"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_get_output_dir", ["self", "trial"]),
        (
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        ("_get_train_sampler", ["self", "dataset"]),
        ("_get_eval_sampler", ["self", "eval_dataset"]),
        ("_save_optimizer_and_scheduler", ["self", "output_dir"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("train", ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("log", ["self", "logs", "start_time"]),
        ("_log_completion_extra", ["self", "column", "values"]),
        ("_log_metric", ["self", "name", "value"]),
    ],
)
def test_signatures_are_those_that_the_overrides_repeat(method: str, expected: list[str]) -> None:
    assert hasattr(GRPOTrainer, method), f"TRL's GRPOTrainer has no {method} any more; vigor/trainer.py uses it."
    assert parameters(method) == expected, f"TRL changed GRPOTrainer.{method}; vigor/trainer.py overrides it."


def test_tokenize_prompts_returns_ids_images_and_fields(trained: Spy) -> None:
    ids, images, fields = trained.seen["tokenized"]
    tokenizer = trained.processing_class
    assert [list(row) for row in ids] == [tokenizer(p)["input_ids"] for p in PROMPTS[:2] for _ in range(4)], (
        "_tokenize_prompts no longer returns unpadded ids of one prompt a completion first."
    )
    assert images is None, "_tokenize_prompts no longer returns images (None for text) second."
    assert fields == {}, "_tokenize_prompts no longer returns the multimodal fields ({} for text) third."


def test_generate_returns_prompt_ids_and_completion_ids_first_once_a_generation(trained: Spy) -> None:
    assert trained.seen["generate_calls"] == 1, "_generate is not called once per generation batch any more."
    prompt_ids, completion_ids = trained.seen["generated"][:2]
    assert [list(row) for row in prompt_ids] == [list(row) for row in trained.seen["tokenized"][0]], (
        "_generate no longer returns prompt_ids first."
    )
    assert completion_ids == COMPLETIONS, "_generate no longer returns completion_ids second."


def test_generate_calls_the_tokenization_that_is_overridden(trained: Spy) -> None:
    source = inspect.getsource(GRPOTrainer._generate)
    assert "self._tokenize_prompts(prompts)" in source, "_generate no longer calls _tokenize_prompts(prompts)."
    assert "self._generate_single_turn(" in source, "_generate no longer samples through _generate_single_turn."


def test_rewards_are_calculated_with_gradients_allowed(trained: Spy) -> None:
    assert trained.seen["grad"] == [(True, False)], (
        "_calculate_rewards runs under no_grad or inference_mode, or not once: no gradient norm can be computed there."
    )


def test_rewards_get_rows_texts_and_the_sampled_ids(trained: Spy) -> None:
    inputs, prompts, completions, ids = trained.seen["reward_inputs"]
    assert ids == COMPLETIONS, "_calculate_rewards no longer gets the sampled token ids last."
    assert completions == trained.processing_class.batch_decode(COMPLETIONS, skip_special_tokens=True)
    assert [row["prompt"] for row in inputs] == prompts == [p for p in PROMPTS[:2] for _ in range(4)], (
        "_calculate_rewards no longer gets group-major rows, one a completion."
    )


def test_rewards_come_back_as_rows_by_functions(trained: Spy) -> None:
    rewards = trained.seen["rewards"]
    assert rewards.shape == (8, 1), "_calculate_rewards no longer returns (B, n_funcs)."
    assert rewards[:, 0].tolist() == REWARDS


def test_rewards_are_gathered_inside() -> None:
    source = inspect.getsource(inspect.unwrap(GRPOTrainer._calculate_rewards))
    assert "gather(rewards_per_func)" in source, "_calculate_rewards no longer gathers over processes."


def test_advantages_are_the_unbiased_z_score_with_eps_1e_4(trained: Spy) -> None:
    groups = torch.tensor(REWARDS).view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(
        trained.seen["output"]["advantages"],
        expected.flatten(),
        msg="GRPO's advantage is no longer (r - mean) / (std + 1e-4), unbiased std, under the key 'advantages'.",
    )


def test_advantages_of_all_processes_are_appended_to_the_log(trained: Spy) -> None:
    assert trained.seen["appended"] == trained.seen["output"]["advantages"].tolist(), (
        "_generate_and_score_completions no longer appends every advantage to _logs['advantages']."
    )


def test_the_logged_advantages_can_be_rewritten(trained: Spy) -> None:
    logged = trained._logs["advantages"]
    kept, logged[0] = logged[0], 7.0
    assert logged[0] == 7.0
    logged[0] = kept


def test_the_sampler_repeats_each_row_for_its_group_and_the_batch_for_its_rounds() -> None:
    sampler = RepeatSampler(range(5), 1, 2, 3, True, 7)
    order = list(sampler)
    assert len(sampler) == len(order) == 12
    assert order[:2] == order[2:4] == order[4:6] and order[6:8] == order[8:10] == order[10:12], (
        "RepeatSampler no longer takes (data_source, mini_repeat_count, batch_size, repeat_count, shuffle, seed)."
    )
    assert len(set(order)) == 4


def test_extra_columns_and_metrics_reach_the_table_and_the_log(trained: Spy) -> None:
    assert list(trained._logs["extra"]["extra_column"]) == list(range(8)), "_log_completion_extra lost its values."
    logged = [record["extra_metric"] for record in trained.state.log_history if "extra_metric" in record]
    assert logged == [2.5], "_log_metric values no longer reach the log."


def test_training_metrics_are_lists_averaged_at_the_next_log(trained: Spy) -> None:
    trained.model.train()
    trained._metrics["train"]["recorded"].append(3.0)
    trained._metrics["train"]["recorded"].append(4.0)
    trained.log({})
    assert trained.state.log_history[-1]["recorded"] == 3.5, "_metrics['train'][name] is no longer a list to average."


def test_attributes_that_the_overrides_read_exist(trained: Spy) -> None:
    for name in (
        "_is_vlm", "_tokenizer", "accelerator", "chat_template", "chat_template_kwargs", "eos_token_ids",
        "is_deepspeed_enabled", "is_fsdp_enabled", "num_generations", "num_generations_eval", "processing_class",
        "reward_func_names", "reward_weights", "temperature", "tools",
    ):  # fmt: skip
        assert hasattr(trained, name), f"TRL's GRPOTrainer has no {name} any more; vigor/trainer.py reads it."


def test_checkpoints_and_their_rotation_go_through_get_output_dir(trained: Spy, tmp_path: Path) -> None:
    trained.args.output_dir = str(tmp_path)
    assert trained._get_output_dir(None) == str(tmp_path)
    source = inspect.getsource(GRPOTrainer._save_checkpoint) + "".join(
        inspect.getsource(base._save_checkpoint) for base in GRPOTrainer.__mro__ if "_save_checkpoint" in vars(base)
    )
    assert "self._get_output_dir(" in source, "checkpoints are no longer written to _get_output_dir()."


def source(method: str) -> str:
    """The code of a method in every class that GRPOTrainer inherits it from."""
    return "\n".join(inspect.getsource(vars(base)[method]) for base in GRPOTrainer.__mro__ if method in vars(base))


def test_a_checkpoint_is_written_under_the_name_that_is_committed() -> None:
    text = source("_save_checkpoint")
    assert 'checkpoint_folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in text
    assert text.index("self._save_optimizer_and_scheduler(") < text.index("self._push_from_checkpoint("), (
        "_save_checkpoint no longer saves the optimizer, then pushes: vigor/trainer.py pushes after the commit."
    )
    assert "shutil.rmtree(checkpoint" not in text, "_save_checkpoint deletes by itself; vigor/checkpoint.py rotates."


def test_the_gradient_norm_is_asked_for_between_backward_and_the_optimizers_step() -> None:
    text = source("_run_epoch")
    steps = ["self.training_step(", "self._clip_grad_norm(", "self._get_grad_norm(", "self.optimizer.step()",
             "model.zero_grad()", "self.callback_handler.on_step_end("]  # fmt: skip
    assert [text.count(step) for step in steps] == [1] * len(steps), "the training loop has another shape."
    assert sorted(steps, key=text.index) == steps, "the training loop has another order; vigor/guard.py relies on it."


def test_the_engines_counters_are_set_before_the_callbacks_see_training_begin() -> None:
    text = source("_inner_training_loop")
    counters = ["self._tr_loss =", "self._globalstep_last_logged =", "self._prepare_for_training("]
    assert all(text.index(name) < text.index("on_train_begin(") for name in counters), (
        "on_train_begin no longer comes after the counters that vigor/resume.py restores."
    )
    assert "_load_optimizer_and_scheduler(resume_from_checkpoint)" in source("_prepare_for_training")


def test_what_is_saved_beside_the_engines_state_has_its_place(trained: Spy) -> None:
    for name in ("_step", "_buffered_inputs", "_tr_loss", "_globalstep_last_logged", "_logs", "_metrics"):
        assert name in vars(trained), f"TRL's GRPOTrainer has no {name} any more; vigor/resume.py saves it."
    text = source("_prepare_inputs")
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in text
    assert "self._buffered_inputs[self._step % self.args.steps_per_generation]" in text


def test_a_sharded_model_is_prepared_loaded_and_written_by_these() -> None:
    assert parameters("_prepare_for_training")[1:] == ["max_steps", "train_dataloader", "resume_from_checkpoint"]
    assert parameters("save_model")[1:] == ["output_dir", "_internal_call"]
    assert parameters("_save")[1:] == ["output_dir", "state_dict"]
    assert "_load_from_checkpoint(resume_from_checkpoint, self.model_wrapped)" in source("_prepare_for_training")
    assert "self.save_model(output_dir, _internal_call=True)" in source("_save_checkpoint")
    assert '"FULL_STATE_DICT" in str(' in source("save_model"), "save_model may write the whole model by itself now."


def test_nothing_of_a_checkpoint_is_unpickled() -> None:
    for method in ("_load_from_checkpoint", "_load_rng_state", "_load_optimizer_and_scheduler"):
        assert "weights_only=False" not in source(method), f"{method} unpickles."
        assert source(method).count("torch.load(") == source(method).count("weights_only=True"), f"{method} unpickles."


def test_log_forgets_the_metrics_and_then_writes_the_table_where_completions_are_logged() -> None:
    text = source("log")
    cleared, asked = text.find("self._metrics[mode].clear()"), text.find("and self.log_completions:")
    assert 0 < cleared < asked < text.find(".to_parquet("), "log no longer clears, asks log_completions, and writes."
