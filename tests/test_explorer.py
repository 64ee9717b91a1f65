import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw

from xai_helpers import explorer as module
from xai_helpers.checkpoints import load, scene_categories
from xai_helpers.explorer import (
    MODELS,
    Method,
    as_question,
    cam_layers,
    covers,
    explorer,
    make_maps,
    methods_with_settings,
    peak,
    pictures,
    shown,
    view,
    with_outline,
)
from xai_helpers.layers import TargetLayer, find_target_layers
from xai_helpers.leaderboard import methods_for
from xai_helpers.recipes import RECIPES
from xai_helpers.scenes import PHOTOS, Scene, make_scene
from xai_helpers.scoring import Example

ROOT = Path(__file__).resolve().parents[1]
SLOW = {"Ablation-CAM", "Score-CAM", "FullGrad"}
TWO, ONE = "Scene: a cat and a coffee cup", "Photo: a cat"


@pytest.fixture(scope="module")
def resnet():
    return load("resnet", "bundled")


@pytest.fixture(scope="module")
def question(resnet):
    return as_question(pictures()[TWO], *resnet)


@pytest.fixture(scope="module")
def methods(resnet, question):
    return methods_with_settings(*resnet, question.pixel_values)


# ---- pictures and questions -----------------------------------------------------------------------------------------


def test_pictures_are_scenes_with_two_objects_and_all_photos():
    scenes = {name: scene for name, scene in pictures().items() if name.startswith("Scene: ")}
    assert len(scenes) >= 3 and len(pictures()) == len(scenes) + len(PHOTOS)
    for name, scene in pictures().items():
        assert scene.masks.any(axis=(1, 2)).all()
        assert all(category in name for category in scene.categories)
        assert name not in scenes or len(set(scene.categories)) == 2


def test_a_question_is_for_the_objects_that_the_model_knows(resnet):
    model, processor = resnet
    both = as_question(pictures()["Photo: an astronaut and a rocket"], model, processor)
    assert both.categories == ["astronaut", "rocket"] and len(both.masks) == 2
    narrow = copy.copy(model)
    narrow.config = copy.deepcopy(model.config)
    narrow.config.id2label = {**model.config.id2label, 0: "tench", 5: "moped", 1: "Egyptian cat", 7: "space shuttle"}
    assert "astronaut" not in scene_categories(narrow)
    one = as_question(pictures()["Photo: an astronaut and a rocket"], narrow, processor)
    assert one.categories == ["space shuttle"]
    assert (one.masks == both.masks[1:]).all()


def test_a_picture_without_answers_is_asked_for_what_the_model_sees(resnet):
    model, processor = resnet
    photo = pictures()[ONE]
    plain = Scene(photo.image, [], np.zeros((0, 300, 451), bool))
    found = as_question(plain, model, processor)
    assert found.categories[0] == "cat" and len(found.categories) == module.CATEGORIES and found.masks is None
    assert as_question(plain, model, processor, ["rocket", "coin"]).categories == ["rocket", "coin"]
    with pytest.raises(ValueError, match="no category 'rockt'; the closest are: 'rocket'"):
        as_question(plain, model, processor, ["rockt"])


# ---- methods and their settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS, "cvt"])
def test_layers_begin_with_that_of_the_recipe_and_give_other_maps(name):
    model, processor = load(name, "bundled")
    question = as_question(pictures()[TWO], model, processor)
    layers = cam_layers(model, question.pixel_values)
    assert 2 <= len(layers) <= 4
    assert find_target_layers(model, question.pixel_values).cam.path in [layer.path for layer in layers.values()]
    assert next(iter(layers.values())).module is RECIPES[name].cam(model, question.pixel_values).module
    grids = [tuple(map(int, label.split(", ")[1].split(" × "))) for label in layers]
    assert grids[1:] == sorted(grids[1:])  # the first is the best one, whatever its grid
    found = []
    for layer in layers.values():
        method = Method(None, {"": methods_for(None, model, question.pixel_values, layer)["HiResCAM"]}, "")
        found.append(make_maps(method, "", question))
        assert found[-1].max(axis=(1, 2)) == pytest.approx(1, abs=1e-3)
        assert not any(np.allclose(found[-1], other) for other in found[:-1])


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_method_gives_maps_and_every_setting_another(name):
    model, processor = load(name, "bundled")
    question = as_question(pictures()[TWO], model, processor)
    methods = methods_with_settings(model, processor, question.pixel_values)
    assert set(methods) == set(methods_for(name, model, question.pixel_values))
    assert ("guided backprop" in methods) == (name == "resnet") and ("relevance" in methods) == (name == "vit")
    for key in set(methods) - SLOW:
        method = methods[key]
        assert method.default in method.settings and (method.parameter is None) == (len(method.settings) == 1)
        chosen = [setting for setting in method.settings if setting != "800"]
        maps = [make_maps(method, setting, question) for setting in chosen]
        for heats in maps:
            assert heats.shape == (2, 128, 128) and heats.dtype == np.float32
            assert heats.min() >= 0 and heats.max() <= 1 and heats.max() > 0.99
        for i, heats in enumerate(maps):
            assert all(np.abs(heats - other).max() > 0.01 for other in maps[:i]), key


