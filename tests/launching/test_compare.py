"""A comparison of methods: which runs a search makes, what it ends with, and what is refused before any starts."""

from __future__ import annotations

import functools
import math
import re

import pytest
from commands import here
from recorded_runs import record
from refusals import refusal

from partial_lora import cli
from partial_lora.files import write_json
from partial_lora.launching import compare, directory
from partial_lora.launching.places import run_directory
from partial_lora.settings import comparison, schema


def searched(score, *, centre=1.0, count=5, seeds=3, known=()):
    """The best rate, and the batches of runs of a search in which a run's score is a function of its rate and seed."""
    searching, batches = compare.search(centre, count, seeds, known), []
    runs = next(searching)
    while True:
        batches.append(runs)
        scores = {run: score(*run) for run in runs}
        worth = {
            run: value if value is None or isinstance(value, tuple) else (value, 0.0) for run, value in scores.items()
        }
        try:
            runs = searching.send(worth)
        except StopIteration as end:
            return end.value, batches


def test_the_better_half_of_the_rates_goes_on_to_the_next_seed() -> None:
    best, batches = searched(lambda rate, seed: -abs(math.log2(rate)))
    assert best == 1.0
    assert batches == [
        [(0.25, 0), (0.5, 0), (1.0, 0), (2.0, 0), (4.0, 0)],
        [(1.0, 1), (0.5, 1), (2.0, 1)],
        [(1.0, 2), (0.5, 2)],
    ]
    assert sum(map(len, batches)) == compare.runs_at_least(5, 3)


def test_a_best_at_an_edge_extends_the_range_until_it_is_inside() -> None:
    best, batches = searched(lambda rate, seed: -abs(math.log2(rate / 16)))
    assert best == 16.0
    assert batches[1:4] == [[(8.0, 0)], [(16.0, 0)], [(32.0, 0)]]
    _, batches = searched(lambda rate, seed: rate)  # ever better: it comes to an end
    assert len({rate for each in batches for rate, _ in each}) == 12


def test_a_search_goes_on_with_the_rates_that_were_tried_wherever_it_would_begin_now() -> None:
    _, earlier = searched(lambda rate, seed: -abs(math.log2(rate / 4)), count=3)
    tried = {rate for each in earlier for rate, seed in each if seed == 0}
    best, again = searched(lambda rate, seed: -abs(math.log2(rate / 4)), centre=64.0, count=3, known=tried)
    assert best == 4.0
    assert {run for each in again for run in each} == {run for each in earlier for run in each}
    assert searched(lambda rate, seed: 0.0, count=3, known=[7.0, 9.0])[1][0] == [(0.5, 0), (1.0, 0), (2.0, 0)]


def test_where_no_rate_has_learned_anything_the_loss_extends_the_range() -> None:
    lucky = {1.0: 0.1, 16.0: 1.0}  # a score by chance, in the middle of the first rates
    best, batches = searched(lambda rate, seed: (lucky.get(rate, 0.0), -abs(math.log2(rate / 16))))
    assert best == 16.0
    assert batches[1:4] == [[(8.0, 0)], [(16.0, 0)], [(32.0, 0)]]


def test_the_mean_over_seeds_decides() -> None:
    """A rate that leads with the first seed alone loses."""
    best, _ = searched(
        lambda rate, seed: {(1.0, 0): 1.0, (2.0, 0): 0.9}.get((rate, seed), rate / 10 if rate <= 2 else 0)
    )
    assert best == 2.0


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_a_run_whose_score_or_loss_is_no_number_is_worth_nothing(name) -> None:
    run = record()
    assert compare.worth(run) is not None
    run["metrics"]["validation"][name] = None  # as JSON has NaN
    assert compare.worth(run) is None


def test_rates_that_fail_go_no_further_and_a_search_of_failures_has_no_best() -> None:
    best, batches = searched(lambda rate, seed: None if rate > 1 else rate)
    assert best == 1.0
    assert all(rate <= 1 for each in batches[2:] for rate, _ in each)
    assert searched(lambda rate, seed: None)[0] is None
    assert searched(lambda rate, seed: None if seed else rate / 4 if rate < 4 else 0)[0] is None


composed = functools.cache(lambda *arguments, checked=compare.checked: checked(arguments))


