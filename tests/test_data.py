"""Data sets as they are read, and the loaders with their randomness."""

import hashlib
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.transforms import v2

from conftest import voc_tree
from experiments import data
from experiments.archives import UserError

RAW = ((0,) * 3, (1 / 255,) * 3)  # stats with which a loader yields pixels as they are
MIXING = {"mixup": v2.MixUp(alpha=1.0, num_classes=28), "cutmix": v2.CutMix(alpha=1.0, num_classes=28)}


def pictures(root, *names, size=16):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size)).save(root / name)


def noise(n, size, width=None):
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, size, width or size, 3), dtype=torch.uint8, generator=g)


def flat(n, size):
    """Image i is all i."""
    return torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, size, size, 3)


def loader_of(images, labels=None, pairs=None, **kwargs):
    labels = torch.arange(len(images)) if labels is None else labels
    kwargs = dict(train=True, batch_size=4, image_size=images.shape[1], stats=RAW) | kwargs
    loader = data.make_loader(data.Split(images, labels), **kwargs)
    loader.pairs = pairs
    return loader


def equal(a, b):
    """Whether two lists of batches are the same, bit for bit."""
    return all(map(torch.equal, sum(map(list, a), []), sum(map(list, b), []))) and len(a) == len(b)


# ------------------------------------------------------------------------------------------------- data sets


def test_shapes_are_always_the_same_and_their_masks_name_the_class():
    images, labels, masks = data.draw_shapes(3, 24, seed=5)
    assert torch.equal(images, data.draw_shapes(3, 24, seed=5)[0]) and images.shape == (24, 24, 24, 3)
    assert labels.tolist() == [c for c in range(8) for _ in range(3)]
    assert all(mask.unique().tolist() == [0, label + 1] for label, mask in zip(labels, masks))
    d = data.load("shapes", image_size=8)
    train, test = ({image.numpy().tobytes() for image in split.images} for split in (d.train, d.test))
    assert len(d.train) == 1600 and len(d.test) == 800 and not train & test


def test_class_folders_are_read_in_sorted_order_without_hidden_files(tmp_path, monkeypatch):
    """A test split that lacks a class leaves the numbers of the others as they are."""
    files = [f"{c}/{place}{i}.png" for c in "ab" for place in ("", "deep/") for i in (0, 1, 10)]
    pictures(tmp_path, *(f"train/{name}" for name in files), "val/b/0.png")
    pictures(tmp_path, "train/.ipynb_checkpoints/0.png", "train/__MACOSX/a/0.png", "train/a/.x/0.png", "val/b/._0.png")
    (tmp_path / "train/a/Thumbs.db").write_bytes(b"")
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    for per_class in (None, 2):
        d = data.load("folder", data_dir="~", image_size=72, per_class=per_class)
        read = [Path(path).relative_to(tmp_path / "train").as_posix() for path in d.train.images]
        assert read == files[:per_class] + (files[6:8] if per_class else [])
        assert [d.classes[label] for label in d.train.labels] == [name[0] for name in read]
        assert d.test.labels.tolist() == [1] and not d.notes


def test_a_note_says_which_folder_is_evaluated_on_and_which_files_are_not_used(tmp_path):
    pictures(tmp_path, "train/a/0.png")
    for name, others in (("test", ""), ("validation", "test"), ("valid", "validation, test")):
        pictures(tmp_path, f"{name}/a/0.png")
        d = data.load("folder", data_dir=tmp_path)
        assert d.test_name == name
        assert d.notes == ((f"evaluated on {tmp_path / name}; not read: {others}",) if others else ())
    pictures(tmp_path, "train/a/a.gif", "valid/b.png")
    note = data.load("folder", data_dir=tmp_path).notes[1]
    assert note.startswith("2 files are not used") and note.endswith(f"first {tmp_path / 'train/a/a.gif'}")


