"""The paper and the promises of the README as executable statements. Run: pytest

Each test is one claim. Values that a test compares with were worked out by hand or stand in the paper.
"""

import ast
import functools
import hashlib
import http.server
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import baselines
import data
import frskd
import seg
import train

HERE = Path(__file__).parent
TINY = "--arch wrn10_1 --image-size 16 --per-class 8 --batch-size 16 --device cpu".split()
TINY_EVAL = "--arch wrn10_1 --image-size 16 --device cpu".split()

ON_CPU = SimpleNamespace(device="cpu", amp=False, epochs=1, clip_value=None)  # what the batch loops read


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or leaves anything in the folder in which pytest was started."""
    monkeypatch.chdir(tmp_path)


def main(*argv, script=train):
    """train.py or seg.py in this process; arguments are strings or lists of them."""
    return script.main([a for arg in argv for a in ([str(arg)] if not isinstance(arg, list) else map(str, arg))])


def shown(err):
    """What a terminal is left with: a progress bar ends in a carriage return, and what follows overwrites it."""
    return [line.rsplit("\r", 1)[-1] for line in err.strip().split("\n")]


def refused(capsys, *argv, script=train):
    """The one line that a user's mistake gets: status 2, nothing else on stderr, no traceback."""
    capsys.readouterr()
    assert main(*argv, script=script) == 2
    lines = shown(capsys.readouterr().err)
    assert len(lines) == 1 and lines[0].startswith(f"{script.__name__}.py: error: ")
    return lines[0]


def frskd_method(num_classes=5, student=None, **kwargs):
    torch.manual_seed(0)
    student = student or frskd.WideResNet(10, 1, num_classes)
    return frskd.FRSKD(student, frskd.BiFPNc(student.channels, num_classes), **kwargs)


def batch(n=4, size=16, num_classes=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(num_classes, (n,), generator=g)


def gradients(module, loss):
    """Names of the parameters of a module that a loss reaches with a gradient that is not zero."""
    module.zero_grad()
    loss.backward()
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


# -------------------------------------------------------------------------- Sec. 3.1: the self-teacher network


def test_a_weighted_sum_of_bf16_maps_has_bf16_weights():
    """A float32 operand would make the sum float32 under CUDA's autocast, twice the memory."""
    dtypes = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.addcmul.default:
                dtypes.update(operand.dtype for operand in args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        frskd.fused_sum(torch.ones(2), list(torch.randn(2, 1, 4, 3, 3).bfloat16()))
    assert dtypes == {torch.bfloat16}


def test_self_teacher_costs_what_table_6_says():
    """Table 6: parameters and FLOPs over the classifier's."""
    paper = [(0.30, 0.67), (0.97, 2.38), (0.19, 0.21), (0.59, 0.68)]
    measured = [number for row in frskd.table6() for number in row[2:4]]
    assert measured == pytest.approx([number for row in paper for number in row], abs=0.01)


def test_bifpnc_runs_with_15_percent_fewer_flops_than_in_the_papers_order():
    """The 1x1 convolution before upsampling works on a quarter of the positions."""
    *_, flops, executed = frskd.table6()[3]
    assert executed < 0.85 * flops


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_1x1_convolution_commutes_with_upsampling(mode):
    """Outputs and gradients are those of the paper's order, to rounding, at odd sizes too."""
    feats = [torch.randn(2, c, h, w).double() for c, h, w in [(4, 17, 23), (6, 9, 12), (10, 5, 6)]]
    results = []
    for conv_first in (True, False):
        torch.manual_seed(0)
        teacher = frskd.BiFPNc([4, 6, 10], 3, upsample_mode=mode, conv_first=conv_first).double()
        inputs = [f.clone().requires_grad_() for f in feats]
        logits, feats_t = teacher(inputs)
        (logits.square().sum() + sum(t.square().sum() for t in feats_t)).backward()
        tensors = [logits, *feats_t, *(x.grad for x in inputs), *(p.grad for p in teacher.parameters())]
        results.append(tensors)
    for ours, paper in zip(*results):
        assert_close(ours, paper, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "build, size, params",
    [(frskd.BiFPN, 128, 209773), (frskd.BiFPN, 256, 681581), (frskd.BiFPNc, 1, 134317), (frskd.BiFPNc, 2, 411885)],
)
def test_self_teacher_has_two_sets_of_laterals_and_two_convolutions_a_node(build, size, params):
    """One shared set, or one separable convolution a node, gives other counts."""
    assert sum(p.numel() for p in build([32, 64, 128], 100, size).parameters()) == params


def test_width_of_the_self_teacher_is_w_times_the_students():
    """Sec. 3.1: d_i = w x c_i; appendix: 64, 128, 256 for WRN-16-2 at w = 2."""
    student = frskd.wrn16_2(100)
    _, feats_t = frskd.BiFPNc(student.channels, 100)(student.features(torch.zeros(2, 3, 32, 32))[1])
    assert [tuple(t.shape) for t in feats_t] == [(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8)]


def test_fast_normalized_fusion_by_hand():
    """relu(w) / (sum + 1e-4): a negative weight takes no part."""
    maps = list(torch.eye(3))
    assert_close(
        frskd.fused_sum(torch.tensor([2.0, -1, 3]), maps), torch.tensor([0.399992, 0, 0.599988]), atol=1e-6, rtol=0
    )
    assert_close(frskd.fused_sum(torch.ones(2), maps[:2])[:2], torch.tensor([0.499975, 0.499975]), atol=1e-6, rtol=0)


def test_a_sum_whose_weights_are_all_negative_is_zero_not_nan():
    maps = [torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)]
    assert torch.equal(frskd.fused_sum(torch.tensor([-1.0, -2.0]), maps), torch.zeros(1, 2, 3, 3))


def test_resize_is_bilinear_up_and_max_pooling_down():
    """Sec. 3.1. 4x4 filled 0..15, and filled 15..0: 3x3 windows of stride 2 with symmetric padding."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert frskd.downsample(x, (2, 2)).flatten().tolist() == [5, 7, 13, 15]
    assert frskd.downsample(15 - x, (2, 2)).flatten().tolist() == [15, 14, 11, 10]
    up = frskd.upsample(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    assert up.flatten().tolist() == [0, 1, 3, 4]


def test_first_node_is_top_down_and_last_node_has_no_top_down_input():
    """Figure 2: T_1 = P_1, which reads P_2; T_n reads L_n and T_{n-1} only."""
    teacher = frskd.BiFPNc([4, 6, 8, 10], 3)
    assert [len(w) for w in teacher.top_down_weights] == [2, 2, 2]
    assert [len(w) for w in teacher.bottom_up_weights] == [3, 3, 2]
    feats = [torch.randn(2, c, s, s) for c, s in zip(teacher.channels, (16, 8, 4, 2))]
    _, feats_t = teacher(feats)
    assert gradients(teacher, feats_t[0].sum() + feats_t[0].square().sum()).isdisjoint(
        name for name, _ in teacher.named_parameters() if name.startswith(("bottom_up", "down", "lateral2"))
    )


def test_self_teacher_is_equation_2_written_out():
    """Three levels, node by node, in the notation of the paper; ReLU where a map is read."""
    torch.manual_seed(0)
    teacher = frskd.BiFPNc([4, 6, 10], 3, width=2)
    for w in (*teacher.top_down_weights, *teacher.bottom_up_weights):
        nn.init.uniform_(w, 0.5, 2)
    F1, F2, F3 = (torch.randn(4, c, s, s, requires_grad=True) for c, s in zip((4, 6, 10), (12, 6, 3)))
    logits, feats_t, pre = teacher([F1, F2, F3], preact=True)

    def fuse(w, *maps):
        return sum(w_k * x for w_k, x in zip(w, maps)) / (w.sum() + 1e-4)

    def up(k, x):
        return teacher.up[k].conv(F.interpolate(x, scale_factor=2, mode="bilinear"))

    def down(k, x):
        return teacher.down[k].conv(F.max_pool2d(x, 3, 2, 1))

    (v1, v2), (w2, w3) = teacher.top_down_weights, teacher.bottom_up_weights
    L1, L2, L3 = (layer(f) for layer, f in zip(teacher.lateral, (F1, F2, F3)))
    M2, M3 = (layer(f) for layer, f in zip(teacher.lateral2, (F2, F3)))
    P3 = L3
    P2 = teacher.top_down[1](fuse(v2, L2, up(1, F.relu(P3))))
    P1 = teacher.top_down[0](fuse(v1, L1, up(0, F.relu(P2))))
    T1 = P1
    T2 = teacher.bottom_up[0](fuse(w2, M2, F.relu(P2), down(0, F.relu(T1))))
    T3 = teacher.bottom_up[1](fuse(w3, M3, down(1, F.relu(T2))))
    assert_close(pre, [T1, T2, T3], rtol=1e-4, atol=1e-4)
    assert_close(feats_t, [F.relu(T1), F.relu(T2), F.relu(T3)], rtol=1e-4, atol=1e-4)
    expected = teacher.fc(F.relu(T3).mean((2, 3)))
    assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    ours, by_hand = (torch.autograd.grad(z.square().sum(), (F1, F2, F3)) for z in (logits, expected))
    assert_close(ours, by_hand, rtol=1e-3, atol=1e-4)


def test_self_teacher_takes_any_size_of_map():
    """33x47 images: each map is resized to its neighbour's size."""
    terms, logits = frskd_method()(torch.randn(2, 3, 33, 47), torch.tensor([0, 1]))
    assert logits.shape == (2, 5) and all(t.isfinite() for t in terms.values())


@pytest.mark.parametrize("build", [lambda: frskd.resnet18(5, stem="cifar"), lambda: frskd.WideResNet(16, 1, 5)])
def test_maps_are_the_relu_of_their_preactivation_on_both_sides(build):
    student = build()
    logits, feats, pre = student.features(batch()[0], preact=True)
    _, feats_t, pre_t = frskd.BiFPNc(student.channels, 5)(feats, preact=True)
    assert all(torch.equal(f, F.relu(p)) for f, p in zip(feats + feats_t, pre + pre_t))
    assert all((p < 0).any() for p in pre + pre_t)


def test_self_teacher_refuses_maps_it_was_not_built_for():
    with pytest.raises(ValueError, match="2 feature maps, got 1"):
        frskd.BiFPNc([4, 8], 3)([torch.randn(2, 4, 8, 8)])


# ---------------------------------------------------------------------------- Sec. 3.2: self-feature distillation


def test_attention_transfer_by_hand():
    """Eq. 3, mean over positions of the squared difference; channels may differ in number."""
    feat = (torch.arange(1, 17) / 10).view(1, 4, 2, 2)
    feat_t = (torch.arange(32, 0, -1) / 10).view(1, 8, 2, 2)
    assert_close(
        frskd.attention_map(feat)[0], torch.tensor([0.361569, 0.440171, 0.529253, 0.628815]), atol=1e-6, rtol=0
    )
    assert_close(
        frskd.attention_map(feat_t)[0], torch.tensor([0.567612, 0.518920, 0.473010, 0.429883]), atol=1e-6, rtol=0
    )
    assert frskd.attention_transfer([feat], [feat_t]).item() == pytest.approx(0.0228482, abs=1e-6)
    assert frskd.attention_transfer([feat] * 2, [feat_t] * 2).item() == pytest.approx(2 * 0.0228482, abs=1e-6)


def test_attention_transfer_sees_places_not_scale_nor_channels():
    """phi is l2-normalised: scale and the order of channels do not count, the place of the energy does."""
    f = torch.rand(3, 6, 4, 5)
    assert frskd.attention_transfer([f], [7 * f.flip(1)]).item() == pytest.approx(0, abs=1e-9)
    one_hot = torch.eye(4).view(4, 1, 2, 2)
    assert frskd.attention_transfer([one_hot[:1]], [one_hot[1:2]]).item() == 0.5  # the bound 2 / (H W)


def test_all_zero_map_gives_no_nan():
    f = torch.zeros(1, 2, 3, 3, requires_grad=True)
    frskd.attention_transfer([f], [torch.rand(1, 2, 3, 3)]).backward()
    assert torch.equal(frskd.attention_map(f), torch.zeros(1, 9)) and f.grad.isfinite().all()


def test_attention_transfer_refuses_maps_of_other_sizes():
    with pytest.raises(ValueError, match="differ in size"):
        frskd.attention_transfer([torch.rand(1, 2, 4, 4)], [torch.rand(1, 2, 2, 2)])


@pytest.mark.parametrize("temperature, value", [(1, 0.742033), (4, 0.814283)])
def test_soft_label_distillation_by_hand(temperature, value):
    """Eq. 4 as the authors compute it: KL(teacher || student) times K^2. Literally it would be 0.053029 at K = 4."""
    student, teacher = torch.tensor([[0.0, 1, -1]]).double(), torch.tensor([[2.0, 0, 0]]).double()
    assert frskd.soft_label_distillation(student, teacher, temperature).item() == pytest.approx(value, abs=1e-6)


def test_soft_label_distillation_is_summed_over_classes_and_averaged_over_the_batch():
    student, teacher = torch.tensor([[0.0, 1, -1], [2, 0, 0]]).double(), torch.tensor([[2.0, 0, 0], [0, 0, 1]]).double()
    assert frskd.soft_label_distillation(student, teacher).item() == pytest.approx(0.813562, abs=1e-6)


def test_gradient_of_the_soft_label_loss_by_hand():
    student = torch.tensor([[0.0, 1, -1]], requires_grad=True)
    frskd.soft_label_distillation(student, torch.tensor([[2.0, 0, 0]])).backward()
    assert_close(student.grad, torch.tensor([[-0.5015, 0.5806, -0.0792]]), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------- Eq. 5: gradients


def test_distillation_updates_the_student_only():
    """Sec. 3.2: L_KD and L_F are "only applied to the student network"."""
    method = frskd_method()
    for name in ("kd", "feat"):
        terms, _ = method(*batch())
        reached = gradients(method, terms[name])
        assert reached and all(p.startswith("student") for p in reached)


def test_cross_entropy_of_the_self_teacher_trains_the_backbone():
    """The teacher's inputs are not detached, so alpha = beta = 0 is not the baseline."""
    method = frskd_method(alpha=0, beta=0)
    terms, _ = method(*batch())
    assert set(terms) == {"ce", "ce_t"}
    reached = gradients(method, terms["ce_t"])
    assert "student.conv1.weight" in reached and "student.fc.weight" not in reached
    assert {"teacher." + name for name, _ in method.teacher.named_parameters()} <= reached


def test_baseline_has_no_teacher():
    method = frskd.Baseline(frskd.WideResNet(10, 1, 5))
    terms, _ = method(*batch())
    assert list(terms) == ["ce"] and all(name.startswith("student") for name, _ in method.named_modules() if name)


def test_terms_are_weighted_and_sum_to_the_loss():
    """Eq. 5, against the losses computed one by one."""
    method, (x, y) = frskd_method(alpha=3, beta=70), batch()
    terms, logits = method(x, y)
    student, feats = method.student.features(x)
    teacher, feats_t = method.teacher(feats)
    expected = F.cross_entropy(student, y) + F.cross_entropy(teacher, y)
    expected += 3 * frskd.soft_label_distillation(student, teacher, 4) + 70 * frskd.attention_transfer(feats, feats_t)
    assert_close(sum(terms.values()), expected)
    assert_close(logits, student.detach())
    assert not logits.requires_grad


def test_beta_zero_computes_no_feature_loss():
    """FRSKD\\F: soft labels only."""
    terms, _ = frskd_method(beta=0)(*batch())
    assert list(terms) == ["ce", "ce_t", "kd"]


def test_soft_labels_are_accepted():
    method, (x, y) = frskd_method(), batch()
    hard, soft = method(x, y)[0], method(x, F.one_hot(y, 5).float())[0]
    assert_close(hard, soft)


@pytest.mark.parametrize("autocast", [False, True])
def test_losses_are_computed_in_float32_from_bf16(autocast):
    logits, logits_t = torch.randn(2, 4, 5).bfloat16()
    feats, feats_t = ([torch.randn(4, c, 6, 6).bfloat16()] for c in (3, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kd = frskd.soft_label_distillation(logits, logits_t)
        feat = frskd.attention_transfer(feats, feats_t)
        terms, _ = frskd_method()(*batch())
    assert torch.equal(kd, frskd.soft_label_distillation(logits.float(), logits_t.float()))
    assert torch.equal(feat, frskd.attention_transfer([feats[0].float()], [feats_t[0].float()]))
    assert {term.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize("kwargs", [dict(alpha=-1), dict(beta=-1), dict(temperature=0)])
def test_weights_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError):
        frskd_method(**kwargs)


def test_sixteen_images_can_be_learnt_by_heart():
    """`ce` and `ce_t` fall below a tenth of their first value."""
    method, (x, y) = frskd_method(), batch(16)
    optimizer = torch.optim.SGD(method.parameters(), 0.02, momentum=0.9)
    history = []
    for _ in range(80):
        terms, _ = method(x, y)
        history.append({name: t.item() for name, t in terms.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert all(history[-1][name] < 0.1 * history[0][name] for name in ("ce", "ce_t"))


@pytest.mark.parametrize("name", ["kd", "feat"])
def test_each_distillation_loss_alone_pulls_the_student_to_a_frozen_teacher(name):
    torch.manual_seed(0)
    student, (x, _) = frskd.WideResNet(10, 1, 5), batch(16)
    logits_t = 3 * torch.randn(16, 5)
    feats_t = [torch.rand(16, 2 * c, s, s) for c, s in zip(student.channels, (16, 8, 4))]
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    values = []
    for _ in range(30):
        logits, feats = student.features(x)
        kd = frskd.soft_label_distillation(logits, logits_t)
        loss = kd if name == "kd" else 100 * frskd.attention_transfer(feats, feats_t)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0]


class Pyramid(nn.Module):
    """A student of given maps: their sizes are those of the image, then halved each time."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.channels = channels
        convs = zip([3, *channels], channels)  # of stride 1: torch's strided ones fail in bf16 on 1x1 maps, on a CPU
        self.convs = nn.ModuleList(nn.Conv2d(c_in, c, 3, padding=1) for c_in, c in convs)
        self.fc = nn.Linear(channels[-1], num_classes)

    def features(self, x):
        feats = []
        for conv in self.convs:
            feats.append(conv(F.avg_pool2d(feats[-1], 2, ceil_mode=True) if feats else x).relu())
        return self.fc(feats[-1].mean((2, 3))), feats


def sound(blocks, size, batch_size, width, loss, dtype):
    """Shapes, finite terms and gradients, where these belong, of a step on maps of `size`, size / 2 ...

    Batch norm refuses a single value a channel, which one image gives on a 1x1 map.
    """
    torch.manual_seed(size)
    student = Pyramid([3, 1, 8, 5, 16, 2][:blocks], 5)
    teacher = frskd.BiFPNc(student.channels, 5, width=width) if width else frskd.BiFPN(student.channels, 5, dim=6)
    feature_loss = frskd.attention_transfer if loss == "at" else frskd.FitNet(student.channels, teacher.dims)
    method = frskd.FRSKD(student, teacher, feature_loss=feature_loss).to(dtype)
    x, y = torch.randn(batch_size, 3, size, size).to(dtype), torch.arange(batch_size) % 5
    smallest = math.ceil(size / 2 ** (blocks - 1))
    if batch_size * smallest**2 == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            method(x, y)
        return
    for dead in (False, True):
        if dead:
            nn.init.zeros_(student.convs[-1].weight), nn.init.zeros_(student.convs[-1].bias)  # a map of zeros
        method.zero_grad()
        _, feats = student.features(x)
        logits_t, feats_t = teacher(feats)
        terms, logits = method(x, y)
        assert [f.shape for f in feats_t] == [(batch_size, d, *f.shape[2:]) for d, f in zip(teacher.dims, feats)]
        assert logits.shape == logits_t.shape == (batch_size, 5) and all(f.isfinite().all() for f in feats_t)
        assert list(terms) == ["ce", "ce_t", "kd", "feat"] and all(term.isfinite() for term in terms.values())
        (terms["kd"] + terms["feat"]).backward(retain_graph=True)
        assert all(p.grad is None for p in teacher.parameters())
        assert student.convs[0].weight.grad.abs().sum() > 0 or dead or blocks == 1
        (terms["ce"] + terms["ce_t"]).backward()
        used = [p for p in method.parameters() if p.grad is not None]
        assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in used)
        assert {id(p) for p in teacher.parameters()} <= {id(p) for p in used}


SIZES, DEPTHS, BATCHES, WIDTHS = (
    (8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 64, 65, 96, 97),
    range(1, 7),
    range(1, 6),
    range(4),
)
TYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("blocks", DEPTHS)
def test_self_teacher_and_losses_are_sound_at_any_size(blocks, dtype):
    """Images of 8 to 97 px, batches of 1 to 5, w of 1 to 3 and one width for all maps, in turn."""
    for i, size in enumerate(SIZES[blocks % 2 :: 2]):
        sound(blocks, size, 1 + (i + blocks) % 5, (i + blocks) % 4, ["at", "fitnet"][i % 2], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("loss", ["at", "fitnet"])
def test_self_teacher_and_losses_are_sound_at_all_sizes(loss, dtype):
    """Every combination of the above: 1,680 of each loss and type."""
    for size, blocks, batch_size, width in itertools.product(SIZES, DEPTHS, BATCHES, WIDTHS):
        sound(blocks, size, batch_size, width, loss, dtype)


# ------------------------------------------------------------------ Variants: other feature losses (Table 5), SLA


def test_fitnet_is_the_mean_over_all_elements_summed_over_blocks():
    """Fit+SKD: (regressor_i(F_i) - T_i)^2; regressors are 1x1 convolutions to the teacher's widths."""
    torch.manual_seed(0)
    loss = frskd.FitNet([3, 5], [6, 10])
    feats = [torch.rand(4, c, s, s) for c, s in ((3, 8), (5, 4))]
    feats_t = [torch.rand(4, c, s, s) for c, s in ((6, 8), (10, 4))]
    regressed = [F.relu(bn(conv(f))) for (conv, bn, _), f in zip(loss.regressors, feats)]
    by_hand = sum((r - t).pow(2).sum() / t.numel() for r, t in zip(regressed, feats_t))
    assert_close(loss(feats, feats_t), by_hand)
    assert [tuple(conv.weight.shape) for conv, *_ in loss.regressors] == [(6, 3, 1, 1), (10, 5, 1, 1)]


@pytest.mark.parametrize(
    "gamma, beta, value", [(1, 0, -0.797885), (1, 1, -0.525135), (0.5, -0.2, -0.480941), (-1, 0, -0.797885), (1, 4, -3)]
)
def test_margin_of_overhaul_distillation_by_hand(gamma, beta, value):
    """E[v | v < 0] of a normal channel; -3 |gamma| where almost nothing is negative."""
    computed = frskd.margin(torch.tensor([float(gamma)]), torch.tensor([float(beta)]))
    assert computed.item() == pytest.approx(value, abs=1e-6)
    assert frskd.margin(torch.zeros(2), torch.tensor([0.0, -1.0])).tolist() == pytest.approx([0, -1], abs=1e-6)


def test_partial_l2_by_hand():
    """Nothing to learn where the student is below a target that is not positive."""
    student, teacher = torch.tensor([1.0, -1, -0.5, -2, 0.5]), torch.tensor([0.5, -2, -0.2, -0.3, -0.1])
    target = teacher.clamp_min(-0.797885)
    values = [frskd.partial_l2(s.view(1, 1, 1, 1), t.view(1, 1, 1, 1)).item() for s, t in zip(student, target)]
    assert values == pytest.approx([0.25, 0, 0, 0, 0.36], abs=1e-6)
    assert frskd.partial_l2(torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)).item() == 12  # a sum, over the batch


def overhaul_method():
    torch.manual_seed(0)
    student = frskd.WideResNet(10, 1, 5)
    teacher = frskd.BiFPNc(student.channels, 5)
    return frskd.FRSKD(student, teacher, beta=1, feature_loss=frskd.Overhaul(student.channels, teacher.norms))


def test_overhaul_is_its_levels_weighted_by_powers_of_two():
    """1e-3 * sum_i 2^(i - n) d_i on maps before their ReLU, of both sides."""
    method, (x, y) = overhaul_method(), batch()
    terms, _ = method(x, y)
    _, feats, pre = method.student.features(x, preact=True)
    _, _, pre_t = method.teacher(feats, preact=True)
    levels = []
    for (conv, bn), p, t in zip(method.feature_loss.connectors, pre, pre_t):
        s, t = bn(conv(p)), t.clamp_min(-0.797885)  # fresh batch norms: every margin is the same
        levels.append(((s - t) ** 2)[(s > t) | (t > 0)].sum() / len(x))
    assert_close(terms["feat"], 1e-3 * (levels[0] / 4 + levels[1] / 2 + levels[2]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_overhaul_takes_its_margins_from_the_teachers_batch_norms_as_they_train(level):
    """Maps far below their margins: the margins are the targets, and follow the batch norm whose output is T_i."""
    method = overhaul_method()
    _, feats, pre = method.student.features(batch()[0], preact=True)
    norm, outputs = [method.teacher.top_down[0], *method.teacher.bottom_up][level][-1], []
    norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    _, _, pre_t = method.teacher(feats, preact=True)
    assert outputs[0] is pre_t[level]
    low = [t - 9 for t in pre_t]
    before = method.feature_loss(pre, low)
    nn.init.constant_(norm.bias, -1)
    assert method.feature_loss(pre, low) > 1.01 * before
    assert {name.split(".")[0] for name in method.feature_loss.state_dict()} == {"connectors"}  # the norms stay there


@pytest.mark.parametrize("loss", ["fitnet", "od"])
def test_other_feature_losses_reach_the_student_only(loss):
    student = frskd.WideResNet(10, 1, 5)
    teacher = frskd.BiFPNc(student.channels, 5)
    method = frskd.FRSKD(student, teacher, feature_loss=train.FEATURE_LOSSES[loss](student, teacher))
    reached = gradients(method, method(*batch())[0]["feat"])
    assert "student.conv1.weight" in reached and not any(name.startswith("teacher") for name in reached)
    assert {name for name, _ in method.named_parameters() if name.startswith("feature_loss")} <= reached


@pytest.mark.parametrize("loss", ["fitnet", "od"])
def test_other_feature_losses_are_computed_in_float32_under_autocast(loss):
    student = frskd.WideResNet(10, 1, 5)
    teacher = frskd.BiFPNc(student.channels, 5)
    method = frskd.FRSKDSLA(student, teacher, feature_loss=train.FEATURE_LOSSES[loss](student, teacher))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, _ = method(*batch())
        wide = frskd.partial_l2(torch.full((1, 1, 2, 2), 1.01).bfloat16(), torch.ones(1, 1, 2, 2).bfloat16())
    assert {term.dtype for term in terms.values()} == {torch.float32} == {wide.dtype}


@pytest.mark.parametrize("loss", ["fitnet", "od"])
def test_other_feature_losses_refuse_maps_of_other_sizes_or_numbers(loss):
    student = frskd.WideResNet(10, 1, 5)
    feature_loss = train.FEATURE_LOSSES[loss](student, frskd.BiFPNc(student.channels, 5))
    feats, feats_t = ([torch.rand(2, c, s, s) for c, s in zip(w, (8, 4, 2))] for w in ((16, 32, 64), (32, 64, 128)))
    for wrong in (feats_t[:2], [*feats_t[:2], feats_t[2][..., :1, :1]]):
        with pytest.raises(ValueError, match="differ in size"):
            feature_loss(feats, wrong)


def test_overhaul_on_an_adapter_is_refused():
    student = frskd.Adapter(torchvision.models.resnet18(num_classes=5), ["layer1", "layer2"], image_size=32)
    teacher = frskd.BiFPNc(student.channels, 5)
    with pytest.raises(ValueError, match="before their ReLU"):
        frskd.FRSKD(student, teacher, feature_loss=frskd.Overhaul(student.channels, teacher.norms))


def test_views_and_joint_labels_by_hand():
    """Four counter-clockwise quarter turns, the views of an image adjacent; the label is 4 y + r."""
    x = torch.stack([torch.tensor([[1.0, 2], [3, 4]]), torch.full((2, 2), 9.0)])[:, None]
    views = [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]] + [[9] * 4] * 4
    assert frskd.rotations(x).flatten(1).tolist() == views
    assert frskd.joint_labels(torch.tensor([0, 2])).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_aggregation_by_hand():
    """Two images, three classes: view r votes with its logit of (class, r)."""
    aggregated = frskd.aggregate(torch.arange(96.0).view(8, 12))
    assert aggregated.tolist() == [[19.5, 23.5, 27.5], [67.5, 71.5, 75.5]]


def sla_method(**kwargs):
    torch.manual_seed(0)
    student = frskd.WideResNet(10, 1, 5)
    return frskd.FRSKDSLA(student, frskd.BiFPNc(student.channels, 5), **kwargs)


def test_terms_of_frskd_sla_written_out():
    """Distillation on the concatenations: 2 B logits, 5 B maps; the joint cross-entropies are means over 4 B."""
    method, (x, y) = sla_method(alpha=3, beta=70, temperature=3), batch()
    terms, logits = method(x, y)
    z, feats = method.student.features(x)
    z_t, feats_t = method.teacher(feats)
    views = torch.stack([x, x.rot90(1, (2, 3)), x.rot90(2, (2, 3)), x.rot90(3, (2, 3))], 1).flatten(0, 1)
    _, turned = method.student.features(views)
    _, turned_t = method.teacher(turned)
    joint, joint_t = (head(f[-1].mean((2, 3))) for head, f in ((method.joint, turned), (method.joint_t, turned_t)))
    g, g_t = frskd.aggregate(joint), frskd.aggregate(joint_t)
    labels = torch.tensor([4 * int(label) + r for label in y for r in range(4)])
    maps, maps_t = ([torch.cat(pair) for pair in zip(*sides)] for sides in ((feats, turned), (feats_t, turned_t)))
    expected = {
        "ce": F.cross_entropy(z, y),
        "ce_t": F.cross_entropy(z_t, y),
        "ce_joint": F.cross_entropy(joint, labels),
        "ce_joint_t": F.cross_entropy(joint_t, labels),
        "kd_joint": frskd.soft_label_distillation(z, g, 3),
        "kd_joint_t": frskd.soft_label_distillation(z_t, g_t, 3),
        "kd": 3 * frskd.soft_label_distillation(torch.cat([z, g]), torch.cat([z_t, g_t]), 3),
        "feat": 70 * frskd.attention_transfer(maps, maps_t),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert_close(terms[name], value, rtol=1e-4, atol=1e-6)
    assert_close(logits, z.detach())


def test_gradient_stops_of_frskd_sla():
    """Aggregated logits and the teacher are targets; the plain heads see rotations only through the aggregate."""
    method = sla_method()
    reached = {name: gradients(method, method(*batch())[0][name]) for name in method(*batch())[0]}

    def parts(term):
        return {name.split(".")[0] for name in reached[term]}

    assert parts("kd") == {"student", "joint"} and parts("feat") == parts("kd_joint") == {"student"}
    assert parts("kd_joint_t") == {"student", "teacher"} and parts("ce_joint") == {"student", "joint"}
    assert parts("ce_joint_t") == {"student", "teacher", "joint_t"}
    assert "student.fc.weight" in reached["kd_joint"] and "teacher.fc.weight" in reached["kd_joint_t"]
    assert "student.fc.weight" not in reached["ce_joint"] | reached["kd_joint_t"]
    assert not {"teacher.fc.weight", "student.fc.weight"} & reached["ce_joint_t"]


def test_frskd_sla_with_overhaul_pools_the_activated_maps():
    """The joint heads read what the plain heads read, after the ReLU."""
    torch.manual_seed(0)
    student = frskd.WideResNet(10, 1, 5)
    teacher = frskd.BiFPNc(student.channels, 5)
    method = frskd.FRSKDSLA(student, teacher, feature_loss=frskd.Overhaul(student.channels, teacher.norms))
    x, y = batch()
    pooled = student.features(frskd.rotations(x))[1][-1].mean((2, 3))
    assert_close(method(x, y)[0]["ce_joint"], F.cross_entropy(method.joint(pooled), frskd.joint_labels(y)))


def test_frskd_sla_refuses_soft_labels_and_images_that_are_not_square():
    x, y = batch()
    with pytest.raises(ValueError, match="class indices"):
        sla_method()(x, F.one_hot(y, 5).float())
    with pytest.raises(ValueError, match="square"):
        sla_method()(x[..., :12], y)


# ------------------------------------------------------------------- baselines.py: Tables 1, 2 and 7, method by method


def student_and_batch(rows=4):
    torch.manual_seed(0)
    return frskd.WideResNet(10, 1, 5), batch(rows)[0], batch()[1]


def parts_of(method, term):
    """The parts of a method that a term trains: {"student.fc", "student.layer1", "heads", ...}."""
    names = gradients(method, term)
    return {".".join(name.split(".")[: 2 if name.startswith("student") else 1]) for name in names}


BLOCKS = {"student.conv1", "student.layer1", "student.layer2", "student.layer3", "student.bn"}
SELF_DISTILLATION = {  # method -> of a student and a number of classes
    "one": lambda student, n: baselines.ONE(student, n),
    "ddgsd": lambda student, n: baselines.DDGSD(student),
    "byot": lambda student, n: baselines.BYOT(student, n),
    "sad": lambda student, n: baselines.SAD(student),
    "cskd": lambda student, n: baselines.CSKD(student),
    "slasd": lambda student, n: baselines.SLASD(student, n),
}


@pytest.mark.parametrize("build", [frskd.wrn16_2, lambda n: frskd.resnet18(n, stem="cifar")], ids=["wrn", "resnet"])
@pytest.mark.parametrize("name", SELF_DISTILLATION)
def test_a_step_costs_what_the_docstring_counts(name, build):
    """Convolutions and linear layers forward and backward, over plain cross-entropy: "Costs 1.66 / 1.48"."""
    method = SELF_DISTILLATION[name](build(100), 100)
    costs = re.search(r"Costs (\S+) / (\d+\.\d\d)", type(method).__doc__).groups()
    ratio = train.step_flops(method) / train.step_flops(frskd.Baseline(build(100)))
    assert ratio == pytest.approx(float(costs[build is not frskd.wrn16_2]), abs=0.01)


def test_operations_of_a_step_by_hand():
    """Forward, and backward once for the weights and once for the input where that has a gradient; a multiply-add is
    two; depthwise convolutions count as they are."""
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert train.step_flops(frskd.Baseline(net)) == 2 * 1024 * (2 * 6 * 3 * 9 + 3 * 6 * 9)


@pytest.mark.parametrize("name", SELF_DISTILLATION)
def test_every_method_trains_all_that_it_adds_and_returns_the_students_logits(name):
    student, x, y = student_and_batch(8 if name in ("ddgsd", "cskd") else 4)
    method = SELF_DISTILLATION[name](student, 5)
    terms, logits = method(x, y)
    assert logits.shape == (4, 5) and not logits.requires_grad
    reached = gradients(method, sum(terms.values()))
    alone = {"gate.0.bias"}  # batch norm follows it
    before_bn = {f"necks.{i}.{k}.bias" for i in range(2) for k in (0, 3, 6)}
    assert {n for n, _ in method.named_parameters()} - reached <= alone | before_bn


@pytest.mark.parametrize("name", set(SELF_DISTILLATION) - {"slasd", "cskd"})
def test_methods_take_soft_labels(name):
    """Of Mixup and CutMix: a one-hot label gives the terms of the class index."""
    terms = []
    for soft in (False, True):
        student, x, y = student_and_batch(8 if name == "ddgsd" else 4)
        method = SELF_DISTILLATION[name](student, 5)
        terms.append(method(x, F.one_hot(y, 5).float() if soft else y)[0])
    assert_close(terms[0], terms[1])


@pytest.mark.parametrize("epoch, share", [(0, 0.006738), (20, 0.060055), (40, 0.286505), (80, 1), (150, 1)])
def test_distillation_of_one_rises_over_80_epochs(epoch, share):
    student, x, y = student_and_batch()
    method = baselines.ONE(student, 5, alpha=2).double()
    whole = method(x.double(), y)[0]["kd"]
    method.set_epoch(epoch, 200)
    assert (method(x.double(), y)[0]["kd"] / whole).item() == pytest.approx(share, abs=1e-6)


def test_one_is_an_ensemble_gated_by_image():
    """z_e = sum_k g_k z_k, g = softmax(relu(bn(linear(pooled F_{n-1})))); T = 3, z_e the target of all branches."""
    student, x, y = student_and_batch()
    method = baselines.ONE(student, 5, alpha=2)
    nn.init.uniform_(method.gate[1].weight, 0.5, 2)
    z1, feats = student.features(x)
    z2, z3 = (branch(feats[1]) for branch in method.branches)
    gate = F.softmax(F.relu(method.gate[1](method.gate[0](feats[1].mean((2, 3))))), 1)
    z_e = gate[:, :1] * z1 + gate[:, 1:2] * z2 + gate[:, 2:] * z3
    terms, logits = method(x, y)
    assert_close(logits, z1.detach())
    assert_close(terms["ce"], F.cross_entropy(z1, y))
    assert_close(terms["ce_aux"], F.cross_entropy(z2, y) + F.cross_entropy(z3, y))
    assert_close(terms["ce_e"], F.cross_entropy(z_e, y))
    assert_close(terms["kd"], 2 * sum(frskd.soft_label_distillation(z, z_e, 3) for z in (z1, z2, z3)))
    assert gate.std(0).min() > 0.01 and not torch.equal(z2, z3)


def test_gate_of_one_learns_from_the_ensembles_cross_entropy_alone():
    student, x, y = student_and_batch()
    method = baselines.ONE(student, 5)
    terms = {name: parts_of(method, method(x, y)[0][name]) for name in ("ce", "ce_aux", "ce_e", "kd")}
    assert "gate" in terms["ce_e"] and not any("gate" in terms[name] for name in ("ce", "ce_aux", "kd"))
    assert terms["kd"] == BLOCKS | {"student.fc", "branches"} and "branches" not in terms["ce"]
    assert "student.layer2" in terms["ce_aux"] and not {"student.fc", "student.bn"} & terms["ce_aux"]


@pytest.mark.parametrize("build", [lambda: frskd.resnet18(5, stem="cifar"), lambda: frskd.WideResNet(16, 2, 5)])
def test_branches_of_one_are_the_last_stage_initialised_anew(build):
    """With the student's weights a branch gives the student's logits; it starts from others."""
    student = build()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2)
    x, last = torch.randn(2, 3, 16, 16), [(n, m) for n, m in student.named_modules() if not list(m.children())]
    branch = baselines.fresh_last_stage(student)
    logits, feats = student.features(x)
    assert not torch.allclose(branch(feats[-2]), logits)
    assert all((m.weight == 1).all() for m in branch.modules() if isinstance(m, nn.BatchNorm2d))
    assert not torch.equal(branch[-1].weight, student.fc.weight)
    conv = next(m for m in branch.modules() if isinstance(m, nn.Conv2d))
    assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.1)  # He, fan out
    stage = "layer4" if hasattr(student, "layer4") else "layer3"
    # All of the stage but a WRN's first batch norm, which F_{n-1} is behind; the last batch norm, the classifier.
    own = [m for n, m in last if n.split(".")[0] in (stage, "bn", "fc") and n != "layer3.0.bn1" * (stage == "layer3")]
    own = [m for m in own if list(m.parameters())]
    theirs = [m for m in branch.modules() if not list(m.children()) and sum(1 for _ in m.parameters())]
    for module, twin in zip(theirs, own, strict=True):
        module.load_state_dict(twin.state_dict())
    assert_close(branch(feats[-2]), logits)


def test_one_refuses_a_network_whose_last_stage_is_not_known():
    student = frskd.Adapter(torchvision.models.squeezenet1_1(num_classes=5), ["features.3", "features.7"], 64)
    with pytest.raises(ValueError, match="where the last stage of a Adapter begins is not known"):
        baselines.ONE(student, 5)


def test_mmd_by_hand():
    """Rows a (1, 0), (0, 1), b (2, 0), (2, 0): 1.5^2 + 0.5^2. The mean over channels too would give 0.25."""
    a, b = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [2, 0]])
    assert baselines.maximum_mean_discrepancy(a, b).item() == 2.5
    assert baselines.maximum_mean_discrepancy(a.flip(0), b).item() == 2.5  # the order of images does not count
    assert baselines.maximum_mean_discrepancy(a, b.flip(1)).item() == 2.5 != 4.5
    assert baselines.maximum_mean_discrepancy(torch.tensor([[3.0, 0]]), b.flip(1)).item() == 13  # 1 unpermuted


def test_terms_of_ddgsd_written_out():
    """Both views in one batch; KD both ways, each with the other as its target; MMD of the pooled last maps."""
    student, x, y = student_and_batch(8)
    method = baselines.DDGSD(student, alpha=2, beta=3)
    z, feats = student.features(x)
    h = feats[-1].mean((2, 3))
    terms, logits = method(x, y)
    assert_close(logits, z[:4].detach())
    assert_close(terms["ce"], F.cross_entropy(z[:4], y) + F.cross_entropy(z[4:], y))
    both = [frskd.soft_label_distillation(z[:4], z[4:], 3), frskd.soft_label_distillation(z[4:], z[:4], 3)]
    assert_close(terms["kd"], 2 * sum(both))
    assert_close(terms["feat"], 3 * (h[:4].mean(0) - h[4:].mean(0)).pow(2).sum())
    ours, expected = (
        torch.autograd.grad(t, student.conv1.weight, retain_graph=True)[0] for t in (terms["kd"], 2 * sum(both))
    )
    assert_close(ours, expected)
    assert parts_of(method, terms["feat"]) == BLOCKS


def test_terms_of_byot_written_out():
    """Heads end at the size of the last map; (1 - alpha) scales all cross-entropies; the features' sum is over batch
    and channels."""
    student, x, y = student_and_batch()
    method = baselines.BYOT(student, 5, alpha=0.3, beta=0.01)
    z_n, feats = student.features(x)
    maps = [neck(f) for neck, f in zip(method.necks, feats)]
    assert [m.shape for m in maps] == [feats[-1].shape] * 2
    h = [m.mean((2, 3)) for m in maps]
    z = [head(h_i) for head, h_i in zip(method.heads, h)]
    terms, logits = method(x, y)
    assert_close(logits, z_n.detach())
    assert_close(terms["ce"], 0.7 * F.cross_entropy(z_n, y))
    assert_close(terms["ce_aux"], 0.7 * (F.cross_entropy(z[0], y) + F.cross_entropy(z[1], y)))
    assert_close(terms["kd"], 0.3 * sum(frskd.soft_label_distillation(z_i, z_n, 3) for z_i in z))
    h_n = feats[-1].mean((2, 3))
    assert_close(terms["feat"], 0.01 * sum(((h_i - h_n) ** 2).sum() for h_i in h))


def test_the_deepest_classifier_of_byot_teaches_and_does_not_learn_from_the_others():
    student, x, y = student_and_batch()
    method = baselines.BYOT(student, 5)
    shallow = {"student.conv1", "student.layer1", "student.layer2", "student.layer3", "necks"}
    for name in ("kd", "feat"):
        reached = gradients(method, method(x, y)[0][name])
        assert parts_of(method, method(x, y)[0][name]) - {"heads"} == shallow
        # of layer3 only the batch norm that makes F_2
        assert {n for n in reached if "layer3" in n} == {"student.layer3.0.bn1.weight", "student.layer3.0.bn1.bias"}


def test_bottleneck_of_byot_is_1x1_kxk_1x1_each_with_batch_norm_and_relu():
    conv1, bn1, _, conv2, bn2, _, conv3, bn3, _ = neck = baselines.Bottleneck(6, 16, 3)
    assert [(c.kernel_size, c.stride, c.out_channels) for c in (conv1, conv2, conv3)] == [
        ((1, 1), (1, 1), 4), ((3, 3), (3, 3), 4), ((1, 1), (1, 1), 16)
    ]  # fmt: skip
    x = torch.randn(2, 6, 9, 9)
    expected = F.relu(bn3(conv3(F.relu(bn2(conv2(F.relu(bn1(conv1(x)))))))))
    assert neck(x).shape == (2, 16, 3, 3)
    assert_close(neck(x), expected)


@pytest.mark.parametrize("size", [16, 19, 33])
def test_heads_of_byot_end_at_the_size_of_the_last_map(size):
    student = frskd.resnet18(5, stem="cifar")
    method = baselines.BYOT(student, 5, image_size=size)
    _, feats = student.features(torch.zeros(2, 3, size, size))
    sizes = [neck(f).shape[-1] for neck, f in zip(method.necks, feats)]
    assert len(sizes) == 3 and all(
        s == f.shape[-1] // (f.shape[-1] // feats[-1].shape[-1]) for s, f in zip(sizes, feats)
    )
    assert size != 16 or sizes == [2, 2, 2]


def test_attention_of_sad_by_hand():
    """Square, then resize, then softmax; resizing first would give 0.00627947."""
    f1, f2 = (torch.arange(16.0) / 8).view(1, 1, 4, 4), torch.tensor([[1.0, 0], [0, 2]]).view(1, 1, 2, 2)
    psi1, psi2 = (baselines.spatial_attention(f, (4, 4)) for f in (f1, f2))
    assert F.mse_loss(psi1, psi2).item() == pytest.approx(0.00268099, abs=1e-8)
    assert_close(psi2.sum(1), torch.ones(1))
    assert_close(
        baselines.spatial_attention(f2.repeat(1, 2, 1, 1), (2, 2)), F.softmax(torch.tensor([[2.0, 0, 0, 8]]), 1)
    )


def test_sad_makes_each_block_imitate_the_next_after_two_thirds_of_the_epochs():
    student, x, y = student_and_batch()
    method = baselines.SAD(student, beta=7)
    _, feats = student.features(x)
    psi = baselines.spatial_attention
    expected = sum(F.mse_loss(psi(a, a.shape[-2:]), psi(b, a.shape[-2:])) for a, b in zip(feats, feats[1:]))
    assert_close(method(x, y)[0]["feat"], 7 * expected)
    reached = gradients(method, method(x, y)[0]["feat"])
    assert "student.layer3.0.bn1.weight" in reached  # makes F_2
    assert not any(n.startswith(("student.layer3.0.conv", "student.bn")) for n in reached)  # F_3 is a target only
    started = []
    for epoch in range(9):
        method.set_epoch(epoch, 9)
        started.append("feat" in method(x, y)[0])
    assert started == [False] * 6 + [True] * 3
    method.set_epoch(0, 1)
    assert method.distils  # in the last epoch at the latest


def test_partner_of_cs_kd_teaches_without_gradient_in_a_pass_of_its_own():
    """Both passes normalise by their own batch, and both enter the running statistics."""
    student, x, y = student_and_batch(8)
    method = baselines.CSKD(student, alpha=3)
    x.requires_grad_()
    terms, logits = method(x, y)
    assert int(student.bn.num_batches_tracked) == 2
    z, z_t = student(x[:4]), student(x[4:])
    assert_close(logits, z.detach())
    assert_close(terms["ce"], F.cross_entropy(z, y))
    assert_close(terms["kd"], 3 * frskd.soft_label_distillation(z, z_t, 4))
    (gradient,) = torch.autograd.grad(sum(terms.values()), x)
    assert gradient[:4].abs().sum() > 0 and gradient[4:].abs().sum() == 0


def test_terms_of_sla_sd_written_out():
    """One pass of the 4 B views; the plain head is read on the upright ones; T = 1."""
    student, x, y = student_and_batch()
    method = baselines.SLASD(student, 5, alpha=2)
    z, feats = student.features(frskd.rotations(x))
    joint, upright = method.joint(feats[-1].mean((2, 3))), z[[0, 4, 8, 12]]
    terms, logits = method(x, y)
    assert_close(logits, upright.detach())
    assert_close(terms["ce"], F.cross_entropy(upright, y))
    labels = torch.tensor([4 * int(label) + r for label in y for r in range(4)])
    assert_close(terms["ce_joint"], F.cross_entropy(joint, labels))
    assert_close(terms["kd"], 2 * frskd.soft_label_distillation(upright, frskd.aggregate(joint), 1))
    assert "joint" not in parts_of(method, terms["kd"])
    assert parts_of(method, method(x, y)[0]["ce_joint"]) == BLOCKS | {"joint"}
    with pytest.raises(ValueError, match="class indices"):
        method(x, F.one_hot(y, 5).float())


def pretrained(loss=None, **kwargs):
    """A student, and a teacher that is wider and deeper and has running statistics of its own."""
    torch.manual_seed(0)
    student, teacher = frskd.WideResNet(10, 1, 5), frskd.WideResNet(16, 2, 5)
    for _ in range(3):
        teacher(torch.randn(8, 3, 16, 16))
    losses = {
        "at": lambda: frskd.attention_transfer,
        "fitnet": lambda: baselines.Hint(student.channels, teacher.channels),
        "od": lambda: frskd.Overhaul(student.channels, teacher.norms),
    }
    return baselines.Distillation(student, teacher, feature_loss=losses[loss]() if loss else None, **kwargs)


def test_terms_of_distillation_written_out():
    """CE + alpha KD_4, the teacher at rest: its running statistics, not the batch's, and they stay."""
    method, (x, y) = pretrained(alpha=2).train(), batch()
    before = {name: t.clone() for name, t in method.teacher.state_dict().items()}
    terms, logits = method(x, y)
    z, z_t = method.student(x), method.teacher.eval()(x)
    assert_close(logits, z.detach())
    assert_close(terms, {"ce": F.cross_entropy(z, y), "kd": 2 * frskd.soft_label_distillation(z, z_t, 4)})
    assert all(torch.equal(before[name], t) for name, t in method.teacher.state_dict().items())


@pytest.mark.parametrize("loss", ["at", "fitnet", "od"])
def test_a_pretrained_teacher_gets_no_gradient(loss):
    method = pretrained(loss, beta=2)
    terms, _ = method(*batch())
    reached = gradients(method, terms["feat"])
    assert "student.conv1.weight" in reached and not any(name.startswith("teacher") for name in reached)
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_features_of_a_pretrained_teacher():
    """ATT on all maps; FitNet's hint on the second alone; both of the teacher at rest."""
    x, y = batch()
    for loss in ("at", "fitnet"):
        method = pretrained(loss, beta=2).train()
        terms, _ = method(x, y)
        feats, feats_t = method.student.features(x)[1], method.teacher.features(x)[1]
        if loss == "at":
            expected = frskd.attention_transfer(feats, feats_t)
        else:
            (regressor,) = method.feature_loss.regressors
            expected = F.mse_loss(regressor(feats[1]), feats_t[1])
        assert_close(terms["feat"], 2 * expected)


def test_overhaul_from_a_trained_teacher():
    """Margins from the teacher's own batch norms; the teacher normalises by the batch, as they take for granted."""
    method, (x, y) = pretrained("od", beta=2).train(), batch()
    norms = [method.teacher.layer2[0].bn1, method.teacher.layer3[0].bn1, method.teacher.bn]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    terms, _ = method(x, y)
    assert method.teacher.training and not method.eval().teacher.training
    method.train()
    pre, (z_t, _, pre_t) = method.student.features(x, preact=True)[2], method.teacher.features(x, preact=True)
    expected = 0
    for k, (norm, connector) in enumerate(zip(norms, method.feature_loss.connectors)):
        lowest = frskd.margin(norm.weight, norm.bias).view(1, -1, 1, 1)
        expected += 2.0 ** (k - 2) * frskd.partial_l2(connector(pre[k]), torch.maximum(pre_t[k], lowest))
    assert_close(terms["feat"], 2e-3 * expected)
    assert_close(terms["kd"], frskd.soft_label_distillation(method.student(x), z_t, 4))


@pytest.mark.parametrize("build", [lambda: frskd.resnet34(5, stem="cifar"), lambda: frskd.WideResNet(16, 1, 5)])
def test_norms_are_the_last_in_front_of_each_map(build):
    """Of a WRN they make the maps; of a ResNet the residual branch that a stage ends in."""
    net, outputs = build(), []
    for norm in net.norms:
        norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    _, _, pre = net.features(torch.randn(2, 3, 16, 16), preact=True)
    assert [o.shape for o in outputs] == [p.shape for p in pre]
    if isinstance(net, frskd.WideResNet):
        assert all(map(torch.equal, outputs, pre))
    else:
        assert [n for n, m in net.named_modules() if m in net.norms] == [
            "layer1.2.bn2", "layer2.3.bn2", "layer3.5.bn2", "layer4.2.bn2"
        ]  # fmt: skip


@pytest.mark.parametrize("loss", ["none", "at", "fitnet", "od"])
def test_resnet34_teaches_resnet18(loss):
    """Table 7's pair, one step of each feature loss."""
    args = train.resolve(given("--dataset cifar100 --method kd --feature-loss", loss, "--device cpu"))
    assert (args.arch, args.teacher_arch) == ("resnet18", "resnet34")
    method = train.build_method(train.CLASSIFICATION, args, 5)
    optimizer = torch.optim.SGD(method.parameters(), 0.01)
    terms, _ = method(*batch(2, 32))
    sum(terms.values()).backward()
    before = method.student.conv1.weight.clone()
    optimizer.step()
    assert set(terms) == {"ce", "kd"} | ({"feat"} if loss != "none" else set())
    assert all(t.isfinite() for t in terms.values()) and not torch.equal(before, method.student.conv1.weight)


def test_distillation_refuses_maps_that_differ_in_number_and_overhaul_an_adapter():
    with pytest.raises(ValueError, match="the student has 3 maps, the teacher 4"):
        baselines.Distillation(
            frskd.WideResNet(10, 1, 5), frskd.resnet18(5), feature_loss=frskd.attention_transfer, beta=1
        )
    net = torchvision.models.squeezenet1_1(num_classes=5)
    student, teacher = frskd.Adapter(net, ["features.3", "features.6", "features.9"], 64), frskd.WideResNet(10, 1, 5)
    with pytest.raises(ValueError, match="before their ReLU"):
        loss = frskd.Overhaul(student.channels, teacher.norms)
        baselines.Distillation(student, teacher, feature_loss=loss, beta=1)
    with pytest.raises(ValueError, match="a feature loss needs its weight"):
        baselines.Distillation(student, teacher, feature_loss=frskd.attention_transfer)


# -------------------------------------------------------------------------------------------------- the students


@pytest.mark.parametrize(
    "build, params",
    [
        (lambda: frskd.wrn16_2(100), 703284),
        (lambda: frskd.resnet18(100, stem="cifar"), 11220132),
        (lambda: frskd.resnet34(100, stem="cifar"), 21328292),
        (lambda: frskd.resnet18(1000), 11689512),
    ],
)
def test_students_have_the_standard_number_of_parameters(build, params):
    assert sum(p.numel() for p in build().parameters()) == params


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_resnet_is_torchvisions_bit_for_bit(mode):
    torch.manual_seed(0)
    ours, theirs = frskd.resnet18(7), torchvision.models.resnet18(num_classes=7)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 3, 64, 64)
    assert torch.equal(getattr(ours, mode)()(x), getattr(theirs, mode)()(x))


def test_resnet_starts_from_torchvisions_initialisation():
    torch.manual_seed(0)
    ours = frskd.resnet18(7).state_dict()
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "build",
    [
        lambda: frskd.resnet18(7, stem="cifar"),
        lambda: frskd.WideResNet(10, 4, 7),
        lambda: frskd.FitNet([16, 32], [64, 128]),
        lambda: frskd.Overhaul([16, 32], frskd.BiFPNc([16, 32], 7).norms),
    ],
)
def test_every_convolution_starts_from_he_fan_out(build):
    """torchvision's initialisation, of the CIFAR stem, the WRN and the connectors: std = sqrt(2 / (c_out k^2))."""
    torch.manual_seed(0)
    for conv in (m for m in build().modules() if isinstance(m, nn.Conv2d)):
        expected = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.15)


