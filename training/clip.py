"""Train a bundled CLIP on scenes and captions: `python -m training.clip clip-base`, then `clip-large`.

Writes xai_helpers/bundled/<name>/ in the hub's folder format, with tokenizer, processor and a model card. A run that
was stopped goes on from its last epoch (training/runs/<name>/). It uses a GPU where there is one.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from training.captions import UNKNOWN, caption, flipped, truth, vocabulary
from training.fit import arguments, fit
from training.recorded import DEVICE, RUNS, Scenes, training_scene
from training.report import INSTANCES, MEAN, SIDE, STD, made_by, normalised
from xai_helpers.checkpoints import BUNDLED
from xai_helpers.scenes import labels, make_scene, with_article

START, PADDING, END = "<|startoftext|>", "<|padding|>", "<|endoftext|>"
CONTEXT = 32  # tokens of a text at most
CAPTIONS = 2  # for each picture of a batch
SHARD = "2500KB"


@dataclass
class Recipe:
    """How a CLIP is trained. `start`: the bundled ViT or CLIP that it begins from."""

    side: int
    vision: dict
    text: dict
    epochs: int
    rate: float
    decay: float
    start: str
    what: str


RECIPES = {
    "clip-base": Recipe(
        side=128,
        vision={
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "patch_size": 16,
        },
        text={"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
        epochs=4,
        rate=1e-4,  # at 1e-3 it is right more often, but forgets the ViT: its relevance maps point worse
        decay=0.05,
        start="vit",
        what="image tower: 6 blocks of width 128 with 4 heads, patches of 16 x 16 pixels; text tower: 2 such blocks",
    ),
    "clip-large": Recipe(
        side=144,
        vision={
            "hidden_size": 128,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "patch_size": 12,
        },
        text={"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
        epochs=3,
        rate=2e-4,
        decay=0.05,
        start="clip-base",
        what="image tower: 12 blocks of width 128 with 4 heads, patches of 12 x 12 pixels; text tower: 4 such blocks",
    ),
}


def tokenizer():
    """A token a word of the captions, in lower case; all other words are one and the same unknown token."""
    # The end must not be token 2: transformers takes that for a mistake of the first CLIP configs.
    words = {word: i for i, word in enumerate([UNKNOWN, START, PADDING, END, *vocabulary()])}
    made = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, words[START]), (END, words[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=CONTEXT,
    )


def processor(side=SIDE):
    """The processor of a bundled CLIP for pictures of side x side pixels."""
    size = {"height": side, "width": side}
    image_processor = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    return CLIPProcessor(image_processor, tokenizer())


def new_model(recipe):
    """A CLIP that starts from a bundled ViT, with a random text tower; or from a smaller CLIP."""
    words = tokenizer()
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # Somewhat larger start weights than usual, which are made for widths of hundreds.
    text = {"vocab_size": len(words), "max_position_embeddings": CONTEXT, "initializer_range": 0.05, **ids}
    config = CLIPConfig(
        vision_config={"image_size": recipe.side, "hidden_act": "gelu", "projection_dim": 128, **recipe.vision},
        text_config={**text, "hidden_act": "gelu", "projection_dim": 128, **recipe.text},
        projection_dim=128,
    )
    model = CLIPModel(config)
    if recipe.start == "vit":
        start = AutoModelForImageClassification.from_pretrained(BUNDLED / recipe.start, dtype=torch.float32)
        copy_tower(start, model)
    else:
        grow(CLIPModel.from_pretrained(BUNDLED / recipe.start, dtype=torch.float32), model)
    return model


@torch.no_grad()
def copy_tower(classifier, model):
    """Give a CLIP's image tower the weights of a ViT of the same size."""
    source, target = classifier.vit, model.vision_model
    embeddings = source.embeddings
    patches = embeddings.patch_embeddings.projection
    target.embeddings.patch_embedding.weight.copy_(patches.weight)
    target.embeddings.class_embedding.copy_(embeddings.cls_token.flatten())
    places = embeddings.position_embeddings[0].clone()
    places[1:] += patches.bias  # CLIP's patches have none
    target.embeddings.position_embedding.weight.copy_(places)
    # CLIP has a norm more, in front of the blocks. It begins with the scale that the ViT's tokens have there.
    pictures = np.stack([training_scene(i)["pictures"] for i in range(20)])
    target.pre_layrnorm.weight.fill_(embeddings(normalised(pictures)).std(dim=2).mean())
    names = {
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.o_proj": "self_attn.out_proj",
        "layernorm_before": "layer_norm1",
        "layernorm_after": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for block, ours in zip(source.layers, target.encoder.layers, strict=True):
        for theirs, here in names.items():
            ours.get_submodule(here).load_state_dict(block.get_submodule(theirs).state_dict())
    target.post_layernorm.load_state_dict(source.layernorm.state_dict())


@torch.no_grad()
def grow(small, large):
    """Give a CLIP the weights of one that has fewer blocks, narrower MLPs and larger patches, but the same width.

    Each block of the small one is followed by new ones that add nothing yet, and an MLP's new units have no effect yet.
    So the large one computes what the small one does, but for the patches: their filters and places are resized.
    (After Chen, Goodfellow, Shlens: Net2Net, ICLR 2016)
    """
    source, target = small.state_dict(), large.state_dict()
    times = {
        tower: getattr(large.config, f"{tower}_config").num_hidden_layers
        // getattr(small.config, f"{tower}_config").num_hidden_layers
        for tower in ("vision", "text")
    }
    for name, weight in target.items():
        tower = name.split("_")[0]
        block = re.search(r"layers\.(\d+)\.(.*)", name)
        if block and int(block[1]) % times[tower]:
            if block[2].startswith(("self_attn.out_proj", "mlp.fc2")):
                weight.zero_()
            continue
        found = source[re.sub(r"layers\.\d+", f"layers.{int(block[1]) // times[tower]}", name) if block else name]
        if "patch_embedding" in name:  # the sum over a patch of one colour stays the same
            resized = F.interpolate(found, weight.shape[2:], mode="bicubic", align_corners=False)
            found = found.mean(dim=(2, 3), keepdim=True) + resized - resized.mean(dim=(2, 3), keepdim=True)
            found *= source[name][0, 0].numel() / weight[0, 0].numel()
        elif name == "vision_model.embeddings.position_embedding.weight":
            old, new = (round((len(places) - 1) ** 0.5) for places in (found, weight))
            places = found[1:].T.reshape(1, -1, old, old)
            places = F.interpolate(places, (new, new), mode="bicubic", align_corners=False)
            found = torch.cat([found[:1], places.flatten(2)[0].T])
        if name.endswith("fc2.weight"):
            weight.zero_()
        weight[tuple(slice(n) for n in found.shape)] = found


def contrastive(model, pictures, ids, mask, true):
    """The symmetric contrastive loss, in which every true caption of a picture counts as its own.

    Args:
        pictures: (n, 3, side, side).
        ids, mask: the captions' tokens, (m, length).
        true: float (n, m), 1 where a caption is true of a picture.
    """
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pictures).logits_per_image
    loss = 0
    for scores, wanted in ((logits, true), (logits.T, true.T)):
        some = wanted.any(dim=1)  # a caption with an unknown word in it is true of no picture
        shares = wanted[some] / wanted[some].sum(dim=1, keepdim=True)
        loss = loss + F.cross_entropy(scores[some], shares) / 2
    return loss


