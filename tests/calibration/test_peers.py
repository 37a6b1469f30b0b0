"""Two processes that calibrate together find what one finds, each with its share of the work."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback

import pytest
import torch.distributed
from scored_models import GRID, Counted, Named, scored_draw, tiny_vit

from partial_lora import PartialLoraError, calibrate
from partial_lora.calibration.score import FewShotScore

VARIANTS = {
    "threshold": {"threshold": 0.8},
    "budget": {"budget": 0.5, "chance": 0.3},
    "repair": {"threshold": 0.9, "repair": True},
    "joint": {"threshold": 0.8, "axes": "joint"},
    "cumulative": {"threshold": 0.8, "scope": "cumulative_backward"},
    "gradient": {"threshold": 0.8, "search": "gradient"},
}


class Gloo:
    """Two processes of torch.distributed on the CPU."""

    def __init__(self):
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gather(self, value):
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


def together(work, folder, *arguments):
    """What `work(peers, ...)` gave in each of two forked processes, or the error in words."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    meeting = f"file://{folder / 'meeting'}"

    def process(rank):
        patience = datetime.timedelta(seconds=300)
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=patience)
        try:
            answers.put((rank, work(Gloo(), folder, *arguments)))
        except PartialLoraError as error:
            answers.put((rank, f"refused: {error}"))
        except RuntimeError as error:
            answers.put((rank, f"failed: {error}"))
        except BaseException:
            answers.put((rank, traceback.format_exc()))
        torch.distributed.destroy_process_group()

    children = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for child in children:
        child.start()
    found = dict(answers.get(timeout=600) for _ in children)
    for child in children:
        child.join()
    return found[0], found[1]


def model_and_batches():
    model = Named(tiny_vit())
    return model, scored_draw(model)


def alone(variant, **more):
    model, batches = model_and_batches()
    return calibrate(model, FewShotScore(model, batches, blocks="vit.blocks"), **GRID, **VARIANTS[variant], **more)


def every_variant(peers, folder):
    """Results, passes of this process, and its progress."""
    found = {}
    for variant, kind in VARIANTS.items():
        model, batches = model_and_batches()
        score, told = FewShotScore(model, batches, blocks="vit.blocks"), []
        listen = {"progress": lambda *count, told=told, **what: told.append((*count, what))}
        store = folder / f"{variant}.json" if peers.rank == 0 else folder / "other" / f"{variant}.json"
        result = calibrate(model, score, peers=peers, store=store, **GRID, **kind, **listen)
        again = calibrate(model, None, peers=peers, store=store, **GRID, **kind)
        found[variant] = result, again, score.evaluations.passes, told
    return found


def test_two_find_what_one_finds_each_with_half_of_the_work(tmp_path):
    first, second = together(every_variant, tmp_path)
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    for variant in VARIANTS:
        single = alone(variant)
        for result, again, *_ in (first[variant], second[variant]):
            assert result.modules == single.modules
            assert (result.baseline, result.joint, result.threshold) == (
                single.baseline,
                single.joint,
                single.threshold,
            )
            assert (again.cached, again.modules) == (True, single.modules)
        assert first[variant][0] == second[variant][0]  # evaluations, seconds and warnings, too
        passes = [first[variant][2], second[variant][2]]
        assert sum(passes) == first[variant][0].evaluations == single.evaluations + 1  # each has the baseline
        if variant in ("cumulative", "gradient"):
            assert passes[1] == 1
        elif variant != "repair":
            assert max(passes) < 0.65 * sum(passes)
        for _, _, _, told in (first[variant], second[variant]):
            curves = 4 if variant == "joint" else 8
            assert told.pop(0)[0] == 0  # what it will take
            if variant == "gradient":
                assert told[-1][:2] == (curves, curves)
                continue
            assert [done for done, _, _ in told[:curves]] == list(range(1, curves + 1))
            assert len({(what["module"], what["axis"]) for _, _, what in told[:curves]}) == curves
    assert not (tmp_path / "other").exists()  # one store, that of rank 0
    again = alone("threshold", store=tmp_path / "threshold.json")
    assert again.cached


def breaking(peers, folder, rank, error, scope):
    model, batches = model_and_batches()
    score = Counted(batches)

    def breaks(model):
        if peers.rank == rank and score.calls == 7:
            raise error
        return score(model)

    calibrate(model, breaks, peers=peers, scope=scope, store=folder / "curves.json", **GRID)


@pytest.mark.parametrize(
    ("rank", "error", "scope", "words"),
    [
        (1, ValueError("2\nlines"), "independent", "failed: calibration: process 1 failed with ValueError: 2 lines"),
        (0, PartialLoraError("one line"), "independent", "refused: one line"),
        (0, ValueError("bad"), "cumulative", "failed: calibration: process 0 failed with ValueError: bad"),
    ],
)
def test_an_error_in_one_is_the_same_error_in_all(tmp_path, rank, error, scope, words):
    assert together(breaking, tmp_path, rank, error, scope) == (words,) * 2


def broken_baseline(peers, folder):
    model, _ = model_and_batches()
    calibrate(model, lambda model: float("nan") if peers.rank else 1.0, peers=peers, **GRID)


def test_a_baseline_that_is_no_number_in_one_stops_all(tmp_path):
    first, second = together(broken_baseline, tmp_path)
    assert first == second
    assert "frozen model is nan" in first
