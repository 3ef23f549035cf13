"""The methods and feature losses that the paper compares with, written out."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import frskd
from experiments.baselines import (BYOT, CSKD, DDGSD, ONE, SAD, SLASD, Baseline, Distillation, FitNet, Hint, Overhaul,
                                   bottleneck, fresh_last_stage, margin, maximum_mean_discrepancy, partial_l2,
                                   spatial_attention)  # fmt: skip
from frskd import soft_label_distillation as KD


def setting(rows=4, build=lambda: frskd.WideResNet(10, 1, 5)):
    """A student, `rows` images and the labels of four."""
    torch.manual_seed(0)
    return build(), torch.randn(rows, 3, 16, 16), torch.randint(5, (4,))


def resnet(*layers):
    return frskd.ResNet(layers, 5, "cifar")


def assert_he_fan_out(*convs):
    for conv in convs:
        std = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
        assert conv.weight.std().item() == pytest.approx(std, rel=0.15)


# --------------------------------------------------------------------------------- the methods (Tables 1, 2 and 7)
def baseline(m, x, y):
    return dict(ce=F.cross_entropy(m.student(x), y))


def byot(m, x, y):
    z_n, feats = m.student.features(x)
    h = [neck(f).mean((2, 3)) for neck, f in zip(m.necks, feats)]
    h_n, z = feats[-1].mean((2, 3)).detach(), [head(h_i) for head, h_i in zip(m.heads, h)]
    ce, ce_aux = 0.9 * F.cross_entropy(z_n, y), 0.9 * sum(F.cross_entropy(z_i, y) for z_i in z)
    return dict(ce=ce, ce_aux=ce_aux, kd=0.1 * sum(KD(z_i, z_n, 3) for z_i in z),
                feat=0.01 * sum(((h_i - h_n) ** 2).sum() for h_i in h))  # fmt: skip


def one(m, x, y):
    """z_e = sum_k g_k z_k, g = softmax(relu(bn(linear(mean of F_{n-1})))); z_e teaches, and trains the gate by CE."""
    z1, feats = m.student.features(x)
    z2, z3 = (branch(feats[1]) for branch in m.branches)
    linear, bn, *_ = m.gate
    g1, g2, g3 = F.softmax(F.relu(bn(linear(feats[1].mean((2, 3))))), 1).split(1, dim=1)
    z_e = g1 * z1 + g2 * z2 + g3 * z3
    return dict(ce=F.cross_entropy(z1, y), ce_aux=F.cross_entropy(z2, y) + F.cross_entropy(z3, y),
                ce_e=F.cross_entropy(z_e, y), kd=2 * sum(KD(z, z_e, 3) for z in (z1, z2, z3)))  # fmt: skip


def sad(m, x, y):
    z, (f1, f2, f3) = m.student.features(x)
    targets = [spatial_attention(deeper, f.shape[2:]).detach() for f, deeper in ((f1, f2), (f2, f3))]
    losses = [F.mse_loss(spatial_attention(f, f.shape[2:]), target) for f, target in zip((f1, f2), targets)]
    return dict(ce=F.cross_entropy(z, y), feat=7 * sum(losses))


def ddgsd(m, x, y):
    z, feats = m.student.features(x)
    (a, b), (h_a, h_b) = z.split(4), feats[-1].mean((2, 3)).split(4)
    return dict(ce=F.cross_entropy(a, y) + F.cross_entropy(b, y), kd=2 * (KD(a, b, 3) + KD(b, a, 3)),
                feat=5 * (h_a.mean(0) - h_b.mean(0)).pow(2).sum())  # fmt: skip


def cskd(m, x, y):
    z, z_t = m.student(x[:4]), m.student(x[4:])
    return dict(ce=F.cross_entropy(z, y), kd=3 * KD(z, z_t, 4))


def slasd(m, x, y):
    z, feats = m.student.features(frskd.rotations(x))
    joint, upright = m.joint(feats[-1].mean((2, 3))), z[[0, 4, 8, 12]]
    labels = torch.tensor([4 * int(label) + r for label in y for r in range(4)])
    return dict(ce=F.cross_entropy(upright, y), ce_joint=F.cross_entropy(joint, labels),
                kd=2 * KD(upright, frskd.aggregate(joint), 1))  # fmt: skip


def distillation(m, x, y):
    """The teacher is at rest, with its own statistics."""
    (z, feats), (z_t, feats_t) = m.student.features(x), copy.deepcopy(m.teacher).eval().features(x)
    feat = dict(feat=5 * m.feature_loss(feats, feats_t)) if m.feature_loss else {}
    return dict(ce=F.cross_entropy(z, y), kd=2 * KD(z, z_t, 4)) | feat


METHODS = [
    (lambda student: Baseline(student), baseline),
    (lambda student: BYOT(student, 5, beta=0.01), byot),
    (lambda student: ONE(student, 5, alpha=2), one),
    (lambda student: SAD(student, beta=7), sad),
    (lambda student: DDGSD(student, alpha=2, beta=5), ddgsd),
    (lambda student: CSKD(student, alpha=3), cskd),
    (lambda student: SLASD(student, 5, alpha=2), slasd),
    (lambda student: Distillation(student, frskd.WideResNet(10, 2, 5), alpha=2), distillation),
    (lambda student: Distillation(student, frskd.WideResNet(10, 2, 5), alpha=2, beta=5,
                                  feature_loss=Hint([16, 32, 64], [32, 64, 128])), distillation),
]  # fmt: skip


@pytest.mark.parametrize("build, written_out", METHODS)
def test_every_method_is_written_out_and_returns_the_students_logits(build, written_out):
    """Terms, and their gradients of all that trains; float32 scalars under autocast; method(x) is the student."""
    student, x, y = setting(8)
    method = build(student)
    assert method.pairs == {DDGSD: "view", CSKD: "class"}.get(type(method))
    x = x[: 8 if method.pairs else 4]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {(term.dtype, term.ndim) for term in method(x, y)[0].values()} == {(torch.float32, 0)}
    method, x = method.double(), x.double()
    terms, expected = method(x, y)[0], written_out(method, x, y)
    assert_close(terms, expected)
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert not any(name.startswith("teacher.") for name in trained)
    losses = sum(terms.values()), sum(expected.values())
    ours, theirs = (torch.autograd.grad(loss, trained.values(), materialize_grads=True) for loss in losses)
    assert_close(ours, theirs)
    _, logits = method.eval()(x, y)
    assert_close([method(x), logits], [student(x), student(x[:4])])
    assert not logits.requires_grad


def test_bottlenecks_of_byot():
    """1x1 to a quarter, k x k of stride k, 1x1, each with batch norm, ReLU and He fan-out; to the last map's size."""
    torch.manual_seed(0)
    conv1, bn1, _, conv2, bn2, _, conv3, bn3, _ = neck = bottleneck(20, 160, 3)
    x = torch.randn(2, 20, 9, 9)
    assert [tuple(c.weight.shape) for c in (conv1, conv2, conv3)] == [(40, 20, 1, 1), (40, 40, 3, 3), (160, 40, 1, 1)]
    assert_close(neck(x), bn3(conv3(bn2(F.conv2d(bn1(conv1(x)).relu(), conv2.weight, conv2.bias, 3)).relu())).relu())
    assert_he_fan_out(conv1, conv2, conv3)
    method = BYOT(resnet(1, 1, 1, 1), 5, image_size=33)  # maps of 33, 17, 9, 5
    assert [neck[3].kernel_size[0] for neck in method.necks] == [6, 3, 1]


