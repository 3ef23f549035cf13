"""Pictures: the paper's attention maps, predictions of segmentation, curves of runs, tables. Needs no display."""

import io
import itertools
import textwrap
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

import frskd
from experiments import runs
from experiments.data import VOID

# Grey is the background's. Any two, and white, lie apart for readers who lack one of the three cones, too.
HEX = "b0b0b0 000080 ffa000 e02000 60a0ff 802020 a040a0 8040ff 400020 00ffa0 f05a5a a5ff4b ffb4f0 5a00c3 692d5a c369c3"
PALETTE = [to_rgb(f"#{c}") for c in f"{HEX} 5ae169 2d872d 879687 2d0f4b 96ffd2".split()]
NO_TERMS = (*runs.METRICS, "train_top1", "iou", "epoch", "lr", "images_per_s", "seconds")  # of a log's keys
STYLE = matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8, "text.parse_math": False})  # a class may be "$5"


@torch.no_grad()
@STYLE
def draw_attention(path, method, loader, classes):
    """Figures 3 and 5: for four test images of evenly spaced classes one row for the classifier and, where there is a
    frskd.SelfTeacher, one for it: the input, then phi of each block over the grey image. -> the figure.
    """
    method.eval()
    labels = loader.split.labels
    index = [(labels == c).nonzero()[0].item() for c in spaced(labels.unique())]
    raw = loader.raw(index)
    logits, feats = features(method, loader, raw)
    networks = {"classifier": (logits, feats)}
    if isinstance(getattr(method, "teacher", None), frskd.SelfTeacher):
        networks["self-teacher"] = method.teacher(feats)
    figure, axes = grid(len(index) * len(networks), ["input"] + [f"block {i + 1}" for i in range(len(feats))])
    rows = itertools.product(range(len(index)), networks.items())
    for (n, (name, (logits, feats))), (first, *others) in zip(rows, axes):
        image = raw[n].permute(1, 2, 0).cpu().numpy()
        first.imshow(image)
        said = f"true: {classes[labels[index[n]]]}", f"{name}: {classes[logits[n].argmax()]}"
        label = "\n".join(textwrap.fill(line, 28, break_on_hyphens=False) for line in said)
        first.text(-0.06, 0.5, label, ha="right", va="center", transform=first.transAxes)
        for feat, ax in zip(feats, others):
            ax.imshow(image.mean(2), cmap="gray", vmin=-255, vmax=510)  # pale: what is bright is phi
            extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
            ax.imshow(heat(feat[n]), vmin=0, vmax=1, alpha=0.75, extent=extent, interpolation="bilinear")
    return save(figure, path)


def heat(feat):
    """phi of one map (C, h, w) over its largest value: (h, w) of 0..1. It is scaled first: squares may overflow."""
    feat = feat.float().nan_to_num()
    phi = frskd.attention_map(feat[None] / feat.abs().max().clamp_min(1e-30)).view(feat.shape[1:])
    return (phi / phi.max().clamp_min(1e-30)).cpu().numpy()


@torch.no_grad()
@STYLE
def draw_predictions(path, method, loader, classes):
    """Four test images, evenly spaced: image, truth, what the student and, where there is one, the self-teacher says;
    beside them the classes that occur, void in white. -> the figure.
    """
    method.eval()
    titles = ["image", "truth", "student"] + ["self-teacher"] * hasattr(method, "teacher")
    index = spaced(range(len(loader.split)))
    figure, axes = grid(len(index), titles)
    colors, found = torch.ones(VOID + 1, 3), set()
    colors[: len(classes)] = torch.tensor(class_colors(len(classes)))
    for i, (first, *others) in zip(index, axes):
        image, mask = loader.dataset[0, i]  # uint8 (3, S, S), (H, W)
        logits, feats = features(method, loader, image[None].to(loader.device))
        logits = [logits, method.teacher(feats)[0]] if hasattr(method, "teacher") else [logits]
        predicted = [F.interpolate(z.float(), mask.shape, mode="bilinear")[0].argmax(0).cpu() for z in logits]
        first.imshow(image.permute(1, 2, 0).numpy(), extent=(0, mask.shape[1], mask.shape[0], 0))  # not squeezed
        for mask, ax in zip([mask.cpu().long(), *predicted], others):
            ax.imshow(colors[mask].numpy(), interpolation="nearest")
            found |= set(mask.unique().tolist())
    names = {c: "void, not counted" if c == VOID else classes[c] for c in sorted(found)}
    patches = [Patch(fc=colors[c].tolist(), ec="black", lw=0.5, label=name) for c, name in names.items()]
    return save(figure, path, patches)


def class_colors(n):
    """PALETTE; of more than its 21 VOC's: bit k of r, g, b, from the top, is bit 3 k, 3 k + 1, 3 k + 2 of the class."""
    voc = [[sum((c >> 3 * k + i & 1) << 7 - k for k in range(3)) / 255 for i in range(3)] for c in range(n)]
    return PALETTE[:n] if n <= len(PALETTE) else voc


