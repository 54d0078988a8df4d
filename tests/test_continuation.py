"""Continuations: the scorer against float64 token by token, the cut at token level, and the rewards in the trainer."""

from __future__ import annotations

import copy
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import dataset, lab_tokenizer, same_weights, table, tiny_model, trainer, weights
from models import counted_forwards, gpt2, llama, lora, qwen2, qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from vigor.continuation import ContinuationScorer, plain, prompt_and_completion, scorer_of, splice, token_cut
from vigor.rewards import get
from vigor.rewards.reference import boxed_cut, tags_cut
from vigor.rewards.rlpr import SpreadFilter
from vigor.rewards.verifree import reference_loss
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEMPERATURE = 0.8
CONTEXTS = [[5, 9, 3], [4], [21, 22, 23, 24, 25, 3, 4, 5, 6, 7], [5, 9], [5, 9, 3], [2] * 7]
CONTINUATIONS = [[7, 8, 30, 2], [*range(2, 34)], [17], [], [7, 8, 30, 2], [0, 1, 0]]


def naive(model: nn.Module, context: list[int], continuation: list[int]) -> torch.Tensor:
    """Each token's log-probability from a forward pass of its own."""
    found = []
    for j, token in enumerate(continuation):
        z = model(input_ids=torch.tensor([[*context, *continuation[:j]]])).logits[0, -1] / TEMPERATURE
        found.append(z.log_softmax(-1)[token])
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 16])
@pytest.mark.parametrize("make", [qwen2, qwen3, llama, gpt2, lora])
def test_equals_the_definition_token_by_token(make: Any, micro_batch: int, requires_grad: bool) -> None:
    model = make().train()  # dropout must be off while scoring
    exact = copy.deepcopy(model).double().eval()
    scorer = ContinuationScorer(model, temperature=TEMPERATURE, micro_batch=micro_batch)
    found = scorer.logps(CONTEXTS, CONTINUATIONS, requires_grad=requires_grad)
    assert [len(row) for row in found] == [len(row) for row in CONTINUATIONS]
    for row, context, continuation in zip(found, CONTEXTS, CONTINUATIONS, strict=True):
        assert row.dtype == torch.float32
        assert row.requires_grad == (requires_grad and len(continuation) > 0) or not len(continuation)
        with torch.no_grad():
            wanted = naive(exact, context, continuation)
        torch.testing.assert_close(row.detach().double(), wanted, rtol=2e-6, atol=2e-6)
    assert model.training


@pytest.mark.parametrize("micro_batch", [2, 16])
def test_the_gradient_is_that_of_the_definition(micro_batch: int) -> None:
    model = qwen2()
    exact = copy.deepcopy(model).double()
    coefficients = [0.3, -1.0, 2.0, 0.0, 0.7, 1.1]
    found = ContinuationScorer(model, temperature=TEMPERATURE, micro_batch=micro_batch).logps(
        CONTEXTS, CONTINUATIONS, requires_grad=True
    )
    sum(c * row.sum() for c, row in zip(coefficients, found, strict=True)).backward()
    rows = zip(coefficients, CONTEXTS, CONTINUATIONS, strict=True)
    sum(c * naive(exact, context, continuation).sum() for c, context, continuation in rows).backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad.double() - q.grad).norm() <= 1e-5 * q.grad.norm(), name


def test_equal_rows_are_computed_once_and_kept() -> None:
    model = qwen2()
    scorer = ContinuationScorer(model, micro_batch=2)
    with counted_forwards(model) as shapes:
        first = scorer.logps(CONTEXTS, CONTINUATIONS)
        assert sum(shape[0] for shape in shapes) == 4, "one of six rows is empty, two are equal"
        again = scorer.logps(CONTEXTS[:2], CONTINUATIONS[:2])
        assert sum(shape[0] for shape in shapes) == 4
        scorer.logps([[5, 9, 3]], [[7, 8]])
        assert sum(shape[0] for shape in shapes) == 5
    assert torch.equal(first[0], first[4])
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again, strict=True))


