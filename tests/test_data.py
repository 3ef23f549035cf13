"""Data sets as they are read, and the loaders with their randomness."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

from conftest import voc_tree
from experiments import data
from experiments.archives import UserError

RAW = ((0,) * 3, (1 / 255,) * 3)  # stats with which a loader yields pixels as they are
MIXING = {None: None} | {cls.__name__: cls(alpha=1.0, num_classes=28) for cls in (v2.MixUp, v2.CutMix)}


def pictures(*names, image=Image.new("RGB", (90, 90))):
    for path in map(Path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def noise(n, size, width=None):
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, size, width or size, 3), dtype=torch.uint8, generator=g)


def loader_of(images, labels=None, pairs=None, **kwargs):
    labels = torch.arange(len(images)) if labels is None else labels
    kwargs = dict(train=True, batch_size=4, image_size=images.shape[1], stats=RAW) | kwargs
    loader = data.make_loader(data.Split(images, labels), **kwargs)
    loader.pairs = pairs
    return loader


def joined(batches):
    """All images and all labels of an epoch."""
    return [torch.cat(parts) for parts in zip(*batches)]


# ------------------------------------------------------------------------------------------------- data sets


def test_shapes_are_always_the_same_and_their_masks_name_the_class():
    images, labels, masks = data.draw_shapes(3, 24, seed=5)
    assert torch.equal(images, data.draw_shapes(3, 24, seed=5)[0]) and images.shape == (24, 24, 24, 3)
    assert labels.tolist() == [c for c in range(8) for _ in range(3)]
    assert all(mask.unique().tolist() == [0, label + 1] for label, mask in zip(labels, masks))
    d = data.load("shapes", image_size=8)
    assert len(d.train) == 1600 and len(d.test) == 800 and not torch.equal(d.train.images[0], d.test.images[0])


def test_class_folders_are_read_in_sorted_order_and_notes_say_what_is_not_read():
    """Hidden files apart. A test split that lacks a class leaves the numbers of the others as they are."""
    files = [f"train/{c}/{place}{i}.png" for c in "ab" for place in ("", "deep/") for i in (0, 1, 10)]
    pictures(*files, "valid/b/0.png", "train/a/a.gif", "valid/b.png", "test/b/0.png")
    pictures("train/.ipynb_checkpoints/0.png", "train/__MACOSX/a/0.png", "train/a/.x/0.png", "valid/b/._0.png")
    Path("train/a/Thumbs.db").write_bytes(b"")
    for per_class, read in ((None, files), (2, files[:2] + files[6:8])):
        d = data.load("folder", data_dir=".", image_size=72, per_class=per_class)
        assert d.train.images == read and d.test.images == ["valid/b/0.png"] and d.test.labels.tolist() == [1]
        assert [d.classes[label] for label in d.train.labels] == [name[6] for name in read]
    unused = "2 files are not used: no image's ending, or in no class folder, first train/a/a.gif"
    assert d.test_name == "valid" and d.notes == ("evaluated on valid; not read: test", unused)


def test_folders_that_make_no_classifier_are_refused():
    pictures("train/a/0.png", "val/a/0.png", "val/b/0.png")
    with pytest.raises(UserError, match="val has the class b, which train lacks"):
        data.load("folder", data_dir=".")
    Path("train/b").mkdir()
    with pytest.raises(UserError, match="train/b has no image"):
        data.load("folder", data_dir=".")


@pytest.fixture
def cifar100(monkeypatch):
    """Three classes in the layout of CIFAR-100's archive, images shuffled, and the same images as class folders."""
    classes, folders = ["apple", "bear", "worm"], []
    files = {"meta": {"fine_label_names": classes}}
    for split, n in (("train", 12), ("test", 6)):
        images, labels = noise(n, 32), [i % 3 for i in range(n)]
        names = [f"{classes[label]}_s_{7 * i % n:06}.png" for i, label in enumerate(labels)]
        files[split] = dict(data=images.permute(0, 3, 1, 2).flatten(1).numpy(), fine_labels=labels, filenames=names)
        folders.append([(name, n // 3) for name in classes])
        for image, label, name in zip(images, labels, names):
            pictures(f"folders/{split}/{classes[label]}/{name}", image=Image.fromarray(image.numpy()))
    archive = Path("archive/cifar-100-python")
    archive.mkdir(parents=True)
    for name, content in files.items():
        (archive / name).write_bytes(pickle.dumps(content))
    cifar = torchvision.datasets.CIFAR100  # the real reader, without its checksums
    monkeypatch.setattr(cifar, "train_list", [["train", None]])
    monkeypatch.setattr(cifar, "test_list", [["test", None]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": None})
    monkeypatch.setattr(data, "CIFAR100_FOLDERS", hashlib.sha256(repr(folders).encode()).hexdigest())


def test_cifar100_is_the_same_from_its_archive_and_from_class_folders(cifar100):
    places = ("archive", "archive/cifar-100-python", "folders")
    first, *others = [data.load("cifar100", data_dir=place, image_size=24) for place in places]
    assert first.train.images.shape == (12, 24, 24, 3) and len(first.test) == 6
    for other in others:
        assert other.classes == first.classes == ["apple", "bear", "worm"]
        for a, b in ((first.train, other.train), (first.test, other.test)):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_cifar100_that_is_not_whole_is_refused(cifar100):
    next(Path("folders/test/worm").iterdir()).unlink()
    Path("archive/cifar-100-python/test").unlink()
    for place in ("folders", "archive"):
        with pytest.raises(UserError, match=f"{place}.*cifar-100-python.tar.gz into .*, or pass --download"):
            data.load("cifar100", data_dir=place)


# ------------------------------------------------------------------------------------------------- images


@pytest.mark.filterwarnings("error")
def test_a_palette_becomes_rgb_without_a_warning_and_more_than_8_bits_are_refused():
    palette = Image.new("P", (9, 7))
    palette.putpalette(bytes(768))
    palette.save("palette.png", transparency=bytes(range(256)))
    assert data.read_image("palette.png").mode == "RGB"
    Image.new("I;16", (9, 7)).save("deep.png")
    with pytest.raises(UserError, match="deep.png.*more than 8 bits a channel, mode I;16"):
        data.read_image("deep.png")


def test_images_are_turned_as_viewers_show_them():
    """Orientation 6: stored turned by a quarter. EXIF data that is broken turns nothing."""
    upright, exif = Image.fromarray(noise(1, 40, 60)[0].numpy()), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    assert data.read_image("turned.png").tobytes() == upright.tobytes()
    turn, text = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0", b"\x01\x19\0\x02\0\0\0\4abc\0"  # a text for a number
    upright.save("broken.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + turn + text + b"\0\0\0\0")
    assert data.read_image("broken.jpg").size == (60, 40)


@pytest.mark.parametrize("size, workers", [(16, 0), (72, 1)])
def test_an_unreadable_image_is_named_in_one_line(size, workers):
    pictures("train/a/0.png", "train/b/0.png", "test/a/0.png")
    broken = Path("train/b/0.png")
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=f"^{broken}: not a readable image [^\n]*$"):
        split = data.load("folder", data_dir=".", image_size=size).train
        list(data.make_loader(split, train=True, batch_size=2, image_size=size, workers=workers).epoch())


# ------------------------------------------------------------------------------------- loaders and their randomness


def test_small_images_are_cropped_from_a_zero_padding_of_4_and_flipped():
    """Sec. 4.1: "random cropping and flipping". Each result is a window of its image, and all offsets occur."""
    padded, seen = F.pad(noise(60, 8).permute(0, 3, 1, 2), (4, 4, 4, 4)), []
    for x, y in loader_of(noise(60, 8)).epoch(3):
        windows = padded[y].unfold(2, 8, 1).unfold(3, 8, 1)  # (B, 3, 9, 9, 8, 8)
        for flip, upright in ((0, x), (1, x.flip(3))):
            hits = (windows == upright.round()[:, :, None, None]).all(-1).all(-1).all(1)  # (B, 9, 9)
            seen += [(top, left, flip) for _, top, left in hits.nonzero().tolist()]
    tops, lefts, flips = zip(*seen)
    assert len(seen) == 60 and set(tops) == set(lefts) == set(range(9)) and 15 < sum(flips) < 45


def test_small_test_images_are_only_normalised():
    images, mean, std = noise(10, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x, _ = joined(loader_of(images, train=False, stats=(mean, std)).epoch())
    assert_close(x, (images / 255 - torch.tensor(mean)).div(torch.tensor(std)).permute(0, 3, 1, 2))


def test_large_test_images_are_resized_to_8_7_and_cropped():
    """A white frame of an eighth a side, around black: the centre crop of 7/8 leaves a sixteenth less of it."""
    images = F.pad(torch.zeros(1, 120, 120, 3, dtype=torch.uint8), (0, 0, 20, 20, 20, 20), value=255)
    ((x, _),) = loader_of(images, train=False, image_size=140).epoch()
    frame = [255] * 10 + [0] * 120 + [255] * 10
    assert x[0, 0, 70].round().tolist() == x[0, 0, :, 70].round().tolist() == frame


def test_large_images_are_cropped_at_random_and_flipped():
    images = torch.arange(90, dtype=torch.uint8).view(1, 1, 90, 1).expand(40, 90, 90, 3)  # a column is its number
    x, _ = joined(loader_of(images, image_size=72).epoch())
    widths = x[:, 0, 0, -1] - x[:, 0, 0, 0]  # negative where it is flipped
    assert 10 < (widths < 0).sum() < 30 and widths.abs().min() < 45 and widths.abs().max() > 70


@pytest.mark.parametrize("size, workers", [(8, 0), (72, 2)])
def test_what_is_drawn_depends_on_seed_and_epoch_alone(size, workers):
    """Order, augmentation and mixing, not on workers; the global generator, which dropout reads, is left alone."""
    torch.manual_seed(0)
    loader, again, other = (loader_of(noise(12, size), seed=s, workers=w) for s, w in ((1, workers), (1, 0), (2, 0)))
    list(loader.epoch(0))
    x, y = joined(loader.epoch(5))
    assert all(map(torch.equal, (x, y), joined(again.epoch(5))))
    for x_other, y_other in (joined(loader.epoch(6)), joined(other.epoch(5))):
        assert not torch.equal(y, y_other) and not torch.equal(x[y.argsort()], x_other[y_other.argsort()])
    loader.mix = other.mix = MIXING["MixUp"]
    mixed = [*loader.epoch(5), *loader.epoch(6), *other.epoch(5)]
    assert len({y.max().item() for _, y in mixed}) == 9  # another lambda each step
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("size, workers", [(8, 0), (72, 2)])
@pytest.mark.parametrize("pairs, others", [("view", [0]), ("class", [0, 1, 2, 3, 4])])
def test_what_goes_with_each_image(pairs, others, size, workers):
    """Behind the B images, which are those without pairs, B more: a view of the same, or any image of its class."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([5, 10, 15]))
    images = noise(30, size)
    images[..., 0] = torch.arange(30).view(-1, 1, 1)  # red is its number
    plain, paired = (loader_of(images, labels, p, batch_size=8, seed=1, workers=workers) for p in (None, pairs))
    for (x, y), (x_plain, y_plain) in zip(paired.epoch(2), plain.epoch(2), strict=True):
        assert torch.equal(y, y_plain) and torch.equal(x[:8], x_plain) and not torch.equal(x[8:], x_plain)
        first, second = x[:, 0].amax((1, 2)).round().long().chunk(2)  # above the zero padding
        assert torch.equal(second, paired.partners(2)[first]) and torch.equal(labels[second], y)
    assert sorted({paired.partners(epoch)[0].item() for epoch in range(99)}) == others


def test_both_views_are_mixed_alike():
    """Same pairs, same lambda: the labels of the second half are those of the first."""
    images = torch.arange(28, dtype=torch.uint8).view(-1, 1, 1, 1).expand(28, 32, 32, 3)
    for x, y in loader_of(images, batch_size=7, mix=MIXING["MixUp"], pairs="view").epoch(1):
        shown = x.amax((1, 2, 3)).view(2, 7)  # where neither of the two images that are mixed shows its padding
        assert_close(shown, (y @ torch.arange(28.0)).expand(2, 7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, pairs, workers, mix", [
    (16, "class", 0, None), (72, None, 1, None), (16, "view", 0, "CutMix"), (72, "view", 0, "MixUp"),
])  # fmt: skip
def test_processes_share_the_draws_of_the_whole_batch(size, pairs, workers, mix):
    """Order, crops, flips and mixing: what three processes get together is what one gets, bit for bit."""

    def epoch(**kwargs):
        loader = loader_of(noise(28, size), torch.arange(28) // 4, pairs, batch_size=12, mix=MIXING[mix], **kwargs)
        return loader.epoch(3)

    shares = zip(*[epoch(rank=rank, processes=3, workers=workers) for rank in range(3)])
    for (x, y), parts in zip(epoch(), shares, strict=True):
        images, labels = zip(*parts)
        halves = [image.unflatten(0, (2 if pairs else 1, -1)) for image in images]
        assert torch.equal(torch.cat(halves, 1).flatten(0, 1), x) and torch.equal(torch.cat(labels), y)
        assert all(image.is_contiguous(memory_format=torch.channels_last) for image in images)


def test_training_drops_the_last_partial_batch_and_processes_evaluate_each_image_once():
    assert [len(y.unique()) for _, y in loader_of(noise(10, 8)).epoch()] == [4, 4]
    loaders = [loader_of(noise(10, 8), train=False, rank=rank, processes=2) for rank in range(2)]
    seen = [[y.tolist() for _, y in loader.epoch()] for loader in loaders]
    assert seen == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]] and list(map(len, loaders)) == [2, 1]


# ------------------------------------------------------------------------------------------------- segmentation


def mask_loader(images, masks, train=True, **kwargs):
    kwargs = dict(batch_size=len(images), image_size=64, stats=RAW, classes=["a", "b", "c"]) | kwargs
    return data.MaskLoader(data.Split(images, masks), train=train, **kwargs)


def test_scale_flip_and_padding_of_training():
    """The shorter side is half to twice the crop; what becomes black is void, not background. Dark at the left."""
    images = torch.full((60, 40, 40, 3), 200, dtype=torch.uint8)
    images[:, :, :20] = 100
    ((x, y),) = mask_loader(images, torch.ones(60, 40, 40, dtype=torch.uint8)).epoch()
    assert x.shape == (60, 3, 64, 64) and y.dtype == torch.int64 and y.unique().tolist() == [1, data.VOID]
    assert (x[:, 0][y == data.VOID] < 130).all() and (x[:, 0][y == 1] > 45).all()  # blur mixes at the border
    inside = [(mask == 1).any(0).nonzero().flatten() for mask in y]
    assert 32 <= min(map(len, inside)) < 36 and max(map(len, inside)) == 64
    assert 15 < sum(image[0, 32, i[0] + 2] < image[0, 32, i[-1] - 2] for image, i in zip(x, inside)) < 45


def test_masks_stay_in_line_with_their_images():
    """Both hold row + column: alike after flip, scale, crop and blur, not half a pixel apart as by torchvision."""
    masks = (torch.arange(80)[:, None] + torch.arange(100)).byte().expand(60, 80, 100)
    ((x, y),) = mask_loader(masks[..., None].expand(60, 80, 100, 3), masks).epoch()
    inside = F.max_pool2d((y == data.VOID).float(), 7, 1, 3) == 0  # where the padding is not blurred into the image
    apart = (x[:, 0] - y)[inside]
    assert apart.abs().max() < 5 and apart.mean().abs() < 0.05 and not inside.all()


def test_masks_are_evaluated_at_their_own_size():
    """The image is squeezed to the network's size, the mask is as it lies."""
    images, masks = noise(2, 70, 100), noise(2, 70, 100)[..., 0] % 3
    ((x, labels),) = mask_loader(images, masks, train=False).epoch()
    assert torch.equal(torch.stack(labels), masks.long())
    assert_close(x, v2.Resize((64, 64))(images.permute(0, 3, 1, 2)).float(), rtol=0, atol=1e-3)


def test_clean_drops_every_image_of_voc2012_that_voc2007_holds(tmp_path, monkeypatch):
    """By the id without 2007_ before it: of the trainval list or of the test list; nothing else."""

    def ids(paths):
        return [Path(path).stem for path in paths]

    loaded = data.load_masks("voc", data_dir=voc_tree(tmp_path))
    kept = ["000032", "000039", "2008_000001", "2007_009999"]
    assert ids(loaded.train.images) == kept and loaded.leaked == 0
    assert ids(loaded.test.images) == ids(loaded.test.labels) == ["000121", "000175"]
    assert len(loaded.classes) == 21 and loaded.classes[1] == "aeroplane" and loaded.classes[20] == "tvmonitor"
    monkeypatch.chdir("VOCdevkit")
    Path("classes.txt").write_text("sky\nroad\n")
    paper = data.load_masks("voc", data_dir=".", protocol="paper")
    assert set(ids(paper.train.images)) == {*kept, "2007_000032", "2007_000121", "000175"} and paper.leaked == 2
    assert ids(paper.train.labels) == ids(paper.train.images) and paper.classes == ["sky", "road"]


def test_masks_with_a_palette_are_read_as_class_numbers_and_fit_images_that_are_turned(tmp_path):
    split = data.load_masks("voc", data_dir=voc_tree(tmp_path, exif=True)).test
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
