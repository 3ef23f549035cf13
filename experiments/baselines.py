"""What the FRSKD paper compares with, under the protocol of frskd.FRSKD: the methods of Tables 1, 2 and 7, and the
feature losses of Tables 5 and 7.

    method = BYOT(student, num_classes=100)                       # student: resnet18, wrn16_2, ... of frskd.py
    terms, logits = method(images, labels)                        # weighted scalars; (B, 100), detached

In the order of the paper's Sec. 2:

    teacher              Distillation      KD with FitNet, attention transfer or overhaul distillation (Table 7)
    auxiliary networks   BYOT, ONE         classifiers on shallow blocks; copies of the last stage
    attention            SAD               each block imitates the attention of the next
    other views          DDGSD, CSKD       two views of an image; another image of its class
                         SLASD             four rotations, labels of class and rotation

CE is cross-entropy, mean over the batch; KD_T(z, t) frskd.soft_label_distillation: T^2 KL(softmax(t / T) ||
softmax(z / T)), t detached; z logits, F_1..F_n maps, h means of maps over positions. alpha weights soft labels, beta
features; defaults are each method's own. Sources: (P) the method's paper, (O) its authors' code, (U) another's code,
where neither of these decides. Costs: of a training step over plain cross-entropy, multiply-adds of convolutions and
linear layers, WRN-16-2 / ResNet-18 at 32 px; at test time each is the plain network.

`pairs` says what a method wants beside each image, "view", another augmentation of it, or "class", an image of its
class; x is then (2 B, 3, H, W), the images, then what goes with them, and y (B,).
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import frskd
from frskd import conv_bn_relu, full_precision, pooled, soft_label_distillation


def cross_entropy(logits, y):
    """Mean over the batch, in float32: logits (B, C), y class indices (B,) or soft labels (B, C) -> scalar."""
    return F.cross_entropy(full_precision(logits), y)


def he_initialized(conv):
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Method(nn.Module):
    """method(x, y): x (B, 3, H, W), y (B,) or soft (B, C) -> terms, logits (B, C); method(x): the student's logits."""

    pairs = None

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, x, y=None):
        return self.student(x) if y is None else self.loss(x, y)


class Baseline(Method):
    """Plain cross-entropy: no teacher, and `ce` is the only term."""

    def __init__(self, student, num_classes=None):
        super().__init__(student)

    def loss(self, x, y):
        logits = self.student(x)
        return {"ce": cross_entropy(logits, y)}, logits.detach()


# ------------------------------------------------------------------------------ feature losses (Tables 5 and 7)


class FitNet(nn.Module):
    """Fit+SKD: sum over blocks of the mean over all elements of (regressor_i(F_i) - T_i)^2.
    A regressor, 1x1 convolution c_i -> d_i, batch norm and ReLU, trains with the student. n maps (B, c_i, H_i, W_i) and
    (B, d_i, H_i, W_i), activated, the teacher's detached -> scalar. Source: Table 5; FitNets, the paper's [26].
    Paper vs code: the paper does not say what a regressor is, nor its beta; the regressors are the authors'.
    """

    def __init__(self, channels, dims):
        super().__init__()
        self.regressors = nn.ModuleList(conv_bn_relu(c, d) for c, d in zip(channels, dims, strict=True))
        for conv, *_ in self.regressors:
            he_initialized(conv)

    def forward(self, feats, feats_t):
        triples = zip(self.regressors, feats, feats_t, strict=True)
        return sum(F.mse_loss(full_precision(r(f)), full_precision(t.detach())) for r, f, t in triples)


class Hint(FitNet):
    """FitNets' hint: of the second of the maps alone.
    Source: FitNets (P) has one hint in the middle of the network; after the second stage, trained along, with weight
    100 in RepDistiller (U). Paper vs code: (P) trains the hint first, alone.
    """

    def __init__(self, channels, dims):
        super().__init__(channels[1:2], dims[1:2])

    def forward(self, feats, feats_t):
        return super().forward(feats[1:2], feats_t[1:2])


