"""One evaluation: everything is checked, then the tasks run one after another through lm-evaluation-harness."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from vigor import __version__
from vigor.evaluation import data, instructions, results, runner
from vigor.evaluation import model as models
from vigor.evaluation.code_tasks import Runner
from vigor.evaluation.suites import TASK_FOLDER, Benchmark, EvalError, system_prompt


@dataclass(frozen=True)
class Settings:
    """What an evaluation was asked for."""

    model: str
    tasks: tuple[Benchmark, ...]
    output_dir: Path
    cache: Path
    """The file of generations."""
    data_dir: str | None = None
    revision: str | None = None
    limit: int | None = None
    backend: str = "hf"
    batch_size: str = "16"
    dtype: str = "auto"
    device: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = "training"
    """"training", "none", or a system prompt for all tasks."""
    chat_template: bool | None = None
    """None: where the tokenizer has one."""
    samples: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave."""

    content: dict[str, Any]
    """As in results.json."""
    generated: int
    reused: int


def evaluate(settings: Settings, make_runner: Callable[[], Runner], say: Callable[[str], None]) -> Outcome:
    """Check, run, and write the results after each task.

    ``make_runner`` gives the sandbox for code tasks (it is called only where there is one); ``say`` takes one line of
    news. Raises EvalError, or SandboxUnavailable, before the model is loaded, where something cannot work.
    """
    import lm_eval

    from vigor.evaluation.cache import CachedLM, Generations

    check(settings)
    tasks = _load_tasks(settings)
    with ExitStack() as stack:
        if any(benchmark.runs_code for benchmark in settings.tasks):
            stack.enter_context(_runner(make_runner()))
        model = models.identify(settings.model, settings.revision)
        chat = _chat(settings.chat_template, model)
        store = Generations(settings.cache)
        stack.callback(store.close)
        lm = CachedLM(
            {"model": model.key, "backend": settings.backend, "dtype": settings.dtype, **settings.model_args},
            model.tokenizer,
            lambda: _load_model(settings, model, say),
            store,
            chunk=_chunk(settings),
            seed=settings.seed,
            max_length=settings.model_args.get(
                "max_model_len", settings.model_args.get("max_length", model.max_length)
            ),
        )
        content = _header(settings, model, chat)
        for benchmark, task in zip(settings.tasks, tasks, strict=True):
            started = time.monotonic()
            generated = lm.generated
            instruction = system_prompt(benchmark, settings.prompt)
            found = lm_eval.evaluate(
                lm,
                {"tasks": {benchmark.task: task}},
                limit=settings.limit,
                bootstrap_iters=0,
                # Without a template the harness joins both texts as they are.
                system_instruction=instruction if chat or instruction is None else f"{instruction}\n\n",
                apply_chat_template=chat,
            )
            rows = results.rows_of(found["samples"][benchmark.task])
            results.write_problems(settings.output_dir, benchmark, rows)
            content["tasks"][benchmark.name] = {
                "problems": len(rows),
                "of": len(task.eval_docs),
                "samples": task.config.repeats,
                "generation": dict(task.config.generation_kwargs),
                "system_prompt": instruction,
                "source": data.origin(benchmark.name, settings.data_dir),
                "note": _note(benchmark, task),
                "problems_sha256": data.digest([logged["doc"] for logged in found["samples"][benchmark.task]]),
                "seconds": round(time.monotonic() - started, 1),
                "generated": lm.generated - generated,
                "measures": {
                    name: {key: measure.as_dict() for key, measure in by.items()}
                    for name, by in results.measures_of(rows).items()
                },
            }
            results.write(settings.output_dir, content)
            say(f"{benchmark.name}: {len(rows):,} problems, {lm.generated - generated:,} texts generated")
    return Outcome(content, lm.generated, lm.reused)


def check(settings: Settings) -> None:
    """What can be refused without reading data or model. Raises EvalError."""
    for flag, value in (
        ("--limit", settings.limit),
        ("--samples", settings.samples),
        ("--max_new_tokens", settings.max_new_tokens),
    ):
        if value is not None and value < 1:
            raise EvalError(f"{flag} {value}: give a number of at least 1.")
    if settings.temperature is not None and settings.temperature < 0:
        raise EvalError(f"--temperature {settings.temperature}: give 0 for greedy decoding, or more.")
    if (settings.samples or 1) > 1 and settings.temperature == 0:
        raise EvalError(f"--samples {settings.samples} --temperature 0: greedy samples are all the same text.")
    size = settings.batch_size
    if size != "auto" and not (size.isdigit() and int(size) > 0):
        raise EvalError(f"--batch_size {size}: give a number of at least 1, or auto.")
    models.check_backend(settings.backend)
    if settings.backend == "vllm" and settings.device is not None:
        raise EvalError(f"--device {settings.device}: vLLM chooses by itself; set CUDA_VISIBLE_DEVICES instead.")