def test_defaults_are_what_the_leaderboard_has(resnet, question, methods):
    board = methods_for("resnet", resnet[0], question.pixel_values)
    for key in ("Grad-CAM", "occlusion", "RISE"):
        expected = board[key](question.pixel_values, question.categories)
        assert np.allclose(make_maps(methods[key], methods[key].default, question), expected, atol=1e-5), key


@pytest.mark.parametrize("key", ["SmoothGrad", "RandomCAM"])
def test_random_methods_give_the_same_maps_again_and_leave_the_generators_alone(question, methods, key):
    torch.manual_seed(7), np.random.seed(7)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(7), np.random.seed(7)
    method = methods[key]
    first, again = (make_maps(method, method.default, question) for _ in range(2))
    assert (first == again).all()
    assert (torch.rand(1).item(), np.random.rand()) == expected


@pytest.mark.parametrize("baseline, level", [("grey", 128), ("black", 0)])
def test_integrated_gradients_of_the_baseline_itself_are_zero(resnet, question, methods, baseline, level):
    pixel_values = resnet[1](images=Image.new("RGB", (50, 80), (level,) * 3), return_tensors="pt")["pixel_values"]
    plain = Example(pixel_values, ["cat"], None)
    zero, other = (make_maps(methods["integrated gradients"], name, plain) for name in (baseline, "blurred picture"))
    assert zero.max() == 0
    assert other.max() < 1e-3 or other.max() == pytest.approx(1)  # blurring a plain picture changes rounding at most


def test_words_of_a_method():
    assert Method("masks", {"25": None, "200": None}, "25").words("RISE", "200") == "RISE (masks: 200)"
    assert Method(None, {module.NOTHING: None}, module.NOTHING).words("edges", module.NOTHING) == "edges"


# ---- what is shown --------------------------------------------------------------------------------------------------


@pytest.fixture
def left_half():
    """A grey picture, 64 high and 128 wide, and an object that fills its left half."""
    mask = np.zeros((1, 64, 128), bool)
    mask[:, :, :64] = True
    return Example(torch.zeros(1, 3, 32, 32), ["thing"], mask, Image.new("RGB", (128, 64), (90, 90, 90)))


def test_a_view_has_the_scores(left_half):
    heat = np.zeros((32, 32), np.float32)
    heat[8, 4], heat[8, 24] = 1, 0.25
    seen = view(left_half, 0, heat)
    assert seen.hit is True and seen.inside == pytest.approx(0.8) and seen.verdict == "hit, 80% inside"
    seen = view(left_half, 0, heat[:, ::-1])
    assert seen.hit is False and seen.inside == pytest.approx(0.2) and seen.verdict == "miss, 20% inside"
    assert covers(left_half, 0) == 0.5


def test_a_view_shows_map_outline_and_maximum(left_half):
    heat = np.zeros((32, 32), np.float32)
    heat[5:12, 1:8] = 0.9
    heat[8:10, 3:7] = 1
    pixels = np.asarray(view(left_half, 0, heat, side=320).picture, int)
    assert pixels.shape == (160, 320, 3)
    dimmed = 43  # 255 * (.04 + .36 * 90 / 255), rounded
    assert (pixels[80:150, 250] == dimmed).all(), "the picture where the map is zero"
    # What one pixel in a hundred exceeds, .9 here, has the last colour, #f7f770, with an opacity of .9.
    np.testing.assert_allclose(pixels[28, 70], 0.9 * np.array([247, 247, 112]) + 0.1 * dimmed, atol=1)
    assert pixels[80, 157:163].min(axis=1).max() > 200, "a white line at the edge of the object"
    row, column = round(8.5 / 32 * 160), round(4.5 / 32 * 320)
    assert (pixels[row, column] == 0).all(), "a black cross at the maximum, in the middle of several"
    assert (pixels[row, column - 15 : column + 15] > 240).all(axis=1).any(), "with a white edge"


