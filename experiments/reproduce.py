"""The paper's Tables 1 to 8 and Figure 4: its figures, ours, and the commands of those that nobody measured yet.

    python -m experiments.reproduce                         # all; or the names of some: 1 6 figure4
    python -m experiments.reproduce --measured              # of results/ alone, what was measured: the README's
    python -m experiments.reproduce 1 --commands            # of every cell that lacks a seed of 0, 1, 2
    python -m experiments.reproduce 1 --run --device cuda --data-dir DIR    # these one after another; --amp counts too
    python -m experiments.reproduce figure4 --plot figure4.png

Run in the folder that holds runs/. --run called again goes on where it was stopped. What Table 6 costs is printed by
`python frskd.py`.
"""
import argparse
import functools
import itertools
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tabulate import tabulate

import seg
import train
from experiments import figures, runs

SEEDS = (0, 1, 2)  # "Experiments are repeated three times"
FOLDERS = ("runs", "results")
# What every command may have.
COMMON = {"--data-dir": "store", "--device": "store", "--workers": "store", "--download": "store_true",
          "--compile": "store_true", "--amp": "store_true"}  # fmt: skip


@dataclass
class Table:
    title: str
    columns: list  # options, which a row's follow
    rows: list  # (label, options, a figure a column: ? where the paper has none, - where there is no cell)
    script: object = train
    metrics: tuple = ("top1",)  # of the columns; one serves all


