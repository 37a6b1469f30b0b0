"""A comparison of methods: which runs a search makes, what it ends with, and what is refused before any starts."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import threading
import types

import pytest
import yaml
from commands import here
from recorded_runs import record
from refusals import refusal

from partial_lora.compare import Contest
from partial_lora.files import write_json
from partial_lora.launching import compare, directory, launch, search
from partial_lora.launching.paths import run_directory
from partial_lora.report import certificate
from partial_lora.settings import comparison, schema

GIVEN = ("model=tiny_vit", "task=digits", "method.rank=32")


@pytest.fixture
def entry(tmp_path) -> compare.Entry:
    """A method at one size."""
    (found,) = compare.entries_of(["low_rank"], [0.3], (*GIVEN, f"results_dir={tmp_path}"))
    return found


def test_every_method_is_at_every_budget_and_those_of_their_own_size_once(tmp_path) -> None:
    overrides = (*GIVEN, f"results_dir={tmp_path}")
    entries = compare.entries_of(["lora", "low_rank", "dora", "lokr", "hira"], [0.13, 0.3], overrides)
    assert [entry.name for entry in entries] == [
        "lora, own size",
        *(f"{name}, {budget}" for name in ("low_rank", "dora", "lokr", "hira") for budget in ("0.13", "0.3")),
    ]
    by_name = {entry.name: entry for entry in entries}
    assert "not applicable" in by_name["lokr, 0.3"].refused  # on a model as small as this
    dense = by_name["lora, own size"].parameters
    assert by_name["dora, 0.3"].parameters == pytest.approx(0.3 * dense, rel=0.05)  # and not of rank 32
    centres = {name: by_name[f"{name}, 0.3"].centre for name in ("low_rank", "dora", "hira")}
    assert centres == {"low_rank": 2e-3, "dora": 2e-3, "hira": 32e-3}  # on the ladder of all
    (written_out,) = compare.entries_of(["hira"], [0.3], (*overrides, "trainer.learning_rate=auto"))
    assert written_out.centre == centres["hira"]
    (counted,) = compare.entries_of(["low_rank", "low_rank"], [1234567, 1234567], overrides)
    assert "calibration.budget=1234567" in counted.overrides  # to the last parameter


@pytest.mark.parametrize(("named", "metrics"), [([], ["perplexity"]), (["task.metrics=[rouge_l]"], ["rouge_l"])])
def test_responses_count_by_perplexity_unless_a_metric_is_named(named: list[str], metrics: list[str], tmp_path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "one", "response": "two"}\n' * 20, encoding="utf-8")
    given = ("task=text_generation", f"task.data_files={file}", "model=tiny_llama", f"results_dir={tmp_path}", *named)
    (entry,) = compare.entries_of(["low_rank"], [0.13], given)
    assert entry.usual.task.metrics == metrics


def test_a_folder_for_results_may_be_named_in_a_file_of_settings(tmp_path) -> None:
    chosen = ["methods=[low_rank]", str(tmp_path / "own.yaml")]
    (tmp_path / "own.yaml").write_text("task: digits\nresults_dir: here\n", encoding="utf-8")
    assert not [each for each in comparison.read(chosen)[1] if each.startswith("results_dir=")]
    record = "".join(f"{group}: {{}}\n" for group in schema.SECTIONS) + "results_dir: there\n"
    for content in ("task: digits\n", record):  # a run's config.yaml has the folder of that run, for other results
        (tmp_path / "own.yaml").write_text(content, encoding="utf-8")
        assert "results_dir=results/compare" in comparison.read(chosen)[1]


def test_a_limit_may_have_its_unit_and_a_file_says_how_workers_start(tmp_path) -> None:
    asked, others = comparison.read(["methods=[low_rank]", "limit.seconds=0.2 s"])
    assert asked.limit == {"seconds": 0.2}
    assert "trainer.start=fork" in others
    (tmp_path / "own.yaml").write_text("trainer: {start: fresh}\n", encoding="utf-8")
    assert "trainer.start=fork" not in comparison.read(["methods=[low_rank]", str(tmp_path / "own.yaml")])[1]


def leave_records(arguments: list[str], best: float = 1e-3, failing: str = "", **changes: object) -> int:
    """Only write the records of a sweep's runs, better the nearer their rate is to the best. changes: of records."""
    for _, config in compare.checked(arguments).runs:  # whole ones, whatever share is asked for
        score = 0.9 - abs(math.log2(config.trainer.learning_rate / best)) / 10
        left = record(config.method.name, score, budget=0.3, seed=config.seed, fixed={"budget": 0.3}, **changes)
        left["config"]["trainer"] |= {"learning_rate": config.trainer.learning_rate, "until": search.QUARTER}
        left["history"] = [{"step": 10, "eval_loss": 1 - score}]
        left["metrics"]["train"] = {"primary": "loss", "loss": 0.1}
        failed = {"status": "failed", "error": "the loss is not finite"} if config.method.name == failing else {}
        run_directory(config).mkdir(parents=True, exist_ok=True)
        write_json(run_directory(config) / "result.json", left | failed)
    return 0