def test_wrn_maps_are_what_both_branches_of_the_next_stage_read():
    student, seen = frskd.WideResNet(16, 2, 5), []
    for layer in (
        student.layer2[0].conv1,
        student.layer2[0].shortcut,
        student.layer3[0].conv1,
        student.layer3[0].shortcut,
    ):
        layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    _, feats = student.features(batch()[0])
    assert [id(x) for x in seen] == [id(feats[0])] * 2 + [id(feats[1])] * 2


def test_wrn_depth_must_be_6k_plus_4():
    with pytest.raises(ValueError, match="6 k"):
        frskd.WideResNet(17, 2, 5)


def test_adapter_gives_the_outputs_of_the_named_blocks():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5).eval()
    student = frskd.Adapter(net, ["layer1", "layer3"], image_size=65).eval()
    ours = frskd.resnet18(5).eval()
    ours.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 65, 65)
    logits, feats = student.features(x)
    assert student.channels == [64, 256] and torch.equal(logits, net(x))
    assert torch.equal(feats[0], ours.features(x)[1][0]) and torch.equal(feats[1], ours.features(x)[1][2])
    net.train()
    net.bn1.eval()  # a frozen batch norm stays frozen
    frskd.Adapter(net, ["layer1"], image_size=32)
    assert net.training and net.layer1.training and not net.bn1.training
    assert frskd.export(student) is net and not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    "blocks, message",
    [
        (["layer1", "layer1"], "name each block once"),
        ([], "and at least one"),
        (["layer9"], "no block named 'layer9'; the network has conv1, bn1"),
        (["layer2", "layer1"], "runs these blocks as"),
        (["layer1", "fc"], "is not a \\(B, C, H, W\\) map"),
        (["conv1", "bn1"], "overwrites the output of block 'bn1'"),
    ],
)
def test_adapter_refuses_blocks_that_give_no_maps(blocks, message):
    with pytest.raises(ValueError, match=message):
        frskd.Adapter(torchvision.models.resnet18(), blocks, image_size=64)