def test_rewards_of_a_batch_share_one_scorer() -> None:
    tokenizer, model = lab_tokenizer(), tiny_model()
    texts = [r"3+4=7 so \boxed{7}", r" so \boxed{8}", "no", r" so \boxed{7}"]
    rollouts = lab_rollouts(tokenizer, texts, ["7"] * 4)
    policy = PolicyPass(model, rollouts, tokenizer=tokenizer)
    with counted_forwards(model) as shapes:
        for spec in ("rlpr", "nover", "rlpr(baseline=none)"):
            get(spec).score(rollouts, policy)
    # Three completions with an answer, two of them with one reasoning; and the prompt's no-reasoning row.
    assert sum(shape[0] for shape in shapes) == 3
    assert scorer_of(policy) is scorer_of(policy)


def test_what_cannot_be_scored_is_refused() -> None:
    scorer = ContinuationScorer(qwen2())
    with pytest.raises(ValueError, match="2 contexts but 1 continuations"):
        scorer.logps([[1], [2]], [[3]])
    with pytest.raises(ValueError, match="the context of row 1 is empty"):
        scorer.logps([[1], []], [[3], [3]])
    with pytest.raises(ValueError, match=r"temperature \(0\)"):
        ContinuationScorer(qwen2(), temperature=0)
    broken = qwen2()
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"NaN for continuation 0 of 1 \(2 tokens\)"):
        ContinuationScorer(broken).logps([[1]], [[3, 4]])
    assert scorer.logps([], []) == []


# The cut --------------------------------------------------------------------------------------------------------------


def wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


