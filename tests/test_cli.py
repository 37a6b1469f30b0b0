"""The commands as a user types them: what runs, what is refused, what is left behind."""

from __future__ import annotations

import contextlib
import importlib
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from commands import begun, environment, here, until
from safetensors.torch import load_file
from schemas import marked

from partial_lora import cli
from partial_lora.building import build
from partial_lora.methods import called
from partial_lora.settings import keys, schema

TINY = ("model=tiny_vit", "trainer.max_steps=4", "trainer.device=cpu", "calibration.shots=4", "calibration.levels=0.2")
TINY += ("task.train_samples=100", "task.test_samples=60")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def record(place: Path, results_dir: str = "results", **choice: object) -> tuple[Path, dict]:
    """The one run under a results directory whose settings are the chosen ones."""
    found = []
    for path in place.glob(f"{results_dir}/runs/*/*/*/*/result.json"):
        result = json.loads(path.read_text())
        flat = {"seed": result["seed"], "threshold": result["config"]["calibration"]["threshold"]}
        if all(flat[key] == value for key, value in choice.items()):
            found.append((path.parent, result))
    assert len(found) == 1
    return found[0]


def calibrations(place: Path) -> set[Path]:
    """The calibrations that are kept for later."""
    return set((place / "cache" / "calibrations").glob("*.json"))


@pytest.fixture(scope="module")
def trained(place: Path) -> subprocess.CompletedProcess:
    """Two thresholds and, for one of them, two seeds."""
    known = calibrations(place)
    first = here(place, "train", *TINY, drawn=True)
    assert first.returncode == 0, first.stderr
    for swept in ("calibration.threshold=0.5,0.9", "seed=1"):
        more = here(place, "train", "-m", *TINY, swept)
        assert more.returncode == 0, more.stderr
    assert len(calibrations(place) - known) == 1
    return first


def test_a_run_leaves_everything_that_was_promised(place: Path, trained: subprocess.CompletedProcess) -> None:
    directory, result = record(place, threshold=0.9, seed=0)
    files = {"adapter", "calibration.json", "config.yaml", "predictions.parquet", "result.json", "train.log"}
    drawn = {f"{name}.{kind}" for name in ("curves", "sparsity", "training") for kind in ("png", "svg")}
    drawn |= {"predictions.png", "example.png", "index.html"}
    assert {entry.name for entry in directory.iterdir()} - {".lock"} == files | drawn
    assert result["status"] == "finished"
    assert set(result["seconds"]) == {"calibrate", "train", "evaluate"}
    parameters = result["parameters"]
    counts = {"base", "adapter_dense", "adapter_trainable", "head", "adapted_modules", "saturated_modules"}
    assert set(parameters) == counts | {"adapter_sparsity"}
    assert {"baseline", "joint", "threshold", "search", "evaluations", "seconds", "cached"} <= set(
        result["calibration"]
    )
    assert result["metrics"]["test"]["primary"] == "accuracy"
    assert {"format": 1} | result["config"] == yaml.safe_load((directory / "config.yaml").read_text())
    assert marked(directory / "config.yaml") == []
    assert result["peak_memory_bytes"] > 0
    assert set(result["sparsity"]) == set(json.loads((directory / "calibration.json").read_text())["modules"])
    assert "test accuracy" in trained.stdout
    kept = load_file(directory / "adapter" / "adapter_model.safetensors")
    for name, factor in kept.items():
        module, _, which = name.removeprefix("base_model.model.").rpartition(".lora_")
        if which.startswith("A"):
            zeros = (factor == 0).all(dim=0).float().mean()
            assert zeros == pytest.approx(result["sparsity"][module]["columns"], abs=1e-6)


def test_the_predictions_are_those_the_metric_was_computed_from(place: Path, trained) -> None:
    directory, result = record(place, threshold=0.9, seed=0)
    frame = pandas.read_parquet(directory / "predictions.parquet")
    assert len(frame) == 60
    assert (frame["label"] == frame["prediction"]).mean() == pytest.approx(result["metrics"]["test"]["accuracy"])


