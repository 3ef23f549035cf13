"""Train EfficientDet for semantic segmentation with FRSKD or without (Sec. 4.2), evaluate it, look at what it predicts.

    python seg.py                                                            # drawn shapes: no file, no network
    python seg.py --dataset voc --data-dir DIR --arch d0 --alpha 1 --beta 50
    python seg.py --dataset voc --data-dir DIR --arch d0 --method baseline
    python seg.py --resume runs/voc-d0-frskd-s0
    python seg.py --eval runs/voc-d0-frskd-s0/student.pt
    python seg.py --table runs
    python seg.py --cost

The network is a backbone, EfficientNet, six levels P2..P7, three BiFPN layers and a head on P2. The self-teacher is two
more BiFPN layers on the student's, and a head of its own. What a run leaves is as of train.py, predictions.png in
place of attention.png; the epochs, the command line and the folder of a run are shared with it.
"""

import math
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import draw_segmentation_masks

import data
import frskd
import train
from data import VOID, DataError
from train import UserError, at_least, not_negative, positive, refuse

# --------------------------------------------------------------------------------------------------- recipes

COMMON = dict(
    alpha=1.0, beta=50.0, epochs=60, warmup=2 / 3, lr=0.01, lr_drops=(2 / 3,),  # Sec. 4.2 and appendix
    method="frskd", teacher="full", arch="d0", protocol="clean", clip_value=None, amp=False, sync_bn=False,
    temperature=1.0, batch_size=32, accumulate=2, momentum=0.9, weight_decay=5e-4,  # silent: the authors' code
)  # fmt: skip
RECIPES = {
    # Ours: short enough for two CPU cores. Clipped: from scratch, a gradient a hundred times the usual comes now and
    # then, and ruins the run.
    "shapes": COMMON
    | dict(weights="none", image_size=64, batch_size=16, accumulate=1, epochs=6, clip_value=0.1, workers=0),
    "voc": COMMON | dict(weights="imagenet", image_size=512),
}
TAGS = dict(
    temperature="t", alpha="alpha", beta="beta", warmup_epochs="wu", ramp_epochs="ramp", weight_decay="wd", lr="lr",
    momentum="m", batch_size="bs", accumulate="acc", clip_value="clip", image_size="px", epochs="e", milestones="ms",
)  # fmt: skip
TEACHER_OPTIONS = ("teacher", "alpha", "beta", "temperature", "warmup_epochs", "ramp_epochs")


def resolve(given):
    """The options given on the command line, a dict -> all values, with the recipe's where none was given."""
    dataset = given.get("dataset", "shapes")
    recipe = RECIPES[dataset] | dict(dataset=dataset)
    args = train.with_defaults(recipe, dict(predictions=None), given)
    args.warmup_epochs = given.get("warmup_epochs", default_warmup(args))
    args.ramp_epochs = given.get("ramp_epochs", args.epochs - args.warmup_epochs)
    if args.method == "frskd" and args.warmup_epochs >= args.epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs}: distillation would never start in {args.epochs} epochs")
    return args


def default_warmup(args):
    return int(args.epochs * args.recipe["warmup"])


def run_name(args):
    """The method, then every choice that changes the result and is not the recipe's: frskd-paper-px256."""
    defaults = args.recipe | dict(milestones=train.default_milestones(args), warmup_epochs=default_warmup(args))
    defaults["ramp_epochs"] = args.epochs - args.warmup_epochs
    name, ignored = args.method, TEACHER_OPTIONS if args.method == "baseline" else ()
    if args.method == "frskd" and args.beta == 0:
        name, ignored = name + "-nofeat", ("beta",)
    if args.method == "frskd" and args.teacher != defaults["teacher"]:
        name += f"-{args.teacher}"
    if args.protocol != defaults["protocol"]:
        name += f"-{args.protocol}"
    if args.weights != defaults["weights"]:
        name += "-scratch" if args.weights == "none" else f"-{Path(args.weights).stem}"
    return name + train.tagged(args, defaults, TAGS, ignored)