SIX = [f"--dataset {name}" for name in "cifar100 tinyimagenet cub200 mit67 dogs stanford40".split()]
TEACHER = "ResNet-34, the teacher (ours)"
# fmt: off
TABLES = {
    "1": Table("Table 1: CIFAR-100 and TinyImageNet", [f"{options} --arch {arch}"
               for arch in ("wrn16_2", "resnet18") for options in SIX[:2]], [
        ("Baseline", "--method baseline", "70.42±0.08 51.05±0.20 73.80±0.60 54.60±0.33"),
        ("ONE", "--method one", "73.01±0.23 52.10±0.20 76.67±0.66 57.53±0.39"),
        ("DDGSD", "--method ddgsd", "71.96±0.05 51.07±0.24 76.61±0.47 56.46±0.24"),
        ("BYOT", "--method byot", "70.22±0.26 50.33±0.03 76.68±0.07 56.61±0.30"),
        ("SAD", "--method sad", "70.31±0.45 51.26±0.39 74.65±0.33 54.45±0.06"),
        ("CS-KD", "--method cskd", "71.79±0.68 50.08±0.18 77.19±0.05 56.46±0.10"),
        ("SLA-SD", "--method slasd", "73.00±0.45 50.77±0.33 77.52±0.30 58.48±0.44"),
        ("FRSKD\\F", "--beta 0", "73.12±0.06 52.91±0.30 77.64±0.12 59.50±0.15"),
        ("FRSKD", "", "73.27±0.45 53.08±0.33 77.71±0.14 59.61±0.31"),
        ("FRSKD+SLA", "--sla", "75.43±0.21 51.83±0.37 82.04±0.16 63.58±0.04"),
        ("Baseline, weight decay 5e-4 (ours)", "--method baseline --weight-decay 5e-4", "? ? ? ?"),
        ("FRSKD, weight decay 5e-4 (ours)", "--weight-decay 5e-4", "? ? ? ?"),
        ("Baseline, 50 images a class (ours)", "--per-class 50 --method baseline", "? - - -"),
        ("FRSKD\\F, 50 a class (ours)", "--per-class 50 --beta 0", "? - - -"),
        ("FRSKD, 50 a class (ours)", "--per-class 50", "? - - -"),
        ("Baseline, 50 a class, 5e-4 (ours)", "--per-class 50 --method baseline --weight-decay 5e-4", "? - - -"),
        ("FRSKD, 50 a class, 5e-4 (ours)", "--per-class 50 --weight-decay 5e-4", "? - - -"),
        ("Baseline, 20 a class (ours)", "--per-class 20 --method baseline", "? - - -"),
        ("FRSKD, 20 a class (ours)", "--per-class 20", "? - - -")]),
    "2": Table("Table 2: fine-grained recognition, ResNet-18", SIX[2:], [
        ("Baseline", "--method baseline", "51.72±1.17 55.00±0.97 63.38±0.04 42.97±0.66"),
        ("ONE", "--method one", "54.71±0.42 56.77±0.76 65.39±0.59 45.35±0.53"),
        ("DDGSD", "--method ddgsd", "58.49±0.55 59.00±0.77 69.00±0.28 45.81±1.79"),
        ("BYOT", "--method byot", "58.66±0.51 58.41±0.71 68.82±0.15 48.51±1.02"),
        ("SAD", "--method sad", "52.76±0.57 54.48±1.30 63.17±0.56 43.52±0.06"),
        ("CS-KD", "--method cskd", "64.34±0.08 57.36±0.37 68.91±0.40 47.23±0.22"),
        ("SLA-SD", "--method slasd", "56.17±0.71 61.57±1.06 67.30±0.21 54.07±0.38"),
        ("FRSKD\\F", "--beta 0", "62.29±1.65 61.32±0.67 69.48±0.84 53.16±0.44"),
        ("FRSKD", "", "65.39±0.13 61.74±0.67 70.77±0.20 56.00±1.19"),
        ("FRSKD+SLA", "--sla", "67.80±1.24 66.04±0.31 72.48±0.34 61.96±0.57")]),
    "3": Table("Table 3: ImageNet", [f"--dataset imagenet --arch resnet{n}" for n in (18, 18, 34, 34)], [
        ("Baseline", "--method baseline", "69.76 89.08 73.31 91.42"),
        ("FRSKD", "", "70.17 89.78 73.75 92.11")], metrics=("top1", "top5")),
    "4": Table("Table 4: PASCAL VOC, mIoU; the paper's protocol trains on every test image, clean on none", [
        "--dataset voc --arch d0", "--dataset voc --arch d1"], [
        ("Baseline", "--method baseline --protocol paper", "79.07 81.95"),
        ("FRSKD", "--protocol paper", "80.55 83.88"),
        ("Baseline, clean (ours)", "--method baseline", "? ?"),
        ("FRSKD, clean (ours)", "", "? ?")], seg, ("miou",)),
    "5": Table("Table 5: feature losses, ResNet-18; beta of Fit+SKD and OD+SKD is ours, not tuned", SIX, [
        ("Baseline", "--method baseline", "73.80±0.60 54.60±0.33 51.72±1.17 55.00±0.97 63.38±0.04 42.97±0.66"),
        ("Fit+SKD", "--feature-loss fitnet", "77.03±0.05 59.06±0.20 61.05±1.05 57.69±0.28 67.50±0.32 51.66±1.32"),
        ("OD+SKD", "--feature-loss od", "77.12±0.09 59.14±0.20 57.44±0.92 54.83±2.63 66.51±0.87 49.09±0.47"),
        ("FRSKD", "", "77.71±0.14 59.61±0.31 65.39±0.13 61.74±0.67 70.77±0.20 56.00±1.19")]),
    "6": Table("Table 6: self-teachers", ["--dataset cifar100 --arch wrn16_2"], [
        ("BiFPN, 128 channels", "--channels 128", "72.64±0.12"),
        ("BiFPN, 256", "--channels 256", "73.54±0.41"),
        ("BiFPNc, 128", "--width 1", "71.70±0.19"),
        ("BiFPNc, 256", "", "73.27±0.45")]),
    "7": Table("Table 7: a pretrained ResNet-34 teaches ResNet-18", SIX, [
        (TEACHER, "--arch resnet34 --method baseline", "? ? ? ? ? ?"),
        ("Baseline", "--method baseline", "73.80±0.60 54.60±0.33 51.72±1.17 55.00±0.97 63.38±0.04 42.97±0.66"),
        ("FitNet", "--method kd --feature-loss fitnet",
         "76.65±0.25 59.38±0.10 58.97±0.07 59.15±0.41 67.18±0.10 46.64±0.24"),
        ("ATT", "--method kd --feature-loss at", "77.16±0.15 59.83±0.28 59.21±0.34 59.33±0.22 67.54±0.18 47.04±0.17"),
        ("Overhaul", "--method kd --feature-loss od",
         "74.59±0.32 59.50±0.09 58.82±0.12 58.81±0.58 66.43±0.08 47.06±0.26"),
        ("FRSKD", "", "77.71±0.14 59.61±0.31 65.39±0.13 61.74±0.67 70.77±0.20 56.00±1.19")]),
    "8": Table("Table 8: augmentation, ResNet-18; the baseline of Dogs is 63.38 in Table 2", SIX, [
        ("Baseline", "--method baseline", "73.80±0.60 54.60±0.33 51.72±1.17 55.00±0.97 66.38±0.04 42.97±0.66"),
        ("Mixup", "--method baseline --mixup", "76.26±0.41 56.28±0.24 57.60±0.42 56.77±1.45 65.96±0.03 47.15±0.60"),
        ("FRSKD + Mixup", "--mixup", "78.74±0.19 60.30±0.38 67.98±0.58 62.11±0.81 71.64±0.29 56.50±0.36"),
        ("CutMix", "--method baseline --cutmix", "79.23±0.23 58.97±0.29 51.54±1.12 60.87±0.30 67.71±0.14 46.90±0.29"),
        ("FRSKD + CutMix", "--cutmix", "80.49±0.05 61.92±0.11 65.92±0.59 66.19±0.49 72.81±0.23 55.75±0.43")]),
    "figure4": Table("Figure 4: alpha and beta; the paper has no numbers but those of Tables 1 and 2", [
        "--dataset cifar100 --arch wrn16_2", "--dataset mit67 --arch resnet18"], [
        (f"alpha {alpha}, beta {beta}", f"--alpha {alpha} --beta {beta}",
         {(2, 100): "73.27±0.45 ?", (1, 200): "? 61.74±0.67"}.get((alpha, beta), "? ?"))
        for alpha, beta in itertools.product((1, 2, 3), (50, 100, 200, 500))]),
    "shapes": Table("Drawn shapes (ours)", ["--dataset shapes --arch wrn16_2"], [
        ("Baseline", "--method baseline", "?"), ("FRSKD", "", "?")]),
    "seg-shapes": Table("Drawn shapes, mIoU (ours)", ["--dataset shapes --arch d0"], [
        ("Baseline", "--method baseline", "?"), ("FRSKD", "", "?")], seg, ("miou",)),
}  # fmt: on


