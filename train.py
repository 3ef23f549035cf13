"""Train an image classifier with FRSKD or without, evaluate it, look at what it attends to.

    python train.py                                                          # drawn shapes: nothing to download
    python train.py --dataset cifar100 --download --arch resnet18 --alpha 2 --beta 100
    python train.py --dataset cifar100 --arch resnet18 --method baseline     # or one, ddgsd, byot, sad, cskd, slasd
    python train.py --dataset folder --data-dir photos --arch resnet34
    python train.py --resume runs/cifar100-resnet18-frskd-s0
    python train.py --eval runs/cifar100-resnet18-frskd-s0/student.pt
    python train.py --table runs
    torchrun --nproc-per-node=2 train.py --dataset cifar100                  # on two GPUs

A run writes args.json, log.jsonl (one object an epoch), last.pt (everything to resume), student.pt (the plain
network), attention.png and curves.png into runs/DATASET-ARCH-NAME-sSEED.
"""
import functools
import math
import re
import sys
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate
from torchvision.transforms import v2

import frskd
from experiments import baselines, data, figures, runs
from experiments.runs import FLAG, UserError, number

CIFAR = dict(  # Sec. 4.1; momentum: the paper is silent, 0.9 is the authors' code
    image_size=32, stats="cifar", per_class=None, arch="resnet18", blocks=None, alpha=2.0, beta=100.0, temperature=4.0,
    width=2, channels=None, feature_loss="at", sla=False, teacher_arch="resnet34", mixup=None, cutmix=None,
    epochs=200, drops=(1 / 2, 3 / 4), batch_size=128, lr=0.1, momentum=0.9, weight_decay=1e-4,
)  # fmt: skip
FGVR = CIFAR | dict(image_size=224, stats="imagenet", alpha=1.0, beta=200.0, batch_size=32)
RECIPES = {
    "shapes": CIFAR | dict(arch="wrn16_2", epochs=10, drops=(4 / 5, 9 / 10), batch_size=16, lr=0.02),  # ours, for CPUs
    "cifar100": CIFAR,
    "tinyimagenet": CIFAR | dict(stats="tinyimagenet", alpha=3.0),
    "cub200": FGVR,  # fine-grained visual recognition
    "mit67": FGVR,
    "stanford40": FGVR,
    "dogs": FGVR,
    "imagenet": FGVR | dict(batch_size=256, epochs=90, drops=(1 / 3, 2 / 3)),
    "folder": CIFAR,  # of images up to 64 px; above, that of cub200
}
BETA = {  # of other feature losses. Paper vs code: neither gives frskd's; kd's are each loss's own, see baselines.py
    ("frskd", "fitnet"): 1.0, ("frskd", "od"): 0.01, ("kd", "at"): 1000.0, ("kd", "fitnet"): 100.0, ("kd", "od"): 1.0,
}  # fmt: skip


def train(args, checkpoint):
    images, train_loader, test_loader = loaders(args)
    method = build(args, len(images.classes), resumed=checkpoint is not None)
    train_loader.pairs = getattr(method, "pairs", None)  # what the method wants beside each image
    optimizer = torch.optim.SGD(method.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
                                foreach=True)  # one kernel for many parameters
    run = runs.Run(args, method, optimizer, checkpoint)  # its folder, and the epochs that it already holds
    forward = runs.parallel(method, args)  # --compile, --amp, DistributedDataParallel

    for epoch in run.epochs():  # seeds, learning rate, method.set_epoch
        method.train()
        meter = runs.Meter(train_loader, epoch, args.epochs)  # progress bar; means stay on the device
        for x, y in meter:
            terms, logits = forward(x, y)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            meter.update(terms | dict(train_top1=accuracy(logits, y)), len(y))
        metrics = evaluate(method.student, test_loader, args) if run.evaluates(epoch) else {}
        if picture := run.picture("attention", epoch):
            figures.draw_attention(picture, method, test_loader, images.classes)
        run.end_of(epoch, meter, metrics)  # log, student.pt, last.pt
    run.print_result("top1")
    if runs.rank() == 0:
        figures.draw_curves(run.folder / "curves.png", [(vars(args), run.log, run.folder)])


def accuracy(logits, y):
    """Top-1 accuracy in percent; a soft label (B, num_classes) counts as its largest entry."""
    labels = y.argmax(1) if y.ndim == 2 else y
    return 100 * (logits.argmax(1) == labels).float().mean()