# --------------------------------------------------------------------------------------------------- networks

BACKBONES = {"d0": ("efficientnet_b0", 64), "d1": ("efficientnet_b1", 88)}  # of torchvision; channels of the BiFPN
ONE_POSITION = 128  # up to this size in pixels, P7, of stride 128, is 1x1
TAPS = {2: 24, 3: 40, 5: 112, 7: 320}  # P2..P5, strides 4 to 32: the backbone's stage and its channels


class BiFPNLayer(nn.Module):
    """One BiFPN layer of EfficientDet: n maps (B, dim, H_i, W_i), shallow to deep -> n maps of the same shapes.

    P_n = L_n,  P_i = Conv(swish(w1 L_i + w2 Resize(P_{i+1})))                    top-down
    T_1 = P_1,  T_i = Conv(swish(w1 L_i + w2 P_i + w3 Resize(T_{i-1})))           bottom-up, T_n without P_n

    Conv is one separable 3x3 convolution and batch norm. bottom_up=False has the top-down path alone and returns its
    maps. Source: Sec. 4.2 and EfficientDet, the paper's [28].
    Paper vs code: the authors have 1x1 depthwise convolutions, plain sums, ReLU, and no pooling.
    """

    def __init__(self, dim, levels=6, bottom_up=True):
        super().__init__()
        inputs = [3] * (levels - 2) + [2] if bottom_up else []  # maps that a node of the bottom-up path sums
        self.top_down = nn.ModuleList(frskd.SeparableConv(dim, depth=1) for _ in range(levels - 1))
        self.bottom_up = nn.ModuleList(frskd.SeparableConv(dim, depth=1) for _ in inputs)
        self.top_down_weights = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(levels - 1))
        self.bottom_up_weights = nn.ParameterList(nn.Parameter(torch.ones(k)) for k in inputs)

    def freeze_bottom_up(self):
        """Says of the bottom-up path that no loss reaches it, which DistributedDataParallel has to know."""
        self.bottom_up.requires_grad_(False)
        self.bottom_up_weights.requires_grad_(False)

    def forward(self, maps):
        n, sizes = len(maps), [m.shape[-2:] for m in maps]
        top_down = [None] * (n - 1) + [maps[-1]]
        for i in reversed(range(n - 1)):
            both = [maps[i], frskd.upsample(top_down[i + 1], sizes[i])]
            top_down[i] = self.top_down[i](F.silu(frskd.fused_sum(self.top_down_weights[i], both)))
        if not self.bottom_up:
            return top_down
        bottom_up = [top_down[0]]
        for i in range(1, n):
            middle = [top_down[i]] if i < n - 1 else []
            all_three = [maps[i], *middle, frskd.downsample(bottom_up[i - 1], sizes[i])]
            bottom_up.append(self.bottom_up[i - 1](F.silu(frskd.fused_sum(self.bottom_up_weights[i - 1], all_three))))
        return bottom_up


def segmentation_head(dim, num_classes):
    """(B, dim, H, W) -> logits (B, num_classes, H, W)."""
    return nn.Sequential(
        nn.Conv2d(dim, 256, 3, padding=1, bias=False),
        nn.BatchNorm2d(256),
        nn.SiLU(inplace=True),
        nn.Conv2d(256, num_classes, 3, padding=1),
    )


