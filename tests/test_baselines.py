"""The methods and feature losses that the paper compares with, term by term."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import frskd
from experiments import baselines
from frskd import attention_transfer, soft_label_distillation


def setting(rows=4, size=16, build=lambda: frskd.WideResNet(10, 1, 5)):
    """A student, `rows` images and the labels of four."""
    torch.manual_seed(0)
    return build(), torch.randn(rows, 3, size, size), torch.randint(5, (4,))


def gradients(module, loss):
    """Names of the parameters of a module that a loss reaches with a gradient that is not zero."""
    module.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def parts(module, loss):
    """{"student.fc", "student.layer1", "heads", ...}."""
    names = (name.split(".") for name in gradients(module, loss))
    return {".".join(name[: 2 if name[0] == "student" else 1]) for name in names}


BLOCKS = {"student.conv1", "student.layer1", "student.layer2", "student.layer3", "student.bn"}
METHODS = {
    "baseline": lambda student, **kwargs: baselines.Baseline(student),
    "one": lambda student, **kwargs: baselines.ONE(student, 5, **kwargs),
    "byot": lambda student, **kwargs: baselines.BYOT(student, 5, **kwargs),
    "sad": lambda student, **kwargs: baselines.SAD(student, **kwargs),
    "ddgsd": lambda student, **kwargs: baselines.DDGSD(student, **kwargs),
    "cskd": lambda student, **kwargs: baselines.CSKD(student, **kwargs),
    "slasd": lambda student, **kwargs: baselines.SLASD(student, 5, **kwargs),
    "kd": lambda student, **kwargs: baselines.Distillation(student, frskd.WideResNet(10, 2, 5), **kwargs),
}


# ------------------------------------------------------------------------------------------- what all have in common
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_all_that_it_adds_and_returns_the_students_logits(name):
    """Scalars in float32, under autocast too; method(x) is the student; the images are the first half of a pair."""
    student, x, y = setting(8 if name in ("ddgsd", "cskd") else 4)
    method = METHODS[name](student)
    assert method.pairs == {"ddgsd": "view", "cskd": "class"}.get(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {term.dtype for term in method(x, y)[0].values()} == {torch.float32}
    terms, logits = method(x, y)
    assert logits.shape == (4, 5) and not logits.requires_grad and all(term.ndim == 0 for term in terms.values())
    silent = {"gate.0.bias"} | {f"necks.{i}.{k}.bias" for i in range(2) for k in (0, 3, 6)}  # batch norm follows
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert trained - gradients(method, sum(terms.values())) <= silent
    assert_close(method.eval()(x), student.eval()(x))


@pytest.mark.parametrize("name", set(METHODS) - {"slasd", "cskd"})
def test_methods_take_soft_labels(name):
    """Of Mixup and CutMix: a one-hot label gives the terms of the class index."""
    student, x, y = setting(8 if name == "ddgsd" else 4)
    method = METHODS[name](student).eval()
    assert_close(method(x, y)[0], method(x, F.one_hot(y, 5).float())[0])


# ---------------------------------------------------------------------------------------- FitNet (Tables 5 and 7)
def test_fitnet_is_the_mean_over_all_elements_summed_over_blocks():
    """(regressor_i(F_i) - T_i)^2, T_i detached; regressors are 1x1 convolution, batch norm, ReLU, He fan-out."""
    torch.manual_seed(0)
    loss, hint = baselines.FitNet([3, 5], [60, 100]), baselines.Hint([3, 5, 7], [6, 10, 14])
    feats = [torch.rand(4, c, s, s) for c, s in ((3, 8), (5, 4))]
    feats_t = [torch.rand(4, c, s, s, requires_grad=True) for c, s in ((60, 8), (100, 4))]
    regressed = [F.relu(bn(F.conv2d(f, conv.weight))) for (conv, bn, _), f in zip(loss.regressors, feats)]
    assert_close(loss(feats, feats_t), sum((r - t).pow(2).sum() / t.numel() for r, t in zip(regressed, feats_t)))
    assert torch.autograd.grad(loss(feats, feats_t), feats_t, allow_unused=True) == (None, None)
    for conv, *_ in loss.regressors:
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / conv.out_channels), rel=0.15)
    ((conv, bn, _),), second = hint.regressors, torch.rand(4, 10, 4, 4)  # FitNets' hint: the second maps alone
    assert_close(hint([None, feats[1], None], [None, second, None]), F.mse_loss(bn(conv(feats[1])).relu(), second))


# ----------------------------------------------------------------------------------------- Overhaul (Tables 5 and 7)
def test_margin_of_overhaul_distillation_by_hand():
    """E[v | v < 0] of a normal channel; -3 |gamma| where almost nothing is negative."""
    gamma, beta = torch.tensor([[1, 0], [1, 1], [0.5, -0.2], [-1, 0], [1, 4], [0, -1], [0, 0]]).T
    values = [-0.797885, -0.525135, -0.480941, -0.797885, -3, -1, 0]
    assert baselines.margin(gamma, beta).tolist() == pytest.approx(values, abs=1e-6)


def test_partial_l2_by_hand():
    """Nothing to learn where the student is below a target that is not positive; a sum over all but the batch."""
    student, teacher = torch.tensor([1.0, -1, -0.5, -2, 0.5]), torch.tensor([0.5, -2, -0.2, -0.3, -0.1])
    target = teacher.clamp_min(-0.797885)
    values = [baselines.partial_l2(s.view(1, 1, 1, 1), t.view(1, 1, 1, 1)).item() for s, t in zip(student, target)]
    assert values == pytest.approx([0.25, 0, 0, 0, 0.36], abs=1e-6)
    assert baselines.partial_l2(torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)).item() == 12


def before_relu(net, x):
    """Block by block: the maps of a network before their ReLU, and the batch norms that they come from."""
    if isinstance(net, frskd.SelfTeacher):
        nodes, maps = [net.top_down[0], *net.bottom_up[1:]], []
        hooks = [n.register_forward_hook(lambda n, args, out: maps.append(n.conv(n.fuse(args)))) for n in nodes]
        net(x), [hook.remove() for hook in hooks]
        return maps, [n.conv[-1] for n in nodes]
    if isinstance(net, frskd.WideResNet):
        norms, maps, x = [net.layer2[0].bn1, net.layer3[0].bn1, net.bn], [], net.conv1(x)
        for stage, norm in zip((net.layer1, net.layer2, net.layer3), norms):
            x = stage(x)
            maps.append(norm(x))
        return maps, norms
    maps, x, stages = [], net.maxpool(net.bn1(net.conv1(x)).relu()), (net.layer1, net.layer2, net.layer3, net.layer4)
    for stage in stages:
        for block in stage:
            out = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
            out = out + (x if block.downsample is None else block.downsample(x))
            x = out.relu()
        maps.append(out)
    return maps, [stage[-1].bn2 for stage in stages]


def overhaul(loss, maps, maps_t, norms):
    """1e-3 sum_i 2^(i - n) partial_l2(connector_i(F_i), max(T_i, margin))."""
    levels = []
    for (conv, bn), f, t, norm in zip(loss.connectors, maps, maps_t, norms, strict=True):
        f, t = bn(F.conv2d(f, conv.weight)), torch.maximum(t, baselines.margin(norm.weight, norm.bias)[:, None, None])
        levels.append(((f - t) ** 2)[(f > t) | (t > 0)].sum() / len(f))
    return 1e-3 * sum(level / 2**i for i, level in enumerate(reversed(levels)))


def resnet(*layers):
    return frskd.ResNet(layers, 5, "cifar")


@pytest.mark.parametrize(
    "cls, student, teacher",
    [
        (frskd.FRSKD, lambda: frskd.WideResNet(16, 1, 5), None),
        (frskd.FRSKDSLA, lambda: frskd.WideResNet(10, 1, 5), None),
        (frskd.FRSKDSLA, lambda: resnet(1, 1, 1, 1), None),
        (baselines.Distillation, lambda: frskd.WideResNet(10, 1, 5), lambda: frskd.WideResNet(16, 2, 5)),
        (baselines.Distillation, lambda: resnet(2, 1, 1, 1), lambda: resnet(1, 1, 1, 2)),
    ],
)
def test_overhaul_distils_the_maps_before_their_relu(cls, student, teacher):
    """Of students, self-teacher and trained teachers; margins follow the batch norms as they train; under SLA the maps
    of image and views are joined; evaluation and drawing leave no map behind; the teacher is no part of the loss."""
    student, x, y = setting(build=student)
    teacher = teacher() if teacher else frskd.BiFPNc(student.channels, 5)
    twin, twin_t = copy.deepcopy(student), copy.deepcopy(teacher)  # without the loss's hooks
    loss = baselines.Overhaul(student, teacher)
    method = cls(student, teacher, beta=2, feature_loss=loss).train()
    norms = before_relu(twin_t, twin.features(x)[1] if cls is not baselines.Distillation else x)[1]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.5, 0.5)
    teacher.load_state_dict(twin_t.state_dict())
    method.eval()(x), student.features(x), method.train()
    assert not any(loss.maps + loss.maps_t)
    for rows in (3, 2):
        terms, _ = method(x[:rows], y[:rows])
        passes = [x[:rows], frskd.rotations(x[:rows])] if cls is frskd.FRSKDSLA else [x[:rows]]
        maps = [before_relu(twin, images)[0] for images in passes]
        reads = passes if cls is baselines.Distillation else [twin.features(images)[1] for images in passes]
        maps_t = [before_relu(twin_t, images)[0] for images in reads]
        maps, maps_t = ([torch.cat(level) for level in zip(*sides)] for sides in (maps, maps_t))
        assert all((m < 0).any() for m in maps + maps_t)
        assert_close(terms["feat"], 2 * overhaul(loss, maps, maps_t, norms), rtol=1e-4, atol=1e-6)
        assert not any(loss.maps + loss.maps_t)
    names = gradients(method, terms["feat"])
    assert "student.conv1.weight" in names and not any(name.startswith("teacher") for name in names)
    assert {f"feature_loss.{name}" for name, _ in loss.named_parameters()} <= names
    assert {name.split(".")[0] for name in loss.state_dict()} == {"connectors"}
    for conv, _ in loss.connectors[1:]:
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / conv.out_channels), rel=0.1)


def test_overhaul_refuses_networks_that_hide_their_maps_or_have_another_number():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = frskd.Adapter(net, ["0"], torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="before their ReLU, which Adapter hides"):
        baselines.Overhaul(student, frskd.BiFPNc([4], 5))
    with pytest.raises(ValueError, match="the student has 3 maps, the teacher 4"):
        baselines.Overhaul(frskd.WideResNet(10, 1, 5), resnet(1, 1, 1, 1))


@pytest.mark.parametrize("build", [baselines.FitNet, baselines.Overhaul])
def test_feature_losses_that_train_along_are_float32_under_autocast(build):
    student, x, y = setting()
    teacher = frskd.BiFPNc(student.channels, 5)
    loss = build(student, teacher) if build is baselines.Overhaul else build(student.channels, teacher.dims)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, _ = frskd.FRSKDSLA(student, teacher, feature_loss=loss)(x, y)
        wide = baselines.partial_l2(torch.full((1, 1, 2, 2), 1.01).bfloat16(), torch.ones(1, 1, 2, 2).bfloat16())
    assert {term.dtype for term in terms.values()} == {torch.float32} == {wide.dtype}


# ------------------------------------------------------------------------------------------ Distillation (Table 7)
@pytest.mark.parametrize("feature", [None, "at", "hint"])
def test_terms_of_distillation_written_out(feature):
    """CE + alpha KD_4 + beta L_F; the teacher is at rest, its own statistics, and gets no gradient."""
    student, x, y = setting()
    teacher = frskd.WideResNet(16, 2, 5)
    for _ in range(3):
        teacher(torch.randn(8, 3, 16, 16))
    loss = {"at": attention_transfer, "hint": baselines.Hint(student.channels, teacher.channels)}.get(feature)
    method = baselines.Distillation(student, teacher, alpha=2, beta=3 * bool(loss), feature_loss=loss).train()
    before = copy.deepcopy(teacher.state_dict())
    terms, logits = method(x, y)
    (z, feats), (z_t, feats_t) = student.features(x), copy.deepcopy(teacher).eval().features(x)
    expected = {"ce": F.cross_entropy(z, y), "kd": 2 * soft_label_distillation(z, z_t, 4)}
    assert_close(terms, expected | ({"feat": 3 * loss(feats, feats_t)} if loss else {}))
    assert torch.equal(logits, z) and all(torch.equal(before[n], t) for n, t in teacher.state_dict().items())
    assert not any(name.startswith("teacher") for name in gradients(method, sum(terms.values())))
    assert list(baselines.Distillation(student, teacher, alpha=0)(x, y)[0]) == ["ce"]
    with pytest.raises(ValueError, match="a feature loss needs its weight"):
        baselines.Distillation(student, teacher, feature_loss=attention_transfer)


# -------------------------------------------------------------------------------------------------- BYOT and ONE
def test_terms_of_byot_written_out():
    """(1 - alpha) scales all cross-entropies; features are summed over batch and channels; the deepest teaches."""
    student, x, y = setting()
    method = baselines.BYOT(student, 5, alpha=0.3, beta=0.01)
    z_n, feats = student.features(x)
    maps = [neck(f) for neck, f in zip(method.necks, feats)]
    assert [m.shape for m in maps] == [feats[-1].shape] * 2
    h, h_n = [m.mean((2, 3)) for m in maps], feats[-1].mean((2, 3))
    z = [head(h_i) for head, h_i in zip(method.heads, h)]
    terms, logits = method(x, y)
    expected = {
        "ce": 0.7 * F.cross_entropy(z_n, y),
        "ce_aux": 0.7 * (F.cross_entropy(z[0], y) + F.cross_entropy(z[1], y)),
        "kd": 0.3 * sum(soft_label_distillation(z_i, z_n, 3) for z_i in z),
        "feat": 0.01 * sum(((h_i - h_n) ** 2).sum() for h_i in h),
    }
    assert_close(terms, expected)
    assert torch.equal(logits, z_n)
    assert_close(baselines.BYOT(student, 5)(x, y)[0]["ce"], 0.9 * F.cross_entropy(z_n, y))
    for name in ("kd", "feat"):
        assert parts(method, terms[name]) - {"heads"} == BLOCKS - {"student.bn"} | {"necks"}
        assert not any("layer3.0.conv" in n for n in gradients(method, terms[name]))  # F_2 needs its first norm alone
    with pytest.raises(ValueError, match="below 1"):
        baselines.BYOT(student, 5, alpha=1)


def test_bottlenecks_of_byot():
    """1x1 to a quarter, k x k of stride k, 1x1, each with batch norm, ReLU and He fan-out; to the last map's size."""
    torch.manual_seed(0)
    conv1, bn1, _, conv2, bn2, _, conv3, bn3, _ = neck = baselines.bottleneck(40, 160, 3)
    x = torch.randn(2, 40, 9, 9)
    assert [tuple(c.weight.shape) for c in (conv1, conv2, conv3)] == [(40, 40, 1, 1), (40, 40, 3, 3), (160, 40, 1, 1)]
    assert_close(neck(x), bn3(conv3(bn2(F.conv2d(bn1(conv1(x)).relu(), conv2.weight, conv2.bias, 3)).relu())).relu())
    for c in (conv1, conv2, conv3):
        assert c.weight.std().item() == pytest.approx(math.sqrt(2 / (c.out_channels * c.kernel_size[0] ** 2)), rel=0.1)
    student = resnet(1, 1, 1, 1)
    method = baselines.BYOT(student, 5, image_size=33)  # maps of 33, 17, 9, 5
    assert [neck[3].kernel_size[0] for neck in method.necks] == [6, 3, 1] and student.training


