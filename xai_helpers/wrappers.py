"""Any model -> "image tensor in, score tensor out", and what every explanation asks of a model first."""

import contextlib
import difflib
import inspect
import itertools
import numbers
import os
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from xai_helpers.reshape import ADVICE
from xai_helpers.scoring import MapWarning

if TYPE_CHECKING:  # imported late below: only tables need it
    import pandas as pd

    from xai_helpers.scoring import Example

BAR_AFTER = 1  # seconds
MOST_COLOURS = 4  # of a picture whose channels may come last by mistake

Category = str | int | Callable[[torch.Tensor], torch.Tensor]


class LogitsModel(torch.nn.Module):
    """Returns the scores of a model as a plain tensor.

    transformers' models return an object with a field `logits`, CLIP one with `logits_per_image`; grad-cam and Captum
    want the tensor in it. A model that returns a tensor already is passed through. The model gets a copy of the images,
    on which it may work in place.

    Args:
        model: a transformers classification model, or any module that maps images to a tensor. Where images are not
            the first thing that it takes, it is given them by the name `pixel_values`.
        options: keyword arguments of each forward pass, such as `interpolate_pos_encoding=True`, or a second input.
            A tensor of one row is repeated for as many rows as there are images, but not the prompts of a CLIP.
    """

    def __init__(self, model: torch.nn.Module, **options: Any):
        super().__init__()
        self.model = model
        self.options = options
        self.config = getattr(model, "config", None)
        self.by_name = _takes_pixel_values_later(model)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Maps images (batch, channels, height, width) to scores, (batch, n_classes) for a classifier.

        Of a model with a single score, they are (batch, 1), however it squeezes them.

        Raises:
            ValueError: the model returns neither a tensor nor an object with `logits`.
        """
        images, options = pixel_values.clone(), self.options
        if len(images) > 1 and not hasattr(self.model, "get_text_features"):
            options = {name: _in_rows(value, len(images)) for name, value in options.items()}
        output = self.model(pixel_values=images, **options) if self.by_name else self.model(images, **options)
        scores = output
        for field in ("logits", "logits_per_image"):
            if not isinstance(scores, torch.Tensor):
                scores = getattr(output, field, None)
        if not isinstance(scores, torch.Tensor):
            raise ValueError(
                f"{type(self.model).__name__} returned {type(output).__name__}, neither a tensor nor an object with "
                "`logits`: load a model with a head (such as ...ForImageClassification), or wrap it in a module whose "
                "forward returns the scores"
            )
        return scores.reshape(-1, 1) if scores.ndim < 2 else scores


def _takes_pixel_values_later(model):
    try:
        names = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # of code that Python does not see
        return False
    return "pixel_values" in names[1:]


def _in_rows(value, rows):
    """A second input of one row, as often as there are images."""
    is_one_row = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == 1
    return value.expand(rows, *value.shape[1:]) if is_one_row else value


class Scorer(LogitsModel):
    """A `LogitsModel` as explanations use it: one row of float scores for each image, or an error that says why not.

    Attributes:
        mixes: the path of a batch norm that takes the statistics of the rows that it gets, even in eval mode; None
            without one. Its rows have to be alike, or run one by one.
    """

    def __init__(self, model: torch.nn.Module, **options: Any):
        super().__init__(model, **options)
        norms = [
            path
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        ]
        self.mixes = norms[0] if norms else None

    def rows(self, pixel_values: torch.Tensor) -> int:
        """How many rows of scores are due."""
        return len(pixel_values)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Maps images (batch, channels, height, width) to float scores, (batch, n_classes) for a classifier.

        Raises:
            ValueError: the model returns no scores, or not a row an image; or it takes one image only.
        """
        if self.mixes is not None and not (pixel_values == pixel_values[:1]).all():
            raise ValueError(self.mixed())
        try:
            scores = super().forward(pixel_values)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if len(pixel_values) > 1 and self.takes(pixel_values[:1]) and not self.takes(pixel_values):
                raise ValueError(
                    f"{type(self.model).__name__} takes one image, but fails for {len(pixel_values)} of them, which an "
                    f"explanation runs at once ({type(error).__name__}: {error}): your model must take any number of "
                    "rows. Give a second input as LogitsModel(model, name=tensor), which repeats one row, or let the "
                    "model expand it to len(pixel_values); occlude and rise take batch=1, too"
                ) from error
            raise
        if len(scores) != self.rows(pixel_values):
            found = tuple(scores.shape) if scores.shape[1:] != (1,) else (len(scores),)  # as the model gave them
            raise ValueError(
                f"the scores have shape {found} for {self.rows(pixel_values)} rows of images, wanted (images, "
                "categories): let the model keep the images' dimension"
            )
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    def mixed(self) -> str:
        """What is said where rows that are not alike would run together."""
        return (
            f"the batch norm at {self.mixes} takes the statistics of the images that run together (it was made with "
            "track_running_stats=False), so that the scores of one depend on the others: run them one by one, by "
            "batch=1 in occlude and rise, batch_size=1 in ScoreCAM and AblationCAM or internal_batch_size=1 in "
            "Captum's IntegratedGradients; or use explain without a layer, which runs one row"
        )

    def takes(self, images: torch.Tensor) -> bool:
        """Whether the model runs on some images."""
        try:
            with torch.no_grad():
                super().forward(images)
        except Exception:
            return False
        return True


