import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, uniform_filter
from skimage import color, data
from sklearn.datasets import load_sample_image
from transformers import CLIPImageProcessor, ConvNextImageProcessor, ViTImageProcessor

from training import masks as cutting
from xai_helpers import scenes
from xai_helpers.scenes import PHOTOS, Scene, as_seen, cutouts, labels, make_scene, natural
from xai_helpers.scenes.backgrounds import PARTS, TEXTURES
from xai_helpers.scenes.photos import MASKS, mask, photo
from xai_helpers.scoring import resize_masks


def pixels(scene):
    return np.asarray(scene.image, float)


def overlap(a, b):
    """Intersection over union of two masks."""
    return (a & b).sum() / (a | b).sum()


def test_the_same_arguments_give_the_same_scene():
    for options in ({}, {"objects": 3, "distractors": 4}, {"objects": ["cat", "coin"], "split": "train"}):
        first, second = make_scene(7, size=96, **options), make_scene(7, size=96, **options)
        np.testing.assert_array_equal(pixels(first), pixels(second))
        np.testing.assert_array_equal(first.masks, second.masks)
        assert first.categories == second.categories
    assert np.abs(pixels(make_scene(7, size=96)) - pixels(make_scene(8, size=96))).mean() > 10


def test_a_seed_gives_another_scene_in_each_split():
    for seed in range(4):
        train, validation, test = (pixels(make_scene(seed, size=64, split=s)) for s in scenes.SPLITS)
        for a, b in ((train, validation), (validation, test), (train, test)):
            assert np.abs(a - b).mean() > 10


@pytest.mark.parametrize("size", [64, 129, 512])
def test_a_scene_is_a_picture_and_a_mask_an_object(size):
    scene = make_scene(1, ["rocket", "cat", "rocket"], size)
    assert scene.image.size == (size, size) and scene.image.mode == "RGB"
    assert scene.categories == ["rocket", "cat", "rocket"]
    assert scene.masks.shape == (3, size, size) and scene.masks.dtype == bool
    assert scene.boxes.shape == (3, 4)


def test_every_object_has_pixels_of_its_own():
    for seed in range(25):
        for n in (2, 4):
            seen = make_scene(seed, n, 64).masks
            assert len(seen) == n and (seen.sum(axis=(1, 2)) >= 10).all()
            assert seen.sum(axis=0).max() == 1


def test_boxes_enclose_the_masks():
    seen = np.zeros((3, 8, 12), bool)
    seen[0, 2:5, 3:9] = True
    seen[1, 7, 11] = seen[1, 0, 4] = True
    scene = Scene(Image.new("RGB", (12, 8)), ["cat", "coin", "hidden"], seen)
    assert scene.boxes.tolist() == [[3, 2, 9, 5], [4, 0, 12, 8], [0, 0, 0, 0]]
    assert make_scene(0, 0, 64).boxes.shape == (0, 4)


def test_sizes_differ_in_their_resolution_only():
    areas = []
    for seed in range(12):
        small, large = make_scene(seed, 2, 128), make_scene(seed, 2, 384)
        assert small.categories == large.categories
        shrunk = large.masks.reshape(2, 128, 3, 128, 3).mean(axis=(2, 4)) >= 0.5
        for a, b in zip(small.masks, shrunk, strict=True):
            if a.sum() > 300:  # in a small object, the edge is most of it
                areas.append(overlap(a, b))
        blocks = pixels(large).reshape(128, 3, 128, 3, 3).mean(axis=(1, 3))
        assert np.corrcoef(blocks.flat, pixels(small).flat)[0, 1] > 0.9
    assert len(areas) > 10 and min(areas) > 0.9