def decided(*_) -> dict:
    """No further seeds."""
    return {}


def comparing(chosen: list[compare.Entry], make, *, asks=decided, **settings) -> int:
    settings = {"methods": [entry.method for entry in chosen], "rates": 3, "jobs": 1} | settings
    contest = Contest(comparison.Comparison(**settings), chosen, [])
    contest.asks = lambda group, say: asks(group)
    return contest.decide(make, lambda line: None)


def leaving(made: list, **changes: object):
    """A stand-in for runs that leaves records, and a list of what was asked for."""

    def make(runs) -> int:
        made.extend(runs)
        for entry, trials in compare._by_entry(runs):
            leave_records(entry.arguments(trials), **changes)
        return 0

    return make


@pytest.mark.usefixtures("composed_once")
def test_a_full_search_makes_its_runs_and_takes_what_is_finished(tmp_path) -> None:
    """With records in place of runs: nothing twice."""
    own = (*GIVEN, f"results_dir={tmp_path}")
    entries = compare.entries_of(["low_rank"], [0.3], own)
    made: list = []
    assert comparing(entries, leaving(made, best=2e-3), search="full", seeds=2) == 0
    assert {entry.best for entry in entries} == {2e-3}
    assert sum(len(entry.done) for entry in entries) == len(made) == len(set(made))
    assert len(made) >= search.runs_at_least(3, 2)
    again = compare.entries_of(["low_rank"], [0.3], own)
    assert comparing(again, leaving([], best=2e-3), search="full", seeds=2) == 0  # all of it is there
    assert [entry.done for entry in again] == [entry.done for entry in entries]
    makes: list = []
    again = compare.entries_of(["low_rank"], [0.3], own)
    comparing(again, leaving(makes), search="full", seeds=2)
    assert makes == []  # records suffice: there are no weights here
    again = compare.entries_of(["low_rank"], [0.3], (*own, "overwrite=true"))
    comparing(again, leaving(makes, best=2e-3), search="full", seeds=2)
    assert len(makes) == len(made)
    assert not any(entry.composed[trial[:2]].overwrite for entry, trial in makes)  # a paused one goes on where it is