@pytest.fixture(autouse=True)
def composed_once(monkeypatch, tmp_path) -> None:
    """Comparisons and what looks at them compose the same runs: each is composed at its first mention."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "checked", lambda arguments: composed(*arguments))


GIVEN = ("model=tiny_vit", "task=digits", "method.rank=32", "results_dir=out")
SHORT = ("rates=3", "seeds=2")


def test_every_method_is_at_every_budget_and_those_of_their_own_size_once() -> None:
    entries = compare.entries(["lora", "low_rank", "dora", "lokr", "hira"], [0.13, 0.3], GIVEN)
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
    (written_out,) = compare.entries(["hira"], [0.3], (*GIVEN, "trainer.learning_rate=auto"))
    assert written_out.centre == centres["hira"]
    (counted,) = compare.entries(["low_rank", "low_rank"], [1234567, 1234567], GIVEN)
    assert "calibration.budget=1234567" in counted.overrides  # to the last parameter


def test_a_folder_for_results_may_be_named_in_a_file_of_settings(tmp_path) -> None:
    chosen = ["methods=[low_rank]", str(tmp_path / "own.yaml")]
    (tmp_path / "own.yaml").write_text("task: digits\nresults_dir: here\n", encoding="utf-8")
    assert not [each for each in comparison.read(chosen)[1] if each.startswith("results_dir=")]
    record = "".join(f"{group}: {{}}\n" for group in schema.SECTIONS) + "results_dir: there\n"
    for content in ("task: digits\n", record):  # a run's config.yaml has the folder of that run, for other results
        (tmp_path / "own.yaml").write_text(content, encoding="utf-8")
        assert "results_dir=results/compare" in comparison.read(chosen)[1]


def leave_records(arguments: list[str], best: float = 1e-3, failing: str = "", **changes: object) -> int:
    """Only write the records of a sweep's runs, better the nearer their rate is to the best. changes: of records."""
    for _, config in compare.checked(arguments).runs:
        score = 0.9 - abs(math.log2(config.trainer.learning_rate / best)) / 10
        left = record(config.method.name, score, budget=0.3, seed=config.seed, fixed={"budget": 0.3}, **changes)
        left["config"]["trainer"]["learning_rate"] = config.trainer.learning_rate
        failed = {"status": "failed", "error": "the loss is not finite"} if config.method.name == failing else {}
        run_directory(config).mkdir(parents=True, exist_ok=True)
        write_json(run_directory(config) / "result.json", left | failed)
    return 0


def test_a_comparison_makes_the_runs_of_every_search_and_takes_what_is_finished() -> None:
    """With a launcher that only writes records: the ranking, and nothing twice."""
    entries = compare.entries(["low_rank", "uniform"], [0.3], GIVEN)
    launched: list[list[str]] = []
    said: list[str] = []

    def launch(arguments: list[str]) -> int:
        launched.append(arguments)
        return leave_records(arguments, best=2e-3)

    assert compare.compare(entries, rates=3, seeds=2, launch=launch, say=said.append) == 0
    assert {entry.best for entry in entries} == {2e-3}
    assert sum(len(entry.done) for entry in entries) == sum(each[-1].count(",") + 1 for each in launched)
    assert all("left" in each for each in said)
    made = len(launched)
    again = compare.entries(["low_rank", "uniform"], [0.3], GIVEN)
    assert compare.compare(again, rates=3, seeds=2, launch=launch, say=said.append) == 0  # all of it is there
    assert [entry.done for entry in again] == [entry.done for entry in entries]
    assert len(launched) == made  # records suffice: there are no weights here
    again = compare.entries(["low_rank", "uniform"], [0.3], (*GIVEN, "overwrite=true"))
    assert compare.compare(again, rates=3, seeds=2, launch=launch, say=said.append) == 0
    assert len(launched) == 2 * made


def test_a_comparison_never_says_that_more_runs_are_left_than_it_makes() -> None:
    entries = compare.entries(["low_rank", "uniform"], [0.3], GIVEN)
    made: list[int] = []
    said: list[str] = []

    def launch(arguments: list[str]) -> int:
        made.append(arguments[-1].count(",") + 1)
        return leave_records(arguments, best=16e-3)  # three rungs above the first rate

    compare.compare(entries, rates=2, seeds=2, launch=launch, say=said.append)
    left = [int(re.search(r"(\d+) left", line)[1]) for line in said]
    assert all(0 < least <= sum(made[place:]) for place, least in enumerate(left))
    assert left[-1] == made[-1]
    said.clear()
    again = compare.entries(["low_rank", "uniform"], [0.3], GIVEN)
    compare.compare(again, rates=2, seeds=2, launch=launch, say=said.append)
    assert "at least 0 left" in said[-1]


