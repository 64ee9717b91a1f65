"""Cut the masks of the scenes' objects: `python -m training.masks` writes xai_helpers/scenes/masks/*.png.

Each object is outlined by hand (outlines.json, in pixels of the photo) in a photo that scikit-image or
scikit-learn ships. GrabCut (Rother et al., SIGGRAPH 2004) then moves the outline onto the object's edge, inside a
narrow band around it. The motorcycle is cut by depth instead, so that one can see through its wheels.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from skimage import data, measure

from xai_helpers.scenes.photos import MASKS, photo

# The coffee cup is its saucer and its cup.
OUTLINES = json.loads((Path(__file__).parent / "outlines.json").read_text())
SAUCER = ((278, 236), (202, 150), 4)  # centre, half axes, angle in degrees
FLOWER = ((307, 222), (137, 137), 0)
FACE = ((197, 178), (192, 176), 14)


def filled(shape, outline):
    """An outline, a polygon or (centre, half axes, angle), as a filled uint8 mask of 0 and 1."""
    mask = np.zeros(shape[:2], np.uint8)
    if isinstance(outline, list):
        return cv2.fillPoly(mask, [np.array(outline, np.int32)], 1)
    return cv2.ellipse(mask, outline[0], outline[1], outline[2], 0, 360, 1, -1)


def disk(radius):
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def grabcut(pixels, rough, band):
    """Move the edge of `rough` (uint8, 0 and 1) onto the edge in the photo, by at most `band` pixels."""
    # Padding by replication: at the photo's border an object goes on, it does not end.
    pad = 2 * band + 2
    pixels, rough = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)), "edge"), np.pad(rough, pad, "edge")
    trimap = np.where(rough, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    trimap[cv2.erode(rough, disk(band)) == 1] = cv2.GC_FGD
    trimap[cv2.dilate(rough, disk(band)) == 0] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    cv2.grabCut(
        cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR),
        trimap,
        None,
        np.zeros((1, 65)),
        np.zeros((1, 65)),
        6,
        cv2.GC_INIT_WITH_MASK,
    )
    found = np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    found = cv2.morphologyEx(cv2.morphologyEx(found, cv2.MORPH_OPEN, disk(2)), cv2.MORPH_CLOSE, disk(2))
    return largest(found[pad:-pad, pad:-pad])


def largest(mask):
    """The largest connected part of a mask, its small holes filled."""
    parts = measure.label(mask)
    mask = (parts == np.argmax(np.bincount(parts.flat)[1:]) + 1).astype(np.uint8)
    holes = measure.label(mask == 0)
    small = [region.label for region in measure.regionprops(holes) if region.area < 150]
    mask[np.isin(holes, small)] = 1
    return mask


def motorcycle():
    """What stands nearer to the camera than the floor and the shelves do, by the disparity of the stereo pair."""
    disparity = data.stereo_motorcycle()[2]
    rows = np.arange(len(disparity))
    floor = disparity[:, :60]  # left of the motorcycle: bench and floor
    behind = np.array([np.median(row[np.isfinite(row)]) for row in floor])
    slope, offset = np.polyfit(rows[330:], behind[330:], 1)
    behind = np.maximum(slope * rows + offset, 34)
    near = np.where(np.isfinite(disparity), disparity, 0) > behind[:, None] + 2.5
    near = cv2.morphologyEx(near.astype(np.uint8), cv2.MORPH_CLOSE, disk(1))
    near[:, :88], near[:, 690:] = 0, 0
    return largest(cv2.morphologyEx(near, cv2.MORPH_OPEN, disk(1)))


def cat_face(cat):
    """The cat for pasting: the photo cuts its forehead flat, so the face is rounded off inside the photo."""
    face = cat & filled(cat.shape, FACE)
    return cv2.morphologyEx(face, cv2.MORPH_OPEN, disk(12))


def masks():
    """All masks by name."""
    made = {}
    for name in ("astronaut", "cat", "pagoda", "photographer", "rocket"):
        pixels = photo(OUTLINES[name]["photo"])
        made[name] = grabcut(pixels, filled(pixels.shape, OUTLINES[name]["polygon"]), OUTLINES[name]["band"])
    coffee, flower, coins = photo("coffee"), photo("flower"), photo("coins")
    cup_and_saucer = filled(coffee.shape, OUTLINES["cup"]["polygon"]) | filled(coffee.shape, SAUCER)
    made["coffee cup"] = grabcut(coffee, cup_and_saucer, OUTLINES["cup"]["band"])
    circles = [filled(coins.shape, ((x, y), (r - 1, r - 1), 0)) for x, y, r in OUTLINES["coins"]["circles"]]
    made["coin"] = np.max(circles, axis=0)
    made["flower"] = grabcut(flower, filled(flower.shape, FLOWER), 12)
    made["motorcycle"] = motorcycle()
    made["cat face"] = cat_face(made["cat"])
    return made


def main():
    MASKS.mkdir(exist_ok=True)
    for name, mask in masks().items():
        cv2.imwrite(
            str(MASKS / f"{name.replace(' ', '_')}.png"),
            mask * 255,
            [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 9],
        )
        print(f"{name}: {mask.mean():.3f} of the photo")


if __name__ == "__main__":
    main()