@pytest.mark.parametrize("build", [lambda: resnet(1, 1, 1, 2), lambda: frskd.WideResNet(16, 2, 5)])
def test_branches_of_one_are_the_last_stage_initialised_anew(build):
    """With the student's weights a branch gives the student's logits; it starts from others, He fan-out."""
    student, x, _ = setting(build=build)
    for norm in (m for m in student.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.constant_(norm.weight, 2), nn.init.constant_(norm.bias, 2)
    logits, feats = student.features(x)
    branch, wide = fresh_last_stage(student), isinstance(student, frskd.WideResNet)
    own = nn.ModuleList([student.layer3, student.bn, student.fc] if wide else [student.layer4, student.fc])
    fresh, own = branch.state_dict(), list(own.state_dict().values())
    own = own[5 * wide :]  # F_{n-1} is behind a WRN's first batch norm
    assert all((value != theirs).any() for value, theirs in zip(fresh.values(), own, strict=True))
    assert_he_fan_out(*(m for m in branch.modules() if isinstance(m, nn.Conv2d)))
    branch.load_state_dict(dict(zip(fresh, own)))
    assert_close(branch(feats[-2]), logits)


def test_schedules_of_one_and_sad():
    """ONE's distillation rises over 80 epochs, SAD's begins after two thirds of them, in the last at the latest."""
    student, x, y = setting()
    ensemble, attention = ONE(student, 5), SAD(student)
    whole = ensemble(x, y)[0]["kd"].item()
    for epoch, share in ((0, 0.006738), (20, 0.060055), (40, 0.286505), (80, 1), (150, 1)):
        ensemble.set_epoch(epoch, 200)
        assert ensemble(x, y)[0]["kd"].item() == pytest.approx(share * whole, rel=1e-3)
    for epoch, epochs, begun in ((5, 9, False), (6, 9, True), (0, 1, True)):
        attention.set_epoch(epoch, epochs)
        assert ("feat" in attention(x, y)[0]) == begun


def test_attention_of_sad_and_discrepancy_of_ddgsd_by_hand():
    """Square, sum over channels, then resize, then softmax; resizing first would give 0.00627947."""
    f1, f2 = (torch.arange(16.0) / 8).view(1, 1, 4, 4), torch.tensor([[1.0, 0], [0, 2]]).view(1, 1, 2, 2)
    psi1, psi2 = (spatial_attention(f, (4, 4)) for f in (f1, f2))
    assert F.mse_loss(psi1, psi2).item() == pytest.approx(0.00268099, abs=1e-8)
    assert_close(spatial_attention(f2.repeat(1, 2, 1, 1), (2, 2)), F.softmax(torch.tensor([[2.0, 0, 0, 8]]), 1))
    a, b = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [2, 0]])
    assert maximum_mean_discrepancy(a, b).item() == 2.5  # 1.5^2 + 0.5^2, of the means over images


