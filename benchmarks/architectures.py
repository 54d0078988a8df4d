"""Which architectures of transformers the batched gradient norms are exact for: docs/architectures.md is its output.

    python benchmarks/architectures.py --out docs/architectures.md        # about 15 minutes on one core
    python benchmarks/architectures.py gpt_oss qwen3_next dora --each     # some of them, module by module

For every causal language model of the installed transformers, and every adapter of PEFT named below, a tiny model (two
layers, random weights far from their initialisation, float32) scores one batch with both methods: six rows, padded on
both sides, the pad token as a real one. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

LIMIT_S = 600
EXACT = 1e-4
"""Relative; what is exact in float64 differs by up to 1e-5 in float32."""
VOCABULARY = 41

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("n_layer", "n_layers", "num_hidden_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "moe_ffn_hidden_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 96),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window", "window_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "type_vocab_size", "mamba_expand"), 2),
    "shared_intermediate_size": 24, "rotary_dim": 4, "mamba_d_conv": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 3,
    "is_decoder": True, "use_cache": False,
}  # fmt: skip
"""Given to every configuration that knows the name."""

LATENT = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu"
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
CHANGES: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4} for kind in f"{LATENT} dots3_note dots3_note_text".split()},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 6, "layer_types": ["mamba", "hybrid", "mamba"] * 2},
    "zamba2": {"num_hidden_layers": 6, "layer_types": ["mamba", "mamba", "hybrid"] * 2, "hybrid_layer_ids": [2, 5],
               "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "num_mem_blocks": 1, "chunk_size": 8,
               "adapter_rank": 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"],
                            "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
                    "num_kv_shared_layers": 0, "num_global_key_value_heads": 2},
    "gemma3n_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
                     "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
                     "layer_types": ["sliding_attention", "full_attention"]},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8, "enable_pronunciation": False, "enable_shape": False},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
"""What single configurations need besides, or instead."""

VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "out_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "vision_output_dim", "image_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "depth", "mlp_ratio"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
    "patch_size": 16, "num_channels": 3,
}  # fmt: skip
"""Given to the other parts of a multimodal model, which take no part in the norm of a text."""
MULTIMODAL = ("idefics3", "internvl", "llava", "llava_next", "mistral3", "paligemma", "qwen3_vl", "qwen3_vl_moe",
              "smolvlm")  # fmt: skip
"""Image-text models that are run besides, on text only; others are among the causal language models."""
TEXTS = ("text", "decoder", "llm", "language")
"""What the name of a text part's configuration holds."""