@torch.no_grad()
def evaluate(net, loader, args):
    """-> top-1 and top-5 accuracy in percent, of a network in evaluation mode; nan if a logit is no number."""
    net.eval()
    runs.share_buffers(net)
    counts = torch.zeros(3, dtype=torch.long, device=loader.device)
    for x, y in loader.epoch():
        with runs.autocast(args):
            logits = net(x)
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), (~logits.isfinite()).sum()])
    top1, top5, not_finite = runs.all_reduced(counts).tolist()
    if not_finite:
        return dict(top1=math.nan, top5=math.nan)
    return dict(top1=100 * top1 / len(loader.split), top5=100 * top5 / len(loader.split))


# ----------------------------------------------------------------------------------------- networks and methods


def network(arch, image_size, num_classes):
    """A network of frskd.py, of timm or of torchvision, by its name."""
    if wrn := re.fullmatch(r"wrn(\d+)_(\d+)", arch):
        return frskd.WideResNet(int(wrn[1]), int(wrn[2]), num_classes)
    if arch in ("resnet18", "resnet34"):
        return getattr(frskd, arch)(num_classes, "cifar" if image_size <= data.DEVICE_RESIDENT else "imagenet")
    if arch.startswith("timm/"):
        import timm

        return timm.create_model(arch.removeprefix("timm/"), num_classes=num_classes)
    aux = dict(aux_logits=False, init_weights=True) if arch in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(arch, num_classes=num_classes, **aux)


def build_student(arch, blocks, num_classes, example):
    """The network that --arch names, with `features` (see frskd.py)."""
    net = network(arch, example.shape[-1], num_classes)
    if arch.startswith("timm/"):
        return frskd.Timm(net, example=example)
    return net if hasattr(net, "channels") else frskd.Adapter(net, blocks, example)


def build_feature_loss(name, student, teacher, fitnet):
    """L_F of Tables 5 and 7; fitnet: the FitNet of the two, which FRSKD and kd build differently."""
    if name == "od":
        return baselines.Overhaul(student, teacher)
    return fitnet() if name == "fitnet" else frskd.attention_transfer


def build_frskd(student, num_classes, *, alpha, beta, temperature, width, channels, feature_loss, sla):
    if channels:
        teacher = frskd.BiFPN(student.channels, num_classes, channels)
    else:
        teacher = frskd.BiFPNc(student.channels, num_classes, width)
    fitnet = functools.partial(baselines.FitNet, student.channels, teacher.dims)
    loss = build_feature_loss(feature_loss if beta > 0 else "at", student, teacher, fitnet)  # unused where beta is 0
    method = frskd.FRSKDSLA if sla else frskd.FRSKD
    return method(student, teacher, alpha=alpha, beta=beta, temperature=temperature, feature_loss=loss)


def build_kd(student, num_classes, *, alpha, beta, temperature, feature_loss, teacher_arch, teacher_checkpoint,
             image_size):  # fmt: skip
    teacher, loss = network(teacher_arch, image_size, num_classes), None
    if feature_loss != "none":
        if not hasattr(teacher, "channels"):
            raise ValueError(f"--feature-loss {feature_loss} needs maps: --teacher-arch resnet18, resnet34, wrn<d>_<w>")
        with frskd.evaluation_mode(student), frskd.evaluation_mode(teacher), torch.no_grad():
            image = torch.zeros(1, 3, image_size, image_size)
            sizes, sizes_t = ([tuple(f.shape[-2:]) for f in net.features(image)[1]] for net in (student, teacher))
        if sizes != sizes_t:
            raise ValueError(f"its maps are {sizes}, those of --teacher-arch {teacher_arch} {sizes_t}")
        fitnet = functools.partial(baselines.Hint, student.channels, teacher.channels)
        loss = build_feature_loss(feature_loss, student, teacher, fitnet)
    if teacher_checkpoint:
        runs.load_state(teacher, runs.load_file(teacher_checkpoint), f"{teacher_checkpoint} does not fit")
    return baselines.Distillation(student, teacher, alpha=alpha, beta=beta, temperature=temperature, feature_loss=loss)


METHODS = {  # name: (student, num_classes, *, options) -> method; its keywords are the options that it takes
    "baseline": baselines.Baseline,
    "one": baselines.ONE,
    "ddgsd": baselines.DDGSD,
    "byot": baselines.BYOT,
    "sad": baselines.SAD,
    "cskd": baselines.CSKD,
    "slasd": baselines.SLASD,
    "frskd": build_frskd,
    "kd": build_kd,
}


def build(args, num_classes, resumed=False):
    """Student and method, from the seed."""
    torch.manual_seed(args.seed)
    example = torch.zeros(2, 3, args.image_size, args.image_size)
    options = {key: getattr(args, key) for key in runs.keywords(METHODS[args.method]) if hasattr(args, key)}
    if args.method == "byot":
        options["beta"] *= runs.processes()  # its feature term is a sum over the images of a process
    if args.method == "kd" and resumed:
        options["teacher_checkpoint"] = None  # its weights are in the checkpoint
    try:
        student = build_student(args.arch, args.blocks, num_classes, example)
        method = METHODS[args.method](student, num_classes, **options)
    except (ImportError, ValueError, TypeError, RuntimeError, AssertionError) as error:  # no timm; what does not suit
        where = f"--method {args.method}, --arch {args.arch} at {args.image_size} px"
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    return method.to(args.device, memory_format=torch.channels_last)


