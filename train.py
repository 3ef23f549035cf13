"""Train an image classifier with FRSKD or without, evaluate it, look at what it attends to.

    python train.py                                                          # drawn shapes: no file, no network
    python train.py --dataset cifar100 --download --arch resnet18 --alpha 2 --beta 100
    python train.py --dataset cifar100 --arch resnet18 --method baseline     # or one, ddgsd, byot, sad, cskd, slasd
    python train.py --dataset cifar100 --method kd --feature-loss at --teacher-checkpoint FILE
    python train.py --dataset folder --data-dir photos --arch resnet34
    python train.py --resume runs/cifar100-resnet18-frskd-s0
    python train.py --eval runs/cifar100-resnet18-frskd-s0/student.pt
    python train.py --table runs
    python train.py --bench
    torchrun --nproc-per-node=2 train.py --dataset cifar100                  # on two GPUs; --resume as above

A run writes args.json, log.jsonl (one object an epoch), last.pt (everything to resume), student.pt (the plain
network) and attention.png into runs/<dataset>-<arch>-<name>-s<seed>.
"""

import argparse
import ctypes
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from torchvision.transforms import v2
from tqdm import tqdm

import baselines
import data
import frskd
from data import DataError

# --------------------------------------------------------------------------------------------------- recipes

COMMON = dict(  # Sec. 4.1; momentum: the paper is silent, 0.9 is the authors' code
    method="frskd", arch="resnet18", epochs=200, lr_drops=(1 / 2, 3 / 4), lr=0.1, momentum=0.9, weight_decay=1e-4,
    temperature=4.0, teacher="bifpnc", width=2, channels=256, feature_loss="at", sla=False, mixup=None, cutmix=None,
    teacher_arch="resnet34", teacher_checkpoint=None, blocks=None, per_class=None, amp=False, sync_bn=False,
)  # fmt: skip
CIFAR = COMMON | dict(stats="cifar", image_size=32, alpha=2.0, beta=100.0, batch_size=128)
FGVR = COMMON | dict(stats="imagenet", image_size=224, alpha=1.0, beta=200.0, batch_size=32)
RECIPES = {
    "shapes": CIFAR | dict(arch="wrn16_2", lr=0.05, batch_size=32, epochs=8),  # ours: short enough for two CPU cores
    "cifar100": CIFAR,  # Sec. 4.1
    "tinyimagenet": CIFAR | dict(stats="tinyimagenet", alpha=3.0),
    "cub200": FGVR,  # fine-grained visual recognition
    "mit67": FGVR,
    "stanford40": FGVR,
    "dogs": FGVR,
    "imagenet": FGVR | dict(batch_size=256, epochs=90, lr_drops=(1 / 3, 2 / 3)),
    "folder up to 64 px": CIFAR,
    "folder above 64 px": FGVR,
}
# Weights of the feature losses that are no recipe's. Those of kd are each loss's own, see baselines.Distillation.
# Paper vs code: for frskd the paper and the authors' code give none; these are ours.
BETA = dict(frskd=dict(fitnet=1.0, od=0.01), kd=dict(none=0.0, at=1000.0, fitnet=100.0, od=1.0))
# Which METHOD_OPTIONS each method takes, one that is not here none, and their defaults: of frskd the recipes', of the
# others the methods' own, from the sources that baselines.py names.
FRSKD_OPTIONS = ("alpha", "beta", "temperature", "teacher", "width", "channels", "feature_loss", "sla")
DEFAULTS = dict(
    one=dict(alpha=1.0, temperature=3.0),
    ddgsd=dict(alpha=1.0, beta=5e-4, temperature=3.0),
    byot=dict(alpha=0.1, beta=1e-6, temperature=3.0),
    sad=dict(beta=0.1),
    cskd=dict(alpha=1.0, temperature=4.0),
    slasd=dict(alpha=1.0, temperature=1.0),
    kd=dict(
        alpha=1.0, beta=0.0, temperature=4.0, feature_loss="none", teacher_arch="resnet34", teacher_checkpoint=None
    ),
)
CSKD_LARGE = 3.0  # alpha of cskd above 64 px
# Of the Beta distribution, up to 64 px and above (appendix: CIFAR-100 and TinyImageNet; FGVR).
# Paper vs code: neither says it for ImageNet; as for FGVR.
MIXUP = (0.2, 0.3)
CUTMIX = 1.0  # appendix
RUN = dict(seed=0, data_dir="data", download=False, workers=2, device=None, compile=None, output=None)

# What a choice that is not the recipe's adds to the name of a run, in this order.
TAGS = dict(
    temperature="t", alpha="alpha", beta="beta", width="w", blocks="blocks", weight_decay="wd", lr="lr",
    momentum="m", batch_size="bs", image_size="px", per_class="n", epochs="e", milestones="ms",
)  # fmt: skip
METHOD_OPTIONS = (*FRSKD_OPTIONS, "teacher_arch", "teacher_checkpoint")
THIS_CALL = ("output", "overwrite", "resume", "eval")  # not kept in a checkpoint
MAY_DIFFER = ("data_dir", "download", "workers", "device", "compile", *THIS_CALL)  # from the checkpoint's values

# What an evaluation reads: which network and images, and how they are brought together.
EVALUATED = ("eval", "dataset", "data_dir", "download", "protocol", "image_size", "arch", "blocks", "amp", "device",
             "workers", "batch_size", "accumulate")  # fmt: skip

DOWNLOADS = ["cifar100", *(name for name, official in data.OFFICIAL.items() if official.archives)]


class UserError(Exception):
    """What the user can mend: what was wrong, where, what to do, in one line."""


class NonFinite(Exception):
    """A term or a gradient became infinite or not a number."""


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; .signum says which."""

    def __init__(self, signum):
        self.signum = signum


def resolve(given):
    """The options given on the command line, a dict -> all values, with the recipe's where none was given."""
    dataset = given.get("dataset", "shapes")
    if dataset == "folder":
        natural = data.folder_image_size(given.get("data_dir", "data"))
        small = given.get("image_size", natural) <= data.DEVICE_RESIDENT
        recipe = RECIPES[f"folder {'up to' if small else 'above'} 64 px"] | dict(image_size=natural)
    else:
        recipe = RECIPES[dataset]
    recipe = recipe | dict(dataset=dataset)
    method = given.get("method", "frskd")
    recipe |= DEFAULTS.get(method, {})
    if method == "cskd" and given.get("image_size", recipe["image_size"]) > data.DEVICE_RESIDENT:
        recipe["alpha"] = CSKD_LARGE
    recipe["beta"] = BETA.get(method, {}).get(given.get("feature_loss"), recipe["beta"])
    args = with_defaults(recipe, dict(attention=None), given)
    args.mixup = mixup_alpha(args.mixup, args.image_size)
    return args


def options_of(method):
    """Which METHOD_OPTIONS a method takes."""
    return FRSKD_OPTIONS if method == "frskd" else tuple(DEFAULTS.get(method, ()))


def with_defaults(recipe, defaults, given):
    """The options given, with the recipe's values and the defaults of any run where none was given."""
    args = SimpleNamespace(**RUN | defaults | recipe | given)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.recipe = recipe
    if "milestones" not in given:
        args.milestones = default_milestones(args)
    if args.milestones != sorted(set(args.milestones)) or args.milestones[-1:] >= [args.epochs]:
        raise UserError(f"--milestones {text(args.milestones)}: the epochs must increase and lie below {args.epochs}")
    return args


def default_milestones(args):
    """The epochs after which the recipe lowers the learning rate: 100 and 150 of 200 (Sec. 4.1)."""
    return sorted({int(args.epochs * fraction) for fraction in args.recipe["lr_drops"]} - {0})


def mixup_alpha(value, image_size):
    """--mixup without a value is the appendix's for images of this size."""
    small, large = MIXUP
    default = small if image_size <= data.DEVICE_RESIDENT else large
    return default if value is True else value


def run_name(args):
    """The method, then every choice that changes the result and is not the recipe's: frskd+sla-nofeat-wd0.0005."""
    name = args.method + "+sla" * args.sla
    if args.mixup:
        name += f"+mixup{text(args.mixup)}"
    if args.cutmix:
        name += "+cutmix" if args.cutmix == CUTMIX else f"+cutmix{text(args.cutmix)}"
    defaults = args.recipe | dict(milestones=default_milestones(args))
    for key in ("feature_loss", "teacher_arch"):
        if getattr(args, key) != defaults[key]:
            name += f"-{getattr(args, key)}"
    ignored = tuple(key for key in METHOD_OPTIONS if key not in options_of(args.method))
    if args.method == "frskd" and args.beta == 0:
        name += "-nofeat"
        ignored += ("beta",)
    if args.method == "frskd" and args.teacher == "bifpn":
        name += f"-bifpn{args.channels}"
        ignored += ("width",)
    return name + tagged(args, defaults, TAGS, ignored)


def tagged(args, defaults, tags, ignored):
    """The part of a run's name that says which values are not the defaults: -wd0.0005-e20."""
    name = ""
    for key, tag in tags.items():
        value = getattr(args, key)
        if value != defaults[key] and key not in ignored:
            name += f"-{tag}{text(value)}"
    return name + "-amp" * args.amp + "-syncbn" * args.sync_bn


