"""FRSKD: Feature Refinement via Self-Knowledge Distillation (Ji et al., CVPR 2021, arXiv 2103.08273).

An auxiliary self-teacher, a BiFPN on the network's own feature maps, refines them and distils the refined
maps and its soft label back into the network. Both train together from scratch; afterwards the teacher is
thrown away and the plain network is what you deploy.

    student = resnet18(num_classes=100, stem="cifar")             # or Adapter(your_network, ["layer1", ...])
    method = FRSKD(student, BiFPNc(student.channels, num_classes=100, width=2), alpha=2, beta=100)
    terms, logits = method(images, labels)                        # (B, 3, H, W), (B,)
    sum(terms.values()).backward()                                # one optimiser over method.parameters()
    ...
    torch.save(export(student).state_dict(), "student.pt")        # the plain network, without the teacher

The paper's symbols, and what they are called here:

    f_c  student       the network to train         L_i  lateral     1x1 convolution of F_i
    f_t  teacher       the self-teacher             P_i  top_down    top-down path, deep to shallow
    F_i  feats         the student's n maps         T_i  bottom_up   bottom-up path; feats_t outside the teacher
    c_i  channels      channels of F_i              phi  attention_map
    d_i  dims          channels of L_i, P_i, T_i    K    temperature
    w    width         d_i = w * c_i                alpha, beta      weights of L_KD and L_F

Maps are listed shallow (i = 1, large) to deep (i = n, small). Contents, in the paper's order:

    Sec. 3.1   fused_sum, upsample, downsample, SelfTeacher, BiFPN, BiFPNc             Eq. 1, Eq. 2
    Sec. 3.2   attention_map, attention_transfer, soft_label_distillation             Eq. 3, Eq. 4
    Objective  FRSKD, Baseline                                                        Eq. 5
    Variants   FitNet, Overhaul (Table 5), FRSKDSLA (FRSKD+SLA)
    Students   ResNet, WideResNet, Adapter, export
    Cost       python frskd.py: Table 6 and the time of a training step
"""

from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

# ----------------------------------------------------------------------- Sec. 3.1: the self-teacher network


def fused_sum(weights, maps, eps=1e-4):
    """Fast normalised fusion: sum_k relu(w_k) / (sum_j relu(w_j) + eps) * maps[k].

    weights (K,), maps K tensors of one shape -> one map of that shape. Source: Sec. 3.1 and BiFPN (its [28]).
    Paper vs code: the paper gives no eps; 1e-4 is EfficientDet's, the authors' code has 1e-6.
    """
    weights = F.relu(weights)
    weights = (weights / (weights.sum() + eps)).to(maps[0].dtype)  # CUDA's autocast would make a bf16 sum float32
    fused = weights[0] * maps[0]
    for w, x in zip(weights[1:], maps[1:]):
        fused = torch.addcmul(fused, w, x)  # fused + w * x in one pass
    return fused


def upsample(x, size, mode="bilinear"):
    """Resize of the top-down path: (B, C, h, w) -> (B, C, *size). Source: Sec. 3.1, bilinear.

    Paper vs code: the authors' code takes mode="nearest".
    """
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode=mode, align_corners=False if mode == "bilinear" else None)


