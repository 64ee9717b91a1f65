"""What `find_target_layers` has to answer: one entry a model family, the book's table of all families is made from it.

The expectations were written down from the models' sources (each entry says where), before the finder was run on them.
By definition the DFF layer is the latest module, in execution order, whose output is a tensor with positions that
change where the image changes and around which nothing flows from the image to the scores; the Grad-CAM layer is the
latest such module with a gradient at more than one position. Where several modules return the very same tensor (a
stage, its last block, that block's activation), all of them are written down, outermost first; left out are modules
that one forward pass calls several times and those whose output an in-place activation overwrites.

The models are the libraries' own classes, tiny and with random weights. Two blocks in the last stage are enough to
tell the last block from the one before it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import timm
import torch
import torchvision
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
)

N_LABELS = 4

CHANNELS_FIRST = "channels first"
CHANNELS_LAST = "channels last"
TOKENS = "tokens"

# Why a module that a reader may well choose is not the answer (Family.also).
NORMALISED = "the tokens that the last attention reads, normalised; the residual path leads around it"
RELAID = "the same values in another layout"
POOLED_FROM = "the tokens that the attention pooling reads"
TUPLE = "returns a tuple, with the tensor wanted first"


@dataclasses.dataclass(frozen=True)
class Family:
    """What is known of one family.

    Attributes:
        name: transformers' model type, where needed with a variant in brackets; or "timm/..." or "torchvision/...".
        make: builds the model; `build` is what to call.
        dff: paths of the DFF layer, from the model that `build` returns; all return the same tensor.
        stride: how many pixels of height and width one position of the layers stands for.
        head: how the scores are computed from one vector of the DFF layer, in words, or why that cannot be said.
        source: file, class and method where all this can be read.
        cam: paths of the Grad-CAM layer; where none are given, those of the DFF layer.
        layout: of both layers: CHANNELS_FIRST, CHANNELS_LAST or TOKENS.
        prefix: tokens before the patches.
        size: (height, width) of the square image.
        wide: (height, width) of an image that is not square, or None.
        square_only: why there is no such image.
        options: keyword arguments of the forward pass that the image that is not square needs.
        concept_head: callable (model) -> callable (vectors (n, channels)) -> scores (n, labels), or None.
        also: other modules worth knowing, each with the reason why it is not the answer.
    """

    name: str
    make: Callable[[], nn.Module]
    dff: tuple[str, ...]
    stride: int
    head: str
    source: str
    cam: tuple[str, ...] = ()
    layout: str = CHANNELS_FIRST
    prefix: int = 0
    size: tuple[int, int] = (64, 64)
    wide: tuple[int, int] | None = (64, 96)
    square_only: str = ""
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    concept_head: Callable | None = None
    also: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "cam", self.cam or self.dff)
        if (self.wide is None) != bool(self.square_only):
            raise ValueError(f"{self.name}: give either the size of an image that is not square or the reason why not")

    @property
    def library(self):
        """The package that the model comes from: transformers, timm or torchvision."""
        return self.name.split("/")[0] if "/" in self.name else "transformers"

    @property
    def model_type(self):
        """The name without its variant: for transformers the key in its image-classification mapping."""
        return self.name.split(" (")[0]

    def grid(self, size):
        """(rows, columns) of the layers for an image of (height, width)."""
        return size[0] // self.stride, size[1] // self.stride


def image(size, batch=1, seed=0):
    """A random image (batch, 3, height, width), normally distributed as after a processor."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def build(family):
    """The model of a family, always the same: float32, eval mode, calibrated so that the image reaches the scores."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family.make().float().eval()
        _calibrate(model, image(family.size, batch=8, seed=1))
    return model


@torch.no_grad()
def _calibrate(model, images):
    """Sets weights to He's scale, draws zero and tiny constants (layer scales, tokens), sets the batch norms."""
    for parameter in model.parameters():
        if parameter.min() == parameter.max():
            if parameter.abs().max() < 0.01:
                parameter.normal_(0, 0.1)
        elif parameter.ndim > 1:
            parameter.mul_((2 / parameter[0].numel()) ** 0.5 / parameter.std())
    for module in model.modules():
        if hasattr(module, "attention_bias_idxs"):
            _look_nearby(module)
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.fill_(1)  # some models draw it around zero
        norm.momentum = 1.0  # the statistics of this one batch
        norm.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _look_nearby(attention):
    """Gives LeViT's attention biases that fall with the distance, as training does.

    Where it subsamples, they alone tell it where things are.
    """
    to, across = (math.isqrt(n) for n in attention.attention_bias_idxs.shape)
    stride = math.ceil(across / to)
    for query, biases in enumerate(attention.attention_bias_idxs):
        for key, number in enumerate(biases):
            (y, x), (row, column) = divmod(query, to), divmod(key, across)
            attention.attention_biases[:, number] = -2.0 * (abs(y * stride - row) + abs(x * stride - column))


# Models that need an adapter from image to scores


