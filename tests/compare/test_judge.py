"""Finished scores, whoever made them: what is read of each kind of file, and what is decided by it."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from recorded_runs import LABEL, leave, place, record
from refusals import refusal

from partial_lora import cli
from partial_lora.compare import judge, scores
from partial_lora.compare.judge_options import Judging
from partial_lora.compare.scores import Scores
from partial_lora.files import read_json
from partial_lora.report import sequential, write_pack


def drawn(chances: dict[str, float], seeds: int, rows: int, spread: float = 0.02) -> dict[str, dict[int, np.ndarray]]:
    """What each row adds to an accuracy: rows are easy or hard for all, seeds lucky or not."""
    generator = np.random.default_rng(0)
    easy = generator.normal(0, 0.2, rows)
    return {
        name: {
            seed: (generator.uniform(size=rows) < chance + easy + generator.normal(0, spread)).astype(float)
            for seed in range(seeds)
        }
        for name, chance in chances.items()
    }


def of(outputs: dict, **options) -> Scores:
    return Scores("digits", "accuracy", outputs, **options)


def by_method(judgement: judge.Judgement) -> dict[str, judge.Line]:
    return {line.method: line for line in judgement.lines}


# What is decided


@pytest.mark.parametrize("rows", [1, 300])
def test_seeds_are_judged_as_a_comparison_that_looks_once_judges_them(rows):
    outputs = drawn({"a": 0.9, "b": 0.89, "c": 0.7, "d": 0.86}, 5, 300)
    if rows == 1:
        for seeds in outputs.values():
            seeds |= {seed: one.mean(keepdims=True) for seed, one in seeds.items()}
    found, expected = judge.judged(of(outputs), 3.0), sequential.decide(outputs, 0.03, (5,))
    assert found.first.method == expected.leader
    assert {line.verdict for line in found.others} > {sequential.WORSE}
    for line in found.others:
        standing = expected.by_method[line.method]
        assert (line.verdict, line.seeds_wanted or None) == (standing.verdict, standing.wants)
        ends = (-standing.difference, -standing.high, -standing.low)
        assert (line.difference, line.low, line.high) == pytest.approx(ends)
        assert line.basis == ("seeds" if rows == 1 else "seeds and rows")


def test_beside_a_reference_a_method_may_be_better_and_there_are_fewer_comparisons():
    outputs = drawn({"a": 0.9, "b": 0.88, "c": 0.6}, 4, 200)
    led, beside = judge.judged(of(outputs), 1.0), judge.judged(of(outputs), 1.0, "c")
    assert (led.comparisons, beside.comparisons) == (3, 2)
    assert [line.verdict for line in beside.lines] == ["reference", "better", "better"]
    there, back = by_method(led)["c"], by_method(beside)[led.first.method]
    assert back.difference == pytest.approx(-there.difference)
    assert back.high - back.low < there.high - there.low
    other = Scores("other", "accuracy", {name: outputs[name] for name in "ab"})
    sets = scores.Found([of(outputs), other], [])
    assert [one.scores.title for one in judge.every(sets, 1.0, "c")] == ["digits"]
    assert any(line.startswith("other: no c") for line in sets.left_out)
    assert judge._named(["a, budget 0.13", "a, threshold 0.9", "b, budget 0.13"], "b") == "b, budget 0.13"
    assert judge._named(["a, budget 0.13", "a, threshold 0.9"], "a") is None
    with refusal("reference", "nobody"):
        judge.every(sets, 1.0, "nobody")


def test_less_may_be_better_and_the_margin_is_in_the_metrics_own_unit():
    means = {"a": 3.0, "b": 5.0}
    losses = {name: {seed: np.array([mean + seed / 100]) for seed in range(4)} for name, mean in means.items()}
    losses["b"][0] += 0.004  # else nothing would say how seeds move a difference
    found = judge.judged(Scores("cars", "mse", losses, lower_is_better=True), 0.5)
    assert (found.first.method, found.others[0].verdict, found.scores.point) == ("a", "worse", 1.0)
    assert found.others[0].difference < 0


def test_a_single_seed_beside_several_decides_nothing_and_seeds_of_other_numbers_pair_in_their_order():
    outputs = drawn({"a": 0.9, "b": 0.5, "lucky": 0.99}, 4, 200)
    outputs["lucky"] = {0: outputs["lucky"][0]}
    found = by_method(judge.judged(of(outputs), 1.0))
    assert (found["a"].verdict, found["lucky"].verdict, found["lucky"].seeds_wanted) == ("leads", "open", 2)
    others = {"a": outputs["a"], "b": {seed + 7: one for seed, one in outputs["b"].items()}}
    alone = {name: outputs[name] for name in "ab"}
    assert judge.judged(of(others), 1.0).lines == judge.judged(of(alone), 1.0).lines


def test_more_of_the_rows_that_are_wanted_decide():
    """One seed, as of a benchmark of models: rows that are wanted are drawn from those that are there."""
    outputs = drawn({"a": 0.82, "b": 0.78}, 1, 300)
    (line,) = judge.judged(of(outputs), 1.0).others
    assert (line.verdict, line.basis) == ("open", "rows of one seed")
    times = math.ceil(line.rows_wanted / 300)
    many = {name: {0: np.tile(one[0], times)} for name, one in outputs.items()}
    assert judge.judged(of(many), 1.0).others[0].verdict == "worse"
    fewer = {name: {0: np.tile(one[0], times // 2)} for name, one in outputs.items()}
    assert judge.judged(of(fewer), 1.0).others[0].verdict == "open"


def test_of_one_seed_without_rows_a_bound_holds_whatever_rows_the_scores_are_of():
    """Told apart at a correlation of rows: just then their own rows tell them apart, too."""
    n, right = 1000, {"a": 800, "b": 700, "c": 770, "d": 798}
    whole = of({name: {0: np.array([count / n])} for name, count in right.items()}, rows=dict.fromkeys(right, n))
    found = judge.judged(whole, 1.0)
    lines = by_method(found)
    assert {line.basis for line in found.others} == {"binomial bound"}
    assert (lines["b"].verdict, lines["b"].correlation, lines["d"].correlation) == ("worse", 0, None)
    assert 0.2 < lines["c"].correlation < 0.9
    at = lines["c"].correlation
    assert [found.untold(each) for each in (0.0, at - 0.01, at, None)] == [2, 2, 1, 1]

    def of_rows(name: str, shared: int) -> tuple[str, float]:
        """The verdict and correlation where the best is right on `shared` of the rows on which `name` is."""
        first = np.arange(n) < right["a"]
        own = np.zeros(n, bool)
        own[:shared] = own[right["a"] : right["a"] + right[name] - shared] = True
        rows = {"a": {0: first.astype(float)}, name: {0: own.astype(float)}}
        rows |= {other: {0: first.astype(float)} for other in right if other not in rows}  # as many comparisons
        line = by_method(judge.judged(of(rows), 1.0, None))[name]
        correlation = np.corrcoef(first, own)[0, 1]
        return line.verdict, correlation

    for shared in range(620, 771, 10):
        verdict, correlation = of_rows("c", shared)
        if abs(correlation - lines["c"].correlation) > 0.03:
            assert (verdict == "worse") == (correlation > lines["c"].correlation), shared
    wrong = {name: {0: 1 - one[0]} for name, one in whole.by_row.items()}
    turned = judge.judged(of(wrong, rows=whole.rows, lower_is_better=True), 1.0)
    assert [(line.method, line.verdict, line.rows_wanted) for line in turned.others] == [
        (line.method, line.verdict, line.rows_wanted) for line in found.others
    ]
    unknown = judge.judged(of(whole.by_row), 1.0)
    assert {(line.verdict, line.basis) for line in unknown.others} == {("open", "nothing")}


@pytest.mark.parametrize(
    ("shares", "rows"),
    [([636 / 1319, 0.0, 300 / 1319], 1319), ([0.482, 0.5], None), ([0.12345678912345, 0.3], None), ([0.5, 3.0], None)],
)
def test_rows_behind_shares_are_told_by_their_digits_unless_these_were_rounded(shares, rows):
    assert scores.rows_behind(shares) == rows


# What is read


def samples(folder, model: str, right: np.ndarray, task: str = "digits") -> None:
    """Samples as lm-eval writes them, with a second filter that is worse."""
    (folder / model).mkdir(parents=True, exist_ok=True)
    lines = [
        {"doc_id": row, "doc_hash": f"h{row}", "filter": name, "metrics": ["exact_match"], "exact_match": score}
        for name, scored in (("strict", right), ("flexible", np.zeros(len(right))))
        for row, score in reversed([*enumerate(map(float, scored))])
    ]
    text = "\n".join(map(json.dumps, lines))
    (folder / model / f"samples_{task}_2026-01-02T03-04-05.678901.jsonl").write_text(text)
    (folder / model / "results_2026-01-02T03-04-05.678901.json").write_text("{}")


def published(folder, name: str, score: float, seed: int = 0, status: str = "success", at: str = "2026-01-01") -> None:
    """A result as PEFT's method_comparison has them, as far as it is read."""
    config = {"model_id": "meta/tiny", "seed": seed}
    seen = [{"step": 1, "valid accuracy": 0.3}, {"step": 2, "test accuracy": score, "train loss": 1.0}]
    content = {
        "run_info": {"experiment_name": name, "created_at": at, "train_config": config},
        "train_info": {"status": status, "metrics": seen},
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name.replace('/', '--')}-{seed}-{at}.json").write_text(json.dumps(content))