def text(value):
    """A value as one would type it."""
    if isinstance(value, list):
        return ",".join(text(v) for v in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------- networks and methods


def own_network(arch):
    """Constructor (num_classes, stem) of a network of frskd.py; None for one of torchvision."""
    wrn = re.fullmatch(r"wrn(\d+)_(\d+)", arch)
    if wrn:
        return lambda num_classes, stem: frskd.WideResNet(int(wrn[1]), int(wrn[2]), num_classes)
    return {"resnet18": frskd.resnet18, "resnet34": frskd.resnet34}.get(arch)


def build_student(args, num_classes):
    """The network that --arch names, with `features` (see frskd.py)."""
    try:
        net = build_network(args.arch, args.image_size, num_classes)
        return net if own_network(args.arch) else frskd.Adapter(net, args.blocks, args.image_size)
    except (ValueError, RuntimeError, AssertionError) as error:  # the adapter, or images that do not suit the network
        raise UserError(f"--arch {args.arch} at {args.image_size} px: {error}") from None


def build_network(arch, image_size, num_classes):
    """A network of frskd.py, or else of torchvision."""
    own = own_network(arch)
    if own:
        return own(num_classes, "cifar" if image_size <= data.DEVICE_RESIDENT else "imagenet")
    aux = dict(aux_logits=False, init_weights=True) if arch in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(arch, num_classes=num_classes, **aux)


FEATURE_LOSSES = {  # name -> (student, self-teacher) -> the loss, see frskd.FRSKD
    "at": lambda student, teacher: frskd.attention_transfer,
    "fitnet": lambda student, teacher: frskd.FitNet(student.channels, teacher.dims),
    "od": lambda student, teacher: frskd.Overhaul(student.channels, teacher.norms),
}
KD_FEATURE_LOSSES = FEATURE_LOSSES | {  # of a pretrained teacher, see baselines.Distillation
    "fitnet": lambda student, teacher: baselines.Hint(student.channels, teacher.channels),
    "none": lambda student, teacher: None,
}


def build_frskd(student, num_classes, args):
    if args.teacher == "bifpn":
        teacher = frskd.BiFPN(student.channels, num_classes, dim=args.channels)
    else:
        teacher = frskd.BiFPNc(student.channels, num_classes, width=args.width)
    feature_loss = FEATURE_LOSSES[args.feature_loss](student, teacher)
    method = frskd.FRSKDSLA if args.sla else frskd.FRSKD
    return method(student, teacher, feature_loss=feature_loss, **weights(args))


def build_kd(student, num_classes, args):
    image = torch.zeros(1, 3, args.image_size, args.image_size)
    try:
        teacher = build_network(args.teacher_arch, args.image_size, num_classes)
        feature_loss = KD_FEATURE_LOSSES[args.feature_loss](student, teacher)
        with frskd.evaluation_mode(student), frskd.evaluation_mode(teacher), torch.no_grad():
            if feature_loss:
                frskd.check_sizes(student.features(image)[1], teacher.features(image)[1])
            else:
                teacher(image)
    except (ValueError, RuntimeError, AssertionError) as error:  # images that do not suit it, or maps that do not match
        raise UserError(f"--teacher-arch {args.teacher_arch} at {args.image_size} px: {error}") from None
    return baselines.Distillation(student, teacher, feature_loss=feature_loss, **weights(args))


def weights(args):
    """alpha, beta and temperature, those that the method takes."""
    return {key: getattr(args, key) for key in ("alpha", "beta", "temperature") if key in options_of(args.method)}


METHODS = {  # name -> (student, number of classes, args) -> method, see frskd.FRSKD.forward
    "baseline": lambda student, num_classes, args: frskd.Baseline(student),
    "one": lambda student, num_classes, args: baselines.ONE(student, num_classes, **weights(args)),
    "ddgsd": lambda student, num_classes, args: baselines.DDGSD(student, **weights(args)),
    "byot": lambda student, num_classes, args: baselines.BYOT(
        student, num_classes, image_size=args.image_size, **weights(args) | dict(beta=args.beta * processes())
    ),  # its feature term is a sum over a process's images: exact where all have as many
    "sad": lambda student, num_classes, args: baselines.SAD(student, **weights(args)),
    "cskd": lambda student, num_classes, args: baselines.CSKD(student, **weights(args)),
    "slasd": lambda student, num_classes, args: baselines.SLASD(student, num_classes, **weights(args)),
    "frskd": build_frskd,
    "kd": build_kd,
}


def load_teacher(args, method):
    """The weights of the pretrained teacher of --method kd; a resumed run has them in its checkpoint."""
    if args.method == "kd":
        state, name = load_file(args.teacher_checkpoint), f"--teacher-checkpoint {args.teacher_checkpoint}"
        if isinstance(state, dict) and "optimizer" in state:
            raise UserError(f"{name} is a last.pt: name the student.pt beside it")
        load_state(method.teacher, state, f"{name} does not fit {args.teacher_arch}")


def build_method(task, args, num_classes):
    torch.manual_seed(args.seed)
    student = task.build_student(args, num_classes)
    try:
        method = task.methods[args.method](student, num_classes, args)
    except ValueError as error:  # a network that does not suit the method
        raise UserError(f"--method {args.method} with --arch {args.arch}: {error}") from None
    return method.to(args.device, memory_format=torch.channels_last)


def build_loaders(args, training=True):
    """-> data, training loader, test loader; without `training`, the data and the test loader alone."""
    loaded = data.load(
        args.dataset,
        data_dir=args.data_dir,
        image_size=args.image_size,
        per_class=args.per_class if training else None,
        download=args.download,
        decoded=("train", "test") if training else ("test",),
    )
    if loaded.skipped and rank() == 0:
        print(
            f"train.py: warning: {len(loaded.skipped)} files are not used, for they have no image's ending or lie in "
            f"no class folder, first {loaded.skipped[0]}",
            file=sys.stderr,
        )
    options = dict(
        batch_size=args.batch_size,
        image_size=args.image_size,
        seed=args.seed,
        stats=data.STATS[args.stats],
        workers=args.workers,
        device=args.device,
        rank=rank(),
        processes=processes(),
    )
    mix = None
    if args.mixup:
        mix = v2.MixUp(alpha=args.mixup, num_classes=len(loaded.classes))
    elif args.cutmix:
        mix = v2.CutMix(alpha=args.cutmix, num_classes=len(loaded.classes))
    loaders = [data.make_loader(loaded.train, train=True, mix=mix, **options)] if training else []
    return loaded, *loaders, data.make_loader(loaded.test, train=False, **options)


# ---------------------------------------------------------------------------------------------------- processes


def rank():
    """The number of this process among those that train together; the first one, 0, alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """How many processes train together: those that torchrun started, or one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def local_processes():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def joined():
    """Joins the processes that torchrun started, where it did: NCCL among GPUs, one each, gloo among CPUs."""
    if not dist.is_torchelastic_launched():
        yield
        return
    gpus = torch.cuda.device_count()
    if local_rank() < gpus:
        torch.cuda.set_device(local_rank())
    store, number, count = next(rendezvous("env://"))
    # After a restart, the store may still hold the addresses of the processes before.
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend, patience = "cpu:gloo,cuda:nccl" if gpus else "gloo", timedelta(hours=12)  # one may fetch a data set
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=patience)
    try:
        yield
    except RuntimeError as error:
        if not is_of_processes(error):
            raise
        raise UserError(f"another process is gone ({data.one_line(error)[:200]})") from None
    finally:
        dist.destroy_process_group()


def is_of_processes(error):
    """Whether it comes from the connection with the other processes, mostly since one has ended."""
    return processes() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def agree(error):
    """Raises the error of the first process that has one, in all of them; does nothing where all have None."""
    if processes() > 1:
        failed = torch.tensor([error is not None], dtype=torch.int32)  # on the CPU: no device is waited for
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed:
            errors = [None] * processes()
            dist.all_gather_object(errors, error)
            error = next(e for e in errors if e is not None)
            error.told = rank() > 0  # the first process prints it, see complain
    if error is not None:
        raise error


@contextmanager
def agreed():
    """Around what a process does alone: where it fails in one of them, all stop, by the same error."""
    error = None
    try:
        yield
    except (UserError, DataError) as raised:
        error = raised
    agree(error)


def all_reduced(tensor, operation=dist.ReduceOp.SUM):
    """The sum over all processes, in place, or their minimum, maximum ..."""
    if processes() > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def share_buffers(method):
    """Every process gets the running statistics of batch norm of the first, as DistributedDataParallel at a step."""
    if processes() > 1:
        for buffer in method.buffers():
            dist.broadcast(buffer, 0)


class Forward:
    """The method on a batch: (x, y, ...) -> terms, logits; compiled with --compile, gradients averaged over processes.

    whole_batch: its number of labels. A batch of another size runs uncompiled: nothing is compiled a second time.
    """

    def __init__(self, method, args, whole_batch):
        self.eager, self.whole_batch = method, whole_batch
        if processes() > 1:
            devices = [torch.cuda.current_device()] if "cuda" in args.device else None
            self.eager = DistributedDataParallel(method, devices)
        self.compiled = torch.compile(self.eager, backend=args.compile) if args.compile else self.eager

    def __call__(self, x, y, *more):
        return (self.compiled if len(y) == self.whole_batch else self.eager)(x, y, *more)

    def accumulating(self, more):
        """A context for a part of a batch: while there is `more`, gradients are added up without averaging them."""
        return self.eager.no_sync() if more and processes() > 1 else nullcontext()