@cache
def bytes_with_merges() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges cross every border that matters here; é, ½ and 😀 are several tokens each."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("\\", "b"), ("\\b", "o"), ("x", "e"), ("xe", "d"), ("\\bo", "xed"), ("\\boxed", "{"), ("{", "7"),
              ("7", "2"), ("2", "}"), ("<", "a"), (">", "7"), ("Ċ", "<"), ("d", "{")]  # fmt: skip
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<eos>", *pieces, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return wrapped(made)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: a text starts with ▁, wherever it will stand."""
    pieces = ["<pad>", "<eos>", "▁", "\n", *"0123456789abcdefghijklmnopqrstuvwxyz\\{}<>/ .", "▁so", "{7"]
    merges = [("▁", "s"), ("▁s", "o"), ("{", "7")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "▁s"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return wrapped(made)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_keeps_whole_tokens_and_spells_the_rest(seed: int) -> None:
    """Random token ids, as a policy samples them: seldom how the tokenizer would have cut the text."""
    rng, tokenizer = random.Random(seed), bytes_with_merges()
    words = [r"so \boxed{72}", "é½", "😀", "<answer>7", "\n<", "{7", r"\boxed", "72}"]
    ids = [i for _ in range(8) for i in _some_spelling(tokenizer, rng.choice(words), rng)]
    text = decoded(tokenizer, ids)
    for at in range(len(text) + 1):
        n, remainder = token_cut(tokenizer, ids, at)
        assert decoded(tokenizer, ids[:n]) + remainder == text[:at]
        longer = [m for m in range(n + 1, len(ids) + 1) if text[:at].startswith(decoded(tokenizer, ids[:m]))]
        assert not longer, "a longer prefix of tokens would have fitted"
        context, continuation = splice(tokenizer, [300, 301], ids, at, "72½}")
        assert context[: 2 + n] == [300, 301, *ids[:n]]
        assert decoded(tokenizer, context[2:] + continuation) == text[:at] + "72½}"
        assert len(decoded(tokenizer, context[2:])) <= at
        first = decoded(tokenizer, [*context[2:], continuation[0]])
        assert len(first) > at, "the first scored token holds a character of the reference"


def _some_spelling(tokenizer: Any, text: str, rng: random.Random) -> list[int]:
    """The ids of a text cut at a random place, each half by itself."""
    at = rng.randrange(len(text) + 1)
    return [i for part in (text[:at], text[at:]) if part for i in tokenizer(part)["input_ids"]]


def test_tokens_that_merge_across_the_opener() -> None:
    tokenizer = bytes_with_merges()
    name = {i: token for token, i in tokenizer.get_vocab().items()}
    closing = [tokenizer.convert_tokens_to_ids("d{"), *tokenizer("9}")["input_ids"]]
    ids = [*tokenizer("so \\boxe")["input_ids"], *closing]
    assert decoded(tokenizer, ids) == "so \\boxed{9}"
    # A border inside "d{" when the answer is to follow "{": the token ends there, so it stays.
    context, continuation = splice(tokenizer, [], ids, boxed_cut("so \\boxed{9}"), "72")
    assert name[context[-1]] == "d{"
    assert [name[i] for i in continuation] == ["72"]
    # A border inside "{7": the brace goes to the continuation, merged with the reference as the tokenizer would.
    crossing = [
        *tokenizer("so \\boxed")["input_ids"],
        tokenizer.convert_tokens_to_ids("{7"),
        *tokenizer("}")["input_ids"],
    ]
    context, continuation = splice(tokenizer, [], crossing, boxed_cut("so \\boxed{7}"), "72")
    assert decoded(tokenizer, context) == "so \\boxed"
    assert [name[i] for i in continuation] == ["{7", "2"]
    context, continuation = splice(tokenizer, [], crossing, boxed_cut("so \\boxed{7}"), "9")
    assert decoded(tokenizer, context) == "so \\boxed{"
    assert [name[i] for i in continuation] == ["9"]


def test_no_sign_for_the_start_of_a_text_is_added_in_the_middle() -> None:
    tokenizer = metaspace()
    name = {i: token for token, i in tokenizer.get_vocab().items()}
    assert [name[i] for i in tokenizer("72")["input_ids"]] == ["▁", "7", "2"]
    ids = tokenizer("so \\boxed{72}")["input_ids"]
    assert [name[i] for i in ids[-3:]] == ["{7", "2", "}"]
    _, continuation = splice(tokenizer, [5], ids, boxed_cut(decoded(tokenizer, ids)), "72")
    assert [name[i] for i in continuation] == ["{7", "2"]
    _, straight = splice(tokenizer, [5], [], 0, "72")
    assert [name[i] for i in straight] == ["7", "2"]


def test_an_opener_of_ours_belongs_to_the_context() -> None:
    tokenizer = lab_tokenizer()
    ids = tokenizer("3+4=7")["input_ids"]
    context, continuation = splice(tokenizer, [9], ids, 5, "12", unscored=" \\boxed{")
    assert context == [9, *ids, *tokenizer(" \\boxed{")["input_ids"]]
    assert continuation == tokenizer("12")["input_ids"]


def test_special_tokens_at_the_end_are_left_out() -> None:
    tokenizer = lab_tokenizer()
    ids = tokenizer("3+4=7")["input_ids"]
    assert plain(tokenizer, [*ids, 1, 0]) == (ids, "3+4=7")
    assert plain(tokenizer, [*ids, 1, *ids]) == ([*ids, 1, *ids], "3+4=7<eos>3+4=7")
    assert plain(tokenizer, [1]) == ([], "")


def test_a_completion_starts_at_its_first_counted_token() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 0, 0], [5, 6, 7, 0, 0, 0, 0]])
    attended = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
    counted = torch.tensor([[0, 0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 1, 0, 0], [0] * 7])
    rollouts = Rollouts(ids, attended, counted, group_size=3)
    assert prompt_and_completion(rollouts) == [([5, 6], [7, 8, 9]), ([5], [6, 7, 8, 9]), ([5, 6, 7], [])]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", r"a \boxed{1} b \boxed{"),
        (r"\boxed{1} and \boxed{2", r"\boxed{"),
        (r"\boxed{\boxed{1}}", r"\boxed{\boxed{"),
        (r"\boxed{1} \boxed{1}", r"\boxed{1} \boxed{"),
        ("no box", None),
    ],
)
def test_where_a_boxed_answer_starts(text: str, kept: str | None) -> None:
    at = boxed_cut(text)
    assert (None if at is None else text[:at]) == kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<think>a</think><answer>b</answer>", "<think>a</think><answer>"),
        ("\n<think>\na\n</think>\n\n<answer> b </answer>\n", "\n<think>\na\n</think>\n\n<answer>"),
        ("a</think><answer>b</answer>", "a</think><answer>"),
        ("<think>a</think><answer></answer>", "<think>a</think><answer>"),
        ("a <think>b</think><answer>c</answer>", None),
        ("<think>a</think><answer>b</answer> c", None),
        ("<think>a</think> c <answer>b</answer>", None),
        ("<think>a</think><answer>b", None),
        ("<think>a</think><answer>b</answer><answer>c</answer>", None),
        ("<think><think>a</think><answer>b</answer>", None),
        ("<answer>b</answer>", None),
    ],
)
def test_tags_must_be_exactly_right(text: str, kept: str | None) -> None:
    at = tags_cut(text)
    assert (None if at is None else text[:at]) == kept