def judged(places, **options) -> list[judge.Judgement]:
    return [judge.judged(one, 1.0) for one in scores.read(places, **options).sets]


def numbers(judgement: judge.Judgement) -> dict:
    return {
        line.method.partition(",")[0]: (line.verdict, line.basis, round(line.difference, 12), round(line.low, 12))
        for line in judgement.lines
    }


def test_runs_their_pack_and_tables_of_the_same_rows_or_scores_are_judged_alike(tmp_path):
    runs, wrong = tmp_path / "runs_of", {"partial": 10, "targeted": 13, "lora": 60}
    lines = []
    for method, count in wrong.items():
        for seed in range(3):
            bad = count + seed * (1 + len(method) % 3)
            leave(runs, method, wrong=bad, seed=seed)
            of_run = {"Model": method, "seed": seed}
            lines += [of_run | {"row": f"r{row}", "correct": row >= bad} for row in range(len(LABEL))]
    table = pd.DataFrame(lines)
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "rows.csv", index=False)
    means = table.groupby(["Model", "seed"])["correct"].mean().rename("score")
    means.reset_index().to_csv(tmp_path / "s.csv", index=False)
    (of_runs,), (of_rows,), (of_scores,) = judged([runs]), judged([tmp_path / "rows.csv"]), judged([tmp_path / "s.csv"])
    assert numbers(of_runs) == numbers(of_rows)
    assert {line.basis for line in of_runs.others} == {"seeds and rows"}
    assert {line.basis for line in of_scores.others} == {"seeds"}
    assert numbers(of_scores).keys() == numbers(of_runs).keys()
    folders = sorted(runs.glob("runs/*/*/*/seed*"))
    assert numbers(judged(folders)[0]) == numbers(of_runs)
    write_pack.pack(runs, remove=True)
    assert numbers(judged([runs])[0]) == numbers(judged([runs / "runs.parquet"])[0]) == numbers(of_runs)
    (some,) = judged([runs], where=["method=partial,lora"])
    assert numbers(some).keys() == {"partial", "lora"}