class EfficientDet(nn.Module):
    """The student: EfficientNet up to its last stage, levels P2..P7, three BiFPN layers, a head on P2.

    forward: (B, 3, H, W) -> logits (B, num_classes, H, W), float32; features: -> logits, feats, the 6 maps
    (B, dim, H / 2^i, W / 2^i), i = 2..7, sizes rounded up, that the self-teacher reads, the head P2 alone. So the last
    layer's bottom-up path learns from the self-teacher's losses, and nothing in the baseline. arch: d0 or d1.
    Paper vs code: the authors tap 80 channels for P4, leave out the swish behind the backbone's first convolution, and
    make P6 and P7 by strided convolutions, of the backbone's map and of P6.
    """

    def __init__(self, arch, num_classes, layers=3):
        super().__init__()
        backbone, self.dim = BACKBONES[arch]
        net = torchvision.models.get_model(backbone, weights=None, stochastic_depth_prob=0.0)
        self.backbone = net.features[:8]  # without the 1x1 convolution that the classifier reads
        c_in = [*TAPS.values(), TAPS[7]]  # P2..P5, and P6 before its pooling
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, self.dim, 1, bias=False), nn.BatchNorm2d(self.dim)) for c in c_in
        )
        self.bifpn = nn.Sequential(*(BiFPNLayer(self.dim) for _ in range(layers)))
        self.head = segmentation_head(self.dim, num_classes)

    def levels(self, x):
        """P2..P7, which the first BiFPN layer reads."""
        maps = []
        for i, stage in enumerate(self.backbone):
            x = stage(x)
            if i in TAPS:
                maps.append(x)
        *levels, p6 = [lateral(m) for lateral, m in zip(self.lateral, [*maps, maps[-1]])]
        p6 = F.max_pool2d(p6, 3, stride=2, padding=1)
        p7 = F.max_pool2d(p6, 3, stride=2, padding=1)
        return [*levels, p6, p7]

    def features(self, x):
        feats = self.bifpn(self.levels(x))
        return resized(self.head(feats[0]), x.shape[-2:]), feats

    def forward(self, x):
        return self.features(x)[0]


class SelfTeacher(nn.Module):
    """The self-teacher: two more BiFPN layers on the student's six maps, and a head on P2. Source: Sec. 4.2.

    feats, 6 maps (B, dim, H_i, W_i) -> logits (B, num_classes, H_1, W_1), at the size of P2, and feats_t, 6 maps of
    the same shapes as feats.
    Paper vs code: the last layer of the authors is a top-down path only, here with bottom_up=False. In a full one, the
    paper's, no loss reaches the bottom-up path, for the head reads P2 and L_F is detached: P3..P7 are distilled from
    convolutions as they were initialised, on trained maps.
    """

    def __init__(self, dim, num_classes, layers=2, bottom_up=True):
        super().__init__()
        full = [BiFPNLayer(dim) for _ in range(layers - 1)]
        self.bifpn = nn.Sequential(*full, BiFPNLayer(dim, bottom_up=bottom_up))
        self.bifpn[-1].freeze_bottom_up()
        self.head = segmentation_head(dim, num_classes)

    def forward(self, feats):
        feats_t = self.bifpn(feats)
        return self.head(feats_t[0]), feats_t


def resized(logits, size):
    """Logits (B, num_classes, h, w) at another size, bilinear, in float32."""
    return frskd.upsample(frskd.full_precision(logits), size)


# ---------------------------------------------------------------------------------------- losses and methods


def group_totals(labels):
    """Pixels that are not void, at least one, and images of a batch, given y (b, H, W) of each of its parts -> (2,).

    Of several processes, what each has on average: their gradients are averaged, and so are the logged terms.
    """
    pixels = sum((y != VOID).sum() for y in labels)
    totals = torch.stack([pixels, torch.full_like(pixels, sum(len(y) for y in labels))])
    return train.all_reduced(totals).clamp_min(1) / train.processes()


def pixel_cross_entropy(logits, y, pixels):
    """Sum over the pixels that are not void, divided by `pixels`: (B, num_classes, H, W), (B, H, W) -> scalar."""
    return F.cross_entropy(frskd.full_precision(logits), y, ignore_index=VOID, reduction="sum") / pixels


