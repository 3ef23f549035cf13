"""Data sets and loaders: the paper's eight as their official archives unpack, `shapes` (drawn in memory), and
`folder` (train/<class>/*, val/ or test/).

    data = load("cub200", data_dir="data", image_size=224)   # reads data/CUB_200_2011/images.txt, ...
    train = make_loader(data.train, train=True, batch_size=32, image_size=224, seed=0, workers=2)
    for x, y in train.epoch(0): ...                          # x (B, 3, H, W) float, normalised, on the device

For segmentation, `load_masks` and `MaskLoader`.

Every random draw comes from a generator seeded by (seed, epoch), or by (seed, epoch, index) for one image. So the
number of workers, their persistence and a resumed run change no number.
"""

import hashlib
import itertools
import math
import os
import re
import signal
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.transforms import v2
from tqdm import tqdm

# Of Python 3.14 on the default: no member of an archive is written outside the folder in which it is unpacked.
tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)

DEVICE_RESIDENT = 64  # up to this size in pixels, a data set is decoded once and lives on the device

# Mean and std of the channels, of images in 0..1.
# Paper vs code: the paper is silent; these are the authors', who normalise CIFAR-100 by CIFAR-10's figures.
STATS = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class DataError(Exception):
    """What is wrong with the data, where, and what to do, in one line."""

    def __init__(self, message):
        # A worker's exception arrives with its traceback before the message.
        super().__init__(str(message).rsplit("DataError: ", 1)[-1].strip())


class CannotUnpack(DataError):
    """The archives are there, but unpacking them failed."""


@dataclass
class Split:
    """Images, uint8 (N, H, W, 3) or a list of N paths, and their labels.

    Of classification: int64 (N,), and the images sorted by them. Of segmentation: masks, uint8 (N, H, W) or a list of
    N paths.
    """

    images: torch.Tensor | list
    labels: torch.Tensor | list

    def __len__(self):
        return len(self.labels)

    def subset(self, keep):
        images = self.images[keep] if torch.is_tensor(self.images) else [self.images[i] for i in keep.tolist()]
        return Split(images, self.labels[keep])


@dataclass
class Data:
    """Training and test split, the names of the classes, what the test split is called, how many of its images are
    training images too, and the files of `folder` that are no images by their names."""

    train: Split
    test: Split
    classes: list
    test_name: str = "test"
    leaked: int = 0
    skipped: tuple = ()


# ---------------------------------------------------------------------------------------------------- data sets


def load(
    dataset,
    *,
    data_dir="data",
    image_size=32,
    per_class=None,
    download=False,
    decoded=("train", "test"),
    expected=None,
):
    """Reads a data set: name, folder, size in pixels, the first `per_class` training images of each class -> Data.

    Up to 64 px the images of the `decoded` splits come back as a uint8 tensor of that size, otherwise as they lie
    on disk. expected: numbers of classes, training and test images of an official set, where others are expected.
    Raises DataError where something is missing, unreadable or does not fit.
    """
    if dataset == "shapes":
        data = draw_data(image_size)
    elif dataset == "cifar100":
        data = read_cifar100(data_dir, download)
    elif dataset == "folder":
        data = read_folder(data_dir)
    elif dataset in OFFICIAL:
        data = read_official(OFFICIAL[dataset], Path(data_dir), download, expected)
    else:
        raise DataError(f"no data set named {dataset}")
    if per_class is not None:
        data.train = first_per_class(data.train, per_class, data.classes)
    if image_size <= DEVICE_RESIDENT:
        for name in decoded:
            split = getattr(data, name)
            split.images = decode(split.images, image_size, f"reading {name}")
    return data


def first_per_class(split, n, classes):
    """The first n images of each class, in sorted order."""
    keep = []
    for c, name in enumerate(classes):
        index = (split.labels == c).nonzero().flatten()
        if len(index) < n:
            raise DataError(f"class {name} has {len(index)} training images, fewer than --per-class {n}")
        keep.append(index[:n])
    return split.subset(torch.cat(keep))


def read_cifar100(root, download=False):
    """CIFAR-100 as cifar-100-python.tar.gz unpacks: `root` is the folder that holds cifar-100-python/.

    Sorted by class (stable), so that the same pixels in class folders give the same numbers.
    """
    splits = []
    for train in (True, False):
        try:
            source = torchvision.datasets.CIFAR100(root, train=train, download=download)
        except (RuntimeError, OSError) as error:  # URLError is an OSError
            tried = f" (the download failed: {error})" if download else ""
            raise DataError(
                f"CIFAR-100 is missing or incomplete in {root}{tried}: unpack cifar-100-python.tar.gz from "
                "https://www.cs.toronto.edu/~kriz/cifar.html there, or pass --download"
            ) from None
        labels = torch.tensor(source.targets)
        splits.append(Split(torch.from_numpy(source.data), labels).subset(labels.argsort(stable=True)))
    return Data(*splits, source.classes)


