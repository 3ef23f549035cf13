"""The pictures: what they show, and that they are whole."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from matplotlib.image import imread
from torch.testing import assert_close

import frskd
from experiments import data, figures

LONG = r"$\no_formula$ WWWWWWWWWWWWWWWWWWWWWWWWWW"  # a name of 40 letters


def assert_whole(path):
    """Nothing reaches the picture's edge: nothing is cut off."""
    pixels = imread(path)
    assert all((side == 1).all() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_attention_has_a_row_for_each_network_and_a_column_for_each_block():
    torch.manual_seed(0)
    split = data.Split(*data.draw_shapes(2, 16, seed=0)[:2])
    student = frskd.WideResNet(10, 1, 8)
    method = frskd.FRSKD(student, frskd.BiFPNc(student.channels, 8))
    loader = data.make_loader(split, train=False, batch_size=4, image_size=16)
    axes = figures.draw_attention("attention.png", method, loader, list(data.SHAPES)).axes
    assert len(axes) == 4 * 2 * (1 + 3)
    assert [ax.get_title() for ax in axes[:5]] == ["input", "block 1", "block 2", "block 3", ""]
    labels = [ax.texts[0].get_text().split("\n") for ax in axes[::4]]
    assert [true for true, _ in labels[::2]] == ["true: cross", "true: disk", "true: ring", "true: triangle"]
    assert [says.split(": ")[0] for _, says in labels] == ["classifier", "self-teacher"] * 4
    assert not np.array_equal(axes[1].images[1].get_array(), axes[5].images[1].get_array())
    del method.teacher
    assert len(figures.draw_attention("attention.png", method, loader, [LONG] * 8).axes) == 4 * (1 + 3)
    assert_whole("attention.png")


def test_heat_is_where_the_energy_is_whatever_its_size():
    feat = torch.tensor([[[0.0, 2], [-1, 0]], [[0, 2], [0, 0]], [[0, 2], [0, 0]]])
    for scale in (1, 1e30, 1e-15):
        assert_close(figures.heat(scale * feat), np.array([[0, 1], [1 / 12, 0]], dtype=np.float32))
    assert figures.heat(torch.zeros(3, 2, 2)).tolist() == [[0, 0], [0, 0]]


def test_predictions_tell_truth_student_and_self_teacher():
    """The student says class 1 of every pixel, the self-teacher class 2, by a map of a quarter of the size."""

    def logits(c, size):
        return torch.eye(4)[c].view(1, 4, 1, 1).expand(1, 4, size, size)

    method = nn.Module()
    method.student = SimpleNamespace(features=lambda x: (logits(1, x.shape[-1]), [x]))
    method.teacher = lambda feats: (logits(2, feats[0].shape[-1] // 4), feats)
    images, _, masks = data.draw_shapes(1, 16, seed=0)
    masks = (masks > 0).byte().repeat_interleave(2, 2)  # (8, 16, 32): background 0 and class 1, twice as wide
    masks[:, 0] = data.VOID
    classes = ["background", "disk", LONG, "unseen"]
    loader = data.MaskLoader(data.Split(images, masks), classes=classes, train=False, batch_size=4, image_size=16)
    figure = figures.draw_predictions("predictions.png", method, loader, classes)
    image, truth, student, teacher = figure.axes[:4]
    assert len(figure.axes) == 4 * 4
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "truth", "student", "self-teacher"]
    colors = [np.unique(ax.images[0].get_array().reshape(-1, 3), axis=0) for ax in (truth, student, teacher)]
    palette = np.array([*figures.PALETTE, (1, 1, 1)], dtype=np.float32)
    assert_close(colors, [np.unique(palette[[0, 1, -1]], axis=0), palette[1:2], palette[2:3]])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["background", "disk", LONG, "void, not counted"]
    assert image.get_data_ratio() == 0.5  # the mask's: not squeezed
    assert_whole("predictions.png")


def run(name="frskd", seed=0, terms=("ce", "ce_t", "kd", "feat")):
    log = [dict(epoch=e, lr=0.1 if e < 3 else 0.01, seconds=1.0, images_per_s=9.0, miou=10.0 * e + seed, iou={})
           | dict.fromkeys(terms, 1 / e) for e in range(1, 5)]  # fmt: skip
    return dict(dataset="shapes", arch="d0", name=name, seed=seed), log, Path(name)


def test_curves_have_a_colour_and_a_name_and_of_several_seeds_a_thick_mean():
    """The metric and every term, with the drops of the learning rate."""
    figure = figures.draw_curves("curves.png", [run(), run(seed=4), run(LONG, terms=("ce",))])
    first, second, mean, baseline, drop = figure.axes[0].lines
    titles = ["mIoU in percent", "loss: ce", "loss: ce_t", "loss: kd", "loss: feat"]
    assert [ax.get_title() for ax in figure.axes] == titles
    assert first.get_xydata().tolist() == [[1, 10], [2, 20], [3, 30], [4, 40]] and drop.get_xdata() == [2.5, 2.5]
    assert first.get_color() == second.get_color() == mean.get_color() != baseline.get_color()
    assert mean.get_ydata().tolist() == [12, 22, 32, 42] and mean.get_linewidth() > 2 * first.get_linewidth()
    assert len(figure.axes[2].lines) == 3 + 1  # the last run has no ce_t
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["shapes d0 frskd, mean of 2", f"shapes d0 {LONG}", "learning rate drops"]
    assert_whole("curves.png")