def downsample(x, size):
    """Resize of the bottom-up path: (B, C, h, w) -> (B, C, *size), max-pooling. Source: Sec. 3.1.

    3x3, stride 2, padding 1 gives the size that a stride-2 convolution gives, odd sizes included; where the
    next map has another size, adaptive max-pooling.
    Paper vs code: the authors' code pads at the bottom and the right only.
    """
    if x.shape[-2:] == size:
        return x
    if size == tuple((s + 1) // 2 for s in x.shape[-2:]):
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    return F.adaptive_max_pool2d(x, size)


class ConvBNReLU(nn.Sequential):
    """1x1 convolution without bias, batch norm, ReLU: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out):
        super().__init__(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class SeparableConv(nn.Sequential):
    """Conv of Eq. 2: `depth` times [3x3 depthwise, 1x1, batch norm], ReLU between, none at the end.

    (B, dim, H, W) -> (B, dim, H, W), before its ReLU. Source: Sec. 3.1.
    Paper vs code: the paper says "a depth-wise convolution"; only depth=2 gives the cost in Table 6.
    """

    def __init__(self, dim, depth=2):
        layers = []
        for _ in range(depth):
            layers += [
                nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
                nn.Conv2d(dim, dim, 1, bias=False),
                nn.BatchNorm2d(dim),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers[:-1])


class Upsample(nn.Module):
    """Resize(P_{i+1}) of Eq. 2, then d_{i+1} -> d_i by 1x1 convolution, batch norm and ReLU where they differ.

    A 1x1 convolution without bias commutes with interpolation, so it runs first, on a quarter of the positions;
    conv_first=False is the paper's order. Same function: batch norm and ReLU stay after the resize.
    """

    def __init__(self, d_in, d_out, mode="bilinear", conv_first=True):
        super().__init__()
        self.mode, self.conv_first = mode, conv_first
        self.conv = ConvBNReLU(d_in, d_out) if d_in != d_out else None

    def forward(self, x, size):
        if self.conv is None:
            return upsample(x, size, self.mode)
        if not self.conv_first:
            return self.conv(upsample(x, size, self.mode))
        conv, bn, relu = self.conv
        return relu(bn(upsample(conv(x), size, self.mode)))


class Downsample(nn.Module):
    """Resize(T_{i-1}) of Eq. 2, then d_{i-1} -> d_i by 1x1 convolution, batch norm and ReLU where they differ."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.conv = ConvBNReLU(d_in, d_out) if d_in != d_out else nn.Identity()

    def forward(self, x, size):
        return self.conv(downsample(x, size))


class SelfTeacher(nn.Module):
    """The self-teacher f_t: a top-down and a bottom-up path over the student's feature maps, and a classifier.

    L_i = ConvBNReLU(F_i)                                                        i = 1..n   Eq. 1
    P_n = L_n,  P_i = Conv(w1 L_i + w2 Resize(P_{i+1}))                          i = n-1..1 Eq. 2
    T_1 = P_1,  T_i = Conv(w1 L'_i + w2 P_i + w3 Resize(T_{i-1}))                i = 2..n   Eq. 2, T_n without P_n
    logits = Linear(mean over positions of T_n)

    P_i and T_i are before their ReLU; it is applied where they are consumed.
    Paper vs code: L'_i is a second set of lateral convolutions, as in EfficientDet. With one set for both paths
    the parameters of Table 6 would be x0.53, not x0.59.

    forward: feats, n maps (B, c_i, H_i, W_i) -> logits (B, num_classes), feats_t, n maps relu(T_i)
    (B, d_i, H_i, W_i); with preact=True also the n maps T_i. Raises ValueError where len(dims) != len(channels)
    or the number of maps is another.
    """

    def __init__(self, channels, dims, num_classes, *, depth=2, upsample_mode="bilinear", conv_first=True):
        super().__init__()
        if len(dims) != len(channels):
            raise ValueError(f"{len(channels)} feature maps need as many teacher widths, got {len(dims)}")
        n = len(channels)
        self.channels, self.dims = list(channels), list(dims)
        self.lateral = nn.ModuleList(ConvBNReLU(c, d) for c, d in zip(channels, dims))
        self.lateral2 = nn.ModuleList(ConvBNReLU(c, d) for c, d in zip(channels[1:], dims[1:]))
        self.up = nn.ModuleList(
            Upsample(deep, shallow, upsample_mode, conv_first) for shallow, deep in zip(dims, dims[1:])
        )
        self.down = nn.ModuleList(Downsample(shallow, deep) for shallow, deep in zip(dims, dims[1:]))
        self.top_down = nn.ModuleList(SeparableConv(d, depth) for d in dims[:-1])
        self.bottom_up = nn.ModuleList(SeparableConv(d, depth) for d in dims[1:])
        self.top_down_weights = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(n - 1))
        self.bottom_up_weights = nn.ParameterList(nn.Parameter(torch.ones(3 if i < n - 1 else 2)) for i in range(1, n))
        self.fc = nn.Linear(dims[-1], num_classes)

    @property
    def norms(self):
        """The n batch norms that make T_1..T_n, for Overhaul."""
        return [conv[-1] for conv in (self.top_down[0], *self.bottom_up)]

    def forward(self, feats, preact=False):
        n = len(self.dims)
        if len(feats) != n:
            raise ValueError(f"the self-teacher was built for {n} feature maps, got {len(feats)}")
        sizes = [f.shape[-2:] for f in feats]
        lateral = [layer(f) for layer, f in zip(self.lateral, feats)]  # Eq. 1, n maps (B, d_i, H_i, W_i)
        lateral2 = [layer(f) for layer, f in zip(self.lateral2, feats[1:])]  # Eq. 1 again, i = 2..n

        top_down = [None] * (n - 1) + [lateral[-1]]  # P_n = L_n
        for i in reversed(range(n - 1)):  # Eq. 2, P_i
            maps = [lateral[i], self.up[i](F.relu(top_down[i + 1]), sizes[i])]
            top_down[i] = self.top_down[i](fused_sum(self.top_down_weights[i], maps))

        bottom_up = [top_down[0]]  # T_1 = P_1
        feats_t = [F.relu(bottom_up[0])]
        for i in range(1, n):  # Eq. 2, T_i; T_n without P_n
            middle = [F.relu(top_down[i])] if i < n - 1 else []
            maps = [lateral2[i - 1], *middle, self.down[i - 1](feats_t[i - 1], sizes[i])]
            bottom_up.append(self.bottom_up[i - 1](fused_sum(self.bottom_up_weights[i - 1], maps)))
            feats_t.append(F.relu(bottom_up[i]))

        logits = self.fc(feats_t[-1].mean((2, 3)))  # (B, num_classes)
        return (logits, feats_t, bottom_up) if preact else (logits, feats_t)


