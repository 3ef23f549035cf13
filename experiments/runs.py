"""A run: its options and name, its folder, log and checkpoint, its processes and its meter, for train.py and seg.py.

A checkpoint is written at the end of an epoch, under another name, then renamed; every random draw comes from
(seed, epoch). So a run may die at any moment, and the recovery is how every run starts: from the last checkpoint.
"""
import argparse
import contextlib
import ctypes
import functools
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from tabulate import tabulate
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import frskd
from experiments.archives import UserError, one_line
from experiments.data import seed_of

THIS_CALL = ("overwrite", "resume", "eval", "table", "curves", "cost", "help")  # not kept with a run
# Options that are no part of the experiment: not in a run's name, free to differ when it is resumed. A teacher's
# weights are in the checkpoint, whatever its file is called later.
FREE = (*THIS_CALL, "data_dir", "download", "workers", "device", "compile", "output", "eval_every", "attention",
        "predictions", "teacher_checkpoint")  # fmt: skip
METHOD_OPTIONS = ("alpha", "beta", "temperature", "width", "channels", "feature_loss", "sla", "teacher_arch",
                  "teacher_checkpoint", "warmup_epochs", "ramp_epochs")  # of which a method takes those that it names
METRICS = dict(top1="top-1", top5="top-5", miou="mIoU")  # key in the log: its name, in percent
RUN_FILES = "last.pt", "student.pt", "args.json", "log.jsonl", "attention*.png", "predictions*.png", "curves.png"
FLAG = dict(action="store_true", default=argparse.SUPPRESS)  # of an option without a value


class NonFinite(Exception):
    """A term, a weight or a logit became infinite or not a number."""


# ------------------------------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """Parses what was given and nothing else: the other values are the recipe's."""

    def __init__(self, script, description):
        said = f"{description} Values in brackets are the recipe's of --dataset: see --dataset NAME --help."
        given = dict(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        super().__init__(prog=script, description=said, **given)

    def error(self, message):
        raise UserError(message)


def number(kind, low, above=False):
    """An argparse type: a finite int or float of at least `low`; above: greater than it."""

    def parse(string):
        value = kind(string)
        if not low <= value < math.inf or above and value == low:
            raise argparse.ArgumentTypeError(f"{string} is not {'above' if above else 'at least'} {low}")
        return value

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def path(string):
    return str(Path(string).expanduser())


def epoch_list(string):
    return [] if string == "none" else sorted({number(int, 1)(epoch) for epoch in string.split(",")})


def add_optimisation_options(parser):
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=number(int, 1), help="(%(default)s)")
    g.add_argument("--milestones", type=epoch_list, metavar="A,B,...", help="after these epochs the learning rate "
                   "falls to a tenth; none: constant (%(default)s)")
    g.add_argument("--batch-size", type=number(int, 1), help="of all processes together (%(default)s)")
    g.add_argument("--lr", type=number(float, 0, above=True), help="of SGD, at the start (%(default)s)")
    g.add_argument("--momentum", type=number(float, 0), help="not Nesterov (%(default)s)")
    g.add_argument("--weight-decay", type=number(float, 0), help="of all parameters; 5e-4 is common too (%(default)s)")
    return g


def add_run_options(parser, picture):
    """The options of a run that both scripts have; `picture` is the one that draws."""
    g = parser.add_argument_group("run")
    g.add_argument("--seed", type=number(int, 0), help="of initialisation, order and augmentation (%(default)s)")
    g.add_argument("--workers", type=number(int, 0), help="processes that decode larger images (%(default)s)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps (%(default)s)")
    g.add_argument("--amp", help="bfloat16 autocast; the losses stay in float32", **FLAG)
    g.add_argument("--compile", nargs="?", const="inductor", choices="inductor reduce-overhead aot_eager eager".split(),
                   help="torch.compile the method, by this backend; reduce-overhead: inductor with CUDA graphs")
    g.add_argument("--output", type=path, metavar="DIR", help="folder of the run (runs/DATASET-ARCH-NAME-sSEED)")
    g.add_argument("--eval-every", type=number(int, 1), metavar="N", help="epochs, and after the last (%(default)s)")
    g.add_argument(f"--{picture}", nargs="*", type=number(int, 1), metavar="EPOCH",
                   help=f"draw {picture}-EPOCH.png after these epochs ({picture}.png at the end)")
    x = g.add_mutually_exclusive_group()
    x.add_argument("--overwrite", help="replace the run that the folder holds", **FLAG)
    x.add_argument("--resume", nargs="?", const=True, type=path, metavar="PATH", help="continue a run, its folder or "
                   "last.pt; without PATH the one in --output, or a fresh one where that has no checkpoint")
    g = parser.add_argument_group("instead of training")
    g.add_argument("--eval", type=path, metavar="FILE", help=f"evaluate a last.pt or student.pt; --{picture} draws too")
    g.add_argument("--table", type=path, metavar="DIR", help="print the results of the runs below a folder")
    g.add_argument("--curves", type=path, metavar="FILE", help="with --table: draw the course of these runs too")
    g.add_argument("--cost", help="print parameters and FLOPs of network and self-teacher", **FLAG)
    g.add_argument("-h", "--help", help="show this message", **FLAG)