def loaders(args, training=True):
    """-> images, training loader, test loader; without `training`, images and test loader."""
    with runs.first_process_first():
        images = data.load(args.dataset, data_dir=args.data_dir, image_size=args.image_size,
                           per_class=args.per_class if training else None, download=args.download,
                           splits=("train", "test") if training else ("test",))
    runs.describe(args, images)
    mix = None
    if args.mixup or args.cutmix:
        mix = (v2.MixUp if args.mixup else v2.CutMix)(alpha=args.mixup or args.cutmix, num_classes=len(images.classes))
    options = dict(batch_size=args.batch_size, image_size=args.image_size, seed=args.seed, stats=data.STATS[args.stats],
                   workers=args.workers, device=args.device, rank=runs.rank(), processes=runs.processes())
    train_loader = [data.make_loader(images.train, train=True, mix=mix, **options)] if training else []
    return images, *train_loader, data.make_loader(images.test, train=False, **options)


# ------------------------------------------------------------------------------------------- the command line


def recipe(given):
    """The options that were given, a dict -> the values of all, by data set and method, where they are not given."""
    dataset, method = given.get("dataset", "shapes"), given.get("method", "frskd")
    if dataset == "folder" and "help" not in given:
        given.setdefault("image_size", data.folder_image_size(given.get("data_dir", "data")))
    small = given.get("image_size", RECIPES[dataset]["image_size"]) <= data.DEVICE_RESIDENT
    values = dict(RECIPES["cub200" if dataset == "folder" and not small else dataset], dataset=dataset, method=method)
    values |= runs.untaken(METHODS, method, given)
    if method != "frskd":  # weights of a method's own
        own = runs.keywords(baselines.Distillation if method == "kd" else METHODS[method])
        values |= {key: own[key] for key in ("alpha", "beta", "temperature") if key in own}
    if method == "cskd" and not small:
        values["alpha"] = 3.0
    if method == "kd":
        values["feature_loss"] = "none"
    values["beta"] = BETA.get((method, given.get("feature_loss")), values["beta"])
    if given.get("mixup") is True:
        given["mixup"] = 0.2 if small else 0.3  # appendix: CIFAR-100 and TinyImageNet; fine-grained sets
    epochs, drops = given.get("epochs", values["epochs"]), values.pop("drops")
    values["milestones"] = sorted({int(epochs * drop) for drop in drops} - {0})
    if "help" not in given:
        check(given, given.get("arch", values["arch"]), method)
    return values


def check(given, arch, method):
    """Refuses what would silently be another experiment."""
    if (given.get("mixup") or given.get("cutmix")) and (given.get("sla") or method in ("slasd", "cskd")):
        raise UserError(f"mixed labels do not go with {'--sla' if given.get('sla') else method}, which needs classes")
    if method == "kd" and not given.get("teacher_checkpoint"):
        raise UserError("--method kd needs --teacher-checkpoint FILE, the student.pt of a trained --teacher-arch")
    if method == "kd" and given.get("beta") and given.get("feature_loss", "none") == "none":
        raise UserError("--beta weighs a feature loss, which kd has by --feature-loss at, fitnet or od")
    if method == "frskd" and given.get("feature_loss") == "none":
        raise UserError("--feature-loss none is kd's: FRSKD without a feature loss is --beta 0")
    own = arch in ("resnet18", "resnet34") or re.fullmatch(r"wrn\d+_\d+", arch) or arch.startswith("timm/")
    if not own and arch not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"--arch {arch}: neither resnet18, resnet34, wrn<depth>_<width>, timm/NAME nor of torchvision")
    if bool(own) == bool(given.get("blocks")):
        need = "has its own blocks: leave --blocks out" if own else "needs --blocks A,B,..., whose outputs are F_1..F_n"
        raise UserError(f"--arch {arch} {need}")