def BiFPNc(channels, num_classes, width=2, **kwargs):
    """The paper's self-teacher: d_i = w * c_i, wider where the network is deeper (Sec. 3.1)."""
    return SelfTeacher(channels, [width * c for c in channels], num_classes, **kwargs)


def BiFPN(channels, num_classes, dim=256, **kwargs):
    """The self-teacher with one width for every level, as in EfficientDet (Table 6)."""
    return SelfTeacher(channels, [dim] * len(channels), num_classes, **kwargs)


# ------------------------------------------------------------------------ Sec. 3.2: self-feature distillation


def full_precision(x):
    """Half precision to float32, float32 and float64 as they are: losses are not computed in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_map(feat):
    """phi of Eq. 3: mean over channels of the squares, l2-normalised over the positions of an image.

    (B, C, H, W) -> (B, H * W). An all-zero map gives zeros. Source: attention transfer, the paper's [37].
    """
    return F.normalize(full_precision(feat).pow(2).mean(1).flatten(1), dim=1)


def check_sizes(feats, feats_t):
    """Raises ValueError unless student and teacher have as many maps, of the same sizes."""
    sizes, sizes_t = ([tuple(f.shape[-2:]) for f in maps] for maps in (feats, feats_t))
    if sizes != sizes_t:
        raise ValueError(f"the feature maps of student and teacher differ in size: {sizes} and {sizes_t}")


def attention_transfer(feats, feats_t):
    """L_F of Eq. 3: sum over blocks of the mean over batch and positions of (phi(T_i) - phi(F_i))^2.

    feats, feats_t: n maps of the student and of the teacher, (B, c_i, H_i, W_i) and (B, d_i, H_i, W_i) -> scalar.
    The teacher's maps are detached. Raises ValueError where the numbers of maps or the sizes differ.
    Paper vs code: Eq. 3 writes a norm, the authors' code takes this mean of squares; beta = 100 fits only this.
    """
    check_sizes(feats, feats_t)
    return sum(F.mse_loss(attention_map(f), attention_map(t.detach())) for f, t in zip(feats, feats_t))  # Eq. 3


def soft_label_distillation(logits, logits_t, temperature=4.0):
    """L_KD of Eq. 4: K^2 * KL(softmax(logits_t / K) || softmax(logits / K)), sum over classes, mean over the batch.

    logits, logits_t: student's and teacher's, (B, num_classes) -> scalar. The teacher's logits are detached.
    Paper vs code: Eq. 4 has the student first and no K^2; alpha = 2 and 3 fit only the code's form, which is this.
    """
    log_p = F.log_softmax(full_precision(logits) / temperature, dim=1)
    log_p_t = F.log_softmax(full_precision(logits_t.detach()) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_p_t, reduction="batchmean", log_target=True)  # Eq. 4


# ----------------------------------------------------------------------------------------- The objective, Eq. 5


class FRSKD(nn.Module):
    """L_CE(student) + L_CE(teacher) + alpha * L_KD + beta * L_F.   Eq. 5

    student: features(x) -> (logits, feats), teacher: a SelfTeacher on student.channels.
    alpha, beta (Sec. 4.1): 2, 100 CIFAR-100; 3, 100 TinyImageNet; 1, 200 fine-grained sets and ImageNet.
    beta=0 is FRSKD\\F of the paper: no feature loss is computed.
    feature_loss: (feats, feats_t) -> scalar; a module is trained along, see FitNet and Overhaul (Table 5).

    forward: x (B, 3, H, W), y class indices (B,) or soft labels (B, num_classes) ->
    terms, a dict of WEIGHTED scalars `ce`, `ce_t`, `kd`, `feat` whose plain sum is the loss; logits
    (B, num_classes), the student's, detached. Raises ValueError for a negative weight or temperature <= 0, and for
    Overhaul on an Adapter, which has no maps before their ReLU.

    L_KD and L_F reach the student only: their teacher side is detached inside the losses. The teacher's inputs
    are not detached, so its cross-entropy also trains the student: alpha = beta = 0 is not the baseline.
    """

    def __init__(self, student, teacher, *, alpha=2.0, beta=100.0, temperature=4.0, feature_loss=attention_transfer):
        super().__init__()
        if alpha < 0 or beta < 0 or temperature <= 0:
            raise ValueError(f"alpha {alpha}, beta {beta}: not negative; temperature {temperature}: above zero")
        self.student, self.teacher = student, teacher
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.feature_loss, self.preact = feature_loss, getattr(feature_loss, "preact", False)
        if self.preact and isinstance(student, Adapter):
            raise ValueError("this feature loss compares maps before their ReLU, which an Adapter does not have")

    def networks(self, x):
        """Student and self-teacher on x -> logits, logits_t, and of each the n maps that the feature loss compares."""
        if self.preact:
            logits, feats, pre = self.student.features(x, preact=True)
            logits_t, _, pre_t = self.teacher(feats, preact=True)
            return logits, logits_t, pre, pre_t
        logits, feats = self.student.features(x)
        logits_t, feats_t = self.teacher(feats)
        return logits, logits_t, feats, feats_t

    def forward(self, x, y):
        logits, logits_t, feats, feats_t = self.networks(x)
        terms = {  # Eq. 5
            "ce": F.cross_entropy(full_precision(logits), y),
            "ce_t": F.cross_entropy(full_precision(logits_t), y),
        }
        if self.alpha > 0:
            terms["kd"] = self.alpha * soft_label_distillation(logits, logits_t, self.temperature)
        if self.beta > 0:
            terms["feat"] = self.beta * self.feature_loss(feats, feats_t)
        return terms, logits.detach()


class Baseline(nn.Module):
    """Plain cross-entropy under the same protocol: no teacher, and `ce` is the only term."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, x, y):
        logits = self.student(x)
        return {"ce": F.cross_entropy(full_precision(logits), y)}, logits.detach()