SCORES = {
    "similarity": lambda logits: logits,
    "contrast": lambda logits: logits - logits.mean(dim=1, keepdim=True),
    "softmax": lambda logits: logits.softmax(dim=1),
}


class PromptClassifier(torch.nn.Module):
    """A CLIP as a classifier: its categories are prompts, its scores say how well each fits the image.

    The texts are embedded once, when it is made; a forward pass runs the image tower only, and is differentiable with
    respect to the image. (Radford et al.: Learning Transferable Visual Models From Natural Language Supervision,
    ICML 2021)

    Args:
        clip: a `CLIPModel` of transformers, or a `SiglipModel`. It is left as it is.
        processor: its processor, whose tokenizer reads the prompts. For a SigLIP they are padded to its context, as in
            its training, so that no prompt depends on how long another one is.
        prompts: a text or several, which are the names of the categories; or a dict, name -> text.
        scores: "similarity": the cosine of image and text, times the model's own temperature, and for a SigLIP plus its
            bias. It knows nothing of the other prompts. "contrast": the similarity minus the mean over all prompts.
            "softmax": the shares that add up to 1. The last two depend on all the prompts.

    Attributes:
        prompts: name -> text.
        text_embeds: float tensor (n_prompts, projection_dim), of unit length.
        config: its `id2label` has the names, so `explain` and `relevance` take them as categories.

    Raises:
        ValueError: no prompt, one that is no string, one that is longer than the context, or unknown `scores`; a
            processor without a tokenizer of transformers, or one that lacks most of the model's vocabulary.

    Warns:
        UserWarning: the tokenizer does not know a word of a prompt and reads it as its unknown token.
    """

    clip: Any
    text_embeds: torch.Tensor

    def __init__(
        self,
        clip: Any,
        processor: Any,
        prompts: str | Iterable[str] | Mapping[str, str],
        scores: str = "similarity",
    ):
        super().__init__()
        if scores not in SCORES:
            raise ValueError(f"scores is one of {', '.join(map(repr, SCORES))}, not {scores!r}")
        if isinstance(prompts, str):
            prompts = [prompts]
        self.prompts = dict(prompts) if isinstance(prompts, Mapping) else {prompt: prompt for prompt in prompts}
        tokens = _tokens(clip, processor, list(self.prompts.values()))
        with frozen(clip), torch.no_grad():
            embeds = torch.nn.functional.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)
        self.clip = clip
        self.scores = scores
        self.register_buffer("text_embeds", embeds, persistent=False)
        self.config = types.SimpleNamespace(id2label=dict(enumerate(self.prompts)))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.clip.device

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of the patches into which the image tower cuts images (batch, channels, height, width)."""
        patch = self.clip.config.vision_config.patch_size
        height, width = pixel_values.shape[2:]
        return height // patch, width // patch

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Maps images (batch, channels, height, width) to scores (batch, n_prompts).

        Of another size than the model was trained on, its position embeddings are interpolated.
        """
        size = self.clip.config.vision_config.image_size
        other_size = tuple(pixel_values.shape[2:]) != (size, size)
        embeds = self.clip.get_image_features(pixel_values, interpolate_pos_encoding=other_size).pooler_output
        cosines = torch.nn.functional.normalize(embeds, dim=-1) @ self.text_embeds.T
        return SCORES[self.scores](cosines * self.clip.logit_scale.exp() + getattr(self.clip, "logit_bias", 0))


