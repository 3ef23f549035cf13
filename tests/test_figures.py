"""The pictures: what they show, and that they are whole."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
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


class Constant(nn.Module):
    """The student says class 1 of every pixel, the self-teacher class 2, by a map of a quarter of the size."""

    def __init__(self, teacher=True):
        super().__init__()
        self.student = SimpleNamespace(features=lambda x: (self.logits(1, x.shape[-1]), [x]))
        if teacher:
            self.teacher = lambda feats: (self.logits(2, feats[0].shape[-1] // 4), feats)

    def logits(self, c, size):
        return torch.eye(4)[c].view(1, 4, 1, 1).expand(1, 4, size, size)


def predictions(method, name="ring"):
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
    axes, alone = attention().axes, attention(teacher=False).axes
    assert len(axes) == 4 * 2 * (1 + 3) and len(alone) == 4 * (1 + 3)
    assert [ax.get_title() for ax in axes[:5]] == ["input", "block 1", "block 2", "block 3", ""]
    labels = [ax.texts[0].get_text().split("\n") for ax in axes[::4]]
    assert [true for true, _ in labels[::2]] == ["true: cross", "true: disk", "true: ring", "true: triangle"]
    assert [says.split(": ")[0] for _, says in labels] == ["classifier", "self-teacher"] * 4
    assert not np.array_equal(axes[1].images[1].get_array(), axes[5].images[1].get_array())


def test_heat_is_where_the_energy_is_whatever_its_size():
    feat = torch.zeros(3, 2, 2)
    feat[:, 0, 1], feat[0, 1, 0] = 2, -1
    expected = np.array([[0, 1], [1 / 12, 0]], dtype=np.float32)
    for scale in (1, 1e30, 1e-15, torch.tensor(4.0, dtype=torch.bfloat16)):
        assert_close(figures.heat(scale * feat), expected)
    assert figures.heat(torch.full((3, 1, 1), 5.0)).tolist() == [[1]]
    assert figures.heat(torch.zeros(3, 2, 2)).tolist() == [[0, 0], [0, 0]]


def test_predictions_tell_truth_student_and_self_teacher():
    figure = predictions(Constant())
    image, truth, student, teacher = figure.axes[:4]
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "truth", "student", "self-teacher"]
    assert len(figure.axes) == 4 * 4 and len(predictions(Constant(teacher=False)).axes) == 4 * 3
    colors = [np.unique(ax.images[0].get_array().reshape(-1, 3), axis=0) for ax in (truth, student, teacher)]
    palette = np.array(figures.PALETTE, dtype=np.float32)
    assert_close(colors[0], np.unique(np.array([*palette[:2], [1, 1, 1]], dtype=np.float32), axis=0))
    assert_close(colors[1], palette[1:2])
    assert_close(colors[2], palette[2:3])
    assert words(figure) == ["background", "disk", "ring", "void, not counted"]  # those that occur
    assert image.get_window_extent().size.tolist() == pytest.approx(truth.get_window_extent().size)
    assert image.get_data_ratio() == 0.5  # the mask's: not squeezed


@pytest.mark.parametrize("cone", [
    [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],  # Machado et al., 2009
    [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
], ids=["red", "green", "blue"])  # fmt: skip
def test_ten_classes_and_void_are_told_apart_without_a_cone(cone):
    linear = torch.tensor([*figures.class_colors(10), (1, 1, 1)]) ** 2.2 @ torch.tensor(cone).T
    assert torch.pdist(linear.clamp(0, 1) ** (1 / 2.2)).min() > 0.15
    assert len(set(map(tuple, figures.class_colors(21)))) == 21


def test_curves_of_one_run():
    figure = figures.draw_curves("curves.png", [run()])
    titles = ["top-1 in percent", "loss: ce", "loss: ce_t", "loss: kd", "loss: feat"]
    assert [ax.get_title() for ax in figure.axes] == titles
    for ax in figure.axes:
        curve, drop = ax.lines
        assert drop.get_xdata() == [2.5, 2.5] and drop.get_linestyle() == ":"
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 10], [2, 20], [3, 30], [4, 40]]
    assert words(figure) == ["shapes wrn10_1 frskd", "learning rate drops"]


def test_curves_of_several_runs_have_a_colour_a_name_and_a_thick_mean_of_its_seeds():
    found = [run(seed=0, metric="miou"), run(seed=4, metric="miou"), run("baseline", terms=("ce",), metric="miou")]
    figure = figures.draw_curves("curves.png", found)
    first, second, average, baseline, _ = figure.axes[0].lines
    assert figure.axes[0].get_title() == "mIoU in percent"
    assert first.get_color() == second.get_color() == average.get_color() != baseline.get_color()
    assert average.get_ydata().tolist() == [12, 22, 32, 42] and average.get_linewidth() > 2 * first.get_linewidth()
    assert len(figure.axes[2].lines) == 3 + 1  # the baseline has no ce_t
    assert words(figure)[:2] == ["shapes wrn10_1 frskd, mean of 2", "shapes wrn10_1 baseline"]
    many = figures.draw_curves("curves.png", [run(f"frskd-alpha{i}", terms=()) for i in range(36)])
    assert len({(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines[:36]}) == 36


def test_a_picture_is_whole_and_always_the_same():
    name = r"$\no_formula$ WWWWWWWWWWWWWWWWWWWWWWWWWW"  # 40 letters
    attention(teacher=False, classes=[name] * 8)
    figures.draw_curves("curves.png", [run(name)])
    predictions(Constant(), name)
    before = Path("predictions.png").read_bytes()
    predictions(Constant(), name)
    assert Path("predictions.png").read_bytes() == before
    assert sorted(map(str, Path().iterdir())) == ["attention.png", "curves.png", "predictions.png"]
    for path in Path().iterdir():
        pixels = imread(path)
        assert all((side == 1).all() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))  # nothing is cut