@functools.cache
def keywords(function):
    """{name: default} of a method's options, its builder's keyword-only arguments."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def untaken(methods, method, given):
    """{option: None} of the options that only other methods take. UserError where one of them was given."""
    if method not in methods:  # of a checkpoint
        raise UserError(f"--method {method} is none of this script's: call the one that made the run")
    takes, known = keywords(methods[method]), set().union(*map(keywords, methods.values()))
    others = [key for key in METHOD_OPTIONS if key in known and key not in takes]
    for key in others:
        if given.get(key) is not None:
            taken = " ".join(option(key) for key in METHOD_OPTIONS if key in takes) or "none of these"
            raise UserError(f"{option(key)} is no option of --method {method}, which takes {taken}")
    return dict.fromkeys(others)


def option(key):
    return "--" + key.replace("_", "-")


def text(value):
    """A value as one would type it."""
    if isinstance(value, list):
        return ",".join(map(text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def options(parser, recipe, argv):
    """Recipe < checkpoint < command line -> args; the file to continue from or to evaluate, loaded, or None.
    recipe: {option: value} of what was given -> {option: value} of all.
    """
    argv = sys.argv[1:] if argv is None else argv
    given, saved, content = vars(parser.parse_args(argv)), {}, None
    if "help" in given:
        parser.set_defaults(**vars(resolved(parser, recipe, given)))
        parser.exit(parser.print_help())
    if "curves" in given and "table" not in given:
        raise UserError("--curves draws the runs of --table DIR: name it")
    source, goes_on, evaluates = given.get("eval", given.get("resume")), "resume" in given, "eval" in given
    if source is True:  # --resume without a path
        source = given.get("output") or resolved(parser, recipe, given).output
        source = source if Path(source, "last.pt").exists() else None
    if source:
        file = Path(source, "last.pt") if Path(source).is_dir() else Path(source)
        content, beside = load_file(file), file.with_name("args.json")
        whole = "method" in content  # not a plain state_dict
        if not (whole or evaluates):
            raise UserError(f"{file} is not the last.pt of a run")
        saved = content["args"] if whole else json.loads(beside.read_text()) if beside.exists() else {}
        if saved and saved.get("script") != parser.prog:
            raise UserError(f"{file} is of a run of {saved.get('script', 'another program')}")
        given.setdefault("output", str(file.parent))
        goes_on = Path(given["output"]).resolve() == file.parent.resolve()
        if evaluates:  # what was drawn in training is not asked for again
            given = dict(attention=None, predictions=None) | given
    args = resolved(parser, recipe, saved | given)
    for key in given.keys() & saved.keys() - {*FREE}:
        value, was = getattr(args, key), saved[key]
        if value != was and (evaluates or key != "epochs" or value < was):
            raise UserError(f"{option(key)} {text(value)} differs from the run's {text(was)}: leave it out")
    if source and not whole:  # only the plain network is in the file
        args.method, args.name = "baseline", args.name if saved else "of unknown training"
    if not goes_on and not given.keys() & {"overwrite", "eval", "table", "cost"} and run_files(args.output):
        raise UserError(f"{args.output} already holds a run: continue it with --resume, replace it with --overwrite, "
                        "or take another --output")
    args.command = f"{launcher()} {shlex.join(argv)}".strip()
    prepare_device(args.device)
    return args, content


def resolved(parser, recipe, given):
    """All values of a run, with its name and its folder."""
    given = dict(given)  # which the recipe may add to
    defaults = dict(seed=0, data_dir="data", download=False, workers=2, amp=False, eval_every=1) | recipe(given)
    keys = [action.dest for action in parser._actions]
    args = argparse.Namespace(**dict.fromkeys(keys) | defaults | given)
    args.script, args.name = parser.prog, args.method
    for key in keys:
        value = getattr(args, key)
        if value != defaults.get(key) and key not in (*FREE, "dataset", "arch", "method", "seed"):
            args.name += option(key)[1:] + ("" if value is True else text(value))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.output = args.output or "runs/" + f"{args.dataset}-{args.arch}-{args.name}-s{args.seed}".replace("/", "-")
    return args


def launcher():
    """What started this script, to be typed in the same folder."""
    count = os.environ.get("LOCAL_WORLD_SIZE")
    return (f"torchrun --nproc-per-node={count} " if count else "python ") + shlex.quote(sys.argv[0])


# ----------------------------------------------------------------------------------------- processes and devices


def rank():
    """The number of this process among those that train together; the first one, 0, alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line, file=None):
    if rank() == 0:
        print(line, file=file, flush=True)