def _tokens(clip, processor, texts):
    """The tokens of the prompts, on the model's device."""
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        found = f"not {type(wrong[0]).__name__}" if wrong else "at least one"
        raise ValueError(f"prompts are texts such as 'a photo of a cat.', {found}")
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "unk_token_id"):
        raise ValueError(
            f"{type(processor).__name__} is no processor of transformers, whose tokenizer reads prompts: load one with "
            "AutoProcessor.from_pretrained, beside the model of transformers that it belongs to"
        )
    known = clip.config.text_config.vocab_size
    if len(tokenizer) < known // 2:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {known}: it would read every word as unknown. "
            "Its vocabulary is not beside it: load it from a folder with tokenizer.json, or vocab.json and merges.txt"
        )
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    context = clip.config.text_config.max_position_embeddings
    tells_places = getattr(tokenizer, "is_fast", False)
    for text in texts:
        read = tokenizer(text, return_offsets_mapping=True) if tells_places else tokenizer(text)
        if len(read["input_ids"]) > context:
            raise ValueError(
                f"the prompt {text[:40] + '...'!r} has {len(read['input_ids'])} tokens; the model reads {context}, the "
                "marks for start and end included: shorten it"
            )
        if tells_places:
            pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
            strange = [text[start:end] for token, (start, end) in pairs if token in unknown]
        else:
            strange = [word for word in text.split() if unknown & set(tokenizer(word)["input_ids"])]
        if strange:
            warnings.warn(
                f"the tokenizer does not know {', '.join(map(repr, strange))} in {text!r} and reads it as "
                f"{tokenizer.unk_token}",
                stacklevel=3,
            )
    # A SigLIP reads padding, too, and was trained on texts that are padded to its context.
    reads_padding = "attention_mask" not in read or "siglip" in clip.config.model_type
    padding = {"padding": "max_length", "max_length": context} if reads_padding else {"padding": True}
    return tokenizer(texts, **padding, return_tensors="pt").to(clip.device)


class CategoryTarget:
    """The score of one category, with a clear error for an index that no score has."""

    def __init__(self, category: int):
        self.category = category

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        if scores.ndim != 1:
            raise ValueError(
                f"the scores of one image have shape {tuple(scores.shape)}, not (categories,), so that a name or an "
                "index does not say which score is meant: give a callable that makes one number of them, such as the "
                "mean over a region or the score of one box, as the book's pages on segmentation and detection do"
            )
        if not 0 <= self.category < len(scores):
            one = "" if len(scores) > 1 else "; what speaks against a single score is shown by lambda scores: -scores"
            raise ValueError(
                f"category {self.category} is out of range: the model's scores are 0 to {len(scores) - 1}{one}"
            )
        return scores[self.category]


class CallableTarget:
    """What a callable makes of the scores of one image, with a clear error where that is not one number."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        score = self.function(scores)
        if not isinstance(score, torch.Tensor) or score.numel() != 1:
            found = f"shape {tuple(score.shape)}" if isinstance(score, torch.Tensor) else type(score).__name__
            raise ValueError(
                "a callable category makes a tensor of one number of the scores of one image, such as "
                f"lambda scores: scores[0] - scores[1]; this one returned {found} for scores of shape "
                f"{tuple(getattr(scores, 'shape', ()))}"
            )
        return score.reshape(())


def category_targets(
    model: torch.nn.Module, categories: Category | Iterable[Category] | torch.Tensor | np.ndarray
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Turns categories into targets, the functions that pick from the scores of one image what is explained.

    Args:
        model: its `config.id2label`, where there is one, knows the names.
        categories: a name, an index or a callable (scores of one image -> scalar), or several of them.

    Returns:
        One callable a category. Those for an index that no score has and for a callable that returns no single number
        raise a ValueError.

    Raises:
        ValueError: an unknown name (the closest names are given), an ambiguous one, what is neither name nor index nor
            callable, or no category at all.
    """
    if isinstance(categories, (torch.Tensor, np.ndarray)):
        categories = categories.reshape(-1).tolist()
    if isinstance(categories, (str, bytes)) or callable(categories) or not isinstance(categories, Iterable):
        categories = [categories]  # type: ignore[list-item]  # of bytes, which `_target` refuses
    targets = [_target(model, category) for category in categories]
    if not targets:
        raise ValueError("no category to explain: give at least one name, index or callable")
    return targets


