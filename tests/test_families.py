"""The finder against what was written down from the models' sources, family by family."""

import functools
import warnings

import numpy as np
import pytest
import torch
from families import EXCEPTIONS, FAMILIES, NORMALISED, UNTRAINED, build, image
from transformers import PerceiverConfig, PerceiverForImageClassificationLearned
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from xai_helpers.cam import explain
from xai_helpers.concepts import factorize
from xai_helpers.layers import find_target_layers
from xai_helpers.wrappers import LogitsModel, layer_path

MODEL_TYPES = set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
KNOWN = [f for f in FAMILIES if f.library != "transformers" or f.model_type in MODEL_TYPES]  # an old release has fewer

each_family = pytest.mark.parametrize("family", KNOWN, ids=lambda f: f.name)
each_size = pytest.mark.parametrize("shape", ["square", "wide"])


@functools.lru_cache(maxsize=1)
def built(name):
    return build(next(family for family in FAMILIES if family.name == name))


def cam_paths(family):
    """Where the head reads CLS alone, the finder takes the norm after the output that the definition gives."""
    return [path for path, why in family.also.items() if why == NORMALISED] or family.cam


def check_maps(maps, n, size):
    assert maps.shape == (n, *size) and np.isfinite(maps).all() and maps.max() > 0.5


@each_size
@each_family
def test_the_finder_gives_the_expected_layers_and_they_can_be_explained(family, shape):
    size = family.size if shape == "square" else family.wide
    if size is None:
        pytest.skip(family.square_only)
    inner, pixel_values = built(family.name), image(size)
    model = LogitsModel(inner, **family.options) if shape == "wide" else inner
    report = find_target_layers(model, pixel_values)

    entries = {candidate.path: candidate for candidate in report.candidates}
    for target, expected in ((report.cam, cam_paths(family)), (report.dff, family.dff)):
        assert layer_path(inner, target.module) in expected
        assert target == entries[target.path].target
        found = entries[target.path]
        assert (found.layout, found.prefix, found.grid) == (family.layout, family.prefix, family.grid(size))
    usable = {layer_path(inner, candidate.target.module) for candidate in report.candidates if candidate.target}
    assert usable & set(family.cam), "what the definition gives is on the list too"

    scores = model_scores(model, pixel_values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model cannot be forked")  # the image is repeated instead
        maps = explain(model, pixel_values, scores.topk(2).indices, report.cam.module, report.cam.reshape_transform)
    check_maps(maps[:1], 1, size)
    assert np.isfinite(maps).all()

    head = family.concept_head(inner) if family.concept_head else lambda vectors: vectors
    concepts = factorize(model, pixel_values, report.dff.module, head, report.dff.reshape_transform, n_concepts=2)
    check_maps(concepts.maps, 2, size)
    assert np.isfinite(concepts.scores).all()
    assert not family.concept_head or concepts.scores.shape == (2, len(scores))


@each_family
def test_the_finder_gives_the_same_for_the_weights_that_a_model_is_made_with(family):
    """In deep models these fade what comes from the picture to 1e-30 of a score; a few leave nothing of it."""
    torch.manual_seed(0)
    model = family.make().float().eval()
    found = set()
    try:
        report = find_target_layers(model, image(family.size))
        found = {layer_path(model, report.cam.module) in cam_paths(family), report.dff.path in family.dff}
    except ValueError as error:
        assert family.name in UNTRAINED, error
    assert (found == {True}) == (family.name not in UNTRAINED)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("donut-swin", "donut.encoder.layers.1.blocks.1.layernorm_before"),
        ("pvt", "pvt.encoder.block.1.1.layer_norm_1"),
        ("hiera", "hiera.encoder.stages.1.layers.1.layernorm_before"),
    ],
)
def test_where_blocks_return_tuples_their_norms_are_worth_a_sweep(name, norm):
    family = next(family for family in FAMILIES if family.name == name)
    assert norm in find_target_layers(built(name), image(family.size)).sweep


def model_scores(model, pixel_values):
    with torch.no_grad():
        return LogitsModel(model)(pixel_values)[0]


@pytest.mark.parametrize("family", [f for f in KNOWN if f.concept_head], ids=lambda f: f.name)
def test_the_concept_head_says_what_the_model_makes_of_a_picture_of_one_concept(family):
    model = built(family.name)
    report = find_target_layers(model, image(family.size))
    vector = []

    def overwrite(module, inputs, output):
        channels_first = family.layout == "channels first"
        n = output.shape[1 if channels_first else -1]
        vector.append(torch.randn(n, generator=torch.Generator().manual_seed(2)))
        return (vector[0][:, None, None] if channels_first else vector[0]).expand_as(output).clone()

    handle = report.dff.module.register_forward_hook(overwrite)
    expected = model_scores(model, image(family.size))
    handle.remove()
    with torch.no_grad():
        scores = family.concept_head(model)(vector[0][None].clone())
    torch.testing.assert_close(scores[0], expected, rtol=1e-3, atol=1e-4)


def test_every_family_of_transformers_is_described_or_says_why_not():
    described = {family.model_type for family in FAMILIES if family.library == "transformers"}
    assert MODEL_TYPES <= described | set(EXCEPTIONS)
    assert not described & set(EXCEPTIONS)
    assert len(described & MODEL_TYPES) >= len(MODEL_TYPES) - 3


def test_perceiver_is_an_exception_and_the_finder_says_so():
    torch.manual_seed(0)
    config = PerceiverConfig(
        num_latents=16, d_latents=32, num_self_attends_per_block=2, num_self_attention_heads=2, image_size=32
    )
    model = PerceiverForImageClassificationLearned(config).eval()
    report = find_target_layers(model, image((32, 32)))
    [chosen] = [candidate for candidate in report.candidates if candidate.target == report.cam]
    assert chosen.path == "perceiver.encoder.cross_attention.attention.self.layernorm2"  # of the input pixels
    assert "% of the model comes after it" in chosen.verdict
    latents = [candidate for candidate in report.candidates if candidate.path.startswith("perceiver.decoder")]
    assert latents and all("positions are no places" in candidate.verdict for candidate in latents)