# ------------------------------------------------------------------------------------------------------- loop


@dataclass
class Task:
    """What classification and segmentation differ in; command line, epochs and the folder of a run are shared.

    given: the options of a command line, a dict. args: all values of a run. metric: the result among the metrics.
    """

    script: str  # "train.py"
    recipe: dict  # any one: keys and types of the values that a checkpoint must hold
    metrics: dict  # of the test split, in percent: {key in the log: its name}; the first is the result
    picture: str  # the option that draws, and the stem of its file
    parser: Callable  # () -> Parser
    check_options: Callable  # (given); raises UserError where they do not go together
    resolve: Callable  # given -> args, all but script, name and the default of output
    run_name: Callable  # args -> the name of the run
    schedule: Callable  # args -> the keys whose defaults follow from --epochs
    build_loaders: Callable  # (args, training=True) -> data, training loader if `training`, test loader
    build_student: Callable  # (args, num_classes) -> student
    methods: dict  # name -> (student, num_classes, args) -> method
    pretrain: Callable  # (args, method): loads the weights that a fresh run starts from
    whole_batch: Callable  # training loader -> the number of labels of a whole batch, see Forward
    train_epoch: Callable  # (args, forward, method, loader, optimizer, epoch, stop) -> means of the terms, the clock
    evaluate: Callable  # (student, loader, autocast, stop=None) -> metrics; the first is nan if a logit is no number
    draw: Callable  # (method, loader, data, path)
    reports: dict  # options that print something and stop: {key: (function (task, given), other options it takes)}

    @property
    def metric(self):
        return next(iter(self.metrics))


def train_epoch(args, forward, method, loader, optimizer, epoch, stop):
    """One pass over the training images; -> means of the terms and train_top1, the clock. forward: see Forward."""
    method.train()
    meter, autocast, sizes = Meter(method, epoch), precision(args), loader.sizes
    for x, y in watched(loader.epoch(epoch), len(loader), meter, args, stop):
        optimizer.zero_grad()
        with autocast:
            terms, logits = forward(x, y)
        share = len(y) * processes() / sizes[meter.step]  # the processes' gradients are averaged; 1 for a single one
        (share * sum(terms.values())).backward()
        optimizer.step()
        meter.update(terms | dict(train_top1=accuracy(logits, y)), len(y))
    return meter.read(), meter.clock()


def accuracy(logits, y):
    """Top-1 accuracy in percent; a soft label (B, num_classes) counts as its largest entry."""
    labels = y.argmax(1) if y.ndim == 2 else y
    return 100 * (logits.argmax(1) == labels).double().mean()


def watched(batches, steps, meter, args, stop):
    """The batches of an epoch under a progress bar: the meter is read every 50 steps."""
    with progress_bar(steps, epoch_title(meter.epoch, args)) as bar:
        for batch in stopped_by(stop, batches, steps, meter):
            yield batch
            if meter.step % 50 == 0:
                bar.set_postfix({name: f"{value:.3g}" for name, value in meter.read().items()})
            bar.update()


def stopped_by(stop, batches, steps, meter=None):
    """The batches of an epoch, until a signal, or an image that cannot be read, stops all processes at the same step.

    Where a process has fewer batches than steps, it waits for the others. The meter adds up the time spent waiting.
    """
    batches, error = iter(batches), None
    stop = stop or StopOnSignal()  # not entered: no signal reaches it
    for _ in range(steps):
        asked = time.perf_counter()
        try:
            batch = next(batches, None)
        except DataError as raised:
            error = raised
        if meter:
            meter.data_wait += time.perf_counter() - asked
        stop.check(error)
        if batch is not None:
            yield batch


def epoch_title(epoch, args):
    return f"epoch {epoch + 1}/{args.epochs}"


def train(task, args, loaders, folder, checkpoint, stop):
    """Train to args.epochs, from the checkpoint where there is one; -> the log, a list of dicts, one an epoch."""
    loaded, train_loader, test_loader = loaders
    with agreed():
        method = build_method(task, args, len(loaded.classes))
    if args.sync_bn:
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    train_loader.pairs = getattr(method, "pairs", None)  # what the method wants beside each image
    fused = True if "cuda" in args.device else None  # one kernel
    optimizer = torch.optim.SGD(  # weight decay on everything, as the authors' code
        method.parameters(),
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=fused,
    )
    log = []
    with agreed():
        if checkpoint:
            load_state(method, checkpoint["method"], unfit_checkpoint(args))
            load_state(optimizer, checkpoint["optimizer"], unfit_checkpoint(args))
            optimizer.param_groups[0]["fused"] = fused  # the checkpoint may be of another device
            log = checkpoint["log"]
        elif rank() == 0:  # whose weights DistributedDataParallel hands to all
            task.pretrain(args, method)
            remove_run(folder)
        if rank() == 0:
            write_run(folder, args, loaded, log)

    autocast = precision(args)
    forward = Forward(method, args, task.whole_batch(train_loader))
    metric, metric_name = task.metric, task.metrics[task.metric]
    pictures = getattr(args, task.picture)
    for epoch in range(len(log), args.epochs):
        key = (args.seed, epoch, "dropout", rank()) if rank() > 0 else (args.seed, epoch)  # each process its own
        torch.manual_seed(data.seed_of(*key))  # a resumed run draws the same
        lr = optimizer.param_groups[0]["lr"] = args.lr / 10 ** sum(epoch >= m for m in args.milestones)
        if hasattr(method, "set_epoch"):
            method.set_epoch(epoch, args.epochs)
        means, clock = task.train_epoch(args, forward, method, train_loader, optimizer, epoch, stop)
        share_buffers(method)
        metrics = task.evaluate(method.student, test_loader, autocast, stop)
        check_finite(method, metrics[metric], epoch)
        log.append(dict(epoch=epoch + 1, lr=lr, **means, **metrics, **clock))
        terms = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        result = f"{metric_name} {metrics[metric]:.2f}  {clock['images_per_s']:.0f} images/s"
        with agreed():
            if rank() == 0:
                write_log(folder, log)
                if pictures and epoch + 1 in pictures:  # before the checkpoint: a resumed run does not come back to it
                    task.draw(method, test_loader, loaded, folder / f"{task.picture}-{epoch + 1}.png")
                save_checkpoint(folder, method, optimizer, args, log)
                print(f"{epoch_title(epoch, args)}  lr {lr:g}  {terms}  {result}", flush=True)
    with agreed():
        if rank() == 0 and not pictures:
            task.draw(method, test_loader, loaded, folder / f"{task.picture}.png")
    return log


NEVER = 1 << 62  # a step that no epoch reaches


class Meter:
    """Means of the terms over the images, and the first step at which a term or a gradient was not finite.

    Everything is kept on the device; read() is the only synchronisation, of processes too.
    """

    def __init__(self, method, epoch):
        self.method, self.epoch, self.step, self.images = method, epoch, 0, 0.0
        self.sums = self.first_bad = None
        self.began, self.data_wait = time.perf_counter(), 0.0

    def update(self, terms, images):
        """terms: {name: scalar}, means over `images`; to be called after backward, while the gradients stand."""
        gradients = {name: p.grad for name, p in self.method.named_parameters() if p.grad is not None}
        values = torch.stack([t.detach().double() for t in terms.values()])
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        finite = torch.cat([values, norms]).isfinite()
        if self.step == 0:
            self.terms, self.gradients = list(terms), list(gradients)
            self.sums = torch.zeros_like(values)
            self.first_bad = torch.full(finite.shape, NEVER, device=values.device)
        self.sums += values * images
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp_max(self.step))
        self.step += 1
        self.images += images

    def read(self):
        """-> mean of each term over the images so far, of all processes. Raises NonFinite, in all of them."""
        first_bad = all_reduced(self.first_bad.clone(), dist.ReduceOp.MIN).tolist()
        *sums, self.images_of_all = all_reduced(torch.cat([self.sums, self.sums.new_tensor([self.images])])).tolist()
        bad = [(step, i) for i, step in enumerate(first_bad) if step < NEVER]
        if bad:
            step, i = min(bad)  # the earliest; in one step, terms before gradients
            n = len(self.terms)
            what = f"the term {self.terms[i]}" if i < n else f"the gradient of {self.gradients[i - n]}"
            raise NonFinite(f"{what} is not finite in epoch {self.epoch + 1}, step {step + 1}")
        return {name: value / self.images_of_all for name, value in zip(self.terms, sums)}

    def clock(self):
        """images_per_s counts all processes' images up to the last read(); seconds and data_wait are this process's."""
        seconds = time.perf_counter() - self.began
        return dict(images_per_s=self.images_of_all / seconds, seconds=seconds, data_wait=self.data_wait)


@torch.no_grad()
def evaluate(student, loader, autocast, stop=None):
    """-> top-1 and top-5 accuracy in percent, of the student alone, in evaluation mode; nan if a logit is no number."""
    student.eval()
    counts = torch.zeros(3, dtype=torch.long, device=loader.device)
    for x, y in stopped_by(stop, loader.epoch(), len(loader)):
        with autocast:
            logits = student(x)
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), (~logits.isfinite()).sum()])
    top1, top5, not_finite = all_reduced(counts).tolist()
    if not_finite:
        return dict(top1=math.nan, top5=math.nan)
    return dict(top1=100 * top1 / len(loader.split), top5=100 * top5 / len(loader.split))