# The rewards ----------------------------------------------------------------------------------------------------------


def lab_rollouts(tokenizer: Any, texts: list[str], answers: list[str | None], **columns: Any) -> Rollouts:
    prompt = tokenizer("Q:3+4\nA:")["input_ids"]
    return Rollouts.from_token_ids(
        [prompt] * len(texts),
        [[*tokenizer(text)["input_ids"], 1] for text in texts],
        group_size=len(texts),
        pad_token_id=0,
        completions=texts,
        columns={"answer": answers, **columns},
    )


def test_rlpr_debias_clip_format_and_missing_references() -> None:
    tokenizer, model = lab_tokenizer(), tiny_model()
    texts = [r"3+4=7 so \boxed{7}", r" hm so \boxed{8}", " well 7", r" so \boxed{1}"]
    rollouts = lab_rollouts(tokenizer, texts, ["7", "7", "7", None], no_reasoning=[0.0, 1.0, 0.0, 0.0])
    policy = PolicyPass(model, rollouts, tokenizer=tokenizer)
    plain_gain = get("rlpr(baseline=none)").score(rollouts, policy)
    assert plain_gain.isnan().tolist() == [False, False, False, True]
    assert plain_gain[2] == 0
    from_column = get("rlpr(baseline=column)").score(rollouts, policy)
    assert from_column[0] == plain_gain[0]
    assert from_column[1] == pytest.approx(0.1), "the gain over a baseline of 1 is negative, hence 0"
    assert get("rlpr(baseline=column)").columns == ("answer", "no_reasoning")
    assert get("rlpr(baseline=none, format_weight=0.0)").score(rollouts, policy)[0] == pytest.approx(
        (float(plain_gain[0]) - 0.1) / 0.9
    )


def test_a_worked_solution_stands_for_what_it_boxes() -> None:
    tokenizer, model = lab_tokenizer(), tiny_model()
    texts = [r"3+4=7 so \boxed{7}", r" so \boxed{8}"]
    scores = []
    for answers in (["7", "7"], [r"3+4=7 so \boxed{7}"] * 2):
        rollouts = lab_rollouts(tokenizer, texts, answers)
        scores.append(get("reference_logprob").score(rollouts, PolicyPass(model, rollouts, tokenizer=tokenizer)))
    assert torch.equal(*scores)


def test_a_long_reference_is_scored_whole() -> None:
    tokenizer, model = lab_tokenizer(), tiny_model()
    rollouts = lab_rollouts(tokenizer, [r"3+4=7 so \boxed{7}"] * 2, ["1234567890" * 12] * 2)
    policy = PolicyPass(model, rollouts, tokenizer=tokenizer)
    total, mean = (get(spec).score(rollouts, policy) for spec in ("reference_logprob", "reference_logprob(mean=True)"))
    assert total[0].item() == pytest.approx(120 * mean[0].item(), rel=1e-6)
    assert get("verifree").score(rollouts, policy)[0] == 0, "a product over 120 tokens is 0 in float32"
    assert get("rlpr(baseline=none)").score(rollouts, policy)[0] > 0.1


def test_a_pass_without_a_tokenizer_is_refused() -> None:
    rollouts = lab_rollouts(lab_tokenizer(), [r" so \boxed{7}"] * 2, ["7"] * 2)
    with pytest.raises(ValueError, match="reward 'rlpr' puts the reference before the policy: give PolicyPass its tok"):
        get("rlpr").score(rollouts, PolicyPass(tiny_model(), rollouts))
    with pytest.raises(ValueError, match="have no column 'gold'"):
        get("rlpr(column=gold)").score(rollouts, PolicyPass(tiny_model(), rollouts, tokenizer=lab_tokenizer()))
    with pytest.raises(ValueError, match="answer='tag' must be one of boxed, tags"):
        get("verifree(answer=tag)")


def test_verifrees_reference_term_has_the_gradient_of_the_mean_probability() -> None:
    model = qwen2()
    contexts, continuations = CONTEXTS[:3], CONTINUATIONS[:3]
    exact = copy.deepcopy(model).double()
    (-sum(naive(exact, c, a).sum().exp() for c, a in zip(contexts, continuations, strict=True)) / 3).backward()
    scorer = ContinuationScorer(model, temperature=TEMPERATURE)
    loss = reference_loss(scorer.logps(contexts, continuations, requires_grad=True))
    loss.backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad.double() - q.grad).norm() <= 1e-5 * q.grad.norm(), name
    with pytest.raises(ValueError, match="no row to average over"):
        reference_loss([])