# ------------------------------------------------------------------ Variants: other feature losses (Table 5), SLA


def he_initialized(conv):
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class FitNet(nn.Module):
    """L_F of Fit+SKD: sum over blocks of the mean over all elements of (regressor_i(F_i) - T_i)^2.

    A regressor is a 1x1 convolution c_i -> d_i without bias, batch norm and ReLU; it trains with the student.
    feats, feats_t: n maps (B, c_i, H_i, W_i) and (B, d_i, H_i, W_i), after their ReLU; the teacher's are detached.
    Raises ValueError where the numbers of maps or the sizes differ. Source: Table 5; FitNets, the paper's [26].
    Paper vs code: the paper does not say what a regressor is, nor its beta; the regressors are the authors'.
    """

    def __init__(self, channels, dims):
        super().__init__()
        self.regressors = nn.ModuleList(ConvBNReLU(c, d) for c, d in zip(channels, dims))
        for conv, *_ in self.regressors:
            he_initialized(conv)

    def forward(self, feats, feats_t):
        check_sizes(feats, feats_t)
        pairs = [(regressor(f), t.detach()) for regressor, f, t in zip(self.regressors, feats, feats_t)]
        return sum(F.mse_loss(full_precision(f), full_precision(t)) for f, t in pairs)


def margin(gamma, beta):
    """E[v | v < 0] of the values v of a channel behind batch norm, taken as normal: mean beta, deviation |gamma|.

    m - s * exp(-(m / s)^2 / 2) / (sqrt(2 pi) * Phi(-m / s)) with m = beta, s = |gamma|, Phi the normal distribution;
    -3 s where less than a thousandth of the values is negative. (C,), (C,) -> (C,), detached. Source: overhaul
    distillation, the paper's [8].
    """
    s, m = gamma.detach().abs().clamp_min(1e-12), beta.detach()
    negative = torch.special.ndtr(-m / s)  # share of the values below zero
    mean = m - s * torch.exp(-((m / s) ** 2) / 2) / ((2 * torch.pi) ** 0.5 * negative.clamp_min(1e-3))
    return torch.where(negative > 1e-3, mean, -3 * s)