def check_finite(method, result, epoch):
    """The update of an epoch's last step shows in none of its terms: look before the weights are saved."""
    for name, tensor in method.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFinite(f"{name} is not finite after epoch {epoch + 1}")
    if math.isnan(result):
        raise NonFinite(f"a logit of a test image is not finite after epoch {epoch + 1}")


class StopOnSignal:
    """While it is entered, SIGINT and SIGTERM are remembered, and check(), called before each step, raises Stopped."""

    signum = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self.remember) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def remember(self, signum, _):
        self.signum = signum
        signal.signal(signum, self.before[signum])  # a second one does not wait for the step

    def check(self, error=None):
        """Raises Stopped after a signal, or the error, in every process where it is so in one."""
        if error is None and self.signum is not None:
            error = Stopped(self.signum)
        agree(error)


def prepare_cuda(args):
    """TF32 in float32's place inside products, cuDNN's fastest convolutions for these sizes, and the GPU named."""
    if "cuda" in args.device:
        if torch.device(args.device).index is not None:
            torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def keep_freed_memory():
    """Tells glibc to keep freed blocks, where it is the C library.

    It hands blocks above 32 MiB back to the system, and the next tensor pays a page fault for each 4 KiB: on a CPU up
    to two thirds of a step's time. No number changes; the process keeps its largest size until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 30) or mallopt(-4, 0)  # M_MMAP_THRESHOLD, in bytes; where that is too much, M_MMAP_MAX
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def precision(args):
    """The context of a forward pass: bfloat16 autocast with --amp, nothing without."""
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.amp)


def progress_bar(steps, title):
    """Gone when it is closed; seldom redrawn where it goes into a file."""
    interval = 0.1 if sys.stderr.isatty() else 5
    return tqdm(total=steps, desc=title, leave=False, mininterval=interval, disable=rank() > 0)


def result_line(task, args, log, test_name):
    """The last line of a run; a folder's says which split it was evaluated on."""
    metric = task.metric
    last, best = log[-1], max(log, key=lambda entry: entry[metric])
    split = f" on {test_name}" if args.dataset == "folder" else ""
    return (
        f"{args.dataset} {args.arch} {args.name} seed {args.seed}: {results(task, last)} "
        f"(last epoch{split}; best {best[metric]:.2f} at epoch {best['epoch']})"
    )


def results(task, metrics):
    """top-1 73.27 top-5 92.10"""
    return " ".join(f"{name} {metrics[key]:.2f}" for key, name in task.metrics.items())


# ------------------------------------------------------------------------------------- the folder of a run

# The checkpoint first: where removing them is cut short, what is left is no run that could be resumed.
RUN_FILES = ("last.pt", "student.pt", "args.json", "log.jsonl", "attention*.png", "predictions*.png")


def run_files(folder):
    """What a run left in a folder; empty where there is none."""
    return [path for name in RUN_FILES for path in Path(folder).glob(name)]


def refuse_to_overwrite(folder):
    if run_files(folder):
        how = "continue it with --resume or " if (Path(folder) / "last.pt").exists() else ""
        raise UserError(f"{folder} already holds a run: {how}replace it with --overwrite")


def remove_run(folder):
    for path in run_files(folder):
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from None


