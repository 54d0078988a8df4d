"""The batched method equals the loop, or refuses by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as hf
from models import SIDES, ZOO, enable_checkpointing, lora, qwen2
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from vigor.gradnorm import SelfCheckFailed, UnsupportedModule, engine, microbatches, sequence_grad_norms
from vigor.gradnorm.microbatches import micro_batches
from vigor.gradnorm.norms import Exact, Sketch
from vigor.gradnorm.squares import GramCache, cross_product, linear_square, rows_square
from vigor.rollouts import Row

VOCABULARY = 41
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_OPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
_OPT |= {"word_embed_proj_dim": 32, "max_position_embeddings": 96, "pad_token_id": 0}

FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2-tied": lambda: hf.Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen2-untied": lambda: hf.Qwen2Config(**_GROUPED, tie_word_embeddings=False),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
    "llama-biases": lambda: hf.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "gemma2": lambda: hf.Gemma2Config(**_GROUPED, head_dim=8, tie_word_embeddings=True, sliding_window=16),
    "gemma3": lambda: hf.Gemma3TextConfig(**_GROUPED, head_dim=8, tie_word_embeddings=True, sliding_window=16),
    "mistral": lambda: hf.MistralConfig(**_GROUPED),
    "olmo2": lambda: hf.Olmo2Config(**_GROUPED),
    "phi": lambda: hf.PhiConfig(**_GROUPED),
    "phi3": lambda: hf.Phi3Config(**_GROUPED),
    "cohere": lambda: hf.CohereConfig(**_GROUPED),
    "stablelm": lambda: hf.StableLmConfig(**_GROUPED),
    "granite": lambda: hf.GraniteConfig(**_GROUPED, logits_scaling=3.0, embedding_multiplier=2.0),
    "smollm3": lambda: hf.SmolLM3Config(**_GROUPED),
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**_GROUPED, **_EXPERTS, shared_expert_intermediate_size=24),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**_GROUPED, **_EXPERTS, head_dim=8),
    "olmoe": lambda: hf.OlmoeConfig(**_GROUPED, num_experts=6, num_experts_per_tok=2),
    "gpt2-tied": lambda: hf.GPT2Config(**_GPT2),
    "gpt2-untied": lambda: hf.GPT2Config(**_GPT2, tie_word_embeddings=False),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**_SIZE),
    "opt": lambda: hf.OPTConfig(**_OPT),
}
family = pytest.mark.parametrize("name", FAMILIES)


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Random weights far from their initialisation, so that no gradient vanishes by it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(FAMILIES[name]())
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped products know no float64
    return model.to(dtype).train()


def batch(rows: int = 6, length: int = 22) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right padding in one batch, tokens that repeat, the pad token as a real one, an empty completion."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 15, (rows, length), generator=generator)
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    for b in range(rows):
        left, right = b % 4, length - 2 * (b % 5)
        attention[b, :left] = attention[b, right:] = 0
        completion[b, left + 5 : right] = 1
    ids[attention == 0] = 0
    ids[2, 9] = 0
    completion[3, 12:14] = 0
    completion[5] = 0
    return ids, attention, completion


def both(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    batched = sequence_grad_norms(model, *batch(), method="batched", self_check=False, **options)
    loop = sequence_grad_norms(model, *batch(), method="loop", **options)
    assert isinstance(batched, Tensor) and isinstance(loop, Tensor)
    assert batched.isnan().tolist() == [False] * 5 + [True]
    return batched[:5], loop[:5]


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted) / wanted).abs().max().item()


@family
def test_float64(name: str) -> None:
    # Norms and rotary embeddings of transformers compute in float32 whatever the model's dtype; the two methods then
    # differ by that rounding.
    assert relative(*both(build(name))) < 1e-6


@family
def test_float32(name: str) -> None:
    assert relative(*both(build(name, torch.float32))) < 1e-5


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
def test_the_zoo_in_float64(make: Any) -> None:
    assert relative(*both(make(torch.float64))) < 1e-7


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2-tied", "gemma3"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 100])
def test_micro_batches_change_nothing(name: str, micro_batch: int) -> None:
    assert relative(*both(build(name), micro_batch=micro_batch)) < 1e-6


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2-tied", "gemma2", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    plain, _ = both(build(name))
    model = build(name)
    enable_checkpointing(model, use_reentrant=reentrant)
    assert relative(both(model)[0], plain) < 1e-12


@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_temperature(temperature: float) -> None:
    assert relative(*both(build("qwen2-tied"), temperature=temperature)) < 1e-6


@pytest.mark.parametrize("parameters", ["head", "last_1", lambda name: "bias" in name, lambda name: "1." in name])
@pytest.mark.parametrize("name", ["qwen2-untied", "gpt2-tied"])
def test_subsets_of_parameters(name: str, parameters: Any) -> None:
    assert relative(*both(build(name), parameters=parameters)) < 1e-6


def test_frozen_parameters_do_not_count() -> None:
    model = build("qwen2-tied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    assert relative(*both(model)) < 1e-6


@pytest.mark.parametrize("checkpointed", [False, True])
def test_lora(checkpointed: bool) -> None:
    model = lora(torch.float64).train()
    if checkpointed:
        enable_checkpointing(model, use_reentrant=False)
        model.enable_input_require_grads()
    assert relative(*both(model)) < 1e-7


def test_token_logps_are_those_of_the_loop() -> None:
    model = build("gpt2-tied")
    _, batched = sequence_grad_norms(model, *batch(), method="batched", return_token_logps=True)
    _, loop = sequence_grad_norms(model, *batch(), method="loop", return_token_logps=True)
    torch.testing.assert_close(batched, loop, rtol=1e-6, atol=1e-7)


def test_experts_run_as_before_after_the_pass() -> None:
    model = build("mixtral", torch.float32)
    before = model.config._experts_implementation
    sequence_grad_norms(model, *batch(), method="batched")
    assert model.config._experts_implementation == before != "eager"


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_experts_in_micro_batches_and_checkpointed(micro_batch: int) -> None:
    model = build("qwen3-moe")
    enable_checkpointing(model, use_reentrant=False)
    assert relative(*both(model, micro_batch=micro_batch)) < 1e-6


def test_a_module_used_twice_counts_its_sum() -> None:
    model = build("qwen2-untied")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert relative(*both(model)) < 1e-6


def test_grad_modes_and_forwards_are_left_as_they_were() -> None:
    model = build("qwen2-tied")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    sequence_grad_norms(model, *batch(), method="batched")
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == before
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.embed_tokens.weight"]
    assert model.lm_head.weight.grad.eq(1).all()


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-biases", "gpt2-tied"])
def test_bfloat16_is_as_near_to_float64_as_the_loop(name: str) -> None:
    exact = both(build(name))[1]
    batched, loop = both(build(name, torch.bfloat16))
    assert batched.dtype == torch.float32
    assert relative(batched.double(), exact) < max(3 * relative(loop.double(), exact), 0.02)


def test_autocast_agrees_with_the_loop_under_autocast() -> None:
    model = build("qwen2-tied", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batched, loop = both(model)
    assert relative(batched, loop) < 0.02
    assert relative(batched, both(model)[1]) > 1e-5  # autocast was on


def test_no_parameter_gradient_is_formed() -> None:
    """The largest tensor of the backward pass stays below the embedding matrix."""
    config = hf.Qwen2Config(**{**_GROUPED, "vocab_size": 4096}, tie_word_embeddings=True)
    model = hf.AutoModelForCausalLM.from_config(config)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and func not in (torch.ops.aten.detach.default, torch.ops.aten.t.default):
                sizes.append(result.numel() if result._base is None else 0)
            return result

    ids, attention, completion = (x[:, :12] for x in batch())
    with Sizes():
        sequence_grad_norms(model, ids, attention, completion, method="batched", micro_batch=1, self_check=False)
    assert sizes and max(sizes) < model.lm_head.weight.numel()


def test_a_head_that_needs_more_than_hidden_states_is_taken_whole() -> None:
    """ProphetNet's predicts from a second stream of its decoder's output."""
    config = hf.ProphetNetConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_decoder_layers=2, num_decoder_attention_heads=4, decoder_ffn_dim=48,
        num_encoder_layers=1, num_encoder_attention_heads=4, encoder_ffn_dim=48, max_position_embeddings=96,
        pad_token_id=0, is_decoder=True, add_cross_attention=False, use_cache=False,
    )  # fmt: skip
    assert relative(*both(hf.ProphetNetForCausalLM(config))) < 1e-3


# Refusals -----------------------------------------------------------------------------------------------------------


class TiedOutside(nn.Module):
    """Uses the embedding's weight as its head, outside the embedding's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = self.layer(self.embedding(input_ids)).cumsum(1)
        return type("Output", (), {"logits": hidden @ self.embedding.weight.T})()