def test_seeds_and_thresholds_share_one_calibration(place: Path, trained) -> None:
    made, reused = record(place, threshold=0.9, seed=0)[1], record(place, threshold=0.9, seed=1)[1]
    assert reused["calibration"]["cached"]
    assert reused["calibration"]["evaluations"] == 0
    assert made["sparsity"] == reused["sparsity"]


def test_a_finished_run_is_not_run_again_unless_asked_to(place: Path, trained) -> None:
    directory, before = record(place, threshold=0.9, seed=0)
    (directory / "index.html").unlink()  # as where the parent was killed once the worker had ended
    again = here(place, "train", *TINY, drawn=True)
    assert again.returncode == 0
    assert (directory / "index.html").is_file()
    assert "not run again" in again.stdout
    assert record(place, threshold=0.9, seed=0)[1] == before
    predictions = (directory / "predictions.parquet").read_bytes()
    redone = here(place, "train", *TINY, "overwrite=true")
    assert redone.returncode == 0, redone.stderr
    after = record(place, threshold=0.9, seed=0)[1]
    assert after["started"] != before["started"]
    assert after["metrics"] == before["metrics"]  # the same seed, the same numbers
    assert (directory / "predictions.parquet").read_bytes() == predictions
    assert after["metrics"] != record(place, threshold=0.9, seed=1)[1]["metrics"]


def test_calibrate_alone_finds_what_a_run_would(place: Path, trained) -> None:
    done = here(place, "calibrate", *TINY)
    assert done.returncode == 0, done.stderr
    (alone,) = place.glob("results/calibrations/digits/tiny_vit/svd-*/calibration.json")
    run, _ = record(place, threshold=0.9, seed=0)
    own, other = (json.loads(path.read_text()) for path in (alone, run / "calibration.json"))
    assert own["modules"] == other["modules"]
    used = here(place, "train", *TINY, f"calibration.file={alone}", "seed=7", first=no_draws)
    assert used.returncode == 0, used.stderr
    result = record(place, seed=7)[1]
    assert result["sparsity"] == json.loads((run / "result.json").read_text())["sparsity"]
    assert result["calibration"]["cached"]
    other = (f"calibration.file={alone}", "model.target_modules=[mlp.fc1]", "results_dir=foreign")
    for command, code in (("train", 1), ("info", 2)):
        foreign = here(place, command, *TINY, *other)
        assert foreign.returncode == code
        assert re.search(r"calibration\.file: \S+attn\.proj ", foreign.stderr)


def test_calibrate_ends_with_every_module_and_what_to_beware_of(place: Path) -> None:
    told = ("results_dir=told", "calibration.seed=3")
    done = here(place, "calibrate", *TINY, *told, drawn=True, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    (run,) = (path.parent for path in place.glob("told/calibrations/*/*/*/result.json"))
    result = json.loads((run / "result.json").read_text())
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines[:3]].count("calibrate") == 1  # what it will take
    for module, axes in result["sparsity"].items():
        (line,) = (line for line in lines if line.startswith(f" {module} "))
        assert f" {axes['rows']:.3f} " in line
        assert f" {axes['columns']:.3f} " in line
    assert max(map(len, lines[lines.index("calibrate done") :])) <= 100
    for words, key in (("beware", "warnings"), ("as usual", "usual")):
        assert (words in done.stdout) == bool(result["calibration"][key])
    log = (run / "train.log").read_text()
    assert all(warning in log for warning in result["calibration"]["warnings"])
    assert {path.name for path in run.iterdir()} >= {"curves.png", "curves.svg", "sparsity.png", "sparsity.svg"}


