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


def attention(teacher=True, classes=tuple(data.SHAPES)):
    torch.manual_seed(0)
    split = data.Split(*data.draw_shapes(2, 16, seed=0)[:2])
    student = frskd.WideResNet(10, 1, 8)
    method = frskd.FRSKD(student, frskd.BiFPNc(student.channels, 8))
    if not teacher:
        del method.teacher
    loader = data.make_loader(split, train=False, batch_size=4, image_size=16)
    return figures.draw_attention("attention.png", method, loader, classes)


def predictions(name="ring"):
    """The student says class 1 of every pixel, the self-teacher class 2, by a map of a quarter of the size."""

    def logits(c, size):
        return torch.eye(4)[c].view(1, 4, 1, 1).expand(1, 4, size, size)

    method = nn.Module()
    method.student = SimpleNamespace(features=lambda x: (logits(1, x.shape[-1]), [x]))
    method.teacher = lambda feats: (logits(2, feats[0].shape[-1] // 4), feats)
    images, _, masks = data.draw_shapes(1, 16, seed=0)
    masks = (masks > 0).byte().repeat_interleave(2, 2)  # (8, 16, 32): background 0 and class 1, twice as wide
    masks[:, 0] = data.VOID
    classes = ["background", "disk", name, "unseen"]
    loader = data.MaskLoader(data.Split(images, masks), classes=classes, train=False, batch_size=4, image_size=16)
    return figures.draw_predictions("predictions.png", method, loader, classes)


def run(name="frskd", seed=0, terms=("ce", "ce_t", "kd", "feat"), metric="top1"):
    log = [dict(epoch=e, lr=0.1 if e < 3 else 0.01, seconds=1.0, images_per_s=9.0, train_top1=1.0, iou=dict(a=1.0))
           | dict.fromkeys(terms, 1 / e) | {metric: 10.0 * e + seed} for e in range(1, 5)]  # fmt: skip
    return dict(dataset="shapes", arch="wrn10_1", name=name, seed=seed), log, Path(name)


def words(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_attention_has_a_row_for_each_network_and_a_column_for_each_block():
    axes = attention().axes
    assert len(axes) == 4 * 2 * (1 + 3) and len(attention(teacher=False).axes) == 4 * (1 + 3)
    assert [ax.get_title() for ax in axes[:5]] == ["input", "block 1", "block 2", "block 3", ""]
    labels = [ax.texts[0].get_text().split("\n") for ax in axes[::4]]
    assert [true for true, _ in labels[::2]] == ["true: cross", "true: disk", "true: ring", "true: triangle"]
    assert [says.split(": ")[0] for _, says in labels] == ["classifier", "self-teacher"] * 4
    assert not np.array_equal(axes[1].images[1].get_array(), axes[5].images[1].get_array())


def test_heat_is_where_the_energy_is_whatever_its_size():
    feat = torch.tensor([[[0.0, 2], [-1, 0]], [[0, 2], [0, 0]], [[0, 2], [0, 0]]])
    for scale in (1, 1e30, 1e-15):
        assert_close(figures.heat(scale * feat), np.array([[0, 1], [1 / 12, 0]], dtype=np.float32))
    assert figures.heat(torch.zeros(3, 2, 2)).tolist() == [[0, 0], [0, 0]]


def test_predictions_tell_truth_student_and_self_teacher():
    figure = predictions()
    image, truth, student, teacher = figure.axes[:4]
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "truth", "student", "self-teacher"]
    colors = [np.unique(ax.images[0].get_array().reshape(-1, 3), axis=0) for ax in (truth, student, teacher)]
    palette = np.array([*figures.PALETTE, (1, 1, 1)], dtype=np.float32)
    assert_close(colors, [np.unique(palette[[0, 1, -1]], axis=0), palette[1:2], palette[2:3]])
    assert len(figure.axes) == 4 * 4 and words(figure) == ["background", "disk", "ring", "void, not counted"]
    assert image.get_data_ratio() == 0.5  # the mask's: not squeezed
    assert len(set(map(tuple, figures.class_colors(21)))) == 21  # of more classes than the palette has


def test_curves_have_a_colour_and_a_name_and_of_several_seeds_a_thick_mean():
    """Top-1 or mIoU and every term, with the drops of the learning rate."""
    runs = [run(seed=0, metric="miou"), run(seed=4, metric="miou"), run("baseline", terms=("ce",), metric="miou")]
    figure = figures.draw_curves("curves.png", runs)
    first, second, mean, baseline, drop = figure.axes[0].lines
    titles = ["mIoU in percent", "loss: ce", "loss: ce_t", "loss: kd", "loss: feat"]
    assert [ax.get_title() for ax in figure.axes] == titles
    assert first.get_xydata().tolist() == [[1, 10], [2, 20], [3, 30], [4, 40]] and drop.get_xdata() == [2.5, 2.5]
    assert first.get_color() == second.get_color() == mean.get_color() != baseline.get_color()
    assert mean.get_ydata().tolist() == [12, 22, 32, 42] and mean.get_linewidth() > 2 * first.get_linewidth()
    assert len(figure.axes[2].lines) == 3 + 1  # the baseline has no ce_t
    assert words(figure)[:2] == ["shapes wrn10_1 frskd, mean of 2", "shapes wrn10_1 baseline"]
    many = figures.draw_curves("curves.png", [run(f"frskd-alpha{i}", terms=()) for i in range(36)])
    assert len({(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines[:36]}) == 36


def test_nothing_is_cut_off_a_picture():
    name = r"$\no_formula$ WWWWWWWWWWWWWWWWWWWWWWWWWW"  # 40 letters
    attention(teacher=False, classes=[name] * 8), predictions(name)
    figures.draw_curves("curves.png", [run(name)])
    for pixels in map(imread, ("attention.png", "curves.png", "predictions.png")):
        assert all((side == 1).all() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
