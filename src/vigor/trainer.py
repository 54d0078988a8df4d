"""VigorTrainer: TRL's GRPOTrainer with rewards that see the policy.

The algorithm is TRL's; what we override, and what each override relies on:
    _tokenize_prompts                 returns (prompt_ids, images, multimodal_fields)
    _generate                         returns prompt_ids and completion_ids first; called once per generation batch
    _calculate_rewards                outside no_grad, before advantages; returns the gathered (B, n_funcs) rewards
    _generate_and_score_completions   returns this process's "advantages"; appends those of all to _logs["advantages"]
                                      with vLLM also "sampling_per_token_logps", and "old_per_token_logps" if corrected
    _compute_loss                     asks for the log-probabilities of its inputs through the next, once
    _get_per_token_logps_and_entropies    (model, input_ids, attention_mask, logits_to_keep, …) -> 3 values, as there
    _get_output_dir                   the folder that checkpoints are written to and rotated in
    _save_checkpoint                  (model, trial) writes checkpoint-N there, in every process; rotation at its end
    _push_from_checkpoint             with that folder, at the end of the former
    _get_grad_norm                    (model, grad_norm), once, between the backward passes and the optimizer's step
    train                             with the checkpoint to resume from first; calls _load_optimizer_and_scheduler
    _generate_single_turn             (prompt_ids, images, fields, num_generations) -> (ids, logps); also for a teacher
    _get_train_sampler, _get_eval_sampler    RepeatSampler(data_source, mini_repeat_count, batch_size, repeat_count, …)
    _save_optimizer_and_scheduler, _load_optimizer_and_scheduler     with the folder of a checkpoint
    log                               (logs, start_time) clears _metrics[mode], then writes the table if log_completions
    save_model                        (output_dir, _internal_call), True for checkpoints; writes no weights where FSDP's
                                      state dicts are sharded; _save(output_dir, state_dict) does
    _prepare_for_training             (max_steps, train_dataloader, resume_from_checkpoint) shards and loads the model
tests/test_trl_contract.py fails loudly when a new TRL changes one of these.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationMixin, PreTrainedTokenizerBase
from trl import GRPOTrainer

from vigor import auxiliary, rewards, shaping
from vigor.config import VigorConfig
from vigor.data import encode_prompt
from vigor.demands import POLICY, check_columns, check_names, check_policy, check_whole
from vigor.disk import STDOUT, naming
from vigor.fusion import FUSED_ROW, Fusion
from vigor.groupmetrics import top_quarter_accuracy, within_group_auc
from vigor.guard import Guard
from vigor.outside import watched
from vigor.resume import Checkpoints
from vigor.rewards.base import TEACHER, Reward, nonfinite, unshaped
from vigor.rewards.compose import annealed_weights
from vigor.rollouts import BatchTexts, Rollouts, real_tokens, text_of
from vigor.samplercheck import check_continuous_batching, check_sampler
from vigor.signals import PolicyPass
from vigor.statedicts import refuse_code
from vigor.teacher import Teacher, fork_generators, teacher_for
from vigor.terminal import printable
from vigor.tokenlog import TokenLog
from vigor.twins import twin_sampler

AnyReward = str | Reward | Callable[..., Any] | nn.Module
_TITLE = "Verifier-Free RL for LLMs via Intrinsic Gradient-Norm Reward"
_CITATION = f"""\
@article{{wen2026vigor,
    title  = {{{{{_TITLE}}}}},
    author = {{Xuexiang Wen and Hang Yu and Linchao Zhu and Gaoang Wang}},
    year   = 2026,
    eprint = {{arXiv:2605.09920}},
}}"""


class VigorTrainer(GRPOTrainer):
    """Drop-in for `trl.GRPOTrainer` whose `reward_funcs` may also name intrinsic rewards.

    Args:
        model: as in TRL: a model, or a name or folder to load.
        reward_funcs: one or a list of: our rewards by name ("vigor", "vigor(ties=index)"), `Reward` objects, and
            anything that TRL takes (functions, reward models, names of reward models). Mixed by
            `VigorConfig.reward_weights`; a reward of weight 0 is watched and changes nothing.
        args: a `VigorConfig`.
        **kwargs: the other arguments of `GRPOTrainer`.

    Raises:
        ValueError: a reward's data set column is missing, two rewards share a name, or a reward reads the policy and
            that is a vision-language model, or sharded in a way in which it cannot be read (FSDP1).
        TypeError: `args` is not a `VigorConfig`.
    """

    _tag_names = ["trl", "grpo", "vigor"]
    _name = "VIGOR"
    _paper = {
        "title": _TITLE,
        "id": "2605.09920",
        "citation": _CITATION,
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: AnyReward | Sequence[AnyReward] = "vigor",
        args: VigorConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is not None and not isinstance(args, VigorConfig):
            raise TypeError(f"VigorTrainer takes a VigorConfig, got a {type(args).__name__}; it has the same fields.")
        listed: list[Any] = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        self._rewards = {i: reward for i, r in enumerate(listed) if (reward := _ours(r)) is not None}
        bound = [self._bind(self._rewards[i]) if i in self._rewards else self._watch(r) for i, r in enumerate(listed)]
        args = VigorConfig("vigor-run") if args is None else args
        check_columns(self._rewards.values(), kwargs.get("train_dataset"))
        check_whole(model)
        super().__init__(model=model, reward_funcs=bound, args=args, **kwargs)
        check_names(self.reward_func_names)
        check_policy(self, list(self._rewards.values()))
        check_continuous_batching(self)
        if self.is_fsdp_enabled:  # else generation ends in each process on its own, and gathers of others' wait forever
            for module in self.model.modules():
                if isinstance(module, GenerationMixin):
                    module._is_fsdp_managed_module = True
        self.adding = auxiliary.active(self._rewards, self.args.reward_weights, self.args.reward_weights_final)
        auxiliary.check(self, self.adding)
        self._fusion = Fusion(self, list(self._rewards.values()))
        self._teacher = teacher_for(self, list(self._rewards.values()))
        self._guard = Guard(self)
        self._checkpoints = Checkpoints(self)
        self.add_callback(self._checkpoints)
        written = self.args.log_completions and self.accelerator.is_main_process
        self._tokens = TokenLog(self.args.output_dir, self._tokenizer, on=written)
        self.add_callback(self._tokens)
        self.sampler: Any = None
        self._seconds = {"generation": 0.0, "reward": 0.0}

    # Rollouts ---------------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Special tokens inside a prompt's text stay text; tools and images go TRL's way."""
        if self._is_vlm or self.tools or not isinstance(self.processing_class, PreTrainedTokenizerBase):
            return super()._tokenize_prompts(prompts)
        template = {**self.chat_template_kwargs}
        if self.chat_template is not None:
            template["chat_template"] = self.chat_template
        encoded: dict[str, list[int]] = {}  # a batch repeats each prompt G times
        for prompt in prompts:
            if repr(prompt) not in encoded:
                encoded[repr(prompt)] = encode_prompt(self.processing_class, prompt, template)
        return [encoded[repr(prompt)] for prompt in prompts], None, {}

    def _generate(self, prompts: list[Any]) -> Any:
        started = time.perf_counter()
        output = super()._generate(prompts)
        self._prompt_ids: list[list[int]] = output[0]
        self._tool_mask: list[list[int]] | None = output[2]
        self._seconds["generation"] += time.perf_counter() - started
        return output

    # Rewards and advantages -------------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        """Scores of the local rows by every reward, gathered, then each of ours shaped within whole groups."""
        started = time.perf_counter()
        self._guard.new_rollouts()
        self._anneal_weights()
        rollouts = self._rollouts(inputs, prompts, completions, completion_ids_list)
        self._policy = PolicyPass(
            self.accelerator.unwrap_model(self.model),
            rollouts,
            temperature=self.temperature,
            micro_batch=self.args.per_device_train_batch_size,
            tokenizer=self._tokenizer,
            needs=frozenset().union(*(reward.needs for reward in self._rewards.values()), self._fusion.needs),
            fuse=self._fusion.mode_for(rollouts) if self.model.training else None,
            fuse_if_possible=self.args.fused == "auto",
        )
        # The functions that _bind made read self._policy; TRL gathers what they return.
        gathered = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._report_infinite(gathered)
        shaped = self._shape(gathered, rollouts)
        self._terms = self._auxiliary_terms(gathered, rollouts) if self.model.training else None
        self._fusion.take(self._policy, self._prompt_ids)
        del self._policy
        self._seconds["reward"] += time.perf_counter() - started
        return shaped

    def _bind(self, reward: Reward) -> Callable[..., list[float]]:
        """The reward as a TRL reward function: this process's scores."""

        def score(**_: Any) -> list[float]:
            with self.accelerator.autocast():
                scores = reward.score(self._policy.rollouts, self._policy)
            if trouble := nonfinite(reward, scores, self._policy.rollouts):
                if not self.model.training:
                    raise FloatingPointError(f"evaluation at step {self.state.global_step}: {trouble}.")
                self._guard.reward_trouble(trouble)
            return scores.tolist()

        score.__name__ = reward.name
        return score

    def _watch(self, given: Any) -> Any:
        """A function of the user's, its exceptions and results checked; models and their names as they are."""
        if isinstance(given, str | nn.Module):
            return given
        return watched(given, lambda: self.state.global_step + 1)

    def _report_infinite(self, gathered: Tensor) -> None:
        """Tells the guard of weighted rewards that are infinite; NaN is a row without an opinion."""
        counts = (gathered.isinf().sum(0) * (self.reward_weights.to(gathered.device) != 0)).tolist()
        for name, count in zip(self.reward_func_names, counts, strict=True):
            if count and self.model.training and not self._guard.troubled:
                self._guard.reward_trouble(f"reward {name!r} is infinite for {count} of {len(gathered)} completions")

    def _rollouts(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> Rollouts:
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
        if self._teacher is not None:
            columns[TEACHER] = self._sample_teacher(self._teacher)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        truncated = torch.tensor([not ids or ids[-1] not in ends for ids in completion_ids])
        rollouts = Rollouts.from_token_ids(
            self._prompt_ids,
            completion_ids,
            group_size=self._group_size,
            pad_token_id=self._tokenizer.pad_token_id,
            device=self.accelerator.device,
            prompts=prompts,
            completions=completions,
            columns=columns,
            truncated_B=truncated.to(self.accelerator.device),
            micro_step=self._micro_step,
            first_row=self.accelerator.process_index * len(prompts),
            batch_texts=self._gather_texts(completions, columns),
        )
        if self._tool_mask is not None:  # what a tool or an environment wrote is context, not the policy's
            for mask_L, prompt, own in zip(rollouts.completion_mask_BL, self._prompt_ids, self._tool_mask, strict=True):
                mask_L[len(prompt) : len(prompt) + len(own)] = torch.tensor(own, device=mask_L.device)
        if self.args.truncated == "mask":
            rollouts.completion_mask_BL[rollouts.truncated_B] = 0
        if self.model.training:
            self._tokens.expect(rollouts, self._prompt_ids, completion_ids)
        self._log_completion_extra("length", [len(ids) for ids in completion_ids])
        self._log_completion_extra("truncated", truncated.tolist())
        return rollouts

    def _gather_texts(self, completions: list[Any], columns: dict[str, list[Any]]) -> BatchTexts | None:
        """The texts of all processes, and the columns that go with them, where a reward compares completions."""
        comparing = [reward for reward in self._rewards.values() if "group" in reward.needs]
        if not comparing:
            return None
        named = [*(column for reward in comparing for column in reward.columns), TEACHER]
        names = [name for name in dict.fromkeys(named) if name in columns]
        own = zip(map(text_of, completions), *(columns[name] for name in names), strict=True)
        gathered = list(zip(*gather_object(list(own)), strict=True))
        return BatchTexts(gathered[0], dict(zip(names, gathered[1:], strict=True)))

    def _sample_teacher(self, teacher: Teacher) -> list[str]:
        """A completion of the teacher's for each local row, drawn from random numbers of its own."""
        with fork_generators(self.accelerator.device), teacher.ema.swapped(teacher.model):
            seed = (self.args.seed * 1_000_003 + self._micro_step) * 4096 + self.accelerator.process_index
            torch.manual_seed(seed)
            ids, _ = self._generate_single_turn(self._prompt_ids, None, {}, self._group_size)
        texts: list[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        self._log_completion_extra(TEACHER, texts)
        return texts

    def _shape(self, scores: Tensor, rollouts: Rollouts) -> Tensor:
        """(B, n_funcs) gathered scores -> rewards; rows that no weighted reward scores get no reward at all."""
        assert rollouts.truncated_B is not None
        truncated, keys = self.accelerator.gather((rollouts.truncated_B, _row_keys(rollouts)))
        group = (-1, self._group_size)
        weighted = self.reward_weights.to(scores.device) != 0
        shaped = scores.clone()
        if self.args.truncated == "mask":
            shaped[truncated] = torch.nan
        elif self.args.truncated == "worst":
            for i in range(shaped.shape[1]):
                column = shaping.truncated_worst(shaped[:, i].view(group), truncated.view(group))
                shaped[:, i] = column.flatten()
        for i, reward in self._rewards.items():
            if reward.shape is not unshaped:
                local = scores[rollouts.first_row : rollouts.first_row + len(rollouts), i]
                self._log_completion_extra(f"{reward.name}/score", local.tolist())
                self._log_metric(f"scores/{reward.name}", local.nanmean().item())
            column = shaped[:, i].view(group)
            if reward.needs & POLICY:
                column = shaping.share_between_identical(column, keys.view(group))
            shaped[:, i] = reward.shape(column).flatten()
        # TRL counts a row as scored as soon as any reward has an opinion; one of weight 0 must not decide that.
        shaped[shaped[:, weighted].isnan().all(dim=1)] = torch.nan
        self._informative = self._differs(shaped[:, weighted], group).repeat_interleave(self._group_size)
        self._log_alignment(scores, shaped, group)
        return shaped

    def _auxiliary_terms(self, scores: Tensor, rollouts: Rollouts) -> list[list[Any]] | None:
        """For each local row, what its rewards add to the loss; None where no reward does."""
        if not self.adding:
            return None
        terms: list[list[Any]] = [[] for _ in range(len(rollouts))]
        for i, reward in self.adding.items():
            column, weight = scores[:, i].clone(), float(self.reward_weights[i])
            if self.args.truncated == "mask":
                assert rollouts.truncated_B is not None
                column[self.accelerator.gather(rollouts.truncated_B)] = torch.nan
            found = auxiliary.terms_of(reward, weight, column, rollouts, self._policy)
            terms = [before + more for before, more in zip(terms, found, strict=True)]
        return terms

    def _log_alignment(self, scores: Tensor, shaped: Tensor, group: tuple[int, int]) -> None:
        """How well each reward tells right from wrong within groups, where an accuracy reward says what is right."""
        at = next((i for i, reward in self._rewards.items() if reward.name.split("(")[0] == "accuracy"), None)
        if at is None:
            return
        for i, name in enumerate(self.reward_func_names):
            if i != at:
                auc = within_group_auc(shaped[:, i].view(group), scores[:, at].view(group))
                top = top_quarter_accuracy(shaped[:, i].view(group), scores[:, at].view(group))
                for metric, value in (("auc", auc), ("top25", top)):
                    if not math.isnan(value):
                        self._log_metric(f"{metric}/{name}", value)

    def _anneal_weights(self) -> None:
        """Sets the rewards' weights to where their schedule stands; without one they stay as configured."""
        if self.args.reward_weights_final is None:
            return
        weights = annealed_weights(
            self.args.reward_weights,
            self.args.reward_weights_final,
            self.state.global_step / max(self.state.max_steps, 1),
            self.args.reward_weights_schedule,
        )
        self.reward_weights[: len(weights)] = torch.tensor(weights)
        for name, weight in zip(self.reward_func_names, weights, strict=False):
            self._log_metric(f"reward_weights/{name}", weight)

    def _differs(self, rewards: Tensor, group: tuple[int, int]) -> Tensor:
        """(P,) True for the groups in which what TRL will normalise differs: each reward, or their weighted sum."""
        if self.multi_objective_aggregation == "normalize_then_sum":
            return torch.stack([shaping.informative(column.view(group)) for column in rewards.unbind(1)]).any(0)
        weights = self.reward_weights.to(rewards.device)
        total = (rewards * weights[weights != 0]).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = torch.nan
        return shaping.informative(total.view(group))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's advantages, with those of groups whose rewards are all equal set to exactly 0.

        TRL divides the rounding error of their mean by 1e-4.
        """
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        check_sampler(self, output)
        first = self.accelerator.process_index * len(inputs)
        local = self._informative[first : first + len(inputs)]
        output["advantages"] = torch.where(local, output["advantages"], 0.0)
        logged = self._logs["advantages"]
        for i, keep in enumerate(self._informative.tolist(), start=len(logged) - len(self._informative)):
            logged[i] = logged[i] if keep else 0.0
        if self._terms is not None:
            output[auxiliary.TERMS] = self._terms
        if self._fusion.ready and not self._guard.troubled:
            output[FUSED_ROW] = torch.arange(len(inputs), device=self.accelerator.device)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss and the rewards' own terms; what the scoring pass kept comes from there, gradient and all."""
        self._fusion.rows = inputs.get(FUSED_ROW)
        self._per_token: Any = None
        loss: Tensor = super()._compute_loss(model, inputs)
        seen, self._per_token = self._per_token, None
        if auxiliary.TERMS in inputs:
            with self.accelerator.autocast():
                term = auxiliary.auxiliary_loss(self, self.accelerator.unwrap_model(self.model), inputs)
            if self.model.training:
                self.record("auxiliary_loss", float(self.accelerator.gather(term.detach()).mean()))
            loss = loss + term
        if self.model.training:
            if seen is not None:
                self._tokens.saw(inputs, *seen[:2])
            self._guard.saw(inputs, loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._guard.before_update(model, norm)
        return norm

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._fusion.rows is None:
            self._per_token = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        else:
            self._per_token = self._fusion.deliver(model, logits_to_keep)
        return self._per_token

    # Housekeeping -----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Two wordings of a question stay in one generation batch, where a reward compares them."""
        twins = twin_sampler(self, self.train_dataset if dataset is None else dataset, train=True)
        self.sampler = super()._get_train_sampler(dataset) if twins is None else twins
        return self.sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        twins = twin_sampler(self, eval_dataset, train=False)
        return super()._get_eval_sampler(eval_dataset) if twins is None else twins

    @property
    def twin_column(self) -> str | None:
        """The column that pairs two wordings of a question, where a reward needs both."""
        return next((reward.columns[0] for reward in self._rewards.values() if "twin" in reward.needs), None)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in the engine; a checkpoint is resumed from only if it is whole. True: the newest that is.

        Raises:
            CheckpointError: there is none, or it was written with other settings or another number of processes.
            NonFiniteError: see `VigorConfig.max_skipped_updates`.
        """
        path = self._checkpoints.verified(self._get_output_dir(None), resume_from_checkpoint)
        return super().train(resume_from_checkpoint=path, **kwargs)

    def load_weights(self, checkpoint: str) -> None:
        """Takes the weights of a checkpoint: for a run that has only its end to do.

        Raises NotImplementedError under DeepSpeed.
        """
        if self.is_deepspeed_enabled:
            raise NotImplementedError(f"{checkpoint} holds all steps; its sharded weights are loaded by training only.")
        if self.is_fsdp_enabled:  # what is sharded is prepared and loaded with its optimizer or not at all
            refuse_code(Path(checkpoint))
            self._prepare_for_training(max(self.args.max_steps, 1), self.get_train_dataloader(), checkpoint)
        else:
            self._load_from_checkpoint(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The engine's metrics and table of completions; what cannot be written is named.

        The summary after the last step comes without a table: the engine would write that of the last log once more,
        when the last checkpoint is whole and a resumed run would not mend a table cut off.
        """
        table = os.path.join(self.args.output_dir, "completions", f"completions_{self.state.global_step:05d}.parquet")
        wanted: bool = self.args.log_completions
        repeated = "train_runtime" in logs and not self._metrics["train"]
        self.log_completions = wanted and not repeated
        with naming(table):
            super().log(logs, start_time)
        self.log_completions = wanted

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The engine's; beside the checkpoints the whole model is written where theirs holds it in parts, too."""
        if self.state_dicts == "SHARDED_STATE_DICT" and not _internal_call:
            self._save(output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The engine's checkpoint, written aside and committed as a whole."""
        write = super()._save_checkpoint
        self._checkpoints.save(self._get_output_dir(trial), lambda: write(model, trial))
        if self.args.push_to_hub:
            path = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            super()._push_from_checkpoint(path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Left to the end of `_save_checkpoint`: what is uploaded in the background must stay where it is."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._checkpoints.write_state(output_dir)
        if self._teacher is not None and self.args.should_save:
            self._teacher.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._checkpoints.read_state(checkpoint)
        if self._teacher is not None and checkpoint is not None:
            self._teacher.load(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoints.folder(os.path.join(super()._get_output_dir(trial), "checkpoints"))

    @property
    def _micro_step(self) -> int:
        """Forward-backward passes before this one; a resumed run goes on counting, TRL's own `_step` starts again."""
        within = self._step % self.args.gradient_accumulation_steps
        return int(self.state.global_step * self.args.gradient_accumulation_steps + within)

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def say(self, text: str) -> None:
        """Prints a line, once for all processes and clear of a progress bar."""
        if self.accelerator.is_main_process:
            with naming(STDOUT):
                tqdm.write(printable(text))

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in generation and in rewards since the last call."""
        taken, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return taken

    def record(self, name: str, value: float) -> None:
        """Adds a number to the next log of training metrics."""
        self._metrics["train"][name].append(value)

    @property
    def state_dicts(self) -> str | None:
        """How FSDP's checkpoints hold weights and optimizer, by the name of its `StateDictType`; None without FSDP."""
        return str(self.accelerator.state.fsdp_plugin.state_dict_type.name) if self.is_fsdp_enabled else None

    @property
    def is_zero3(self) -> bool:
        """Whether DeepSpeed partitions the parameters."""
        return bool(self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3)


def _ours(reward: AnyReward) -> Reward | None:
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str) and rewards.is_reward_spec(reward):
        return rewards.get(reward)
    return None


def _row_keys(rollouts: Rollouts) -> Tensor:
    """(B,) int64: equal for rows with the same tokens; with 64 bits, different rows practically never collide."""
    keys = [hash(row) for row in real_tokens(rollouts.input_ids_BL, rollouts.attention_mask_BL)]
    return torch.tensor(keys, dtype=torch.int64, device=rollouts.input_ids_BL.device)
