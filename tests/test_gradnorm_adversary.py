"""Inputs on which a batched norm was once silently wrong although an earlier batch had passed, or broke, or refused.

Most need two batches: a first one that agrees with the loop, and another in which the model takes another path, or in
which a tensor that is no batch has the length of one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from models import lora, qwen2
from test_gradnorm_routes import D, Toy, V
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
)

from vigor.gradnorm import SelfCheckFailed, UnsupportedModule, fused_grad_norms, microbatches, sequence_grad_norms
from vigor.gradnorm.constants import Constants
from vigor.gradnorm.microbatches import micro_batches
from vigor.gradnorm.verdicts import Verdict

Rows = tuple[Tensor, Tensor, Tensor]


def batch(rows: int, length: int, *, equal: bool = False) -> Rows:
    """Right-padded rows of up to four lengths, or of one."""
    ids = torch.randint(3, 15, (rows, length), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([length if equal else max(3, length - b % 4) for b in range(rows)])
    attention = (torch.arange(length) < lengths[:, None]).long()
    completion = attention.clone()
    completion[:, :2] = 0
    return ids * attention, attention, completion


def assert_exact(model: nn.Module, *batches: Rows, limit: float = 1e-9, **options: Any) -> None:
    for rows in batches:
        loop = sequence_grad_norms(model, *rows, method="loop", **options)
        batched = sequence_grad_norms(model, *rows, method="batched", **options)
        assert isinstance(loop, Tensor) and isinstance(batched, Tensor)
        error = ((batched - loop).abs() / loop).nan_to_num().max().item()
        assert error < limit, (rows[0].shape, error)


def toy(layer: nn.Module) -> nn.Module:
    return Toy(layer).double()


def output(logits: Tensor) -> Any:
    return type("Output", (), {"logits": logits})()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Constants whose length is the batch's by chance ------------------------------------------------------------


class Tables(nn.Module):
    """Parameters, and tables that are not."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear, self.scale = nn.Linear(D, D), nn.Parameter(torch.tensor(0.5))
        self.by_head, self.rows = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(V, D))
        self.distances = nn.Embedding(16, 1)
        self.register_buffer("positions", torch.randn(64, D))
        self.register_buffer("square", torch.randn(64, 64))
        self.register_buffer("heads", torch.randn(4, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def attended(x: Tensor, bias: Tensor) -> Tensor:
    return x + (x @ x.mT + bias).tril() @ x / 10


def by_heads(m: Any, x: Tensor) -> Tensor:
    T, q = x.shape[1], x.unflatten(-1, (4, -1)).transpose(1, 2)
    scores = q @ q.mT + m.scale * m.heads[:, :T, :T] + m.by_head * m.heads[:, :T, :T]
    return x + (scores.tril() @ q).transpose(1, 2).flatten(2) / 10


def flat_positions(m: Any, x: Tensor) -> Tensor:
    """Rotary embeddings of flattened tokens."""
    at = torch.arange(x.shape[1]).repeat(len(x))
    return m.linear(x.reshape(-1, D) * m.positions[at]).view(x.shape)


def relative(m: Any, x: Tensor) -> Tensor:
    """T5's bias: an embedding of distances, (T, T) of them."""
    at = torch.arange(x.shape[1])
    return attended(x, m.distances((at[:, None] - at).clamp(0, 15)).squeeze(-1))


def picked(m: Any, x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])
    return x + m.rows.index_select(0, at) + torch.gather(m.rows, 0, at[:, None].expand(-1, D))


def zero_state(m: Any, x: Tensor) -> Tensor:
    """A recurrence whose first state is made without the batch."""
    state, out = torch.zeros(len(x), D, dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = torch.tanh(m.linear(state) + x[:, t] + m.scale * state)
        out.append(state)
    return torch.stack(out, dim=1)


def masked(m: Any, x: Tensor) -> Tensor:
    """A buffer of zeros that is written to stops being a constant."""
    out = torch.zeros(*x.shape, dtype=x.dtype)
    out[:, 1:] = x[:, :-1]
    return m.linear(out)


def unread(m: Any, x: Tensor) -> Tensor:
    """Uses of a matrix that never reach the loss."""
    torch.tanh(m.linear(x) + F.embedding((x[..., 0] > 0).long(), m.rows))
    return m.linear(x) + F.embedding((x[..., 0] > 0).long(), m.rows)


def one_row(m: Any, x: Tensor) -> Tensor:
    """The embedding of one token, where others have been looked up: as multimodal models fill in a pad token."""
    looked_up = F.embedding((x[..., 0] > 0).long() + 3, m.rows)
    return torch.where(x > 0, m.rows[5], looked_up) + m.rows[-1, :] * x


TABLES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear map of a part of a table": lambda m, x: x + m.linear(m.positions[: x.shape[1]]),
    "linear map of a table": lambda m, x: x + m.linear(m.positions)[: x.shape[1]],
    "a scale on a square table": lambda m, x: attended(x, m.scale * m.square[: x.shape[1], : x.shape[1]]),
    "a scale on a table a head": by_heads,
    "flat positions": flat_positions,
    "relative positions": relative,
    "rows picked": picked,
    "one row of a matrix": one_row,
    "a state of zeros": zero_state,
    "uses that are not read": unread,
    "written to": masked,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_as_long_as_the_batch_is_no_batch(name: str) -> None:
    """4, 6 and 8 rows; tables of 4 heads, of 6 and 8 positions, of 64 = 4 x 16 = 8 x 8."""
    model = toy(Tables(TABLES[name]))
    assert_exact(model, batch(3, 7), batch(4, 9), batch(6, 6), batch(4, 16), batch(8, 8))


def test_what_is_computed_from_the_batch_is_no_constant() -> None:
    model = nn.Linear(3, 3)
    constants = Constants()
    constants.of_model(model, {id(model.weight)})
    assert constants.has(model.bias) and not constants.has(model.weight)
    x, zeros = torch.ones(2, 3), torch.zeros(2, 3)

    def follow(func: Any, args: tuple[Any, ...], result: Any) -> None:
        constants.follow(constants.judge(args, {})[1], func, args, result)

    follow(torch.zeros, (2, 3), zeros)
    both = zeros + model.bias
    follow(torch.add, (zeros, model.bias), both)
    of_batch = zeros + x
    follow(torch.add, (zeros, x), of_batch)
    assert constants.judge(([zeros, both], 1), {id(both)}) == (True, True)
    assert constants.has(zeros) and constants.has(both) and not constants.has(of_batch)
    follow(Tensor.__setitem__, (zeros, 0, x), None)
    assert not constants.has(zeros) and constants.has(both)


# Paths that a first batch does not take ------------------------------------------------------------


class SeesPadding(Toy):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        return output(self.head(self.layer(hidden + hidden.mean(1, keepdim=True))))


class Switched(nn.Module):
    """Mixes the rows if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mix = nn.Linear(D, D), False

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x.mean(0, keepdim=True) if self.mix else 0)


class OfLength(nn.Module):
    """Computes a batch otherwise where its longest row is long."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if x.shape[1] > 10 else 1)


class Capacity(nn.Module):
    """Experts that drop what is over their capacity, in order of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        kept = torch.arange(len(flat)) < 20
        return x + (self.linear(flat) * kept[:, None]).view(x.shape)


def test_padding_that_first_appears_later() -> None:
    model = SeesPadding(nn.Linear(D, D)).double()
    assert_exact(model, batch(4, 9, equal=True))
    with pytest.raises(SelfCheckFailed, match="layer mixes the sequences of a batch, or lets padding"):
        sequence_grad_norms(model, *batch(4, 9), method="batched")


@pytest.mark.parametrize(("layer", "second"), [(OfLength(), batch(4, 12)), (Capacity(), batch(6, 9))])
def test_longer_and_larger_batches_are_compared_anew(layer: nn.Module, second: Rows) -> None:
    model = toy(copy.deepcopy(layer))
    assert_exact(model, batch(2, 9))
    with pytest.raises(SelfCheckFailed, match="layer mixes"):
        sequence_grad_norms(model, *second, method="batched")


def switched(model: Any) -> None:
    model.layer.mix = True


def replaced(model: Any) -> None:
    layer = Switched().double()
    layer.mix = True
    model.layer = layer


def hooked(model: Any) -> None:
    model.layer.register_forward_hook(lambda module, args, y: y + y.mean(0, keepdim=True))


def patched(model: Any) -> None:
    forward = model.layer.forward
    model.layer.forward = lambda x: forward(x) + x.mean(0, keepdim=True)


@pytest.mark.parametrize("change", [switched, replaced, hooked, patched])
def test_a_model_that_was_changed_is_compared_anew(change: Callable[[Any], None]) -> None:
    model = toy(Switched())
    assert_exact(model, batch(4, 9))
    change(model)
    with pytest.raises(SelfCheckFailed, match=r"layer(\.linear)? mixes"):
        sequence_grad_norms(model, *batch(4, 9), method="batched")


def test_what_is_compared_of_a_call() -> None:
    verdict = Verdict()
    lengths = [5, 6, 9, 9, 30]
    batches = [[1, 2, 0], [4, 3]]
    first = verdict.due(batches, lengths, lengths, most=1000)
    assert [c.row for c in first] == [2, 0, 4, 3]
    assert batches == [[1, 2, 0], [4, 3]]  # what is known of a model must not change how rows are scored
    verdict.passed |= {c.settles for c in first if c.settles is not None}
    assert not verdict.due(batches, lengths, lengths, most=1000)
    equal = verdict.due([[2, 3]], lengths, lengths, most=1000)
    assert [c.row for c in equal] == [2]  # no padding is another kind
    assert [c.row for c in verdict.due([[1, 2, 0]], lengths, lengths, most=1000)] == [2]  # the fourth call
    assert [c.row for c in Verdict().due([[4, 0]], lengths, lengths, most=20)] == [
        0
    ]  # a long row's logits are not held


@pytest.mark.parametrize(("apart", "batch", "company"), [([], [1, 0], True), ([5], [4], False), ([6], [1, 0], True)])
def test_a_row_alone_gets_company_for_the_comparison(apart: list[int], batch: list[int], company: bool) -> None:
    lengths = [5, 6, 9, 9, 30]
    (found,) = Verdict().due([[4], [3], [2], [1], [0]], lengths, lengths, most=1000, apart=apart)
    assert (found.batch, found.company) == (batch, company)
    assert (found.settles is None) == (not company)
    assert found.row == batch[-1]


def test_rows_that_mix_are_found_where_each_has_a_micro_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's choice, which may be another in the next call; not where the caller wants them alone."""
    monkeypatch.setattr(microbatches, "TOKENS", 8)
    model: Any = toy(nn.Linear(D, D))
    hooked(model)
    with pytest.raises(SelfCheckFailed, match="layer mixes"):
        sequence_grad_norms(model, *batch(4, 9), method="batched")
    alone = sequence_grad_norms(model, *batch(4, 9), method="batched", micro_batch=1)
    torch.testing.assert_close(alone, sequence_grad_norms(model, *batch(4, 9), method="loop"), rtol=1e-5, atol=0)


def test_a_hook_on_a_parameter_is_refused() -> None:
    """The loop's gradient is what the hook makes of it; a batched pass forms none."""
    model: Any = toy(nn.Linear(D, D))
    model.layer.weight.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(UnsupportedModule, match=r"layer\.weight has a hook"):
        sequence_grad_norms(model, *batch(4, 9), method="batched")


# Rotary embeddings that look at the longest row ------------------------------------------------------------

SIZES = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def test_rows_on_either_side_of_the_original_context_are_not_mixed() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4,
            "original_max_position_embeddings": 10}  # fmt: skip
    config = Phi3Config(**SIZES, max_position_embeddings=64, rope_parameters=rope, original_max_position_embeddings=10)
    model = Phi3ForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    assert_exact(model, batch(6, 9), batch(6, 12), limit=1e-6, micro_batch=6)
    assert micro_batches([9, 10, 11, 12], 4, 1000, 0, [10]) == [[0, 1], [2, 3]]


def test_rows_beyond_a_dynamic_context_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=10, rope_parameters=rope)).double().eval()
    assert_exact(model, batch(4, 9), limit=1e-6)
    with pytest.raises(UnsupportedModule, match=r"rotary_emb.*a row of 12 tokens, more than 10"):
        sequence_grad_norms(model, *batch(4, 12), method="batched")


