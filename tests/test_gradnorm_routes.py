"""Every way in which a model may use a parameter: exact, or refused by name. Each model is a few lines.

The models are compared module by module, most of them in float64, rows of different lengths in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MambaConfig, Qwen2Config

from vigor.gradnorm import UnsupportedModule, fused_grad_norms, sequence_grad_norms, watch

V, D, H = 23, 8, 2


def batch(rows: int = 4, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(1))
    lengths = [length - b % 3 for b in range(rows)]
    attention = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    completion = attention.clone()
    completion[:, :2] = 0
    ids[1, 2] = 0
    return ids, attention, completion


def norms(model: nn.Module, rows: tuple[Tensor, Tensor, Tensor], **options: Any) -> Tensor:
    found = sequence_grad_norms(model, *rows, self_check=False, micro_batch=100, **options)
    assert isinstance(found, Tensor)
    return found


def owned_by(module: str, name: str) -> bool:
    return name.rpartition(".")[0] == module


def assert_exact(model: nn.Module, rows: tuple[Tensor, Tensor, Tensor] | None = None, limit: float = 1e-9) -> None:
    rows = batch() if rows is None else rows
    modules = sorted({name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad})
    choices: list[Any] = ["trainable", *(partial(owned_by, module) for module in modules)]
    total = norms(model, rows, method="loop")
    for choice in choices:
        batched, loop = (norms(model, rows, method=m, parameters=choice) for m in ("batched", "loop"))
        if choice == "trainable":
            assert batched.gt(0).all()
        error = ((batched - loop).abs() / torch.maximum(loop, 1e-6 * total)).max().item()
        assert error < limit, (choice, error)


class Toy(nn.Module):
    """Embedding, a sum over the past, the layer under test, head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(V, D), layer, nn.Linear(D, V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids).cumsum(1) / 3
        return type("Output", (), {"logits": self.head(torch.tanh(self.layer(hidden)))})()


