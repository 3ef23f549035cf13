"""seg.py: the network and its self-teacher, losses at each pixel, evaluation, and a run."""

import functools
import json
import math
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.testing import assert_close

import frskd
import seg
from conftest import log_of, main, same, shown, voc_tree
from experiments import data, figures, runs
from test_runs import before_step, without_batch_norm

TINY = "--dataset voc --data-dir {} --weights none --image-size 64 --batch-size 4 --accumulate 1 --clip-value 0.1"
TINY += " --device cpu --workers 0"
CURVES = figures.draw_curves


@pytest.fixture(scope="module", autouse=True)
def few():
    """`shapes` with eight images each, and no curves, which tests/test_figures.py looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_DRAWN", ((1, 1), (1, 2)))
        patch.setattr(figures, "draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TINY.format(voc_tree(tmp_path_factory.mktemp("voc")))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A finished run of three epochs of one step, the last of them with distillation."""
    folder = tmp_path_factory.mktemp("run") / "a"
    assert main(seg, tiny, "--epochs 3 --predictions 99 --output", folder) == 0
    return folder


def resolved(words=""):
    given = vars(seg.parser().parse_args(words.split()))
    return runs.resolved(seg.parser(), seg.recipe, given)


def test_recipe_is_that_of_section_4_2_and_the_appendix():
    """60 epochs, lr 0.01 divided by 10 at 40, alpha 1, beta 50, warm-up 40; weights of ImageNet; the clean protocol."""
    args = resolved("--dataset voc")
    assert (args.epochs, args.lr, args.milestones, args.warmup_epochs, args.ramp_epochs) == (60, 0.01, [40], 40, 20)
    assert (args.alpha, args.beta, args.temperature, args.protocol, args.weights) == (1, 50, 1, "clean", "imagenet")
    assert (args.batch_size, args.accumulate, args.momentum, args.weight_decay) == (32, 2, 0.9, 5e-4)
    assert (args.image_size, args.clip_value, args.arch) == (512, None, "d0")
    args = resolved("--epochs 9 --warmup-epochs 5")
    assert (args.weights, args.milestones, args.ramp_epochs) == ("none", [6], 4)
    assert args.name == "frskd-warmup-epochs5-epochs9"


# ------------------------------------------------------------------------------------------------- the networks


@functools.cache
def efficientdet(arch="d0"):
    torch.manual_seed(0)
    return seg.EfficientDet(arch, 5).eval()


@pytest.mark.parametrize("arch, dim", [("d0", 64), ("d1", 88)])
def test_efficientdet_has_six_levels_of_one_width(arch, dim):
    """P2..P7, strides 4 to 128, sizes rounded up; three BiFPN layers."""
    net = efficientdet(arch)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=arch == "d1"):
        logits, feats = net.features(torch.randn(1, 3, 136, 200))
    assert logits.shape == (1, 5, 136, 200) and logits.dtype == torch.float32
    sizes = [(34, 50), (17, 25), (9, 13), (5, 7), (3, 4), (2, 2)]
    assert [tuple(f.shape[1:]) for f in feats] == [(dim, *size) for size in sizes] and net.channels == [dim] * 6
    assert [lateral[0].in_channels for lateral in net.lateral] == [24, 40, 112, 320, 320] and len(net.bifpn) == 3


def test_levels_are_the_backbones_stages_and_pooled_below():
    """P2..P5 from features[2], [3], [5], [7]; P6 is a pooled 1x1 convolution of the last, P7 a pooled P6."""
    net, stages = efficientdet(), [torch.randn(2, 3, 64, 64)]
    for stage in net.backbone:
        stages.append(stage(stages[-1]))
    expected = [lateral(stages[i + 1]) for lateral, i in zip(net.lateral, (2, 3, 5, 7, 7))]
    expected[4] = F.max_pool2d(expected[4], 3, 2, 1)
    assert_close(net.levels(stages[0]), [*expected, F.max_pool2d(expected[4], 3, 2, 1)])


