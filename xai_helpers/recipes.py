"""The table of described families: which layers to explain, and what the head makes of a concept.

`find_target_layers` finds layers in any model by trying. Here stands what is known of eight families from reading them.
These are layers that can be explained. Which layer points best is a question of score: for the bundled Swin, SegFormer
and CvT the chapters find others that do better.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from xai_helpers.layers import TargetLayer
from xai_helpers.reshape import tokens_to_map
from xai_helpers.wrappers import LogitsModel, layer_path


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to explain the image classification models of a family of transformers.

    Attributes:
        family: its name, as in `load`.
        cam_layer: model -> the module for class activation maps.
        dff_layer: model -> the module for Deep Feature Factorization.
        head: model -> what stands behind the dff layer, a callable (n_concepts, channels) -> (n_concepts, n_classes):
            the model's scores of a picture that consists of the concept alone.
        positions: (config, pixels) -> number of tokens along a side of so many pixels; None for layers that put out
            (batch, channels, height, width).
        prefix: how many tokens stand before those of the picture.
        differs: "cam" or "dff" -> why it is not the layer that `find_target_layers` chooses.
    """

    family: str
    cam_layer: Callable
    dff_layer: Callable
    head: Callable
    positions: Callable | None = None
    prefix: int = 0
    differs: dict[str, str] = dataclasses.field(default_factory=dict)

    def cam(self, model: torch.nn.Module, pixel_values: torch.Tensor) -> TargetLayer:
        """The `TargetLayer` for class activation maps; its reshape transform fits the size of pixel_values.

        Args:
            model: an image classification model of the family, or a `LogitsModel` around one.
            pixel_values: the image tensor that will be explained, (batch, 3, height, width).

        Raises:
            ValueError: the model is of another family.
        """
        return self._target(model, self.cam_layer, pixel_values)

    def dff(self, model: torch.nn.Module, pixel_values: torch.Tensor) -> TargetLayer:
        """The `TargetLayer` for `factorize`, to go with `concept_head`. Arguments and errors are those of `cam`."""
        return self._target(model, self.dff_layer, pixel_values)

    def concept_head(self, model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """What `factorize` wants as concept head. Argument and errors are those of `cam`."""
        return self.head(self._unwrapped(model))

    def _target(self, model, layer, pixel_values):
        inner, reshape_transform = self._unwrapped(model), None
        module = layer(inner)
        if self.positions:
            grid = tuple(self.positions(inner.config, pixels) for pixels in pixel_values.shape[2:])
            reshape_transform = functools.partial(tokens_to_map, grid=grid, prefix=self.prefix)
        return TargetLayer(module, layer_path(model, module), reshape_transform)

    def _unwrapped(self, model):
        model = model.model if isinstance(model, LogitsModel) else model
        if not (hasattr(model, self.family) and hasattr(model, "classifier")):
            raise ValueError(
                f"the recipe for {self.family} does not fit a {type(model).__name__}: load one with "
                f"load({self.family!r}), or let find_target_layers(model, pixel_values) find the layers of yours"
            )
        return model


def cvt_positions(config: Any, pixels: int) -> int:
    """Each stage of a CvT begins with a strided convolution."""
    for kernel, stride, padding in zip(config.patch_sizes, config.patch_stride, config.patch_padding, strict=True):
        pixels = (pixels + 2 * padding - kernel) // stride + 1
    return pixels


def rest_of_vit(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last block, where CLS reads the patches for the last time, and what follows. Every token is the concept."""
    # Attention to tokens that are all alike does not depend on their number: one is enough.
    return lambda concepts: model.classifier(model.vit.layernorm(model.vit.layers[-1](concepts[:, None]))[:, 0])


def rest_of_cvt(model: Any, rows: int = 14, columns: int = 14) -> Callable[[torch.Tensor], torch.Tensor]:
    """As for the ViT, but the block convolves the patches, so there has to be a map of them: 14 x 14 is 224 pixels."""

    def head(concepts):
        tokens = concepts[:, None].expand(-1, 1 + rows * columns, -1)
        tokens = model.cvt.encoder.stages[-1].layers[-1](tokens, rows, columns)
        return model.classifier(model.layernorm(tokens[:, 0]))

    return head


READ_BY_CLS = "the finder takes the last tokens there are, but the head reads CLS alone and never saw the others"

RECIPES = {
    recipe.family: recipe
    for recipe in [
        Recipe(
            "resnet",
            cam_layer=lambda model: model.resnet.encoder.stages[-1],
            dff_layer=lambda model: model.resnet.encoder.stages[-1],
            head=lambda model: model.classifier,
        ),
        Recipe(
            "regnet",
            cam_layer=lambda model: model.regnet.encoder.stages[-1],
            dff_layer=lambda model: model.regnet.encoder.stages[-1],
            head=lambda model: model.classifier,
        ),
        Recipe(
            "convnext",
            cam_layer=lambda model: model.convnext.encoder.stages[-1],
            dff_layer=lambda model: model.convnext.encoder.stages[-1],
            # The norm stands behind the average over positions.
            head=lambda model: lambda concepts: model.classifier(model.convnext.layernorm(concepts)),
        ),
        Recipe(
            "mobilevit",
            cam_layer=lambda model: model.mobilevit.conv_1x1_exp,
            dff_layer=lambda model: model.mobilevit.conv_1x1_exp,
            head=lambda model: model.classifier,
        ),
        Recipe(
            "swin",
            cam_layer=lambda model: model.swin.layernorm,
            dff_layer=lambda model: model.swin.layernorm,
            head=lambda model: model.classifier,
            # Patches; every stage but the last merges 2 x 2 of them. What is left over is padded.
            positions=lambda config, pixels: math.ceil(pixels / (config.patch_size * 2 ** (len(config.depths) - 1))),
        ),
        Recipe(
            "segformer",  # its stages end with their norm and lay their tokens out as a map
            cam_layer=lambda model: model.segformer.stages[-1],
            dff_layer=lambda model: model.segformer.stages[-1],
            head=lambda model: model.classifier,
        ),
        Recipe(
            "vit",
            cam_layer=lambda model: model.vit.layers[-1].layernorm_before,
            dff_layer=lambda model: model.vit.layers[-2],
            head=rest_of_vit,
            positions=lambda config, pixels: pixels // config.patch_size,
            prefix=1,
            differs={"dff": READ_BY_CLS},
        ),
        Recipe(
            "cvt",
            cam_layer=lambda model: model.cvt.encoder.stages[-1].layers[-1].layernorm_before,
            dff_layer=lambda model: model.cvt.encoder.stages[-1].layers[-2],
            head=rest_of_cvt,
            positions=cvt_positions,
            prefix=1,
            differs={"dff": READ_BY_CLS},
        ),
    ]
}