@dataclass(frozen=True)
class Cell:
    row: str
    script: object
    words: tuple  # options
    metric: str
    paper: str

    def found(self, logs):
        """{seed: (metric, whether by --amp, folder)} of its runs; a seed counts once, without --amp where it can."""
        keys = [key_of(resolved(self.script, (*self.words, *amp))) for amp in (["--amp"], [])]
        seeds = ((seed, key == keys[0], *run) for key in keys for seed, run in logs.get(key, {}).items())
        return {seed: (log[self.metric], amp, folder) for seed, amp, log, folder in seeds}

    def ours(self, logs):
        """73.27 ± 0.45 (3, 1a): mean and standard deviation over 3 seeds, one of them by --amp."""
        if not (found := self.found(logs)):
            return ""
        values, amp, _ = zip(*found.values())
        return f"{runs.spread(values)} ({len(values)}{f', {sum(amp)}a' if any(amp) else ''})"


@functools.cache
def parser(script):
    return script.parser()


@functools.cache
def resolved(script, words):
    """All values of the run that options stand for, its name and folder among them."""
    given = vars(parser(script).parse_args(words))
    if given.get("method") == "kd":
        given.setdefault("teacher_checkpoint", "a teacher's")
    return runs.resolved(parser(script), script.recipe, given)


def key_of(args):
    return args.script, args.dataset, args.arch, args.name


def cells(table):
    """[(label of the row, [Cell or None where there is none, a column each]), ...]"""
    def cell(label, column, options, metric, paper):
        words = (*column.split(), *options.split())
        return Cell(label, table.script, words, metric, paper.strip("?").replace("±", " ± ")) if paper != "-" else None

    metrics = table.metrics * len(table.columns)
    return [(label, [cell(label, column, options, *rest) for column, *rest in zip(table.columns, metrics, row.split())])
            for label, options, row in table.rows]  # fmt: skip


def heads(table):
    """cifar100 wrn16_2; of several metrics imagenet resnet18 top-5."""
    several, pairs = len(table.metrics) > 1, zip(table.columns, itertools.cycle(table.metrics))
    return [" ".join([*column.split()[1::2], *[runs.METRICS[metric]] * several]) for column, metric in pairs]


def last_epochs(folders):
    """Of every finished run the last epoch: {(script, dataset, arch, name): {seed: (log entry, folder)}}."""
    logs = {}
    for folder, (script, metric) in itertools.product(folders, (("train.py", "top1"), ("seg.py", "miou"))):
        for args, log, path in runs.read_runs(folder, script, metric)[0]:
            logs.setdefault(key_of(SimpleNamespace(**args)), {}).setdefault(args["seed"], (log[-1], path))
    return logs


def commands(tables, logs, common):
    """[[script, its options ...], ...] of the cells that lack one of SEEDS, a teacher's before its students'.

    common: options of every command. Of a teacher seed 0 is enough, and it is listed where its weights are gone.
    """
    listed = {}

    def add(cell, seed, *more):
        words = (*cell.words, *more, "--seed", str(seed), *common)
        listed.setdefault((key_of(resolved(cell.script, cell.words)), seed), [cell.script.__file__, *words])
        return words

    for column in itertools.chain.from_iterable(zip(*(row for _, row in cells(table))) for table in tables):
        for cell in filter(None, column):
            found, more = cell.found(logs), []
            lacking = [seed for seed in SEEDS[: 1 if cell.row == TEACHER else None] if seed not in found]
            if "kd" in cell.words and lacking:
                teacher = next(c for c in column if c.row == TEACHER)
                *_, folder = teacher.found(logs).get(0, [None])
                if not folder or not (folder / "student.pt").exists():
                    folder = Path(resolved(teacher.script, add(teacher, 0)).output)
                more = ["--teacher-checkpoint", (folder / "student.pt").as_posix()]
            for seed in lacking:
                add(cell, seed, *more)
    return list(listed.values())


