"""Tables of runs: what stands in a row, what is written, what is noted below."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from recorded_runs import leave, place, record, rows_of
from rich.console import Console

from partial_lora.report import records, seed_groups, tables
from partial_lora.report.predictions import Predictions
from partial_lora.report.records import LeftOut


def shown_of(results_dir, **options):
    return tables.readable(seed_groups.group(rows_of(results_dir)), **options)


def test_rows_that_would_read_alike_say_what_they_differ_in(tmp_path):
    plain = [place(tmp_path, record(test=test, seed=seed)) for seed, test in enumerate((0.98, 0.985, 0.9925))]
    changes = [
        {"method__rank": 64, "method__alpha": 64.0},
        {"task__label_noise": 0.4},
        {"mask__seed": 3},
        {"importance__name": "imp"},
    ]
    for number, change in enumerate(changes):
        place(tmp_path, record(test=0.9 - 0.1 * number, **change))
    place(tmp_path, record("lora", task__label_noise=0.4))
    for rate in (0.002, 0.003):
        place(tmp_path, record("targeted", trainer__learning_rate=rate))
    for id in ("1111aaaa", "2222bbbb"):
        place(tmp_path, record("dora"), id=id)
    shown = shown_of(tmp_path)
    told = dict(zip(shown["test accuracy (%)"], shown["differs in"], strict=True))
    assert told["98.58 ± 0.63"] == "–"
    assert [told[score] for score in ("90.00", "80.00", "70.00", "60.00")] == [
        "alpha=64, rank=64", "label_noise=0.4", "mask.seed=3", "importance=imp"
    ]  # fmt: skip
    by_method = shown.groupby("method")["differs in"].agg(set)
    assert by_method["lora"] == {"label_noise=0.4"}  # alone of its method, and not as most rows are
    assert by_method["targeted"] == {"learning_rate=0.002", "learning_rate=0.003"}  # nothing else tells them apart
    assert by_method["dora"] == {"1111aaaa", "2222bbbb"}  # nor does anything else these
    assert plain[0].parent.name.endswith(shown["id"][shown["differs in"] == "–"].iloc[0])


def test_rows_are_in_order_of_task_model_point_method(tmp_path):
    expected = [
        ("cifar10", "tiny_vit", "–", "probe"),
        ("cifar10", "vit", "–", "probe"),
        ("digits", "vit", "–", "lora"),
        ("digits", "vit", "threshold 0.9", "partial"),
        ("digits", "vit", "threshold 0.9", "targeted"),
        ("digits", "vit", "budget 12,000", "partial"),
        ("digits", "vit", "budget 0.5", "partial"),
        ("digits", "vit", "budget 0.13", "partial"),
        ("digits", "vit", "budget 0.13", "uniform"),
    ]
    for task, model, point, method in expected:
        budget = float(point.removeprefix("budget ").replace(",", "")) if "budget" in point else None
        place(tmp_path, record(method, task=task, model=model, budget=budget, share=0.5))
    shown = shown_of(tmp_path)
    columns = shown[["task", "model", "operating point", "method"]]
    assert list(columns.itertuples(index=False, name=None)) == expected
    assert not {"id", "differs in", "precision"} & set(shown)  # none has to be told apart


def test_a_quantity_that_does_not_apply_is_a_dash_and_a_calibration_that_was_reused_costs_nothing(tmp_path):
    place(tmp_path, record("probe"))
    for seed in (0, 1):
        place(tmp_path, record(seed=seed, calibration={"cached": seed == 1}))
    place(tmp_path, record("targeted", calibration={"cached": True}))
    shown = shown_of(tmp_path).set_index("method")
    probe = shown.loc["probe"]
    assert probe["adapter parameters"] == "0"
    assert {probe[each] for each in ("operating point", "share of dense", "sparsity", "calibrate (s)")} == {"–"}
    assert shown.loc[["partial", "targeted"], "calibrate (s)"].tolist() == ["60.0", "reused"]


def test_metrics_of_several_names_have_their_own_column_and_bytes_stand_beside_them(tmp_path):
    place(tmp_path, record(cost={"adapter_bytes": 81_000}))
    matthews = {"test": {"primary": "matthews", "matthews": 0.61}}
    place(tmp_path, record(task="cola", metrics=matthews, cost={"adapter_bytes": 4_000}))
    shown = shown_of(tmp_path)
    assert shown["metric"].tolist() == ["matthews", "accuracy"]
    assert shown["test"].tolist() == ["0.6100", "98.61 %"]
    assert shown["adapter (KB)"].tolist() == ["4", "81"]


LEFT_OUT = [
    LeftOut("a", "failed: no_space left", False),
    LeftOut("b", "missing, the run never started", False),
    LeftOut("broken", "why", True),
    LeftOut("c", "failed: another reason", False),
]


def test_three_files_begin_with_their_command(tmp_path):
    for seed in (0, 1):
        place(tmp_path, record(test=0.98 + 0.01 * seed, seed=seed, model="vit_s14"))
    place(tmp_path, record("lora", model="vit_s14"))
    runs, _ = records.read(tmp_path)
    command = "partial-lora report \\\n  results/first"
    files = tables.write(seed_groups.table(runs), tmp_path, command=command, left_out=LEFT_OUT)
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        f"report/table.{kind}" for kind in ("md", "csv", "tex")
    ]
    markdown, table, latex = (path.read_text(encoding="utf-8") for path in files)
    for text, mark in ((markdown, "    "), (table, "# "), (latex, "% ")):
        assert text.startswith(f"{mark}partial-lora report \\ results/first\n")
    assert "- broken: why" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert (len({line.count("|") for line in rows}), len(rows)) == (1, 2 + 2)
    assert str(tmp_path) not in table
    numbers = pd.read_csv(files[1], comment="#")
    assert numbers["adapter_parameters"].tolist() == [1000, 700]
    assert numbers["test_mean"].tolist() == pytest.approx([0.9861, 0.985])
    assert r"vit\_s14" in latex
    assert latex.isascii()


def test_only_an_untuned_table_has_the_warning(tmp_path):
    place(tmp_path, record())
    place(tmp_path, record(trainer__learning_rate=2e-3))
    assert tables._UNTUNED not in tables.notes(seed_groups.group(rows_of(tmp_path)))
    place(tmp_path, record("lora"))
    assert tables._UNTUNED in tables.notes(seed_groups.group(rows_of(tmp_path)))
    place(tmp_path, record("lora", trainer__learning_rate=2e-3))  # as a search leaves them
    assert tables._UNTUNED not in tables.notes(seed_groups.group(rows_of(tmp_path)))


def test_the_table_on_screen_fits_80_columns(tmp_path):
    for seed in (0, 1):
        place(tmp_path, record("random_weights", 0.98 + 0.01 * seed, seed=seed))
    place(tmp_path, record("lora", task="cifar10"))
    for rank in (16, 128):
        place(tmp_path, record(budget=250_000, share=0.5, method__rank=rank, mask__granularity="element"))
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(tables.on_screen(rows_of(tmp_path)))
    text = console.file.getvalue()
    for part in ("cifar10, vit", "digits, vit", "98.50 ± 0.71", "partial (element)  ", "budget 250,000", "rank=128"):
        assert part in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    (table,) = tables.on_screen(rows_of(tmp_path), by=["task", "method"]).renderables
    assert [str(column.header) for column in table.columns].count("method") == 1


def test_a_terminal_shows_words_in_brackets_as_they_are_written():
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(tables.drawn("t", pd.DataFrame({"form": ["target_modules=[qkv]", "[/x/y]"], "n": [1, 2]})))
    assert {"target_modules=[qkv]", "[/x/y]"} <= set(console.file.getvalue().split())


# The answer


def test_the_best_of_a_method_is_chosen_on_validation_whatever_the_seeds(tmp_path):
    def scored(validation, test, **changes):
        each = {"validation": validation, "test": test}
        splits = {name: {"primary": "accuracy", "accuracy": score} for name, score in each.items()}
        return record(test=test, metrics=splits, **changes)

    for seed in (0, 1):
        place(tmp_path, scored(0.7, 0.9, seed=seed))
        place(tmp_path, scored(0.8, 0.6, seed=seed, budget=0.13))
        place(tmp_path, record("lora", 0.7, seed=seed))
    place(tmp_path, scored(0.8, 0.7, budget=0.3))  # as good, but of one seed
    place(tmp_path, record("probe", 1.0, trainer__epochs=50.0))  # under other conditions than most
    best = tables.best_of_each(seed_groups.group(rows_of(tmp_path)))
    assert list(zip(best["method"], best["operating_point"], strict=True)) == [
        ("lora", "–"),
        ("partial", "budget 0.13"),
    ]
    place(tmp_path, scored(0.99, 0.88, budget=0.5))
    best = tables.best_of_each(seed_groups.group(rows_of(tmp_path)))
    assert best[["method", "operating_point", "n"]].values.tolist()[0] == ["partial", "budget 0.5", 1]
    worse = record("lora", 3.0, metrics={"test": {"primary": "mse", "mse": 3.0}}, task="cars")
    place(tmp_path, worse)
    place(tmp_path, record("dora", metrics={"test": {"primary": "mse", "mse": 2.0}}, task="cars"))
    best = tables.best_of_each(seed_groups.group(rows_of(tmp_path)))
    assert best.query("task == 'cars'")["method"].tolist() == ["dora", "lora"]  # of mse less is better


def test_of_a_search_only_the_best_rate_on_validation_is_drawn_and_it_has_the_most_seeds(tmp_path):
    def left(rate: float, seed: int, score: float, **changes: object) -> None:
        scores = {"primary": "accuracy", "accuracy": score, "loss": 1 - score}
        metrics = {"validation": scores, "test": scores}
        leave(tmp_path, test=score, seed=seed, id=f"{rate:g}", trainer__learning_rate=rate, metrics=metrics, **changes)

    for seed in range(2):
        left(1e-3, seed, 0.7)
        left(2e-3, seed, 0.8)
    left(4e-3, 0, 0.9)  # a lucky seed, alone
    left(8e-3, 0, 0.1, method="lora")
    left(3e-3, 0, 0.2, mask__granularity="element")  # another method, whatever its name
    best = seed_groups.without_searches(seed_groups.folders(records.read(tmp_path)[0]))
    assert sorted(each.row["learning_rate"] for each in best) == [2e-3, 3e-3, 8e-3]


def test_a_generation_is_chosen_by_its_perplexity_on_validation(tmp_path):
    """Its texts are written for test rows alone: the best of these may be so by chance."""
    for seed, (budget, perplexity, exact) in enumerate([(0.5, 9.0, 0.9), (0.13, 3.0, 0.2)]):
        validation = {"primary": "perplexity", "perplexity": perplexity, "loss": 1.0}
        metrics = {"validation": validation, "test": {"primary": "exact_match", "exact_match": exact}}
        place(tmp_path, record(test=exact, seed=seed, budget=budget, metrics=metrics))
    best = tables.best_of_each(seed_groups.group(rows_of(tmp_path)))
    assert best["operating_point"].tolist() == ["budget 0.13"]


def test_the_smallest_nearly_as_good_has_as_many_seeds(tmp_path):
    for seed in (0, 1):
        place(tmp_path, record("lora", 0.9, seed=seed))
        place(tmp_path, record(test=0.895, seed=seed, budget=0.5))
        place(tmp_path, record(test=0.85, seed=seed, budget=0.13))
    place(tmp_path, record(test=0.9, budget=0.01))
    table = seed_groups.group(rows_of(tmp_path))
    best = table[table["method"] == "lora"].iloc[0]
    assert tables.smallest_within(table, best)["operating_point"] == "budget 0.5"
    assert tables.smallest_within(table[table["method"] == "lora"], best) is None


def test_an_interval_is_over_seeds_else_over_examples_and_no_wider_than_the_metric(tmp_path):
    for seed, wrong in enumerate((0, 40)):
        leave(tmp_path, "partial", wrong=wrong, seed=seed)
    leave(tmp_path, "lora", wrong=20)
    leave(tmp_path, "dora", 0.9)
    rows = {row["method"]: row for _, row in seed_groups.group(rows_of(tmp_path)).iterrows()}
    predictions = Predictions(tmp_path)
    assert tables.interval(rows["partial"], predictions) == (0.0, 1.0, "seeds")
    *ends, over = tables.interval(rows["lora"], predictions)
    assert ends == pytest.approx([0.8506, 0.9343], abs=1e-4)  # Wilson's, of 180 in 200
    assert over == "examples"
    assert tables.interval(rows["dora"], predictions) is None
    row = {"metric": "pearson", "test_mean": 0.9, "test_half": 0.3}
    assert tables.interval(pd.Series(row), predictions) == (pytest.approx(0.6), 1.0, "seeds")
