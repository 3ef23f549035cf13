"""The paper's Tables 1 to 8 and Figure 4: its figures, ours, and the commands of those that nobody measured yet.

    python -m experiments.reproduce                         # all; or the names of some: 1 6 figure4
    python -m experiments.reproduce 1 --run --device cuda --data-dir DIR    # resumes what was begun

Run in the folder that holds runs/; --help lists the rest. What Table 6 costs is printed by `python frskd.py`.
"""
import argparse
import functools
import itertools
import shlex
import subprocess
import sys
from collections import namedtuple
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

from tabulate import tabulate

import seg
import train
from experiments import figures, runs

SEEDS = (0, 1, 2)  # "Experiments are repeated three times"
key_of = itemgetter("script", "dataset", "arch", "name")  # of a run's options: what its seeds have in common
# Columns: options, which a row's follow. Rows: (label, options, [figure, a column each]). One metric serves them all.
Table = namedtuple("Table", "title columns rows script metrics", defaults=[train, ["top1"]])


def rows(text, first=0, last=None):
    """Of a table: label | options | a figure a column, ? where the paper has none, - where there is no cell."""
    lines = [line.strip().split(" | ") for line in text.strip().splitlines()]
    return [(label, options, row.split()[first:last]) for label, options, row in lines]


# Tables 1 and 2; of ResNet-18, the last six columns, Tables 5, 7 and 8 repeat some.
RESULTS = r"""
Baseline | --method baseline | 70.42±0.08 51.05±0.20 73.80±0.60 54.60±0.33 51.72±1.17 55.00±0.97 63.38±0.04 42.97±0.66
ONE | --method one | 73.01±0.23 52.10±0.20 76.67±0.66 57.53±0.39 54.71±0.42 56.77±0.76 65.39±0.59 45.35±0.53
DDGSD | --method ddgsd | 71.96±0.05 51.07±0.24 76.61±0.47 56.46±0.24 58.49±0.55 59.00±0.77 69.00±0.28 45.81±1.79
BYOT | --method byot | 70.22±0.26 50.33±0.03 76.68±0.07 56.61±0.30 58.66±0.51 58.41±0.71 68.82±0.15 48.51±1.02
SAD | --method sad | 70.31±0.45 51.26±0.39 74.65±0.33 54.45±0.06 52.76±0.57 54.48±1.30 63.17±0.56 43.52±0.06
CS-KD | --method cskd | 71.79±0.68 50.08±0.18 77.19±0.05 56.46±0.10 64.34±0.08 57.36±0.37 68.91±0.40 47.23±0.22
SLA-SD | --method slasd | 73.00±0.45 50.77±0.33 77.52±0.30 58.48±0.44 56.17±0.71 61.57±1.06 67.30±0.21 54.07±0.38
FRSKD\F | --beta 0 | 73.12±0.06 52.91±0.30 77.64±0.12 59.50±0.15 62.29±1.65 61.32±0.67 69.48±0.84 53.16±0.44
FRSKD |  | 73.27±0.45 53.08±0.33 77.71±0.14 59.61±0.31 65.39±0.13 61.74±0.67 70.77±0.20 56.00±1.19
FRSKD+SLA | --sla | 75.43±0.21 51.83±0.37 82.04±0.16 63.58±0.04 67.80±1.24 66.04±0.31 72.48±0.34 61.96±0.57
"""
BASELINE, *_, FRSKD, _ = rows(RESULTS, 2)
SIX = [f"--dataset {name}" for name in "cifar100 tinyimagenet cub200 mit67 dogs stanford40".split()]
TEACHER = "ResNet-34, the teacher (ours)"
SHAPES = rows("Baseline | --method baseline | ?\nFRSKD |  | ?")
# fmt: off
TABLES = {
    "1": Table("Table 1: CIFAR-100 and TinyImageNet", [f"{options} --arch {arch}"
               for arch in ("wrn16_2", "resnet18") for options in SIX[:2]], rows(RESULTS, 0, 4) + rows(r"""
        Baseline, weight decay 5e-4 (ours) | --method baseline --weight-decay 5e-4 | ? ? ? ?
        FRSKD, weight decay 5e-4 (ours) | --weight-decay 5e-4 | ? ? ? ?
        Baseline, 50 images a class (ours) | --per-class 50 --method baseline | ? - - -
        FRSKD\F, 50 a class (ours) | --per-class 50 --beta 0 | ? - - -
        FRSKD, 50 a class (ours) | --per-class 50 | ? - - -
        Baseline, 50 a class, 5e-4 (ours) | --per-class 50 --method baseline --weight-decay 5e-4 | ? - - -
        FRSKD, 50 a class, 5e-4 (ours) | --per-class 50 --weight-decay 5e-4 | ? - - -
        Baseline, 20 a class (ours) | --per-class 20 --method baseline | ? - - -
        FRSKD\F, 20 a class (ours) | --per-class 20 --beta 0 | ? - - -
        FRSKD, 20 a class (ours) | --per-class 20 | ? - - -
        Baseline, 20 a class, 5e-4 (ours) | --per-class 20 --method baseline --weight-decay 5e-4 | ? - - -
        FRSKD, 20 a class, 5e-4 (ours) | --per-class 20 --weight-decay 5e-4 | ? - - -""")),
    "2": Table("Table 2: fine-grained recognition, ResNet-18", SIX[2:], rows(RESULTS, 4)),
    "3": Table("Table 3: ImageNet", [f"--dataset imagenet --arch resnet{n}" for n in (18, 18, 34, 34)], rows("""
        Baseline | --method baseline | 69.76 89.08 73.31 91.42
        FRSKD |  | 70.17 89.78 73.75 92.11"""), metrics=["top1", "top5"]),
    "4": Table("Table 4: PASCAL VOC, mIoU; the paper's protocol trains on every test image, clean on none",
               ["--dataset voc --arch d0", "--dataset voc --arch d1"], rows("""
        Baseline | --method baseline --protocol paper | 79.07 81.95
        FRSKD | --protocol paper | 80.55 83.88
        Baseline, clean (ours) | --method baseline | ? ?
        FRSKD, clean (ours) |  | ? ?"""), seg, ["miou"]),
    "5": Table("Table 5: feature losses, ResNet-18; beta of Fit+SKD and OD+SKD is ours, not tuned", SIX, [
        BASELINE, *rows("""
        Fit+SKD | --feature-loss fitnet | 77.03±0.05 59.06±0.20 61.05±1.05 57.69±0.28 67.50±0.32 51.66±1.32
        OD+SKD | --feature-loss od | 77.12±0.09 59.14±0.20 57.44±0.92 54.83±2.63 66.51±0.87 49.09±0.47"""), FRSKD]),
    "6": Table("Table 6: self-teachers", ["--dataset cifar100 --arch wrn16_2"], rows("""
        BiFPN, 128 channels | --channels 128 | 72.64±0.12
        BiFPN, 256 | --channels 256 | 73.54±0.41
        BiFPNc, 128 | --width 1 | 71.70±0.19
        BiFPNc, 256 |  | 73.27±0.45""")),
    "7": Table("Table 7: a pretrained ResNet-34 teaches ResNet-18", SIX, [
        (TEACHER, "--arch resnet34 --method baseline", ["?"] * 6), BASELINE, *rows("""
        FitNet | --method kd --feature-loss fitnet | 76.65±0.25 59.38±0.10 58.97±0.07 59.15±0.41 67.18±0.10 46.64±0.24
        ATT | --method kd --feature-loss at | 77.16±0.15 59.83±0.28 59.21±0.34 59.33±0.22 67.54±0.18 47.04±0.17
        Overhaul | --method kd --feature-loss od | 74.59±0.32 59.50±0.09 58.82±0.12 58.81±0.58 66.43±0.08 47.06±0.26
        """), FRSKD]),
    "8": Table("Table 8: augmentation, ResNet-18; the baseline of Dogs is 63.38 in Table 2", SIX, rows("""
        Baseline | --method baseline | 73.80±0.60 54.60±0.33 51.72±1.17 55.00±0.97 66.38±0.04 42.97±0.66
        Mixup | --method baseline --mixup | 76.26±0.41 56.28±0.24 57.60±0.42 56.77±1.45 65.96±0.03 47.15±0.60
        FRSKD + Mixup | --mixup | 78.74±0.19 60.30±0.38 67.98±0.58 62.11±0.81 71.64±0.29 56.50±0.36
        CutMix | --method baseline --cutmix | 79.23±0.23 58.97±0.29 51.54±1.12 60.87±0.30 67.71±0.14 46.90±0.29
        FRSKD + CutMix | --cutmix | 80.49±0.05 61.92±0.11 65.92±0.59 66.19±0.49 72.81±0.23 55.75±0.43""")),
    "figure4": Table("Figure 4: alpha and beta; the paper has no numbers but those of Tables 1 and 2",
                     ["--dataset cifar100 --arch wrn16_2", "--dataset mit67 --arch resnet18"], [
        (f"alpha {alpha}, beta {beta}", f"--alpha {alpha} --beta {beta}",
         {(2, 100): ["73.27±0.45", "?"], (1, 200): ["?", "61.74±0.67"]}.get((alpha, beta), ["?", "?"]))
        for alpha, beta in itertools.product((1, 2, 3), (50, 100, 200, 500))]),
    "shapes": Table("Drawn shapes (ours)", ["--dataset shapes --arch wrn16_2"], SHAPES),
    "seg-shapes": Table("Drawn shapes, mIoU (ours)", ["--dataset shapes --arch d0"], SHAPES, seg, ["miou"]),
}  # fmt: on