def write_run(folder, args, loaded, log):
    """args.json, and log.jsonl with the epochs that a checkpoint holds."""
    about = dict(
        command=f"{launcher(args.script)} {shlex.join(args.argv)}",
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        python=sys.version.split()[0],
        device_name=torch.cuda.get_device_name() if "cuda" in args.device else os.uname().machine,
        threads=torch.get_num_threads(),
        processes=processes(),
        train_images=len(loaded.train),
        test_images=len(loaded.test),
        test_name=loaded.test_name,
        test_images_in_training=loaded.leaked,
        num_classes=len(loaded.classes),
    )
    values = {k: v for k, v in vars(args).items() if k not in ("argv", "overwrite", "resume")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    write_atomically(folder / "args.json", lambda file: file.write(json.dumps(values | about, indent=1).encode()))
    write_log(folder, log)


def launcher(script):
    """What starts it again as it was started: python train.py, or torchrun --nproc-per-node=2 train.py."""
    return f"torchrun --nproc-per-node={local_processes()} {script}" if processes() > 1 else f"python {script}"


def write_log(folder, log):
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    write_atomically(folder / "log.jsonl", lambda file: file.write(lines.encode()))


def write_atomically(path, write):
    """Through a temporary file that is then renamed: a reader finds the old content or the new, never half."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps that of a full disk
        if not isinstance(cause, OSError):
            raise
        kept = "; the one from before is whole" if path.exists() else ""
        raise UserError(f"cannot write {path}: {cause.strerror}{kept}") from None
    finally:
        if partial.exists():
            partial.unlink()


def save_checkpoint(folder, method, optimizer, args, log):
    """student.pt, the plain network; then last.pt, everything to resume, the log included.

    In this order: a run killed between the two repeats the epoch, and writes both again.
    """
    values = {k: v for k, v in vars(args).items() if k not in THIS_CALL}
    checkpoint = dict(args=values, method=method.state_dict(), optimizer=optimizer.state_dict(), log=log)
    student = frskd.export(method.student).state_dict()
    write_atomically(folder / "student.pt", lambda file: torch.save(student, file))
    write_atomically(folder / "last.pt", lambda file: torch.save(checkpoint, file))


def load_file(path):
    """A checkpoint or a state_dict, by weights_only: no code of a stranger runs."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except Exception as error:  # cut short, no zip file, a foreign pickle ...: torch's own text is long
        raise UserError(f"{path} is not a checkpoint that can be read: {type(error).__name__}") from None


def is_checkpoint(content, path, task):
    """Whether it is what save_checkpoint wrote to a last.pt. Raises UserError where another script did."""
    return (
        isinstance(content, dict)
        and {"args", "method", "optimizer", "log"} <= set(content)
        and is_values(content["args"], path, task)
        and isinstance(content["log"], list)
        and all(isinstance(entry, dict) and fits_log(entry, task) for entry in content["log"])
    )


def fits_log(entry, task):
    return isinstance(entry.get("epoch"), int) and isinstance(entry.get(task.metric), float)


class OtherScript(UserError):
    """A run of train.py where one of seg.py is expected, or the reverse."""


def is_values(content, path, task):
    """Whether it is the values of a run, as a checkpoint and an args.json hold them: all, and as could be given."""
    if not isinstance(content, dict):
        return False
    if isinstance(content.get("script"), str) and content["script"] != task.script:
        raise OtherScript(f"{path} is of a run of {content['script']}, not of {task.script}")
    if isinstance(content.get("method"), str) and content["method"] not in task.methods:
        raise UserError(f"{path} is of --method {content['method']}, which {task.script} does not have: use its script")
    needed = {*task.recipe, *RUN, task.picture, "script", "dataset", "milestones", "recipe", "name"} - {"output"}
    types = {key: type(value) for key, value in (RUN | task.recipe).items() if value is not None}
    types |= dict(device=str, script=str, name=str, recipe=dict)
    types |= {key: (list, tuple) for key, kind in types.items() if kind is tuple}  # JSON knows no tuple
    return (
        needed <= set(content)
        and all(isinstance(content[key], kind) for key, kind in types.items())
        and task.recipe.keys() - {"warmup_epochs", "ramp_epochs"} <= content["recipe"].keys()
        and content.get("stats", "cifar") in [*data.STATS]
        and isinstance(content.get("argv", []), list)
        and all(isinstance(arg, str) for arg in content.get("argv", []))
        and all(isinstance(drop, float) and 0 < drop < 1 for drop in content["lr_drops"])
        and all(could_be_given(action, content.get(action.dest)) for action in task.parser()._actions)
    )


def could_be_given(action, value):
    """Whether an option of a parser has this value where it is given on some command line, or not given."""
    if value is None or action.nargs == 0:  # a flag
        return value in (None, False, True)
    values = value if action.nargs == "*" and isinstance(value, list) else [value]
    try:
        strings = [text(v) if isinstance(v, list) else str(v) for v in values]
        parsed = [(action.type or str)(string) for string in strings]
    except (argparse.ArgumentTypeError, TypeError):
        return False
    return parsed == values and (action.choices is None or value in action.choices)


def continued(task, saved, given):
    """The values of a checkpoint, and what the command line may change of them; anything else is refused by name."""
    args = SimpleNamespace(**saved)
    if "mixup" in given:
        given = given | dict(mixup=mixup_alpha(given["mixup"], saved["image_size"]))
    longer = "resume" in given and given.get("epochs", 0) > saved["epochs"]
    for key, value in given.items():
        kept = saved.get(key)
        if value == kept:
            continue
        if key not in MAY_DIFFER and not (key == "epochs" and longer):
            hint = "only more are possible" if key == "epochs" and "resume" in given else "leave it out"
            raise UserError(f"{option(key)} {text(value)} differs from the checkpoint's {text(kept)}: {hint}")
        if key not in ("resume", "eval"):  # so that args.json's command says it too
            args.argv = [*getattr(args, "argv", []), option(key), *([] if value is True else [text(value)])]
        setattr(args, key, value)
    if longer:  # the command to paste names what would otherwise follow from --epochs
        for key in task.schedule(args):
            args.argv += [option(key), text(getattr(args, key))]
    args.name = task.run_name(args)
    return args


def option(key):
    return "--" + key.replace("_", "-")


def load_state(target, state, unfit):
    """target.load_state_dict, of a network, a method or an optimiser; `unfit` begins the message where it fails."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
        reasons = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = reasons[1] if len(reasons) > 1 else reasons[0]
        raise UserError(f"{unfit}: {reason[:200]}") from None


def unfit_checkpoint(args):
    return f"the checkpoint does not fit {args.arch}, {args.method}"


# ---------------------------------------------------------------------------------------- pictures and tables


@torch.no_grad()
def draw_attention(method, loader, loaded, path, images=4, side=112):
    """The paper's Figure 3: for a few test images, the attention map of each block.

    Per image one row for the classifier and, where the method has one, one for the self-teacher: the input,
    then the mean of squares over channels of F_i and of T_i, each scaled to 0..1, red where it is large.
    """
    method.eval()
    classes = torch.linspace(0, len(loaded.classes) - 1, min(images, len(loaded.classes))).long()
    index = [i for c in classes for i in (loader.split.labels == c).nonzero().flatten()[:1].tolist()]
    raw = loader.raw(index)
    logits, feats = method.student.features(loader.normalize(raw).contiguous(memory_format=torch.channels_last))
    rows = [("classifier", logits, feats)]
    if isinstance(getattr(method, "teacher", None), frskd.SelfTeacher):
        rows.append(("self-teacher", *method.teacher(feats)))

    margin, header, step = 150, 24, side + 4
    picture = Image.new(
        "RGB", (margin + (1 + len(feats)) * step, header + len(index) * (len(rows) * step + 4)), "white"
    )
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for k, title in enumerate(["input"] + [f"block {i + 1}" for i in range(len(feats))]):
        draw.text((margin + k * step, 5), title, "black", font)
    y = header
    for n, i in enumerate(index):
        image = F.interpolate(raw[n : n + 1].float().cpu() / 255, (side, side), mode="bilinear", antialias=True)[0]
        for name, row_logits, maps in rows:
            truth, predicted = (loaded.classes[c] for c in (loader.split.labels[i], row_logits[n].argmax()))
            lines = [*textwrap.wrap(truth, 20)[:2], f"{name} says", *textwrap.wrap(predicted, 20)[:2]]
            draw.text((4, y + 16), "\n".join(lines), "black", font)
            for k, tile in enumerate([image] + [heat_map(feat[n], image) for feat in maps]):
                tile = Image.fromarray((tile * 255).byte().permute(1, 2, 0).numpy())
                picture.paste(tile, (margin + k * step, y))
            y += step
        y += 4
    write_atomically(path, lambda file: picture.save(file, format="png"))


def heat_map(feat, image):
    """Attention map of one feature map (C, h, w), from blue to red over an image (3, H, W) of 0..1 -> (3, H, W)."""
    heat = frskd.attention_map(feat[None]).cpu().view(1, 1, *feat.shape[-2:])
    heat = F.interpolate(heat, image.shape[-2:], mode="bilinear")[0, 0]
    heat = ((heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-12)).nan_to_num(0)  # squares may overflow
    shades = torch.tensor([[0.0, 0, 0.4], [0, 0.3, 1], [0, 0.9, 0.9], [1, 0.9, 0], [0.8, 0, 0]]).T[None]  # (1, 3, 5)
    palette = F.interpolate(shades, 256, mode="linear", align_corners=True)[0]  # (3, 256)
    return 0.35 * image.mean(0) + 0.65 * palette[:, (255 * heat).long()]


BENCH = dict(dataset="cifar100", arch="wrn16_2")
BENCHED = (
    "--method baseline", "--method one", "--method ddgsd", "--method byot", "--method sad", "--method cskd",
    "--method slasd", "--beta 0", "", "--feature-loss fitnet", "--feature-loss od", "--sla",
    "--method kd", "--method kd --feature-loss fitnet", "--method kd --feature-loss at",
    "--method kd --feature-loss od",
)  # fmt: skip
BENCH_COLUMNS = {  # name -> what training_step takes
    "float32": dict(),
    "float32, default layout": dict(memory_format=torch.contiguous_format),
    "bf16": dict(amp=True),
}
BENCH_OPTIONS = ("compile", "arch", "batch_size", "device", "workers")


def print_table(task, given):
    """Mean and standard deviation over seeds of the task's runs below a folder, in markdown: laid out as Table 1, and
    where runs differ in alpha and in beta, a grid of the two, the numbers of Figure 4."""
    folder, metric, metric_name = given["table"], task.metric, task.metrics[task.metric]
    runs, grids, left_out, order = {}, {}, [], {}
    for path in sorted([*Path(folder).glob("args.json"), *Path(folder).glob("*/args.json")]):
        try:
            args = read_values(path, task)
            log = [json.loads(line) for line in path.with_name("log.jsonl").read_text().splitlines()]
            result = [float(entry[metric]) for entry in log]
            source = f" ({args['data_dir']}, {args['test_name']})" if args["dataset"] == "folder" else ""
            column = f"{args['dataset']}{source} {args['arch']}"
            weights = {key: args["recipe"][key] for key in ("alpha", "beta")}
            order[args["name"]] = list(task.methods).index(args["method"])  # as Table 1
            name, grid = args["name"], task.run_name(SimpleNamespace(**args | weights))
            if not log or len(log) < args["epochs"]:
                left_out.append(f"- {path.parent}: unfinished, {len(log)} of {args['epochs']} epochs")
            elif args["seed"] in runs.setdefault((name, column), {}):
                left_out.append(f"- {path.parent}: seed {args['seed']} again")
            else:
                runs[name, column][args["seed"]] = result[-1], max(result)
                grids.setdefault((column, grid), {})[args["alpha"], args["beta"]] = name
        except OtherScript:
            continue
        except (UserError, OSError, ValueError, KeyError, TypeError):
            left_out.append(f"- {path.parent}: not a run that can be read")
    if not runs and not left_out:
        raise UserError(f"--table {folder}: no run of {task.script} in or below this folder (a run has an args.json)")
    names = sorted({name for name, _ in runs}, key=lambda name: (order[name], name))
    columns = sorted({column for _, column in runs})
    print(f"{metric_name} in percent, last epoch (best epoch); mean ± standard deviation over n seeds\n")
    print_rows("method", columns, {name: [cell(runs.get((name, column))) for column in columns] for name in names})
    for (column, grid), cells in sorted(grids.items()):
        alphas, betas = (sorted(set(values)) for values in zip(*cells))
        if len(alphas) > 1 and len(betas) > 1:
            print(f"\n{column} {grid}, alpha down, beta across:\n")
            rows = {text(a): [cell(runs.get((cells.get((a, b)), column))) for b in betas] for a in alphas}
            print_rows("alpha", [f"beta {text(b)}" for b in betas], rows)
    if left_out:
        print("\nNot averaged:\n" + "\n".join(left_out))


def print_bench(task, given):
    """Time of a training step of each method at 32 px, 100 classes, by memory layout and precision; what it computes
    and holds; loading alone. On a CPU in batches of 32 unless told, so that two cores are done in two minutes."""
    args = with_defaults(CIFAR | BENCH, dict(attention=None), {k: v for k, v in given.items() if k in BENCH_OPTIONS})
    if not own_network(args.arch):
        raise UserError(f"--bench --arch {args.arch}: takes resnet18, resnet34 or wrn<depth>_<width>")
    check_values(task, args)
    prepare_cuda(args)
    cuda, columns = "cuda" in args.device, dict(BENCH_COLUMNS)
    batch_size = given.get("batch_size", 128 if cuda else 32)
    if batch_size < 2:
        raise UserError("--bench --batch-size 1: batch norm cannot normalise one value a channel")
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # the variants of a class share a forward
        columns |= {f"{name}, compiled": columns[name] | dict(backend=args.compile) for name in ("float32", "bf16")}

    flops, steps = {}, {}
    for name, build in benched_methods(task, args.arch, args.device).items():
        flops[name] = step_flops(build())
        for column, kwargs in columns.items():
            steps[name, column] = frskd.training_step(build(), batch_size, **kwargs)
            if "backend" in kwargs:
                began = time.perf_counter()
                steps[name, column]()
                print(f"{name}, {column}, in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    seconds = frskd.step_times(steps, rounds=4, repeat=20 if cuda else 1)

    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    about = (
        f"A training step, {args.arch}, batch {batch_size} at 32 px, {where}: median of 4 interleaved; images/s; "
        "in brackets the time over that of the column's baseline; operations a second, of convolutions and linear "
        "layers, a multiply-add being two; the most memory that the step holds. Counted: its operations over the "
        "baseline's."
    )
    print(textwrap.fill(about, 120) + "\n")
    rows = {}
    for name in flops:
        rows[name] = [f"{flops[name] / flops['baseline']:.2f}"]
        for column, kwargs in columns.items():
            t, ratio = seconds[name, column], seconds[name, column] / seconds["baseline", column]
            rate = f"{batch_size * flops[name] / t / 1e9:.0f} G/s"
            memory = ""
            if cuda or "backend" not in kwargs:  # compiled code of a CPU hides its tensors
                memory = f", {peak_memory(steps[name, column], cuda) / 1e6:.0f} MB"
            rows[name].append(f"{1e3 * t:.0f} ms, {batch_size / t:.0f}/s ({ratio:.2f}), {rate}{memory}")
    print_rows("method", ["counted", *columns], rows)
    small, large = loading_rates(args)
    consumed = batch_size / min(seconds["baseline", column] for column in columns)  # images a second
    about = (
        f"Loading alone: 32 px, from the device's memory, {small:.0f} images/s, {small / consumed:.0f} times what the "
        f"fastest baseline step takes; JPEGs of 500 px to 224 px, {args.workers} workers, {large:.0f} images/s."
    )
    print("\n" + textwrap.fill(about, 120))


def benched_methods(task, arch, device):
    """{name: function that builds it}, each method, and FRSKD in the paper's order of convolution and upsampling."""
    methods = {}
    for options in BENCHED:
        given = {k: v for k, v in vars(task.parser().parse_args(options.split())).items() if v is not None}
        if given.get("method") == "kd":
            given["teacher_arch"] = "wrn40_2" if arch.startswith("wrn") else "resnet34"
        values = task.resolve(BENCH | given | dict(arch=arch, device=device))
        methods[task.run_name(values)] = partial(build_method, task, values, 100)

    def in_the_papers_order():
        method = methods["frskd"]()
        for up in method.teacher.up:
            up.conv_first = False
        return method

    return methods | {"frskd, the paper's order": in_the_papers_order}


def step_flops(method, batch_size=2):
    """Operations of convolutions and linear layers of a training step, forward and backward, a 32-px image."""

    def backward(grad_shape, x_shape, w_shape, *args, out_shape, **kwargs):
        transposed, output_mask = args[4], args[7]  # torch's own count of a grouped convolution's is too large
        return conv_flop_count(x_shape, w_shape, grad_shape, transposed) * sum(output_mask[:2])

    step = frskd.training_step(method, batch_size)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward}) as counter:
        step()
    return counter.get_total_flops() / batch_size


