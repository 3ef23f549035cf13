"""Data sets as they are read, and the loaders with their randomness."""

import hashlib
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


def class_folders(root, per_class=4, size=16, classes=3, splits=("train", "test")):
    """Drawn shapes as PNG class folders, and what Mac and Jupyter leave beside them."""
    for k, split in enumerate(splits):
        images, labels, _ = data.draw_shapes(per_class, min(size, 96), seed=k)
        for i in range(classes * per_class):
            path = root / split / f"class{labels[i]}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].numpy()).resize((size, size)).save(path)
            path.with_name(f"._{i:03}.png").write_bytes(b"\0\5\x16\7")
        (root / split / ".ipynb_checkpoints").mkdir()
        (root / split / "__MACOSX/class0").mkdir(parents=True)
        (root / split / "Thumbs.db").write_bytes(b"")
    return root


def noise(n, size, width=None):
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, size, width or size, 3), dtype=torch.uint8, generator=g)


def flat(n, size=8):
    """Image i is all i."""
    return torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, size, size, 3)


def loader_of(images, labels=None, **kwargs):
    labels = torch.arange(len(images)) if labels is None else labels
    kwargs = dict(train=True, batch_size=4, image_size=images.shape[1], stats=RAW) | kwargs
    return data.make_loader(data.Split(images, labels), **kwargs)


# ------------------------------------------------------------------------------------------------- data sets


def test_shapes_are_always_the_same_and_their_masks_name_the_class():
    images, labels, masks = data.draw_shapes(3, 24, seed=5)
    assert torch.equal(images, data.draw_shapes(3, 24, seed=5)[0]) and images.shape == (24, 24, 24, 3)
    assert labels.tolist() == [c for c in range(8) for _ in range(3)]
    assert all(mask.unique().tolist() == [0, label + 1] for label, mask in zip(labels, masks))


def test_training_and_test_shapes_differ():
    d = data.load("shapes", image_size=8)
    assert len(d.train) == 1600 and len(d.test) == 800
    seen = {image.numpy().tobytes() for image in d.train.images}
    assert not any(image.numpy().tobytes() in seen for image in d.test.images)


def test_per_class_takes_the_first_images_of_each_class_in_sorted_order(tmp_path):
    class_folders(tmp_path)
    d = data.load("folder", data_dir=tmp_path, image_size=72, per_class=2)
    names = [Path(path).relative_to(tmp_path).as_posix() for path in d.train.images]
    assert names == [f"train/class{c}/{4 * c + i:03}.png" for c in range(3) for i in range(2)]
    assert d.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(d.test) == 12
    with pytest.raises(UserError, match="class class0 has 4 training images, fewer than --per-class 5"):
        data.load("folder", data_dir=tmp_path, per_class=5)


def test_hidden_files_and_folders_are_no_data(tmp_path):
    d = data.load("folder", data_dir=class_folders(tmp_path))
    assert d.classes == ["class0", "class1", "class2"] and len(d.train) == len(d.test) == 12 and not d.notes


def test_folder_is_evaluated_on_val_by_any_name_before_test_and_says_so(tmp_path):
    for name, note in (("test", ()), ("validation", ("test",)), ("valid", ("validation", "test"))):
        class_folders(tmp_path, per_class=1, splits=(name,) if note else ("train", name))
        d = data.load("folder", data_dir=tmp_path)
        assert d.test_name == name
        assert d.notes == ((f"evaluated on {tmp_path / name}; not read: {', '.join(note)}",) if note else ())


