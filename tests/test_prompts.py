"""PromptClassifier: a CLIP whose categories are prompts."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from training.clip import processor as new_processor
from training.clip import tokenizer
from xai_helpers.attention import relevance
from xai_helpers.cam import explain
from xai_helpers.checkpoints import BUNDLED, examples, load, names_of
from xai_helpers.reshape import tokens_to_map
from xai_helpers.scenes import labels, make_scene, with_article
from xai_helpers.scoring import score_table
from xai_helpers.wrappers import PromptClassifier, top_categories

PROMPTS = ["a photo of a cat.", "a photo of a coffee cup.", "a cat and a coffee cup"]


@pytest.fixture(scope="module")
def processor():
    return new_processor()


@pytest.fixture
def clip():
    torch.manual_seed(0)
    words = tokenizer()
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        vision_config={**size, "image_size": 128, "patch_size": 32, "initializer_range": 0.3},
        text_config={**size, "vocab_size": len(words), "max_position_embeddings": 16, "initializer_range": 0.3, **ids},
        projection_dim=8,
    )
    return CLIPModel(config).eval()


def picture(seed, size=(128, 128)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(processor, *seeds):
    return processor(images=[picture(seed) for seed in seeds], return_tensors="pt")["pixel_values"]


def test_scores_are_those_of_the_whole_clip(clip, processor):
    inputs = processor(text=PROMPTS, images=[picture(0), picture(1)], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = clip(**inputs).logits_per_image
    scores = PromptClassifier(clip, processor, PROMPTS)(inputs["pixel_values"])
    torch.testing.assert_close(scores, wanted)
    assert not torch.allclose(scores[0], scores[1])


def test_a_batch_and_single_pictures_agree(clip, processor):
    model, both = PromptClassifier(clip, processor, PROMPTS), pixels(processor, 0, 1)
    torch.testing.assert_close(model(both), torch.cat([model(both[:1]), model(both[1:])]))


def test_contrast_and_softmax_by_hand(clip, processor):
    x = pixels(processor, 0)
    similarity = PromptClassifier(clip, processor, PROMPTS)(x)[0].tolist()
    contrast = PromptClassifier(clip, processor, PROMPTS, "contrast")(x)[0].tolist()
    softmax = PromptClassifier(clip, processor, PROMPTS, "softmax")(x)[0].tolist()
    powers = [np.exp(value) for value in similarity]
    assert contrast == pytest.approx([value - sum(similarity) / 3 for value in similarity], abs=1e-4)
    assert softmax == pytest.approx([power / sum(powers) for power in powers], abs=1e-4)


def test_only_similarity_knows_nothing_of_the_other_prompts(clip, processor):
    x = pixels(processor, 0)
    for scores, alone in (("similarity", True), ("contrast", False), ("softmax", False)):
        few, more = (PromptClassifier(clip, processor, PROMPTS[:n], scores)(x)[0, 0].item() for n in (2, 3))
        assert (few == pytest.approx(more, abs=1e-5)) == alone, scores


def test_the_gradient_is_that_of_a_finite_difference(clip, processor):
    model, x = PromptClassifier(clip, processor, PROMPTS).double(), pixels(processor, 0).double()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, 1], x)
    direction, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double(), 1e-5
    with torch.no_grad():
        slope = (model(x + step * direction)[0, 1] - model(x - step * direction)[0, 1]) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
    assert abs(slope.item()) > 1e-3


def test_maps_follow_the_picture_and_the_prompt(clip, processor):
    model = PromptClassifier(clip, processor, PROMPTS)
    for attribute in (
        relevance,
        lambda *args: explain(
            *args, clip.vision_model.encoder.layers[-1].layer_norm1, functools.partial(tokens_to_map, grid=(4, 4))
        ),
    ):
        first, second = (attribute(model, pixels(processor, seed), PROMPTS) for seed in (0, 1))
        assert first.shape == (3, 128, 128)
        assert np.abs(first - second).max() > 0.1
        assert np.abs(first[0] - first[1]).max() > 0.1


def test_names_stand_for_prompts(clip, processor):
    model, x = PromptClassifier(clip, processor, {"cat": PROMPTS[0], "cup": PROMPTS[1]}), pixels(processor, 0)
    assert model.prompts == {"cat": PROMPTS[0], "cup": PROMPTS[1]}
    np.testing.assert_array_equal(relevance(model, x, "cup"), relevance(model, x, 1))
    assert set(top_categories(model, x, k=2).index) == {"cat", "cup"}


@pytest.mark.parametrize("size", [(128, 192), (96, 96)])
def test_inputs_of_another_shape_have_their_own_grid(clip, processor, size):
    model, x = PromptClassifier(clip, processor, PROMPTS), torch.randn(1, 3, *size)
    assert model.grid(x) == (size[0] // 32, size[1] // 32)
    reshape = functools.partial(tokens_to_map, grid=model.grid(x))
    maps = explain(model, x, PROMPTS, clip.vision_model.encoder.layers[-1].layer_norm1, reshape)
    assert maps.shape == (3, *size) and np.isfinite(maps).all()


def test_the_processor_makes_any_picture_fit(clip, processor):
    x = processor(images=picture(0, (200, 90)), return_tensors="pt")["pixel_values"]
    assert PromptClassifier(clip, processor, PROMPTS)(x).shape == (1, 3)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts are texts such as .*, at least one"),
        ({}, "at least one"),
        (["a cat", 3], "prompts are texts such as .*, not int"),
        (["a cat " * 10], r"'a cat a cat .*\.\.\.' has 22 tokens; the model reads 16, .*: shorten it"),
    ],
)
def test_bad_prompts_say_what_to_do(clip, processor, prompts, message):
    with pytest.raises(ValueError, match=message):
        PromptClassifier(clip, processor, prompts)


def test_a_prompt_as_long_as_the_context_is_read(clip, processor):
    whole = " ".join(["cat"] * 14)  # with the marks for start and end the 16 tokens of the context
    assert len(processor.tokenizer(whole)["input_ids"]) == 16
    PromptClassifier(clip, processor, whole)
    with pytest.raises(ValueError, match="has 17 tokens; the model reads 16"):
        PromptClassifier(clip, processor, whole + " cat")


def test_unknown_scores_are_named(clip, processor):
    with pytest.raises(ValueError, match="scores is one of 'similarity', 'contrast', 'softmax', not 'cosine'"):
        PromptClassifier(clip, processor, PROMPTS, "cosine")


def test_unknown_words_are_all_the_same_and_are_named(clip, processor):
    with pytest.warns(UserWarning, match=r"does not know 'zebra' in 'a photo of a zebra\.' and reads it as <\|unknown"):
        zebra = PromptClassifier(clip, processor, "a photo of a zebra.")
    with pytest.warns(UserWarning, match="'quagga'"):
        quagga = PromptClassifier(clip, processor, ["a photo of a quagga."])
    torch.testing.assert_close(zebra.text_embeds, quagga.text_embeds)


def test_an_empty_prompt_is_a_prompt(clip, processor):
    model = PromptClassifier(clip, processor, ["", *PROMPTS])
    assert model(pixels(processor, 0)).shape == (1, 4) and torch.isfinite(model.text_embeds).all()


def test_the_clip_is_left_as_it_was(clip, processor):
    clip.train()
    wanted = {name: value.clone() for name, value in clip.state_dict().items()}
    model = PromptClassifier(clip, processor, PROMPTS)
    assert clip.training and clip.text_model.training
    assert all(p.requires_grad for p in clip.parameters()) and not model.text_embeds.requires_grad
    assert wanted.keys() == clip.state_dict().keys()
    assert all(torch.equal(wanted[name], value) for name, value in clip.state_dict().items())


def naming(name):
    """A bundled CLIP that looks for the scenes' categories, and its processor."""
    clip, processor = load(name, weights="bundled")
    return PromptClassifier(clip, processor, {c: f"a photo of {with_article(c)}." for c in labels()}), processor