def join_processes():
    """Joins those that torchrun started, where it did: NCCL among GPUs, one each, gloo among CPUs."""
    if not dist.is_torchelastic_launched():
        sizes = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
        if any(os.environ.get(size, "1") != "1" for size in sizes):
            raise UserError("several processes were started, and each would train the same run: use torchrun")
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local < gpus:
        torch.cuda.set_device(local)
    store, number_, count = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)  # it remembers the processes before
    backend, patience = "cpu:gloo,cuda:nccl" if gpus else "gloo", timedelta(hours=12)  # one may fetch a data set
    dist.init_process_group(backend, store=store, rank=number_, world_size=count, timeout=patience)


@contextlib.contextmanager
def first_process_first():
    """One process of a machine fetches and unpacks data, the others find what it left."""
    if processes() > 1 and os.environ["LOCAL_RANK"] != "0":
        dist.barrier()
    yield
    if processes() > 1 and os.environ["LOCAL_RANK"] == "0":
        dist.barrier()


def all_reduced(tensor):
    """The sum over all processes, in place."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_buffers(net):
    """Every process gets the first one's running statistics of batch norm, as DistributedDataParallel at a step."""
    for buffer in net.buffers() if processes() > 1 else ():
        dist.broadcast(buffer, 0)


def prepare_device(device):
    """TF32 products and cuDNN's fastest convolutions on CUDA. UserError for a device that is not there."""
    try:
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {one_line(error)[:120]}") from None
    if "cuda" in device:
        torch.cuda.set_device(torch.device(device).index or torch.cuda.current_device())
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True


def keep_freed_memory():
    """Tells glibc to keep freed blocks: it hands those above 32 MiB back to the system, and a page fault for each 4 KiB
    of the next tensor is up to two thirds of a step's time on a CPU. Changes no number.
    """
    if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 1 << 30) or mallopt(-4, 0)  # M_MMAP_THRESHOLD, in bytes; where that is too much, M_MMAP_MAX
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def autocast(args):
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.amp)


def parallel(method, args):
    """The method on a batch, (x, y) -> terms, logits: under --amp, compiled, gradients averaged over processes."""
    if processes() > 1:
        method = DistributedDataParallel(method, [torch.cuda.current_device()] if "cuda" in args.device else None)
    if args.compile:
        method = torch.compile(method, **{"mode" if args.compile == "reduce-overhead" else "backend": args.compile})

    def forward(x, y):
        with autocast(args):
            return method(x, y)

    return forward


# -------------------------------------------------------------------------------------- the folder and the epochs


