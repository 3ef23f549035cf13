"""Data sets and loaders: `shapes` (drawn in memory), CIFAR-100, class folders, the official archives, PASCAL VOC.

    data = load("cub200", data_dir="data", image_size=224)   # reads data/CUB_200_2011/images.txt, ...
    train = make_loader(data.train, train=True, batch_size=32, image_size=224, seed=0, workers=2)
    for x, y in train.epoch(0): ...                          # x (B, 3, H, W) float, normalised, on the device

For segmentation, `load_masks` and `MaskLoader`.
Every random draw comes from a generator seeded by (seed, epoch), or by (seed, epoch, index) for one image. So neither
the number of workers or processes nor a resumed run changes a number.
"""

import hashlib
import math
import pickle
import signal
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from experiments import archives
from experiments.archives import UserError

DEVICE_RESIDENT = 64  # up to this size in pixels, a data set is decoded once and lives on the device

# Mean and std of the channels, of images in 0..1.
# Paper vs code: the paper is silent; these are the authors', who normalise CIFAR-100 by CIFAR-10's figures.
STATS = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass
class Split:
    """Images, uint8 (N, H, W, 3) or a list of N paths, and their labels.
    Of classification: int64 (N,), the images sorted by them. Of segmentation: masks, uint8 (N, H, W) or N paths.
    """

    images: torch.Tensor | list
    labels: torch.Tensor | list

    def __len__(self):
        return len(self.labels)


@dataclass
class Data:
    train: Split
    test: Split
    classes: list
    test_name: str = "test"
    leaked: int = 0  # test images that are training images too
    notes: tuple = ()  # what the user should be told, a line each


# ---------------------------------------------------------------------------------------------------- data sets


def load(dataset, *, data_dir="data", image_size=32, per_class=None, download=False, splits=("train", "test")):
    """Reads a data set, at a size in pixels, of the training images the first `per_class` of each class -> Data.
    Up to 64 px the images of the named splits come back as a uint8 tensor of that size, otherwise as they lie on disk.
    """
    root = Path(data_dir).expanduser()
    if dataset == "shapes":
        data = Data(*(Split(*draw_shapes(n, image_size, seed)[:2]) for n, seed in SHAPES_DRAWN), list(SHAPES))
    elif dataset == "cifar100":
        data = read_cifar100(root, download)
    elif dataset == "folder":
        data = read_folder(root)
    else:
        data = data_of(*archives.read(dataset, root, download), archives.OFFICIAL[dataset].test_name)
    if per_class is not None:
        data.train = first_per_class(data.train, per_class, data.classes)
    if image_size <= DEVICE_RESIDENT:
        for name in splits:
            split = getattr(data, name)
            split.images = decode(split.images, image_size, f"reading {name}")
    return data


def data_of(train, test, test_name="test", notes=()):
    """Two lists [(path, class name), ...] -> Data, labels numbering the training classes in sorted order."""
    classes = sorted({name for _, name in train})
    number = {name: i for i, name in enumerate(classes)}
    splits = [Split([p for p, _ in part], torch.tensor([number[name] for _, name in part])) for part in (train, test)]
    return Data(*splits, classes, test_name, notes=notes)


def class_range(labels):
    """Of each image, where its class begins and how many it has; the images are sorted by class."""
    counts = labels.bincount()
    return (counts.cumsum(0) - counts)[labels], counts[labels]


def first_per_class(split, n, classes):
    first, count = class_range(split.labels)
    if count.min() < n:
        name = classes[split.labels[count.argmin()]]
        raise UserError(f"class {name} has {count.min()} training images, fewer than --per-class {n}")
    keep = (torch.arange(len(split)) - first < n).nonzero().flatten()
    images = split.images[keep] if torch.is_tensor(split.images) else [split.images[i] for i in keep]
    return Split(images, split.labels[keep])


# SHA-256 of the names of its classes with their images, 500 and 100, in training and test.
CIFAR100_FOLDERS = "20d0cd2e0eda41243374f2e8a96dc0a13813dcc7735de9bc843dbee57ab6cef9"