def _target(model, category):
    if callable(category):
        return CallableTarget(category)
    if isinstance(category, (torch.Tensor, np.ndarray)) and category.ndim == 0:
        category = category.item()
    if isinstance(category, numbers.Integral) and not isinstance(category, bool):
        return CategoryTarget(int(category))
    if not isinstance(category, str):
        raise ValueError(f"a category is a name, an index or a callable, not {type(category).__name__}")
    return CategoryTarget(category_index(model, category))


def category_index(model: torch.nn.Module, name: str) -> int:
    """The index of a category, whichever way the model's label set writes its name.

    Args:
        model: its `config.id2label` knows the names.
        name: a string, which is looked up as in `matching_categories`.

    Raises:
        ValueError: the model has no names, an unknown name (the closest names are given), or an ambiguous one.

    Example:
        >>> from xai_helpers.checkpoints import load
        >>> model, processor = load("resnet", weights="bundled")
        >>> category_index(model, "Coffee_cup")
        2
        >>> category_index(model, "coffee")
        Traceback (most recent call last):
        ...
        ValueError: the model has no category 'coffee'; the closest are: 'coffee cup', 'coin'
    """
    return index_among(_names(model, f"category {name!r} has no index: give the index"), name)


def index_among(names: Mapping[int, str], name: str) -> int:
    """The index of a category among names, as `category_index` finds it; raises what that does."""
    indices = matching_categories(names, name)
    if len(indices) > 1:
        raise ValueError(f"several categories are named {name!r}: give one of their indices, {indices}")
    if indices:
        return indices[0]
    plain = _plain(name)
    known = {_plain(name): name for name in names.values()}
    containing = [key for key in known if plain in key]
    close = containing + difflib.get_close_matches(plain, known, n=5, cutoff=0.4)
    shown = [known[key] for key in dict.fromkeys(close)] or list(known.values())
    raise ValueError(f"the model has no category {name!r}; the closest are: {', '.join(map(repr, shown[:5]))}")


def matching_categories(names: Mapping[int, str], name: str) -> list[int]:
    """The indices of the categories that a name may mean.

    A name is looked up as it stands; if no category is called that, without regard to case and underscores, so that
    "Egyptian cat" finds the "Egyptian_cat" of ImageNet-22k; and at last among the synonyms that a name lists between
    commas, so that "remote control" finds "remote control, remote".

    Args:
        names: index -> name, as in a model's `config.id2label`.
        name: a string.
    """
    plain = _plain(name)
    for is_meant in (
        lambda known: known == name,
        lambda known: _plain(known) == plain,
        lambda known: plain in _plain(known).split(", "),
    ):
        indices = [int(index) for index, known in names.items() if is_meant(known)]
        if indices:
            return indices
    return []