def test_a_view_without_an_answer_has_no_scores(left_half):
    left_half.masks = None
    seen = view(left_half, 0, np.eye(32, dtype=np.float32))
    assert seen.hit is None and seen.inside is None and seen.verdict == "no known answer"
    blank = view(left_half, 0, np.zeros((32, 32), np.float32))
    assert (np.asarray(blank.picture) == 43).all(), "a map of zeros has no maximum to mark"  # 90, dimmed


def test_a_thin_picture_keeps_a_pixel():
    assert shown(Image.new("RGB", (2000, 2)), 320).size == (320, 1)


@pytest.mark.parametrize("mode", ["L", "LA", "P"])
def test_a_scene_of_another_mode_is_asked_about(resnet, mode):
    scene = make_scene(1, ["cat"], size=64)
    other = Scene(scene.image.convert(mode), scene.categories, scene.masks)
    for asked in (None, ["rocket"]):
        example = as_question(other, *resnet, asked)
        assert example.pixel_values.shape == (1, 3, 128, 128) and example.image.mode == "RGB"


@pytest.mark.parametrize("share", [2, 4, 8])
def test_the_window_fits_into_a_wide_picture(resnet, share):
    model, _ = resnet
    maps = module._occlude(model, torch.ones(1, 3, 32, 200), ["cat"], share)
    assert maps.shape == (1, 32, 200)


def test_the_peak_of_several_is_the_one_nearest_to_their_middle():
    heat = np.zeros((4, 8), np.float32)
    heat[1, [0, 1, 7]] = 1
    assert peak(heat) == (1.5 / 8, 1.5 / 4)


def test_pictures_keep_their_shape(left_half):
    assert shown(left_half.image, 100).size == (100, 50)
    assert with_outline(shown(left_half.image, 100), left_half.masks[0]).size == (100, 50)


# ---- in a notebook --------------------------------------------------------------------------------------------------


class Controls:
    """The widgets of an explorer by name."""

    def __init__(self, box):
        (self.picture, self.model, self.category), panels = (row.children for row in box.children[:2])
        self.a, self.b = ({"method": p.children[1], "setting": p.children[2]} for p in panels)
        self.shown = [panel.children[3] for panel in panels]

    def values(self):
        return [one.value for one in self.shown]

    def pictures(self):
        return [re.search(r'src="data:image/png;base64,([^"]+)"', value)[1] for value in self.values()]

    def texts(self):
        return [re.sub(r'src="[^"]*"', "", value) for value in self.values()]


@pytest.fixture
def opened():
    return Controls(explorer("resnet"))