class Run:
    """A run's folder, and its epochs from the first one that the checkpoint does not hold."""

    def __init__(self, args, method, optimizer, checkpoint=None):
        self.args, self.method, self.optimizer, self.folder = args, method, optimizer, Path(args.output)
        self.kept = {key: value for key, value in vars(args).items() if key not in THIS_CALL}
        self.log = checkpoint["log"] if checkpoint else []
        if checkpoint:
            load_state(method, checkpoint["method"], f"the checkpoint does not fit {args.arch}, {args.method}")
            optimizer.load_state_dict(checkpoint["optimizer"])
        elif rank() == 0:
            for file in run_files(self.folder):
                file.unlink()
        write_atomically(self.folder / "args.json", json.dumps(self.kept | about(args), indent=1).encode())
        self.write_log()

    def write_log(self):
        write_atomically(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log).encode())

    def epochs(self):
        args = self.args
        for epoch in range(len(self.log), args.epochs):
            each = ("dropout", rank()) if rank() > 0 else ()  # dropout is each process's own
            torch.manual_seed(seed_of(args.seed, epoch, *each))
            for group in self.optimizer.param_groups:
                group["lr"] = args.lr / 10 ** sum(epoch >= m for m in args.milestones)
            if hasattr(self.method, "set_epoch"):
                self.method.set_epoch(epoch, args.epochs)
            yield epoch

    def evaluates(self, epoch):
        return (epoch + 1) % self.args.eval_every == 0 or epoch + 1 == self.args.epochs

    def picture(self, name, epoch):
        """Where this epoch's picture is to be drawn, None where none is asked for."""
        asked = getattr(self.args, name)
        if rank() == 0 and epoch + 1 in (asked or [self.args.epochs]):
            return self.folder / (f"{name}-{epoch + 1}.png" if asked else f"{name}.png")

    def end_of(self, epoch, meter, metrics):
        """Log, then student.pt, then last.pt: a run killed between them repeats the epoch."""
        means, state = meter.read(of_all=True), self.method.state_dict()
        for name, value in [*state.items(), *metrics.items()]:
            if not isinstance(value, dict) and not torch.as_tensor(value).isfinite().all():
                raise NonFinite(f"{name} is not finite after epoch {epoch + 1}")
        lr, rate = self.optimizer.param_groups[0]["lr"], meter.images / meter.seconds
        self.log.append(dict(epoch=epoch + 1, lr=lr, **means, **metrics, images_per_s=rate, seconds=meter.seconds))
        self.write_log()
        write_atomically(self.folder / "student.pt", frskd.export(self.method.student).state_dict())
        checkpoint = dict(args=self.kept, method=state, optimizer=self.optimizer.state_dict(), log=self.log)
        write_atomically(self.folder / "last.pt", checkpoint)
        terms = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        say(f"{meter.title}  lr {lr:g}  {terms}  {results(metrics)}  {rate:.0f} images/s")

    def print_result(self, metric):
        """The last line; a folder's says which split it was evaluated on."""
        a, last, best = self.args, self.log[-1], max(self.log, key=lambda entry: entry.get(metric, 0.0))
        split = f" on {a.test_name}" if a.dataset == "folder" else ""
        best = f"best {best[metric]:.2f} at epoch {best['epoch']}"
        say(f"{a.dataset} {a.arch} {a.name} seed {a.seed}: {results(last)} (last epoch{split}; {best})")


def results(metrics):
    """top-1 73.27 top-5 92.10"""
    return " ".join(f"{name} {metrics[key]:.2f}" for key, name in METRICS.items() if key in metrics)


class Meter:
    """An epoch's batches under a progress bar, and the means of its terms over the images.
    Sums stay on the device, in float32, and go to the host every 50 steps, the only synchronisation.
    """

    def __init__(self, loader, epoch, epochs):
        self.loader, self.epoch, self.title = loader, epoch, f"epoch {epoch + 1}/{epochs}"
        self.sums, self.totals, self.images, self.began = 0.0, {}, 0, time.perf_counter()

    def __iter__(self):
        slow = 0.1 if sys.stderr.isatty() else 5  # seldom redrawn where it goes into a file
        bar = tqdm(self.loader.epoch(self.epoch), self.title, len(self.loader), leave=False, mininterval=slow,
                   disable=rank() > 0)  # fmt: skip
        for step, batch in enumerate(bar, 1):
            yield batch
            if step % 50 == 0:
                bar.set_postfix(self.read())
        self.read()  # waits for the device
        self.seconds = time.perf_counter() - self.began

    def update(self, terms, images):
        """terms: {name: scalar}, means over `images`."""
        self.sums = self.sums + images * torch.stack([t.detach().float() for t in terms.values()])
        self.names, self.images = list(terms), self.images + images

    def read(self, of_all=False):
        """-> mean of each term over the images so far, of_all: of all processes. Raises NonFinite."""
        for name, value in zip(self.names, self.sums.tolist()):
            if not math.isfinite(value):
                raise NonFinite(f"the term {name} is not finite in epoch {self.epoch + 1}")
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.sums, totals = torch.zeros_like(self.sums), [*self.totals.values(), self.images]
        if of_all and processes() > 1:
            totals = all_reduced(torch.tensor(totals, dtype=torch.float64)).tolist()  # on the CPU
            self.images = totals[-1]
        return {name: value / totals[-1] for name, value in zip(self.totals, totals)}