def test_files_that_are_not_used_are_told(tmp_path):
    class_folders(tmp_path)
    for path in ("train/class0/a.gif", "test/b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / path)
    (note,) = data.load("folder", data_dir=tmp_path).notes
    assert note.startswith("2 files are not used") and note.endswith(f"first {tmp_path / 'train/class0/a.gif'}")


def test_folders_that_make_no_classifier_are_refused(tmp_path):
    with pytest.raises(UserError, match="needs train/<class>"):
        data.load("folder", data_dir=tmp_path)
    class_folders(tmp_path, classes=1, splits=("train",))
    class_folders(tmp_path, classes=2, splits=("val",))
    with pytest.raises(UserError, match="val has the class class1, which .*train lacks"):
        data.load("folder", data_dir=tmp_path)
    (tmp_path / "train/class1").mkdir()
    with pytest.raises(UserError, match="class1 has no image"):
        data.load("folder", data_dir=tmp_path)


def test_test_labels_follow_the_training_classes(tmp_path):
    """A class that the test split lacks leaves the numbers of the others as they are."""
    (class_folders(tmp_path) / "test/class0").rename(tmp_path / "elsewhere")
    assert set(data.load("folder", data_dir=tmp_path).test.labels.tolist()) == {1, 2}


def test_a_folders_size_is_that_of_its_first_image_up_to_64_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for size, expected in ((20, 20), (65, 224)):
        class_folders(tmp_path / str(size), per_class=1, size=size)
        assert data.folder_image_size(f"~/{size}") == expected


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """An archive in CIFAR-100's layout, images shuffled, and its images as class folders; 2 and 1 a class."""
    archive, names = tmp_path / "archive/cifar-100-python", data.CIFAR100_CLASSES
    archive.mkdir(parents=True)
    files = {"meta": {"fine_label_names": names}}
    for split, n in (("train", 2), ("test", 1)):
        images = noise(100 * n, 32).flip(0) if split == "test" else noise(100 * n, 32)
        labels = torch.randperm(100 * n, generator=torch.Generator().manual_seed(n)) % 100
        written = [f"{names[label]}_s_{(7 * i) % 300:06}.png" for i, label in enumerate(labels)]
        planes = images.permute(0, 3, 1, 2).flatten(1).numpy()
        files[split] = {"data": planes, "fine_labels": labels.tolist(), "filenames": written}
        for image, label, name in zip(images, labels, written):
            path = tmp_path / "folders" / split / names[label] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path)
    sums = {name: hashlib.md5(pickle.dumps(content)).hexdigest() for name, content in files.items()}
    for name, content in files.items():
        (archive / name).write_bytes(pickle.dumps(content))
    cifar = torchvision.datasets.CIFAR100  # the real reader, told the checksums of this archive
    monkeypatch.setattr(cifar, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["meta"]})
    monkeypatch.setattr(data, "CIFAR100_COUNTS", {"train": 2, "test": 1})
    return tmp_path


def test_cifar100_is_the_same_from_its_archive_and_from_class_folders(cifar100):
    places = ("archive", "archive/cifar-100-python", "folders")
    first, *others = [data.load("cifar100", data_dir=cifar100 / place) for place in places]
    assert len(first.classes) == 100 and len(first.train) == 200 and len(first.test) == 100
    for other in others:
        assert other.classes == first.classes
        for a, b in ((first.train, other.train), (first.test, other.test)):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_cifar100_that_is_not_whole_is_refused(cifar100):
    (cifar100 / "folders/train/apple/._x.png").write_bytes(b"")  # hidden: counts for nothing
    data.load("cifar100", data_dir=cifar100 / "folders")
    next((cifar100 / "folders/test/worm").iterdir()).unlink()
    (cifar100 / "archive/cifar-100-python/test").write_bytes(b"junk")
    for place in ("folders", "archive", "nowhere"):
        with pytest.raises(UserError, match=f"{place}.*cifar-100-python.tar.gz into .*, or pass --download"):
            data.load("cifar100", data_dir=cifar100 / place)


# ------------------------------------------------------------------------------------------------- images


def test_images_of_any_mode_become_rgb_and_more_than_8_bits_are_refused(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1", "LA"):
        path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
        Image.new(mode, (9, 7)).save(path)
        assert data.read_image(path).mode == "RGB"
    for mode, name in (("F", "float.tif"), ("I;16", "deep.png")):
        Image.new(mode, (9, 7)).save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}.*more than 8 bits a channel, mode {mode}"):
            data.read_image(tmp_path / name)


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = Image.new("P", (9, 7), 5)
    image.putpalette([i % 256 for i in range(768)])
    image.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.read_image(tmp_path / "palette.png").getpixel((0, 0)) == (15, 16, 17)


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
    broken = class_folders(tmp_path, size=90) / "train/class1/005.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UserError, match=f"^{broken}: not a readable image [^\n]*$"):
        split = data.load("folder", data_dir=tmp_path, image_size=size).train
        list(data.make_loader(split, train=True, batch_size=12, image_size=size, workers=workers).epoch())


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


def test_test_images_are_only_normalised():
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


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    def epoch(loader, e):
        x, y = (torch.cat(parts) for parts in zip(*loader.epoch(e)))
        return y, x[y.argsort()]  # the order; the augmented images, image by image

    first, second, other = (loader_of(noise(12, 8), seed=seed) for seed in (1, 1, 2))
    list(first.epoch(0))
    reference = epoch(first, 5)
    assert all(map(torch.equal, reference, epoch(second, 5)))
    for differs in (epoch(first, 6), epoch(other, 5)):
        assert not torch.equal(reference[0], differs[0]) and not torch.equal(reference[1], differs[1])


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
        epochs.append([x for e in (0, 1) for x, _ in loader.epoch(e)])
    assert epochs[0][0].shape == (5, 3, 72, 72) and epochs[0][0].is_contiguous(memory_format=torch.channels_last)
    for other in epochs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(epochs[0], other, strict=True))
    for loader in (loader, mask_loader(noise(4, 80), torch.ones(4, 80, 80, dtype=torch.uint8))):
        dataset, *_ = pickle.loads(pickle.dumps((loader.dataset, loader.collate, data.init_worker)))
        assert torch.equal(dataset[3, 1][0], loader.dataset[3, 1][0])
        assert not torch.equal(dataset[3, 1][0], dataset[4, 1][0])