@pytest.mark.parametrize(
    "name, value, panels", [("picture", "Scene: a cat and a rocket", "ab"), ("category", "coffee cup", "ab")]
)
def test_a_control_changes_both_maps_and_their_scores(opened, name, value, panels):
    before = opened.pictures(), opened.texts()
    getattr(opened, name).value = value
    for old, new in zip(before, (opened.pictures(), opened.texts()), strict=True):
        assert all(a != b for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("panel", "ab")
@pytest.mark.parametrize("control, index", [("method", 2), ("setting", -1)])
def test_a_control_of_a_panel_changes_its_map_only(opened, panel, control, index):
    one, other = (0, 1) if panel == "a" else (1, 0)
    if control == "method":
        index = list(getattr(opened, panel)[control].options).index("gradient")
    before = opened.pictures(), opened.texts()
    dropdown = getattr(opened, panel)[control]
    dropdown.value = dropdown.options[index]
    for old, new in zip(before, (opened.pictures(), opened.texts()), strict=True):
        assert old[one] != new[one] and old[other] == new[other]
    assert dropdown.value in opened.texts()[one]


def test_another_model_keeps_what_it_can(monkeypatch):
    monkeypatch.setattr(module, "MODELS", ["resnet", "vit"])
    opened = Controls(explorer())
    assert opened.model.options == ("resnet", "vit") and opened.picture.options == tuple(pictures())
    opened.category.value = "coffee cup"
    opened.a["method"].value = "guided backprop"
    assert opened.a["setting"].disabled and opened.a["setting"].value == module.NOTHING
    opened.b["setting"].value = "black"
    before = opened.pictures()
    opened.model.value = "vit"
    assert "guided backprop" not in opened.a["method"].options and opened.a["method"].value == "Grad-CAM"
    assert "layernorm_before" in opened.a["setting"].value and not opened.a["setting"].disabled
    assert opened.a["setting"].description == "layer"
    assert (opened.b["method"].value, opened.b["setting"].value) == ("integrated gradients", "black")
    assert opened.category.value == "coffee cup"
    assert all(old != new for old, new in zip(before, opened.pictures(), strict=True))
    assert all("of vit for coffee cup" in text and "an even map: 15%" in text for text in opened.texts())
    opened.picture.value = ONE
    assert opened.category.value == "cat"


def test_maps_are_made_once(opened, monkeypatch):
    opened.category.value = "coffee cup"
    opened.category.value = "cat"
    before = opened.values()
    monkeypatch.setattr(module, "make_maps", None)
    opened.category.value = "coffee cup"
    opened.category.value = "cat"
    assert opened.values() == before and "hit" in before[0]


def test_what_goes_wrong_is_shown_and_the_next_choice_works(opened, monkeypatch):
    def fail(*args):
        raise RuntimeError("no <memory> left")

    before = opened.values()
    monkeypatch.setattr(module, "make_maps", fail)
    opened.a["method"].value = "gradient"
    assert "cannot be shown" in opened.values()[0] and "RuntimeError: no &lt;memory&gt; left" in opened.values()[0]
    assert opened.values()[1] == before[1]
    monkeypatch.undo()
    opened.a["method"].value = "HiResCAM"
    assert "<img" in opened.values()[0]


def test_a_model_of_your_own_is_left_as_it_was(resnet):
    model = copy.deepcopy(resnet[0])
    model.train()
    model.resnet.embedder.requires_grad_(False)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    opened = Controls(explorer(model, resnet[1]))
    assert opened.model.options == ("ResNetForImageClassification",)
    for method in ("SmoothGrad", "guided backprop", "occlusion"):
        opened.a["method"].value = method
        assert "<img" in opened.values()[0]
    assert all(module.training for module in model.modules())
    assert grads == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_a_picture_of_your_own(tmp_path):
    path = tmp_path / "mine.png"
    pictures()[ONE].image.convert("LA").save(path)
    opened = Controls(explorer("resnet", image=path))
    assert opened.picture.options == ("your picture",) and len(opened.category.options) == module.CATEGORIES
    assert all("no known answer" in text and "even" not in text for text in opened.texts())
    named = Controls(explorer("resnet", image=path, categories=["rocket", "cat"]))
    assert named.category.options == ("rocket", "cat")
    scored = Controls(explorer("resnet", image=make_scene(3, ["flower", "coin"])))
    assert scored.category.options == ("flower", "coin") and all("inside" in text for text in scored.texts())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "resnett"}, "There is no classifier 'resnett'. There are: resnet, vit"),
        ({"model": "yolos"}, "There is no classifier 'yolos'"),
        ({"model": torch.nn.Identity()}, "comes with its processor"),
        ({"processor": "resnet"}, "comes with its processor"),
        ({"model": torch.nn.Identity(), "processor": 1}, "Identity has no config.id2label"),
        ({"image": "nowhere.jpg"}, "nowhere.jpg cannot be read as a picture"),
        ({"image": 3}, "A picture is a path or a PIL image, not int"),
        ({"categories": ["cat"]}, "categories go with a picture of your own"),
        ({"image": Image.new("RGB", (64, 64)), "categories": "cat"}, r"a list of names: \['cat'\]"),
        ({"image": Image.new("RGB", (64, 64)), "categories": []}, "at least one name"),
        ({"image": Image.new("RGB", (64, 64)), "categories": ["cta"]}, "no category 'cta'; the closest are: 'cat'"),
    ],
)
def test_bad_input_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        explorer(**arguments)