def test_a_mask_covers_what_the_object_changes():
    """The same seed without the object has the same background, under another light: what differs is the object."""
    found = []
    for seed in range(14):
        scene = make_scene(seed, ["flower"], 128, distractors=0)
        seen = scene.masks[0]
        empty, full = pixels(make_scene(seed, [], 128, distractors=0)), pixels(scene)
        light = np.median(full[~seen] / (empty[~seen] + 1), axis=0)
        # Hue tells the flower from its shadow: shares of the light, which a shadow does not change.
        before, after = ((p + 8) / (p + 8).sum(axis=2, keepdims=True) for p in (empty * light, full))
        changed = np.abs(after - before).sum(axis=2) > 0.08
        here = overlap(changed, seen)
        for shift in ((6, 0), (-6, 0), (0, 6), (0, -6)):
            assert overlap(changed, np.roll(seen, shift, axis=(0, 1))) < here
        found.append(here)
    assert np.median(found) > 0.8 and max(found) > 0.98  # lower where background or noise are like the flower


@pytest.mark.parametrize("category", ["flower", "coffee cup"])
def test_a_mask_holds_the_colours_of_its_object(category):
    """A warm object beside a grey coin: its pixels are the more orange ones."""
    warmer = []
    for seed in range(10):
        scene = make_scene(seed, [category, "coin"], 96)
        warmth = pixels(scene)[..., 0] - pixels(scene)[..., 2]
        warmer.append(warmth[scene.masks[0]].mean() - warmth[scene.masks[1]].mean())
    assert np.median(warmer) > 40 and np.mean(np.array(warmer) > 0) >= 0.9


def test_objects_are_visible_by_half_even_in_a_crowd():
    for seed in range(12):
        stream = np.random.default_rng(np.random.SeedSequence([scenes.SPLITS.index("test"), seed]).spawn(3)[0])
        pastes = scenes._lay_out(stream, scenes._draw_categories(stream, 4, labels()), 4, "test")
        seen = make_scene(seed, 4, 256, distractors=4).masks
        for paste in pastes:
            if paste.object is not None:
                cutout = paste.levels[0]
                whole = (cutout[..., 3] / 255).sum() * (paste.scale * 256 / max(cutout.shape[:2])) ** 2
                assert seen[paste.object].sum() > 0.42 * whole  # judged at 64 pixels, which is coarse
                assert seen[paste.object].sum() < 1.15 * whole


def test_how_many_objects():
    for n in range(5):
        drawn = make_scene(3, n, 64).categories
        assert len(drawn) == len(set(drawn)) == n and set(drawn) <= set(labels())
    some = [make_scene(seed, size=64) for seed in range(30)]
    assert {len(scene.categories) for scene in some} == {1, 2}
    assert all(set(make_scene(seed, 2, 64, among=["cat", "coin", "rocket"]).categories)
               < {"cat", "coin", "rocket"} for seed in range(10))  # fmt: skip
    assert all(make_scene(seed, size=64, among=["cat"]).categories == ["cat"] for seed in range(10))