def train(name, n_scenes, epochs=None, seed=0, batch=64):
    """Train, resuming where a run was stopped. Returns the model and the seconds that training took."""
    recipe, words = RECIPES[name], tokenizer()
    torch.manual_seed(seed)
    model = new_model(recipe).to(DEVICE)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    def batches(rng):
        scenes = Scenes(n_scenes, recipe.side).make()

        def made():
            for pictures, rows, flip, _ in scenes.batches(batch, rng):
                facts = flipped(scenes.facts[rows], flip)
                written = [caption(rng, of_one) for of_one in facts for _ in range(CAPTIONS)]
                tokens = words([text for text, _ in written], padding=True, return_tensors="pt").to(DEVICE)
                true = torch.from_numpy(truth([claims for _, claims in written], facts)).float().to(DEVICE)
                yield pictures, tokens["input_ids"], tokens["attention_mask"], true

        return made()

    seconds = fit(
        model,
        RUNS / name / "state.pt",
        batches,
        contrastive,
        lambda model: zero_shot(model, processor(recipe.side), "validation", n=300),
        epochs=epochs or recipe.epochs,
        steps=n_scenes // batch,
        rate=recipe.rate,
        decay=recipe.decay,
        seed=seed,
    )
    return model, seconds


def zero_shot(model, processor, split, n=1000):
    """How often the prompts "a photo of a cat." and so on, one a category, find what is there.

    Returns:
        The share of n one-object scenes whose prompt comes first, and of n two-object scenes whose two come first.
    """
    model.eval()
    device, side = model.device, model.config.vision_config.image_size
    prompts = [f"a photo of {with_article(name)}." for name in labels()]
    tokens = processor.tokenizer(prompts, padding=True, return_tensors="pt").to(device)
    found = {}
    for objects, name in ((1, "one object, its prompt first"), (2, "two objects, their prompts first")):
        scenes = [make_scene(100_000 * objects + i, objects, side, split=split) for i in range(n)]
        right = 0
        for start in range(0, n, 100):
            some = scenes[start : start + 100]
            pictures = normalised(np.stack([np.asarray(scene.image) for scene in some]), device)
            with torch.no_grad():
                logits = model(**tokens, pixel_values=pictures).logits_per_image
            first = logits.topk(objects).indices.cpu().tolist()
            right += sum(
                {labels()[i] for i in row} == set(scene.categories) for row, scene in zip(first, some, strict=True)
            )
        found[name] = right / n
    return found