# --------------------------------------------------------------------------- FitNet and Overhaul (Tables 5 and 7)
def test_fitnet_is_the_mean_over_all_elements_summed_over_blocks():
    """(regressor_i(F_i) - T_i)^2, T_i detached; regressors are 1x1 convolution, batch norm, ReLU, He fan-out."""
    torch.manual_seed(0)
    loss, hint = FitNet([3, 5], [60, 100]), Hint([3, 5, 7], [6, 10, 14])
    feats = [torch.rand(4, c, s, s) for c, s in ((3, 8), (5, 4))]
    feats_t = [torch.rand(4, c, s, s, requires_grad=True) for c, s in ((60, 8), (100, 4))]
    regressed = [F.relu(bn(F.conv2d(f, conv.weight))) for (conv, bn, _), f in zip(loss.regressors, feats)]
    assert_close(loss(feats, feats_t), sum((r - t).pow(2).sum() / t.numel() for r, t in zip(regressed, feats_t)))
    assert torch.autograd.grad(loss(feats, feats_t), feats_t, allow_unused=True) == (None, None)
    assert_he_fan_out(*(conv for conv, *_ in loss.regressors))
    ((conv, bn, _),), second = hint.regressors, torch.rand(4, 10, 4, 4)  # FitNets' hint: the second maps alone
    assert_close(hint([None, feats[1], None], [None, second, None]), F.mse_loss(bn(conv(feats[1])).relu(), second))