def test_terms_of_one_written_out():
    """z_e = sum_k g_k z_k, g = softmax(relu(bn(linear(mean of F_{n-1})))); z_e teaches, and trains the gate by CE."""
    student, x, y = setting()
    method = baselines.ONE(student, 5, alpha=2)
    nn.init.uniform_(method.gate[1].weight, 0.5, 2)
    z1, feats = student.features(x)
    z2, z3 = (branch(feats[1]) for branch in method.branches)
    gate = F.softmax(F.relu(method.gate[1](method.gate[0](feats[1].mean((2, 3))))), 1)
    z_e = gate[:, :1] * z1 + gate[:, 1:2] * z2 + gate[:, 2:] * z3
    terms, logits = method(x, y)
    expected = {
        "ce": F.cross_entropy(z1, y),
        "ce_aux": F.cross_entropy(z2, y) + F.cross_entropy(z3, y),
        "ce_e": F.cross_entropy(z_e, y),
        "kd": 2 * sum(soft_label_distillation(z, z_e, 3) for z in (z1, z2, z3)),
    }
    assert_close(terms, expected)
    assert torch.equal(logits, z1) and gate.std(0).min() > 0.01
    trains = {name: parts(method, terms[name]) for name in terms}
    assert "gate" in trains["ce_e"] and not any("gate" in trains[name] for name in ("ce", "ce_aux", "kd"))
    assert trains["kd"] == BLOCKS | {"student.fc", "branches"} and "branches" not in trains["ce"]
    assert "student.layer2" in trains["ce_aux"] and not {"student.fc", "student.bn"} & trains["ce_aux"]
    shares = []
    for epoch in (0, 20, 40, 80, 150):
        method.set_epoch(epoch, 200)
        shares.append((method(x, y)[0]["kd"] / terms["kd"]).item())
    assert shares == pytest.approx([0.006738, 0.060055, 0.286505, 1, 1], abs=1e-4)