@pytest.mark.usefixtures("composed_once")
def test_a_rate_whose_run_was_killed_is_tried_again_and_one_that_failed_by_itself_is_not(tmp_path) -> None:
    own, made = (*GIVEN, f"results_dir={tmp_path}"), []
    (entry,) = compare.entries_of(["low_rank"], [0.3], own)
    lowest, low, centre = (entry.centre / factor for factor in (4, 2, 1))
    ended = {centre: {"status": "failed", "killed": True}, lowest: {"status": "failed", "error": "not finite"}}

    def make(runs) -> int:
        for own_entry, trial in runs:
            leave_records(own_entry.arguments([trial]), best=centre, **ended.get(trial.rate, {}))
        made.extend(trial.rate for _, trial in runs)
        return 0

    assert comparing([entry], make, search="full", seeds=1, rates=2) == 1
    assert made == [low, centre, lowest]  # low is the best, and at an edge
    assert entry.killed == [centre]
    del ended[centre], made[:]
    (again,) = compare.entries_of(["low_rank"], [0.3], own)
    assert comparing([again], make, search="full", seeds=1, rates=2) == 0
    assert made == [centre, centre * 2]
    assert (again.best, again.killed) == (centre, [])


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(("hours", "last"), [(None, [2, 1]), (1e-9, [1, 1])])
def test_a_quick_comparison_asks_for_seeds_of_the_best_rate_alone_until_nothing_is_open_or_time_is_over(
    tmp_path, hours, last
) -> None:
    """But the first two always are begun."""
    entries = compare.entries_of(["low_rank", "uniform"], [0.3], (*GIVEN, f"results_dir={tmp_path}"))
    made: list = []
    looks = iter([dict.fromkeys(entries, 2), {entries[0]: 3}, {}])
    assert comparing(entries, leaving(made, best=2e-3), asks=lambda group: next(looks), hours=hours) == 0
    assert all(trial.rate == entry.best for entry, trial in made if trial.seed)
    assert [max(trial.seed for own, trial in made if own is entry) for entry in entries] == last
    assert {trial.until for _, trial in made if not trial.seed} == {search.QUARTER}  # whole records answer for the rest


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(("hours", "first"), [(None, 8), (1e-9, 2)])
def test_where_time_may_be_over_two_seeds_are_asked_for_before_all(tmp_path, hours, first) -> None:
    entries = compare.entries_of(["low_rank", "uniform"], [0.3], (*GIVEN, f"results_dir={tmp_path}"))
    for entry in entries:
        entry.best = entry.centre
    own = comparison.Comparison(methods=["low_rank", "uniform"], seeds=8, hours=hours)
    assert Contest(own, entries, []).asks(entries, lambda line: None) == dict.fromkeys(entries, first)


def test_an_interrupted_comparison_makes_no_further_runs(tmp_path) -> None:
    entries = compare.entries_of(["low_rank", "uniform"], [0.3], (*GIVEN, f"results_dir={tmp_path}"))
    launched: list = []
    assert comparing(entries, lambda runs: launched.append(runs) or 130) == 130
    assert len(launched) == 1


def test_a_run_that_another_process_holds_ends_a_comparison(tmp_path, entry) -> None:
    """Else its rate would pass for one that failed."""
    held = next(iter(compare.places_of(entry, [search.Trial(entry.centre, 0)]).values()))
    with directory.locked(held), refusal("", held):
        comparing([entry], lambda runs: 2)


@pytest.mark.usefixtures("composed_once")
def test_of_two_comparisons_at_once_one_waits_for_the_runs_of_the_other(tmp_path, monkeypatch, entry) -> None:
    trial = search.Trial(entry.centre, 0, search.QUARTER)
    ((place),) = compare.places_of(entry, [trial]).values()
    monkeypatch.setattr(compare.launch, "launch", lambda *_, **__: pytest.fail("made twice"))
    outcomes: list[str] = []
    with contextlib.ExitStack() as other:
        other.enter_context(directory.locked(place))

        def the_other_ends(seconds: float) -> None:
            leave_records(entry.arguments([trial]))
            other.close()

        monkeypatch.setattr(compare, "time", types.SimpleNamespace(sleep=the_other_ends))
        compare.side_by_side([(entry, trial)], 1, lambda *each: outcomes.append(each[-1].status))
    assert outcomes == ["skipped"]


@pytest.mark.usefixtures("composed_once")
def test_runs_side_by_side_have_different_slots(tmp_path, monkeypatch, entry) -> None:
    slots, both = [], threading.Barrier(2, timeout=60)

    def launched(*_, slot: int, **__) -> launch.Outcome:
        both.wait()
        slots.append(slot)
        return launch.Outcome(tmp_path, "finished")

    monkeypatch.setattr(compare.launch, "launch", launched)
    trials = [search.Trial(entry.centre * factor, 0) for factor in (1, 2, 3, 4)]
    compare.side_by_side([(entry, trial) for trial in trials], 2, lambda *each: None)
    assert sorted(slots) == [0, 0, 1, 1]