class Allocations(TorchDispatchMode):
    """While it is entered, .peak is the largest number of bytes that new tensors held at once.

    What an operation holds for itself, such as a convolution's workspace, is not seen.
    """

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.alive = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for storage in {t.untyped_storage() for t in tree_leaves(result) if torch.is_tensor(t)}:
            if storage not in old and storage not in self.alive:
                self.alive.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def freed(self, size):
        self.held -= size


def peak_memory(step, cuda):
    """Bytes that a step holds at most beside the weights: activations, gradients, what is passing."""
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Allocations() as allocations:
        step()
    return allocations.peak


def loading_rates(args):
    """Training images a second of the two loaders, no step between them: at 32 px, and of 500-px JPEGs at 224 px."""
    images, labels, _ = data.draw_shapes(2, 500, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(len(images))]
        for path, image in zip(paths, images):
            Image.fromarray(image.numpy()).save(path, quality=90)
        rates = []
        for split, size in (
            (data.Split(torch.zeros(10_000, 32, 32, 3, dtype=torch.uint8), torch.arange(10_000) % 100), 32),
            (data.Split(16 * paths, labels.repeat(16)), 224),
        ):
            loader = data.make_loader(
                split, train=True, batch_size=128, image_size=size, workers=args.workers, device=args.device
            )
            for epoch in range(2):  # the first starts the workers
                began = time.perf_counter()
                for _ in loader.epoch(epoch):
                    pass
                if "cuda" in args.device:
                    torch.cuda.synchronize()
            rates.append(len(split) / (time.perf_counter() - began))
    return rates


def print_rows(corner, columns, rows):
    """A markdown table: the names of the columns, and {name of a row: its cells}."""
    print(f"| {corner} |" + "".join(f" {column} |" for column in columns))
    print("|---|" + "---|" * len(columns))
    for name, cells in rows.items():
        print(f"| {name} |" + "".join(f" {c} |" for c in cells))


def cell(runs):
    """{seed: (last, best)} -> 73.27 ± 0.45 (73.40 ± 0.41), n = 3; empty where nobody measured."""
    if not runs:
        return ""

    def spread(values):
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{deviation}"

    last, best = zip(*runs.values())
    return f"{spread(last)} ({spread(best)}), n = {len(runs)}"


# ----------------------------------------------------------------------------------------------------- parser


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def at_least(low):
    """An argparse type: a whole number of at least `low`."""

    def whole(string):
        if not re.fullmatch(r"-?\d{1,9}", string) or int(string) < low:
            raise argparse.ArgumentTypeError(f"{string!r} is not a whole number of at least {low}")
        return int(string)

    return whole


def concentration(string):
    return finite_number(string, lambda value: value >= 1e-3, "of at least 0.001")


def not_negative(string):
    return finite_number(string, lambda value: value >= 0, "of at least 0")


def positive(string):
    return finite_number(string, lambda value: value > 0, "above 0")


def below_one(string):
    return finite_number(string, lambda value: 0 <= value < 1, "from 0 to below 1")


def finite_number(string, fits, meaning):
    try:
        value = float(string)
    except ValueError:
        value = math.nan
    if not (value <= 1e6 and fits(value)):
        raise argparse.ArgumentTypeError(f"{string!r} is not a number {meaning}")
    return value


def epoch_list(string):
    return [] if string == "none" else [at_least(1)(epoch) for epoch in string.split(",")]


def folder_name(string):
    if not string:
        raise argparse.ArgumentTypeError("an empty name")
    return string


def recipe_values(key, recipes=RECIPES):
    """What each recipe says of a value, for --help: "2 shapes, cifar100; 1 folder above 64 px"."""
    names = {}
    for name, recipe in recipes.items():
        names.setdefault(text(recipe[key]), []).append(name)
    return "; ".join(f"{value} {', '.join(n)}" for value, n in names.items())


def method_values(key):
    """The methods' own defaults: "1 one; 0.1 byot". The beta of kd hangs on its feature loss."""
    own = {name: values for name, values in DEFAULTS.items() if key in values and (name, key) != ("kd", "beta")}
    return recipe_values(key, own)


def feature_loss_values(method):
    return ", ".join(f"{text(beta)} --feature-loss {name}" for name, beta in BETA[method].items())


# fmt: off
def parser():
    p = Parser(prog="train.py", allow_abbrev=False, description="Train an image classifier with FRSKD. "
               "Every value that is not given is the recipe's of the data set.")

    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=["shapes", "cifar100", *data.OFFICIAL, "folder"], help="shapes: drawn in "
                   "memory; folder: train/<class>/* and val/ or test/; the others: the official archives as they "
                   "unpack (default shapes)")
    g.add_argument("--data-dir", metavar="DIR", help="the folder into which the archives were unpacked, or that holds "
                   "train/ (default data)")
    g.add_argument("--download", action="store_true", default=None, help="fetch the data set where it is missing "
                   f"(of {', '.join(DOWNLOADS)})")
    g.add_argument("--image-size", type=at_least(8), metavar="PX", help="side in pixels; up to 64 with the CIFAR stem, "
                   "pad-crop and flip, above with the ImageNet stem and random resized crops (default "
                   f"{recipe_values('image_size')}; folder: the size of its images up to 64; 32 is Sec. 4.1's, 224 the "
                   "authors')")
    g.add_argument("--per-class", type=at_least(1), metavar="N", help="train on the first N images of each class "
                   "(default all)")

    g = p.add_argument_group("network")
    g.add_argument("--arch", help="resnet18, resnet34, wrn16_2, wrn<depth>_<width>, or with --blocks any name in "
                   f"torchvision.models (default {recipe_values('arch')})")
    g.add_argument("--blocks", type=lambda names: names.split(","), metavar="A,B,...", help="for a network of "
                   "torchvision.models: the modules whose outputs are F_1..F_n, shallow to deep")

    g = p.add_argument_group("method")
    g.add_argument("--method", choices=list(METHODS), help="baseline: plain cross-entropy; kd: from a pretrained "
                   "teacher; the others are self-distillation (default frskd; Tables 1, 2 and 7)")
    g.add_argument("--alpha", type=not_negative, help="weight of the soft-label loss L_KD; larger trusts the "
                   f"teacher more, 0 is without (default {recipe_values('alpha')}; Sec. 4.1; "
                   f"{method_values('alpha')}, above 64 px {text(CSKD_LARGE)} cskd: see baselines.py)")
    g.add_argument("--beta", type=not_negative, help="weight of the feature loss L_F; 0 is FRSKD\\F "
                   f"(default {recipe_values('beta')}; Sec. 4.1; {feature_loss_values('frskd')}, ours; "
                   f"{method_values('beta')}, kd with {feature_loss_values('kd')}: see baselines.py)")
    g.add_argument("--temperature", type=positive, help="K of L_KD; larger softens both distributions "
                   f"(default 4; Sec. 4.1; {method_values('temperature')}: see baselines.py)")
    g.add_argument("--teacher", choices=["bifpnc", "bifpn"], help="bifpnc: --width times as wide as the network's "
                   "blocks; bifpn: --channels wide at every block (default bifpnc; Sec. 3.1)")
    g.add_argument("--width", type=at_least(1), help="w of bifpnc; 1 is the cheaper one of Table 6 "
                   "(default 2; Sec. 4.1)")
    g.add_argument("--channels", type=at_least(1), help="width of bifpn; Table 6 has 128 and 256 (default 256)")
    g.add_argument("--feature-loss", choices=list(KD_FEATURE_LOSSES), help="L_F of Tables 5 and 7: attention transfer, "
                   "FitNet or overhaul distillation, for kd also none (default at, Sec. 3.2; kd none)")
    g.add_argument("--sla", action="store_true", default=None, help="FRSKD+SLA: joint heads for class and rotation; "
                   "each step sees five times the images")
    g.add_argument("--teacher-arch", help="of kd: as --arch; with a feature loss one without --blocks (default "
                   "resnet34; Sec. 4.3)")
    g.add_argument("--teacher-checkpoint", metavar="FILE", type=folder_name, help="of kd: the trained teacher, the "
                   "student.pt of its run, or a state_dict of torchvision's class")
    g.add_argument("--mixup", nargs="?", const=True, type=concentration, metavar="A", help="mix pairs of images and "
                   f"labels by a share from Beta(A, A); larger mixes more (without A {text(MIXUP[0])} up to 64 px, "
                   f"{text(MIXUP[1])} above; appendix)")
    g.add_argument("--cutmix", nargs="?", const=CUTMIX, type=concentration, metavar="A", help="paste a box of one "
                   f"image into another, its area from Beta(A, A) (without A {text(CUTMIX)}; appendix)")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=at_least(1), help=f"(default {recipe_values('epochs')}; Sec. 4.1, shapes ours)")
    g.add_argument("--milestones", type=epoch_list, metavar="A,B,...", help="after these epochs the "
                   "learning rate falls to a tenth; none is constant (default 1/2 and 3/4 of --epochs, imagenet 1/3 "
                   "and 2/3; Sec. 4.1)")
    g.add_argument("--batch-size", type=at_least(1), help=f"(default {recipe_values('batch_size')}; Sec. 4.1, shapes "
                   "ours)")
    g.add_argument("--lr", type=positive, help=f"of SGD, at the start (default {recipe_values('lr')}; Sec. 4.1, shapes "
                   "ours)")
    g.add_argument("--momentum", type=below_one, help="not Nesterov (default 0.9, the authors' code; the paper is "
                   "silent)")
    g.add_argument("--weight-decay", type=not_negative, help="on every parameter; 5e-4 is common elsewhere (default "
                   "1e-4; Sec. 4.1)")

    g = add_run_options(p, "attention")
    g.add_argument("--bench", action="store_true", default=None, help="time a training step of every method, by memory "
                   "layout and precision, with --compile compiled too; takes --arch, --batch-size (default 128, on a "
                   "CPU 32), --device and --workers")
    return p