def test_runs_under_other_conditions_or_without_rows_are_no_rows_of_a_set(tmp_path):
    for seed in (0, 1):
        leave(tmp_path, "partial", wrong=10 + seed, seed=seed)
        leave(tmp_path, "lora", wrong=20, seed=seed)
        leave(tmp_path, "dora", 0.9, seed=seed)  # without predictions
        leave(tmp_path, "lora", wrong=9, seed=seed, trainer__epochs=50.0)
    place(tmp_path, record("probe", seed=3, task="cifar10"))
    found = scores.read([tmp_path])
    (one,) = found.sets
    bases = {line.method.partition(",")[0]: line.basis for line in judge.judged(one, 1.0, "lora").others}
    assert bases == {"partial": "seeds and rows", "dora": "seeds"}
    assert len(found.left_out) == 2  # alone in their sets


def test_samples_of_lm_eval_are_rows_of_one_seed(tmp_path):
    generator = np.random.default_rng(1)
    right = {name: generator.uniform(size=80) < chance for name, chance in (("base", 0.9), ("small", 0.4))}
    for model, rows in right.items():
        samples(tmp_path, model, rows)
    samples(tmp_path, "base", right["base"], "other")
    found = scores.read([tmp_path])
    (one,) = found.sets
    assert (one.title, one.metric) == ("digits", "exact_match")
    for model, rows in right.items():
        assert one.by_row[model][0].mean() == rows.mean()
    assert judge.judged(one, 1.0).others[0].verdict == "worse"
    assert sum("flexible" in line for line in found.left_out) == 3
    samples(tmp_path, "base", np.append(right["base"], True))
    (again,) = scores.read([tmp_path]).sets
    assert len(again.by_row["small"][0]) == 80
    assert any("1 rows" in line for line in scores.read([tmp_path]).left_out)