def test_frskd_py_can_be_copied_alone(tmp_path, monkeypatch):
    """It imports torch and torchvision only, and one step runs on another code base's network."""
    (tmp_path / "copied.py").write_text((HERE / "frskd.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "fvcore", None)
    copied = importlib.import_module("copied")
    net = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    student = copied.Adapter(nn.Sequential(*net), ["0", "1"], image_size=20)
    method = copied.FRSKD(student, copied.BiFPNc(student.channels, 5))
    terms, logits = method(*batch(2, size=20))
    sum(terms.values()).backward()
    assert list(terms) == ["ce", "ce_t", "kd", "feat"] and logits.shape == (2, 5)
    tree = ast.parse((HERE / "frskd.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported == {"torch", "torch.nn", "torch.nn.functional", "torchvision", "contextlib"}


# ------------------------------------------------------------------------------------------------- data sets


def class_folders(root, per_class=8, size=16, classes=3, splits=("train", "test")):
    """Drawn shapes as PNG class folders, as `--dataset folder` reads them."""
    for k, split in enumerate(splits):
        images, labels, _ = data.draw_shapes(per_class, min(size, 96), seed=k)
        for i in range(classes * per_class):
            path = root / split / f"class{labels[i]}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].numpy()).resize((size, size)).save(path)
    return root


def test_shapes_are_always_the_same_and_their_masks_name_the_class():
    images, labels, masks = data.draw_shapes(3, 24, seed=5)
    again, *_ = data.draw_shapes(3, 24, seed=5)
    assert images.shape == (24, 24, 24, 3) and images.dtype == torch.uint8 and torch.equal(images, again)
    assert labels.tolist() == [c for c in range(8) for _ in range(3)]
    for label, mask in zip(labels, masks):
        assert mask.unique().tolist() == [0, label + 1]


def test_shapes_cannot_be_told_apart_by_their_colours():
    """A linear classifier on mean and spread of the colours stays near chance, 1 in 8."""
    images, labels, _ = data.draw_shapes(100, 16, seed=0)
    x = images.flatten(1, 2).float() / 255
    x = torch.cat([x.mean(1), x.std(1), torch.ones(len(x), 1)], 1)
    weights = torch.linalg.lstsq(x[::2], F.one_hot(labels[::2]).float()).solution
    assert ((x[1::2] @ weights).argmax(1) == labels[1::2]).float().mean() < 0.35


def test_training_and_test_shapes_differ():
    d = data.load("shapes", image_size=8)
    assert len(d.train) == 1600 and len(d.test) == 800
    seen = {image.numpy().tobytes() for image in d.train.images}
    assert not any(image.numpy().tobytes() in seen for image in d.test.images)


def test_per_class_takes_the_first_images_of_each_class_in_sorted_order(tmp_path):
    class_folders(tmp_path, per_class=5)
    d = data.load("folder", data_dir=tmp_path, image_size=72, per_class=2)
    names = [str(Path(p).relative_to(tmp_path)) for p in d.train.images]
    assert names == [f"train/class{c}/{5 * c + i:03}.png" for c in range(3) for i in range(2)]
    assert d.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(d.test) == 15


def test_folder_prefers_val_to_test_and_says_which(tmp_path):
    class_folders(tmp_path, splits=("train", "test"))
    assert data.load("folder", data_dir=tmp_path).test_name == "test"
    class_folders(tmp_path, per_class=3, splits=("val",))
    d = data.load("folder", data_dir=tmp_path)
    assert d.test_name == "val" and len(d.test) == 9


def test_test_labels_follow_the_training_classes(tmp_path):
    """A class that the test split lacks leaves the ids of the others as they are."""
    class_folders(tmp_path)
    for path in (tmp_path / "test/class0").iterdir():
        path.unlink()
    (tmp_path / "test/class0").rmdir()
    assert set(data.load("folder", data_dir=tmp_path).test.labels.tolist()) == {1, 2}


def test_images_of_any_mode_become_rgb_and_16_bits_are_refused(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1", "LA"):
        path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
        Image.new(mode, (9, 7)).save(path)
        assert data.read_image(path).mode == "RGB"
    Image.new("F", (9, 7)).save(tmp_path / "float.tif")
    with pytest.raises(data.DataError, match="float.tif.*more than 8 bits a channel, mode F"):
        data.read_image(tmp_path / "float.tif")
    Image.new("I;16", (9, 7)).save(tmp_path / "deep.png")
    with pytest.raises(data.DataError, match="deep.png.*more than 8 bits a channel, mode I;16"):
        data.read_image(tmp_path / "deep.png")


def test_cifar100_and_the_same_pixels_as_folders_give_the_same_numbers(tmp_path, monkeypatch):
    """An archive in CIFAR-100's layout, its images shuffled, against class folders sorted by name."""
    import pickle

    archive, names = tmp_path / "cifar-100-python", ["apple", "baby", "worm"]
    archive.mkdir()
    files = {"meta": {"fine_label_names": names}}
    for k, split in enumerate(("train", "test")):
        images, labels, _ = data.draw_shapes(8, 32, seed=k)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(k))
        planes = images[order].permute(0, 3, 1, 2).flatten(1).numpy()
        files[split] = {"data": planes, "fine_labels": labels[order].tolist()}
        for i, j in enumerate(order.tolist()):
            path = tmp_path / "folders" / split / names[labels[j]] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[j].numpy()).save(path)
    sums = {}
    for name, content in files.items():
        (archive / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((archive / name).read_bytes()).hexdigest()
    cifar = torchvision.datasets.CIFAR100  # the real reader, told the checksums of this archive
    monkeypatch.setattr(cifar, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["meta"]})

    options = "--arch wrn10_1 --batch-size 8 --epochs 2 --device cpu".split()
    for dataset, where in (("cifar100", tmp_path), ("folder", tmp_path / "folders")):
        assert main("--dataset", dataset, "--data-dir", where, options, "--output", tmp_path / dataset) == 0
    assert numbers(tmp_path / "cifar100") == numbers(tmp_path / "folder")


# ------------------------------------------------------------------- official archives, as tiny trees of their layout


def picture(path, mode="RGB", kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (18, 20)).save(path, format=kind)


def write(path, content, newline="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.replace("\n", newline).encode())


def mat_file(path, names, deflate=True):
    """file_list, annotation_list and labels in a MAT-file of version 5, characters of two bytes, as MATLAB writes."""

    def element(kind, body):
        return struct.pack("<II", kind, len(body)) + body + b"\0" * (-len(body) % 8)

    def array(kind, shape, name, body):  # kind: 1 cell, 4 char, 9 uint8
        head = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<2i", *shape)) + element(1, name)
        return element(14, head + body)

    def cell(name, strings):
        return array(1, (len(strings), 1), name, b"".join(
            array(4, (1, len(s)), b"", element(4, s.encode("utf-16-le"))) for s in strings))  # fmt: skip

    variables = [
        cell(b"file_list", names),
        cell(b"annotation_list", [name.removesuffix(".jpg") for name in names]),
        array(9, (len(names), 1), b"labels", element(2, bytes(range(1, len(names) + 1)))),
    ]
    if deflate:
        variables = [struct.pack("<II", 15, len(z)) + z for z in map(zlib.compress, variables)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49) + b"".join(variables))


# Each writes a tree below root -> (path, class id) of the training images and of the test images, sorted by class.


def tinyimagenet_tree(root):
    root = root / "tiny-imagenet-200"
    write(root / "wnids.txt", "n02\nn01\n")  # not sorted
    write(root / "words.txt", "n01\tgoldfish\nn02\tbullfrog\nn03\tnewt\n")
    for wnid in ("n01", "n02"):
        names = [f"{wnid}_{n}.JPEG" for n in (0, 10, 2)]
        for name in names:
            picture(root / "train" / wnid / "images" / name, "L" if name == "n01_2.JPEG" else "RGB")
        write(root / "train" / wnid / f"{wnid}_boxes.txt", "".join(f"{name}\t0\t0\t62\t62\n" for name in names) + " \n")
    write(root / "val/val_annotations.txt", "val_0.JPEG\tn02\t0\t32\t44\t62\nval_1.JPEG\tn01\t0\t0\t5\t5\n")
    for name in ("val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG"):
        picture(root / name)
    train = [(f"train/{w}/images/{w}_{n}.JPEG", c) for c, w in enumerate(("n01", "n02")) for n in (0, 10, 2)]
    return train, [("val/images/val_1.JPEG", 0), ("val/images/val_0.JPEG", 1)]


def cub200_tree(root):
    write(root / "attributes.txt", "1 has_bill_shape::curved\n")  # beside the folder, as in the archive
    root = root / "CUB_200_2011"
    black, laysan = "001.Black_footed_Albatross", "002.Laysan_Albatross"
    paths = [f"{black}/Black_Footed_Albatross_0046_18.jpg", f"{black}/Black_Footed_Albatross_0009_34.jpg"]
    paths += [f"{laysan}/Laysan_Albatross_0002_1027.jpg", f"{laysan}/Laysan_Albatross_0001_545.jpg"]
    paths += [f"{black}/Black_Footed_Albatross_0001_1.jpg"]
    write(root / "images.txt", "".join(f"{i} {path}\n" for i, path in enumerate(paths, 1)))
    write(root / "image_class_labels.txt", "5 1\n1 1\n2 1\n3 2\n4 2\n")  # in another order: joined on the id
    write(root / "train_test_split.txt", "1 1\n2 1\n3 1\n4 0\n5 0\n")
    write(root / "classes.txt", f"1 {black}\n2 {laysan}\n")
    write(root / "bounding_boxes.txt", "1 60.0 27.0 325.0 304.0\n")
    for i, path in enumerate(paths):
        picture(root / "images" / path, "L" if i == 0 else "RGB")
    train = [(f"images/{paths[1]}", 0), (f"images/{paths[0]}", 0), (f"images/{paths[2]}", 1)]
    return train, [(f"images/{paths[4]}", 0), (f"images/{paths[3]}", 1)]


def mit67_tree(root):
    train = ["nursery/baby's_room.jpg.jpg", "mall/shopping mall.jpg", "mall/a_gif.jpg"]  # shuffled
    test = ["mall/food court.jpg", "nursery/n1.jpg"]
    write(root / "TrainImages.txt", "\n".join(train))  # no newline at the end
    write(root / "TestImages.txt", "\n".join(test))
    for name in (*train, *test, "mall/IN_NO_LIST.JPG", "nursery/in_no_list.jpg"):
        picture(root / "Images" / name, kind="GIF" if "gif" in name else "JPEG")
    return (
        [("Images/mall/a_gif.jpg", 0), ("Images/mall/shopping mall.jpg", 0), ("Images/nursery/baby's_room.jpg.jpg", 1)],
        [("Images/mall/food court.jpg", 0), ("Images/nursery/n1.jpg", 1)],
    )


def stanford40_tree(root):
    train = ["writing_on_a_board_001.jpg", "writing_on_a_book_001.jpg", "writing_on_a_book_002.jpg"]
    test = ["writing_on_a_board_002.jpg", "writing_on_a_book_003.jpg"]
    write(root / "ImageSplits/train.txt", "\n".join(train) + "\n", newline="\r\n")
    write(root / "ImageSplits/test.txt", "\n".join(test) + "\n", newline="\r\n")
    write(root / "ImageSplits/actions.txt", "action_name\tnumber_of_images\nwriting_on_a_board\t\t2\n", newline="\r\n")
    for name in train + test:
        picture(root / "JPEGImages" / name)
    labels = {"writing_on_a_board": 0, "writing_on_a_book": 1}
    return tuple([(f"JPEGImages/{n}", labels[n.rsplit("_", 1)[0]]) for n in names] for names in (train, test))


def dogs_tree(root):
    tan, terrier = "n02089078-black-and-tan_coonhound", "n02095314-wire-haired_fox_terrier"
    train = [f"{tan}/n02089078_1.jpg", f"{tan}/n02089078_22.jpg", f"{terrier}/n02095314_3.jpg"]
    test = [f"{tan}/n02089078_4.jpg", f"{terrier}/n02095314_5.jpg"]
    mat_file(root / "train_list.mat", train)
    mat_file(root / "test_list.mat", test, deflate=False)
    mat_file(root / "file_list.mat", train + test)
    for k, name in enumerate(train + test):
        picture(root / "Images" / name, *(("RGBA", "PNG") if k == 0 else ()))  # a PNG with transparency, named .jpg
        write(root / "Annotation" / name.removesuffix(".jpg"), "<annotation/>")
    label = {tan: 0, terrier: 1}
    return tuple([(f"Images/{n}", label[n.split("/")[0]]) for n in names] for names in (train, test))


def imagenet_tree(root):
    train = [("train/n01440764/n01440764_1.JPEG", 0), ("train/n01440764/n01440764_2.JPEG", 0)]
    train += [("train/n02105855/n02105855_2933.JPEG", 1)]
    test = [("val/n01440764/ILSVRC2012_val_00000002.JPEG", 0), ("val/n02105855/ILSVRC2012_val_00000001.JPEG", 1)]
    for k, (name, _) in enumerate(train + test):
        picture(root / name, *(("CMYK", "JPEG"), ("RGB", "JPEG"), ("RGBA", "PNG"))[min(k, 2)])
    return train, test


TREES = {
    "tinyimagenet": tinyimagenet_tree,
    "cub200": cub200_tree,
    "mit67": mit67_tree,
    "stanford40": stanford40_tree,
    "dogs": dogs_tree,
    "imagenet": imagenet_tree,
}


def test_official_data_sets_have_their_published_sizes():
    """Classes, training and test images."""
    assert {name: official.expected for name, official in data.OFFICIAL.items()} == {
        "tinyimagenet": (200, 100000, 10000),
        "cub200": (200, 5994, 5794),
        "mit67": (67, 5360, 1340),
        "stanford40": (40, 4000, 5532),
        "dogs": (120, 12000, 8580),
        "imagenet": (1000, 1281167, 50000),
    }


@pytest.fixture
def tree(request, tmp_path, monkeypatch):
    """(data set, its folder): a tiny tree, whose size stands in for the official one."""
    dataset = request.param
    train_images, test_images = TREES[dataset](tmp_path / "data")
    monkeypatch.setattr(data.OFFICIAL[dataset], "expected", (2, len(train_images), len(test_images)))
    return dataset, tmp_path / "data"


@pytest.mark.parametrize("dataset", TREES)
def test_official_archives_are_read_as_they_unpack(tmp_path, dataset):
    """The right images and labels in each split, sorted by class; each becomes RGB."""
    listed = TREES[dataset](tmp_path / "data")
    expected = (2, *map(len, listed))
    folder = tmp_path / "data" / {"tinyimagenet": "tiny-imagenet-200", "cub200": "CUB_200_2011"}.get(dataset, "")
    for data_dir in (tmp_path / "data", folder):  # the folder into which it was unpacked, or its own
        d = data.load(dataset, data_dir=data_dir, image_size=224, expected=expected)
        for split, samples in zip((d.train, d.test), listed):
            assert [(Path(path).relative_to(folder).as_posix(), label) for path, label in
                    zip(split.images, split.labels.tolist())] == samples  # fmt: skip
            assert all(data.read_image(path).mode == "RGB" for path in split.images)
    assert d.classes == sorted(d.classes) and len(d.classes) == 2
    assert d.test_name == ("val" if dataset in ("tinyimagenet", "imagenet") else "test")


def test_archives_without_a_folder_of_their_own_may_lie_in_one(tmp_path):
    """MIT67's and Dogs' both unpack to Images/: --download keeps them apart."""
    for dataset in ("mit67", "stanford40", "dogs", "imagenet"):
        listed = TREES[dataset](tmp_path / dataset)
        data.load(dataset, data_dir=tmp_path, image_size=224, expected=(2, *map(len, listed)))


@pytest.mark.parametrize("place", ["{}/{}", "{}/images/{}"])
def test_tinyimagenet_is_read_where_val_was_sorted_into_class_folders(tmp_path, place):
    _, test = tinyimagenet_tree(tmp_path)
    val = tmp_path / "tiny-imagenet-200/val"
    for path, label in test:
        target = val / place.format(("n01", "n02")[label], Path(path).name)
        target.parent.mkdir(parents=True)
        (tmp_path / "tiny-imagenet-200" / path).rename(target)
    d = data.load("tinyimagenet", data_dir=tmp_path, expected=(2, 6, 2), image_size=224)
    assert [Path(p).name for p in d.test.images] == ["val_1.JPEG", "val_0.JPEG"]


def test_dogs_lists_may_lie_in_a_folder_of_their_own(tmp_path):
    dogs_tree(tmp_path)
    (tmp_path / "lists").mkdir()
    assert len(data.load("dogs", data_dir=tmp_path, expected=(2, 3, 2), image_size=224).train) == 3  # empty: not read
    for name in ("train_list.mat", "test_list.mat"):
        (tmp_path / name).rename(tmp_path / "lists" / name)
    assert len(data.load("dogs", data_dir=tmp_path, expected=(2, 3, 2), image_size=224).train) == 3


@pytest.mark.parametrize(
    "tree, name, change, message",
    [  # a file removed (None), cut short (an int), or edited; {} is its path
        ("tinyimagenet", "tiny-imagenet-200/train/n01/images/n01_10.JPEG", None, "1 of 8 images are missing, first {}"),
        ("tinyimagenet", "tiny-imagenet-200/val/images/val_1.JPEG", None, "1 of 8 images are missing, first {}"),
        ("tinyimagenet", "tiny-imagenet-200/train/n02", None, "1 classes, 3 training and 2 test images, not 2 classes"),
        (
            "tinyimagenet",
            "tiny-imagenet-200/val/val_annotations.txt",
            ("\t62\n", "\n"),
            "{}, line 1: 6 fields expected",
        ),
        (
            "tinyimagenet",
            "tiny-imagenet-200/val/val_annotations.txt",
            ("n02", "n3"),
            "no training image of the class n3",
        ),
        ("cub200", "CUB_200_2011/images/002.Laysan_Albatross/Laysan_Albatross_0001_545.jpg", None, "1 of 5 images are"),
        ("cub200", "CUB_200_2011/images", None, "5 of 5 images are missing"),
        ("cub200", "CUB_200_2011/train_test_split.txt", ("5 0\n", ""), "do not name the same images"),
        ("cub200", "CUB_200_2011/train_test_split.txt", ("5 0", "5 1"), "2 classes, 4 training and 1 test images, not"),
        ("cub200", "CUB_200_2011/train_test_split.txt", ("5 0", "5 2"), "{} has 2 for image 5, neither 1 nor 0"),
        ("cub200", "CUB_200_2011/image_class_labels.txt", ("5 1", "5 9"), "classes.txt does not name the class 9"),
        ("cub200", "CUB_200_2011/image_class_labels.txt", ("5 1", "5 1\n5 2"), "{} has two lines for one number"),
        ("cub200", "CUB_200_2011/images.txt", None, "{} is missing"),
        ("cub200", "CUB_200_2011/classes.txt", ("2 002.Laysan_Albatross\n", ""), "{} does not name the class 2"),
        ("cub200", "CUB_200_2011/image_class_labels.txt", None, "{} is missing"),
        ("mit67", "Images/mall/shopping mall.jpg", None, "1 of 5 images are missing, first {}"),
        ("mit67", "TestImages.txt", None, "{} is missing"),
        ("mit67", "TestImages.txt", ("food court", "shopping mall"), "Images/mall/shopping mall.jpg more than once"),
        ("stanford40", "JPEGImages/writing_on_a_board_001.jpg", None, "1 of 5 images are missing, first {}"),
        (
            "stanford40",
            "ImageSplits/train.txt",
            ("writing_on_a_board_001.jpg\r\n", ""),
            "1 classes, 2 training and 2 test",
        ),
        ("stanford40", "ImageSplits/test.txt", None, "{} is missing"),
        (
            "dogs",
            "Images/n02089078-black-and-tan_coonhound/n02089078_4.jpg",
            None,
            "1 of 5 images are missing, first {}",
        ),
        ("dogs", "test_list.mat", None, "{} is missing"),
        ("dogs", "train_list.mat", 200, "{} is cut short, or no MAT-file of version 5"),
        ("imagenet", "train/n02105855/n02105855_2933.JPEG", None, "Found no valid file for the classes n02105855"),
        (
            "imagenet",
            "train/n01440764/n01440764_2.JPEG",
            None,
            "2 classes, 2 training and 2 test images, not 2 classes",
        ),
        ("imagenet", "val", None, "neither val/ nor ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz is in"),
    ],
    indirect=["tree"],
)
def test_an_archive_that_is_not_whole_is_refused_by_name(tree, capsys, name, change, message):
    dataset, root = tree
    path = root / name
    if isinstance(change, tuple):
        assert change[0].encode() in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(change[0].encode(), change[1].encode(), 1))
    elif change:
        path.write_bytes(path.read_bytes()[:change])
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    line = refused(capsys, "--dataset", dataset, "--data-dir", root, "--device", "cpu")
    assert message.format(path) in line
    archive = "ILSVRC2012_img_train.tar" if dataset == "imagenet" else data.OFFICIAL[dataset].archives[0][0]
    assert archive in line and ("--download" in line) == (dataset != "imagenet")


@pytest.mark.parametrize("dataset", TREES)
def test_a_data_set_that_is_not_there_says_which_archive_to_put_where(tmp_path, capsys, dataset):
    line = refused(capsys, "--dataset", dataset, "--data-dir", tmp_path / "empty", "--device", "cpu")
    assert f"no {data.OFFICIAL[dataset].title} in {tmp_path / 'empty'}" in line and f"into {tmp_path / 'empty'}" in line
    assert all(url in line for url, _ in data.OFFICIAL[dataset].archives)


def test_mat_lists_are_read_deflated_or_plain(tmp_path):
    """MAT-files with deflated elements and with plain ones hold the same names."""
    names = [f"n02085620-Chihuahua/n02085620_{i}.jpg" for i in (7, 3)] + [
        "n02116738-African_hunting_dog/n02116738_1.jpg"
    ]
    for deflate in (True, False):
        mat_file(tmp_path / "list.mat", names, deflate)
        assert data.mat_names(tmp_path / "list.mat") == names


@pytest.mark.parametrize("dataset, image", [("mit67", "airport_inside/a.jpg"), ("dogs", "n02085620-Chihuahua/a.jpg")])
def test_images_without_their_lists_are_recognised(tmp_path, capsys, dataset, image):
    """The lists are in an archive of their own: the one that is missing is named."""
    picture(tmp_path / "Images" / image)
    line = refused(capsys, "--dataset", dataset, "--data-dir", tmp_path, "--device", "cpu")
    assert f"{tmp_path}/{'TrainImages.txt' if dataset == 'mit67' else 'train_list.mat'} is missing" in line


def test_a_folder_of_its_own_comes_first(tmp_path):
    """A train/ of other images in --data-dir is not taken for ImageNet where imagenet/ is there."""
    imagenet_tree(tmp_path / "imagenet")
    class_folders(tmp_path)
    assert data.load("imagenet", data_dir=tmp_path, expected=(2, 3, 2), image_size=224).classes[0] == "n01440764"
    (tmp_path / "mit67").mkdir()  # what a download that failed leaves
    mit67_tree(tmp_path)
    assert len(data.load("mit67", data_dir=tmp_path, expected=(2, 3, 2), image_size=224).test) == 2


@pytest.mark.parametrize("tree", TREES, indirect=True)
def test_every_data_set_trains(tree, tmp_path, capsys):
    """Through the command line, at a size for which images are decoded once."""
    dataset, root = tree
    options = "--arch wrn10_1 --image-size 16 --batch-size 2 --epochs 1 --device cpu --output".split()
    assert main("--dataset", dataset, "--data-dir", root, options, tmp_path / "run") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{dataset} wrn10_1 frskd-bs2-px16-e1 seed 0: top-1 ")


@pytest.mark.parametrize("tree, mean", [("tinyimagenet", 0.4802), ("cub200", 0.485)], indirect=["tree"])
@pytest.mark.parametrize("options, mix", [("--cutmix 0.5", v2.CutMix), ("--mixup 0.5", v2.MixUp), ("", type(None))])
def test_training_batches_are_normalised_and_mixed_as_the_options_say(tree, mean, options, mix):
    args = train.resolve(given("--dataset", tree[0], "--data-dir", str(tree[1]), "--batch-size 2", options))
    _, loader, test_loader = train.build_loaders(args)
    assert type(loader.mix) is mix and getattr(loader.mix, "alpha", 0.5) == 0.5 and test_loader.mix is None
    assert loader.mean[0, 0].item() == test_loader.mean[0, 0].item() == pytest.approx(255 * mean)
    _, y = next(loader.epoch())
    assert y.shape[1:] == ((2,) if options else ())  # soft labels where batches are mixed


@pytest.mark.parametrize("tree", ["cub200"], indirect=True)
def test_224_pixel_recipe_trains_and_draws_its_attention_maps(tree, tmp_path):
    """Figure 3: the input, four blocks of the ResNet and of its self-teacher; two classes here, so two images."""
    options = "--batch-size 3 --epochs 1 --workers 0 --device cpu --output".split()
    assert main("--dataset", tree[0], "--data-dir", tree[1], options, tmp_path / "run") == 0
    args = json.loads((tmp_path / "run/args.json").read_text())
    assert (args["arch"], args["image_size"], args["stats"]) == ("resnet18", 224, "imagenet")
    assert Image.open(tmp_path / "run/attention.png").size == (150 + 5 * 116, 24 + 2 * (2 * 116 + 4))


def test_imagenet_is_unpacked_from_its_archives(tmp_path, monkeypatch):
    """train: a tar of one tar a class; val: a flat tar, whose labels are in the devkit, which meta.bin stands for."""
    from torchvision.datasets import imagenet

    imagenet_tree(tmp_path / "tree")
    root = tmp_path / "data"
    root.mkdir()
    for wnid in ("n01440764", "n02105855"):
        with tarfile.open(tmp_path / f"{wnid}.tar", "w") as tar:
            for path in sorted((tmp_path / "tree/train" / wnid).iterdir()):
                tar.add(path, path.name)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
        for path in tmp_path.glob("n*.tar"):
            tar.add(path, path.name)
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for path in (tmp_path / "tree/val").glob("*/*"):
            tar.add(path, path.name)
    wnids = {"n01440764": ("tench",), "n02105855": ("Shetland sheepdog",)}
    torch.save((wnids, ["n02105855", "n01440764"]), root / "meta.bin")  # of val images 1 and 2
    sums = {k: (f, hashlib.md5((root / f).read_bytes()).hexdigest()) for k, (f, _) in imagenet.ARCHIVE_META.items()
            if k != "devkit"}  # fmt: skip
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    d = data.load("imagenet", data_dir=root, image_size=224, expected=(2, 3, 2))
    names = [[Path(path).name for path in split.images] for split in (d.train, d.test)]
    assert names[1] == ["ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00000001.JPEG"]
    assert names[0] == ["n01440764_1.JPEG", "n01440764_2.JPEG", "n02105855_2933.JPEG"]
    (root / "ILSVRC2012_img_val.tar").write_bytes(b"half")
    shutil.rmtree(root / "val")
    with pytest.raises(data.DataError, match="ILSVRC2012_img_val.tar is not present in the root directory or is corr"):
        data.load("imagenet", data_dir=root, expected=(2, 3, 2))
    (root / "meta.bin").write_bytes(b"junk")
    with pytest.raises(data.DataError, match="cannot unpack val/"):
        data.load("imagenet", data_dir=root, expected=(2, 3, 2))
    (root / "meta.bin").rename(root / "ILSVRC2012_devkit_t12.tar.gz")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(data.DataError, match="^ImageNet's devkit is read once, with scipy: pip install scipy$"):
        data.load("imagenet", data_dir=root, expected=(2, 3, 2))


@pytest.fixture
def served(tmp_path):
    """(a folder, its address on localhost)."""
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_download_fetches_verifies_and_unpacks(tmp_path, served, monkeypatch, capsys):
    """From an archive on localhost: fetched, repaired where half unpacked, and refused where its checksum differs."""
    where, address = served
    listed = cub200_tree(tmp_path / "tree")
    with tarfile.open(where / "CUB_200_2011.tgz", "w:gz") as tar:
        for path in (tmp_path / "tree").iterdir():
            tar.add(path, path.name)
    good = hashlib.md5((where / "CUB_200_2011.tgz").read_bytes()).hexdigest()
    official = data.OFFICIAL["cub200"]
    monkeypatch.setattr(official, "expected", (2, *map(len, listed)))

    def fetch_from(url, md5):
        monkeypatch.setattr(official, "archives", ((url, md5),))

    options = (
        "--dataset cub200 --arch wrn10_1 --image-size 16 --batch-size 2 --epochs 1 --device cpu --download".split()
    )
    options += ["--data-dir", tmp_path / "data", "--overwrite", "--output", tmp_path / "run"]
    fetch_from(address + "/absent.tgz", good)
    assert f"cannot fetch {address}/absent.tgz into {tmp_path / 'data'}: HTTP Error 404" in refused(capsys, options)
    fetch_from(address + "/CUB_200_2011.tgz", "0" * 32)
    capsys.readouterr()
    assert main(options) == 2
    assert "/CUB_200_2011.tgz into" in (line := shown(capsys.readouterr().err)[-1]) and "corrupted" in line
    assert not (tmp_path / "data/CUB_200_2011").exists()
    fetch_from(address + "/CUB_200_2011.tgz", good)
    assert main(options) == 0
    (where / "CUB_200_2011.tgz").unlink()  # the archive stays in --data-dir: nothing is fetched again
    shutil.rmtree(tmp_path / "data/CUB_200_2011/images/002.Laysan_Albatross")
    assert main(options) == 0
    assert sorted(p.name for p in (tmp_path / "data").glob("*.tgz")) == ["CUB_200_2011.tgz"]
    shutil.rmtree(tmp_path / "data/CUB_200_2011/images")
    monkeypatch.chdir(tmp_path / "data/CUB_200_2011")
    assert main(options, "--data-dir", ".") == 0  # from inside, it is unpacked beside itself
    (tmp_path / "data/CUB_200_2011").rename(tmp_path / "data/birds")
    (tmp_path / "data/birds/train_test_split.txt").unlink()
    assert main(options, "--data-dir", tmp_path / "data/birds") == 2
    line = shown(capsys.readouterr().err)[-1]
    assert f"even though its archives were unpacked into {tmp_path / 'data'}: remove {tmp_path / 'data/birds'}" in line


def test_download_of_archives_without_a_folder_or_a_checksum(tmp_path, served, monkeypatch):
    """They get a folder of their own below --data-dir; a zip that arrives cut short is refused."""
    where, address = served
    listed = stanford40_tree(tmp_path / "tree")
    for name in ("JPEGImages", "ImageSplits"):
        shutil.make_archive(where / name, "zip", tmp_path / "tree", name)
    official = data.OFFICIAL["stanford40"]
    monkeypatch.setattr(
        official, "archives", tuple((f"{address}/{n}.zip", None) for n in ("JPEGImages", "ImageSplits"))
    )
    kwargs = dict(data_dir=tmp_path / "data", image_size=224, download=True, expected=(2, *map(len, listed)))
    whole = (where / "JPEGImages.zip").read_bytes()
    (where / "JPEGImages.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.DataError, match="cannot fetch .*JPEGImages.zip"):
        data.load("stanford40", **kwargs)
    (where / "JPEGImages.zip").write_bytes(whole)
    (tmp_path / "data/stanford40/JPEGImages.zip").write_bytes(b"the user's own, cut short")
    with pytest.raises(data.DataError, match="cannot unpack .*JPEGImages.zip.*; remove it and try again"):
        data.load("stanford40", **kwargs)
    (tmp_path / "data/stanford40/JPEGImages.zip").unlink()
    d = data.load("stanford40", **kwargs)
    assert len(d.train) == 3 and (tmp_path / "data/stanford40/ImageSplits/train.txt").exists()


def test_archives_write_nothing_outside_their_folder(tmp_path, monkeypatch, capsys):
    """Members that climb out, of an absolute path, or through a link: refused by name, and nothing is there."""
    (tmp_path / "data").mkdir()
    for member in ("../outside", str(tmp_path / "outside"), "link/outside"):
        archive = tmp_path / "data/CUB_200_2011.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            if member.startswith("link"):
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
                tar.addfile(link)
            tar.addfile(tarfile.TarInfo(member))
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        official = (("http://localhost/CUB_200_2011.tgz", md5),)
        monkeypatch.setattr(data.OFFICIAL["cub200"], "archives", official)
        line = refused(capsys, "--dataset", "cub200", "--download", "--data-dir", tmp_path / "data")
        assert f"cannot unpack {archive}: " in line or "even though its archives were unpacked" in line
        assert not (tmp_path / "outside").exists()
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w") as archive:
        archive.writestr("../outside", "")
    data.extract_archive(tmp_path / "hostile.zip", tmp_path / "data")
    assert not (tmp_path / "outside").exists()


def test_files_that_are_not_used_are_told(tmp_path, capsys):
    """An image of an ending that torchvision does not read, or in no class folder, is never left out silently."""
    class_folders(tmp_path, size=16)
    Image.new("RGB", (16, 16)).save(tmp_path / "train/class0/a.gif")
    Image.new("RGB", (16, 16)).save(tmp_path / "test/b.png")
    (tmp_path / "train/.DS_Store").write_text("")
    options = ["--dataset", "folder", "--data-dir", tmp_path, *TINY, "--epochs", 1, "--output", tmp_path / "run"]
    assert main(options) == 0
    assert (
        "train.py: warning: 2 files are not used, for they have no image's ending or lie in no class folder, first "
        f"{tmp_path / 'train/class0/a.gif'}\n"
    ) in capsys.readouterr().err


# ----------------------------------------------------------------------------------- loaders and their randomness


def device_loader(n=10, size=8, **kwargs):
    images = torch.randint(256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kwargs = dict(train=True, batch_size=4, image_size=size, stats=((0, 0, 0), (1, 1, 1))) | kwargs
    return images, data.make_loader(data.Split(images, torch.arange(n)), **kwargs)


def test_small_images_are_cropped_from_a_zero_padding_of_4_and_flipped():
    """Sec. 4.1: "random cropping and flipping". Each result is a window of its image, and all offsets occur."""
    images, loader = device_loader(n=60)
    tops, lefts, flips = set(), set(), set()
    for x, y in loader.epoch(3):
        assert x.is_contiguous(memory_format=torch.channels_last)
        for result, i in zip((255 * x).round().byte(), y):
            padded = F.pad(images[i].permute(2, 0, 1), (4, 4, 4, 4))
            (found,) = (
                (top, left, flip)
                for top in range(9)
                for left in range(9)
                for flip in (False, True)
                if torch.equal(result.flip(2) if flip else result, padded[:, top : top + 8, left : left + 8])
            )
            for seen, value in zip((tops, lefts, flips), found):
                seen.add(value)
    assert tops == lefts == set(range(9)) and flips == {False, True}


def test_test_images_are_only_normalised():
    images, loader = device_loader(train=False, stats=((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    x = torch.cat([x for x, _ in loader.epoch()])
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    assert_close(x, expected)


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    def epoch(loader, e):
        x, y = (torch.cat(parts) for parts in zip(*loader.epoch(e)))
        return y, x[y.argsort()]  # the order; the augmented images, image by image

    first, second, other = (device_loader(seed=seed)[1] for seed in (1, 1, 2))
    list(first.epoch(0))
    reference = epoch(first, 5)
    assert all(map(torch.equal, reference, epoch(second, 5)))
    for differs in (epoch(first, 6), epoch(other, 5)):
        assert not torch.equal(reference[0], differs[0]) and not torch.equal(reference[1], differs[1])


def test_every_image_is_seen_once_an_epoch_and_a_last_single_one_joins_the_batch_before():
    _, loader = device_loader(n=9)
    batches = [y for _, y in loader.epoch(0)]
    assert [len(y) for y in batches] == [4, 5] and len(loader) == 2
    assert sorted(torch.cat(batches).tolist()) == list(range(9))
    assert [len(y) for _, y in device_loader(n=10)[1].epoch(0)] == [4, 4, 2]


def test_large_test_images_are_resized_to_8_7_and_cropped(tmp_path):
    """A white frame of an eighth a side, around black: the centre crop of 7/8 leaves a sixteenth less of it."""
    path = tmp_path / "frame.png"
    image = torch.zeros(160, 160, 3, dtype=torch.uint8)
    image[:20], image[-20:], image[:, :20], image[:, -20:] = 255, 255, 255, 255
    Image.fromarray(image.numpy()).save(path)
    loader = data.make_loader(
        data.Split([str(path)], torch.tensor([0])),
        train=False,
        batch_size=1,
        image_size=140,
        stats=((0,) * 3, (1,) * 3),
    )
    ((x, _),) = loader.epoch()
    assert x.shape == (1, 3, 140, 140)
    assert x[0, 0, 70, 9] == 1 and x[0, 0, 70, 10] == 0 and x[0, 0, 130, 70] == 1 and x[0, 0, 129, 70] == 0


def test_large_images_do_not_depend_on_the_number_of_workers(tmp_path):
    split = data.load("folder", data_dir=class_folders(tmp_path, size=90), image_size=72).train
    epochs = []
    for workers in (0, 1, 2):
        loader = data.make_loader(split, train=True, batch_size=5, image_size=72, seed=3, workers=workers)
        epochs.append([x for e in (0, 1) for x, _ in loader.epoch(e)])
    assert epochs[0][0].shape == (5, 3, 72, 72) and epochs[0][0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(loader.dataset[0, 3][0], loader.dataset[1, 3][0])
    for other in epochs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(epochs[0], other))


def mixed(mix, n=40, size=8, epochs=1, batch_size=10):
    """Image i is all i, label i; not augmented: -> x, y of the mixed batches."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, size, size, 3).contiguous()
    loader = data.make_loader(
        data.Split(images, torch.arange(n)),
        train=False,
        batch_size=batch_size,
        image_size=size,
        stats=((0, 0, 0), (1 / 255,) * 3),
        mix=mix,
    )
    return (torch.cat(parts) for parts in zip(*(b for e in range(epochs) for b in loader.epoch(e))))


def test_lambda_of_cutmix_is_the_share_that_was_not_pasted_over():
    x, y = mixed(v2.CutMix(alpha=1.0, num_classes=40), epochs=5)
    own = torch.arange(40).repeat(5)
    kept = (x.round() == own.view(-1, 1, 1, 1)).float().mean((1, 2, 3))
    assert_close(y[torch.arange(200), own], kept)
    assert_close(y.sum(1), torch.ones(200))
    assert len(kept.unique()) > 8  # one box a batch


def test_mixup_mixes_labels_as_it_mixes_images():
    x, y = mixed(v2.MixUp(alpha=1.0, num_classes=40), epochs=2)
    assert_close(x.mean((1, 2, 3)), y @ torch.arange(40.0), rtol=1e-4, atol=1e-4)
    assert len(y.max(1).values.unique()) == 8  # one lambda a batch


def test_mixup_at_lambda_1_is_plain_cross_entropy():
    """Beta(1e-3, 1e-3) draws 0 or 1, but for rounding; where it draws 1 the batch is as it was."""
    mix, (x, y), method = v2.MixUp(alpha=1e-3, num_classes=5), batch(), frskd_method()
    plain, _ = method(x, y)
    torch.manual_seed(0)
    draws = [mix(x, y) for _ in range(20)]
    (mixed_x, mixed_y), *_ = (draw for draw in draws if torch.allclose(draw[0], x, atol=1e-5))
    assert mixed_y.shape == (4, 5)
    assert_close(method(mixed_x, mixed_y)[0], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [8, 72])
def test_mixing_depends_on_seed_epoch_and_step_alone(size):
    """In both loaders; the global generator, which dropout reads, is left alone."""
    images = torch.randint(256, (12, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split, mix = data.Split(images, torch.arange(12)), v2.MixUp(alpha=1.0, num_classes=12)
    a, b, other = (
        data.make_loader(split, train=True, batch_size=4, image_size=size, seed=seed, mix=mix) for seed in (1, 1, 2)
    )
    torch.manual_seed(0)
    reference = list(a.epoch(3))
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(p, q) for one, two in zip(reference, b.epoch(3)) for p, q in zip(one, two))
    shares = [[y.max().item() for _, y in loader.epoch(e)] for loader, e in ((a, 3), (a, 4), (other, 3))]
    assert len(set(sum(shares, []))) == 9
    assert reference[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size, workers", [(8, 0), (72, 0), (72, 2)])
@pytest.mark.parametrize("pairs", ["view", "class"])
def test_what_goes_with_each_image(pairs, size, workers):
    """2 B images and B labels: a view of the same image, or one of its class; the first half is as without pairs."""
    images = torch.randint(256, (30, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3).repeat_interleave(torch.tensor([5, 10, 15]))
    split = data.Split(images, labels)
    kwargs = dict(train=True, batch_size=8, image_size=size, seed=1)
    plain, paired, again = (data.make_loader(split, workers=w, **kwargs) for w in (0, workers, 0))
    paired.pairs = again.pairs = pairs
    batches = list(paired.epoch(2))
    assert [(len(x), len(y)) for x, y in batches] == [(16, 8)] * 3 + [(12, 6)]
    for (x, y), (x_plain, y_plain), (x_again, y_again) in zip(batches, plain.epoch(2), again.epoch(2), strict=True):
        assert torch.equal(y, y_plain) and torch.equal(x[: len(y)], x_plain)
        assert (
            torch.equal(x, x_again) and torch.equal(y, y_again) and x.is_contiguous(memory_format=torch.channels_last)
        )
        assert all(not torch.equal(a, b) for a, b in zip(*x.chunk(2)))
    partners = paired.partners(2)
    assert torch.equal(labels[partners], labels)
    assert torch.equal(partners, torch.arange(30)) == (pairs == "view")
    assert torch.equal(paired.partners(3), partners) == (pairs == "view")


def test_second_half_of_a_batch_is_the_partners(tmp_path):
    """Image i is all i: the loader reads what `partners` says, in both loaders."""
    for size in (8, 72):
        images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, size, size, 3).contiguous()
        split = data.Split(images, torch.arange(4).repeat_interleave(10))
        loader = data.make_loader(split, train=True, batch_size=40, image_size=size, stats=((0,) * 3, (1 / 255,) * 3))
        loader.pairs = "class"
        ((x, y),) = loader.epoch(0)
        shown = x.amax((1, 2, 3)).round().long()  # above the zero padding
        assert sorted(shown[:40].tolist()) == list(range(40)) and torch.equal(y, split.labels[shown[:40]])
        assert torch.equal(shown[40:], loader.partners(0)[shown[:40]])


def test_partners_are_drawn_uniformly_from_the_whole_class():
    """CS-KD: the image itself included; so about one in five of five."""
    labels = torch.arange(2).repeat_interleave(torch.tensor([5, 8]))
    _, loader = device_loader(n=13)
    loader.split.labels, loader.pairs = labels, "class"
    drawn = torch.stack([loader.partners(epoch) for epoch in range(2000)])  # (2000, 13)
    counts = torch.stack([(drawn == i).sum(0) for i in range(13)])  # how often i goes with j
    assert (counts[:5, :5] / 2000 - 0.2).abs().max() < 0.05 and (counts[5:, 5:] / 2000 - 0.125).abs().max() < 0.05
    assert counts[5:, :5].sum() == counts[:5, 5:].sum() == 0


def test_an_epoch_of_cifar100_has_391_batches_of_pairs():
    """50,000 / 128; anchors are a permutation, the last batch has 80 and 80."""
    split = data.Split(torch.zeros(50_000, 1, 1, 3, dtype=torch.uint8), torch.arange(100).repeat_interleave(500))
    loader = data.DeviceLoader(split, train=True, batch_size=128, seed=0, stats=data.STATS["cifar"], device="cpu")
    loader.pairs = "class"
    sizes = [(len(x), len(y)) for x, y in loader.epoch(0)]
    assert len(sizes) == len(loader) == 391 and sizes[0] == (256, 128) and sizes[-1] == (160, 80)
    assert torch.equal(torch.cat(loader.batches(0)).sort().values, torch.arange(50_000))


def test_both_views_are_mixed_alike():
    """Same pairs, same lambda: the labels of the second half are those of the first."""
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3).contiguous()
    mix = v2.MixUp(alpha=1.0, num_classes=40)
    loader = data.make_loader(data.Split(images, torch.arange(40)), train=False, batch_size=10, image_size=8,
                              stats=((0,) * 3, (1 / 255,) * 3), mix=mix)  # fmt: skip
    loader.pairs = "view"
    for x, y in loader.epoch(1):
        a, b = x.mean((1, 2, 3)).chunk(2)
        assert y.shape == (10, 40)
        assert_close(a, b)
        assert_close(a, y @ torch.arange(40.0), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- train.py


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def numbers(folder):
    """The log without what depends on the clock."""
    return [
        {k: v for k, v in entry.items() if k not in ("seconds", "images_per_s", "data_wait")}
        for entry in log_of(folder)
    ]


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["method"]


def given(*argv, script=train):
    """What the parser makes of a command line, as main sees it."""
    values = vars(script.parser().parse_args(shlex.split(" ".join(argv))))
    return {key: value for key, value in values.items() if value is not None}


def name_of(*argv):
    return train.run_name(train.resolve(given(*argv)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run of three epochs on drawn shapes, which several tests look at."""
    folder = tmp_path_factory.mktemp("run") / "a"
    assert main(TINY, "--epochs 3 --output".split(), folder) == 0
    return folder


@pytest.mark.parametrize("dataset, alpha, beta, batch_size, mixup, image_size, stats", [
    ("cifar100", 2, 100, 128, 0.2, 32, ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
    ("tinyimagenet", 3, 100, 128, 0.2, 32, ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))),
    ("cub200", 1, 200, 32, 0.3, 224, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ("mit67", 1, 200, 32, 0.3, 224, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ("stanford40", 1, 200, 32, 0.3, 224, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ("dogs", 1, 200, 32, 0.3, 224, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ("imagenet", 1, 200, 256, 0.3, 224, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
])  # fmt: skip
def test_recipe_is_that_of_section_4_1_and_the_appendix(dataset, alpha, beta, batch_size, mixup, image_size, stats):
    """SGD, lr 0.1, weight decay 1e-4, 200 epochs, /10 at 100 and 150; ImageNet 90, 30 and 60; K = 4, w = 2."""
    args = train.resolve(given("--dataset", dataset, "--mixup"))
    assert (args.alpha, args.beta, args.batch_size, args.mixup) == (alpha, beta, batch_size, mixup)
    assert (args.epochs, args.milestones) == ((90, [30, 60]) if dataset == "imagenet" else (200, [100, 150]))
    assert (args.lr, args.weight_decay, args.momentum) == (0.1, 1e-4, 0.9)
    assert (args.temperature, args.width, args.teacher, args.arch) == (4, 2, "bifpnc", "resnet18")
    assert (args.image_size, data.STATS[args.stats]) == (image_size, stats)
    assert train.resolve(given("--dataset", dataset, "--cutmix")).cutmix == 1.0
    betas = [train.resolve(given("--dataset", dataset, "--feature-loss", f)).beta for f in ("at", "fitnet", "od")]
    assert betas == [beta, 1, 0.01]


@pytest.mark.parametrize("size, recipe", [(40, (40, 2, 100, 128)), (80, (224, 1, 200, 32))])
def test_folder_takes_the_recipe_of_its_size(tmp_path, size, recipe):
    """CIFAR-100's up to 64 px; above, that of the fine-grained sets at 224 px."""
    args = train.resolve(dict(dataset="folder", data_dir=class_folders(tmp_path, per_class=1, size=size)))
    assert (args.image_size, args.alpha, args.beta, args.batch_size) == recipe


def test_learning_rate_falls_at_the_milestones(tmp_path):
    main(TINY, "--method baseline --epochs 4 --milestones 1,3 --lr 0.2 --output".split(), tmp_path)
    assert [entry["lr"] for entry in log_of(tmp_path)] == [0.2, 0.02, 0.02, 0.002]


@pytest.mark.parametrize(
    "options, name",
    [
        ("", "frskd"),
        ("--method baseline", "baseline"),
        ("--beta 0", "frskd-nofeat"),
        ("--alpha 2 --beta 100 --epochs 8", "frskd"),
        ("--alpha 3 --beta 200", "frskd-alpha3-beta200"),
        ("--teacher bifpn --channels 128", "frskd-bifpn128"),
        ("--width 1", "frskd-w1"),
        ("--weight-decay 5e-4", "frskd-wd0.0005"),
        ("--method baseline --weight-decay=5e-4 --lr 0.2", "baseline-wd0.0005-lr0.2"),
        ("--per-class 100 --epochs 20", "frskd-n100-e20"),
        ("--epochs 20 --milestones 5,10", "frskd-e20-ms5,10"),
        ("--temperature 2 --image-size 48 --amp", "frskd-t2-px48-amp"),
        ("--seed 3 --workers 1 --device cpu --compile", "frskd"),
        ("--sla", "frskd+sla"),
        ("--sla --beta 0", "frskd+sla-nofeat"),
        ("--mixup", "frskd+mixup0.2"),
        ("--mixup --image-size 72", "frskd+mixup0.3-px72"),
        ("--mixup 0.4 --beta 0", "frskd+mixup0.4-nofeat"),
        ("--cutmix", "frskd+cutmix"),
        ("--cutmix 0.5", "frskd+cutmix0.5"),
        ("--method baseline --cutmix", "baseline+cutmix"),
        ("--method baseline --mixup", "baseline+mixup0.2"),
        ("--feature-loss at", "frskd"),
        ("--feature-loss fitnet", "frskd-fitnet"),
        ("--feature-loss od --beta 0.01", "frskd-od"),
        ("--feature-loss od --beta 100", "frskd-od-beta100"),
        ("--feature-loss fitnet --teacher bifpn --channels 128 --sla", "frskd+sla-fitnet-bifpn128"),
        ("--method one", "one"),
        ("--method one --alpha 2 --temperature 4", "one-t4-alpha2"),
        ("--method byot --mixup", "byot+mixup0.2"),
        ("--method cskd --alpha 3", "cskd-alpha3"),
        ("--method cskd --image-size 72 --alpha 3", "cskd-px72"),
        ("--method kd --teacher-checkpoint x", "kd"),
        ("--method kd --teacher-checkpoint x --feature-loss at", "kd-at"),
        ("--method kd --teacher-checkpoint x --feature-loss od --teacher-arch resnet18", "kd-od-resnet18"),
        ("--method kd --teacher-checkpoint x --feature-loss fitnet --beta 50", "kd-fitnet-beta50"),
    ],
)
def test_a_run_is_named_by_what_changes_its_result(options, name):
    assert name_of(options) == name


def test_a_run_leaves_its_files_and_logs_every_key(run):
    assert {p.name for p in run.iterdir()} == {"args.json", "log.jsonl", "last.pt", "student.pt", "attention.png"}
    keys = "epoch lr ce ce_t kd feat train_top1 top1 top5 images_per_s seconds data_wait".split()
    assert [list(entry) for entry in log_of(run)] == [keys] * 3
    args = json.loads((run / "args.json").read_text())
    assert args["name"] == "frskd-bs16-px16-n8-e3" and args["alpha"] == 2 and args["threads"] >= 1
    assert args["torch"] == torch.__version__ and args["command"].startswith("python train.py --arch wrn10_1")


def test_the_last_line_is_the_result(tmp_path, capsys):
    main(TINY, "--epochs 1 --seed 4 --output".split(), tmp_path)
    pattern = r"shapes wrn10_1 frskd-\S+ seed 4: top-1 (\S+) top-5 \d+\.\d\d \(last epoch; best \1 at epoch 1\)"
    assert re.fullmatch(pattern, capsys.readouterr().out.splitlines()[-1])


def test_attention_png_has_two_rows_an_image_and_a_column_a_block(run):
    picture = Image.open(run / "attention.png")
    assert picture.size == (150 + 4 * 116, 24 + 4 * (2 * 116 + 4))
    assert len(picture.getcolors(1 << 20)) > 500
    tiles = {(x, y): picture.crop((x, y, x + 112, y + 112)).tobytes() for x in (150, 266) for y in (24, 140, 260, 376)}
    assert tiles[150, 24] == tiles[150, 140] != tiles[150, 260] == tiles[150, 376]  # one input an image
    student = frskd.WideResNet(10, 1, 8).eval()
    student.load_state_dict(torch.load(run / "student.pt", weights_only=True))
    loader = data.make_loader(data.load("shapes", image_size=16).test, train=False, batch_size=8, image_size=16)
    raw = loader.raw([200])  # the second image drawn: the first of class 2
    image = F.interpolate(raw.float() / 255, (112, 112), mode="bilinear", antialias=True)[0]
    expected = train.heat_map(student.features(loader.normalize(raw))[1][0][0].detach(), image)
    drawn = torch.frombuffer(bytearray(tiles[266, 260]), dtype=torch.uint8).view(112, 112, 3)
    assert (drawn.float() - 255 * expected.permute(1, 2, 0)).abs().mean() < 2


def test_heat_map_of_squares_that_overflow_is_drawn():
    assert train.heat_map(torch.full((2, 4, 4), 1e30), torch.rand(3, 8, 8)).isfinite().all()


def test_heat_map_is_red_where_the_energy_is():
    feat = torch.zeros(3, 4, 4)
    feat[:, 0, 0] = -2
    red, _, blue = train.heat_map(feat, torch.zeros(3, 64, 64))
    assert red[0, 0] > 0.5 > blue[0, 0] and red[63, 63] < 0.05 < blue[63, 63]


def test_attention_is_drawn_after_the_epochs_asked_for(tmp_path):
    assert main(TINY, "--epochs 3 --output".split(), tmp_path, "--attention 1 3".split()) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["attention-1.png", "attention-3.png"]


def test_eval_gives_the_logged_accuracy_from_either_file(run, tmp_path, capsys):
    expected = "top-1 {top1:.2f} top-5 {top5:.2f}".format(**log_of(run)[-1])
    for name in ("last.pt", "student.pt"):
        assert main("--eval", run / name) == 0
        assert expected in capsys.readouterr().out
    alone = tmp_path / "student.pt"  # without args.json beside it, the command line says what it is
    alone.write_bytes((run / "student.pt").read_bytes())
    assert main("--eval", alone, TINY_EVAL) == 0
    assert expected in capsys.readouterr().out


def test_eval_with_attention_draws_the_teacher_only_from_last_pt(run, tmp_path):
    for name, rows in (("last.pt", 2), ("student.pt", 1)):
        assert main("--eval", run / name, "--attention", "--output", tmp_path) == 0
        assert Image.open(tmp_path / "attention.png").size[1] == 24 + 4 * (rows * 116 + 4)


def test_evaluation_is_of_the_network_at_rest(run):
    """Running statistics, not the batch's: one image at a time gives the same accuracy."""
    student = frskd.WideResNet(10, 1, 8).train()
    student.load_state_dict(torch.load(run / "student.pt", weights_only=True))
    test, off = data.load("shapes", image_size=16).test, torch.autocast("cpu", enabled=False)
    accuracies = [
        train.evaluate(student, data.make_loader(test, train=False, batch_size=n, image_size=16), off) for n in (1, 256)
    ]
    assert accuracies[0] == accuracies[1] == {key: log_of(run)[-1][key] for key in ("top1", "top5")}


def test_top_1_and_top_5_by_hand():
    """Four images, the label ranked 1st, 2nd, 5th and 6th of seven classes."""

    class Table(nn.Module):
        def forward(self, x):
            return -torch.arange(7.0).repeat(len(x), 1)  # class 0 first, class 6 last

    split = data.Split(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 4, 5]))
    loader = data.make_loader(split, train=False, batch_size=3, image_size=8)
    assert train.evaluate(Table(), loader, torch.autocast("cpu", enabled=False)) == dict(top1=25, top5=75)


def test_logged_terms_are_means_over_images():
    """Batches of 3 and 1 images with terms 1 and 5: 2, not 3."""
    method = frskd.Baseline(nn.Linear(2, 2))
    method.student(torch.ones(1, 2)).sum().backward()
    meter = train.Meter(method, epoch=0)
    meter.update({"ce": torch.tensor(1.0)}, 3)
    meter.update({"ce": torch.tensor(5.0)}, 1)
    assert meter.read() == {"ce": 2}


def test_train_accuracy_by_hand():
    """Soft labels count by their largest entry."""
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])
    assert train.accuracy(logits, torch.tensor([0, 1, 0, 1])) == 75
    assert train.accuracy(logits, torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])) == 50


def test_the_optimiser_is_the_recipes(run):
    """Sec. 4.1: SGD with weight decay 1e-4; one group, so on every parameter."""
    (group,) = torch.load(run / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)


def test_weights_ruined_by_the_last_step_are_not_saved(tmp_path, capsys):
    """One step an epoch: its terms and gradients are finite, what it makes of the weights is not."""
    where = class_folders(tmp_path / "images", per_class=4)
    options = ["--dataset", "folder", "--data-dir", where, "--arch", "wrn10_1", "--batch-size", 12, "--epochs", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.COMMON, "lr", 1e38)
        patch.setitem(train.RECIPES, "folder up to 64 px", train.CIFAR | dict(lr=1e38))
        assert main(options, "--device", "cpu", "--output", tmp_path / "run") == 1
    assert "is not finite after epoch 1" in shown(capsys.readouterr().err)[-1]
    assert not (tmp_path / "run/last.pt").exists()


def test_the_same_command_gives_the_same_numbers_and_another_seed_others(run, tmp_path):
    main(TINY, "--epochs 3 --output".split(), tmp_path / "b")
    main(TINY, "--epochs 3 --seed 1 --output".split(), tmp_path / "c")
    assert numbers(run) == numbers(tmp_path / "b") != numbers(tmp_path / "c")


def test_exported_resnet34_is_torchvisions(tmp_path):
    """student.pt loads with strict=True, and the logits are the same bit for bit."""
    where = class_folders(tmp_path / "images", per_class=2, size=96)
    options = "--arch resnet34 --image-size 96 --epochs 1 --batch-size 6 --workers 0 --device cpu".split()
    assert main("--dataset", "folder", "--data-dir", where, options, "--output", tmp_path) == 0
    state = torch.load(tmp_path / "student.pt", weights_only=True)
    theirs, ours = torchvision.models.resnet34(num_classes=3).eval(), frskd.resnet34(3).eval()
    theirs.load_state_dict(state, strict=True)
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(theirs(x), ours(x))


MOBILENET = (
    "--arch mobilenet_v3_small --blocks features.3,features.8,features.11 --image-size 73 --batch-size 8".split()
)


def interrupted(capsys, folder, after, signum, *argv, script=train):
    """main, sent a signal as soon as `after` epochs are logged: it stops, says how to resume, and returns 128 + n."""

    def watch():
        log, deadline = folder / "log.jsonl", time.monotonic() + 120
        while not log.exists() or log.read_bytes().count(b"\n") < after:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    status = main(*argv, script=script)
    thread.join()
    assert status == 128 + signum
    assert f"continue with: python {script.__name__}.py --resume {folder}" in capsys.readouterr().err
    assert not list(folder.glob("*.partial"))


def same_run(a, b):
    ours, theirs = weights(a), weights(b)
    return numbers(a) == numbers(b) and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_interrupted_after_each_epoch_and_resumed_a_run_ends_the_same(tmp_path, capsys):
    options = TINY + "--epochs 4 --output".split()
    main(options, tmp_path / "whole")
    interrupted(capsys, tmp_path / "cut", 1, signal.SIGINT, options, tmp_path / "cut")
    interrupted(capsys, tmp_path / "cut", 2, signal.SIGTERM, "--resume", tmp_path / "cut")
    interrupted(capsys, tmp_path / "cut", 3, signal.SIGINT, "--resume", tmp_path / "cut" / "last.pt")
    assert main("--resume", tmp_path / "cut") == 0
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    assert [entry["epoch"] for entry in log_of(tmp_path / "cut")] == [1, 2, 3, 4]


def test_large_images_resume_the_same_with_0_1_and_2_workers(tmp_path, capsys):
    """Worker augmentation, dropout and an adapter at an odd size; its student loads into torchvision's class."""
    where = class_folders(tmp_path / "images", size=80)
    options = ["--dataset", "folder", "--data-dir", where, *MOBILENET, "--epochs", 4, "--device", "cpu"]
    main(options, "--workers", 2, "--output", tmp_path / "whole")
    interrupted(capsys, tmp_path / "cut", 1, signal.SIGINT, options, "--workers", 0, "--output", tmp_path / "cut")
    interrupted(capsys, tmp_path / "cut", 2, signal.SIGINT, "--resume", tmp_path / "cut", "--workers", 1)
    interrupted(capsys, tmp_path / "cut", 3, signal.SIGINT, "--resume", tmp_path / "cut", "--workers", 2)
    assert main("--resume", tmp_path / "cut", "--workers", 0) == 0
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    net = torchvision.models.mobilenet_v3_small(num_classes=3)
    net.load_state_dict(torch.load(tmp_path / "cut/student.pt", weights_only=True), strict=True)


def test_resume_may_add_epochs_and_move_the_folder_but_change_nothing_else(run, tmp_path, capsys):
    assert main("--resume", run, "--epochs", 4, "--output", tmp_path / "moved") == 0
    assert numbers(tmp_path / "moved")[:3] == numbers(run) and len(numbers(tmp_path / "moved")) == 4
    for option, value in (("--beta", "50"), ("--seed", "1"), ("--arch", "wrn16_1"), ("--epochs", "2")):
        assert refused(capsys, "--resume", run, option, value).startswith(f"train.py: error: {option} {value} ")


def test_resume_without_a_path_starts_afresh_or_continues(tmp_path):
    """What an elastic restart needs: the same command, whether or not a checkpoint is there."""
    options = TINY + ["--epochs", 2, "--resume", "--output", tmp_path]
    assert main(options) == 0
    first = (tmp_path / "last.pt").stat().st_mtime_ns
    assert main(options) == 0
    assert (tmp_path / "last.pt").stat().st_mtime_ns == first


def test_a_signal_stops_before_the_next_step():
    class Signalling:
        sizes, drawn = [4] * 9, 0

        def __len__(self):
            return 9

        def epoch(self, epoch):
            for self.drawn in range(1, 10):
                if self.drawn == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch()

    method, loader = frskd_method(), Signalling()
    counted, sizes = counting(method)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    with train.StopOnSignal() as stop, pytest.raises(train.Stopped):
        train.train_epoch(ON_CPU, counted, method, loader, optimizer, 0, stop)
    assert loader.drawn == 3 and len(sizes) == 2 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_stopped_before_the_first_checkpoint_says_how_to_start_again(tmp_path, capsys):
    def watch():
        deadline = time.monotonic() + 120
        while not (tmp_path / "args.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    options = "--image-size 16 --arch wrn16_2 --device cpu --output".split() + [str(tmp_path)]
    assert main(options) == 130
    assert f"python train.py {shlex.join(options)} --overwrite" in capsys.readouterr().err


def counting(method):
    """The method, and the lengths of the x that it was given."""
    sizes = []

    def counted(x, *args):
        sizes.append(len(x))
        return method(x, *args)

    return counted, sizes


@pytest.mark.parametrize("options", ["", "--method baseline", "--sla --feature-loss od", "--method one"])
def test_compiled_training_gives_the_same_losses(tmp_path, options):
    for name, extra in (("eager", []), ("compiled", ["--compile", "aot_eager"])):
        assert main(TINY, "--epochs 1 --output".split(), tmp_path / name, options.split(), extra) == 0
    eager, compiled = (numbers(tmp_path / name)[0] for name in ("eager", "compiled"))
    terms = [name for name in eager if name.startswith(("ce", "kd", "feat"))]
    assert [eager[name] for name in terms] == pytest.approx([compiled[name] for name in terms], rel=0.02)


def with_counted_compiler(task, method, loader):
    """A train.Forward whose compiled code is the method itself, and the lengths of the x that this was given."""
    forward = train.Forward(method, SimpleNamespace(compile=None), task.whole_batch(loader))
    forward.compiled, sizes = counting(method)
    return forward, sizes


def test_a_smaller_last_batch_runs_uncompiled():
    """So nothing is compiled a second time for its shape."""
    method, loader = frskd_method(num_classes=10), device_loader(n=10)[1]
    forward, sizes = with_counted_compiler(train.CLASSIFICATION, method, loader)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    with train.StopOnSignal() as stop:
        train.train_epoch(ON_CPU, forward, method, loader, optimizer, 0, stop)
    assert sizes == [4, 4]


def test_a_pair_counts_as_one_image():
    """Of a batch with partners: what is compiled takes the whole one, images_per_s counts the labels."""
    method, loader = baselines.CSKD(frskd.WideResNet(10, 1, 10)), device_loader(n=10)[1]
    forward, sizes = with_counted_compiler(train.CLASSIFICATION, method, loader)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    loader.split.labels[1] = 0
    loader.pairs = method.pairs
    with train.StopOnSignal() as stop:
        _, clock = train.train_epoch(ON_CPU, forward, method, loader, optimizer, 0, stop)
    assert sizes == [8, 8]
    assert clock["images_per_s"] * clock["seconds"] == pytest.approx(10)


def test_bf16_autocast_trains_near_float32(run, tmp_path):
    assert main(TINY, "--epochs 3 --amp --output".split(), tmp_path) == 0
    assert 0 < abs(log_of(tmp_path)[0]["ce"] - log_of(run)[0]["ce"]) < 0.1


VARIANTS = {  # options -> name; one run of each, below one folder
    "--method sad": "sad",
    "--method baseline": "baseline",
    "--method baseline --cutmix": "baseline+cutmix",
    "--method baseline --mixup": "baseline+mixup0.2",
    "": "frskd",
    "--beta 0": "frskd-nofeat",
    "--sla": "frskd+sla",
    "--sla --beta 0": "frskd+sla-nofeat",
    "--mixup": "frskd+mixup0.2",
    "--cutmix": "frskd+cutmix",
    "--feature-loss fitnet": "frskd-fitnet",
    "--feature-loss od": "frskd-od",
    "--sla --feature-loss od": "frskd+sla-od",
    "--teacher bifpn --channels 24": "frskd-bifpn24",
    "--teacher bifpn --channels 24 --sla": "frskd+sla-bifpn24",
    "--width 1": "frskd-w1",
}


def test_every_variant_trains_under_a_name_of_its_own_and_the_table_tells_them_apart(tmp_path, capsys):
    for options, name in VARIANTS.items():
        assert main(TINY, "--epochs 1".split(), options.split()) == 0
        (entry,) = log_of(tmp_path / f"runs/shapes-wrn10_1-{name}-bs16-px16-n8-e1-s0")
        terms = {"ce"}
        if name == "sad":
            terms = {"ce", "feat"}
        if "frskd" in name:
            terms |= {"ce_t", "kd"} | ({"feat"} if "nofeat" not in name else set())
        if "sla" in name:
            terms |= {"ce_joint", "ce_joint_t", "kd_joint", "kd_joint_t"}
        assert {key for key in entry if key.startswith(("ce", "kd", "feat"))} == terms
    assert len(list((tmp_path / "runs").iterdir())) == len(VARIANTS)
    capsys.readouterr()
    assert main("--table", "runs") == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (\S+)-bs16-px16-n8-e1 \| \d+\.\d\d ", out, re.M)
    assert "alpha down" not in out  # FRSKD and FRSKD\\F differ in beta alone: no grid
    assert sorted(rows) == sorted(VARIANTS.values())
    assert [re.split("[+-]", row)[0] for row in rows] == ["baseline"] * 3 + ["sad"] + ["frskd"] * (len(rows) - 4)


@pytest.mark.parametrize(
    "options, kind, feature_loss",
    [("", frskd.FRSKD, None), ("--sla", frskd.FRSKDSLA, None), ("--feature-loss fitnet", frskd.FRSKD, frskd.FitNet)]
    + [("--feature-loss od --sla", frskd.FRSKDSLA, frskd.Overhaul)],
)
def test_method_is_built_as_the_options_say(options, kind, feature_loss):
    weights = "--alpha 3 --beta 70 --temperature 5 --width 3"
    method = train.build_method(
        train.CLASSIFICATION, train.resolve(given("--arch wrn10_1 --device cpu", weights, options)), 8
    )
    assert type(method) is kind and method.teacher.dims == [48, 96, 192]
    assert (method.alpha, method.beta, method.temperature) == (3, 70, 5)
    if feature_loss:
        assert type(method.feature_loss) is feature_loss
    else:
        assert method.feature_loss is frskd.attention_transfer


def test_bifpn_is_as_wide_as_asked(tmp_path):
    assert main(TINY, "--epochs 1 --teacher bifpn --channels 24 --output".split(), tmp_path) == 0
    assert weights(tmp_path)["teacher.fc.weight"].shape == (8, 24)


@pytest.mark.parametrize("options", ["--cutmix", "--mixup", "--sla --feature-loss od"])
def test_variants_resume_the_same(tmp_path, options):
    """Mixing draws from (seed, epoch, step); joint heads, connectors and their momenta are in the checkpoint."""
    options = TINY + "--milestones none".split() + options.split() + ["--output"]
    main(options, tmp_path / "whole", "--epochs", 3)
    main(options, tmp_path / "cut", "--epochs", 1)
    assert main("--resume", tmp_path / "cut", "--epochs", 3) == 0
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_student_of_every_variant_is_the_plain_network(tmp_path, capsys):
    """What training added, joint heads and connectors, is not in student.pt."""
    assert main(TINY, "--epochs 1 --sla --feature-loss od --output".split(), tmp_path) == 0
    frskd.WideResNet(10, 1, 8).load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True), strict=True)
    capsys.readouterr()
    assert main("--eval", tmp_path / "student.pt") == 0
    assert "top-1 {top1:.2f} top-5 {top5:.2f}".format(**log_of(tmp_path)[-1]) in capsys.readouterr().out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher for --method kd: a finished run of a deeper network."""
    folder = tmp_path_factory.mktemp("teacher")
    assert main(TINY, "--arch wrn16_1 --method baseline --epochs 1 --output".split(), folder) == 0
    return folder / "student.pt"


COMPARED = {  # options -> name of the run, terms in its log
    "--method one": ("one", "ce ce_aux ce_e kd"),
    "--method ddgsd": ("ddgsd", "ce kd feat"),
    "--method byot": ("byot", "ce ce_aux kd feat"),
    "--method sad": ("sad", "ce feat"),
    "--method cskd": ("cskd", "ce kd"),
    "--method slasd": ("slasd", "ce ce_joint kd"),
    "--method kd": ("kd-wrn16_1", "ce kd"),
    "--method kd --feature-loss fitnet": ("kd-fitnet-wrn16_1", "ce kd feat"),
    "--method kd --feature-loss at": ("kd-at-wrn16_1", "ce kd feat"),
    "--method kd --feature-loss od": ("kd-od-wrn16_1", "ce kd feat"),
    "--method ddgsd --cutmix": ("ddgsd+cutmix", "ce kd feat"),
}


@pytest.mark.parametrize("options", COMPARED)
def test_every_compared_method_trains_resumes_and_exports_the_plain_network(tmp_path, teacher, capsys, options):
    """Bit for bit; branches, heads, connectors and a pretrained teacher are in the checkpoint, not in student.pt."""
    name, terms = COMPARED[options]
    options = TINY + "--epochs 3 --milestones none".split() + options.split()
    if "kd" in options:
        file = tmp_path / "teacher.pt"
        shutil.copy(teacher, file)
        options += ["--teacher-arch", "wrn16_1", "--teacher-checkpoint", file]
    assert main(options, "--output", tmp_path / "whole") == 0
    interrupted(capsys, tmp_path / "cut", 1, signal.SIGINT, options, "--output", tmp_path / "cut")
    if "kd" in options:
        file.unlink()  # not needed again
    assert main("--resume", tmp_path / "cut") == 0
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    log = log_of(tmp_path / "whole")
    assert set(terms.split()) <= set(log[-1]) and not {"ce_t", "ce_aux", "ce_e", "ce_joint", "feat"} - set(
        terms.split()
    ) & set(log[-1])
    assert json.loads((tmp_path / "whole/args.json").read_text())["name"] == f"{name}-bs16-px16-n8-e3-msnone"
    state = torch.load(tmp_path / "whole/student.pt", weights_only=True)
    frskd.WideResNet(10, 1, 8).load_state_dict(state, strict=True)
    capsys.readouterr()
    assert main("--eval", tmp_path / "whole/student.pt") == 0
    assert "top-1 {top1:.2f} top-5 {top5:.2f}".format(**log[-1]) in capsys.readouterr().out
    assert main("--eval", tmp_path / "whole/last.pt", "--attention", "--output", tmp_path) == 0


@pytest.mark.parametrize("method", ["cskd", "ddgsd", "sad"])
def test_compared_methods_train_on_large_images_with_workers(tmp_path, capsys, method):
    """Partners and views come from the sampler, the same with any number of workers, here of an adapter's network."""
    where = class_folders(tmp_path / "images", size=80)
    options = [
        "--dataset",
        "folder",
        "--data-dir",
        where,
        *MOBILENET,
        "--epochs",
        2,
        "--method",
        method,
        "--device",
        "cpu",
    ]
    main(options, "--workers", 2, "--output", tmp_path / "two")
    main(options, "--workers", 0, "--output", tmp_path / "none")
    assert same_run(tmp_path / "two", tmp_path / "none")


def test_a_teacher_of_torchvision_teaches_by_soft_labels(tmp_path):
    net = torchvision.models.squeezenet1_1(num_classes=8)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    options = "--method kd --teacher-arch squeezenet1_1 --image-size 32 --epochs 1 --teacher-checkpoint".split()
    assert main(TINY, options, tmp_path / "net.pt", "--output", tmp_path / "run") == 0
    assert all(torch.equal(t, weights(tmp_path / "run")[f"teacher.{name}"]) for name, t in net.state_dict().items())


def test_the_command_lines_weights_are_the_classes():
    """A default stands in the constructor for who copies it, and in train.py for --help: the same."""
    classes = {"one": baselines.ONE, "ddgsd": baselines.DDGSD, "byot": baselines.BYOT, "sad": baselines.SAD}
    classes |= {"cskd": baselines.CSKD, "slasd": baselines.SLASD}
    for name, defaults in train.DEFAULTS.items():
        parameters = inspect.signature(classes.get(name, baselines.Distillation)).parameters
        for key in {"alpha", "beta", "temperature"} & set(parameters):
            assert parameters[key].default == defaults[key]


def test_a_file_that_is_no_teacher_is_refused(tmp_path, teacher, capsys):
    options = TINY + "--method kd --teacher-arch wrn16_1 --teacher-checkpoint".split()
    (tmp_path / "text.pt").write_text("no teacher")
    torch.save([1], tmp_path / "list.pt")
    torch.save(frskd.WideResNet(16, 1, 5).state_dict(), tmp_path / "five.pt")
    for file, message in [
        (teacher.with_name("last.pt"), "last.pt is a last.pt: name the student.pt beside it"),
        (tmp_path, "--teacher-checkpoint: no such file"),
        (tmp_path / "text.pt", "is not a checkpoint that can be read"),
        (tmp_path / "list.pt", "list.pt does not fit wrn16_1"),
        (tmp_path / "five.pt", "five.pt does not fit wrn16_1: size mismatch for fc.weight"),
    ]:
        assert message in refused(capsys, options, file)
        assert not (tmp_path / "runs").exists()


def test_a_teacher_that_does_not_suit_images_or_student_is_refused(tmp_path, teacher, capsys):
    options = TINY + ["--method", "kd", "--teacher-checkpoint", teacher, "--teacher-arch"]
    assert "--teacher-arch vit_b_16 at 16 px: Wrong image height!" in refused(capsys, options, "vit_b_16")
    student = "--arch squeezenet1_1 --blocks features.3,features.6,features.9 --image-size 32 --feature-loss at".split()
    assert "--teacher-arch wrn16_1 at 32 px: the feature maps of student and teacher differ in size" in refused(
        capsys, options, "wrn16_1", student
    )


def test_teacher_of_a_run_is_the_one_in_the_file(tmp_path, teacher):
    options = "--method kd --epochs 1 --teacher-arch wrn16_1 --teacher-checkpoint".split()
    assert main(TINY, options, teacher, "--output", tmp_path) == 0
    saved, state = weights(tmp_path), torch.load(teacher, weights_only=True)
    assert all(torch.equal(saved[f"teacher.{name}"], t) for name, t in state.items())


def test_other_methods_have_their_own_weights():
    """alpha, beta and K: ONE 1, 3; DDGSD 1, 5e-4, 3; BYOT 0.1, 1e-6, 3; SAD 0.1; CS-KD 1 (3 above 64 px), 4; SLA-SD
    1, 1; KD 1, 4 with FitNet 100, ATT 1000, overhaul 1."""

    def built(*options):
        args = train.resolve(given("--arch wrn10_1 --dataset cifar100 --device cpu", *options))
        return train.build_method(train.CLASSIFICATION, args, 5)

    values = {
        name: tuple(getattr(built("--method", name), key, None) for key in ("alpha", "beta", "temperature"))
        for name in SELF_DISTILLATION
    }
    assert values == dict(one=(1, None, 3), ddgsd=(1, 5e-4, 3), byot=(0.1, 1e-6, 3), sad=(None, 0.1, None),
                          cskd=(1, None, 4), slasd=(1, None, 1))  # fmt: skip
    betas = [built("--method kd --teacher-arch wrn16_1 --feature-loss", f).beta for f in ("none", "fitnet", "at", "od")]
    assert betas == [0, 100, 1000, 1]
    method = built("--method kd --teacher-arch wrn16_1 --feature-loss fitnet --beta 7 --alpha 2 --temperature 5")
    assert (method.alpha, method.beta, method.temperature) == (2, 7, 5) and type(method.feature_loss) is baselines.Hint
    assert type(built("--method kd --teacher-arch wrn16_1 --feature-loss od").feature_loss) is frskd.Overhaul
    method = built("--method byot --arch resnet18 --image-size 12")
    assert [neck[3].stride[0] for neck in method.necks] == [6, 3, 1]  # maps of 12, 6, 3, 2
    assert built("--method byot --alpha 0.2 --beta 0.5 --temperature 2").alpha == 0.2
    for dataset, alpha in (("cub200", 3), ("imagenet", 3), ("tinyimagenet", 1)):
        assert train.resolve(given("--method cskd --dataset", dataset)).alpha == alpha
    assert train.resolve(given("--method cskd --image-size 72")).alpha == 3


def test_bench_prints_time_operations_and_memory_of_each_method(monkeypatch, capsys, tmp_path):
    """By layout and precision, over the baseline's; a partner without gradient costs a third of a step, as counted."""
    monkeypatch.setattr(train, "BENCHED", ("--method baseline", "--method cskd", ""))
    assert main("--bench --arch wrn10_1 --batch-size 4 --device cpu --compile eager".split()) == 0
    out, err = capsys.readouterr()
    names = "float32 | float32, default layout | bf16 | float32, compiled | bf16, compiled"
    lines = out.splitlines()
    assert f"| method | counted | {names} |" in lines
    step = r" \d+ ms, \d+/s \((\d+\.\d\d)\), \d+ G/s"
    columns = rf"{step}, (\d+) MB \|{step}, \d+ MB \|{step}, (\d+) MB \|{step} \|{step} \|"
    rows = [re.fullmatch(rf"\| (.*) \| (\d+\.\d\d) \|{columns}", line) for line in lines]
    counted, ratios, memory, memory_bf16 = ({row[1]: float(row[i]) for row in rows if row} for i in (2, 3, 4, 7))
    assert list(counted) == ["baseline", "cskd", "frskd", "frskd, the paper's order"]
    assert counted["baseline"] == ratios["baseline"] == 1 and counted["cskd"] == pytest.approx(4 / 3, abs=0.02)
    assert 1 < counted["frskd"] < counted["frskd, the paper's order"]
    assert 0 < memory["baseline"] < memory["cskd"] < memory["frskd"] and memory_bf16["frskd"] < memory["frskd"]
    assert len(re.findall(r"(?:float32|bf16), compiled, in \d+ s", err)) == 8
    assert "Loading alone: 32 px" in out and not list(tmp_path.iterdir())
    assert "--bench goes without any other option than --compile" in refused(capsys, "--bench", "--epochs", 3)
    assert "--arch alexnet: takes resnet18" in refused(capsys, "--bench --arch alexnet".split())
    assert "--batch-size 1: batch norm" in refused(capsys, "--bench --batch-size 1".split())


def test_bench_has_every_method():
    """And of FRSKD and kd every feature loss; the pretrained teacher has as many maps as the student."""
    names = train.benched_methods(train.CLASSIFICATION, "wrn16_2", "cpu")
    assert {name.partition("-")[0].removesuffix("+sla") for name in names if "," not in name} == {*train.METHODS}
    assert {"kd-wrn40_2", "kd-fitnet-wrn40_2", "kd-at-wrn40_2", "kd-od-wrn40_2", "frskd-nofeat"} <= {*names}
    assert {"frskd-fitnet", "frskd-od", "frskd+sla"} <= {*names}
    assert {"kd", "kd-at"} <= {*train.benched_methods(train.CLASSIFICATION, "resnet18", "cpu")}


def test_peak_memory_by_hand():
    """Of four tensors of 400 bytes: two, a third beside them, which is freed before the fourth; views and what
    was there before add nothing."""
    x = torch.zeros(100)

    def step():
        x.add_(1)
        a, b = x + 1, x + 2
        b.add_(a.view(10, 10).flatten())
        c = a + b
        del a, c
        return x + 3

    assert train.peak_memory(step, cuda=False) == 1200


def test_freed_memory_stays_with_the_process():
    """So that a tensor above 32 MiB does not pay page faults again each time: glibc's default."""
    train.keep_freed_memory()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)  # 64 MiB, 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(5)) < 1000


def test_resume_without_a_path_takes_mixup_without_a_value(tmp_path, capsys):
    """The same command again, as an elastic restart gives it."""
    options = TINY + ["--epochs", 1, "--mixup", "--resume", "--output", tmp_path]
    assert main(options) == main(options) == 0
    assert "--mixup 0.4 differs from the checkpoint's 0.2" in refused(capsys, options, "--mixup", "0.4")


def test_table_prints_alpha_against_beta(tmp_path, capsys):
    """Figure 4: a grid where runs differ in both; a pair that nobody ran is empty."""
    for alpha, beta in ((1, 50), (1, 100), (2, 100)):
        main(TINY, "--epochs 1 --alpha".split(), alpha, "--beta", beta, "--output", tmp_path / f"{alpha}-{beta}")
    main(TINY, "--epochs 1 --method baseline --output".split(), tmp_path / "baseline")
    capsys.readouterr()
    assert main("--table", tmp_path) == 0
    *_, title, _, header, _, one, two = capsys.readouterr().out.splitlines()
    top1 = {name: f"{log_of(tmp_path / name)[-1]['top1']:.2f}" for name in ("1-50", "1-100", "2-100")}
    assert title == "shapes wrn10_1 frskd-bs16-px16-n8-e1, alpha down, beta across:"
    assert header == "| alpha | beta 50 | beta 100 |"
    assert one.startswith(f"| 1 | {top1['1-50']} (") and f"| {top1['1-100']} (" in one
    assert two.startswith(f"| 2 |  | {top1['2-100']} (")


def test_table_averages_seeds_and_lists_what_it_leaves_out(tmp_path, capsys):
    for seed in (0, 1, 2):
        main(TINY, "--method baseline --epochs 2 --seed".split(), seed, "--output", tmp_path / f"s{seed}")
    main(TINY, "--epochs 2 --output".split(), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    cut = tmp_path / "s2" / "log.jsonl"
    cut.write_text(cut.read_text().splitlines()[0] + "\n")
    capsys.readouterr()
    assert main("--table", tmp_path) == 0
    out = capsys.readouterr().out
    a, b = (log_of(tmp_path / f"s{seed}")[-1]["top1"] for seed in (0, 1))
    assert f"| baseline-bs16-px16-n8-e2 | {(a + b) / 2:.2f} ± {abs(a - b) / math.sqrt(2):.2f} (" in out
    assert "), n = 2 |" in out and f"| frskd-bs16-px16-n8-e2 | {log_of(tmp_path / 'one')[-1]['top1']:.2f} (" in out
    assert f"- {tmp_path / 'two'}: seed 0 again" in out
    assert f"- {tmp_path / 's2'}: unfinished, 1 of 2 epochs" in out and "| method | shapes wrn10_1 |" in out


def test_a_number_that_is_not_finite_ends_the_run_with_status_1(tmp_path, capsys):
    """Named by term, epoch and step; the last good checkpoint stays."""
    assert main(TINY, "--epochs 1 --output".split(), tmp_path) == 0
    before = (tmp_path / "last.pt").read_bytes()
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    checkpoint["args"] |= dict(epochs=2)
    checkpoint["optimizer"]["state"][0]["momentum_buffer"].fill_(math.inf)
    torch.save(checkpoint, tmp_path / "last.pt")
    poisoned = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    assert main("--resume", tmp_path) == 1
    error = shown(capsys.readouterr().err)[-1]
    assert error == (
        f"train.py: error: the term ce is not finite in epoch 2, step 2; {tmp_path / 'last.pt'} is of the epoch before"
    )
    assert (tmp_path / "last.pt").read_bytes() == poisoned != before


def test_a_gradient_that_is_not_finite_is_named():
    method = frskd.Baseline(nn.Linear(2, 2))
    meter = train.Meter(method, epoch=0)
    for step in range(3):
        logits = method.student(torch.ones(1, 2))
        logits.sum().backward()
        if step == 1:
            method.student.bias.grad[0] = math.nan
        meter.update({"ce": logits.sum()}, 1)
    with pytest.raises(train.NonFinite, match="the gradient of student.bias is not finite in epoch 1, step 2"):
        meter.read()


# -------------------------------------------------------------------------------------- every error is one line


def test_options_that_do_not_go_together_are_refused_before_data_is_read(capsys):
    missing = ["--data-dir", "/nowhere"]  # were the data read first, this would be the error
    for options, message in [
        ("--dataset folder --method baseline --alpha 2", "--alpha has no effect with --method baseline"),
        ("--dataset folder --channels 128", "--channels has no effect with --teacher bifpnc"),
        ("--dataset folder --teacher bifpn --width 2", "--width has no effect with --teacher bifpn"),
        ("--dataset folder --download", "--download has no effect with --dataset folder"),
        ("--data-dir x", "--data-dir has no effect with --dataset shapes"),
        ("--dataset folder --resume --overwrite", "--overwrite and --resume do not go together"),
        ("--dataset folder --mixup --cutmix", "--cutmix does not go with --mixup"),
        ("--dataset cub200 --sla --mixup", "--mixup does not go with --sla"),
        ("--dataset cub200 --sla --cutmix 0.5", "--cutmix does not go with --sla"),
        ("--dataset folder --method slasd --mixup", "--mixup does not go with --method slasd"),
        ("--dataset folder --method slasd --cutmix", "--cutmix does not go with --method slasd"),
        ("--dataset folder --method cskd --mixup", "--mixup does not go with --method cskd"),
        ("--dataset folder --method cskd --cutmix", "--cutmix does not go with --method cskd"),
        ("--dataset folder --method one --beta 3", "--beta has no effect with --method one"),
        ("--dataset folder --method sad --alpha 3", "--alpha has no effect with --method sad"),
        ("--dataset folder --method byot --alpha 1.5", "--alpha 1.5: byot weights cross-entropy by 1 - alpha"),
        ("--dataset folder --method byot --alpha 1", "--alpha 1: byot weights cross-entropy by 1 - alpha"),
        ("--dataset cub200 --method kd --teacher-checkpoint x --alpha 0", "--alpha 0 without a feature loss leaves"),
        (
            "--dataset cub200 --method kd --teacher-checkpoint x --feature-loss none --beta 0",
            "--beta has no effect with --feature-loss none",
        ),
        ("--dataset folder --method cskd --sla", "--sla has no effect with --method cskd"),
        ("--dataset folder --method byot --feature-loss od", "--feature-loss has no effect with --method byot"),
        ("--dataset folder --method kd --teacher bifpn", "--teacher has no effect with --method kd"),
        ("--dataset folder --teacher-arch resnet34", "--teacher-arch has no effect with --method frskd"),
        (
            "--dataset folder --method one --teacher-checkpoint x",
            "--teacher-checkpoint has no effect with --method one",
        ),
        (
            "--dataset cub200 --method kd",
            "--method kd needs --teacher-checkpoint FILE, the student.pt of a trained resnet34",
        ),
        (
            "--dataset cub200 --method kd --teacher-checkpoint x --beta 3",
            "--beta has no effect with --feature-loss none",
        ),
        (
            "--dataset cub200 --method kd --teacher-checkpoint x --teacher-arch y",
            "--teacher-arch y: neither of frskd.py",
        ),
        (
            "--dataset cub200 --method kd --teacher-checkpoint x --teacher-arch resnet50 --feature-loss at",
            "--feature-loss at compares maps, which --teacher-arch resnet50 does not give",
        ),
        (
            "--dataset cub200 --method kd --teacher-checkpoint x --feature-loss at --arch wrn16_2",
            "--feature-loss at compares maps: --arch wrn16_2 has 3, --teacher-arch resnet34 has 4",
        ),
        (
            "--dataset cub200 --method kd --teacher-checkpoint x --feature-loss at --arch mobilenet_v2 --blocks a,b",
            "--feature-loss at compares maps: --arch mobilenet_v2 has 2, --teacher-arch resnet34 has 4",
        ),
        ("--dataset folder --feature-loss none", "--feature-loss none is for --method kd"),
        ("--dataset cub200 --method one --arch mobilenet_v2 --blocks a,b", "--method one copies the last stage"),
        ("--dataset cub200 --method kd --teacher-checkpoint /nowhere", "--teacher-checkpoint: no such file: /nowhere"),
        ("--dataset folder --method baseline --sla", "--sla has no effect with --method baseline"),
        ("--dataset folder --method baseline --feature-loss od", "--feature-loss has no effect with --method base"),
        ("--dataset folder --beta 0 --feature-loss od", "--feature-loss has no effect with --beta 0"),
        (
            "--dataset cub200 --arch mobilenet_v2 --blocks features.3 --feature-loss od",
            "--feature-loss od compares maps",
        ),
        ("--dataset imagenet --download", "--download cannot fetch imagenet, which needs a registration"),
        ("--dataset folder --arch resnet18 --blocks layer1", "--blocks is for the networks of torchvision.models"),
        ("--dataset folder --arch densenet121", "--arch densenet121 needs --blocks"),
        ("--dataset folder --arch resnet19", "--arch resnet19: neither"),
        ("--dataset folder --alpha 0 --temperature 3", "--temperature has no effect with --alpha 0"),
        ("--dataset cub200 --eval x --alpha 3", "--alpha has no effect with --eval"),
        ("--dataset cub200 --eval x --output y", "--output has no effect with --eval"),
        ("--dataset cub200 --eval x --resume y", "--resume has no effect with --eval"),
        ("--dataset cub200 --eval x --overwrite", "--overwrite has no effect with --eval"),
        ("--dataset cub200 --eval x --compile", "--compile has no effect with --eval"),
        ("--dataset cub200 --eval x --attention 3", "--attention 3: with --eval without an epoch"),
    ]:
        argv = options.split() + (missing if "--data-dir" not in options else [])
        assert message in refused(capsys, argv)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--alpha -1", "argument --alpha: '-1' is not a number of at least 0"),
        ("--temperature 0", "argument --temperature: '0' is not a number above 0"),
        ("--lr nan", "argument --lr: 'nan' is not a number above 0"),
        ("--epochs x", "argument --epochs: 'x' is not a whole number of at least 1"),
        ("--milestones 5,3", "--milestones 5,3: the epochs must increase and lie below 8"),
        ("--milestones 4 --epochs 4", "--milestones 4: the epochs must increase and lie below 4"),
        ("--momentum 1", "argument --momentum: '1' is not a number from 0 to below 1"),
        ("--lr 1e300", "argument --lr: '1e300' is not a number above 0"),
        ("--seed 99999999999999999999999", "argument --seed: '99999999999999999999999' is not a whole number"),
        ("--output=", "argument --output: an empty name"),
        ("--mixup 0", "argument --mixup: '0' is not a number of at least 0.001"),
        ("--cutmix x", "argument --cutmix: 'x' is not a number of at least 0.001"),
        ("--feature-loss l2", "argument --feature-loss: invalid choice: 'l2'"),
        ("--table . --epochs 3", "--table goes without any other option"),
        ("--epoch 5", "unrecognized arguments: --epoch 5"),
        ("--dataset cifar10", "invalid choice: 'cifar10'"),
        ("--device tpu9", "--device tpu9: no such device here, there are cpu"),
        ("--device cuda:99", "--device cuda:99: no such device here, there are cpu"),
        ("--compile nonsense", "argument --compile: invalid choice: 'nonsense'"),
        ("--epochs 2 --attention 3", "--attention 3 is after the last of 2 epochs"),
        ("--arch wrn17_2", "--arch wrn17_2 at 32 px: a wide ResNet has depth 6 k + 4"),
        ("--arch vit_b_32 --blocks encoder", "--arch vit_b_32 at 32 px: Wrong image height! Expected 224 but got 32!"),
        ("--arch squeezenet1_1 --blocks features.99", "no block named 'features.99'; the network has features"),
        ("--arch squeezenet1_1 --blocks features --method byot", "--method byot with --arch squeezenet1_1: one map is"),
        ("--arch squeezenet1_1 --blocks features --method sad", "--method sad with --arch squeezenet1_1: one map is"),
        ("--table /nowhere", "no run of train.py in or below this folder"),
        ("--resume /nowhere", "no such file: /nowhere"),
        ("--eval /nowhere", "no such file: /nowhere"),
        ("--per-class 201", "class cross has 200 training images, fewer than --per-class 201"),
        ("--per-class 2", "--batch-size 32 is larger than the training set of 16 images"),
        ("--output /proc/nowhere", "cannot make the folder /proc/nowhere"),
    ],
)
def test_a_users_mistake_gets_one_line(capsys, options, message):
    assert message in refused(capsys, options.split())


def test_dashes_and_underscores_both_work_in_a_flag(capsys):
    assert "--batch-size 32" in refused(capsys, "--per_class", 2)
    assert "--batch-size 48" in refused(capsys, "--per_class=2", "--batch_size=48")


def test_broken_data_is_refused_by_name(tmp_path, capsys):
    folder = ["--dataset", "folder", "--data-dir", tmp_path]
    assert "no such folder: " + str(tmp_path / "train") in refused(capsys, folder)
    class_folders(tmp_path, splits=("train",))
    assert "neither val/ nor test/" in refused(capsys, folder)
    class_folders(tmp_path, size=7)
    assert "a side of 7 pixels, fewer than 8: say with --image-size" in refused(capsys, folder)
    class_folders(tmp_path)
    (tmp_path / "test/class9").mkdir()
    assert "Found no valid file for the classes class9" in refused(capsys, folder)
    Image.new("RGB", (16, 16)).save(tmp_path / "test/class9/a.png")
    assert f"{tmp_path / 'test'} has the class class9, which {tmp_path / 'train'} lacks" in refused(capsys, folder)


@pytest.mark.parametrize("size, workers", [(32, 0), (72, 0), (72, 1)])
def test_a_truncated_image_is_named(tmp_path, capsys, size, workers):
    """Decoded in this process or in a worker, the line is the same."""
    class_folders(tmp_path, size=size)
    broken = tmp_path / "train/class1/010.png"
    broken.write_bytes(broken.read_bytes()[:200])
    options = ["--dataset", "folder", "--data-dir", tmp_path, "--arch", "wrn10_1", "--batch-size", 8, "--epochs", 1]
    line = refused(capsys, options, "--image-size", size, "--workers", workers, "--output", tmp_path / "run")
    assert line.startswith(f"train.py: error: {broken}: not a readable image (")


def test_cifar100_that_is_not_there_says_what_to_do(tmp_path, capsys):
    line = refused(capsys, "--dataset", "cifar100", "--data-dir", tmp_path)
    assert str(tmp_path) in line and "cifar-100-python.tar.gz" in line and "--download" in line


def test_a_run_is_never_overwritten_unasked(run, capsys):
    before = (run / "last.pt").read_bytes()
    line = refused(capsys, TINY, "--epochs 3 --output".split(), run)
    assert "--resume" in line and "--overwrite" in line and (run / "last.pt").read_bytes() == before


def test_overwrite_that_fails_leaves_the_run(run, tmp_path, capsys):
    """A network that cannot be built is noticed before the old run is removed."""
    shutil.copytree(run, tmp_path / "a")
    refused(capsys, "--arch squeezenet1_1 --blocks layer9 --overwrite --output".split(), tmp_path / "a")
    refused(capsys, "--arch wrn17_1 --overwrite --output".split(), tmp_path / "a")
    assert same_run(run, tmp_path / "a")


def test_a_run_without_a_checkpoint_is_replaced_not_resumed(tmp_path, capsys):
    (tmp_path / "args.json").write_text("{}")
    line = refused(capsys, TINY, "--output", tmp_path)
    assert "--overwrite" in line and "--resume" not in line


def test_the_command_in_args_json_says_what_a_resume_changed(run, tmp_path):
    shutil.copytree(run, tmp_path / "a")
    main("--resume", tmp_path / "a", "--epochs", 4, "--workers", 1)
    command = shlex.split(json.loads((tmp_path / "a/args.json").read_text())["command"])[2:]
    options = vars(train.parser().parse_args(command))
    assert [options[key] for key in ("epochs", "milestones", "workers", "arch")] == [4, [1, 2], 1, "wrn10_1"]


def test_a_single_value_for_batch_norm_is_refused(tmp_path, capsys):
    where = class_folders(tmp_path / "images", per_class=4, size=8)
    options = ["--dataset", "folder", "--data-dir", where, "--batch-size", 1, "--device", "cpu"]
    assert "batch norm cannot normalise one value a channel: --batch-size 1" in refused(capsys, options)


def test_overwrite_replaces_a_run(tmp_path):
    main(TINY, "--epochs 2 --attention 2 --output".split(), tmp_path)
    assert main(TINY, "--epochs 1 --overwrite --output".split(), tmp_path) == 0
    assert len(log_of(tmp_path)) == 1 and not (tmp_path / "attention-2.png").exists()


def test_checkpoints_that_do_not_fit_are_refused(run, tmp_path, capsys):
    half = tmp_path / "last.pt"
    half.write_bytes((run / "last.pt").read_bytes()[:20000])
    assert f"{half} is not a checkpoint that can be read" in refused(capsys, "--resume", half)
    assert "is not the last.pt of a run" in refused(capsys, "--resume", run / "student.pt")
    other = tmp_path / "student.pt"
    for unfit in (frskd.WideResNet(16, 1, 8), frskd.WideResNet(10, 2, 8), frskd.WideResNet(10, 1, 7)):
        torch.save(unfit.state_dict(), other)  # of another depth, width, number of classes
        assert "the checkpoint does not fit wrn10_1" in refused(capsys, "--eval", other, TINY_EVAL)
    for content in (b"", b"[]", b"PK", bytes(5000), (run / "args.json").read_bytes()):
        other.write_bytes(content)
        assert f"{other} is not a checkpoint that can be read" in refused(capsys, "--eval", other, TINY_EVAL)
    assert "is not a checkpoint that can be read: IsADirectoryError" in refused(capsys, "--eval", run)


@pytest.mark.parametrize(
    "values",
    [
        dict(seed="x"), dict(seed=None), dict(device=5), dict(device="cuda:99"), dict(compile="x"), dict(workers=-1),
        dict(lr=math.nan), dict(alpha=-1.0), dict(epochs=True), dict(milestones=[1, "x"]), dict(arch="resnet19"),
        dict(stats="x"), dict(lr_drops=["x"]), dict(argv=3), dict(argv=[3]), dict(recipe={}), dict(dataset=[]),
        dict(method="baseline"), dict(width=1), dict(data_dir=3), dict(download="x"), dict(mixup="x"), dict(blocks=[1]),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_values_is_refused(run, tmp_path, capsys, values):
    """Those that no command line could give, that this machine has not, or that do not fit the weights."""
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    torch.save(checkpoint | dict(args=checkpoint["args"] | values), tmp_path / "last.pt")
    line = refused(capsys, "--resume", tmp_path)
    (key,) = values
    reasons = dict(device="--device cuda:99" if values == dict(device="cuda:99") else "is not the last.pt of a run")
    reasons |= dict(
        arch="--arch resnet19", method="does not fit wrn10_1, baseline", width="does not fit wrn10_1, frskd"
    )
    assert reasons.get(key, "is not the last.pt of a run") in line


@pytest.mark.parametrize(
    "change",
    [dict(args=[]), dict(args={}), dict(log="x"), dict(log=[{}]), dict(log=[1]), dict(optimizer={}), dict(method={})],
)
def test_a_checkpoint_of_another_content_is_refused(run, tmp_path, capsys, change):
    torch.save(torch.load(run / "last.pt", weights_only=True) | change, tmp_path / "last.pt")
    line = refused(capsys, "--resume", tmp_path)
    assert "is not the last.pt of a run" in line or "the checkpoint does not fit" in line


@pytest.mark.parametrize("content", ["", "[]", "{}", dict(name=1), dict(method=[]), dict(arch=5), dict(recipe=[])])
def test_args_json_of_another_content_is_refused(run, tmp_path, capsys, content):
    shutil.copy(run / "student.pt", tmp_path)
    if isinstance(content, dict):  # a value of another type
        content = json.dumps(json.loads((run / "args.json").read_text()) | content)
    (tmp_path / "args.json").write_text(content)
    assert f"{tmp_path / 'args.json'} does not hold the values" in refused(capsys, "--eval", tmp_path / "student.pt")
    assert main("--table", tmp_path) == 0
    assert "not a run that can be read" in capsys.readouterr().out


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save(Hostile(), tmp_path / "last.pt")
    assert "is not a checkpoint that can be read" in refused(capsys, "--resume", tmp_path)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("room", [0.01, 0.5])
def test_a_full_disk_leaves_the_checkpoint_from_before(tmp_path, capsys, room):
    """student.pt, or last.pt, does not fit any more: one line says so, and with room again the run goes on."""
    assert main(TINY, "--epochs 1 --output".split(), tmp_path / "a") == 0
    last, limits = tmp_path / "a/last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = last.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * len(before)), limits[1]))
    try:
        line = refused(capsys, "--resume", tmp_path / "a", "--epochs", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    name = "student.pt" if room == 0.01 else "last.pt"
    assert (
        line == f"train.py: error: cannot write {tmp_path / 'a' / name}: File too large; the one from before is whole"
    )
    assert last.read_bytes() == before and not list(tmp_path.glob("a/*.partial"))
    assert len(log_of(tmp_path / "a")) == 2  # one more than the checkpoint has
    assert main("--resume", tmp_path / "a", "--epochs", 3) == 0
    assert [entry["epoch"] for entry in log_of(tmp_path / "a")] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch's handler of SIGCHLD
def test_a_worker_that_is_gone_stops_the_run_with_one_line(tmp_path, capsys):
    """Killed, as the system does for want of memory."""
    where = class_folders(tmp_path / "images", size=80)

    def watch():
        while not (tmp_path / "run/last.pt").exists():
            time.sleep(0.01)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    options = ["--dataset", "folder", "--data-dir", where, *MOBILENET, "--epochs", 200, "--device", "cpu"]
    assert main(options, "--workers", 1, "--output", tmp_path / "run") == 1
    (line,) = shown(capsys.readouterr().err)
    assert line.startswith("train.py: error: a worker process is gone, perhaps killed for want of memory")
    assert line.endswith(f"; continue with: python train.py --resume {tmp_path / 'run'}")


def test_what_nobody_reads_any_more_stops_with_one_line(run, monkeypatch, capsys):
    """Standard output on a full disk, and a pipe that is closed, as by | head: status 141, the shell's for it."""
    with suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as patch:  # closing it fails too
        patch.setattr(sys, "stdout", full)
        assert main("--table", run) == 2
    assert shown(capsys.readouterr().err) == ["train.py: error: [Errno 28] No space left on device"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert main("--table", run) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", ["", "--method cskd", "--cutmix", "--sla"])
def test_classes_of_one_image_a_last_batch_of_one_and_a_single_test_image(tmp_path, options):
    """The partner in a class of one image is the image; of five images in batches of two, the last batch has three."""
    class_folders(tmp_path, per_class=1, classes=5, splits=("train",))
    (tmp_path / "test/class2").mkdir(parents=True)
    shutil.copy(tmp_path / "train/class2/002.png", tmp_path / "test/class2")
    arguments = ["--dataset", "folder", "--data-dir", tmp_path, "--arch", "wrn10_1", "--batch-size", 2, "--epochs", 1]
    assert main(arguments, options.split(), "--device", "cpu", "--output", tmp_path / "run") == 0
    (entry,) = log_of(tmp_path / "run")
    assert entry["top1"] in (0, 100) and entry["top5"] == 100
    assert all(math.isfinite(value) for value in entry.values())


def test_too_little_memory_gets_one_line(monkeypatch, capsys):
    monkeypatch.setitem(train.METHODS, "baseline", lambda student, num_classes, args: torch.empty(1 << 60))
    line = refused(capsys, TINY, "--method", "baseline")
    assert line.startswith("train.py: error: out of memory: take a smaller --batch-size, --image-size or network (")


def started(script, *argv):
    """train.py or seg.py in a process of its own, the first of a group."""
    command = [sys.executable, HERE / f"{script.__name__}.py", *map(str, argv)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **pipes, start_new_session=True)


def test_ctrl_c_in_a_terminal_exits_with_130(tmp_path):
    """A real process that waits for its worker, its whole group signalled: no traceback, and how to resume."""
    where = class_folders(tmp_path / "images", size=700)
    options = [
        "--dataset",
        "folder",
        "--data-dir",
        where,
        *MOBILENET,
        "--epochs",
        99,
        "--workers",
        1,
        "--device",
        "cpu",
    ]
    process = started(train, *options, "--output", tmp_path / "run")
    while not (tmp_path / "run/last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and f"continue with: python train.py --resume {tmp_path / 'run'}" in err


# --------------------------------------------------------------------------------------------- many processes


@pytest.mark.parametrize("size, pairs, workers", [(16, None, 0), (16, "class", 0), (72, None, 1), (72, "view", 0)])
def test_processes_share_the_draws_of_the_whole_batch(size, pairs, workers):
    """Order, crops and flips: what two or three processes get together is what one gets, bit for bit."""
    images = torch.randint(256, (28, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def epoch(**kwargs):
        split = data.Split(images, torch.arange(28) // 4)
        loader = data.make_loader(split, train=True, batch_size=11, image_size=size, workers=workers, **kwargs)
        loader.pairs = pairs
        return list(loader.epoch(3))

    whole = epoch()
    assert [len(y) for _, y in whole] == [11, 11, 6]
    for n in (2, 3):
        parts = [epoch(rank=rank, processes=n) for rank in range(n)]
        for step, (x, y) in enumerate(whole):
            halves = [part[step][0].chunk(2 if pairs else 1) for part in parts]
            assert torch.equal(torch.cat([half[0] for half in halves]), x[: len(y)])
            assert torch.equal(torch.cat([half[-1] for half in halves]), x[-len(y) :])
            assert torch.equal(torch.cat([part[step][1] for part in parts]), y)


def test_processes_mix_by_the_same_share():
    """lambda, and the box of CutMix, are the batch's; only the pairs are made within a process."""
    mix = v2.CutMix(alpha=1.0, num_classes=10)
    _, loader = device_loader(n=8, batch_size=8, mix=mix)
    shares = {share for share in next(loader.epoch(0))[1].flatten().tolist() if share}
    for rank in (0, 1):
        _, loader = device_loader(n=8, batch_size=8, mix=mix, rank=rank, processes=2)
        ((x, y),) = loader.epoch(0)
        assert len(x) == 4 and {share for share in y.flatten().tolist() if share} == shares


def test_a_last_batch_too_small_for_the_processes_joins_the_one_before():
    """Fewer than two images each; of one process, a single image."""
    for n, processes, sizes in ((23, 2, [10, 13]), (24, 2, [10, 10, 4]), (25, 3, [10, 15]), (21, 1, [10, 11])):
        loaders = [device_loader(n=n, batch_size=10, rank=rank, processes=processes)[1] for rank in range(processes)]
        assert all(loader.sizes == sizes and len(loader) == len(sizes) for loader in loaders)
        parts = torch.tensor([[len(index) for index in loader.batches(0)] for loader in loaders])
        assert parts.sum(0).tolist() == sizes and parts.min() >= 2
        assert (parts.max(0).values - parts.min(0).values <= 1).all()
    with pytest.raises(data.DataError, match="--batch-size 5 does not give each of 3 processes two images"):
        device_loader(n=9, batch_size=5, processes=3)
    _, loader = device_loader(n=9, batch_size=7, rank=2, processes=3)
    assert train.CLASSIFICATION.whole_batch(loader) == 2


def test_processes_evaluate_each_image_once_in_the_batches_of_one():
    """Whole batches in turn; a process that has none left still takes part in the last step."""
    whole = [x for x, _ in device_loader(n=10, train=False)[1].epoch()]
    loaders = [device_loader(n=10, train=False, rank=rank, processes=2)[1] for rank in range(2)]
    first, second = ([x for x, _ in loader.epoch()] for loader in loaders)
    assert_close([first[0], second[0], first[1]], whole, rtol=0, atol=0)
    assert [len(loader) for loader in loaders] == [2, 2] and (len(first), len(second)) == (2, 1)


class Plain(nn.Module):
    """A network without batch norm."""

    def __init__(self, num_classes=7):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def recorded_epoch(task, method, loader):
    """One epoch of training -> means of the terms so far after each step, all parameters."""
    steps = []

    class Recorded(train.Meter):
        def update(self, *args):
            super().update(*args)
            steps.append(self.read())

    args = SimpleNamespace(**vars(ON_CPU) | dict(compile=None))
    method.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9)
    forward = train.Forward(method, args, task.whole_batch(loader))
    with train.StopOnSignal() as stop, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "Meter", Recorded)
        task.train_epoch(args, forward, method, loader, optimizer, 0, stop)
    return steps, torch.cat([p.detach().flatten() for p in method.parameters()])


def small_runs():
    """What is compared: {name: what `recorded_epoch` gives}, of this process among those that train together."""
    among = dict(rank=train.rank(), processes=train.processes())
    images = torch.randint(256, (31, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(3, (31, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    masks[:9, :40] = data.VOID  # unequal among the parts
    torch.manual_seed(0)
    plain = frskd.Baseline(Plain())
    labels, kwargs = torch.arange(31) // 5, dict(train=True, image_size=16, **among)
    small = data.make_loader(data.Split(images[:, :16, :16], labels), batch_size=12, **kwargs)
    even = data.make_loader(data.Split(images[:18, :16, :16], labels[:18]), batch_size=6, **kwargs)
    masks[5] = data.VOID  # an image, and so perhaps a part, without a pixel that counts
    parts = mask_loader(images, masks, batch_size=12, part=6 // train.processes(), **among)
    student = frskd.WideResNet(10, 1, 7)
    options = train.resolve(given("--method byot --arch wrn10_1 --image-size 16 --beta 0.01"))
    byot = train.METHODS["byot"](student, 7, options)
    return dict(
        baseline=recorded_epoch(train.CLASSIFICATION, plain, small),
        frskd=recorded_epoch(train.CLASSIFICATION, without_batch_norm(frskd_method(num_classes=7)), small),
        byot=recorded_epoch(train.CLASSIFICATION, without_batch_norm(byot), even),  # a sum: exact in equal parts
        segmentation=recorded_epoch(seg.SEGMENTATION, pixel_method(), parts),
    )


class Poisoned(frskd.Baseline):
    """In the second process, not in the first, the loss becomes infinite in the second step."""

    steps = 0

    def forward(self, x, y):
        terms, logits = super().forward(x, y)
        self.steps += 1
        return (dict(ce=terms["ce"] * math.inf), logits) if self.steps == 2 and train.rank() == 1 else (terms, logits)


class Broken(data.DeviceLoader):
    """In the second process, not in the first, the second batch cannot be read."""

    def epoch(self, epoch=0):
        for step, batch in enumerate(super().epoch(epoch)):
            if step == 1 and self.rank == 1:
                raise data.DataError("a.jpg: not a readable image")
            yield batch


def refusal(function, *args):
    """The message of the error that a call raises."""
    try:
        function(*args)
    except (train.UserError, train.NonFinite, data.DataError) as error:
        return str(error)


def one_of_many(out):
    """What each process does that torchrun starts below; the first leaves its results in `out`."""
    with train.joined():
        results = small_runs()
        torch.manual_seed(train.rank())  # processes that begin apart are made equal
        student = frskd.WideResNet(10, 1, 28)
        method = frskd.FRSKD(student, frskd.BiFPNc(student.channels, 28))
        loader = device_loader(n=28, size=16, batch_size=7, rank=train.rank(), processes=train.processes())[1]
        _, weights = recorded_epoch(train.CLASSIFICATION, method, loader)
        train.share_buffers(method)
        everyone = torch.cat([weights, *(b.double() for b in map(torch.flatten, method.buffers()))])
        smallest, largest = train.all_reduced(everyone.clone(), MIN), train.all_reduced(everyone.clone(), MAX)
        kwargs = dict(train=True, batch_size=7, rank=train.rank(), processes=train.processes())
        results["refused"] = [refusal(*call) for call in (
            (train.run, train.CLASSIFICATION, ["--table", "runs"], []),
            (train.run, train.CLASSIFICATION, ["--seed", "x"], []),
            (train.check_processes, SimpleNamespace(device="cuda:1", sync_bn=False)),
            (train.check_processes, SimpleNamespace(device="cuda", sync_bn=False)),
            (recorded_epoch, train.CLASSIFICATION, Poisoned(Plain(28)), loader),
            (recorded_epoch, train.CLASSIFICATION, frskd.Baseline(Plain(28)), Broken(loader.split, **kwargs)),
        )]  # fmt: skip
        among = dict(rank=train.rank(), processes=train.processes())
        test = data.make_loader(
            data.load("shapes", image_size=16).test, train=False, batch_size=90, image_size=16, **among
        )
        accuracy = train.evaluate(student, test, torch.autocast("cpu", enabled=False))
        results |= dict(equal=torch.equal(smallest, largest), student=student.state_dict(), accuracy=accuracy)
        if train.rank() == 0:
            torch.save(results, out)


MIN, MAX = torch.distributed.ReduceOp.MIN, torch.distributed.ReduceOp.MAX


def torchrun(processes, *argv, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return subprocess.Popen([*command, *map(str, argv)], **pipes | kwargs)


@pytest.fixture(scope="module")
def of_many(tmp_path_factory):
    """{2: ..., 3: ...}: what `one_of_many` leaves, of two processes and of three."""
    folder = tmp_path_factory.mktemp("many")
    for process in [torchrun(n, HERE / "test_frskd.py", folder / f"{n}.pt") for n in (2, 3)]:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in (2, 3)}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["baseline", "frskd", "byot", "segmentation"])
def test_processes_without_batch_norm_train_as_one(of_many, name, n):
    """Three steps of 12, 12 and 7 images, and masks with void in two parts: losses, terms and weights to 1e-5."""
    (steps, weights), (steps_n, weights_n) = small_runs()[name], of_many[n][name]
    assert len(steps) == len(steps_n) == 3 and steps[0]["ce"] != steps[-1]["ce"]
    for expected, actual in zip(steps, steps_n):
        assert actual == pytest.approx(expected, rel=1e-5)
    assert_close(weights_n, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_processes_keep_equal_weights_and_evaluate_as_one(of_many, n):
    """FRSKD, with batch norm: parameters and buffers equal bit for bit, accuracies those of one process."""
    assert of_many[n]["equal"]
    student = frskd.WideResNet(10, 1, 28)
    student.load_state_dict(of_many[n]["student"])
    test = data.load("shapes", image_size=16).test
    loader = data.make_loader(test, train=False, batch_size=90, image_size=16)
    assert train.evaluate(student, loader, torch.autocast("cpu", enabled=False)) == of_many[n]["accuracy"]


@pytest.mark.parametrize("n", [2, 3])
def test_processes_refuse_together(of_many, n):
    """In all of them, the same: what is for one process, options, devices, a loss or an image that is bad in one."""
    expected = [
        "--table is for one process: python train.py, without torchrun",
        "argument --seed: 'x' is not a whole number of at least 0",
        "--device cuda:1: torchrun's processes take cpu, or cuda, one GPU each",
        f"--nproc-per-node={n}: one GPU each is needed, there are {torch.cuda.device_count()}; or --device cpu",
        "the term ce is not finite in epoch 1, step 2",
        "a.jpg: not a readable image",
    ]
    assert of_many[n]["refused"] == expected


def test_sync_bn_is_named_and_needs_gpus(capsys):
    assert train.run_name(train.resolve(given("--sync-bn"))) == "frskd-syncbn"
    assert "--sync-bn needs CUDA GPUs" in refused(capsys, "--sync-bn --device cpu".split())
    assert "--sync-bn needs CUDA GPUs" in refused(capsys, "--sync-bn --device cpu".split(), script=seg)


def test_workers_leave_signals_to_the_main_process(monkeypatch):
    """torchrun sends SIGTERM to all of a process group, a terminal SIGINT: a worker goes on."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    images = torch.zeros(40, 72, 72, 3, dtype=torch.uint8)
    loader = data.make_loader(data.Split(images, torch.arange(40)), train=True, batch_size=2, image_size=72, workers=1)
    batches = loader.epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, signum)
    assert len(list(batches)) == 19 and worker.is_alive()


def test_torchrun_trains_shapes_through_a_kill_and_a_signal(tmp_path):
    """--max-restarts and --resume: one of two processes is killed, both start again at the last checkpoint; SIGTERM
    stops both with one line, and one process goes on."""
    folder = tmp_path / "run"
    options = [*TINY, "--per-class", 20, "--epochs", 25, "--output", folder, "--resume"]
    process = torchrun(2, "--max-restarts", 1, HERE / "train.py", *options)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def wait_for(epochs):
        while not (folder / "log.jsonl").exists() or len(log_of(folder)) < epochs:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    wait_for(1)
    before = children.read_text().split()
    os.kill(int(before[-1]), signal.SIGKILL)
    wait_for(len(log_of(folder)) + 2)
    assert not {*before} & {*children.read_text().split()}
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert "another process is gone; continue with: torchrun --nproc-per-node=2 train.py --resume" in err
    stopped = f"train.py: stopped; continue with: torchrun --nproc-per-node=2 train.py --resume {folder}"
    assert process.returncode == 1 and err.count(stopped) == 1
    done = len(log_of(folder))
    assert [entry["epoch"] for entry in log_of(folder)] == list(range(1, done + 1)) and done < 25
    assert out.count(f"epoch {done}/25") == 1
    args = json.loads((folder / "args.json").read_text())
    assert args["processes"] == 2 and args["command"].startswith("torchrun --nproc-per-node=2 train.py --arch wrn10_1")
    assert main("--resume", folder) == 0 and len(log_of(folder)) == 25


@pytest.mark.slow
def test_a_broken_image_of_one_process_stops_all_with_one_line(tmp_path):
    """seg.py in two processes, then an image that cannot be read; one process goes on where they stopped."""
    where, folder = voc_tree(tmp_path / "voc"), tmp_path / "run"
    options = [*TINY_SEG, "--data-dir", where, "--batch-size", 8, "--epochs", 8, "--output", folder]
    process = torchrun(2, HERE / "seg.py", *options)
    while not (folder / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    image = where / "VOCdevkit/VOC2007/JPEGImages/000032.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("seg.py: error: ") == 1 and f"error: {image}: not a readable" in err
    image.write_bytes(whole)
    done = len(log_of(folder))
    assert json.loads((folder / "args.json").read_text())["processes"] == 2
    assert 0 < done < 8 and seg_main("--resume", folder) == 0 and len(log_of(folder)) == 8


# --------------------------------------------------------------------------------- seg.py: networks and losses


@functools.cache
def efficientdet(arch="d0", num_classes=5):
    torch.manual_seed(0)
    return seg.EfficientDet(arch, num_classes).eval()


@pytest.mark.parametrize("arch, dim", [("d0", 64), ("d1", 88)])
def test_efficientdet_has_six_levels_of_one_width(arch, dim):
    """P2..P7, strides 4 to 128; the backbone ends before the convolution that its classifier reads."""
    net = efficientdet(arch)
    logits, feats = net.features(torch.randn(1, 3, 136, 200))
    assert logits.shape == (1, 5, 136, 200) and logits.dtype == torch.float32
    assert [tuple(f.shape[1:]) for f in feats] == [
        (dim, 34, 50), (dim, 17, 25), (dim, 9, 13), (dim, 5, 7), (dim, 3, 4), (dim, 2, 2),
    ]  # fmt: skip
    assert [lateral[0].in_channels for lateral in net.lateral] == [24, 40, 112, 320, 320]
    assert len(net.backbone) == 8 and len(net.bifpn) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert net(torch.randn(1, 3, 64, 64)).dtype == torch.float32


def test_levels_are_the_backbones_stages_and_pooled_below():
    """P2..P5 from features[2], [3], [5], [7]; P6 is a pooled 1x1 convolution of the last, P7 a pooled P6."""
    net, x = efficientdet(), torch.randn(2, 3, 64, 64)
    stages = [x]
    for stage in net.backbone:
        stages.append(stage(stages[-1]))
    expected = [lateral(stages[i + 1]) for lateral, i in zip(net.lateral, (2, 3, 5, 7, 7))]
    expected[4] = F.max_pool2d(expected[4], 3, 2, 1)
    assert_close(net.levels(x), [*expected, F.max_pool2d(expected[4], 3, 2, 1)])


def test_backbone_is_torchvisions_without_stochastic_depth():
    net, x = torchvision.models.efficientnet_b0(), torch.randn(2, 3, 64, 64)
    ours = seg.EfficientDet("d0", 5)
    ours.backbone.load_state_dict(net.features[:8].state_dict())
    for module in net.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    assert_close(ours.train().backbone(x), net.train().features[:8](x))


def test_bifpn_layer_written_out():
    """Three levels: fast normalised fusion, swish, one separable 3x3 convolution and batch norm a node."""
    torch.manual_seed(0)
    layer = seg.BiFPNLayer(4, levels=3).train()
    for w in (*layer.top_down_weights, *layer.bottom_up_weights):
        nn.init.uniform_(w, 0.5, 2)
    L1, L2, L3 = (torch.randn(2, 4, s, s) for s in (12, 6, 3))

    def node(conv, w, *maps):
        fused = sum(w_k * x for w_k, x in zip(w, maps)) / (w.sum() + 1e-4)
        depthwise, pointwise, bn = conv
        assert (depthwise.groups, depthwise.kernel_size, pointwise.kernel_size) == (4, (3, 3), (1, 1))
        return bn(pointwise(depthwise(fused * fused.sigmoid())))

    (v1, v2), (w2, w3) = layer.top_down_weights, layer.bottom_up_weights
    P2 = node(layer.top_down[1], v2, L2, F.interpolate(L3, scale_factor=2, mode="bilinear"))
    P1 = node(layer.top_down[0], v1, L1, F.interpolate(P2, scale_factor=2, mode="bilinear"))
    T2 = node(layer.bottom_up[0], w2, L2, P2, F.max_pool2d(P1, 3, 2, 1))
    T3 = node(layer.bottom_up[1], w3, L3, F.max_pool2d(T2, 3, 2, 1))
    assert_close(layer([L1, L2, L3]), [P1, T2, T3], rtol=1e-4, atol=1e-5)


def test_self_teacher_of_segmentation_is_two_layers_and_a_head():
    """Sec. 4.2: "additional two BiFPN layer"; the head is a 3x3 convolution to 256, BN, swish, 3x3 to the classes."""
    teacher = seg.SelfTeacher(64, 21)
    layer = 10 * (9 * 64 + 64**2 + 2 * 64) + 5 * 2 + 4 * 3 + 2
    assert sum(p.numel() for p in teacher.bifpn.parameters()) == 2 * layer
    assert sum(p.numel() for p in teacher.head.parameters()) == 64 * 256 * 9 + 2 * 256 + 256 * 21 * 9 + 21


VOID_CASE = (  # two pixels with the logits of the hand-worked soft-label loss, then a void one
    torch.tensor([[0.0, 1, -1], [2, 0, 0], [9, -9, 3]]).T.view(1, 3, 1, 3).double(),
    torch.tensor([[2.0, 0, 0], [0, 0, 1], [-9, 9, 9]]).T.view(1, 3, 1, 3).double(),
    torch.tensor([[[0, 2, 255]]]),
)


def test_pixel_losses_by_hand():
    """Void pixels are in no loss; the others are averaged: KL at temperature 1 as for two images, 0.791184."""
    logits, logits_t, y = VOID_CASE
    pixels, images = seg.group_totals([y])
    assert (pixels, images) == (2, 1)
    assert seg.pixel_distillation(logits, logits_t, y, pixels, 1.0).item() == pytest.approx(0.791184, abs=1e-6)
    expected = (math.log(1 + math.e + 1 / math.e) + math.log(math.exp(2) + 2)) / 2  # labels with logit 0
    assert seg.pixel_cross_entropy(logits, y, pixels).item() == pytest.approx(expected)


def test_void_pixels_get_no_gradient():
    logits, logits_t, y = VOID_CASE
    logits = logits.clone().requires_grad_()
    (seg.pixel_distillation(logits, logits_t, y, 2, 1.0) + seg.pixel_cross_entropy(logits, y, 2)).backward()
    assert (logits.grad[..., 2] == 0).all() and (logits.grad[..., :2] != 0).all()


def test_masks_that_are_all_void_give_zero_not_nan():
    y = torch.full((1, 1, 3), 255)
    assert seg.pixel_cross_entropy(VOID_CASE[0], y, seg.group_totals([y])[0]) == 0


@pytest.mark.parametrize("epoch, value", [(0, 0), (39, 0), (40, 0.01097), (49, 0.2865), (59, 1), (80, 1)])
def test_alpha_and_beta_rise_after_the_warm_up(epoch, value):
    """Appendix: zero for 40 epochs of 60, then exp(-5 (1 - t)^2)."""
    assert seg.ramp(epoch, 40, 20) == pytest.approx(value, abs=1e-4)


class Pixels(nn.Module):
    """A student without batch norm: 3 -> 4 channels at stride 4, six levels by pooling, the deepest 2x2."""

    dim = 4

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 3, 1)

    def features(self, x):
        feats = [F.silu(self.conv(x.to(self.conv.weight.dtype)))]
        feats += [F.adaptive_avg_pool2d(feats[0], size) for size in (8, 6, 4, 3, 2)]
        return F.interpolate(self.head(feats[0]), x.shape[-2:]), feats

    def forward(self, x):
        return self.features(x)[0]


def without_batch_norm(module):
    for name, child in module.named_children():
        setattr(module, name, nn.Identity() if isinstance(child, nn.BatchNorm2d) else without_batch_norm(child))
    return module


def pixel_method(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    teacher = without_batch_norm(seg.SelfTeacher(4, 3))
    method = seg.SegmentationFRSKD(Pixels(), teacher, warmup_epochs=1, ramp_epochs=2, **kwargs).to(dtype)
    method.set_epoch(1, 3)
    return method


def test_terms_of_segmentation_are_weighted_and_ramped():
    """alpha 1 and beta 50, times exp(-5/4) half way; in the warm-up the networks' cross-entropies alone."""
    method, x, y = pixel_method(alpha=2), torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    y[0, :20] = 255
    logits, feats = method.student.features(x)
    logits_t, feats_t = method.teacher(feats)
    logits_t = F.interpolate(logits_t, (64, 64), mode="bilinear")
    rows, rows_t = (z.permute(0, 2, 3, 1)[y != 255] for z in (logits, logits_t))
    share = math.exp(-5 / 4)
    assert all(frskd.attention_transfer([f], [t]) > 0 for f, t in zip(feats, feats_t)) and len(feats) == 6
    expected = dict(
        ce=F.cross_entropy(logits, y, ignore_index=255),
        ce_t=F.cross_entropy(logits_t, y, ignore_index=255),
        kd=share * 2 * frskd.soft_label_distillation(rows, rows_t, 1.0),
        feat=share * 50 * frskd.attention_transfer(feats, feats_t),
    )
    terms, detached = method(x, y)
    assert list(terms) == list(expected)
    assert_close(terms, expected, rtol=1e-6, atol=1e-9)
    assert_close(detached, logits.detach())
    method.set_epoch(0, 3)
    assert list(method(x, y)[0]) == ["ce", "ce_t"]
    assert list(seg.SegmentationBaseline(method.student)(x, y)[0].items()) == [("ce", terms["ce"])]


def test_distillation_of_segmentation_updates_the_student_only():
    """And the teacher's cross-entropy trains the student's maps."""
    method, x, y = pixel_method(), torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    for name in ("kd", "feat"):
        reached = gradients(method, method(x, y)[0][name])
        assert reached and all(p.startswith("student") for p in reached)
    reached = gradients(method, method(x, y)[0]["ce_t"])
    assert "student.conv.weight" in reached and "student.head.weight" not in reached
    assert {f"teacher.head.{name}" for name, _ in method.teacher.head.named_parameters()} <= reached


@pytest.mark.parametrize("bottom_up", [True, False])
def test_what_the_losses_of_segmentation_do_not_train(bottom_up):
    """The heads read P2 alone: in the baseline the last bottom-up path is not trained, in FRSKD the teacher's last."""
    student, x, y = seg.EfficientDet("d0", 3), torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))

    def untrained(method):
        method.zero_grad(set_to_none=True)
        sum(method(x, y)[0].values()).backward()
        return {name for name, p in method.named_parameters() if p.grad is None}

    def last_path(module):
        return {name for name, _ in module.named_parameters() if name.startswith("bottom_up")}

    student_path = {f"student.bifpn.2.{name}" for name in last_path(student.bifpn[2])}
    assert untrained(seg.SegmentationBaseline(student)) == student_path
    teacher = seg.SelfTeacher(64, 3, bottom_up=bottom_up)
    method = seg.SegmentationFRSKD(student, teacher, warmup_epochs=0, ramp_epochs=1)
    method.set_epoch(0, 1)
    assert untrained(method) == {f"teacher.bifpn.1.{name}" for name in last_path(teacher.bifpn[1])}
    assert len(last_path(teacher.bifpn[1])) == 25 * bottom_up and len(student_path) == 25


def test_a_top_down_path_alone_is_the_first_half_of_a_layer():
    layer, half = seg.BiFPNLayer(4, levels=3).eval(), seg.BiFPNLayer(4, levels=3, bottom_up=False).eval()
    half.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith("top_down")})
    maps = [torch.randn(1, 4, s, s) for s in (12, 6, 3)]
    assert_close(half(maps)[0], layer(maps)[0])
    assert half(maps)[2] is maps[2]


@pytest.mark.parametrize("parts", [[16, 16], [20, 7, 5]])
def test_gradient_of_the_parts_is_that_of_the_batch(parts):
    """Float64, no batch norm, a share of void that differs from image to image: 2 x 16 against 32."""
    method, x = pixel_method(), torch.randn(32, 3, 64, 64)
    y = torch.where(
        torch.rand(32, 64, 64) < torch.linspace(0, 0.95, 32).view(-1, 1, 1), 255, torch.randint(3, (32, 64, 64))
    )

    def batch_gradients(sizes):
        method.zero_grad()
        groups = list(zip(x.split(sizes), y.split(sizes)))
        totals = seg.group_totals([labels for _, labels in groups])
        for images, labels in groups:
            sum(method(images, labels, totals)[0].values()).backward()
        return [p.grad.clone() for p in method.parameters() if p.grad is not None]

    assert_close(batch_gradients(parts), batch_gradients([32]), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------ seg.py: data and evaluation


def test_intersection_over_union_by_hand():
    """Three classes, one of them absent, and void pixels: class 0 has 2 of 3, class 1 has 4 of 5, class 2 none."""
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 255, 255, 255]])
    predicted = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 2]])
    confusion = seg.confusion_matrix(predicted, mask, 3)
    assert confusion.tolist() == [[2, 1, 0], [0, 4, 0], [0, 0, 0]]
    iou = seg.intersection_over_union(confusion)
    assert iou[:2].tolist() == [2 / 3, 0.8] and iou[2].isnan()
    student, loader = Answers(predicted), Masks(mask)
    metrics = seg.evaluate(student, loader, torch.autocast("cpu", enabled=False))
    assert metrics == dict(miou=pytest.approx(220 / 3), iou=dict(a=pytest.approx(200 / 3), b=80, c=None))
    assert not student.training


def test_logits_are_brought_to_the_masks_size_by_bilinear_interpolation():
    """Of two positions to four: 1, 3/4, 1/4, 0 against 0, 1/4, 3/4, 1 and 4/5 everywhere: classes 0, 2, 2, 1."""
    student, mask = Answers(torch.zeros(1, 2, dtype=torch.long)), torch.tensor([[0, 2, 2, 1]])
    student.logits = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.8]]).view(1, 3, 1, 2)
    assert seg.evaluate(student, Masks(mask), torch.autocast("cpu", enabled=False))["miou"] == 100


class Answers(nn.Module):
    """Predicts one fixed map of three classes."""

    def __init__(self, predicted):
        super().__init__()
        self.logits = F.one_hot(predicted, 3).permute(2, 0, 1)[None].float()

    def forward(self, x):
        return self.logits


class Masks:
    classes, device = ["a", "b", "c"], "cpu"

    def __init__(self, mask):
        self.mask = mask

    def __len__(self):
        return 1

    def epoch(self):
        yield torch.zeros(1, 3, 64, 64), [self.mask]


def test_a_logit_that_is_not_finite_is_told_from_a_result():
    student, off = Answers(torch.zeros(2, 2, dtype=torch.long)), torch.autocast("cpu", enabled=False)
    student.logits[0, 1, 0, 0] = math.inf
    assert math.isnan(seg.evaluate(student, Masks(torch.zeros(2, 2, dtype=torch.long)), off)["miou"])


def mask_loader(images, masks, size=64, classes=3, train=True, **kwargs):
    split = data.Split(images, masks)
    options = dict(batch_size=len(images), image_size=size, workers=0, seed=0, stats=data.STATS["imagenet"])
    names = [str(c) for c in range(classes)]
    return data.MaskLoader(split, train=train, device="cpu", classes=names, **options | kwargs)


def test_padding_is_void_not_background():
    """White images, class 1 everywhere: what becomes black is void, and nothing is labelled 0."""
    loader = mask_loader(torch.full((24, 64, 64, 3), 255, dtype=torch.uint8), torch.ones(24, 64, 64, dtype=torch.uint8))
    pairs = [loader.dataset[0, i] for i in range(24)]
    padded = [(image, mask) for image, mask in pairs if (mask == 255).any()]
    assert 3 < len(padded) < 21
    for image, mask in padded:
        assert set(mask.unique().tolist()) == {1, 255}
        assert (image[0][mask == 255] < 130).all() and (image[0][mask == 1] > 125).all()  # blur mixes at the border


def test_image_and_mask_stay_aligned():
    """Red where the label is 1: also after flip, scale, crop and blur, but for the pixels on the border."""
    g = torch.Generator().manual_seed(0)
    masks = (F.interpolate(torch.rand(16, 1, 4, 4, generator=g), (80, 100))[:, 0] < 0.5).byte()
    images = torch.stack([200 * masks, *2 * [torch.full_like(masks, 40)]], 3)
    loader, seen = mask_loader(images, masks), set()
    for i in range(16):
        image, mask = loader.dataset[0, i]
        wrong = ((image[0] > 100) != (mask == 1)) & (mask != 255)
        assert wrong.float().mean() < 0.03
        seen.add((mask == 255).any().item())
        assert image.shape == (3, 64, 64) and not torch.equal(loader.dataset[1, i][0], image)
    assert seen == {True, False}
    _, y = next(loader.groups(1))[0]
    assert torch.equal(y[0], loader.dataset[1, loader.batches(1)[0][0].item()][1].long())  # augmented by the epoch


def test_every_other_image_is_blurred_and_no_mask_is():
    loader = mask_loader(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.uint8))
    blur = loader.dataset.transform.transforms[-1]
    image = torchvision.tv_tensors.Image(torch.randint(256, (3, 16, 16), dtype=torch.uint8))
    mask = torchvision.tv_tensors.Mask(torch.randint(2, (16, 16), dtype=torch.uint8))
    with data.seeded("blur"):
        pairs = [blur(image, mask) for _ in range(100)]
    assert 25 < sum(not torch.equal(blurred, image) for blurred, _ in pairs) < 65  # a deviation near 0 changes nothing
    assert all(torch.equal(untouched, mask) for _, untouched in pairs)


