import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

from xai_helpers.attention import relevance, rollout
from xai_helpers.wrappers import LogitsModel

PICTURE = torch.tensor([[0.9, -0.4], [0.3, 1.2]])  # 2 x 2 pixels, each its own patch
CLS = 0.7
SCALES = (1.5, -0.8)  # of the attention in the two layers


class Attention(nn.Module):
    """One head; a token's query, key and value are the token itself."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, tokens):
        heads = tokens[:, None]
        weights = (self.scale * heads @ heads.transpose(2, 3)).softmax(dim=-1)
        return (weights @ heads)[:, 0], weights


class TwoLayers(nn.Module):
    """Two attention layers with residual connections on tokens of one channel; two scores, of opposite sign."""

    def __init__(self, mean_head=False, prefix=(CLS,)):
        super().__init__()
        self.embed = nn.Conv2d(3, 1, 1, bias=False)
        self.embed.weight.data = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        self.layers = nn.ModuleList(Attention(scale) for scale in SCALES)
        self.mean_head, self.prefix = mean_head, torch.tensor(prefix)

    def forward(self, x):
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix[None, :, None].expand(len(x), -1, 1), patches], dim=1)
        for layer in self.layers:
            tokens = tokens + layer(tokens)[0]
        score = tokens[:, len(self.prefix) :].mean(dim=1) if self.mean_head else tokens[:, 0]
        return torch.cat([score, -2 * score], dim=1)


def pixels(picture=PICTURE):
    return torch.stack([picture, torch.zeros(2, 2), torch.ones(2, 2)])[None]


def forward_by_hand(tokens, changes, mean_head, prefix):
    """The two layers in numpy; `changes` are added to the attention weights. Returns a score and the weights."""
    weights = []
    for scale, change in zip(SCALES, changes, strict=True):
        logits = np.exp(scale * np.outer(tokens, tokens))
        weights.append(logits / logits.sum(axis=1, keepdims=True) + change)
        tokens = tokens + weights[-1] @ tokens
    return (tokens[prefix:].mean() if mean_head else tokens[0]), weights


def normalised(values):
    values = values - values.min()
    return values / values.max()


def relevance_by_hand(factor, mean_head, prefix):
    """Chefer et al. 2021 with gradients from central differences."""
    tokens = np.concatenate([prefix, PICTURE.numpy().ravel()]).astype(np.float64)
    n, step = len(tokens), 1e-5
    unchanged = np.zeros((2, n, n))
    _, weights = forward_by_hand(tokens, unchanged, mean_head, len(prefix))
    R = np.eye(n)
    for layer in range(2):
        positive = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                change = unchanged.copy()
                change[layer, i, j] = step
                up, _ = forward_by_hand(tokens, change, mean_head, len(prefix))
                down, _ = forward_by_hand(tokens, -change, mean_head, len(prefix))
                gradient = factor * (up - down) / (2 * step)
                positive[i, j] = max(weights[layer][i, j] * gradient, 0)
        R = R + positive @ R
    patches = R[:, len(prefix) :]
    row = patches[len(prefix) :].mean(axis=0) if mean_head else patches[0]
    return normalised(row).reshape(2, 2)


@pytest.mark.parametrize("mean_head", [False, True])
@pytest.mark.parametrize("prefix", [(CLS,), (CLS, -0.2, 0.5)])
def test_relevance_of_two_layers_and_one_head_worked_out_by_hand(mean_head, prefix):
    model = TwoLayers(mean_head, prefix)
    maps = relevance(model, pixels(), [0, 1])
    assert maps.dtype == np.float32 and maps.shape == (2, 2, 2)
    first, second = (relevance_by_hand(factor, mean_head, prefix) for factor in (1, -2))
    np.testing.assert_allclose(maps[0], first, atol=1e-4)
    np.testing.assert_allclose(maps[1], second, atol=1e-4)
    assert np.abs(first - second).max() > 0.1


def test_relevance_without_prefix_tokens():
    np.testing.assert_allclose(
        relevance(TwoLayers(True, ()), pixels(), 0)[0], relevance_by_hand(1, True, ()), atol=1e-4
    )


@pytest.mark.parametrize("mean_head", [False, True])
def test_rollout_worked_out_by_hand(mean_head):
    tokens = np.array([CLS, *PICTURE.numpy().ravel()], dtype=np.float64)
    _, (first, second) = forward_by_hand(tokens, np.zeros((2, 5, 5)), mean_head, 1)
    R = (0.5 * second + 0.5 * np.eye(5)) @ (0.5 * first + 0.5 * np.eye(5))
    row = R[1:, 1:].mean(axis=0) if mean_head else R[0, 1:]
    maps = rollout(TwoLayers(mean_head), pixels())
    assert maps.dtype == np.float32 and maps.shape == (1, 2, 2)
    np.testing.assert_allclose(maps[0], normalised(row).reshape(2, 2), atol=1e-4)


def tiny_vit(**options):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,
        id2label={0: "cat", 1: "coin", 2: "rocket"},
        **options,
    )
    return ViTForImageClassification(config).eval()


def picture(height=32, width=32):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_relevance_of_a_vit_follows_the_attentions_that_transformers_returns():
    model = tiny_vit(attn_implementation="eager")
    maps = relevance(model, picture(), ["rocket", "cat"])
    output = model(picture(), output_attentions=True)
    for attention in output.attentions:
        attention.retain_grad()
    output.logits[0, 2].backward()
    R = np.eye(17)
    for attention in output.attentions:
        R = R + np.maximum((attention * attention.grad)[0].detach().numpy(), 0).mean(axis=0) @ R
    grid = normalised(R[0, 1:]).reshape(4, 4)
    resized = torch.nn.functional.interpolate(torch.tensor(grid)[None, None], size=(32, 32), mode="bilinear")[0, 0]
    np.testing.assert_allclose(maps[0], normalised(resized.numpy()), atol=1e-4)
    assert np.abs(maps[0] - maps[1]).max() > 0.1


def test_a_picture_that_is_not_square():
    model = LogitsModel(tiny_vit(), interpolate_pos_encoding=True)
    maps = relevance(model, picture(32, 64), ["cat", 1, lambda scores: scores[2]])
    assert maps.shape == (3, 32, 64)
    assert maps.min() == 0 and maps.max() <= 1


def test_one_forward_pass_for_all_categories():
    model, passes = tiny_vit(), []
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    relevance(model, picture(), [0, 1, 2])
    assert passes == [1]


def test_the_same_input_gives_the_same_maps():
    model = tiny_vit()
    first, second = (relevance(model, picture(), [0, 1]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


class ClipScores(nn.Module):
    """Similarity of an image to three directions, with the image tower of CLIP."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        vision = {**tower, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
        text = {**tower, "vocab_size": 20}
        self.clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
        self.texts = torch.randn(3, 8)

    def forward(self, pixel_values):
        return self.clip.get_image_features(pixel_values=pixel_values).pooler_output @ self.texts.T