def test_widgets_are_imported_when_they_are_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="ipywidgets"):
        explorer("resnet")


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("explorer_page", ROOT / "book" / "explorer.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


SHORT = {"Grad-CAM": None, "SmoothGrad": 1, "integrated gradients": 1, "guided backprop": None, "edges": None}


@pytest.fixture(scope="module")
def prepared(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    return folder, page.prepare(folder, {"resnet": "ResNet", "vit": "ViT"}, [TWO, ONE], SHORT)


def stored(folder, data, picture, model, category, method, setting):
    """A map of the page, in [0, 1], found by its place in a file."""
    about = data["pictures"][picture]
    categories = list(about["seen"][about["by"][model]]["categories"])
    with Image.open(folder / picture / model / f"{method}.webp") as file:
        rows = np.split(np.asarray(file.convert("L")), len(data["models"][model]["methods"][method]["settings"]))
    return np.split(rows[setting], len(categories), axis=1)[categories.index(category)] / 255


def test_the_page_has_maps_and_scores_for_every_choice(prepared):
    folder, data = prepared
    expected = {"first-a.webp", "first-b.webp"}
    assert set(data["pictures"]) == {"scene-a-cat-and-a-coffee-cup", "photo-a-cat"}
    assert "guided-backprop" in data["models"]["resnet"]["methods"]
    assert "guided-backprop" in data["methods"] and "guided-backprop" not in data["models"]["vit"]["methods"]
    for picture, about in data["pictures"].items():
        [seen] = about["seen"]  # both models see the same
        expected |= {f"{picture}/thumbnail.webp", f"{picture}/seen-0.webp"}
        assert Image.open(folder / picture / "seen-0.webp").size == tuple(seen["size"])
        for model, known in data["models"].items():
            assert about["by"][model] == 0
            assert set(data["scores"][picture][model]) == set(seen["categories"])
            for category, scores in data["scores"][picture][model].items():
                assert set(scores) == set(known["methods"])
                for method, found in scores.items():
                    expected.add(f"{picture}/{model}/{method}.webp")
                    assert len(found) == len(known["methods"][method]["settings"])
                    for setting, (hit, inside, x, y) in enumerate(found):
                        assert hit in (0, 1) and 0 <= inside <= 100
                        heat = stored(folder, data, picture, model, category, method, setting)
                        assert heat.shape == (128, 128) and heat.max() > 0.99
                        assert heat[y * 128 // 1000, x * 128 // 1000] > 0.9
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.webp")} == expected


def test_the_page_stores_the_maps_themselves(prepared, question, methods):
    heats = make_maps(methods["integrated gradients"], "grey", question)
    for heat, category in zip(heats, ("cat", "coffee-cup"), strict=True):
        found = stored(*prepared, "scene-a-cat-and-a-coffee-cup", "resnet", category, "integrated-gradients", 0)
        assert np.abs(found - heat).max() < 0.51 / 255


def test_layers_on_the_page_are_in_the_order_of_the_model(prepared):
    resnet, vit = (prepared[1]["models"][key]["methods"] for key in ("resnet", "vit"))
    about = resnet["grad-cam"]
    stages = [about["settings"][number].split(",")[0] for number in about["order"]]
    assert stages == [f"encoder.stages.{i}" for i in range(3)]
    blocks = [re.search(r"layers?\.(\d+)", vit["grad-cam"]["settings"][i])[1] for i in vit["grad-cam"]["order"]]
    assert blocks == sorted(blocks, key=int)
    assert "order" not in resnet["edges"]


def test_the_output_of_a_stage_lies_behind_its_blocks(page):
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU()), "b": torch.nn.ReLU()})
    paths = {"stage": "a", "last": "b", "block": "a.1"}
    layers = {label: TargetLayer(model, path, None) for label, path in paths.items()}
    depth = page.depths(model, layers)
    assert sorted(layers, key=depth.get) == ["block", "stage", "last"]


def test_outlines_on_the_page_enclose_the_objects(prepared, question):
    [seen] = prepared[1]["pictures"]["scene-a-cat-and-a-coffee-cup"]["seen"]
    size = tuple(4 * length for length in seen["size"])
    for mask, about in zip(question.masks, seen["categories"].values(), strict=True):
        filled = Image.new("1", size)
        for part in about["outline"].removesuffix("Z").split("Z"):
            numbers = [4 * float(number) for number in re.findall(r"[\d.-]+", part)]
            drawn = Image.new("1", size)
            ImageDraw.Draw(drawn).polygon(numbers, fill=1)
            filled = ImageChops.logical_xor(filled, drawn)  # a hole is enclosed twice
        wanted = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        found = np.asarray(filled)
        assert (wanted & found).sum() / (wanted | found).sum() > 0.97