class Mixer(TiedOutside):
    """Lets the sequences of a batch see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        return type("Output", (), {"logits": self.head(self.layer(hidden + hidden.mean(0, keepdim=True)))})()


class Square(nn.Module):
    """Uses a matrix in something that is not a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight @ self.weight)


class Bilinear(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Square()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.head(self.layer(self.embedding(input_ids)).cumsum(1))})()


class InPlace(Mixer):
    """Changes a copy of a matrix in place before it uses it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        weight = self.layer.weight.clone().mul_(2)
        hidden = nn.functional.linear(self.embedding(input_ids), weight).cumsum(1)
        return type("Output", (), {"logits": self.head(hidden)})()


@pytest.mark.parametrize("make", [TiedOutside, Bilinear], ids=["tied-outside", "bilinear"])
def test_unusual_uses_of_a_matrix_are_exact(make: Callable[[], nn.Module]) -> None:
    assert relative(*both(make().double())) < 1e-9


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Mixer(), SelfCheckFailed, "mixes the sequences of a batch"),
        (InPlace(), UnsupportedModule, "uses layer.weight in mul_.*in place"),
    ],
    ids=["mixer", "in-place"],
)
def test_what_cannot_be_exact_is_refused_and_auto_falls_back(model: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        sequence_grad_norms(model, *batch(), method="batched")
    assert "method='loop'" in str(refused.value)
    with pytest.raises(error, match=message):  # as long as it is asked for
        sequence_grad_norms(model, *batch(), method="batched")
    again = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="Falling back to the loop"):
        norms = sequence_grad_norms(again, *batch())
    torch.testing.assert_close(norms, sequence_grad_norms(model, *batch(), method="loop"), equal_nan=True)
    with warnings.catch_warnings():  # once a model
        warnings.simplefilter("error")
        sequence_grad_norms(again, *batch())


def test_dora() -> None:
    config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(qwen2(torch.float64), config)
    assert relative(*both(model)) < 1e-6


def test_the_self_check_runs_once_a_model_and_choice() -> None:
    model = build("qwen2-tied", torch.float32)
    shapes: list[tuple[int, ...]] = []
    # The embedding runs once a decoder pass; the model's own forward also runs the head by itself.
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    sequence_grad_norms(model, *batch(), method="batched")
    sequence_grad_norms(model, *batch(), method="batched")
    assert shapes == [(5, 22), (1, 22), (1, 13), (5, 22)]  # the longest and the shortest row
    sequence_grad_norms(model, *batch(), method="batched", parameters="last_1")
    assert shapes[4:] == [(5, 22), (1, 22), (1, 13)]


def test_a_row_alone_does_not_settle_the_self_check() -> None:
    """Alone in its batch it cannot show that the model lets sequences see each other."""
    model = Mixer()
    one_row = [x[:1] for x in batch()]
    sequence_grad_norms(model, *one_row, method="batched")
    with pytest.raises(SelfCheckFailed):
        sequence_grad_norms(model, *batch(), method="batched")


def test_the_self_check_waits_for_a_row_that_is_not_certain() -> None:
    """A policy that gives one token nearly all probability has norms that are rounding errors: they prove nothing."""
    model = build("qwen2-untied", torch.float32)
    ids, attention, completion = batch()
    ids[:, 4:] = torch.where(attention[:, 4:] == 1, 7, 0)
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = nn.Parameter(torch.zeros(VOCABULARY), requires_grad=False)
        model.lm_head.bias[7] = 60.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norms = sequence_grad_norms(model, ids, attention, completion)
    assert isinstance(norms, Tensor) and norms[:5].max() < 1e-4
    calls: list[int] = []
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
        model.lm_head.bias.zero_()
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    sequence_grad_norms(model, *batch())
    assert len(calls) == 3  # the pass, and the rows that are compared now
    sequence_grad_norms(model, *batch())
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fast"}, "unknown method"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"method": "batched", "accumulation": "gradient_dtype"}, "never forms"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_grad_norms(qwen2(), *batch(), **options)


# The squares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "p", "q"), [(1, 3, 5), (7, 3, 5), (7, 64, 96), (300, 40, 50), (300, 400, 500)])
def test_linear_square(T: int, p: int, q: int) -> None:
    a, g = torch.randn(3, T, p, dtype=torch.float64), torch.randn(3, T, q, dtype=torch.float64)
    wanted = torch.einsum("btq,btp->bqp", g, a).square().sum((1, 2))
    cache = GramCache()
    torch.testing.assert_close(linear_square(a, g, cache), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(linear_square(a, 2 * g, cache), 4 * wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(linear_square(3 * a, g, cache), 9 * wanted, rtol=1e-12, atol=0)


def test_direct_form_in_blocks() -> None:
    a, g = torch.randn(2, 2100, 1500, dtype=torch.float64), torch.randn(2, 2100, 3000, dtype=torch.float64)
    wanted = torch.stack([(g[b].T @ a[b]).square().sum() for b in range(2)])
    torch.testing.assert_close(linear_square(a, g, GramCache()), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_rows_square_and_cross_product(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vigor.gradnorm.squares.BLOCK", block)
    ids = torch.randint(0, 6, (3, 20))
    d, a = torch.randn(3, 20, 4, dtype=torch.float64), torch.randn(3, 17, 4, dtype=torch.float64)
    g = torch.randn(3, 17, 6, dtype=torch.float64)
    embedding = torch.zeros(3, 6, 4, dtype=torch.float64)
    for b in range(3):
        embedding[b].index_add_(0, ids[b], d[b])
    head = torch.einsum("bsv,bsp->bvp", g, a)
    torch.testing.assert_close(rows_square(ids, d), embedding.square().sum((1, 2)))
    selected = g.gather(-1, ids[:, None, :].expand(-1, 17, -1))
    torch.testing.assert_close(cross_product(selected, a, d), (head * embedding).sum((1, 2)))


def test_a_float32_sum_over_a_large_matrix_keeps_its_digits() -> None:
    a, g = torch.full((1, 600, 3000), 0.1), torch.full((1, 600, 4000), 0.1)
    wanted = (600 * 0.01) ** 2 * 3000 * 4000
    assert linear_square(a, g, GramCache()).item() == pytest.approx(wanted, rel=1e-5)


def test_micro_batches_hold_rows_of_like_length_within_the_bounds() -> None:
    lengths = [10] * 40 + [700, 710, 4000, 4100, 9000, 9100]
    batches = micro_batches(lengths, None, 16_384, 128)
    assert [b for batch in batches for b in batch] == list(range(len(lengths)))
    assert [[lengths[b] for b in batch] for batch in batches[1:]] == [[700, 710], [4000, 4100], [9000], [9100]]
    assert [len(b) for b in micro_batches([9] * 5, 2, 16_384, 128)] == [2, 2, 1]
    assert [len(b) for b in micro_batches([1000] * 3, None, (1 << 28) // 150_000, 128)] == [1, 1, 1]


@pytest.mark.parametrize("own_cost", [0, 30, 200, 10_000])
@pytest.mark.parametrize("apart", [[], [25]])
def test_micro_batches_cost_no_more_than_any_other_runs(own_cost: int, apart: list[int]) -> None:
    """Padding against passes: compared with all ways of cutting the sorted rows."""
    lengths, most = [40, 9, 11, 30, 100, 12, 38, 110], 230

    def cost(runs: list[list[int]]) -> float:
        padded = [len(run) * max(run) for run in runs]
        mixed = any(min(run) <= n < max(run) for run in runs for n in apart)
        if mixed or any(tokens > most and len(run) > 1 for tokens, run in zip(padded, runs, strict=True)):
            return float("inf")
        return sum(padded) + own_cost * len(runs)

    ascending = sorted(lengths)
    cuts = [[0, *(i for i in range(1, 8) if bits >> i & 1), 8] for bits in range(0, 256, 2)]
    ways = [[ascending[a:b] for a, b in pairwise(cut)] for cut in cuts]
    found = [[lengths[b] for b in run] for run in micro_batches(lengths, None, most, own_cost, apart)]
    assert sorted(n for run in found for n in run) == ascending
    assert cost(found) == min(map(cost, ways))


def test_a_micro_batch_is_at_most_half_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a small batch would need nearly the memory of a training step, as an estimate may, which is for speed; passes
    that are kept are all held anyway."""
    monkeypatch.setattr(microbatches, "ACTIVATIONS", 1)
    model = build("qwen2-tied", torch.float32)
    ids = torch.ones(100, dtype=torch.int64)

    def most_tokens(rows: int, keep: Any = "nothing", norms: Any = Exact) -> int:
        row = Row(ids, ids.bool(), ids)
        settings, chosen = engine.Settings(keep=keep, norms=norms), dict(model.named_parameters())
        return engine.Engine(model, chosen, [row] * rows, settings, device=ids.device).bounds()[0]

    assert [most_tokens(rows) for rows in (1, 8, 16, 30, 50)] == [512, 512, 800, 1500, 2048]
    assert most_tokens(8, "keep") == most_tokens(8, "retain") == most_tokens(8, norms=partial(Sketch, 32, 0)) == 2048
    enable_checkpointing(model, use_reentrant=False)
    assert most_tokens(50) == most_tokens(50, norms=partial(Sketch, 32, 0)) == 512


def test_sides_of_padding_change_nothing() -> None:
    from models import SAMPLES, padded

    model = qwen2()
    norms = [sequence_grad_norms(model, *padded(SAMPLES, side, extra=3), method="batched") for side in SIDES]
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=1e-6, atol=0, equal_nan=True)