@functools.cache
def resolved(script, words):
    """All values of the run that options stand for, its name and folder among them."""
    parser, teacher = script.parser(), {"teacher_checkpoint": "a teacher's"} if "kd" in words else {}
    return vars(runs.resolved(parser, script.recipe, teacher | vars(parser.parse_args(words))))


def last_epochs(folders):
    """Of every finished run the last epoch: {key: {seed: (log entry, options, folder)}}."""
    logs = {}
    for folder, (script, metric) in itertools.product(folders, (("train.py", "top1"), ("seg.py", "miou"))):
        for args, log, path in runs.read_runs(folder, script, metric)[0]:
            logs.setdefault(key_of(args), {}).setdefault(args["seed"], (log[-1], args, path))
    return logs


def cells(table, logs):
    """[[cell, a row each], a column each]. Of a cell `found` is {seed: (log entry, options, folder)}, without --amp
    where it can; `ours` 73.27 ± 0.45 (3, 1a), of three seeds, one by --amp; `seeds` is empty where there is no cell.
    """
    def cell(column, metric, label, options, paper):
        words = (*column.split(), *options.split())
        by_amp, key = (key_of(resolved(table.script, (*words, *amp))) for amp in (["--amp"], []))
        found = logs.get(by_amp, {}) | logs.get(key, {})
        amp = sum(args["amp"] for _, args, _ in found.values())
        count = f"{len(found)}, {amp}a" if amp else len(found)
        ours = f"{runs.spread(log[metric] for log, *_ in found.values())} ({count})" if found else ""
        seeds = () if paper == "-" else SEEDS[:1] if label == TEACHER else SEEDS
        head = " ".join(column.split()[1::2] + [runs.METRICS[metric]] * (len(table.metrics) > 1))
        return SimpleNamespace(head=head, row=label, words=words, key=key, paper=paper.strip("?-").replace("±", " ± "),
                               ours=ours, found=found, seeds=seeds)  # fmt: skip

    columns = zip(table.columns, itertools.cycle(table.metrics))
    return [[cell(*column, label, options, row[i]) for label, options, row in table.rows]
            for i, column in enumerate(columns)]  # fmt: skip