@pytest.mark.parametrize("build", [lambda: resnet(1, 1, 1, 2), lambda: frskd.WideResNet(16, 2, 5)])
def test_branches_of_one_are_the_last_stage_initialised_anew(build):
    """With the student's weights a branch gives the student's logits; it starts from others, He fan-out."""
    student, x, _ = setting(build=build)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2)
    logits, feats = student.features(x)
    branch = baselines.fresh_last_stage(student)
    wide, leaves = isinstance(student, frskd.WideResNet), lambda net: [m for m in net.modules() if m._parameters]
    own = leaves(nn.ModuleList([student.layer3, student.bn, student.fc] if wide else [student.layer4, student.fc]))
    for module, twin in zip(leaves(branch), own[wide:], strict=True):  # F_{n-1} is behind a WRN's first batch norm
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            assert module.weight.std().item() == pytest.approx(std, rel=0.1)
        assert isinstance(module, nn.BatchNorm2d) == bool((module.weight == 1).all())
        assert (module.weight != twin.weight).any()
        module.load_state_dict(twin.state_dict())
    assert_close(branch(feats[-2]), logits)
    with pytest.raises(ValueError, match="where the last stage of Linear begins is not known"):
        baselines.fresh_last_stage(nn.Linear(3, 5))


# ---------------------------------------------------------------------------------- SAD, DDGSD, CS-KD and SLA-SD
def test_attention_of_sad_by_hand():
    """Square, sum over channels, then resize, then softmax; resizing first would give 0.00627947."""
    f1, f2 = (torch.arange(16.0) / 8).view(1, 1, 4, 4), torch.tensor([[1.0, 0], [0, 2]]).view(1, 1, 2, 2)
    psi1, psi2 = (baselines.spatial_attention(f, (4, 4)) for f in (f1, f2))
    assert F.mse_loss(psi1, psi2).item() == pytest.approx(0.00268099, abs=1e-8)
    twice = baselines.spatial_attention(f2.repeat(1, 2, 1, 1), (2, 2))
    assert_close(twice, F.softmax(torch.tensor([[2.0, 0, 0, 8]]), 1))


