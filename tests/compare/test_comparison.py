"""A comparison of methods: which runs a search makes, what it ends with, and what is refused before any starts."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import threading
import types
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd
import pytest
import yaml
from commands import here
from recorded_runs import record
from refusals import refusal

from partial_lora.commands import compare_or_judge
from partial_lora.compare import candidates, comparison, options, rate_search
from partial_lora.compare.candidates import Candidate, Entrant
from partial_lora.compare.comparison import Comparison
from partial_lora.compare.options import Options
from partial_lora.files import read_json, write_json
from partial_lora.launching import directory, launch, pool
from partial_lora.launching.paths import run_directory
from partial_lora.report import certificate
from partial_lora.settings import compose, schema
from partial_lora.settings.schema import Config

GIVEN = ("model=tiny_vit", "task=digits", "method.rank=32")


@pytest.fixture
def entry(tmp_path) -> Candidate:
    """A method at one size."""
    (found,) = candidates.candidates_of(["lora"], [0.3], (*GIVEN, f"results_dir={tmp_path}"))
    return found


def test_every_method_is_at_every_budget_and_those_of_their_own_size_once(tmp_path) -> None:
    overrides = (*GIVEN, f"results_dir={tmp_path}")
    entries = candidates.candidates_of(["dense", "lora", "dora", "lokr", "hira"], [0.13, 0.3], overrides)
    assert [entry.name for entry in entries] == [
        "dense, own size",
        *(f"{name}, {budget}" for name in ("lora", "dora", "lokr", "hira") for budget in ("0.13", "0.3")),
    ]
    by_name = {entry.name: entry for entry in entries}
    assert "not applicable" in by_name["lokr, 0.3"].unfit  # on a model as small as this
    dense = by_name["dense, own size"].parameters
    assert by_name["dora, 0.3"].parameters == pytest.approx(0.3 * dense, rel=0.05)  # and not of rank 32
    centres = {name: by_name[f"{name}, 0.3"].centre for name in ("lora", "dora", "hira")}
    assert centres == {"lora": 4e-3, "dora": 2e-3, "hira": 32e-3}  # on the ladder of all
    (written_out,) = candidates.candidates_of(["hira"], [0.3], (*overrides, "trainer.learning_rate=auto"))
    assert written_out.centre == centres["hira"]
    (counted,) = candidates.candidates_of(["lora", "lora"], [1234567, 1234567], overrides)
    assert "calibration.budget=1234567" in counted.overrides  # to the last parameter
    asked, _ = options.read(["methods=[lora]", "budgets=null"])
    (as_in_peft,) = candidates.candidates_of(asked.methods, asked.budgets, (*overrides, "calibration=fixed"))
    assert (as_in_peft.size, as_in_peft.parameters) == ("own size", dense)
    with refusal("method=low_rank: expected lora"):
        candidates.candidates_of(["low_rank"], [0.3], overrides)


@pytest.mark.parametrize(("named", "metrics"), [([], ["perplexity"]), (["task.metrics=[rouge_l]"], ["rouge_l"])])
def test_responses_count_by_perplexity_unless_a_metric_is_named(named: list[str], metrics: list[str], tmp_path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "one", "response": "two"}\n' * 20, encoding="utf-8")
    given = ("task=text_generation", f"task.data_files={file}", "model=tiny_llama", f"results_dir={tmp_path}", *named)
    (entry,) = candidates.candidates_of(["lora"], [0.13], given)
    assert entry.usual.task.metrics == metrics


def test_a_folder_for_results_may_be_named_in_a_file_of_settings(tmp_path) -> None:
    chosen = ["methods=[lora]", str(tmp_path / "own.yaml")]
    (tmp_path / "own.yaml").write_text("task: digits\nresults_dir: here\n", encoding="utf-8")
    assert not [each for each in options.read(chosen)[1] if each.startswith("results_dir=")]
    record = "".join(f"{group}: {{}}\n" for group in schema.SECTIONS) + "results_dir: there\n"
    for content in ("task: digits\n", record):  # a run's config.yaml has the folder of that run, for other results
        (tmp_path / "own.yaml").write_text(content, encoding="utf-8")
        assert "results_dir=results/compare" in options.read(chosen)[1]


@pytest.mark.parametrize(
    "given", ["seed: 4", "method: dense", "method: {name: dense}", "calibration.budget: 0.02", "margin: 2"]
)
def test_a_file_may_not_set_what_a_comparison_replaces_or_is_told_by_itself(given: str, tmp_path) -> None:
    (tmp_path / "own.yaml").write_text(f"task: digits\n{given}\n", encoding="utf-8")
    with refusal(str(tmp_path / "own.yaml"), given.partition(":")[0]):
        options.read(["methods=[lora]", str(tmp_path / "own.yaml")])


def test_a_limit_may_have_its_unit_and_a_file_says_how_workers_start(tmp_path) -> None:
    asked, others = options.read(["methods=[lora]", "limit.seconds=0.2 s"])
    assert asked.limit == {"seconds": 0.2}
    assert "trainer.start=fork" in others
    (tmp_path / "own.yaml").write_text("trainer: {start: fresh}\n", encoding="utf-8")
    assert "trainer.start=fork" not in options.read(["methods=[lora]", str(tmp_path / "own.yaml")])[1]


def leave_records(configs: Iterable[Config], best: float = 1e-3, failing: str = "", **changes: object) -> int:
    """Only write the records of runs, better the nearer their rate is to the best. changes: of records."""
    for config in configs:  # whole ones, whatever share is asked for
        score = 0.9 - abs(math.log2(config.trainer.learning_rate / best)) / 10
        left = record(config.method.name, score, budget=0.3, seed=config.seed, fixed={"budget": 0.3}, **changes)
        left["config"]["trainer"] |= {"learning_rate": config.trainer.learning_rate, "until": rate_search.QUARTER}
        left["history"] = [{"step": 10, "eval_loss": 1 - score}]
        left["metrics"]["train"] = {"primary": "loss", "loss": 0.1}
        failed = {"status": "failed", "error": "the loss is not finite"} if config.method.name == failing else {}
        run_directory(config).mkdir(parents=True, exist_ok=True)
        write_json(run_directory(config) / "result.json", left | failed)
    return 0


def decided(*_) -> dict:
    """No further seeds."""
    return {}


def begun(chosen: Iterable[Candidate], *, seeds_of=decided, **settings) -> Comparison:
    """A comparison of candidates. seeds_of: the seeds that its members need, in place of a look at their runs."""
    progress = list(map(Entrant, chosen))
    settings = {"methods": [one.candidate.method for one in progress], "rates": 3, "jobs": 1} | settings
    made = Comparison(Options(**settings), progress, [])
    made.next_look = lambda group: (seeds_of(group), [])
    return made


def comparing(chosen: Iterable[Candidate], make, **settings) -> tuple[int, list[Entrant]]:
    """The exit code of a comparison of candidates, and what becomes of them. settings: as `begun` takes them."""
    made = begun(chosen, **settings)
    return made.decide(make, lambda line: None), made.progress


def config_of(one: Entrant, trial: rate_search.Trial) -> Config:
    (config,) = one.configs([trial]).values()
    return config


def leaving(made: list, **changes: object):
    """A stand-in for runs that leaves records, and a list of what was asked for."""

    def make(runs) -> int:
        made.extend(runs)
        return leave_records((config_of(*run) for run in runs), **changes)

    return make


@pytest.mark.usefixtures("composed_once")
def test_a_full_search_makes_its_runs_and_takes_what_is_finished(tmp_path) -> None:
    """With records in place of runs: nothing twice."""

    def compared(make, *more: str) -> tuple[int, Entrant]:
        own = candidates.candidates_of(["lora"], [0.3], (*GIVEN, f"results_dir={tmp_path}", *more))
        code, (one,) = comparing(own, make, search="full", seeds=2)
        return code, one

    made: list = []
    code, one = compared(leaving(made, best=2e-3))
    assert (code, one.best) == (0, 2e-3)
    assert len(one.records) == len(made) == len(set(made))
    assert len(made) >= rate_search.runs_at_least(3, 2)
    again: list = []
    code, other = compared(leaving(again))
    assert (code, again, other.records) == (0, [], one.records)  # records suffice: there are no weights here
    _, other = compared(leaving(again, best=2e-3), "overwrite=true")
    assert len(again) == len(made)
    assert not any(config_of(*run).overwrite for run in again)  # a paused one goes on where it is
    assert [word for word in other.arguments([again[0][1]]) if word.startswith("overwrite")] == ["overwrite=false"]


@pytest.mark.usefixtures("composed_once")
def test_a_rate_whose_run_was_killed_is_tried_again_and_one_that_failed_by_itself_is_not(tmp_path) -> None:
    made: list = []
    (candidate,) = candidates.candidates_of(["lora"], [0.3], (*GIVEN, f"results_dir={tmp_path}"))
    lowest, low, centre = (candidate.centre / factor for factor in (4, 2, 1))
    ended = {centre: {"status": "failed", "killed": True}, lowest: {"status": "failed", "error": "not finite"}}

    def make(runs) -> int:
        for one, trial in runs:
            leave_records([config_of(one, trial)], best=centre, **ended.get(trial.rate, {}))
        made.extend(trial.rate for _, trial in runs)
        return 0

    code, (one,) = comparing([candidate], make, search="full", seeds=1, rates=2)
    assert made == [low, centre, lowest]  # low is the best, and at an edge
    assert (code, one.killed) == (1, [centre])
    del ended[centre], made[:]
    code, (one,) = comparing([candidate], make, search="full", seeds=1, rates=2)
    assert made == [centre, centre * 2]
    assert (code, one.best, one.killed) == (0, centre, [])


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(("hours", "last"), [(None, [2, 1]), (1e-9, [1, 1])])
def test_a_quick_comparison_asks_for_seeds_of_the_best_rate_alone_until_nothing_is_open_or_time_is_over(
    tmp_path, hours, last
) -> None:
    """But the first two always are begun."""
    own = candidates.candidates_of(["lora", "uniform"], [0.3], (*GIVEN, f"results_dir={tmp_path}"))
    made: list = []
    looks = iter([lambda group: dict.fromkeys(group, 2), lambda group: {group[0]: 3}, decided])
    code, progress = comparing(own, leaving(made, best=2e-3), seeds_of=lambda group: next(looks)(group), hours=hours)
    assert code == 0
    assert all(trial.rate == one.best for one, trial in made if trial.seed)
    assert [max(trial.seed for other, trial in made if other is one) for one in progress] == last
    # Whole records answer for the rest of the first seed.
    assert {trial.until for _, trial in made if not trial.seed} == {rate_search.QUARTER}


@pytest.mark.parametrize(("hours", "first"), [(None, 8), (1e-9, 2)])
def test_where_time_may_be_over_two_seeds_are_asked_for_before_all(hours, first) -> None:
    group = [Entrant(Candidate(method, "0.3", ()), best=1e-3) for method in ("lora", "uniform")]
    own = Options(methods=["lora", "uniform"], seeds=8, hours=hours)
    assert Comparison(own, group, []).next_look(group) == (dict.fromkeys(group, first), [])


def test_an_interrupted_comparison_makes_no_further_runs(tmp_path) -> None:
    own = candidates.candidates_of(["lora", "uniform"], [0.3], (*GIVEN, f"results_dir={tmp_path}"))
    launched: list = []
    assert comparing(own, lambda runs: launched.append(runs) or 130)[0] == 130
    assert len(launched) == 1


def test_a_run_that_another_process_holds_ends_a_comparison(entry) -> None:
    """Else its rate would pass for one that failed."""
    with directory.locked(run_directory(entry.usual)), refusal("", run_directory(entry.usual)):
        comparing([entry], lambda runs: 2)


def test_of_two_comparisons_at_once_one_waits_for_the_runs_of_the_other(monkeypatch, entry) -> None:
    monkeypatch.setattr(pool.launch, "launch", lambda *_, **__: pytest.fail("made twice"))
    (config,) = entry.configs([rate_search.Trial(entry.centre, 0, rate_search.QUARTER)]).values()
    outcomes: list[str] = []
    with contextlib.ExitStack() as other:
        other.enter_context(directory.locked(run_directory(config)))

        def the_other_ends(seconds: float) -> None:
            leave_records([config])
            other.close()

        monkeypatch.setattr(pool, "time", types.SimpleNamespace(sleep=the_other_ends))
        pool.side_by_side([config], 1, candidates.is_made, lambda _, outcome: outcomes.append(outcome.status))
    assert outcomes == ["skipped"]


def test_runs_side_by_side_have_different_slots_and_each_is_told_by_its_place(tmp_path, monkeypatch, entry) -> None:
    slots, ended, both = [], [], threading.Barrier(2, timeout=60)

    def launched(config: Config, *_, slot: int, **__) -> launch.Outcome:
        both.wait()
        slots.append(slot)
        return launch.Outcome(run_directory(config), "finished")

    monkeypatch.setattr(pool.launch, "launch", launched)
    configs = list(entry.configs([rate_search.Trial(entry.centre * factor, 0) for factor in (1, 2, 3, 4)]).values())
    pool.side_by_side(configs, 2, candidates.is_made, lambda *end: ended.append(end))
    assert sorted(slots) == [0, 0, 1, 1]
    assert {place: outcome.directory for place, outcome in ended} == dict(enumerate(map(run_directory, configs)))


@pytest.mark.parametrize("given", ["trainer: {learning_rate: 3e-5}", "trainer.learning_rate: 3e-5"])
def test_a_learning_rate_in_a_file_is_where_searches_begin(given: str, tmp_path) -> None:
    (tmp_path / "own.yaml").write_text(f"model: tiny_vit\n{given}\n", encoding="utf-8")
    own = (str(tmp_path / "own.yaml"), f"results_dir={tmp_path}")
    assert [each.centre for each in candidates.candidates_of(["dense", "lora"], [0.13], own)] == [3e-5, 6e-5]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ([], "methods"),
        (["method=dense"], "method=dense"),
        (["methods=[]"], "methods"),
        (["methods=null"], "methods=null"),
        (["methods=[null,lora]"], "methods=[null,lora]"),
        (["methods=[partial"], "methods"),
        (["methods=[lora]", "budgets=[some]"], "budgets"),
        (["methods=[lora]", "budgets=[inf]"], "budgets"),
        (["methods=[lora]", "seeds=0"], "seeds"),
        (["methods=[lora]", "rates=1"], "rates"),
        (["methods=[lora]", "margin=0"], "margin"),
        (["methods=[lora]", "hours=-1"], "hours"),
        (["methods=[lora]", "jobs=0"], "jobs"),
        (["methods=[lora]", "search=fast"], "search"),
        (["methods=[lora]", "limit.seconds=2KB"], "limit.seconds"),
        (["methods=[lora]", "limit.kept=1MB", "limit.seconds=1"], "limit"),
        (["methods=[lora]", "limit.rows=1"], "limit"),
        (["methods=[lora]", "reference=dense"], "reference"),
        (["methods=[nothing]"], "method"),
        (["methods=[lora]", "trainer.nothing=1"], "trainer.nothing"),
        (["methods=[lora]", "seed=5"], "seed"),
        (["methods=[lora]", "+method=dora"], "method"),
        (["methods=[lora]", "calibration.budget=0.02"], "calibration.budget"),
        (["methods=[shira]", "model=tiny_vit,tiny_clip"], "model"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_its_key(arguments: list[str], key: str, tmp_path, monkeypatch) -> None:
    """And before what counts and trains is imported."""
    monkeypatch.setattr(compare_or_judge, "libraries", pytest.fail)
    done = here(tmp_path, "compare", *arguments)
    assert done.returncode == 2
    assert key in done.stderr.splitlines()[0]
    assert not list(tmp_path.glob("results*"))


def test_what_one_verdict_cannot_tell_apart_is_refused(tmp_path) -> None:
    overrides = (*GIVEN, f"results_dir={tmp_path}")
    (one,) = candidates.candidates_of(["lora"], [0.3], overrides)
    (twin,) = candidates.candidates_of(["lora"], [0.3], (*overrides, "method.alpha=4"))
    (elsewhere,) = candidates.candidates_of(["dense"], [0.3], (*GIVEN, f"results_dir={tmp_path}/other"))
    with refusal("methods: lora, 0.3"):
        candidates.refuse_twins([one, twin])
    with refusal("results_dir", tmp_path / "other"):
        candidates.refuse_twins([one, elsewhere])
    candidates.refuse_twins([one])


def test_a_recorded_rate_of_many_digits_is_the_rate_of_its_seeds() -> None:
    rate = 0.0012345678
    entry = Candidate("dense", "own size", ("model=tiny_vit", "task=digits", "method=dense"))
    (config,) = entry.configs([rate_search.Trial(rate, 1)]).values()
    assert config.trainer.learning_rate == rate


def test_a_results_directory_is_taken_however_it_is_set_and_a_limit_has_no_budgets_beside_it() -> None:
    for given in ("results_dir=there", "+results_dir=there", "++results_dir=there"):
        _, others = options.read(["methods=[dense]", given])
        assert [each for each in others if "results_dir" in each] == [given]
    with refusal("budgets="):
        options.read(["methods=[dense]", "budgets=[0.02]", "limit.served=40MB"])


def test_a_number_of_seeds_is_of_a_method_that_stands_alone_too() -> None:
    one = Entrant(Candidate("dense", "own size", ()), best=1e-3)
    one.records = {seed: record(seed=seed, trainer__learning_rate=1e-3) for seed in range(2)}
    assert Comparison(Options(methods=["dense"], seeds=3), [one], []).next_look([one]) == ({one: 3}, [])


def test_rows_that_cannot_be_read_are_refused_once_and_before_any_run(tmp_path) -> None:
    (tmp_path / "one.csv").write_text("text,label\n" + "a film,good\n" * 20)
    chosen = ("compare", "model=tiny_bert", "task=text_table", "methods=[lora,dense,dora]")
    for given, names in (((), "task.data_files"), (("task.data_files=one.csv",), "good")):
        done = here(tmp_path, *chosen, *given)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("partial-lora: ")]
        assert (done.returncode, names in line) == (2, True)
    assert not list(tmp_path.glob("results*"))


@pytest.fixture
def composed_once(monkeypatch) -> None:
    """A test and the comparison that it looks at compose the same runs: each is composed at its first mention."""
    checked = functools.cache(lambda *arguments: compose.checked(arguments))
    monkeypatch.setattr(candidates, "checked", lambda arguments: checked(*arguments))


def test_a_limit_gives_every_method_its_largest_size_and_names_the_nearest_of_one_that_has_none(tmp_path) -> None:
    """By the file that is served, which for masks of single entries is the dense adapter's."""
    own = (*GIVEN, f"results_dir={tmp_path}")
    found = candidates.candidates_of(["lora", "entries"], [0.5, 0.25], own)
    dense = max(entry.served for entry in found)
    kept = candidates.fitting(found, {"served": 0.4 * dense})
    assert [(entry.method, entry.size) for entry in kept if entry.unfit is None] == [("lora", "0.25")]
    assert "limit.served" in kept[-1].unfit
    assert len({entry.group for entry in kept}) == 1
    own = candidates.candidates_of(["lora"], [0.5, 0.25], own)
    sizes = [candidates.cost_of(entry, "kept") for entry in own]  # counted, not measured
    assert sizes[0] > sizes[1]
    (within,) = candidates.fitting(own, {"kept": sizes[1]})
    assert within.overrides == own[1].overrides


