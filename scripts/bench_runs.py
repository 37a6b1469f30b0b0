"""Benchmark of whole runs, `results/bench/runs.md`: what one costs to start, and its steps beside a bare loop's.

`python scripts/bench_runs.py starts` times a sweep of short runs whose workers are fresh interpreters, then forks, and
commands that train nothing. `steps` times a step of LoRA by PEFT in a bare loop and in a plain Trainer, and of LoRA
and Partial-LoRA in `partial-lora train`. `methods` times a step of every method of the race at one size, on one thread,
and weighs what it keeps. `long` does so on one text of 2,048 tokens, with gradient checkpointing and compiled too.
`threads` times a step with one thread or all, and with each way in which OpenMP's threads can wait, of a run alone and
of two side by side. Variants take turns. Every repetition is in runs.json. Each part replaces its own section of the
record.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import bench_record

ROOT = Path(__file__).resolve().parents[1]

COMMAND = [sys.executable, "-m", "partial_lora"]
RUNS = 24  # of a sweep
SHORT = ("model=tiny_vit", "trainer.device=cpu", "method=lora", "trainer.max_steps=8")
COMMANDS = {
    "`import peft`": [sys.executable, "-c", "import peft"],
    "`import partial_lora.adapter`": [sys.executable, "-c", "import partial_lora.adapter"],
    "`partial-lora info model=vit_s14`": [*COMMAND, "info", "model=vit_s14"],
}
FEW = ("trainer.batch_size=16", "trainer.device=cpu", "method.rank=16")
JOBS = {
    "vit_s14, digits": ("model=vit_s14", "task=digits"),
    "minilm_l6, trec": ("model=minilm_l6", "task=trec"),
    "smollm2_135m, arc_easy": (
        "model=smollm2_135m",
        "task=arc_easy",
        "model.target_modules=[q_proj,v_proj]",
        "trainer.batch_size=4",
    ),
}
SIZE = 0.13  # of dense LoRA's parameters
METHODS = ("lora", "low_rank", "partial", "entries", "random_weights", "lokr", "loha", "hira", "dora", "vera", "pissa")
METHODS += ("psoft", "oft", "unilora", "fourierft", "randlora", "gralora")
TINY_JOBS = {"tiny_vit, digits": ("model=tiny_vit", "task=digits")}
LOOPS = ("bare", "trainer", "lora", "partial")
LOOP_TITLES = {
    "bare": "bare loop, PEFT's LoRA",
    "trainer": "transformers' Trainer, PEFT's LoRA",
    "lora": "partial-lora train method=lora",
    "partial": "partial-lora train method=partial",
}
WAYS = ("plain", "gradient checkpointing", "torch.compile")
LONG_RANK, LONG_SPARSITY = 16, 0.87
LONG_TITLES = {
    "lora": f"LoRA, rank {LONG_RANK}",
    "low_rank": "LoRA, rank 2",
    "rows_columns": f"rows and columns at {1 - LONG_SPARSITY:.0%}, rank {LONG_RANK}",
}
WAITING = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "all, passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "all, spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "all, spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "all, as OpenMP has it": {},
}
_OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


# --- Starts.


def timed(command: Sequence[str], **given) -> dict[str, float]:
    """Run a command; return its seconds, and those of processors that it and its children took."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **given)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - began, "processor_seconds": spent}


def starts(options: argparse.Namespace) -> dict:
    """Measure sweeps of short runs by either start, and what commands that train nothing take."""
    seeds = f"seed={','.join(map(str, range(RUNS)))}"
    sweeps: dict[str, list] = {"fresh": [], "fork": []}
    commands: dict[str, list] = {name: [] for name in COMMANDS}
    for _ in range(options.repeats):
        for start, found in sweeps.items():
            with tempfile.TemporaryDirectory() as place:
                command = [*COMMAND, "train", "-m", *SHORT, seeds, f"trainer.start={start}"]
                whole = timed(command, cwd=place)
                records = [
                    json.loads(path.read_text()) for path in Path(place).glob("results/runs/*/*/*/*/result.json")
                ]
            assert [record["status"] for record in records] == ["finished"] * RUNS
            # Not its processors' seconds: a forked worker is nobody's child once the process that forked it has ended.
            trained = sum(record["seconds"]["train"] for record in records)
            found.append({"seconds": whole["seconds"], "of_training": trained})
        for name, found in commands.items():
            found.append(timed(COMMANDS[name]))
    return {"runs": RUNS, "sweeps": sweeps, "commands": commands}