def test_augmentation_scales_the_shorter_side_to_half_and_twice_the_crop_and_flips():
    """Each image is dark at the left; its scale is told by the width of what is not padding."""
    images = torch.full((60, 40, 40, 3), 200, dtype=torch.uint8)
    images[:, :, :20] = 100
    loader = mask_loader(images, torch.ones(60, 40, 40, dtype=torch.uint8), size=64)
    widths, dark_left = [], []
    for i in range(60):
        image, mask = loader.dataset[0, i]
        inside = (mask == 1).any(0).nonzero().flatten()
        widths.append(len(inside))
        dark_left.append(image[0, mask.shape[0] // 2, inside[0] + 2] < image[0, mask.shape[0] // 2, inside[-1] - 2])
    assert 32 <= min(widths) < 36 and max(widths) == 64
    assert loader.dataset.transform.transforms[0].min_size == list(range(32, 129))
    assert 15 < sum(dark_left) < 45


def test_a_batch_passes_in_parts_and_none_has_a_single_image():
    images, masks = (
        torch.zeros(41, 64, 64, 3, dtype=torch.uint8),
        torch.arange(41).byte().view(-1, 1, 1).repeat(1, 64, 64),
    )
    loader = mask_loader(images, masks % 3, batch_size=20, part=10)
    assert [[len(x) for x, _ in parts] for parts in loader.groups(0)] == [[10, 10], [11, 10]]
    for rank, last in ((0, [6, 5]), (1, [5, 5])):  # as many parts of 11 images as of 10
        loader_of = mask_loader(images, masks % 3, batch_size=20, part=5, rank=rank, processes=2)
        assert [[len(x) for x, _ in parts] for parts in loader_of.groups(0)] == [[5, 5], last]
    order = [i for batch in loader.batches(0) for i in batch.tolist()]
    assert sorted(order) == list(range(41)) and loader.batches(1)[0].tolist() != order[:20]
    x, y = next(loader.groups(0))[0]
    assert x.shape == (10, 3, 64, 64) and y.shape == (10, 64, 64) and y.dtype == torch.int64


def test_masks_are_evaluated_at_their_own_size():
    """The image is squeezed to the network's size, the mask is as it lies."""
    images = torch.randint(256, (4, 70, 100, 3), dtype=torch.uint8)
    masks = torch.randint(3, (4, 70, 100), dtype=torch.uint8)
    loader = mask_loader(images, masks, train=False, batch_size=2)
    (x, labels), (_, last) = loader.epoch()
    assert x.shape == (2, 3, 64, 64) and torch.equal(torch.stack([*labels, *last]), masks.long())
    squeezed = v2.Resize((64, 64))(images[0].permute(2, 0, 1)).float() / 255
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert_close(x[0], (squeezed - mean) / std, rtol=1e-4, atol=1e-4)


def voc_tree(root):
    """A tiny VOCdevkit of 80x72 px: 4 + 11 training and 3 test images; VOC2012 has some of VOC2007 once more."""
    lists = {
        ("VOC2007", "trainval"): ["000032", "000039", "000063", "000068"],
        ("VOC2012", "trainval"): [f"2008_00{i:04}" for i in range(7)]
        + ["2007_009999", "2007_000032", "2007_000121", "000175"],
        ("VOC2007", "test"): ["000121", "000175", "000243"],
    }
    palette = [value for color in seg.voc_palette(256) for value in color]
    images, _, masks = data.draw_shapes(3, 72, seed=0)
    k = 0
    for (year, name), ids in lists.items():
        folder = root / "VOCdevkit" / year
        write(folder / f"ImageSets/Segmentation/{name}.txt", "\n".join(ids) + "\n")
        for image_id in ids:
            k = (k + 5) % 24
            image = F.pad(images[k].permute(2, 0, 1), (0, 8)).permute(1, 2, 0)
            mask = F.pad(masks[k], (0, 8), value=255).numpy()
            picture(folder / f"JPEGImages/{image_id}.jpg")
            Image.fromarray(image.numpy()).save(folder / f"JPEGImages/{image_id}.jpg")
            paletted = Image.frombytes("P", (80, 72), mask.tobytes())
            paletted.putpalette(palette)
            picture(folder / f"SegmentationClass/{image_id}.png", kind="PNG")
            paletted.save(folder / f"SegmentationClass/{image_id}.png")
    return root


def ids(split):
    return [Path(image).stem for image in split.images]


def test_clean_drops_every_image_of_voc2012_that_voc2007_holds(tmp_path):
    """By the id without 2007_ before it: of the trainval list or of the test list; nothing else."""
    loaded = data.load_masks("voc", data_dir=voc_tree(tmp_path))
    kept = ["000032", "000039", "000063", "000068", *(f"2008_00{i:04}" for i in range(7)), "2007_009999"]
    assert ids(loaded.train) == kept and ids(loaded.test) == ["000121", "000175", "000243"] and loaded.leaked == 0
    published = data.load_masks("voc", data_dir=tmp_path / "VOCdevkit", protocol="paper")
    assert ids(published.train) == kept + ["2007_000032", "2007_000121", "000175"]
    assert published.leaked == 2
    assert [Path(mask).stem for mask in published.train.labels] == ids(published.train)
    assert len(loaded.classes) == 21 and loaded.classes[1] == "aeroplane" and loaded.classes[20] == "tvmonitor"


def test_both_protocols_have_the_published_sizes(tmp_path, monkeypatch):
    """422 + 2,913 entries as published, 210 test images, all in VOC2012; 422 + 2,281 without them."""
    held = {"trainval": [f"{i:06}" for i in range(422)], "test": [f"{i:06}" for i in range(422, 632)]}
    more = [f"2007_{i}" for i in held["trainval"] + held["test"]] + [f"2009_{i:06}" for i in range(2281)]
    pairs = {("2007", "trainval"): held["trainval"], ("2007", "test"): held["test"], ("2012", "trainval"): more}
    monkeypatch.setattr(data, "complete_voc_list", lambda root, *which: {i: (i, i) for i in pairs[which]})
    sizes = {p: len(data.load_masks("voc", data_dir=tmp_path, protocol=p).train) for p in ("clean", "paper")}
    assert sizes == dict(clean=2703, paper=3335)
    assert data.load_masks("voc", data_dir=tmp_path, protocol="paper").leaked == 210


def test_masks_with_a_palette_are_read_as_class_numbers(tmp_path):
    voc_tree(tmp_path)
    with (tmp_path / "VOCdevkit/VOC2007/ImageSets/Segmentation/test.txt").open("a") as file:
        file.write("\r\n\r\n")  # empty lines count for nothing
    loaded = data.load_masks("voc", data_dir=tmp_path)
    assert len(loaded.test) == 3
    mask = data.read_mask(loaded.train.labels[0], 21)
    assert mask.shape == (72, 80) and mask.dtype == torch.uint8 and set(mask.unique().tolist()) == {0, 2, 255}


# ---------------------------------------------------------------------------------------------- seg.py: runs

TINY_SEG = "--dataset voc --weights none --image-size 64 --batch-size 6 --device cpu --workers 0".split()


def seg_main(*argv):
    return main(*argv, script=seg)


def seg_given(*argv):
    return given(*argv, script=seg)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return voc_tree(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def seg_run(tmp_path_factory, voc):
    """One finished run of three epochs, the last of them with distillation."""
    folder = tmp_path_factory.mktemp("run") / "a"
    assert seg_main(TINY_SEG, "--data-dir", voc, "--epochs 3 --output".split(), folder) == 0
    return folder


def test_recipe_of_segmentation_is_that_of_section_4_2_and_the_appendix():
    """60 epochs, lr 0.01 divided by 10 at 40, alpha 1, beta 50, warm-up 40; weights of ImageNet; the clean protocol."""
    args = seg.resolve(seg_given("--dataset voc"))
    assert (args.epochs, args.lr, args.milestones, args.warmup_epochs, args.ramp_epochs) == (60, 0.01, [40], 40, 20)
    assert (args.alpha, args.beta, args.temperature, args.protocol, args.weights) == (1, 50, 1, "clean", "imagenet")
    assert (args.batch_size, args.accumulate, args.momentum, args.weight_decay) == (32, 2, 0.9, 5e-4)
    assert (args.image_size, args.clip_value, args.arch) == (512, None, "d0")
    shapes = seg.resolve({})
    assert (shapes.epochs, shapes.warmup_epochs, shapes.weights, shapes.workers, shapes.lr) == (6, 4, "none", 0, 0.01)


@pytest.mark.parametrize(
    "options, name",
    [
        ("--dataset voc", "frskd"),
        ("--dataset voc --alpha 1 --beta 50 --warmup-epochs 40 --ramp-epochs 20", "frskd"),
        ("--dataset voc --method baseline --protocol paper", "baseline-paper"),
        ("--dataset voc --beta 0 --weights none", "frskd-nofeat-scratch"),
        ("--dataset voc --teacher top-down --protocol paper", "frskd-top-down-paper"),
        ("--dataset voc --weights a/b.pth --temperature 4", "frskd-b-t4"),
        ("--dataset voc --epochs 30 --accumulate 1 --clip-value 2", "frskd-acc1-clip2-e30"),
        ("--dataset voc --epochs 30 --warmup-epochs 10 --image-size 128", "frskd-wu10-px128-e30"),
        ("--ramp-epochs 1 --amp --weights none", "frskd-ramp1-amp"),
    ],
)
def test_a_run_of_segmentation_is_named_by_what_changes_its_result(options, name):
    assert seg.run_name(seg.resolve(seg_given(options))) == name


def test_a_run_of_segmentation_leaves_its_files_and_logs_every_key(seg_run):
    files = {"args.json", "log.jsonl", "last.pt", "student.pt", "predictions.png"}
    assert {p.name for p in seg_run.iterdir()} == files
    keys = "epoch lr ce ce_t {}miou iou images_per_s seconds data_wait"
    assert [list(entry) for entry in log_of(seg_run)] == [keys.format(x).split() for x in ("", "", "kd feat ")]
    iou = log_of(seg_run)[-1]["iou"]
    assert list(iou) == data.VOC_CLASSES and iou["tvmonitor"] is None
    known = [value for value in iou.values() if value is not None]
    assert log_of(seg_run)[-1]["miou"] == pytest.approx(sum(known) / len(known))
    args = json.loads((seg_run / "args.json").read_text())
    assert args["name"] == "frskd-scratch-bs6-px64-e3" and args["command"].startswith("python seg.py --dataset voc")
    assert (args["train_images"], args["test_images"], args["test_images_in_training"]) == (12, 3, 0)


def test_the_last_line_of_segmentation_is_the_result(voc, tmp_path, capsys):
    options = "--epochs 1 --method baseline --protocol paper --output".split()
    assert seg_main(TINY_SEG, "--data-dir", voc, options, tmp_path) == 0
    out, err = capsys.readouterr()
    pattern = r"voc d0 baseline-paper-scratch-bs6-px64-e1 seed 0: mIoU (\S+) \(last epoch; best \1 at epoch 1\)"
    assert re.fullmatch(pattern, out.splitlines()[-1])
    assert "seg.py: warning: 2 of the 3 test images are also training images" in err
    assert json.loads((tmp_path / "args.json").read_text())["test_images_in_training"] == 2


def test_predictions_png_shows_image_truth_student_and_teacher(seg_run, voc):
    picture = Image.open(seg_run / "predictions.png")  # of one or two classes each
    width = round(128 * 80 / 72)
    assert picture.size == (110 + 4 * (width + 4), 24 + 3 * 132)
    net = seg.EfficientDet("d0", 21).eval()
    net.load_state_dict(torch.load(seg_run / "student.pt", weights_only=True))
    loaded = data.load_masks("voc", data_dir=voc)
    image, mask = Image.open(loaded.test.images[1]), data.read_mask(loaded.test.labels[1], 21)
    x = v2.functional.normalize(v2.Resize((64, 64))(v2.functional.to_image(image)) / 255, *data.STATS["imagenet"])
    predicted = F.interpolate(net(x[None]), mask.shape, mode="bilinear").argmax(1)[0]
    tiles = []
    for k in range(3):
        left, top = 110 + k * (width + 4), 24 + 132
        pixels = bytearray(picture.crop((left, top, left + width, top + 128)).tobytes())
        tiles.append(torch.frombuffer(pixels, dtype=torch.uint8).view(128, width, 3).float())
    colors = torch.tensor(seg.voc_palette(21) + 235 * [(255, 255, 255)])
    rows, columns = (torch.arange(side) * full // side for side, full in ((128, 72), (width, 80)))
    for tile, labels in zip(tiles[1:], (mask.long(), predicted)):
        expected = 0.25 * tiles[0] + 0.75 * colors[labels[rows][:, columns]]
        assert ((tile - expected).abs().amax(2) < 2).float().mean() > 0.99  # a pixel may fall on a tie


def test_predictions_png_tells_student_from_teacher(tmp_path):
    """A student that sees class 1 everywhere, a self-teacher that sees class 2; both at rest."""
    loader = mask_loader(
        torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.uint8), train=False
    )
    method, seen = nn.Module(), torch.eye(3).view(3, 1, 3, 1, 1).expand(-1, -1, -1, 16, 16)
    method.student, method.teacher = nn.Module(), nn.Identity()
    method.student.features = lambda x: (seen[1], [method.training])
    method.teacher.forward = lambda feats: (seen[2], feats)
    seg.draw_predictions(method, loader, data.Data(loader.split, loader.split, loader.classes), tmp_path / "p.png")
    picture = Image.open(tmp_path / "p.png")
    pixels = [picture.getpixel((110 + k * 132 + 64, 24 + 64)) for k in range(4)]
    assert pixels == [(0, 0, 0), (0, 0, 0), (96, 0, 0), (0, 96, 0)] and not method.training  # 3/4 of (128, 0, 0) ...


def test_predictions_png_has_room_for_every_class_of_a_mask(tmp_path):
    masks = torch.arange(16).byte().view(1, 16, 1).repeat(2, 1, 16)
    loader = mask_loader(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), masks, classes=16, train=False)
    method, split = seg.SegmentationBaseline(Pixels()), loader.split
    seg.draw_predictions(method, loader, data.Data(split, split, loader.classes), tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").height == 24 + 2 * (16 * 14 + 4)


def test_student_of_segmentation_loads_without_the_teacher(seg_run):
    state = torch.load(seg_run / "student.pt", weights_only=True)
    seg.EfficientDet("d0", 21).load_state_dict(state, strict=True)
    assert not any(key.startswith("teacher") for key in state)


def test_eval_of_segmentation_gives_the_logged_result(seg_run, voc, tmp_path, capsys):
    shutil.copy(seg_run / "student.pt", tmp_path / "alone.pt")
    for file, options in (
        ("last.pt", []),
        ("student.pt", []),
        (tmp_path / "alone.pt", f"--dataset voc --image-size 64 --device cpu --data-dir {voc}".split()),
    ):
        capsys.readouterr()
        assert seg_main("--eval", seg_run / file, options) == 0
        assert f"mIoU {log_of(seg_run)[-1]['miou']:.2f} (on VOC2007 test" in capsys.readouterr().out
    for file, columns in (("last.pt", 4), ("student.pt", 3)):
        assert seg_main("--eval", seg_run / file, "--predictions", "--output", tmp_path) == 0
        assert Image.open(tmp_path / "predictions.png").width == 110 + columns * (142 + 4)


def test_segmentation_interrupted_and_resumed_ends_the_same(seg_run, voc, tmp_path, capsys):
    """In the warm-up and after it, with other numbers of workers."""
    options = [*TINY_SEG, "--data-dir", voc, "--epochs", 3, "--output", tmp_path / "cut"]
    interrupted(capsys, tmp_path / "cut", 1, signal.SIGINT, options, script=seg)
    interrupted(capsys, tmp_path / "cut", 2, signal.SIGTERM, "--resume", tmp_path / "cut", "--workers", 2, script=seg)
    assert seg_main("--resume", tmp_path / "cut", "--workers", 1) == 0
    assert same_run(seg_run, tmp_path / "cut")


def test_more_epochs_keep_the_schedule_of_a_segmentation_run(seg_run, tmp_path):
    """Warm-up and ramp stay those of the run, and the command to paste says so."""
    assert seg_main("--resume", seg_run, "--epochs", 4, "--output", tmp_path) == 0
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["warmup_epochs"], args["ramp_epochs"], args["milestones"]) == (2, 1, [2])
    assert seg.run_name(seg.resolve(seg_given(args["command"].removeprefix("python seg.py ")))) == args["name"]
    assert numbers(tmp_path)[:3] == numbers(seg_run)


def test_seg_and_train_tell_their_runs_apart(run, seg_run, tmp_path, capsys):
    assert f"{seg_run / 'last.pt'} is of a run of seg.py, not of train.py" in refused(capsys, "--resume", seg_run)
    assert "is of a run of train.py, not of seg.py" in refused(capsys, "--eval", run / "student.pt", script=seg)
    for folder, name in ((run, "a"), (seg_run, "b")):
        shutil.copytree(folder, tmp_path / name)
    capsys.readouterr()
    assert seg_main("--table", tmp_path) == 0
    table = capsys.readouterr().out
    assert "mIoU in percent" in table and "| method | voc d0 |" in table and "frskd-scratch-bs6" in table
    assert "wrn10_1" not in table and "Not averaged" not in table
    main("--table", tmp_path)
    assert "voc" not in capsys.readouterr().out


def test_compiled_segmentation_gives_the_same_terms_and_compiles_once_for_all_of_the_ramp():
    method, x, y = pixel_method(torch.float32), torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    compilations, totals = [], seg.group_totals([y])

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(method, backend=backend)
    for epoch in range(4):
        method.set_epoch(epoch, 4)
        assert_close(compiled(x, y, totals)[0], method(x, y, totals)[0])
        assert len(compilations) == (1 if epoch == 0 else 2)  # without distillation, with it


def test_segmentation_trains_compiled(voc, tmp_path):
    """With distillation from the first epoch; the first batch is as without."""
    options = [*TINY_SEG, "--data-dir", voc, "--epochs", 1, "--batch-size", 12, "--accumulate", 1]
    for name, more in (("eager", []), ("compiled", ["--compile", "eager"])):
        assert seg_main(options, more, "--output", tmp_path / name) == 0
    eager, compiled = (numbers(tmp_path / name)[0] for name in ("eager", "compiled"))
    assert [eager[n] for n in ("ce", "ce_t", "kd", "feat")] == pytest.approx(
        [compiled[n] for n in ("ce", "ce_t", "kd", "feat")], rel=1e-3
    )


def test_bf16_segmentation_trains_near_float32(seg_run, voc, tmp_path):
    assert seg_main(TINY_SEG, "--data-dir", voc, "--epochs 3 --amp --output".split(), tmp_path) == 0
    assert log_of(tmp_path)[0]["ce"] == pytest.approx(log_of(seg_run)[0]["ce"], rel=0.05)
    assert numbers(tmp_path) != numbers(seg_run)


class Recorded(torch.optim.SGD):
    """Counts its steps, and keeps the gradients of the last."""

    steps = 0

    def step(self):
        self.steps += 1
        self.last = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        super().step()


def one_epoch(part, clip_value=None):
    method, g = pixel_method(), torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 64, 64, 3), dtype=torch.uint8, generator=g)
    masks = torch.randint(3, (40, 64, 64), dtype=torch.uint8, generator=g)
    loader = mask_loader(images, masks, batch_size=32, part=part)
    optimizer = Recorded(method.parameters(), 0.1)
    args = SimpleNamespace(**vars(ON_CPU) | dict(clip_value=clip_value))
    forward, optimizer.compiled = with_counted_compiler(seg.SEGMENTATION, method, loader)
    with train.StopOnSignal() as stop:
        means, clock = seg.train_epoch(args, forward, method, loader, optimizer, 1, stop)
    assert clock["images_per_s"] * clock["seconds"] == pytest.approx(40)
    return means, optimizer, list(method.parameters())