def add_run_options(p, picture):
    """The options of a run that every task has; `picture` is the one that draws. -> the last group, to be added to."""
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=at_least(0), help="of initialisation, order and augmentation (default 0)")
    g.add_argument("--workers", type=at_least(0), help="processes that decode and augment images, where these do "
                   "not live on the device; changes no number (default 2; shapes of seg.py 0)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, ... (default cuda where there is one)")
    g.add_argument("--amp", action="store_true", default=None, help="bfloat16 autocast; the losses stay in float32")
    g.add_argument("--sync-bn", action="store_true", default=None, help="batch norm over the images of all processes "
                   "(CUDA only; untried, for want of two GPUs)")
    g.add_argument("--compile", nargs="?", const="inductor", choices=["inductor", "aot_eager", "eager"],
                   help="torch.compile the method, by this backend (inductor where none is named)")
    g.add_argument("--output", type=folder_name, metavar="DIR", help="folder of the run (default "
                   "runs/<dataset>-<arch>-<name>-s<seed>)")
    g.add_argument("--overwrite", action="store_true", default=None, help="replace the run that the folder holds")
    g.add_argument("--resume", nargs="?", const=True, type=folder_name, metavar="PATH", help="continue a run, its "
                   "folder or last.pt; without PATH the one in --output, or a fresh one where that holds no checkpoint")
    g.add_argument(f"--{picture}", type=at_least(1), nargs="*", metavar="EPOCH", help=f"draw {picture}-<epoch>.png "
                   f"after these epochs (default: {picture}.png at the end)")

    g = p.add_argument_group("instead of training")
    g.add_argument("--eval", metavar="FILE", help="evaluate a last.pt or student.pt; with "
                   f"--{picture} draw {picture}.png instead")
    g.add_argument("--table", metavar="DIR", help="print the results of the runs below a folder as a markdown table")
    return g
# fmt: on


def refuse(given, keys, reason):
    """Raises UserError for the first of the keys that was given."""
    for key in keys:
        if key in given:
            raise UserError(f"{option(key)} {reason}")


def check_options(given):
    """Options that do not go together, refused before any data is read."""
    dataset, arch, method = given.get("dataset", "shapes"), given.get("arch"), given.get("method", "frskd")
    teacher = given.get("teacher", "bifpnc")
    others = [key for key in METHOD_OPTIONS if key not in options_of(method)]
    refuse(given, others, f"has no effect with --method {method}")
    refuse(given, ["channels"] if teacher == "bifpnc" else ["width"], f"has no effect with --teacher {teacher}")
    if dataset == "shapes":
        refuse(given, ["data_dir"], "has no effect with --dataset shapes, which is drawn in memory")
    if dataset == "imagenet":
        refuse(given, ["download"], "cannot fetch imagenet, which needs a registration: see image-net.org")
    elif dataset not in DOWNLOADS:
        refuse(given, ["download"], f"has no effect with --dataset {dataset}")
    if given.get("beta") == 0 and given.get("feature_loss") != "none":
        refuse(given, ["feature_loss"], "has no effect with --beta 0, which is without a feature loss")
    if given.get("alpha") == 0 and "sla" not in given:
        refuse(given, ["temperature"], "has no effect with --alpha 0, which is without soft labels")
    if "mixup" in given:
        refuse(given, ["cutmix"], "does not go with --mixup: one of them")
    if "sla" in given:
        refuse(given, ["mixup", "cutmix"], "does not go with --sla, whose labels of class and rotation cannot be mixed")
    if method == "slasd":
        refuse(given, ["mixup", "cutmix"], "does not go with --method slasd, whose joint labels cannot be mixed")
    if method == "cskd":
        refuse(given, ["mixup", "cutmix"], "does not go with --method cskd, whose pairs are of one class")
    if method == "byot" and given.get("alpha", 0) >= 1:
        raise UserError(f"--alpha {text(given['alpha'])}: byot weights cross-entropy by 1 - alpha, so below 1")
    if method == "kd":
        check_teacher(given)
    elif given.get("feature_loss") == "none":
        raise UserError("--feature-loss none is for --method kd: FRSKD without a feature loss is --beta 0")
    if arch is None or own_network(arch):
        refuse(
            given,
            ["blocks"],
            "is for the networks of torchvision.models; --arch " + (arch or "of the recipe") + " has its own",
        )
    elif arch not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"--arch {arch}: neither resnet18, resnet34, wrn<depth>_<width> nor a name in torchvision.models"
        )
    elif "blocks" not in given:
        raise UserError(f"--arch {arch} needs --blocks, the modules whose outputs are F_1..F_n, such as --blocks a,b,c")
    elif given.get("feature_loss") == "od":
        raise UserError(f"--feature-loss od compares maps before their ReLU, which --arch {arch} does not give")
    elif method == "one":
        raise UserError(f"--method one copies the last stage, and where that of --arch {arch} begins is not known")


def check_teacher(given):
    """The pretrained teacher of --method kd, and whether its maps can teach the student's."""
    arch, teacher, loss = (given.get(key, DEFAULTS["kd"].get(key)) for key in ("arch", "teacher_arch", "feature_loss"))
    arch = arch or RECIPES.get(given.get("dataset", "shapes"), CIFAR)["arch"]
    if "teacher_checkpoint" not in given:
        raise UserError(f"--method kd needs --teacher-checkpoint FILE, the student.pt of a trained {teacher}")
    if not own_network(teacher) and teacher not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"--teacher-arch {teacher}: neither of frskd.py nor a name in torchvision.models")
    if loss == "none":
        refuse(given, ["beta"], "has no effect with --feature-loss none")
        if given.get("alpha") == 0:
            raise UserError("--alpha 0 without a feature loss leaves nothing of the teacher: --method baseline")
    elif not own_network(teacher):
        raise UserError(f"--feature-loss {loss} compares maps, which --teacher-arch {teacher} does not give")
    else:
        n, n_t = (len(given["blocks"]) if "blocks" in given else levels(arch), levels(teacher))
        if n != n_t:
            raise UserError(
                f"--feature-loss {loss} compares maps: --arch {arch} has {n}, --teacher-arch {teacher} has {n_t}"
            )


def levels(arch):
    """How many maps a network of frskd.py has."""
    return 3 if arch.startswith("wrn") else 4


def check_values(task, args):
    """Values that this machine or the schedule does not bear."""
    there = {"cpu": 1, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.device_count()}
    kind, _, number = args.device.partition(":")
    if not (number or "0").isdigit() or int(number or 0) >= there.get(kind, 0):
        names = ", ".join(name for name, count in there.items() if count)
        raise UserError(f"--device {args.device}: no such device here, there are {names}")
    if args.compile == "inductor" and kind == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile needs a C++ compiler on a CPU: install g++ or leave it out")
    pictures = getattr(args, task.picture)
    if pictures and max(pictures) > args.epochs:
        raise UserError(f"{option(task.picture)} {max(pictures)} is after the last of {args.epochs} epochs")