def test_bifpn_layer_written_out():
    """Three levels: fast normalised fusion, swish, one separable 3x3 convolution and batch norm a node."""
    torch.manual_seed(0)
    layer = seg.BiFPNLayer(4, levels=3).eval()
    top, bottom = [dict(layer.named_parameters()) for layer in (layer.top_down, layer.bottom_up)]
    fusion = [p for name, p in layer.named_parameters() if p.ndim == 1 and len(p) in (2, 3)]
    assert [len(p) for p in fusion] == [2, 2, 3, 2] and len(top) == len(bottom) == 2 * 5
    for p in fusion:
        nn.init.uniform_(p, 0.5, 2)
    L1, L2, L3 = (torch.randn(2, 4, s, s) for s in (12, 6, 3))

    def node(node, w, *maps):
        fused = sum(w_k * x for w_k, x in zip(w, maps)) / (w.sum() + 1e-4)
        depthwise, pointwise, bn = node.conv
        assert (depthwise.groups, depthwise.kernel_size, pointwise.kernel_size) == (4, (3, 3), (1, 1))
        return bn(pointwise(depthwise(fused * fused.sigmoid())))

    v1, v2, w2, w3 = fusion
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
    teacher, node = seg.SelfTeacher(64, 21), 9 * 64 + 64**2 + 2 * 64
    layer, top_down = 10 * node + 5 * 2 + 4 * 3 + 2, 5 * node + 5 * 2
    assert sum(p.numel() for p in teacher.bifpn.parameters()) == layer + top_down
    assert sum(p.numel() for p in teacher.head.parameters()) == 64 * 256 * 9 + 2 * 256 + 256 * 21 * 9 + 21
    feats = [torch.randn(2, 64, s, s) for s in (16, 8, 4, 2, 1, 1)]
    logits, feats_t = teacher.eval()(feats)
    assert_close(logits, teacher.head(feats_t[0]))
    assert logits.shape == (2, 21, 16, 16) and [f.shape for f in feats_t] == [f.shape for f in feats]


# ------------------------------------------------------------------------------------------- losses and the ramp

VOID_CASE = (  # two pixels with the logits of a soft-label loss worked by hand, then a void one
    torch.tensor([[0.0, 1, -1], [2, 0, 0], [9, -9, 3]]).T.view(1, 3, 1, 3).double(),
    torch.tensor([[2.0, 0, 0], [0, 0, 1], [-9, 9, 9]]).T.view(1, 3, 1, 3).double(),
    torch.tensor([[[0, 2, 255]]]),
)


def test_pixel_losses_by_hand():
    """Void pixels are in no loss and get no gradient; the others are averaged; where all are void it is 0."""
    logits, logits_t, y = VOID_CASE
    logits = logits.clone().requires_grad_()
    kd, ce = seg.pixel_distillation(logits, logits_t, y, 1.0), seg.pixel_cross_entropy(logits, y)
    assert kd.item() == pytest.approx(0.791184, abs=1e-6)
    expected = (math.log(1 + math.e + 1 / math.e) + math.log(math.exp(2) + 2)) / 2  # labels with logit 0
    assert ce.item() == pytest.approx(expected)
    (kd + ce).backward()
    assert (logits.grad[..., 2] == 0).all() and (logits.grad[..., :2] != 0).all()
    void = torch.full_like(y, 255)
    assert seg.pixel_cross_entropy(logits, void) == seg.pixel_distillation(logits, logits_t, void, 1.0) == 0


@pytest.mark.parametrize("epoch, value", [(0, 0), (39, 0), (40, 0.01097), (49, 0.2865), (59, 1), (80, 1)])
def test_alpha_and_beta_rise_after_the_warm_up(epoch, value):
    """Appendix: zero for 40 epochs of 60, then exp(-5 (1 - t)^2)."""
    assert seg.ramp(epoch, 40, 20) == pytest.approx(value, abs=1e-4)


class Pixels(nn.Module):
    """A student without batch norm: 3 -> 4 channels at stride 4, six levels by pooling."""

    channels = [4] * 6

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 9, 1)

    def features(self, x):
        feats = [F.silu(self.conv(x.to(self.conv.weight.dtype)))]
        feats += [F.adaptive_avg_pool2d(feats[0], size) for size in (8, 6, 4, 3, 2)]
        return F.interpolate(self.head(feats[0]), x.shape[-2:]), feats

    def forward(self, x):
        return self.features(x)[0]


def pixel_method(alpha=1.0, beta=50.0, temperature=1.0):
    torch.manual_seed(0)
    weights = dict(alpha=alpha, beta=beta, temperature=temperature)
    teacher = without_batch_norm(seg.SelfTeacher(4, 9))
    method = seg.SegmentationFRSKD(Pixels(), teacher, warmup_epochs=1, ramp_epochs=2, **weights).double()
    method.set_epoch(1, 3)
    return method