@pytest.mark.parametrize("size", [8, 72])
def test_mixing_depends_on_seed_epoch_and_step_alone(size):
    """The global generator, which dropout reads, is left alone."""
    mix = v2.MixUp(alpha=1.0, num_classes=12)
    a, b, other = (loader_of(noise(12, size), seed=seed, mix=mix) for seed in (1, 1, 2))
    torch.manual_seed(0)
    reference = list(a.epoch(3))
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(p, q) for one, two in zip(reference, b.epoch(3)) for p, q in zip(one, two))
    shares = [y.max().item() for loader, e in ((a, 3), (a, 4), (other, 3)) for _, y in loader.epoch(e)]
    assert len(set(shares)) == 9


@pytest.mark.parametrize("size, workers", [(8, 0), (72, 2)])
@pytest.mark.parametrize("pairs", ["view", "class"])
def test_what_goes_with_each_image(pairs, size, workers):
    """Behind the B images, which are those without pairs, B others: a view of the same, or an image of its class."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([5, 10, 15]))
    plain, paired = (loader_of(flat(30, size), labels, batch_size=8, seed=1, workers=w) for w in (0, workers))
    paired.pairs = pairs
    partners = paired.partners(2)
    assert torch.equal(labels[partners], labels) and torch.equal(partners, torch.arange(30)) == (pairs == "view")
    for (x, y), (x_plain, y_plain) in zip(paired.epoch(2), plain.epoch(2), strict=True):
        assert torch.equal(y, y_plain) and torch.equal(x[:8], x_plain) and len(x) == 16
        shown, other = x.amax((1, 2, 3)).round().long().chunk(2)  # above the zero padding
        assert torch.equal(other, partners[shown])
    assert torch.equal(paired.partners(3), partners) == (pairs == "view")


def test_partners_are_drawn_uniformly_from_the_whole_class():
    """CS-KD: the image itself included; so about one in five of five."""
    loader = loader_of(noise(13, 8), torch.arange(2).repeat_interleave(torch.tensor([5, 8])))
    loader.pairs = "class"
    drawn = torch.stack([loader.partners(epoch) for epoch in range(2000)])  # (2000, 13)
    counts = torch.stack([(drawn == i).sum(0) for i in range(13)])  # how often i goes with j
    assert (counts[:5, :5] / 2000 - 0.2).abs().max() < 0.05 and (counts[5:, 5:] / 2000 - 0.125).abs().max() < 0.05
    assert counts[5:, :5].sum() == counts[:5, 5:].sum() == 0


def test_both_views_are_mixed_alike():
    """Same pairs, same lambda: the labels of the second half are those of the first."""
    loader = loader_of(flat(40), train=False, batch_size=10, mix=v2.MixUp(alpha=1.0, num_classes=40))
    loader.pairs = "view"
    for x, y in loader.epoch(1):
        a, b = x.mean((1, 2, 3)).chunk(2)
        assert y.shape == (10, 40)
        assert_close(a, b)
        assert_close(a, y @ torch.arange(40.0), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------- many processes


@pytest.mark.parametrize("size, pairs, workers", [(16, "class", 0), (72, None, 1), (72, "view", 0)])
def test_processes_share_the_draws_of_the_whole_batch(size, pairs, workers):
    """Order, crops and flips: what two or three processes get together is what one gets, bit for bit."""

    def epoch(**kwargs):
        loader = loader_of(noise(28, size), torch.arange(28) // 4, batch_size=12, workers=workers, **kwargs)
        loader.pairs = pairs
        return list(loader.epoch(3))

    whole = epoch()
    for n in (2, 3):
        parts = [epoch(rank=rank, processes=n) for rank in range(n)]
        for (x, y), *shares in zip(whole, *parts, strict=True):
            assert {len(share[1]) for share in shares} == {12 // n}
            halves = [share[0].chunk(2 if pairs else 1) for share in shares]
            assert torch.equal(torch.cat([torch.cat(half) for half in zip(*halves)]), x)
            assert torch.equal(torch.cat([share[1] for share in shares]), y)


def test_processes_mix_by_the_same_share():
    """lambda, and the box of CutMix, are the batch's; only the pairs are made within a process."""
    kwargs = dict(batch_size=8, mix=v2.CutMix(alpha=1.0, num_classes=10))
    loaders = [loader_of(noise(8, 8), rank=r, processes=n, **kwargs) for r, n in ((0, 1), (0, 2), (1, 2))]
    shares = [set(next(loader.epoch(0))[1].flatten().tolist()) for loader in loaders]
    assert shares[0] == shares[1] == shares[2]


