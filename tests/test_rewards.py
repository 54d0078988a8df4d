"""Rewards: names and options, composition, and each method's own behaviour."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import SAMPLES, Sample, lora, naive_norm, qwen2
from torch import Tensor, nn

from vigor.rewards import METHODS, get, is_reward_spec, parse_spec
from vigor.rewards.base import NEEDS, Reward, compose, from_values, negate, ranked, times_length
from vigor.rewards.boxed import last_boxed
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def rollouts_of(*samples: Sample, group_size: int = 1, **fields: Any) -> Rollouts:
    """Rollouts of samples without holes."""
    prompts, completions = [s.prompt for s in samples], [s.completion for s in samples]
    return Rollouts.from_token_ids(prompts, completions, group_size=group_size, pad_token_id=0, **fields)


def texts(*completions: Any, **fields: Any) -> Rollouts:
    """Rollouts of texts; their tokens do not matter."""
    tokens = [Sample([2], [3])] * len(completions)
    return rollouts_of(*tokens, completions=completions, **fields)


def scores_of(reward: Reward, rollouts: Rollouts, model: nn.Module | None = None) -> Tensor:
    return reward.score(rollouts, PolicyPass(nn.Identity() if model is None else model, rollouts))


# Names and options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("vigor", "vigor", {}),
        (" vigor ", "vigor", {}),
        ("vigor()", "vigor", {}),
        ("vigor(ties=index)", "vigor", {"ties": "index"}),
        ("vigor( ties = 'index' , temperature=1.0 )", "vigor", {"ties": "index", "temperature": 1.0}),
        ("vigor(temperature=None)", "vigor", {"temperature": None}),
        ("random(p=1e-1,seed=3,)", "random", {"p": 0.1, "seed": 3}),
        ("someone_elses(a=b)", "someone_elses", {"a": "b"}),
    ],
)
def test_parse_spec(spec: str, name: str, options: dict[str, Any]) -> None:
    assert parse_spec(spec) == (name, options)


@pytest.mark.parametrize("spec", ["", "vigor(", "vigor)", "vigor(ties)", "vigor(=index)", "vigor(ties=)", "Vigor x"])
def test_unreadable_specs_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vigour", "unknown reward 'vigour'; the rewards are: vigor, self_certainty"),
        ("vigor(tie=index)", "no option 'tie'; it has: parameters, ties"),
        ("format(strict=True)", "no option 'strict'; it has: none"),
        ("vigor(ties=index, ties=average)", "'ties' twice"),
        ("vigor(ties=alphabet)", "ties='alphabet' must be one of"),
        ("vigor(accumulation=int8)", "accumulation='int8'"),
        ("vigor(temperature=0)", "temperature must be positive, got 0"),
        ("random(p=1.5)", r"p must lie in \[0, 1\], got 1.5"),
    ],
)
def test_senseless_rewards_are_refused_by_name(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get(spec)


def test_names_tell_variants_apart_and_can_be_read_again() -> None:
    assert get("vigor").name == "vigor"
    assert get("vigor()").name == "vigor"
    assert get("vigor(ties=index)", temperature=1.0).name == "vigor(ties=index, temperature=1.0)"
    assert get("vigor(ties=index)", ties="average").name == "vigor(ties=average)"
    for spec in ("vigor(parameters=last_2, temperature=None)", "random(p=0.25, seed=7)", "accuracy(column=solution)"):
        name = get(spec).name
        assert name == spec
        assert parse_spec(name) == parse_spec(spec)


def test_what_is_a_reward_spec() -> None:
    assert all(is_reward_spec(name) for name in METHODS)
    assert is_reward_spec("vigor(ties=index)")
    for other in ("Qwen/Qwen2.5-0.5B", "my_reward", "./vigor", "vigor/rm", "vigor("):
        assert not is_reward_spec(other)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_follows_the_protocol(name: str) -> None:
    runner = {"runner": len} if "sandbox" in METHODS[name].needs else {}
    reward = get(name, **runner)
    assert isinstance(reward, Reward)
    assert reward.name == (f"{name}(runner=len)" if runner else name)
    assert reward.needs <= NEEDS
    assert all(getattr(METHODS[name], key) for key in ("family", "needs", "cost", "paper", "summary"))
    assert bool(reward.columns) == (METHODS[name].needs != "prompts")


# Composition --------------------------------------------------------------------------------------------------------


def test_steps_apply_left_to_right_and_the_result_is_float32() -> None:
    def signal(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)

    def add_one(scores_B: Tensor, rollouts: Rollouts) -> Tensor:
        return scores_B + 1

    rollouts = rollouts_of(Sample([2], [3] * 4), Sample([2], [3]), Sample([2], []))
    scores = scores_of(compose("mine", "text", signal, times_length(0.5), negate, add_one), rollouts)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [-3.0, -2.0, -3.0]


def test_an_unknown_need_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown needs \['gpu'\]"):
        Reward(name="mine", needs=frozenset({"gpu"}), score=lambda rollouts, policy: torch.zeros(1))


def test_calling_a_reward_needs_whole_groups() -> None:
    rollouts = rollouts_of(*SAMPLES[:3], group_size=2)
    with pytest.raises(ValueError, match="3 rows are not whole groups of 2"):
        get("random")(rollouts, PolicyPass(nn.Identity(), rollouts))


def test_calling_a_reward_shapes_each_group() -> None:
    values = torch.tensor([1.0, 5.0, 3.0, -9.0, -9.0, 0.0])
    reward = Reward("mine", frozenset(), lambda rollouts, policy: values, shape=ranked())
    rollouts = rollouts_of(*[Sample([2], [3])] * 6, group_size=3)
    assert reward(rollouts, PolicyPass(nn.Identity(), rollouts)).tolist() == [-1.0, 1.0, 0.0, -0.5, -0.5, 1.0]


def test_values_without_an_opinion_become_nan() -> None:
    values = from_values([1.0, None, 0], texts("a", "b", "c"))
    assert values.dtype == torch.float32
    assert values.nan_to_num(9).tolist() == [1.0, 9.0, 0.0]


# VIGOR --------------------------------------------------------------------------------------------------------------

PLAIN = tuple(Sample(sample.prompt, sample.completion) for sample in SAMPLES[:4])


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_vigor_is_minus_root_t_times_the_norm(temperature: float) -> None:
    model, rollouts = qwen2(), rollouts_of(*PLAIN, group_size=4)
    wanted = [-math.sqrt(len(s.completion)) * naive_norm(model, s, temperature) for s in PLAIN]
    policy = PolicyPass(model, rollouts, temperature=temperature)
    reward = get("vigor")
    assert reward.score(rollouts, policy).tolist() == pytest.approx(wanted, rel=1e-6)
    order = sorted(range(4), key=wanted.__getitem__)
    assert reward(rollouts, policy)[order].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])


def test_vigor_at_its_own_temperature() -> None:
    model, rollouts = qwen2(), rollouts_of(*PLAIN)
    policy = PolicyPass(model, rollouts, temperature=0.7)
    wanted = scores_of(get("vigor"), rollouts, model)
    assert torch.equal(get("vigor(temperature=1.0)").score(rollouts, policy), wanted)
    assert not torch.equal(get("vigor").score(rollouts, policy), wanted)


def test_vigor_over_chosen_parameters() -> None:
    rollouts, model = rollouts_of(*PLAIN[:2]), lora()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    scores = scores_of(get("vigor(parameters=lora)"), rollouts, model)
    wanted = [-(len(s.completion) ** 0.5) * naive_norm(model, s, chosen=lambda n: "lora" in n) for s in PLAIN[:2]]
    assert scores.tolist() == pytest.approx(wanted, rel=1e-6)
    assert bool((scores > scores_of(get("vigor"), rollouts, model)).all())


def test_vigor_ties() -> None:
    same = Sample([4, 5], [6, 7])
    rollouts = rollouts_of(same, same, same, same, group_size=4)
    policy = PolicyPass(qwen2(), rollouts)
    assert get("vigor")(rollouts, policy).tolist() == [0.0] * 4
    assert get("vigor(ties=index)")(rollouts, policy).tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])


def test_vigor_variants_share_the_norms_of_one_pass() -> None:
    model, rollouts = qwen2(), rollouts_of(*PLAIN, group_size=4)
    policy, shapes = PolicyPass(model, rollouts), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    for spec in ("vigor", "vigor(ties=index)", "self_certainty", "vigor(parameters=trainable)"):
        get(spec)(rollouts, policy)
    lengths = sorted(rollouts.attention_mask_BL.sum(1).tolist())
    # One batched pass over all rows for the norms, its self-check on two, one pass for the statistics.
    assert shapes == [(4, lengths[-1]), (1, lengths[-1]), (1, lengths[0]), (4, lengths[-1])]


# Random -------------------------------------------------------------------------------------------------------------


def draws(rows: int, *, first_row: int = 0, step: int = 0, spec: str = "random") -> list[float]:
    rollouts = rollouts_of(*[Sample([2], [3])] * rows, micro_step=step, first_row=first_row)
    return scores_of(get(spec), rollouts).tolist()


@pytest.mark.parametrize("parts", [(1, 63), (8, 8, 16, 32), (15, 16, 17, 16)])
def test_random_does_not_depend_on_the_number_of_processes(parts: tuple[int, ...]) -> None:
    split, first = [], 0
    for rows in parts:
        split += draws(rows, first_row=first, step=5)
        first += rows
    assert split == draws(64, step=5)


def test_random_is_a_function_of_seed_and_step_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert draws(64, step=3) == draws(64, step=3)
    assert torch.equal(torch.get_rng_state(), state)
    streams = [draws(64, step=step, spec=f"random(seed={seed})") for step in range(3) for seed in range(3)]
    assert len({tuple(stream) for stream in streams}) == 9
    assert draws(64, spec="random(seed=0, p=0.5)") == draws(64)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_random_has_probability_p(p: float) -> None:
    sample = draws(4000, spec=f"random(p={p})")
    assert set(sample) <= {0.0, 1.0}
    assert sum(sample) / 4000 == pytest.approx(p, abs=0.03)


# Format and boxes ---------------------------------------------------------------------------------------------------

BOXES = [
    ("", None),
    ("no box", None),
    (r"\boxed{4}", "4"),
    (r"\boxed{}", ""),
    (r"\boxed{ }", " "),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{1} then \boxed{2", "1"),
    (r"\boxed{1", None),
    (r"\boxed{{1}", None),
    (r"} \boxed{1}}", "1"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{\boxed{3} and \boxed{4}}", "4"),
    (r"{\boxed{1}", "1"),
    (r"boxed{1} \boxed 2 \fbox{3}", None),
    ("\\boxed{a\nb}", "a\nb"),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_last_boxed_agrees_with_trying_every_opener() -> None:
    def slow(text: str) -> str | None:
        for start in reversed([i for i in range(len(text)) if text.startswith("\\boxed{", i)]):
            depth = 1
            for i in range(start + 7, len(text)):
                depth += (text[i] == "{") - (text[i] == "}")
                if not depth:
                    return text[start + 7 : i]
        return None

    pieces = ["\\boxed{", "{", "}", "}", "1", " "]
    for _ in range(3000):
        text = "".join(pieces[i] for i in torch.randint(len(pieces), (8,)).tolist())
        assert last_boxed(text) == slow(text), text


def test_ten_thousand_unclosed_boxes_have_no_answer() -> None:
    # In quadratic time this takes a minute; a collapsed policy does write such texts.
    assert last_boxed("\\boxed{" * 10_000) is None
    assert last_boxed("\\boxed{" * 10_000 + "7}") == "7"


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_format_wants_a_box_that_is_not_blank(text: str, content: str | None) -> None:
    conversation = [{"role": "assistant", "content": text}]
    wanted = float(content is not None and content.strip() != "")
    assert scores_of(get("format"), texts(text, conversation)).tolist() == [wanted, wanted]


# Accuracy -----------------------------------------------------------------------------------------------------------


def test_accuracy_compares_the_last_box_with_the_reference() -> None:
    completions = (r"\boxed{72}", r"\boxed{71} no, \boxed{72}", r"\boxed{72} no, \boxed{71}", "72", "")
    rollouts = texts(*completions, columns={"answer": ["72"] * 5})
    assert scores_of(get("accuracy"), rollouts).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_accuracy_knows_equivalent_numbers() -> None:
    completions = (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{1,000}", r"\boxed{0.3}")
    rollouts = texts(*completions, columns={"answer": ["0.5", r"\frac{1}{2}", "1000", "0.5"]})
    assert scores_of(get("accuracy"), rollouts).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_accuracy_has_no_opinion_without_a_reference() -> None:
    rollouts = texts(r"\boxed{1}", r"\boxed{1}", columns={"answer": [None, "1"]})
    assert scores_of(get("accuracy"), rollouts).nan_to_num(9).tolist() == [9.0, 1.0]


def test_accuracy_reads_conversations_and_its_own_column() -> None:
    rollouts = texts([{"role": "assistant", "content": r"\boxed{3}"}], columns={"solution": ["3"]})
    reward = get("accuracy(column=solution)")
    assert reward.columns == ("solution",)
    assert scores_of(reward, rollouts).tolist() == [1.0]


def test_accuracy_without_its_column_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no column 'answer' \(columns: \['level', 'solution'\]\)"):
        scores_of(get("accuracy"), texts("x", columns={"solution": ["1"], "level": ["2"]}))