def test_results_of_method_comparison_have_the_rows_that_their_digits_tell_and_the_later_counts(tmp_path):
    published(tmp_path / "r", "lora/r32", 636 / 1319)
    published(tmp_path / "r", "lora/r32", 100 / 1319, at="2025-01-01")
    published(tmp_path / "r", "vera/x", 500 / 1319)
    published(tmp_path / "r", "oft/x", 0.1, status="failed")
    found = scores.read([tmp_path / "r"])
    (one,) = found.sets
    assert (one.title, one.metric) == ("tiny", "accuracy")
    assert one.rows == {"lora/r32": 1319, "vera/x": 1319}
    assert one.by_row["lora/r32"][0] == pytest.approx(636 / 1319)
    assert len(found.left_out) == 2
    assert judge.judged(one, 1.0).others[0].verdict == "worse"
    for seed in (1, 2):
        published(tmp_path / "r", "lora/r32", (636 + seed) / 1319, seed)
        published(tmp_path / "r", "vera/x", (500 + 2 * seed) / 1319, seed)
    assert judged([tmp_path / "r"])[0].others[0].basis == "seeds"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model,seed\na,0\n", "score"),
        ("seed,score\n0,1\n", "method"),
        ("method,seed,score\na,0,x\nb,0,1\n", "line 2"),
        ("method,seed,score\na,0,.5\na,0,.6\nb,0,.4\n", "two scores"),
        ("method,row,score\na,0,1\na,0,1\nb,0,1\n", "each row once"),
        ("method,score\na,.5\na,.6\n", "two methods"),
        ("", "scores.csv"),
    ],
)
def test_a_table_that_says_too_little_is_refused_by_name(tmp_path, text, named):
    (tmp_path / "scores.csv").write_text(text)
    with refusal("", "scores", named):
        scores.read([tmp_path / "scores.csv"])


def test_conditions_are_of_runs(tmp_path):
    (tmp_path / "scores.csv").write_text("method,score\na,1\nb,0\n")
    with refusal("--where seed=0", "scores.csv"):
        scores.read([tmp_path / "scores.csv"], where=["seed=0"])


def test_files_that_hold_no_scores_are_refused_by_name(tmp_path):
    for name, content in (("a.json", "{}"), ("samples_x.jsonl", "{}\n"), ("b.txt", "")):
        (tmp_path / name).write_text(content)
        with refusal(str(tmp_path / name)):
            scores.read([tmp_path / name])
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with refusal(str(tmp_path / missing)):
            scores.read([tmp_path / missing])


# The command


def test_the_command_writes_what_it_says_and_its_exit_code_says_whether_all_is_decided(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    outputs = drawn({"<b>a</b>": 0.9, "b": 0.6, "c": 0.55}, 3, 150)
    lines = [
        {"method": name, "seed": seed, "row": row, "correct": one, "task": task}
        for task in ("first", "second")
        for name, seeds in outputs.items()
        for seed, rows in seeds.items()
        for row, one in enumerate(rows)
    ]
    pd.DataFrame(lines).to_csv("scores.csv", index=False)
    assert cli.compare(["scores.csv"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines() if "│" in line or "─" in line)
    found = read_json("verdict/verdict.json")
    assert [one["decided"] for one in found["sets"]] == [True, True]
    csv = pd.read_csv("verdict/verdict.csv", comment="#")
    assert csv["difference"].tolist() == pytest.approx(
        [line["difference"] for one in found["sets"] for line in one["methods"]]
    )
    page = (tmp_path / "verdict" / "report" / "index.html").read_text()
    svg = (tmp_path / "verdict" / "report" / "intervals.svg").read_text()
    assert svg in page
    assert "<b>a</b>" not in page
    arguments = ["scores.csv", "reference=b", "margin=0.1", "results_dir=again", "--json"]
    assert cli.compare(arguments) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == read_json("again/verdict.json")
    assert {line["verdict"] for line in printed["sets"][0]["methods"]} == {"reference", "better", "open"}
    before = {file: file.read_bytes() for file in (tmp_path / "again").rglob("*") if file.is_file()}
    assert cli.compare(arguments) == 1
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    ("setting", "key"),
    [("margin=0", "margin"), ("margin=x", "margin"), ("rows=1", "rows"), ("lower=2", "lower"), ("seeds=3", "seeds")],
)
def test_settings_of_training_are_none_of_a_judge(tmp_path, setting, key):
    with refusal(key):
        Judging.of([str(tmp_path), setting])


def test_a_file_of_settings_is_none_of_scores():
    assert Judging.of(["methods=[lora]", "mine.yaml"]) is None
    with refusal("--where, --json"):
        cli.compare(["methods=[lora]", "--json"])
