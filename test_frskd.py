"""What the paper and frskd.py say, as statements that run: pytest test_frskd.py

In the paper's order. Values that a test compares with were worked out by hand or stand in the paper.
"""

import ast
import importlib.util
import math
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import frskd

SOURCE = Path(frskd.__file__).resolve()


def new(cls=frskd.FRSKD, num_classes=5, **kwargs):
    torch.manual_seed(0)
    student = frskd.WideResNet(10, 1, num_classes)
    return cls(student, frskd.BiFPNc(student.channels, num_classes), **kwargs)


def batch(n=4, size=16, num_classes=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(num_classes, (n,), generator=g)


def reached(module, loss):
    """Names of the parameters of a module that a loss reaches with a gradient that is not zero."""
    module.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def by_hand(values, atol=1e-6):
    """A comparison with decimals that were worked out by hand."""
    return lambda x: assert_close(x.detach(), torch.tensor(values, dtype=x.dtype), atol=atol, rtol=0)


# ---------------------------------------------------------------------------- Sec. 3.1: the self-teacher network
def test_table_6_as_python_frskd_py_prints_it(capsys):
    """Parameters and FLOPs over the classifier's, and 18.6 % fewer FLOPs than in the paper's order."""
    runpy.run_path(str(SOURCE), run_name="__main__")
    rows = [re.findall(r"[A-Za-z]\w+|\d[\d.]*", line) for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[:2] for row in rows] == [["BiFPN", "128"], ["BiFPN", "256"], ["BiFPNc", "128"], ["BiFPNc", "256"]]
    measured = [[float(number) for number in row[2:]] for row in rows]  # parameters, paper's, FLOPs, paper's, executed
    assert [(p, f) for _, p, _, f, _ in measured] == [(0.30, 0.67), (0.97, 2.38), (0.19, 0.21), (0.59, 0.68)]
    assert all(abs(row[0] - row[1]) < 0.01 and abs(row[2] - row[3]) < 0.01 for row in measured)
    assert measured[3][4] / measured[3][2] == pytest.approx(1 - 0.186, abs=0.001)


@pytest.mark.parametrize(
    "build, size, params",
    [(frskd.BiFPN, 128, 209773), (frskd.BiFPN, 256, 681581), (frskd.BiFPNc, 1, 134317), (frskd.BiFPNc, 2, 411885)],
)
def test_self_teacher_has_two_sets_of_laterals_and_two_convolutions_a_node(build, size, params):
    """One shared set, or one separable convolution a node, gives other counts; 256 and w = 2 are the defaults."""
    teacher = build([32, 64, 128], 100, size)
    assert sum(p.numel() for p in teacher.parameters()) == params
    assert teacher.dims == ([size] * 3 if build is frskd.BiFPN else [size * c for c in (32, 64, 128)])
    assert (build([32, 64, 128], 100).dims == teacher.dims) == (size in (2, 256))


def equation_2(teacher, feats, mode="bilinear"):
    """Three levels node by node, each resized BEFORE its 1x1 convolution, as in the paper -> logits, T_1, T_2, T_3."""

    def conv_bn_relu(layers, x):
        return layers[1](F.conv2d(x, layers[0].weight)).relu()

    def node(node, *maps):
        w = node.weights.relu()
        x = sum(w_k * x for w_k, x in zip(w, maps)) / (w.sum() + 1e-4)
        layers = [m for m in node.conv if not isinstance(m, nn.ReLU)]
        for depthwise, pointwise, norm in (layers[:3], layers[3:]):
            x = F.conv2d(x, depthwise.weight, padding=1, groups=x.shape[1])
            x = norm(F.conv2d(x, pointwise.weight)).relu()
        return x

    def up(i, x, like):
        align = dict(align_corners=False) if mode == "bilinear" else {}
        return conv_bn_relu(teacher.up[i].conv, F.interpolate(x, like.shape[2:], mode=mode, **align))

    def down(i, x):
        return conv_bn_relu(teacher.down[i].conv, F.max_pool2d(x, 3, 2, 1))

    F1, F2, F3 = feats
    L1, L2, L3 = (conv_bn_relu(layers, f) for layers, f in zip(teacher.lateral, feats))
    M2, M3 = (conv_bn_relu(layers, f) for layers, f in zip(teacher.lateral2[1:], (F2, F3)))
    P3 = L3
    P2 = node(teacher.top_down[1], L2, up(1, P3, F2))
    P1 = node(teacher.top_down[0], L1, up(0, P2, F1))
    T1 = P1
    T2 = node(teacher.bottom_up[1], M2, P2, down(1, T1))
    T3 = node(teacher.bottom_up[2], M3, down(2, T2))
    return F.linear(T3.mean((2, 3)), teacher.fc.weight, teacher.fc.bias), [T1, T2, T3]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("sizes", [[(12, 12), (6, 6), (3, 3)], [(17, 23), (9, 12), (5, 6)]])
def test_self_teacher_is_equation_2_written_out(sizes, mode):
    """Outputs and gradients, in float64: that the 1x1 convolution runs before upsampling changes neither."""
    torch.manual_seed(0)
    teacher = frskd.BiFPNc([4, 6, 10], 3, upsample_mode=mode).double()
    for node in (*teacher.top_down[:-1], *teacher.bottom_up[1:]):
        assert (node.weights == 1).all()  # to begin with
        nn.init.uniform_(node.weights, 0.5, 2)
    feats = [torch.randn(2, c, *size).double().requires_grad_() for c, size in zip((4, 6, 10), sizes)]
    results = []
    for logits, feats_t in (teacher(feats), equation_2(teacher, feats, mode)):
        loss = logits.square().sum() + sum(t.square().sum() for t in feats_t)
        results.append([logits, *feats_t, *torch.autograd.grad(loss, [*feats, *teacher.parameters()])])
    for ours, paper in zip(*results):
        assert_close(ours, paper, rtol=1e-9, atol=1e-10)


def test_first_node_is_top_down_and_last_node_has_no_top_down_input():
    """Figure 2: T_1 = P_1 reads nothing of the bottom-up path; T_n reads L_n and T_{n-1} only."""
    teacher = frskd.BiFPNc([4, 6, 8, 10], 3)
    assert [len(node.weights) for node in teacher.top_down[:-1]] == [2, 2, 2]
    assert [len(node.weights) for node in teacher.bottom_up[1:]] == [3, 3, 2]
    _, feats_t = teacher([torch.randn(2, c, s, s) for c, s in zip(teacher.channels, (16, 8, 4, 2))])
    names = reached(teacher, feats_t[0].square().sum())
    assert not any(name.startswith(("bottom_up", "down", "lateral2")) for name in names)
    assert {"lateral.3.0.weight", "up.2.conv.0.weight", "top_down.0.weights"} <= names


def test_fast_normalised_fusion_by_hand():
    """relu(w) / (sum + 1e-4): a negative weight takes no part; without positive ones the sum is zero, not nan."""
    node, maps = frskd.Node(3, 1), list(torch.eye(3))
    by_hand([0.333322] * 3)(node.fuse(maps))
    node.weights.data = torch.tensor([2.0, -1, 3])
    by_hand([0.399992, 0, 0.599988])(node.fuse(maps))
    node.weights.data = torch.tensor([-1.0, -2, 0])
    by_hand([0.0, 0, 0])(node.fuse(maps))


def test_fusion_of_bf16_maps_has_bf16_weights():
    """A float32 operand would make the sum float32 under CUDA's autocast, twice the memory."""
    dtypes = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.addcmul.default:
                dtypes.update(operand.dtype for operand in args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        frskd.Node(2, 4).fuse(list(torch.randn(2, 1, 4, 3, 3).bfloat16()))
    assert dtypes == {torch.bfloat16}


def test_resize_is_bilinear_up_and_max_pooling_down():
    """Sec. 3.1. Down, 4x4 filled 0..15 and 15..0: 3x3 windows of stride 2, symmetric padding; adaptive by a third."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert frskd.resize(x, (2, 2)).flatten().tolist() == [5, 7, 13, 15]
    assert frskd.resize(15 - x, (2, 2)).flatten().tolist() == [15, 14, 11, 10]
    assert frskd.resize(torch.arange(5.0).view(1, 1, 1, 5), (1, 3)).flatten().tolist() == [1, 3, 4]
    assert frskd.resize(torch.arange(36.0).view(1, 1, 6, 6), (2, 2)).flatten().tolist() == [14, 17, 32, 35]
    assert frskd.resize(torch.tensor([[[[0.0, 4.0]]]]), (1, 4)).flatten().tolist() == [0, 1, 3, 4]
    assert frskd.resize(torch.tensor([[[[0.0, 4.0]]]]), (1, 4), "nearest").flatten().tolist() == [0, 0, 4, 4]
    assert torch.equal(frskd.resize(x, (4, 4)), x)


def test_self_teacher_takes_any_size_of_map_and_refuses_another_number():
    """Odd sizes, a ratio of one, of three, of one side only: each map is resized to its neighbour's size."""
    feats = [torch.randn(2, c, h, w) for c, h, w in ((4, 33, 47), (6, 33, 47), (6, 11, 16), (8, 11, 5), (8, 1, 5))]
    teacher = frskd.BiFPNc([4, 6, 6, 8, 8], 3, width=0.5)
    assert [t.shape[2:] for t in teacher(feats)[1]] == [f.shape[2:] for f in feats] and teacher.dims == [2, 3, 3, 4, 4]
    with pytest.raises(ValueError):
        teacher(feats[:-1])


# ---------------------------------------------------------------------------- Sec. 3.2: self-feature distillation
def test_attention_transfer_by_hand():
    """Eq. 3: mean over batch and positions of the squared difference, summed over blocks; widths may differ."""
    feat, feat_t = (torch.arange(1, 17) / 10).view(1, 4, 2, 2), (torch.arange(32, 0, -1) / 10).view(1, 8, 2, 2)
    by_hand([[0.361569, 0.440171, 0.529253, 0.628815]])(frskd.attention_map(feat))
    by_hand([[0.567612, 0.518920, 0.473010, 0.429883]])(frskd.attention_map(feat_t))
    by_hand(0.0228482)(frskd.attention_transfer([feat], [feat_t]))
    by_hand(2 * 0.0228482)(frskd.attention_transfer([feat] * 2, [feat_t] * 2))
    twice, half_right = feat.repeat(2, 1, 1, 1), torch.cat([feat_t, feat.repeat(1, 2, 1, 1)])
    by_hand(0.0228482 / 2)(frskd.attention_transfer([twice], [half_right]))
    with pytest.raises(ValueError):
        frskd.attention_transfer([feat] * 2, [feat_t])


def test_attention_transfer_sees_places_not_scale_nor_channels():
    """phi is l2-normalised: the place of the energy counts; a map of zeros gives no nan."""
    f, zeros = torch.rand(3, 6, 4, 5), torch.zeros(1, 2, 3, 3, requires_grad=True)
    assert frskd.attention_transfer([f], [7 * f.flip(1)]).item() == pytest.approx(0, abs=1e-9)
    one_hot = torch.eye(4).view(4, 1, 2, 2)
    assert frskd.attention_transfer([one_hot[:1]], [one_hot[1:2]]).item() == 0.5  # the bound 2 / (H W)
    frskd.attention_transfer([zeros], [torch.rand(1, 2, 3, 3)]).backward()
    assert torch.equal(frskd.attention_map(zeros), torch.zeros(1, 9)) and zeros.grad.isfinite().all()


def test_soft_label_distillation_by_hand():
    """Eq. 4 as the authors compute it: K^2 KL(teacher || student), summed over classes, averaged over the batch."""
    student = torch.tensor([[0.0, 1, -1], [2, 0, 0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    by_hand(0.742033)(frskd.soft_label_distillation(student[:1], teacher[:1], 1))
    by_hand(0.814283)(frskd.soft_label_distillation(student[:1], teacher[:1]))
    by_hand(0.791184)(frskd.soft_label_distillation(student, teacher, 1))
    by_hand(0.813562)(frskd.soft_label_distillation(student, teacher, 4.0))
    (gradient,) = torch.autograd.grad(frskd.soft_label_distillation(student[:1], teacher[:1]), student)
    by_hand([[-0.5015, 0.5806, -0.0792], [0, 0, 0]], atol=1e-4)(gradient)
    maps, maps_t = torch.randn(2, 3, 5, 4, 6)  # (B, C, H, W): B H W rows of classes
    rows, rows_t = (z.permute(0, 2, 3, 1).reshape(-1, 5) for z in (maps, maps_t))
    assert_close(frskd.soft_label_distillation(maps, maps_t), frskd.soft_label_distillation(rows, rows_t))


# --------------------------------------------------------------------------------------------------------- Eq. 5
@pytest.mark.parametrize("cls", [frskd.FRSKD, frskd.FRSKDSLA])
def test_distillation_teaches_the_student_only(cls):
    """Sec. 3.2: L_KD and L_F are "only applied to the student network"."""
    terms, _ = (method := new(cls))(*batch())
    for name in ("kd", "feat"):
        names = reached(method, terms[name])
        assert "student.conv1.weight" in names and not any(p.startswith(("teacher", "joint_t")) for p in names)


def test_cross_entropy_of_the_self_teacher_trains_the_backbone():
    """The teacher's inputs are not detached, so alpha = beta = 0 is not the baseline."""
    terms, _ = (method := new(alpha=0, beta=0))(*batch())
    names = reached(method, terms["ce_t"])
    assert "student.conv1.weight" in names and "student.fc.weight" not in names
    assert {f"teacher.{name}" for name, _ in method.teacher.named_parameters()} <= names
    assert reached(method, terms["ce"]) >= {f"student.{name}" for name, _ in method.student.named_parameters()}


@pytest.mark.parametrize("alpha, beta, temperature", [(2, 100, 4), (3, 70, 2)])
def test_terms_are_equation_5_weighted(alpha, beta, temperature):
    """Against the losses one by one, for soft labels too; Sec. 4.1's weights are the defaults; method(x) is f_c."""
    weights = dict(alpha=alpha, beta=beta, temperature=temperature) if alpha != 2 else {}
    method, (x, y) = new(**weights), batch()
    terms, logits = method(x, y)
    z, feats = method.student.features(x)
    z_t, feats_t = method.teacher(feats)
    expected = {"ce": F.cross_entropy(z, y), "ce_t": F.cross_entropy(z_t, y)}
    expected["kd"] = alpha * frskd.soft_label_distillation(z, z_t, temperature)
    expected["feat"] = beta * frskd.attention_transfer(feats, feats_t)
    assert list(terms) == list(expected)
    assert_close(terms, expected)
    assert_close(method(x, F.one_hot(y, 5).float())[0], expected)
    assert torch.equal(logits, z) and not logits.requires_grad and torch.equal(method(x), z)


@pytest.mark.parametrize("cls", [frskd.FRSKD, frskd.FRSKDSLA])
def test_a_term_of_weight_zero_is_not_computed(cls):
    """beta = 0 is FRSKD\\F."""
    terms = list(new(cls)(*batch())[0])
    assert list(new(cls, beta=0)(*batch())[0]) == [term for term in terms if term != "feat"]
    assert list(new(cls, alpha=0)(*batch())[0]) == [term for term in terms if term != "kd"]


@pytest.mark.parametrize("cls", [frskd.FRSKD, frskd.FRSKDSLA])
def test_criterion_is_the_callers_loss_of_both_networks_and_of_them_alone(cls):
    """SLA's joint heads keep plain cross-entropy; a criterion gets float32 logits under autocast."""
    seen = []

    def criterion(logits, y):
        seen.append(logits.dtype)
        return 7 * F.cross_entropy(logits, y)

    (plain, _), (ours, _) = new(cls)(*batch()), new(cls, criterion=criterion)(*batch())
    assert_close(ours, plain | {"ce": 7 * plain["ce"], "ce_t": 7 * plain["ce_t"]})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new(cls, criterion=criterion)(*batch())
    assert seen == [torch.float32] * 4


@pytest.mark.parametrize("cls", [frskd.FRSKD, frskd.FRSKDSLA])
def test_losses_are_computed_in_float32_from_bf16(cls):
    logits, logits_t = torch.randn(2, 4, 5).bfloat16()
    feats, feats_t = ([torch.randn(4, c, 6, 6).bfloat16()] for c in (3, 8))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            kd, feat = frskd.soft_label_distillation(logits, logits_t), frskd.attention_transfer(feats, feats_t)
            terms, _ = new(cls)(*batch())
        assert torch.equal(kd, frskd.soft_label_distillation(logits.float(), logits_t.float()))
        assert torch.equal(feat, frskd.attention_transfer([feats[0].float()], [feats_t[0].float()]))
        assert {term.dtype for term in terms.values()} == {torch.float32}


def test_a_deepest_map_of_1x1_is_warned_of_and_a_plain_network_sent_to_the_adapter():
    with pytest.warns(UserWarning, match="the deepest map is 1x1"):
        new()(*batch(size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new()(*batch(size=8)), new(beta=0)(*batch(size=4))
    with pytest.raises(TypeError, match="channels None .* Adapter"):
        frskd.FRSKD(nn.Linear(3, 5), frskd.BiFPNc([4], 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.filterwarnings("ignore:the deepest map is 1x1")
def test_a_step_is_sound_at_any_size_depth_and_type(n, dtype):
    """Shapes, finite terms, gradients where these belong and of the type; a deepest map of zeros is no exception."""
    torch.manual_seed(0)
    channels, half = [3, 1, 8, 5, 16, 2][:n], nn.AvgPool2d(2, ceil_mode=True)
    convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip([3, *channels], channels)]
    stages = [nn.Sequential(*[half][: min(i, 1)], conv, nn.ReLU()) for i, conv in enumerate(convs)]
    net = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 5))
    for rows, size, dead in ((1, (8, 8), 0), (2, (9, 15), 1), (3, (16, 16), 0), (2, (47, 33), 0), (1, (32, 64), 1)):
        x, y = torch.randn(rows, 3, *size).to(dtype), torch.arange(rows)
        convs[-1].bias.data.fill_(-99 if dead else 1)
        student = frskd.Adapter(net, map(str, range(n)), x)
        teacher = frskd.BiFPN(channels, 5, 6) if rows == 1 else frskd.BiFPNc(channels, 5, rows - 1)
        method = frskd.FRSKD(student, teacher).to(dtype)
        if rows * math.prod(math.ceil(side / 2 ** (n - 1)) for side in size) == 1:
            with pytest.raises(ValueError, match="more than 1 value per channel"):  # torch's batch norm
                method(x, y)
            continue
        method.zero_grad()
        terms, logits = method(x, y)
        _, feats = student.features(x)
        assert [t.shape[2:] for t in teacher(feats)[1]] == [f.shape[2:] for f in feats]
        assert logits.shape == (rows, 5) and all(term.isfinite() for term in terms.values())
        assert bool(feats[-1].any()) != dead
        (terms["kd"] + terms["feat"]).backward(retain_graph=True)
        assert all(p.grad is None for p in teacher.parameters())
        (terms["ce"] + terms["ce_t"]).backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in method.parameters())


def test_eight_images_can_be_learnt_by_heart():
    """`ce` and `ce_t` fall below a tenth of their first value."""
    method, (x, y) = new(), batch(8, size=8)
    optimizer, history = torch.optim.SGD(method.parameters(), 0.05, momentum=0.9), []
    for _ in range(40):
        terms, _ = method(x, y)
        history.append([terms["ce"].item(), terms["ce_t"].item()])
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert all(last < 0.1 * first for first, last in zip(history[0], history[-1]))


# ----------------------------------------------------------------------------------------------------- FRSKD+SLA
def test_views_labels_and_aggregate_by_hand():
    """Quarter turns counter-clockwise, the views of an image adjacent; 4 y + r; view r votes with its (class, r)."""
    x = torch.stack([torch.tensor([[1.0, 2], [3, 4]]), torch.full((2, 2), 9.0)])[:, None]
    views = [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]] + [[9] * 4] * 4
    assert frskd.rotations(x).flatten(1).tolist() == views
    assert frskd.joint_labels(torch.tensor([0, 2])).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert frskd.aggregate(torch.arange(96.0).view(8, 12)).tolist() == [[19.5, 23.5, 27.5], [67.5, 71.5, 75.5]]


def test_terms_of_frskd_sla_written_out():
    """Distillation on concatenations, 2 B logits and 5 B maps, in one call of the feature loss; joint means of 4 B."""
    calls = []

    def feature_loss(feats, feats_t):
        calls.append((feats, feats_t))
        return frskd.attention_transfer(feats, feats_t)

    method, (x, y) = new(frskd.FRSKDSLA, alpha=3, beta=70, temperature=3, feature_loss=feature_loss), batch()
    terms, logits = method(x, y)
    z, feats = method.student.features(x)
    z_t, feats_t = method.teacher(feats)
    _, views = method.student.features(frskd.rotations(x))
    _, views_t = method.teacher(views)
    joint, joint_t = (head(f[-1].mean((2, 3))) for head, f in ((method.joint, views), (method.joint_t, views_t)))
    g, g_t = frskd.aggregate(joint), frskd.aggregate(joint_t)
    labels = torch.tensor([4 * int(label) + r for label in y for r in range(4)])
    maps, maps_t = ([torch.cat(pair) for pair in zip(*sides)] for sides in ((feats, views), (feats_t, views_t)))
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
    assert_close(terms, expected, rtol=1e-4, atol=1e-6)
    assert_close(calls, [(maps, maps_t)], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, z) and not logits.requires_grad and torch.equal(method(x), z)


def test_gradient_stops_of_frskd_sla():
    """Aggregates and the teacher are targets; the plain heads see rotations only through the aggregate."""
    terms, _ = (method := new(frskd.FRSKDSLA))(*batch())
    names = {term: reached(method, value) for term, value in terms.items()}
    parts = {term: {name.split(".")[0] for name in names[term]} for term in terms}
    assert parts["kd"] == {"student", "joint"} and parts["feat"] == parts["kd_joint"] == {"student"}
    assert parts["kd_joint_t"] == {"student", "teacher"} and parts["ce_joint"] == {"student", "joint"}
    assert parts["ce_joint_t"] == {"student", "teacher", "joint_t"}
    assert "student.fc.weight" in names["kd_joint"] and "teacher.fc.weight" in names["kd_joint_t"]
    assert "student.fc.weight" not in names["ce_joint"] | names["kd_joint_t"] | names["ce_joint_t"]
    assert "teacher.fc.weight" not in names["ce_joint_t"]


# -------------------------------------------------------------------------------------------------- the students
def test_students_have_the_standard_number_of_parameters():
    with torch.device("meta"):
        students = [frskd.wrn16_2(100), frskd.resnet18(1000), frskd.resnet34(1000)]
        students += [frskd.resnet18(100, stem="cifar"), frskd.resnet34(100, stem="cifar")]
    counts = [sum(p.numel() for p in student.parameters()) for student in students]
    assert counts == [703284, 11689512, 21797672, 11220132, 21328292]


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_resnet_is_torchvisions_bit_for_bit_and_its_maps_are_the_stages(stem):
    """From one seed: initialisation, names, outputs; the CIFAR stem is 3x3 of stride 1 without max-pooling."""
    layers, basic = [2, 1, 1, 1], torchvision.models.resnet.BasicBlock
    torch.manual_seed(0)
    theirs = torchvision.models.ResNet(basic, layers, num_classes=7)
    torch.manual_seed(0)
    ours, stages = frskd.ResNet(layers, 7, stem), []
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False), nn.Sequential()
        theirs.conv1.weight.data = ours.conv1.weight.data
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        stage.register_forward_hook(lambda module, args, out: stages.append(out))
    for training in (True, False):
        ours.train(training), theirs.train(training), stages.clear()
        x = torch.randn(3, 3, 24, 40)
        logits, feats = ours.features(x)
        assert torch.equal(logits, theirs(x)) and all(map(torch.equal, feats, stages))
        assert torch.equal(ours.eval()(x), theirs.eval()(x)) and [f.shape[1] for f in feats] == ours.channels


@pytest.mark.parametrize("build", [lambda: frskd.resnet18(7, stem="cifar"), lambda: frskd.WideResNet(10, 4, 7)])
def test_every_convolution_starts_from_he_fan_out(build):
    """Of the CIFAR stem and the WRN too: std = sqrt(2 / (c_out k^2))."""
    torch.manual_seed(0)
    for conv in (m for m in build().modules() if isinstance(m, nn.Conv2d)):
        expected = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_wide_resnet_written_out():
    """Pre-activation blocks; both branches of a widening one read the activated map; F_i is that map."""
    torch.manual_seed(0)
    net, (x, _) = frskd.WideResNet(16, 1, 5), batch()
    x, feats = F.conv2d(x, net.conv1.weight, padding=1), []
    for i, stage in enumerate((net.layer1, net.layer2, net.layer3)):
        for k, block in enumerate(stage):
            stride, activated = 2 if i and not k else 1, block.bn1(x).relu()
            if stride == 2:
                feats.append(activated)
                x = F.conv2d(activated, block.shortcut.weight, stride=2)
            hidden = block.bn2(F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)).relu()
            x = x + F.conv2d(hidden, block.conv2.weight, padding=1)
        assert len(stage) == 2
    feats.append(net.bn(x).relu())
    logits, ours = net.features(batch()[0])
    assert_close(ours, feats)
    assert_close(logits, net.fc(feats[-1].mean((2, 3))))
    assert torch.equal(net(batch()[0]), logits) and [f.shape[1] for f in ours] == net.channels


@pytest.mark.parametrize("depth, widen", [(19, 2), (4, 2), (16, 0)])
def test_depth_of_a_wide_resnet_is_6_k_plus_4(depth, widen):
    with pytest.raises(ValueError, match="6 k"):
        frskd.WideResNet(depth, widen, 5)
    with pytest.raises(ValueError, match="imagenet or cifar"):
        frskd.resnet18(5, stem="tiny")


# ------------------------------------------------------------------------------------- Other networks, and export
def plain(channels=3):
    """A network of another code base."""
    inner = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Sequential(nn.Conv2d(6, 6, 1)))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), inner, *head)


