"""The flags of `vigor train` that are neither TRL's nor the model's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainArguments:
    """Prompts, rewards and the course of a run."""

    prompts: str | None = field(
        default=None,
        metadata={"help": "Prompts to train on: a jsonl, json, csv or parquet file, a hub data set, or lab:math."},
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the prompt (default: prompt, problem, question or messages)."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column with the reference answer (default: answer, where there is one)."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message put before every prompt."})
    prompt_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use only the first this many prompts."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; a longer one is a bad row, never cut."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out rows that cannot be used, and count them, instead of stopping."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["vigor"],
        metadata={
            "help": "Rewards: names from `vigor methods`, with options as in 'vigor(ties=index)', or dotted paths of "
            "TRL reward functions such as my_pkg.rewards.brevity. Weights: --reward_weights."
        },
    )
    watch_accuracy: bool = field(
        default=True,
        metadata={"help": "Where the prompts come with answers, log accuracy at weight 0: it changes nothing."},
    )
    resume: bool = field(default=False, metadata={"help": "Continue the run in --output_dir from its last checkpoint."})
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the plan, touch nothing."})
    lab_eval_prompts: int = field(
        default=300, metadata={"help": "Test prompts a lab task is scored on before and after; 0 leaves it out."}
    )
    lab_eval_samples: int = field(default=4, metadata={"help": "Samples per test prompt of a lab task."})