def test_two_processes_share_a_calibration_and_find_and_train_in_parts_what_one_does(place: Path) -> None:
    # Rows that do not divide into batches: the epochs that end within these steps end alike.
    settings = (*TINY, "trainer.max_steps=8", "trainer.mixed_precision=no", "importance=snip")
    settings += ("trainer.head_learning_rate=2e-3", "trainer.loraplus_ratio=4")
    runs = []
    for processes in (1, 2):
        own = (f"results_dir=by{processes}", f"trainer.num_processes={processes}")
        own += (f"trainer.gradient_accumulation_steps={processes}",)
        done = here(place, "train", *settings, *own, PARTIAL_LORA_CACHE=str(place / f"own_cache{processes}"))
        assert done.returncode == 0, done.stderr
        runs += [path.parent for path in place.glob(f"by{processes}/runs/*/*/*/*/result.json")]
    assert runs[0].relative_to(place / "by1") == runs[1].relative_to(place / "by2")
    one, two = (json.loads((run / "calibration.json").read_text()) for run in runs)
    same = ("modules", "baseline", "joint", "warnings")
    assert {key: one[key] for key in same} == {key: two[key] for key in same}
    assert not two["cached"]
    first, second = (json.loads((run / "result.json").read_text()) for run in runs)
    assert first["sparsity"] == second["sparsity"]
    sidecars = [(run / "adapter" / "partial_lora.json").read_text() for run in runs]
    assert sidecars[0] == sidecars[1]
    for split in ("validation", "test"):
        assert first["metrics"][split] == pytest.approx(second["metrics"][split], abs=1e-4)
    steps, parted = ([entry for entry in each["history"] if "grad_norm" in entry] for each in (first, second))
    for expected, found in zip(steps, parted, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        for name in ("learning_rate", "B_learning_rate", "head_learning_rate"):
            assert found[name] == expected[name]
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=0)


def test_an_error_in_the_process_that_works_alone_ends_all_of_them(place: Path) -> None:
    diverging = ("importance=imp", "importance.learning_rate=1e30", "importance.steps=5", "trainer.num_processes=2")
    done = here(place, "calibrate", *TINY, *diverging, "results_dir=diverged")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "importance=imp: " in line
    assert "importance.learning_rate" in line


def test_a_model_of_another_shape_is_calibrated_anew(place: Path, trained) -> None:
    known = calibrations(place)
    own = ("model.model_args.num_heads=4", "results_dir=shape")  # the weights have the same shapes
    done = here(place, "calibrate", *TINY, *own)
    assert done.returncode == 0, done.stderr
    assert "reused" not in done.stdout
    assert len(calibrations(place) - known) == 1


def test_another_method_runs_from_the_same_head(place: Path, trained) -> None:
    done = here(place, "train", *TINY, "method=uniform", "results_dir=uniform")
    assert done.returncode == 0, done.stderr
    _, result = record(place, "uniform")
    _, partial = record(place, threshold=0.9, seed=0)
    own, reference = result["parameters"], partial["parameters"]
    assert own["head"] == reference["head"]
    assert result["history"][0]["loss"] == pytest.approx(partial["history"][0]["loss"], abs=1e-5)  # B is zero
    assert 0.99 < own["adapter_trainable"] / reference["adapter_trainable"] <= 1


def test_importance_by_data_goes_the_whole_way(place: Path, trained) -> None:
    by_gradients = (*TINY, "importance=snip", "method=targeted")
    done = here(place, "train", *by_gradients, "results_dir=snip")
    assert done.returncode == 0, done.stderr
    (run,) = (path.parent for path in place.glob("snip/runs/*/*/targeted-*/seed0/result.json"))
    settings = json.loads((run / "calibration.json").read_text())["settings"]
    assert settings["importance"] == {"name": "snip", "seed": 0}
    # Out of a file come the sparsities alone: the most important rows are found again, the same ones.
    done = here(place, "train", *by_gradients, "results_dir=again", f"calibration.file={run / 'calibration.json'}")
    assert done.returncode == 0, done.stderr
    (again,) = (path.parent for path in place.glob("again/runs/*/*/targeted-*/seed0/result.json"))
    kept = [json.loads((path / "adapter" / "partial_lora.json").read_text())["modules"] for path in (run, again)]
    assert kept[0] == kept[1]


def no_draws() -> None:
    """In a worker: an end to whoever draws examples, for a head, for importance or for a calibration."""

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("drawn")

    build.draws_of = refuse