def _names(model, so):
    """A model's `config.id2label`; `so` says what follows where it has none."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names:
        wrapped = isinstance(getattr(model, "module", None), torch.nn.Module)  # as in a DataParallel
        raise ValueError(f"the model has no config.id2label, so {so}{', or explain model.module' if wrapped else ''}")
    return names


def _plain(name):
    return name.lower().replace("_", " ")


def top_categories(model: torch.nn.Module, pixel_values: torch.Tensor, k: int = 4) -> "pd.DataFrame":
    """The categories to which a model gives the highest scores for one image.

    Args:
        model: a transformers classification model with a `config.id2label`.
        pixel_values: one image, float tensor (1, channels, height, width).
        k: how many, at least 1; all, if the model has fewer.

    Returns:
        A pandas DataFrame, best first: a row a category, with its "score" (a logit, if the model gives logits).

    Raises:
        ValueError: a model without `config.id2label`, or with scores that are not a row an image, as a segmenter's;
            pixel_values of another shape; a bad k.

    Example:
        >>> from xai_helpers.checkpoints import example_scene, load
        >>> model, processor = load("resnet", weights="bundled")
        >>> inputs = processor(example_scene("bundled").image, return_tensors="pt").to(model.device)
        >>> top_categories(model, inputs["pixel_values"], k=2).index.tolist()
        ['coffee cup', 'cat']
    """
    import pandas as pd

    pixel_values = input_for(model, pixel_values, coarse=True)
    names = _names(model, "its categories have no names: sort its scores yourself")
    check_count("k", k)
    scorer = Scorer(model)
    with frozen(scorer), torch.no_grad():
        scores = scorer(pixel_values)[0]
        if scores.ndim != 1:
            raise ValueError(
                f"the scores of one image have shape {tuple(scores.shape)}, not (categories,): there is no order of "
                "categories for the whole image; sort the scores of a region or a box yourself"
            )
        scores, indices = scores.topk(min(k, len(scores)))
    return pd.DataFrame({"score": scores.numpy(force=True)}, index=[names[int(i)] for i in indices])


def check_scores(scores: torch.Tensor) -> None:
    """Raises a ValueError unless the scores of some categories, (n_categories,) or (rows, n_categories), are finite."""
    wrong = ~scores.detach().reshape(-1, scores.shape[-1]).isfinite()
    if wrong.any():
        number = int(wrong.any(dim=0).int().argmax())
        value = scores.detach().reshape(-1, scores.shape[-1])[wrong[:, number].int().argmax(), number].item()
        raise ValueError(
            f"the score of category number {number + 1} is {value}, of which there is no map: look for a division by "
            "zero, a logarithm of zero or an overflow in the model or in the category's function, or for broken weights"
        )


def finished_maps(maps: np.ndarray, why_zero: str) -> np.ndarray:
    """Maps as they are handed out: float32 and finite; of one that is zero everywhere a warning says why.

    Args:
        maps: (n_categories, height, width).
        why_zero: what a map of zeros means, and what to do.

    Raises:
        ValueError: a map has NaN or infinite values.

    Warns:
        MapWarning: a map is zero everywhere.
    """
    maps = np.asarray(maps, np.float32)
    for number, heat in enumerate(maps, start=1):
        if not np.isfinite(heat).all():
            raise ValueError(
                f"the map of category number {number} has NaN or infinite values, though its score is finite: the "
                "gradient is not, as that of a root at zero; look for one in the model, or use a method that needs "
                "none, such as occlude or rise"
            )
        if not heat.any():
            why = f"the map of category number {number} is zero everywhere: {why_zero}"
            warnings.warn(why, MapWarning, stacklevel=3)
    return maps


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raises a ValueError unless a value is a whole number of at least `least` and, if given, at most `most`."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is a whole number {bounds}, not {value!r}")


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model computes: the device of its first parameter or buffer; the CPU, if it has neither."""
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def _tensors(model):
    return itertools.chain(model.parameters(), model.buffers())


def input_for(model: torch.nn.Module, pixel_values: torch.Tensor, coarse: bool = False) -> torch.Tensor:
    """An image as a model takes it: checked, without autograd's history, on the model's device and in its precision.

    Args:
        model: any module.
        pixel_values: one image, float tensor (1, channels, height, width).
        coarse: whether a model in half precision will do.

    Raises:
        ValueError: pixel_values of another kind, as in `check_picture`; a model in half precision.
    """
    check_picture(pixel_values)
    dtype = next((tensor.dtype for tensor in _tensors(model) if tensor.is_floating_point()), pixel_values.dtype)
    if dtype.itemsize < 4 and not coarse:
        raise ValueError(
            f"the model computes in {dtype}, which is too coarse for gradients and maps: explain it in single "
            "precision, model.float()"
        )
    return pixel_values.detach().to(device_of(model), dtype)


