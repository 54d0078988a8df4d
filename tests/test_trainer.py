"""VigorTrainer: rewards, groups, ties, truncation and what must not change, on tiny random models."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import (
    CHAT_TEMPLATE,
    PROMPTS,
    config,
    dataset,
    lab_tokenizer,
    naive_score,
    same_weights,
    save_tiny,
    spy,
    table,
    tiny_model,
    trainer,
    weights,
)
from trl import GRPOConfig, GRPOTrainer

from vigor import shaping
from vigor.config import VigorConfig
from vigor.outside import RewardError
from vigor.rewards import get
from vigor.rewards.base import Reward
from vigor.trainer import VigorTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EOS = 1
GOLDEN_8 = (-1.4287, -1.0205, -0.6123, -0.2041, 0.2041, 0.6123, 1.0205, 1.4287)
DISTINCT = [[40 + i, 50 - i, EOS] for i in range(8)]


def fixed(values: list[float | None], name: str = "fixed") -> Any:
    """A TRL reward function that gives these values, row by row."""

    def reward(completions: list[Any], **_: Any) -> list[float | None]:
        return list(values)

    reward.__name__ = name
    return reward


def nan_zscore(values: list[float | None], size: int) -> list[float]:
    """GRPO's advantage from its definition, rows without reward left out; 0 for those and for groups of equals."""
    out: list[float] = []
    for start in range(0, len(values), size):
        group = values[start : start + size]
        known = [v for v in group if v is not None]
        mean = sum(known) / len(known)
        std = math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1))
        out += [0.0 if v is None else (v - mean) / (std + 1e-4) for v in group]
    return out


# Kinds of rewards ------------------------------------------------------------------------


