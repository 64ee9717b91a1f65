"""A small Faster R-CNN of torchvision around a ResNet of transformers, in the hub's folder format."""

from collections import OrderedDict
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import AutoBackbone, PreTrainedConfig, ResNetConfig, ViTImageProcessor

from xai_helpers import hub


class ResNetPyramid(torch.nn.Module):
    """A ResNet whose stages feed a feature pyramid (Lin et al., CVPR 2017): the levels "0", "1", ... and "pool".

    Args:
        config: a `ResNetConfig`. Its stages are the levels, and "pool" is half as fine as the last.
        out_channels: channels of each level.
    """

    def __init__(self, config: ResNetConfig, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.body = AutoBackbone.from_config(config)
        self.fpn = FeaturePyramidNetwork(config.hidden_sizes, out_channels, LastLevelMaxPool())

    def forward(self, pictures: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Maps pictures (batch, 3, height, width) to an OrderedDict of levels (batch, out_channels, rows, columns)."""
        stages = self.body(pictures).feature_maps
        return self.fpn(OrderedDict((str(i), stage) for i, stage in enumerate(stages)))


class SceneFasterRCNN(FasterRCNN, PyTorchModelHubMixin):
    """Faster R-CNN (Ren et al., NeurIPS 2015) for pictures as small as the scenes.

    It is called as torchvision's: a batch or a list of pictures in [0, 1], which it normalises itself; in eval mode
    it gives a dict a picture with "boxes" (n, 4) in pixels, "labels" and "scores".

    Args:
        categories: names; label i + 1 is categories[i], and 0 is the background.
        hidden_sizes, depths: of the ResNet with basic blocks.
        side: height and width in pixels to which pictures are brought.
        channels: of each level of the pyramid.

    Attributes:
        config: its `id2label` has the names.
    """

    def __init__(
        self,
        categories: list[str],
        hidden_sizes: list[int],
        depths: list[int],
        side: int,
        channels: int,
    ):
        stages = [f"stage{i + 1}" for i in range(len(depths))]
        config = ResNetConfig(
            embedding_size=hidden_sizes[0],
            hidden_sizes=hidden_sizes,
            depths=depths,
            layer_type="basic",
            out_features=stages,  # type: ignore[call-arg]  # of all backbones' configs
        )
        levels = [str(i) for i in range(len(stages))]
        super().__init__(
            ResNetPyramid(config, channels),
            min_size=side,
            max_size=side,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            rpn_anchor_generator=AnchorGenerator(
                tuple((2 ** (4 + i),) for i in range(len(stages) + 1)), ((0.5, 1.0, 2.0),) * (len(stages) + 1)
            ),
            rpn_pre_nms_top_n_train=200,
            rpn_pre_nms_top_n_test=200,
            rpn_post_nms_top_n_train=60,
            rpn_post_nms_top_n_test=50,
            rpn_batch_size_per_image=64,
            box_roi_pool=MultiScaleRoIAlign(levels, output_size=5, sampling_ratio=2),
            box_head=TwoMLPHead(channels * 5**2, 2 * channels),
            box_predictor=FastRCNNPredictor(2 * channels, len(categories) + 1),
            box_batch_size_per_image=32,
            box_detections_per_img=20,
        )
        self.config = PreTrainedConfig(id2label=dict(enumerate(["background", *categories])))


def published_faster_rcnn(name: str) -> tuple[FasterRCNN, ViTImageProcessor]:
    """torchvision's Faster R-CNN with the weights that it publishes, and a processor that leaves the rest to it.

    Args:
        name: one of torchvision's, such as "fasterrcnn_resnet50_fpn".

    Returns:
        (model, processor). The model has a `config.id2label`, COCO's categories with the background first.

    Raises:
        OSError: the weights are not there and cannot be fetched, or cannot be read.
    """
    weights = get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])  # where torchvision looks first
    hub.weights_file(weights.url, path, path.stem.rpartition("-")[2])
    try:
        model = get_model(name, weights=weights)
    except Exception as error:  # a pickle has many ways to be broken
        raise OSError(f"The file {path} cannot be read ({error}). Delete it, and it is fetched anew") from error
    model.config = PreTrainedConfig(id2label=dict(enumerate(weights.meta["categories"])))
    return model, ViTImageProcessor(do_resize=False, do_normalize=False)