def test_the_spread_filter_follows_rlprs_schedule() -> None:
    keep, mean, generator = SpreadFilter(0.5), None, torch.Generator().manual_seed(0)
    for batch in range(1, 30):
        wide = torch.rand(3, 4, generator=generator)
        rewards = wide * torch.tensor([[1.0], [0.1], [0.6]])
        keep.training = True
        stds = rewards.double().std(dim=1)
        wanted = stds < 0.5 * mean if batch >= 11 else torch.zeros(3, dtype=torch.bool)
        got = keep(rewards)
        assert got.isnan().all(1).tolist() == got.isnan().any(1).tolist() == wanted.tolist()
        assert torch.equal(got[~wanted], rewards[~wanted])
        if batch >= 6:
            now = float(stds.mean())
            mean = now if mean is None else 0.99 * mean + 0.01 * now
        assert keep.mean_std == pytest.approx(mean)
        if batch >= 11:
            assert wanted[1], "a group that spreads ten times less is always left out"
    before = (keep.batches, keep.mean_std)
    keep.training = False
    keep(torch.rand(3, 4))
    assert (keep.batches, keep.mean_std) == before, "evaluation leaves it alone"


# In the trainer -------------------------------------------------------------------------------------------------------

EOS = 1
DATA = dataset(answer=["7", "19", "15", "5"])


def sampled(*texts: str) -> list[list[int]]:
    tokenizer = lab_tokenizer()
    return [[*tokenizer(text)["input_ids"], EOS] for text in texts]


TEXTS = sampled(r"3+4=7 so \boxed{7}", r" ok so \boxed{8}", " hm", r" so \boxed{1}",
                r" so \boxed{19}", r"1 so \boxed{7}", r" well so \boxed{3}", " maybe")  # fmt: skip


def test_two_steps_with_rlpr_train_towards_the_reference(tmp_path: Path) -> None:
    model = tiny_model()
    made = trainer(tmp_path, ["rlpr", "verifree", "nover", "reference_logprob"], reward_weights=[1.0, 0.0, 0.0, 0.0],
                   model=model, data=DATA, completions=TEXTS, max_steps=2)  # fmt: skip
    start = weights(model)
    made.train()
    first = table(tmp_path, 1)
    assert not same_weights(start, weights(made.model))
    tokenizer = lab_tokenizer()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in first["prompt"]]
    rollouts = Rollouts.from_token_ids(
        prompts, TEXTS, group_size=4, pad_token_id=0, completions=list(first["completion"]),
        columns={"answer": ["7"] * 4 + ["19"] * 4},
    )  # fmt: skip
    policy = PolicyPass(tiny_model(), rollouts, tokenizer=tokenizer)
    for name in ("rlpr", "verifree", "nover", "reference_logprob"):
        assert first[name].tolist() == pytest.approx(get(name)(rollouts, policy).tolist(), abs=1e-6), name
    assert first["rlpr"].nunique() > 3
    assert first["rlpr"][[2, 7]].tolist() == [0, 0]
    mean = first["rlpr"].to_numpy().reshape(2, 4)
    advantages = (mean - mean.mean(1, keepdims=True)) / (mean.std(1, ddof=1, keepdims=True) + 1e-4)
    assert first["advantage"].tolist() == pytest.approx(advantages.flatten().tolist(), abs=1e-4)


def test_a_row_without_a_reference_has_no_advantage(tmp_path: Path) -> None:
    made = trainer(tmp_path, "reference_logprob", data=dataset(answer=["7", None, "15", "5"]), completions=TEXTS)
    made.train()
    rows = table(tmp_path)
    assert rows["reference_logprob"].isna().tolist() == [False] * 4 + [True] * 4
    assert rows["advantage"][4:].tolist() == [0.0] * 4
    assert math.isfinite(rows["advantage"].sum())


def test_a_diverged_policy_stops_the_run(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    made = trainer(tmp_path, "rlpr", model=model, data=DATA, completions=TEXTS)
    with pytest.raises(FloatingPointError, match="the policy gives NaN"):
        made.train()