# What was refused or broke without need ------------------------------------------------------------


class Unpads(Toy):
    """Strips padding inside, as ModernBERT does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden, real = self.embedding(input_ids).cumsum(1) / 3, attention_mask.bool()
        logits = torch.zeros(*input_ids.shape, V, dtype=hidden.dtype)
        logits[real] = self.head(torch.tanh(self.layer(hidden[real])))
        return output(logits)


class FlatIds(Toy):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids.view(-1)).view(*input_ids.shape, -1).cumsum(1) / 3
        return output(self.head(torch.tanh(self.layer(hidden))))


@pytest.mark.parametrize("cls", [Unpads, FlatIds])
def test_tokens_without_their_padding_and_flat_ids(cls: type[Toy]) -> None:
    assert_exact(cls(nn.Linear(D, D)).double(), batch(4, 9, equal=True), batch(4, 9), batch(6, 6))


def test_an_embedding_with_sparse_gradients() -> None:
    model: Any = toy(nn.Linear(D, D))
    model.embedding = nn.Embedding(V, D, sparse=True, dtype=torch.float64)
    assert_exact(model, batch(4, 9))


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "p-tuning", "prefix"],
)
def test_virtual_tokens(config: Any) -> None:
    model = peft.get_peft_model(qwen2(torch.float64), config).double().eval()
    assert_exact(model, batch(4, 9), batch(3, 3), limit=1e-6)


def test_virtual_tokens_in_the_fused_update() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = peft.get_peft_model(qwen2(torch.float64), config).double().eval()
    ids, attention, completion = batch(4, 9)
    weights_B = torch.tensor([-1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    (parameter,) = [p for p in model.parameters() if p.requires_grad]
    logps = model(input_ids=ids, attention_mask=attention).logits[:, 3:-1].log_softmax(-1)
    logps_BT = logps.gather(-1, ids[:, 1:, None]).squeeze(-1) * completion[:, 1:]
    (wanted,) = torch.autograd.grad((weights_B[:, None] * logps_BT).sum(), [parameter])
    for mode in ("keep", "retain"):
        parameter.grad = None
        fused = fused_grad_norms(model, ids, attention, completion, mode=mode)
        torch.testing.assert_close(fused.logps_BL[:, 1:], logps_BT.detach(), rtol=1e-6, atol=1e-7)
        (weights_B[:, None] * fused.token_logps()).sum().backward()
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-8)


def test_several_adapters_at_once_and_another_later() -> None:
    model: Any = lora(torch.float64)
    assert_exact(model, batch(4, 9), limit=1e-6)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], use_dora=True))
    model.double().set_adapter("second")
    assert_exact(model, batch(4, 9), limit=1e-6)
    model.base_model.set_adapter(["default", "second"])
    assert_exact(model, batch(4, 9), limit=1e-6)
    assert_exact(model, batch(4, 9), limit=1e-6, parameters="base")


def test_a_multimodal_model_given_text_only() -> None:
    """Its embedding runs outside the decoder, which the output head's own run repeats."""
    vision = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                  num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16)  # fmt: skip
    text = {"model_type": "llama", **SIZES}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=V - 1, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).double().eval()
    assert_exact(model, batch(4, 9), limit=1e-6)
    model.lm_head.weight = model.get_input_embeddings().weight
    assert_exact(model, batch(4, 9), limit=1e-6)