def read_folder(root):
    """Class folders: root/train/<class>/*, evaluated on root/val where there is one, else on root/test."""
    root = Path(root)
    for folder in (root, root / "train"):
        if not folder.is_dir():
            raise DataError(f"no such folder: {folder} (expected train/<class>/* and val/ or test/ below {root})")
    test_name = next((name for name in ("val", "test") if (root / name).is_dir()), None)
    if test_name is None:
        raise DataError(f"no test images: {root} has neither val/ nor test/")
    train, test = image_folder(root / "train"), image_folder(root / test_name)
    extra = sorted(set(test.classes) - set(train.classes))
    if extra:
        raise DataError(f"{root / test_name} has the class {extra[0]}, which {root / 'train'} lacks")
    if len(train.classes) < 2:
        raise DataError(f"{root / 'train'} has one class, {train.classes[0]}: a classifier needs two")
    splits = []
    for source in (train, test):
        paths = [path for path, _ in source.samples]
        labels = torch.tensor([train.class_to_idx[source.classes[label]] for _, label in source.samples])
        splits.append(Split(paths, labels))
    return Data(*splits, train.classes, test_name, skipped=(*no_images(root / "train"), *no_images(root / test_name)))


def no_images(folder):
    """The files below a folder that torchvision's ImageFolder leaves out: of other endings, or in no class folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("."))
    return [path for path in paths if path.parent == folder or path.suffix.lower() not in IMG_EXTENSIONS]


def image_folder(folder):
    try:
        return torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:  # no class folder, or one without an image: torchvision names it
        raise DataError(f"{folder}: {error}") from None


def folder_image_size(root):
    """The size that a folder's images are trained at unless told: theirs up to 64 px, 224 above.

    It is read off the first training image: the shorter side.
    """
    first = read_folder(root).train.images[0]
    short = min(read_image(first).size)
    if short < 8:
        raise DataError(f"{first}: a side of {short} pixels, fewer than 8: say with --image-size what to enlarge it to")
    return short if short <= DEVICE_RESIDENT else 224


# --------------------------------------------------------------------------- official data sets, as they unpack

# A reader takes the folder that holds the lists -> {"train": [(path, class name), ...], "test": [...]}.


def read_tinyimagenet(root):
    """Evaluated on val/, as the field does: the images in test/ have no labels.

    Many tools move val/images/* into val/<wnid>/; that is read too.
    """
    train = []
    for wnid in lines(root / "wnids.txt"):
        images, boxes = root / "train" / wnid / "images", root / "train" / wnid / f"{wnid}_boxes.txt"
        names = {path.name for path in images.glob("*.JPEG")}
        names |= {line.split()[0] for line in lines(boxes)} if boxes.exists() else set()
        train += [(images / name, wnid) for name in names]
    test = []
    for name, wnid, *_ in fields(root / "val/val_annotations.txt", 6):
        places = [root / "val/images", root / "val" / wnid, root / "val" / wnid / "images"]
        test.append((next((place for place in places if os.path.exists(place / name)), places[0]) / name, wnid))
    return {"train": train, "test": test}


def read_cub200(root):
    """Three lists joined on the image's id: they are not in the order of the paths."""
    files = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    paths, labels, in_train = (table(root / name) for name in files)
    if not paths.keys() == labels.keys() == in_train.keys():
        raise DataError(f"{', '.join(files)} do not name the same images")
    names = table(root / "classes.txt")
    splits = {"1": [], "0": []}
    for i, path in paths.items():
        if labels[i] not in names:
            raise DataError(f"{root / 'classes.txt'} does not name the class {labels[i]}")
        if in_train[i] not in splits:
            raise DataError(f"{root / 'train_test_split.txt'} has {in_train[i]} for image {i}, neither 1 nor 0")
        splits[in_train[i]].append((root / "images" / path, names[labels[i]]))
    return {"train": splits["1"], "test": splits["0"]}


def read_mit67(root):
    """The lists name 6,700 of the 15,620 images, some with a blank in their names; the others are in no split."""
    files = {"train": "TrainImages.txt", "test": "TestImages.txt"}
    return {split: in_class_folders(root / "Images", lines(root / name)) for split, name in files.items()}


def read_stanford40(root):
    """One flat folder; the class is the name without its number: writing_on_a_book_017.jpg."""
    splits = {}
    for split in ("train", "test"):
        names = lines(root / "ImageSplits" / f"{split}.txt")
        splits[split] = [(root / "JPEGImages" / name, name.rpartition("_")[0]) for name in names]
    return splits


def read_dogs(root):
    """The lists are MAT-files, beside Images/ as their archive unpacks, or in the lists/ that some users make."""
    splits = {}
    for split in ("train", "test"):
        own = root / "lists" / f"{split}_list.mat"
        splits[split] = in_class_folders(root / "Images", mat_names(own if own.exists() else root / own.name))
    return splits


def read_imagenet(root):
    """train/<wnid>/* and val/<wnid>/*; where one is absent, torchvision makes it from the archives."""
    splits = {}
    for ours, split in (("train", "train"), ("test", "val")):
        if not (root / split).is_dir():
            needed = [f"ILSVRC2012_img_{split}.tar"]
            if not (root / "meta.bin").exists():
                needed.append("ILSVRC2012_devkit_t12.tar.gz")
            absent = [name for name in needed if not (root / name).exists()]
            if absent:
                raise DataError(f"neither {split}/ nor {' and '.join(absent)} is in {root}")
            try:
                torchvision.datasets.ImageNet(root, split)
            except ModuleNotFoundError:
                raise CannotUnpack("ImageNet's devkit is read once, with scipy: pip install scipy") from None
            except Exception as error:  # of tarfile, of torch.load for meta.bin, a checksum that differs ...
                raise CannotUnpack(f"cannot unpack {split}/ in {root}: {one_line(error)}; remove {split}/") from None
        source = image_folder(root / split)
        splits[ours] = [(path, source.classes[label]) for path, label in source.samples]
    return splits


def in_class_folders(folder, names):
    """Names <class>/<file> below a folder -> [(path, class), ...]."""
    return [(folder / name, name.split("/")[0]) for name in names]


def lines(path):
    """The lines of a list, without their ends (LF or CRLF) and without empty ones."""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        raise DataError(f"{path} is missing") from None
    return [line for line in text.split("\n") if line.strip()]


def fields(path, n):
    """The n fields of each line of a list."""
    rows = [line.split() for line in lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) != n:
            raise DataError(f"{path}, line {number}: {n} fields expected, not {len(row)}")
    return rows


def table(path):
    """A list of two fields a line as a dict."""
    rows = fields(path, 2)
    if len(dict(rows)) < len(rows):
        raise DataError(f"{path} has two lines for one number")
    return dict(rows)


def mat_names(path):
    """The names <wnid>-<breed>/<wnid>_<number>.jpg in a MAT-file of version 5, in their order.

    Behind a header of 128 bytes lie elements: type and size, uint32 each, and the content, deflated in type 15. In
    it a character takes one or two bytes. Of the variables, file_list alone has names that end in .jpg.
    """
    try:
        content, text, position = path.read_bytes(), b"", 128
        while position < len(content):
            kind, size = struct.unpack_from("<II", content, position)
            element = content[position + 8 : position + 8 + size]
            text += zlib.decompress(element) if kind == 15 else element
            position += 8 + size
    except OSError:
        raise DataError(f"{path} is missing") from None
    except (struct.error, zlib.error):
        raise DataError(f"{path} is cut short, or no MAT-file of version 5") from None
    return [name.decode() for name in re.findall(rb"n\d{8}-[\w-]+/n\d{8}_\d+\.jpg", text.replace(b"\0", b""))]


@dataclass
class Official:
    """A data set as its authors publish it: reader, numbers of classes, training and test images, where it lies.

    folder: its folder below --data-dir; markers: paths, any of which in a folder means that the set lies there;
    archives: (address, MD5, None where none is published), empty where a registration is needed, where by_hand says
    what to do, {} being the place; own_folder: whether they unpack into `folder` by themselves; test_name: what the
    split evaluated is called.
    """

    title: str
    read: Callable
    expected: tuple
    folder: str
    markers: tuple
    archives: tuple = ()
    own_folder: bool = False
    test_name: str = "test"
    by_hand: str = ""

    def locate(self, root):
        """The folder that holds the set, whole or not: `folder`, or --data-dir itself; None where neither does."""
        for place in (root / self.folder, root):
            if any((place / marker).exists() for marker in self.markers):
                return place
        return root / self.folder if (root / self.folder).is_dir() else None

    def how(self, place):
        """What to do where it is missing or incomplete."""
        if self.by_hand:
            return self.by_hand.format(place)
        return f"fetch and unpack {', '.join(url for url, _ in self.archives)} into {place}, or pass --download"


# fmt: off
OFFICIAL = {
    "tinyimagenet": Official(
        "TinyImageNet", read_tinyimagenet, (200, 100_000, 10_000), "tiny-imagenet-200", ("wnids.txt",),
        (("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),),
        own_folder=True, test_name="val",
    ),
    "cub200": Official(
        "CUB-200-2011", read_cub200, (200, 5_994, 5_794), "CUB_200_2011", ("images.txt",),
        (("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"),),
        own_folder=True,
    ),
    "mit67": Official(
        "MIT Indoor67", read_mit67, (67, 5_360, 1_340), "mit67", ("TrainImages.txt", "Images/airport_inside"),
        (("http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar", "5d176e5f0e56624a453f2fe0d8b19ff7"),
         ("http://web.mit.edu/torralba/www/TrainImages.txt", "fd987513d0f623c424252770fac3f354"),
         ("http://web.mit.edu/torralba/www/TestImages.txt", "f00bef137f39d51e4894303a7bf4c2d4")),
    ),
    "stanford40": Official(
        "Stanford 40 Actions", read_stanford40, (40, 4_000, 5_532), "stanford40", ("ImageSplits", "JPEGImages"),
        (("http://vision.stanford.edu/Datasets/Stanford40_JPEGImages.zip", None),
         ("http://vision.stanford.edu/Datasets/Stanford40_ImageSplits.zip", None)),
    ),
    "dogs": Official(
        "Stanford Dogs", read_dogs, (120, 12_000, 8_580), "dogs",
        ("train_list.mat", "lists/train_list.mat", "Images/n02085620-Chihuahua"),
        (("http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar", "1bb1f2a596ae7057f99d7d75860002ef"),
         ("http://vision.stanford.edu/aditya86/ImageNetDogs/lists.tar", "edbb9f16854ec66506b5f09b583e0656")),
    ),
    "imagenet": Official(
        "ImageNet", read_imagenet, (1_000, 1_281_167, 50_000), "imagenet",
        ("train", "val", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
        test_name="val",
        by_hand="put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, from "
                "image-net.org after a registration, into {}, and remove a train/ or val/ that is half unpacked",
    ),
}
# fmt: on


def read_official(official, root, download=False, expected=None):
    """An official data set below root; fetched, if `download` says so, where it is missing or incomplete -> Data."""
    folder = official.locate(root) or root / official.folder
    place = folder  # where its archives are unpacked
    if official.own_folder:
        place = folder.resolve().parent if folder == root else folder.parent
    try:
        return complete(official, root, expected)
    except CannotUnpack:
        raise
    except DataError as error:
        if not download:
            raise DataError(f"{error}; {official.how(place)}") from None
    for url, md5 in official.archives:
        fetch(url, md5, place)
    try:
        return complete(official, root, expected)
    except DataError as error:
        raise DataError(f"{error}, even though its archives were unpacked into {place}: remove {folder}") from None


def complete(official, root, expected=None):
    """Reads an official data set; raises DataError where it is not whole."""
    title, folder = official.title, official.locate(root)
    if folder is None:
        raise DataError(f"no {title} in {root}")
    splits = official.read(folder)
    paths = [os.fspath(path) for samples in splits.values() for path, _ in samples]
    absent = missing(paths)
    if absent:
        raise DataError(f"{title} is incomplete: {len(absent)} of {len(paths)} images are missing, first {absent[0]}")
    classes = sorted({name for _, name in splits["train"]})
    found, expected = (len(classes), *map(len, splits.values())), tuple(expected or official.expected)
    if found != expected:
        counts = "{} classes, {} training and {} test images, not {} classes, {} training and {} test images"
        raise DataError(f"{title} in {folder} is incomplete or altered: {counts.format(*found, *expected)}")
    (path, times), *_ = Counter(paths).most_common(1)
    if times > 1:
        raise DataError(f"{title} in {folder} is altered: its lists name {path} more than once")
    unknown = {name for _, name in splits["test"]} - set(classes)
    if unknown:
        raise DataError(f"{title} in {folder} is altered: no training image of the class {min(unknown)}")
    label = {name: i for i, name in enumerate(classes)}
    sorted_splits = []
    for split in ("train", "test"):
        samples = sorted((label[name], os.fspath(path)) for path, name in splits[split])
        sorted_splits.append(Split([path for _, path in samples], torch.tensor([i for i, _ in samples])))
    return Data(*sorted_splits, classes, official.test_name)


def missing(paths):
    """Those of the paths that are no files, told by listing each folder once: a set may have a million files."""
    listed = {}
    for folder in {os.path.dirname(path) for path in paths}:
        try:
            listed[folder] = set(os.listdir(folder))
        except FileNotFoundError:
            listed[folder] = set()
        except OSError as error:
            raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None
    return [path for path in paths if os.path.basename(path) not in listed[os.path.dirname(path)]]


def fetch(url, md5, folder):
    """Downloads a file into a folder, compares its checksum where there is one, and unpacks it.

    It gets its own name at the end, so a download that was cut short is never taken for the archive.
    """
    archive = folder / url.rpartition("/")[2]
    partial = archive.with_name("partial-" + archive.name)
    source = archive if check_integrity(archive, md5) else partial
    try:
        if source is partial:
            if md5 is None:
                partial.unlink(missing_ok=True)  # else torchvision takes what is there
            download_url(url, folder, partial.name, md5)
        if archive.suffix != ".txt":
            extract_archive(source, folder)
        source.replace(archive)
    except Exception as error:  # of urllib, tarfile, zipfile, zlib, the file system ...
        if source is archive:
            raise DataError(f"cannot unpack {archive}: {one_line(error)}; remove it and try again") from None
        raise DataError(f"cannot fetch {url} into {folder}: {one_line(error)}") from None


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------- images


def read_image(path):
    """A file as a PIL image in RGB, whatever its format and mode; 16-bit images are refused."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}; convert it to 8")
            return image.convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ... for a broken file
        raise DataError(f"{path}: not a readable image ({error})") from None


def decode(images, size, what):
    """Paths or a uint8 tensor (N, H, W, 3) -> uint8 (N, size, size, 3): shorter side to `size`, centre crop."""
    if torch.is_tensor(images) and images.shape[1:3] == (size, size):
        return images
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    decoded = torch.empty(len(images), size, size, 3, dtype=torch.uint8)

    def one(i):
        decoded[i] = fit(as_pil(images[i])).permute(1, 2, 0)

    with ThreadPool(os.cpu_count()) as pool:
        for _ in tqdm(pool.imap_unordered(one, range(len(images)), 64), what, len(images), leave=False, disable=None):
            pass
    return decoded


def as_pil(image):
    """A path or a uint8 tensor (H, W, 3) -> PIL image."""
    return Image.fromarray(image.numpy()) if torch.is_tensor(image) else read_image(image)


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


SHAPES_DRAWN = ((200, 1), (100, 2))  # images a class and seed, of training and test


def draw_data(size):
    """The data set `shapes`: eight classes, 200 training and 100 test images each, always the same."""
    return Data(*(Split(*draw_shapes(n, size, seed)[:2]) for n, seed in SHAPES_DRAWN), list(SHAPES))


# ------------------------------------------------------------------------------- segmentation: images and masks

VOID = 255  # the label of a pixel that counts neither in training nor in evaluation

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def load_masks(dataset, *, data_dir="data", image_size=512, protocol="clean", download=False):
    """Reads a data set of segmentation, `shapes` drawn at a size in pixels, or `voc` -> Data, its labels masks.

    A mask holds class numbers, 0 being the background, and VOID. Raises DataError where something is missing.
    """
    if dataset == "voc":
        return read_voc(Path(data_dir), protocol, download)
    drawn = [draw_shapes(n, image_size, seed) for n, seed in SHAPES_DRAWN]
    return Data(*(Split(images, masks) for images, _, masks in drawn), ["background", *SHAPES])


def read_voc(root, protocol="clean", download=False):
    """PASCAL VOC: the trainval lists of VOC2007 and VOC2012 together, evaluated on VOC2007's test list -> Data.

    `root` is the folder that holds VOCdevkit/, or that folder itself. VOC2012 has under the id 2007_<id> the images of
    VOC2007, those of the test list among them; protocol "clean" drops from it what a list of VOC2007 holds, "paper"
    does not.
    Paper vs code: both train on VOC2012's whole list, and so on every test image.
    """
    root = next((path.parent for path in (root, root.resolve()) if path.name == "VOCdevkit"), root)
    train, more, test = (voc_list(root, *which, download) for which in VOC_LISTS)
    if protocol == "clean":
        more = {image_id: paths for image_id, paths in more.items() if plain_id(image_id) not in train | test}
    leaked = {plain_id(image_id) for image_id in [*train, *more]} & set(test)
    splits = [Split(*map(list, zip(*pairs))) for pairs in ([*train.values(), *more.values()], test.values())]
    return Data(*splits, VOC_CLASSES, "VOC2007 test", len(leaked))


VOC_LISTS = (("2007", "trainval"), ("2012", "trainval"), ("2007", "test"))


def plain_id(image_id):
    """An id of VOC2012 as VOC2007 has it."""
    return image_id.removeprefix("2007_")


def voc_list(root, year, name, download):
    """One list of one year: {id: (path of the image, path of the mask)}, fetched if need be and `download` says so."""
    archive = DATASET_YEAR_DICT["2007-test" if name == "test" else year]
    try:
        return complete_voc_list(root, year, name)
    except DataError as error:
        if not download:
            raise DataError(f"{error}; fetch and unpack {archive['url']} into {root}, or pass --download") from None
    fetch(archive["url"], archive["md5"], root)
    return complete_voc_list(root, year, name)


def complete_voc_list(root, year, name):
    file = root / f"VOCdevkit/VOC{year}/ImageSets/Segmentation/{name}.txt"
    try:
        source = torchvision.datasets.VOCSegmentation(root, year=year, image_set=name)
    except (RuntimeError, OSError):
        raise DataError(f"{file} is missing") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not a text file") from None
    pairs = {Path(mask).stem: (image, mask) for image, mask in zip(source.images, source.masks)}
    pairs.pop(".png", None)  # an empty line
    if not pairs:
        raise DataError(f"{file} names no image")
    absent = missing([path for pair in pairs.values() for path in pair])
    if absent:
        raise DataError(f"{len(absent)} images and masks of {file} are missing, first {absent[0]}")
    return pairs


def read_mask(path, num_classes):
    """A PNG of class numbers, with a palette or grey -> uint8 (H, W)."""
    try:
        with Image.open(path) as mask:
            if mask.mode not in ("P", "L"):
                raise ValueError(f"mode {mask.mode}, not class numbers with a palette (P) or grey (L)")
            mask = v2.functional.pil_to_tensor(mask)[0]
    except Exception as error:  # as for images
        raise DataError(f"{path}: not a readable mask ({error})") from None
    beyond = mask[(mask >= num_classes) & (mask != VOID)]
    if len(beyond):
        raise DataError(f"{path}: the label {beyond[0]} is neither a class, 0 to {num_classes - 1}, nor void, {VOID}")
    return mask


# ------------------------------------------------------------------------------------------ seeds and batches


def seed_of(*key):
    """One 56-bit seed for a key: (seed, epoch), (seed, epoch, index) or (seed, epoch, "what for", ...)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))


@contextmanager
def seeded(*key):
    """Seeds the CPU's global generator inside, and restores it: torchvision's transforms draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*key))
        yield


def split_batches(order, batch_size, processes=1):
    """Consecutive batches, the last partial one kept; one of fewer than two images a process joins the batch before.

    Batch norm cannot normalise one value a channel, which is what a single image gives on a 1x1 map.
    """
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < 2 * processes:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


# ---------------------------------------------------------------------------------------------------- loaders


def make_loader(split, *, image_size, workers=0, **kwargs):
    """The loader for a size: DeviceLoader up to 64 px, WorkerLoader above; kwargs as Loader's."""
    if image_size <= DEVICE_RESIDENT:
        return DeviceLoader(split, **kwargs)
    return WorkerLoader(split, image_size=image_size, workers=workers, **kwargs)


class Loader:
    """What both loaders share.

    mix: v2.MixUp or v2.CutMix, for each batch. rank, processes: of several processes that train together, each makes a
    loader, which yields its part: in training a slice of each batch, in evaluation every processes-th batch. Order,
    augmentation and mixing are drawn for the whole batch: those of an image do not depend on the number of processes.
    Raises DataError for a batch too large, or too small to give each of several processes two images.

    epoch(e) yields x (B, 3, H, W) float32, normalised, channels_last, and y (B,), or soft y (B, num_classes) where
    batches are mixed; raw([i, ...]) gives images before normalisation, uint8 (N, 3, H, W), from the test split as
    they are evaluated.
    Paper vs code: torchvision mixes each image with the one before it in the shuffled batch, the authors by a
    permutation. CutMix mixes every batch, as theirs; its own code mixes half of them on CIFAR.

    pairs: what goes with each image, for a method that declares it (see baselines.py): "view", another augmentation
    of it, "class", an image of its class drawn uniformly. x is then (2 B, 3, H, W), the second halves beside the
    first; both are mixed alike.
    """

    pairs = None

    def __init__(
        self, split, *, train, batch_size, stats=STATS["cifar"], seed=0, device="cpu", mix=None, rank=0, processes=1
    ):
        if train and batch_size > len(split):
            raise DataError(f"--batch-size {batch_size} is larger than the training set of {len(split)} images")
        if train and processes > 1 and batch_size < 2 * processes:
            raise DataError(f"--batch-size {batch_size} does not give each of {processes} processes two images")
        self.rank, self.processes = rank, processes
        self.split, self.train, self.batch_size, self.seed, self.device = split, train, batch_size, seed, device
        self.mix = mix
        self.mean, self.std = (255 * torch.tensor(s, device=device).view(1, 3, 1, 1) for s in stats)

    @property
    def sizes(self):
        """Images in each batch of an epoch, those of all processes."""
        return [len(batch) for batch in self.whole_batches(torch.arange(len(self.split)))]

    def part_of(self, batch):
        """This process's part of a batch: of N images a tensor (N,) -> (N / processes,) or one more."""
        return batch.tensor_split(self.processes)[self.rank]

    def whole_batches(self, order):
        return split_batches(order, self.batch_size, self.processes if self.train else 1)

    def __len__(self):
        """Steps of an epoch, the same in every process; in evaluation the last may have no batch for this one."""
        return len(self.sizes) if self.train else math.ceil(len(self.sizes) / self.processes)

    def epoch(self, epoch=0):
        for step, (x, y) in enumerate(self.augmented(epoch)):
            if self.mix:
                with seeded(self.seed, epoch, "mixing", step):
                    x, y = self.mix(x, y)
            yield x, y[: len(y) // 2] if self.pairs else y  # the second half has the labels of the first

    def batches(self, epoch, device="cpu"):
        """The indices of each batch of an epoch, of this process; shuffled in training."""
        n = len(self.split)
        if not self.train:
            return self.whole_batches(torch.arange(n, device=device))[self.rank :: self.processes]
        order = torch.randperm(n, generator=generator(self.seed, epoch)).to(device)
        return [self.part_of(batch) for batch in self.whole_batches(order)]

    def partners(self, epoch):
        """The index of the image that goes with each: (N,)."""
        if self.pairs == "view":
            return torch.arange(len(self.split))
        labels = self.split.labels
        counts = labels.bincount()
        first = counts.cumsum(0) - counts  # where a class begins: the images are sorted by it
        share = torch.rand(len(labels), dtype=torch.float64, generator=generator(self.seed, epoch, "partners"))
        return first[labels] + (share * counts[labels]).long()

    def normalize(self, x):
        return (x.float() - self.mean) / self.std


class DeviceLoader(Loader):
    """All images on the device as uint8; cropped, flipped and normalised there, a batch at a time.

    Training: zero padding of 4, random crop, horizontal flip (Sec. 4.1: "random cropping and flipping").
    Paper vs code: TinyImageNet too is resized to 32 px and then cropped so, as the paper says; the authors take random
    resized crops from its 64 px.
    """

    def __init__(self, split, *, pad=4, **kwargs):
        super().__init__(split, **kwargs)
        self.size, self.pad = split.images.shape[1], pad
        images = F.pad(split.images, (0, 0, pad, pad, pad, pad)) if self.train else split.images
        self.images, self.labels = images.to(self.device), split.labels.to(self.device)

    def augmented(self, epoch):
        everyone = torch.arange(len(self.split), device=self.device)
        halves = [(everyone, *self.windows(epoch, "augmentation"))]
        if self.pairs:
            halves.append((self.partners(epoch).to(self.device), *self.windows(epoch, "augmentation of the partners")))
        batches = self.batches(epoch, self.device)  # all at once: a copy a step would wait for the device
        for index in batches:
            parts = [(image[index], rows[index], cols[index]) for image, rows, cols in halves]
            image, rows, cols = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
            x = self.images[image[:, None, None], rows[:, :, None], cols[:, None, :]]  # (B, H, W, 3)
            yield self.normalize(x.permute(0, 3, 1, 2)), self.labels[image]

    def windows(self, *key):
        """Which rows of each padded image are read, (N, H), and which columns, (N, W); in training drawn from a key."""
        span, n = torch.arange(self.size, device=self.device), len(self.split)
        if not self.train:
            return span.expand(n, -1), span.expand(n, -1)
        g = generator(self.seed, *key)
        top, left = torch.randint(2 * self.pad + 1, (2, n), generator=g).to(self.device)
        flip = (torch.rand(n, generator=g) < 0.5).to(self.device)
        return top[:, None] + span, left[:, None] + torch.where(flip[:, None], span.flip(0), span)

    def raw(self, index):
        return self.split.images[index].permute(0, 3, 1, 2).to(self.device)


class WorkerLoader(Loader):
    """Images decoded and augmented one by one, in worker processes where workers > 0; normalised on the device.

    Training: RandomResizedCrop and horizontal flip; evaluation: shorter side to 8/7 of the size, centre crop.
    Paper vs code: the paper says "random cropping and flipping"; these are the authors' transforms.
    """

    def __init__(self, split, *, image_size, workers, **kwargs):
        super().__init__(split, **kwargs)
        self.dataset = self.make_dataset(image_size)
        self.keys = []  # refilled for each epoch: the workers stay, and learn the epoch from the key of each image
        self.loader = DataLoader(
            self.dataset,
            batch_sampler=self.keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.device(self.device).type == "cuda",
            collate_fn=self.collate,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # else it draws from the global generator, which dropout reads
        )

    collate = staticmethod(default_collate)

    def make_dataset(self, image_size):
        if self.train:
            steps = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
        else:
            steps = [v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size)]
        return SeededDataset(self.split, v2.Compose([*steps, v2.PILToTensor()]), self.seed)

    def augmented(self, epoch):
        yield from self.read(self.batches(epoch), epoch)

    def read(self, batches, epoch):
        """The batches with these indices, one after the other."""
        self.keys[:] = [[(epoch, i) for i in index.tolist()] for index in batches]
        if self.pairs:
            partners = self.partners(epoch).tolist()
            self.keys[:] = [keys + [(epoch, partners[i], i) for _, i in keys] for keys in self.keys]
        for x, y in self.loader:
            x = x.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            yield self.normalize(x), self.labels_to_device(y)

    def labels_to_device(self, y):
        return y.to(self.device, non_blocking=True)

    def raw(self, index):
        return torch.stack([self.dataset[0, i][0] for i in index]).to(self.device)


class SeededDataset(Dataset):
    """An image by its key (epoch, index) -> uint8 (3, H, W), label; augmented by a draw from (seed, epoch, index).

    With a third number in the key, the image it goes with, the draw is from all three.
    """

    def __init__(self, split, transform, seed):
        self.split, self.transform, self.seed = split, transform, seed

    def __getitem__(self, key):
        _, index, *_ = key
        with seeded(self.seed, *key):
            return self.transform(as_pil(self.split.images[index])), self.split.labels[index]


class MaskLoader(WorkerLoader):
    """Images with masks, transformed together.

    Training, groups(e): one list of parts a batch, each part x (b, 3, size, size), y (b, size, size) int64, of `part`
    images, of a last batch about as many. Flip, shorter side to 0.5..2 times the size, random crop,
    padded with black and VOID where the image is smaller, blur of every other image (deviation up to 1 pixel).
    Evaluation, epoch(): x (B, 3, size, size), the whole image squeezed to that size, and B masks of their own sizes.
    Paper vs code: the paper follows overhaul distillation; the transforms are the authors', but they pad with the
    background's label, and squeeze the masks of the evaluation too.
    """

    def __init__(self, split, *, classes, part=None, **kwargs):
        self.classes = classes
        super().__init__(split, **kwargs)
        self.part = part or self.batch_size

    def make_dataset(self, image_size):
        if not self.train:
            return MaskDataset(self.split, v2.Resize((image_size, image_size)), self.seed, len(self.classes), False)
        transform = v2.Compose(
            [
                v2.RandomShortestSize(range(image_size // 2, 2 * image_size + 1)),
                v2.RandomCrop(image_size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: VOID}),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.GaussianBlur(7, (0.001, 1.0))]),
            ]
        )
        return MaskDataset(self.split, transform, self.seed, len(self.classes), True)

    def groups(self, epoch):
        largest = [math.ceil(size / self.processes) for size in self.sizes]  # of the processes' slices of each batch
        counts = [len(split_batches(torch.arange(n), self.part)) for n in largest]  # so all have as many parts
        groups = [batch.tensor_split(count) for batch, count in zip(self.batches(epoch), counts)]
        parts = self.read([part for group in groups for part in group], epoch)
        for group in groups:
            yield list(itertools.islice(parts, len(group)))

    @staticmethod
    def collate(samples):
        images, masks = zip(*samples)
        return torch.stack(images), list(masks)

    def labels_to_device(self, masks):
        masks = [mask.to(self.device, non_blocking=True).long() for mask in masks]
        return torch.stack(masks) if self.train else masks


class MaskDataset(SeededDataset):
    """An image and its mask by their key (epoch, index) -> uint8 (3, h, w), uint8 (H, W).

    together: the transform changes the mask as it does the image, else the image alone.
    """

    def __init__(self, split, transform, seed, num_classes, together):
        super().__init__(split, transform, seed)
        self.num_classes, self.together = num_classes, together

    def __getitem__(self, key):
        epoch, index = key
        image, mask = as_pil(self.split.images[index]), self.split.labels[index]
        if not torch.is_tensor(mask):
            path, mask = mask, read_mask(mask, self.num_classes)
            if mask.shape != (image.height, image.width):
                sizes = f"{mask.shape[1]}x{mask.shape[0]} pixels, its image {image.width}x{image.height}"
                raise DataError(f"{path}: the mask has {sizes}")
        image = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        mask = tv_tensors.Mask(mask) if self.together else mask  # a plain tensor beside an Image stays as it is
        with seeded(self.seed, epoch, index):
            pair = self.transform(image, mask)
        return tuple(part.as_subclass(torch.Tensor) for part in pair)


def init_worker(_):
    """Ctrl-C and torchrun's SIGTERM reach the whole process group: the workers leave them to the main process.

    Without torchrun, SIGTERM is how the main process gets rid of a worker that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if torch.distributed.is_torchelastic_launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
