"""seg.py: the network and its self-teacher, losses at each pixel, evaluation, and a run."""
import math
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close

import conftest
import frskd
import seg
from conftest import log_of, main, same, shown, voc_tree, weights
from experiments import data, figures, runs
from test_runs import before_step

pytestmark = pytest.mark.usefixtures("quick")
CURVES = figures.draw_curves


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    words = "--weights none --image-size 64 --batch-size 4 --accumulate 1 --clip-value 0.1 --device cpu --workers 0"
    return f"--dataset voc --data-dir {voc_tree(tmp_path_factory.mktemp('voc'))} {words}"


def resolved(words):
    return conftest.resolved(seg, f"--device cpu {words}")


def test_recipe_is_that_of_section_4_2_and_the_appendix():
    """60 epochs, lr 0.01 divided by 10 at 40, alpha 1, beta 50, warm-up 40; weights of ImageNet; the clean protocol."""
    args = resolved("--dataset voc")
    assert (args.epochs, args.lr, args.milestones, args.warmup_epochs, args.ramp_epochs) == (60, 0.01, [40], 40, 20)
    assert (args.alpha, args.beta, args.temperature, args.protocol, args.weights) == (1, 50, 1, "clean", "imagenet")
    assert (args.batch_size, args.accumulate, args.momentum, args.weight_decay) == (32, 2, 0.9, 5e-4)
    assert (args.image_size, args.clip_value, args.arch) == (512, None, "d0")
    args = resolved("--epochs 9 --warmup-epochs 5")
    assert (args.milestones, args.ramp_epochs) == ([6], 4)


@pytest.mark.parametrize("arch, dim", [("d0", 64), ("d1", 88)])
def test_efficientdet_has_six_levels_of_one_width(arch, dim):
    """P2..P5 from features[2], [3], [5], [7], P6 a pooled 1x1 convolution of the last, P7 a pooled P6: strides 4 to
    128, sizes rounded up; three BiFPN layers."""
    net, x = seg.EfficientDet(arch, 5), torch.randn(2, 3, 136, 200)  # at rest all maps are small before training
    logits, feats = net.features(x)
    stages = [x := stage(x) for stage in net.backbone]
    levels = [lateral(stages[i]) for lateral, i in zip(net.lateral, (2, 3, 5, 7, 7), strict=True)]
    levels[4] = F.max_pool2d(levels[4], 3, 2, 1)
    assert_close(feats, net.bifpn([*levels, F.max_pool2d(levels[4], 3, 2, 1)]))
    sizes = [(34, 50), (17, 25), (9, 13), (5, 7), (3, 4), (2, 2)]
    assert [tuple(f.shape[1:]) for f in feats] == [(dim, *size) for size in sizes] and net.channels == [dim] * 6
    assert logits.shape == (2, 5, 136, 200) and len(net.bifpn) == 3


def test_bifpn_layer_written_out():
    """Three levels: fast normalised fusion, swish, one separable 3x3 convolution and batch norm a node."""
    layer = seg.BiFPNLayer(4, levels=3).eval()
    v1, v2, w2, w3 = fusion = [p for p in layer.parameters() if p.ndim == 1 and len(p) < 4]
    for w in fusion:
        nn.init.uniform_(w, 0.5, 2)
    L1, L2, L3 = (torch.randn(2, 4, s, s) for s in (12, 6, 3))

    def node(node, w, *maps):
        fused = sum(w_k * x for w_k, x in zip(w, maps, strict=True)) / (w.sum() + 1e-4)
        depthwise, pointwise, bn = node.conv
        assert (depthwise.groups, depthwise.kernel_size, pointwise.kernel_size) == (4, (3, 3), (1, 1))
        return bn(pointwise(depthwise(fused * fused.sigmoid())))

    P2 = node(layer.top_down[1], v2, L2, F.interpolate(L3, scale_factor=2, mode="bilinear"))
    P1 = node(layer.top_down[0], v1, L1, F.interpolate(P2, scale_factor=2, mode="bilinear"))
    T2 = node(layer.bottom_up[0], w2, L2, P2, F.max_pool2d(P1, 3, 2, 1))
    T3 = node(layer.bottom_up[1], w3, L3, F.max_pool2d(T2, 3, 2, 1))
    assert_close(layer([L1, L2, L3]), [P1, T2, T3], rtol=1e-4, atol=1e-5)
    half = seg.BiFPNLayer(4, levels=3, bottom_up=False).eval()
    half.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith("top_down")})
    assert_close(half([L1, L2, L3]), [P1, P2, L3], rtol=1e-4, atol=1e-5)