def test_an_epoch_in_parts_is_the_epoch_in_batches():
    """Two updates, of 32 and of 8 images: same logged terms, same weights, without batch norm."""
    (means, optimizer, parameters), (means2, optimizer2, parameters2) = one_epoch(32), one_epoch(11)
    assert optimizer.steps == optimizer2.steps == 2
    assert (optimizer.compiled, optimizer2.compiled) == ([32], [11, 11])  # other sizes: no compiling again
    assert means2 == pytest.approx(means, rel=1e-9)
    assert_close(parameters2, parameters, rtol=1e-9, atol=1e-12)


def test_gradients_are_clipped_by_value():
    """The authors' element-wise clip."""
    largest = [max(g.abs().max() for g in one_epoch(32, clip)[1].last) for clip in (None, 1e-3)]
    assert largest[0] > largest[1] == pytest.approx(1e-3)


@pytest.mark.parametrize("options", ["--arch d1 --accumulate 3 --clip-value 2", "--teacher top-down --warmup-epochs 0"])
def test_variants_of_segmentation_train(voc, tmp_path, options):
    more = "--epochs 1 --overwrite --output".split()
    (tmp_path / "predictions-9.png").touch()  # of an earlier run
    assert seg_main(TINY_SEG, "--data-dir", voc, options.split(), more, tmp_path) == 0
    state = torch.load(tmp_path / "last.pt", weights_only=True)["method"]
    assert any(name.startswith("teacher.bifpn.1.bottom_up") for name in state) == ("top-down" not in options)
    assert [path.name for path in tmp_path.glob("*.png")] == ["predictions.png"]