def test_terms_of_sad_written_out():
    """Each block imitates the next, which is a target, from two thirds of the epochs, or in the last one."""
    student, x, y = setting()
    method, psi = baselines.SAD(student, beta=7), baselines.spatial_attention
    z, feats = student.features(x)
    expected = sum(F.mse_loss(psi(a, a.shape[-2:]), psi(b, a.shape[-2:])) for a, b in zip(feats, feats[1:]))
    terms, logits = method(x, y)
    assert_close(terms, {"ce": F.cross_entropy(z, y), "feat": 7 * expected})
    assert torch.equal(logits, z)
    names = gradients(method, terms["feat"])
    assert "student.layer3.0.bn1.weight" in names  # makes F_2; F_3 is a target only
    assert not any(name.startswith(("student.layer3.0.conv", "student.bn")) for name in names)
    began = []
    for epoch, epochs in [*((e, 9) for e in range(9)), (0, 1)]:
        method.set_epoch(epoch, epochs)
        began.append("feat" in method(x, y)[0])
    assert began == [False] * 6 + [True] * 4
    with pytest.raises(ValueError, match="one map is too few"):
        student.channels = [64]
        baselines.SAD(student)


def test_terms_of_ddgsd_written_out():
    """Both views in one batch; KD both ways, each with the other as its target; MMD, by hand, has none."""
    student, x, y = setting(8)
    method = baselines.DDGSD(student, alpha=2, beta=3)
    z, feats = student.features(x)
    h = feats[-1].mean((2, 3))
    terms, logits = method(x, y)
    both = [soft_label_distillation(z[:4], z[4:], 3), soft_label_distillation(z[4:], z[:4], 3)]
    expected = {"ce": F.cross_entropy(z[:4], y) + F.cross_entropy(z[4:], y), "kd": 2 * sum(both)}
    expected["feat"] = 3 * (h[:4].mean(0) - h[4:].mean(0)).pow(2).sum()
    assert_close(terms, expected)
    assert torch.equal(logits, z[:4])
    for name in ("kd", "feat"):
        first = student.conv1.weight
        ours, written = (torch.autograd.grad(t[name], first, retain_graph=True) for t in (terms, expected))
        assert_close(ours, written)
    a, b = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [2, 0]])
    assert baselines.maximum_mean_discrepancy(a, b).item() == 2.5  # 1.5^2 + 0.5^2, of the means over images