def check_picture(pixel_values: torch.Tensor) -> None:
    """Raises a ValueError that says what to do, unless pixel_values is one image of finite values.

    It is a float tensor (1, channels, height, width), with any number of channels.
    """
    if not isinstance(pixel_values, torch.Tensor):
        advice = 'give the tensor that the processor makes: processor(image, return_tensors="pt")["pixel_values"]'
        raise ValueError(f"pixel_values is a {type(pixel_values).__name__}, not a tensor: {advice}")
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim == 3:
        advice = "add the batch dimension: pixel_values.unsqueeze(0)"
    elif pixel_values.ndim == 5:
        advice = (
            "of a video or a volume, explain one frame with the others held as they are; or fold the frames into the "
            "channels, pixel_values.flatten(1, 2), and explain a module whose forward unflattens them: occlude then "
            "hides a window in all frames at once"
        )
    elif pixel_values.ndim == 4 and shape[0] != 1:
        advice = "explain one image at a time: pixel_values[i : i + 1]"
    elif pixel_values.ndim == 4 and shape[3] <= MOST_COLOURS < shape[1]:
        advice = "put the channels first: pixel_values.permute(0, 3, 1, 2)"
    elif pixel_values.ndim != 4 or 0 in shape:
        advice = "let the model's processor make it from the image"
    elif not pixel_values.is_floating_point():
        advice = f"it is {pixel_values.dtype}; let the model's processor scale and normalise the image"
    elif not (pixel_values.is_meta or pixel_values.isfinite().all()):
        raise ValueError(
            "pixel_values has NaN or infinite values: look for them in the image, or for a division by zero in what "
            "normalised it"
        )
    else:
        return
    raise ValueError(f"pixel_values has shape {shape}, wanted a float tensor (1, channels, height, width): {advice}")


def layer_path(model: torch.nn.Module, layer: torch.nn.Module) -> str:
    """The dotted name of a module inside a model; a ValueError if it is not in there."""
    if not isinstance(layer, torch.nn.Module):
        found = repr(layer) if isinstance(layer, str) else type(layer).__name__
        raise ValueError(f"a target layer is a module such as model.vit.layers[-2], not {found}; {ADVICE}")
    for path, module in model.named_modules():
        if module is layer:
            return path or type(model).__name__
    raise ValueError(f"target layer {type(layer).__name__} is not part of this {type(model).__name__}; {ADVICE}")


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, parameters that need no gradient, autograd on; at the end all of it, and `.grad`, is as before.

    Autocast is off, since numpy knows no bfloat16; layers run without gradient checkpointing, which would run them
    once more, past all rules; and a model of torch.compile runs as it was written, since compiled code runs past hooks.
    Threads that explain one model take turns.

    Raises:
        ValueError: the model was made in `torch.inference_mode()`, or exported.
    """
    modules = list(model.modules())
    for path, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"{path} was made in torch.inference_mode(), so that no gradient goes through it: load the model "
                "outside, or explain copy.deepcopy(model), made outside"
            )
    with _lock_of(model):
        modes = [(module, module.training) for module in modules]
        checkpointing = [
            (module, name, vars(module)[name])
            for module in modules
            for name in ("grad_checkpointing", "gradient_checkpointing")  # timm's name, and transformers'
            if isinstance(vars(module).get(name), bool)
        ]
        parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        try:
            try:
                model.eval().requires_grad_(False)
            except NotImplementedError as error:
                raise ValueError(
                    f"{type(model).__name__} was exported, so that it has no layers to look into and no eval mode: "
                    "explain the model that it was made of"
                ) from error
            for module, name, _ in checkpointing:
                setattr(module, name, False)
            kind = device_of(model).type
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.enable_grad())
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
                stack.enter_context(_not_compiled())
                yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, value in checkpointing:
                setattr(module, name, value)
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


RUNS_AGAIN = (
    "a layer runs outside the pass that is explained: by gradient checkpointing, which saves memory in training alone "
    "(switch it off), or because a category's function runs the model (let it use what was computed before)"
)


@contextlib.contextmanager
def no_checkpointing() -> Iterator[None]:
    """Within, what torch says of gradient checkpointing becomes a ValueError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "checkpoint" in f"{type(error).__name__} {error}".lower():
            raise ValueError(RUNS_AGAIN) from error
        raise


_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _lock_of(model):
    """One for all wrappers around the same model: that of the first module with parameters."""
    owner = next((module for module in model.modules() if any(True for _ in module.parameters(recurse=False))), model)
    with _making:
        return _locks.setdefault(owner, threading.RLock())