def test_segmentation_starts_from_torchvisions_weights(tmp_path):
    """A file of theirs, with the classifier that the backbone lacks."""
    net = torchvision.models.efficientnet_b0()
    torch.save(net.state_dict(), tmp_path / "b0.pth")
    method = seg.SegmentationBaseline(seg.EfficientDet("d0", 5))
    seg.pretrain(seg.resolve(seg_given(f"--weights {tmp_path / 'b0.pth'}")), method)
    assert_close(method.student.backbone.state_dict(), net.features[:8].state_dict(), rtol=0, atol=0)


def test_a_resumed_run_does_not_ask_for_its_weights_again(voc, tmp_path):
    torch.save(torchvision.models.efficientnet_b0().state_dict(), tmp_path / "b0.pth")
    options = [*TINY_SEG, "--data-dir", voc, "--weights", tmp_path / "b0.pth", "--epochs", 1, "--method", "baseline"]
    assert seg_main(options, "--output", tmp_path / "run") == 0
    (tmp_path / "b0.pth").unlink()
    assert seg_main("--resume", tmp_path / "run", "--epochs", 2) == 0
    command = json.loads((tmp_path / "run/args.json").read_text())["command"].removeprefix("python seg.py ")
    seg.check_options(seg_given(command))
    assert "--milestones" in command