async def brevity(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def digits(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def test_names_objects_functions_and_async_functions_mix(tmp_path: Path) -> None:
    mine = Reward("tokens", frozenset(), lambda rollouts, policy: rollouts.lengths_B.float())
    made = trainer(
        tmp_path,
        ["vigor", mine, digits, brevity, "vigor(ties=index)"],
        reward_weights=[1.0, 0.5, 2.0, -0.1, 0.0],
        data=dataset(),
    )
    made.train()
    rows = table(tmp_path)
    assert made.reward_func_names == ["vigor", "tokens", "digits", "brevity", "vigor(ties=index)"]
    assert rows["tokens"].tolist() == rows["length"].astype(float).tolist()
    assert rows["brevity"].tolist() == [-float(len(text)) for text in rows["completion"]]
    total = rows["vigor"] + 0.5 * rows["tokens"] + 2 * rows["digits"] - 0.1 * rows["brevity"]
    assert rows["advantage"].tolist() == pytest.approx(nan_zscore(total.tolist(), 4), abs=1e-4)


def test_one_name_and_a_tuple_are_lists_of_rewards(tmp_path: Path) -> None:
    assert trainer(tmp_path, "self_certainty").reward_func_names == ["self_certainty"]
    assert trainer(tmp_path, ("vigor", "random")).reward_func_names == ["vigor", "random"]


def test_the_default_reward_is_vigor(tmp_path: Path) -> None:
    made = VigorTrainer(tiny_model(), args=config(tmp_path), train_dataset=dataset(), processing_class=lab_tokenizer())
    assert made.reward_func_names == ["vigor"]


def test_a_reward_option_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no option 'tie'"):
        trainer(tmp_path, "vigor(tie=index)")


def test_repeated_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vigor more than once"):
        trainer(tmp_path, ["vigor", get("vigor")])


def test_a_missing_column_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'accuracy' reads the column 'answer', but the data set has prompt"):
        trainer(tmp_path, ["vigor", "accuracy"])


# Weight 0 ------------------------------------------------------------------------


def test_watched_rewards_change_no_sample_no_advantage_and_no_weight(tmp_path: Path) -> None:
    """Three steps with and without five watched rewards, some of which draw, fail to answer or run a child process."""
    data = dataset(answer=["7", "19", None, "5"])
    results = []
    for name, watched in (("alone", []), ("watched", ["random", "accuracy", "format", "self_certainty", digits])):
        folder = tmp_path / name
        made = trainer(
            folder, ["vigor", *watched], data=data, reward_weights=[1.0] + [0.0] * len(watched), max_steps=3, seed=3
        )
        made.train()
        rows = [table(folder, step) for step in (1, 2, 3)]
        results.append((weights(made.model), rows))
    (alone, rows_alone), (watched_weights, rows_watched) = results
    for first, second in zip(rows_alone, rows_watched, strict=True):
        assert first["completion"].tolist() == second["completion"].tolist()
        assert first["vigor"].tolist() == second["vigor"].tolist()
        assert first["advantage"].tolist() == second["advantage"].tolist()
    assert same_weights(alone, watched_weights)
    assert not same_weights(alone, weights(tiny_model())), "nothing was trained, so the comparison shows nothing"


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_watched_rewards_change_no_advantage_in_either_aggregation(tmp_path: Path, aggregation: str) -> None:
    advantages = []
    for name, watched in (("alone", []), ("watched", ["random", fixed([None, 1.0] * 4)])):
        made = trainer(
            tmp_path / name,
            ["vigor", digits, *watched],
            completions=DISTINCT,
            reward_weights=[1.0, 0.5] + [0.0] * len(watched),
            multi_objective_aggregation=aggregation,
        )
        made.train()
        advantages.append(table(tmp_path / name)["advantage"].tolist())
    assert advantages[0] == advantages[1]
    assert any(advantages[0])


def test_a_watched_reward_cannot_make_a_row_scorable(tmp_path: Path) -> None:
    """Row 0 has no reward that counts: it must neither be trained on nor shift the baseline of its group."""
    values = [None, 1.0, 2.0, 4.0, 0.0, 1.0, None, 3.0]
    made = trainer(
        tmp_path,
        [fixed(values), fixed([9.0] * 8, "watched"), "random"],
        reward_weights=[1.0, 0.0, 0.0],
        completions=DISTINCT,
    )
    made.train()
    advantages = table(tmp_path)["advantage"].tolist()
    assert advantages == pytest.approx(nan_zscore(values, 4), abs=1e-6)
    assert advantages[0] == 0.0
    assert advantages[6] == 0.0


# Advantages ------------------------------------------------------------------------


def test_golden_advantages_for_groups_of_eight(tmp_path: Path) -> None:
    made = trainer(tmp_path, "vigor", num_generations=8, completions=DISTINCT)
    made.train()
    rows = table(tmp_path).sort_values("vigor/score")
    assert rows["advantage"].tolist() == pytest.approx(GOLDEN_8, abs=5e-5)
    assert rows["vigor"].tolist() == pytest.approx([2 * i / 7 - 1 for i in range(8)])


def test_identical_completions_get_identical_rewards_and_advantages(tmp_path: Path) -> None:
    a, b, c = [40, 41, EOS], [42, EOS], [43, 44, 45, EOS]
    made = trainer(tmp_path, ["vigor", "self_certainty"], completions=[a, b, a, c, a, a, a, b])
    made.train()
    rows = table(tmp_path)
    for same in ([0, 2], [4, 5, 6]):
        for name in ("vigor", "vigor/score", "self_certainty", "advantage"):
            assert rows[name].iloc[same].nunique() == 1, name
    assert sorted(rows["vigor"].iloc[4:].round(6).unique()) == pytest.approx([-1.0, 1 / 3]) or sorted(
        rows["vigor"].iloc[4:].round(6).unique()
    ) == pytest.approx([-1 / 3, 1.0])


def test_ties_by_index_reproduce_the_official_code(tmp_path: Path) -> None:
    a, b, c = [40, 41, EOS], [42, EOS], [43, 44, 45, EOS]
    made = trainer(tmp_path, "vigor(ties=index)", completions=[a, b, a, c, a, a, a, a])
    made.train()
    rows = table(tmp_path)
    scores = torch.tensor(rows["vigor(ties=index)/score"].tolist()).view(2, 4)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    official = 2 * ranks / 3 - 1
    assert rows["vigor(ties=index)"].tolist() == pytest.approx(official.flatten().tolist())
    assert rows["vigor(ties=index)"].iloc[4:].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])