def shown(command):
    return f"python {Path(command[0]).name} {shlex.join(command[1:])}"


def run(command):
    """Runs a command, or continues it. An error of it, or Ctrl-C, is the end, with its status."""
    print("\n" + shown(command), flush=True)
    try:
        status = subprocess.run([sys.executable, *command, "--resume"]).returncode
    except KeyboardInterrupt:
        status = 130
    if status:
        sys.exit(status if status > 0 else 128 - status)  # of a signal, as a shell has it


def print_table(table, logs, measured=False):
    """Each cell paper / ours; measured: only the rows and columns that have one of ours, and the commands of these."""
    rows = [(label, row, [cell.ours(logs) if cell else "" for cell in row]) for label, row in cells(table)]
    rows = [row for row in rows if any(row[2]) or not measured]
    columns = [i for i in range(len(table.columns)) if any(ours[i] for *_, ours in rows) or not measured]
    lines = [[label, *(f"{row[i].paper} / {ours[i]}".strip() if row[i] else "" for i in columns)]
             for label, row, ours in rows]  # fmt: skip
    if lines:
        print(f"\n{table.title}\n\n{tabulate(lines, ['', *(heads(table)[i] for i in columns)], tablefmt='github')}")
    commands_ = dict.fromkeys(cell for _, row, _ in rows for cell in row if cell and measured and cell.ours(logs))
    print("\n" * bool(commands_), end="")
    for cell in commands_:
        for seed, (_, amp, folder) in cell.found(logs).items():
            commit = json.loads((folder / "args.json").read_text()).get("commit", "")
            command = shown([cell.script.__file__, *cell.words, *["--amp"] * amp, "--seed", str(seed)])
            print(f"- `{command}`, commit {commit[:7]}")


@figures.STYLE
def draw(path, table, logs):
    """A panel a column, a line a row: the paper's figure and ours. -> the figure."""
    labels, rows = zip(*cells(table))
    figure = Figure((2 + 2.2 * len(table.columns), 1 + 0.25 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(table.columns), sharey=True, squeeze=False)[0]
    looks = [dict(color=color, marker=marker, markersize=4) for color, marker in zip(figures.PALETTE, "so")]
    for ax, head, column in zip(panels, heads(table), zip(*rows)):
        for y, cell in enumerate(column):
            for k, value in enumerate((cell.paper, cell.ours(logs).partition(" (")[0]) if cell else ()):
                if value:
                    mean, *deviation = map(float, value.split(" ± "))
                    ax.errorbar(mean, y + 0.3 * k - 0.15, xerr=deviation or None, **looks[k])
        ax.set(title=head, xlabel="percent", ylim=(len(rows) - 0.5, -0.5))
        ax.grid(axis="y", linewidth=0.3)
    panels[0].set_yticks(range(len(rows)), labels)
    handles = [Line2D([], [], linestyle="", label=name, **look) for name, look in zip(("paper", "ours"), looks)]
    return figures.save(figure, path, handles)


@runs.command  # what the user can mend: one line, 2
def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__.split("\n")[0],
                                allow_abbrev=False)  # fmt: skip
    p.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (all)")
    x = p.add_mutually_exclusive_group()
    x.add_argument("--measured", action="store_true", help="rows and columns that results/ has, without runs/")
    x.add_argument("--commands", action="store_true", help="print the commands of what nobody measured")
    x.add_argument("--run", action="store_true", help="run them, one after another; what was begun goes on")
    x.add_argument("--plot", metavar="FILE", help="draw one table")
    g = p.add_argument_group("of every command, as train.py and seg.py have them")
    for option, action in COMMON.items():
        g.add_argument(option, action=action)
    args = p.parse_intermixed_args(argv)
    given = {option: getattr(args, option[2:].replace("-", "_")) for option in COMMON}
    common = [word for option, value in given.items() if value for word in (option, value) if word is not True]
    if unknown := [name for name in args.tables if name not in TABLES]:
        p.error(f"no table {unknown[0]}: {', '.join(TABLES)}")
    tables = [TABLES[name] for name in args.tables or TABLES]
    logs = last_epochs(FOLDERS[args.measured :])
    if args.plot:
        if len(tables) > 1:
            p.error("--plot draws one table: name it")
        draw(args.plot, tables[0], logs)
    elif args.commands or args.run:
        for command in commands(tables, logs, common):
            print(shown(command)) if args.commands else run(command)
    else:
        print("paper / ours, in percent: last epoch, mean ± standard deviation over (n seeds, of them a with --amp)")
        for table in tables:
            print_table(table, logs, args.measured)


if __name__ == "__main__":
    sys.exit(main())