def test_cost_prints_what_the_teacher_adds(capsys):
    """Of d0 and d1, with the parameters counted here."""
    assert seg_main("--cost") == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, (arch, dim) in zip(lines, (("d0", 64), ("d1", 88))):
        counts = [
            sum(p.numel() for p in m.parameters()) for m in (seg.EfficientDet(arch, 21), seg.SelfTeacher(dim, 21))
        ]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[0].startswith(arch) and (cells[1], cells[3]) == tuple(f"{count / 1e6:.3f}" for count in counts)
        assert cells[5] == f"{100 * counts[1] / sum(counts):.1f} %"
        flops, flops_t = float(cells[2]), float(cells[4])
        assert cells[6] == f"{100 * flops_t / (flops + flops_t):.1f} %" and flops > flops_t > 1


BROKEN_VOC = {  # what is broken: (how, what the one line says)
    "a list": (
        lambda v: (v / "VOC2012/ImageSets/Segmentation/trainval.txt").unlink(),
        "VOCtrainval_11-May-2012.tar",
    ),
    "the test archive": (lambda v: (v / "VOC2007/ImageSets/Segmentation/test.txt").unlink(), "VOCtest_06-Nov-2007"),
    "a year": (lambda v: shutil.rmtree(v / "VOC2007"), "VOCtrainval_06-Nov-2007.tar"),
    "an image": (lambda v: (v / "VOC2012/JPEGImages/2008_000002.jpg").unlink(), "1 images and masks of"),
    "a mask": (lambda v: (v / "VOC2007/SegmentationClass/000175.png").unlink(), "000175.png"),
    "a binary list": (
        lambda v: (v / "VOC2007/ImageSets/Segmentation/test.txt").write_bytes(b"\xff\xfe\x00"),
        "test.txt is not a text file",
    ),
    "an empty list": (lambda v: write(v / "VOC2007/ImageSets/Segmentation/test.txt", ""), "names no image"),
    "a mask of another size": (
        lambda v: Image.new("P", (80, 70)).save(v / "VOC2007/SegmentationClass/000032.png"),
        "000032.png: the mask has 80x70 pixels, its image 80x72",
    ),
    "a label": (
        lambda v: Image.new("L", (80, 72), 21).save(v / "VOC2007/SegmentationClass/000032.png"),
        "000032.png: the label 21 is neither a class, 0 to 20, nor void, 255",
    ),
    "a coloured mask": (
        lambda v: Image.new("RGB", (80, 72)).save(v / "VOC2007/SegmentationClass/000121.png"),
        "000121.png: not a readable mask (mode RGB",
    ),
    "a torn image": (
        lambda v: (v / "VOC2007/JPEGImages/000032.jpg").write_bytes(b"\xff\xd8\xff"),
        "000032.jpg: not a readable image",
    ),
    "test masks all void": (
        lambda v: [Image.new("L", (80, 72), 255).save(p) for p in (v / "VOC2007/SegmentationClass").glob("000[12]*")],
        "every pixel of the test masks is void",
    ),
}