def parser():
    p = runs.Parser("train.py", "Train an image classifier with FRSKD.")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=list(RECIPES), help="shapes: drawn in memory; folder: train/CLASS/*, and "
                   "val/, valid/, validation/ or test/; the others: the archives as they unpack (%(default)s)")
    g.add_argument("--data-dir", type=runs.path, metavar="DIR", help="where the archives were unpacked, or that holds "
                   "train/ (%(default)s)")
    g.add_argument("--download", help="fetch the data set where it is missing", **FLAG)
    g.add_argument("--image-size", type=number(int, 8), metavar="PX", help="up to 64 with the CIFAR stem, pad-crop and "
                   "flip, above with the ImageNet stem and random resized crops (%(default)s)")
    g.add_argument("--per-class", type=number(int, 1), metavar="N", help="train on the first N images of each class")
    g = p.add_argument_group("network")
    g.add_argument("--arch", help="resnet18, resnet34, wrn<depth>_<width>, timm/NAME, or with --blocks any of "
                   "torchvision.models (%(default)s)")
    g.add_argument("--blocks", type=lambda names: names.split(","), metavar="A,B,...", help="of torchvision.models: "
                   "the modules whose outputs are F_1..F_n, shallow to deep")
    g = p.add_argument_group("method")
    g.add_argument("--method", choices=list(METHODS), help="baseline: plain cross-entropy; kd: from a pretrained "
                   "teacher; the others are self-distillation (%(default)s)")
    g.add_argument("--alpha", type=number(float, 0), help="weight of L_KD; larger trusts it more (%(default)s)")
    g.add_argument("--beta", type=number(float, 0), help="weight of L_F; 0 is FRSKD\\F (%(default)s)")
    g.add_argument("--temperature", type=number(float, 0, above=True), help="K of L_KD; larger is softer (%(default)s)")
    x = g.add_mutually_exclusive_group()
    x.add_argument("--width", type=number(int, 1), help="w of BiFPNc, the paper's self-teacher (%(default)s)")
    x.add_argument("--channels", type=number(int, 1), help="BiFPN instead, of one width; Table 6 has 128 and 256")
    g.add_argument("--feature-loss", choices=["at", "fitnet", "od", "none"], help="L_F: attention transfer, FitNet or "
                   "overhaul distillation; none: kd by soft labels alone (%(default)s)")
    g.add_argument("--sla", help="FRSKD+SLA: five times the images a step", **FLAG)
    g.add_argument("--teacher-arch", help="of kd, as --arch")
    g.add_argument("--teacher-checkpoint", type=runs.path, metavar="FILE", help="of kd: the trained teacher's weights")
    x = g.add_mutually_exclusive_group()
    x.add_argument("--mixup", nargs="?", const=True, type=number(float, 1e-3), metavar="A", help="mix pairs of images, "
                   "share from Beta(A, A); larger mixes more (without A 0.2 up to 64 px, 0.3 above)")
    x.add_argument("--cutmix", nargs="?", const=1.0, type=number(float, 1e-3), metavar="A", help="paste a box of one "
                   "image into another, area from Beta(A, A) (without A 1.0)")
    runs.add_optimisation_options(p)
    runs.add_run_options(p, "attention")
    return p


def evaluate_file(args, content):
    """Evaluates a last.pt, its self-teacher too, or a student.pt; with --attention draws the maps."""
    images, loader = loaders(args, training=False)
    method = build(args, len(images.classes), resumed=True)
    for name, net in runs.evaluated(args, method, content):
        metrics = runs.results(evaluate(net, loader, args))
        runs.say(f"{name}: {metrics} (on {args.test_name}, {args.eval})")
    if args.attention is not None and runs.rank() == 0:
        figures.draw_attention(Path(args.output) / "attention.png", method, loader, images.classes)


def print_cost(args):
    """Parameters and FLOPs (multiply-adds) of the network, and of its self-teacher over the network's."""
    if args.method != "frskd":
        raise UserError("--cost compares a network with FRSKD's self-teacher: leave --method out")
    method, x = build(args, 100), torch.zeros(1, 3, args.image_size, args.image_size, device=args.device)
    with frskd.evaluation_mode(method), torch.no_grad():
        feats = method.student.features(x)[1]
    (params, flops), (params_t, flops_t) = frskd.cost(method.student, x), frskd.cost(method.teacher, feats)
    rows = [[args.arch, params / 1e6, flops / 1e9, ""]]
    rows += [["its self-teacher", params_t / 1e6, flops_t / 1e9, f"x{params_t / params:.2f}, x{flops_t / flops:.2f}"]]
    columns = [f"{args.image_size} px, 100 classes", "parameters / M", "FLOPs / G", "over the network's"]
    print(tabulate(rows, columns, tablefmt="github", floatfmt=".3f"))


@runs.command  # what the user can mend: one line, 2; not finite: 1; Ctrl-C: 130
def main(argv=None):
    args, checkpoint = runs.options(parser(), recipe, argv)  # recipe < checkpoint < command line
    if args.table:
        found = runs.print_table(args.table, "train.py", "top1")
        if args.curves:
            figures.draw_curves(args.curves, found)
    elif args.cost:
        print_cost(args)
    elif args.eval:
        evaluate_file(args, checkpoint)
    else:
        train(args, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