def test_categories_are_drawn_evenly():
    drawn = [c for seed in range(300) for c in make_scene(seed, size=64, distractors=0).categories]
    counts = np.array([drawn.count(c) for c in labels()])
    # About 450 in all, 56 a category with a standard deviation of 7.
    assert 400 < counts.sum() < 500 and counts.min() > 30 and counts.max() < 85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 63}, "size is 64 to 512 pixels, not 63"),
        ({"size": 513}, "size is 64 to 512 pixels, not 513"),
        ({"seed": -1}, "seed is 0 or more, not -1"),
        ({"split": "dev"}, "split is one of train, validation, test, not 'dev'"),
        ({"objects": ["dog"]}, r"list of names out of astronaut, cat, .* not \['dog'\]"),
        ({"objects": "cat"}, "list of names out of .* not 'cat'"),
        ({"among": ["cat", "dog"]}, r"list of names out of .* not \['cat', 'dog'\]"),
        ({"objects": 5}, "objects is 0 to 4, or a list of names, not 5"),
        ({"objects": -1}, "objects is 0 to 4, or a list of names, not -1"),
        ({"objects": 3, "among": ["cat", "coin"]}, "objects is 0 to 2, or a list of names, not 3"),
        ({"distractors": 5}, "distractors is 0 to 4, not 5"),
        ({"distractors": -1}, "distractors is 0 to 4, not -1"),
        ({"distractors": 1.5}, "distractors is 0 to 4, not 1.5"),
        ({"size": 100.5}, "size is 64 to 512 pixels, not 100.5"),
        ({"size": "128"}, "size is 64 to 512 pixels, not '128'"),
        ({"size": (128, 128)}, r"size is 64 to 512 pixels, not \(128, 128\)"),
        ({"seed": 1.5}, "seed is 0 or more, not 1.5"),
        ({"seed": None}, "seed is 0 or more, not None"),
        ({"objects": 2.0}, "list of names out of .* not 2.0"),
        ({"objects": True}, "list of names out of .* not True"),
        ({"objects": [["cat"]]}, r"list of names out of .* not \[\['cat'\]\]"),
        ({"among": []}, r"list of names out of .* not \[\]"),
        ({"among": "cat"}, "list of names out of .* not 'cat'"),
        ({"objects": 2, "leave_out": 2}, "leave_out is the number of one of 2 objects, from 0, not 2"),
        ({"objects": 2, "leave_out": -1}, "leave_out is the number of one of 2 objects, from 0, not -1"),
        ({"objects": ["cat"], "leave_out": "cat"}, "leave_out is the number of one of 1 objects, from 0, not 'cat'"),
        ({"objects": 0, "leave_out": 0}, "leave_out is the number of one of 0 objects"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_scene(**{"seed": 0, "size": 64, **options})


def test_distractors_are_no_object():
    empty, cluttered = (make_scene(5, 0, 96, distractors=n) for n in (0, 4))
    assert cluttered.categories == [] and cluttered.masks.shape == (0, 96, 96)
    assert np.abs(pixels(empty) - pixels(cluttered)).mean() > 5


def test_distractors_have_masks_of_their_own():
    for seed in range(10):
        scene = make_scene(seed, 2, 96, distractors=3)
        assert scene.distractors.shape == (3, 96, 96) and scene.distractors.dtype == bool
        assert np.concatenate([scene.masks, scene.distractors]).sum(axis=0).max() == 1
    assert make_scene(0, 1, 64, distractors=0).distractors.shape == (0, 64, 64)
    assert natural("chelsea").distractors is None


@pytest.mark.parametrize("seed", range(12))
def test_a_distractors_mask_covers_what_it_changes(seed):
    """The same scene without it: up to its light, a scene changes where the mask is, and nowhere else."""
    scene, without = (make_scene(seed, 0, 96, distractors=n) for n in (1, 0))
    (mask,) = scene.distractors
    a, b = pixels(scene), pixels(without)
    told = (20 < b) & (b < 250) & (a < 250) & ~mask[..., None]
    changed = uniform_filter(np.abs(a - np.median(a[told] / b[told]) * b).mean(axis=-1), 5)  # against the noise
    assert changed[mask].mean() > 2.5 * changed[~mask].mean()
    assert changed.max() < 25 or binary_dilation(mask, iterations=4)[changed >= 25].mean() > 0.98


@pytest.mark.parametrize("seed", range(8))
def test_what_is_left_out_is_gone_and_nothing_else_has_changed(seed):
    scene = make_scene(seed, ["flower", "cat"], 128, distractors=1)
    for k, seen in enumerate(scene.masks):
        without = make_scene(seed, ["flower", "cat"], 128, distractors=1, leave_out=k)
        assert without.categories == scene.categories
        np.testing.assert_array_equal(without.masks, scene.masks)
        np.testing.assert_array_equal(without.distractors, scene.distractors)
        changed = np.abs(pixels(scene) - pixels(without)).max(axis=2)
        assert (changed[seen] > 10).mean() > 0.7  # a white petal on a white background is hardly a change
        others = np.delete(np.concatenate([scene.masks, scene.distractors]), k, axis=0).any(axis=0)
        near = binary_dilation(seen | others, np.ones((3, 3)), iterations=12)  # shadows, and what others cover of it
        assert changed[~near].max() <= 1 and (changed[~near] == 0).mean() > 0.999  # a shadow's last trace is rounded
        assert (changed[others] == 0).mean() > 0.75  # its shadow may fall on another object


def test_of_two_objects_each_can_be_left_out_and_neither_is():
    whole, first, second = (pixels(make_scene(3, ["cat", "cat"], 96, leave_out=k)) for k in (None, 0, 1))
    np.testing.assert_array_equal(whole, pixels(make_scene(3, ["cat", "cat"], 96)))
    for a, b in ((whole, first), (whole, second), (first, second)):
        assert np.abs(a - b).max() > 30


def test_distractors_are_cropped_with_the_picture():
    scene = make_scene(3, 1, 96, distractors=2)
    seen = as_seen(scene, PROCESSORS["resize and crop"])
    edge = (96 - seen.image.width) // 2
    assert 0 < edge and seen.distractors.shape == (2, seen.image.height, seen.image.width)
    np.testing.assert_array_equal(seen.distractors, scene.distractors[:, edge : 96 - edge, edge : 96 - edge])
    assert as_seen(natural("chelsea"), PROCESSORS["resize and crop"]).distractors is None


def test_held_out_distractors_are_in_test_scenes_only():
    held_out = [cutouts.thing(kind) for kind in cutouts.HELD_OUT_DISTRACTORS]
    for split in scenes.SPLITS:
        found = set()
        for seed in range(60):
            for paste in scenes._lay_out(np.random.default_rng(seed), [], 4, split):
                found |= {i for i, levels in enumerate(held_out) if paste.levels is levels}
        assert found == ({0, 1, 2} if split == "test" else set())


# Points of the photos, x and y, that lie on an object and beside it.
POINTS = {
    ("astronaut", "astronaut"): ([(225, 105), (140, 316)], [(28, 112), (417, 140), (300, 40)]),
    ("astronaut", "rocket"): ([(417, 140)], [(485, 56), (225, 105), (330, 200)]),
    ("chelsea", "cat"): ([(170, 115), (261, 246)], [(416, 56)]),
    ("china", "pagoda"): ([(204, 218)], [(372, 84), (443, 253), (30, 20)]),
    ("coffee", "coffee cup"): ([(287, 155), (125, 267)], [(41, 84), (560, 60)]),
    ("coins", "coin"): ([(334, 45), (42, 253)], [(77, 84), (5, 5)]),
    ("flower", "flower"): ([(305, 218)], [(600, 323), (50, 50)]),
    ("motorcycle", "motorcycle"): ([(360, 323), (423, 204)], [(240, 450), (451, 70)]),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_untouched_photos_have_masks(name):
    scene = natural(name)
    np.testing.assert_array_equal(np.asarray(scene.image), photo(name))
    assert set(scene.categories) <= set(labels())
    assert scene.masks.shape == (len(scene.categories), scene.image.height, scene.image.width)
    assert scene.masks.dtype == bool
    for category, seen in zip(scene.categories, scene.masks, strict=True):
        inside, outside = POINTS[name, category]
        assert all(seen[y, x] for x, y in inside), category
        assert not any(seen[y, x] for x, y in outside), category


def test_every_category_is_in_an_untouched_photo():
    assert {category for answers in PHOTOS.values() for category in answers} == set(labels())
    with pytest.raises(ValueError, match="no photo 'lena'.*astronaut, chelsea, china"):
        natural("lena")


PROCESSORS = {
    "squash": ViTImageProcessor(size={"height": 128, "width": 128}),
    "squash to other proportions": ViTImageProcessor(size={"height": 96, "width": 160}),
    "resize and crop": ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
    "crop": CLIPImageProcessor(),
    "pad": CLIPImageProcessor(size={"shortest_edge": 192}, crop_size={"height": 224, "width": 224}),
}


@pytest.mark.parametrize("size", [(384, 384), (451, 300), (200, 320)], ids=str)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_masks_lie_where_the_processor_puts_the_object(processor, size):
    """One geometry: a white box, put through the processor, is where its mask is, put through as_seen."""
    processor, (width, height) = PROCESSORS[processor], size
    seen = np.zeros((2, height, width), bool)
    seen[0, int(0.35 * height) : int(0.6 * height), int(0.4 * width) : int(0.75 * width)] = True
    seen[1, int(0.7 * height) :, : int(0.45 * width)] = True  # a crop cuts it
    for one in seen:
        scene = Scene(Image.fromarray(one.astype(np.uint8) * 255).convert("RGB"), ["box"], one[None])
        out = processor(scene.image, return_tensors="np")["pixel_values"][0]
        shown = out > (out.min(axis=(1, 2), keepdims=True) + out.max(axis=(1, 2), keepdims=True)) / 2
        part = as_seen(scene, processor)
        assert part.masks.shape == (1, part.image.height, part.image.width)
        np.testing.assert_array_equal(np.asarray(part.image)[..., 0] == 255, part.masks[0])
        assert overlap(resize_masks(part.masks, *shown.shape[1:])[0], shown[0]) > 0.96


def test_as_seen_keeps_the_picture_without_a_processor_that_crops():
    scene = make_scene(2, 2, 96)
    part = as_seen(scene, PROCESSORS["squash"])
    np.testing.assert_array_equal(pixels(part), pixels(scene))
    np.testing.assert_array_equal(part.masks, scene.masks)
    assert part.categories == scene.categories
    plain = as_seen(Scene(scene.image, [], np.zeros((0, 96, 96), bool)), PROCESSORS["resize and crop"])
    assert plain.image.size == (84, 84) and plain.masks.shape == (0, 84, 84)  # 0.875 of 96


def test_masks_are_those_that_training_cuts():
    """Cut again from outlines and photos; a little room is left for other versions of OpenCV."""
    made = cutting.masks()
    assert {f"{name.replace(' ', '_')}.png" for name in made} == {path.name for path in MASKS.iterdir()}
    for name, cut in made.items():
        assert overlap(cut.astype(bool), mask(name)) > 0.98, name


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_a_picture_as_thin_as_a_pixel_is_seen(size):
    scene = Scene(Image.new("RGB", size, (9, 99, 199)), ["cat"], np.ones((1, *size[::-1]), bool))
    seen = as_seen(scene, ViTImageProcessor())
    assert seen.image.size == size and seen.image.getcolors() == [(size[0] * size[1], (9, 99, 199))]
    assert seen.masks.shape == scene.masks.shape and seen.masks.all()


SHIPPED = {name for name, _ in PARTS} | set(TEXTURES) | {source for source, *_ in cutouts.OBJECTS.values()}
SHIPPED |= {"camera", "colorwheel", "horse", "logo", "moon", "retina", "shepp_logan_phantom"}  # the distractors


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_photo_is_what_its_package_loads(name):
    """Bit by bit: the bundled models were trained on these pixels."""
    if name in ("china", "flower"):
        wanted = load_sample_image(f"{name}.jpg")
    else:
        wanted = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    wanted = color.gray2rgb(wanted) if wanted.ndim == 2 else wanted[..., :3]
    if name == "shepp_logan_phantom":  # read as grey, its last bit may differ; in single precision none does
        assert photo(name).dtype == wanted.dtype
        wanted, found = np.float32(wanted), np.float32(photo(name))
    else:
        wanted, found = np.uint8(wanted * 255 if wanted.dtype == bool else wanted), photo(name)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_the_photos_packages_are_not_imported():
    code = "import sys; from xai_helpers.scenes import make_scene; [make_scene(i, size=64) for i in range(20)]"
    code += "; print({'skimage', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