def implementations(model):
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def test_a_wrapped_clip_is_read_and_each_tower_keeps_its_attention():
    model = ClipScores().eval()
    model.clip.text_model.set_attn_implementation("eager")
    before = implementations(model)
    assert set(before) == {"eager", "sdpa"}
    maps = relevance(model, picture(), [0, 1, 2])
    assert maps.shape == (3, 32, 32) and np.abs(maps[0] - maps[1]).max() > 0.1
    assert implementations(model) == before


def state(model):
    return (
        implementations(model),
        [(module.training, len(module._forward_hooks)) for module in model.modules()],
        [(parameter.requires_grad, id(parameter.grad)) for parameter in model.parameters()],
    )


def fails(scores):
    raise KeyError("a target of the reader")


@pytest.mark.parametrize("call", [lambda *arguments: relevance(*arguments, 0), rollout])
def test_the_model_is_as_before(call):
    model = tiny_vit().train()
    model.classifier.eval().requires_grad_(False)
    before = state(model)
    assert before[0][0] == "sdpa"
    call(model, picture())
    assert state(model) == before


@pytest.mark.parametrize(
    ("pixel_values", "categories", "error"),
    [(picture(), [0, fails], KeyError), (picture(48, 48), 0, ValueError), (picture(), 3, ValueError)],
)
def test_the_model_is_as_before_when_something_fails(pixel_values, categories, error):
    model = tiny_vit().train()
    model.classifier.eval().requires_grad_(False)
    before = state(model)
    with pytest.raises(error):
        relevance(model, pixel_values, categories)
    assert state(model) == before