def read_cifar100(root, download=False):
    """CIFAR-100 as its archive unpacks, or as class folders train/<class>/*, test/<class>/* -> Data.
    Both in the order of class and file name, so that they give the same numbers.
    """
    cifar = torchvision.datasets.CIFAR100
    root = archives.holder(root, cifar.base_folder)

    def whole():
        if (root / cifar.base_folder).is_dir():
            return read_cifar100_archive(root)
        parts = [archives.class_folders(root / name)[0] for name in ("train", "test") if (root / name).is_dir()]
        counts = [sorted(Counter(name for _, name in part).items()) for part in parts]
        if hashlib.sha256(repr(counts).encode()).hexdigest() == CIFAR100_FOLDERS:
            return data_of(*parts)
        raise UserError(f"no CIFAR-100 in {root}: neither {cifar.base_folder}/ nor its 60,000 images as class folders")

    return archives.fetched(whole, [(cifar.url, cifar.tgz_md5)], root, download)


def read_cifar100_archive(root):
    splits = []
    for name in ("train", "test"):
        try:
            source = torchvision.datasets.CIFAR100(root, train=name == "train")  # compares the checksums
        except (RuntimeError, OSError) as error:
            raise UserError(f"CIFAR-100 in {root} is not whole: {archives.one_line(error)}") from None
        names = pickle.loads((root / source.base_folder / name).read_bytes(), encoding="latin1")["filenames"]
        order = sorted(range(len(names)), key=lambda i: (source.targets[i], names[i]))
        splits.append(Split(torch.from_numpy(source.data)[order], torch.tensor(source.targets)[order]))
    return Data(*splits, source.classes)


def read_folder(root):
    """Class folders: root/train/<class>/*, evaluated on the first of val/, valid/, validation/, test/ -> Data."""
    names = [name for name in ("val", "valid", "validation", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not names:
        raise UserError(f"{root} needs train/<class>/* and val/, valid/, validation/ or test/")
    (train, unused), (test, more) = (archives.class_folders(root / name) for name in ("train", names[0]))
    extra = {name for _, name in test} - {name for _, name in train}
    if extra:
        raise UserError(f"{root / names[0]} has the class {min(extra)}, which {root / 'train'} lacks")
    notes = []
    if len(names) > 1:
        notes.append(f"evaluated on {root / names[0]}; not read: {', '.join(names[1:])}")
    if unused := unused + more:
        notes.append(f"{len(unused)} files are not used: no image's ending, or in no class folder, first {unused[0]}")
    return data_of(train, test, names[0], tuple(notes))


def folder_image_size(root):
    """The size at which a folder's images are trained unless told: the shorter side of the first, above 64 px 224."""
    short = min(read_image(read_folder(Path(root).expanduser()).train.images[0]).size)
    return max(8, short) if short <= DEVICE_RESIDENT else 224  # --image-size begins at 8


# ---------------------------------------------------------------------------------------------------- images


def read_image(path):
    """A file as a PIL image in RGB, turned as viewers show it; more than 8 bits a channel are refused.
    Or an image that is in memory, uint8 (H, W, 3).
    """
    if torch.is_tensor(path):
        return Image.fromarray(path.numpy())
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}; convert it to 8")
            image.load()
            with suppress(Exception):  # broken EXIF data: as it lies
                image = ImageOps.exif_transpose(image)
            if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                image = image.convert("RGBA")  # else Pillow warns
            return image.convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ... for a broken file
        raise UserError(f"{path}: not a readable image ({error})") from None


def decode(images, size, what):
    """Paths or a uint8 tensor (N, H, W, 3) -> uint8 (N, size, size, 3): shorter side to `size`, centre crop."""
    if torch.is_tensor(images) and images.shape[1:3] == (size, size):
        return images
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    decoded = torch.empty(len(images), size, size, 3, dtype=torch.uint8)

    def one(i):
        decoded[i] = fit(read_image(images[i])).permute(1, 2, 0)

    thread_map(one, range(len(images)), tqdm_class=tqdm, desc=what, leave=False, disable=None)
    return decoded


# ---------------------------------------------------------------------------------------------- shapes, drawn


def _polar(u, v):
    return (u.square() + v.square()).sqrt(), torch.atan2(v, u)


# Each takes coordinates (u, v), the object's own, turned and scaled so that it fits the unit disk -> bool.
SHAPES = {
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.3) & (torch.maximum(u.abs(), v.abs()) < 0.95),
    "crescent": lambda u, v: (_polar(u, v)[0] < 1) & (_polar(u - 0.5, v)[0] > 0.75),
    "disk": lambda u, v: _polar(u, v)[0] < 0.85,
    "flower": lambda u, v: _polar(u, v)[0] < 0.65 + 0.35 * torch.cos(5 * _polar(u, v)[1]),
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) < 0.8) & (torch.maximum(u.abs(), v.abs()) > 0.45),
    "ring": lambda u, v: (_polar(u, v)[0] < 0.95) & (_polar(u, v)[0] > 0.55),
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.75,
    "triangle": lambda u, v: torch.maximum(-v, 0.866 * u.abs() + 0.5 * v) < 0.5,
}