def pixel_distillation(logits, logits_t, y, pixels, temperature):
    """Eq. 4 at each pixel that is not void, summed over these and divided by `pixels`; shapes as above -> scalar.

    Paper vs code: the authors average over the void pixels too.
    """
    void = (y == VOID)[:, None]
    logits, logits_t = (z.masked_fill(void, 0) for z in (logits, logits_t))  # equal: no divergence there
    return frskd.soft_label_distillation(logits, logits_t, temperature) * len(y) / pixels


def ramp(epoch, warmup_epochs, ramp_epochs):
    """Share of alpha and beta in an epoch counted from 0: 0 in the warm-up, then exp(-5 (1 - t)^2), t up to 1.

    Source: the appendix, "adaptively increase". Paper vs code: the paper gives no formula; this is the authors'.
    """
    t = min(1.0, (epoch + 1 - warmup_epochs) / ramp_epochs)
    return math.exp(-5 * (1 - t) ** 2) if epoch >= warmup_epochs else 0.0


class SegmentationFRSKD(frskd.FRSKD):
    """Eq. 5 with every loss at each pixel; alpha and beta rise by `ramp` after a warm-up.

    student: an EfficientDet, teacher: a SelfTeacher on its maps. alpha, beta: 1, 50 (appendix).
    forward: x (B, 3, H, W), y (B, H, W) class numbers or VOID, totals as `group_totals` gives -> terms, a dict of
    WEIGHTED scalars `ce`, `ce_t`, `kd`, `feat`, the last two after the warm-up only; logits (B, num_classes, H, W),
    detached.
    Every term is a sum divided by totals: `ce`, `ce_t`, `kd` by pixels, `feat`, a mean over positions, by images. So
    the terms of the parts of a batch, with the totals of the batch, add up to its terms; totals=None are those of y.
    """

    def __init__(self, student, teacher, *, alpha=1.0, beta=50.0, temperature=1.0, warmup_epochs=40, ramp_epochs=20):
        super().__init__(student, teacher, alpha=alpha, beta=beta, temperature=temperature)
        self.warmup_epochs, self.ramp_epochs = warmup_epochs, ramp_epochs
        self.register_buffer("share", torch.zeros(()), persistent=False)  # a tensor: compiled code reads it anew
        self.distils = False

    def set_epoch(self, epoch, epochs):
        self.share.fill_(ramp(epoch, self.warmup_epochs, self.ramp_epochs))
        self.distils = epoch >= self.warmup_epochs

    def forward(self, x, y, totals=None):
        pixels, images = group_totals([y]) if totals is None else totals
        logits, logits_t, feats, feats_t = self.networks(x)
        logits_t = resized(logits_t, x.shape[-2:])
        terms = dict(ce=pixel_cross_entropy(logits, y, pixels), ce_t=pixel_cross_entropy(logits_t, y, pixels))
        if self.distils and self.alpha > 0:
            kd = pixel_distillation(logits, logits_t, y, pixels, self.temperature)
            terms["kd"] = self.share * self.alpha * kd
        if self.distils and self.beta > 0:
            feat = self.feature_loss(feats, feats_t) * len(x) / images
            terms["feat"] = self.share * self.beta * feat
        return terms, logits.detach()


class SegmentationBaseline(frskd.Baseline):
    """Plain cross-entropy under the same protocol: no teacher, and `ce` is the only term."""

    def forward(self, x, y, totals=None):
        pixels, _ = group_totals([y]) if totals is None else totals
        logits = self.student(x)
        return dict(ce=pixel_cross_entropy(logits, y, pixels)), logits.detach()


def build_student(args, num_classes):
    return EfficientDet(args.arch, num_classes)


def build_frskd(student, num_classes, args):
    teacher = SelfTeacher(student.dim, num_classes, bottom_up=args.teacher == "full")
    keys = ("alpha", "beta", "temperature", "warmup_epochs", "ramp_epochs")
    return SegmentationFRSKD(student, teacher, **{key: getattr(args, key) for key in keys})


def build_baseline(student, num_classes, args):
    student.bifpn[-1].freeze_bottom_up()  # the head reads P2
    return SegmentationBaseline(student)


