import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rehearsal import accelerator
from transformers import CLIPImageProcessor, ConvNextImageProcessor, MobileViTImageProcessor, ViTImageProcessor

from xai_helpers.imagenet import efficientnet_lite
from xai_helpers.pictures import read_picture, seen_box, to_original, widened

EXIF_ORIENTATION = 0x0112


def row(mode, *pixels):
    """A picture of one row of pixels."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def palette(transparency=None):
    image = row("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def grey(*levels):
    return [(level,) * 3 for level in levels]


WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        pytest.param(row("RGB", (1, 2, 3), RED), [(1, 2, 3), RED], id="RGB"),
        pytest.param(row("1", 0, 255), grey(0, 255), id="1"),
        pytest.param(row("L", 0, 77, 255), grey(0, 77, 255), id="L"),
        # Half transparent black on white: 255 * (1 - 128 / 255).
        pytest.param(row("LA", (10, 255), (10, 0), (0, 128)), grey(10, 255, 127), id="LA"),
        # A fifth of blue on white: 255 * 4 / 5.
        pytest.param(row("RGBA", (*RED, 255), (*RED, 0), (*BLUE, 51)), [RED, WHITE, (204, 204, 255)], id="RGBA"),
        # Premultiplied, so 100 with an opacity of 128 was 199 before: the same half transparent grey.
        pytest.param(row("La", (10, 255), (0, 128)), grey(10, 127), id="La"),
        pytest.param(palette(), [RED, GREEN], id="P"),
        pytest.param(palette(transparency=1), [RED, WHITE], id="P with a transparent colour"),
        pytest.param(palette(transparency=bytes([0, 255])), [WHITE, GREEN], id="P with an opacity a colour"),
        pytest.param(row("CMYK", (0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)), [WHITE, RED, (0, 0, 0)], id="CMYK"),
        pytest.param(row("YCbCr", (99, 128, 128)), grey(99), id="YCbCr"),
        # 13107 is a fifth of 65535, and 51 a fifth of 255.
        pytest.param(Image.fromarray(np.array([[0, 13107, 65535]], np.uint16)), grey(0, 51, 255), id="I;16"),
        pytest.param(Image.fromarray(np.array([[1000, 1200, 2000]], np.uint16)), grey(0, 51, 255), id="dark I;16"),
        pytest.param(Image.fromarray(np.full((1, 2), 300, np.uint16)), grey(0, 0), id="flat I;16"),
        pytest.param(Image.fromarray(np.array([[-500, 0, 2000]], np.int32)), grey(0, 51, 255), id="I"),
        pytest.param(Image.fromarray(np.array([[-1, -0.6, 1]], np.float32)), grey(0, 51, 255), id="F"),
        pytest.param(Image.fromarray(np.full((1, 2), 7, np.float32)), grey(0, 0), id="F of one value"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_rgb(image, wanted):
    before = image.tobytes()
    found = read_picture(image)
    assert found.mode == "RGB" and found.size == image.size
    assert np.asarray(found).tolist() == [[list(colour) for colour in wanted]]
    assert image.tobytes() == before


def test_one_transparent_colour_of_an_rgb_file(tmp_path):
    row("RGB", RED, GREEN).save(tmp_path / "keyed.png", transparency=RED)
    assert np.asarray(read_picture(tmp_path / "keyed.png")).tolist() == [[list(WHITE), list(GREEN)]]


def test_sixteen_bit_file(tmp_path):
    Image.fromarray(np.array([[0, 13107], [26214, 65535]], np.uint16)).save(tmp_path / "deep.png")
    for path in (tmp_path / "deep.png", str(tmp_path / "deep.png")):
        assert np.asarray(read_picture(path))[..., 0].tolist() == [[0, 51], [102, 255]]


# Where the corner that is stored first belongs, as the EXIF standard numbers it, for a stored picture of 3 x 2 pixels.
@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [
        (1, (3, 2), (0, 0)),
        (2, (3, 2), (2, 0)),
        (3, (3, 2), (2, 1)),
        (4, (3, 2), (0, 1)),
        (5, (2, 3), (0, 0)),
        (6, (2, 3), (1, 0)),
        (7, (2, 3), (1, 2)),
        (8, (2, 3), (0, 2)),
    ],
)
def test_rotation_of_a_camera_is_carried_out(orientation, size, corner, tmp_path):
    stored = Image.new("RGB", (3, 2), BLUE)
    stored.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    found = read_picture(tmp_path / "turned.png")
    assert found.size == size
    assert np.argwhere((np.asarray(found) == RED).all(axis=2)).tolist() == [list(corner[::-1])]


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.png cannot be read as a picture.*No such file"):
        read_picture(tmp_path / "absent.png")
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.png cannot be read as a picture.*Save it as PNG or JPEG"):
        read_picture(tmp_path / "notes.png")
    with pytest.raises(ValueError, match="not ndarray.*PIL.Image.fromarray"):
        read_picture(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="not NoneType"):
        read_picture(None)


def test_half_a_file_is_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:6000])
    with pytest.raises(ValueError, match=r"half\.png cannot be read as a picture.*truncated"):
        read_picture(tmp_path / "half.png")


@pytest.mark.parametrize("mode", ["RGB", "F"])
def test_a_picture_without_pixels_is_named(mode):
    with pytest.raises(ValueError, match="no pixels: it is 0 x 5"):
        read_picture(Image.new(mode, (0, 5)))


def test_a_file_beyond_pils_bound_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match=r"vast\.png is too large to be read as a picture.*900 pixels"):
        read_picture(tmp_path / "vast.png")


def test_values_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match="not finite.*nan_to_num"):
        read_picture(Image.fromarray(np.array([[0, np.nan, 1]], np.float32)))


SQUASH = ViTImageProcessor(size={"height": 224, "width": 224})
WIDE_SQUASH = ViTImageProcessor(size={"height": 96, "width": 160})
# The short side becomes 224 / 0.875 = 256 pixels and the long one in proportion; 224 in the middle are kept.
CROP = ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875)
# The short side becomes 224 pixels; 224 in the middle of the long one are kept.
CLIP = CLIPImageProcessor()
# A square picture becomes 224 pixels wide, with black around it up to 256.
PAD = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 256, "width": 256})
# The short side becomes 288 pixels; 256 in the middle are kept, and their channels are turned round.
BGR = MobileViTImageProcessor(size={"shortest_edge": 288}, crop_size={"height": 256, "width": 256})


@pytest.mark.parametrize(
    ("processor", "size", "box", "tolerance"),
    [
        pytest.param(SQUASH, (640, 480), (0, 0, 640, 480), 0.25, id="squash"),
        pytest.param(SQUASH, (90, 120), (0, 0, 90, 120), 0.25, id="squash, enlarged"),
        pytest.param(WIDE_SQUASH, (300, 451), (0, 0, 300, 451), 0.25, id="squash to other proportions"),
        # 640 x 480 becomes 341 x 256. Columns 58 to 282 and rows 16 to 240 are kept.
        pytest.param(CROP, (640, 480), (58 * 640 / 341, 30, 282 * 640 / 341, 450), 0.25, id="resize and crop"),
        pytest.param(CROP, (480, 640), (30, 58 * 640 / 341, 450, 282 * 640 / 341), 0.25, id="resize and crop, upright"),
        # 640 x 480 becomes 298 x 224. Columns 37 to 261 are kept.
        pytest.param(CLIP, (640, 480), (37 * 640 / 298, 0, 261 * 640 / 298, 480), 0.25, id="crop"),
        pytest.param(CLIP, (900, 90), (405, 0, 495, 90), 0.25, id="crop of a banner"),
        # 640 x 480 becomes 384 x 288. Columns 64 to 320 and rows 16 to 272 are kept.
        pytest.param(BGR, (640, 480), (64 / 0.6, 16 / 0.6, 320 / 0.6, 272 / 0.6), 0.25, id="blue, green, red"),
        # 16 black pixels are 16 * 480 / 224 of the picture's.
        pytest.param(PAD, (480, 480), (-34.29, -34.29, 514.29, 514.29), 0.25, id="pad"),
    ],
)
def test_seen_box(processor, size, box, tolerance):
    found = seen_box(processor, size)
    assert all(isinstance(edge, float) for edge in found)
    assert found == pytest.approx(box, abs=tolerance)


def test_seen_box_of_a_processor_that_has_an_image_processor():
    assert seen_box(SimpleNamespace(image_processor=CROP), (640, 480)) == seen_box(CROP, (640, 480))


def test_seen_box_of_a_processor_that_computes_elsewhere():
    with accelerator() as device:
        there = functools.partial(CROP, device=device)
        assert seen_box(there, (640, 480)) == pytest.approx(seen_box(CROP, (640, 480)), abs=0.25)


def test_seen_box_leaves_the_processor_as_it_was():
    seen_box(BGR, (64, 48))
    red = BGR(Image.new("RGB", (64, 48), RED), return_tensors="np")["pixel_values"][0]
    assert red[:, 0, 0].tolist() == [0, 0, 1]


def test_a_widened_input_and_its_picture_stay_together():
    left_half = np.zeros((8, 8, 3), np.uint8)
    left_half[:, :4] = 255
    pixels = torch.from_numpy(left_half).permute(2, 0, 1)[None] / 255
    wide, image = widened(pixels, Image.fromarray(left_half))
    assert wide.shape == (1, 3, 8, 12) and image.size == (12, 8)
    for columns, value in ((slice(0, 5), 1), (slice(7, 12), 0)):  # the edge lies at 6 of 12
        assert wide[..., columns].sub(value).abs().max() < 0.15
        assert np.abs(np.asarray(image)[:, columns] / 255 - value).max() < 0.15


def processors():
    return {
        "squashed": ViTImageProcessor(size={"height": 64, "width": 64}),
        "cropped": ConvNextImageProcessor(size={"shortest_edge": 96}, crop_pct=0.875),
        "timm": efficientnet_lite()[1],
        "cropped from the middle": CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64),
    }


@pytest.mark.parametrize("name", processors())
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (640, 250), (180, 180)])
def test_a_map_comes_back_to_where_its_light_was(name, size):
    """A dot in a dark photo goes through the processor; what comes out, taken for a map, is where the dot was."""
    processor, (width, height) = processors()[name], size
    for x, y in ((width // 2, height // 2), (width // 2 + 31, height // 2 - 22)):
        photo = np.zeros((height, width, 3), np.uint8)
        photo[y - 4 : y + 5, x - 4 : x + 5] = 255
        pixels = processor(Image.fromarray(photo), return_tensors="pt")["pixel_values"][0, 0]
        (heat,) = to_original((pixels - pixels.min())[None], processor, size)
        assert heat.shape == (height, width) and heat.dtype == np.float32
        rows, columns = np.indices(heat.shape)
        assert (rows * heat).sum() / heat.sum() == pytest.approx(y, abs=0.02 * max(size))
        assert (columns * heat).sum() / heat.sum() == pytest.approx(x, abs=0.02 * max(size))


def test_outside_of_what_the_model_saw_a_map_is_zero():
    ones = to_original(np.ones((2, 64, 64)), processors()["cropped from the middle"], (300, 200))
    assert ones.shape == (2, 200, 300)
    np.testing.assert_array_equal(ones[:, :, 55:245], 1)  # the middle 200 of 300
    np.testing.assert_array_equal(ones[:, :, :45], 0)
    np.testing.assert_array_equal(ones[:, :, 255:], 0)
    squashed = to_original(torch.ones(1, 64, 64), processors()["squashed"], (300, 200))
    assert squashed.min() == 1


def test_a_map_is_stretched_between_the_centres_of_its_pixels():
    """Two pixels side by side, 0 and 1: from a quarter to three quarters of the photo the map rises."""
    (heat,) = to_original(np.array([[[0.0, 1.0]] * 2]), processors()["squashed"], (64, 64))
    wanted = np.clip((np.arange(64) + 0.5) / 32 - 0.5, 0, 1)
    np.testing.assert_allclose(heat, np.tile(wanted, (64, 1)), atol=0.05)