def commands(tables, logs, common):
    """[[script, its options ...], ...] of the cells that lack a seed, `common` at their ends. A teacher's are before
    its students', also where only its weights are gone."""
    listed = {}
    for table, column in ((table, column) for table in tables for column in cells(table, logs)):
        wanted = [(cell, seed) for cell in column for seed in cell.seeds if seed not in cell.found]
        if any("kd" in cell.words for cell, _ in wanted):
            teacher = next(cell for cell in column if cell.row == TEACHER)
            *_, folder = teacher.found.get(0, [None])
            if not folder or not (folder / "student.pt").exists():
                wanted.insert(0, (teacher, 0))
                folder = Path(resolved(table.script, (*teacher.words, *common))["output"])
        for cell, seed in wanted:
            more = ["--teacher-checkpoint", (folder / "student.pt").as_posix()] if "kd" in cell.words else []
            command = [table.script.__file__, *cell.words, *more, "--seed", str(seed), *common]
            listed.setdefault((cell.key, seed), command)
    return list(listed.values())


def shown(command):
    return f"python {Path(command[0]).name} {shlex.join(command[1:])}"


def print_table(table, logs, measured=False):
    """Each cell paper / ours; measured: only the rows and columns that have one of ours, and the commands of these."""
    columns = [column for column in cells(table, logs) if not measured or any(cell.ours for cell in column)]
    rows = [row for row in zip(*columns) if not measured or any(cell.ours for cell in row)]
    if not rows:
        return
    lines = [[row[0].row, *(f"{c.paper or '-'} / {c.ours}".strip() if c.seeds else "" for c in row)] for row in rows]
    print(f"\n{table.title}\n\n{tabulate(lines, ['', *(column[0].head for column in columns)], tablefmt='github')}")
    said = {}  # `command --seed 0`, commit a; `--seed 1`, commit b: once for all metrics of a run
    for cell in itertools.chain(*rows) if measured else ():
        for seed, (_, args, _) in sorted(cell.found.items()):
            command = shown([table.script.__file__, *cell.words, *["--amp"] * args["amp"]])
            said.setdefault(command, {})[f"--seed {seed}`, commit {args.get('commit', '')[:7]}"] = True
    if said:
        print("", *(f"- `{command} {'; `'.join(seeds)}" for command, seeds in said.items()), sep="\n")


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
    for option, value in (("--data-dir", "DIR"), ("--device", "NAME"), ("--workers", "N")):
        g.add_argument(option, dest=option, metavar=value)
    for option in ("--download", "--compile", "--amp"):
        g.add_argument(option, dest=option, action="store_true")
    args = p.parse_intermixed_args(argv)
    given = [item for item in vars(args).items() if item[0].startswith("--") and item[1]]
    common = [word for item in given for word in item if word is not True]
    if unknown := [name for name in args.tables if name not in TABLES]:
        p.error(f"no table {unknown[0]}: {', '.join(TABLES)}")
    tables = [TABLES[name] for name in args.tables or TABLES]
    logs = last_epochs(["results"] if args.measured else ["runs", "results"])
    if args.plot:
        if len(tables) > 1:
            p.error("--plot draws one table: name it")
        figures.draw_table(args.plot, cells(tables[0], logs))
    elif args.commands or args.run:
        for command in commands(tables, logs, common):
            print("\n" * args.run + shown(command), flush=True)
            try:
                status = args.run and subprocess.run([sys.executable, *command, "--resume"]).returncode
            except KeyboardInterrupt:
                status = 130
            if status:  # the end, also by a signal, as a shell has it
                sys.exit(status if status > 0 else 128 - status)
    else:
        print("Paper / ours in percent, last epoch: mean ± standard deviation "
              "(number of seeds; 3, 1a: three, one by --amp)")
        for table in tables:
            print_table(table, logs, args.measured)


if __name__ == "__main__":
    sys.exit(main())
