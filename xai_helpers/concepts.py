"""Deep Feature Factorization: what the parts of an image are to a model, without asking for a category."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from xai_helpers.balance import check_rules_reach
from xai_helpers.layers import TargetLayer, modules_and_transform
from xai_helpers.reshape import ADVICE, check_finite, check_layout, check_rows, layer_to_map, runs_often
from xai_helpers.scoring import Example, strongest_inside
from xai_helpers.wrappers import Scorer, check_count, frozen, input_for, layer_path


@dataclasses.dataclass
class Concepts:
    """Concepts of one image.

    Attributes:
        maps: where each concept is, float32 (n_concepts, height, width) in [0, 1] at the size of the image tensor.
        vectors: the activation where each concept is strongest, float32 (n_concepts, channels).
        scores: what the head makes of the vectors, float32 (n_concepts, n_classes); logits, if the head gives logits.
    """

    maps: np.ndarray
    vectors: np.ndarray
    scores: np.ndarray

    def labels(self, id2label: Mapping[int, str]) -> list[str]:
        """What the head calls each concept: the best category, without its synonyms, and its score."""
        best = self.scores.argmax(axis=1)
        return [f"{id2label[int(i)].split(',')[0]} ({row[i]:.1f})" for i, row in zip(best, self.scores, strict=True)]


def factorize(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    target_layer: torch.nn.Module | TargetLayer,
    concept_head: Callable[[torch.Tensor], torch.Tensor],
    reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    n_concepts: int = 4,
) -> Concepts:
    """Splits an image into concepts (Deep Feature Factorization: Collins, Achanta, Süsstrunk, ECCV 2018).

    Non-negative matrix factorization of the activations: at each position they are a sum of concept vectors, weighted
    by the concepts' maps. Activations may be negative (after a layer norm): the smallest value of each channel in the
    image is taken off before and put back onto the vectors. A factorization leaves the scale of a vector open, so a
    vector is scaled to its map's maximum: it is the activation that the concept alone makes where it is strongest.
    The same input gives the same concepts. The model is left as it was.

    Args:
        model: a transformers classification model, or any module that maps images to a score tensor.
        pixel_values: one image as the model's processor makes it, float tensor (1, channels, height, width).
        target_layer: the module whose output is factorized, or a `TargetLayer`.
        concept_head: callable that scores vectors, (n_concepts, channels) -> (n_concepts, n_classes): what the model
            does after the target layer's average, so its classifier, with the norm before it where there is one.
        reshape_transform: turns the layer's output into (batch, channels, height, width); None if it has that shape, or
            for a `TargetLayer`, which has its own.
        n_concepts: how many, at least 1.

    Returns:
        Concepts.

    Raises:
        ValueError: a layer that is not in the model, is not reached, runs more than once in a pass, has no positions or
            other rows than the picture's, or puts out what is not finite; a reshape transform or a concept head that
            does not fit; pixel_values of another shape or not finite; no whole number of concepts; a model in half
            precision, exported, or made in inference mode.

    Example:
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("resnet", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> concepts = factorize(model, example.pixel_values, model.resnet.encoder.stages[-1], model.classifier)
        >>> concepts.maps.shape, len(concepts.labels(model.config.id2label))
        ((4, 128, 128), 4)
    """
    # Late, as in `explain`.
    from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff
    from pytorch_grad_cam.utils.image import scale_cam_image
    from sklearn.exceptions import ConvergenceWarning

    pixel_values = input_for(model, pixel_values)
    check_count("n_concepts", n_concepts)
    check_rules_reach(model)
    scorer = Scorer(model)
    (module,), reshape_transform = modules_and_transform(target_layer, reshape_transform)
    path = layer_path(model, module)
    activations: list[torch.Tensor] = []

    def watch(layer, inputs, output):
        if activations:
            raise ValueError(runs_often(path))
        activations.append(layer_to_map(output, reshape_transform, path))
        check_rows(activations[0], 1, path)
        check_layout(activations[0], pixel_values.shape[2:], path)
        check_finite(activations[0], path)

    with frozen(scorer), torch.no_grad():
        with module.register_forward_hook(watch):
            scorer(pixel_values)
        if not activations:
            raise ValueError(f"target layer {path} is not reached in the forward pass; {ADVICE}")
        features = activations[0].float().cpu().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # dff stops after 200 iterations
            factors, strengths = dff(features.copy(), n_components=n_concepts)
        offset = features.min(axis=(0, 2, 3))
        peaks = strengths[0].max(axis=(1, 2))
        vectors = ((factors - offset[:, None]) * peaks + offset[:, None]).T.astype(np.float32)
        scores = _head_scores(concept_head, torch.from_numpy(vectors).to(pixel_values))
    height, width = pixel_values.shape[2:]
    return Concepts(scale_cam_image(strengths[0], (width, height)), vectors, scores)


def named_right(
    model: Any,
    examples: Sequence[Example],
    target_layer: torch.nn.Module | TargetLayer,
    concept_head: Callable[[torch.Tensor], torch.Tensor],
    reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    n_concepts: int = 4,
) -> float:
    """How often the concept that rules an object bears the object's name.

    An object's ruling concept is the one that is the strongest in the largest part of its mask (`strongest_inside`).

    Args:
        model: with a `config.id2label`.
        examples: `Example` objects, as `checkpoints.examples` gives them.
        target_layer, concept_head, reshape_transform, n_concepts: as for `factorize`.

    Returns:
        The share of objects, in [0, 1].
    """
    right = []
    for example in examples:
        concepts = factorize(model, example.pixel_values, target_layer, concept_head, reshape_transform, n_concepts)
        ruling = strongest_inside(concepts.maps, example.masks).argmax(axis=0)
        said = [model.config.id2label[int(i)] for i in concepts.scores[ruling].argmax(axis=1)]
        right += [name == wanted for name, wanted in zip(said, example.categories, strict=True)]
    return float(np.mean(right))


def _head_scores(concept_head, vectors):
    wanted = f"concept_head must map (n_concepts, channels) to (n_concepts, n_classes); for {tuple(vectors.shape)} it "
    try:
        scores = concept_head(vectors)
    except Exception as error:
        raise ValueError(f"{wanted}raised {type(error).__name__}: {error}") from error
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or len(scores) != len(vectors):
        raise ValueError(f"{wanted}returned {tuple(getattr(scores, 'shape', ())) or type(scores).__name__}")
    return scores.float().cpu().numpy()