def partial_l2(feat, target):
    """Sum of (feat - target)^2 except where feat <= target <= 0, over all elements, divided by the batch.

    Two (B, C, H, W) -> scalar; the target is detached. Source: overhaul distillation, the paper's [8].
    """
    feat, target = full_precision(feat), full_precision(target.detach())
    counts = (feat > target) | (target > 0)
    return ((feat - target) ** 2 * counts).sum() / len(feat)


class Overhaul(nn.Module):
    """L_F of OD+SKD: 1e-3 * sum over blocks of 2^(i - n) * partial_l2(connector_i(F_i), max(T_i, margin)).

    On maps before their ReLU, of both sides. A connector is a 1x1 convolution c_i -> d_i without bias and batch
    norm; it trains with the student. The margin of a channel comes from the batch norm that makes T_i, as it is at
    this step (norms: the `.norms` of a SelfTeacher, ResNet or WideResNet; their widths are the d_i).
    feats, feats_t: n maps (B, c_i, H_i, W_i) and (B, d_i, H_i, W_i); the teacher's are detached.
    Raises ValueError where the numbers of maps or the sizes differ. Source: Table 5; overhaul distillation, the
    paper's [8], with its 1e-3 for CIFAR.
    Paper vs code: the authors take the margins once, from untrained batch norms (always -0.798), and omit the 1e-3.
    """

    preact = True

    def __init__(self, channels, norms):
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Sequential(he_initialized(nn.Conv2d(c, d, 1, bias=False)), nn.BatchNorm2d(d))
            for c, d in zip(channels, [norm.num_features for norm in norms])
        )
        self.norms = list(norms)  # a list: they stay the teacher's

    def forward(self, feats, feats_t):
        check_sizes(feats, feats_t)
        loss, n = 0, len(self.norms)
        for i, (connector, norm, f, t) in enumerate(zip(self.connectors, self.norms, feats, feats_t), 1):
            lowest = margin(norm.weight, norm.bias).view(1, -1, 1, 1)  # (1, d_i, 1, 1)
            loss = loss + 2.0 ** (i - n) * partial_l2(connector(f), torch.maximum(full_precision(t), lowest))
        return 1e-3 * loss


def rotations(x):
    """Four quarter turns, counter-clockwise: (B, C, H, H) -> (4 B, C, H, H), the views of an image adjacent."""
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"quarter turns need square images, got {tuple(x.shape[-2:])}")
    views = torch.stack([torch.rot90(x, r, (2, 3)) for r in range(4)], 1).flatten(0, 1)
    return views.contiguous(memory_format=torch.channels_last)


def joint_labels(y):
    """Class and rotation as one label: (B,) -> (4 B,), 4 * y + r for the views r = 0..3 of an image.

    Raises ValueError for soft labels.
    """
    if y.ndim > 1:
        raise ValueError("the joint labels of class and rotation need class indices, not soft labels")
    return (4 * y[:, None] + torch.arange(4, device=y.device)).flatten()


