"""Few-shot scores: every measure against its definition, bounds that decide, and the order of examples."""

from __future__ import annotations

import math
import weakref
from itertools import cycle

import numpy as np
import pytest
import torch
from scipy import stats
from scored_models import Altered, graded, labelled, linears, questions, scored_draw, texts, word_batches
from sklearn import metrics
from torch import nn

from partial_lora.calibration import answer_scores
from partial_lora.calibration.answer_scores import Correctness, Loss
from partial_lora.calibration.order import Tally, arranged, batch_sizes, enough, next_batch
from partial_lora.calibration.score import BoundedScore, FewShotScore
from partial_lora.errors import PartialLoraError

BLOCKS = "vit.blocks"


def all_of_it(low, high):
    """The question that only the score itself decides."""
    return low < high


# The literal twins


def logits_by_row(model, batches):
    """The logits of every row by itself, with nothing padded away that the batch pads."""
    with torch.no_grad():
        for batch in batches:
            for row in range(len(batch["labels"])):
                own = {name: value[row : row + 1] for name, value in batch.items()}
                inputs = {name: own[name] for name in ("input_ids", "attention_mask")}
                yield model(**inputs).logits[0].double(), own


def log_likelihoods(logits, labels):
    """The log probability of each token that is asked for, given those before it."""
    shares = torch.log_softmax(logits, -1)
    return [float(shares[at - 1, labels[at]]) for at in range(1, len(labels)) if labels[at] != -100]


def accuracy(model, batches):
    right = [int(logits.argmax()) == int(own["labels"]) for logits, own in logits_by_row(model, batches)]
    return sum(right) / len(right)


def class_loss(model, batches):
    losses = [-float(torch.log_softmax(logits, -1)[own["labels"][0]]) for logits, own in logits_by_row(model, batches)]
    return -sum(losses) / len(losses)


def squared_error(model, batches):
    errors = [(float(logits[0]) - float(own["labels"])) ** 2 for logits, own in logits_by_row(model, batches)]
    return -sum(errors) / len(errors)


def token_loss(model, batches):
    tokens = [
        value for logits, own in logits_by_row(model, batches) for value in log_likelihoods(logits, own["labels"][0])
    ]
    return sum(tokens) / len(tokens)


def chosen_options(model, batches, per_token):
    """Whether the right option is the likeliest, by item."""
    values: dict = {}
    for logits, own in logits_by_row(model, batches):
        tokens = log_likelihoods(logits, own["labels"][0])
        value = sum(tokens) / (len(tokens) if per_token else 1)
        values.setdefault(int(own["items"]), []).append((value, bool(own["answers"])))
    right = [max(options)[1] for options in values.values()]
    return sum(right) / len(right)


def by_metric(function):
    def score(model, batches):
        pairs = [(int(logits.argmax()), int(own["labels"])) for logits, own in logits_by_row(model, batches)]
        predictions, labels = map(np.array, zip(*pairs, strict=True))
        return function(labels, predictions)

    return score


def by_correlation(function):
    def score(model, batches):
        pairs = [(float(logits[0]), float(own["labels"])) for logits, own in logits_by_row(model, batches)]
        return function(*zip(*pairs, strict=True)).statistic

    return score


def macro_f1(labels, predictions):
    return metrics.f1_score(labels, predictions, average="macro")