def draw_shapes(per_class, size, seed):
    """Images of one shape each, somewhere, at some size, turned, before a background with crumbs of other shapes.
    Its colour is lighter than a dark background, darker than a bright one, and says nothing about its class.
    -> images uint8 (N, size, size, 3), labels int64 (N,), masks uint8 (N, size, size): 0 background, class + 1.
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(SHAPES)).repeat_interleave(per_class)
    chunk = max(1, 256 * 64**2 // max(64, size) ** 2)  # images drawn at once: bounds the memory
    drawn = [_draw(part, size, g) for part in labels.split(chunk)]
    images, masks = (torch.cat(parts) for parts in zip(*drawn))
    return images, labels, masks


def _draw(labels, size, g):
    n, fine = len(labels), 2 * size  # drawn at twice the size, then averaged
    axis = (torch.arange(fine) + 0.5) / fine * 2 - 1  # -1..1 across the image
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    def texture():
        """A colour of its own, shaded by a coarse random pattern: (n, 3, fine, fine)."""
        pattern = F.interpolate(uniform(-0.12, 0.12, 3, 5, 5), size=(fine, fine), mode="bicubic")
        return uniform(0.1, 0.9, 3, 1, 1) + pattern

    def place(labels, radius, limit):
        """Mask (n, fine, fine) of one shape an image, `radius` of the half image, its centre within `limit`."""
        cx, cy, angle = uniform(-1, 1, 1, 1) * limit, uniform(-1, 1, 1, 1) * limit, uniform(0, 2 * math.pi, 1, 1)
        u = ((x - cx) * angle.cos() + (y - cy) * angle.sin()) / radius
        v = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / radius
        mask = torch.empty(n, fine, fine, dtype=torch.bool)
        for c, shape in enumerate(SHAPES.values()):
            mask[labels == c] = shape(u[labels == c], v[labels == c])
        return mask

    image = texture()
    for _ in range(3):  # crumbs
        crumb = place(torch.randint(len(SHAPES), (n,), generator=g), uniform(0.1, 0.2, 1, 1), 1.0)
        image = torch.where(crumb[:, None], texture(), image)
    radius = uniform(0.4, 0.75, 1, 1)
    mask = place(labels, radius, 1 - radius)
    lighter = (image.mean((1, 2, 3), keepdim=True) < 0.5).float()  # than a dark background, else darker
    image = torch.where(mask[:, None], (texture() + lighter) / 2, image)
    image = F.avg_pool2d(image, 2) + 0.02 * torch.randn(n, 3, size, size, generator=g)
    covered = F.avg_pool2d(mask[:, None].float(), 2)[:, 0] >= 0.5
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return pixels, (covered * (labels + 1).view(-1, 1, 1)).byte()


SHAPES_DRAWN = ((200, 1), (100, 2))  # images a class and seed, of training and test, always the same


# ------------------------------------------------------------------------------- segmentation: images and masks

VOID = 255  # the label of a pixel that counts neither in training nor in evaluation

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def load_masks(dataset, *, data_dir="data", image_size=512, protocol="clean", download=False):
    """Reads a data set of segmentation, `shapes` drawn at a size in pixels, or `voc` -> Data, its labels masks.
    A mask holds class numbers, 0 being the background, and VOID.
    """
    if dataset == "voc":
        return read_voc(Path(data_dir).expanduser(), protocol, download)
    drawn = [draw_shapes(n, image_size, seed) for n, seed in SHAPES_DRAWN]
    return Data(*(Split(images, masks) for images, _, masks in drawn), ["background", *SHAPES])


def read_voc(root, protocol="clean", download=False):
    """PASCAL VOC: the trainval lists of VOC2007 and VOC2012 together, evaluated on VOC2007's test list -> Data.
    VOC2012 has under the id 2007_<id> the images of VOC2007, those of the test list among them; protocol "clean" drops
    from it what a list of VOC2007 holds, "paper" does not. VOCdevkit/classes.txt names other classes than VOC's.
    Paper vs code: both train on VOC2012's whole list, and so on every test image.
    """
    train, more, test = archives.voc_lists(root, download)
    more = {image_id.removeprefix("2007_"): pair for image_id, pair in more.items()}  # the id in VOC2007
    if protocol == "clean":
        more = {image_id: pair for image_id, pair in more.items() if image_id not in train | test}
    leaked = test.keys() & (train | more).keys()
    splits = [Split(*map(list, zip(*pairs))) for pairs in ([*train.values(), *more.values()], test.values())]
    names = archives.holder(root, "VOCdevkit") / "VOCdevkit/classes.txt"
    classes = archives.lines(names) if names.exists() else VOC_CLASSES
    return Data(*splits, classes, "VOC2007 test", len(leaked))


def read_mask(path, size, num_classes):
    """A PNG of class numbers, with a palette or grey, of a size (W, H) -> uint8 (H, W)."""
    try:
        with Image.open(path) as mask:
            if mask.mode not in ("P", "L"):
                raise ValueError(f"the mask has mode {mask.mode}, not class numbers with a palette (P) or grey (L)")
            if mask.size != size:
                raise ValueError("the mask has {}x{} pixels, its image upright {}x{}".format(*mask.size, *size))
            mask = v2.functional.pil_to_tensor(mask)[0]
            beyond = mask[(mask >= num_classes) & (mask != VOID)]
            if len(beyond):
                raise ValueError(f"the label {beyond[0]} is neither a class, 0 to {num_classes - 1}, nor void, {VOID}")
            return mask
    except Exception as error:  # as for images
        raise UserError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------------ seeds


def seed_of(*key):
    """A seed of 56 bits for a key: (seed, epoch), (seed, epoch, index) or (seed, epoch, "what for", ...)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))


