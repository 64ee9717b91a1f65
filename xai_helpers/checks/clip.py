"""Checks of the tasks in the chapters on CLIP."""

from collections.abc import Callable

import numpy as np
import torch

from xai_helpers.checks import as_array, right, same


def _unit(vectors, axis=-1):
    return vectors / np.linalg.norm(vectors, axis=axis, keepdims=True)


def _vectors(*shape, seed=0):
    """Random vectors of very different lengths, float32 (..., dim)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw) * torch.rand(*shape[:-1], 1, generator=draw).mul(4).exp()


def contrast_scores(function: Callable, image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: float) -> None:
    """Task: a function (image_embeds, text_embeds, scale) -> contrasts, (n_pictures, n_prompts)."""
    for pictures, texts, factor in (
        (_vectors(3, 8), _vectors(5, 8, seed=1), 10.0),
        (image_embeds, text_embeds, scale),
    ):
        raw_pictures, raw_texts = as_array(pictures, "The pictures' vectors"), as_array(texts, "The texts' vectors")
        P, T = _unit(raw_pictures), _unit(raw_texts)
        n = len(T)
        wanted = factor * P @ (T - T.mean(axis=0)).T  # the contrast is the similarity to a vector less the mean vector
        similarity = factor * P @ T.T
        powers = np.exp(similarity - similarity.max(axis=1, keepdims=True))
        shares = powers / powers.sum(axis=1, keepdims=True)

        def centred(scores):
            return scores - scores.mean(axis=1, keepdims=True)

        mistakes = {
            "is the similarity: subtract the mean over the prompts": similarity,
            "subtracts a mean over the pictures: take each picture's mean over the prompts": (
                similarity - similarity.mean(axis=0)
            ),
            "subtracts one mean from all: take each picture's own": similarity - similarity.mean(),
            "is made of vectors that are not normalised": factor * centred(raw_pictures @ raw_texts.T),
            "is made of pictures' vectors that are not normalised": factor * centred(raw_pictures @ T.T),
            "is made of texts' vectors that are not normalised": factor * centred(P @ raw_texts.T),
            "is a softmax: subtract a mean": shares,
            "is a logarithm of a softmax: subtract the mean of the similarities": np.log(shares),
            "lacks the temperature: multiply by scale": wanted / factor,
            "leaves a prompt out of its own mean: the mean is over all prompts": wanted * n / (n - 1),
        }
        same(function(pictures, texts, factor), wanted, "The contrast", mistakes)
    right("The contrasts of a picture add up to 0: each says how a prompt compares with the list that it stands in.")


def prompt_ensemble(function: Callable, text_embeds: torch.Tensor) -> None:
    """Task: a function of text_embeds, (n_categories, n_templates, dim) -> unit vectors, (n_categories, dim)."""
    for texts in (_vectors(3, 4, 8), text_embeds):
        raw = as_array(texts, "The texts' vectors")
        mean = np.array([np.mean([wording / np.sqrt(wording @ wording) for wording in one], axis=0) for one in raw])
        mistakes = {
            "is not normalised again: the mean of unit vectors is shorter than 1": mean,
            "gives long vectors more weight: normalise each wording before the mean": _unit(raw.mean(axis=1)),
            "is the mean of vectors that are not normalised": raw.mean(axis=1),
            "is normalised along the wordings: the numbers of a vector are on the last axis": _unit(
                _unit(raw, axis=1).mean(axis=1)
            ),
            "is the first wording alone": _unit(raw[:, 0]),
            "is the last wording alone": _unit(raw[:, -1]),
        }
        same(function(texts), _unit(mean), "The ensemble", mistakes)
    lengths = np.linalg.norm(mean, axis=1)
    right(f"{raw.shape[1]} wordings each became one vector of length 1; their mean had {lengths.mean():.2f}.")