CASES = {
    "accuracy": (labelled, "accuracy", accuracy),
    "class loss": (labelled, "loss", class_loss),
    "token loss": (texts, "loss", token_loss),
    "squared error": (graded, "loss", squared_error),
    "f1": (labelled, "f1", by_metric(macro_f1)),
    "matthews": (labelled, "matthews", by_metric(metrics.matthews_corrcoef)),
    "pearson": (graded, "pearson", by_correlation(stats.pearsonr)),
    "spearman": (graded, "spearman", by_correlation(stats.spearmanr)),
    "a function": (
        labelled,
        lambda said, true: float(np.mean((said == true) & (true != 1))),
        by_metric(lambda true, said: np.mean((said == true) & (true != 1))),
    ),
    "options": (questions, "options", lambda model, batches: chosen_options(model, batches, False)),
    "options per token": (questions, "options_per_token", lambda model, batches: chosen_options(model, batches, True)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_score_is_what_its_definition_says(case):
    draw, measure, twin = CASES[case]
    model, batches, blocks = draw()
    score = FewShotScore(model, batches, measure, blocks)
    assert isinstance(score, BoundedScore)
    baseline = score(model)
    assert baseline == pytest.approx(twin(model, batches), abs=1e-5)
    found = {baseline}
    for name, rows in zip([name for name in linears(model, "") if name.startswith(blocks)][::3], cycle((6, 3))):
        with Altered(model, name, rows):
            low, high = score.bounds(model, name, all_of_it)
            assert low == high == pytest.approx(twin(model, batches), abs=1e-5)
            assert low == score(model)
            found.add(low)
    assert len(found) > 2


@pytest.mark.parametrize("case", CASES)
def test_bounds_hold_decide_and_go_on(case):
    draw, measure, _ = CASES[case]
    model, batches, blocks = draw()
    score = FewShotScore(model, batches, measure, blocks)
    baseline = score(model)
    for name in [name for name in linears(model, "") if name.startswith(blocks)][::4]:
        for share in (0.5, 0.9):
            needed = baseline / share if baseline < 0 else baseline * share

            def undecided(low, high, needed=needed):
                return low < needed <= high

            with Altered(model, name, 10):
                exact = FewShotScore(model, score._batches, measure, blocks).bounds(model, name, all_of_it)[0]
                start = score.evaluations.examples
                low, high = score.bounds(model, name, undecided)
                assert low <= exact <= high
                assert not undecided(low, high)
                assert (low >= needed) == (exact >= needed)
                before = score.evaluations.examples
                again = score.bounds(model, name, undecided, (low, high))
                assert (again, score.evaluations.examples) == ((low, high), before)
                assert score.bounds(model, name, all_of_it, (low, high)) == pytest.approx((exact, exact), abs=1e-12)
                assert score.evaluations.examples - start == score.size  # none is evaluated twice


def test_a_lost_loss_stops_early_largest_losses_first():
    model, batches, blocks = labelled()
    score = FewShotScore(model, batches[:3], "loss", blocks)
    score(model)
    assert [len(batch["labels"]) for batch in score._batches] == [8, 8, 8]

    @torch.no_grad()
    def lost(index):
        return -float(score.measure.values(*score._answers(model, index, None)).sum()) / score.size

    losses = [lost(index) for index in range(3)]
    assert losses == sorted(losses, reverse=True)
    name = "bert.encoder.layer.0.output.dense"
    with Altered(model, name, 12):
        needed = -0.9 * lost(0)  # the first batch alone is too much
        before = score.evaluations.examples
        low, high = score.bounds(model, name, lambda low, high: low < needed <= high)
        assert (low, high) == (-math.inf, pytest.approx(-lost(0)))
        assert score.bounds(model, name, all_of_it, (low, high))[0] == pytest.approx(-sum(map(lost, range(3))))
        seen = score.evaluations.examples - before - 8 * 4  # without those that this test has asked for
    assert seen == score.size


def test_options_of_an_item_stay_together():
    model, batches, blocks = questions(lengths=(8, 8))
    score = FewShotScore(model, batches, "options", blocks)
    assert score.size == 10
    score(model)
    for batch in score._batches:
        score.measure.check(batch)  # next to each other, one right
    rows = {
        (int(item), tuple(words.tolist()), bool(answer))
        for batch in score._batches
        for item, words, answer in zip(batch["items"], batch["input_ids"], batch["answers"], strict=True)
    }
    assert rows == {
        (int(item), tuple(words.tolist()), bool(answer))
        for batch in batches
        for item, words, answer in zip(batch["items"], batch["input_ids"], batch["answers"], strict=True)
    }


# What guessing scores


def constant(batches):
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()
    values, counts = np.unique(labels, return_counts=True)
    return labels, np.full(len(labels), values[counts.argmax()]), counts / counts.sum()


def test_chance_is_the_majority_class_or_its_analogue():
    model, batches, _ = labelled()
    labels, guesses, shares = constant(batches)
    chance = {
        measure: FewShotScore(model, batches, measure).chance for measure in ("accuracy", "loss", "f1", "matthews")
    }
    assert chance["accuracy"] == pytest.approx(shares.max())
    assert chance["loss"] == pytest.approx(sum(share * math.log(share) for share in shares))
    assert chance["f1"] == pytest.approx(metrics.f1_score(labels, guesses, average="macro", zero_division=0))
    assert chance["matthews"] == 0
    assert FewShotScore(model, batches, lambda said, true: float(np.mean(said == true))).chance == chance["accuracy"]
    model, batches, _ = graded()
    labels = torch.cat([batch["labels"] for batch in batches]).double()
    assert FewShotScore(model, batches, "loss").chance == pytest.approx(-float(((labels - labels.mean()) ** 2).mean()))
    assert FewShotScore(model, batches, "pearson").chance == 0
    assert FewShotScore(model, batches, lambda said, true: 0.5).chance is None
    model, batches, _ = texts()
    assert FewShotScore(model, batches, "loss").chance is None


def test_chance_of_options_is_the_best_position_or_one_of_them():
    model, batches, _ = questions()
    positions = []
    for batch in batches:
        for item in batch["items"].unique():
            positions.append(int(batch["answers"][batch["items"] == item].nonzero()[0]))
    most = max(positions.count(position) for position in range(3)) / 15
    assert FewShotScore(model, batches, "options").chance == pytest.approx(most)
    even = [{**batch, "answers": batch["answers"].clone()} for batch in batches]
    for batch in even:  # the position of the right one as even as can be
        batch["answers"][:] = False
    at = 0
    for batch in even:
        for item in batch["items"].unique():
            rows = (batch["items"] == item).nonzero().squeeze(1)
            batch["answers"][rows[at % len(rows)]] = True
            at += 1
    assert FewShotScore(model, even, "options").chance >= (9 / 3 + 6 / 2) / 15


# What is no number, and bad arguments


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_says_no_number_has_no_score(case):
    draw, measure, _ = CASES[case]
    model, batches, blocks = draw()
    score = FewShotScore(model, batches, measure, blocks)
    score(model)
    name = [name for name in linears(model, "") if name.startswith(blocks)][-1]
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = torch.nan
    assert all(math.isnan(bound) for bound in score.bounds(model, name, all_of_it))
    assert math.isnan(score(model))


def test_a_model_that_always_says_the_same_correlates_with_nothing():
    model, batches, blocks = graded()
    nn.init.zeros_(model.classifier.weight)
    for measure in ("pearson", "spearman"):
        assert FewShotScore(model, batches, measure, blocks)(model) == 0


def test_bad_arguments_are_named():
    model, batches, _ = labelled()
    with pytest.raises(PartialLoraError, match=r"^calibration\.score=auc: .*accuracy"):
        FewShotScore(model, batches, "auc")
    with pytest.raises(PartialLoraError, match="answers, items"):
        FewShotScore(model, batches, "options")
    _, real, _ = graded()
    with pytest.raises(PartialLoraError, match=r"^labels: .*torch\.float32"):
        FewShotScore(model, real)
    with pytest.raises(PartialLoraError, match=r"^labels: .*\[8\].*\[8, 3\]"):
        FewShotScore(model, real, "loss")(model)
    model, batches, _ = questions()
    batches[0]["answers"][:] = True
    with pytest.raises(PartialLoraError, match="answers: "):
        FewShotScore(model, batches, "options")
    _, batches, _ = texts()
    batches[1]["labels"][:] = -100
    with pytest.raises(PartialLoraError, match="labels: "):
        FewShotScore(model, batches, "loss")


def test_a_model_that_is_no_sequence_of_blocks_is_one(model, batches):
    score = FewShotScore(model, batches)
    score(model)
    rows = sum(len(batch["labels"]) for batch in batches)
    assert score.evaluations.sample_blocks == 2 * rows  # 1 puts in order


def test_the_surest_come_first_and_what_is_wrong_anyway_last(model, batches):
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    assert [len(batch["labels"]) for batch in score._batches] == [len(batch["labels"]) for batch in batches]
    with torch.no_grad():
        images = torch.cat([batch["pixel_values"] for batch in score._batches])
        labels = torch.cat([batch["labels"] for batch in score._batches])
        logits = model(images)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    margins = own - logits.scatter(1, labels[:, None], -torch.inf).max(1).values
    assert (margins.diff() < 1e-4).all()
    assert margins[0] > 0 > margins[-1]
    same = {tuple(image.flatten()[:4].tolist()) for batch in batches for image in batch["pixel_values"]}
    assert {tuple(image.flatten()[:4].tolist()) for image in images} == same


def test_the_model_comes_back_as_it_was(model, batches):
    model.train()
    model.vit.blocks[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    score.bounds(model, "vit.blocks.1.mlp.fc1", all_of_it)

    def broken(low, high):
        if low > 0:
            raise RuntimeError("in the middle")
        return True

    with pytest.raises(RuntimeError, match="in the middle"):
        score.bounds(model, "vit.blocks.1.mlp.fc1", broken)
    handle = model.vit.blocks[1].mlp.fc2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score.bounds(model, "vit.blocks.1.mlp.fc1", all_of_it)
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == flags
    for block in model.vit.blocks:
        assert "forward" not in vars(block)
        assert not block._forward_hooks


def test_a_forward_of_its_own_is_put_back(model, batches):
    block = model.vit.blocks[0]
    own = block.forward
    block.forward = lambda x: own(x)  # what accelerate's hooks do
    replaced = block.forward
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    for _ in range(2):
        score.bounds(model, "vit.blocks.1.mlp.fc1", all_of_it)
    assert block.forward is replaced


def test_bad_blocks_and_draws_are_named(model, batches):
    with pytest.raises(PartialLoraError, match=r"^model\.blocks=vit\.layers: "):
        FewShotScore(model, batches, blocks="vit.layers")
    with pytest.raises(PartialLoraError, match=r"^model\.blocks=vit\.head: "):
        FewShotScore(model, batches, blocks="vit.head")
    with pytest.raises(PartialLoraError, match="scored draw"):
        FewShotScore(model, [])


def undecided_at(needed, size):
    """The question whether `needed` of `size` are right."""
    return lambda low, high: round(low * size) < needed <= round(high * size)


def walked(sizes, right, needed):
    """The batches that are seen until it is decided whether `needed` are right; right: those of each batch that are."""
    tally, size = Tally(), sum(sizes)
    while tally.total < needed <= tally.total + size - tally.units:
        index = next_batch(sizes, tally, needed)
        assert index not in tally.seen
        tally.add(index, torch.tensor([1.0] * right[index] + [0.0] * (sizes[index] - right[index])), keep=False)
    return tally.seen


def test_what_passes_is_decided_by_the_surest_and_what_fails_by_the_least_sure():
    sizes, needed = [10] * 7, 45
    assert walked(sizes, [10, 10, 9, 9, 8, 0, 0], needed) == [4, 3, 2, 0, 1]  # none of the last two is needed
    assert walked(sizes, [10, 10, 5, 4, 2, 2, 0], needed) == [4, 3, 2, 6]  # 29 wrong are too many already
    assert walked(sizes, [10, 10, 9, 6, 3, 4, 3], needed) == [4, 3, 2, 6, 5, 1, 0]  # as close as can be
    assert walked(sizes, [0, 0, 9, 9, 9, 9, 9], needed) == [4, 3, 2, 0, 1, 5, 6]  # not in their order
    assert walked([7], [7], 7) == [0]
    assert walked([4, 3], [4, 3], 8) == []


def test_no_order_sees_a_batch_twice_or_stops_undecided():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sizes = torch.randint(1, 6, (5,), generator=generator).tolist()
        right = [int(torch.randint(0, size + 1, (1,), generator=generator)) for size in sizes]
        needed = int(torch.randint(0, sum(sizes) + 2, (1,), generator=generator))
        seen = walked(sizes, right, needed)
        known = sum(right[index] for index in seen)
        possible = known + sum(size for index, size in enumerate(sizes) if index not in seen)
        assert (known >= needed) != (possible < needed)


@pytest.mark.parametrize("needed", [0, 1, 7, 20])
def test_how_many_have_to_be_right(needed):
    assert enough(undecided_at(needed, 20), 20) == needed
    assert enough(lambda low, high: True, 20) == 21


def test_units_stay_what_they_were():
    batches = [
        {"x": torch.arange(4.0), "labels": torch.arange(4)},
        {"x": torch.arange(4.0, 7), "labels": torch.arange(3)},
    ]
    sureness = [torch.tensor([0.0, 3, 1, 2]), torch.tensor([5.0, -1, 3])]
    first, second = arranged(batches, sureness, Correctness())
    assert first["x"].tolist() == [4, 1, 6, 3]
    assert first["labels"].tolist() == [0, 1, 2, 3]
    assert second["x"].tolist() == [2, 0, 5]


@pytest.mark.parametrize("case", [labelled, texts])
def test_texts_are_padded_to_the_longest_of_their_new_batch_and_answer_as_before(case):
    model, batches, _ = case()
    measure = Correctness() if case is labelled else Loss()

    def values(batch):
        inputs = {name: each for name, each in batch.items() if name != "labels"}
        with torch.no_grad():
            return measure.values(model(**inputs).logits, batch)

    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    parts = arranged(batches, [-batch["attention_mask"].sum(1) for batch in batches], measure)  # the shortest first
    longest = [part["attention_mask"].sum(1) for part in parts]
    assert torch.cat(longest).tolist() == lengths.sort().values.tolist()
    assert [part["input_ids"].shape[1] for part in parts] == [int(each.max()) for each in longest]
    shortest_first = lengths.argsort(stable=True)
    expected = torch.cat([values(batch) for batch in batches])[shortest_first]
    assert torch.cat([values(part) for part in parts]).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_surest_texts_come_in_the_first_third_and_those_of_like_length_share_a_batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (120,), generator=generator)
    mask = (torch.arange(30) < lengths[:, None]).long()
    batch = {"input_ids": mask * 7, "attention_mask": mask, "labels": torch.arange(120)}
    sureness = torch.randn(120, generator=generator)
    parts = arranged([batch], [sureness], Correctness())
    assert [len(part["labels"]) for part in parts] == [16, 16, 8] * 3
    seen = torch.cat([part["labels"] for part in parts])
    for third, expected in zip(seen.chunk(3), sureness.argsort(descending=True).chunk(3), strict=True):
        assert sorted(third.tolist()) == sorted(expected.tolist())
        assert lengths[third].tolist() == sorted(lengths[third].tolist())


@pytest.mark.parametrize("changes", ["no padding", "embeddings"])
def test_what_does_not_show_how_to_pad_it_stays_in_its_batches(changes):
    batches = word_batches((7, 5))
    for batch in batches:
        if changes == "no padding":
            batch["attention_mask"][:] = 1
        else:
            batch["inputs_embeds"] = torch.zeros(*batch.pop("input_ids").shape, 4)
    sureness = [torch.zeros(6), torch.ones(6)]
    assert arranged(batches, sureness, Correctness()) == [batches[1], batches[0]]


@pytest.mark.parametrize(
    ("sizes", "smaller"),
    [
        ([32] * 5, [24] * 4 + [16] * 2 + [8] * 4),
        ([64, 40], [24] * 3 + [16] + [8] * 2),
        ([10, 7], [10, 7]),
        ([300, 200], [75] * 4 + [50] * 2 + [25] * 4),
        ([8] * 60, [8] * 60),
        ([20], [20]),
        ([1], [1]),
    ],
)
def test_batches_get_smaller_where_most_is_decided(sizes, smaller):
    assert batch_sizes(sizes) == smaller
    batches = [{"labels": torch.arange(size)} for size in sizes]
    parts = arranged(batches, [torch.arange(float(size)) for size in sizes], Correctness())
    assert [len(part["labels"]) for part in parts] == smaller


def test_what_two_points_have_in_common_is_not_taken_for_the_same(model, monkeypatch):
    """Equal bounds after other batches: nobody can know which to go on with."""
    score = FewShotScore(model, scored_draw(model, sizes=(3, 3, 3)), "accuracy")
    right = {"first": [2, 3, 1], "second": [0, 3, 2]}  # of each batch, with one or another level zeroed

    def bounds(point, undecided, known=None):
        def see(model, index, module, tally):
            tally.add(index, torch.tensor([1.0] * right[point][index] + [0.0] * (3 - right[point][index])), keep=False)
            return True

        monkeypatch.setattr(score, "_see", see)
        return score.bounds(model, "vit.head", undecided, known)

    def from_the_end(low, high):
        return high - low > 0.7 or (low > 0.3 and high == 1)

    known = bounds("first", lambda low, high: high - low > 0.7)
    assert known == (2 / 9, 8 / 9)
    assert bounds("first", lambda low, high: low < high, known) == (6 / 9, 6 / 9)
    assert bounds("second", from_the_end) == known
    for point in right:
        exact = sum(right[point]) / 9
        assert bounds(point, lambda low, high: low < high, known) == (exact, exact)


# Logits of tokens, which are a vocabulary long


def test_the_logits_of_one_batch_are_held_at_a_time():
    model, batches, _ = texts()
    seen, held = [], []
    model.register_forward_pre_hook(lambda *_: held.append(sum(logits() is not None for logits in seen)))
    model.register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output.logits)))
    FewShotScore(model, batches, "loss")(model)
    assert len(held) > 2
    assert max(held) <= 1


def test_only_tokens_that_count_are_made_numbers_of_four_bytes(monkeypatch):
    compared, cross_entropy = [], answer_scores.F.cross_entropy

    def seen(logits, labels, **settings):
        compared.append(labels)
        return cross_entropy(logits, labels, **settings)

    monkeypatch.setattr(answer_scores.F, "cross_entropy", seen)
    model, batches, _ = texts()
    FewShotScore(model, batches, "loss")(model)
    assert len(compared) >= len(batches)
    assert all((labels >= 0).all() for labels in compared)