def _load_tasks(settings: Settings) -> list[Any]:
    """The harness's task objects, with the settings that the user has changed."""
    from lm_eval.tasks import TaskManager

    for benchmark in settings.tasks:
        if benchmark.family == "instructions":
            instructions.check(data.documents(benchmark.name, settings.data_dir)[: settings.limit])
    manager = TaskManager(
        include_path=str(TASK_FOLDER), include_defaults=False, metadata={"data_dir": settings.data_dir}
    )
    loaded = manager.load([benchmark.task for benchmark in settings.tasks])["tasks"]
    tasks = [loaded[benchmark.task] for benchmark in settings.tasks]
    for benchmark, task in zip(settings.tasks, tasks, strict=True):
        _adjust(benchmark, task.config, settings)
    return tasks


def _adjust(benchmark: Benchmark, config: Any, settings: Settings) -> None:
    generation = config.generation_kwargs
    if settings.max_new_tokens is not None:
        generation["max_gen_toks"] = settings.max_new_tokens
    if settings.temperature is not None:
        generation.update(temperature=settings.temperature, do_sample=settings.temperature > 0)
        if settings.temperature > 0:
            generation.update(top_p=1.0, top_k=0)
        else:
            generation.pop("top_p", None), generation.pop("top_k", None)
            config.repeats = 1
    if settings.samples is not None:
        if settings.samples > 1 and not generation["do_sample"]:
            raise EvalError(f"{benchmark.name} is decoded greedily: --samples {settings.samples} needs --temperature.")
        config.repeats = settings.samples


def _runner(chosen: Runner) -> ExitStack:
    """Use the runner; close it afterwards where it is a pool."""
    from vigor.evaluation.sandbox import Sandbox

    stack = ExitStack()
    if isinstance(chosen, Sandbox):
        stack.enter_context(chosen)
    stack.enter_context(runner.runs_on(chosen))
    return stack


def _chat(wanted: bool | None, model: models.Model) -> bool:
    has = model.tokenizer.chat_template is not None
    if wanted and not has:
        raise EvalError(f"--chat_template: the tokenizer of {model.name} has none.")
    return has if wanted is None else wanted


def _chunk(settings: Settings) -> int:
    """vLLM schedules by itself and likes many; a batch of transformers is the unit of its work."""
    if settings.backend == "vllm" or settings.batch_size == "auto":
        return 1024
    return 8 * int(settings.batch_size)


def _load_model(settings: Settings, model: models.Model, say: Callable[[str], None]) -> Any:
    say(f"loading {model.name} ({settings.backend})")
    return models.load(
        model,
        settings.backend,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        device=settings.device,
        more=settings.model_args,
        seed=settings.seed,
    )


def _header(settings: Settings, model: models.Model, chat: bool) -> dict[str, Any]:
    asked = asdict(settings)
    for key in ("tasks", "model", "output_dir", "cache", "chat_template"):
        del asked[key]
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "math-verify")}
    return {
        "model": {"name": model.name, "path": model.path, "adapter": model.adapter, "key": model.key},
        "settings": {**asked, "model_args": dict(settings.model_args), "chat_template": chat},
        "versions": {"vigor": __version__, "lm_eval": metadata.version("lm-eval"), **versions},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tasks": {},
    }


def _note(benchmark: Benchmark, task: Any) -> str:
    if benchmark.name != "livecodebench":
        return ""
    import json

    private = sum(bool(json.loads(doc["row"]).get("private_test_cases")) for doc in task.eval_docs)
    return f"public tests only for {len(task.eval_docs) - private} of {len(task.eval_docs)}: an upper bound there"


def default_output(model: str, tasks: Sequence[Benchmark], suite: str | None) -> Path:
    """runs/eval-MODEL-SUITE, or the tasks' names where there is no suite."""
    what = suite or "+".join(benchmark.name for benchmark in tasks)
    plain = "".join(c if c.isalnum() or c in "._+-" else "-" for c in f"{model.strip('/')}-{what}")
    return Path("runs") / f"eval-{plain.lstrip('.-')}"