def report(folder, recipe, how, seconds):
    """Score the checkpoint in `folder` as it was saved, write its card, and print it."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    test = zero_shot(model, CLIPProcessor.from_pretrained(folder), "test")
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    begun = f"The image tower started from the bundled {recipe.start}, which was"
    if recipe.start != "vit":
        begun = f"It started from the bundled {recipe.start}, whose image tower started from a ViT that was"
    scores = "".join(f"| {name} | {value:.3f} |\n" for name, value in test.items())
    card = f"""# {folder.name}

A CLIP; {recipe.what}; {parameters / 1e6:.2f} million parameters, {size / 1e6:.1f} MB in half precision.
Input: {recipe.side} x {recipe.side} pixels and a text of up to {CONTEXT - 2} words out of {len(vocabulary())}. Any
other word is the unknown one.

{INSTANCES}

**Its zero-shot scores are not zero-shot in the strict sense.** {begun} trained to
name the same categories, and the captions name them, too.

Recipe: {how} Masks were never shown to it; the captions' words for places and sizes were worked out from them.
{made_by("clip", folder.name, seconds)}

Scores on 2,000 test scenes (1,000 with one object, 1,000 with two) with eight prompts, "a photo of a cat." and so on.
Test scenes have distractors of kinds that training never shows.

| score | value |
|---|---|
{scores}"""
    (folder / "README.md").write_text(card)
    print(card)


def main():
    given = arguments(__doc__, RECIPES)
    recipe, folder = RECIPES[given.name], BUNDLED / given.name
    model, seconds = train(given.name, given.scenes, given.epochs)
    model.half().save_pretrained(folder, max_shard_size=SHARD)
    processor(recipe.side).save_pretrained(folder)
    how = (
        f"{given.scenes} training scenes of {recipe.side} x {recipe.side} pixels, "
        f"{given.epochs or recipe.epochs} epochs, "
        f"flips and shifts of up to 8 pixels; {CAPTIONS} fresh captions a picture and epoch; symmetric contrastive "
        f"loss in which every true caption of a picture counts as its own; AdamW, rate {recipe.rate:g}, one cycle, "
        f"weight decay {recipe.decay:g} on matrices, batch 64, seed 0."
    )
    report(folder, recipe, how, seconds)


if __name__ == "__main__":
    main()