def test_the_self_teacher_is_a_layer_a_top_down_path_and_a_head():
    """The head: a 3x3 convolution to 256, BN, swish, 3x3 to the classes, read at P2."""
    teacher, feats = seg.SelfTeacher(4, 3), [torch.randn(2, 4, s, s) for s in (16, 8, 4, 2, 1, 1)]
    (layer, top_down), (conv, bn, _, classifier) = teacher.bifpn, teacher.head
    logits, feats_t = teacher(feats)
    assert len(layer.bottom_up) == 5 and not top_down.bottom_up
    assert_close(feats_t, top_down(layer(feats)))
    hidden = F.silu(bn(F.conv2d(feats_t[0], conv.weight, padding=1)))
    assert_close(logits, F.conv2d(hidden, classifier.weight, classifier.bias, padding=1))
    assert conv.weight.shape == (256, 4, 3, 3) and classifier.weight.shape == (3, 256, 3, 3)


def test_pixel_losses_by_hand():
    """Void pixels are in no loss and get no gradient; the others are averaged; where all are void it is 0."""
    logits = torch.tensor([[0.0, 1, -1], [2, 0, 0], [9, -9, 3]]).T.view(1, 3, 1, 3).double().requires_grad_()
    logits_t = torch.tensor([[2.0, 0, 0], [0, 0, 1], [-9, 9, 9]]).T.view(1, 3, 1, 3).double()
    y = torch.tensor([[[0, 2, 255]]])
    kd, ce = seg.pixel_distillation(logits, logits_t, y, 1.0), seg.pixel_cross_entropy(logits, y)
    assert kd.item() == pytest.approx(0.791184, abs=1e-6)
    assert ce.item() == pytest.approx((math.log(1 + math.e + 1 / math.e) + math.log(math.exp(2) + 2)) / 2)
    (kd + ce).backward()
    assert (logits.grad[..., 2] == 0).all() and (logits.grad[..., :2] != 0).all()
    void = torch.full_like(y, 255)
    assert seg.pixel_cross_entropy(logits, void) == seg.pixel_distillation(logits, logits_t, void, 1.0) == 0


def test_alpha_and_beta_rise_after_the_warm_up():
    """Appendix: zero for 40 epochs of 60, then exp(-5 (1 - t)^2)."""
    shares = [seg.ramp(epoch, 40, 20) for epoch in (0, 39, 40, 49, 59, 80)]
    assert shares == pytest.approx([0, 0, 0.01097, 0.2865, 1, 1], abs=1e-4)


def test_terms_are_weighted_and_ramped_and_distillation_reaches_the_student_only():
    """alpha and beta times exp(-5/4) half way; in the warm-up the networks' cross-entropies alone, of which the
    self-teacher's trains the student's maps too."""
    method = seg.build(resolved("--alpha 2 --beta 50 --temperature 3 --warmup-epochs 1 --ramp-epochs 2"), 9)
    x, y = torch.randn(2, 3, 64, 64), torch.randint(9, (2, 64, 64))
    y[0, :20] = 255
    logits, feats = method.student.features(x)
    logits_t, feats_t = method.teacher(feats)
    logits_t = F.interpolate(logits_t, (64, 64), mode="bilinear")
    rows, rows_t = (z.permute(0, 2, 3, 1)[y != 255] for z in (logits, logits_t))
    share = math.exp(-5 / 4)
    expected = dict(
        ce=F.cross_entropy(logits, y, ignore_index=255),
        ce_t=F.cross_entropy(logits_t, y, ignore_index=255),
        kd=share * 2 * frskd.soft_label_distillation(rows, rows_t, 3.0),
        feat=share * 50 * frskd.attention_transfer(feats, feats_t),
    )
    method.set_epoch(1, 3)
    terms, detached = method(x, y)
    assert list(terms) == list(expected) and not detached.requires_grad
    assert_close(terms, expected)
    assert_close((detached, method(x)), (logits, logits))
    (terms["kd"] + terms["feat"]).backward(retain_graph=True)
    assert all(p.grad is None for p in method.teacher.parameters())
    method.student.zero_grad()
    terms["ce_t"].backward()
    assert method.student.backbone[0][0].weight.grad.any() and method.student.head[-1].weight.grad is None
    method.set_epoch(0, 3)
    assert list(method(x, y)[0]) == ["ce", "ce_t"]
    assert_close(seg.SegmentationBaseline(method.student)(x, y)[0], {"ce": terms["ce"]})


def test_of_the_baseline_the_last_bottom_up_path_alone_is_not_trained():
    """The head reads P2."""
    method = seg.build(resolved("--method baseline"), 3)
    method(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64)))[0]["ce"].backward()
    for name, p in method.named_parameters():
        assert (p.grad is not None) == p.requires_grad == ("bifpn.2.bottom_up" not in name), name