@pytest.mark.parametrize("given", ["trainer: {learning_rate: 3e-5}", "trainer.learning_rate: 3e-5"])
def test_a_learning_rate_in_a_file_is_where_searches_begin(given: str, tmp_path) -> None:
    (tmp_path / "own.yaml").write_text(f"model: tiny_vit\n{given}\n", encoding="utf-8")
    own = (str(tmp_path / "own.yaml"), f"results_dir={tmp_path}")
    assert [each.centre for each in compare.entries_of(["lora", "low_rank"], [0.13], own)] == [3e-5, 6e-5]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ([], "methods"),
        (["method=lora"], "method=lora"),
        (["methods=[]"], "methods"),
        (["methods=[partial"], "methods"),
        (["methods=[low_rank]", "budgets=[some]"], "budgets"),
        (["methods=[low_rank]", "budgets=[inf]"], "budgets"),
        (["methods=[low_rank]", "seeds=0"], "seeds"),
        (["methods=[low_rank]", "rates=1"], "rates"),
        (["methods=[low_rank]", "margin=0"], "margin"),
        (["methods=[low_rank]", "hours=-1"], "hours"),
        (["methods=[low_rank]", "jobs=0"], "jobs"),
        (["methods=[low_rank]", "search=fast"], "search"),
        (["methods=[low_rank]", "limit.seconds=2KB"], "limit.seconds"),
        (["methods=[low_rank]", "limit.kept=1MB", "limit.seconds=1"], "limit"),
        (["methods=[low_rank]", "limit.rows=1"], "limit"),
        (["methods=[low_rank]", "reference=lora"], "reference"),
        (["methods=[nothing]"], "method"),
        (["methods=[low_rank]", "trainer.nothing=1"], "trainer.nothing"),
        (["methods=[low_rank]", "seed=5"], "seed"),
        (["methods=[low_rank]", "+method=dora"], "method"),
        (["methods=[low_rank]", "calibration.budget=0.02"], "calibration.budget"),
        (["methods=[shira]", "model=tiny_vit,tiny_clip"], "model"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_its_key(arguments: list[str], key: str, tmp_path) -> None:
    done = here(tmp_path, "compare", *arguments)
    assert done.returncode == 2
    assert key in done.stderr.splitlines()[0]
    assert not list(tmp_path.glob("results*"))


def test_what_one_verdict_cannot_tell_apart_is_refused(tmp_path) -> None:
    overrides = (*GIVEN, f"results_dir={tmp_path}")
    (one,) = compare.entries_of(["low_rank"], [0.3], overrides)
    (twin,) = compare.entries_of(["low_rank"], [0.3], (*overrides, "method.alpha=4"))
    (elsewhere,) = compare.entries_of(["lora"], [0.3], (*GIVEN, f"results_dir={tmp_path}/other"))
    with refusal("methods: low_rank, 0.3"):
        compare.refuse_twins([one, twin])
    with refusal("results_dir", tmp_path / "other"):
        compare.refuse_twins([one, elsewhere])
    compare.refuse_twins([one])


def test_a_recorded_rate_of_many_digits_is_the_rate_of_its_seeds() -> None:
    rate = 0.0012345678
    entry = compare.Entry("lora", "own size", ("model=tiny_vit", "task=digits", "method=lora"), best=rate)
    (config,) = entry.configs([search.Trial(rate, 1)]).values()
    assert config.trainer.learning_rate == rate


def test_a_results_directory_is_taken_however_it_is_set_and_a_limit_has_no_budgets_beside_it() -> None:
    for given in ("results_dir=there", "+results_dir=there", "++results_dir=there"):
        _, others = comparison.read(["methods=[lora]", given])
        assert [each for each in others if "results_dir" in each] == [given]
    with refusal("budgets="):
        comparison.read(["methods=[lora]", "budgets=[0.02]", "limit.served=40MB"])


def test_a_number_of_seeds_is_of_a_method_that_stands_alone_too() -> None:
    entry = compare.Entry("lora", "own size", (), best=1e-3)
    entry.done = {seed: record(seed=seed, trainer__learning_rate=1e-3) for seed in range(2)}
    contest = Contest(comparison.Comparison(methods=["lora"], seeds=3), [entry], [])
    assert contest.asks([entry], pytest.fail) == {entry: 3}


def test_rows_that_cannot_be_read_are_refused_once_and_before_any_run(tmp_path) -> None:
    (tmp_path / "one.csv").write_text("text,label\n" + "a film,good\n" * 20)
    chosen = ("compare", "model=tiny_bert", "task=text_table", "methods=[low_rank,lora,dora]")
    for given, names in (((), "task.data_files"), (("task.data_files=one.csv",), "good")):
        done = here(tmp_path, *chosen, *given)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("partial-lora: ")]
        assert (done.returncode, names in line) == (2, True)
    assert not list(tmp_path.glob("results*"))