def test_a_model_with_other_categories_sees_a_picture_in_its_own_way(page, tmp_path):
    astronaut = "Photo: an astronaut and a rocket"
    models = {"resnet": "ResNet", "efficientnet-lite": "EfficientNet-Lite"}
    data = page.prepare(tmp_path, models, [astronaut], {"SmoothGrad": 1, "edges": None})
    about = data["pictures"][page.slug(astronaut)]
    names = [{key: one["name"] for key, one in seen["categories"].items()} for seen in about["seen"]]
    assert names == [{"astronaut": "astronaut", "rocket": "rocket"}, {"rocket": "space shuttle"}]
    assert about["by"] == {"resnet": 0, "efficientnet-lite": 1}
    assert set(data["models"]["efficientnet-lite"]["methods"]) == {"edges"}  # it has no time for SmoothGrad
    assert (tmp_path / page.slug(astronaut) / "seen-1.webp").is_file()


def test_the_page_has_all_families_with_names(page):
    assert set(RECIPES) <= set(page.MODELS) and {"clip-base", "efficientnet-lite"} <= set(page.MODELS)
    assert len(set(page.MODELS.values())) == len(page.MODELS)
    assert set(page.IN_FULL) | set(page.LEFT_OUT) <= set(page.MODELS) and set(page.PICTURES) <= set(pictures())


def test_the_page_and_the_notebook_have_the_same_scores(prepared, question, methods):
    heat = make_maps(methods["integrated gradients"], "grey", question)[1]
    seen = view(question, 1, heat)
    scores = prepared[1]["scores"]["scene-a-cat-and-a-coffee-cup"]["resnet"]["coffee-cup"]
    hit, inside, *_ = scores["integrated-gradients"][0]
    assert seen.verdict == f"{'hit' if hit else 'miss'}, {inside}% inside"


def test_the_page_is_the_same_each_time(page, prepared, tmp_path):
    folder, data = prepared
    again = page.prepare(tmp_path, {"resnet": "ResNet"}, [TWO], SHORT)
    assert again["scores"][page.slug(TWO)]["resnet"] == data["scores"][page.slug(TWO)]["resnet"]
    for path in tmp_path.rglob("*.webp"):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()


def test_the_fragment_holds_the_data_and_needs_nothing_from_elsewhere(page, prepared):
    folder, data = prepared
    text = page.fragment(data)
    kept = re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(kept) == json.loads(json.dumps(data))
    assert "http" not in text and "import" not in text.replace("!important", "")
    without_script = re.search("<noscript>(.*?)</noscript>", text, re.DOTALL)[1]
    sources = re.findall(r'<img src="\.\./explorer/([^"]+)" [^>]*alt="[^"]+inside">', without_script)
    assert len(set(sources)) == 2 and all((folder / source).is_file() for source in sources)
    assert not re.search(r"\b(COLOURS|WITHOUT_SCRIPT|DATA)\b", text)


def test_the_page_is_prepared_by_its_command(page, prepared, tmp_path, monkeypatch):
    stale = tmp_path / "extra" / "explorer" / "stale.webp"
    stale.parent.mkdir(parents=True)
    stale.touch()
    monkeypatch.setattr(page, "prepare", lambda files: prepared[1])
    page.main(str(tmp_path))
    assert (tmp_path / "fragment.html").read_text(encoding="utf-8") == page.fragment(prepared[1])
    assert not stale.exists()


def test_what_the_page_asks_has_the_answers_that_it_hints_at(resnet, question, methods):
    def seen(example, methods, name, setting, category):
        index = example.categories.index(category)
        return view(example, index, make_maps(methods[name], setting, example)[index])

    _, last, *_, finest = methods["Grad-CAM"].settings
    for name, hears in (("Grad-CAM", True), ("Eigen-CAM", False)):
        assert seen(question, methods, name, last, "cat").hit
        assert seen(question, methods, name, last, "coffee cup").hit == hears

    photo, scene = (as_question(pictures()[name], *resnet) for name in (ONE, "Scene: a flower and a motorcycle"))
    assert seen(photo, methods, "edges", module.NOTHING, "cat").hit
    assert seen(photo, methods, "gradient", module.NOTHING, "cat").hit
    assert not any(seen(scene, methods, "edges", module.NOTHING, c).hit for c in ("flower", "motorcycle"))

    same = [make_maps(methods[name], last, scene) for name in ("Grad-CAM", "HiResCAM")]
    assert np.allclose(*same, atol=1e-3)
    assert not seen(scene, methods, "Grad-CAM", finest, "flower").hit
    assert seen(scene, methods, "HiResCAM", finest, "flower").hit