def test_terms_are_weighted_and_ramped():
    """alpha and beta times exp(-5/4) half way; in the warm-up the networks' cross-entropies alone."""
    method, x, y = pixel_method(alpha=2), torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    y[0, :20] = 255
    logits, feats = method.student.features(x)
    logits_t, feats_t = method.teacher(feats)
    logits_t = F.interpolate(logits_t, (64, 64), mode="bilinear")
    rows, rows_t = (z.permute(0, 2, 3, 1)[y != 255] for z in (logits, logits_t))
    share = math.exp(-5 / 4)
    expected = dict(
        ce=F.cross_entropy(logits, y, ignore_index=255),
        ce_t=F.cross_entropy(logits_t, y, ignore_index=255),
        kd=share * 2 * frskd.soft_label_distillation(rows, rows_t, 1.0),
        feat=share * 50 * frskd.attention_transfer(feats, feats_t),
    )
    terms, detached = method(x, y)
    assert list(terms) == list(expected) and not detached.requires_grad
    assert_close(terms, expected, rtol=1e-6, atol=1e-9)
    assert_close(detached, logits.detach())
    assert_close(method(x), logits)
    method.set_epoch(0, 3)
    assert list(method(x, y)[0]) == ["ce", "ce_t"]
    assert list(seg.SegmentationBaseline(method.student)(x, y)[0].items()) == [("ce", terms["ce"])]


def reached(method, loss):
    method.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_distillation_updates_the_student_only():
    """And the self-teacher's cross-entropy trains the student's maps."""
    method, x, y = pixel_method(), torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    terms, _ = method(x, y)
    assert all(name.startswith("student") for name in reached(method, terms["kd"] + terms["feat"]))
    names = reached(method, terms["ce_t"])
    assert "student.conv.weight" in names and "student.head.weight" not in names
    assert {f"teacher.head.{name}" for name, _ in method.teacher.head.named_parameters()} <= names


def test_every_parameter_that_is_trained_gets_a_gradient():
    """The head reads P2: the baseline's last bottom-up path, and nothing else, stays as initialised."""
    x, y, untrained = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64)), {}
    for name in ("baseline", "frskd"):
        method = seg.build(resolved(f"--method {name} --device cpu" + " --warmup-epochs 0" * (name == "frskd")), 3)
        getattr(method, "set_epoch", lambda *_: None)(0, 1)
        sum(method(x, y)[0].values()).backward()
        fixed = {n for n, p in method.named_parameters() if not p.requires_grad}
        assert fixed == {n for n, p in method.named_parameters() if p.grad is None}
        untrained[name] = fixed
    assert untrained["baseline"] == {f"student.bifpn.2.{n}" for n, _ in seg.BiFPNLayer(64).named_parameters()
                                     if n.startswith("bottom_up")}  # fmt: skip
    assert not untrained["frskd"]


class Recorded(torch.optim.SGD):
    def step(self):
        GRADIENTS.append([p.grad.clone() for p in self.param_groups[0]["params"] if p.grad is not None])
        super().step()


GRADIENTS = []


def one_step(monkeypatch, words):
    """Gradients of a first step on the eight images of `shapes`, of a network without batch norm."""
    GRADIENTS.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Recorded)
        patch.setattr(seg, "build", lambda *_, **__: pixel_method())
        words += " --device cpu --epochs 1 --batch-size 8 --overwrite --predictions 9 --output a"
        assert main(seg, words) == 0
    (gradients,) = GRADIENTS
    return gradients


