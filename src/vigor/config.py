"""VigorConfig: GRPOConfig with one coherent sampling distribution, and refusals before a model is loaded."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import ClassVar, get_args

import torch
from trl import GRPOConfig

from vigor.launch import asked_sizes, check_deepspeed, check_sizes
from vigor.rewards.compose import Schedule

FUSED = ("auto", "keep", "retain", "off")
TRUNCATED = ("score", "worst", "mask")


@dataclass
class VigorConfig(GRPOConfig):
    """Everything that TRL's `GRPOConfig` has, and what label-free rewards add.

    Defaults that differ from TRL's: completions are always written to disk and never printed, every step is logged,
    no tracker unless asked for, bf16 only where a GPU is. Sampling, loss and reward speak of one distribution:
    temperature 1, no top-k, top-p, min-p or repetition penalty.

    Raises:
        ValueError: settings that cannot work, with the numbers that show why.
    """

    planned_processes: ClassVar[int | None] = None
    """Set where a run of so many processes is checked before any of them is started."""

    truncated: str = field(
        default="score",
        metadata={
            "help": "What a completion that hit the token budget is worth. 'score': as its reward says, like any other "
            "(the published runs; a cut-off text has a likelihood too, and no rule of ours decides for the signal). "
            "'worst': below every complete one of its group. 'mask': no reward and no loss.",
            "choices": list(TRUNCATED),
        },
    )
    reward_weights_final: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of the rewards at the end of the run, one for each of reward_weights: in between they "
            "move along reward_weights_schedule. Default: the weights stay."
        },
    )
    reward_weights_schedule: str = field(
        default="linear",
        metadata={
            "help": "How the weights move from reward_weights to reward_weights_final over the optimizer steps: "
            "'linear', or 'cosine' (slowly at both ends).",
            "choices": list(get_args(Schedule)),
        },
    )
    fused: str = field(
        default="auto",
        metadata={
            "help": "Take the update from the pass that scored the completions, where that gives the same gradient. "
            "'keep': one forward and one backward in all; every token of a completion must have one weight in the loss "
            "(beta=0, first update after sampling). 'retain': one forward, two backwards, any loss. 'off': a forward "
            "and a backward for each. 'auto': the first of these that fits the loss and half of the free memory, "
            "printed with its reason.",
            "choices": list(FUSED),
        },
    )
    max_skipped_updates: int = field(
        default=0,
        metadata={
            "help": "Updates of a run that may be left out because the loss, the gradient norm or a reward is NaN or "
            "infinite in any process; the next one stops the run. 0: the first stops it. The weights stay untouched, "
            "and the batch is written to dumps/ (`vigor replay`)."
        },
    )
    max_sampler_mismatch: float = field(
        default=0.1,
        metadata={
            "help": "With use_vllm: the largest mean |difference|, in nats a token, between the log-probabilities that "
            "vLLM reports of the tokens it sampled and the policy's own, compared after every push of weights; more "
            "stops the run with the numbers. inf: no check."
        },
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - the argument parser takes None in first place only
        default="none", metadata={"help": "Trackers to mirror the metrics to: none, wandb, trackio, tensorboard …"}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every this many optimizer steps."})
    log_completions: bool = field(
        default=True, metadata={"help": "Write prompts, completions, rewards and advantages to completions/*.parquet."}
    )
    num_completions_to_print: int | None = field(
        default=0, metadata={"help": "Completions to print at each log; they are on disk anyway."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and (torch.cuda.is_available() or torch.xpu.is_available())
        self._check_truncated()
        self._check_weights()
        self._check_batch()
        self._check_sampler()
        super().__post_init__()
        self._check_mappings()
        self._check_parallelism()
        self._check_distribution()

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.planned_processes or int(super().world_size)

    def _check_truncated(self) -> None:
        if self.truncated not in TRUNCATED:
            raise ValueError(f"truncated={self.truncated!r}: choose one of {', '.join(TRUNCATED)}.")
        if self.mask_truncated_completions and self.truncated == "worst":
            raise ValueError(
                "truncated='worst' ranks truncated completions last, but mask_truncated_completions=True takes them "
                "out of the loss. Set mask_truncated_completions=False, or truncated='mask'."
            )
        if self.mask_truncated_completions:
            self.truncated = "mask"
        self.mask_truncated_completions = self.truncated == "mask"

    def _check_weights(self) -> None:
        if self.reward_weights_schedule not in get_args(Schedule):
            raise ValueError(
                f"reward_weights_schedule={self.reward_weights_schedule!r}: choose one of "
                f"{', '.join(get_args(Schedule))}."
            )
        final = self.reward_weights_final
        if final is not None and (self.reward_weights is None or len(final) != len(self.reward_weights)):
            given = "no reward_weights" if self.reward_weights is None else f"{len(self.reward_weights)} reward_weights"
            raise ValueError(
                f"reward_weights_final has {len(final)} numbers for {given}: give both, one number a reward each."
            )

    def _check_batch(self) -> None:
        if self.num_generations is None or self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: rewards compare the completions of one prompt, which takes "
                "at least 2. The paper uses 8."
            )
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length={self.max_completion_length}: give the tokens that a completion may have, at "
                "least 1."
            )
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
                  "generation_batch_size", "num_iterations")  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1.")
        processes = self.planned_processes or int(os.environ.get("WORLD_SIZE", "1"))
        device_batch = processes * self.per_device_train_batch_size
        if self.generation_batch_size is not None:
            batch, made_of = self.generation_batch_size, "generation_batch_size"
        else:
            rounds = self.steps_per_generation or self.gradient_accumulation_steps
            batch = device_batch * rounds
            made_of = f"{processes} processes × {self.per_device_train_batch_size} rows × {rounds} rounds"
        if batch % self.num_generations:
            whole = -(-batch // self.num_generations) * self.num_generations
            raise ValueError(
                f"{batch} completions ({made_of}) are not whole groups of num_generations={self.num_generations}: "
                f"{batch} / {self.num_generations} = {batch / self.num_generations:.2f} prompts. Change "
                "per_device_train_batch_size, gradient_accumulation_steps or the number of processes so that their "
                f"product is, for example, {whole} = {whole // self.num_generations} prompts."
            )

    def _check_mappings(self) -> None:
        names = ("chat_template_kwargs", "generation_kwargs", "model_init_kwargs", "gradient_checkpointing_kwargs")
        for name in names:  # the engine reads a text as JSON where it begins with a brace, and keeps any other
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a mapping in YAML, or a JSON object as a flag.")

    def _check_parallelism(self) -> None:
        switched = {name: os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
                    for name in ("FSDP", "MEGATRON_LM")}  # fmt: skip
        check_sizes(
            asked_sizes(self.parallelism_config), self.world_size, shards=switched["FSDP"],
            megatron=switched["MEGATRON_LM"], where="accelerate's parallelism_config",
        )  # fmt: skip
        if self.deepspeed_plugin is not None:
            check_deepspeed(self.deepspeed_plugin.deepspeed_config, "the DeepSpeed configuration")
        init = self.model_init_kwargs or {}
        if split := [n for n in ("tp_plan", "tp_size", "distributed_config", "device_mesh") if init.get(n) is not None]:
            raise ValueError(
                f"model_init_kwargs: {split[0]} splits the model while it is loaded, which leaves each process a part "
                "of its layers, and its checkpoints cannot be resumed. Let accelerate shard it: --accelerate_config "
                "fsdp2."
            )

    def _check_sampler(self) -> None:
        if not self.max_sampler_mismatch > 0:
            raise ValueError(
                f"max_sampler_mismatch={self.max_sampler_mismatch}: vLLM and the trainer round differently, so the "
                "allowed difference must be positive (nats a token; the default is 0.1, inf turns the check off)."
            )

    def _check_distribution(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: must be positive. Greedy sampling gives a group "
                f"{self.num_generations} equal completions, and nothing to compare."
            )
        neutral = {"top_p": (1.0,), "top_k": (0,), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
        off = {name: getattr(self, name) for name, values in neutral.items() if getattr(self, name) not in values}
        if off:
            listed = ", ".join(f"{name}={value}" for name, value in off.items())
            warnings.warn(
                f"Sampling is restricted by {listed}, but loss and reward use the whole distribution: the policy "
                "gradient is biased. Leave them neutral unless you reproduce published settings.",
                stacklevel=3,
            )