def aggregate(joint):
    """Mean over r of the logit that view r has for (class, r): (4 B, 4 num_classes) -> (B, num_classes)."""
    joint = joint.view(len(joint) // 4, 4, -1, 4)  # image, view, class, rotation
    return joint.diagonal(dim1=1, dim2=3).mean(-1)


class FRSKDSLA(FRSKD):
    """FRSKD+SLA: FRSKD with self-supervised label augmentation (SLA-SD, the paper's [18]).

    A second head on each network tells class and rotation of an image at once, as 4 num_classes joint classes; the
    mean over the four views (`aggregate`) is a better soft label, and teaches the plain head. With z, g the plain and
    the aggregated logits of student (c) and teacher (t), V the rotated images:

      ce, ce_t              cross-entropy of z_c, z_t                                  mean over B
      ce_joint, ce_joint_t  cross-entropy of the joint heads on V                      mean over 4 B
      kd_joint, kd_joint_t  L_KD(z_c, g_c), L_KD(z_t, g_t), weighted by 1              g detached, mean over B
      kd                    alpha * L_KD([z_c; g_c], [z_t; g_t])                       teacher's detached, mean over 2 B
      feat                  beta * (L_F of the maps of x + 4 * L_F of those of V) / 5    teacher's detached

    (`feat` is, for attention transfer, L_F of the maps of all 5 B images together.)

    forward as FRSKD, x square, y class indices. The plain head is evaluated, on one view. Raises ValueError for soft
    labels and for images that are not square.
    Paper vs code: Sec. 4 has one sentence, "attaching" SLA-SD; all of this is the authors' code.
    """

    def __init__(self, student, teacher, **kwargs):
        super().__init__(student, teacher, **kwargs)
        num_classes = teacher.fc.out_features
        self.joint = nn.Linear(student.channels[-1], 4 * num_classes)
        self.joint_t = nn.Linear(teacher.dims[-1], 4 * num_classes)

    def joint_logits(self, head, feat):
        """The last map, after its ReLU, averaged over positions, through a joint head."""
        return full_precision(head((F.relu(feat) if self.preact else feat).mean((2, 3))))

    def forward(self, x, y):
        y_joint = joint_labels(y)
        logits, logits_t, feats, feats_t = self.networks(x)
        _, _, views, views_t = self.networks(rotations(x))  # maps of the 4 B views; the plain heads' logits unused
        joint, joint_t = self.joint_logits(self.joint, views[-1]), self.joint_logits(self.joint_t, views_t[-1])
        agg, agg_t = aggregate(joint), aggregate(joint_t)
        terms = {
            "ce": F.cross_entropy(full_precision(logits), y),
            "ce_t": F.cross_entropy(full_precision(logits_t), y),
            "ce_joint": F.cross_entropy(joint, y_joint),
            "ce_joint_t": F.cross_entropy(joint_t, y_joint),
            "kd_joint": soft_label_distillation(logits, agg, self.temperature),
            "kd_joint_t": soft_label_distillation(logits_t, agg_t, self.temperature),
        }
        if self.alpha > 0:
            both, both_t = torch.cat([logits, agg]), torch.cat([logits_t, agg_t])  # (2 B, num_classes)
            terms["kd"] = self.alpha * soft_label_distillation(both, both_t, self.temperature)
        if self.beta > 0:
            upright, turned = self.feature_loss(feats, feats_t), self.feature_loss(views, views_t)
            terms["feat"] = self.beta * (upright + 4 * turned) / 5
        return terms, logits.detach()


# -------------------------------------------------------------------------------------------------- The students


class BasicBlock(torchvision.models.resnet.BasicBlock):
    """torchvision's residual block, its ReLU moved from behind the sum to the input of whatever reads it.

    (B, c_in, H, W) -> (B, c_out, H / stride, W / stride), before its ReLU. Parameters and values are torchvision's.
    """

    def forward(self, x):
        x = F.relu(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet with its four stages' maps: same parameter names, same initialisation, same function.

    stem "imagenet" is torchvision's; "cifar" is a 3x3 convolution of stride 1 and no max-pooling (Sec. 4.1).
    forward: (B, 3, H, W) -> logits (B, num_classes); features: -> logits, feats, n = 4 maps (B, c_i, H_i, W_i)
    after their ReLU; with preact=True also the same maps before it.
    """

    channels = [64, 128, 256, 512]

    def __init__(self, layers, num_classes, stem="imagenet"):
        super().__init__(BasicBlock, layers, num_classes=num_classes)
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem is imagenet or cifar, got {stem}")
        if stem == "cifar":
            self.conv1 = he_initialized(nn.Conv2d(3, 64, 3, padding=1, bias=False))
            self.maxpool = nn.Identity()

    @property
    def norms(self):
        """The last batch norm of each stage, in front of its sum, for Overhaul."""
        return [stage[-1].bn2 for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]

    def features(self, x, preact=False):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        pre, feats = [], []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            pre.append(stage(x))
            x = F.relu(pre[-1])
            feats.append(x)
        logits = self.fc(torch.flatten(self.avgpool(x), 1))
        return (logits, feats, pre) if preact else (logits, feats)

    def forward(self, x):
        return self.features(x)[0]


def resnet18(num_classes, stem="imagenet"):
    """ResNet-18: 11,220,132 parameters at 100 classes with the CIFAR stem."""
    return ResNet([2, 2, 2, 2], num_classes, stem)


def resnet34(num_classes, stem="imagenet"):
    """ResNet-34: 21,328,292 parameters at 100 classes with the CIFAR stem."""
    return ResNet([3, 4, 6, 3], num_classes, stem)


class WideBlock(nn.Module):
    """Pre-activation block of a wide ResNet: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x):
        return self.branches(x, F.relu(self.bn1(x)))

    def branches(self, x, activated):
        """The sum of both branches, given the input and its activation relu(bn1(x))."""
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-widen (Zagoruyko and Komodakis, 2016): three stages of 16, 32, 64 times `widen` channels.

    F_i is the activated output of the batch norm that opens the next stage (for F_3, the last one): exactly what
    both branches of the next stage, or the classifier, read.
    Paper vs code: the authors' WRN lacks the blocks' first batch norms; this is the standard one.

    forward: (B, 3, H, W) -> logits (B, num_classes); features: -> logits, feats, n = 3 maps (B, c_i, H_i, W_i)
    after their ReLU; with preact=True also the same maps before it. Raises ValueError unless depth = 6 k + 4.
    """

    def __init__(self, depth, widen, num_classes):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen < 1:
            raise ValueError(
                f"a wide ResNet has depth 6 k + 4 (10, 16, 22, 28, 40) and width >= 1, got {depth}, {widen}"
            )
        self.channels = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        c_in = 16
        for i, c_out in enumerate(self.channels):
            strides = [1 if i == 0 else 2] + [1] * ((depth - 4) // 6 - 1)
            blocks = [WideBlock(c_in if k == 0 else c_out, c_out, stride) for k, stride in enumerate(strides)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = c_out
        self.bn = nn.BatchNorm2d(c_in)
        self.fc = nn.Linear(c_in, num_classes)
        for m in self.modules():  # torchvision's initialisation, as for ResNet
            if isinstance(m, nn.Conv2d):
                he_initialized(m)

    @property
    def norms(self):
        """The batch norms that make F_1..F_3 before their ReLU, for Overhaul."""
        return [self.layer2[0].bn1, self.layer3[0].bn1, self.bn]

    def features(self, x, preact=False):
        x = self.layer1(self.conv1(x))
        pre, feats = [], []
        for first, *blocks in (self.layer2, self.layer3):
            pre.append(first.bn1(x))
            feats.append(F.relu(pre[-1]))
            x = first.branches(x, feats[-1])
            for block in blocks:
                x = block(x)
        pre.append(self.bn(x))
        feats.append(F.relu(pre[-1]))
        logits = self.fc(feats[-1].mean((2, 3)))
        return (logits, feats, pre) if preact else (logits, feats)

    def forward(self, x):
        return self.features(x)[0]


def wrn16_2(num_classes):
    """WRN-16-2: 703,284 parameters at 100 classes."""
    return WideResNet(16, 2, num_classes)


@contextmanager
def evaluation_mode(net):
    """net.eval() inside; afterwards each module is in the mode in which it was, frozen batch norms too."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Adapter(nn.Module):
    """Gives any image classifier `features`, by the names of its blocks (as in net.named_modules()).

    F_i is the output of blocks[i] as it is, so name blocks whose output is what the next layer reads. One image
    of `image_size` pixels passes through at construction, in evaluation mode, to learn the channels.

    forward: x -> net(x); features: -> logits (B, num_classes), feats, len(blocks) maps (B, c_i, H_i, W_i).
    Raises ValueError for an unknown block, blocks not listed in the order in which the network runs them, one
    that it runs more or less than once, whose output is no (B, C, H, W) map, or that a later layer overwrites.
    """

    def __init__(self, net, blocks, image_size=224):
        super().__init__()
        modules = dict(net.named_modules())
        if not blocks or len(set(blocks)) < len(blocks):
            raise ValueError(f"name each block once, and at least one, got {list(blocks)}")
        for block in blocks:
            if not block or block not in modules:
                raise ValueError(f"no block named {block!r}; the network has {', '.join(outer_names(net))}")
        self.net, self.blocks = net, list(blocks)
        weight = next(net.parameters())
        with evaluation_mode(net), torch.no_grad():
            _, outputs = self.run(torch.zeros(1, 3, image_size, image_size).to(weight))
        ran = [block for block, _, _ in outputs]
        if ran != self.blocks:
            raise ValueError(f"the network runs these blocks as {ran}, not as {self.blocks}")
        for block, output, version in outputs:
            if not torch.is_tensor(output) or output.ndim != 4:
                raise ValueError(f"the output of block {block!r} is not a (B, C, H, W) map")
            if output._version != version:
                raise ValueError(f"a later layer overwrites the output of block {block!r}: name that layer instead")
        self.channels = [output.shape[1] for _, output, _ in outputs]

    def run(self, x):
        """net(x), and (block, output, the output's version) of each named block in the order in which they ran."""
        outputs = []

        def capture(block):
            return lambda module, args, output: outputs.append((block, output, getattr(output, "_version", 0)))

        handles = [self.net.get_submodule(block).register_forward_hook(capture(block)) for block in self.blocks]
        try:
            return self.net(x), outputs
        finally:
            for handle in handles:
                handle.remove()

    def features(self, x):
        logits, outputs = self.run(x)
        return logits, [output for _, output, _ in outputs]

    def forward(self, x):
        return self.net(x)


def outer_names(net):
    """Names of a network's modules two levels deep, for the message above: a full list runs to hundreds."""
    return [name for name, _ in net.named_modules() if name and name.count(".") <= 1]


def export(student):
    """The plain network, without what training added: what you deploy, and whose state_dict you save."""
    return student.net if isinstance(student, Adapter) else student


# ------------------------------------------------------------------------- Cost: what the self-teacher adds


def cost(module, *inputs):
    """Parameters and FLOPs of one forward pass, (int, float), in evaluation mode. Needs fvcore.

    A FLOP is a multiply-add, as fvcore and the paper count; convolutions, linear layers, batch norm, pooling and
    interpolation count, element-wise operations do not.
    """
    from fvcore.nn import FlopCountAnalysis

    with evaluation_mode(module):
        flops = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return sum(p.numel() for p in module.parameters()), flops.total()


def table6():
    """Cost of each self-teacher of Table 6 over its WRN-16-2 (32x32, 100 classes, batch of one).

    Returns a list of (type, deepest width, parameter ratio, FLOP ratio in the paper's order, as executed here).
    """
    student = wrn16_2(100).eval()
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        _, feats = student.features(x)
    params, flops = cost(student, x)
    rows = []
    for name, build, size in (
        ("BiFPN", BiFPN, 128), ("BiFPN", BiFPN, 256), ("BiFPNc", BiFPNc, 1), ("BiFPNc", BiFPNc, 2),
    ):  # fmt: skip
        params_t, flops_t = cost(build(student.channels, 100, size, conv_first=False), feats)
        _, executed = cost(build(student.channels, 100, size), feats)
        deepest = size * student.channels[-1] if build is BiFPNc else size
        rows.append((name, deepest, params_t / params, flops_t / flops, executed / flops))
    return rows


def training_step(method, batch_size=128, memory_format=torch.channels_last, amp=False, backend=None):
    """A function that trains once by SGD, on random images (batch_size, 3, 32, 32) of 100 classes.

    Twice as many images for a method with `pairs`. amp: bfloat16 autocast. backend: of torch.compile, None is eager.
    """
    device = next(method.parameters()).device
    method.to(memory_format=memory_format)
    rows = 2 * batch_size if getattr(method, "pairs", None) else batch_size
    x = torch.randn(rows, 3, 32, 32, device=device).to(memory_format=memory_format)
    y = torch.arange(batch_size, device=device) % 100
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=fused)
    forward = torch.compile(method, backend=backend) if backend else method

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            terms, _ = forward(x, y)
        sum(terms.values()).backward()
        optimizer.step()

    return step


