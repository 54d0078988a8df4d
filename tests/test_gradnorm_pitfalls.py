"""What once made a gradient norm silently wrong, or broke it: one test each, for those that no other file has.

Gradient checkpointing under the watching mode, uses counted once, flat float32 sums, empty completions and dropout are
in test_gradnorm.py and test_gradnorm_batched.py; single operations and experts in test_gradnorm_routes.py.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_gradnorm_batched import batch, both, build, relative
from test_gradnorm_routes import D, Layer, Toy, assert_exact, norms, toy
from test_gradnorm_routes import batch as rows
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Gemma2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vigor.gradnorm import SelfCheckFailed, UnsupportedModule, sequence_grad_norms
from vigor.gradnorm import norms as norms_module
from vigor.gradnorm.tokens import Tokens


def output(logits: Tensor) -> Any:
    return type("Output", (), {"logits": logits})()


# Precision ----------------------------------------------------------------------------------------------------------


def test_autocast_is_off_in_the_products_of_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass runs inside the user's autocast region, which makes float32 products bfloat16 ones."""
    square, errors = norms_module.linear_square, []

    def checked(a_BTp: Tensor, g_BTq: Tensor, cache: Any) -> Tensor:
        found = square(a_BTp, g_BTq, cache)
        with torch.autocast("cpu", enabled=False):
            wanted = torch.einsum("btq,btp->bqp", g_BTq.double(), a_BTp.double()).square().sum((1, 2))
        errors.append(((found - wanted).abs() / wanted)[wanted > 1e-9].max().item())
        return found

    monkeypatch.setattr(norms_module, "linear_square", checked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both(build("llama-biases", torch.float32))
    assert len(errors) > 10 and max(errors) < 1e-5


def test_a_bias_adds_up_in_float32() -> None:
    """200 tokens: a sum rounded to bfloat16 is off by up to 4e-3, one taken in bfloat16 by more."""
    seen: list[Tensor] = []

    def linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = nn.functional.linear(x, a, b)
        y.register_hook(lambda g: seen.append(g.double().sum(1)))
        return y

    model = toy(linear, (D, D), (D,)).to(torch.bfloat16)
    batched = norms(model, rows(4, 200), method="batched", parameters="layer.b".__eq__)
    (gradient_BD,) = seen
    assert relative(batched.double().sort().values, gradient_BD.norm(dim=1).sort().values) < 1e-5


# Which row of a batch a gradient belongs to -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tied"), [("qwen2-untied", False), ("qwen2-tied", True)])
def test_the_pad_id_as_a_real_token_has_no_gradient_as_input_and_has_one_as_output(name: str, tied: bool) -> None:
    model = build(name)
    embedding = "model.embed_tokens.weight"
    with_padding_idx = both(model, parameters=embedding.__eq__)
    assert relative(*with_padding_idx) < 1e-9
    model.model.embed_tokens.padding_idx = None
    without = both(model, parameters=embedding.__eq__)
    assert relative(*without) < 1e-9
    assert (with_padding_idx[0] - without[0]).abs()[2] > 1e-6  # the row that holds it


def test_position_ids_that_all_rows_share() -> None:
    model = build("gpt2-tied")
    assert relative(*both(model, parameters="transformer.wpe.weight".__eq__)) < 1e-9


def test_norms_of_heads_before_and_after_the_heads_are_transposed() -> None:
    for name in ("gemma3", "qwen3"):
        assert relative(*both(build(name), parameters=lambda n: "q_norm" in n or "k_norm" in n)) < 1e-6


class TokensFirst(Toy):
    """Works on (tokens, sequences, features), as XLNet does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids.T.contiguous()).cumsum(0) / 3
        return output(self.head(self.layer(hidden)).transpose(0, 1))


@pytest.mark.parametrize(("n", "length"), [(4, 9), (9, 9)])
def test_tokens_on_the_first_axis_are_refused_even_where_as_many_as_rows(n: int, length: int) -> None:
    model = TokensFirst(nn.Linear(D, D)).double()
    with pytest.raises(UnsupportedModule, match=r"embedding uses embedding\.weight in embedding"):
        norms(model, rows(n, length), method="batched")


def test_padding_that_changes_the_logits_fails_the_self_check() -> None:
    class SeesPadding(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            hidden = self.embedding(input_ids)
            return output(self.head(self.layer(hidden + hidden.mean(1, keepdim=True))))

    with pytest.raises(SelfCheckFailed):
        sequence_grad_norms(SeesPadding(nn.Linear(D, D)).double(), *rows(), method="batched", micro_batch=4)


def test_picked_tokens_are_not_held_after_the_module_that_picked_them() -> None:
    """Or gradient checkpointing would save no memory in a mixture of experts."""
    tokens, index = Tokens(2, 3), torch.tensor([5, 0])

    def module() -> Tensor:
        picked = torch.ones(6, 4)[index]
        tokens.follow(Tensor.__getitem__, (torch.ones(6, 4), index), {}, picked)
        doubled = 2 * picked
        tokens.follow(Tensor.mul, (picked, 2), {}, doubled)
        assert len(tokens.marked) == 2
        return doubled

    doubled = tokens.module(module)
    assert [x is doubled for x, _ in tokens.marked.values()] == [True]
    assert tokens.of(doubled).tolist() == [1, 0]  # type: ignore[union-attr]


# Where a weight is used ---------------------------------------------------------------------------------------------


class Head(Toy):
    """Turns hidden states into logits with a weight of another module."""

    def __init__(self, logits: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(nn.Linear(D, D))
        self.logits = logits
        self.head.bias = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = torch.tanh(self.layer(self.embedding(input_ids).cumsum(1) / 3))
        return output(self.logits(hidden, self.head.weight))


class FusedHead(torch.autograd.Function):
    """A linear map with a backward pass of its own, as fused kernels have it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        return g @ weight, g.flatten(0, 1).T @ hidden.flatten(0, 1)


def test_a_head_that_uses_the_weight_of_another_module() -> None:
    assert_exact(Head(lambda hidden, weight: hidden @ weight.T).double())
    tied = Head(lambda hidden, weight: nn.functional.linear(hidden, weight)).double()
    tied.embedding.weight = tied.head.weight
    assert_exact(tied)


def test_a_fused_kernel_that_takes_the_weight_is_refused() -> None:
    model = Head(FusedHead.apply).double()
    with pytest.raises(UnsupportedModule, match=r"head\.weight is used by an operation that cannot be watched.*loop"):
        norms(model, rows(), method="batched")
    model.head.requires_grad_(False)
    assert_exact(model)


def test_a_use_under_no_grad_does_not_count() -> None:
    """Models that refine a state without a gradient first, such as HRM."""

    class Refined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                guess = torch.tanh(self.inner(x))
            return self.inner(x + guess)

    assert_exact(Toy(Refined()).double())


def test_a_use_that_is_detached_does_not_count() -> None:
    assert_exact(toy(lambda x, a: nn.functional.linear(x, a) / (1 + (2 * a).square().sum().detach()), (D, D)))


def test_changes_in_place_after_a_linear_map_and_an_embedding() -> None:
    class InPlace(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            hidden = self.embedding(input_ids)
            hidden += 0.1
            hidden = self.layer(hidden.cumsum(1) / 3)
            hidden.mul_(2).tanh_()
            return output(self.head(hidden).div_(3))

    for layer in (nn.Linear(D, D), Layer(lambda x, a: x @ a, (D, D))):
        assert_exact(InPlace(layer).double())


def test_a_soft_cap_on_the_logits() -> None:
    config = Gemma2Config(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
                          num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)  # fmt: skip
    found = []
    for cap in (None, 0.5):
        config.final_logit_softcapping = cap
        torch.manual_seed(0)
        found.append(both(AutoModelForCausalLM.from_config(config)))
        assert relative(*found[-1]) < 1e-5
    assert relative(found[0][0], found[1][0]) > 0.01


# Compiled and wrapped models ----------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[list[Any]]:
    """The graphs that were compiled, by `backend=count(compiled)`."""
    yield []
    torch.compiler.reset()


def count(graphs: list[Any]) -> Any:
    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("how", ["torch.compile", "compile()", "layer", "function"])
def test_what_is_compiled_runs_uncompiled(how: str, compiled: list[Any]) -> None:
    """A compiled graph cannot be watched: watched while it is compiled, it was compiled anew for each module."""
    model: Any = Toy(nn.Sequential(Layer(lambda x, a: x @ a, (D, D)), nn.Tanh())).double()
    wanted = norms(copy.deepcopy(model), rows(), method="batched")
    if how == "torch.compile":
        model = torch.compile(model, backend=count(compiled))
    elif how == "compile()":
        model.compile(backend=count(compiled))
    elif how == "layer":
        model.layer[0].compile(backend=count(compiled))
    else:
        tanh = torch.compile(torch.tanh, backend=count(compiled), fullgraph=True)
        model.layer[1].forward = lambda x: tanh(x)
    assert torch.equal(norms(model, rows(), method="batched"), wanted)
    assert not compiled
    with torch.no_grad():
        model(rows()[0], None, False)
    assert compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_flex_attention_stays_compiled(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled it would hold every attention score; the modules around it are not watched."""
    model = build("qwen2-tied", torch.float32)
    wanted = norms(model, batch(), method="batched")
    sdpa = torch.compile(_attention, backend=count(compiled), fullgraph=True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", lambda *a, **named: sdpa(*a[1:4]))
    model.config._attn_implementation_internal = "flex_attention"
    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.create_causal_mask", lambda **named: None)
    got = norms(model, batch(), method="batched")
    assert compiled
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0, equal_nan=True)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_model_trains_on_after_its_norms() -> None:
    """Its hooks wait for parameter gradients, of which the pass forms none."""
    model = Toy(nn.Linear(D, D)).double()
    wanted = norms(copy.deepcopy(model), rows(), method="batched")
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        assert torch.equal(norms(wrapped, rows(), method="batched"), wanted)
        assert all(p.grad is None for p in model.parameters())
        wrapped(rows()[0], None, False).logits.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()


# Waiting for the device ---------------------------------------------------------------------------------------------

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}
OUTSIDE = {"api.py", "engine.py"}
"""Rows are taken apart before the pass, and put together after it."""


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts, by file, the operations of vigor.gradnorm that wait for the device's result."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            outer = {"torch", "beartype", "jaxtyping"}
            inner = [
                path
                for frame in traceback.extract_stack()
                if not outer & set((path := Path(frame.filename)).parts) and path != Path(__file__)
                if frame.name not in ("__torch_function__", "_plain")  # an operation of the model's own
            ]
            if inner[-1].parent.name == "gradnorm" and inner[-1].name not in OUTSIDE:
                self.files[inner[-1].name] += 1
        return func(*args, **(kwargs or {}))


def waits(model: Any, n: int) -> Counter[str]:
    ids = torch.randint(3, 40, (n, 12))
    completion = torch.ones_like(ids)
    completion[:, :3] = 0
    with Waits() as mode:
        sequence_grad_norms(
            model, ids, torch.ones_like(ids), completion, method="batched", self_check=False, micro_batch=n
        )
    return mode.files


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2-tied"])
def test_the_pass_does_not_wait_for_the_device_row_by_row(name: str) -> None:
    model = build(name, torch.float32)
    few, many = waits(model, 3), waits(model, 11)
    assert few == many
    assert set(many) <= {"batched.py", "head.py"}


def test_experts_wait_for_their_number_and_counts_only() -> None:
    """Which expert's slice it is (watch.py), and how many tokens of one sequence it gets at most (capture.py)."""
    model = build("mixtral", torch.float32)
    files = waits(model, 6)
    experts = 2 * 4  # layers and experts of each
    assert files["watch.py"] == 2 * experts
    assert files["capture.py"] <= 2 * 2 * experts  # for inputs and for output gradients
    assert set(files) <= {"watch.py", "capture.py", "batched.py", "head.py"}
