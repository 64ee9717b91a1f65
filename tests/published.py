"""The classifiers of `checkpoints.CHECKPOINTS` as they are published, without their weights."""

from dataclasses import dataclass

from transformers import (
    ConvNextConfig,
    CvtConfig,
    MobileViTConfig,
    RegNetConfig,
    ResNetConfig,
    SegformerConfig,
    SwinConfig,
    ViTConfig,
)

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
STEPS = {"do_normalize": True, "do_resize": True}
# Resized until the short side has 256 pixels; 224 of them are kept.
CROP = {**STEPS, **IMAGENET, "feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875, "size": 224}


@dataclass
class Published:
    """A published checkpoint.

    Attributes:
        config: what its config.json says, without the names of the categories.
        millions: its parameters in millions. A slip in the config would show here.
        preprocessor: what its preprocessor_config.json says.
        side: height and width in pixels of what its processor makes of a picture.
        positions: how many positions the target layer has along this side.
    """

    config: object
    millions: float
    preprocessor: dict
    side: int
    positions: int


PUBLISHED = {
    "resnet": Published(  # strides 2 (stem), 2 (pooling), 1, 2, 2, 2
        ResNetConfig(
            embedding_size=64,
            hidden_sizes=[256, 512, 1024, 2048],
            depths=[3, 4, 6, 3],
            layer_type="bottleneck",
            hidden_act="relu",
            downsample_in_first_stage=False,
            num_labels=1000,
        ),
        25.6,
        {**CROP, "resample": 3},
        side=224,
        positions=7,
    ),
    "vit": Published(  # 384 / 32
        ViTConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=384,
            patch_size=32,
            num_labels=1000,
        ),
        306.6,
        {**STEPS, **HALVES, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": 384},
        side=384,
        positions=12,
    ),
    "convnext": Published(  # strides 4, 2, 2, 2
        ConvNextConfig(
            hidden_sizes=[96, 192, 384, 768],
            depths=[3, 3, 9, 3],
            num_stages=4,
            patch_size=4,
            layer_scale_init_value=1e-6,
            num_labels=1000,
        ),
        28.6,
        {**CROP, "resample": 3},
        side=224,
        positions=7,
    ),
    "regnet": Published(  # strides 2 (stem), 2, 2, 2, 2
        RegNetConfig(
            embedding_size=32,
            hidden_sizes=[128, 192, 512, 1088],
            depths=[2, 6, 12, 2],
            groups_width=64,
            layer_type="y",
            downsample_in_first_stage=True,
            num_labels=1000,
        ),
        20.6,
        {**CROP, "resample": 3},
        side=224,
        positions=7,
    ),
    "mobilevit": Published(  # strides 2 (stem), 1, 2, 2, 2, 2
        MobileViTConfig(
            image_size=256,
            patch_size=2,
            hidden_sizes=[144, 192, 240],
            neck_hidden_sizes=[16, 32, 64, 96, 128, 160, 640],
            num_attention_heads=4,
            mlp_ratio=2.0,
            expand_ratio=4.0,
            output_stride=32,
            num_labels=1000,
        ),
        5.6,
        {
            "feature_extractor_type": "MobileViTFeatureExtractor",
            "do_resize": True,
            "size": 288,
            "resample": 2,
            "do_center_crop": True,
            "crop_size": 256,
            "do_flip_channel_order": True,
        },
        side=256,
        positions=8,
    ),
    "swin": Published(  # 384 / 4 patches, merged 2 x 2 before stages 2, 3 and 4
        SwinConfig(
            image_size=384,
            patch_size=4,
            embed_dim=192,
            depths=[2, 2, 18, 2],
            num_heads=[6, 12, 24, 48],
            window_size=12,
            mlp_ratio=4.0,
            drop_path_rate=0.1,
            num_labels=21841,
        ),
        228.8,
        {**STEPS, **IMAGENET, "feature_extractor_type": "ViTFeatureExtractor", "resample": 3, "size": 384},
        side=384,
        positions=12,
    ),
    "segformer": Published(  # strides 4, 2, 2, 2
        SegformerConfig(
            hidden_sizes=[32, 64, 160, 256],
            depths=[2, 2, 2, 2],
            patch_sizes=[7, 3, 3, 3],
            strides=[4, 2, 2, 2],
            sr_ratios=[8, 4, 2, 1],
            num_attention_heads=[1, 2, 5, 8],
            mlp_ratios=[4, 4, 4, 4],
            drop_path_rate=0.1,
            num_labels=1000,
        ),
        3.6,
        {**STEPS, **IMAGENET, "feature_extractor_type": "SegformerFeatureExtractor", "resample": 2, "size": 512},
        side=512,
        positions=16,
    ),
    "cvt": Published(  # strides 4, 2, 2
        CvtConfig(
            embed_dim=[64, 192, 384],
            depth=[1, 2, 10],
            num_heads=[1, 3, 6],
            mlp_ratio=[4.0, 4.0, 4.0],
            patch_sizes=[7, 3, 3],
            patch_stride=[4, 2, 2],
            patch_padding=[2, 1, 1],
            cls_token=[False, False, True],
            drop_path_rate=[0.0, 0.0, 0.1],
            num_labels=1000,
        ),
        20.0,
        {**CROP, "resample": 3},
        side=224,
        positions=14,
    ),
}