# Refusals that name what is wrong ------------------------------------------------------------


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight[0] = 0
        return F.linear(x, weight)


class Checkpointed(nn.Module):
    """A checkpoint around a function, whose repetition is seen from the linear map on only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("table", torch.randn(64, D))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._inside, x, use_reentrant=False)  # type: ignore[no-any-return]

    def _inside(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) + self.linear(self.table[: x.shape[1]])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Written(), r"layer uses layer\.weight in setitem.*in place"),
        (Checkpointed(), r"layer\.linear ran otherwise when gradient checkpointing repeated it"),
        (nn.GRU(D, D), r"layer uses layer\.weight_ih_l0 in gru"),
    ],
    ids=["written", "checkpointed", "gru"],
)
def test_refusals_name_the_layer(layer: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModule, match=message):
        sequence_grad_norms(toy(layer), *batch(4, 9), method="batched")


def test_an_encoder_decoder_is_refused_by_every_method() -> None:
    config = BartConfig(vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
    for method in ("loop", "batched", "sketch", "auto"):
        with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
            sequence_grad_norms(BartForConditionalGeneration(config), *batch(4, 9), method=method)


def test_logits_of_too_few_positions_are_refused() -> None:
    class Last(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            return output(self.head(self.layer(self.embedding(input_ids)))[:, -1:])

    with pytest.raises(ValueError, match="returned 1 positions for 9 tokens"):
        sequence_grad_norms(Last(nn.Linear(D, D)).double(), *batch(4, 9), method="loop")