@pytest.mark.usefixtures("no_figures")
def test_entries_spend_a_budget_without_a_calibration(place: Path, trained) -> None:
    entries, known = (*TINY, "method=entries", "results_dir=entries"), set(place.glob("cache/calibrations/*"))
    planned = here(place, "info", *entries)
    assert "nothing is calibrated" in planned.stdout
    done = here(place, "train", "-m", *entries, "calibration.budget=null,2000", first=no_draws)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in place.glob("entries/runs/*/*/*/*/result.json")]
    spent = {result["fixed"]["budget"]: result["parameters"]["adapter_trainable"] for result in records}
    dense = records[0]["parameters"]["adapter_dense"]
    assert spent == {0.13: int(0.13 * dense), 2000.0: 2000}
    assert f"{spent[0.13]:,}" in planned.stdout
    assert all(result["seconds"]["calibrate"] == 0 and result["calibration"] is None for result in records)
    assert not list(place.glob("entries/runs/*/*/*/*/calibration.json"))
    assert set(place.glob("cache/calibrations/*")) == known
    again = here(place, "train", *entries, "calibration.budget=0.13")  # what null stands for, so the same run
    assert "budget 0.13" in again.stdout
    assert "not run again" in again.stdout
    reported = here(place, "report", "entries")
    assert reported.returncode == 0, reported.stderr
    table = pandas.read_csv(place / "entries" / "report" / "table.csv", comment="#")
    assert set(table["method"]) == {"entries"}
    assert set(table["operating_point"]) == {"budget 0.13", "budget 2,000"}


@pytest.mark.parametrize("given", ["calibration=fixed", "calibration.sparsity=0.5", "method=entries"])
def test_where_nothing_is_calibrated_calibrate_is_refused_and_leaves_nothing(place: Path, given: str) -> None:
    for more in ([], ["-m", "seed=0,1"]):
        done = here(place, "calibrate", *more, *TINY, given, "results_dir=nothing")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"partial-lora: {'method.name' if 'method' in given else 'calibration.sparsity'}=")
        assert not (place / "nothing").exists()