@pytest.mark.parametrize("value", [0.3, 0.1, 1 / 3, 1e8, -7.7])
def test_groups_of_equal_rewards_have_exactly_zero_advantage(tmp_path: Path, value: float) -> None:
    """0.3 summed seven times and divided by seven is not 0.3; TRL divides what is left by 1e-4."""
    equal = fixed([value] * 7 + [0.0] * 6 + [1.0])
    completions = [[40 + i, EOS] for i in range(14)]
    made = trainer(tmp_path, [equal], num_generations=7, per_device_train_batch_size=14, completions=completions)
    made.train()
    advantages = table(tmp_path)["advantage"].tolist()
    assert advantages[:7] == [0.0] * 7
    assert all(advantages[7:])


def test_two_weighted_rewards_that_are_equal_in_a_group_have_exactly_zero_advantage(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        [fixed([0.1] * 7, "first"), fixed([0.7] * 7, "second")],
        reward_weights=[0.3, 1.7],
        num_generations=7,
        per_device_train_batch_size=7,
        completions=[[40 + i, EOS] for i in range(7)],
    )
    outputs: list[Any] = []
    spy(made, "_generate_and_score_completions", lambda output, *_: outputs.append(output))
    made.train()
    assert outputs[0]["advantages"].tolist() == [0.0] * 7
    assert table(tmp_path)["advantage"].tolist() == [0.0] * 7


def test_a_batch_of_identical_groups_moves_no_weight(tmp_path: Path) -> None:
    made = trainer(tmp_path, "vigor", completions=[[40, 41, EOS]] * 4 + [[50, EOS]] * 4)
    before = weights(made.model)
    made.train()
    assert same_weights(before, weights(made.model))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_plain_functions_get_the_advantages_of_trl(tmp_path: Path, scale: str, aggregation: str) -> None:
    """The weighted sum of the second group is constant, its normalised sum is not: TRL's advantages must survive."""
    first = fixed([1.0, 2.0, 0.0, 5.0, 2.0, 0.0, 2.0, 0.0], "first")
    second = fixed([0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0], "second")
    settings = {
        "reward_weights": [1.0, 2.0],
        "scale_rewards": scale,
        "multi_objective_aggregation": aggregation,
    }
    ours = trainer(tmp_path / "ours", [first, second], completions=DISTINCT, **settings)
    args = config(tmp_path / "trl", **settings)
    theirs = GRPOTrainer(tiny_model(), [first, second], args, train_dataset=dataset(), processing_class=lab_tokenizer())
    theirs._generate_single_turn = lambda *_, **__: ([list(ids) for ids in DISTINCT], None)
    advantages = []
    for made in (ours, theirs):
        made.train()
        advantages.append(list(made._logs["advantages"]))
    assert advantages[0] == pytest.approx(advantages[1], abs=2e-3)


# The score ------------------------------------------------------------------------


def sampled_ids(made: VigorTrainer) -> list[tuple[list[int], list[int]]]:
    """Fills up with (prompt ids, completion ids) of each row while the trainer trains."""
    seen: list[tuple[list[int], list[int]]] = []

    def keep(_: Any, inputs: Any, prompts: Any, completions: Any, ids: Any) -> None:
        seen.extend((list(p), list(c)) for p, c in zip(made._prompt_ids, ids, strict=True))

    spy(made, "_calculate_rewards", keep)
    return seen


def test_the_score_is_the_naive_definition_on_the_sampled_ids(tmp_path: Path) -> None:
    model = tiny_model().double()
    reference = copy.deepcopy(model).eval()
    made = trainer(tmp_path, "vigor", model=model, max_completion_length=12)
    seen = sampled_ids(made)
    made.train()
    rows = table(tmp_path)
    expected = [naive_score(reference, prompt, completion) for prompt, completion in seen]
    assert rows["vigor/score"].tolist() == pytest.approx(expected, rel=1e-6)
    ranks = shaping.rank(torch.tensor(expected, dtype=torch.float64).view(2, 4))
    assert rows["vigor"].tolist() == pytest.approx(ranks.flatten().tolist(), abs=1e-6)


