"""Agreement: clusters and majorities against brute force, the four rewards by hand, and whole groups in parts."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import dataset, lab_tokenizer, same_weights, table, tiny_model, trainer, weights
from peft import LoraConfig

from vigor.checkpoint import CheckpointError
from vigor.rewards import get
from vigor.rewards.agreement import (
    boxed_answer,
    cluster,
    cluster_entropy,
    equality,
    majority,
    majority_at_k,
    matches,
    shares,
)
from vigor.rewards.base import TEACHER, Reward
from vigor.rollouts import BatchTexts, Rollouts
from vigor.twins import TwinSampler, check_twins

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

G = 4


def some_answers(seed: int, n: int = 9) -> list[str | None]:
    rng = random.Random(seed)
    return [rng.choice([None, "1", "1.0", "2", "3", "10/5", "7"]) for _ in range(n)]


def same_number(a: str, b: str) -> bool:
    return eval(a) == eval(b)


def rollouts_of(texts: list[str], size: int = G, **others: Any) -> Rollouts:
    ids = [[2, 3]] * len(texts)
    return Rollouts.from_token_ids(ids, ids, group_size=size, pad_token_id=0, completions=texts, **others)


def boxed(*answers: str | None) -> list[str]:
    return ["no idea" if answer is None else rf"so \boxed{{{answer}}}" for answer in answers]


def score(reward: Reward, texts: list[str], **others: Any) -> list[float]:
    return reward.score(rollouts_of(texts, **others), None).tolist()


# The core against brute force -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [equality("string"), same_number])
@pytest.mark.parametrize("seed", range(20))
def test_clusters_are_the_classes_of_an_equivalence(seed: int, equal: Any) -> None:
    answers = some_answers(seed)
    clusters = cluster(answers, equal)
    for (a, k), (b, j) in itertools.product(zip(answers, clusters, strict=True), repeat=2):
        assert (k is None) == (a is None)
        if a is not None and b is not None:
            assert (k == j) == equal(a, b)
    first_seen = list(dict.fromkeys(k for k in clusters if k is not None))
    assert first_seen == list(range(len(first_seen)))


@pytest.mark.parametrize("seed", range(20))
def test_majority_is_the_counters_most_common(seed: int) -> None:
    answers = some_answers(seed)
    counts = Counter(answer for answer in answers if answer is not None).most_common()
    assert majority(answers) == (counts[0][0] if counts else None)
    tied = len(counts) > 1 and counts[0][1] == counts[1][1]
    assert majority(answers, ties="none") == (None if tied or not counts else counts[0][0])


@pytest.mark.parametrize("seed", range(20))
def test_the_majority_of_equivalent_answers_is_the_largest_class(seed: int) -> None:
    answers = some_answers(seed)
    label = majority(answers, same_number)
    sizes = [sum(b is not None and same_number(a, b) for b in answers) if a is not None else 0 for a in answers]
    if max(sizes) == 0:
        assert label is None
    else:
        assert label == answers[sizes.index(max(sizes))]


@pytest.mark.parametrize("seed", range(20))
def test_shares_and_entropy_by_counting(seed: int) -> None:
    answers = some_answers(seed)
    clusters = cluster(answers, same_number)
    wanted = [
        0.0 if a is None else sum(b is not None and same_number(a, b) for b in answers) / len(answers) for a in answers
    ]
    assert shares(clusters) == pytest.approx(wanted, abs=1e-12)
    # Summed over rows: a row of a class of n carries 1/n of the class's term.
    probabilities = [share or 1 / len(answers) for share in wanted]
    assert cluster_entropy(clusters) == pytest.approx(-sum(math.log(p) for p in probabilities) / len(answers))


def test_a_relation_that_is_not_transitive_is_clustered_by_first_members() -> None:
    def near(a: str, b: str) -> bool:
        return abs(int(a) - int(b)) <= 1

    assert cluster(["1", "2", "3"], near) == [0, 0, 1]
    assert cluster(["2", "1", "3"], near) == [0, 0, 0]


def test_answers_of_texts() -> None:
    texts = [r"\boxed{1} then \boxed{ 2 }", r"\boxed{}", r"\boxed{ }", "2", r"\boxed{\frac{1}{2}}", r"\boxed{1"]
    assert [boxed_answer(text) for text in texts] == ["2", None, None, None, r"\frac{1}{2}", None]


def test_mathematical_equality_reads_values() -> None:
    equal = equality("math")
    assert equal("1/2", "0.5")
    assert equal(r"\frac{1}{2}", "0.5")
    assert equal("unreadable )(", "unreadable )(")
    assert not equal("1/2", "0.25")
    assert not equal("unreadable )(", "1")
    assert equality(same_number) is same_number
    with pytest.raises(ValueError, match="'maths' is no comparison: choose one of string, math"):
        equality("maths")


def test_majority_at_k_is_unbiased_over_blocks() -> None:
    answers = ["1", "1", "2", "2", "2", "1", None, None, None, "1"]
    assert majority_at_k(answers, "1", 1) == 0.4
    assert majority_at_k(answers, "1", 3) == pytest.approx(1 / 3)  # right, wrong, no answer; the tenth is left over
    assert majority_at_k(answers, "1.0", 3, check=same_number) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="between 1 and the 10 answers, got 11"):
        majority_at_k(answers, "1", 11)


def test_matches_of_no_label_are_wrong() -> None:
    assert matches(["1", None, "2"], None, equality("string")) == [0.0, 0.0, 0.0]
    assert matches(["1", None, "2"], "2", equality("string")) == [0.0, 0.0, 1.0]


# The rewards by hand --------------------------------------------------------------------------------------------------


def test_majority_vote_votes_by_text_and_checks_by_value() -> None:
    texts = boxed("0.5", "1/2", "0.5", "3", None, None, "4", "5")
    assert score(get("majority_vote"), texts) == [1, 1, 1, 0, 0, 0, 1, 0]
    assert score(get("majority_vote(check=string)"), texts) == [1, 0, 1, 0, 0, 0, 1, 0]
    assert score(get("majority_vote(ties=none)"), texts) == [1, 1, 1, 0, 0, 0, 0, 0]
    split = boxed("3", "3", "0.5", "1/2", "1/2")
    assert score(get("majority_vote(check=string)"), split, size=5) == [1, 1, 0, 0, 0]
    assert score(get("majority_vote(votes=math)"), split, size=5) == [0, 0, 1, 1, 1]


def test_all_vote_and_the_first_are_trained_on() -> None:
    texts = boxed("1", "2", "2", "2", None, "3", "3", "3")
    reward = get("majority_vote(trained=2)")
    rewards = reward(rollouts_of(texts), None)
    assert rewards[[0, 1, 4, 5]].tolist() == [0, 1, 0, 1]
    assert rewards[[2, 3, 6, 7]].isnan().all()
    assert score(reward, texts) == [0, 1, 1, 1, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="trained=1 leaves nothing to compare"):
        get("majority_vote(trained=1)")


def test_empo_pays_the_share_of_the_cluster() -> None:
    texts = boxed("0.5", "1/2", "3", None, "1", "2", None, None)
    assert score(get("empo"), texts) == [0.5, 0.5, 0.25, 0, 0, 0, 0, 0]
    assert score(get("empo(equal=string)"), texts) == [0] * 8
    assert score(get("empo(min_share=0.6)"), texts) == [0] * 8
    assert score(get("empo"), boxed(*"1111"), size=4) == [1, 1, 1, 1]


def test_users_bring_their_own_equality_and_extraction() -> None:
    def parity(a: str, b: str) -> bool:
        return int(a) % 2 == int(b) % 2

    reward = get("empo", equal=parity, extract=lambda text: text or None)
    assert reward.name.startswith("empo(")
    assert score(reward, ["1", "3", "2", ""]) == [0.5, 0.5, 0.25, 0]


def test_co_rewarding_1_takes_the_label_of_the_other_wording() -> None:
    texts = boxed("1", "1", "2", None, "2", "2", "1", "3") + boxed("7", "7", "7", "7", None, None, None, None)
    pairs = [0] * 8 + [5] * 8
    wanted = [0, 0, 1, 0, 0, 0, 1, *[0] * 9]
    assert score(get("co_rewarding_1"), texts, columns={"pair": pairs}) == wanted
    order = [*range(4), *range(8, 12), *range(4, 8), *range(12, 16)]  # the twins need not be neighbours
    moved = {"pair": [pairs[i] for i in order]}
    assert score(get("co_rewarding_1"), [texts[i] for i in order], columns=moved) == [wanted[i] for i in order]


def test_co_rewarding_1_refuses_a_batch_without_the_twin() -> None:
    with pytest.raises(ValueError, match=r"2 prompts holds 1 with pair=0, not 2"):
        score(get("co_rewarding_1"), boxed(*"12341234"), columns={"pair": [0] * 4 + [1] * 4})
    with pytest.raises(ValueError, match="have no column 'pair'"):
        score(get("co_rewarding_1"), boxed(*"1234"))


def test_co_rewarding_2_takes_the_teachers_label() -> None:
    texts, teacher = boxed("1", "1", "2", None), boxed("2", "2", "1", None)
    assert score(get("co_rewarding_2"), texts, columns={TEACHER: teacher}) == [0, 0, 1, 0]
    assert score(get("co_rewarding_2"), texts, columns={TEACHER: boxed(*[None] * 4)}) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="no column 'teacher_completion'"):
        score(get("co_rewarding_2"), texts)


@pytest.mark.parametrize("name", ["majority_vote", "empo", "co_rewarding_1", "co_rewarding_2"])
@pytest.mark.parametrize("cuts", [[0, 3, 8], [0, 1, 2, 7, 8], [0, 4, 8], [0, 8]])
def test_parts_of_groups_get_what_whole_groups_get(name: str, cuts: list[int]) -> None:
    texts, teacher = boxed("1", "1", "2", None, "2", "2", "1", "3"), boxed("2", "2", "1", None, "3", "3", "3", "1")
    columns = {"pair": [0] * 8, TEACHER: teacher}
    whole = score(get(name), texts, columns=columns)
    batch, parts = BatchTexts(texts, columns), []
    for first, last in itertools.pairwise(cuts):
        own = {key: values[first:last] for key, values in columns.items()}
        parts += score(get(name), texts[first:last], columns=own, first_row=first, batch_texts=batch)
    assert parts == whole
    assert sum(whole) not in (0, 8)


def test_parts_of_groups_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows are not whole groups of 4"):
        score(get("empo"), boxed(*"123"))


# Twins ----------------------------------------------------------------------------------------------------------------


def test_the_sampler_keeps_twins_together() -> None:
    order = list(TwinSampler([2, 0, 1], 3))
    assert order == [4] * 3 + [5] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert len(TwinSampler([2, 0, 1], 3)) == 18


@pytest.mark.parametrize(
    ("pairs", "prompts", "message"),
    [
        ([0, 0, 1, 1], 3, "a generation batch of 3 prompts cuts a pair in two"),
        ([0, 0, 1], 2, "the data set has 3 rows"),
        ([0, 1, 1, 0], 2, "rows 0 and 1 of the data set are no pair: pair=0 and 1"),
        ([0, 0, 0, 0], 2, "rows 2 and 3 of the data set repeat pair=0"),
    ],
)
def test_unpaired_data_is_refused(pairs: list[int], prompts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_twins(pairs, "pair", prompts)


# In the trainer -------------------------------------------------------------------------------------------------------

EOS = 1


def sampled(*answers: str | None) -> list[list[int]]:
    tokenizer = lab_tokenizer()
    return [
        [*tokenizer(" ok" if answer is None else f" so \\boxed{{{answer}}}")["input_ids"], EOS] for answer in answers
    ]


def test_the_trainer_rewards_the_majority(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        ["majority_vote", "empo"],
        reward_weights=[1.0, 0.0],
        completions=sampled("7", "7", "8", None, "3", "4", "4", "4"),
        max_steps=2,
    )
    made.train()
    rows = table(tmp_path, 2)
    assert rows["majority_vote"].tolist() == [1, 1, 0, 0, 0, 1, 1, 1]
    assert rows["empo"].tolist() == [0.5, 0.5, 0.25, 0, 0.25, 0.75, 0.75, 0.75]
    half = [x / (1 / 3**0.5 + 1e-4) for x in (0.5, 0.5, -0.5, -0.5)]
    assert rows["advantage"].tolist()[:4] == pytest.approx(half, abs=1e-4)
    assert not same_weights(weights(made.model), weights(tiny_model()))


def test_the_trainer_leaves_voters_out_of_the_update(tmp_path: Path) -> None:
    made = trainer(tmp_path, "majority_vote(trained=2)", completions=sampled("7", "8", "8", "8", None, "4", "4", "4"))
    made.train()
    rows = table(tmp_path)
    assert rows["majority_vote(trained=2)"].isna().tolist() == [False, False, True, True] * 2
    low, high = -0.70700, 0.70700
    assert rows["advantage"].tolist() == pytest.approx([low, high, 0, 0, low, high, 0, 0], abs=1e-3)


PAIRS = dataset(
    [f"Q:{a}+{b}\nA:" for a, b in ((3, 4), (4, 3), (5, 1), (1, 5), (2, 9), (9, 2))], pair=[0, 0, 1, 1, 2, 2]
)


def test_the_trainer_samples_both_wordings_in_one_batch(tmp_path: Path) -> None:
    made = trainer(tmp_path, "co_rewarding_1", data=PAIRS, max_steps=3, shuffle_dataset=True)
    made.train()
    seen = []
    for step in (1, 2, 3):
        prompts = table(tmp_path, step)["prompt"].unique().tolist()
        assert len(prompts) == 2
        first, second = (prompt[2:-3].split("+") for prompt in prompts)
        assert first == second[::-1]
        seen += prompts
    assert sorted(seen) == sorted(PAIRS["prompt"])
    assert seen != PAIRS["prompt"], "shuffled"


def test_the_trainer_refuses_what_would_part_the_twins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads the column 'pair', but the data set has prompt"):
        trainer(tmp_path, "co_rewarding_1")
    made = trainer(tmp_path, "co_rewarding_1", data=PAIRS, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="a generation batch of 1 prompts cuts a pair in two"):
        made.train()


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("peft", [None, LORA])
def test_the_teacher_follows_after_each_step(tmp_path: Path, peft: LoraConfig | None) -> None:
    # Both rewards are needed: random samples box nothing, so the teacher's label alone would train nothing.
    made = trainer(
        tmp_path,
        ["co_rewarding_2(start=0.5, end=0.1)", "random"],
        reward_weights=[1.0, 1.0],
        peft_config=peft,
        max_steps=3,
    )
    rate, seen = get("co_rewarding_2(start=0.5, end=0.1)").teacher.rate, []
    wanted = {n: p.detach().double() for n, p in made.model.named_parameters() if p.requires_grad}
    start = {name: tensor.clone() for name, tensor in wanted.items()}
    original = made._teacher.on_step_end

    def on_step_end(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(args, state, control, **kwargs)
        alpha = rate(state.global_step + 1, 3)
        for name, p in made.model.named_parameters():
            if p.requires_grad:
                wanted[name] = alpha * p.detach().double() + (1 - alpha) * wanted[name]
        seen.append(alpha)

    made._teacher.on_step_end = on_step_end
    made.train()
    assert seen == pytest.approx([0.4, 0.2, 0.1])
    assert any(not torch.equal(tensor, start[name]) for name, tensor in wanted.items())
    for name, tensor in made._teacher.ema.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-7)
    assert table(tmp_path, 3)[TEACHER].map(len).sum() > 0


def test_the_teachers_samples_come_from_its_own_weights(tmp_path: Path) -> None:
    """With a teacher whose head prefers one token by far, all its completions are that token; the policy's are not."""
    made = trainer(tmp_path, ["co_rewarding_2", "random"], reward_weights=[1.0, 1.0])
    state = made._teacher.ema.state_dict()
    with torch.no_grad():
        embedding = state["model.embed_tokens.weight"]
        embedding.fill_(1.0)  # whatever stands in the context, the hidden state points along the ones
        embedding[20] = 50.0
        state["model.norm.weight"].fill_(1.0)
    made.train()
    rows = table(tmp_path)
    token = lab_tokenizer().decode([20])
    texts = set(rows[TEACHER])
    assert texts != set(rows["completion"])
    assert all(set(text) <= set(token) for text in texts), texts


