"""The examples a run is most wrong about, and their inputs where the rows can be read back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from PIL import Image

from partial_lora.report import examples


def classes(chances, label=0):
    """Predictions of two classes with these chances of the first."""
    logits = [np.log([chance, 1 - chance]).astype(np.float32) for chance in chances]
    said = [int(chance < 0.5) for chance in chances]
    return pa.table(
        {
            "label": [label] * len(said),
            "prediction": said,
            "label_name": ["cat"] * len(said),
            "prediction_name": [("cat", "dog")[each] for each in said],
            "logits": logits,
        }
    )


def test_the_worst_over_all_runs_come_first():
    frames = [classes([0.9, 0.2, 0.6, 0.4]), classes([0.9, 0.2, 0.1, 0.4])]
    found = examples.hardest(frames, 2)
    assert [example.index for example in found] == [1, 2]
    assert found[1].predicted == ["cat", "dog"]
    assert found[0].label == "cat"
    assert found[0].loss == pytest.approx(-np.log(0.2), rel=1e-5)
    assert found[1].loss == pytest.approx(-(np.log(0.6) + np.log(0.1)) / 2, rel=1e-5)
    assert examples.hardest([], 2) == []


@pytest.mark.parametrize(
    ("columns", "worst"),
    [
        ({"label": [1.0, 2.0, 3.0], "prediction": [1.0, 2.5, 2.0]}, 2),
        ({"label": [0, 1, 0], "prediction": [0, 0, 0], "scores": [[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]]}, 1),
        ({"label": ["a", "b", "c"], "prediction": ["a", "b", "d"], "rouge_l": [1.0, 0.2, 0.4]}, 1),
        ({"label": [1, 2, 3], "prediction": [1, 0, 3]}, 1),
    ],
)
def test_every_kind_of_prediction_has_a_loss(columns, worst):
    assert examples.hardest([pa.table(columns)], 1)[0].index == worst


def test_outputs_of_a_mixture_may_be_of_unlike_length():
    found = pa.table(
        {
            "member": ["a", "a", "b", "b"],
            "label": [0, 1, 5, 0],
            "prediction": [0, 0, 5, 0],
            "label_name": ["no", "yes", "six", "one"],
            "prediction_name": ["no", "no", "six", "one"],
            "logits": [np.log([0.9, 0.1]), np.log([0.7, 0.3]), np.log([0.1] * 5 + [0.5]), np.log([0.2, *[0.16] * 5])],
        }
    )
    worst = examples.hardest([found], 4)
    assert [each.index for each in worst] == [3, 1, 2, 0]
    assert [each.loss for each in worst] == pytest.approx([-np.log(chance) for chance in (0.2, 0.3, 0.5, 0.9)])
    assert worst[2].label == "six"


def test_members_of_other_kinds_have_losses_of_their_own():
    found = pa.table(
        {
            "member": ["chosen", "written"],
            "label": ["0", "a text"],
            "prediction": ["1", "a test"],
            "rouge_l": [None, 0.25],
            "scores": [None, None],
        }
    )
    assert [each.loss for each in examples.hardest([found], 2)] == [1, 0.75]


def test_a_label_without_an_output_is_refused():
    with pytest.raises(ValueError, match="without an output"):
        examples.hardest([classes([0.9], label=2)], 1)


def test_inputs_are_shown_of_the_same_rows_alone():
    frame = classes([0.9, 0.2])
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    rows = Dataset.from_dict({"image": images, "label": [0, 0]})
    labels = frame["label"].to_pylist()
    (found,) = examples.with_inputs(examples.hardest([frame], 1), rows, labels)
    assert found.image.startswith("data:image/webp;base64,")
    for other in (rows.select([0]), rows.map(lambda row: {"label": 1})):
        (found,) = examples.with_inputs(examples.hardest([frame], 1), other, labels)
        assert found.image == ""


def test_texts_and_options_are_printed():
    frame = classes([0.9, 0.2])
    rows = Dataset.from_dict({"text": ["one", "two " * 500], "text_pair": ["a", "b"], "label": [0, 0]})
    (found,) = examples.with_inputs(examples.hardest([frame], 1), rows, [0, 0])
    assert len(found.text[0]) == 400
    assert found.text[1] == "b"
    chosen = pa.table({"label": [1], "prediction": [0], "scores": [[0.7, 0.3]]})
    rows = Dataset.from_dict({"prompts": [["which?", "which?"]], "options": [["this", "that"]], "label": [1]})
    (found,) = examples.with_inputs(examples.hardest([chosen], 1), rows, [1])
    assert (found.label, found.predicted) == ("that", ["this"])
    assert found.text == ["which?", "– this", "– that"]


def test_rows_are_read_from_files_and_never_from_a_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("partial_lora.tasks.sources.read_hub", lambda *_: pytest.fail("asked the hub"))
    assert examples.rows_of({"task": {"name": "cifar10", "path": "uoft-cs/cifar10", "data_files": None}}) is None
    gone = {"train": str(tmp_path / "gone.parquet"), "test": str(tmp_path / "gone.parquet")}
    task = {"name": "mine", "path": "files", "data_files": gone, "modality": "text", "kind": "label"}
    assert examples.rows_of({"task": task, "model": {"name": "tiny_bert", "family": "encoder"}}) is None