def test_a_batch_passes_in_parts_each_averaged_by_itself(monkeypatch):
    """loss / accumulate, as the authors': the mean of the parts' gradients; clipped element by element."""
    whole, halves = one_step(monkeypatch, "--clip-value 1e9"), one_step(monkeypatch, "--accumulate 2 --clip-value 1e9")
    images, loader, _ = seg.loaders(resolved("--batch-size 8 --device cpu"))
    ((x, y),) = loader.epoch(0)
    for parts, gradients in ((1, whole), (2, halves)):
        method, steps = pixel_method(), []
        method.set_epoch(0, 1)
        for part, masks in zip(x.chunk(parts), y.chunk(parts)):
            method.zero_grad()
            sum(method(part, masks)[0].values()).backward()
            steps.append([p.grad for p in method.parameters() if p.grad is not None])
        assert_close([sum(gs) / parts for gs in zip(*steps)], gradients, rtol=1e-5, atol=1e-9)
    assert max((a - b).abs().max() for a, b in zip(whole, halves)) > 1e-6  # void is unequal among the parts
    clipped = one_step(monkeypatch, "--clip-value 1e-3")
    assert_close(clipped, [g.clamp(-1e-3, 1e-3) for g in whole], rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- evaluation


class Answers(nn.Module):
    """Predicts one fixed map of three classes."""

    def __init__(self, predicted):
        super().__init__()
        self.logits = F.one_hot(predicted, 3).permute(2, 0, 1)[None].float()

    def forward(self, x):
        return self.logits


def evaluated(net, mask):
    masks = SimpleNamespace(classes=["a", "b", "c"], device="cpu", epoch=lambda: [(torch.zeros(1, 3, 64, 64), [mask])])
    return seg.evaluate(net.train(), masks, resolved("--device cpu"))


def test_intersection_over_union_by_hand(refused):
    """Three classes, one of them absent, and void pixels: class 0 has 2 of 3, class 1 has 4 of 5, class 2 none."""
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 255, 255, 255]])
    net = Answers(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 2]]))
    metrics = evaluated(net, mask)
    assert metrics == dict(miou=pytest.approx(220 / 3), iou=dict(a=pytest.approx(200 / 3), b=80, c=None))
    assert not net.training
    net.logits[0, 1, 0, 0] = math.inf
    assert math.isnan(evaluated(net, mask)["miou"])
    with pytest.raises(runs.UserError, match="every pixel of the test masks is void"):
        evaluated(net, torch.full((2, 5), 255))


def test_logits_are_brought_to_the_masks_own_size_by_bilinear_interpolation():
    """Of two positions to four: 1, 3/4, 1/4, 0 against 0, 1/4, 3/4, 1 and 4/5 everywhere: classes 0, 2, 2, 1."""
    net = Answers(torch.zeros(1, 2, dtype=torch.long))
    net.logits = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.8]]).view(1, 3, 1, 2)
    assert evaluated(net, torch.tensor([[0, 2, 2, 1]]))["miou"] == 100


# --------------------------------------------------------------------------------------------------------- runs


def test_a_run_logs_distillation_after_the_warm_up(run):
    keys = "epoch lr ce ce_t {}miou iou images_per_s seconds"
    assert [list(entry) for entry in log_of(run)] == [keys.format(x).split() for x in ("", "", "kd feat ")]
    assert [entry["lr"] for entry in log_of(run)] == pytest.approx([0.01, 0.01, 0.001])
    iou = log_of(run)[-1]["iou"]
    known = [value for value in iou.values() if value is not None]
    assert list(iou) == list(data.VOC_CLASSES) and log_of(run)[-1]["miou"] == pytest.approx(sum(known) / len(known))
    args = json.loads((run / "args.json").read_text())
    assert args["name"] == "frskd-image-size64-weightsnone-epochs3-batch-size4-accumulate1-clip-value0.1"
    assert (args["train_images"], args["test_images"], args["test_images_in_training"]) == (4, 2, 0)


def test_interrupted_and_resumed_a_run_ends_the_same(run, tiny, monkeypatch, capsys):
    """Bit for bit, in the warm-up, with another number of workers; either file is evaluated; pictures are drawn."""
    with monkeypatch.context() as patch:
        patch.setattr(runs.Meter, "update", before_step(2, partial(signal.raise_signal, signal.SIGINT)))
        assert main(seg, tiny, "--epochs 3 --output cut --predictions") == 130
    monkeypatch.setattr(figures, "draw_curves", CURVES)
    assert len(log_of("cut")) == 1 and main(seg, "--resume cut --workers 1") == 0
    assert same(run, "cut")
    assert sorted(path.name for path in Path("cut").glob("*.png")) == ["curves.png", "predictions.png"]
    state = torch.load("cut/student.pt", weights_only=True)
    seg.EfficientDet("d0", 21).load_state_dict(state)
    capsys.readouterr()
    for file, networks in (("last.pt", 2), ("student.pt", 1)):
        assert main(seg, f"--eval cut/{file} --output b") == 0
        first, *teachers = capsys.readouterr().out.splitlines()
        assert f"seed 0: mIoU {log_of(run)[-1]['miou']:.2f} (on VOC2007 test" in first
        assert len(teachers) == networks - 1 and all(line.startswith("its self-teacher: mIoU ") for line in teachers)