class LastHiddenState(nn.Module):
    """PP-LCNet returns its scores as `last_hidden_state`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).last_hidden_state


class SoftColours(nn.Module):
    """ImageGPT reads a colour's number a pixel; a soft choice among the colours lets a gradient reach the pixels."""

    def __init__(self, model, levels=(-1.0, 0.0, 1.0)):
        super().__init__()
        self.model = model
        self.register_buffer("colours", torch.cartesian_prod(*[torch.tensor(levels)] * 3))

    def forward(self, images):
        pixels = images.flatten(2).transpose(1, 2)
        distances = (pixels[:, :, None] - self.colours).square().sum(-1)
        embedded = distances.neg().softmax(-1) @ self.model.transformer.wte.weight[: len(self.colours)]
        return self.model(inputs_embeds=embedded, use_cache=False).logits


class PackedPatches(nn.Module):
    """SigLIP 2 reads patches (batch, n_patches, values), as its processor packs them, and how many rows and columns."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        patch = self.model.config.vision_config.patch_size
        batch, channels, height, width = images.shape
        rows, columns = height // patch, width // patch
        patches = images.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        return self.model(
            pixel_values=patches.reshape(batch, rows * columns, -1),
            pixel_attention_mask=torch.ones(batch, rows * columns, dtype=torch.long),
            spatial_shapes=torch.tensor([[rows, columns]] * batch),
        ).logits


class Prompted(nn.Module):
    """ShieldGemma 2 answers a prompt about the image with yes or no: two scores."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        config = model.config
        image_tokens = [config.image_token_index] * config.mm_tokens_per_image
        prompt = [2, config.boi_token_index, *image_tokens, config.eoi_token_index, 9, 10, 11, 12, 13]
        self.register_buffer("prompt", torch.tensor([prompt]))

    def forward(self, images):
        return self.model(input_ids=self.prompt.expand(len(images), -1), pixel_values=images, use_cache=False).logits


# Builders


def auto(model_type, **config):
    """The family's image classification model, for a config given in keywords."""
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type, num_labels=N_LABELS, **config))


def of_class(model_class, model_type, **config):
    """The same for a family with two such models, one of them with a teacher's classifier beside its own."""
    return model_class(AutoConfig.for_model(model_type, num_labels=N_LABELS, **config))


def timm_model(name, **overrides):
    return timm.create_model(name, pretrained=False, num_classes=N_LABELS, **overrides)


