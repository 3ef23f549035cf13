# FRSKD (Ji et al., CVPR 2021): https://arxiv.org/abs/2103.08273. MIT licence, (c) 2026 the FRSKD reference authors.
"""FRSKD: Feature Refinement via Self-Knowledge Distillation. Copy this file alone: torch 2.1 and torchvision 0.16 on.

A self-teacher, a BiFPN on the network's own maps, refines them and teaches the network by the refined maps and by its
soft labels. Both train together, from scratch; afterwards the self-teacher is thrown away.

    student = resnet18(num_classes=100, stem="cifar")             # or Adapter(net, ["layer1", ...], images)
    method = FRSKD(student, BiFPNc(student.channels, num_classes=100), alpha=2, beta=100)
    terms, logits = method(images, labels)                        # (B, 3, H, W), (B,)
    sum(terms.values()).backward()                                # one optimiser over method.parameters()
    torch.save(export(student).state_dict(), "student.pt")        # the plain network

The paper's f_c is `student`, f_t `teacher`, F_i `feats`, T_i `feats_t`, c_i `channels`, d_i `dims`, w `width`,
phi `attention_map`, K `temperature`. Maps go from shallow and large to deep and small; i = 0 is the paper's 1.
"""
import contextlib
import functools
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

# ---------------------------------------------------------------------------- Sec. 3.1: the self-teacher network
def conv_bn_relu(c_in, c_out):
    """1x1 convolution without bias, batch norm, ReLU: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class Node(nn.Module):
    """A node of Eq. 2, relu(Conv(sum_k w_k x_k / (sum_k w_k + eps))): maps x_k (B, d, H, W) -> (B, d, H, W).
    Fast normalised fusion, w_k >= 0. Conv is `depth` times [3x3 depthwise, 1x1, batch norm], ReLU between.
    Paper vs code: the paper has "a depth-wise convolution"; two are the authors', and the cost in Table 6. It gives no
    eps: 1e-4 is EfficientDet's, the authors have 1e-6.
    """

    def __init__(self, inputs, dim, depth=2):
        super().__init__()
        self.weights, layers = nn.Parameter(torch.ones(inputs)), []
        for _ in range(depth):
            layers += [nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.Conv2d(dim, dim, 1, bias=False)]
            layers += [nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers[:-1])

    def fuse(self, maps, eps=1e-4):
        w = F.relu(self.weights)
        w = (w / (w.sum() + eps)).to(maps[0].dtype)  # a float32 factor would make a bf16 sum float32
        fused = w[0] * maps[0]
        for w_k, x in zip(w[1:], maps[1:]):
            fused = torch.addcmul(fused, w_k, x)  # fused + w_k x
        return fused

    def forward(self, *maps):
        return F.relu(self.conv(self.fuse(maps)))


def resize(x, size, mode="bilinear"):
    """(B, C, h, w) -> (B, C, *size): up by interpolation, down by 3x3 max-pooling of stride 2, adaptive where it must.
    Paper vs code: bilinear is the paper's; the authors take nearest, and pad the pooling at the bottom and right only.
    """
    if size[0] > x.shape[-2] or size[1] > x.shape[-1]:
        return F.interpolate(x, size, mode=mode, align_corners=False if mode == "bilinear" else None)
    if size == tuple((s + 1) // 2 for s in x.shape[-2:]):
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    return x if size == x.shape[-2:] else F.adaptive_max_pool2d(x, size)


class Resize(nn.Module):
    """Resize of Eq. 2: (B, d_in, h, w) -> (B, d_out, *size), by 1x1 convolution, batch norm, ReLU where widths differ.
    On the way up the convolution is first, on a quarter of the positions: without bias it commutes with interpolation.
    """

    def __init__(self, d_in, d_out, mode="bilinear"):
        super().__init__()
        self.mode, self.conv = mode, conv_bn_relu(d_in, d_out) if d_in != d_out else None

    def forward(self, x, size):
        if self.conv is None:
            return resize(x, size, self.mode)
        conv, bn, relu = self.conv
        up = size[0] > x.shape[-2] or size[1] > x.shape[-1]
        return relu(bn(resize(conv(x), size, self.mode) if up else conv(resize(x, size))))


class SelfTeacher(nn.Module):
    """The self-teacher f_t: a top-down and a bottom-up path over the student's n maps, and a classifier.
    L_i = ConvBNReLU(F_i)                                                                     Eq. 1
    P_n = L_n,  P_i = relu(Conv(w_1 L_i + w_2 Resize(P_{i+1})))                               Eq. 2, top-down
    T_1 = P_1,  T_i = relu(Conv(w_1 L'_i + w_2 P_i + w_3 Resize(T_{i-1}))), T_n without P_n   Eq. 2, bottom-up
    forward: n maps F_i (B, c_i, H_i, W_i) -> logits (B, num_classes), n maps T_i (B, d_i, H_i, W_i).
    Paper vs code: L'_i has convolutions of its own, as in EfficientDet; with shared ones Table 6 would say x0.53.
    """

    def __init__(self, channels, dims, num_classes, *, upsample_mode="bilinear"):
        super().__init__()
        self.channels, self.dims, n = list(channels), list(dims), len(dims)
        none = [nn.Identity()]  # where there is no node (P_n, T_1): pads to n, so that one i serves all; never called
        self.lateral = nn.ModuleList(conv_bn_relu(c, d) for c, d in zip(channels, dims, strict=True))
        self.lateral2 = nn.ModuleList(none + [conv_bn_relu(c, d) for c, d in zip(channels[1:], dims[1:])])
        self.up = nn.ModuleList([Resize(dims[i + 1], dims[i], upsample_mode) for i in range(n - 1)] + none)
        self.down = nn.ModuleList(none + [Resize(dims[i - 1], dims[i]) for i in range(1, n)])
        self.top_down = nn.ModuleList([Node(2, d) for d in dims[:-1]] + none)
        self.bottom_up = nn.ModuleList(none + [Node(3 if i < n - 1 else 2, dims[i]) for i in range(1, n)])
        self.fc = nn.Linear(dims[-1], num_classes)

    def forward(self, feats):
        n, sizes = len(self.dims), [f.shape[-2:] for f in feats]
        L = [lateral(f) for lateral, f in zip(self.lateral, feats, strict=True)]  # Eq. 1, n maps (B, d_i, H_i, W_i)
        P = [None] * (n - 1) + [L[-1]]  # P_n = L_n
        for i in reversed(range(n - 1)):
            P[i] = self.top_down[i](L[i], self.up[i](P[i + 1], sizes[i]))  # Eq. 2, top-down
        T = [P[0]] + [None] * (n - 1)  # T_1 = P_1, of L_1 and P_2, as Figure 2 draws it
        for i in range(1, n):
            middle = [P[i]] if i < n - 1 else []  # Figure 2: T_n reads L'_n and T_{n-1}; P_n would be L_n again
            T[i] = self.bottom_up[i](self.lateral2[i](feats[i]), *middle, self.down[i](T[i - 1], sizes[i]))  # Eq. 2
        return self.fc(pooled(T[-1])), T  # f_t(x), whose softmax is the soft label


def pooled(feat):
    """Mean over positions, (B, C, H, W) -> (B, C); permuted first, since maps lie channels-last in memory."""
    return feat.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def BiFPNc(channels, num_classes, width=2, **kwargs):
    """The paper's self-teacher: d_i = w c_i, wider where the network is deeper (Sec. 3.1)."""
    return SelfTeacher(channels, [max(1, int(width * c)) for c in channels], num_classes, **kwargs)


def BiFPN(channels, num_classes, dim=256, **kwargs):
    """The self-teacher of one width for all maps, as in EfficientDet (Table 6)."""
    return SelfTeacher(channels, [dim] * len(channels), num_classes, **kwargs)


# ---------------------------------------------------------------------------- Sec. 3.2: self-feature distillation
def full_precision(x):
    """Half precision to float32, float32 and float64 as they are: losses are not computed in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_map(feat):
    """phi of Eq. 3: mean over channels of the squares, l2-normalised over positions: (B, C, H, W) -> (B, H * W)."""
    norm = torch.linalg.vector_norm(feat, dim=1, dtype=torch.promote_types(feat.dtype, torch.float32))  # (B, H, W)
    return F.normalize((norm.square() / feat.shape[1]).flatten(1), dim=1)  # the norm sums in float32, without a copy


def attention_transfer(feats, feats_t):
    """L_F of Eq. 3: sum over blocks of the mean over batch and positions of (phi(T_i) - phi(F_i))^2.
    n maps (B, c_i, H_i, W_i) of the student, n maps (B, d_i, H_i, W_i) of the teacher, detached here -> scalar.
    Paper vs code: Eq. 3 writes a norm, the authors compute this; beta = 100 fits only this.
    """
    pairs = zip(feats, feats_t, strict=True)
    return sum(F.mse_loss(attention_map(f), attention_map(t.detach())) for f, t in pairs)  # Eq. 3


def soft_label_distillation(logits, logits_t, temperature=4.0):
    """L_KD of Eq. 4: K^2 KL(softmax(logits_t / K) || softmax(logits / K)), sum over classes, mean over the rest.
    Student's logits (B, C) or (B, C, H, W), the teacher's, detached here -> scalar.
    Paper vs code: Eq. 4 has the student first and no K^2; alpha = 2 fits only the authors' form, this.
    """
    log_p = F.log_softmax(full_precision(logits) / temperature, dim=1)
    log_p_t = F.log_softmax(full_precision(logits_t.detach()) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_p_t, reduction="none", log_target=True).sum(1).mean()  # Eq. 4


# ----------------------------------------------------------------------------------------- The objective: Eq. 5
class FRSKD(nn.Module):
    """L_CE(student) + L_CE(teacher) + alpha L_KD + beta L_F.   Eq. 5
    student: features(x) -> (logits, feats), and .channels; teacher: a SelfTeacher on these channels.
    alpha, beta (Sec. 4.1): 2, 100 CIFAR-100; 3, 100 TinyImageNet; 1, 200 fine-grained sets and ImageNet; beta = 0 is
    FRSKD\\F. criterion(logits, y) -> scalar: your own loss, of both networks.
    method(x, y): images (B, 3, H, W), labels as the criterion takes them -> terms, WEIGHTED scalars `ce`, `ce_t`, `kd`,
    `feat` whose plain sum is the loss; the student's logits (B, num_classes), detached. method(x): the logits.
    L_KD and L_F detach the teacher's side, against collapse (Sec. 3.2). The teacher's inputs are not detached, so that
    its cross-entropy trains the student's blocks too: alpha = beta = 0 is not the baseline.
    """

    def __init__(self, student, teacher, *, alpha=2.0, beta=100.0, temperature=4.0,
                 feature_loss=attention_transfer, criterion=F.cross_entropy):  # fmt: skip
        super().__init__()
        given, read = getattr(student, "channels", None), getattr(teacher, "channels", None)
        if given is None or list(given) != list(read or given):
            raise TypeError(f"channels {given} and the teacher's {read}: wrap a plain network in Adapter or Timm")
        self.student, self.teacher, self.feature_loss, self.criterion = student, teacher, feature_loss, criterion
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, x, y=None):
        if y is None:
            return self.student(x)
        logits, feats = self.student.features(x)
        logits_t, feats_t = self.teacher(feats)  # feats are not detached
        terms = {"ce": self.criterion(full_precision(logits), y)}  # Eq. 5, term by term
        terms["ce_t"] = self.criterion(full_precision(logits_t), y)
        if self.alpha > 0:
            terms["kd"] = self.alpha * soft_label_distillation(logits, logits_t, self.temperature)
        if self.beta > 0:
            terms["feat"] = self.beta * self.feature_loss(feats, feats_t)
            if feats[-1].shape[-2:] == (1, 1):
                warnings.warn("the deepest map is 1x1: its phi is always 1, its part of L_F always 0")
        return terms, logits.detach()


# ----------------------------------------------- FRSKD+SLA, with self-supervised label augmentation (Tables 1, 2)
def rotations(x):
    """Four quarter turns, counter-clockwise: (B, C, H, H) -> (4 B, C, H, H), the views of an image adjacent."""
    views = torch.stack([torch.rot90(x, r, (2, 3)) for r in range(4)], 1).flatten(0, 1)
    return views.contiguous(memory_format=torch.channels_last)


def joint_labels(y):
    """Class and rotation as one label: (B,) -> (4 B,), 4 y + r for the views r = 0..3 of an image."""
    return (4 * y[:, None] + torch.arange(4, device=y.device)).flatten()


def aggregate(joint):
    """Mean over r of the logit that view r has for (class, r): (4 B, 4 num_classes) -> (B, num_classes)."""
    return joint.view(len(joint) // 4, 4, -1, 4).diagonal(dim1=1, dim2=3).mean(-1)  # image, view, class, rotation


class FRSKDSLA(FRSKD):
    """FRSKD+SLA: with SLA-SD, the paper's [18], on both networks.
    A second head on each network tells class and rotation at once, 4 num_classes joint classes; g, the mean over the
    four views, is a better soft label than the plain head's z, and teaches it.
      ce, ce_t              criterion of z, z_t                                   mean over B
      ce_joint, ce_joint_t  cross-entropy of the joint heads                      mean over the 4 B views
      kd_joint, kd_joint_t  L_KD(z, g), L_KD(z_t, g_t), weight 1                  g detached
      kd, feat              alpha L_KD([z; g], [z_t; g_t]), beta L_F of the maps of images and views together
    method(x, y) as FRSKD, x square, y class indices. The plain head is evaluated, on one view.
    Paper vs code: the paper has one sentence, "attaching" SLA-SD; all of this is the authors' code.
    """

    def __init__(self, student, teacher, **kwargs):
        super().__init__(student, teacher, **kwargs)
        self.joint = nn.Linear(student.channels[-1], 4 * teacher.fc.out_features)
        self.joint_t = nn.Linear(teacher.dims[-1], 4 * teacher.fc.out_features)

    def forward(self, x, y=None):
        if y is None:
            return self.student(x)
        y_joint = joint_labels(y)
        z, feats = self.student.features(x)
        z_t, feats_t = self.teacher(feats)
        _, views = self.student.features(rotations(x))  # of 4 B; the plain heads' logits of them are not used
        _, views_t = self.teacher(views)
        joint, joint_t = self.joint(pooled(views[-1])), self.joint_t(pooled(views_t[-1]))  # (4 B, 4 num_classes)
        z, z_t, joint, joint_t = map(full_precision, (z, z_t, joint, joint_t))
        g, g_t = aggregate(joint), aggregate(joint_t)  # (B, num_classes)
        terms = dict(ce=self.criterion(z, y), ce_t=self.criterion(z_t, y))
        terms |= dict(ce_joint=F.cross_entropy(joint, y_joint), ce_joint_t=F.cross_entropy(joint_t, y_joint))
        terms["kd_joint"] = soft_label_distillation(z, g, self.temperature)
        terms["kd_joint_t"] = soft_label_distillation(z_t, g_t, self.temperature)
        if self.alpha > 0:
            both, both_t = torch.cat([z, g]), torch.cat([z_t, g_t])  # (2 B, num_classes)
            terms["kd"] = self.alpha * soft_label_distillation(both, both_t, self.temperature)
        if self.beta > 0:
            maps, maps_t = (list(map(torch.cat, zip(*m))) for m in ((feats, views), (feats_t, views_t)))  # of 5 B
            terms["feat"] = self.beta * self.feature_loss(maps, maps_t)
        return terms, z.detach()


# ------------------------------------------------------------------------------------------------- The students
class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet and its four stages' maps: same parameter names, same initialisation, same function.
    stem "imagenet" is torchvision's; "cifar" is a 3x3 convolution of stride 1 and no max-pooling (Sec. 4.1).
    features: (B, 3, H, W) -> logits (B, num_classes), feats, 4 maps (B, c_i, H_i, W_i), activated.
    """

    channels = [64, 128, 256, 512]

    def __init__(self, layers, num_classes, stem="imagenet"):
        super().__init__(torchvision.models.resnet.BasicBlock, layers, num_classes=num_classes)
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem is imagenet or cifar, got {stem}")
        if stem == "cifar":
            self.conv1, self.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x):
        x, feats = self.maxpool(self.relu(self.bn1(self.conv1(x)))), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            feats.append(x)
        return self.fc(pooled(x)), feats

    def forward(self, x):
        return self.features(x)[0]


resnet18 = functools.partial(ResNet, [2, 2, 2, 2])  # (num_classes, stem="imagenet")
resnet34 = functools.partial(ResNet, [3, 4, 6, 3])


class WideBlock(nn.Module):
    """Pre-activation block: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x, activated=None):
        activated = F.relu(self.bn1(x)) if activated is None else activated
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-widen (Zagoruyko and Komodakis, 2016), depth 6 k + 4: three stages of 16, 32, 64 times `widen` maps.
    features: (B, 3, H, W) -> logits (B, num_classes), feats, 3 maps (B, c_i, H_i, W_i). F_i is the activated output of
    the batch norm that opens the next stage, what its branches read; F_3 of the last one.
    Paper vs code: the authors' WRN lacks the blocks' first batch norms; this is the standard one.
    """

    def __init__(self, depth, widen, num_classes):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen < 1:
            raise ValueError(f"a wide ResNet has depth 6 k + 4 and width >= 1, got {depth}, {widen}")
        self.channels = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        for i, (c_in, c) in enumerate(zip([16, *self.channels], self.channels), 1):
            blocks = [WideBlock(c if k else c_in, c, 2 if i > 1 and k == 0 else 1) for k in range((depth - 4) // 6)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.bn, self.fc = nn.BatchNorm2d(c), nn.Linear(c, num_classes)
        for m in self.modules():  # as torchvision's ResNet
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x):
        x, feats = self.layer1(self.conv1(x)), []
        for first, *blocks in (self.layer2, self.layer3):
            feats.append(F.relu(first.bn1(x)))
            x = first(x, feats[-1])
            for block in blocks:
                x = block(x)
        feats.append(F.relu(self.bn(x)))
        return self.fc(pooled(feats[-1])), feats

    def forward(self, x):
        return self.features(x)[0]


wrn16_2 = functools.partial(WideResNet, 16, 2)  # (num_classes)


@contextlib.contextmanager
def evaluation_mode(net):
    """net.eval() inside; afterwards each module in the mode that it was in, frozen batch norms too."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield net.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def run_with(net, blocks, x):
    """net(x), and the outputs of the named blocks as (name, output), in the order in which they run."""
    ran, handles = [], []
    for name in blocks:
        hook = functools.partial(lambda name, module, args, out: ran.append((name, out)), name)
        handles.append(net.get_submodule(name).register_forward_hook(hook))
    try:
        return net(x), ran
    finally:
        for handle in handles:
            handle.remove()


class Adapter(nn.Module):
    """Gives any image classifier `features`, by the names of its blocks (as in net.named_modules()).
    F_i is the output of blocks[i] as it is: name blocks whose output is what the next layer reads. example: a batch of
    your images (B, 3, H, W), one is enough; it passes through once, in evaluation mode, to learn the channels.
    features: x -> logits (B, num_classes), maps (B, c_i, H_i, W_i). ValueError where the blocks give no such maps.
    """

    def __init__(self, net, blocks, example):
        super().__init__()
        self.net, self.blocks, modules = net, list(blocks), dict(net.named_modules())
        if any(isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)) for m in modules.values()):
            raise TypeError("put DistributedDataParallel around the method, not the network; take no DataParallel")
        names = [name for name in modules if name in self.blocks or (name and name.count(".") < 2)]
        with evaluation_mode(net), torch.no_grad():
            logits, ran = run_with(net, names, example.to(next(net.parameters(), example)))
        maps, absent = [(name, out) for name, out in ran if name in self.blocks], set(self.blocks) - modules.keys()
        if wrong := f"there is no block {min(absent)}" if absent else self.fault(logits, maps, *example.shape[-2:]):
            sizes = {name: "x".join(map(str, out.shape[1:])) for name, out in ran if torch.is_tensor(out)}
            raise ValueError(f"{wrong}; the network has {', '.join(f'{name} {size}' for name, size in sizes.items())}")
        self.channels = [out.shape[1] for _, out in maps]

    def fault(self, logits, maps, height, width):
        """What is wrong with a pass, in words; None where nothing is."""
        if not torch.is_tensor(logits):
            return f"the network returns {type(logits).__name__}, not a tensor of logits (aux_logits=False helps some)"
        if [name for name, _ in maps] != self.blocks or not maps:
            return (f"of the blocks {self.blocks} ran {[name for name, _ in maps]}: name each once, in this order; "
                    "compile the method, not the network; DistributedDataParallel, not DataParallel")  # fmt: skip
        for name, out in maps:
            if not torch.is_tensor(out) or out.ndim != 4:
                return f"the output of {name} is no (B, C, H, W) map"
            a, b, c = out.shape[1:]  # which two of them have the image's aspect ratio, to a pixel?
            if max(height, width, abs(a * width - b * height)) < abs(b * width - c * height):
                return f"the output of {name} is (B, H, W, C): permute it, or take Timm"
            trained = any(p.requires_grad for p in self.net.get_submodule(name).parameters())
            if trained and logits.requires_grad and not out.requires_grad:
                return f"the output of {name} has no gradient: checkpoint with use_reentrant=False"

    def features(self, x):
        logits, maps = run_with(self.net, self.blocks, x)
        if wrong := self.fault(logits, maps, *x.shape[-2:]):
            raise ValueError(wrong)
        return logits, [out for _, out in maps]

    def forward(self, x):
        return self.net(x)


class Timm(nn.Module):
    """Gives a network of timm `features`, by forward_intermediates and forward_head; ViT and Swin included.
    indices: as there, 4 is its last four maps. example: a batch of your images, else one of its default size.
    Shapes as Adapter. ValueError for a network without such maps.
    """

    def __init__(self, net, indices=4, example=None):
        super().__init__()
        self.net, self.indices = net, indices
        with evaluation_mode(net), torch.no_grad():
            try:
                example = torch.randn(1, *net.default_cfg["input_size"]) if example is None else example
                logits, feats = self.features(example.to(next(net.parameters())))
                same = torch.allclose(logits, net(example.to(logits)), rtol=1e-3, atol=1e-3)
            except (AttributeError, AssertionError, RuntimeError) as error:  # not of timm; so many maps; such images
                raise ValueError(f"{type(net).__name__} has no maps {indices} (example=images?): {error}") from error
        if not same:
            raise ValueError(f"{type(net).__name__} is more than forward_intermediates, forward_head: take Adapter")
        self.channels = [f.shape[1] for f in feats]

    def features(self, x):
        last, feats = self.net.forward_intermediates(x, indices=self.indices)
        return self.net.forward_head(last), feats

    def forward(self, x):
        return self.net(x)


def export(student):
    """The plain network, without what training added: what you deploy, and whose state_dict you save."""
    return student.net if isinstance(student, (Adapter, Timm)) else student


# ----------------------------------------------------------------------------- Cost: what the self-teacher adds
def cost(module, *inputs):
    """Parameters and FLOPs of a forward pass in evaluation mode, by fvcore; a FLOP is a multiply-add, as in Table 6."""
    from fvcore.nn import FlopCountAnalysis
    with evaluation_mode(module):
        flops = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return sum(p.numel() for p in module.parameters()), flops.total()


def table6():
    """Rows (type, deepest width, parameters, FLOPs in the paper's order, FLOPs executed), over those of WRN-16-2."""
    student, x, rows = wrn16_2(100).eval(), torch.zeros(1, 3, 32, 32), []
    (params, flops), (_, feats) = cost(student, x), student.features(x)
    positions = [f[0, 0].numel() for f in feats]
    for build, size in ((BiFPN, 128), (BiFPN, 256), (BiFPNc, 1), (BiFPNc, 2)):
        teacher = build(student.channels, 100, size)
        params_t, executed = cost(teacher, feats)
        pairs = zip(teacher.dims, teacher.dims[1:], positions, positions[1:])
        saved = sum(d * e * (p - q) + 4 * (e - d) * p for d, e, p, q in pairs if d != e)  # 1x1s before bilinear
        rows.append((build.__name__, teacher.dims[-1], params_t / params, (executed + saved) / flops, executed / flops))
    return rows


if __name__ == "__main__":
    print("Table 6: the self-teacher over its WRN-16-2 (32x32, 100 classes); executed: 1x1 before upsampling\n")
    print("| type   | #channel | parameters (paper) | FLOPs (paper) | FLOPs executed |")
    print("|--------|---------:|-------------------:|--------------:|---------------:|")
    paper = [(0.30, 0.67), (0.97, 2.38), (0.19, 0.21), (0.59, 0.68)]
    for (name, channel, params, flops, executed), (p, f) in zip(table6(), paper):
        print(f"| {name:6} | {channel:8} | {params:9.3f} ({p:.2f})   | {flops:6.3f} ({f:.2f}) | {executed:14.3f} |")
