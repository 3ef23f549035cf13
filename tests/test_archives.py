"""The official archives as they unpack, as tiny trees of their layout."""

import contextlib
import functools
import hashlib
import http.server
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import imagenet, voc

from conftest import voc_tree
from experiments import archives
from experiments.archives import OFFICIAL, UserError


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        return savemat(path, {"file_list": np.array(content, dtype=object)[:, None]}, do_compression=True)
    path.write_bytes(content.encode())


def listed(images, train_list, train, test_list, test, join):
    """What two lists name below a folder of images, and the lists."""
    paths = [[images + name for name in names] for names in (train, test)]
    return *paths, {train_list: join(train), test_list: join(test)}


BLACK, LAYSAN = "001.Black_footed_Albatross", "002.Laysan_Albatross"
TAN, TERRIER = "n02089078-black-and-tan_coonhound", "n02095314-wire-haired_fox_terrier"
# Folder below --data-dir, images of training and test sorted by class, other files. "._*" are a Mac's.
TREES = {
    "tinyimagenet": ("tiny-imagenet-200",
        [f"train/{wnid}/images/{wnid}_{n}.JPEG" for wnid in ("n01", "n02") for n in (0, 10, 2)],
        ["val/images/val_1.JPEG", "val/n01/val_2.JPEG", "val/n02/images/val_0.JPEG"],  # as it unpacks; sorted by users
        {"wnids.txt": "n02\nn01\n", "test/images/test_0.JPEG": "", "train/n01/images/._n01_0.JPEG": "",  # not sorted
         "val/val_annotations.txt": "".join(f"val_{i}.JPEG\tn0{n}\t0\t32\t44\t62\n" for i, n in enumerate((2, 1, 1)))}),
    "cub200": ("CUB_200_2011",
        [f"images/{BLACK}/b_0.jpg", f"images/{BLACK}/b_18.jpg", f"images/{LAYSAN}/l_7.jpg"],
        [f"images/{BLACK}/b_1.jpg", f"images/{LAYSAN}/l_5.jpg"],
        {"images.txt": f"1 {BLACK}/b_18.jpg\n2 {BLACK}/b_0.jpg\n3 {LAYSAN}/l_7.jpg\n4 {LAYSAN}/l_5.jpg\n"
                       f"5 {BLACK}/b_1.jpg\n",
         "image_class_labels.txt": "5 1\n1 1\n2 1\n3 2\n4 2\n",  # in another order: joined on the number
         "train_test_split.txt": "1 1\n2 1\n3 1\n4 0\n5 0\n", "classes.txt": f"1 {BLACK}\n2 {LAYSAN}\n"}),
    "mit67": ("", *listed("Images/",
        "TrainImages.txt", ["mall/a_gif.jpg", "mall/shopping mall.jpg", "nursery/baby's_room.jpg.jpg"],
        "TestImages.txt", ["mall/food court.jpg", "nursery/n1.jpg"],
        lambda names: "\ufeff" + "\n".join(names[::-1]))),  # a byte-order mark; no newline at the end
    "stanford40": ("stanford40", *listed("JPEGImages/", "ImageSplits/train.txt",
        ["writing_on_a_board_001.jpg", "writing_on_a_book_001.jpg", "writing_on_a_book_002.jpg"],
        "ImageSplits/test.txt", ["writing_on_a_board_002.jpg", "writing_on_a_book_003.jpg"],
        lambda names: "\r\n".join(names) + "\r\n")),
    "dogs": ("", *listed("Images/", "train_list.mat",
        [f"{TAN}/n02089078_1.jpg", f"{TAN}/n02089078_22.jpg", f"{TERRIER}/n02095314_3.jpg"],
        "test_list.mat", [f"{TAN}/n02089078_4.jpg", f"{TERRIER}/n02095314_5.jpg"], list)),
    "imagenet": ("",
        [f"train/n01440764/n01440764_{n}.JPEG" for n in (1, 2)] + ["train/n02105855/n02105855_2933.JPEG"],
        ["val/n01440764/ILSVRC2012_val_00000002.JPEG", "val/n02105855/ILSVRC2012_val_00000001.JPEG"],
        {"train/.ipynb_checkpoints/a.JPEG": "", "val/n01440764/._a.JPEG": "", "val/__MACOSX/a.JPEG": ""}),
}  # fmt: skip
TREES["mit67"][3]["Images/mall/IN_NO_LIST.JPG"] = ""
_, *images, lists = TREES["dogs"]
TREES["dogs, sorted by users"] = ("dogs", *images, {f"lists/{name}": cells for name, cells in lists.items()})