# ---------------------------------------------------------------------------------------------- files and tables


def run_files(folder):
    """In the order in which they are removed: without last.pt a run starts afresh."""
    return [file for name in RUN_FILES for file in Path(folder).glob(name)]


def describe(args, images):
    """What a run says of its data. UserError where it was trained on other classes."""
    known, classes = getattr(args, "classes", images.classes), images.classes
    if list(known) != list(classes):
        raise UserError(f"the data has the classes {text(classes)[:80]}, the run {text(known)[:80]}")
    args.classes, args.num_classes, args.test_name = list(classes), len(classes), images.test_name
    args.train_images, args.test_images = len(images.train), len(images.test)
    args.test_images_in_training = images.leaked
    leak = f"{images.leaked} of the {len(images.test)} test images are also training images"
    size = f"{len(images.train)} images of {len(classes)} classes, at {args.image_size} px"
    for line in [*images.notes, *[leak] * (images.leaked > 0), *[size] * (args.dataset == "folder")]:
        say(f"{args.script}: note: {line}", sys.stderr)


def about(args):
    """What args.json says beyond the values of a run."""
    device = torch.cuda.get_device_name() if "cuda" in args.device else platform.machine()
    found = dict(torch=torch.__version__, torchvision=torchvision.__version__, python=platform.python_version(),
                 device_name=device, threads=torch.get_num_threads(), processes=processes())  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or a repository without a commit
        if (root / ".git").exists():  # the project's own, not one that it was copied into
            found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return found


def write_atomically(path, content):
    """The first process writes bytes, or what torch.save takes, under another name: never half a file has this one."""
    if rank() > 0:
        return
    partial = path.with_name(path.name + ".partial")
    if not isinstance(content, bytes):
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getbuffer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_file(path):
    """A checkpoint or a state_dict, a dict, by weights_only: no code of a stranger runs."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content if isinstance(content, dict) else dict(content)
    except Exception as error:  # none there, cut short, a whole module or another pickle: torch's text is long
        raise UserError(f"{path} is no checkpoint or state_dict that can be read: {type(error).__name__}") from None


def load_state(net, state, unfit):
    """Weights, wrapped or with a wrapper's prefixes as others save them too; `unfit` begins the message of an error."""
    for key in ("state_dict", "model", "net"):
        state = state[key] if isinstance(state.get(key), dict) else state
    try:
        for prefix in ("_orig_mod.", "module.", "_orig_mod."):
            consume_prefix_in_state_dict_if_present(state, prefix)
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        own = net.state_dict()
        has, wants = [key for key in state if key not in own], [key for key in own if key not in state]
        keys = f"it has {(has or ['nothing'])[0]} where {(wants or ['nothing'])[0]} was looked for"
        raise UserError(f"{unfit}: {keys if has or wants else one_line(error)[:200]}") from None


def evaluated(args, method, content):
    """Loads the file that --eval names into a method; yields (whose result it is, network)."""
    net = method if "method" in content else frskd.export(method.student)
    load_state(net, content.get("method", content), f"{args.eval} does not fit {args.arch}")
    yield f"{args.dataset} {args.arch} {args.name} seed {args.seed}", method.student
    if isinstance(method, frskd.FRSKD):
        teacher = torch.nn.ModuleList([method])  # a network of its own: images -> the self-teacher's logits
        teacher.forward = lambda x: method.teacher(method.student.features(x)[1])[0]
        yield "its self-teacher", teacher


