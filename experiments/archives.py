"""The official data sets as their archives unpack.

    read("cub200", Path("data"))  # training and test images: two lists [(path, class name), ...]

An archive is whole when every file that its lists name is there and the published counts hold (VOC's are not counted).
"""

import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Callable

import torchvision
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT


class UserError(Exception):
    """What the user can mend, in one line: what is wrong, where, and what to do."""

    def __init__(self, message):
        # A DataLoader hands on its worker's exception with the traceback before the message.
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


def read(dataset, root, download=False):
    """An official data set below root, or root being its own folder -> two lists [(path, class name), ...], of training
    and test, sorted by class and path.
    """
    official = OFFICIAL[dataset]
    places = root / official.folder, root
    folder = next((p for p in places if any((p / marker).exists() for marker in official.markers)), places[0])
    place = folder.absolute().parent if official.own_folder else folder
    return fetched(lambda: whole(official, folder), official.archives, place, download, official.advice)


def whole(official, folder):
    """What the reader finds in a folder, sorted; UserError where that is not the whole data set."""
    where = f"{official.title} in {folder} is not whole"
    try:
        splits = official.reader(folder)
    except Exception as error:  # a list that is absent, cut short, or names what another does not; torchvision's ...
        raise UserError(f"{where}: {one_line(error)}") from None
    splits = [sorted([(os.fspath(p), name) for p, name in split], key=lambda pair: pair[::-1]) for split in splits]
    found = len({name for split in splits for _, name in split}), *map(len, splits)
    if found != official.counts:
        counts = "{:,} classes, {:,} training and {:,} test images"
        raise UserError(f"{where}: {counts.format(*found)}, not {counts.format(*official.counts)}")
    check_files([path for split in splits for path, _ in split], where)
    return splits


def check_files(paths, where):
    """UserError where one of the paths is no file. Each folder is listed once: there may be a million files."""
    listed = {folder: set(os.listdir(folder)) for folder in set(map(os.path.dirname, paths)) if os.path.isdir(folder)}
    absent = [path for path in paths if os.path.basename(path) not in listed.get(os.path.dirname(path), ())]
    if absent:
        raise UserError(f"{where}: {len(absent)} of {len(paths)} files are missing, first {absent[0]}")


# --------------------------------------------- readers: the folder of a set -> its training and test images


def read_tinyimagenet(root):
    """Evaluated on val/, as the field does: test/ has no labels. Some tools sort val/images/* into val/<wnid>/."""
    train = []
    for wnid in lines(root / "wnids.txt"):
        images = root / "train" / wnid / "images"
        train += [(images / name, wnid) for name in os.listdir(images) if not hidden(name)]
    test = []
    for name, wnid, *_ in map(str.split, lines(root / "val/val_annotations.txt")):
        places = [root / "val/images" / name, root / "val" / wnid / name, root / "val" / wnid / "images" / name]
        test.append((next(filter(Path.exists, places), places[0]), wnid))
    return train, test


def read_cub200(root):
    """The lists are joined on the image's number: they are not in the order of the paths."""
    files = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    paths, labels, in_train, names = (dict(map(str.split, lines(root / name))) for name in files)
    splits = {"1": [], "0": []}
    for i, path in paths.items():
        splits[in_train[i]].append((root / "images" / path, names[labels[i]]))
    return splits["1"], splits["0"]


def read_mit67(root):
    """The lists name 6,700 of the 15,620 images, some with a blank in their names; the others are in no split."""
    lists = [lines(root / name) for name in ("TrainImages.txt", "TestImages.txt")]
    return [[(root / "Images" / name, name.split("/")[0]) for name in names] for names in lists]


def read_stanford40(root):
    """One flat folder; the class is the name without its number: writing_on_a_book_017.jpg."""
    lists = [lines(root / "ImageSplits" / name) for name in ("train.txt", "test.txt")]
    return [[(root / "JPEGImages" / name, name.rpartition("_")[0]) for name in names] for names in lists]


def read_dogs(root):
    """The lists are MAT-files, beside Images/ as their archive unpacks, or in the lists/ that some users make."""
    from scipy.io import loadmat

    place = root / "lists" if (root / "lists").is_dir() else root
    cells = [loadmat(place / name)["file_list"].flat for name in ("train_list.mat", "test_list.mat")]
    lists = [[str(cell.item()) for cell in part] for part in cells]
    return [[(root / "Images" / name, name.split("/")[0]) for name in names] for names in lists]


def read_imagenet(root):
    """train/<wnid>/* and val/<wnid>/*; where one is absent, torchvision makes it from the archives."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            torchvision.datasets.ImageNet(root, split)
    return [class_folders(root / split)[0] for split in ("train", "val")]


def lines(path):
    """The lines of a list that are not empty, whatever ends them, without a byte-order mark."""
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def hidden(name):
    """Whether a file or folder is an operating system's or a notebook's, and so no data."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