def test_an_interrupted_comparison_makes_no_further_runs() -> None:
    entries = compare.entries(["low_rank", "uniform"], [0.3], GIVEN)
    launched: list[list[str]] = []
    code = compare.compare(entries, rates=3, seeds=2, launch=lambda each: launched.append(each) or 130, say=print)
    assert (code, len(launched)) == (130, 1)


def test_a_run_that_another_process_holds_ends_a_comparison() -> None:
    """Else its rate would pass for one that failed."""
    (entry,) = compare.entries(["low_rank"], [0.3], GIVEN)
    held = next(iter(compare.places_of(entry, [(entry.centre, 0)]).values()))
    with directory.locked(held), refusal("", held):
        compare.compare([entry], rates=3, seeds=2, launch=lambda each: 2, say=print)


@pytest.mark.parametrize("given", ["trainer: {learning_rate: 3e-5}", "trainer.learning_rate: 3e-5"])
def test_a_learning_rate_in_a_file_is_where_searches_begin(given: str, tmp_path) -> None:
    (tmp_path / "own.yaml").write_text(f"model: tiny_vit\n{given}\n", encoding="utf-8")
    own = (str(tmp_path / "own.yaml"), f"results_dir={tmp_path}")
    assert [each.centre for each in compare.entries(["lora", "low_rank"], [0.13], own)] == [3e-5, 6e-5]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ([], "methods"),
        (["methods=[]"], "methods"),
        (["methods=[partial"], "methods"),
        (["methods=[1]"], "methods"),
        (["methods=[low_rank]", "budgets=[some]"], "budgets"),
        (["methods=[low_rank]", "budgets=[-1e-1]"], "budgets"),
        (["methods=[low_rank]", "budgets=[inf]"], "budgets"),
        (["methods=[low_rank]", "seeds=0"], "seeds"),
        (["methods=[low_rank]", "seeds=true"], "seeds"),
        (["methods=[low_rank]", "rates=1"], "rates"),
        (["methods=[low_rank]", "reference=lora"], "reference"),
        (["methods=[nothing]"], "method"),
        (["methods=[low_rank]", "trainer.nothing=1"], "trainer.nothing"),
        (["methods=[low_rank]", "seed=5"], "seed"),
        (["methods=[low_rank]", "+method=dora"], "method"),
        (["methods=[low_rank]", "calibration.budget=0.02"], "calibration.budget"),
        (["methods=[low_rank]", "model=tiny_vit,tiny_clip"], "model"),
        (["methods=[shira]", "model=tiny_vit,tiny_clip"], "model"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_its_key(arguments: list[str], key: str, tmp_path) -> None:
    done = here(tmp_path, "compare", *arguments)
    assert done.returncode == 2
    assert key in done.stderr.splitlines()[0]
    assert not list(tmp_path.glob("results*"))


def test_rows_that_cannot_be_read_are_refused_once_and_before_any_run(tmp_path) -> None:
    (tmp_path / "one.csv").write_text("text,label\n" + "a film,good\n" * 20)
    chosen = ("compare", "model=tiny_bert", "task=text_table", "methods=[low_rank,lora,dora]")
    for given, names in (((), "task.data_files"), (("task.data_files=one.csv",), "good")):
        done = here(tmp_path, *chosen, *given)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("partial-lora: ")]
        assert (done.returncode, names in line) == (2, True)
    assert not list(tmp_path.glob("results*"))


def test_what_has_run_is_ranked_and_a_masked_method_is_a_reference_whatever_its_form_is_called(
    tmp_path, monkeypatch
) -> None:
    """Two methods are equally good, and the runs of a third fail."""
    leave = functools.partial(leave_records, failing="unilora", mask__fan_in="kept")
    monkeypatch.setattr(cli, "_stage", lambda stage, arguments: leave(arguments))
    methods = ("methods=[partial,low_rank,unilora]", "reference=partial", "calibration=fixed")
    done = here(tmp_path, "compare", *GIVEN, *methods, "budgets=0.3", *SHORT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "− partial row_exponent=0" in table
    assert re.search(r"\| low_rank +\| +0\.001 \| 90\.00", table)
    assert "+0.00" in table
    assert "unilora, 0.3: the loss is not finite" in done.stderr