def starts_page(found: Mapping) -> list[str]:
    """Return the tables of starts."""
    runs, rows = found["runs"], []
    for start, each in found["sweeps"].items():
        rows.append([f"trainer.start={start}", *(f"{median(each, key) / runs:.2f}" for key in _OF_A_SWEEP)])
    lines = [f"## A sweep of {runs} short runs (`{' '.join(SHORT)}`), for each run", ""]
    lines += table(["", "seconds", "of these in training"], rows)
    rows = [[name, *(f"{median(each, key):.2f}" for key in _SPENT)] for name, each in found["commands"].items()]
    return [*lines, "", "## Commands that train nothing", "", *table(["", "seconds", "processor seconds"], rows)]


_OF_A_SWEEP = ("seconds", "of_training")
_SPENT = ("seconds", "processor_seconds")


# --- Steps.


def step_seconds(job: Sequence[str], loop: str, steps: int, environment: Mapping[str, str] = {}) -> dict[str, float]:
    """Return the median seconds of a step, and the most memory in bytes, of a job in one of LOOPS."""
    return end_of(begin(job, loop, steps, environment))


def begin(job: Sequence[str], loop: str, steps: int, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a measurement of `step_seconds`, in a process of its own."""
    variables = {key: value for key, value in os.environ.items() if key not in _OPENMP} | environment
    command = [sys.executable, __file__, "worker", loop, str(steps), *job]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)


def end_of(process: subprocess.Popen) -> dict[str, float]:
    """Return what a worker has measured."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args)}: ended with code {process.returncode}")
    return json.loads(out.splitlines()[-1])