def test_margin_and_partial_l2_of_overhaul_distillation_by_hand():
    """E[v | v < 0] of a normal channel; -3 |gamma| where almost nothing is negative. Nothing to learn where the student
    is below a target that is not positive; a sum over all but the batch."""
    gamma, beta = torch.tensor([[1, 0], [1, 1], [0.5, -0.2], [-1, 0], [1, 4], [0, -1], [0, 0]]).T
    values = [-0.797885, -0.525135, -0.480941, -0.797885, -3, -1, 0]
    assert margin(gamma, beta).tolist() == pytest.approx(values, abs=1e-6)
    pairs = torch.tensor([[1.0, -1, -0.5, -2, 0.5, 0.2], [0.5, -0.797885, -0.2, -0.3, -0.1, 0.5]]).T.view(6, 2, 1, 1, 1)
    values = [partial_l2(student, target).item() for student, target in pairs]
    assert values == pytest.approx([0.25, 0, 0, 0, 0.36, 0.09], abs=1e-6)
    ones = torch.ones(2, 3, 2, 2, dtype=torch.bfloat16)
    assert_close(partial_l2(ones, 0 * ones), torch.tensor(12.0))  # in float32


def test_overhaul_refuses_a_network_whose_maps_before_their_relu_it_does_not_know():
    with pytest.raises(ValueError, match="before their ReLU, which Linear hides"):
        Overhaul(nn.Linear(3, 5), frskd.BiFPNc([4], 5))


@pytest.mark.parametrize("cls, student, teacher, norms", [
    (frskd.FRSKDSLA, lambda: frskd.WideResNet(16, 1, 5), lambda: frskd.BiFPNc([16, 32, 64], 5),
     ["top_down.0.conv.6", "bottom_up.1.conv.6", "bottom_up.2.conv.6"]),
    (Distillation, lambda: resnet(2, 1, 1, 1), lambda: resnet(1, 1, 1, 2),
     ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2", "layer4.1.bn2"]),
])  # fmt: skip
def test_overhaul_distils_the_maps_before_their_relu(cls, student, teacher, norms):
    """Of self-teachers and trained teachers; margins follow the batch norms as they train; under SLA the maps of image
    and views are joined; a pass without a loss is forgotten, evaluation leaves no map behind."""
    (student, x, y), teacher, seen = setting(build=student), teacher(), []
    loss = Overhaul(student, teacher)
    method = cls(student, teacher, beta=2, feature_loss=loss)
    norms = [teacher.get_submodule(name) for name in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.5, 0.5)
    method.eval()(x), method.train()
    assert not any(loss.maps + loss.maps_t)
    method.student(x[:2])

    def before(loss, args):
        kept = ([torch.cat(maps)[-len(args[0][0]) :] for maps in side] for side in (loss.maps, loss.maps_t))
        seen.extend([*args, *kept])

    loss.register_forward_pre_hook(before)
    terms, _ = method(x, y)
    feats, feats_t, kept, kept_t = seen
    assert len(feats[0]) == (20 if cls is frskd.FRSKDSLA else 4) and not any(loss.maps + loss.maps_t)
    assert_close([F.relu(f) for f in kept + kept_t], feats + feats_t)
    assert all((f < 0).any() for f in kept + kept_t)
    expected = 0
    for (conv, bn), f, t, norm in zip(loss.connectors, kept, kept_t, norms, strict=True):
        lowest = margin(norm.weight, norm.bias)[:, None, None]
        expected = expected / 2 + 1e-3 * partial_l2(bn(F.conv2d(f, conv.weight)), torch.maximum(t, lowest))
    assert_close(terms["feat"], 2 * expected)
    terms["feat"].backward()
    assert all(p.grad.any() for p in (student.conv1.weight, *loss.parameters()))
    assert all(p.grad is None for p in teacher.parameters())
    assert_he_fan_out(*(conv for conv, _ in loss.connectors[1:]))