TARGETS = ["q_proj", "v_proj", "down_proj"]
VIRTUAL = {"task_type": "CAUSAL_LM"}
"""Virtual tokens have no target modules."""
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "lora, biases": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "lora, embedding too": ("LoraConfig", {"r": 4, "target_modules": [*TARGETS, "embed_tokens"]}),
    "lora, head and embedding saved": ("LoraConfig", {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "lora, some tokens": ("LoraConfig", {"r": 4, "trainable_token_indices": [5, 6, 7]}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "dora, embedding too": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": [*TARGETS, "embed_tokens"]}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "loha": ("LoHaConfig", {"r": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "oft": ("OFTConfig", {"r": 4, "oft_block_size": 0, "target_modules": ["q_proj"]}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 10}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["q_proj"]}),
    "miss": ("MissConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 8, "target_modules": ["q_proj"]}),
    "randlora": ("RandLoraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "road": ("RoadConfig", {"group_size": 4, "target_modules": ["q_proj"]}),
    "delora": ("DeloraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "gralora": ("GraloraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "shira": ("ShiraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "osf": ("OSFConfig", {"target_modules": ["q_proj"]}),
    "prompt tuning": ("PromptTuningConfig", {**VIRTUAL, "num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {**VIRTUAL, "num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "prefix tuning": ("PrefixTuningConfig", {**VIRTUAL, "num_virtual_tokens": 3}),
    "layer norms": ("LNTuningConfig", {"target_modules": None}),
}


def configuration(kind: str, *, whole: bool = False) -> Any:
    """The tiny configuration of a model type, of its text part where it has several, unless `whole` is asked for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    default = cls()
    if "text_config" in default.to_dict() and not whole:
        default = default.get_text_config()
    return _tiny(default, kind, SIZES)


def _tiny(default: Any, kind: str, given: dict[str, Any]) -> Any:
    cls, values = type(default), default.to_dict()
    names = set(values) | set(cls.attribute_map)
    parts = {name: part for name in cls.sub_configs if (part := getattr(default, name, None)) is not None}
    sizes = {k: v for k, v in given.items() if k in names and not isinstance(values.get(k), list | dict)}
    if "sliding_window" in sizes and values.get("sliding_window", 1) is None:
        del sizes["sliding_window"]
    tokens = {name: VOCABULARY - 1 for name in names if name.endswith(("_token_id", "_token_index")) and parts}
    inner = {
        name: _tiny(part, part.model_type, SIZES if any(t in name for t in TEXTS) else VISION).to_dict()
        for name, part in parts.items()
    }
    return cls(**{**tokens, **sizes, **CHANGES.get(kind, {}), **inner})


def build(kind: str) -> Any:
    """A tiny model, or Qwen2 with an adapter, its weights moved so that no gradient vanishes by initialisation."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    torch.manual_seed(0)
    if kind in ADAPTERS:
        import peft

        name, options = ADAPTERS[kind]
        targets = {} if "task_type" in options else {"target_modules": TARGETS}
        base = transformers.Qwen2ForCausalLM(configuration("qwen2"))
        model = peft.get_peft_model(base, getattr(peft, name)(**{**targets, **options}))
    else:
        multimodal = kind in MULTIMODAL
        names = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if multimodal else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[kind]
        cls = getattr(transformers, names if isinstance(names, str) else names[0])
        config = configuration(kind, whole=cls.config_class is CONFIG_MAPPING[kind])
        with torch.device("meta"):
            numbers = sum(p.numel() for p in cls(config).parameters())
        if numbers > 8_000_000:
            raise ValueError(f"{numbers} parameters even with the smallest sizes known here")
        model = cls(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.nan_to_num(p, nan=0.0, posinf=0.0, neginf=0.0).clamp(-3, 3))
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def rows() -> tuple[Any, Any, Any]:
    """input_ids, attention_mask and completion_mask (6, 22)."""
    import torch

    ids = torch.randint(3, 15, (6, 22), generator=torch.Generator().manual_seed(1))
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    for b in range(6):
        left, right = b % 4, 22 - 2 * (b % 5)
        attention[b, :left] = attention[b, right:] = 0
        completion[b, left + 5 : right] = 1
    ids[attention == 0] = 0
    ids[2, 9] = 0
    return ids, attention, completion


def score(kind: str, each: bool) -> dict[str, Any]:
    """What became of one architecture."""
    import torch
    from transformers.utils import logging

    from vigor.gradnorm import SelfCheckFailed, UnsupportedModule, sequence_grad_norms
    from vigor.gradnorm.values import View
    from vigor.gradnorm.watch import Watch

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"kind": kind}
    try:
        model = build(kind)
        found["class"] = type(model.base_model.model if kind in ADAPTERS else model).__name__
        loop = sequence_grad_norms(model, *rows(), method="loop")
    except Exception as error:
        return {**found, "verdict": "not run", "why": _line(error)}
    copied: dict[str, None] = {}
    copies = Watch._copies

    def noting(self: Watch, value: Any) -> Any:
        if isinstance(value, View):
            copied.setdefault(self.capture.names[id(value.parameter)].split(".layers.")[-1].partition(".")[2])
        return copies(self, value)

    Watch._copies = noting  # type: ignore[method-assign]
    try:
        batched = sequence_grad_norms(model, *rows(), method="batched", micro_batch=6)
        found["error"] = ((batched - loop) / loop).abs().max().item()
        if each and kind not in ADAPTERS:
            found["error"] = max(found["error"], _each(model, loop))
    except (UnsupportedModule, SelfCheckFailed) as error:
        why = "self-check: its own logits change with padding" if _padding_changes(model) else _line(error)
        return {**found, "verdict": "refused", "why": why}
    except Exception as error:
        return {**found, "verdict": "fails", "why": _line(error)}
    return {**found, "verdict": "exact" if found["error"] < EXACT else "wrong", "copies": list(copied)}


def _each(model: Any, total_B: Any) -> float:
    """The largest error of any module's part of the norm, relative to it or to a thousandth of the whole."""
    import torch

    from vigor.gradnorm import sequence_grad_norms

    worst = 0.0
    for module in sorted({name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}):
        batched, loop = (
            sequence_grad_norms(
                model,
                *rows(),
                method=method,
                micro_batch=6,
                self_check=False,
                parameters=partial(_owned_by, module),
            )
            for method in ("batched", "loop")
        )
        worst = max(worst, ((batched - loop).abs() / torch.maximum(loop, 1e-3 * total_B)).max().item())
    return worst


def _owned_by(module: str, name: str) -> bool:
    return name.rpartition(".")[0] == module


def _padding_changes(model: Any) -> bool:
    import torch

    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 6))
        padded = model(input_ids=torch.nn.functional.pad(ids, (0, 6)), attention_mask=mask, use_cache=False).logits
    return not torch.allclose(alone, padded[:, :12], rtol=1e-3, atol=1e-3)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix("batched gradient norm: ").partition(" Use method=")[0]
    return text if type(error).__module__.startswith("vigor") else f"{type(error).__name__}: {text[:160]}"


def apart(function: Callable[..., dict[str, Any]], kind: str, each: bool) -> dict[str, Any]:
    """The result of the function in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        warnings.simplefilter("ignore")
        signal.alarm(LIMIT_S)
        theirs.send(function(kind, each))

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()  # type: ignore[no-any-return]
    except EOFError:
        return {"kind": kind, "verdict": "not run", "why": f"no result within {LIMIT_S} s"}
    finally:
        process.join()


def page(results: list[dict[str, Any]], command: str, each: bool) -> str:
    """The results as Markdown."""
    import peft
    import torch
    import transformers

    counts = {v: sum(r["verdict"] == v for r in results) for v in ("exact", "refused", "fails", "wrong", "not run")}
    lines = [
        "# Architectures",
        "",
        f"Output of `{command}` on {date.today()}: transformers {transformers.__version__}, peft {peft.__version__}, "
        f"torch {torch.__version__}, {platform.machine()} CPU, one thread, float32, seed 0.",
        "",
        "Tiny random models of every causal language model type of transformers, image-text models given text only, "
        "and Qwen2 with adapters of PEFT, score one batch of six rows (padded on both sides) with "
        "the batched method and with the loop. *error* is the largest relative difference of a row's norm"
        + (", or of the part of it that belongs to any one module" if each else "")
        + '. A refusal names the module; `method="auto"` then takes the loop. *copies* names the matrices that are '
        "used in more than linear maps and embeddings: they are held once a sequence, and refused where that exceeds "
        "2^24 numbers, which a large model may reach.",
        "",
        ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n) + ".",
        "",
    ]
    for title, some in (
        ("Models", [r for r in results if r["kind"] not in ADAPTERS and r["verdict"] != "not run"]),
        ("Adapters", [r for r in results if r["kind"] in ADAPTERS and r["verdict"] != "not run"]),
    ):
        lines += [f"## {title}", "", "| type | class | batched | error | copies, or why not |", "|---|---|---|---|---|"]
        for r in some:
            note = ", ".join(f"`{name}`" for name in r["copies"]) if r.get("copies") else r.get("why", "")
            error = f"{r['error']:.0e}" if "error" in r else ""
            lines.append(f"| `{r['kind']}` | {r['class']} | {r['verdict']} | {error} | {note.replace('|', '/')} |")
        lines.append("")
    rest = [r for r in results if r["verdict"] == "not run"]
    if rest:
        lines += [
            "## Not run",
            "",
            "The model could not be built this small, or its own loss not be differentiated.",
            "",
        ]
        lines += [f"* `{r['kind']}`: {r['why']}" for r in rest] + [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types of transformers, or adapters; all by default")
    parser.add_argument("--each", action="store_true", help="compare the norms over single modules too")
    parser.add_argument("--out", type=Path, help="write the page here")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    results = []
    for kind in options.kinds or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL, *ADAPTERS]:
        results.append(apart(score, kind, options.each))
        print(json.dumps(results[-1]), flush=True)
    if options.out:
        options.out.write_text(page(results, f"python {' '.join(sys.argv)}", options.each))


if __name__ == "__main__":
    main()