def test_processes_evaluate_each_image_once_in_the_batches_of_one():
    loaders = [loader_of(noise(10, 8), train=False, rank=rank, processes=2) for rank in range(2)]
    seen = [[y.tolist() for _, y in loader.epoch()] for loader in loaders]
    assert seen == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]] and list(map(len, loaders)) == [2, 1]


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="--batch-size 12 is larger than the training set of 9 images"):
        loader_of(noise(9, 8), batch_size=12)
    with pytest.raises(UserError, match="--batch-size 8 is not divisible by the 3 processes"):
        loader_of(noise(9, 8), batch_size=8, processes=3)
    assert len(list(loader_of(noise(2, 8), batch_size=12, train=False).epoch())) == 1


# ------------------------------------------------------------------------------------------------- segmentation


def mask_loader(images, masks, size=64, train=True, **kwargs):
    kwargs = dict(batch_size=len(images), image_size=size, stats=RAW, classes=["a", "b", "c"]) | kwargs
    return data.MaskLoader(data.Split(images, masks), train=train, **kwargs)


def test_padding_is_void_not_background():
    """White images, class 1 everywhere: what becomes black is void, and nothing is labelled 0."""
    loader = mask_loader(torch.full((24, 64, 64, 3), 255, dtype=torch.uint8), torch.ones(24, 64, 64, dtype=torch.uint8))
    ((x, y),) = loader.epoch()
    assert x.shape == (24, 3, 64, 64) and y.shape == (24, 64, 64) and y.dtype == torch.int64
    padded = (y == data.VOID).any(2).any(1)
    assert 3 < padded.sum() < 21 and set(y.unique().tolist()) == {1, data.VOID}
    assert (x[:, 0][y == data.VOID] < 130).all() and (x[:, 0][y == 1] > 125).all()  # blur mixes at the border


def test_masks_are_resized_in_line_with_their_images():
    """Both hold the number of the row: no shift between them, at any size."""
    rows = torch.arange(200, dtype=torch.uint8)[:, None].repeat(1, 200)
    loader, shifts = mask_loader(rows[None, ..., None].repeat(1, 1, 1, 3), rows[None], 130), []
    resize = loader.dataset.transform.transforms[0]
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


def test_augmentation_scales_the_shorter_side_to_half_and_twice_the_crop_and_flips():
    """Each image is dark at the left; its scale is told by the width of what is not padding."""
    images = torch.full((60, 40, 40, 3), 200, dtype=torch.uint8)
    images[:, :, :20] = 100
    ((x, y),) = mask_loader(images, torch.ones(60, 40, 40, dtype=torch.uint8)).epoch()
    inside = [(mask == 1).any(0).nonzero().flatten() for mask in y]
    assert 32 <= min(map(len, inside)) < 36 and max(map(len, inside)) == 64
    assert 15 < sum(image[0, 32, i[0] + 2] < image[0, 32, i[-1] - 2] for image, i in zip(x, inside)) < 45


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
    ((x, (mask, _)),) = mask_loader(split.images, split.labels, train=False).epoch()
    assert mask.shape == (72, 80) and mask.unique().tolist() == [0, 1]
    assert (x[0, :, :, 40:] > 125).all() and (x[0, :, :, :24] < 125).all() and mask[:, 40:].eq(1).all()


@pytest.mark.parametrize(
    "broken, message",
    [
        (Image.new("P", (80, 70)), "the mask has 80x70 pixels, its image .*80x72"),
        (Image.new("L", (80, 72), 3), "the label 3 is neither a class, 0 to 2, nor void, 255"),
        (Image.new("RGB", (80, 72)), "not a readable mask .mode RGB"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_a_mask_that_does_not_fit_is_named(tmp_path, broken, message, train):
    split = data.load_masks("voc", data_dir=voc_tree(tmp_path)).test
    broken.save(split.labels[1])
    with pytest.raises(UserError, match=f"^{split.labels[1]}: {message}"):
        list(mask_loader(split.images, split.labels, train=train).epoch())
