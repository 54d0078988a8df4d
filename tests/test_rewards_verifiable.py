"""Family F4: verifiable rewards and controls, what the common table does not say of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vigor.config import VigorConfig
from vigor.rewards import get, parse_spec
from vigor.rewards.base import Reward, from_values, ranked
from vigor.rewards.compose import annealed_weights
from vigor.rewards.exact_match import normal
from vigor.rewards.keyword_chain import chain_score, common_subsequence, occurrences, read_key_points
from vigor.rewards.language_consistency import script_share
from vigor.rewards.multiple_choice import choice
from vigor.rewards.noisy import corrected, flip
from vigor.rewards.repetition import repeated_share
from vigor.rewards.unit_tests import code_of
from vigor.rewards.verpo import difficulty_weights, verpo_rewards
from vigor.rollouts import BatchTexts, Rollouts
from vigor.shaping import truncated_worst, zscore
from vigor.signals import PolicyPass


def rollouts_of(
    *texts: str, lengths: list[int] | None = None, group_size: int = 1, columns: Any = None, **fields: Any
) -> Rollouts:
    """Rollouts of texts, with completions of the given lengths in tokens."""
    counts = lengths or [1] * len(texts)
    return Rollouts.from_token_ids(
        [[2]] * len(counts),
        [[3] * n for n in counts],
        group_size=group_size,
        pad_token_id=0,
        completions=texts or [""] * len(counts),
        columns=columns or {},
        **fields,
    )


def score(reward: str | Reward, rollouts: Rollouts) -> list[float]:
    found = get(reward) if isinstance(reward, str) else reward
    return found.score(rollouts, PolicyPass(nn.Identity(), rollouts)).tolist()


def rewards_of(reward: str, rollouts: Rollouts) -> list[float]:
    return get(reward)(rollouts, PolicyPass(nn.Identity(), rollouts)).tolist()


def given(values: list[float | None], **fields: Any) -> Reward:
    """A reward with these scores."""
    return Reward("given", frozenset(), lambda rollouts, policy: from_values(values, rollouts), **fields)


# Specs that hold specs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("both(first=format, second=random(p=0.5, seed=1))", {"first": "format", "second": "random(p=0.5, seed=1)"}),
        ("regex_match(pattern='a,(b)=[,]')", {"pattern": "a,(b)=[,]"}),
        (r"regex_match(pattern=#### (\-?[0-9\.\,]+))", {"pattern": r"#### (\-?[0-9\.\,]+)"}),
        ("inverse(of=inverse(of=noisy(false_positive=0.2, seed=3)))", None),
        ("contains(word='it\\'s, (so)')", {"word": "it's, (so)"}),
        ("contains(word=\")\")", {"word": ")"}),
        ("contains(word='7')", {"word": "7"}),
        ("multiple_choice(letters=ABCD)", {"letters": "ABCD"}),
    ],
)  # fmt: skip
def test_commas_inside_belong_to_the_value_and_names_can_be_read_again(spec: str, options: dict[str, Any]) -> None:
    if options is not None:
        assert parse_spec(spec)[1] == options
    name = get(spec).name
    assert parse_spec(name) == parse_spec(spec)
    assert get(name).name == name


def test_names_of_rewards_and_functions() -> None:
    assert get("inverse", of=get("random(p=0.25)")).name == "inverse(of=random(p=0.25))"
    assert get("unit_tests", runner=len).name == "unit_tests(runner=len)"


# Answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{A} and later \boxed{C}", "C"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{$D$}", "D"),
        (r"\boxed{d) seven}", "D"),
        (r"\boxed{Dog}", None),
        (r"\boxed{42} though the answer is B", None),
        (r"\boxed{} but the answer is B", "B"),
        ("The correct answer is: (B).", "B"),
        ("ANSWER: c", "C"),
        ("answer is A. No, the answer is **D**", "D"),
        ("I choose option E", "E"),
        ("an answer a person would give: A", None),
        ("the answer is a cat", None),
        ("the answer is: (a)", "A"),
        (" (b). ", "B"),
        ("A", "A"),
        ("A cat", None),
        ("", None),
        ("Z", None),
    ],
)
def test_the_letter_that_a_completion_settles_on(text: str, letter: str | None) -> None:
    assert choice(text, "ABCDE") == letter


def test_references_that_are_no_letter_have_no_reward() -> None:
    rollouts = rollouts_of(*["A"] * 6, columns={"answer": ["A", "(a)", "B", "72", None, "F"]})
    values = score("multiple_choice(letters=ABCD)", rollouts)
    assert values[:3] == [1.0, 1.0, 0.0]
    assert all(map(math.isnan, values[3:]))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The Cat.", "cat", True),
        ("a  cat\n", "Cat!", True),
        ("theatre", "atre", False),
        ("3,000", "3000", True),
        ("-5", "5", True),
        ("-", "a", False),
        ("a", "the", False),
        ("...", "", False),
        ("Zürich", "zürich", True),
    ],
)
def test_squad_normal_form(one: str, other: str, same: bool) -> None:
    assert (normal(one) == normal(other)) is same


def test_exact_match_without_normal_form() -> None:
    rollouts = rollouts_of(r"\boxed{ -5 }", "-5", "5", "The", columns={"answer": ["-5", "-5", "-5", "the"]})
    assert score("exact_match(normalise=False)", rollouts) == [1.0, 1.0, 0.0, 0.0]
    assert score("exact_match", rollouts) == [1.0, 1.0, 1.0, 1.0]
    assert math.isnan(score("exact_match", rollouts_of("x", columns={"answer": [None]}))[0])


def test_a_pattern_of_ones_own() -> None:
    rollouts = rollouts_of("x = 3; x = 4", "x=4", "y = 4", columns={"answer": ["4", "4", "4"]})
    assert score(r"regex_match(pattern='x *= *(\\d)')", rollouts) == [1.0, 1.0, 0.0]
    assert score("regex_match(pattern='[xy].*')", rollouts) == [0.0, 0.0, 0.0]
    assert math.isnan(score("regex_match", rollouts_of("#### 1", columns={"answer": [None]}))[0])


def test_an_endless_search_finds_nothing_in_time() -> None:
    rollouts = rollouts_of("a" * 40 + "!", "ab", columns={"answer": ["ab", "ab"]})
    assert score("regex_match(pattern='(?:a|a)*b', timeout_s=0.05)", rollouts) == [0.0, 1.0]


# Keyword chains -----------------------------------------------------------------------------------------------------


def test_the_longest_common_subsequence_equals_trying_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        one, other = (
            ["abc"[i] for i in torch.randint(0, 3, (int(n),), generator=generator)]
            for n in torch.randint(0, 7, (2,), generator=generator)
        )
        every = {s for n in range(len(other) + 1) for s in itertools.combinations(other, n)}
        wanted = max(len(s) for n in range(len(one) + 1) for s in itertools.combinations(one, n) if s in every)
        assert common_subsequence(one, other) == wanted


def test_keywords_are_whole_words_in_any_case() -> None:
    assert occurrences(["heat", "C++", "gas law"], "Heat! preheat, c++ and the GAS LAW; C++x") == [
        "heat",
        "c++",
        "gas law",
    ]
    assert occurrences(["mean", "mean value"], "the mean value") == ["mean"]
    assert occurrences(["mean value", "mean"], "the mean value") == ["mean value"]
    assert occurrences(["", " "], "text") == []


def test_chain_by_hand() -> None:
    reference = "first a then b then c"
    assert chain_score("a b c", reference, [[["a", "b", "c"]]]) == 1.0
    assert chain_score("c b a", reference, [[["a", "b", "c"]]]) == pytest.approx(1 / 3)
    assert chain_score("a b", reference, [[["a", "b", "c"]]]) == pytest.approx(2 / 3)
    assert chain_score("a a a a", reference, [[["a", "b", "c"]]]) == pytest.approx(1 / 4)
    assert chain_score("a", reference, [[["a"], ["b"]], [["c"]]]) == 0.5
    assert chain_score("a", reference, []) == 0.0


@pytest.mark.parametrize(
    ("cell", "points"),
    [
        (["a", "b"], [[["a", "b"]]]),
        ([["a"], ["b", "c"]], [[["a"]], [["b", "c"]]]),
        ([[["a"], ["b"]], [["c"]]], [[["a"], ["b"]], [["c"]]]),
        ('["a"]', [[["a"]]]),
        ([], []),
        (None, None),
        ("null", None),
    ],
)
def test_cells_with_keywords(cell: Any, points: Any) -> None:
    assert read_key_points(cell) == points


@pytest.mark.parametrize("cell", ["a, b", 7, [1, 2], {"a": 1}, [[[["a"]]]], "__import__('os')"])
def test_cells_without_keywords_are_refused(cell: Any) -> None:
    with pytest.raises(ValueError, match=r"keyword_chain: (cannot read|.* is not JSON)"):
        read_key_points(cell)


# Length -------------------------------------------------------------------------------------------------------------


def test_overlong_equals_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = [1, 7, 8, 9, 11, 12, 13, 40]
    wanted = get_soft_overlong_punishment(12, 4)([[3] * n for n in lengths])
    assert score("overlong(max_length=12, cache=4)", rollouts_of(lengths=lengths)) == pytest.approx(wanted)
    assert wanted[2:6] == [0.0, -0.25, -0.75, -1.0]


def test_repetition_equals_trls() -> None:
    from trl.rewards import get_repetition_penalty_reward

    tokens = [[1, 2, 3, 1, 2, 3, 1], [5] * 9, [1, 2], [], [1, 2, 3, 4]]
    rollouts = Rollouts.from_token_ids([[2]] * 5, tokens, group_size=1, pad_token_id=0)
    for n in (1, 2, 3):
        wanted = get_repetition_penalty_reward(n, -0.5)(tokens)
        assert score(f"repetition(n={n}, weight=0.5)", rollouts) == pytest.approx(wanted)
    assert repeated_share([5, 5, 5, 5, 5], 2) == 0.75


def test_what_a_tool_wrote_is_no_repetition() -> None:
    rollouts = rollouts_of(lengths=[9])
    rollouts.completion_mask_BL[0, 3:9] = 0
    assert rollouts.lengths_B.tolist() == [3]
    assert score("repetition(n=2)", rollouts) == [-0.5]


def lengths_reward(name: str, right: list[float | None], lengths: list[int], **options: Any) -> list[float]:
    columns = {"target_length": options.pop("targets", [None] * len(lengths))}
    rollouts = rollouts_of(lengths=lengths, group_size=len(lengths), columns=columns)
    return get(name, of=given(right), **options)(rollouts, PolicyPass(nn.Identity(), rollouts)).tolist()


def test_l1_by_hand() -> None:
    exact = lengths_reward("l1_exact", [1, 0, 1, None], [10, 10, 40, 10], targets=[20, 20, 20, 20], alpha=0.01)
    assert exact[:3] == pytest.approx([0.9, -0.1, 0.8])
    assert math.isnan(exact[3])
    best = lengths_reward("l1_max", [1, 0, 1, 1, 1], [10, 10, 20, 95, 1], targets=[20] * 4 + [None], alpha=0.01)
    assert best[:4] == pytest.approx([0.6, 0.0, 0.5, 0.0])
    assert math.isnan(best[4])


def test_cosine_equals_trls() -> None:
    from trl.rewards import get_cosine_scaled_reward

    lengths = [0, 5, 10, 20, 20, 13]
    answers = [r"\boxed{7}", r"\boxed{8}"] * 3
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    wanted = get_cosine_scaled_reward(20)(completions, [r"\boxed{7}"] * 6, completion_ids=[[3] * n for n in lengths])
    found = lengths_reward("cosine_length", [1, 0] * 3, lengths, max_length=20)
    assert found == pytest.approx(wanted)
    assert lengths_reward("cosine_length", [1, 0], [900, 21], max_length=20) == pytest.approx([0.5, -0.5])


def test_kimi_by_hand() -> None:
    assert lengths_reward("kimi_length", [1, 1, 0, 0], [10, 30, 10, 30]) == pytest.approx([0.5, -0.5, 0.0, -0.5])
    assert lengths_reward("kimi_length", [1, 0, 1, 0], [10, 15, 20, 20]) == pytest.approx([0.5, 0.0, -0.5, -0.5])
    assert lengths_reward("kimi_length", [1, 0, 0], [7, 7, 7]) == [0.0, 0.0, 0.0]
    partly = lengths_reward("kimi_length", [None, 1, 1], [1, 10, 20])
    assert math.isnan(partly[0])
    assert partly[1:] == [0.5, -0.5]


def test_kimi_keeps_long_completions_apart() -> None:
    lengths = torch.tensor([2_000_000, 2_000_001, 4_000_000, 2_000_000], dtype=torch.int64)
    scores = -lengths.float() - 0.5 * torch.tensor([0.0, 1.0, 1.0, 0.0])
    shaped = get("kimi_length").shape(scores[None])[0].tolist()
    assert shaped == pytest.approx([0.5, 0.0, -0.5, 0.5])


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_kimi_takes_cut_off_completions_for_long_and_wrong(wrong: float) -> None:
    scores = torch.tensor([[-10.0, -20.0 - wrong, -5.0]])
    worst = truncated_worst(scores, torch.tensor([[False, False, True]]))
    assert get("kimi_length").shape(worst)[0].tolist() == pytest.approx([0.5, -0.5, -0.5])


# Language -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("two words", "Latin", 1.0),
        ("two слова", "Latin", 0.5),
        ("два two", "Cyrillic", 0.5),
        ("答案 is 六", "Han", 2 / 3),
        ("cafe\u0301", "Latin", 1.0),
        ("1 + 1 = 2", "Latin", 1.0),
        ("ሰላም two", "Latin", 0.5),
        ("ሰላም", "Latin", 0.0),
    ],
)
def test_share_of_words_in_a_script(text: str, script: str, share: float) -> None:
    assert script_share(text, script) == pytest.approx(share)


# Wrappers -----------------------------------------------------------------------------------------------------------


def test_noise_has_the_rates_it_says() -> None:
    n = 20_000
    rollouts = rollouts_of(lengths=[1] * n)
    for value, rate in ((0.0, 0.2), (1.0, 0.35)):
        seen = score(get("noisy", of=given([value] * n), false_positive=0.2, false_negative=0.35), rollouts)
        flipped = sum(x != value for x in seen) / n
        assert abs(flipped - rate) < 4 * math.sqrt(rate * (1 - rate) / n)


def test_noise_follows_step_and_row_and_not_the_layout() -> None:
    values = [0.0, 1.0] * 32
    reward = get("noisy", of=given(values), false_positive=0.4, false_negative=0.4)
    whole = score(reward, rollouts_of(lengths=[1] * 64, micro_step=3))
    half = get("noisy", of=given(values[40:]), false_positive=0.4, false_negative=0.4)
    assert score(half, rollouts_of(lengths=[1] * 24, micro_step=3, first_row=40)) == whole[40:]
    assert score(reward, rollouts_of(lengths=[1] * 64, micro_step=4)) != whole
    tosses = score("random", rollouts_of(lengths=[1] * 64, micro_step=3))
    errors = [float(a != b) for a, b in zip(whole, values, strict=True)]
    assert tosses != errors and [1 - x for x in tosses] != errors


@pytest.mark.parametrize(("rho0", "rho1"), [(0.0, 0.0), (0.1, 0.3), (0.45, 0.5)])
def test_corrections_have_the_mean_that_the_paper_gives(rho0: float, rho1: float) -> None:
    for clean in (0.0, 1.0):
        # The mean over all draws of the channel, by its two outcomes.
        draws = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
        seen = flip(torch.full_like(draws, clean), draws, rho0, rho1)
        backward = corrected(seen, rho0, rho1, "backward").mean().item()
        forward = corrected(seen, rho0, rho1, "forward").mean().item()
        assert backward == pytest.approx(clean, abs=1e-3)
        assert forward == pytest.approx((1 - rho0 - rho1) * (clean - 1), abs=1e-3)


def test_forward_weights() -> None:
    values = corrected(torch.tensor([1.0, 0.0, math.nan]), 0.1, 0.3, "forward")
    assert values[:2].tolist() == pytest.approx([0.3, -0.7])
    assert values[2].isnan()


def test_a_z_score_undoes_both_corrections() -> None:
    seen = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    plain = zscore(seen)
    for correction in ("backward", "forward"):
        torch.testing.assert_close(zscore(corrected(seen, 0.2, 0.3, correction)), plain, rtol=5e-4, atol=5e-4)


def test_inverse_turns_ranks_round() -> None:
    values = from_values([3.0, 1.0, 2.0, None], rollouts_of(lengths=[1] * 4))
    reward = Reward("mine", frozenset(), lambda rollouts, policy: values, shape=ranked())
    rollouts = rollouts_of(lengths=[1] * 4, group_size=4)
    found = get("inverse", of=reward)(rollouts, PolicyPass(nn.Identity(), rollouts)).tolist()
    assert found[:3] == [-1.0, 1.0, 0.0]
    assert math.isnan(found[3])


def test_both_is_one_only_where_both_are() -> None:
    first, second = given([1, 1, 0, 0, None, 1]), given([1, 0, 1, 0, 1, None])
    found = score(get("both", first=first, second=second), rollouts_of(lengths=[1] * 6))
    assert found[:4] == [1.0, 0.0, 0.0, 0.0]
    assert all(map(math.isnan, found[4:]))
    three = get("both(first=format, second=both(first=contains(word='7'), second=contains(word='8')))")
    assert score(three, rollouts_of(r"\boxed{78}", r"\boxed{7}", "78")) == [1.0, 0.0, 0.0]
    assert get("both").columns == ("answer",)


WRAPPERS = ("inverse(of={})", "noisy(of={})", "tiers(of={})", "both(second={})", "both(first={})", "l1_exact(of={})",
            "l1_max(of={})", "kimi_length(of={})", "cosine_length(of={})")  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_hand_on_what_the_wrapped_reward_asks_for(wrapper: str) -> None:
    wrapped = get("co_rewarding_2(start=0.5)")
    reward = get(wrapper.format(wrapped.name))
    assert reward.teacher == wrapped.teacher is not None
    assert wrapped.needs <= reward.needs
    twin = get(wrapper.format("co_rewarding_1"))
    assert twin.columns[0] == get("co_rewarding_1").columns[0]


def test_two_parts_share_a_teacher_or_are_refused() -> None:
    assert get("both(first=co_rewarding_2, second=co_rewarding_2)").teacher == get("co_rewarding_2").teacher
    with pytest.raises(ValueError, match="ask for different teachers"):
        get("both(first=co_rewarding_2, second=co_rewarding_2(start=0.5))")
    assert get("both(first=accuracy, second=co_rewarding_1)").columns == ("pair", "answer")


def test_tiers_of_exact_fractions() -> None:
    grades = [0.0, 0.2499, 0.25, 1 / 3, 0.5, 0.7499, 0.75, 0.9999, 1.0]
    rollouts = rollouts_of(lengths=[1] * 9)
    assert score(get("tiers", of=given(grades)), rollouts) == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]
    thirds = [k / 3 for k in range(4)]
    assert score(get("tiers", of=given(thirds), levels=3, power=2.0), rollouts_of(lengths=[1] * 4)) == pytest.approx(
        [0, 1 / 9, 4 / 9, 1]
    )


# Wrong labels -------------------------------------------------------------------------------------------------------


def test_the_wrong_majority_is_equivalent_answers_too() -> None:
    texts = [r"\boxed{7}", r"\boxed{3}", r"\boxed{3}", r"\boxed{3.0}"]
    rollouts = rollouts_of(*texts, group_size=4, columns={"answer": ["7"] * 4})
    assert score("incorrect_label(source=majority)", rollouts) == [0.0, 1.0, 1.0, 1.0]


def test_a_group_without_wrong_answers_has_no_wrong_label() -> None:
    rollouts = rollouts_of(r"\boxed{7}", "no answer", group_size=2, columns={"answer": ["7", "7"]})
    assert all(map(math.isnan, score("incorrect_label(source=majority)", rollouts)))


def test_parts_of_groups_are_judged_by_the_whole_group() -> None:
    texts = [r"\boxed{7}", r"\boxed{3}", r"\boxed{4}", r"\boxed{4}"]
    columns = {"answer": ["7"] * 4}
    wanted = score("incorrect_label(source=majority)", rollouts_of(*texts, group_size=4, columns=columns))
    assert wanted == [0.0, 0.0, 1.0, 1.0]
    part = rollouts_of(*texts[1:3], group_size=4, columns={"answer": ["7"] * 2}, first_row=1)
    part = replace(part, batch_texts=BatchTexts(texts, columns))
    assert score("incorrect_label(source=majority)", part) == wanted[1:3]
    with pytest.raises(ValueError, match="not whole groups of 4"):
        score("incorrect_label(source=majority)", replace(part, batch_texts=None))


# Unit tests ---------------------------------------------------------------------------------------------------------


def test_harder_tests_weigh_more() -> None:
    table = [[True, True, True], [True, True, False], [True, False, False], [True, False, False]]
    assert difficulty_weights(table) == pytest.approx([0.0, 0.5 / 1.25, 0.75 / 1.25])
    assert verpo_rewards(table) == pytest.approx([1.0, 0.2, 0.0, 0.0])
    assert verpo_rewards(table, outcome_weight=0.0) == pytest.approx([1.0, 0.4, 0.0, 0.0])
    assert verpo_rewards(table, outcome_weight=1.0) == [1.0, 0.0, 0.0, 0.0]


def test_verpo_against_its_definition_on_every_small_table() -> None:
    for bits in itertools.product([False, True], repeat=6):
        table = [list(bits[:3]), list(bits[3:])]
        weights, found = difficulty_weights(table), verpo_rewards(table)
        assert sum(weights) == pytest.approx(1.0)
        for code, reward in zip(table, found, strict=True):
            assert 0.0 <= reward <= 1.0 + 1e-12
            assert (reward == pytest.approx(1.0)) == all(code)
        passed = Counter(j for code in table for j in range(3) if code[j])
        for a, b in itertools.permutations(range(3), 2):
            assert passed[a] < passed[b] or weights[a] <= weights[b] + 1e-12


def test_rows_without_tests_have_no_reward() -> None:
    def run(codes: list[str], tests: list[Any]) -> list[list[bool]]:
        assert codes == ["good"]
        return [[code == "good"] * len(cell) for code, cell in zip(codes, tests, strict=True)]

    rollouts = rollouts_of("good", "x", "y", columns={"tests": [["t"], [], None]}, group_size=3)
    for name in ("unit_tests", "verpo"):
        values = score(get(name, runner=run), rollouts)
        assert values[0] == 1.0
        assert all(map(math.isnan, values[1:]))


def test_the_last_fenced_block_is_the_code() -> None:
    assert code_of("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2\n"
    assert code_of("x = 1") == "x = 1"
    assert code_of("```python\nunfinished") == "```python\nunfinished"


@pytest.mark.parametrize("name", ["unit_tests", "verpo"])
def test_without_bubblewrap_nothing_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    module = import_module("vigor.rewards.unit_tests")
    module._no_sandbox.cache_clear()
    with pytest.raises(
        ValueError,
        match=rf"(?s)'{name}' runs generated code: .*Remedies: install bubblewrap.*{name}\(unsafe_local_exec=True",
    ):
        get(name)
    module._no_sandbox.cache_clear()
    with pytest.raises(ValueError, match=r"unsafe_local_exec=True is for the runner that comes with vigor"):
        get(f"{name}(runner=builtins.len, unsafe_local_exec=True)")
    with pytest.raises(ValueError, match=r"cannot import 'no_such.thing'"):
        get(f"{name}(runner=no_such.thing)")
    rollouts = rollouts_of("x", columns={"tests": [["t"]]})
    with pytest.raises(ValueError, match="got 1 codes and answered for 0"):
        score(get(name, runner=lambda codes, tests: []), rollouts)


@pytest.mark.parametrize("name", ["unit_tests", "verpo"])
def test_giving_isolation_up_takes_a_word_and_says_what_it_means(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    with pytest.warns(RuntimeWarning, match="runs with YOUR rights on THIS machine"):
        reward = get(f"{name}(unsafe_local_exec=True)")
    codes = [f"open({str(outside)!r}, 'w').close()\ndef f(x):\n    return x", "def f(x):\n    return 1"]
    rollouts = rollouts_of(*codes, columns={"tests": [["assert f(1) == 1", "assert f(2) == 2"]] * 2}, group_size=2)
    assert score(reward, rollouts)[0] == 1.0
    assert outside.exists()


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("noisy(false_positive=0.6, false_negative=0.4)", "their sum must be below 1"),
        ("noisy(false_positive=-0.1)", "must not be negative"),
        ("noisy(correction=sideways)", "must be one of none, backward, forward"),
        ("noisy(of=vigor)", "'vigor' is shaped within its group"),
        ("both(first=vigor)", "'vigor' is shaped within its group"),
        ("inverse(of=nonsense)", "unknown reward 'nonsense'"),
        ("tiers(levels=0)", "levels=0 must be at least 1"),
        ("overlong(max_length=10, cache=20)", "cache=20 must be positive and at most max_length=10"),
        ("overlong(cache=0)", "cache=0 must be positive"),
        ("repetition(n=0)", "n=0 must be at least 1"),
        ("repetition(weight=-1)", "the sign is the reward's"),
        ("l1_exact(alpha=-1)", "must not be negative"),
        ("l1_max(delta=2)", r"must lie in \[0, 1\]"),
        ("cosine_length(max_length=0)", "must be at least 1 token"),
        ("multiple_choice(letters=abc)", "different letters A to Z"),
        ("multiple_choice(letters=AAB)", "different letters A to Z"),
        ("regex_match(pattern='(')", "is not a regular expression"),
        ("regex_match(pattern='(a)(b)')", "has 2 groups"),
        ("regex_match(timeout_s=0)", "positive number of seconds"),
        ("contains(word='')", "word='' must be some text"),
        ("contains(word=7)", "a number is quoted"),
        ("language_consistency(script=Klingon)", "must be one of Latin"),
        ("incorrect_label(source=rumour)", "must be one of column, majority"),
        ("verpo(runner=builtins.len, outcome_weight=2)", r"must lie in \[0, 1\]"),
    ],
)
def test_senseless_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get(spec)


@pytest.mark.parametrize("name", ["noisy", "cosine_length", "kimi_length"])
def test_only_verdicts_are_taken_for_verdicts(name: str) -> None:
    with pytest.raises(ValueError, match=r"'given' gave 0.5 for row 1; .* takes rewards whose values are 0 and 1"):
        lengths_reward(name, [1.0, 0.5], [1, 1])
    with pytest.raises(ValueError, match=r"'given' gave values from -2 to 1; tiers takes grades in \[0, 1\]"):
        lengths_reward("tiers", [1.0, -2.0], [1, 1])


@pytest.mark.parametrize(
    "spec",
    ["multiple_choice", "exact_match", "regex_match", "keyword_chain", "incorrect_label", "l1_max", "both", "inverse"],
)
def test_a_missing_column_is_named(spec: str) -> None:
    with pytest.raises(ValueError, match=r"have no column '\w+' \(columns: \[?'?other'?\]?\)"):
        rewards_of(spec, rollouts_of(r"\boxed{1}", columns={"other": ["x"]}))


# Weights over the run -----------------------------------------------------------------------------------------------


def test_annealed_weights() -> None:
    assert annealed_weights([1.0, 0.0], [0.0, 3.0], 0.25) == pytest.approx([0.75, 0.75])
    assert annealed_weights([1.0], [0.0], 0.25, "cosine") == pytest.approx([(1 + math.cos(math.pi / 4)) / 2])
    for schedule in ("linear", "cosine"):
        assert annealed_weights([0.3, -1.0], [2.0, 0.0], 0.0, schedule) == pytest.approx([0.3, -1.0])
        assert annealed_weights([0.3, -1.0], [2.0, 0.0], 1.0, schedule) == pytest.approx([2.0, 0.0])
        assert annealed_weights([0.3], [2.0], 7.0, schedule) == pytest.approx([2.0])
    with pytest.raises(ValueError, match="must be one of linear, cosine"):
        annealed_weights([1.0], [0.0], 0.5, "sudden")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_weights_final": [0.0]}, "has 1 numbers for no reward_weights"),
        ({"reward_weights": [1.0, 0.0], "reward_weights_final": [0.0]}, "has 1 numbers for 2 reward_weights"),
        ({"reward_weights_schedule": "sudden"}, "choose one of linear, cosine"),
    ],
)
def test_senseless_schedules_are_refused(tmp_path: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VigorConfig(str(tmp_path), use_cpu=True, **settings)
