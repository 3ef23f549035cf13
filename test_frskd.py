"""What the paper and frskd.py say, as statements that run: pytest test_frskd.py

In the paper's order. Values that a test compares with were worked out by hand or stand in the paper.
"""

import ast
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import frskd

SOURCE = Path(frskd.__file__).resolve()
with_and_without_sla = pytest.mark.parametrize("cls", [frskd.FRSKD, frskd.FRSKDSLA])


def new(cls=frskd.FRSKD, **kwargs):
    torch.manual_seed(0)
    student = frskd.WideResNet(10, 1, 5)
    return cls(student, frskd.BiFPNc(student.channels, 5), **kwargs)


def batch(n=4, size=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(5, (n,), generator=g)


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
    """Parameters and FLOPs over the classifier's, the paper's behind each, FLOPs executed: 18.6 % fewer at w = 2."""
    runpy.run_path(str(SOURCE), run_name="__main__")
    rows = [re.findall(r"[A-Za-z]\w+|\d[\d.]*", line) for line in capsys.readouterr().out.splitlines()[4:]]
    assert [" ".join(row) for row in rows] == [
        "BiFPN 128 0.298 0.30 0.674 0.67 0.674",
        "BiFPN 256 0.969 0.97 2.381 2.38 2.381",
        "BiFPNc 128 0.191 0.19 0.209 0.21 0.176",
        "BiFPNc 256 0.586 0.59 0.686 0.68 0.558",
    ]


def test_self_teacher_has_two_sets_of_laterals_and_two_convolutions_a_node():
    """One shared set, or one separable convolution a node, gives other counts; 256 and w = 2 are the defaults."""
    c, BiFPN, BiFPNc = [32, 64, 128], frskd.BiFPN, frskd.BiFPNc
    teachers = [BiFPN(c, 100, 128), BiFPN(c, 100), BiFPNc(c, 100, 1), BiFPNc(c, 100)]
    assert [teacher.dims for teacher in teachers] == [[128] * 3, [256] * 3, [32, 64, 128], [64, 128, 256]]
    counts = [sum(p.numel() for p in teacher.parameters()) for teacher in teachers]
    assert counts == [209773, 681581, 134317, 411885]


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
    T1 = P1  # Figure 2: of L_1 and P_2
    T2 = node(teacher.bottom_up[1], M2, P2, down(1, T1))
    T3 = node(teacher.bottom_up[2], M3, down(2, T2))  # Figure 2: without P_3
    return F.linear(T3.mean((2, 3)), teacher.fc.weight, teacher.fc.bias), [T1, T2, T3]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_self_teacher_is_equation_2_written_out(mode):
    """Outputs and gradients, in float64: that the 1x1 convolution runs before upsampling changes neither."""
    torch.manual_seed(0)
    teacher = frskd.BiFPNc([4, 6, 10], 3, upsample_mode=mode).double()
    for node in (*teacher.top_down[:-1], *teacher.bottom_up[1:]):
        assert (node.weights == 1).all()  # to begin with
        nn.init.uniform_(node.weights, 0.5, 2)
    sizes = (4, 17, 23), (6, 9, 12), (10, 5, 6)
    feats = [torch.randn(2, *size).double().requires_grad_() for size in sizes]
    results = []
    for logits, feats_t in (teacher(feats), equation_2(teacher, feats, mode)):
        loss = logits.square().sum() + sum(t.square().sum() for t in feats_t)
        results.append([logits, *feats_t, *torch.autograd.grad(loss, [*feats, *teacher.parameters()])])
    for ours, paper in zip(*results):
        assert_close(ours, paper, rtol=1e-9, atol=1e-10)


def test_fast_normalised_fusion_by_hand(monkeypatch):
    """relu(w) / (sum + 1e-4): a negative weight takes no part; without positive ones the sum is zero, not nan."""
    node, maps = frskd.Node(3, 1), list(torch.eye(3))
    by_hand([0.333322] * 3)(node.fuse(maps))
    node.weights.data = torch.tensor([2.0, -1, 3])
    by_hand([0.399992, 0, 0.599988])(node.fuse(maps))
    node.weights.data = torch.tensor([-1.0, -2, 0])
    by_hand([0.0, 0, 0])(node.fuse(maps))
    seen, addcmul = set(), torch.addcmul  # a float32 operand would make the sum float32 under CUDA's autocast
    monkeypatch.setattr(torch, "addcmul", lambda *args: seen.update(arg.dtype for arg in args) or addcmul(*args))
    node.fuse(list(torch.eye(3).bfloat16()))
    assert seen == {torch.bfloat16}


def test_resize_is_bilinear_up_and_max_pooling_down():
    """Sec. 3.1. Down, 4x4 filled 0..15 and 15..0: 3x3 windows of stride 2, symmetric padding; adaptive by a third."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert frskd.resize(x, (2, 2)).flatten().tolist() == [5, 7, 13, 15]
    assert frskd.resize(15 - x, (2, 2)).flatten().tolist() == [15, 14, 11, 10]
    assert frskd.resize(torch.arange(5.0).view(1, 1, 1, 5), (1, 3)).flatten().tolist() == [1, 3, 4]
    assert frskd.resize(torch.arange(36.0).view(1, 1, 6, 6), (2, 2)).flatten().tolist() == [14, 17, 32, 35]
    pair = torch.tensor([0.0, 4]).view(1, 1, 1, 2)
    assert frskd.resize(pair, (1, 4)).flatten().tolist() == [0, 1, 3, 4]
    assert frskd.Resize(1, 1, "nearest")(pair, (1, 4)).flatten().tolist() == [0, 0, 4, 4]
    assert torch.equal(frskd.resize(x, (4, 4)), x)


def test_self_teacher_takes_any_number_and_size_of_maps_but_no_other_than_it_was_built_for():
    """Odd sizes, a ratio of one, of three, of one side only: each map is resized to its neighbour's size."""
    feats = [torch.randn(2, c, h, w) for c, h, w in ((1, 33, 47), (6, 33, 47), (6, 11, 16), (8, 11, 5), (8, 1, 5))]
    for n, dims in enumerate(([1], [1, 3], [1, 3, 3], [1, 3, 3, 4], [1, 3, 3, 4, 4]), 1):
        teacher = frskd.BiFPNc([1, 6, 6, 8, 8][:n], 3, width=0.5)
        _, feats_t = teacher(feats[:n])
        assert [t.shape[1:] for t in feats_t] == [(d, *f.shape[2:]) for d, f in zip(dims, feats)]
    with pytest.raises(ValueError):
        teacher(feats[:-1])


# ---------------------------------------------------------------------------- Sec. 3.2: self-feature distillation
def test_attention_transfer_by_hand():
    """Eq. 3: mean over batch and positions of the squared difference, summed over blocks; widths may differ.
    phi is l2-normalised: the place of the energy counts, not scale nor channels; a map of zeros gives no nan.
    """
    feat, feat_t = (torch.arange(1, 17) / 10).view(1, 4, 2, 2), (torch.arange(32, 0, -1) / 10).view(1, 8, 2, 2)
    by_hand([[0.361569, 0.440171, 0.529253, 0.628815]])(frskd.attention_map(feat))
    by_hand([[0.567612, 0.518920, 0.473010, 0.429883]])(frskd.attention_map(feat_t))
    by_hand(0.0228482)(frskd.attention_transfer([feat], [feat_t]))
    by_hand(2 * 0.0228482)(frskd.attention_transfer([feat] * 2, [feat_t] * 2))
    twice, half_right = feat.repeat(2, 1, 1, 1), torch.cat([feat_t, feat.repeat(1, 2, 1, 1)])
    by_hand(0.0228482 / 2)(frskd.attention_transfer([twice], [half_right]))
    assert_close(frskd.attention_map(7 * feat.flip(1)), frskd.attention_map(feat))
    zeros = torch.zeros(1, 2, 2, 2, requires_grad=True)
    frskd.attention_transfer([zeros], [feat_t]).backward()
    assert torch.equal(frskd.attention_map(zeros), torch.zeros(1, 4)) and zeros.grad.isfinite().all()
    with pytest.raises(ValueError):
        frskd.attention_transfer([feat] * 2, [feat_t])


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
@pytest.mark.parametrize("weights", [{}, dict(alpha=3, beta=70, temperature=2)])
def test_terms_are_equation_5_weighted(weights):
    """Against the losses one by one, for soft labels too; Sec. 4.1's weights are the defaults; method(x) is f_c."""
    alpha, beta, temperature = weights.values() or (2, 100, 4)
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


def test_distillation_teaches_the_student_only_and_the_teachers_cross_entropy_the_backbone_too():
    """Sec. 3.2. The teacher's inputs are not detached, so alpha = beta = 0 is not the baseline."""
    terms, _ = (method := new())(*batch())
    names = {term: reached(method, value) for term, value in terms.items()}
    student = {f"student.{name}" for name, _ in method.student.named_parameters()}
    teacher = {f"teacher.{name}" for name, _ in method.teacher.named_parameters()}
    backbone = student - {"student.fc.weight", "student.fc.bias"}
    assert names == {"ce": student, "ce_t": backbone | teacher, "kd": student, "feat": backbone}


@with_and_without_sla
def test_a_term_of_weight_zero_is_not_computed_and_ce_and_ce_t_are_the_callers_loss(cls):
    """beta = 0 is FRSKD\\F. SLA's joint heads keep plain cross-entropy."""
    terms, _ = new(cls)(*batch())
    assert list(new(cls, beta=0)(*batch())[0]) == [term for term in terms if term != "feat"]
    assert list(new(cls, alpha=0)(*batch())[0]) == [term for term in terms if term != "kd"]
    ours, _ = new(cls, criterion=lambda logits, y: 7 * F.cross_entropy(logits, y))(*batch())
    assert_close(ours, terms | {"ce": 7 * terms["ce"], "ce_t": 7 * terms["ce_t"]})


def test_losses_of_bf16_are_computed_in_float32():
    logits, logits_t = torch.randn(2, 4, 5).bfloat16()
    feats, feats_t = ([torch.randn(4, c, 6, 6).bfloat16()] for c in (3, 8))
    kd, feat = frskd.soft_label_distillation(logits, logits_t), frskd.attention_transfer(feats, feats_t)
    assert torch.equal(kd, frskd.soft_label_distillation(logits.float(), logits_t.float()))
    assert torch.equal(feat, frskd.attention_transfer([feats[0].float()], [feats_t[0].float()]))


@with_and_without_sla
def test_a_step_follows_the_type_of_its_input_and_its_terms_are_float32_under_autocast(cls):
    """A criterion gets float32 logits."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, _ = new(cls, criterion=lambda logits, y: logits.mean())(*batch())
    assert {term.dtype for term in terms.values()} == {torch.float32}
    for dtype in (torch.float64, torch.bfloat16):
        method, (x, y) = new(cls).to(dtype), batch(size=9)
        sum(method(x.to(dtype), y)[0].values()).backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in method.parameters())


def test_a_deepest_map_of_1x1_is_warned_of_and_a_plain_network_sent_to_the_adapter():
    with pytest.warns(UserWarning, match="the deepest map is 1x1"):
        new()(*batch(size=4))
    with pytest.raises(TypeError, match="channels None .* Adapter"):
        frskd.FRSKD(nn.Linear(3, 5), frskd.BiFPNc([4], 5))


# ----------------------------------------------------------------------------------------------------- FRSKD+SLA
def test_views_labels_and_aggregate_by_hand():
    """Quarter turns counter-clockwise, the views of an image adjacent; 4 y + r; view r votes with its (class, r)."""
    x = torch.stack([torch.tensor([[1.0, 2], [3, 4]]), torch.full((2, 2), 9.0)])[:, None]
    views = [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]] + [[9] * 4] * 4
    assert frskd.rotations(x).flatten(1).tolist() == views
    assert frskd.rotations(batch()[0]).is_contiguous(memory_format=torch.channels_last)  # which is faster
    assert frskd.joint_labels(torch.tensor([0, 2])).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    joint = torch.arange(96.0).square().view(8, 12)  # of image b, view r, class c: (48 b + 13 r + 4 c)^2
    assert frskd.aggregate(joint).tolist() == [[591.5, 763.5, 967.5], [4767.5, 5323.5, 5911.5]]


def test_terms_of_frskd_sla_written_out():
    """Distillation on concatenations, 2 B logits and 5 B maps; joint means of 4 B."""
    method, (x, y) = new(frskd.FRSKDSLA, alpha=3, beta=70, temperature=3), batch()
    terms, logits = method(x, y)
    z, feats = method.student.features(x)
    z_t, feats_t = method.teacher(feats)
    _, views = method.student.features(frskd.rotations(x))
    _, views_t = method.teacher(views)
    joint, joint_t = (head(f[-1].mean((2, 3))) for head, f in ((method.joint, views), (method.joint_t, views_t)))
    g, g_t = frskd.aggregate(joint), frskd.aggregate(joint_t)
    labels = torch.tensor([4 * int(label) + r for label in y for r in range(4)])
    maps, maps_t = ([torch.cat(pair) for pair in zip(*sides)] for sides in ((feats, views), (feats_t, views_t)))
    expected = dict(ce=F.cross_entropy(z, y), ce_t=F.cross_entropy(z_t, y))
    expected |= dict(ce_joint=F.cross_entropy(joint, labels), ce_joint_t=F.cross_entropy(joint_t, labels))
    expected["kd_joint"] = frskd.soft_label_distillation(z, g, 3)
    expected["kd_joint_t"] = frskd.soft_label_distillation(z_t, g_t, 3)
    expected["kd"] = 3 * frskd.soft_label_distillation(torch.cat([z, g]), torch.cat([z_t, g_t]), 3)
    expected["feat"] = 70 * frskd.attention_transfer(maps, maps_t)
    assert list(terms) == list(expected)
    assert_close(terms, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, z) and not logits.requires_grad and torch.equal(method(x), z)


def test_gradient_stops_of_frskd_sla():
    """Aggregates and the teacher are targets; the plain heads see rotations only through the aggregate."""
    terms, _ = (method := new(frskd.FRSKDSLA))(*batch())
    names = {term: reached(method, value) for term, value in terms.items()}
    parts = {term: {name.split(".")[0] for name in names[term]} for term in terms}
    assert parts["kd"] == {"student", "joint"} and parts["feat"] == parts["kd_joint"] == {"student"}
    assert parts["kd_joint_t"] == {"student", "teacher"} and parts["ce_joint"] == {"student", "joint"}
    assert parts["ce_joint_t"] == {"student", "teacher", "joint_t"}
    assert {term for term in terms if "student.fc.weight" in names[term]} == {"ce", "kd_joint", "kd"}
    assert {term for term in terms if "teacher.fc.weight" in names[term]} == {"ce_t", "kd_joint_t"}


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
    ours, stages, x = frskd.ResNet(layers, 7, stem), [], torch.randn(3, 3, 24, 40)
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False), nn.Sequential()
        theirs.conv1.weight.data = ours.conv1.weight.data
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        stage.register_forward_hook(lambda module, args, out: stages.append(out))
    logits, feats = ours.features(x)
    assert torch.equal(logits, theirs(x)) and all(map(torch.equal, feats, stages))
    assert torch.equal(ours.eval()(x), theirs.eval()(x)) and [f.shape[1] for f in feats] == ours.channels


def test_every_convolution_starts_from_he_fan_out():
    """Of the CIFAR stem and the WRN too: std = sqrt(2 / (c_out k^2))."""
    torch.manual_seed(0)
    modules = [*frskd.resnet18(7, stem="cifar").modules(), *frskd.WideResNet(10, 4, 7).modules()]
    for conv in (m for m in modules if isinstance(m, nn.Conv2d)):
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


# ------------------------------------------------------------------------------------- Other networks, and export
def plain(channels=3):
    """A network of another code base."""
    inner = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Sequential(nn.Conv2d(6, 6, 1)))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), inner, *head)


def test_adapter_gives_the_outputs_of_the_named_blocks():
    """Of any size and number of input channels; deep names too; modules keep modes and statistics, frozen ones too."""
    net, x = plain(channels=1), torch.randn(2, 1, 40, 56)
    net[0].requires_grad_(False), net[2].eval()
    student = frskd.Adapter(net, ["0", "2.1.0"], x[:1])
    assert net.training and net[1].training and not net[2].training and net[1].num_batches_tracked == 0
    assert student.channels == [4, 6] and frskd.export(student) is net and frskd.export(net) is net
    logits, feats = student.eval().features(x)
    assert torch.equal(logits, net(x)) and torch.equal(student(x), logits)
    assert torch.equal(feats[0], net[0](x)) and torch.equal(feats[1], net[2](net[1](feats[0])))
    assert [p.requires_grad for p in student.parameters()] == [False] * 2 + [True] * 8
    assert not any(m._forward_hooks for m in net.modules())
    for size in ((31, 64), (15, 17), (224, 7)):  # maps of 1x1 and of odd sizes are not taken for (B, H, W, C)
        assert frskd.Adapter(net, "023", torch.randn(1, 1, *size)).channels == [4, 6, 6]


LAST = nn.Sequential(nn.AvgPool2d(4), torchvision.ops.Permute([0, 2, 3, 1]), nn.Linear(3, 24), nn.Flatten())


@pytest.mark.parametrize(
    "net, blocks, error, message",
    [
        (nn.Sequential(LAST[0], LAST[0]), ["0"], ValueError, r"\['0'\] ran \['0', '0'\]: name each once"),
        (plain(), ["conv"], ValueError, r"^there is no block conv; the network has 0 4x32x48, 1 4x32x48, 2.0 6x16x24, .*, 5 5$"),
        (plain(), ["2", "0"], ValueError, r"\['2', '0'\] ran \['0', '2'\]: name each once, in this order"),
        (plain(), ["0", "5"], ValueError, r"the output of 5 is no \(B, C, H, W\) map"),
        (LAST, ["2"], ValueError, r"2 is \(B, H, W, C\): permute it, .*; the network has .*, 2 16x24x24, 3 9216$"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), ["0"], ValueError, "returns tuple, not a tensor"),
        (nn.DataParallel(plain()), ["module.0"], TypeError, "around the method, not the network"),
    ],
)
def test_adapter_refuses_in_words(net, blocks, error, message):
    """What is wrong, and the blocks that the network has, with their sizes."""
    with pytest.raises(error, match=message):
        frskd.Adapter(net, blocks, torch.randn(2, 3, 64, 96))
    assert net.training and not any(m._forward_hooks for m in net.modules())


def test_adapter_refuses_a_pass_in_which_a_block_did_not_run_or_has_no_gradient():
    net, x = plain(), batch()[0].requires_grad_()
    student = frskd.Adapter(net, ["0", "1"], x)
    net.forward = lambda x: net[2:](net[0](x))
    with pytest.raises(ValueError, match=r"of the blocks \['0', '1'\] ran \['0'\]: "):
        student.features(x)
    net.forward = lambda x: net[2:](checkpoint(lambda x: net[:2](x).relu(), x, use_reentrant=True))
    with pytest.raises(ValueError, match="0 has no gradient: checkpoint with use_reentrant=False"):
        student.features(x)


def test_timm_gives_the_last_maps_of_forward_intermediates():
    """At its default size, or an example's; a network that is more, or less, than its functions is refused."""
    timm = pytest.importorskip("timm")
    net, x = timm.create_model("test_resnet", num_classes=5), torch.randn(2, 3, 64, 64)
    student = frskd.Timm(net)
    assert student.channels == [32, 48, 192, 96] and net.training and net.bn1.num_batches_tracked == 0
    logits, feats = student.eval().features(x)
    assert_close([logits, student(x), net.forward_head(feats[-1])], [net(x)] * 3)
    assert frskd.export(student) is net and frskd.Timm(net, 1, x).channels == [96]
    with pytest.raises(ValueError, match=r"ResNet has no maps 9 .*"):
        frskd.Timm(net, 9)
    with pytest.raises(ValueError, match="Sequential has no maps 4 .*: .*forward_intermediates"):
        frskd.Timm(plain(), example=x)
    net.forward = lambda x: net.forward_head(net.forward_features(x)) + 1
    with pytest.raises(ValueError, match="ResNet is more than forward_intermediates, forward_head: take Adapter"):
        frskd.Timm(net)


# ------------------------------------------------------------------------------------------- The file, copied alone
def test_frskd_py_knows_no_option_file_device_or_seed_and_prints_only_as_main():
    """Nothing but torch and torchvision is imported; fvcore inside the cost report alone."""
    source = SOURCE.read_text(encoding="utf-8")
    imports = set(re.findall(r"^( *)(?:import|from) (\w+)", source, re.M))
    everywhere = ("torch", "torchvision", "contextlib", "functools", "warnings")
    assert imports == {("", name) for name in everywhere} | {("    ", "fvcore")}
    *module, main = ast.parse(source).body
    calls = [node.func for part in module for node in ast.walk(part) if isinstance(node, ast.Call)]
    called = {ast.unparse(call).split(".")[-1] for call in calls}
    assert not called & {"print", "open", "cuda", "manual_seed", "ArgumentParser", "save", "load", "read_text", "Path"}
    assert ast.unparse(main).startswith("if __name__ == '__main__':")