def class_folders(folder):
    """folder/<class>/**/* -> [(path, class), ...] in sorted order, and the paths of the files that are no images."""
    classes, found = None, []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not hidden(name)]
        classes = set(folders) if classes is None else classes  # the first place is the folder itself
        name = os.path.relpath(place, folder).split(os.sep)[0]
        found += [(name, place, file) for file in files if not hidden(file)]
    found = [(os.path.join(place, file), name) for name, place, file in sorted(found)]
    images = [(path, name) for path, name in found if name in classes and path.lower().endswith(IMG_EXTENSIONS)]
    if not classes:
        raise UserError(f"{folder} has no class folders: images are read from {folder}/<class>/")
    if empty := classes - {name for _, name in images}:
        raise UserError(f"{os.path.join(folder, min(empty))} has no image: remove it, or fill it")
    return images, sorted({path for path, _ in found} - {path for path, _ in images})


# ------------------------------------------------------------------------------------- what is published, and where


@dataclass
class Official:
    """A data set as its authors publish it: classes, training and test images; paths that tell its folder."""

    title: str
    reader: Callable
    counts: tuple
    folder: str  # below --data-dir
    markers: tuple
    archives: tuple = ()  # (address, MD5 or None)
    own_folder: bool = False  # whether the archives make the folder by themselves
    test_name: str = "test"
    advice: str = ""


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
        ("train", "val", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"), test_name="val",
        advice="--dataset folder reads class folders of any number; train/ and val/, where absent, are unpacked from "
               "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (image-net.org)",
    ),
}
# fmt: on


def voc_lists(root, download=False):
    """The trainval lists of VOC2007 and VOC2012 and the test list of VOC2007 -> [{id: (image, mask)}, ...], paths.
    root is the folder that holds VOCdevkit/, or that folder itself.
    """
    root, lists = holder(root, "VOCdevkit"), []
    for year, name, key in ((2007, "trainval", "2007"), (2012, "trainval", "2012"), (2007, "test", "2007-test")):
        file = root / f"VOCdevkit/VOC{year}/ImageSets/Segmentation/{name}.txt"
        archive = DATASET_YEAR_DICT[key]
        lists.append(fetched(lambda: voc_list(file), [(archive["url"], archive["md5"])], root, download))
    return lists


def voc_list(file):
    """.../ImageSets/Segmentation/<name>.txt -> {id: (path of the image, path of the mask)}."""
    images, masks = (os.path.join(file.parents[2], name) for name in ("JPEGImages", "SegmentationClass"))
    try:
        pairs = {i: (os.path.join(images, f"{i}.jpg"), os.path.join(masks, f"{i}.png")) for i in lines(file)}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {one_line(error)}") from None
    if not pairs:
        raise UserError(f"{file} names no image")
    check_files([path for pair in pairs.values() for path in pair], f"{file} is not whole")
    return pairs


# --------------------------------------------------------------------------------------------- fetched and unpacked


def holder(root, name):
    """The folder that holds the folder `name`: root, or where root is that folder, its parent."""
    return root.absolute().parent if root.absolute().name == name else root


def fetched(check, archives, place, download, advice=""):
    """What check() returns; where it raises UserError, `download` fetches the archives and it is asked once more."""
    try:
        return check()
    except UserError as error:
        if not (download and archives):
            urls = ", ".join(url for url, _ in archives)
            advice = advice or f"fetch and unpack {urls} into {place}, or pass --download"
            raise UserError(f"{error}; {advice}") from None
    for url, md5 in archives:
        fetch(url, md5, place)
    return check()


def fetch(url, md5, folder):
    """Downloads a file into a folder unless it is there, compares its checksum if it has one, and unpacks it."""
    archive = folder / url.rpartition("/")[2]
    try:
        if md5 is None and not zipfile.is_zipfile(archive):  # cut short, but torchvision would take it
            archive.unlink(missing_ok=True)
        download_url(url, folder, archive.name, md5)
        if archive.suffix != ".txt":
            unpack(archive, folder)
    except Exception as error:  # of urllib, tarfile, zipfile, zlib, the file system ...
        raise UserError(f"cannot fetch {url} and unpack it into {folder}: {one_line(error)}") from None


def unpack(archive, folder):
    """Unpacks a tar or a zip, and writes nothing outside the folder."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as members:
            return members.extractall(folder)  # drops roots and .. by itself
    with tarfile.open(archive) as members:
        if hasattr(tarfile, "data_filter"):
            return members.extractall(folder, filter="data")
        for member in members:  # Python before 3.10.12 and 3.11.4
            path = PureWindowsPath(member.name)  # of either kind of slash
            if path.anchor or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise UserError(f"{archive}: the member {member.name} would lie outside, or is a link")
        members.extractall(folder)


def one_line(error):
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())
