"""How the bundled CLIPs are trained: the loss, and the image tower that starts from a ViT."""

import math

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from training import clip as training
from xai_helpers.checkpoints import load
from xai_helpers.scenes import make_scene

TEXTS = ["a photo of a cat.", "", "a coffee cup on a grey background", "a <|unknown|> flower"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return training.new_model(training.RECIPES["clip-base"]).eval()


def inputs():
    scenes = [make_scene(i, 1, 128).image for i in range(4)]
    made = training.processor()(images=scenes, text=TEXTS, padding=True, return_tensors="pt")
    return made["pixel_values"], made["input_ids"], made["attention_mask"]


def test_with_one_true_caption_each_the_loss_is_transformers_own(model):
    pictures, ids, mask = inputs()
    with torch.no_grad():
        ours = training.contrastive(model, pictures, ids, mask, torch.eye(4))
        theirs = model(input_ids=ids, attention_mask=mask, pixel_values=pictures, return_loss=True).loss
    torch.testing.assert_close(ours, theirs)


class Fixed:
    """Gives the same similarities whatever it is asked."""

    def __init__(self, logits):
        self.logits_per_image = torch.tensor(logits)

    def __call__(self, **inputs):
        return self


def test_several_true_captions_share_and_a_caption_without_picture_is_left_out():
    # Two pictures, three captions: the first is true of both, the second of the second picture, the third of none.
    true = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    logits = [[2.0, 0, 1], [1, 1, 0]]
    loss = training.contrastive(Fixed(logits), None, None, None, true).item()

    def log_share(values, i):
        return values[i] - math.log(sum(math.exp(value) for value in values))

    by_picture = [log_share([2, 0, 1], 0), (log_share([1, 1, 0], 0) + log_share([1, 1, 0], 1)) / 2]
    by_caption = [(log_share([2, 1], 0) + log_share([2, 1], 1)) / 2, log_share([0, 1], 1)]
    assert loss == pytest.approx(-(sum(by_picture) / 2 + sum(by_caption) / 2) / 2, rel=1e-5)


def test_without_its_extra_norm_the_image_tower_is_the_vit(model):
    vit, _ = load("vit", weights="bundled")
    pictures = inputs()[0]
    tower, norm = model.vision_model, model.vision_model.pre_layrnorm
    tower.pre_layrnorm = torch.nn.Identity()
    try:
        with torch.no_grad():
            torch.testing.assert_close(
                tower(pictures).pooler_output, vit.vit(pictures).last_hidden_state[:, 0], atol=1e-3, rtol=1e-3
            )
    finally:
        tower.pre_layrnorm = norm


def test_padding_does_not_change_a_text(model):
    words = training.tokenizer()
    alone = words(TEXTS[0], return_tensors="pt")
    padded = words(TEXTS[0], padding="max_length", return_tensors="pt")
    assert padded["input_ids"].shape[1] == training.CONTEXT > alone["input_ids"].shape[1]
    with torch.no_grad():
        a, b = (model.get_text_features(**tokens).pooler_output for tokens in (alone, padded))
    torch.testing.assert_close(a, b)


def test_the_processor_is_the_same_from_its_folder(tmp_path):
    training.processor().save_pretrained(tmp_path)
    again = CLIPProcessor.from_pretrained(tmp_path)
    picture = make_scene(0, 1, 256).image
    ours, theirs = (
        p(images=picture, text=TEXTS, padding=True, return_tensors="pt") for p in (training.processor(), again)
    )
    assert ours.keys() == theirs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ours["pixel_values"].shape == (1, 3, 128, 128)


def random_clip(blocks, units, patch, side):
    config = CLIPConfig(
        vision_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": blocks,
            "intermediate_size": units,
            "patch_size": patch,
            "image_size": side,
            "initializer_range": 0.3,
        },
        text_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": blocks,
            "intermediate_size": units,
            "vocab_size": 20,
            "max_position_embeddings": 8,
            "eos_token_id": 3,
            "initializer_range": 0.3,
        },
        projection_dim=8,
    )
    return CLIPModel(config).eval()


def test_a_grown_clip_computes_the_same():
    torch.manual_seed(0)
    small, large = random_clip(2, 24, 8, 32), random_clip(4, 48, 8, 32)
    pictures, ids = torch.randn(2, 3, 32, 32), torch.tensor([[1, 5, 6, 3], [1, 7, 3, 2]])
    with torch.no_grad():
        wanted = small(input_ids=ids, pixel_values=pictures).logits_per_image
        assert not torch.allclose(large(input_ids=ids, pixel_values=pictures).logits_per_image, wanted, atol=1e-2)
        training.grow(small, large)
        torch.testing.assert_close(large(input_ids=ids, pixel_values=pictures).logits_per_image, wanted)
    new = large.vision_model.encoder.layers[1]
    assert new.self_attn.q_proj.weight.any() and new.mlp.fc1.weight.any() and not new.mlp.fc2.weight.any()


def test_smaller_patches_see_a_plain_picture_as_before():
    torch.manual_seed(0)
    small, large = random_clip(1, 24, 16, 64), random_clip(1, 24, 12, 72)
    training.grow(small, large)
    embedded = [
        model.vision_model.embeddings.patch_embedding(torch.full((1, 3, 72, 72), 0.7))[0, :, 0, 0]
        for model in (small, large)
    ]
    torch.testing.assert_close(embedded[1], embedded[0], atol=1e-4, rtol=1e-4)
    places = large.vision_model.embeddings.position_embedding.weight
    assert places.shape == (37, 16)
    torch.testing.assert_close(places[0], small.vision_model.embeddings.position_embedding.weight[0])