class Layer(nn.Module):
    """A forward function with parameters of the given shapes, named a, b and so on."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.names = "abcdef"[: len(shapes)]
        for name, shape in zip(self.names, shapes, strict=True):
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))


def toy(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> nn.Module:
    return Toy(Layer(function, *shapes)).double()


def head_bias(x: Tensor, a: Tensor) -> Tensor:
    """A number a head, as attention sinks and gates have it."""
    heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
    return (heads + a[None, :, None, None]).transpose(1, 2).flatten(2)


def sinks(x: Tensor, a: Tensor) -> Tensor:
    heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
    sink = a.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
    return torch.cat([heads, sink], dim=-1).softmax(-1)[..., :-1].transpose(1, 2).flatten(2)


def per_head_norm(x: Tensor, a: Tensor) -> Tensor:
    """Sequences, tokens and heads flattened into one axis."""
    heads = x.reshape(-1, D // H)
    return (a * heads / (1 + heads.square().mean(-1, keepdim=True))).reshape(x.shape)


def convolution(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.mT, (2, 0)), a, b, groups=D).mT


def state_space(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    decay = torch.exp(-torch.exp(a.float().to(a.dtype)))  # (D, 3)
    state, out = x.new_zeros(len(x), D, 3), []
    for t in range(x.shape[1]):
        state = state * decay[None] + x[:, t, :, None]
        out.append(state.sum(-1) + b * x[:, t])
    return torch.stack(out, dim=1)


def stacked_experts(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """All tokens through all experts in one product, as Llama 4 does."""
    each = x.reshape(-1, D).repeat(len(a), 1).view(len(a), -1, D)
    return torch.bmm(F.silu(torch.bmm(each, a)), b).sum(0).view(x.shape)


def block_diagonal(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As RecurrentGemma's gates do it."""
    blocks = x.reshape(-1, H, D // H).permute(1, 0, 2)
    return torch.baddbmm(b[:, None, :], blocks, a).permute(1, 0, 2).reshape(x.shape)


def group_norm(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.group_norm(x.reshape(-1, D), H, a, b).view(x.shape)


FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "W.T": (lambda x, a: x @ a.T, (D, D)),
    "W.t()": (lambda x, a: torch.matmul(x, a.t()), (D, D)),
    "W.mT": (lambda x, a: torch.matmul(x, a.mT), (D, D)),
    "W.transpose": (lambda x, a: x.flatten(0, 1).mm(a.transpose(0, 1)).view(x.shape), (D, D)),
    "W.permute": (lambda x, a: x @ a.permute(1, 0), (D, D)),
    "twice transposed": (lambda x, a: F.linear(x, a.T.T), (D, D)),
    "not square": (lambda x, a, b: x @ a.T @ b.T, (5, D), (D, 5)),
    "W x": (lambda x, a: (a @ x.mT).mT, (D, D)),
    "cast": (lambda x, a: F.linear(x, a.to(x.dtype).type(torch.float64)), (D, D)),
    "keywords": (lambda x, a, b: F.linear(input=x, weight=a, bias=b), (D, D), (D,)),
    "bias by addmm": (lambda x, a, b: torch.addmm(b, x.flatten(0, 1), a).view(x.shape), (D, D), (D,)),
    "bias made": (lambda x, a, b: F.linear(x, a, 2 * b), (D, D), (D,)),
    "times a number": (lambda x, a: F.linear(x, a * 0.3), (D, D)),
    "product of two": (lambda x, a, b: x @ (a @ b), (D, D), (D, D)),
    "scalar": (lambda x, a: x * a, ()),
    "one number": (lambda x, a: x * a.view(1, -1), (1,)),
    "leading ones": (lambda x, a: x * a + x.roll(1, -1) * (1 - a), (1, 1, D)),
    "chunks": (lambda x, a: torch.cat([x[..., :4] * a.chunk(2)[0], x[..., 4:] + a.chunk(2)[1]], -1), (D,)),
    "sum of exponentials": (lambda x, a, b: x * (torch.exp((a * b).sum()) - torch.exp(a.mean())), (D,), (D,)),
    "in place": (lambda x, a: x.clone().mul_(a).add_(a), (D,)),
    "where": (lambda x, a: torch.where(x > 0, x, x * a), (D,)),
    "einsum": (lambda x, a: torch.einsum("btd,de->bte", x, a), (D, D)),
    "head bias": (head_bias, (H,)),
    "sinks": (sinks, (H,)),
    "per-head norm": (per_head_norm, (D // H,)),
    "convolution": (convolution, (D, 1, 3), (D,)),
    "state space": (state_space, (D, 3), (D,)),
    "stacked experts": (stacked_experts, (3, D, 5), (3, 5, D)),
    "block diagonal": (block_diagonal, (H, D // H, D // H), (H, D // H)),
    "group norm": (group_norm, (D,), (D,)),
    "layer norm": (lambda x, a, b: F.layer_norm(x, (D,), weight=a, bias=b), (D,), (D,)),
    "layer norm without shift": (lambda x, a: F.layer_norm(x, (D,), a, None, 1e-3), (D,)),
    "rms norm": (lambda x, a: F.rms_norm(x, (D,), weight=a, eps=1e-3), (D,)),
    "table of positions": (lambda x, a: x + F.embedding(torch.arange(x.shape[1]), a), (12, D)),
    "rows of a table": (lambda x, a: x + a[: x.shape[1]], (12, D)),
    "padded row": (lambda x, a: x + F.embedding((x[..., 0] > 0).long(), a, 0), (2, D)),
    "padded row of copies": (lambda x, a: x + F.embedding((x[..., 0] > 0).long(), a.T, 0), (D, 2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name: str) -> None:
    assert_exact(toy(*FUNCTIONS[name]))


@pytest.mark.parametrize("name", ["W.T", "head bias", "sinks", "per-head norm", "convolution", "stacked experts"])
@pytest.mark.parametrize(("rows", "length"), [(1, 9), (2, 9), (H, 5), (8, 8), (9, 9), (3, 6)])
def test_sizes_that_coincide(name: str, rows: int, length: int) -> None:
    """As many rows as heads, features, experts or tokens."""
    assert_exact(toy(*FUNCTIONS[name]), batch(rows, length) if rows > 1 else tuple(x[:1] for x in batch(4, length)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations_under_checkpointing(name: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    assert_exact(Toy(Checkpointed(Layer(*FUNCTIONS[name]))).double())


# The update ---------------------------------------------------------------------------------------------------------

UPDATED = ["W.T", "W.permute", "not square", "W x", "bias by addmm", "stacked experts", "layer norm", "convolution"]
UPDATED += ["state space", "block diagonal", "einsum", "padded row of copies", "experts"]


@pytest.mark.parametrize("mode", ["keep", "retain"])
@pytest.mark.parametrize("name", UPDATED)
def test_gradients_of_the_fused_update_are_the_right_way_round(name: str, mode: Any) -> None:
    model = Toy(Experts(modules=False, both=True)).double() if name == "experts" else toy(*FUNCTIONS[name])
    ids, attention, completion = batch()
    weights_B = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    scored = fused_grad_norms(model, ids, attention, completion, mode=mode, micro_batch=100, self_check=False)
    (scored.token_logps() * weights_B[:, None]).sum().backward()
    got = [parameter.grad for parameter in model.parameters()]
    logps = model(ids, attention, False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    wanted = torch.autograd.grad((logps * completion[:, 1:] * weights_B[:, None]).sum(), list(model.parameters()))
    torch.testing.assert_close(got, list(wanted), rtol=1e-5, atol=1e-7)


# Experts ------------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Each token through one or two of three experts, which are modules of their own or slices of a parameter."""

    def __init__(self, *, modules: bool, both: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3, bias=False)
        self.both = both
        if modules:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 5), nn.SiLU(), nn.Linear(5, D)) for _ in range(3))
        else:
            self.up, self.up_bias = nn.Parameter(torch.randn(3, D, 5)), nn.Parameter(torch.randn(3, 5))
            self.down = nn.Parameter(torch.randn(3, D, 5))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        scores = self.gate(flat).softmax(-1)
        chosen = scores.topk(2).indices if self.both else scores.argmax(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e in range(3):
            _, token = torch.where(e == chosen.T)  # first choices before second ones: not the tokens' order
            if len(token):
                out = out.index_add(0, token, self.expert(e, flat[token]) * scores[token, e, None])
        return out.view(x.shape)

    def expert(self, e: int, x: Tensor) -> Tensor:
        if hasattr(self, "experts"):
            return self.experts[e](x)
        return F.linear(F.silu(x @ self.up[e] + self.up_bias[e]), self.down[e])


@pytest.mark.parametrize("modules", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_experts(modules: bool, both: bool) -> None:
    assert_exact(Toy(Experts(modules=modules, both=both)).double())


@pytest.mark.parametrize("modules", [False, True])
def test_an_expert_with_as_many_tokens_as_the_batch(modules: bool) -> None:
    """Two rows of two tokens: any count of tokens is that of the rows, or of all tokens, somewhere."""
    ids = torch.randint(3, V, (2, 12, 2, 3), generator=torch.Generator().manual_seed(4))
    model = Toy(Experts(modules=modules, both=True)).double()
    for i in range(6):
        rows = ids[0, i], torch.ones(2, 3).long(), torch.tensor([[0, 1, 1], [0, 0, 1]])
        assert_exact(model, rows)


def test_experts_of_gpt_oss() -> None:
    """Biases, sinks, and matrices the other way round, in float32."""
    config = GptOssConfig(vocab_size=V, hidden_size=16, intermediate_size=8, num_hidden_layers=1, head_dim=8,
                          num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
                          pad_token_id=0)  # fmt: skip
    assert_exact(moved(AutoModelForCausalLM.from_config(config)), limit=1e-4)


def moved(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.filterwarnings("ignore")
def test_mamba() -> None:
    config = MambaConfig(vocab_size=V, hidden_size=8, state_size=3, num_hidden_layers=1, pad_token_id=0)
    assert_exact(moved(AutoModelForCausalLM.from_config(config)), limit=1e-4)


# Adapters -----------------------------------------------------------------------------------------------------------


def qwen2(**sizes: int) -> Any:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=V, num_hidden_layers=1, pad_token_id=0, **{**small, **sizes})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 36}], ids=["16", "as many features as tokens"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters(sizes: dict[str, int], dora: bool) -> None:
    """DoRA's weight norm uses lora_A and lora_B on an identity matrix, detached."""
    targets = ["q_proj", "o_proj", "down_proj", "embed_tokens"]
    model = get_peft_model(qwen2(**sizes), LoraConfig(r=2, use_dora=dora, target_modules=targets))
    model = moved(model)
    batched, loop = (norms(model, batch(), method=method) for method in ("batched", "loop"))
    torch.testing.assert_close(batched, loop, rtol=1e-5, atol=0)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_the_copies_of_a_matrix_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy(*FUNCTIONS["einsum"])
    norms(model, batch(), method="batched")
    monkeypatch.setattr(watch, "COPIES", 4 * D * D - 1)
    with pytest.raises(UnsupportedModule, match=r"layer uses layer.a in einsum.* 4 sequences would take 256 numbers"):
        norms(model, batch(), method="batched")
    assert_exact(toy(*FUNCTIONS["W.T"]))


REFUSED: dict[str, tuple[Any, ...]] = {
    "tokens first": (lambda x, a: F.linear(x.transpose(0, 1), a).transpose(0, 1), (D, D)),
    "tokens first, vector": (lambda x, a: (x.transpose(0, 1) * a).transpose(0, 1), (D,)),
    "features first": (lambda x, a: (x.permute(2, 0, 1) * a[:, None, None]).permute(1, 2, 0), (D,)),
    "a linear map and more": (lambda x, a: x @ a + x * a.sum(0), (D, D)),
    "more and a linear map": (lambda x, a: (x * a.sum(0)) @ a, (D, D)),
    "changed in place": (lambda x, a: x * (2 * a).mul_(3), (D,)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_apart_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModule, match=r"layer uses layer\.a in") as refused:
        norms(toy(*REFUSED[name]), batch(), method="batched")
    assert "method='loop'" in str(refused.value)


def test_experts_that_are_used_twice_are_refused() -> None:
    experts = Experts(modules=False)
    model = Toy(nn.Sequential(experts, experts)).double()
    with pytest.raises(UnsupportedModule, match=r"uses layer\.0\.up in matmul.*: expert \d is used a second time"):
        norms(model, batch(), method="batched")
    modules = Experts(modules=True)
    assert_exact(Toy(nn.Sequential(modules, modules)).double())