def test_terms_of_cs_kd_written_out():
    """The partner teaches without gradient, in a pass with statistics of its own, which enter the running ones."""
    student, x, y = setting(8)
    method = baselines.CSKD(student, alpha=3)
    terms, logits = method(x.requires_grad_(), y)
    assert student.bn.num_batches_tracked == 2
    z, z_t = student(x[:4]), student(x[4:])
    assert_close(terms, {"ce": F.cross_entropy(z, y), "kd": 3 * soft_label_distillation(z, z_t, 4)})
    (gradient,) = torch.autograd.grad(sum(terms.values()), x)
    assert torch.equal(logits, z) and gradient[:4].abs().sum() > 0 and gradient[4:].abs().sum() == 0


def test_terms_of_sla_sd_written_out():
    """One pass of the 4 B views; the plain head is read on the upright ones; T = 1; the aggregate is a target."""
    student, x, y = setting()
    method = baselines.SLASD(student, 5, alpha=2)
    z, feats = student.features(frskd.rotations(x))
    joint, upright = method.joint(feats[-1].mean((2, 3))), z[[0, 4, 8, 12]]
    labels = torch.tensor([4 * int(label) + r for label in y for r in range(4)])
    expected = {"ce": F.cross_entropy(upright, y), "ce_joint": F.cross_entropy(joint, labels)}
    terms, logits = method(x, y)
    expected["kd"] = 2 * soft_label_distillation(upright, frskd.aggregate(joint), 1)
    assert_close(terms, expected)
    assert torch.equal(logits, upright) and parts(method, terms["kd"]) == BLOCKS | {"student.fc"}
    assert parts(method, terms["ce_joint"]) == BLOCKS | {"joint"}