@pytest.mark.parametrize(("spec", "temperature"), [("vigor", 0.7), ("vigor(temperature=1.0)", 1.0)])
def test_the_score_is_taken_at_the_sampling_temperature(tmp_path: Path, spec: str, temperature: float) -> None:
    model = tiny_model().double()
    reference = copy.deepcopy(model).eval()
    made = trainer(tmp_path, spec, model=model, temperature=0.7, completions=DISTINCT)
    seen = sampled_ids(made)
    made.train()
    expected = [naive_score(reference, prompt, completion, temperature) for prompt, completion in seen]
    assert table(tmp_path)[f"{made.reward_func_names[0]}/score"].tolist() == pytest.approx(expected, rel=1e-6)


def test_rewards_see_the_sampled_ids_and_not_the_text_tokenised_again(tmp_path: Path) -> None:
    """ ";" and " " sampled one after the other read "; ", which the tokenizer knows as one token."""
    tokenizer = lab_tokenizer()
    apart = [*tokenizer(";")["input_ids"], *tokenizer(" ")["input_ids"]]
    together = tokenizer(tokenizer.decode(apart))["input_ids"]
    assert len(apart) == 2
    assert len(together) == 1
    model = tiny_model().double()
    reference = copy.deepcopy(model).eval()
    rows = [[*apart, EOS], *DISTINCT[:3], *DISTINCT[4:]]
    made = trainer(tmp_path, "vigor", model=model, completions=rows)
    seen = sampled_ids(made)
    made.train()
    score = table(tmp_path)["vigor/score"][0]
    prompt = seen[0][0]
    assert score == pytest.approx(naive_score(reference, prompt, [*apart, EOS]), rel=1e-6)
    assert score != pytest.approx(naive_score(reference, prompt, [*together, EOS]), rel=1e-2)


