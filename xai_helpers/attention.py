"""Maps of models that attend, read from the attention weights of all their blocks."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from xai_helpers.layers import NO_GRADIENT
from xai_helpers.wrappers import (
    Scorer,
    category_targets,
    check_scores,
    eager_attention,
    finished_maps,
    frozen,
    input_for,
    no_checkpointing,
)


def relevance(
    model: torch.nn.Module, pixel_values: torch.Tensor, categories: str | int | Callable | Sequence
) -> np.ndarray:
    """Shows what in an image speaks for each category, from the attentions and their gradients.

    Gradient-weighted attention relevance (Chefer, Gur, Wolf: Generic Attention-model Explainability, ICCV 2021, the
    case of self-attention). R starts as the identity; each block, first to last, adds what it attends to with a
    positive effect on the score: R <- R + mean over heads of max(attention * its gradient, 0) @ R. The map is the
    row of the token that the head reads: the CLS row (the mean of the rows, for several such tokens), or that of a
    YOLOS's detection token; for a mean-pooled head, the mean of the patches' rows. Which of the two is seen from
    the gradient: only the rows that the head reads have one in the last block. Where it reads both, as DINOv2's does,
    each counts by what its attentions in that block do for the score, attention times gradient. One forward pass, and
    one backward pass a category. The model is explained in eval mode with eager attention, and left as it was.

    Args:
        model: a ViT-like transformers model, or a module around one that maps images to a score tensor.
        pixel_values: one image as the model's processor makes it, float tensor (1, channels, height, width).
        categories: names from `config.id2label`, indices, or callables (scores of one image -> scalar); one or several.

    Returns:
        A float32 array (n_categories, height, width) in [0, 1], at the size of pixel_values.

    Raises:
        ValueError: no attention between all patches can be read (a CNN, windowed or pooled attention); an unknown
            category; a callable that returns no single number; a category that no attention has an effect on; scores
            that are not finite, or not (categories,) for a name or an index; a model without a gradient, or made in
            inference mode; pixel_values of another shape or not finite; a model in half precision.

    Warns:
        MapWarning: a map is zero everywhere.

    Example:
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("vit", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> relevance(model, example.pixel_values, example.categories).shape  # a scene with two objects
        (2, 128, 128)
    """
    pixel_values = input_for(model, pixel_values)
    targets = category_targets(model, categories)
    scorer = Scorer(model)
    with frozen(scorer), eager_attention(scorer):
        scores, attentions, patches = _attend(scorer, pixel_values)
        picked = [target(scores[0]) for target in targets]
        check_scores(torch.stack(picked))
        maps = []
        for target in picked:
            gradients = _gradients(target, attentions)
            # R less the identity, beside which the effects on a tiny score would be rounded away.
            D = torch.zeros(attentions[0].shape[-2:], dtype=torch.float32, device=scores.device)
            for attention, gradient in zip(attentions, gradients, strict=True):
                step = (attention * gradient).clamp(min=0).mean(dim=1)[0].detach().float()
                D = D + step + step @ D
            maps.append(_read(D, attentions[-1], gradients[-1], patches))
    return _at_image_size(maps, pixel_values, "no attention has a positive effect on the score")


def rollout(model: torch.nn.Module, pixel_values: torch.Tensor) -> np.ndarray:
    """Shows where a model looks, whatever the category (attention rollout: Abnar and Zuidema, ACL 2020).

    The product over the blocks of the attentions, averaged over heads and mixed half and half with the identity for
    the residual connection. It is read as in `relevance`; arguments and errors are the same.

    Returns:
        A float32 array (1, height, width) in [0, 1].

    Example:
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("vit", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> rollout(model, example.pixel_values).shape
        (1, 128, 128)
    """
    pixel_values = input_for(model, pixel_values)
    scorer = Scorer(model)
    with frozen(scorer), eager_attention(scorer):
        scores, attentions, patches = _attend(scorer, pixel_values)
        check_scores(scores.reshape(1, -1))
        gradients = _gradients(scores.sum(), attentions)
        R = identity = torch.eye(attentions[0].shape[-1], dtype=torch.float32, device=scores.device)
        for attention in attentions:
            R = (attention.mean(dim=1)[0].detach().float() + identity) / 2 @ R
        maps = [_read(R, attentions[-1], gradients[-1], patches)]
    return _at_image_size(maps, pixel_values, "all places are attended to alike")


def _attend(scorer, pixel_values):
    """Runs the image once.

    Returns:
        The scores; the attention weights of each block, (1, heads, tokens, tokens); and the places of the patches
        among the tokens, int (rows, columns). Their grid is that of the last convolution before the first attention,
        and they come last, save for detection tokens.
    """
    attentions, grids = [], []

    def watch(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d) and not attentions:
            grids.append(tuple(output.shape[2:]))
        if isinstance(output, tuple) and len(output) > 1 and getattr(output[1], "ndim", 0) == 4:
            if not any(output[1] is known for known in attentions):
                attentions.append(output[1])

    with contextlib.ExitStack() as stack:
        for module in scorer.modules():
            stack.enter_context(module.register_forward_hook(watch))
        scores = scorer(pixel_values.clone().requires_grad_())

    name = type(scorer.model).__name__
    advice = "use explain, which needs a target layer in the place of attentions"
    if not attentions or not grids:
        raise ValueError(f"{name} returns no attention weights; {advice}")
    grid = grids[-1]
    tokens = attentions[0].shape[-1]
    shapes = [tuple(attention.shape) for attention in attentions]
    if tokens < grid[0] * grid[1] or any((s[0], *s[2:]) != (1, tokens, tokens) for s in shapes):
        raise ValueError(
            f"the attentions of {name} have the shapes {sorted(set(shapes))}, wanted (1, heads, tokens, tokens) with "
            f"{grid[0]} x {grid[1]} patches among the tokens: windowed or pooled attention cannot be followed; {advice}"
        )
    last = tokens - getattr(scorer.config, "num_detection_tokens", 0)
    return scores, attentions, torch.arange(last - grid[0] * grid[1], last, device=scores.device).reshape(grid)


def _gradients(score, attentions):
    """The gradient of a score with respect to each attention, zero where it has no effect."""
    if not score.requires_grad:
        raise ValueError(NO_GRADIENT)
    with no_checkpointing():
        gradients = torch.autograd.grad(score, attentions, retain_graph=True, allow_unused=True, materialize_grads=True)
    if not gradients[-1].any():
        raise ValueError("the score does not depend on the attention of the last block")
    return gradients


def _read(R, attention, gradient, patches):
    """The patches' relevance (rows, columns) for the tokens that the head reads, by what they do in the last block."""
    is_patch = torch.zeros(len(R), dtype=torch.bool, device=R.device).index_fill(0, patches.flatten(), True)
    has_gradient = gradient[0].any(dim=-1).any(dim=0)
    effects = (attention * gradient)[0].detach().float().abs().sum(dim=(0, 2))
    relevance = torch.zeros(len(R), device=R.device)
    for group in (has_gradient & is_patch, has_gradient & ~is_patch):
        if group.any():
            rows = R[patches.flatten()] if is_patch[group][0] else R[group]
            effect = effects[group].sum() / effects.sum().clamp(min=torch.finfo(torch.float32).tiny)
            relevance = relevance + effect * rows.mean(dim=0)
    return relevance[patches].cpu().numpy()


def _at_image_size(maps, pixel_values, why_zero):
    from pytorch_grad_cam.utils.image import scale_cam_image  # late, as in `explain`

    height, width = pixel_values.shape[2:]
    maps = np.stack(maps)
    low, high = (edge(axis=(1, 2), keepdims=True) for edge in (maps.min, maps.max))
    maps = (maps - low) / np.where(high > low, high - low, 1)
    return finished_maps(scale_cam_image(scale_cam_image(maps, (width, height))), why_zero)  # once more when resized