def jobs_of(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Return the settings of the jobs that are measured, by their names."""
    return TINY_JOBS if options.quick else {name: job for name, job in JOBS.items() if name in options.jobs}


def settings_of(job: Sequence[str], loop: str, steps: int) -> list[str]:
    """Return the settings of a job with so many steps; one share everywhere takes no calibration."""
    from data_sets import folder

    from partial_lora import methods

    method = "lora" if loop in ("bare", "trainer") else loop
    sized = methods.called(method).at_budget if method in ("dora", "vera") else (f"method={method}",)
    length = (f"trainer.max_steps={steps}", f"trainer.save_steps={steps}", "calibration=fixed")
    rows = (f"task.train_samples={16 * 25}", "task.test_samples=64", "trainer.learning_rate=1e-3")
    data = [] if "task=digits" in job else [f"data_dir={folder()}"]
    return [*FEW, *length, *sized, *rows, *job, *data]


def work(loop: str, steps: int, job: Sequence[str]) -> dict[str, float]:
    """Train for some steps in this process and return what `step_seconds` does."""
    if job[0] in WAYS:
        return _on_a_long_text(loop, steps, *job)
    from partial_lora.settings.compose import composed

    config = composed(*settings_of(job, loop, steps))
    with tempfile.TemporaryDirectory() as place:
        work_in = _in_a_loop if loop in ("bare", "trainer") else _in_a_run
        return work_in(config, loop, Path(place))


def _in_a_run(config, loop: str, place: Path) -> dict[str, float]:
    from partial_lora.launching import directory
    from partial_lora.settings.stored import plain
    from partial_lora.train import run

    record = directory.new(plain(config))
    run(config, place, record, "train")
    cost, trained = record["cost"], record["parameters"]["adapter_trainable"]
    kept = {"saved": "saved_activation_bytes", "optimizer": "optimizer_bytes", "file": "adapter_bytes"}
    weighed = {name: cost[key] for name, key in kept.items()} | {"peak": record["peak_memory_bytes"]}
    return {"step": cost["step_seconds"], "parameters": trained} | weighed


def _in_a_loop(config, loop: str, place: Path) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    from partial_lora.building import build
    from partial_lora.models.targets import target_linears
    from partial_lora.training.distributed import join

    world = join("cpu")
    task = build.task_of(config)
    transform = build.transform_of(config.model, config.task, task)
    judge = build.judge_of(config, task, transform, world)
    set_seed(0)
    model = build.model_of(config.model, task.labels, task.class_names)
    targets = list(target_linears(model, **config.model.trained_modules))
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=list(targets)))
    if config.model.head:
        model.get_base_model().get_submodule(config.model.head).requires_grad_(True)
    rows, limit, times = judge.train(), config.trainer.max_steps, []

    class Clock(TrainerCallback):
        def on_step_begin(self, *given, **more):
            self.began = time.perf_counter()

        def on_step_end(self, *given, **more):
            times.append(time.perf_counter() - self.began)

    if loop == "trainer":
        arguments = TrainingArguments(
            output_dir=str(place),
            max_steps=limit,
            per_device_train_batch_size=config.trainer.batch_size,
            learning_rate=1e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=transform.collate,
            compute_loss_func=judge.loss,
            callbacks=[Clock()],
        ).train()
    else:
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        batches = DataLoader(rows, config.trainer.batch_size, shuffle=True, collate_fn=transform.collate)
        model.train()
        while len(times) < limit:
            for batch in batches:
                began = time.perf_counter()
                labels = batch.pop("labels")
                judge.loss(model(**batch), labels).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                times.append(time.perf_counter() - began)
                if len(times) == limit:
                    break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step": statistics.median(times[2:] or times), "peak": peak}


def steps(options: argparse.Namespace) -> dict:
    """Measure every job in every loop, in turns."""
    jobs = jobs_of(options)
    found: dict[str, dict[str, list]] = {name: {loop: [] for loop in LOOPS} for name in jobs}
    for _ in range(options.repeats):
        for name, job in jobs.items():
            for loop in LOOPS:
                found[name][loop].append(step_seconds(job, loop, options.steps))
    return found


def steps_page(found: Mapping) -> list[str]:
    """Return the table of steps."""
    rows = []
    for job, loops in found.items():
        bare = median(loops["bare"], "step")
        for loop, each in loops.items():
            seconds = median(each, "step")
            peak = f"{median(each, 'peak') / 2**20:,.0f}"
            rows.append([job, LOOP_TITLES[loop], f"{seconds:.3f}", f"{seconds / bare:.2f}", peak])
    heads = ["model, task", "", "seconds a step", "of the bare loop's", "peak memory, MiB"]
    return ["## A step beside a bare loop's", "", *table(heads, rows)]


# --- Methods.


def methods(options: argparse.Namespace) -> dict:
    """Measure a step of every method on one thread, each with as many parameters, in turns."""
    jobs = jobs_of(options)
    found: dict[str, dict[str, list]] = {name: {method: [] for method in METHODS} for name in jobs}
    for _ in range(options.repeats):
        for name, job in jobs.items():
            for method, each in found[name].items():
                size = [] if method == "lora" else [f"calibration.budget={SIZE}"]
                each.append(step_seconds([*job, *size], method, options.steps, {"OMP_NUM_THREADS": "1"}))
    return found


def methods_page(found: Mapping) -> list[str]:
    """Return the table of methods."""
    rows = []
    for job, each in found.items():
        reference = median(each["low_rank"], "step")
        for method, runs in each.items():
            seconds = median(runs, "step")
            weighed = [f"{median(runs, key) / 1e6:,.1f}" for key in _WEIGHED]
            parameters = f"{median(runs, 'parameters'):,.0f}"
            rows.append([job, method, parameters, f"{seconds:.3f}", f"{seconds / reference:.2f}", *weighed])
    kept = ("kept for the backward pass, MB", "optimizer, MB", "adapter's file, MB", "peak memory, MB")
    heads = ["model, task", "method", "adapter's parameters", "seconds a step", "of low_rank's", *kept]
    return [f"## A step of every method, at {SIZE} of dense LoRA's parameters, one thread", "", *table(heads, rows)]


_WEIGHED = ("saved", "optimizer", "file", "peak")


# --- Long texts.


def long(options: argparse.Namespace) -> dict:
    """Measure a step on one long text on one thread, in each of WAYS, in turns."""
    found: dict[str, dict[str, list]] = {way: {variant: [] for variant in LONG_TITLES} for way in WAYS}
    for _ in range(options.repeats):
        for way, each in found.items():
            for variant, runs in each.items():
                size = "quick" if options.quick else "full"
                runs.append(step_seconds([way, size], variant, options.steps, {"OMP_NUM_THREADS": "1"}))
    return found


def _on_a_long_text(variant: str, steps: int, way: str, size: str) -> dict[str, float]:
    import bench_measure as measure
    import torch
    from bench_models import LONG, QUICK_LONG, SEED, build_variant

    torch.manual_seed(SEED)
    model = QUICK_LONG if size == "quick" else LONG
    batch, rank = model.batch(), 2 if variant == "low_rank" else LONG_RANK
    built = build_variant("lora" if variant == "low_rank" else variant, model.build(), model, rank, LONG_SPARSITY)
    optimizer = measure.optimizer_of(built)
    if way == "gradient checkpointing":
        built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif way == "torch.compile":
        built.compile()
    began = time.perf_counter()
    measure.step(built, optimizer, batch)
    first = time.perf_counter() - began
    times = [sum(measure.step(built, optimizer, batch).values()) for _ in range(steps)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(each.numel() for each in measure.trainable(built))
    measured = {"step": statistics.median(times), "first": first, "parameters": parameters, "peak": peak}
    # What autograd is handed can be counted only where Python hands it over; a compiled forward pass does not.
    return measured | ({"saved": measure.saved_bytes(built, batch)} if way != "torch.compile" else {})


def long_page(found: Mapping) -> list[str]:
    """Return the table of long texts."""
    rows = []
    for way, each in found.items():
        reference = median(each["low_rank"], "step")
        for variant, runs in each.items():
            seconds = median(runs, "step")
            weighed = [f"{median(runs, key) / 1e6:,.1f}" if key in runs[0] else "–" for key in ("saved", "peak")]
            ratio, first = f"{seconds / reference:.2f}", f"{median(runs, 'first'):.1f}"
            title, parameters = LONG_TITLES[variant], f"{median(runs, 'parameters'):,.0f}"
            rows.append([way, title, parameters, f"{seconds:.2f}", ratio, first, *weighed])
    heads = ["", "adapter", "its parameters", "seconds a step", "of rank 2's", "first step, seconds"]
    heads += ["kept for the backward pass, MB", "peak memory, MB"]
    return ["## One text of 2,048 tokens a step, Llama of 8 layers, d = 1024, one thread", "", *table(heads, rows)]


# --- Threads.


def threads(options: argparse.Namespace) -> dict:
    """Measure a step of PEFT's LoRA by every way to wait, of a run alone and of two side by side."""
    jobs = jobs_of(options)
    found = {name: {way: {"alone": [], "two": []} for way in WAITING} for name in jobs}
    for _ in range(options.repeats):
        for name, job in jobs.items():
            for way, environment in WAITING.items():
                found[name][way]["alone"].append(step_seconds(job, "bare", options.steps, environment))
                both = [begin(job, "bare", options.steps, environment) for _ in range(2)]
                ended = [end_of(each)["step"] for each in both]
                found[name][way]["two"].append({"step": statistics.mean(ended)})
    return found


def threads_page(found: Mapping) -> list[str]:
    """Return the table of threads."""
    rows = [
        [job, way, *(f"{median(each[how], 'step'):.3f}" for how in ("alone", "two"))]
        for job, ways in found.items()
        for way, each in ways.items()
    ]
    heads = ["model, task", "OpenMP's threads", "seconds a step, alone", "two runs side by side"]
    return ["## Threads and how they wait", "", *table(heads, rows)]


# --- The page.

PARTS = {
    "starts": (starts, starts_page),
    "steps": (steps, steps_page),
    "methods": (methods, methods_page),
    "long": (long, long_page),
    "threads": (threads, threads_page),
}


def median(found: Sequence[Mapping], key: str) -> float:
    """Return the median of a key."""
    return statistics.median(each[key] for each in found)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines."""
    ruler = ["---" for _ in heads]
    return [f"| {' | '.join(each)} |" for each in (heads, ruler, *rows)]


def page(record: Mapping) -> str:
    """Return the page of a record."""
    lines = ["# Whole runs", ""]
    for part, (_, shown) in PARTS.items():
        if part in record:
            made = record[part]["made"]
            command = f"Made by `{made['command']}`: medians of {made['repeats']}, {made['cpus']} cores."
            lines += [*shown(record[part]["found"]), "", command, ""]
    return "\n".join(lines)


def figures(record: Mapping) -> bench_record.Figures:
    """Return the ratios of a record: forked starts to fresh ones, loops to the bare one, methods to plain
    LoRA of a lower rank, ways to wait to one thread."""
    found = {part: each["found"] for part, each in record.items()}
    ratios: dict[str, tuple[float, float, float]] = {}

    def add(what: str, variants: Mapping[str, Sequence[Mapping]], one: str, other: str, key: str = "step") -> None:
        both = ([each[key] for each in variants[name]] for name in (one, other))
        ratios[what] = bench_record.ratio_of_medians(*both)

    if "starts" in found:
        add("a forked run / a fresh one", found["starts"]["sweeps"], "fork", "fresh", "seconds")
    for job, loops in found.get("steps", {}).items():
        for loop in LOOPS[1:]:
            add(f"{job}: {LOOP_TITLES[loop]} / bare loop", loops, loop, "bare")
    for job, each in found.get("methods", {}).items():
        for method in (method for method in each if method != "low_rank"):
            add(f"{job}: {method} / low_rank", each, method, "low_rank")
    for way, each in found.get("long", {}).items():
        for variant in ("lora", "rows_columns"):
            add(f"a long text, {way}: {LONG_TITLES[variant]} / rank 2", each, variant, "low_rank")
    for job, ways in found.get("threads", {}).items():
        for how in ("alone", "two"):
            waits = {way: each[how] for way, each in ways.items()}
            for way in list(WAITING)[1:]:
                add(f"{job}, {how}: {way} / one thread", waits, way, "one thread")
    return ratios


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a part, or be one of its processes."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["worker"]:
        _, loop, count, *job = words
        print(json.dumps(work(loop, int(count), job)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    options = bench_record.parsed(parser, words)
    file = options.out / "runs.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    made = {"command": f"python scripts/bench_runs.py {shlex.join(words)}", "repeats": options.repeats}
    record[options.part] = {"made": made | {"cpus": os.cpu_count()}, "found": PARTS[options.part][0](options)}
    bench_record.write(options.out, "runs", record, page, figures)


if __name__ == "__main__":
    main()
