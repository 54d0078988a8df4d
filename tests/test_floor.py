"""The arithmetic of vigor.flops and benchmarks/floor.py against counted operations and published sizes."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Qwen2Config, Qwen2ForCausalLM

from vigor import flops
from vigor.gradnorm import fused_grad_norms, sequence_grad_norms
from vigor.gradnorm.kept import keeps_gradient
from vigor.gradnorm.squares import GramCache, cross_product, linear_square, rows_square

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "pad_token_id": 0,
}


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("floor")


def shape_of(tied: bool) -> Any:
    return flops.Shape(64, 2, 160, 4, 2, 16, 600, tied, 4)


class Counter(TorchDispatchMode):
    """torch.utils.flop_counter without its tracking of modules, whose hooks torch.autograd.grad refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def counted(run: Any) -> int:
    with Counter() as counter:
        run()
    return counter.total


@pytest.mark.parametrize("tied", [True, False])
def test_forward_and_backward_are_those_of_qwen2(tied: bool) -> None:
    T, rows = 48, 3
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=tied, attn_implementation="eager"))
    ids = torch.randint(3, 600, (rows, T))
    outputs = []
    forward = counted(lambda: outputs.append(model(ids, use_cache=False).logits))
    backward = counted(lambda: outputs[0].sum().backward())
    # Eager attention forms all scores, not the causal half, and keeps them: 2 products forward, 4 backward.
    shape = shape_of(tied)
    attention = flops.attention(shape, T, causal=False)
    assert forward == rows * (flops.products(shape, T) + attention)
    assert backward == rows * (2 * flops.products(shape, T) + 2 * attention)
    c = flops.cost(shape, T)
    assert c.forward == flops.products(shape, T) + attention / 2
    assert c.backward == 2 * flops.products(shape, T) + 2.5 * attention / 2


@pytest.mark.parametrize(
    ("T", "p", "q", "gram"),
    [(32, 40, 600, True), (300, 700, 900, True), (1030, 2000, 3000, True), (300, 64, 64, False), (7, 8, 8, False)],
)
def test_norms_of_a_matrix_are_those_of_the_library(T: int, p: int, q: int, gram: bool) -> None:
    rows, cache = 2, GramCache()
    a, g = torch.randn(rows, T, p), torch.randn(rows, T, q)
    assert flops.takes_gram(T, p, q) is gram
    first, again = (counted(lambda: linear_square(a, g, cache)) for _ in range(2))
    if gram:
        assert first == rows * (flops.gram(T, p) + flops.gram(T, q))
        assert again == rows * flops.gram(T, q)  # A Aᵀ is there already
    else:
        assert first == again == rows * flops.direct(T, p, q)


def test_norms_of_an_embedding_are_those_of_the_library() -> None:
    T, h = 30, 64
    ids, d, a, g = torch.randint(0, 9, (2, T)), torch.randn(2, T, h), torch.randn(2, T, h), torch.randn(2, T, T)
    untied = counted(lambda: rows_square(ids, d))
    tied = untied + counted(lambda: cross_product(g, a, d))
    assert untied == 2 * flops.embedding_norms(shape_of(False), T)
    assert tied == 2 * flops.embedding_norms(shape_of(True), T)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("T", [24, 300])
def test_whole_passes_are_those_of_the_library(tied: bool, T: int) -> None:
    shape, rows, C = shape_of(tied), 2, T - 1  # the first token has nothing before it that predicts it
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=tied, attn_implementation="eager"))
    ids = torch.randint(3, 600, (rows, T))
    attended = torch.ones_like(ids)
    completion = attended.clone()
    completion[:, 0] = 0
    batch = (model, ids, attended, completion)

    def fused(mode: Any) -> None:
        logps = fused_grad_norms(*batch, mode=mode, self_check=False).token_logps()
        (logps.sum(1) * torch.arange(1.0, rows + 1)).sum().backward()

    # Floors have the head on all T positions; the library has it on the C counted ones, and, while the decoder runs, on
    # one. Eager attention takes 2 products forward and 4 backward.
    body, head = flops.products(shape, T) - flops.direct(T, 64, 600), flops.direct(C, 64, 600)
    attention = flops.attention(shape, T, causal=False)
    norms_pass = 2 * body + 3 * attention + 2 * head + flops.direct(1, 64, 600)
    embedding = 2 * T * T * 64 + (2 * C * T * 64 if tied else 0)
    exact, kept = (
        flops.linear_norms(shape, T, fused=keep) - head_norm(T, keep) + head_norm(C, keep) for keep in (False, True)
    )
    tokens = {m: C if m.name == "lm_head" else T for m in flops.matrices(shape)}
    sketch = sum(2 * t * 32 * (m.p + m.q) * m.count for m, t in tokens.items())
    sketch += 2 * T * 32 * 64 if tied else embedding
    second = 2 * (5 * 64 + 2 * (64 + 32 + 32))  # norm scales and biases
    for m, t in tokens.items():
        second += (2 * m.p * m.q if flops.keeps_gradient(shape, t, m) else flops.direct(t, m.p, m.q)) * m.count

    found = counted(lambda: sequence_grad_norms(*batch, method="batched", self_check=False))
    assert found == rows * (norms_pass + exact + embedding)
    found = counted(lambda: sequence_grad_norms(*batch, method="sketch", self_check=False))
    assert found == rows * (norms_pass + sketch)
    assert counted(lambda: fused("keep")) == rows * (norms_pass + kept + embedding + second)
    assert counted(lambda: fused("retain")) == rows * (
        norms_pass + exact + embedding + 2 * body + 2 * attention + 3 * head
    )