def test_a_batch_passes_in_parts_each_averaged_by_itself(monkeypatch):
    """loss / accumulate, as the authors': the mean of the parts' gradients; clipped element by element. The first step
    at learning rate 1 subtracts it."""
    monkeypatch.setattr(data, "SHAPES_DRAWN", ((2, 1), (1, 2)))
    words = "--accumulate 2 --clip-value 0.01 --epochs 1 --batch-size 16 --weight-decay 0 --lr 1 --predictions 9"
    _, loader, _ = seg.loaders(resolved(words))
    ((x, y),), method = loader.epoch(0), seg.build(resolved(words), 9)
    method.set_epoch(0, 1)
    for part, masks in zip(x.chunk(2), y.chunk(2)):  # of which one has more void
        (sum(method(part, masks)[0].values()) / 2).backward()
    assert main(seg, words, "--device cpu --output a") == 0
    after = weights("a")
    for name, p in method.named_parameters():
        assert_close(p - after[name], p.grad.clamp(-0.01, 0.01), rtol=0, atol=1e-6)


def evaluated(logits, mask):
    """Metrics of a network that gives these logits (C, h, w), on one mask."""
    net, batch = nn.Module(), (torch.zeros(1, 3, 64, 64), [torch.tensor(mask)])
    net.forward = lambda x: logits[None]
    loader = SimpleNamespace(classes="abc", device="cpu", epoch=lambda: [batch])
    metrics = seg.evaluate(net, loader, resolved(""))
    assert not net.training
    return metrics


def test_intersection_over_union_by_hand():
    """Three classes, one of them absent, and void pixels: class 0 has 2 of 3, class 1 has 4 of 5, class 2 none."""
    mask = [[0, 0, 0, 1, 1], [1, 1, 255, 255, 255]]
    logits = F.one_hot(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 2]])).permute(2, 0, 1).float()
    iou = dict(a=pytest.approx(200 / 3), b=80, c=None)
    assert evaluated(logits, mask) == dict(miou=pytest.approx(220 / 3), iou=iou)
    logits[1, 0, 0] = math.inf
    assert math.isnan(evaluated(logits, mask)["miou"])


def test_logits_are_brought_to_the_masks_own_size_by_bilinear_interpolation():
    """Of two positions to four: 1, 3/4, 1/4, 0 against 0, 1/4, 3/4, 1 and 4/5 everywhere: classes 0, 2, 2, 1."""
    logits = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.8]]).view(3, 1, 2)
    assert evaluated(logits, [[0, 2, 2, 1]])["miou"] == 100


def test_interrupted_and_resumed_a_run_ends_the_same(tiny, monkeypatch, capsys):
    """Bit for bit, in the warm-up, with another number of workers; either file is evaluated; pictures are drawn."""
    assert main(seg, tiny, "--epochs 3 --predictions 99 --output whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(runs.Meter, "update", before_step(2, partial(signal.raise_signal, signal.SIGINT)))
        assert main(seg, tiny, "--epochs 3 --output cut --predictions") == 130
    monkeypatch.setattr(figures, "draw_curves", CURVES)
    assert len(log_of("cut")) == 1 and main(seg, "--resume cut --workers 1") == 0
    assert same("whole", "cut")
    keys, log = "epoch lr ce ce_t {}miou iou images_per_s seconds", log_of("cut")
    assert [list(entry) for entry in log] == [keys.format(x).split() for x in ("", "", "kd feat ")]
    assert sorted(path.name for path in Path("cut").glob("*.png")) == ["curves.png", "predictions.png"]
    result = f"seed 0: mIoU {log[-1]['miou']:.2f} "
    assert f"{result}(last epoch; best " in capsys.readouterr().out
    assert main(seg, "--eval cut/last.pt") == main(seg, "--eval cut/student.pt") == 0
    said = capsys.readouterr().out
    assert said.count(f"{result}(on VOC2007 test") == 2 and said.count("its self-teacher: mIoU ") == 1


def test_bf16_trains_and_a_protocol_that_leaks_is_named(tiny, capsys):
    assert main(seg, tiny, "--method baseline --protocol paper --amp --epochs 1 --output a") == 0
    assert "seg.py: note: 2 of the 2 test images are also training images" in shown(capsys.readouterr().err)


def test_the_backbone_starts_from_a_file_which_a_resume_does_not_ask_for():
    """Of torchvision's, with the classifier that the backbone lacks. Its memory is channels last, which is faster."""
    net, args = torchvision.models.efficientnet_b0(), resolved("--weights b0.pth")
    torch.save(net.state_dict(), "b0.pth")
    backbone = seg.build(args, 5).student.backbone
    assert_close(backbone.state_dict(), net.features[:8].state_dict(), rtol=0, atol=0)
    assert backbone[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    Path("b0.pth").unlink()
    seg.build(args, 5, resumed=True)


@pytest.mark.slow
def test_cost_of_the_networks_and_of_their_self_teachers(capsys):
    """Parameters in millions, FLOPs in billions at 512 px."""
    assert main(seg, "--cost") == 0
    costs = [[float(n) for n in line.split("|")[2:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert costs == [[3.989, 5.662, 0.268, 3.464], [6.687, 7.886, 0.382, 4.566]]