def margin(gamma, beta):
    """E[v | v < 0] of the values v of a channel behind batch norm, taken as normal: mean beta, deviation |gamma|.
    m - s exp(-(m / s)^2 / 2) / (sqrt(2 pi) Phi(-m / s)) with m = beta, s = |gamma|, Phi the normal distribution; -3 s
    where less than a thousandth is negative. (C,), (C,) -> (C,), detached. Source: overhaul distillation, [8].
    """
    s, m = gamma.detach().abs().clamp_min(1e-12), beta.detach()
    negative = torch.special.ndtr(-m / s)  # share of the values below zero
    mean = m - s * torch.exp(-((m / s) ** 2) / 2) / ((2 * torch.pi) ** 0.5 * negative.clamp_min(1e-3))
    return torch.where(negative > 1e-3, mean, -3 * s)


def partial_l2(feat, target):
    """Sum of (feat - target)^2 except where feat <= target <= 0, divided by the batch: two (B, C, H, W) -> scalar.
    The target is detached. Source: overhaul distillation, the paper's [8].
    """
    feat, target = full_precision(feat), full_precision(target.detach())
    counts = (feat > target) | (target > 0)
    return ((feat - target) ** 2 * counts).sum() / len(feat)


def watch(net):
    """The maps of a network before their ReLU: n batch norms, and n lists that its passes in training add a map to.
    The norms are those that make the maps, of a ResNet those in front of a stage's last sum.
    """
    if isinstance(net, frskd.SelfTeacher):
        norms = [net.top_down[0].conv[-1], *(node.conv[-1] for node in net.bottom_up[1:])]
    elif isinstance(net, frskd.WideResNet):
        norms = [net.layer2[0].bn1, net.layer3[0].bn1, net.bn]
    elif isinstance(net, frskd.ResNet):
        norms = [stage[-1].bn2 for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
    else:
        raise ValueError(f"overhaul distillation needs maps before their ReLU, which {type(net).__name__} hides")

    lists = [[] for _ in norms]
    for i, (norm, maps) in enumerate(zip(norms, lists)):

        def keep(module, args, out, maps=maps):
            if module.training:
                maps[:] = [*maps[-1:], out]  # of two passes at most, as FRSKD+SLA has before its loss

        if isinstance(net, frskd.ResNet):
            block, latest = getattr(net, f"layer{i + 1}")[-1], {}

            def before(relu, args, latest=latest):  # no module's output: called twice, in place, the second on the sum
                latest["map"] = args[0].clone() if relu.training else None

            block.relu.register_forward_pre_hook(before)
            block.register_forward_hook(lambda m, a, _, keep=keep, latest=latest: keep(m, a, latest.pop("map")))
        else:
            norm.register_forward_hook(keep)
    return norms, lists


class Overhaul(nn.Module):
    """OD+SKD: 1e-3 sum over blocks of 2^(i - n) partial_l2(connector_i(F_i), max(T_i, margin)), of both networks' maps
    before their ReLU, which hooks keep: what passed since the loss was last computed, as many images as it is given.

    A connector, 1x1 convolution c_i -> d_i and batch norm, trains with the student. The margin of a channel comes from
    the batch norm that makes T_i, as it is at this step. feats, feats_t as FitNet. ValueError for networks that are
    not of frskd.py. Source: Table 5; overhaul distillation, the paper's [8], with its 1e-3 for CIFAR.
    Paper vs code: the authors take the margins once, from untrained batch norms (always -0.798), and omit the 1e-3.
    """

    def __init__(self, student, teacher):
        super().__init__()
        (_, self.maps), (self.norms, self.maps_t) = watch(student), watch(teacher)  # lists: no modules of the loss
        if len(self.maps) != len(self.maps_t):
            raise ValueError(f"the student has {len(self.maps)} maps, the teacher {len(self.maps_t)}")
        pairs = [(c, norm.num_features) for c, norm in zip(student.channels, self.norms)]  # c_i, d_i
        connectors = ([he_initialized(nn.Conv2d(c, d, 1, bias=False)), nn.BatchNorm2d(d)] for c, d in pairs)
        self.connectors = nn.ModuleList(nn.Sequential(*connector) for connector in connectors)

    def forward(self, feats, feats_t):
        loss, n = 0, len(self.norms)
        levels = zip(self.connectors, self.norms, self.maps, self.maps_t)
        for i, (connector, norm, maps, maps_t) in enumerate(levels, 1):
            f, t = (torch.cat(m)[-len(feats[0]) :] for m in (maps, maps_t))
            lowest = margin(norm.weight, norm.bias).view(1, -1, 1, 1)  # (1, d_i, 1, 1)
            loss = loss + 2.0 ** (i - n) * partial_l2(connector(f), torch.maximum(full_precision(t), lowest))
            maps.clear(), maps_t.clear()
        return 1e-3 * loss


# ----------------------------------------------------------------- knowledge distillation from a pretrained teacher


class Distillation(Method):
    """KD from a pretrained teacher, with a feature loss or without: CE(z) + alpha KD_T(z, z_t) + beta L_F.
    teacher: a trained network, frozen here; with a feature loss one that has `features`, with maps of the student's
    number and sizes. feature_loss: Hint (FitNet, beta 100), frskd.attention_transfer (ATT, beta 1000), Overhaul
    (beta 1), which trains along; None is soft labels alone. The teacher runs in evaluation mode, under Overhaul in
    training mode, as its authors do (their Table 8): its running statistics drift, and its soft labels are of the same
    pass.

    Terms `ce`, `kd`, `feat`. ValueError for a feature loss without beta. Costs 1 + a third of the teacher's cost over
    the student's, ResNet-34 to ResNet-18: 1.70. Source: Table 7, "feature distillation as well as the soft label";
    weights of the feature losses: their own (O; FitNet RepDistiller's, U). Paper vs code: the paper names no weight;
    alpha = 1 as in FRSKD's objective, where RepDistiller has 0.1 CE + 0.9 KD_4, and overhaul distillation (O) no soft
    label, and on ImageNet a tenth of the weight that it has on CIFAR, which is ours everywhere.
    """

    def __init__(self, student, teacher, *, alpha=1.0, beta=0.0, temperature=4.0, feature_loss=None):
        super().__init__(student)
        if feature_loss and beta <= 0:
            raise ValueError("a feature loss needs its weight, a beta above 0")
        self.teacher, self.feature_loss = teacher.requires_grad_(False), feature_loss
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.teacher.train(mode and isinstance(self.feature_loss, Overhaul))
        return self

    def loss(self, x, y):
        if self.feature_loss:
            logits, feats = self.student.features(x)
            with torch.no_grad():
                logits_t, feats_t = self.teacher.features(x)
        else:
            logits = self.student(x)
            with torch.no_grad():
                logits_t = self.teacher(x)
        terms = {"ce": cross_entropy(logits, y)}
        if self.alpha > 0:
            terms["kd"] = self.alpha * soft_label_distillation(logits, logits_t, self.temperature)
        if self.feature_loss:
            terms["feat"] = self.beta * self.feature_loss(feats, feats_t)
        return terms, logits.detach()


# --------------------------------------------------------------------------------------------- auxiliary networks


def check_levels(student):
    if len(student.channels) < 2:
        raise ValueError("one map is too few: shallow blocks learn from the deepest")


def bottleneck(c_in, c_out, k):
    """1x1 to a quarter of c_out, k x k of stride k, 1x1 to c_out, each with batch norm and ReLU, He fan-out:
    (B, c_in, H, W) -> (B, c_out, H // k, W // k)."""
    layers = []
    for a, b, size in ((c_in, c_out // 4, 1), (c_out // 4, c_out // 4, k), (c_out // 4, c_out, 1)):
        layers += [he_initialized(nn.Conv2d(a, b, size, stride=size)), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class BYOT(Method):
    """Be Your Own Teacher (the paper's [40]): a classifier on each shallow block learns from the deepest one.
    (1 - alpha) (CE(z_n) + sum_i CE(z_i)) + alpha sum_i KD_3(z_i, z_n) + beta sum_i sum over batch and channels of
    (h_i - h_n)^2, i = 1..n-1. h_i is the mean over positions of a bottleneck on F_i with k = H_i // H_n, z_i a linear
    layer on it. z_n and h_n are detached where they teach. image_size: a pass of one such image measures the maps.

    Terms `ce`, `ce_aux` (of the shallow classifiers), `kd`, `feat`. ValueError for fewer than two maps. Costs
    1.03 / 1.07. Paper vs code: three versions differ in heads and weights; this is the one usually compared with (U,
    luanyunteng's), which scales the deepest cross-entropy too, and for KD_3 has T^2 times the cross-entropy of soft
    labels: larger by the targets' entropy, of the same gradient. Its unused downsampling layers are left out.
    """

    def __init__(self, student, num_classes, *, alpha=0.1, beta=1e-6, temperature=3.0, image_size=32):
        super().__init__(student)
        check_levels(student)
        if alpha >= 1:
            raise ValueError(f"alpha {alpha}: cross-entropy is weighted by 1 - alpha, so below 1")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        with frskd.evaluation_mode(student), torch.no_grad():
            image = torch.zeros(1, 3, image_size, image_size).to(next(student.parameters()))
            _, feats = student.features(image)
        *shallow, deepest = student.channels
        *sides, last = (f.shape[-1] for f in feats)
        self.necks = nn.ModuleList(bottleneck(c, deepest, side // last) for c, side in zip(shallow, sides))
        self.heads = nn.ModuleList(nn.Linear(deepest, num_classes) for _ in shallow)

    def loss(self, x, y):
        logits, feats = self.student.features(x)
        h = [pooled(neck(f)) for neck, f in zip(self.necks, feats)]  # n - 1 times (B, c_n)
        z = [head(h_i) for head, h_i in zip(self.heads, h)]
        h_n = full_precision(pooled(feats[-1])).detach()
        terms = {
            "ce": (1 - self.alpha) * cross_entropy(logits, y),
            "ce_aux": (1 - self.alpha) * sum(cross_entropy(z_i, y) for z_i in z),
            "kd": self.alpha * sum(soft_label_distillation(z_i, logits, self.temperature) for z_i in z),
            "feat": self.beta * sum((full_precision(h_i) - h_n).pow(2).sum() for h_i in h),
        }
        return terms, logits.detach()


def fresh_last_stage(student):
    """A copy of the last stage and the classifier, initialised anew: F_{n-1} (B, c_{n-1}, H, W) -> logits (B, C)."""
    if isinstance(student, frskd.ResNet):
        stage = copy.deepcopy(student.layer4)
    elif isinstance(student, frskd.WideResNet):
        stage = nn.Sequential(*copy.deepcopy(student.layer3), copy.deepcopy(student.bn), nn.ReLU())
        stage[0].bn1 = nn.Identity()  # F_{n-1} comes from behind it
    else:
        raise ValueError(f"where the last stage of {type(student).__name__} begins is not known")
    branch = nn.Sequential(stage, nn.AdaptiveAvgPool2d(1), nn.Flatten(), copy.deepcopy(student.fc))
    for module in branch.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d):
            he_initialized(module)
    return branch


class ONE(Method):
    """On-the-fly Native Ensemble (the paper's [44]): branches of the last stage learn from their gated ensemble.
    sum_k CE(z_k) + CE(z_e) + alpha r(epoch) sum_k KD_3(z_k, z_e), z_e = sum_k g_k z_k. The m = 3 branches are copies
    of the last stage and the classifier, of which the student's own is the first; the gate g, one weight an image and
    branch, is softmax(relu(batch norm(linear(mean over positions of F_{n-1})))). z_e is detached where it teaches.
    r(e) = exp(-5 (1 - e / 80)^2), e < 80 counted from 0, then 1 (`set_epoch`; 1 without).

    Terms `ce` of the student, `ce_aux` of the other branches, `ce_e`, `kd`. ValueError for a student that is neither
    ResNet nor WideResNet of frskd.py. Costs 1.66 / 1.48. Source: (O), whose 1e-7 on the target probabilities is left
    out. Paper vs code: which of its networks FRSKD's paper evaluates is not said; a single branch costs what the others
    cost. The rise is (O)'s 80 epochs, of 300 there, whatever --epochs is.
    """

    def __init__(self, student, num_classes, *, alpha=1.0, temperature=3.0, branches=3, rise=80):
        super().__init__(student)
        self.alpha, self.temperature, self.rise = alpha, temperature, rise
        self.branches = nn.ModuleList(fresh_last_stage(student) for _ in range(branches - 1))
        gate = [nn.Linear(student.channels[-2], branches), nn.BatchNorm1d(branches), nn.ReLU(), nn.Softmax(dim=1)]
        self.gate = nn.Sequential(*gate)
        self.register_buffer("share", torch.ones(()), persistent=False)  # a tensor: compiled code reads it anew

    def set_epoch(self, epoch, epochs):
        self.share.fill_(math.exp(-5 * (1 - min(1, epoch / self.rise)) ** 2))

    def loss(self, x, y):
        logits, feats = self.student.features(x)
        z = torch.stack([logits, *(branch(feats[-2]) for branch in self.branches)], 1)  # (B, m, C)
        z_e = (self.gate(pooled(feats[-2]))[..., None] * z).sum(1)  # (B, C)
        kd = sum(soft_label_distillation(z_k, z_e, self.temperature) for z_k in z.unbind(1))
        terms = {
            "ce": cross_entropy(logits, y),
            "ce_aux": sum(cross_entropy(z_k, y) for z_k in z.unbind(1)[1:]),
            "ce_e": cross_entropy(z_e, y),
            "kd": self.alpha * self.share * kd,
        }
        return terms, logits.detach()


# ---------------------------------------------------------------------------------------------------- attention


def spatial_attention(feat, size):
    """Psi of SAD: sum over channels of the squares, resized, softmax over positions: (B, C, h, w) -> (B, H * W)."""
    energy = full_precision(feat).pow(2).sum(1, keepdim=True)
    return frskd.resize(energy, size).flatten(1).softmax(1)


class SAD(Method):
    """Self Attention Distillation (the paper's [10]): each block imitates the attention of the next.
    CE(z) + beta sum_{i<n} mean over batch and positions of (Psi(F_i) - Psi(F_{i+1}))^2, both at the size of F_i;
    Psi(F_{i+1}) is detached. The sum begins after two thirds of the epochs, in the last one at the latest (`set_epoch`;
    without, at once).

    Terms `ce`, `feat` (once it has begun). ValueError for fewer than two maps. Costs 1.00 / 1.00. Maps sum to 1, so
    the term is tiny. Paper vs code: the published code has no such loss; this is (P)'s formula as (U, InhwanBae's) has
    it: square, then resize, then softmax, weight 0.1, from iteration 40,000 of 60,000. There the target is not
    detached, elsewhere (U, Self-KD-Lib's, weight 1000 from the first epoch) it is, and here: the deeper block is the
    one to be imitated.
    """

    def __init__(self, student, num_classes=None, *, beta=0.1, start=2 / 3):
        super().__init__(student)
        check_levels(student)
        self.beta, self.start, self.distils = beta, start, True

    def set_epoch(self, epoch, epochs):
        self.distils = epoch >= min(self.start * epochs, epochs - 1)

    def loss(self, x, y):
        logits, feats = self.student.features(x)
        terms = {"ce": cross_entropy(logits, y)}
        if self.distils:
            terms["feat"] = 0
            for f, deeper in zip(feats, feats[1:]):
                target = spatial_attention(deeper, f.shape[-2:]).detach()
                terms["feat"] += self.beta * F.mse_loss(spatial_attention(f, f.shape[-2:]), target)
        return terms, logits.detach()


# --------------------------------------------------------------------------------------------------- other views


def maximum_mean_discrepancy(h_a, h_b):
    """With a linear kernel: sum over channels of the squared difference of the means: two (B, C) -> scalar."""
    return (h_a.mean(0) - h_b.mean(0)).pow(2).sum()


class DDGSD(Method):
    """Data-Distortion Guided Self-Distillation (the paper's [32]): two views of an image agree.
    CE(z_a) + CE(z_b) + alpha (KD_3(z_a, z_b) + KD_3(z_b, z_a)) + beta MMD(h_a, h_b), h of F_n. Each KD has its target
    detached, MMD none. Both views pass in one batch, so they share the statistics of batch norm.

    Terms `ce` of both views, `kd`, `feat`; logits of the views a. Costs 2.00 / 2.00. Paper vs code: there is no
    official code, and both others depart (means over classes; a scalar in place of MMD; CE halved twice), so this is
    (P)'s formula with the weights 1 and 5e-4 that both have; T = 3 is one's (U, youngerous'), the other has 4. Views
    are two draws of the same crop and flip.
    """

    pairs = "view"

    def __init__(self, student, num_classes=None, *, alpha=1.0, beta=5e-4, temperature=3.0):
        super().__init__(student)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def loss(self, x, y):
        logits, feats = self.student.features(x)
        (z_a, z_b), (h_a, h_b) = logits.chunk(2), full_precision(pooled(feats[-1])).chunk(2)
        kd = soft_label_distillation(z_a, z_b, self.temperature) + soft_label_distillation(z_b, z_a, self.temperature)
        terms = {
            "ce": cross_entropy(z_a, y) + cross_entropy(z_b, y),
            "kd": self.alpha * kd,
            "feat": self.beta * maximum_mean_discrepancy(h_a, h_b),
        }
        return terms, z_a.detach()


class CSKD(Method):
    """Class-wise Self-Knowledge Distillation (the paper's [36]): an image agrees with another of its class.
    CE(z(x)) + alpha KD_4(z(x), z(x')), x' drawn uniformly from the class of x (it may be x). x' passes without gradient
    in a second pass, in training mode: with statistics of its own, which enter the running ones too.

    Terms `ce`, `kd`. Costs 1.33 / 1.33. Source: (O); alpha = 1 on CIFAR-100, 3 on fine-grained sets. Paper vs code:
    alpha on TinyImageNet and ImageNet is not published; train.py has 1 up to 64 px and 3 above. (O) lowers the learning
    rate an epoch later and reports the best epoch.
    """

    pairs = "class"

    def __init__(self, student, num_classes=None, *, alpha=1.0, temperature=4.0):
        super().__init__(student)
        self.alpha, self.temperature = alpha, temperature

    def loss(self, x, y):
        x, partners = x.chunk(2)
        logits = self.student(x)
        with torch.no_grad():
            logits_t = self.student(partners)
        kd = soft_label_distillation(logits, logits_t, self.temperature)
        return {"ce": cross_entropy(logits, y), "kd": self.alpha * kd}, logits.detach()


class SLASD(Method):
    """SLA-SD, Self-supervised Label Augmentation with self-distillation (the paper's [18]).
    CE(joint head on the four rotations, labels 4 y + r), mean over 4 B, + CE(z) + alpha KD_1(z, g), where g is the
    mean of the four views' logits (frskd.aggregate), detached. All 4 B views pass in one batch; z are the plain head's
    logits of the upright ones. Both heads read the mean over positions of F_n.

    x square, y class indices. Terms `ce`, `ce_joint`, `kd`; the plain head is evaluated, on one view. Costs
    4.00 / 4.00. Source: (O), without its option that multiplies the joint loss by 4 on ImageNet.
    """

    def __init__(self, student, num_classes, *, alpha=1.0, temperature=1.0):
        super().__init__(student)
        self.alpha, self.temperature = alpha, temperature
        self.joint = nn.Linear(student.channels[-1], 4 * num_classes)

    def loss(self, x, y):
        logits, feats = self.student.features(frskd.rotations(x))
        logits, joint = logits[::4], full_precision(self.joint(pooled(feats[-1])))  # (B, C), (4 B, 4 C)
        terms = {
            "ce": cross_entropy(logits, y),
            "ce_joint": cross_entropy(joint, frskd.joint_labels(y)),
            "kd": self.alpha * soft_label_distillation(logits, frskd.aggregate(joint), self.temperature),
        }
        return terms, logits.detach()