def test_methods_under_a_limit_are_compared_within_one_task_and_model(tmp_path) -> None:
    overrides = (*GIVEN, f"results_dir={tmp_path}")
    of_tasks = [
        candidates.candidates_of(["lora"], [0.25], (*overrides, f"task.name={name}")) for name in ("one", "two")
    ]
    kept = [entry for entries in of_tasks for entry in candidates.fitting(entries, {"served": 1e9})]
    candidates.refuse_twins(kept)
    assert [entry.group.split(", ")[0] for entry in kept] == ["one", "two"]
    assert all(entry.group.endswith(candidates.limit_text({"served": 1e9})) for entry in kept)


def test_runs_go_side_by_side_where_cores_and_memory_allow_and_one_by_one_on_an_accelerator(
    tmp_path, monkeypatch, entry
) -> None:
    monkeypatch.setattr(candidates, "cpu_count", lambda: 4)
    monkeypatch.setattr(candidates, "has_accelerator", lambda: False)
    monkeypatch.setattr(candidates.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=30))
    assert candidates.jobs_at_once([entry]) == 4
    for peak, jobs in ((12, 2), (50, 1)):
        assert candidates.jobs_at_once([replace(entry, timed={"peak_memory_bytes": peak})]) == jobs
    monkeypatch.setattr(candidates, "has_accelerator", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert candidates.jobs_at_once([entry]) == 1
    (entry,) = candidates.candidates_of(["lora"], [0.3], (*GIVEN, "trainer.num_processes=1", f"results_dir={tmp_path}"))
    assert candidates.jobs_at_once([entry]) == 3


def test_runs_side_by_side_share_the_cores_unless_the_user_has_set_their_threads(monkeypatch) -> None:
    monkeypatch.setattr(pool, "cpu_count", lambda: 4)
    monkeypatch.setattr(pool, "_SHARED", {})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that what the test leaves is undone
    monkeypatch.delenv("OMP_NUM_THREADS")
    for jobs, threads in ((1, None), (4, "1"), (2, "2"), (1, "4")):
        pool.share_threads(jobs)
        assert os.environ.get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pool.share_threads(4)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_request_to_stop_while_runs_are_timed_ends_the_comparison(tmp_path, monkeypatch, entry) -> None:
    stopped = launch.Outcome(tmp_path, "interrupted", signal="SIGTERM")
    monkeypatch.setattr(pool.launch, "launch", lambda *arguments, **named: stopped)
    with pytest.raises(SystemExit) as ended:
        candidates.timed(entry)
    assert ended.value.code == 128 + 15


def test_methods_that_servers_do_not_load_are_left_out_by_name(tmp_path) -> None:
    own = (*GIVEN, f"results_dir={tmp_path}")
    found, lines = candidates.prepared(Options(["oft", "dora", "lora"], serve=True), own)
    assert [entry.method for entry in found] == ["lora"]
    assert [line.partition(":")[0] for line in lines] == ["oft", "dora"]
    assert candidates.prepared(Options(["oft"], serve=True), own)[0] == []


def test_auto_takes_all_candidates_that_have_the_size_and_names_the_others(tmp_path, monkeypatch) -> None:
    own = (*GIVEN, f"results_dir={tmp_path}")
    monkeypatch.setattr(candidates, "CANDIDATES", ("entries", "partial", "lora"))
    every, lines = candidates.prepared(Options(["auto"]), own)
    assert ([entry.method for entry in every], lines) == (["entries", "partial", "lora"], [])
    few = {"served": 1.1 * min(entry.served for entry in every)}  # no single entries, whose file is the dense adapter's
    found, lines = candidates.prepared(Options(["auto"], limit=few), own)
    assert [entry.method for entry in found] == ["lora"]
    assert [line.partition(",")[0] for line in lines] == ["entries", "partial"]


LOSSES = {"lora": 0.1, "partial": 0.2, "entries": 0.3, "uniform": 0.31, "random_weights": 0.9}  # after half a run


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(("kept", "gone"), [(True, ["random_weights"]), (False, ["uniform", "random_weights"])])
def test_a_race_lets_three_go_on_and_those_whose_rows_do_not_tell_them_from_the_third(
    kept: bool, gone: list[str], tmp_path, rng
) -> None:
    """Without their rows, by means alone; what is recorded answers for a second look."""
    noise, made = rng.normal(size=(len(LOSSES), 200)), []

    def make(runs) -> int:
        made.extend(runs)
        for one, trial in runs:
            loss = LOSSES[one.candidate.method]
            config = config_of(one, trial)
            leave_records([config], best=2e-3)
            record = read_json(run_directory(config) / "result.json")
            record["history"] = [{"step": step, "eval_loss": loss} for step in range(1, 1 + round(8 * trial.until))]
            record |= {"training": {"steps": 8}} | ({"status": "paused"} if trial.until < 1 else {})
            write_json(run_directory(config) / "result.json", record)
            if kept:
                losses = loss + noise[list(LOSSES).index(one.candidate.method)] / 4
                told = pd.DataFrame({"label": 0, "prediction": 0, "loss": losses - losses.mean() + loss})
                told.to_parquet(run_directory(config) / directory.VALIDATION)
        return 0

    own = candidates.candidates_of([*LOSSES], [0.3], (*GIVEN, "calibration=fixed", f"results_dir={tmp_path}"))
    code, progress = comparing(own, make, margin=1)
    dropped = [one.candidate.method for one in progress if one.dropped]
    assert (code, dropped) == (0, gone)
    assert all((one.best is None) == (one.candidate.method in gone) for one in progress)
    assert not [one for one, trial in made if trial.until == 1 and one.candidate.method in gone]
    assert {trial.until for _, trial in made} == {rate_search.QUARTER, rate_search.HALF, 1.0}
    before = len(made)
    for rows in tmp_path.rglob(directory.VALIDATION):  # as packed runs are without them
        rows.unlink()
    _, again = comparing(own, make, margin=1)
    assert (len(made), [one.dropped for one in again]) == (before, [one.dropped for one in progress])
    named = [line for line in Comparison(Options(["lora"]), progress, []).remarks if "place 5 of 5" in line]
    assert [line.partition(",")[0] for line in named] == ["random_weights"]


@pytest.mark.usefixtures("composed_once")
def test_what_has_run_is_ranked_and_a_masked_method_is_a_reference_whatever_its_form_is_called(
    tmp_path, monkeypatch
) -> None:
    """Two methods are equally good, and the runs of a third fail."""

    def make(configs, *_) -> int:
        return leave_records(configs, failing="unilora", mask__fan_in="kept")

    monkeypatch.setattr(pool, "side_by_side", make)
    monkeypatch.setattr(comparison, "timed", lambda candidate: candidate)
    methods = ("methods=[partial,lora,unilora]", "reference=partial", "calibration=fixed")
    short = ("budgets=0.3", "seeds=2", "results_dir=out")
    done = here(tmp_path, "compare", *GIVEN, *methods, *short)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "− partial row_exponent=0" in table
    assert re.search(r"\| lora +\| +0\.001 \| 90\.00", table)
    assert "unilora, 0.3: the loss is not finite" in done.stderr
    for name in ("config.yaml", "training_arguments.json", "method_comparison.json"):
        assert (tmp_path / "out" / "take" / name).is_file()
    taken = yaml.safe_load((tmp_path / "out" / "take" / "config.yaml").read_text())
    failed = (*methods[:1], "reference=unilora", *methods[2:])
    assert here(tmp_path, "compare", *GIVEN, *failed, *short).returncode == 0
    assert "− partial row_exponent=0" in (tmp_path / "out" / "compare.md").read_text()  # the first that has trained
    assert taken["trainer"]["until"] == 1  # a whole run, though its record may be of one that was paused


@pytest.mark.usefixtures("composed_once")
def test_a_comparison_made_from_python_prints_nothing_and_returns_its_verdict(tmp_path, monkeypatch, capsys) -> None:
    def make(configs, jobs, is_made, then) -> int:
        leave_records(configs, best=8e-3)  # at an edge
        for place, config in enumerate(configs):
            failed = config.method.name == "uniform" and config.trainer.learning_rate == 2e-3
            then(place, launch.Outcome(tmp_path, "failed" if failed else "finished", error="of chance"))
        return 0

    monkeypatch.setattr(pool, "side_by_side", make)
    monkeypatch.setattr(comparison, "timed", lambda candidate: candidate)
    settings = (*GIVEN, "methods=[lora,uniform]", "budgets=0.3", "seeds=2", "jobs=1", f"results_dir={tmp_path}")
    parts = [options.read(settings)]
    whole = Comparison.of(parts[0][0], parts)
    said, events, notes = [], [], []
    whole.measure(said.append)
    assert whole.run(said.append, watch=events.append, note=notes.append, sweep=pytest.fail) == 0
    conclusion = whole.conclude("a command")
    assert capsys.readouterr() == ("", "")
    assert [one.best for one in whole.progress] == [8e-3, 8e-3]
    assert {"lora, 0.3: learning rate 0.008", "uniform, 0.3: learning rate 0.008"} <= {*said}
    shares = [event.get("share", event["done"] / event["total"]) for event in events]
    assert shares == sorted(shares)
    assert (max(shares[:-1]) < 1, shares[-1]) == (True, 1)  # whatever more there was to do
    assert all(note.startswith("uniform, 0.3, ") for note in notes)
    ((sentences, take),) = conclusion.verdicts
    assert "lora" in " ".join(sentences)
    assert (take / "config.yaml").is_file()
    assert certificate.found_wrong(take / "verdict.json") == []
    assert conclusion.page.is_file()
