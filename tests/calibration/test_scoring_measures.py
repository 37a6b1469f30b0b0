"""Few-shot scores by every measure, against their definitions written out one example at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scored_models import Altered, linears, random_model, word_batches
from sklearn import metrics
from torch import nn

from partial_lora.calibration.score import BoundedScore, FewShotScore
from partial_lora.errors import PartialLoraError

BERT, LLAMA = "bert.encoder.layer", "model.layers"


def all_of_it(low, high):
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


# The scored draws


def labelled():
    model = random_model("bert")
    batches = word_batches((7, 7, 7, 5), rows=8)
    with torch.no_grad():
        for batch in batches:  # labelled as the model would, but for every fifth
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            batch["labels"] = model(**inputs).logits.argmax(-1)
            batch["labels"][::5] = (batch["labels"][::5] + 1) % 3
    return model, batches, BERT


def graded():
    model = random_model("bert", labels=1)
    batches = word_batches((7, 7, 5), rows=8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            batch["labels"] = model(**inputs).logits[:, 0] + torch.randn(8, generator=generator)
    return model, batches, BERT


def texts():
    batches = word_batches((7, 9, 9), rows=6)
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][1, :4] = -100
    return random_model("llama"), batches, LLAMA


def questions(lengths=(8, 8, 6)):
    """Items of two and of three options, of several lengths, the right one first, second or third."""
    model = random_model("llama")
    generator = torch.Generator().manual_seed(5)
    batches, item = [], 0
    for length in lengths:
        sizes = [3, 2, 3, 3, 2]
        words = torch.randint(1, 50, (sum(sizes), length), generator=generator)
        labels, items, answers = words.clone(), [], []
        for size in sizes:
            items += [item] * size
            answers += [option == item % size for option in range(size)]
            item += 1
        for row in range(len(words)):
            labels[row, : length - 1 - row % 3] = -100
        tensors = {"labels": labels, "items": torch.tensor(items), "answers": torch.tensor(answers)}
        batches.append({"input_ids": words, "attention_mask": torch.ones_like(words), **tensors})
    return model, batches, LLAMA


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
    "a function": (labelled, lambda said, true: float(np.mean((said == true) & (true == 1))), None),
    "options": (questions, "options", lambda model, batches: chosen_options(model, batches, False)),
    "options per token": (questions, "options_per_token", lambda model, batches: chosen_options(model, batches, True)),
}
CASES["a function"] = (*CASES["a function"][:2], by_metric(lambda true, said: np.mean((said == true) & (true == 1))))


@pytest.mark.parametrize("case", CASES)
def test_a_score_is_what_its_definition_says(case):
    draw, measure, twin = CASES[case]
    model, batches, blocks = draw()
    score = FewShotScore(model, batches, measure, blocks)
    assert isinstance(score, BoundedScore)
    baseline = score(model)
    assert baseline == pytest.approx(twin(model, batches), abs=1e-5)
    found = set()
    for name in [name for name in linears(model, "") if name.startswith(blocks)][::3]:
        for rows in (5, 12):
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
    for name in [name for name in linears(model, "") if name.startswith(blocks)][::2]:
        for share in (0.5, 0.9):
            needed = baseline / share if baseline < 0 else baseline * share

            def undecided(low, high, needed=needed):
                return low < needed <= high

            with Altered(model, name, 10):
                exact = FewShotScore(model, score._batches, measure, blocks).bounds(model, name, all_of_it)[0]
                low, high = score.bounds(model, name, undecided)
                assert low <= exact <= high
                assert not undecided(low, high)
                assert (low >= needed) == (exact >= needed)
                before = score.evaluations.examples
                again = score.bounds(model, name, undecided, (low, high))
                assert (again, score.evaluations.examples) == ((low, high), before)
                assert score.bounds(model, name, all_of_it, (low, high)) == pytest.approx((exact, exact), abs=1e-12)


def test_a_lost_loss_stops_early_largest_losses_first():
    model, batches, blocks = labelled()
    score = FewShotScore(model, batches[:3], "loss", blocks)
    score(model)
    assert [len(batch["labels"]) for batch in score._batches] == [8, 8, 8]

    @torch.no_grad()
    def lost(index):
        return -float(score.measure.values(score._logits(model, index, None), score._batches[index]).sum()) / score.size

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
    with pytest.raises(PartialLoraError, match=r"calibration.score=auc: expected one of accuracy, loss, options"):
        FewShotScore(model, batches, "auc")
    with pytest.raises(PartialLoraError, match=r"batches: options need answers, items; found input_ids"):
        FewShotScore(model, batches, "options")
    _, real, _ = graded()
    with pytest.raises(PartialLoraError, match=r"labels: expected whole numbers \(batch,\), found torch.float32"):
        FewShotScore(model, real)
    with pytest.raises(
        PartialLoraError, match=r"labels: real numbers \[8\] need outputs of that shape, found \[8, 3\]"
    ):
        FewShotScore(model, real, "loss")(model)
    model, batches, _ = questions()
    batches[0]["answers"][:] = True
    with pytest.raises(PartialLoraError, match="answers: expected one right option for each item"):
        FewShotScore(model, batches, "options")
    _, batches, _ = texts()
    batches[1]["labels"][:] = -100
    with pytest.raises(PartialLoraError, match=r"labels: every token is -100"):
        FewShotScore(model, batches, "loss")