@STYLE
def draw_curves(path, found):
    """Runs [(args, log, folder)], as runs.read_runs: top-1 or mIoU, below it each term of the loss, by epoch.
    A colour for each data set, network and name: its seeds thin, their mean thick. -> the figure.
    """
    logs = {}
    for args, log, _ in found:
        source = f" ({args['data_dir']})" if args["dataset"] == "folder" else ""
        logs.setdefault(f"{args['dataset']}{source} {args['arch']} {args['name']}", []).append(log)
    metric = next(key for key in runs.METRICS if key in found[0][1][-1])
    entries = [entry for _, log, _ in found for entry in log]
    terms = list(dict.fromkeys(key for entry in entries for key in entry if key not in NO_TERMS))  # of all, in order
    rows = [(terms[i : i + 4] + 3 * ["."])[:4] for i in range(0, len(terms), 4)]  # "." is an empty place
    figure = Figure((8, 3 + 2 * len(rows)), layout="constrained")
    axes = figure.subplot_mosaic([[metric] * 4, *rows], height_ratios=[1.5] + [1] * len(rows))
    drops = {now["epoch"] for _, log, _ in found for last, now in zip(log, log[1:]) if now["lr"] < last["lr"]}
    lines = []
    for k, (name, seeds) in enumerate(logs.items()):
        look = dict(color=PALETTE[1 + k % 9], linestyle=["-", "--", "-.", ":"][(k // 9 + k % 9 // 4) % 4])
        lines.append(Line2D([], [], **look, label=name + (f", mean of {len(seeds)}" if len(seeds) > 1 else "")))
        for key, ax in axes.items():
            curves = [[(entry["epoch"], entry[key]) for entry in log if key in entry] for log in seeds]
            curves = [curve for curve in curves if curve]
            means = [[(at[0][0], fmean(v for _, v in at)) for at in zip(*curves)]] if len(curves) > 1 else []
            for curve in curves + means:
                width = 1.2 if not means else 1.8 if curve is means[0] else 0.6
                ax.plot(*zip(*curve), **look, linewidth=width, marker="." if len(curve) < 10 else None)
    for key, ax in axes.items():
        ax.set_title(f"{runs.METRICS[key]} in percent" if key == metric else f"loss: {key}")
        ax.set(xlabel="epoch", xlim=(0.5, max(entry["epoch"] for entry in entries) + 0.5))
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for epoch in drops:
            ax.axvline(epoch - 0.5, color="grey", linestyle=":", linewidth=1, zorder=0)
        if key != metric:
            ax.set_yscale("log", nonpositive="mask")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")
    if drops:
        lines.append(Line2D([], [], color="grey", linestyle=":", linewidth=1, label="learning rate drops"))
    return save(figure, path, lines)


@STYLE
def draw_table(path, columns):
    """The cells of a table of reproduce.py: a panel a column, a line a row, the paper's and ours. -> the figure."""
    rows = [cell.row for cell in columns[0]]
    figure = Figure((2 + 2.2 * len(columns), 1 + 0.25 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    looks = [dict(color=color, marker=marker, markersize=4) for color, marker in zip(PALETTE[1:], "so")]
    for ax, column in zip(panels, columns):
        for (y, cell), k in itertools.product(enumerate(column), (0, 1)):
            if value := (cell.paper, cell.ours.partition(" (")[0])[k]:
                mean, *deviation = map(float, value.split(" ± "))
                ax.errorbar(mean, y + 0.3 * k - 0.15, xerr=deviation or None, **looks[k])
        ax.set(title=column[0].head, xlabel="percent", ylim=(len(rows) - 0.5, -0.5))
        ax.grid(axis="y", linewidth=0.3)
    panels[0].set_yticks(range(len(rows)), rows)
    handles = [Line2D([], [], linestyle="", label=name, **look) for name, look in zip(("paper", "ours"), looks)]
    return save(figure, path, handles)


def spaced(items):
    """Four of the items, evenly spaced."""
    return [items[i] for i in torch.linspace(0, len(items) - 1, min(4, len(items))).round().long().tolist()]


def features(method, loader, raw):
    return method.student.features(loader.normalize(raw).contiguous(memory_format=torch.channels_last))


def grid(rows, titles):
    """A figure of rows x len(titles) square axes without ticks, titles above."""
    figure = Figure((1.25 * len(titles), 1.25 * rows))
    axes = figure.subplots(rows, len(titles), squeeze=False, subplot_kw=dict(xticks=[], yticks=[]))
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.04, hspace=0.04)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title)
    return figure, axes


def save(figure, path, handles=()):
    """Written whole or not at all, the same bytes whenever it is drawn, with a legend as wide as its words."""
    if handles:
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), ncols=1 + len(handles) // 30)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    runs.write_atomically(Path(path), file.getvalue())
    return figure
