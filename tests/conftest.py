import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or leaves anything in the folder in which pytest was started."""
    monkeypatch.chdir(tmp_path)


def voc_tree(root, exif=False):
    """A VOCdevkit of 80x72 px, label 1 in the right half; of VOC2012, some are VOC2007's."""
    lists = {"VOC2007/trainval": ["000032", "000039"], "VOC2007/test": ["000121", "000175"]}
    lists["VOC2012/trainval"] = ["2008_000001", "2007_000032", "2007_000121", "000175", "2007_009999"]
    image, mask, turned = Image.new("RGB", (80, 72), (20, 20, 20)), Image.new("P", (80, 72)), Image.Exif()
    for picture, value in ((image, (230, 230, 230)), (mask, 1)):
        picture.paste(value, (40, 0, 80, 72))
    mask.putpalette([0, 0, 0, 128, 0, 0])
    if exif:
        image, turned[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
    for name, ids in lists.items():
        for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
            (root / "VOCdevkit" / name[:7] / folder).mkdir(parents=True, exist_ok=True)
        (root / "VOCdevkit" / name[:7] / f"ImageSets/Segmentation/{name[8:]}.txt").write_text("\n".join(ids))
        for i in ids:
            image.save(root / "VOCdevkit" / name[:7] / f"JPEGImages/{i}.jpg", exif=turned)
            mask.save(root / "VOCdevkit" / name[:7] / f"SegmentationClass/{i}.png")
    return root
