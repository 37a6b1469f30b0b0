"""Classes in predictions: what is counted, how each is told, what is mistaken most."""

from __future__ import annotations

import math

import pyarrow as pa

from partial_lora.report import classes

NAMES = {0: "cat", 2: "dog", 5: "owl"}


def predicted(*pairs, **columns):
    """Predictions of (class, predicted class)."""
    label, prediction = zip(*pairs, strict=True)
    names = {
        f"{name}_name": [NAMES[index] for index in each]
        for name, each in (("label", label), ("prediction", prediction))
    }
    return pa.table({"label": label, "prediction": prediction} | names | columns)


def test_classes_are_counted_in_their_order_and_scored_each():
    counted = classes.counted(predicted((2, 2), (0, 0), (0, 2), (0, 2), (2, 0), (0, 5)))
    assert counted.names == ["cat", "dog", "owl"]  # the last was never right, only predicted
    assert counted.counts.tolist() == [[1, 2, 1], [1, 1, 0], [0, 0, 0]]
    cat, dog, owl = counted.scores()
    assert cat == ("cat", 4, 1 / 2, 1 / 4, 1 / 3)
    assert dog == ("dog", 2, 1 / 3, 1 / 2, 2 / 5)
    assert owl[:3] == ("owl", 0, 0)
    assert math.isnan(owl[3])
    assert counted.confused(2) == [("cat", "dog", 2), ("cat", "owl", 1)]


def test_nothing_is_counted_where_no_classes_or_those_of_several_tasks_are_predicted():
    assert classes.counted(pa.table({"label": [0.5], "prediction": [0.25]})) is None
    assert classes.counted(predicted((0, 0), member=["a"])) is None
