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
    predicted = [int(chance < 0.5) for chance in chances]
    return pa.table(
        {
            "label": [label] * len(chances),
            "prediction": predicted,
            "label_name": ["cat"] * len(chances),
            "prediction_name": [("cat", "dog")[each] for each in predicted],
            "logits": [np.log([chance, 1 - chance]).astype(np.float32) for chance in chances],
        }
    )


def test_the_worst_over_all_runs_come_first():
    worst = examples.hardest([classes([0.9, 0.2, 0.6, 0.4]), classes([0.9, 0.2, 0.1, 0.4])], 2)
    assert [(example.index, example.label, example.predicted) for example in worst] == [
        (1, "cat", ["dog", "dog"]),
        (2, "cat", ["cat", "dog"]),
    ]
    losses = [-np.log(0.2), -(np.log(0.6) + np.log(0.1)) / 2]
    assert [example.loss for example in worst] == pytest.approx(losses, rel=1e-5)
    assert examples.hardest([], 2) == []
    with pytest.raises(ValueError, match="label"):
        examples.hardest([classes([0.9], label=2)], 1)


@pytest.mark.parametrize(
    ("columns", "worst", "losses"),
    [
        ({"label": [1.0, 2.0, 3.0], "prediction": [1.0, 2.5, 2.0]}, [2, 1], [1, 0.25]),
        ({"label": [0, 1], "prediction": [0, 0], "scores": [[0.6, 0.4], [0.7, 0.3]]}, [1, 0], -np.log([0.3, 0.6])),
        ({"label": [1, 2], "prediction": [1, 0]}, [1, 0], [1, 0]),
        (  # members of other kinds, of which each has the columns that are its own
            {
                "member": ["chosen", "written"],
                "label": ["0", "a text"],
                "prediction": ["1", "a test"],
                "loss": [None, 0.75],
                "scores": [None, None],
            },
            [0, 1],
            [1, 0.75],
        ),
        (  # members with outputs of unlike length
            {
                "member": ["a", "b"],
                "label": [0, 5],
                "prediction": [0, 5],
                "label_name": ["no", "six"],
                "prediction_name": ["no", "six"],
                "logits": [np.log([0.9, 0.1]), np.log([0.1] * 5 + [0.5])],
            },
            [1, 0],
            -np.log([0.5, 0.9]),
        ),
    ],
)
def test_every_kind_of_prediction_has_a_loss(columns, worst, losses):
    hardest = examples.hardest([pa.table(columns)], 2)
    assert [each.index for each in hardest] == worst
    assert [each.loss for each in hardest] == pytest.approx(losses)


def test_inputs_are_shown_of_the_same_rows_alone():
    frame = classes([0.9, 0.2])
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    rows = Dataset.from_dict({"image": images, "label": [0, 0]})
    same, fewer, relabelled = rows, rows.select([0]), rows.map(lambda row: {"label": 1})
    shown = [
        examples.with_inputs(examples.hardest([frame], 1), each, [0, 0])[0].image for each in (same, fewer, relabelled)
    ]
    assert shown[0].startswith("data:image/webp;base64,")
    assert shown[1:] == ["", ""]


def test_grey_of_16_bits_is_shown_as_a_model_sees_it():
    grey = Image.fromarray((np.arange(64).reshape(8, 8) * 1024).astype(np.uint16))
    assert np.asarray(examples.rgb(grey))[..., 0].ravel().tolist() == [4 * each for each in range(64)]


def test_texts_and_options_are_printed():
    rows = Dataset.from_dict({"text": ["one", "two " * 500], "text_pair": ["a", "b"], "label": [0, 0]})
    (worst,) = examples.with_inputs(examples.hardest([classes([0.9, 0.2])], 1), rows, [0, 0])
    assert len(worst.text[0]) == 400
    assert worst.text[1] == "b"
    chosen = pa.table({"label": [1], "prediction": [0], "scores": [[0.7, 0.3]]})
    rows = Dataset.from_dict({"prompts": [["which?", "which?"]], "options": [["this", "that"]], "label": [1]})
    (worst,) = examples.with_inputs(examples.hardest([chosen], 1), rows, [1])
    assert (worst.label, worst.predicted) == ("that", ["this"])
    assert worst.text == ["which?", "– this", "– that"]


def test_rows_are_read_from_files_and_never_from_a_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("partial_lora.tasks.sources.read_hub", lambda *_: pytest.fail("the hub was read"))
    assert examples.rows_of({"task": {"name": "cifar10", "path": "uoft-cs/cifar10", "data_files": None}}) is None
    gone = {"train": str(tmp_path / "gone.parquet"), "test": str(tmp_path / "gone.parquet")}
    task = {"name": "mine", "path": "files", "data_files": gone, "modality": "text", "kind": "label"}
    assert examples.rows_of({"task": task, "model": {"name": "tiny_bert", "family": "encoder"}}) is None