def check_processes(args):
    """What several processes need of each other."""
    kind, _, number = args.device.partition(":")
    if args.sync_bn and kind != "cuda":
        raise UserError(f"--sync-bn needs CUDA GPUs: there is no synchronised batch norm for {kind}")
    if processes() == 1:
        return
    if number or kind == "mps":
        raise UserError(f"--device {args.device}: torchrun's processes take cpu, or cuda, one GPU each")
    count, gpus = local_processes(), torch.cuda.device_count()
    if kind == "cuda" and count > gpus:
        raise UserError(f"--nproc-per-node={count}: one GPU each is needed, there are {gpus}; or --device cpu")


def fresh(task, given, argv):
    """The values of a new run."""
    task.check_options(given)
    args = task.resolve(given)
    args.script, args.name = task.script, task.run_name(args)
    args.argv = [a for a in argv if a not in ("--overwrite", "--resume")]
    args.output = args.output or f"runs/{args.dataset}-{args.arch}-{args.name}-s{args.seed}"
    return args


def resumed(task, path, given):
    """The values of the run at `path`, a folder or its last.pt, and its checkpoint."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    checkpoint = load_file(path)
    if not is_checkpoint(checkpoint, path, task):
        raise UserError(f"{path} is not the last.pt of a run")
    args = continued(task, checkpoint["args"], given)
    args.output = given.get("output", str(path.parent))
    if Path(args.output).resolve() != path.parent.resolve():
        refuse_to_overwrite(args.output)
    return args, checkpoint


def run_training(task, given, argv):
    """A fresh run, or one continued, in this process and those that torchrun started beside it: -> exit status."""
    with agreed():
        args, checkpoint = values_of_run(task, given, argv)
    folder = Path(args.output)
    prepare_cuda(args)
    for first in (True, False):  # one process of a machine fetches and unpacks, the others find what it left
        with agreed():
            if first == (local_rank() == 0):
                loaders = task.build_loaders(args)
    try:
        with StopOnSignal() as stop:
            log = train(task, args, loaders, folder, checkpoint, stop)
    except Stopped as stopped:
        complain(f"{task.script}: stopped; {how_to_go_on(task, args)}", stopped)
        return 128 + stopped.signum
    except NonFinite as error:
        kept = f"; {folder / 'last.pt'} is of the epoch before" if (folder / "last.pt").exists() else ""
        error.told = rank() > 0
        complain(f"{task.script}: error: {error}{kept}", error)
        return 1
    except RuntimeError as error:
        if is_of_processes(error):
            gone = "another process is gone"
        elif "DataLoader worker" in str(error):
            gone = "a worker process is gone, perhaps killed for want of memory (fewer --workers need less)"
        else:
            raise
        print(f"{task.script}: error: {gone}; {how_to_go_on(task, args)}", file=sys.stderr)
        return 1
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"batch norm cannot normalise one value a channel: --batch-size {args.batch_size} and --image-size "
            f"{args.image_size} leave a single one, take larger ones"
        ) from None
    if rank() == 0:
        print(result_line(task, args, log, loaders[0].test_name))
    return 0


def how_to_go_on(task, args):
    if (Path(args.output) / "last.pt").exists():
        return f"continue with: {launcher(task.script)} --resume {shlex.quote(args.output)}"
    return f"no epoch was finished; start again with: {launcher(task.script)} {shlex.join(args.argv)} --overwrite"


def complain(message, error):
    """On stderr; of an error that all processes have, once."""
    if not getattr(error, "told", False):
        print(message, file=sys.stderr)


def values_of_run(task, given, argv):
    """The values of a fresh run, or of one continued and its checkpoint; refused where it cannot be made."""
    resume, checkpoint = given.get("resume"), None
    if resume and "overwrite" in given:
        raise UserError("--overwrite and --resume do not go together")
    if resume in (None, True):  # True: without a path
        args = fresh(task, given, argv)
        if resume and (Path(args.output) / "last.pt").exists():
            resume = args.output
        elif not resume and "overwrite" not in given:
            refuse_to_overwrite(args.output)
    if resume not in (None, True):
        args, checkpoint = resumed(task, resume, given)
    check_values(task, args)
    teacher = getattr(args, "teacher_checkpoint", None)
    if teacher and not checkpoint and not Path(teacher).is_file():
        raise UserError(f"--teacher-checkpoint: no such file: {teacher}")
    check_processes(args)
    return args, checkpoint


def run_eval(task, given):
    """Evaluate a last.pt or a student.pt, or with the option that draws, draw its picture; -> exit status."""
    drawn = given.pop(task.picture, None)
    draw = drawn is not None
    if drawn:
        raise UserError(f"{option(task.picture)} {text(drawn)}: with --eval without an epoch, for the file says which")
    read = (*EVALUATED, "output") if draw else EVALUATED
    refuse(given, [key for key in given if key not in read], "has no effect with --eval")
    path = Path(given["eval"])
    state = load_file(path)
    beside = path.with_name("args.json")
    whole = is_checkpoint(state, path, task)
    if whole or beside.exists():
        args = continued(task, state["args"] if whole else read_values(beside, task), given)
        name = f"{args.name} seed {args.seed}"
    else:  # the command line says what the file holds
        task.check_options(given)
        args, name = task.resolve(given), path.name
    check_values(task, args)
    loaded, loader = task.build_loaders(args, training=False)
    if not whole:
        args.method = "baseline"  # only the plain network is in the file
    method = build_method(task, args, len(loaded.classes))
    if whole:
        load_state(method, state["method"], unfit_checkpoint(args))
    else:
        load_state(frskd.export(method.student), state, unfit_checkpoint(args))
    if draw:
        picture = Path(given.get("output", path.parent)) / f"{task.picture}.png"
        task.draw(method, loader, loaded, picture)
        print(picture)
        return 0
    metrics = task.evaluate(method.student, loader, precision(args))
    if math.isnan(metrics[task.metric]):
        raise UserError(f"{path}: a logit of a test image is not finite")
    print(f"{args.dataset} {args.arch} {name}: {results(task, metrics)} (on {loaded.test_name}, {path})")
    return 0


def read_values(path, task):
    """The values in an args.json."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        values = None
    if not is_values(values, path, task):
        raise UserError(f"{path} does not hold the values of a run: move it away, and name the options of the file")
    return values


def run_command(task, argv):
    """A command line; -> exit status: 0, 1 a number that is not finite, 2 a user's mistake, 130 and 143 signals."""
    keep_freed_memory()
    argv = list(sys.argv[1:] if argv is None else argv)
    dashed = [re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), a) for a in argv]
    try:
        with joined():
            status = run(task, dashed, argv)
            sys.stdout.flush()  # here, where a closed pipe is caught
            return status
    except (UserError, DataError) as error:
        complain(f"{task.script}: error: {error}", error)
        return 2
    except BrokenPipeError:  # of | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be printed
        return 128 + signal.SIGPIPE
    except OSError as error:  # of the machine: no permission, a full disk under the output, a disk that is gone
        complain(f"{task.script}: error: {error}", error)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_of_memory(error):
            raise
        advice = "take a smaller --batch-size, --image-size or network"
        complain(f"{task.script}: error: out of memory: {advice} ({data.one_line(error)[:100]})", error)
        return 2
    except KeyboardInterrupt:
        print(f"{task.script}: stopped", file=sys.stderr)
        return 130


def is_of_memory(error):
    """Whether it says that memory, of the GPU or of the machine, is not enough."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def run(task, dashed, argv):
    """What a command line asks for; dashed: argv with dashes in the options' names. -> exit status."""
    with agreed():
        given = {k: v for k, v in vars(task.parser().parse_args(dashed)).items() if v is not None}
        alone = [key for key in ("eval", *task.reports) if key in given]
        if alone and processes() > 1:
            raise UserError(f"{option(alone[0])} is for one process: python {task.script}, without torchrun")
    for key in task.reports.keys() & given.keys():
        report, with_it = task.reports[key]
        if given.keys() - {key, *with_it}:
            others = f"any other option than {', '.join(map(option, with_it))}" if with_it else "any other option"
            raise UserError(f"{option(key)} goes without {others}")
        report(task, given)
        return 0
    return run_eval(task, given) if "eval" in given else run_training(task, given, argv)


CLASSIFICATION = Task(
    script="train.py",
    recipe=CIFAR,
    metrics=dict(top1="top-1", top5="top-5"),
    picture="attention",
    parser=parser,
    check_options=check_options,
    resolve=resolve,
    run_name=run_name,
    schedule=lambda args: ["milestones"],
    build_loaders=build_loaders,
    build_student=build_student,
    methods=METHODS,
    pretrain=load_teacher,
    whole_batch=lambda loader: len(loader.part_of(torch.arange(loader.batch_size))),
    train_epoch=train_epoch,
    evaluate=evaluate,
    draw=draw_attention,
    reports=dict(table=(print_table, ()), bench=(print_bench, BENCH_OPTIONS)),
)


def main(argv=None):
    return run_command(CLASSIFICATION, argv)


if __name__ == "__main__":
    sys.exit(main())
