"""Time of a training step of every method, what it computes and what it moves; and of loading alone.

    python -m experiments.bench                                   # WRN-16-2, 32 px, 100 classes; a minute on two cores
    python -m experiments.bench --arch resnet18 --batch-size 128 --device cuda --compile

Kernels and bytes are counted on any device: operations that compute, not views, and the tensors that they read and
write. On a GPU each is a launch, and bytes over bandwidth the least time that a step can take.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from experiments import data, runs

METHODS = (
    "--method baseline", "--method one", "--method ddgsd", "--method byot", "--method sad", "--method cskd",
    "--method slasd", "--beta 0", "", "--feature-loss fitnet", "--feature-loss od", "--sla", "--method kd",
    "--method kd --feature-loss at",
)  # fmt: skip


def build(options, arch, device):
    """The name and the method that train.py's options stand for, at 32 px and 100 classes."""
    given = vars(train.parser().parse_args(options.split())) | dict(dataset="cifar100", arch=arch, device=device)
    if given.get("method") == "kd":
        given |= dict(teacher_arch="wrn40_2" if arch.startswith("wrn") else "resnet34", teacher_checkpoint="any")
    args = runs.resolved(train.parser(), train.recipe, given)
    return args.name, train.build(args, 100, resumed=True)


def training_step(method, batch_size, amp=False, backend=None):
    """A function that trains once, as train.py does, on random images, twice as many for a method with `pairs`."""
    device = next(method.parameters()).device
    rows = batch_size * (2 if getattr(method, "pairs", None) else 1)
    x = torch.randn(rows, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.arange(batch_size, device=device) % 100
    forward = runs.parallel(method, argparse.Namespace(device=str(device), amp=amp, compile=backend))
    optimizer = torch.optim.SGD(method.parameters(), 0.01, 0.9, weight_decay=1e-4, foreach=True)

    def step():
        terms, _ = forward(x, y)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()

    return step


class Count(TorchDispatchMode):
    """While it is entered, counts kernels and the bytes that they read and write."""

    kernels = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(tree) if torch.is_tensor(t)] for tree in ((args, kwargs), out))
        sources = {t.untyped_storage().data_ptr() for t in read}
        is_view = not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in sources for t in written)
        if not is_view:
            self.kernels += 1
            self.bytes += sum(t.numel() * t.element_size() for t in read + written)
        return out


def seconds_of(steps, rounds, repeat):
    """Median seconds of each function of {name: function}, interleaved, so that a noisy machine hits all alike."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(repeat):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i > 0:
                seconds[name].append((time.perf_counter() - began) / repeat)
    return {name: statistics.median(values) for name, values in seconds.items()}


def loading_rates(device, workers):
    """Training images a second of both loaders, no step between them: at 32 px, and JPEGs of 500 px at 224 px."""
    images, labels, _ = data.draw_shapes(2, 500, seed=0)
    small = data.Split(torch.zeros(10_000, 32, 32, 3, dtype=torch.uint8), torch.arange(10_000) % 100)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(len(images))]
        for path, image in zip(paths, images):
            Image.fromarray(image.numpy()).save(path, quality=90)
        for split, size in ((small, 32), (data.Split(16 * paths, labels.repeat(16)), 224)):
            loader = data.make_loader(split, train=True, batch_size=128, image_size=size, workers=workers,
                                      device=device, stats=data.STATS["cifar"], seed=0)  # fmt: skip
            for epoch in range(2):  # the first starts the workers
                began = time.perf_counter()
                count = sum(len(y) for _, y in loader.epoch(epoch))
            yield count / (time.perf_counter() - began)


@runs.command
def main(argv=None):
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(prog="python -m experiments.bench", description="Time of a training step.")
    p.add_argument("--arch", default="wrn16_2", help="resnet18, resnet34 or wrn<depth>_<width> (%(default)s)")
    p.add_argument("--batch-size", type=runs.number(int, 2), default=128 if cuda else 32, help="(%(default)s)")
    p.add_argument("--device", default="cuda" if cuda else "cpu", help="(%(default)s)")
    p.add_argument("--rounds", type=runs.number(int, 1), default=3, help="of the interleaved timing (%(default)s)")
    p.add_argument("--workers", type=runs.number(int, 0), default=2, help="of loading (%(default)s)")
    p.add_argument("--compile", nargs="?", const="inductor", help="compiled columns too, by this backend")
    p.add_argument("--only", type=lambda names: names.split(","), default=METHODS, metavar="OPTIONS,...",
                   help='options of train.py, a method each: --only="--method baseline,--sla"')
    p.add_argument("--float32", action="store_true", help="leave out bf16, which some CPUs have no instructions for")
    args = p.parse_args(argv)
    runs.prepare_device(args.device)
    columns = {"float32": dict()} if args.float32 else {"float32": dict(), "bf16": dict(amp=True)}
    if args.compile:
        columns |= {f"{name}, compiled": kwargs | dict(backend=args.compile) for name, kwargs in columns.items()}

    steps, counts = {}, {}
    for options in args.only:
        for column, kwargs in columns.items():
            name, method = build(options, args.arch, args.device)
            steps[name, column] = training_step(method, args.batch_size, **kwargs)
            steps[name, column]()  # the first makes the momentum
            if "backend" not in kwargs:
                with Count() as counts[name, column]:
                    steps[name, column]()
    if "cuda" in args.device:
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(steps, args.rounds, repeat=20 if "cuda" in args.device else 1)

    first, rows = next(iter(steps))[0], []
    for name in dict.fromkeys(name for name, _ in steps):
        row = [name]
        for column in columns:
            t, count = seconds[name, column], counts.get((name, column))
            row.append(f"{1e3 * t:.0f} ms {args.batch_size / t:.0f}/s x{t / seconds[first, column]:.2f}")
            if count:
                row.append(f"{count.kernels} {count.bytes / args.batch_size / 1e6:.1f}")
        rows.append(row)
    where = torch.cuda.get_device_name() if "cuda" in args.device else f"CPU, {torch.get_num_threads()} threads"
    print(f"A training step, {args.arch}, batch {args.batch_size} at 32 px, {where}: median of {args.rounds} "
          f"interleaved, images a second, times {first}'s; kernels, MB an image that they read and write.\n")  # fmt: skip
    heads = [h for column in columns for h in ([column] + ["kernels, MB"] * ("compiled" not in column))]
    print(tabulate(rows, ["method", *heads], tablefmt="github"))
    if "cuda" in args.device:
        print(f"\nMost memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, all methods together.")
    small, large = loading_rates(args.device, args.workers)
    print(f"\nLoading alone: 32 px, on the device, {small:.0f} images/s; JPEGs of 500 px to 224 px, "
          f"{args.workers} workers, {large:.0f} images/s.")


if __name__ == "__main__":
    sys.exit(main())