METHODS = {  # name -> (student, number of classes, args) -> method
    "baseline": build_baseline,
    "frskd": build_frskd,
}


def pretrain(args, method):
    """Loads the backbone's weights from ImageNet: torchvision's, or a file of theirs."""
    if args.weights == "none":
        return
    name, _ = BACKBONES[args.arch]
    if args.weights == "imagenet":
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            state = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except Exception as error:  # of urllib, of the file system, a checksum that differs
            raise UserError(
                f"--weights imagenet: cannot fetch {weights.url}: {data.one_line(error)}; name the file as --weights "
                "FILE, or train from scratch with --weights none"
            ) from None
    else:
        state = train.load_file(args.weights)
    unfit = f"--weights {args.weights} is not a state_dict of torchvision's {name}, the backbone of {args.arch}"
    if not isinstance(state, dict):
        raise UserError(unfit)
    stages = {
        key.removeprefix("features."): value for key, value in state.items() if re.match(r"features\.[0-7]\.", str(key))
    }
    train.load_state(method.student.backbone, stages, unfit)


# ------------------------------------------------------------------------------------- loop and evaluation


def check_batches(args):
    parts = args.accumulate * train.processes()
    if args.batch_size % parts:
        times = f" times {train.processes()} processes" if train.processes() > 1 else ""
        raise UserError(
            f"--batch-size {args.batch_size} is no multiple of --accumulate {args.accumulate}{times}: name both"
        )
    if args.image_size <= ONE_POSITION and args.batch_size == parts:
        raise UserError(
            f"--image-size {args.image_size} makes P7 a single position, which batch norm cannot normalise over one "
            "image: take a larger --batch-size, a smaller --accumulate, or crops above 128 px"
        )