@pytest.fixture
def composed_once(monkeypatch) -> None:
    """A test and the comparison that it looks at compose the same runs: each is composed at its first mention."""
    checked = functools.cache(lambda *arguments: compare_checked(arguments))
    monkeypatch.setattr(compare, "checked", lambda arguments: checked(*arguments))


compare_checked = compare.checked


def test_a_limit_gives_every_method_its_largest_size_and_names_the_nearest_of_one_that_has_none(tmp_path) -> None:
    """By the file that is served, which for masks of single entries is the dense adapter's."""
    own = (*GIVEN, f"results_dir={tmp_path}")
    found = compare.entries_of(["low_rank", "entries"], [0.5, 0.25], own)
    dense = max(entry.served for entry in found)
    kept = compare.fitting(found, {"served": 0.4 * dense})
    assert [(entry.method, entry.size) for entry in kept if entry.refused is None] == [("low_rank", "0.25")]
    assert "limit.served" in kept[-1].refused
    assert len({entry.group for entry in kept}) == 1
    own = compare.entries_of(["low_rank"], [0.5, 0.25], own)
    sizes = [compare.cost_of(entry, "kept") for entry in own]  # counted, not measured
    assert sizes[0] > sizes[1]
    (within,) = compare.fitting(own, {"kept": sizes[1]})
    assert within is own[1]


def test_methods_under_a_limit_are_compared_within_one_task_and_model(tmp_path) -> None:
    overrides = (*GIVEN, f"results_dir={tmp_path}")
    of_tasks = [compare.entries_of(["low_rank"], [0.25], (*overrides, f"task.name={name}")) for name in ("one", "two")]
    kept = [entry for entries in of_tasks for entry in compare.fitting(entries, {"served": 1e9})]
    compare.refuse_twins(kept)
    assert [entry.group.split(", ")[0] for entry in kept] == ["one", "two"]
    assert all(entry.group.endswith(compare.in_words({"served": 1e9})) for entry in kept)