def read_runs(folder, script, metric):
    """Finished runs in or below a folder, [(args, log, path), ...], and lines that say what was left out."""
    found, left_out = [], []
    for file in sorted([*Path(folder).glob("args.json"), *Path(folder).glob("*/args.json")]):
        try:
            args = json.loads(file.read_text())
            log = [json.loads(line) for line in file.with_name("log.jsonl").read_text().splitlines()]
            if args["script"] == script and len(log) < args["epochs"]:
                left_out.append(f"{file.parent}: unfinished, {len(log)} of {args['epochs']} epochs")
            elif args["script"] == script and float(log[-1][metric]) >= 0:
                found.append((args, log, file.parent))
        except (OSError, ValueError, KeyError, TypeError):
            left_out.append(f"{file.parent}: not a run that can be read")
    return found, left_out


def spread(values):
    """73.27 ± 0.45; of one value 73.27"""
    values = list(values)
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def print_table(folder, script, metric):
    """Prints the results of the runs below a folder, in markdown, and returns these."""
    (found, left_out), rows = read_runs(folder, script, metric), {}
    for args, log, _ in found:
        source = f" ({args['data_dir']}, {args['test_name']})" if args["dataset"] == "folder" else ""
        seeds = rows.setdefault((args["dataset"] + source, args["arch"], args["name"]), {})
        seeds.setdefault(args["seed"], (log[-1][metric], max(entry.get(metric, 0.0) for entry in log)))
    if not found:
        raise UserError("; ".join([f"--table {folder}: no finished run of {script} in or below it", *left_out]))
    table = [[*key, *map(spread, zip(*seeds.values())), len(seeds)] for key, seeds in sorted(rows.items())]
    print(f"{METRICS[metric]} in percent, mean ± standard deviation over n seeds\n")
    heads = ["data set", "network", "method", "last epoch", "best epoch", "n"]
    print(tabulate(table, heads, "github", disable_numparse=True))  # 19.60, not 19.6
    if left_out:
        print("\nNot averaged:", *left_out, sep="\n- ")
    return found


# ------------------------------------------------------------------------------------------------ the command line

ENDS = (  # found in an error's classes and text; what to say, {} its own text; exit status
    ("NonFinite", "{}; last.pt, where there is one, is of the epoch before", 1),
    ("UserError|OSError", "{}", 2),  # also no permission, a disk that is full or gone
    ("MemoryError|can't allocate memory", "out of memory: take a smaller --batch-size or network ({:.100})", 2),
    ("torch._dynamo|torch._inductor", "--compile: {:.300}", 2),
    ("shared memory", "shared memory (/dev/shm) is too small: enlarge it, or take --workers 0", 2),
    ("DataLoader worker", "a worker is gone, perhaps killed for want of memory: fewer --workers need less", 1),
    ("more than 1 value per channel", "{}: take a larger --batch-size or --image-size", 2),
    ("gloo|NCCL", "another process is gone", 1),
)


def command(main):
    """main(argv) with an exit status: 0, 1 a number that is not finite or a process that is gone, 2 what the user can
    mend, in one line, 130 Ctrl-C, 141 a reader that is gone, 143 SIGTERM."""

    def terminate(*_):
        raise KeyboardInterrupt("SIGTERM")

    @functools.wraps(main)
    def wrapped(argv=None):
        argv, script = sys.argv[1:] if argv is None else argv, Path(main.__globals__["__file__"]).name
        for name in ("stdout", "stderr"):  # None where it was closed at the start; or of an ASCII terminal
            setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
            getattr(getattr(sys, name), "reconfigure", lambda **_: None)(errors="replace")
        with contextlib.suppress(ValueError):  # in a thread
            signal.signal(signal.SIGTERM, terminate)
        keep_freed_memory()
        try:
            join_processes()
            main(argv)
            sys.stdout.flush()  # here, where a closed pipe is caught
            return 0
        except BrokenPipeError:  # of | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be printed
            return 141
        except KeyboardInterrupt as stop:
            words = [word for word in argv if word != "--overwrite"]
            asked = {word.partition("=")[0] for word in words}
            words += [] if asked & {"--resume", "--eval", "--table", "--cost"} else ["--resume"]
            again = f"; continue with: {launcher()} {shlex.join(words)}" if "METHODS" in main.__globals__ else ""
            if os.environ.get("RANK", "0") == "0":
                print(f"{script}: stopped{again}", file=sys.stderr)
            return 143 if stop.args else 130
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            for cause, advice, status in ENDS:
                if re.search(cause, f"{type(error).__mro__} {said}"):
                    print(f"{script}: error: {advice.format(said)}", file=sys.stderr)
                    return status
            raise  # a bug
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return wrapped