def build_loaders(args, training=True):
    """-> data, training loader, test loader; without `training`, the data and the test loader alone."""
    if training:
        check_batches(args)
    loaded = data.load_masks(
        args.dataset,
        data_dir=args.data_dir,
        image_size=args.image_size,
        protocol=args.protocol,
        download=args.download,
    )
    if loaded.leaked and train.rank() == 0:
        print(
            f"seg.py: warning: {loaded.leaked} of the {len(loaded.test)} test images are also training images; "
            "--protocol clean leaves them out",
            file=sys.stderr,
        )
    options = dict(
        image_size=args.image_size,
        classes=loaded.classes,
        seed=args.seed,
        stats=data.STATS["imagenet"],
        workers=args.workers,
        device=args.device,
        rank=train.rank(),
        processes=train.processes(),
    )
    part = max(1, args.batch_size // (args.accumulate * train.processes()))
    test_loader = data.MaskLoader(loaded.test, train=False, batch_size=part, **options)
    if not training:
        return loaded, test_loader
    return (
        loaded,
        data.MaskLoader(loaded.train, train=True, batch_size=args.batch_size, part=part, **options),
        test_loader,
    )


def train_epoch(args, forward, method, loader, optimizer, epoch, stop):
    """One pass over the training images, an update a batch, a batch in parts; -> means of the terms, the clock.

    forward: see train.Forward.
    """
    method.train()
    meter, autocast, sizes = train.Meter(method, epoch), train.precision(args), loader.sizes
    for parts in train.watched(loader.groups(epoch), len(loader), meter, args, stop):
        totals, means = group_totals([y for _, y in parts]), {}
        optimizer.zero_grad()
        for i, (x, y) in enumerate(parts, 1):
            with forward.accumulating(i < len(parts)):
                with autocast:
                    terms, _ = forward(x, y, totals)
                sum(terms.values()).backward()
            means = {name: term.detach() + means.get(name, 0) for name, term in terms.items()}
        meter.update(means, sizes[meter.step] / train.processes())
        if args.clip_value:
            nn.utils.clip_grad_value_(method.parameters(), args.clip_value)
        optimizer.step()
    return meter.read(), meter.clock()


def confusion_matrix(predicted, mask, num_classes):
    """Pixels that are not void by true class (rows) and predicted class: two int64 of one shape -> (C, C) int64."""
    known = mask != VOID
    pairs = num_classes * mask[known] + predicted[known]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(confusion):
    """(C, C) -> (C,) float64; nan for a class that is neither in the masks nor predicted."""
    hits = confusion.diag().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


@torch.no_grad()
def evaluate(student, loader, autocast, stop=None):
    """-> miou, the mean of the classes' IoU in percent, nan if a logit is no number; iou, a dict by class, None where
    the class is neither in the masks nor predicted. Of the student alone, in evaluation mode, at the masks' own sizes.

    Paper vs code: the paper is silent; the authors squeeze the masks to the network's size.
    """
    student.eval()
    n = len(loader.classes)
    confusion, not_finite = torch.zeros(n, n, dtype=torch.long, device=loader.device), 0
    for x, masks in train.stopped_by(stop, loader.epoch(), len(loader)):
        with autocast:
            logits = student(x)
        not_finite = not_finite + (~logits.isfinite()).sum()
        for z, mask in zip(logits, masks):
            predicted = resized(z[None], mask.shape).argmax(1)[0]
            confusion += confusion_matrix(predicted, mask, n)
    not_finite = train.all_reduced(torch.as_tensor(not_finite, device=loader.device))
    if not train.all_reduced(confusion).any():
        train.agree(DataError("every pixel of the test masks is void"))
    iou = 100 * intersection_over_union(confusion)
    values = [None if math.isnan(value) else value for value in iou.tolist()]
    return dict(miou=math.nan if not_finite else iou.nanmean().item(), iou=dict(zip(loader.classes, values)))


# ------------------------------------------------------------------------------------------ pictures and cost


def voc_palette(n):
    """The colours that VOC gives to n classes: bit k of r, g, b, from the top, is bit 3 k, 3 k + 1, 3 k + 2 of c."""
    return [
        tuple(sum((c >> (3 * k + channel) & 1) << (7 - k) for k in range(3)) for channel in range(3)) for c in range(n)
    ]


@torch.no_grad()
def draw_predictions(method, loader, loaded, path, images=4, side=128):
    """For a few test images, evenly spaced, one row each: the image, its mask, what the student predicts and, where the
    method has one, what the self-teacher does; beside it the classes of the mask in their colours, void white."""
    method.eval()
    rows = []
    for i in torch.linspace(0, len(loaded.test) - 1, min(images, len(loaded.test))).long().tolist():
        image, mask = loader.dataset[0, i]  # (3, size, size), (H, W)
        x = loader.normalize(image[None].to(loader.device)).contiguous(memory_format=torch.channels_last)
        logits, feats = method.student.features(x)
        labels = [mask, resized(logits, mask.shape).argmax(1)[0]]
        if hasattr(method, "teacher"):
            labels.append(resized(method.teacher(feats)[0], mask.shape).argmax(1)[0])
        size = (side, round(side * mask.shape[1] / mask.shape[0]))
        image = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().byte()
        labels = [F.interpolate(m[None, None].cpu().float(), size)[0, 0].long() for m in labels]
        rows.append((image, labels))

    margin, header, gap, line = 110, 24, 4, 14
    titles = ["image", "ground truth", "student", "self-teacher"][: 1 + len(rows[0][1])]
    step = max(image.shape[2] for image, _ in rows) + gap
    legends = [[c for c in labels[0].unique().tolist() if c != VOID] for _, labels in rows]
    heights = [max(side, line * len(legend)) + gap for legend in legends]
    picture = Image.new("RGB", (margin + len(titles) * step, header + sum(heights)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for k, title in enumerate(titles):
        draw.text((margin + k * step, 5), title, "black", font)
    colors = voc_palette(len(loaded.classes)) + [(255, 255, 255)]
    numbers = torch.tensor([*range(len(loaded.classes)), VOID]).view(-1, 1, 1)
    top = header
    for (image, labels), legend, height in zip(rows, legends, heights):
        for n, c in enumerate(legend):
            draw.rectangle((4, top + line * n + 3, 12, top + line * n + 11), colors[c], "black")
            draw.text((17, top + line * n), loaded.classes[c], "black", font)
        tiles = [image, *(draw_segmentation_masks(image, m == numbers, alpha=0.75, colors=colors) for m in labels)]
        for k, tile in enumerate(tiles):
            picture.paste(Image.fromarray(tile.permute(1, 2, 0).numpy()), (margin + k * step, top))
        top += height
    train.write_atomically(path, lambda file: picture.save(file, format="png"))


def print_cost(task, _):
    """Parameters and FLOPs of students and self-teachers, as a markdown table."""
    print(
        "One image of 512x512, 21 classes; a FLOP is a multiply-add. Share: of the self-teacher, which is thrown away,"
    )
    print("in both networks together; its logits are left at the size of P2.\n")
    columns = [
        f"{network} {unit}" for network in ("student", "self-teacher") for unit in ("parameters / M", "FLOPs / G")
    ]
    rows = {}
    for arch, (backbone, dim) in BACKBONES.items():
        student, x = EfficientDet(arch, 21).eval(), torch.zeros(1, 3, 512, 512)
        with torch.no_grad():
            feats = student.features(x)[1]
        params, flops = frskd.cost(student, x)
        params_t, flops_t = frskd.cost(SelfTeacher(dim, 21), feats)
        cells = [f"{value:.3f}" for value in (params / 1e6, flops / 1e9, params_t / 1e6, flops_t / 1e9)]
        shares = [f"{100 * t / (s + t):.1f} %" for s, t in ((params, params_t), (flops, flops_t))]
        rows[f"{arch} ({backbone})"] = cells + shares
    train.print_rows("network", [*columns, "share of parameters", "share of FLOPs"], rows)


# ----------------------------------------------------------------------------------------------------- parser


# fmt: off
def parser():
    p = train.Parser(prog="seg.py", allow_abbrev=False, description="Train EfficientDet for semantic segmentation with "
                     "FRSKD. Every value that is not given is the recipe's of the data set.")

    def recipe_values(key):
        return train.recipe_values(key, RECIPES)

    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=list(RECIPES), help="shapes: drawn in memory; voc: VOC2007 and VOC2012 as "
                   "their archives unpack (default shapes)")
    g.add_argument("--data-dir", metavar="DIR", help="the folder that holds VOCdevkit/ (default data)")
    g.add_argument("--download", action="store_true", default=None, help="fetch the archives of voc where they are "
                   "missing")
    g.add_argument("--protocol", choices=["clean", "paper"], help="clean: leave out of VOC2012 what VOC2007 holds, "
                   "every test image among it; paper: train on the whole list (default clean; Sec. 4.2 is paper)")
    g.add_argument("--image-size", type=at_least(64), metavar="PX", help="side of the training crops and of the "
                   f"evaluation in pixels (default {recipe_values('image_size')}; 512 is the authors')")

    g = p.add_argument_group("network")
    g.add_argument("--arch", choices=list(BACKBONES), help="EfficientDet-d0 or -d1, on EfficientNet-b0 or -b1 (default "
                   "d0; Sec. 4.2)")
    g.add_argument("--weights", metavar="{imagenet,none,FILE}", type=train.folder_name, help="what the backbone starts "
                   "from: torchvision's IMAGENET1K_V1, nothing, or a file of theirs (default "
                   f"{recipe_values('weights')}; appendix)")

    g = p.add_argument_group("method")
    g.add_argument("--method", choices=list(METHODS), help="baseline is plain cross-entropy (default frskd)")
    g.add_argument("--teacher", choices=["full", "top-down"], help="full: two BiFPN layers, the second one's bottom-up "
                   "path untrained; top-down: the second is without, as the authors' (default full; Sec. 4.2)")
    g.add_argument("--alpha", type=not_negative, help="weight of the soft-label loss L_KD; larger trusts the "
                   "self-teacher more, 0 is without (default 1; appendix)")
    g.add_argument("--beta", type=not_negative, help="weight of the feature loss L_F; 0 is without (default 50; "
                   "appendix)")
    g.add_argument("--temperature", type=positive, help="K of L_KD; larger softens both distributions (default 1, the "
                   "authors' code; Sec. 4.1 has 4)")
    g.add_argument("--warmup-epochs", type=at_least(0), metavar="N", help="alpha and beta are zero for so long "
                   "(default 2/3 of --epochs, 40 of 60; appendix)")
    g.add_argument("--ramp-epochs", type=at_least(1), metavar="N", help="and then rise for so long (default the rest "
                   "of --epochs, 20; the authors' code)")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=at_least(1), help=f"(default {recipe_values('epochs')}; Sec. 4.2, shapes ours)")
    g.add_argument("--milestones", type=train.epoch_list, metavar="A,B,...", help="after these epochs the learning "
                   "rate falls to a tenth; none is constant (default 2/3 of --epochs, 40 of 60; Sec. 4.2)")
    g.add_argument("--batch-size", type=at_least(1), help=f"images an update (default "
                   f"{recipe_values('batch_size')}; the authors' 2 x 16, shapes ours)")
    g.add_argument("--accumulate", type=at_least(1), metavar="N", help="a batch passes in N equal parts, one after the "
                   "other: less memory, the same gradient but for batch norm (default "
                   f"{recipe_values('accumulate')}; the authors' code)")
    g.add_argument("--clip-value", type=positive, metavar="X", help="clip each element of the gradient to -X..X "
                   "(default 0.1 shapes, ours; not voc; the authors' code has 2)")
    g.add_argument("--lr", type=positive, help="of SGD, at the start (default 0.01; Sec. 4.2)")
    g.add_argument("--momentum", type=train.below_one, help="not Nesterov (default 0.9, the authors' code)")
    g.add_argument("--weight-decay", type=not_negative, help="on every parameter (default 5e-4, the authors' code)")

    g = train.add_run_options(p, "predictions")
    g.add_argument("--cost", action="store_true", default=None, help="print parameters and FLOPs of students and "
                   "self-teachers")
    return p
# fmt: on


def check_options(given):
    """Options that do not go together, refused before any data is read."""
    if given.get("method") == "baseline":
        refuse(given, TEACHER_OPTIONS, "has no effect with --method baseline, which has no teacher")
    if given.get("alpha") == 0:
        refuse(given, ["temperature"], "has no effect with --alpha 0, which is without soft labels")
        if given.get("beta") == 0:
            refuse(given, ["warmup_epochs", "ramp_epochs"], "has no effect with --alpha 0 and --beta 0: nothing rises")
    if given.get("dataset", "shapes") == "shapes":
        refuse(given, ["data_dir", "download", "protocol"], "has no effect with --dataset shapes, drawn in memory")


SEGMENTATION = train.Task(
    script="seg.py",
    recipe=COMMON | dict(weights="none", image_size=512, warmup_epochs=40, ramp_epochs=20),
    metrics=dict(miou="mIoU"),
    picture="predictions",
    parser=parser,
    check_options=check_options,
    resolve=resolve,
    run_name=run_name,
    schedule=lambda args: ["milestones"] + ["warmup_epochs", "ramp_epochs"] * (args.method == "frskd"),
    build_loaders=build_loaders,
    build_student=build_student,
    methods=METHODS,
    pretrain=pretrain,
    whole_batch=lambda loader: loader.part,
    train_epoch=train_epoch,
    evaluate=evaluate,
    draw=draw_predictions,
    reports=dict(table=(train.print_table, ()), cost=(print_cost, ())),
)


def main(argv=None):
    return train.run_command(SEGMENTATION, argv)


if __name__ == "__main__":
    sys.exit(main())