def test_runs_go_side_by_side_where_cores_and_memory_allow_and_one_by_one_on_an_accelerator(
    tmp_path, monkeypatch, entry
) -> None:
    monkeypatch.setattr(compare, "cpu_count", lambda: 4)
    monkeypatch.setattr(compare, "has_accelerator", lambda: False)
    monkeypatch.setattr(compare.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=30))
    assert compare.jobs_at_once([entry]) == 4
    entry.timed = {"peak_memory_bytes": 12}
    assert compare.jobs_at_once([entry]) == 2
    entry.timed = {"peak_memory_bytes": 50}
    assert compare.jobs_at_once([entry]) == 1
    entry.timed = None
    monkeypatch.setattr(compare, "has_accelerator", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert compare.jobs_at_once([entry]) == 1
    (entry,) = compare.entries_of(["low_rank"], [0.3], (*GIVEN, "trainer.num_processes=1", f"results_dir={tmp_path}"))
    assert compare.jobs_at_once([entry]) == 3


def test_runs_side_by_side_share_the_cores_unless_the_user_has_set_their_threads(monkeypatch) -> None:
    monkeypatch.setattr(compare, "cpu_count", lambda: 4)
    monkeypatch.setattr(compare, "_SHARED", {})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that what the test leaves is undone
    monkeypatch.delenv("OMP_NUM_THREADS")
    for jobs, threads in ((1, None), (4, "1"), (2, "2"), (1, "4")):
        compare.share_threads(jobs)
        assert os.environ.get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    compare.share_threads(4)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_request_to_stop_while_runs_are_timed_ends_the_comparison(tmp_path, monkeypatch, entry) -> None:
    stopped = launch.Outcome(tmp_path, "interrupted", signal="SIGTERM")
    monkeypatch.setattr(compare.launch, "launch", lambda *arguments, **named: stopped)
    with pytest.raises(SystemExit) as ended:
        compare.time_entry(entry)
    assert ended.value.code == 128 + 15


def test_methods_that_servers_do_not_load_are_left_out_by_name(tmp_path) -> None:
    own = (*GIVEN, f"results_dir={tmp_path}")
    found, lines = compare.prepared(comparison.Comparison(["oft", "dora", "low_rank"], serve=True), own)
    assert [entry.method for entry in found] == ["low_rank"]
    assert [line.partition(":")[0] for line in lines] == ["oft", "dora"]
    assert compare.prepared(comparison.Comparison(["oft"], serve=True), own)[0] == []


def test_auto_takes_the_first_candidates_that_have_the_size_and_names_the_others(tmp_path, monkeypatch) -> None:
    own = (*GIVEN, f"results_dir={tmp_path}")
    monkeypatch.setattr(compare, "CANDIDATES", ("entries", "partial", "lori", "low_rank"))
    monkeypatch.setattr(compare, "TAKEN", 2)
    every, lines = compare.prepared(comparison.Comparison(["auto"]), own)
    assert [entry.method for entry in every] == ["entries", "partial", "low_rank"]  # the last is the reference
    assert lines[0].startswith("lori: ")
    few = {"served": 1.1 * min(entry.served for entry in every)}  # no single entries, whose file is the dense adapter's
    found, lines = compare.prepared(comparison.Comparison(["auto"], limit=few), own)
    assert "entries" not in [entry.method for entry in found]
    assert found[0].method == "low_rank"
    assert any(line.startswith("entries, ") for line in lines)


@pytest.mark.usefixtures("composed_once")
def test_what_has_run_is_ranked_and_a_masked_method_is_a_reference_whatever_its_form_is_called(
    tmp_path, monkeypatch
) -> None:
    """Two methods are equally good, and the runs of a third fail."""
    leave = functools.partial(leave_records, failing="unilora", mask__fan_in="kept")

    def make(runs, jobs: int, ended) -> int:
        return max(leave(entry.arguments(trials)) for entry, trials in compare._by_entry(runs))

    monkeypatch.setattr(compare, "side_by_side", make)
    monkeypatch.setattr(compare, "time_entry", lambda entry: None)
    methods = ("methods=[partial,low_rank,unilora]", "reference=partial", "calibration=fixed")
    short = ("budgets=0.3", "seeds=2", "results_dir=out")
    done = here(tmp_path, "compare", *GIVEN, *methods, *short)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "− partial row_exponent=0" in table
    assert re.search(r"\| low_rank +\| +0\.001 \| 90\.00", table)
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
    def make(runs, jobs: int, ended) -> int:
        for entry, trials in compare._by_entry(runs):
            leave_records(entry.arguments(trials), best=2e-3)
        for entry, trial in runs:
            failed = entry.method == "uniform" and trial.rate == entry.centre
            ended(entry, trial, launch.Outcome(tmp_path, "failed" if failed else "finished", error="of chance"))
        return 0

    monkeypatch.setattr(compare, "side_by_side", make)
    monkeypatch.setattr(compare, "time_entry", lambda entry: None)
    settings = (*GIVEN, "methods=[low_rank,uniform]", "budgets=0.3", "seeds=2", "jobs=1", f"results_dir={tmp_path}")
    parts = [comparison.read(settings)]
    contest = Contest.of(parts[0][0], parts)
    said, events, notes = [], [], []
    contest.measure(said.append)
    assert contest.run(said.append, watch=events.append, note=notes.append, sweep=pytest.fail) == 0
    ruling = contest.rule("a command")
    assert capsys.readouterr() == ("", "")
    assert [entry.best for entry in contest.entries] == [2e-3, 2e-3]
    assert {"low_rank, 0.3: learning rate 0.002", "uniform, 0.3: learning rate 0.002"} <= {*said}
    shares = [event["share"] for event in events]
    assert shares == sorted(shares)
    assert shares[-1] <= 1
    assert all(note.startswith("uniform, 0.3, ") for note in notes)
    ((sentences, take),) = ruling.verdicts
    assert "low_rank" in " ".join(sentences)
    assert (take / "config.yaml").is_file()
    assert certificate.found_wrong(take / "verdict.json") == []
    assert ruling.page.is_file()