def step_times(steps, rounds, repeat=1):
    """Median seconds of each function of {name: function}, interleaved so that a noisy machine hits all alike.

    A measurement is `repeat` calls, then, where there is one, a wait for the GPU.
    """
    import statistics
    import time

    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i > 0:
                seconds[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    paper = [(0.30, 0.67), (0.97, 2.38), (0.19, 0.21), (0.59, 0.68)]
    print("Table 6: the self-teacher over its WRN-16-2 (32x32, 100 classes); executed: 1x1 before upsampling\n")
    print("| type   | #channel | parameters (paper) | FLOPs (paper)  | FLOPs executed |")
    print("|--------|---------:|-------------------:|---------------:|---------------:|")
    for (name, channel, params, flops, executed), (p, f) in zip(table6(), paper):
        print(f"| {name:6} | {channel:8} | {params:9.3f} ({p:.2f})   | {flops:6.3f} ({f:.2f})  | {executed:14.3f} |")

    def frskd(**kwargs):
        student = wrn16_2(100)
        return FRSKD(student, BiFPNc(student.channels, 100, **kwargs))

    times = step_times(
        {
            "baseline": training_step(Baseline(wrn16_2(100))),
            "FRSKD": training_step(frskd()),
            "FRSKD, default layout, paper's order": training_step(
                frskd(conv_first=False), memory_format=torch.contiguous_format
            ),
        },
        rounds=10,
    )
    print("\nA training step, WRN-16-2, batch 128, float32, eager, CPU, median of 10 interleaved\n")
    for name, seconds in times.items():
        ratio = seconds / times["baseline"]
        print(f"{name:36} {seconds * 1e3:7.0f} ms {128 / seconds:7.0f} images/s {ratio:6.2f} baseline steps")