def test_a_run_ends_with_its_paths_unbroken_and_goes_by_latest_and_by_its_id(place: Path, trained) -> None:
    run = Path(trained.stdout.splitlines()[0].removeprefix("train "))
    again = here(place, "train", *TINY, drawn=True, COLUMNS="40")
    assert {str(run), str(run / "index.html"), "next: partial-lora predict latest results/latest/example.png"} <= set(
        again.stdout.splitlines()
    )
    listed = here(place, "runs")
    assert len(listed.stdout.splitlines()) == len(list(place.glob("results/runs/*/*/*/*")))
    assert [line for line in listed.stdout.splitlines() if line.endswith(str(run)) and "digits" in line]
    assert here(place, "runs", "nowhere").returncode == 2
    named = f"{run.parent.name.rpartition('-')[2]}/seed0"
    for name in ("latest", named):
        done = here(place, "evaluate", name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["folder"].startswith(f"{run}/")


def test_a_run_of_which_the_record_is_left_is_neither_the_latest_nor_offered_for_predictions(
    place: Path, trained
) -> None:
    run = Path(trained.stdout.splitlines()[0].removeprefix("train "))
    kept = place / "kept" / run.relative_to("results")
    kept.mkdir(parents=True)
    for name in ("result.json", "predictions.parquet"):
        shutil.copy(place / run / name, kept / name)
    done = here(place, "train", *TINY, "results_dir=kept", "keep_records=true")
    assert done.returncode == 0, done.stderr
    assert "not run again" in done.stdout
    assert "predict" not in done.stdout
    assert "next: partial-lora report kept" in done.stdout
    assert not (place / "kept" / "latest").exists()


def test_a_command_leaves_its_blocks_when_it_is_terminated_and_says_so_when_its_reader_is_gone(monkeypatch) -> None:
    left = []

    def terminated() -> int:
        with contextlib.ExitStack() as stack:
            stack.callback(left.append, "left")
            signal.raise_signal(signal.SIGTERM)
        return 0

    def unread() -> int:
        raise BrokenPipeError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        cli.guarded(terminated)
    assert (ended.value.code, left) == (128 + signal.SIGTERM, ["left"])
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(cli, "_forget_stdout", lambda: None)
    assert cli.guarded(unread) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [["runs", "--help"], ["-sc", "query=fish"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_an_output_on_a_full_disk_is_one_line(monkeypatch, capsys, arguments) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # which it says once more as it is closed
        monkeypatch.setattr(sys, "stdout", full)
        code = cli.main(arguments)
        monkeypatch.undo()
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("partial-lora: ")


def test_a_weight_of_merge_is_a_finite_number(capsys) -> None:
    for weight in ("nan", "inf", "much"):
        assert cli.main(["merge", "one", "other", "--weights", weight, "1", "--out", "merged"]) == 2
        assert "--weights" in capsys.readouterr().err


def test_export_from_another_directory_is_checked_and_says_so(place: Path, trained, tmp_path: Path) -> None:
    directory, _ = record(place, threshold=0.9, seed=0)
    cache = str(place / "cache")
    done = here(
        tmp_path, "export", str(directory), "--to", "compact", "--out", "mine[red]", "--check", PARTIAL_LORA_CACHE=cache
    )
    assert done.returncode == 0, done.stderr
    written, checked = done.stdout.strip().splitlines()
    size = sum(file.stat().st_size for file in (tmp_path / "mine[red]").rglob("*") if file.is_file())
    assert written == f"{tmp_path.resolve() / 'mine[red]'}: written ({size:,} bytes)"
    assert checked.startswith("checked: ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine[red]"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing_half_written(place: Path, trained, number: signal.Signals) -> None:
    directory, _ = record(place, threshold=0.9, seed=0)
    running = begun(place, "export", str(directory), "--to", "peft", "--check", "--out", "stopped_export/out")
    until(lambda: list(place.glob("stopped_export/.out.*")), running)  # it has begun to write
    running.send_signal(number)
    printed, said = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert "Traceback" not in said
    assert printed == ""
    assert list((place / "stopped_export").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model=tiny_vit", "task=cifar10"], r"task=cifar10: .*uoft-cs/cifar10.*task=digits"),
        (["model=tiny_vit", "model.model_args.num_heads=7"], r"model\.model_args"),
    ],
)
def test_what_only_the_worker_can_find_wrong_is_one_line_too(place: Path, arguments: list[str], said: str) -> None:
    done = here(place, "train", *arguments, "method=lora", "results_dir=refused", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert re.search(said, line)
    assert "Traceback" not in done.stdout + done.stderr
    assert not (place / "refused" / "runs").exists()  # nothing was begun


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("task=sst2", "model=tiny_vit "),
        ("model.image_size=30", "model.image_size=30: "),
        ("model.target_modules=[nothing]", "target_modules: "),
        ("model.head=timm_model.nothing", "model.head=timm_model.nothing: "),
        ("trainer.device=cuda", "trainer.device=cuda: "),
        ("calibration.budget=3", "calibration.budget=3: "),
        ("calibration.sparsity={nothing: 0.5}", "calibration.sparsity"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    place: Path, argument: str, key: str
) -> None:
    swept = argument.startswith(("model.image_size", "calibration.budget"))  # the runs of a sweep are checked as one is
    for sweep in ([], ["-m", "seed=0,1"])[: 1 + swept]:
        done = here(place, "train", *sweep, "model=tiny_vit", argument, "results_dir=unfit")
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith(f"partial-lora: {key}")
    assert not (place / "unfit").exists()


def test_rows_and_settings_to_beware_of_are_said_and_recorded(place: Path) -> None:
    rows = "".join(f"{word} film {number},{word}\n" for number in range(9) for word in ("good", "bad"))
    for name in ("rows.csv", "same.csv"):
        (place / name).write_text("text,label\n" + rows)
    files = "task.data_files={train: rows.csv, test: same.csv}"
    own = ("model=tiny_bert", "task=text_table", files, "calibration=fixed", "method.rank=1000")
    own += ("trainer.batch_size=32", "trainer.max_steps=1", "trainer.device=cpu")
    done = here(place, "train", *own, "trainer.learning_rate=2", "results_dir=beware", COLUMNS="100")
    assert done.returncode == 0, done.stderr
    (file,) = place.glob("beware/runs/*/*/*/*/result.json")
    *warnings, of_adapter = json.loads(file.read_text())["warnings"]
    assert re.match(r"(\d+) of \1 modules ", of_adapter)  # which train more numbers than they can change
    keys = ["trainer.learning_rate", "trainer.batch_size=32", "task=text_table"]
    assert [warning.partition(": ")[0] for warning in warnings] == keys
    assert "16 of 18" in warnings[2]  # two are of the validation that is cut from them
    assert all(f"{key}: " in done.stdout.partition("beware ")[2] for key in keys)
    log = file.with_name("train.log").read_text()
    assert all(warning in log for warning in (*warnings, of_adapter))
    assert "beware: trainer.learning_rate" in done.stdout  # before anything is trained


def test_a_world_that_somebody_else_started_is_refused(place: Path) -> None:
    done = here(place, "train", *TINY, RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "trainer.num_processes=2" in done.stderr


def test_info_downloads_nothing(place: Path) -> None:
    done = here(place, "info", "model=vit_b16", "calibration.budget=0.13")
    assert done.returncode == 0, done.stderr
    assert "2,359,296" in done.stdout  # 12 blocks x rank 16 x (3072 + 1536 + 3840 + 3840)
    assert "13.0%" in done.stdout
    assert "learning rate: adapter 0.001\n" in done.stdout  # half of that for half the width
    rates = ("trainer.learning_rate=1e-3", "trainer.head_learning_rate=2e-3", "trainer.loraplus_ratio=4")
    own = here(place, "info", "model=tiny_vit", *rates)
    assert "learning rate: adapter 0.001, B 0.004, head 0.002\n" in own.stdout


def test_help_says_what_each_key_means_the_common_ones_first(place: Path) -> None:
    known = keys.meanings()
    assert [key for key, meaning in known.items() if not meaning] == []
    of_any_keys = {"model.model_args", "model.text_args"}
    assert known.keys() - of_any_keys == schema.defaults().keys()
    done = here(place, "train", "--help", "model=tiny_bert", "trainer.epochs=7", COLUMNS="90")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    others = [key for key in known if key not in (*keys.COMMON, "preset")]  # which is a group, too
    places = [said.index(f"\n{key}=") for key in (*keys.COMMON, *others)]
    assert places == sorted(places)
    assert max(map(len, said.splitlines()[8:])) <= 90
    assert f"trainer.epochs=7.0  {known['trainer.epochs']}" in said
    assert "\nmodel=bert_base, " in said
    assert "--memory" in said
    methods = [file.stem for file in (schema.conf_dir() / "method").glob("*.yaml")]
    told = re.findall(r"^  (\w+)  +\S", said.partition("== Methods")[2].partition("== Keys")[0], re.MULTILINE)
    assert told == sorted(methods, key=lambda name: (not called(name).masked, name))
    wrong = here(place, "info", "-h", "model=nope")
    assert (wrong.returncode, wrong.stderr.partition(": ")[2][:11]) == (2, "model=nope:")
    read = subprocess.run(
        f"'{sys.executable}' -m partial_lora train --help | true",
        shell=True,
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.stderr == ""


def test_info_needs_no_task_and_has_a_line_for_programs(place: Path) -> None:
    for model, outputs in (("bert_base", 2), ("llama3_1_8b", 0), ("vit_b16", 10)):
        done = here(place, "info", f"model={model}", "--json", "calibration.budget=0.13")
        assert done.returncode == 0, done.stderr
        counted = json.loads(done.stdout)
        assert (counted["model"], counted["outputs"]) == (model, outputs)
        assert counted["counts"]["adapter_trainable"] <= 0.13 * counted["counts"]["adapter_dense"]
        assert counted["learning_rate"]["adapter"] == pytest.approx(0.768 / counted["width"])
    assert "model.gradient_checkpointing=true" in here(place, "info", "model=llama3_1_8b").stdout
    (place / "own.yaml").write_text("model: bert_base\ntask: digits\n")
    for named in (["model=bert_base", "task=digits"], ["own.yaml"]):
        assert here(place, "info", *named).returncode == 2
    (place / "own.yaml").write_text("model: tiny_vit\n1: 2\n")
    refused = here(place, "info", "own.yaml")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_env_has_versions_and_no_place_of_this_machine(place: Path) -> None:
    done = here(place, "env", "--json")
    found = json.loads(done.stdout)
    assert {"partial-lora", "torch", "peft", "python", "platform", "accelerators"} <= found.keys()
    assert not [value for value in found.values() if "/" in value or platform.node() in value]


def imported(place: Path, script: str) -> set[str]:
    """The modules that a script imports, in a process of its own."""
    script += "\nimport sys\nprint('imported', *(name for name, module in sys.modules.items() if module))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=place, env=environment(place), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported ")[2].split())


def test_neither_help_nor_a_wrong_argument_nor_info_waits_for_a_library(place: Path) -> None:
    right = [["--help"], ["train", "--help"], ["train", "--cfg", "job"], ["report", "--help"]]
    right += [["info"], ["info", "model=vit_s14"], ["info", "model=llama3_1_8b", "task=arc_easy", "method=dense"]]
    wrong = [["trainer.lr=1"], ["model=nothing"], ["task=image_table", "task.data_files.train=nowhere.csv"]]
    wrong = [[command, *each] for command in ("train", "info") for each in wrong]
    wrong += [["runs", "nowhere"], ["report", "--by"], ["export", "nowhere"], ["predict", "nowhere", "a text"]]
    wrong += [["export", place, "--to", "peft"] for place in ("nowhere", ".")] + [["export", ".", "--to", "onnx"]]
    script = f"""
from partial_lora.cli import main
def code(arguments):
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code
assert [code(each) for each in {right + wrong!r}] == {[0] * len(right) + [2] * len(wrong)!r}
"""
    heavy = {"torch", "transformers", "peft", "timm", "datasets", "sklearn", "scipy", "pandas", "matplotlib"}
    assert not heavy & imported(place, script)


def test_one_key_is_shown_whatever_its_value_is(tmp_path: Path) -> None:
    show = ("train", "model=tiny_vit", "seed=3", "--cfg", "job", "-p")
    assert [here(tmp_path, *show, key).stdout for key in ("seed", "task.data_files")] == ["3\n", "null\n"]
    refused = here(tmp_path, *show, "data_files")
    assert refused.returncode == 2
    assert refused.stderr.startswith("partial-lora: data_files: ")


def test_a_worker_imports_what_its_run_needs(place: Path) -> None:
    script = """
from partial_lora.launching.imports import hide_bitsandbytes, importing
hide_bitsandbytes()
with importing():
    import partial_lora.train
"""
    others = {"bitsandbytes", "timm", "sklearn", "scipy.stats", "evaluate", "matplotlib"}
    assert not (others | {"mlflow", "tensorboard", "trackio", "wandb"}) & imported(place, script)


def test_an_interruption_has_its_exit_code_before_the_command_line_is_imported(monkeypatch) -> None:
    class Slow:
        def __getattr__(self, name: str):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "partial_lora.cli", Slow())
    assert importlib.import_module("partial_lora.__main__").main() == 130


@pytest.mark.parametrize(("given", "code"), [(["--help"], 0), (["--force"], 2), ([], None)])
def test_a_script_without_arguments_does_its_work_when_it_is_given_none(given, code, monkeypatch, capsys) -> None:
    done = []

    @cli.script
    def main() -> None:
        done.append(True)

    monkeypatch.setattr(sys, "argv", ["script.py", *given])
    if code is None:
        assert main() == 0
    else:
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    assert done == [True] * (code is None)