def test_watching_the_teacher_changes_nothing(tmp_path: Path) -> None:
    results = []
    for name, watched in (("alone", []), ("watched", ["co_rewarding_2", "majority_vote", "empo"])):
        made = trainer(
            tmp_path / name,
            ["random", *watched],
            reward_weights=[1.0] + [0.0] * len(watched),
            max_steps=3,
        )
        made.train()
        texts = [table(tmp_path / name, step)["completion"].tolist() for step in (1, 2, 3)]
        results.append((weights(made.model), texts))
    assert results[0][1] == results[1][1]
    assert same_weights(results[0][0], results[1][0])


def test_a_resumed_run_has_the_teacher_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def make(folder: str, **changes: Any) -> Any:
        return trainer(
            tmp_path / folder,
            ["co_rewarding_2(start=0.5, end=0.5)", "random"],
            reward_weights=[1.0, 1.0],
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="constant",
            **{"max_steps": 4, **changes},
        )

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoints" / "checkpoint-2"))
    for name, tensor in whole._teacher.ema.state_dict().items():
        assert torch.equal(tensor, resumed._teacher.ema.state_dict()[name])
    assert table(tmp_path / "whole", 4)[TEACHER].tolist() == table(tmp_path / "resumed", 4)[TEACHER].tolist()
    without = trainer(tmp_path / "without", "random", max_steps=6)
    with pytest.raises(CheckpointError, match="EMA teacher: True → False"):
        without.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoints" / "checkpoint-4"))
    with pytest.raises(FileNotFoundError, match=r"holds no teacher\.safetensors"):
        resumed._teacher.load(str(tmp_path))


def test_one_teacher_a_run_and_no_column_of_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ask for different teachers"):
        trainer(tmp_path, ["co_rewarding_2", "co_rewarding_2(start=0.5)"])
    with pytest.raises(ValueError, match="the data set has a column 'teacher_completion'"):
        trainer(tmp_path, "co_rewarding_2", data=dataset(teacher_completion=["a"] * 4))
