"""The methods that the FRSKD paper compares with (Tables 1, 2 and 7), under the protocol of frskd.FRSKD.

    method = BYOT(student, num_classes=100)                       # student: resnet18, wrn16_2, ... of frskd.py
    terms, logits = method(images, labels)                        # weighted scalars; (B, 100), detached
    sum(terms.values()).backward()                                # one optimiser over method.parameters()

A companion to the paper's Sec. 2, in its order, one class each:

    teacher              Distillation      KD with FitNet, attention transfer or overhaul distillation (Table 7)
    auxiliary networks   BYOT, ONE         classifiers on shallow blocks; copies of the last stage
    attention            SAD               each block imitates the attention of the next
    other views          DDGSD, CSKD       two views of an image; another image of its class
                         SLASD             four rotations, labels of class and rotation

CE is cross-entropy, mean over the batch. KD_T(z, t) is frskd.soft_label_distillation: T^2 KL(softmax(t / T) ||
softmax(z / T)), sum over classes, mean over the batch, t detached. z are a network's logits, F_1..F_n its maps, h means
of maps over positions. alpha weights soft labels, beta features; the defaults are each method's own. Sources: (P) the
paper of the method, (O) its authors' code, (U) another's code, where neither of these decides.

Costs are of a training step against plain cross-entropy, counted in multiply-adds of convolutions and linear layers,
a backward pass as two forward ones: WRN-16-2 / ResNet-18 at 32 px. At test time each is the plain network.

`pairs` says what a method wants from the loader beside each image: "view", another augmentation of it, or "class", an
image of its class. x is then (2 B, 3, H, W), the B images and what goes with them, and y (B,).
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import frskd
from frskd import full_precision, soft_label_distillation


def cross_entropy(logits, y):
    """Mean over the batch, in float32: logits (B, C), y class indices (B,) or soft labels (B, C) -> scalar."""
    return F.cross_entropy(full_precision(logits), y)


def pooled(feat):
    """Mean over positions: (B, C, H, W) -> (B, C)."""
    return feat.mean((2, 3))


def check_levels(student):
    """Raises ValueError for a student of one map, where there is no shallower one to teach."""
    if len(student.channels) < 2:
        raise ValueError("one map is too few: shallow blocks learn from the deepest")


# ------------------------------------------------------------------------ knowledge distillation from a teacher


class Hint(frskd.FitNet):
    """FitNets' hint: the mean over all elements of (regressor(F_2) - T_2)^2, of the second of the maps alone.

    Source: FitNets (P) has one hint in the middle of the network; after the second stage, trained along, with weight
    100 in RepDistiller (U), whose convolution has a bias: batch norm takes it away. Shapes and errors as frskd.FitNet.
    Paper vs code: (P) trains the hint first, alone.
    """

    def __init__(self, channels, dims):
        super().__init__(channels[1:2], dims[1:2])

    def forward(self, feats, feats_t):
        return super().forward(feats[1:2], feats_t[1:2])


class Distillation(nn.Module):
    """KD from a pretrained teacher, with a feature loss or without: CE(z) + alpha KD_T(z, z_t) + beta L_F.

    teacher: a trained network, frozen here; with a feature loss one that has `features`, as many maps as the student
    and of the same sizes. feature_loss: (feats, feats_t) -> scalar, such as Hint (FitNet, beta 100),
    frskd.attention_transfer (ATT, beta 1000), frskd.Overhaul (beta 1), which trains along; None is soft labels alone.
    The teacher gets no gradient. It runs at rest (batch norm by its running statistics, no dropout), but under
    Overhaul in training mode, with the statistics of the batch, as its authors do (their Table 8): its running
    statistics drift, and its soft labels are of the same pass.

    forward: x (B, 3, H, W), y (B,) or soft (B, C) -> terms `ce`, `kd`, `feat`, weighted; logits (B, C), detached.
    Raises ValueError where the numbers of maps differ, for maps of other sizes, for Overhaul on an Adapter, and
    for a feature loss without beta.
    Source: Table 7, "feature distillation as well as the soft label"; the weights of the feature losses are their own
    (O; FitNet RepDistiller's, U). Paper vs code: the paper names no weight; alpha = 1 as in FRSKD's objective, where
    RepDistiller has 0.1 CE + 0.9 KD_4, and overhaul distillation (O) has no soft label, and on ImageNet a tenth of the
    weight that it has on CIFAR, which is ours everywhere.
    Costs 1 + a third of the teacher's cost over the student's, ResNet-34 to ResNet-18: 1.70.
    """

    def __init__(self, student, teacher, *, alpha=1.0, beta=0.0, temperature=4.0, feature_loss=None):
        super().__init__()
        self.preact = getattr(feature_loss, "preact", False)
        if feature_loss and beta <= 0:
            raise ValueError("a feature loss needs its weight, a beta above 0")
        if feature_loss and len(student.channels) != len(teacher.channels):
            raise ValueError(f"the student has {len(student.channels)} maps, the teacher {len(teacher.channels)}")
        if self.preact and isinstance(student, frskd.Adapter):
            raise ValueError("this feature loss compares maps before their ReLU, which an Adapter does not have")
        self.student, self.teacher, self.feature_loss = student, teacher.requires_grad_(False), feature_loss
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def train(self, mode=True):
        super().train(mode)
        self.teacher.train(mode and self.preact)
        return self

    def networks(self, x):
        """Student and teacher on x -> logits, logits_t, and of each the maps that the feature loss compares."""
        if self.feature_loss is None:
            with torch.no_grad():
                logits_t = self.teacher(x)
            return self.student(x), logits_t, [], []
        which = dict(preact=True) if self.preact else {}
        logits, *_, feats = self.student.features(x, **which)
        with torch.no_grad():
            logits_t, *_, feats_t = self.teacher.features(x, **which)
        return logits, logits_t, feats, feats_t

    def forward(self, x, y):
        logits, logits_t, feats, feats_t = self.networks(x)
        terms = {"ce": cross_entropy(logits, y)}
        if self.alpha > 0:
            terms["kd"] = self.alpha * soft_label_distillation(logits, logits_t, self.temperature)
        if self.feature_loss:
            terms["feat"] = self.beta * self.feature_loss(feats, feats_t)
        return terms, logits.detach()


# --------------------------------------------------------------------------------------------- auxiliary networks


class Bottleneck(nn.Sequential):
    """1x1 to a quarter of c_out, k x k of stride k, 1x1 to c_out, each with batch norm and ReLU.

    (B, c_in, H, W) -> (B, c_out, H // k, W // k).
    """

    def __init__(self, c_in, c_out, k):
        layers = []
        for a, b, size in ((c_in, c_out // 4, 1), (c_out // 4, c_out // 4, k), (c_out // 4, c_out, 1)):
            layers += [nn.Conv2d(a, b, size, stride=size), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class BYOT(nn.Module):
    """Be Your Own Teacher (the paper's [40]): a classifier on each shallow block learns from the deepest one.

    (1 - alpha) (CE(z_n) + sum_i CE(z_i)) + alpha sum_i KD_3(z_i, z_n) + beta sum_i sum over batch and channels of
    (h_i - h_n)^2, i = 1..n-1. h_i is the mean over positions of a Bottleneck on F_i with k = H_i // H_n, so that it
    ends at the size of F_n, or about it; z_i is a linear layer on h_i. z_n and h_n are detached where they teach: the
    auxiliary classifiers and the blocks below them learn from them.
    num_classes is that of the student; image_size: a pass of one such image, in evaluation mode, measures the maps.

    forward: x (B, 3, H, W), y (B,) or soft (B, C) -> terms `ce`, `ce_aux` (of the shallow classifiers), `kd`, `feat`,
    weighted; logits (B, C) of the deepest classifier, detached. Raises ValueError for fewer than two maps.
    Costs 1.03 / 1.07.
    Paper vs code: three versions differ in heads and weights; this is the one usually compared with (U, luanyunteng's:
    alpha 0.1, beta 1e-6, T = 3), which scales the deepest cross-entropy too. In place of KD_3 it has T^2 times
    the cross-entropy of soft labels: larger by the targets' entropy, of the same gradient. Its unused downsampling
    layers are left out.
    """

    def __init__(self, student, num_classes, *, alpha=0.1, beta=1e-6, temperature=3.0, image_size=32):
        super().__init__()
        check_levels(student)
        self.student, self.alpha, self.beta, self.temperature = student, alpha, beta, temperature
        with frskd.evaluation_mode(student), torch.no_grad():
            image = torch.zeros(1, 3, image_size, image_size).to(next(student.parameters()))
            _, feats = student.features(image)
        *shallow, deepest = student.channels
        *sides, last = (f.shape[-1] for f in feats)
        self.necks = nn.ModuleList(Bottleneck(c, deepest, side // last) for c, side in zip(shallow, sides))
        self.heads = nn.ModuleList(nn.Linear(deepest, num_classes) for _ in shallow)

    def forward(self, x, y):
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
    """A copy of the last stage and the classifier, initialised anew: F_{n-1} (B, c_{n-1}, H, W) -> logits (B, C).

    Of a ResNet or WideResNet of frskd.py; raises ValueError for another network.
    """
    if isinstance(student, frskd.ResNet):  # its blocks apply ReLU to their input: once more changes nothing
        stage = nn.Sequential(copy.deepcopy(student.layer4), nn.ReLU())
    elif isinstance(student, frskd.WideResNet):
        stage = nn.Sequential(*copy.deepcopy(student.layer3), copy.deepcopy(student.bn), nn.ReLU())
        stage[0].bn1 = nn.Identity()  # F_{n-1} comes from behind it
    else:
        raise ValueError(f"where the last stage of a {type(student).__name__} begins is not known")
    branch = nn.Sequential(stage, nn.AdaptiveAvgPool2d(1), nn.Flatten(), copy.deepcopy(student.fc))
    for module in branch.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d):
            frskd.he_initialized(module)
    return branch


class ONE(nn.Module):
    """On-the-fly Native Ensemble (the paper's [44]): branches of the last stage learn from their gated ensemble.

    sum_k CE(z_k) + CE(z_e) + alpha r(epoch) sum_k KD_3(z_k, z_e), z_e = sum_k g_k z_k. The m = 3 branches are copies
    of the last stage and the classifier, of which the student's own is the first; the gate g, one weight an image and
    branch, is softmax(relu(batch norm(linear(mean over positions of F_{n-1})))). z_e is detached where it teaches.
    r(e) = exp(-5 (1 - e / 80)^2), e < 80 counted from 0, then 1 (`set_epoch`; 1 without).

    forward: x (B, 3, H, W), y (B,) or soft (B, C) -> terms `ce` of the student, `ce_aux` of the other branches, `ce_e`,
    `kd`, weighted; logits (B, C) of the student, detached. Raises ValueError for a student that is neither ResNet nor
    WideResNet of frskd.py. Costs 1.66 / 1.48. Source: (O), whose 1e-7 on the target probabilities is left out.
    Paper vs code: which of its networks FRSKD's paper evaluates is not said; a single branch costs what the others
    cost. The rise is (O)'s 80 epochs, of 300 there, whatever --epochs is.
    """

    def __init__(self, student, num_classes, *, alpha=1.0, temperature=3.0, branches=3, ramp_epochs=80):
        super().__init__()
        self.student, self.alpha, self.temperature, self.ramp_epochs = student, alpha, temperature, ramp_epochs
        self.branches = nn.ModuleList(fresh_last_stage(student) for _ in range(branches - 1))
        self.gate = nn.Sequential(
            nn.Linear(student.channels[-2], branches), nn.BatchNorm1d(branches), nn.ReLU(), nn.Softmax(dim=1)
        )
        self.register_buffer("share", torch.ones(()), persistent=False)  # a tensor: compiled code reads it anew

    def set_epoch(self, epoch, epochs):
        self.share.fill_(math.exp(-5 * (1 - min(1, epoch / self.ramp_epochs)) ** 2))

    def forward(self, x, y):
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
    """Psi of SAD: sum over channels of the squares, resized to `size` (bilinear), softmax over positions.

    (B, C, h, w) -> (B, H * W), each row of sum 1.
    """
    energy = full_precision(feat).pow(2).sum(1, keepdim=True)
    return frskd.upsample(energy, size).flatten(1).softmax(1)


class SAD(nn.Module):
    """Self Attention Distillation (the paper's [10]): each block imitates the attention of the next.

    CE(z) + beta sum_{i<n} mean over batch and positions of (Psi(F_i) - Psi(F_{i+1}))^2, both at the size of F_i;
    Psi(F_{i+1}) is detached. The sum begins after two thirds of the epochs, in the last one at the latest (`set_epoch`;
    without, at once).

    forward: x (B, 3, H, W), y (B,) or soft (B, C) -> terms `ce`, `feat` (once it has begun), weighted; logits (B, C),
    detached. Raises ValueError for fewer than two maps. Costs 1.00 / 1.00. Both maps sum to 1, so the term is tiny.
    Paper vs code: the published code has no such loss; this is (P)'s formula as (U, InhwanBae's) has it: square,
    then resize, then softmax, weight 0.1, from iteration 40,000 of 60,000. There the target is not detached, elsewhere
    (U, Self-KD-Lib's, with weight 1000 from the first epoch) it is; here it is, since the deeper block is the one to
    be imitated.
    """

    def __init__(self, student, *, beta=0.1, start=2 / 3):
        super().__init__()
        check_levels(student)
        self.student, self.beta, self.start, self.distils = student, beta, start, True

    def set_epoch(self, epoch, epochs):
        self.distils = epoch >= min(self.start * epochs, epochs - 1)

    def forward(self, x, y):
        logits, feats = self.student.features(x)
        terms = {"ce": cross_entropy(logits, y)}
        if self.distils:
            loss = 0
            for f, deeper in zip(feats, feats[1:]):
                target = spatial_attention(deeper, f.shape[-2:]).detach()
                loss = loss + F.mse_loss(spatial_attention(f, f.shape[-2:]), target)
            terms["feat"] = self.beta * loss
        return terms, logits.detach()


# --------------------------------------------------------------------------------------------------- other views


class DDGSD(nn.Module):
    """Data-Distortion Guided Self-Distillation (the paper's [32]): two views of an image agree.

    CE(z_a) + CE(z_b) + alpha (KD_3(z_a, z_b) + KD_3(z_b, z_a)) + beta MMD, MMD = sum over channels of
    (mean over the batch of h_a - mean over the batch of h_b)^2, h = mean over positions of F_n. Each KD has its target
    detached, MMD none. Both views pass in one batch, so they share the statistics of batch norm.

    forward: x (2 B, 3, H, W), the views a, then the views b, y (B,) or soft (B, C) -> terms `ce` of both views, `kd`,
    `feat`, weighted; logits (B, C) of the views a, detached. Costs 2.00 / 2.00.
    Paper vs code: there is no official code, and both others depart (means over classes; a scalar in place of MMD; CE
    halved twice), so this is (P)'s formula with the weights 1 and 5e-4 that both have; T = 3 is one's (U, youngerous'),
    the other has 4. Views are two draws of the same crop and flip.
    """

    pairs = "view"

    def __init__(self, student, *, alpha=1.0, beta=5e-4, temperature=3.0):
        super().__init__()
        self.student, self.alpha, self.beta, self.temperature = student, alpha, beta, temperature

    def forward(self, x, y):
        logits, feats = self.student.features(x)
        (z_a, z_b), (h_a, h_b) = logits.chunk(2), full_precision(pooled(feats[-1])).chunk(2)
        kd = soft_label_distillation(z_a, z_b, self.temperature) + soft_label_distillation(z_b, z_a, self.temperature)
        terms = {
            "ce": cross_entropy(z_a, y) + cross_entropy(z_b, y),
            "kd": self.alpha * kd,
            "feat": self.beta * maximum_mean_discrepancy(h_a, h_b),
        }
        return terms, z_a.detach()


def maximum_mean_discrepancy(h_a, h_b):
    """With a linear kernel: sum over channels of the squared difference of the means: two (B, C) -> scalar."""
    return (h_a.mean(0) - h_b.mean(0)).pow(2).sum()


class CSKD(nn.Module):
    """Class-wise Self-Knowledge Distillation (the paper's [36]): an image agrees with another of its class.

    CE(z(x)) + alpha KD_4(z(x), z(x')), x' drawn uniformly from the class of x (it may be x). x' passes without gradient
    in a second pass, in training mode: with statistics of its own, which enter the running ones too.

    forward: x (2 B, 3, H, W), the images, then their partners, y (B,) -> terms `ce` and `kd`, weighted; logits (B, C)
    of the images, detached. Costs 1.33 / 1.33. Source: (O); alpha = 1 on CIFAR-100, 3 on fine-grained sets.
    Paper vs code: alpha on TinyImageNet and ImageNet is not published; here 1 up to 64 px and 3 above. (O) lowers the
    learning rate an epoch later and reports the best epoch.
    """

    pairs = "class"

    def __init__(self, student, *, alpha=1.0, temperature=4.0):
        super().__init__()
        self.student, self.alpha, self.temperature = student, alpha, temperature

    def forward(self, x, y):
        x, partners = x.chunk(2)
        logits = self.student(x)
        with torch.no_grad():
            logits_t = self.student(partners)
        kd = soft_label_distillation(logits, logits_t, self.temperature)
        return {"ce": cross_entropy(logits, y), "kd": self.alpha * kd}, logits.detach()


class SLASD(nn.Module):
    """SLA-SD, Self-supervised Label Augmentation with self-distillation (the paper's [18]).

    CE(joint head on the four rotations, labels 4 y + r), mean over 4 B, + CE(z) + alpha KD_1(z, g), where g is the
    mean of the four views' logits (frskd.aggregate), detached. All 4 B views pass in one batch; z are the plain head's
    logits of the upright ones. Both heads read the mean over positions of F_n.

    forward: x (B, 3, H, H), y (B,) class indices -> terms `ce`, `ce_joint`, `kd`, weighted; logits (B, C) of the plain
    head, detached, which is evaluated, on one view. Raises ValueError for soft labels and images that are not square.
    Costs 4.00 / 4.00. Source: (O), without its option that multiplies the joint loss by 4 on ImageNet.
    """

    def __init__(self, student, num_classes, *, alpha=1.0, temperature=1.0):
        super().__init__()
        self.student, self.alpha, self.temperature = student, alpha, temperature
        self.joint = nn.Linear(student.channels[-1], 4 * num_classes)

    def forward(self, x, y):
        y_joint = frskd.joint_labels(y)
        logits, feats = self.student.features(frskd.rotations(x))
        logits, joint = logits[::4], full_precision(self.joint(pooled(feats[-1])))  # (B, C), (4 B, 4 C)
        kd = soft_label_distillation(logits, frskd.aggregate(joint), self.temperature)
        terms = {
            "ce": cross_entropy(logits, y),
            "ce_joint": cross_entropy(joint, y_joint),
            "kd": self.alpha * kd,
        }
        return terms, logits.detach()
