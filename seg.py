"""Train EfficientDet for semantic segmentation with FRSKD or without (Sec. 4.2), evaluate it, look at its predictions.

    python seg.py                                                            # drawn shapes: nothing to download
    python seg.py --dataset voc --data-dir DIR --arch d0 --alpha 1 --beta 50
    python seg.py --dataset voc --data-dir DIR --arch d0 --method baseline
    python seg.py --resume runs/voc-d0-frskd-s0
    python seg.py --eval runs/voc-d0-frskd-s0/student.pt
    python seg.py --table runs

The network is a backbone, EfficientNet, six levels P2..P7, three BiFPN layers and a head on P2. The self-teacher is one
more BiFPN layer, a top-down path and a head, on the student's maps. A run leaves what one of train.py leaves, with
predictions.png in place of attention.png.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tabulate import tabulate

import frskd
from experiments import baselines, data, figures, runs
from experiments.data import VOID
from experiments.runs import FLAG, UserError, number

COMMON = dict(  # Sec. 4.2 and appendix; silent: temperature, batch, momentum, weight decay of the authors' code
    arch="d0", protocol="clean", alpha=1.0, beta=50.0, temperature=1.0, epochs=60, batch_size=32, accumulate=2,
    clip_value=None, lr=0.01, momentum=0.9, weight_decay=5e-4,
)  # fmt: skip
RECIPES = {
    # Ours: short enough for two CPU cores. Clipped: from scratch, a gradient a hundred times the usual comes now and
    # then, and ruins the run.
    "shapes": COMMON | dict(weights="none", image_size=64, batch_size=16, accumulate=1, epochs=14, lr=0.02,
                            clip_value=0.1, workers=0),
    "voc": COMMON | dict(weights="imagenet", image_size=512),
}  # fmt: skip


def train(args, checkpoint):
    images, train_loader, test_loader = loaders(args)
    method = build(args, len(images.classes), resumed=checkpoint is not None)
    optimizer = torch.optim.SGD(method.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
                                foreach=True)  # one kernel for many parameters
    run = runs.Run(args, method, optimizer, checkpoint)  # its folder, and the epochs that it already holds
    forward = runs.parallel(method, args)  # --compile, --amp, DistributedDataParallel

    for epoch in run.epochs():  # seeds, learning rate, method.set_epoch
        method.train()
        meter = runs.Meter(train_loader, epoch, args.epochs)  # progress bar; means stay on the device
        for x, y in meter:
            optimizer.zero_grad()
            for part, masks in zip(x.chunk(args.accumulate), y.chunk(args.accumulate)):
                terms, _ = forward(part, masks)
                (sum(terms.values()) / args.accumulate).backward()
                meter.update(terms, len(part))
            if args.clip_value:
                nn.utils.clip_grad_value_(method.parameters(), args.clip_value)
            optimizer.step()
        metrics = evaluate(method.student, test_loader, args) if run.evaluates(epoch) else {}
        if picture := run.picture("predictions", epoch):
            figures.draw_predictions(picture, method, test_loader, images.classes)
        run.end_of(epoch, meter, metrics)  # log, student.pt, last.pt
    run.print_result("miou")
    if runs.rank() == 0:
        figures.draw_curves(run.folder / "curves.png", [(vars(args), run.log, run.folder)])


@torch.no_grad()
def evaluate(net, loader, args):
    """-> miou, mean IoU in percent, nan if a logit is no number; iou, a dict by class, None where the class is neither
    in the masks nor predicted. Of a network in evaluation mode, at the masks' own sizes.
    Paper vs code: the paper is silent; the authors squeeze the masks to the network's size.
    """
    net.eval()
    runs.share_buffers(net)
    n = len(loader.classes)
    counts = torch.zeros(n * n + 1, dtype=torch.long, device=loader.device)  # confusion matrix, logits not finite
    for x, masks in loader.epoch():
        with runs.autocast(args):
            logits = net(x)
        counts[-1] += (~logits.isfinite()).sum()
        for z, mask in zip(logits, masks):
            predicted, seen = resized(z[None], mask.shape).argmax(1)[0], mask != VOID
            counts[:-1] += torch.bincount(n * mask[seen] + predicted[seen], minlength=n * n)
    *confusion, not_finite = runs.all_reduced(counts).tolist()
    iou = 100 * intersection_over_union(torch.tensor(confusion).view(n, n))
    by_class = {name: None if math.isnan(value) else value for name, value in zip(loader.classes, iou.tolist())}
    return dict(miou=math.nan if not_finite else iou.nanmean().item(), iou=by_class)


def intersection_over_union(confusion):
    """Confusion matrix (C, C), rows the true class -> (C,) float64; nan for a class neither there nor predicted."""
    hits = confusion.diag().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


# ----------------------------------------------------------------------------------------------------- networks

BACKBONES = {"d0": ("efficientnet_b0", 64), "d1": ("efficientnet_b1", 88)}  # of torchvision; channels of the BiFPN
TAPS = {2: 24, 3: 40, 5: 112, 7: 320}  # P2..P5, strides 4 to 32: the backbone's stage and its channels


class Node(frskd.Node):
    """Conv(swish(w_1 x_1 + ... + w_K x_K)), Conv one separable 3x3 convolution and batch norm."""

    def __init__(self, inputs, dim):
        super().__init__(inputs, dim, depth=1)

    def forward(self, *maps):
        return self.conv(F.silu(self.fuse(maps)))


class BiFPNLayer(nn.Module):
    """One BiFPN layer of EfficientDet: n maps (B, dim, H_i, W_i), shallow to deep -> n maps of the same shapes.
    P_n = L_n,  P_i = Node(L_i, Resize(P_{i+1}))         top-down; bottom_up=False returns these
    T_1 = P_1,  T_i = Node(L_i, P_i, Resize(T_{i-1}))    bottom-up, T_n without P_n
    Source: Sec. 4.2 and EfficientDet, [28].
    Paper vs code: the authors have 1x1 depthwise convolutions, plain sums, ReLU, and no pooling.
    """

    def __init__(self, dim, levels=6, bottom_up=True):
        super().__init__()
        inputs = [3] * (levels - 2) + [2] if bottom_up else []
        self.top_down = nn.ModuleList(Node(2, dim) for _ in range(levels - 1))
        self.bottom_up = nn.ModuleList(Node(k, dim) for k in inputs)

    def forward(self, L):
        n, sizes = len(L), [m.shape[-2:] for m in L]
        P = [None] * (n - 1) + [L[-1]]
        for i in reversed(range(n - 1)):
            P[i] = self.top_down[i](L[i], frskd.resize(P[i + 1], sizes[i]))
        if not self.bottom_up:
            return P
        T = [P[0]] + [None] * (n - 1)
        for i in range(1, n):
            middle = [P[i]] if i < n - 1 else []
            T[i] = self.bottom_up[i - 1](L[i], *middle, frskd.resize(T[i - 1], sizes[i]))
        return T


def segmentation_head(dim, num_classes):
    """(B, dim, H, W) -> logits (B, num_classes, H, W)."""
    conv, classifier = nn.Conv2d(dim, 256, 3, padding=1, bias=False), nn.Conv2d(256, num_classes, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(256), nn.SiLU(inplace=True), classifier)


def resized(logits, size):
    """Logits (B, num_classes, h, w) at another size, bilinear, in float32."""
    return F.interpolate(frskd.full_precision(logits), size, mode="bilinear")


class EfficientDet(nn.Module):
    """The student: EfficientNet up to its last stage, levels P2..P7, three BiFPN layers, a head on P2.
    forward: (B, 3, H, W) -> logits (B, num_classes, H, W), float32; features: -> logits, feats, 6 maps
    (B, dim, H / 2^i, W / 2^i), i = 2..7, sizes rounded up, for the self-teacher.
    Paper vs code: the authors tap 80 channels for P4, leave out the swish behind the backbone's first convolution, and
    make P6 and P7 by strided convolutions, of the backbone's map and of P6.
    """

    def __init__(self, arch, num_classes):
        super().__init__()
        backbone, dim = BACKBONES[arch]
        net = torchvision.models.get_model(backbone, weights=None, stochastic_depth_prob=0.0)
        self.backbone = net.features[:8]  # without the 1x1 convolution that the classifier reads
        c_in = [*TAPS.values(), TAPS[7]]  # P2..P5, and P6 before its pooling
        laterals = ((nn.Conv2d(c, dim, 1, bias=False), nn.BatchNorm2d(dim)) for c in c_in)
        self.lateral = nn.ModuleList(nn.Sequential(*layers) for layers in laterals)
        self.bifpn = nn.Sequential(*(BiFPNLayer(dim) for _ in range(3)))
        self.head = segmentation_head(dim, num_classes)
        self.channels = [dim] * 6

    def levels(self, x):
        """P2..P7, which the first BiFPN layer reads."""
        maps = []
        for i, stage in enumerate(self.backbone):
            x = stage(x)
            if i in TAPS:
                maps.append(x)
        *levels, p6 = [lateral(m) for lateral, m in zip(self.lateral, [*maps, maps[-1]])]
        p6 = F.max_pool2d(p6, 3, stride=2, padding=1)
        return [*levels, p6, F.max_pool2d(p6, 3, stride=2, padding=1)]

    def features(self, x):
        feats = self.bifpn(self.levels(x))
        return resized(self.head(feats[0]), x.shape[-2:]), feats

    def forward(self, x):
        return self.features(x)[0]


class SelfTeacher(nn.Module):
    """The self-teacher: a BiFPN layer and a top-down path on the student's six maps, and a head on P2. Sec. 4.2.
    feats, 6 maps (B, dim, H_i, W_i) -> logits (B, num_classes, H_1, W_1), at the size of P2, and feats_t, 6 maps of
    the same shapes as feats.
    Paper vs code: "two repeated BiFPN layers" in the paper; the authors' second is a top-down path, as here. No loss
    would reach the bottom-up path of a full one: the head reads P2, and L_F is detached.
    """

    def __init__(self, dim, num_classes):
        super().__init__()
        self.bifpn = nn.Sequential(BiFPNLayer(dim), BiFPNLayer(dim, bottom_up=False))
        self.head = segmentation_head(dim, num_classes)

    def forward(self, feats):
        feats_t = self.bifpn(feats)
        return self.head(feats_t[0]), feats_t


# ------------------------------------------------------------------------------------------- losses and methods


def pixel_cross_entropy(logits, y):
    """Mean over the pixels that are not void: (B, num_classes, H, W), (B, H, W) -> scalar; 0 where all are void."""
    total = F.cross_entropy(frskd.full_precision(logits), y, ignore_index=VOID, reduction="sum")
    return total / (y != VOID).sum().clamp_min(1)


def pixel_distillation(logits, logits_t, y, temperature):
    """Eq. 4 at each pixel that is not void, mean over these: shapes as above -> scalar.
    Paper vs code: the authors average over the void pixels too.
    """
    void = (y == VOID)[:, None]
    logits, logits_t = (z.masked_fill(void, 0) for z in (logits, logits_t))  # equal: no divergence there
    mean = frskd.soft_label_distillation(logits, logits_t, temperature)  # over all pixels
    return mean * y.numel() / (~void).sum().clamp_min(1)


def ramp(epoch, warmup_epochs, ramp_epochs):
    """Share of alpha and beta in an epoch counted from 0: 0 in the warm-up, then exp(-5 (1 - t)^2), t up to 1.
    Source: the appendix, "adaptively increase". Paper vs code: the paper gives no formula; this is the authors'.
    """
    t = min(1.0, (epoch + 1 - warmup_epochs) / ramp_epochs)
    return math.exp(-5 * (1 - t) ** 2) if epoch >= warmup_epochs else 0.0


class SegmentationFRSKD(frskd.FRSKD):
    """Eq. 5 with every loss at each pixel; alpha and beta rise by `ramp` after a warm-up.
    method(x, y): x (B, 3, H, W), y (B, H, W) class numbers or VOID -> terms, `kd` and `feat` after the warm-up only;
    logits (B, num_classes, H, W), detached. set_epoch before each epoch: without it nothing is distilled.
    """

    def __init__(self, student, teacher, *, warmup_epochs=40, ramp_epochs=20, **weights):
        super().__init__(student, teacher, criterion=pixel_cross_entropy, **weights)
        self.warmup_epochs, self.ramp_epochs, self.distils = warmup_epochs, ramp_epochs, False
        self.register_buffer("share", torch.zeros(()), persistent=False)  # a tensor: compiled code reads it anew

    def set_epoch(self, epoch, epochs):
        self.share.fill_(ramp(epoch, self.warmup_epochs, self.ramp_epochs))
        self.distils = epoch >= self.warmup_epochs

    def forward(self, x, y=None):
        if y is None:
            return self.student(x)
        logits, feats = self.student.features(x)
        logits_t, feats_t = self.teacher(feats)
        logits_t = resized(logits_t, x.shape[-2:])
        terms = dict(ce=self.criterion(logits, y), ce_t=self.criterion(logits_t, y))
        if self.distils and self.alpha > 0:
            kd = pixel_distillation(logits, logits_t, y, self.temperature)
            terms["kd"] = self.share * self.alpha * kd
        if self.distils and self.beta > 0:
            terms["feat"] = self.share * self.beta * self.feature_loss(feats, feats_t)
        return terms, logits.detach()


class SegmentationBaseline(baselines.Baseline):
    """Plain cross-entropy at each pixel: no teacher, and `ce` is the only term."""

    def loss(self, x, y):
        logits = self.student(x)
        return dict(ce=pixel_cross_entropy(logits, y)), logits.detach()


def build_frskd(student, num_classes, *, alpha, beta, temperature, warmup_epochs, ramp_epochs):
    return SegmentationFRSKD(student, SelfTeacher(student.channels[0], num_classes), alpha=alpha, beta=beta,
                             temperature=temperature, warmup_epochs=warmup_epochs, ramp_epochs=ramp_epochs)


def build_baseline(student, num_classes):
    student.bifpn[-1].bottom_up.requires_grad_(False)  # the head reads P2: no loss reaches it, and DDP asks
    return SegmentationBaseline(student)


METHODS = {"baseline": build_baseline, "frskd": build_frskd}  # as in train.py


def build(args, num_classes, resumed=False):
    """Student and method, from the seed; the backbone of a fresh run starts from --weights."""
    torch.manual_seed(args.seed)
    student = EfficientDet(args.arch, num_classes)
    options = {key: getattr(args, key) for key in runs.keywords(METHODS[args.method])}
    method = METHODS[args.method](student, num_classes, **options)
    if not resumed and args.weights != "none":
        imagenet = "IMAGENET1K_V1" if args.weights == "imagenet" else None
        with runs.first_process_first():  # who fetches them
            net = torchvision.models.get_model(BACKBONES[args.arch][0], weights=imagenet)
        if not imagenet:
            runs.load_state(net, runs.load_file(args.weights), f"{args.weights} does not fit")
        student.backbone.load_state_dict(net.features[:8].state_dict())
    return method.to(args.device, memory_format=torch.channels_last)


def loaders(args, training=True):
    """-> images, training loader, test loader; without `training`, images and test loader."""
    parts = args.accumulate * runs.processes()
    if training and args.batch_size % parts:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of --accumulate times processes, {parts}")
    with runs.first_process_first():
        images = data.load_masks(args.dataset, data_dir=args.data_dir, image_size=args.image_size,
                                 protocol=args.protocol, download=args.download)
    runs.describe(args, images)
    options = dict(image_size=args.image_size, classes=images.classes, seed=args.seed, stats=data.STATS["imagenet"],
                   workers=args.workers, device=args.device, rank=runs.rank(), processes=runs.processes())
    test_loader = data.MaskLoader(images.test, train=False, batch_size=max(1, args.batch_size // parts), **options)
    if not training:
        return images, test_loader
    return images, data.MaskLoader(images.train, train=True, batch_size=args.batch_size, **options), test_loader


# --------------------------------------------------------------------------------------------- the command line


def recipe(given):
    """The options that were given, a dict -> the values of all, by data set and method, where they are not given."""
    dataset, method = given.get("dataset", "shapes"), given.get("method", "frskd")
    values = dict(RECIPES[dataset], dataset=dataset, method=method)
    epochs = given.get("epochs", values["epochs"])
    start = int(epochs * 2 / 3)  # 40 of 60, of the lower learning rate (Sec. 4.2) and of distillation (appendix)
    warmup = given.get("warmup_epochs")
    warmup = start if warmup is None else warmup  # None in a baseline's checkpoint, too
    values |= dict(milestones=[start] if start else [], warmup_epochs=start, ramp_epochs=max(1, epochs - warmup))
    values |= runs.untaken(METHODS, method, given)
    if method == "frskd" and warmup >= epochs:
        raise UserError(f"--warmup-epochs {warmup}: distillation would never start in {epochs} epochs")
    return values


def parser():
    p = runs.Parser("seg.py", "Train EfficientDet for semantic segmentation with FRSKD.")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=list(RECIPES), help="shapes: drawn in memory; voc: VOC2007 and VOC2012 as "
                   "their archives unpack (%(default)s)")
    g.add_argument("--data-dir", type=runs.path, metavar="DIR", help="the folder that holds VOCdevkit/ (%(default)s)")
    g.add_argument("--download", help="fetch the archives of voc where they are missing", **FLAG)
    g.add_argument("--protocol", choices=["clean", "paper"], help="clean: without the images of VOC2012 that VOC2007 "
                   "holds, every test image among them; paper: with them (%(default)s)")
    g.add_argument("--image-size", type=number(int, 64), metavar="PX", help="side of crops and of the evaluation "
                   "(%(default)s)")
    g = p.add_argument_group("network")
    g.add_argument("--arch", choices=list(BACKBONES), help="EfficientDet-d0 or -d1 (%(default)s)")
    g.add_argument("--weights", type=runs.path, metavar="{imagenet,none,FILE}", help="what the backbone starts from: "
                   "torchvision's IMAGENET1K_V1, nothing, or a file of theirs (%(default)s)")
    g = p.add_argument_group("method")
    g.add_argument("--method", choices=list(METHODS), help="baseline is plain cross-entropy (%(default)s)")
    g.add_argument("--alpha", type=number(float, 0), help="weight of L_KD; larger trusts it more (%(default)s)")
    g.add_argument("--beta", type=number(float, 0), help="weight of L_F (%(default)s)")
    g.add_argument("--temperature", type=number(float, 0, above=True), help="K of L_KD; larger is softer (%(default)s)")
    g.add_argument("--warmup-epochs", type=number(int, 0), metavar="N", help="alpha and beta are zero for so long "
                   "(%(default)s)")
    g.add_argument("--ramp-epochs", type=number(int, 1), metavar="N", help="and then rise for so long (%(default)s)")
    g = runs.add_optimisation_options(p)
    g.add_argument("--accumulate", type=number(int, 1), metavar="N", help="a batch passes in N equal parts, one after "
                   "the other: less memory (%(default)s)")
    g.add_argument("--clip-value", type=number(float, 0, above=True), metavar="X", help="clip each element of the "
                   "gradient to -X..X; the authors' code has 2 (%(default)s)")
    runs.add_run_options(p, "predictions")
    return p


def evaluate_file(args, content):
    """Evaluates a last.pt, its self-teacher too, or a student.pt; with --predictions draws them."""
    images, loader = loaders(args, training=False)
    method = build(args, len(images.classes), resumed=True)
    for name, net in runs.evaluated(args, method, content):
        metrics = runs.results(evaluate(net, loader, args))
        runs.say(f"{name}: {metrics} (on {args.test_name}, {args.eval})")
    if args.predictions is not None and runs.rank() == 0:
        figures.draw_predictions(Path(args.output) / "predictions.png", method, loader, images.classes)


def print_cost():
    """Parameters and FLOPs (multiply-adds) of students and self-teachers, whose logits are left at the size of P2."""
    rows = []
    for arch, (backbone, dim) in BACKBONES.items():
        student, x = EfficientDet(arch, 21).eval(), torch.zeros(1, 3, 512, 512)
        with torch.no_grad():
            feats = student.features(x)[1]
        (params, flops), (params_t, flops_t) = frskd.cost(student, x), frskd.cost(SelfTeacher(dim, 21), feats)
        rows.append([f"{arch} ({backbone})", params / 1e6, flops / 1e9, params_t / 1e6, flops_t / 1e9])
    columns = [f"{of} {what}" for of in ("student's", "self-teacher's") for what in ("parameters / M", "FLOPs / G")]
    print(tabulate(rows, ["512 px, 21 classes", *columns], "github", floatfmt=".3f"))


@runs.command  # what the user can mend: one line, 2; not finite: 1; Ctrl-C: 130
def main(argv=None):
    args, checkpoint = runs.options(parser(), recipe, argv)  # recipe < checkpoint < command line
    if args.table:
        found = runs.print_table(args.table, "seg.py", "miou")
        if args.curves:
            figures.draw_curves(args.curves, found)
    elif args.cost:
        print_cost()
    elif args.eval:
        evaluate_file(args, checkpoint)
    else:
        train(args, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