@pytest.mark.parametrize("channels, size", [(3, (33, 33)), (1, (40, 56))])
def test_adapter_gives_the_outputs_of_the_named_blocks(channels, size):
    """Of any size and number of input channels; deep names too; modules keep their modes and statistics."""
    torch.manual_seed(0)
    net, x = plain(channels), torch.randn(2, channels, *size)
    net[2].eval()
    student = frskd.Adapter(net, ["0", "2.1.0"], x[:1])
    assert net.training and net[1].training and not net[2].training and net[1].num_batches_tracked == 0
    assert student.channels == [4, 6] and frskd.export(student) is net and frskd.export(net) is net
    logits, feats = student.eval().features(x)
    assert torch.equal(logits, net(x)) and torch.equal(student(x), logits)
    assert torch.equal(feats[0], net[0](x)) and torch.equal(feats[1], net[2](net[1](feats[0])))
    assert not any(m._forward_hooks for m in net.modules())
    for size in ((31, 64), (15, 17), (224, 7)):  # maps of 1x1 and of odd sizes are not taken for (B, H, W, C)
        assert frskd.Adapter(net, "023", torch.randn(1, channels, *size)).channels == [4, 6, 6]


class Net(nn.Module):
    """One block, and a forward of it."""

    def __init__(self, block, forward):
        super().__init__()
        self.block, self.function = block, forward

    def forward(self, x):
        return self.function(self.block, x)