@pytest.mark.parametrize("name", BROKEN_VOC)
def test_a_broken_voc_gets_one_line(tmp_path, capsys, name):
    change, message = BROKEN_VOC[name]
    voc_tree(tmp_path)
    change(tmp_path / "VOCdevkit")
    options = ["--method", "baseline", "--epochs", 1, "--output", tmp_path / "run"]
    assert message in refused(capsys, TINY_SEG, "--data-dir", tmp_path, options, script=seg)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--image-size 63", "argument --image-size: '63' is not a whole number of at least 64"),
        ("--batch-size 1", "--image-size 64 makes P7 a single position"),
        ("--batch-size 4 --accumulate 4", "--image-size 64 makes P7 a single position"),
        ("--batch-size 4 --accumulate 5", "--batch-size 4 is no multiple of --accumulate 5"),
        ("--warmup-epochs 9", "--warmup-epochs 9: distillation would never start"),
        ("--method baseline --beta 5", "--beta has no effect with --method baseline"),
        ("--method baseline --warmup-epochs 5", "--warmup-epochs has no effect with --method baseline"),
        ("--protocol paper", "--protocol has no effect with --dataset shapes"),
        ("--dataset voc --alpha 0 --temperature 2", "--temperature has no effect with --alpha 0"),
        ("--dataset voc --alpha 0 --beta 0 --ramp-epochs 2", "--ramp-epochs has no effect with --alpha 0 and --beta 0"),
        ("--dataset voc --eval x --lr 1", "--lr has no effect with --eval"),
        ("--data-dir x", "--data-dir has no effect with --dataset shapes"),
        ("--arch d2", "argument --arch: invalid choice: 'd2'"),
        ("--dataset voc --data-dir /nowhere", "VOC2007/ImageSets/Segmentation/trainval.txt is missing; fetch"),
        ("--cost --arch d1", "--cost goes without any other option"),
        ("--predictions 99", "--predictions 99 is after the last of"),
    ],
)
def test_a_users_mistake_in_segmentation_gets_one_line(capsys, options, message):
    assert message in refused(capsys, options.split(), script=seg)


def test_a_batch_larger_than_the_training_set_is_refused(voc, capsys):
    message = refused(capsys, TINY_SEG, "--data-dir", voc, "--batch-size", 14, script=seg)
    assert "--batch-size 14 is larger than the training set of 12 images" in message


def test_weights_that_do_not_fit_are_refused(voc, seg_run, tmp_path, monkeypatch, capsys):
    """Another architecture's, no state_dict at all, a run's own student; and torchvision's, without a network."""
    torch.save(torchvision.models.efficientnet_b1().state_dict(), tmp_path / "b1.pth")
    torch.save([1], tmp_path / "list.pth")
    options = [*TINY_SEG, "--data-dir", voc, "--output", tmp_path / "run", "--weights"]
    shutil.copytree(seg_run, tmp_path / "kept")
    for file in (tmp_path / "b1.pth", tmp_path / "list.pth", seg_run / "student.pt"):
        message = refused(capsys, options, file, "--overwrite", "--output", tmp_path / "kept", script=seg)
        assert (tmp_path / "kept/last.pt").exists()
        assert f"{file} is not a state_dict of torchvision's efficientnet_b0, the backbone of d0" in message

    def unreachable(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torchvision.models.EfficientNet_B0_Weights, "get_state_dict", unreachable)
    message = refused(capsys, options, "imagenet", script=seg)
    assert "cannot fetch https://download.pytorch.org/models/efficientnet_b0" in message and "no network;" in message
    assert "no such file: /nowhere" in refused(capsys, options, "/nowhere", script=seg)
    assert not (tmp_path / "run").exists()


def test_download_of_voc_fetches_what_is_missing(tmp_path, served, monkeypatch):
    """The test archive alone, from a server here: it merges with what is there."""
    where, address = served
    voc_tree(tmp_path)
    devkit = tmp_path / "VOCdevkit/VOC2007"
    with tarfile.open(where / "VOCtest_06-Nov-2007.tar", "w") as tar:
        for path in (devkit / "ImageSets/Segmentation/test.txt", *devkit.glob("*/000[12]*")):
            tar.add(path, path.relative_to(tmp_path))
            path.unlink()
    md5 = hashlib.md5((where / "VOCtest_06-Nov-2007.tar").read_bytes()).hexdigest()
    archive = dict(url=f"{address}/VOCtest_06-Nov-2007.tar", md5=md5)
    monkeypatch.setitem(data.DATASET_YEAR_DICT, "2007-test", data.DATASET_YEAR_DICT["2007-test"] | archive)
    with pytest.raises(data.DataError, match="test.txt is missing; fetch and unpack http"):
        data.load_masks("voc", data_dir=tmp_path)
    assert len(data.load_masks("voc", data_dir=tmp_path, download=True).test) == 3
    (devkit / "JPEGImages/000175.jpg").unlink()
    shutil.rmtree(where)
    assert len(data.load_masks("voc", data_dir=tmp_path, download=True).test) == 3  # unpacked again, not fetched


# ------------------------------------------------------------------------------ every option has an effect of its own

ALL = {"ce", "ce_t", "kd", "feat"}
EFFECTS = {  # option -> value, the first of three steps whose terms it changes, and which terms
    "alpha": ("3", 1, {"kd"}),
    "beta": ("50", 1, {"feat"}),
    "temperature": ("2", 1, {"kd"}),
    "teacher": ("bifpn", 1, {"ce_t", "kd", "feat"}),
    "width": ("1", 1, {"ce_t", "kd", "feat"}),
    "channels": ("16 --teacher bifpn", 1, {"ce_t", "kd", "feat"}),
    "feature-loss": ("fitnet --beta 100", 1, {"feat"}),
    "sla": ("", 1, {"kd", "feat"}),
    "mixup": ("1", 1, ALL),
    "cutmix": ("", 1, ALL),
    "method": ("baseline", 1, {"ce_t", "kd", "feat"}),
    "arch": ("wrn10_2", 1, ALL),
    "seed": ("1", 1, ALL),
    "image-size": ("24", 1, ALL),
    "per-class": ("6 --batch-size 18", 1, ALL),
    "batch-size": ("12", 1, ALL),
    "amp": ("", 1, ALL),
    "lr": ("0.01", 2, ALL),
    "weight-decay": ("0.1", 2, ALL),
    "momentum": ("0.5", 3, ALL),
    "milestones": ("none", 3, ALL),
}
ELSEWHERE = {"blocks", "teacher-arch", "teacher-checkpoint", "sync-bn"}  # other networks, teachers and machines
NO_NUMBER = {"dataset", "data-dir", "download", "epochs", "workers", "device", "compile", "output", "overwrite",
             "resume", "eval", "table", "bench", "cost", "attention", "predictions", "help"}  # fmt: skip
SEG_EFFECTS = {
    "alpha": ("3", 1, {"kd"}),
    "beta": ("20", 1, {"feat"}),
    "temperature": ("2", 1, {"kd"}),
    "teacher": ("top-down", 1, {"ce_t", "kd", "feat"}),
    "ramp-epochs": ("1", 1, {"kd", "feat"}),
    "warmup-epochs": ("1", 1, {"kd", "feat"}),
    "arch": ("d1", 1, ALL),
    "seed": ("1", 1, ALL),
    "image-size": ("72", 1, ALL),
    "batch-size": ("6", 1, ALL),
    "accumulate": ("1", 1, ALL),
    "protocol": ("paper", 1, ALL),
    "amp": ("", 1, ALL),
    "clip-value": ("0.0001", 2, ALL),
    "lr": ("0.001", 2, ALL),
    "weight-decay": ("0.1", 2, ALL),
    "momentum": ("0.1", 3, ALL),
    "milestones": ("1", 3, ALL),
}


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory):
    """Three epochs of one step each -> {script: (options, log)}."""
    root, runs = tmp_path_factory.mktemp("effects"), {}
    images, voc = class_folders(root / "images"), voc_tree(root)
    for script, options in (
        (train, f"--dataset folder --data-dir {images} --arch wrn10_1 --batch-size 24 --device cpu --epochs 3"),
        (seg, f"--data-dir {voc} --epochs 3 --warmup-epochs 0 --batch-size 12 --accumulate 2 --dataset voc "
              "--weights none --image-size 64 --device cpu --workers 0 --milestones none"),
    ):  # fmt: skip
        assert main(options.split(), "--output", root / script.__name__, script=script) == 0
        runs[script] = options.split(), log_of(root / script.__name__)
    return runs


@pytest.mark.parametrize(
    "script, key",
    [*((train, key) for key in EFFECTS), *(pytest.param(seg, key, marks=pytest.mark.slow) for key in SEG_EFFECTS)],
)
def test_every_option_changes_the_terms_that_it_is_about(plain_runs, tmp_path, script, key):
    (value, step, terms), (options, plain) = (EFFECTS if script is train else SEG_EFFECTS)[key], plain_runs[script]
    assert main(options, f"--{key} {value}".split(), "--output", tmp_path / "run", script=script) == 0
    changed = [
        {term for term in ALL if before[term] != after.get(term)}
        for before, after in zip(plain, log_of(tmp_path / "run"))
    ]
    assert changed[step - 1] == terms and not any(changed[: step - 1])
    if key in ("alpha", "beta"):  # a weight: 3 of 2 and of 1, 50 of 100, 20 of 50
        ratio = {"alpha": 3 / (2 if script is train else 1), "beta": 0.5 if script is train else 0.4}[key]
        (term,) = terms
        assert log_of(tmp_path / "run")[0][term] == pytest.approx(ratio * plain[0][term], rel=1e-4)


def test_no_option_is_without_a_test_of_its_effect():
    for script, effects, elsewhere in (
        (train, EFFECTS, ELSEWHERE),
        (seg, SEG_EFFECTS, {"method", "weights", "sync-bn"}),
    ):
        options = {a.option_strings[-1].removeprefix("--") for a in script.parser()._actions}
        assert options - NO_NUMBER == effects.keys() | elsewhere


# ------------------------------------------------------------------------------------- killed at any moment


def killed(script, folder, argv):
    """Starts a run or continues it, and kills it at a random moment; -> whether it was still running.

    Of four moments, one is anywhere from the start on, two lie in the first epochs that it trains, and one is while a
    file is being written.
    """
    process, began = started(script, *argv, "--resume", "--output", folder), time.time()
    kind, values = random.choice(["any", "training", "training", "writing"]), folder / "args.json"
    while kind != "any" and process.poll() is None:  # the last file that is written before training
        if values.exists() and values.stat().st_mtime > began:
            break
        time.sleep(0.001)
    if kind == "writing":
        half = folder / f"{random.choice(['log.jsonl', 'student.pt', 'last.pt'])}.partial"
        while process.poll() is None and not half.exists():
            pass
    else:
        time.sleep(random.uniform(0, 6 if kind == "any" else 1))
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    written = [path.name for path in folder.glob("*.partial")]
    print(kind, len(log_of(folder)) if (folder / "log.jsonl").exists() else "no", "epochs logged", *written)


KILLED = {  # name -> script, options
    "frskd": (train, [*TINY, "--epochs", 60, "--attention", *range(1, 61)]),
    "sla": (train, [*TINY, "--sla", "--epochs", 30]),
    "cutmix": (train, [*TINY, "--cutmix", "--epochs", 200]),
    "partners": (train, [*TINY, "--method", "cskd", "--epochs", 300]),
    "workers": (train, [*MOBILENET, "--dataset", "folder", "--device", "cpu", "--epochs", 60]),
    "partners, workers": (train, "--dataset folder --arch wrn10_1 --method cskd --image-size 72 --batch-size 8".split()
                          + "--device cpu --epochs 120".split()),
    "segmentation": (seg, [*TINY_SEG, "--epochs", 24, "--predictions", *range(1, 25)]),
    "segmentation, workers": (seg, [*TINY_SEG, "--epochs", 24, "--workers", 1]),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, kills",
    [("partners, workers", 2), *(pytest.param(name, 20, marks=pytest.mark.slow) for name in KILLED)],
)
def test_killed_at_any_moment_and_resumed_a_run_ends_the_same(tmp_path, name, kills):
    """By SIGKILL: weights and log equal bit for bit, every epoch logged once, all pictures drawn, nothing left over."""
    script, options = KILLED[name]
    if "folder" in options:
        options = [*options, "--data-dir", class_folders(tmp_path / "images", size=80)]
    if "voc" in options:
        options = [*options, "--data-dir", voc_tree(tmp_path)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(options, "--output", whole, script=script) == 0
    for _ in range(kills):
        killed(script, cut, options)
    assert main(options, "--resume", "--output", cut, script=script) == 0
    assert same_run(whole, cut)
    assert [entry["epoch"] for entry in log_of(cut)] == list(range(1, len(log_of(whole)) + 1))
    files = {path.name for path in whole.iterdir()}
    assert files == {path.name for path in cut.iterdir()}
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in files if name.endswith(".png"))


# ----------------------------------------------------------------------------------------------- the README


@pytest.mark.parametrize("script, number", [(train, 150), (seg, 12)])
def test_every_command_of_the_readme_is_understood(script, number):
    text = (HERE / "README.md").read_text()
    launcher = r"(?:python|torchrun --nproc-per-node=\d(?: --max-restarts=\d)?)"
    commands = re.findall(rf"{launcher} {script.__name__}\.py((?! --help)[^`\n]*)", text)
    assert len(commands) >= number
    for command in commands:
        command = command.split("#")[0].replace("$alpha", "1").replace("$beta", "50")
        options = given(command, script=script)
        if not {"resume", "eval", "table", "cost", "bench"} & set(options):
            script.check_options(options)


def test_every_row_of_the_papers_tables_is_the_command_beside_it():
    """Tables 1, 2, 3, 5, 6, 7 and 8: data set, network, method, and nothing else that the recipe does not say."""
    names = {"baseline": "baseline", "FRSKD\\F": "frskd-nofeat", "FRSKD": "frskd", "FRSKD+SLA": "frskd+sla"}
    names |= {"Fit+SKD": "frskd-fitnet", "OD+SKD": "frskd-od", "CutMix": "baseline+cutmix", "128": "frskd-bifpn128"}
    names |= {"FRSKD+CutMix": "frskd+cutmix", "256": "frskd-bifpn256", "Mixup": "baseline+mixup{}"}
    names |= {"FRSKD+Mixup": "frskd+mixup{}", "BiFPNc, 128": "frskd-w1", "BiFPNc, 256": "frskd"}
    names |= {"ONE": "one", "DDGSD": "ddgsd", "BYOT": "byot", "SAD": "sad", "CS-KD": "cskd", "SLA-SD": "slasd"}
    names |= {"FitNet": "kd-fitnet", "ATT": "kd-at", "Overhaul": "kd-od"}
    datasets = {"CIFAR-100": "cifar100", "TinyImageNet": "tinyimagenet", "CUB200": "cub200", "MIT67": "mit67"}
    datasets |= {"Dogs": "dogs", "Stanford40": "stanford40", "Self-teachers": "cifar100", "ImageNet": "imagenet"}
    networks = {"WRN-16-2": "wrn16_2", "ResNet-18": "resnet18", "ResNet-34": "resnet34"}
    title, rows = "", 0
    for line in (HERE / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "(Table" in cells[0] if cells else False:
            title = cells[0]
        elif title and len(cells) == 4 and cells[3].startswith("`python train.py"):
            first, method = cells[0].split(", ")
            dataset = datasets.get(first) or next(d for name, d in datasets.items() if title.startswith(name))
            network = networks.get(first, "wrn16_2" if title.startswith("Self-teachers") else "resnet18")
            args = train.resolve(given(cells[3].strip("`").removeprefix("python train.py")))
            name = names.get(cells[0]) or names[method]
            assert (args.dataset, args.arch) == (dataset, network), line
            teacher = f"runs/{dataset}-resnet34-baseline-s0/student.pt" if args.method == "kd" else None
            assert args.teacher_checkpoint == teacher, line
            assert train.run_name(args) == name.format("0.3" if args.image_size > 64 else "0.2"), line
            rows += 1
        elif not cells:
            title = ""
    assert rows == 40 + 40 + 4 + 12 + 4 + 18 + 24


def test_every_row_of_table_4_is_the_command_beside_it():
    """Network, method and protocol; the published figures stand beside the published protocol alone."""
    rows = [line.split("|")[1:-1] for line in (HERE / "README.md").read_text().splitlines() if "`python seg.py" in line]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) == 4]
    for label, paper, _, command in rows:
        arch, method, protocol = label.split(", ")
        args = seg.resolve(seg_given(command.strip("`").removeprefix("python seg.py")))
        assert (args.dataset, args.arch, args.method) == ("voc", arch, method.lower())
        assert args.protocol == {"as published": "paper", "clean": "clean"}[protocol] and bool(paper) == (
            args.protocol == "paper"
        )
        assert seg.run_name(args) == method.lower() + "-paper" * bool(paper)
    assert [row[1] for row in rows if row[1]] == ["79.07", "80.55", "81.95", "83.88"] and len(rows) == 8


def test_every_file_that_the_readme_links_is_there():
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", (HERE / "README.md").read_text())
    assert len(links) >= 2 and all((HERE / link).is_file() for link in links)


def test_the_readmes_snippet_runs():
    """Its first Python block, with smaller images."""
    code = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    names = dict(images=torch.randn(2, 3, 32, 32), labels=torch.tensor([1, 2]))
    exec(code, names)
    assert set(names["terms"]) == {"ce", "ce_t", "kd", "feat"}


def test_the_readmes_method_of_ones_own_trains(tmp_path, monkeypatch, capsys):
    """One class and one line: it has the command line, trains, is named and exports its student."""
    (code,) = re.findall(r"```python\n(import sys.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    monkeypatch.setattr(train, "METHODS", train.METHODS.copy())
    monkeypatch.setattr(sys, "argv", ["mine.py", *TINY, "--method", "smoothing", "--epochs", "1"])
    monkeypatch.setattr(train.CLASSIFICATION, "methods", train.METHODS)
    with pytest.raises(SystemExit, match="0"):
        exec(code, {"__name__": "__main__"})
    monkeypatch.undo()
    assert "is of --method smoothing, which train.py does not have" in refused(
        capsys, "--resume", tmp_path / "runs/shapes-wrn10_1-smoothing-bs16-px16-n8-e1-s0"
    )
    (entry,) = log_of(tmp_path / "runs/shapes-wrn10_1-smoothing-bs16-px16-n8-e1-s0")
    assert entry["ce"] > 0 and (tmp_path / "runs/shapes-wrn10_1-smoothing-bs16-px16-n8-e1-s0/student.pt").exists()


if __name__ == "__main__":
    one_of_many(sys.argv[1])