def test_variants_train_and_a_protocol_that_leaks_is_named(tiny, capsys):
    """bfloat16, in parts, clipped as the authors do; the published protocol is told."""
    words = "--method baseline --protocol paper --accumulate 2 --clip-value 2 --amp --epochs 1 --output a"
    assert main(seg, tiny, words) == 0
    out, err = capsys.readouterr()
    name = "baseline-protocolpaper-image-size64-weightsnone-epochs1-batch-size4-clip-value2-amp"
    assert re.fullmatch(rf"voc d0 {name} seed 0: mIoU (\S+) \(last epoch; best \1 at epoch 1\)", out.splitlines()[-1])
    assert "seg.py: note: 2 of the 2 test images are also training images" in shown(err)
    assert json.loads(Path("a/args.json").read_text())["test_images_in_training"] == 2
    assert Path("a/predictions.png").exists() and list(log_of("a")[0])[2] == "ce"


def test_compiled_terms_are_the_same_through_the_ramp_and_compile_twice():
    method, x, y = pixel_method().float(), torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    method.teacher.bifpn, features, graphs = nn.Sequential(seg.BiFPNLayer(4, 2, False)), method.student.features, []
    method.student.features = lambda x: (features(x)[0], features(x)[1][:2])  # fewer levels compile sooner
    compiled = torch.compile(method, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for epoch in range(3):
        method.set_epoch(epoch, 3)
        assert_close(compiled(x, y)[0], method(x, y)[0])
    assert len(graphs) == 2  # without distillation, with it


def test_the_backbone_starts_from_a_file_which_a_resume_does_not_ask_for(tiny, refused):
    """Of torchvision's, with the classifier that the backbone lacks; any other is refused by a key."""
    net = torchvision.models.efficientnet_b0()
    torch.save(net.state_dict(), "b0.pth")
    method = seg.build(resolved("--weights b0.pth --device cpu"), 5)
    assert_close(method.student.backbone.state_dict(), net.features[:8].state_dict(), rtol=0, atol=0)
    assert main(seg, tiny, "--weights b0.pth --epochs 1 --method baseline --predictions 9 --output a") == 0
    Path("b0.pth").unlink()
    assert main(seg, "--resume a --epochs 2") == 0 and len(log_of("a")) == 2
    torch.save(torchvision.models.efficientnet_b1().state_dict(), "b1.pth")
    message = refused(seg, tiny, "--weights b1.pth")
    assert re.search(r"b1.pth does not fit: it has features\.\S+ where \S+ was looked for", message)
    assert "a/student.pt does not fit: it has backbone.0.0.weight where features.0.0.weight" in refused(
        seg, tiny, "--weights a/student.pt")  # fmt: skip


def test_mistakes_that_only_segmentation_knows(tiny, refused, tmp_path):
    assert "--batch-size 5 is larger than the training set of 4 images" in refused(seg, tiny, "--batch-size 5")
    shutil.copytree(tiny.split()[3], "broken")
    masks = Path("broken/VOCdevkit/VOC2007/SegmentationClass")
    words = TINY.format("broken") + " --epochs 1 --method baseline --overwrite --output a"
    Image.new("L", (80, 72), 21).save(masks / "000032.png")
    assert "000032.png: the label 21 is neither a class, 0 to 20, nor void, 255" in refused(seg, words)
    Image.new("P", (80, 70)).save(masks / "000032.png")
    assert "000032.png: the mask has 80x70 pixels, its image upright 80x72" in refused(seg, words)
    Path(masks / "000032.png").unlink()
    assert "000032" in refused(seg, words)


@pytest.mark.slow
def test_cost_prints_what_the_teacher_adds(capsys):
    assert main(seg, "--cost") == 0
    for line, (arch, dim) in zip(capsys.readouterr().out.splitlines()[-2:], (("d0", 64), ("d1", 88))):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        networks = seg.EfficientDet(arch, 21), seg.SelfTeacher(dim, 21)
        counts = [sum(p.numel() for p in net.parameters()) for net in networks]
        assert cells[0].startswith(arch) and (cells[1], cells[3]) == tuple(f"{count / 1e6:.3f}" for count in counts)
        assert float(cells[2]) > float(cells[4]) > 1
