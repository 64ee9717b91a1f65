"""Each check of the tasks on CLIP takes right answers and says what is wrong with others."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from xai_helpers.checkpoints import load
from xai_helpers.checks import clip as checks
from xai_helpers.wrappers import PromptClassifier


def vectors(*shape, seed=7):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw) + 1


def cosines(pictures, texts):
    return normalize(pictures, dim=-1) @ normalize(texts, dim=-1).T


def centred(scores, axis=1):
    return scores - scores.mean(dim=axis, keepdim=True)


def in_loops(pictures, texts, scale):
    rows = [[scale * float(cosine_similarity(p, t, dim=0)) for t in texts] for p in pictures]
    return [[one - sum(row) / len(row) for one in row] for row in rows]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, t, s: centred(s * cosines(p, t)), None),
        (lambda p, t, s: s * normalize(p, dim=-1) @ centred(normalize(t, dim=-1), axis=0).T, None),
        (in_loops, None),
        (lambda p, t, s: s * cosines(p, t), "is the similarity"),
        (lambda p, t, s: centred(s * cosines(p, t), axis=0), "subtracts a mean over the pictures"),
        (lambda p, t, s: s * cosines(p, t) - s * cosines(p, t).mean(), "subtracts one mean from all"),
        (lambda p, t, s: centred(s * p @ t.T), "is made of vectors that are not normalised"),
        (lambda p, t, s: centred(s * p @ normalize(t).T), "is made of pictures' vectors that are not normalised"),
        (lambda p, t, s: centred(s * normalize(p) @ t.T), "is made of texts' vectors that are not normalised"),
        (lambda p, t, s: (s * cosines(p, t)).softmax(dim=1), "is a softmax"),
        (lambda p, t, s: (s * cosines(p, t)).log_softmax(dim=1), "is a logarithm of a softmax"),
        (lambda p, t, s: centred(cosines(p, t)), "lacks the temperature"),
        (lambda p, t, s: centred(s * cosines(p, t)) * len(t) / (len(t) - 1), "leaves a prompt out of its own mean"),
        (lambda p, t, s: -centred(s * cosines(p, t)), "has the opposite sign"),
        (lambda p, t, s: centred(s * cosines(p, t)).T, r"has the shape \(5, 3\); \(3, 5\) is wanted"),
        (lambda p, t, s: centred(s * s * cosines(p, t)), "the right pattern on another scale"),
        (lambda p, t, s: vectors(len(p), len(t)), "is not right: its correlation"),
        (lambda p, t, s: None, "The contrast is None"),
    ],
)
def test_contrast_scores(function, message, verdict):
    verdict(lambda: checks.contrast_scores(function, vectors(6, 16), vectors(4, 16, seed=8), 14.0), message)


def test_the_contrast_is_that_of_the_prompt_classifier(verdict):
    clip, processor = load("clip-base", weights="bundled")
    classifier = PromptClassifier(clip, processor, ["a photo of a cat.", "a photo of a coin."], "contrast")
    pictures = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds, scores = clip.get_image_features(pictures).pooler_output, classifier(pictures)

    def function(image_embeds, text_embeds, scale):
        return scores if image_embeds is embeds else in_loops(image_embeds, text_embeds, scale)

    scale = clip.logit_scale.exp().item()
    verdict(lambda: checks.contrast_scores(function, embeds, classifier.text_embeds, scale), None)


def ensemble_in_loops(texts):
    found = []
    for wordings in texts.numpy():
        total = sum(wording / np.linalg.norm(wording) for wording in wordings)
        found.append(total / np.linalg.norm(total))
    return found


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t: normalize(normalize(t, dim=-1).mean(dim=1), dim=-1), None),
        (lambda t: normalize(normalize(t, dim=2).sum(dim=1)), None),
        (ensemble_in_loops, None),
        (lambda t: normalize(t, dim=-1).mean(dim=1), "is not normalised again"),
        (lambda t: normalize(t.mean(dim=1), dim=-1), "gives long vectors more weight"),
        (lambda t: t.mean(dim=1), "is the mean of vectors that are not normalised"),
        (lambda t: normalize(normalize(t).mean(dim=1)), "is normalised along the wordings"),
        (lambda t: normalize(t[:, 0], dim=-1), "is the first wording alone"),
        (lambda t: normalize(t[:, -1], dim=-1), "is the last wording alone"),
        (lambda t: normalize(normalize(t, dim=-1).mean(dim=0), dim=-1), r"has the shape \(4, 8\); \(3, 8\) is wanted"),
        (lambda t: -normalize(normalize(t, dim=-1).mean(dim=1), dim=-1), "has the opposite sign"),
        (lambda t: normalize(t[:, :2].mean(dim=1), dim=-1), "is not right: its correlation"),
    ],
)
def test_prompt_ensemble(function, message, verdict):
    verdict(lambda: checks.prompt_ensemble(function, vectors(5, 6, 16)), message)