@pytest.fixture(params=TREES)
def tree(request, tmp_path, monkeypatch):
    """(data set, --data-dir, its folder, its images), with the tree's counts for the published ones."""
    dataset, root = request.param.partition(",")[0], tmp_path / "data"
    below, train, test, others = TREES[request.param]
    for name, content in (dict.fromkeys(train + test, "") | others).items():
        write(root / below / name, content)
    monkeypatch.setattr(OFFICIAL[dataset], "counts", (2, len(train), len(test)))
    return dataset, root, root / below, [train, test]


def only(dataset):
    return pytest.mark.parametrize("tree", [dataset], indirect=True)


def names(splits, folder):
    return [[Path(path).relative_to(folder).as_posix() for path, _ in split] for split in splits]


def test_archives_are_read_as_they_unpack(tree):
    """From --data-dir, or the set's own folder, without hidden files."""
    dataset, root, folder, images = tree
    for place in (root, folder):
        train, test = archives.read(dataset, place)
        assert names([train, test], folder) == images
    assert all(name in path for path, name in train)


@pytest.mark.parametrize("what", ["no image", "half a list"])
def test_an_archive_that_is_not_whole_is_refused_with_what_to_do(tree, what):
    dataset, root, folder, images = tree
    lists = [path for path in sorted(folder.rglob("*")) if path.suffix in (".txt", ".mat")]
    if what == "no image":
        (folder / images[0][0]).unlink()
    elif lists:
        lists[-1].write_bytes(lists[-1].read_bytes()[: lists[-1].stat().st_size // 2])
    else:  # ImageNet's val/ as its archive unpacks: no class folders
        shutil.rmtree(folder / "val")
        write(folder / "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UserError, match=rf"^{OFFICIAL[dataset].title} in {folder}\S* is not whole: [^\n]*$") as error:
        archives.read(dataset, root)
    assert ("--dataset folder" if dataset == "imagenet" else OFFICIAL[dataset].archives[0][0]) in str(error.value)


@only("imagenet")
def test_imagenet_is_unpacked_from_its_archives(tree, tmp_path, monkeypatch):
    """train: a tar of one tar a class; val: a flat tar, whose labels are in the devkit, which meta.bin stands for."""
    _, _, folder, images = tree
    (root := tmp_path / "packed").mkdir()
    for wnid in ("n01440764", "n02105855"):
        pack(tmp_path / f"{wnid}.tar", folder / "train" / wnid, "n*")
    pack(root / "ILSVRC2012_img_train.tar", tmp_path, "n*.tar")
    pack(root / "ILSVRC2012_img_val.tar", folder / "val", "*/ILSVRC*")
    wnids = {"n01440764": ("tench",), "n02105855": ("Shetland sheepdog",)}
    torch.save((wnids, ["n02105855", "n01440764"]), root / "meta.bin")  # of val images 1 and 2
    sums = {k: (file, md5(root / file)) for k, (file, _) in imagenet.ARCHIVE_META.items() if k != "devkit"}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    assert names(archives.read("imagenet", root), root) == images


# ---------------------------------------------------------------------------------------- downloads and unpacking


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pack(archive, folder, pattern="*"):
    with tarfile.open(archive, "w") as tar:
        for path in sorted(folder.glob(pattern)):
            tar.add(path, path.name)


@pytest.fixture
def served(tmp_path):
    """(a folder, its address on localhost)."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@only("cub200")
def test_download_fetches_verifies_and_unpacks(tree, tmp_path, served, monkeypatch):
    """Refused where its checksum differs; repaired from the archive that stays in --data-dir."""
    _, root, folder, images = tree
    (where, address), new = served, tmp_path / "new"
    pack(where / "CUB_200_2011.tgz", root)
    write(where / "list.txt", "is not unpacked")
    good, other = [(f"{address}/{name}", md5(where / name)) for name in ("CUB_200_2011.tgz", "list.txt")]
    monkeypatch.setattr(OFFICIAL["cub200"], "archives", ((good[0], "0" * 32),))
    with pytest.raises(UserError, match=f"cannot fetch {good[0]} .* into {new}: RuntimeError: .*corrupted"):
        archives.read("cub200", new, download=True)
    assert not (new / "CUB_200_2011").exists()
    monkeypatch.setattr(OFFICIAL["cub200"], "archives", (good, other))
    assert names(archives.read("cub200", new, download=True), new / "CUB_200_2011") == images
    shutil.rmtree(where)
    shutil.rmtree(new / "CUB_200_2011/images")
    monkeypatch.chdir(new / "CUB_200_2011")
    assert names(archives.read("cub200", Path("."), download=True), ".") == images  # unpacked beside itself
    assert {path.name for path in new.iterdir()} == {"CUB_200_2011", "CUB_200_2011.tgz", "list.txt"}


def test_a_zip_without_a_checksum_that_is_cut_short_is_fetched_again(tmp_path, served):
    where, address = served
    write(tmp_path / "images/JPEGImages/0.jpg")
    shutil.make_archive(where / "JPEGImages", "zip", tmp_path / "images")
    write(tmp_path / "JPEGImages.zip", "half")
    archives.fetch(f"{address}/JPEGImages.zip", None, tmp_path)
    assert (tmp_path / "JPEGImages/0.jpg").exists()


@pytest.mark.parametrize("python", ["with the filter", "without"])
@pytest.mark.parametrize("member", ["../outside", "{}/outside", "link/outside"])
def test_nothing_is_unpacked_outside_the_folder(tmp_path, monkeypatch, python, member):
    """A member that climbs out, of an absolute path, or through a link; Python 3.10.0 and 3.11.2 have no filter."""
    if python == "without":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open("hostile.tar", "w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        if member.startswith("link"):
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo(member.format(tmp_path)))
    with zipfile.ZipFile("hostile.zip", "w") as members:
        members.writestr("../outside", "")
    for name in ("hostile.tar", "hostile.zip"):
        with contextlib.suppress(UserError, tarfile.TarError):  # or the member is written inside
            archives.unpack(Path(name), Path("folder"))
    assert not Path("outside").exists()


# ------------------------------------------------------------------------------------------------------ VOC's lists


def test_a_voc_that_is_not_whole_is_refused_with_its_archive(tmp_path):
    voc_tree(tmp_path)
    for gone, archive in (  # the lists are read in the other order
        ("VOC2007/SegmentationClass/000175.png", "VOCtest_06-Nov-2007.tar"),
        ("VOC2012/ImageSets/Segmentation/trainval.txt", "VOCtrainval_11-May-2012.tar"),
        ("VOC2007/JPEGImages/000039.jpg", "VOCtrainval_06-Nov-2007.tar"),
    ):
        path = tmp_path / "VOCdevkit" / gone
        path.unlink()
        with pytest.raises(UserError, match=f"{path}.*{archive} into {tmp_path}, or pass --download"):
            archives.voc_lists(tmp_path)


def test_download_of_voc_fetches_what_is_missing(tmp_path, served, monkeypatch):
    """The test archive alone: it merges with what is there."""
    where, address = served
    pack(where / "VOCtest.tar", voc_tree(tmp_path))
    archive = dict(url=f"{address}/VOCtest.tar", md5=md5(where / "VOCtest.tar"))
    monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2007-test", archive)
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/000175.jpg").unlink()
    train, more, test = archives.voc_lists(tmp_path / "VOCdevkit", download=True)
    assert (len(train), len(more), list(test)) == (2, 5, ["000121", "000175"])