SWIN = Net(nn.Linear(3, 24), lambda block, x: block(F.avg_pool2d(x, 4).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize(
    "net, blocks, error, message",
    [
        (plain(), ["0", "0"], ValueError, "name each once, in this order"),
        (plain(), [], ValueError, "name each once"),
        (plain(), ["conv"], ValueError, r"ran \[\]: .*; the network has 0 4x32x48, 1 4x32x48, 2.0 6x16x24, .*, 5 5$"),
        (plain(), ["2", "0"], ValueError, r"of the blocks \['2', '0'\] ran \['0', '2'\]: "),
        (plain(), ["0", "5"], ValueError, r"the output of 5 is no \(B, C, H, W\) map"),
        (SWIN, ["block"], ValueError, r"block is \(B, H, W, C\): permute it, .*; the network has block 16x24x24"),
        (Net(nn.ReLU(), lambda block, x: (block(x), None)), ["block"], ValueError, "returns tuple, not a tensor"),
        (nn.DataParallel(plain()), ["module.0"], TypeError, "around the method, not the network"),
    ],
)
def test_adapter_refuses_in_words(net, blocks, error, message):
    """What is wrong, and the blocks that the network has, with their sizes."""
    with pytest.raises(error, match=message):
        frskd.Adapter(net, blocks, torch.randn(2, 3, 64, 96))
    assert net.training and not any(m._forward_hooks for m in net.modules())


def test_adapter_refuses_a_pass_in_which_a_block_did_not_run():
    net = Net(nn.Conv2d(3, 4, 1), lambda block, x: (x if block.training else block(x)).mean((2, 3)))
    student = frskd.Adapter(net, ["block"], batch()[0])
    with pytest.raises(ValueError, match=r"of the blocks \['block'\] ran \[\]: "):
        student.features(batch()[0])


def test_a_network_compiled_in_place_is_still_right_or_told():
    torch.manual_seed(0)
    net, (x, _) = plain().eval(), batch()
    expected = (student := frskd.Adapter(net, ["2"], x)).features(x)
    net.compile(backend="eager")
    assert_close(student(x), expected[0])  # traced without hooks
    try:
        assert_close(student.features(x), expected)
    except ValueError as error:
        assert "compile the method, not the network" in str(error)


class FakeTimm(nn.Module):
    """What Timm relies on: default_cfg, forward_intermediates, forward_head; `extra` is of forward alone."""

    default_cfg = {"input_size": (3, 12, 20)}

    def __init__(self, extra=0):
        super().__init__()
        self.body, self.extra = plain(), extra

    def forward_intermediates(self, x, indices):
        assert indices <= 2, "no such indices"
        feats = [self.body[:1](x), self.body[:3](x)]
        return self.body[3](feats[-1]), feats[-indices:]

    def forward_head(self, x):
        return self.body[4:](x)

    def forward(self, x):
        return self.body(x) + self.extra


def test_timm_gives_the_last_maps_of_forward_intermediates():
    """Its default size, or an example's; a network that is more, or less, than these functions is refused."""
    torch.manual_seed(0)
    student, x = frskd.Timm(net := FakeTimm(), indices=2), torch.randn(2, 3, 12, 20)
    assert student.channels == [4, 6] and net.training and net.body[1].num_batches_tracked == 0
    logits, feats = student.features(x)
    assert_close([logits, *feats], [net(x), net.body[0](x), net.body[:3](x)])
    assert_close(student(x), logits)
    assert frskd.export(student) is net and frskd.Timm(net, 1, torch.randn(1, 3, 9, 9)).channels == [6]
    with pytest.raises(ValueError, match="FakeTimm is more than forward_intermediates, forward_head: take Adapter"):
        frskd.Timm(FakeTimm(extra=1), 2)
    with pytest.raises(ValueError, match=r"FakeTimm has no maps 4 .*: no such indices"):
        frskd.Timm(net)
    assert net.training
    with pytest.raises(ValueError, match="Sequential has no maps 4 .*: .*forward_intermediates"):
        frskd.Timm(plain(), example=x)


@pytest.mark.parametrize("name, channels", [("test_vit", [64] * 4), ("test_resnet", [32, 48, 192, 96])])
@pytest.mark.filterwarnings("ignore")
def test_networks_of_timm_take_part(name, channels):
    student = frskd.Timm(pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=5))
    assert student.channels == channels
    terms, logits = frskd.FRSKD(student, frskd.BiFPN(channels, 5, 8))(*batch(2, 160))
    assert logits.shape == (2, 5) and all(term.isfinite() for term in terms.values())


# ------------------------------------------------------------------------------------------- The file, copied alone
def test_frskd_py_can_be_copied_alone(tmp_path, monkeypatch):
    """A step trains another code base's network from another folder, without fvcore; the network comes back plain."""
    (tmp_path / "copied.py").write_text(SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fvcore", None)
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "copied.py")
    spec.loader.exec_module(copied := importlib.util.module_from_spec(spec))
    net, (x, y) = plain(), batch(2, size=20)
    student = copied.Adapter(net, ["0", "2"], x)
    method = copied.FRSKD(student, copied.BiFPNc(student.channels, 5))
    before, names = net[0].weight.clone(), set(net.state_dict())
    sum(method(x, y)[0].values()).backward()
    torch.optim.SGD(method.parameters(), 0.1).step()
    assert not torch.equal(before, net[0].weight) and set(copied.export(student).state_dict()) == names


def test_frskd_py_knows_no_option_file_device_or_seed_and_prints_only_as_main():
    """Nothing but torch and torchvision is imported; fvcore inside the cost report alone."""
    *module, main = ast.parse(SOURCE.read_text(encoding="utf-8")).body
    nodes = [node for part in module for node in ast.walk(part)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names}
    assert roots == {"torch", "torchvision", "contextlib", "functools", "warnings", "fvcore"}
    assert not any("fvcore" in ast.unparse(part) for part in module if isinstance(part, (ast.Import, ast.ImportFrom)))
    calls = {ast.unparse(node.func).split(".")[-1] for node in nodes if isinstance(node, ast.Call)}
    assert not calls & {"print", "open", "cuda", "manual_seed", "ArgumentParser", "save", "load", "read_text", "Path"}
    assert ast.unparse(main).startswith("if __name__ == '__main__':")
