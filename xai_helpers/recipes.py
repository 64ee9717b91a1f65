"""The one place that knows layers: for nine models, which layers are named elsewhere, are worth a sweep, point best.

`explain` without a layer needs none of this. For a class activation map in a model that is not described here,
`find_target_layers` lists the layers that are worth a sweep.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from xai_helpers.cam import explain
from xai_helpers.layers import TargetLayer
from xai_helpers.reshape import tokens_to_map
from xai_helpers.wrappers import LogitsModel, layer_path

# Where layers are named: https://jacobgil.github.io/pytorch-gradcam-book/HuggingFace.html and
# https://github.com/jacobgil/pytorch-grad-cam#choosing-the-target-layer
BOOK, README = "pytorch-gradcam-book, HuggingFace", "pytorch-grad-cam, README"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a family.

    Attributes:
        module: model -> the module.
        positions: (config, pixels) -> number of tokens along a side of so many pixels; None for a layer that puts out
            (batch, channels, height, width).
        prefix: how many tokens stand before those of the picture.
        source: who names it as the layer to explain; "" if we do.
    """

    module: Callable
    positions: Callable | None = None
    prefix: int = 0
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to explain the image classification models of a family of transformers, or a network of timm's.

    Attributes:
        family: its name, as in `load`.
        layers: name -> `Layer`, those worth a sweep. Those that have a source are among them.
        best: the name of the one at which class activation maps of the bundled model point best.
        method: with which class of grad-cam.
        pointing: how often they do, on 50 validation scenes with two objects (`python -m benchmarks.best_layers`), and
            on 150 for Swin, whose two best layers 50 do not tell apart.
        concepts: the `Layer` for Deep Feature Factorization.
        head: (model, (height, width) of the picture) -> what stands behind it: a callable (n_concepts, channels) ->
            (n_concepts, n_classes), the model's scores of a picture that consists of the concept alone.
        differs: why `concepts` is not the layer that `find_target_layers` chooses; "" if it is.
        architecture: timm's name of the network; "" for a family of transformers.
    """

    family: str
    layers: dict[str, Layer]
    best: str
    method: str
    pointing: float
    concepts: Layer
    head: Callable
    differs: str = ""
    architecture: str = ""

    def cam(self, model: torch.nn.Module, pixel_values: torch.Tensor) -> TargetLayer:
        """The `TargetLayer` at which class activation maps point best, by `method`; it fits the size of pixel_values.

        Args:
            model: an image classification model of the family, or a `LogitsModel` around one.
            pixel_values: the image tensor that will be explained, (batch, 3, height, width).

        Raises:
            ValueError: the model is of another family.
        """
        return self._target(model, self.layers[self.best], pixel_values)

    def sweep(self, model: torch.nn.Module, pixel_values: torch.Tensor) -> dict[str, TargetLayer]:
        """All `layers`, name -> `TargetLayer`: which points best is a question to your own model and pictures.

        Arguments and errors are those of `cam`.
        """
        return {name: self._target(model, layer, pixel_values) for name, layer in self.layers.items()}

    def ways(self, model: torch.nn.Module, pixel_values: torch.Tensor) -> dict[str, Callable]:
        """How the model can be explained: without a layer, at the layer that points best, at those that others name.

        Arguments and errors are those of `cam`.

        Returns:
            name -> function (pixel_values, categories) -> maps, for pictures of this size.
        """
        import pytorch_grad_cam

        layers = self.sweep(model, pixel_values)
        at = {f"{self.method} at {self.best}": (self.best, self.method)}
        at |= {f"published: Grad-CAM at {name}": (name, "GradCAM") for name in layers if self.layers[name].source}
        return {"balanced gradients": functools.partial(explain, model)} | {
            words: functools.partial(
                explain, model, target_layer=layers[name], method=getattr(pytorch_grad_cam, method)
            )
            for words, (name, method) in at.items()
        }

    def dff(self, model: torch.nn.Module, pixel_values: torch.Tensor) -> TargetLayer:
        """The `TargetLayer` for `factorize`, to go with `concept_head`. Arguments and errors are those of `cam`."""
        return self._target(model, self.concepts, pixel_values)

    def concept_head(
        self, model: torch.nn.Module, pixel_values: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """What `factorize` wants as concept head. Arguments and errors are those of `cam`."""
        return self.head(self._unwrapped(model), tuple(pixel_values.shape[2:]))

    def _target(self, model, layer, pixel_values):
        inner, reshape_transform = self._unwrapped(model), None
        module = layer.module(inner)
        if layer.positions:
            grid = tuple(layer.positions(inner.config, pixels) for pixels in pixel_values.shape[2:])
            reshape_transform = functools.partial(tokens_to_map, grid=grid, prefix=layer.prefix)
        return TargetLayer(module, layer_path(model, module), reshape_transform)

    def _unwrapped(self, model):
        model = model.model if isinstance(model, LogitsModel) else model
        if self.architecture:
            fits = getattr(getattr(model, "config", None), "architecture", "") == self.architecture
        else:
            fits = hasattr(model, self.family) and hasattr(model, "classifier")
        if not fits:
            raise ValueError(
                f"the recipe for {self.family} does not fit a {type(model).__name__}: load one with "
                f"load({self.family!r}), or let find_target_layers(model, pixel_values) find the layers of yours"
            )
        return model


def vit_positions(config: Any, pixels: int) -> int:
    """A ViT cuts the picture into patches and drops what is left over."""
    return pixels // config.patch_size


def swin_positions(config: Any, pixels: int, merges: int | None = None) -> int:
    """After so many merges of 2 x 2 patches, all of them if None. What is left over is padded."""
    merges = len(config.depths) - 1 if merges is None else merges
    return math.ceil(pixels / (config.patch_size * 2**merges))


def strided(kernels: list[int], strides: list[int], paddings: list[int], pixels: int) -> int:
    """The positions along a side after convolutions one behind the other."""
    for kernel, stride, padding in zip(kernels, strides, paddings, strict=True):
        pixels = (pixels + 2 * padding - kernel) // stride + 1
    return pixels


def cvt_positions(config: Any, pixels: int, stages: int | None = None) -> int:
    """Each stage of a CvT begins with a strided convolution; after so many stages, all of them if None."""
    return strided(config.patch_sizes[:stages], config.patch_stride[:stages], config.patch_padding[:stages], pixels)


def segformer_positions(config: Any, pixels: int, stages: int | None = None) -> int:
    """As `cvt_positions`, for a SegFormer. Its convolutions are padded by half of their kernel."""
    kernels = config.patch_sizes[:stages]
    return strided(kernels, config.strides[:stages], [size // 2 for size in kernels], pixels)


def rest_of_vit(model: Any, size: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last block, where CLS reads the patches for the last time, and what follows. Every token is the concept."""
    # Attention to tokens that are all alike does not depend on their number: one is enough.
    return lambda concepts: model.classifier(model.vit.layernorm(model.vit.layers[-1](concepts[:, None]))[:, 0])