def test_folders_that_make_no_classifier_are_refused(tmp_path):
    with pytest.raises(UserError, match="needs train/<class>"):
        data.load("folder", data_dir=tmp_path)
    pictures(tmp_path, "train/a/0.png", "val/a/0.png", "val/b/0.png")
    with pytest.raises(UserError, match="val has the class b, which .*train lacks"):
        data.load("folder", data_dir=tmp_path)
    (tmp_path / "train/b").mkdir()
    with pytest.raises(UserError, match="b has no image"):
        data.load("folder", data_dir=tmp_path)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """An archive in CIFAR-100's layout, images shuffled, and its images as class folders."""
    archive, classes = tmp_path / "archive/cifar-100-python", ["apple", "bear", "worm"]
    archive.mkdir(parents=True)
    files, folders = {"meta": {"fine_label_names": classes}}, []
    for split, n in (("train", 12), ("test", 6)):
        images, labels = noise(n, 32), [i % 3 for i in range(n)]
        written = [f"{classes[label]}_s_{7 * i % n:06}.png" for i, label in enumerate(labels)]
        planes = images.permute(0, 3, 1, 2).flatten(1).numpy()
        files[split] = {"data": planes, "fine_labels": labels, "filenames": written}
        folders.append([(name, n // 3) for name in classes])
        for image, label, name in zip(images, labels, written):
            pictures(tmp_path / "folders" / split / classes[label], name)
            Image.fromarray(image.numpy()).save(tmp_path / "folders" / split / classes[label] / name)
    for name, content in files.items():
        (archive / name).write_bytes(pickle.dumps(content))
    sums = {name: hashlib.md5(pickle.dumps(content)).hexdigest() for name, content in files.items()}
    cifar = torchvision.datasets.CIFAR100  # the real reader, told the checksums of this archive
    monkeypatch.setattr(cifar, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["meta"]})
    monkeypatch.setattr(data, "CIFAR100_FOLDERS", hashlib.sha256(repr(folders).encode()).hexdigest())
    return tmp_path


def test_cifar100_is_the_same_from_its_archive_and_from_class_folders(cifar100):
    places = ("archive", "archive/cifar-100-python", "folders")
    first, *others = [data.load("cifar100", data_dir=cifar100 / place, image_size=24) for place in places]
    assert first.train.images.shape == (12, 24, 24, 3)
    assert len(first.classes) == 3 and len(first.train) == 12 and len(first.test) == 6
    for other in others:
        assert other.classes == first.classes
        for a, b in ((first.train, other.train), (first.test, other.test)):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_cifar100_that_is_not_whole_is_refused(cifar100):
    next((cifar100 / "folders/test/worm").iterdir()).unlink()
    (cifar100 / "archive/cifar-100-python/test").write_bytes(b"junk")
    for place in ("folders", "archive", "nowhere"):
        with pytest.raises(UserError, match=f"{place}.*cifar-100-python.tar.gz into .*, or pass --download"):
            data.load("cifar100", data_dir=cifar100 / place)


# ------------------------------------------------------------------------------------------------- images


def test_images_of_any_mode_become_rgb_without_a_warning_and_more_than_8_bits_are_refused(tmp_path):
    palette = Image.new("P", (9, 7), 5)
    palette.putpalette([i % 256 for i in range(768)])
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.read_image(tmp_path / "palette.png").getpixel((0, 0)) == (15, 16, 17)
        for mode in ("L", "RGBA", "P", "CMYK", "1", "LA"):
            Image.new(mode, (9, 7)).save(tmp_path / f"{mode}.tif")
            assert data.read_image(tmp_path / f"{mode}.tif").mode == "RGB"
    for mode, name in (("F", "float.tif"), ("I;16", "deep.png")):
        Image.new(mode, (9, 7)).save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}.*more than 8 bits a channel, mode {mode}"):
            data.read_image(tmp_path / name)


def test_images_are_turned_as_viewers_show_them(tmp_path):
    """Orientation 6: stored turned by a quarter. EXIF data that is broken turns nothing."""
    upright = Image.fromarray(noise(1, 40, 60)[0].numpy())
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert data.read_image(tmp_path / "turned.png").tobytes() == upright.tobytes()
    turn, text = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0", b"\x01\x19\0\x02\0\0\0\4abc\0"  # a text for a number
    upright.save(tmp_path / "broken.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + turn + text + b"\0\0\0\0")
    assert data.read_image(tmp_path / "broken.jpg").size == (60, 40)


@pytest.mark.parametrize("size, workers", [(16, 0), (72, 0), (72, 1)])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, size, workers):
    pictures(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png", size=90)
    broken = tmp_path / "train/b/0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=f"^{broken}: not a readable image [^\n]*$"):
        split = data.load("folder", data_dir=tmp_path, image_size=size).train
        list(data.make_loader(split, train=True, batch_size=2, image_size=size, workers=workers).epoch())


# ------------------------------------------------------------------------------------- loaders and their randomness


def test_small_images_are_cropped_from_a_zero_padding_of_4_and_flipped():
    """Sec. 4.1: "random cropping and flipping". Each result is a window of its image, and all offsets occur."""
    images, seen = noise(60, 8), set()
    for x, y in loader_of(images).epoch(3):
        assert x.is_contiguous(memory_format=torch.channels_last)
        for result, i in zip(x.round().byte(), y):
            padded = F.pad(images[i].permute(2, 0, 1), (4, 4, 4, 4))
            windows = {(top, left): padded[:, top : top + 8, left : left + 8] for top in range(9) for left in range(9)}
            for flip, upright in ((False, result), (True, result.flip(2))):
                seen |= {(*place, flip) for place, window in windows.items() if torch.equal(upright, window)}
    tops, lefts, flips = map(set, zip(*seen))
    assert tops == lefts == set(range(9)) and flips == {False, True}


def test_small_test_images_are_only_normalised():
    images, mean, std = noise(10, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x = torch.cat([x for x, _ in loader_of(images, train=False, stats=(mean, std)).epoch()])
    assert_close(x, (images / 255 - torch.tensor(mean)).div(torch.tensor(std)).permute(0, 3, 1, 2))


def test_large_test_images_are_resized_to_8_7_and_cropped():
    """A white frame of an eighth a side, around black: the centre crop of 7/8 leaves a sixteenth less of it."""
    images = F.pad(torch.zeros(1, 120, 120, 3, dtype=torch.uint8), (0, 0, 20, 20, 20, 20), value=255)
    ((x, _),) = loader_of(images, train=False, image_size=140).epoch()
    x = x.round() / 255
    assert x.shape == (1, 3, 140, 140)
    assert x[0, 0, 70, 9] == 1 and x[0, 0, 70, 10] == 0 and x[0, 0, 130, 70] == 1 and x[0, 0, 129, 70] == 0


@pytest.mark.parametrize("mix", [None, "mixup"])
@pytest.mark.parametrize("size", [8, 72])
def test_what_is_drawn_depends_on_seed_and_epoch_alone(size, mix):
    """Order, augmentation and mixing; the global generator, which dropout reads, is left alone."""
    a, b, other = (loader_of(noise(12, size), seed=seed, mix=MIXING.get(mix)) for seed in (1, 1, 2))
    torch.manual_seed(0)
    list(a.epoch(0))
    reference = list(a.epoch(5))
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))
    assert equal(reference, list(b.epoch(5)))
    for differs in (list(a.epoch(6)), list(other.epoch(5))):
        (x, y), (x_differs, y_differs) = ([torch.cat(parts) for parts in zip(*e)] for e in (reference, differs))
        assert not torch.equal(y, y_differs)
        if mix:
            shares = [batch.max().item() for _, batch in (*reference, *differs)]
            assert len(set(shares)) == 6  # another lambda each step
        else:
            assert not torch.equal(x[y.argsort()], x_differs[y_differs.argsort()])  # image by image


def test_training_drops_the_last_partial_batch_and_evaluation_does_not():
    loader = loader_of(noise(11, 8))
    batches = [y for _, y in loader.epoch(0)]
    assert [len(y) for y in batches] == [4, 4] and len(loader) == 2 and len(torch.cat(batches).unique()) == 8
    loader = loader_of(noise(11, 8), train=False)
    assert torch.equal(torch.cat([y for _, y in loader.epoch()]), torch.arange(11)) and len(loader) == 3


def test_large_images_do_not_depend_on_the_number_of_workers_and_go_to_spawned_ones():
    epochs = []
    for workers in (0, 1, 2):
        loader = loader_of(noise(12, 90), batch_size=5, image_size=72, seed=3, workers=workers)
        epochs.append([*loader.epoch(0), *loader.epoch(1)])
    assert epochs[0][0][0].shape == (5, 3, 72, 72) and equal(epochs[0], epochs[1]) and equal(epochs[0], epochs[2])
    assert epochs[0][0][0].is_contiguous(memory_format=torch.channels_last)
    for loader in (loader, mask_loader(noise(4, 80), torch.ones(4, 80, 80, dtype=torch.uint8))):
        dataset, *_ = pickle.loads(pickle.dumps((loader.dataset, loader.collate, data.init_worker)))
        assert torch.equal(dataset[3, 1][0], loader.dataset[3, 1][0])
        assert not torch.equal(dataset[3, 1][0], dataset[4, 1][0])


@pytest.mark.parametrize("size, workers", [(8, 0), (72, 2)])
@pytest.mark.parametrize("pairs", ["view", "class"])
def test_what_goes_with_each_image(pairs, size, workers):
    """Behind the B images, which are those without pairs, B others: a view of the same, or an image of its class."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([5, 10, 15]))
    images = flat(30, size)
    images[..., 1] = noise(30, size)[..., 1]  # red is its number
    plain, paired = (loader_of(images, labels, p, batch_size=8, seed=1, workers=workers) for p in (None, pairs))
    partners = paired.partners(2)
    assert torch.equal(labels[partners], labels) and torch.equal(partners, torch.arange(30)) == (pairs == "view")
    for (x, y), (x_plain, y_plain) in zip(paired.epoch(2), plain.epoch(2), strict=True):
        assert torch.equal(y, y_plain) and torch.equal(x[:8], x_plain) and len(x) == 16
        assert not torch.equal(x[8:], x_plain)
        shown, other = x[:, 0].amax((1, 2)).round().long().chunk(2)  # above the zero padding
        assert torch.equal(other, partners[shown])
    assert torch.equal(paired.partners(3), partners) == (pairs == "view")


def test_partners_are_drawn_uniformly_from_the_whole_class():
    """CS-KD: the image itself included; so about one in five of five."""
    loader = loader_of(noise(13, 8), torch.arange(2).repeat_interleave(torch.tensor([5, 8])), pairs="class")
    drawn = torch.stack([loader.partners(epoch) for epoch in range(2000)])  # (2000, 13)
    counts = torch.stack([(drawn == i).sum(0) for i in range(13)])  # how often i goes with j
    assert (counts[:5, :5] / 2000 - 0.2).abs().max() < 0.05 and (counts[5:, 5:] / 2000 - 0.125).abs().max() < 0.05
    assert counts[5:, :5].sum() == counts[:5, 5:].sum() == 0


def test_both_views_are_mixed_alike():
    """Same pairs, same lambda: the labels of the second half are those of the first."""
    for x, y in loader_of(flat(28, 32), batch_size=7, mix=MIXING["mixup"], pairs="view").epoch(1):
        a, b = x.amax((1, 2, 3)).chunk(2)  # where neither of the two images that are mixed shows its padding
        assert y.shape == (7, 28)
        assert_close(a, b)
        assert_close(a, y @ torch.arange(28.0), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------- many processes


@pytest.mark.parametrize("size, pairs, workers, mix", [
    (16, "class", 0, None), (72, None, 1, None), (72, "view", 0, None),
    (16, None, 0, "mixup"), (16, "view", 0, "cutmix"), (72, "view", 1, "mixup"),
])  # fmt: skip
def test_processes_share_the_draws_of_the_whole_batch(size, pairs, workers, mix):
    """Order, crops, flips and mixing: what two or three processes get together is what one gets, bit for bit."""

    def epoch(**kwargs):
        images, labels = noise(28, size), torch.arange(28) // 4
        kwargs |= dict(batch_size=12, workers=workers, pairs=pairs, mix=MIXING.get(mix))
        return list(loader_of(images, labels, **kwargs).epoch(3))

    whole = epoch()
    for n in (2, 3):
        parts = [epoch(rank=rank, processes=n) for rank in range(n)]
        for (x, y), *shares in zip(whole, *parts, strict=True):
            assert {len(share[1]) for share in shares} == {12 // n}
            assert all(share[0].is_contiguous(memory_format=torch.channels_last) for share in shares)
            halves = [share[0].chunk(2 if pairs else 1) for share in shares]
            assert torch.equal(torch.cat([torch.cat(half) for half in zip(*halves)]), x)
            assert torch.equal(torch.cat([share[1] for share in shares]), y)


def test_processes_evaluate_each_image_once_in_the_batches_of_one():
    loaders = [loader_of(noise(10, 8), train=False, rank=rank, processes=2) for rank in range(2)]
    seen = [[y.tolist() for _, y in loader.epoch()] for loader in loaders]
    assert seen == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]] and list(map(len, loaders)) == [2, 1]


# ------------------------------------------------------------------------------------------------- segmentation


def mask_loader(images, masks, size=64, train=True, **kwargs):
    kwargs = dict(batch_size=len(images), image_size=size, stats=RAW, classes=["a", "b", "c"]) | kwargs
    return data.MaskLoader(data.Split(images, masks), train=train, **kwargs)


def test_scale_flip_and_padding_of_training():
    """The shorter side is half to twice the crop; what becomes black is void, not background. Dark at the left."""
    images = torch.full((60, 40, 40, 3), 200, dtype=torch.uint8)
    images[:, :, :20] = 100
    ((x, y),) = mask_loader(images, torch.ones(60, 40, 40, dtype=torch.uint8)).epoch()
    assert x.shape == (60, 3, 64, 64) and y.shape == (60, 64, 64) and y.dtype == torch.int64
    assert set(y.unique().tolist()) == {1, data.VOID}
    assert (x[:, 0][y == data.VOID] < 130).all() and (x[:, 0][y == 1] > 45).all()  # blur mixes at the border
    inside = [(mask == 1).any(0).nonzero().flatten() for mask in y]
    assert 32 <= min(map(len, inside)) < 36 and max(map(len, inside)) == 64
    assert 15 < sum(image[0, 32, i[0] + 2] < image[0, 32, i[-1] - 2] for image, i in zip(x, inside)) < 45


def test_masks_are_resized_in_line_with_their_images():
    """Both hold the number of the row: no shift between them, at any size."""
    rows, shifts = torch.arange(200, dtype=torch.uint8)[:, None].repeat(1, 200), []
    resize = data.ShortestSize(range(65, 261))
    for seed in range(60):
        with data.seeded(seed):
            image, mask = resize(tv_tensors.Image(rows.repeat(3, 1, 1)), tv_tensors.Mask(rows))
        assert image.shape[1:] == mask.shape and 65 <= mask.shape[0] <= 260
        shifts.append((mask.float() - image[0].float()).mean())
    assert abs(sum(shifts) / len(shifts)) < 0.05  # torchvision's nearest: 0.67


def test_image_and_mask_stay_aligned():
    """Red where the label is 1: also after flip, scale, crop and blur, but for the pixels on the border."""
    coarse = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = (F.interpolate(coarse, (80, 100))[:, 0] < 0.5).byte()
    images = torch.stack([200 * masks, *2 * [torch.full_like(masks, 40)]], 3)
    ((x, y),) = mask_loader(images, masks).epoch()
    wrong = ((x[:, 0] > 100) != (y == 1)) & (y != data.VOID)
    assert wrong.float().mean((1, 2)).max() < 0.03 and (y == data.VOID).any()


def test_masks_are_evaluated_at_their_own_size():
    """The image is squeezed to the network's size, the mask is as it lies."""
    images, masks = noise(4, 70, 100), noise(4, 70, 100)[..., 0] % 3
    (x, labels), (_, last) = mask_loader(images, masks, train=False, batch_size=2).epoch()
    assert x.shape == (2, 3, 64, 64) and torch.equal(torch.stack([*labels, *last]), masks.long())
    assert_close(x[0], v2.Resize((64, 64))(images[0].permute(2, 0, 1)).float(), rtol=0, atol=1e-3)


def test_clean_drops_every_image_of_voc2012_that_voc2007_holds(tmp_path):
    """By the id without 2007_ before it: of the trainval list or of the test list; nothing else."""

    def ids(split):
        return [Path(image).stem for image in split.images]

    loaded = data.load_masks("voc", data_dir=voc_tree(tmp_path))
    kept = ["000032", "000039", "2008_000001", "2007_009999"]
    assert ids(loaded.train) == kept and ids(loaded.test) == ["000121", "000175"] and loaded.leaked == 0
    published = data.load_masks("voc", data_dir=tmp_path / "VOCdevkit", protocol="paper")
    assert set(ids(published.train)) == {*kept, "2007_000032", "2007_000121", "000175"} and published.leaked == 2
    assert [Path(mask).stem for mask in published.train.labels] == ids(published.train)
    assert len(loaded.classes) == 21 and loaded.classes[1] == "aeroplane" and loaded.classes[20] == "tvmonitor"
    (tmp_path / "VOCdevkit/classes.txt").write_text("sky\nroad\n")
    assert data.load_masks("voc", data_dir=tmp_path).classes == ["sky", "road"]


@pytest.mark.parametrize("exif", [False, True])
def test_masks_with_a_palette_are_read_as_class_numbers_and_fit_images_that_are_turned(tmp_path, exif):
    split = data.load_masks("voc", data_dir=voc_tree(tmp_path, exif)).test
    with Image.open(split.labels[0]) as mask:
        mask.putpalette(bytes(768))  # of 256 colours, else Pillow writes one bit a pixel
        mask.putpixel((0, 0), data.VOID)
        mask.save(split.labels[0])
    ((x, (mask, _)),) = mask_loader(split.images, split.labels, train=False).epoch()
    assert mask.shape == (72, 80) and mask.unique().tolist() == [0, 1, data.VOID]
    assert (x[0, :, :, 40:] > 125).all() and (x[0, :, :, :24] < 125).all() and mask[:, 40:].eq(1).all()


@pytest.mark.parametrize("broken, message", [
    (Image.new("P", (80, 70)), "the mask has 80x70 pixels, its image .*80x72"),
    (Image.new("L", (80, 72), 3), "the label 3 is neither a class, 0 to 2, nor void, 255"),
    (Image.new("RGB", (80, 72)), "the mask has mode RGB"),
])  # fmt: skip
def test_a_mask_that_does_not_fit_is_named(tmp_path, broken, message):
    split = data.load_masks("voc", data_dir=voc_tree(tmp_path)).test
    broken.save(split.labels[1])
    with pytest.raises(UserError, match=f"^{split.labels[1]}: {message}"):
        list(mask_loader(split.images, split.labels).epoch())