_stance = contextlib.ExitStack()
_within_stance = 0


@contextlib.contextmanager
def _not_compiled():
    """Code of torch.compile runs as it was written, which is switched for all threads: from the first to the last."""
    global _within_stance
    with _making:
        if _within_stance == 0:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _within_stance += 1
    try:
        yield
    finally:
        with _making:
            _within_stance -= 1
            if _within_stance == 0:
                _stance.close()


@contextlib.contextmanager
def eager_attention(model: torch.nn.Module) -> Iterator[None]:
    """Eager attention, which alone returns its weights and has a second derivative; at the end all is as before."""
    from transformers import PreTrainedConfig  # late, since it takes half a second

    # The attentions look into these configs. model.set_attn_implementation does the same to them, but warns about parts
    # that a config describes and the model lacks.
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


@contextlib.contextmanager
def count_passes(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Counts what an explanation asks of a model: its cost, without a clock.

    For example::

        with count_passes(model) as passed:
            explain(model, pixel_values, categories, target_layer)

    Args:
        model: the module that the explanation is given; it may take a batch, or a list of pictures as torchvision's
            detectors do. Calls that go past it, to one of its parts, are not seen.

    Yields:
        A dict: "pictures", how many have gone into the model; "backward passes", how many have come from its scores,
        each for any number of pictures. One may end before it is through: `explain`'s ends at the target layer.
    """
    passed = {"pictures": 0, "backward passes": 0}

    def at_input(module, args, kwargs):
        pictures = next(value for value in (*args, *kwargs.values()) if isinstance(value, (torch.Tensor, list, tuple)))
        passed["pictures"] += len(pictures)

    def at_scores(module, args, output):
        if isinstance(output, list):  # of a detector: a dict a picture
            scores = [found["scores"] for found in output]
        else:
            scores = [output if torch.is_tensor(output) else output.logits]
        if needed := [tensor for tensor in scores if tensor.requires_grad]:
            torch.autograd.graph.register_multi_grad_hook(needed, at_gradient, mode="any")

    def at_gradient(gradient):
        passed["backward passes"] += 1

    with model.register_forward_pre_hook(at_input, with_kwargs=True), model.register_forward_hook(at_scores):
        yield passed


def masked_scores(scores_of: Callable[[slice], torch.Tensor], n: int, batch: int, name: str) -> torch.Tensor:
    """The scores of many masked pictures, some at a time: what RISE, ScoreCAM and AblationCAM read all categories from.

    A progress bar comes where they take more than a second, and goes when they are done. Where nobody watches, as when
    a book is built, tqdm's own switch keeps the page clean: TQDM_DISABLE=1.

    Args:
        scores_of: (which of the masks) -> scores of the pictures, or activations, that are masked so; (n_masks, ...).
        n: how many masks there are.
        batch: how many of them in one pass.
        name: for the bar.

    Returns:
        A tensor (n, ...), without a graph.
    """
    found, start = [], time.monotonic()
    disable = bool(os.environ.get("TQDM_DISABLE"))  # which tqdm's bar for notebooks does not read
    with contextlib.ExitStack() as stack, torch.no_grad():
        bar = None
        for first in range(0, n, batch):
            found.append(scores_of(slice(first, min(first + batch, n))))
            if bar is None and time.monotonic() - start >= BAR_AFTER:
                bar = stack.enter_context(tqdm(desc=name, total=n, leave=False, disable=disable))
            if bar is not None:
                bar.update(first + len(found[-1]) - bar.n)
    return torch.cat(found)


def passes_table(model: torch.nn.Module, methods: Mapping[str, Callable], example: "Example") -> "pd.DataFrame":
    """What each of several methods asks of a model for all maps of one example, by `count_passes`.

    Args:
        model: the module that the methods explain.
        methods: name -> function (pixel_values, categories), as for `scoring.score_table`.
        example: an `Example`.

    Returns:
        A pandas DataFrame, a row a method: "pictures" and "backward passes".
    """
    import pandas as pd

    rows = {}
    for name, method in methods.items():
        with count_passes(model) as rows[name]:
            method(example.pixel_values, example.categories)
    return pd.DataFrame.from_dict(rows, orient="index")