def test_a_model_in_train_mode_is_explained_in_eval_mode():
    model = tiny_vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    expected = relevance(model, picture(), 0)
    np.testing.assert_array_equal(relevance(model.train(), picture(), 0), expected)


@pytest.mark.parametrize("call", [lambda *arguments: relevance(*arguments, 0), rollout])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(call, context):
    model = tiny_vit()
    expected = call(model, picture())
    with context():
        np.testing.assert_array_equal(call(model, picture() * 1), expected)


def test_a_model_without_attentions_names_explain():
    model = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]))
    with pytest.raises(ValueError, match="ResNetForImageClassification returns no attention weights; use explain"):
        relevance(model, picture(), 0)
    with pytest.raises(ValueError, match="use explain"):
        rollout(model, picture())


def test_windowed_attention_names_explain():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    model = SwinForImageClassification(config)
    before = state(model)
    with pytest.raises(ValueError, match="with 8 x 8 patches among the tokens: windowed .*use explain"):
        relevance(model, picture(), 0)
    assert state(model) == before


class EarlyScores(nn.Module):
    """Scores that are read after the first block; the last one runs for nothing."""

    def __init__(self):
        super().__init__()
        self.vit = tiny_vit()

    def forward(self, x):
        return self.vit.classifier(self.vit(x, output_hidden_states=True).hidden_states[1][:, 0])


def test_other_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="the closest are: 'coin'"):
        relevance(tiny_vit(), picture(), "coins")
    with pytest.raises(ValueError, match="one image at a time"):
        relevance(tiny_vit(), picture().repeat(2, 1, 1, 1), "coin")
    with pytest.raises(ValueError, match="does not depend on the attention of the last block"):
        relevance(tiny_vit(), picture(), lambda scores: 0 * scores.sum())
    with pytest.raises(ValueError, match="does not depend on the attention of the last block"):
        relevance(EarlyScores(), picture(), 0)
    with pytest.raises(ValueError, match="makes a tensor of one number"):
        relevance(tiny_vit(), picture(), lambda scores: scores)
    with pytest.raises(ValueError, match="Flatten returns no attention weights"):  # nor has it parameters
        relevance(nn.Flatten(), picture(), 0)


def test_a_detection_tokens_row_is_read_at_the_patches_in_front_of_it():
    """A YOLOS has patches between its CLS token and its detection tokens; the formula is written out with autograd."""
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[48, 64],
        patch_size=16,
        num_detection_tokens=5,
        use_mid_position_embeddings=False,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    model = YolosForObjectDetection(config).eval()
    model.vit.embeddings.detection_tokens.data.normal_()
    x = torch.randn(1, 3, 48, 64)
    output = model(x, output_attentions=True)
    R = torch.eye(1 + 12 + 5)
    score = output.logits[0, 3, 1]
    for attention, gradient in zip(
        output.attentions, torch.autograd.grad(score, output.attentions, retain_graph=True), strict=True
    ):
        R = R + (attention * gradient).clamp(min=0).mean(dim=1)[0].detach() @ R
    wanted = R[1 + 12 + 3, 1:13].reshape(3, 4).numpy()
    found = relevance(model, x, lambda scores: scores[3, 1])[0]
    assert found.shape == (48, 64)
    # Enlarged from 3 x 4, the maximum and the order of the cells' centres stay.
    centres = found[8::16, 8::16]
    np.testing.assert_array_equal(np.argsort(centres.ravel())[-4:], np.argsort(wanted.ravel())[-4:])
    other = relevance(model, x, lambda scores: scores[2, 1])[0]
    assert np.abs(found - other).max() > 0.05