def head_norm(T: int, keep: bool) -> float:
    if flops.takes_gram(T, 64, 600) and not (keep and keeps_gradient(T, 64, 600, 4)):
        return flops.gram(T, 64) + flops.gram(T, 600)
    return flops.direct(T, 64, 600)


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_kept_is_the_librarys_choice(size: int) -> None:
    shape = dataclasses.replace(shape_of(True), activation_bytes=size)
    choices = [(T, p, q) for T in (8, 300, 3000) for p in (16, 3584) for q in (16, 900, 152064)]
    ours = [flops.keeps_gradient(shape, T, flops.Matrix("m", p, q, 1, "m")) for T, p, q in choices]
    assert ours == [keeps_gradient(T, p, q, size) for T, p, q in choices] and len(set(ours)) == 2


def test_shared_inputs_are_counted_once() -> None:
    shape, T = shape_of(True), 8
    assert all(flops.takes_gram(T, m.p, m.q) for m in flops.matrices(shape))
    inputs = 2 * (flops.gram(T, 64) * 3 + flops.gram(T, 160)) + flops.gram(T, 64)  # q k v; o; gate up; down; head
    outputs = 2 * (flops.gram(T, 64) * 3 + flops.gram(T, 32) * 2 + flops.gram(T, 160) * 2) + flops.gram(T, 600)
    assert flops.linear_norms(shape, T) == inputs + outputs


def test_what_is_kept_is_the_smaller() -> None:
    shape = shape_of(True)
    short, long = 2, 4096
    layer = 2 * (64 + 64 + 64 + 160 + 64 + 32 + 32 + 64 + 160 + 160 + 64)  # inputs, then output gradients
    assert flops.kept_bytes(shape, short) == 4 * short * (layer + 64 + 600)
    assert flops.kept_bytes(shape, long) == 4 * sum(m.p * m.q * m.count for m in flops.matrices(shape))
    # All gradients at hand: norms are free, and the weighted sum is all that is left of the weight gradients.
    c = flops.cost(shape, long)
    weighted = 2 * sum(m.p * m.q * m.count for m in flops.matrices(shape))
    assert c.keep == c.plain + flops.embedding_norms(shape, long) + weighted


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen2.5-3B", 3_085_938_688),
        ("Qwen2.5-7B", 7_615_616_512),
    ],
)
def test_built_in_shapes_have_the_published_sizes(name: str, published: int) -> None:
    s = flops.MODELS[name]
    biases = s.layers * (s.heads + 2 * s.kv_heads) * s.head_dim
    norms = (2 * s.layers + 1) * s.hidden
    assert flops.parameters(s) + biases + norms == published


@pytest.mark.parametrize("T", [64, 512, 1024, 3072, 8192])
def test_the_costs_are_in_order(T: int) -> None:
    for shape in flops.MODELS.values():
        c = flops.cost(shape, T)
        assert c.forward < c.sketch < c.plain
        assert c.cheapest <= c.norms <= c.direct < 1.01 * c.plain
        assert c.plain < c.keep < c.retain < c.two_passes


def test_a_config_folder_is_read(floor: Any, tmp_path: Path) -> None:
    Qwen2Config(**SMALL, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert floor.read_shape(str(tmp_path)) == dataclasses.replace(shape_of(True), activation_bytes=2)
    out = tmp_path / "floor.md"
    floor.main(["--config", str(tmp_path), "--lengths", "100", "--out", str(out)])
    assert f"| {tmp_path} | 100 |" in out.read_text("utf-8")


def test_measured_ratios_stand_beside_the_floors(floor: Any, tmp_path: Path) -> None:
    measured = tmp_path / "gradnorm.json"
    shapes = {"512x8000x8x128": {"train": {"ratio": 1.0}, "batched": {"ratio": 0.8537}}}
    settings = {"density": 1.0, "layers": 8, "lora": 0, "checkpointing": False, "shapes": shapes}
    measured.write_text(json.dumps(settings))
    floor.main(["--measured", str(measured), "--out", str(tmp_path / "floor.md")])
    rows = [line for line in (tmp_path / "floor.md").read_text("utf-8").splitlines() if line.startswith("| 512 × 8000")]
    assert rows[0].endswith("| 0.85 |") and rows[1].endswith("| – |")
    for change, message in (({"density": 0.34}, r"density 0\.34"), ({"lora": 16}, "LoRA rank 16")):
        measured.write_text(json.dumps({**settings, **change}))
        with pytest.raises(SystemExit, match=message):
            floor.main(["--measured", str(measured)])