def test_adapters_are_scored_over_what_is_trained(tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    made = trainer(tmp_path, "vigor", model=tiny_model(), peft_config=adapter, completions=DISTINCT)
    trainable = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora" in name for name in trainable)
    made.model.eval()
    prompts = lab_tokenizer()([PROMPTS[row // 4] for row in range(8)])["input_ids"]
    expected = [
        naive_score(made.model, prompt, completion) for prompt, completion in zip(prompts, DISTINCT, strict=True)
    ]
    made.train()
    assert table(tmp_path)["vigor/score"].tolist() == pytest.approx(expected, rel=1e-4)


def test_conversations_are_rendered_by_the_chat_template_and_scored(tmp_path: Path) -> None:
    prompts = [[{"role": "system", "content": "maybe"}, {"role": "user", "content": text}] for text in ("3+4", "12+7")]
    tokenizer = lab_tokenizer(CHAT_TEMPLATE)
    boxed = tokenizer(" \\boxed{7}")["input_ids"]
    model = tiny_model().double()
    reference = copy.deepcopy(model).eval()
    made = trainer(
        tmp_path,
        ["vigor", "accuracy", "format"],
        reward_weights=[1.0, 0.0, 0.0],
        model=model,
        tokenizer=tokenizer,
        data=dataset(prompts, answer=["7", "19"]),
        completions=[[*boxed, EOS], *DISTINCT[:3], [*boxed, EOS], *DISTINCT[4:7]],
    )
    seen = sampled_ids(made)
    made.train()
    rows = table(tmp_path)
    assert seen[0][0] == tokenizer("Q:maybe\nQ:3+4\nA:")["input_ids"]
    assert rows["accuracy"].tolist() == [1.0] + [0.0] * 7
    assert rows["format"].tolist() == [1.0, 0.0, 0.0, 0.0] * 2
    expected = [naive_score(reference, prompt, completion) for prompt, completion in seen]
    assert rows["vigor/score"].tolist() == pytest.approx(expected, rel=1e-6)


def test_special_tokens_in_a_prompt_stay_text(tmp_path: Path) -> None:
    made = trainer(tmp_path, "format", data=dataset(["Q:3<eos>+4<pad>\nA:", "Q:1\nA:"]))
    seen = sampled_ids(made)
    made.train()
    special = set(lab_tokenizer().all_special_ids) - {lab_tokenizer().unk_token_id}
    assert all(not special & set(prompt) for prompt, _ in seen)
    assert len(seen[0][0]) > len(lab_tokenizer()("Q:3+4\nA:")["input_ids"])


# What must not matter ------------------------------------------------------------------------


def scores_with(folder: Path, reward_funcs: Any = "vigor", **changes: Any) -> dict[str, list[float]]:
    prompts = [f"Q:{'1' * (i + 1)}+{i}\nA:" for i in range(8)]
    completions = [[10 + (7 * i + j) % 50 for j in range(1 + i % 6)] + [EOS] for i in range(64)]
    made = trainer(folder, reward_funcs, data=dataset(prompts), completions=completions, num_generations=8, **changes)
    made.train()
    rows = table(folder)
    return {name: rows[name].tolist() for name in rows.columns if name not in ("step", "prompt", "completion")}


def test_micro_batches_change_no_reward(tmp_path: Path) -> None:
    funcs = ["vigor", "self_certainty"]
    splits = [(64, 1), (8, 8), (16, 4)]
    whole, *others = (
        scores_with(tmp_path / f"{rows}", funcs, per_device_train_batch_size=rows, gradient_accumulation_steps=rounds)
        for rows, rounds in splits
    )
    assert len(whole["vigor"]) == 64
    for other in others:
        assert other["vigor/score"] == whole["vigor/score"]
        assert other["vigor"] == whole["vigor"]
        assert other["self_certainty"] == pytest.approx(whole["self_certainty"], rel=1e-5)
        assert other["advantage"] == pytest.approx(whole["advantage"], abs=1e-4)


def test_gradient_checkpointing_and_padding_change_no_reward(tmp_path: Path) -> None:
    plain = scores_with(tmp_path / "plain", per_device_train_batch_size=64)
    checkpointed = scores_with(tmp_path / "gc", per_device_train_batch_size=64, gradient_checkpointing=True)
    padded = scores_with(tmp_path / "padded", per_device_train_batch_size=64, pad_to_multiple_of=32)
    for other in (checkpointed, padded):
        assert other["vigor/score"] == pytest.approx(plain["vigor/score"], rel=1e-6)
        assert other["vigor"] == plain["vigor"]
        assert other["advantage"] == plain["advantage"]


def test_scoring_leaves_no_gradient_and_no_mode_behind(tmp_path: Path) -> None:
    made = trainer(tmp_path, ["vigor", "self_certainty"])
    seen: list[tuple[bool, bool]] = []

    def look(*_: Any) -> None:
        seen.append((all(p.grad is None for p in made.model.parameters()), made.model.training))

    spy(made, "_calculate_rewards", look)
    made.train()
    assert seen == [(True, True)]


def test_a_watched_reward_draws_no_random_number(tmp_path: Path) -> None:
    made = trainer(tmp_path, ["vigor", "self_certainty", "random"])
    states: list[torch.Tensor] = []
    inner = made._calculate_rewards

    def around(*args: Any) -> Any:
        states.append(torch.get_rng_state())
        result = inner(*args)
        states.append(torch.get_rng_state())
        return result

    made._calculate_rewards = around
    made.train()
    assert torch.equal(states[0], states[1])


# Truncation ------------------------------------------------------------------------

CUT = [[40, 41, EOS], [42, 43, 44], [45, EOS], [46, 47, 48], [49, EOS], [50, 51, EOS], [52, 53, EOS], [54, 55, 56]]
IS_CUT = [False, True, False, True, False, False, False, True]


def train_cut(folder: Path, truncated: str, reward_funcs: Any = "vigor", **changes: Any) -> tuple[Any, Any]:
    made = trainer(folder, reward_funcs, completions=CUT, truncated=truncated, **changes)
    outputs: list[Any] = []
    spy(made, "_generate_and_score_completions", lambda output, *_: outputs.append(output))
    made.train()
    return table(folder), outputs[0]


def test_truncated_completions_are_scored_like_any_other_by_default(tmp_path: Path) -> None:
    assert VigorConfig("x", use_cpu=True).truncated == "score"
    rows, output = train_cut(tmp_path, "score")
    assert rows["truncated"].tolist() == IS_CUT
    assert not rows["vigor/score"].isna().any()
    ranks = shaping.rank(torch.tensor(rows["vigor/score"].tolist()).view(2, 4)).flatten()
    assert rows["vigor"].tolist() == pytest.approx(ranks.tolist())
    assert (output["completion_mask"].sum(1) == torch.tensor([len(ids) for ids in CUT])).all()


def test_truncated_worst_ranks_them_below_every_complete_one(tmp_path: Path) -> None:
    rows, output = train_cut(tmp_path, "worst")
    rewards = rows["vigor"].tolist()
    assert rewards[1] == rewards[3] == pytest.approx(-2 / 3)
    assert min(rewards[0], rewards[2]) == pytest.approx(1 / 3)
    assert rewards[7] == -1.0
    assert rewards[4:7] == pytest.approx(
        [2 * (1 + sorted(rows["vigor/score"][4:7]).index(s)) / 3 - 1 for s in rows["vigor/score"][4:7]]
    )
    assert (output["completion_mask"].sum(1) > 0).all()


def test_truncated_mask_takes_them_out_of_rewards_and_loss(tmp_path: Path) -> None:
    rows, output = train_cut(tmp_path, "mask")
    assert rows["vigor"].isna().tolist() == IS_CUT
    assert rows["advantage"][IS_CUT].tolist() == [0.0] * 3
    assert (output["completion_mask"].sum(1) == 0).tolist() == IS_CUT
    complete = [row for row, cut in enumerate(IS_CUT[:4]) if not cut]
    assert sorted(rows["vigor"].iloc[complete]) == [-1.0, 1.0]
    assert sorted(rows["vigor"].iloc[4:7]) == [-1.0, 0.0, 1.0]
    assert rows["advantage"].tolist() == pytest.approx(
        nan_zscore([None if math.isnan(r) else r for r in rows["vigor"]], 4), abs=1e-5
    )


def test_truncated_mask_holds_for_every_weighted_reward(tmp_path: Path) -> None:
    """'mask' means no reward: a user's function must not put truncated rows into the baseline either."""
    values = [1.0, 9.0, 2.0, 9.0, 0.0, 1.0, 2.0, 9.0]
    rows, _ = train_cut(tmp_path, "mask", [fixed(values)])
    expected = nan_zscore([None if cut else v for v, cut in zip(values, IS_CUT, strict=True)], 4)
    assert rows["advantage"].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_group_that_is_truncated_throughout_teaches_nothing(tmp_path: Path) -> None:
    cut = [[40 + i, 50 - i, 44] for i in range(4)]
    for truncated in ("worst", "mask"):
        folder = tmp_path / truncated
        made = trainer(folder, "vigor", completions=cut + DISTINCT[4:], truncated=truncated)
        made.train()
        advantages = table(folder)["advantage"].tolist()
        assert advantages[:4] == [0.0] * 4
        assert all(advantages[4:])


def test_a_batch_that_is_masked_throughout_trains_on_nothing_and_goes_on(tmp_path: Path) -> None:
    made = trainer(tmp_path, "vigor", completions=[[40 + i, 50 - i, 44] for i in range(8)], truncated="mask")
    before = weights(made.model)
    made.train()
    assert same_weights(before, weights(made.model))


# Failures ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vigor", "self_certainty"])
def test_a_diverged_policy_stops_the_run_and_names_the_reward(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    made = trainer(tmp_path, name, model=model, completions=DISTINCT)
    with pytest.raises(FloatingPointError, match=rf"step 1: reward '{name}' is nan for 8 of 8.*learning_rate"):
        made.train()


def test_a_wrong_number_of_values_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, [fixed([1.0])], completions=DISTINCT)
    with pytest.raises(RewardError, match="gave back 1 values at step 1: expected a list of 8"):
        made.train()


# The course of a run ------------------------------------------------------------------------


def test_checkpoints_lie_in_their_own_folder_and_rotate_there(tmp_path: Path) -> None:
    made = trainer(tmp_path, "format", max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2)
    made.train()
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_evaluation_uses_its_own_group_size(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        "vigor",
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        data=dataset(),
    )
    made.eval_dataset = None
    metrics = made.evaluate(dataset(PROMPTS[:2]))
    assert metrics["eval_rewards/vigor/std"] == pytest.approx(2 / math.sqrt(3), abs=1e-5)


def test_several_updates_a_generation_keep_groups_whole(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, "vigor", num_iterations=2, steps_per_generation=2, max_steps=4, per_device_train_batch_size=4
    )
    made.train()
    assert made.state.global_step == 4
    rows = table(tmp_path, 1)
    assert len(rows) == 8
    assert rows["vigor"].groupby(rows.index // 4).mean().tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_random_knows_nothing_of_the_text(tmp_path: Path) -> None:
    """Identical completions get coins of their own: one coin for all of them would favour or punish a text."""
    many = {"per_device_train_batch_size": 64, "data": dataset(PROMPTS * 4)}
    made = trainer(tmp_path, "random", completions=[[40, EOS]] * 64, **many)
    made.train()
    assert 16 < table(tmp_path)["random"].sum() < 48


def test_what_a_tool_wrote_is_not_scored(tmp_path: Path) -> None:
    """TRL marks tokens of tools and environments with 0; they condition the policy's tokens and are not its own."""
    prompt, completion, own = [12, 13, 14], [20, 21, 22, 23, EOS], [1, 1, 0, 0, 1]

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        ids = [[*completion[:-1], EOS]] * len(prompts)
        logprobs = [[0.0] * len(completion)] * len(prompts)
        return {"prompt_ids": [prompt] * len(prompts), "completion_ids": ids, "logprobs": logprobs,
                "env_mask": [own] * len(prompts)}  # fmt: skip

    model = tiny_model()
    made = trainer(tmp_path, "vigor", model=copy.deepcopy(model))
    made.rollout_func = rollout
    made.train()
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1)[torch.arange(5), torch.tensor(completion)]
    loss = -(logps * torch.tensor(own)).sum() / 3
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    wanted = -math.sqrt(3 * sum(float(g.double().square().sum()) for g in gradients))
    assert table(tmp_path)["vigor/score"].iloc[0] == pytest.approx(wanted, rel=1e-5)


def test_a_config_of_trl_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes a VigorConfig, got a GRPOConfig"):
        VigorTrainer(tiny_model(), "vigor", GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_random_tosses_anew_for_each_generation_of_a_step(tmp_path: Path) -> None:
    """With one update after two generations, the coins of the second must not repeat those of the first."""
    made = trainer(
        tmp_path,
        "random",
        num_generations=8,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        data=dataset(PROMPTS * 4),
        completions=[[10 + row, EOS] for row in range(32)],
    )
    tosses: list[list[float]] = []
    spy(made, "_calculate_rewards", lambda rewards, *_: tosses.append(rewards[:, 0].tolist()))
    made.train()
    assert len(tosses) == 2
    assert tosses[0] != tosses[1]


def test_bf16_autocast_scores_close_to_float32(tmp_path: Path) -> None:
    full = scores_with(tmp_path / "full", per_device_train_batch_size=64)
    half = scores_with(tmp_path / "half", per_device_train_batch_size=64, bf16=True)
    assert half["vigor/score"] == pytest.approx(full["vigor/score"], rel=0.05)
    assert half["vigor/score"] != full["vigor/score"]


def test_a_plain_grpo_config_field_still_works(tmp_path: Path) -> None:
    assert isinstance(config(tmp_path), GRPOConfig)
    folder = save_tiny(tmp_path / "model")
    made = trainer(tmp_path / "run", "vigor", model=str(folder), beta=0.1, loss_type="dr_grpo")
    made.train()
    assert any("kl" in record for record in made.state.log_history)