@contextmanager
def seeded(*key):
    """Seeds the CPU's global generator inside, and restores it: torchvision's transforms draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*key))
        yield


# ---------------------------------------------------------------------------------------------------- loaders


def make_loader(split, *, image_size, workers=0, **kwargs):
    """The loader for a size: DeviceLoader up to 64 px, WorkerLoader above; kwargs as Loader's."""
    if image_size <= DEVICE_RESIDENT:
        return DeviceLoader(split, **kwargs)
    return WorkerLoader(split, image_size=image_size, workers=workers, **kwargs)


class Loader:
    """What the loaders share: epoch(e) yields x (B, 3, H, W) float32, normalised, channels_last, and y (B,).
    Training drops the last partial batch. Of several processes each yields its slice of every training batch, and
    every processes-th batch of the evaluation: together what one would, bit for bit.
    mix: v2.MixUp or v2.CutMix, of each batch; y is then soft, (B, num_classes).
    Paper vs code: torchvision mixes each image with the one before it in the shuffled batch, the authors by a
    permutation. CutMix mixes every batch, as theirs; its own code mixes half of them on CIFAR.

    pairs: what goes with each image, for a method that declares it (see baselines.py): "view", another augmentation
    of it, "class", an image of its class drawn uniformly. x is then (2 B, 3, H, W), the second images behind the
    first; both halves are mixed alike.
    raw([i, ...]): images of the test split as they are evaluated, before normalisation: uint8 (N, 3, H, W).
    """

    pairs = None

    def __init__(
        self, split, *, train, batch_size, stats=STATS["cifar"], seed=0, device="cpu", mix=None, rank=0, processes=1
    ):
        if train and batch_size > len(split):
            raise UserError(f"--batch-size {batch_size} is larger than the training set of {len(split)} images")
        if train and batch_size % processes:
            raise UserError(f"--batch-size {batch_size} is not divisible by the {processes} processes")
        self.split, self.train, self.batch_size, self.seed, self.device = split, train, batch_size, seed, device
        self.mix, self.rank, self.processes = mix, rank, processes
        self.mean, self.std = (255 * torch.tensor(s, device=device).view(1, 3, 1, 1) for s in stats)

    def __len__(self):
        return len(self.batches(0))

    def epoch(self, epoch=0):
        halves = 2 if self.pairs else 1
        for step, (x, y) in enumerate(self.augmented(epoch)):
            if self.mix:
                with seeded(self.seed, epoch, "mixing", step):
                    x, y = self.mix(x, y)
                if self.processes > 1:  # without the image of another process, the first of each half
                    x, y = (torch.cat([half[1:] for half in part.chunk(halves)]) for part in (x, y))
            yield x, y[: len(y) // halves]  # the second half has the labels of the first

    def batches(self, epoch, device="cpu"):
        """The indices of each batch of this process; in training shuffled, N + i being what goes with image i of N."""
        n, size = len(self.split), self.batch_size
        if not self.train:
            return torch.arange(n, device=device).split(size)[self.rank :: self.processes]
        whole = torch.randperm(n, generator=generator(self.seed, epoch))[: n // size * size].view(-1, size)
        share = torch.arange(size).view(self.processes, -1)[self.rank]
        if self.mix and self.processes > 1:
            share = torch.cat([share[:1] - 1, share])  # the image before it, with which its first one is mixed
        if self.pairs:
            whole, share = torch.cat([whole, whole + n], 1), torch.cat([share, share + size])
        return whole[:, share].to(device)

    def partners(self, epoch):
        """The index of the image that goes with each: (N,)."""
        if self.pairs == "view":
            return torch.arange(len(self.split))
        first, count = class_range(self.split.labels)
        share = torch.rand(len(first), dtype=torch.float64, generator=generator(self.seed, epoch, "partners"))
        return first + (share * count).long()

    def normalize(self, x):
        return (x.float() - self.mean) / self.std


class DeviceLoader(Loader):
    """All images on the device as uint8; cropped, flipped and normalised there, a batch at a time.
    Training: zero padding of 4, random crop, horizontal flip (Sec. 4.1: "random cropping and flipping").
    Paper vs code: TinyImageNet too is resized to 32 px and then cropped so, as the paper says; the authors take random
    resized crops from its 64 px.
    """

    def __init__(self, split, **kwargs):
        super().__init__(split, **kwargs)
        self.size, self.pad = split.images.shape[1], 4 if self.train else 0
        self.images = F.pad(split.images, (0, 0, *4 * [self.pad])).to(self.device)
        self.labels = split.labels.to(self.device)

    def augmented(self, epoch):
        image, (rows, cols) = torch.arange(len(self.split)), self.windows(epoch, "augmentation")
        if self.pairs:
            more = self.partners(epoch), *self.windows(epoch, "augmentation of the partners")
            image, rows, cols = map(torch.cat, zip((image, rows, cols), more))
        image = image.to(self.device)
        for index in self.batches(epoch, self.device):  # moved all at once: a copy a step would wait for the device
            x = self.images[image[index][:, None, None], rows[index][:, :, None], cols[index][:, None, :]]
            yield self.normalize(x.permute(0, 3, 1, 2)), self.labels[image[index]]

    def windows(self, *key):
        """Which rows of each padded image are read, (N, H), and which columns, (N, W), drawn from a key."""
        g, n, span = generator(self.seed, *key), len(self.split), torch.arange(self.size, device=self.device)
        top, left = torch.randint(2 * self.pad + 1, (2, n), generator=g).to(self.device)
        flip = (torch.rand(n, generator=g) < 0.5).to(self.device) & self.train
        return top[:, None] + span, left[:, None] + torch.where(flip[:, None], span.flip(0), span)

    def raw(self, index):
        return self.split.images[index].permute(0, 3, 1, 2).to(self.device)


class WorkerLoader(Loader):
    """Images decoded and augmented one by one, in worker processes where workers > 0; normalised on the device.
    Training: RandomResizedCrop and horizontal flip; evaluation: shorter side to 8/7 of the size, centre crop.
    Paper vs code: the paper says "random cropping and flipping"; these are the authors' transforms.
    """

    collate = staticmethod(default_collate)

    def __init__(self, split, *, image_size, workers=0, **kwargs):
        super().__init__(split, **kwargs)
        self.dataset = self.make_dataset(image_size)
        self.keys = []  # refilled for each epoch: the workers stay, and learn the epoch from the key of each image
        self.loader = DataLoader(
            self.dataset, batch_sampler=self.keys, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=torch.device(self.device).type == "cuda", worker_init_fn=init_worker,
            collate_fn=default_collate if self.train else self.collate,
            generator=torch.Generator(),  # else it draws from the global generator, which dropout reads
        )  # fmt: skip

    def make_dataset(self, size):
        steps = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
        if self.train:
            steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        return SeededDataset(self.split, v2.Compose([*steps, v2.PILToTensor()]), self.seed)

    def augmented(self, epoch):
        n, partners = len(self.split), self.partners(epoch).tolist() if self.pairs else []
        keys = [(epoch, i) for i in range(n)] + [(epoch, partner, i) for i, partner in enumerate(partners)]
        self.keys[:] = [[keys[i] for i in index.tolist()] for index in self.batches(epoch)]
        for x, y in self.loader:
            x = x.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            yield self.normalize(x), self.labels_to_device(y)

    def labels_to_device(self, y):
        if isinstance(y, list):  # masks of different sizes
            return [self.labels_to_device(mask) for mask in y]
        return y.to(self.device, non_blocking=True).long()

    def raw(self, index):
        return torch.stack([self.dataset[0, int(i)][0] for i in index]).to(self.device)


@dataclass
class SeededDataset(Dataset):
    """An image by its key (epoch, index) -> uint8 (3, H, W), label; augmented by a draw from (seed, epoch, index).
    With a third number in the key, the image it goes with, the draw is from all three.
    """

    split: Split
    transform: v2.Transform
    seed: int

    def __getitem__(self, key):
        image, label = self.read(key[1])
        with seeded(self.seed, *key):
            return self.transform(image, label)

    def read(self, index):
        return read_image(self.split.images[index]), self.split.labels[index]


@dataclass
class MaskDataset(SeededDataset):
    """An image and its mask, which where `together` is changed as the image is -> uint8 (3, h, w), uint8 (H, W)."""

    num_classes: int
    together: bool

    def read(self, index):
        image, mask = super().read(index)
        if not torch.is_tensor(mask):
            mask = read_mask(mask, image.size, self.num_classes)
        return image, tv_tensors.Mask(mask) if self.together else mask  # transforms leave a plain tensor as it is


class MaskLoader(WorkerLoader):
    """Images with masks, transformed together.
    Training: x (B, 3, size, size), y (B, size, size) int64. Flip, shorter side to 0.5..2 times the size, random crop,
    padded with black and VOID where the image is smaller, blur of every other image (deviation up to 1 pixel).
    Evaluation: x (B, 3, size, size), the whole image squeezed to that size, and a list of B masks of their own sizes.
    Paper vs code: the paper follows overhaul distillation; the transforms are the authors', but they pad with the
    background's label, and squeeze the masks of the evaluation too.
    """

    def __init__(self, split, *, classes, **kwargs):
        self.classes = classes
        super().__init__(split, **kwargs)

    def make_dataset(self, size):
        steps = [v2.Resize((size, size))]
        if self.train:
            shortest = ShortestSize(range(size // 2, 2 * size + 1))
            crop = v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: VOID})
            blur = v2.RandomApply([v2.GaussianBlur(7, (0.001, 1.0))])
            steps = [shortest, crop, v2.RandomHorizontalFlip(), blur]
        transform = v2.Compose([v2.ToImage(), *steps, v2.ToPureTensor()])
        return MaskDataset(self.split, transform, self.seed, len(self.classes), self.train)

    @staticmethod
    def collate(samples):
        images, masks = zip(*samples)
        return torch.stack(images), list(masks)


class ShortestSize(v2.RandomShortestSize):
    """Masks by nearest-exact, aligned with the images' bilinear: torchvision's nearest lies half a pixel off."""

    def transform(self, x, params):
        if not isinstance(x, tv_tensors.Mask):
            return super().transform(x, params)
        mask = F.interpolate(x.as_subclass(torch.Tensor)[None, None], params["size"], mode="nearest-exact")
        return tv_tensors.Mask(mask[0, 0])


def init_worker(_):
    """Ctrl-C reaches every process of a terminal: the workers leave it to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