def rest_of_cvt(model: Any, size: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """As for the ViT, but the block convolves the patches, so there has to be a map of them."""
    rows, columns = (cvt_positions(model.config, pixels) for pixels in size)

    def head(concepts):
        tokens = concepts[:, None].expand(-1, 1 + rows * columns, -1)
        tokens = model.cvt.encoder.stages[-1].layers[-1](tokens, rows, columns)
        return model.classifier(model.layernorm(tokens[:, 0]))

    return head


def rest_of_swin(model: Any, size: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last stage, and what follows: the mean of its tokens after a norm. Every token is the concept."""
    rows, columns = (swin_positions(model.config, pixels) for pixels in size)

    def head(concepts):
        tokens = concepts[:, None].expand(-1, rows * columns, -1)
        tokens = model.swin.encoder.layers[-1](tokens, (rows, columns))[0]
        return model.classifier(model.swin.layernorm(tokens).mean(dim=1))

    return head


def rest_of_segformer(model: Any, size: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last stage, and what follows: the mean over its positions. Every position is the concept."""
    rows, columns = (segformer_positions(model.config, pixels, -1) for pixels in size)

    def head(concepts):
        maps = concepts[:, :, None, None].expand(-1, -1, rows, columns)
        return model.classifier(model.segformer.stages[-1](maps).mean(dim=(2, 3)))

    return head


def to_classifier(model: Any, size: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The classifier alone: what it reads is the mean over the positions."""
    return model.classifier


def to_norm_and_classifier(model: Any, size: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm of a ConvNeXt stands behind the average over positions."""
    return lambda concepts: model.classifier(model.convnext.layernorm(concepts))


READ_BY_CLS = "the finder takes the last tokens there are, but the head reads CLS alone and never saw the others"
ONE_STAGE_BEFORE = "what the last stage reads is still at its place: its concepts are named right more often"


def _swin_block(stage, block):
    """The tokens that a block of a Swin reads, after its first norm."""

    def module(model):
        return model.swin.encoder.layers[stage].blocks[block].layernorm_before

    return module


RECIPES = {
    recipe.family: recipe
    for recipe in [
        Recipe(
            "resnet",
            layers={
                "stages[-1]": Layer(lambda model: model.resnet.encoder.stages[-1], source=f"{BOOK}; {README}"),
                "stages[-2]": Layer(lambda model: model.resnet.encoder.stages[-2]),
            },
            best="stages[-2]",
            method="HiResCAM",
            pointing=0.97,
            concepts=Layer(lambda model: model.resnet.encoder.stages[-1], source=BOOK),
            head=to_classifier,
        ),
        Recipe(
            "regnet",
            layers={
                "stages[-1]": Layer(lambda model: model.regnet.encoder.stages[-1], source=BOOK),
                "stages[-2]": Layer(lambda model: model.regnet.encoder.stages[-2]),
            },
            best="stages[-1]",
            method="GradCAM",
            pointing=0.9,
            concepts=Layer(lambda model: model.regnet.encoder.stages[-1], source=BOOK),
            head=to_classifier,
        ),
        Recipe(
            "convnext",
            layers={
                "stages[-1]": Layer(lambda model: model.convnext.encoder.stages[-1], source=BOOK),
                "stages[-1].layers[0]": Layer(lambda model: model.convnext.encoder.stages[-1].layers[0]),
                "stages[-1].downsampling_layer": Layer(
                    lambda model: model.convnext.encoder.stages[-1].downsampling_layer[-1]
                ),
                "stages[-2]": Layer(lambda model: model.convnext.encoder.stages[-2]),
            },
            best="stages[-1].layers[0]",
            method="HiResCAM",
            pointing=0.94,
            concepts=Layer(lambda model: model.convnext.encoder.stages[-1], source=BOOK),
            head=to_norm_and_classifier,
        ),
        Recipe(
            "mobilevit",
            layers={
                "conv_1x1_exp": Layer(lambda model: model.mobilevit.conv_1x1_exp, source=BOOK),
                "layer[-1]": Layer(lambda model: model.mobilevit.encoder.layer[-1]),
                "layer[-2]": Layer(lambda model: model.mobilevit.encoder.layer[-2]),
                "layer[-3]": Layer(lambda model: model.mobilevit.encoder.layer[-3]),
                "layer[-3].downsampling_layer": Layer(
                    lambda model: model.mobilevit.encoder.layer[-3].downsampling_layer
                ),
            },
            best="layer[-3].downsampling_layer",
            method="HiResCAM",
            pointing=0.89,
            concepts=Layer(lambda model: model.mobilevit.conv_1x1_exp, source=BOOK),
            head=to_classifier,
        ),
        Recipe(
            "swin",
            layers={
                "layernorm": Layer(lambda model: model.swin.layernorm, swin_positions, source=BOOK),
                "layers[-1].blocks[-1].layernorm_before": Layer(_swin_block(-1, -1), swin_positions, source=README),
                "layers[-1].blocks[0].layernorm_before": Layer(_swin_block(-1, 0), swin_positions),
                "layers[-2].downsample": Layer(lambda model: model.swin.encoder.layers[-2].downsample, swin_positions),
                "layers[-2].blocks[-1].layernorm_before": Layer(
                    _swin_block(-2, -1),
                    lambda config, pixels: swin_positions(config, pixels, len(config.depths) - 2),
                ),
            },
            best="layers[-1].blocks[0].layernorm_before",
            method="HiResCAM",
            pointing=0.86,
            concepts=Layer(lambda model: model.swin.encoder.layers[-2].downsample, swin_positions),
            head=rest_of_swin,
            differs=ONE_STAGE_BEFORE,
        ),
        Recipe(
            "segformer",  # its stages end with their norm and lay their tokens out as a map
            layers={
                "stages[-1]": Layer(lambda model: model.segformer.stages[-1], source=BOOK),
                "stages[-1].blocks[0].layernorm_before": Layer(
                    lambda model: model.segformer.stages[-1].blocks[0].layernorm_before, segformer_positions
                ),
                "stages[-2]": Layer(lambda model: model.segformer.stages[-2]),
                "stages[-3]": Layer(lambda model: model.segformer.stages[-3]),
            },
            best="stages[-1].blocks[0].layernorm_before",
            method="HiResCAM",
            pointing=0.83,
            concepts=Layer(lambda model: model.segformer.stages[-2]),
            head=rest_of_segformer,
            differs=ONE_STAGE_BEFORE,
        ),
        Recipe(
            "vit",
            layers={
                "layers[-2]": Layer(lambda model: model.vit.layers[-2], vit_positions, 1, source=BOOK),
                "layers[-1].layernorm_before": Layer(
                    lambda model: model.vit.layers[-1].layernorm_before, vit_positions, 1, source=README
                ),
                "layers[-2].layernorm_before": Layer(
                    lambda model: model.vit.layers[-2].layernorm_before, vit_positions, 1
                ),
                "layers[-3].layernorm_before": Layer(
                    lambda model: model.vit.layers[-3].layernorm_before, vit_positions, 1
                ),
                "layers[-3]": Layer(lambda model: model.vit.layers[-3], vit_positions, 1),
            },
            best="layers[-1].layernorm_before",
            method="GradCAM",
            pointing=0.76,
            concepts=Layer(lambda model: model.vit.layers[-2], vit_positions, 1),
            head=rest_of_vit,
            differs=READ_BY_CLS,
        ),
        Recipe(
            "cvt",
            layers={
                "stages[-1].layers[-2]": Layer(
                    lambda model: model.cvt.encoder.stages[-1].layers[-2], cvt_positions, 1, source=BOOK
                ),
                "stages[-1].layers[-1].layernorm_before": Layer(
                    lambda model: model.cvt.encoder.stages[-1].layers[-1].layernorm_before, cvt_positions, 1
                ),
                "stages[-1].layers[0].layernorm_before": Layer(
                    lambda model: model.cvt.encoder.stages[-1].layers[0].layernorm_before, cvt_positions, 1
                ),
                "stages[-2].layers[-1].layernorm_before": Layer(
                    lambda model: model.cvt.encoder.stages[-2].layers[-1].layernorm_before,
                    lambda config, pixels: cvt_positions(config, pixels, -1),
                ),
            },
            best="stages[-2].layers[-1].layernorm_before",
            method="HiResCAM",
            pointing=0.84,
            concepts=Layer(lambda model: model.cvt.encoder.stages[-1].layers[-2], cvt_positions, 1),
            head=rest_of_cvt,
            differs=READ_BY_CLS,
        ),
        Recipe(
            "efficientnet-lite",
            layers={
                "bn2": Layer(lambda model: model.timm_model.bn2),
                "blocks[-1]": Layer(lambda model: model.timm_model.blocks[-1]),
                "blocks[-1][0].bn1": Layer(lambda model: model.timm_model.blocks[-1][0].bn1),
                "blocks[-2]": Layer(lambda model: model.timm_model.blocks[-2]),
                "blocks[-3]": Layer(lambda model: model.timm_model.blocks[-3]),
            },
            best="blocks[-3]",
            method="HiResCAM",
            pointing=0.89,
            concepts=Layer(lambda model: model.timm_model.bn2),
            head=lambda model, size: model.timm_model.classifier,
            architecture="tf_efficientnet_lite0",
        ),
    ]
}
