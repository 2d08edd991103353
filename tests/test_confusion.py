"""The confusion matrix and the scores that come from it, against plain loops over the pixels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import ROOT
from pipelines.runs.confusion import confusion_matrix, iou, summary

CLASSES, IGNORE = 4, 255


def brute_force(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    counts = np.zeros((len(label), CLASSES, CLASSES), dtype=np.int64)
    for image in range(len(label)):
        for guess, truth in zip(prediction[image].ravel(), label[image].ravel(), strict=True):
            if truth != IGNORE:
                counts[image, truth, guess] += 1
    return counts


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    pixels = int(np.prod(shape))
    label = draw(st.lists(st.sampled_from([*range(CLASSES), IGNORE]), min_size=pixels, max_size=pixels))
    guess = draw(st.lists(st.integers(0, CLASSES - 1), min_size=pixels, max_size=pixels))
    return np.reshape(guess, shape), np.reshape(label, shape)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([torch.int64, torch.uint8, torch.int32]))
def test_counts_equal_loops_over_the_pixels(batch: tuple[np.ndarray, np.ndarray], dtype: torch.dtype) -> None:
    prediction, label = batch
    counts = confusion_matrix(
        torch.tensor(prediction, dtype=dtype), torch.tensor(label, dtype=dtype), CLASSES, IGNORE
    )
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), brute_force(prediction, label))


@settings(max_examples=60, deadline=None)
@given(batches())
def test_iou_equals_sets_of_pixels(batch: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, label = batch
    scores = iou(brute_force(prediction, label).sum(axis=0))
    assert scores.dtype == np.float64
    for c in range(CLASSES):
        truth, guess = label == c, (prediction == c) & (label != IGNORE)
        if truth.any():
            assert scores[c] == pytest.approx((truth & guess).sum() / (truth | guess).sum(), abs=1e-12)
        else:
            assert np.isnan(scores[c])


def test_truth_is_the_row_and_the_prediction_the_column() -> None:
    counts = confusion_matrix(torch.tensor([[[2]]]), torch.tensor([[[1]]]), CLASSES, IGNORE)
    assert counts[0, 1, 2] == 1
    assert counts.sum() == 1


def test_what_is_predicted_on_ignored_pixels_does_not_matter() -> None:
    label = torch.tensor([[[0, IGNORE, IGNORE, 3]]])
    counts = [
        confusion_matrix(torch.tensor([[[0, a, b, 3]]]), label, CLASSES, IGNORE)
        for a, b in ((0, 0), (3, IGNORE))
    ]
    assert torch.equal(*counts)
    assert counts[0].sum() == 2


def test_an_ignore_index_inside_the_range_of_the_classes_is_left_out_too() -> None:
    label = torch.tensor([[[0, 1, 2]]])
    assert confusion_matrix(label, label, 3, ignore_index=1)[0].diagonal().tolist() == [1, 0, 1]


@pytest.mark.parametrize(("prediction", "label"), [(CLASSES, 0), (0, CLASSES), (-1, 0), (0, -1)])
def test_values_outside_the_classes_are_refused(prediction: int, label: int) -> None:
    with pytest.raises(ValueError, match="outside the 4 classes"):
        confusion_matrix(torch.tensor([[[prediction]]]), torch.tensor([[[label]]]), CLASSES, IGNORE)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="B, H, W"):
        confusion_matrix(
            torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=torch.int64), CLASSES, IGNORE
        )


def test_small_integer_types_do_not_overflow() -> None:
    """19 × 20 + 19 does not fit into the bytes that labels are kept in."""
    label = torch.full((2, 3, 3), 19, dtype=torch.uint8)
    counts = confusion_matrix(label, label, 20, IGNORE)
    assert counts[:, 19, 19].tolist() == [9, 9]
    assert counts.sum() == 18


def test_counts_beyond_float32_stay_exact() -> None:
    """2^24 + 1 correct pixels of 2^24 + 2: float32 would lose one of them."""
    counts = np.array([[[2**24, 0], [0, 0]], [[1, 0], [1, 0]]])
    assert summary(counts, ["a", "b"])["pixel_accuracy"] == 99.999994


def test_summary_by_hand() -> None:
    first = [[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    second = [[1, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5]]
    scores = summary(np.array([first, second]), ["road", "car", "sky", "pole"])
    # Over the images: road 4 hits of 6 + 6 - 4, car 2 of 4 + 3 - 2, pole 5 of 5. Sky has no pixel in the
    # truth:
    # one stray prediction does not make it a class of the split, but counts against the road it covers.
    assert scores["iou"] == {"road": 50.0, "car": 40.0, "sky": None, "pole": 100.0}
    assert scores["miou"] == round(190 / 3, 6)
    assert scores["pixel_accuracy"] == round(100 * 11 / 15, 6)
    assert scores["mean_accuracy"] == round(100 * (4 / 6 + 2 / 4 + 1) / 3, 6)


def test_summary_of_the_split_is_not_the_mean_over_its_images() -> None:
    counts = np.array([[[1, 0], [0, 1]], [[0, 8], [0, 8]]])
    assert summary(counts, ["a", "b"])["miou"] == round(100 * (1 / 9 + 9 / 17) / 2, 6)


def test_a_split_without_a_labelled_pixel_has_no_score() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        summary(np.zeros((2, 3, 3), dtype=np.int64), ["a", "b", "c"])


def test_the_report_is_made_without_torch() -> None:
    code = "import sys, pipelines.stages.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