def thin_vgg16():
    """VGG-16 with an eighth of its channels: at its own size of 224 px, features[-1] and avgpool return the same."""
    channels = [c if c == "M" else c // 8 for c in torchvision.models.vgg.cfgs["D"]]
    with torch.device("meta"):  # its own classifier has 120 million weights
        model = torchvision.models.VGG(nn.Identity(), num_classes=N_LABELS, init_weights=False)
    model.features = torchvision.models.vgg.make_layers(channels, batch_norm=False)
    model.classifier = nn.Sequential(nn.Linear(64 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, N_LABELS))
    return model


# Concept heads: model -> (vectors -> scores)


def chain(*paths):
    """The concept head that applies the modules at these paths one after the other."""
    return lambda model: nn.Sequential(*[model.get_submodule(path) for path in paths])


def mean_of(*paths):
    """The concept head that averages the scores of several classifiers."""
    return lambda model: lambda vectors: sum(model.get_submodule(path)(vectors) for path in paths) / len(paths)


def twice(path):
    """The concept head that reads the vector both as CLS token and as mean of the patches."""
    return lambda model: lambda vectors: model.get_submodule(path)(torch.cat([vectors, vectors], -1))


def _pp_lcnet_head(model):
    keep = 1 - model.model.hidden_dropout_prob  # the model scales by it in eval mode too
    convolve = nn.Sequential(model.model.last_convolution, model.model.act_fn, nn.Flatten())
    return lambda vectors: model.model.head(convolve(vectors[:, :, None, None]) * keep)


def _attention_pool_head(model):
    pool, head = model.attn_pool, chain("fc_norm", "head")(model)

    def scores(vectors):
        values = pool.proj(vectors.chunk(2, -1)[1])  # keys and values lie side by side
        return head(values + pool.mlp(pool.norm(values)))

    return scores


TINY_VIT = dict(image_size=48, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
TINY_VIT_MLP = TINY_VIT | dict(intermediate_size=32)
TINY_CLIP = dict(vision_config=TINY_VIT_MLP, text_config=dict(bos_token_id=0, eos_token_id=1))
TINY_SWIN = dict(image_size=64, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, mlp_ratio=2.0)
TINY_LEVIT = dict(
    image_size=192, hidden_sizes=(32, 48, 64), num_attention_heads=(2, 3, 4), depths=(1, 1, 2), key_dim=(8, 8, 8)
)
VIT_SIZES = dict(layout=TOKENS, stride=8, size=(48, 48), wide=(48, 64))
INTERPOLATE = dict(options={"interpolate_pos_encoding": True})
TIMM_VIT = dict(img_size=48, patch_size=8, embed_dim=16, depth=2, num_heads=2, dynamic_img_size=True)

FAMILIES = [
    # Convolutional families
    Family(
        name="resnet",
        make=functools.partial(auto, "resnet", embedding_size=8, hidden_sizes=(16, 32), depths=(1, 2)),
        dff=(
            "resnet.encoder.stages.1",
            "resnet.encoder.stages.1.layers.1",
            "resnet.encoder.stages.1.layers.1.activation",
        ),
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/resnet/modeling_resnet.py: ResNetModel.forward, ResNetStage.forward",
    ),
    Family(
        name="regnet",
        make=functools.partial(
            auto, "regnet", embedding_size=8, hidden_sizes=(16, 32), depths=(1, 2), groups_width=8, layer_type="y"
        ),
        dff=(
            "regnet.encoder.stages.1",
            "regnet.encoder.stages.1.layers",
            "regnet.encoder.stages.1.layers.1",
            "regnet.encoder.stages.1.layers.1.activation",
        ),
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/regnet/modeling_regnet.py: RegNetModel.forward, RegNetStage.forward (calls its Sequential)",
    ),
    Family(
        name="convnext",
        make=functools.partial(auto, "convnext", num_stages=2, hidden_sizes=(16, 32), depths=(1, 2)),
        dff=("convnext.encoder.stages.1", "convnext.encoder.stages.1.layers.1"),
        stride=8,
        head="layernorm, then classifier",
        concept_head=chain("convnext.layernorm", "classifier"),
        source="models/convnext/modeling_convnext.py: ConvNextModel.forward (norm after pooling)",
    ),
    Family(
        name="convnextv2",
        make=functools.partial(auto, "convnextv2", num_stages=2, hidden_sizes=(16, 32), depths=(1, 2)),
        dff=("convnextv2.encoder.stages.1", "convnextv2.encoder.stages.1.layers.1"),
        stride=8,
        head="layernorm, then classifier",
        concept_head=chain("convnextv2.layernorm", "classifier"),
        source="models/convnextv2/modeling_convnextv2.py: ConvNextV2Model.forward (norm after pooling)",
    ),
    Family(
        name="bit",
        make=functools.partial(auto, "bit", embedding_size=16, hidden_sizes=(16, 32), depths=(1, 2), num_groups=4),
        dff=("bit.norm", "bit.norm.activation"),
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/bit/modeling_bit.py: BitModel.forward (norm and activation before pooling)",
    ),
    Family(
        name="efficientnet",
        make=functools.partial(
            auto,
            "efficientnet",
            width_coefficient=0.1,
            depth_coefficient=1.0,
            kernel_sizes=(3, 3),
            in_channels=(32, 160),
            out_channels=(160, 320),
            strides=(2, 2),
            num_block_repeats=(1, 2),
            expand_ratios=(1, 4),
            hidden_dim=128,
        ),
        dff=("efficientnet.encoder.top_activation",),
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/efficientnet/modeling_efficientnet.py: EfficientNetEncoder.forward",
    ),
    Family(
        name="mobilenet_v1",
        make=functools.partial(auto, "mobilenet_v1", depth_multiplier=0.125),
        dff=("mobilenet_v1.layer.25", "mobilenet_v1.layer.25.activation"),
        stride=32,
        size=(128, 128),
        wide=(128, 192),
        head="classifier",
        concept_head=chain("classifier"),
        source="models/mobilenet_v1/modeling_mobilenet_v1.py: MobileNetV1Model.forward",
    ),
    Family(
        name="mobilenet_v2",
        make=functools.partial(auto, "mobilenet_v2", depth_multiplier=0.25, finegrained_output=False),
        dff=("mobilenet_v2.conv_1x1", "mobilenet_v2.conv_1x1.activation"),
        stride=32,
        size=(128, 128),
        wide=(128, 192),
        head="classifier",
        concept_head=chain("classifier"),
        source="models/mobilenet_v2/modeling_mobilenet_v2.py: MobileNetV2Model.forward",
    ),
    Family(
        name="hgnet_v2",
        make=functools.partial(
            auto,
            "hgnet_v2",
            stem_channels=(3, 8, 16),
            hidden_sizes=(24, 32),
            depths=(1, 2),
            stage_in_channels=(16, 24),
            stage_mid_channels=(8, 16),
            stage_out_channels=(24, 32),
            stage_num_blocks=(1, 2),
            stage_downsample=(False, True),
            stage_downsample_strides=(2, 2),
            stage_light_block=(False, True),
            stage_kernel_size=(3, 3),
            stage_numb_of_layers=(2, 2),
        ),
        dff=("encoder.stages.1", "encoder.stages.1.blocks.1"),
        stride=8,
        head="fc",
        concept_head=chain("fc"),
        source="models/hgnet_v2/modeling_hgnet_v2.py: HGNetV2ForImageClassification.forward, HGNetV2Stage.forward",
    ),
    Family(
        name="pp_lcnet",
        make=lambda: LastHiddenState(
            auto(
                "pp_lcnet",
                block_configs=[
                    [[3, 16, 16, 1, False]],
                    [[3, 16, 24, 2, False]],
                    [[3, 24, 24, 1, False]],
                    [[3, 24, 32, 2, False]],
                    [[5, 32, 32, 1, True], [5, 32, 32, 1, True]],
                ],
                class_expand=32,
            )
        ),
        dff=(
            "model.encoder.blocks.4",
            "model.encoder.blocks.4.layers.1",
            "model.encoder.blocks.4.layers.1.pointwise_convolution",
            "model.encoder.blocks.4.layers.1.pointwise_convolution.activation",
        ),
        stride=8,
        head="last convolution and activation, then head",
        concept_head=_pp_lcnet_head,
        source="models/pp_lcnet/modeling_pp_lcnet.py: PPLCNetForImageClassification.forward; adapter: LastHiddenState",
    ),
    Family(
        name="textnet",
        make=functools.partial(
            auto,
            "textnet",
            stem_out_channels=16,
            hidden_sizes=(16, 16, 32),
            conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [3, 1]]],
            conv_layer_strides=[[2], [2, 1]],
        ),
        dff=(
            "textnet.encoder.stages.1",
            "textnet.encoder.stages.1.stage.1",
            "textnet.encoder.stages.1.stage.1.activation_function",
        ),
        stride=8,
        head="fc",
        concept_head=chain("fc"),
        source="models/textnet/modeling_textnet.py: TextNetForImageClassification.forward (2 x 2 pooler unused)",
    ),
    Family(
        name="timm_wrapper",
        make=functools.partial(
            auto,
            "timm_wrapper",
            architecture="resnet18",
            model_args=dict(layers=(1, 1, 1, 2), channels=(8, 16, 16, 32)),
        ),
        dff=("timm_model.layer4", "timm_model.layer4.1", "timm_model.layer4.1.act2"),
        stride=32,
        size=(128, 128),
        wide=(128, 192),
        head="timm_model.fc",
        concept_head=chain("timm_model.fc"),
        source="models/timm_wrapper/modeling_timm_wrapper.py: TimmWrapperForImageClassification.forward; "
        "timm/models/resnet.py: ResNet.forward_features",
    ),
    # Convolution and attention mixed
    Family(
        name="mobilevit",
        make=functools.partial(
            auto,
            "mobilevit",
            hidden_sizes=(16, 16, 32),
            neck_hidden_sizes=(8, 8, 16, 16, 24, 32, 64),
            expand_ratio=2.0,
            num_attention_heads=2,
        ),
        dff=("mobilevit.conv_1x1_exp", "mobilevit.conv_1x1_exp.activation"),
        stride=32,
        size=(128, 128),
        wide=(128, 192),
        head="classifier",
        concept_head=chain("classifier"),
        source="models/mobilevit/modeling_mobilevit.py: MobileViTModel.forward",
    ),
    Family(
        name="mobilevitv2",
        make=functools.partial(auto, "mobilevitv2", width_multiplier=0.25, n_attn_blocks=(1, 1, 2)),
        dff=(
            "mobilevitv2.encoder.layer.4",
            "mobilevitv2.encoder.layer.4.conv_projection",
            "mobilevitv2.encoder.layer.4.conv_projection.normalization",
        ),
        stride=32,
        size=(128, 128),
        wide=(128, 192),
        head="classifier",
        concept_head=chain("classifier"),
        source="models/mobilevitv2/modeling_mobilevitv2.py: MobileViTV2Model.forward, MobileViTV2Layer.forward",
    ),
    Family(
        name="poolformer",
        make=functools.partial(
            auto,
            "poolformer",
            num_encoder_blocks=2,
            depths=(1, 2),
            hidden_sizes=(16, 32),
            patch_sizes=(7, 3),
            strides=(4, 2),
            padding=(2, 1),
        ),
        dff=("norm",),
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/poolformer/modeling_poolformer.py: PoolFormerForImageClassification.forward (norm, then mean)",
    ),
    Family(
        name="swiftformer",
        make=functools.partial(
            auto, "swiftformer", depths=(1, 2), embed_dims=(16, 32), downsamples=(True, True), mlp_ratio=2
        ),
        dff=("norm",),
        stride=8,
        head="mean of head and dist_head",
        concept_head=mean_of("head", "dist_head"),
        source="models/swiftformer/modeling_swiftformer.py: SwiftFormerForImageClassification.forward",
    ),
    Family(
        name="levit",
        make=functools.partial(of_class, LevitForImageClassification, "levit", **TINY_LEVIT),
        dff=("levit.encoder.stages.2", "levit.encoder.stages.2.layers.3"),
        layout=TOKENS,
        stride=64,
        size=(192, 192),
        wide=None,
        square_only="attention biases and subsampling are made for one square size",
        head="batch norm, then linear",
        concept_head=chain("classifier"),
        source="models/levit/modeling_levit.py: LevitForImageClassification.forward, LevitStage.forward",
    ),
    Family(
        name="levit (with teacher)",
        make=functools.partial(of_class, LevitForImageClassificationWithTeacher, "levit", **TINY_LEVIT),
        dff=("levit.encoder.stages.2", "levit.encoder.stages.2.layers.3"),
        layout=TOKENS,
        stride=64,
        size=(192, 192),
        wide=None,
        square_only="attention biases and subsampling are made for one square size",
        head="mean of classifier and classifier_distill, each batch norm, then linear",
        concept_head=mean_of("classifier", "classifier_distill"),
        source="models/levit/modeling_levit.py: LevitForImageClassificationWithTeacher.forward",
    ),
    # Transformers with windows, stages or modulation
    Family(
        name="segformer",
        make=functools.partial(
            auto,
            "segformer",
            num_encoder_blocks=2,
            depths=(1, 2),
            sr_ratios=(2, 1),
            hidden_sizes=(16, 32),
            patch_sizes=(7, 3),
            strides=(4, 2),
            num_attention_heads=(1, 2),
            mlp_ratios=(2, 2),
        ),
        dff=("segformer.stages.1",),
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/segformer/modeling_segformer.py: SegformerStage.forward (norm, then channels first)",
        also={"segformer.stages.1.layer_norm": RELAID},
    ),
    Family(
        name="cvt",
        make=functools.partial(
            auto,
            "cvt",
            patch_sizes=(7, 3),
            patch_stride=(4, 2),
            patch_padding=(2, 1),
            embed_dim=(16, 32),
            num_heads=(1, 2),
            depth=(1, 2),
            mlp_ratio=(2.0, 2.0),
            attention_drop_rate=(0.0, 0.0),
            drop_rate=(0.0, 0.0),
            drop_path_rate=(0.0, 0.0),
            qkv_bias=(True, True),
            cls_token=(False, True),
            qkv_projection_method=("dw_bn", "dw_bn"),
            kernel_qkv=(3, 3),
            padding_kv=(1, 1),
            stride_kv=(2, 2),
            padding_q=(1, 1),
            stride_q=(1, 1),
        ),
        dff=(
            "cvt.encoder.stages.1.layers.1",
            "cvt.encoder.stages.1.layers.1.output",
        ),
        cam=(
            "cvt.encoder.stages.1.layers.0",
            "cvt.encoder.stages.1.layers.0.output",
        ),
        layout=TOKENS,
        prefix=1,
        stride=8,
        head="layernorm, then classifier",
        concept_head=chain("layernorm", "classifier"),
        source="models/cvt/modeling_cvt.py: CvtForImageClassification.forward (reads the CLS token), CvtLayer.forward",
        also={"cvt.encoder.stages.1.layers.1.layernorm_before": NORMALISED},
    ),
    Family(
        name="swin",
        make=functools.partial(auto, "swin", **TINY_SWIN),
        dff=("swin.layernorm",),
        layout=TOKENS,
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/swin/modeling_swin.py: SwinModel.forward",
    ),
    Family(
        name="swinv2",
        make=functools.partial(auto, "swinv2", pretrained_window_sizes=(0, 0), **TINY_SWIN),
        dff=("swinv2.layernorm",),
        layout=TOKENS,
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/swinv2/modeling_swinv2.py: Swinv2Model.forward",
    ),
    Family(
        name="donut-swin",
        make=functools.partial(auto, "donut-swin", **TINY_SWIN),
        dff=("donut.encoder.layers.0.downsample", "donut.encoder.layers.0.downsample.reduction"),
        layout=TOKENS,
        stride=8,
        head="none: the last stage lies between this layer and the classifier",
        source="models/donut/modeling_donut_swin.py: DonutSwinModel.forward (no norm after the blocks), "
        "DonutSwinLayer.forward (a tuple, the residual added in it)",
        also={"donut.encoder.layers.1": TUPLE, "donut.encoder.layers.1.blocks.1": TUPLE},
    ),
    Family(
        name="focalnet",
        make=functools.partial(
            auto,
            "focalnet",
            image_size=64,
            embed_dim=16,
            depths=(1, 2),
            focal_levels=(2, 2),
            focal_windows=(3, 3),
            mlp_ratio=2.0,
        ),
        dff=("focalnet.layernorm",),
        layout=TOKENS,
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/focalnet/modeling_focalnet.py: FocalNetModel.forward",
    ),
    Family(
        name="hiera",
        make=functools.partial(
            auto,
            "hiera",
            image_size=(64, 64),
            embed_dim=16,
            depths=(1, 2),
            num_heads=(1, 2),
            mlp_ratio=2.0,
            num_query_pool=1,
            masked_unit_size=(4, 4),
            masked_unit_attention=(True, False),
        ),
        dff=("hiera.embeddings.patch_embeddings.projection",),
        stride=4,
        head="none: all blocks lie between this layer and the classifier",
        source="models/hiera/modeling_hiera.py: HieraLayer.forward (a tuple, the residual added in it), unroll (no row "
        "order before the last pooling), HieraPooler.forward",
        also={"hiera.encoder.stages.1": TUPLE, "hiera.encoder.stages.1.layers.1": TUPLE},
        **INTERPOLATE,
    ),
    Family(
        name="pvt",
        make=functools.partial(
            auto,
            "pvt",
            image_size=64,
            num_encoder_blocks=2,
            depths=(1, 2),
            sequence_reduction_ratios=(2, 1),
            hidden_sizes=(16, 32),
            patch_sizes=(4, 2),
            strides=(4, 2),
            num_attention_heads=(1, 2),
            mlp_ratios=(2, 2),
        ),
        dff=("pvt.encoder.layer_norm",),
        cam=("pvt.encoder.patch_embeddings.1.dropout",),
        layout=TOKENS,
        prefix=1,
        stride=8,
        wide=None,
        square_only="the position embeddings fit one number of patches",
        head="classifier",
        concept_head=chain("classifier"),
        source="models/pvt/modeling_pvt.py: PvtForImageClassification.forward (reads the CLS token), PvtLayer.forward "
        "(a tuple, the residual added in it), PvtPatchEmbeddings.forward",
        also={"pvt.encoder.block.1.1.layer_norm_1": NORMALISED, "pvt.encoder.block.1.0": TUPLE},
    ),
    Family(
        name="pvt_v2",
        make=functools.partial(
            auto,
            "pvt_v2",
            image_size=64,
            num_encoder_blocks=2,
            depths=(1, 2),
            sr_ratios=(2, 1),
            hidden_sizes=(16, 32),
            patch_sizes=(7, 3),
            strides=(4, 2),
            num_attention_heads=(1, 2),
            mlp_ratios=(2, 2),
        ),
        dff=("pvt_v2.encoder.layers.1.layer_norm",),
        layout=TOKENS,
        stride=8,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/pvt_v2/modeling_pvt_v2.py: PvtV2EncoderLayer.forward, PvtV2ForImageClassification.forward",
    ),
    # Plain vision transformers
    Family(
        name="vit",
        make=functools.partial(auto, "vit", **TINY_VIT_MLP),
        dff=("vit.layernorm",),
        cam=("vit.layers.0",),
        prefix=1,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/vit/modeling_vit.py: ViTModel.forward, ViTForImageClassification.forward (reads the CLS token)",
        also={"vit.layers.1.layernorm_before": NORMALISED},
        **VIT_SIZES,
        **INTERPOLATE,
    ),
    Family(
        name="vit_msn",
        make=functools.partial(auto, "vit_msn", **TINY_VIT_MLP),
        dff=("vit.layernorm",),
        cam=("vit.layers.0",),
        prefix=1,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/vit_msn/modeling_vit_msn.py: ViTMSNForImageClassification.forward (reads the CLS token)",
        also={"vit.layers.1.layernorm_before": NORMALISED},
        **VIT_SIZES,
        **INTERPOLATE,
    ),
    Family(
        name="deit",
        make=functools.partial(of_class, DeiTForImageClassification, "deit", **TINY_VIT_MLP),
        dff=("deit.layernorm",),
        cam=("deit.layers.0",),
        prefix=2,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/deit/modeling_deit.py: DeiTEmbeddings.forward (two tokens), DeiTForImageClassification.forward "
        "(reads the CLS token)",
        also={"deit.layers.1.layernorm_before": NORMALISED},
        **VIT_SIZES,
        **INTERPOLATE,
    ),
    Family(
        name="deit (with teacher)",
        make=functools.partial(of_class, DeiTForImageClassificationWithTeacher, "deit", **TINY_VIT_MLP),
        dff=("deit.layernorm",),
        cam=("deit.layers.0",),
        prefix=2,
        head="mean of cls_classifier and distillation_classifier",
        concept_head=mean_of("cls_classifier", "distillation_classifier"),
        source="models/deit/modeling_deit.py: DeiTForImageClassificationWithTeacher.forward (reads two tokens)",
        also={"deit.layers.1.layernorm_before": NORMALISED},
        **VIT_SIZES,
        **INTERPOLATE,
    ),
    Family(
        name="beit",
        make=functools.partial(auto, "beit", use_relative_position_bias=True, **TINY_VIT_MLP),
        dff=("beit.layernorm", "beit.layers.1"),
        prefix=1,
        head="layernorm, then classifier",
        concept_head=chain("beit.pooler.layernorm", "classifier"),
        source="models/beit/modeling_beit.py: BeitModel (its layernorm is an identity), BeitPooler.forward "
        "(mean of the patches)",
        **VIT_SIZES,
    ),
    Family(
        name="data2vec-vision",
        make=functools.partial(auto, "data2vec-vision", use_relative_position_bias=True, **TINY_VIT_MLP),
        dff=("data2vec_vision.layernorm",),
        prefix=1,
        head="layernorm, then classifier",
        concept_head=chain("data2vec_vision.pooler.layernorm", "classifier"),
        source="models/data2vec/modeling_data2vec_vision.py: Data2VecVisionModel (its layernorm is an identity; blocks "
        "return tuples), Data2VecVisionPooler.forward (mean of the patches)",
        **VIT_SIZES,
    ),
    Family(
        name="dinov2",
        make=functools.partial(auto, "dinov2", mlp_ratio=2, **TINY_VIT),
        dff=("dinov2.layernorm",),
        prefix=1,
        head="the vector as CLS token and as mean of the patches, then classifier",
        concept_head=twice("classifier"),
        source="models/dinov2/modeling_dinov2.py: Dinov2ForImageClassification.forward",
        **VIT_SIZES,
    ),
    Family(
        name="dinov2_with_registers",
        make=functools.partial(auto, "dinov2_with_registers", mlp_ratio=2, **TINY_VIT),
        dff=("dinov2_with_registers.layernorm",),
        prefix=5,
        head="the vector as CLS token and as mean of the patches, then classifier",
        concept_head=twice("classifier"),
        source="models/dinov2_with_registers/modeling_dinov2_with_registers.py: "
        "Dinov2WithRegistersForImageClassification.forward",
        **VIT_SIZES,
    ),
    Family(
        name="ijepa",
        make=functools.partial(auto, "ijepa", **TINY_VIT_MLP),
        dff=("ijepa.layernorm",),
        head="classifier",
        concept_head=chain("classifier"),
        source="models/ijepa/modeling_ijepa.py: IJepaForImageClassification.forward (mean of the patches)",
        **VIT_SIZES,
        **INTERPOLATE,
    ),
    Family(
        name="clip",
        make=functools.partial(auto, "clip", **TINY_CLIP),
        dff=("vision_model.encoder.layers.1",),
        prefix=1,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/clip/modeling_clip.py: CLIPForImageClassification.forward (mean of the patches, no norm)",
        **VIT_SIZES,
        **INTERPOLATE,
    ),
    Family(
        name="metaclip_2",
        make=functools.partial(auto, "metaclip_2", **TINY_CLIP),
        dff=("vision_model.encoder.layers.1",),
        prefix=1,
        head="classifier",
        concept_head=chain("classifier"),
        source="models/metaclip_2/modeling_metaclip_2.py: MetaClip2ForImageClassification.forward (as CLIP)",
        **VIT_SIZES,
        **INTERPOLATE,
    ),
    Family(
        name="siglip",
        make=functools.partial(auto, "siglip", **TINY_CLIP),
        dff=("vision_model.post_layernorm",),
        head="classifier",
        concept_head=chain("classifier"),
        source="models/siglip/modeling_siglip.py: SiglipForImageClassification.forward (mean of the patches; "
        "attention pooling unused)",
        **VIT_SIZES,
        **INTERPOLATE,
    ),
    Family(
        name="siglip2",
        make=lambda: PackedPatches(
            auto(
                "siglip2",
                text_config=TINY_CLIP["text_config"],
                vision_config=dict(
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    patch_size=8,
                    num_patches=36,
                ),
            )
        ),
        dff=("model.vision_model.post_layernorm",),
        head="classifier",
        concept_head=chain("model.classifier"),
        source="models/siglip2/modeling_siglip2.py: Siglip2ForImageClassification.forward; adapter: PackedPatches",
        **VIT_SIZES,
    ),
    # Language models that look
    Family(
        name="imagegpt",
        make=lambda: SoftColours(auto("imagegpt", vocab_size=28, n_embd=16, n_layer=2, n_head=2, n_positions=1024)),
        dff=("model.transformer.ln_f",),
        layout=TOKENS,
        stride=1,
        size=(24, 24),
        wide=(24, 32),
        head="score",
        concept_head=chain("model.score"),
        source="models/imagegpt/modeling_imagegpt.py: ImageGPTForImageClassification.forward (mean of all pixels); "
        "adapter: SoftColours",
    ),
    Family(
        name="shieldgemma2",
        make=lambda: Prompted(
            auto(
                "shieldgemma2",
                vision_config=TINY_VIT_MLP | dict(image_size=64),
                text_config=dict(
                    vocab_size=32,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                ),
                mm_tokens_per_image=16,
                boi_token_index=5,
                eoi_token_index=6,
                image_token_index=7,
                yes_token_index=20,
                no_token_index=21,
            )
        ),
        dff=("model.model.model.multi_modal_projector",),
        layout=TOKENS,
        stride=16,
        wide=None,
        square_only="the projector lays the patches out as a square",
        head="none: a language model reads the image between the words of a prompt",
        source="models/gemma3/modeling_gemma3.py: Gemma3MultiModalProjector.forward, Gemma3Model.forward; "
        "models/shieldgemma2/modeling_shieldgemma2.py; adapter: Prompted",
    ),
    # timm
    Family(
        name="timm/vit_tiny_patch16_224",
        make=functools.partial(timm_model, "vit_tiny_patch16_224", **TIMM_VIT),
        dff=("norm",),
        cam=("blocks.0",),
        prefix=1,
        head="head",
        concept_head=chain("head"),
        source="timm/models/vision_transformer.py: VisionTransformer.forward_features and pool (reads the CLS token)",
        also={"blocks.1.norm1": NORMALISED},
        **VIT_SIZES,
    ),
    Family(
        name="timm/vit_small_patch14_reg4_dinov2",
        make=functools.partial(timm_model, "vit_small_patch14_reg4_dinov2", **TIMM_VIT),
        dff=("norm",),
        cam=("blocks.0",),
        prefix=5,
        head="head",
        concept_head=chain("head"),
        source="timm/models/vision_transformer.py: vit_small_patch14_reg4_dinov2 (CLS and four registers)",
        also={"blocks.1.norm1": NORMALISED},
        **VIT_SIZES,
    ),
    Family(
        name="timm/vit_medium_patch16_reg4_gap_256",
        make=functools.partial(timm_model, "vit_medium_patch16_reg4_gap_256", **TIMM_VIT),
        dff=("norm", "blocks", "blocks.1"),
        prefix=4,
        head="fc_norm, then head",
        concept_head=chain("fc_norm", "head"),
        source="timm/models/vision_transformer.py: vit_medium_patch16_reg4_gap_256 (registers, no CLS; mean of the "
        "patches, so norm is an identity)",
        **VIT_SIZES,
    ),
    Family(
        name="timm/vit_base_patch16_siglip_224",
        make=functools.partial(timm_model, "vit_base_patch16_siglip_224", **TIMM_VIT),
        dff=("attn_pool.kv",),
        head="the attention pooling's values, its MLP, then head",
        concept_head=_attention_pool_head,
        source="timm/models/vision_transformer.py: VisionTransformer.pool; timm/layers/attention_pool.py: "
        "AttentionPoolLatent.forward (keys and values from one linear layer)",
        also={"norm": POOLED_FROM},
        **VIT_SIZES,
    ),
    Family(
        name="timm/swin_tiny_patch4_window7_224",
        make=functools.partial(
            timm_model,
            "swin_tiny_patch4_window7_224",
            img_size=64,
            embed_dim=16,
            depths=(1, 2),
            num_heads=(2, 4),
            window_size=4,
            dynamic_img_size=True,
        ),
        dff=("norm",),
        layout=CHANNELS_LAST,
        stride=8,
        head="head.fc",
        concept_head=chain("head.fc"),
        source="timm/models/swin_transformer.py: SwinTransformer.forward_features",
    ),
    Family(
        name="timm/convnext_atto",
        make=functools.partial(timm_model, "convnext_atto", depths=(1, 1, 1, 2), dims=(8, 16, 16, 32)),
        dff=("norm_pre", "stages", "stages.3", "stages.3.blocks", "stages.3.blocks.1"),
        stride=32,
        size=(128, 128),
        wide=(128, 192),
        head="head.norm, then head.fc",
        concept_head=lambda model: lambda vectors: model.head(vectors[:, :, None, None]),
        source="timm/models/convnext.py: ConvNeXt.forward_features (norm_pre is an identity)",
    ),
    # torchvision
    Family(
        name="torchvision/resnet50",
        make=functools.partial(torchvision.models.resnet50, num_classes=N_LABELS),
        dff=("layer4", "layer4.2"),
        stride=32,
        size=(96, 96),
        wide=(96, 128),
        head="fc",
        concept_head=chain("fc"),
        source="torchvision/models/resnet.py: ResNet._forward_impl",
    ),
    Family(
        name="torchvision/vgg16",
        make=thin_vgg16,
        dff=("avgpool", "features", "features.30"),
        stride=32,
        size=(224, 224),
        wide=None,
        square_only="avgpool lays any image out as 7 x 7 positions",
        head="the vector at all 7 x 7 positions, then classifier",
        concept_head=lambda model: lambda vectors: model.classifier(vectors[..., None].expand(-1, -1, 49).flatten(1)),
        source="torchvision/models/vgg.py: VGG.forward",
    ),
    Family(
        name="torchvision/densenet121",
        make=functools.partial(torchvision.models.densenet121, num_classes=N_LABELS),
        dff=("features", "features.norm5"),
        stride=32,
        size=(96, 96),
        wide=(96, 128),
        head="relu, then classifier",
        concept_head=lambda model: lambda vectors: model.classifier(vectors.relu()),
        source="torchvision/models/densenet.py: DenseNet.forward (relu in place)",
    ),
    Family(
        name="torchvision/mnasnet1_0",
        make=functools.partial(torchvision.models.mnasnet1_0, num_classes=N_LABELS),
        dff=("layers", "layers.16"),
        stride=32,
        size=(128, 128),
        wide=(128, 192),
        head="classifier",
        concept_head=chain("classifier"),
        source="torchvision/models/mnasnet.py: MNASNet.forward",
    ),
    Family(
        name="torchvision/vit_b_16",
        make=functools.partial(
            torchvision.models.VisionTransformer,
            image_size=48,
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
            num_classes=N_LABELS,
        ),
        dff=("encoder", "encoder.ln"),
        cam=("encoder.layers.encoder_layer_0",),
        layout=TOKENS,
        prefix=1,
        stride=8,
        size=(48, 48),
        wide=None,
        square_only="the model checks that the image has its own size",
        head="heads",
        concept_head=chain("heads"),
        source="torchvision/models/vision_transformer.py: Encoder.forward, VisionTransformer.forward (CLS token)",
        also={"encoder.layers.encoder_layer_1.ln_1": NORMALISED},
    ),
    Family(
        name="torchvision/swin_t",
        make=functools.partial(
            torchvision.models.SwinTransformer,
            patch_size=[4, 4],
            embed_dim=16,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=[4, 4],
            num_classes=N_LABELS,
        ),
        dff=("permute",),
        stride=8,
        head="head",
        concept_head=chain("head"),
        source="torchvision/models/swin_transformer.py: SwinTransformer.forward (permute is a module)",
        also={"norm": RELAID},
    ),
]

# Model types of transformers' mapping that have no entry, and why.
EXCEPTIONS = {
    "dinat": "needs the package natten, in a version that cannot be installed any more",
    "perceiver": "its head reads an array of latents without positions; the last layer that has any is the norm of the "
    "input pixels, before the first attention",
}

# Why the finder has no answer, or another one, for the weights that a model is made with.
UNTRAINED = {
    "mobilevit": "its head starts at zero",
    "mobilevitv2": "its head starts at zero",
    "torchvision/vit_b_16": "its head starts at zero",
    "levit": "its attention, which has learnt nothing, mixes the places up",
    "levit (with teacher)": "its attention, which has learnt nothing, mixes the places up",
    "shieldgemma2": "a language model that has learnt nothing does not read the picture",
}