@pytest.mark.parametrize("name", names_of("prompts"))
def test_bundled_clips_find_what_their_cards_say(name):
    model, processor = naming(name)
    right = {}
    for objects in (1, 2):
        scenes = [make_scene(500_000 + i, objects, 128) for i in range(300)]
        x = torch.cat([processor(images=scene.image, return_tensors="pt")["pixel_values"] for scene in scenes])
        with torch.no_grad():
            first = torch.cat([model(some) for some in x.split(50)]).topk(objects).indices.tolist()
        found = [{labels()[i] for i in row} == set(scene.categories) for row, scene in zip(first, scenes, strict=True)]
        right[objects] = np.mean(found)
    assert right[1] >= 0.95 and right[2] >= 0.85, right


@pytest.mark.parametrize(("name", "bar"), [("clip-base", 0.85), ("clip-large", 0.8)])
def test_relevance_points_at_what_the_prompt_names(name, bar):
    model, processor = naming(name)
    scores = score_table(
        {"relevance": lambda x, names: relevance(model, x, names)}, examples(model, processor, n=60, split="validation")
    )
    assert scores.loc["relevance", "pointing"] >= bar
    assert scores.loc[["centre dot", "random map"], "pointing"].max() < 0.3


@pytest.mark.parametrize("name", names_of("prompts"))
def test_a_bundled_clip_is_small_and_has_a_card(name):
    files = {path.name: path.stat().st_size for path in (BUNDLED / name).iterdir()}
    assert {"README.md", "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(
        files
    )
    assert max(files.values()) < 3e6
    card = (BUNDLED / name / "README.md").read_text()
    assert f"python -m training.clip {name}" in card and "not zero-shot in the strict sense" in card
