import functools
import re
import warnings

import numpy as np
import pytest
import torch
from pytorch_grad_cam import AblationCAM, EigenCAM, GradCAM, LayerCAM, ScoreCAM
from rehearsal import accelerator
from torch import nn

from xai_helpers.cam import explain
from xai_helpers.checkpoints import example_scene, examples, load
from xai_helpers.concepts import factorize
from xai_helpers.layers import TargetLayer, find_target_layers, layer_table
from xai_helpers.recipes import RECIPES
from xai_helpers.reshape import channels_last_to_map, tokens_to_map
from xai_helpers.scoring import MapWarning
from xai_helpers.wrappers import LogitsModel


def picture(height=32, width=32):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def state(model):
    """What must be left as it was."""
    return (
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        [(p.requires_grad, id(p.grad), len(p._backward_hooks or ())) for p in model.parameters()],
        [buffer.clone().tolist() for buffer in model.buffers()],
    )


def mixed_state(model):
    """Gives a model modes, flags and gradients that no call would give it by itself, and returns its state."""
    model.train()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        if i % 2 == 0:
            parameter.grad = torch.ones_like(parameter)
    return state(model)


class LeftHalf(nn.Module):
    """Reads the left half of one channel of the last layer; its ReLU works in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 5, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.unused = nn.Conv2d(3, 4, 1)
        self.aside = nn.Conv2d(3, 2, 8, stride=8)

    def forward(self, x):
        self.aside(x)
        x = self.conv(self.relu(self.norm(self.stem(x))))
        left = x[..., : x.shape[3] // 2]
        return torch.cat([self.pool(left).flatten(1)[:, :1], left.mean(dim=(2, 3))[:, 1:2]], dim=1)


def test_layer_table_by_hand():
    model = LeftHalf()
    layers = {"stem": model.stem, "last": model.conv, "pooled": model.pool, "side branch": model.aside}
    table = layer_table(model, picture(32, 48), 0, layers)
    assert table.columns.tolist() == ["output", "grid", "stride", "share with gradient"]
    assert table.loc["last"].tolist() == ["1 x 5 x 8 x 12", "8 x 12", "4", 0.5]
    assert table.loc["pooled"].tolist() == ["1 x 5 x 1 x 1", "-", "-", 1]
    assert table.loc["side branch"].tolist() == ["1 x 2 x 4 x 6", "4 x 6", "8", 0]
    # The stem's gradient ends where the ReLU was below zero, so it is at most that of the layer behind.
    assert 0 < table.loc["stem", "share with gradient"] <= 0.5


def test_layer_table_is_not_fooled_by_a_relu_that_works_in_place():
    model = LeftHalf().eval()
    with torch.no_grad():
        alive = (model.norm(model.stem(picture())) > 0).any(dim=1)[..., :4].float().mean() / 2
    table = layer_table(model, picture(), 0, {"norm": model.norm, "relu": model.relu})
    assert table.loc["norm", "share with gradient"] == pytest.approx(alive.item())
    assert table.loc["relu", "share with gradient"] == 0.5


def test_layer_table_lays_tokens_out_and_leaves_prefix_tokens_aside():
    model, _ = load("vit", weights="bundled")
    reshape = functools.partial(tokens_to_map, grid=(8, 8))
    last, before = model.vit.layers[-1], model.vit.layers[-2]
    table = layer_table(
        model, picture(128, 128), "cat", {"last": (last, reshape), "before": (before, reshape), "plain": last}
    )
    assert table.loc["last"].tolist() == ["1 x 65 x 128", "8 x 8", "16", 0]
    assert table.loc["before"].tolist() == ["1 x 65 x 128", "8 x 8", "16", 1]
    assert table.loc["plain"].tolist() == ["1 x 65 x 128", "-", "-", pytest.approx(1 / 65)]


def test_layer_table_reads_channels_last_and_windows():
    class Windows(nn.Module):
        """Four windows of 2 x 2 tokens, then channels last on a grid of 4 x 4; a stride that is 8 x 16."""

        def __init__(self):
            super().__init__()
            self.stem, self.window, self.join = nn.Conv2d(3, 6, (8, 16), stride=(8, 16)), nn.Identity(), nn.Identity()

        def forward(self, x):
            x = self.stem(x).permute(0, 2, 3, 1).reshape(-1, 2, 2, 2, 2, 6).transpose(2, 3).reshape(-1, 4, 6)
            x = self.window(x).reshape(-1, 2, 2, 2, 2, 6).transpose(2, 3).reshape(-1, 4, 4, 6)
            return self.join(x).mean(dim=(1, 2))

    model = Windows()
    table = layer_table(
        model, picture(32, 64), 0, {"windows": model.window, "joined": (model.join, channels_last_to_map)}
    )
    assert table.loc["windows"].tolist() == ["4 x 4 x 6", "-", "-", 1]
    assert table.loc["joined"].tolist() == ["1 x 4 x 4 x 6", "4 x 4", "8 x 16", 1]


def raises(scores):
    raise RuntimeError("the target failed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "tree"}, "no category 'tree'; the closest are"),
        ({"category": ["cat", "flower"]}, "one category, not at 2"),
        ({"category": raises}, "the target failed"),
        ({"category": lambda scores: torch.ones(())}, "does not depend on the image"),
        ({"layers": {}}, "no layers"),
        ({"layers": {"all": "vit.layers"}}, "a target layer is a module"),
        ({"layers": {"other": nn.Linear(1, 1)}}, "Linear is not part of this ViTFor"),
        ({"layers": lambda model: {"list": model.vit.layers}}, "vit.layers is not reached"),
        ({"layers": lambda model: {"body": model.vit}}, "vit returns a BaseModelOutput.*find_target_layers"),
        ({"layers": lambda model: {"last": (model.vit.layers[-1], channels_last_to_map)}}, "does not fit .*layers.5"),
        ({"pixel_values": torch.zeros(3, 128, 128)}, "unsqueeze"),
    ],
)
def test_layer_table_says_what_is_wrong_and_leaves_the_model_as_it_was(change, message):
    model, _ = load("vit", weights="bundled")
    before = mixed_state(model)
    asked = {"pixel_values": picture(128, 128), "category": "cat", "layers": {"last": model.vit.layers[-1]}} | change
    if callable(asked["layers"]):
        asked["layers"] = asked["layers"](model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        layer_table(model, **asked)
    assert state(model) == before


def test_layer_table_takes_one_pass_and_leaves_the_model_as_it_was():
    model = LeftHalf()
    before = mixed_state(model)
    passes = []
    with model.register_forward_hook(lambda module, inputs, output: passes.append(1)):
        layer_table(model, picture(), 0, {"last": model.conv, "again": model.conv})
    assert passes == [1] and state(model) == before


def test_layer_table_refuses_a_layer_that_runs_twice():
    class Twice(LeftHalf):
        def forward(self, x):
            return super().forward(x) + self.relu(x).mean(dim=(1, 2, 3))[:, None]

    model = Twice()
    with pytest.raises(ValueError, match="relu runs more than once"):
        layer_table(model, picture(), 0, {"relu": model.relu})


# The finder. Tiny models in which the answer is known because they were built that way. Patches are 4 x 4 pixels.


def seeded(model_class, *args, **kwargs):
    torch.manual_seed(0)
    return model_class(*args, **kwargs)


def entries(report):
    return {candidate.path: candidate for candidate in report.candidates}


class Convolutions(nn.Module):
    """Two convolutions, a norm between them, and the mean over positions."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6)
        self.last, self.relu, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.relu(self.last(self.norm(self.stem(x)))).mean(dim=(2, 3)))


class Block(nn.Module):
    """A transformer block with one head of attention."""

    def __init__(self, width, returns_tuple):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.returns_tuple = returns_tuple

    def forward(self, x):
        y = self.norm1(x)
        attention = (self.q(y) @ self.k(y).transpose(1, 2) / y.shape[2] ** 0.5).softmax(dim=-1)
        x = x + self.o(attention @ self.v(y))
        x = x + self.mlp(self.norm2(x))
        return (x, attention) if self.returns_tuple else x


class Tokens(nn.Module):
    """A ViT with `prefix` tokens before the patches.

    Args:
        reads: "cls", the first token; "mean", that of the patches; "all", the mean of all tokens.
        returns_tuple: whether the blocks return their attention too.
        final_norm: whether there is one.
    """

    def __init__(self, prefix=1, reads="cls", returns_tuple=False, final_norm=True):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, stride=4)
        self.extra = nn.Parameter(torch.randn(1, prefix, 12))
        self.blocks = nn.ModuleList([Block(12, returns_tuple) for _ in range(3)])
        self.norm = nn.LayerNorm(12) if final_norm else (lambda x: x)
        self.head = nn.Linear(12, 5)
        self.reads = reads

    def forward(self, x):
        x = torch.cat([self.extra.expand(len(x), -1, -1), self.embed(x).flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x)[0] if block.returns_tuple else block(x)
        x = self.norm(x)
        first = self.extra.shape[1] if self.reads == "mean" else 0
        return self.head(x[:, 0] if self.reads == "cls" else x[:, first:].mean(dim=1))


def check(report, cam, dff, layout, prefix, grid):
    """The finder's choice, with an entry each, by path; and the entries."""
    found = entries(report)
    assert (report.cam.path, report.dff.path) == (cam, dff)
    for target in (report.cam, report.dff):
        entry = found[target.path]
        assert entry.target is target
        assert (entry.layout, entry.prefix, entry.grid) == (layout, prefix, grid)
    return found


@pytest.mark.parametrize(("size", "grid"), [((32, 32), (8, 8)), ((24, 40), (6, 10)), ((33, 46), (8, 11))])
def test_a_convolutional_network(size, grid):
    model = seeded(Convolutions)
    report = find_target_layers(model, picture(*size))
    found = check(report, "relu", "relu", "channels first", 0, grid)
    assert report.cam == TargetLayer(model.relu, "relu", None) == report.dff
    assert found["last"].target.module is model.last and found["last"].verdict == "all evidence passes it"
    assert found["relu"].verdict == "all evidence passes it; nothing later does"
    assert [entry.path for entry in report.candidates] == ["stem", "norm", "last", "relu"]
    assert all(entry.back == 1 for entry in report.candidates)
    assert list(report.sweep) == ["relu", "last", "norm", "stem"] and report.sweep["norm"].module is model.norm


@pytest.mark.parametrize(("size", "grid"), [((32, 32), (8, 8)), ((24, 40), (6, 10))])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_tokens_whose_head_reads_cls(prefix, size, grid):
    report = find_target_layers(seeded(Tokens, prefix), picture(*size))
    found = check(report, "blocks.2.norm1", "norm", "tokens", prefix, grid)
    assert report.cam.reshape_transform(torch.zeros(1, prefix + grid[0] * grid[1], 12)).shape == (1, 12, *grid)

    # After the last exchange of information the patch tokens lead nowhere.
    for path in ("norm", "blocks.2"):
        assert found[path].share_with_gradient == 0 and path not in report.sweep
        assert "patch tokens get no gradient: for Grad-CAM use the block before" in found[path].verdict
    assert found["norm"].back == 1
    # Both the block before and the norm that reads it are worth a sweep. What CLS had before flows around the norm.
    assert found["blocks.1"].target and found["blocks.1"].share_with_gradient == found["blocks.1"].back == 1
    assert found["blocks.2.norm1"].back < 1
    verdict = "holds the patches as they are read for the last time; what the .* had before flows around it"
    assert re.match(verdict, found["blocks.2.norm1"].verdict)
    # A norm in an earlier block is no such layer: the residual connection brings its patches to the last attention.
    assert found["blocks.1.norm1"].back < 1 and found["blocks.1.norm1"].verdict.startswith("begins a branch: ")
    assert list(report.sweep)[:4] == ["blocks.2.norm1", "blocks.1", "blocks.1.norm1", "blocks.0"]
    # The values come after the norm, but evidence also flows through the keys.
    assert found["blocks.2.v"].back < 1 and found["blocks.2.v"].verdict.startswith("a part: ")


def test_tokens_whose_mean_is_read():
    for reads, prefix in (("mean", 0), ("mean", 1), ("all", 1)):
        report = find_target_layers(seeded(Tokens, prefix, reads), picture())
        found = check(report, "norm", "norm", "tokens", prefix, (8, 8))
        assert found["norm"].share_with_gradient == 1
        assert found["blocks.2"].back == 1 > found["blocks.2.norm1"].back
        assert list(report.sweep)[:3] == ["norm", "blocks.2", "blocks.2.norm1"]


class SequenceFirst(Tokens):
    """Tokens (tokens, batch, channels), as in OpenAI's CLIP and in torch.nn.Transformer."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention, self.mlp = nn.LayerNorm(12), nn.MultiheadAttention(12, 2), nn.Linear(12, 12)

        def forward(self, x):
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(x)

    def __init__(self, prefix=1, reads="cls"):
        super().__init__(prefix, reads)
        self.blocks = nn.ModuleList([self.Block() for _ in range(3)])

    def forward(self, x):
        x = torch.cat([self.extra.expand(len(x), -1, -1), self.embed(x).flatten(2).transpose(1, 2)], dim=1)
        x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[0] if self.reads == "cls" else x[self.extra.shape[1] :].mean(dim=0))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_tokens_that_come_sequence_first(size):
    grid = size[0] // 4, size[1] // 4
    for reads, prefix, cam in (("cls", 1, "blocks.2.norm"), ("mean", 0, "norm"), ("mean", 2, "norm")):
        model = seeded(SequenceFirst, prefix, reads)
        report = find_target_layers(model, picture(*size))
        check(report, cam, "norm", "tokens, sequence first", prefix, grid)
        assert {"blocks.0", "blocks.1", "blocks.1.norm"} <= set(report.sweep)

        # What is explained is what the same values give that come with the batch first.
        class Turned(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model, self.tokens = model, nn.Identity()
                model.blocks[1].register_forward_hook(lambda _, i, x: self.tokens(x.transpose(0, 1)).transpose(0, 1))

            def forward(self, x):
                return self.model(x)

        layer = report.sweep["blocks.1"]
        methods = (GradCAM, LayerCAM, EigenCAM, ScoreCAM, AblationCAM)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is forked
            warnings.simplefilter("ignore", MapWarning)
            found = [explain(model, picture(*size), [0, 3], layer, method=method) for method in methods]
        concepts = factorize(model, picture(*size), layer, nn.Identity(), n_concepts=2)
        table = layer_table(model, picture(*size), 0, {"block": layer})
        turned = Turned(model).eval()
        layer = TargetLayer(turned.tokens, "tokens", functools.partial(tokens_to_map, grid=grid, prefix=prefix))
        for method, maps in zip(methods, found, strict=True):
            wanted = explain(turned, picture(*size), [0, 3], layer, method=method)
            assert wanted.max() > 0.9
            np.testing.assert_allclose(maps, wanted, atol=1e-5, err_msg=method.__name__)
        wanted = factorize(turned, picture(*size), layer, nn.Identity(), n_concepts=2)
        np.testing.assert_allclose(concepts.maps, wanted.maps, atol=1e-5)
        expected = layer_table(turned, picture(*size), 0, {"block": layer})
        columns = ["grid", "stride", "share with gradient"]
        assert table.loc["block", columns].tolist() == expected.loc["block", columns].tolist()


def test_blocks_that_return_tuples():
    report = find_target_layers(seeded(Tokens, returns_tuple=True), picture())
    # The norm of the last block is a tensor, though the output of the block before is not.
    found = check(report, "blocks.2.norm1", "norm", "tokens", 1, (8, 8))
    assert found["blocks.1"].target is None
    assert found["blocks.1"].verdict == "returns a tuple, in which grad-cam's hooks find no tensor"

    model = seeded(Tokens, 0, "mean", returns_tuple=True, final_norm=False)
    report = find_target_layers(model, picture())
    assert report.cam.path == report.dff.path == "embed"  # the last tensor that all evidence passes
    assert entries(report)["blocks.2"].verdict.startswith("returns a tuple")
    assert "% of the model comes after it" in entries(report)["embed"].verdict
    # The norms of the blocks are worth a sweep, though what the blocks return cannot be hooked.
    assert "blocks.2.norm1" in report.sweep and "blocks.2" not in report.sweep


def test_a_shortcut_around_a_layer_rejects_it():
    class Shortcut(Convolutions):
        def __init__(self):
            super().__init__()
            self.last, self.head, self.short = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            x = self.norm(self.stem(x))
            return self.head(self.relu(self.last(x)).mean(dim=(2, 3))) + self.short(x.mean(dim=(2, 3)))

    report = find_target_layers(seeded(Shortcut), picture())
    found = check(report, "norm", "norm", "channels first", 0, (8, 8))
    for path in ("last", "relu"):
        assert 0 < found[path].back < 1 and found[path].target
        assert found[path].verdict.endswith(f"{100 - round(100 * found[path].back)} % of the evidence flows around it")
    assert found["last"].verdict.startswith("begins a branch") and "last" in report.sweep and "relu" not in report.sweep


def test_how_much_flows_around_worked_out_by_hand():
    class ThreeToOne(nn.Module):
        """A mean of the picture, three parts of which go through a branch."""

        def __init__(self):
            super().__init__()
            self.stem, self.branch = nn.Conv2d(3, 2, 4, stride=4), nn.Identity()

        def forward(self, x):
            x = self.stem(x)
            return (self.branch(x * 3) + x).mean(dim=(2, 3))

    found = entries(find_target_layers(seeded(ThreeToOne), picture()))
    assert found["stem"].back == 1 and found["branch"].back == pytest.approx(0.75, abs=1e-4)


def test_channels_last_and_windows():
    class Windows(nn.Module):
        """Channels last; within, windows of 4 x 4 positions that are rows of the batch."""

        def __init__(self):
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)
            self.in_window, self.join, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.mix(self.stem(x).permute(0, 2, 3, 1))
            rows, columns = x.shape[1] // 4, x.shape[2] // 4
            windows = x.reshape(-1, rows, 4, columns, 4, 8).transpose(2, 3).reshape(-1, 16, 8)
            windows = self.in_window(windows).reshape(-1, rows, columns, 4, 4, 8).transpose(2, 3)
            return self.head(self.join(windows.reshape(x.shape)).mean(dim=(1, 2)))

    for size, grid in (((32, 32), (8, 8)), ((32, 48), (8, 12))):
        report = find_target_layers(seeded(Windows), picture(*size))
        found = check(report, "join", "join", "channels last", 0, grid)
        assert report.cam.reshape_transform is channels_last_to_map
        assert list(found) == ["stem", "mix", "join"]


def test_tokens_out_of_order_are_no_map():
    class Shuffled(Tokens):
        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
            return self.head(self.norm(x[:, order]).mean(dim=1))

    report = find_target_layers(seeded(Shuffled), picture())
    assert report.cam.path == report.dff.path == "embed"
    verdict = entries(report)["norm"].verdict
    assert verdict == "does not change where the image does: its positions are no places in the image"


def test_a_module_that_runs_twice_is_not_chosen():
    class Twice(Convolutions):
        def forward(self, x):
            return self.head(self.relu(self.last(self.relu(self.norm(self.stem(x))))).mean(dim=(2, 3)))

    report = find_target_layers(seeded(Twice), picture())
    found = check(report, "last", "last", "channels first", 0, (8, 8))
    assert found["relu"].verdict.startswith("runs 2 times in a pass")


def test_one_name_for_modules_with_the_same_output():
    class Nested(Convolutions):
        """The body's last convolution, the body and a dropout behind it all put out the same values in eval mode."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(self.stem, nn.Sequential(self.norm, self.last))
            self.dropout = nn.Dropout(0.5)
            del self.stem, self.norm, self.last, self.relu

        def forward(self, x):
            return self.head(self.dropout(self.body(x)).mean(dim=(2, 3)))

    report = find_target_layers(seeded(Nested), picture())
    assert [entry.path for entry in report.candidates] == ["body.0", "body.1.0", "body"]
    assert report.cam.path == "body"


def test_positions_that_are_not_read_do_not_count():
    class OneIsRead(Convolutions):
        def forward(self, x):
            x = self.last(self.norm(self.stem(x)))
            return self.head(self.relu(x)[:, :, 0, 0])

    report = find_target_layers(seeded(OneIsRead), picture())
    # The last convolution reads 3 x 3 positions, in the corner 2 x 2 of 8 x 8 are left.
    found = check(report, "norm", "relu", "channels first", 0, (8, 8))
    assert found["norm"].share_with_gradient == 4 / 64
    assert found["last"].share_with_gradient == 1 / 64
    assert "at most one position gets a gradient" in found["relu"].verdict


def test_a_branch_that_leads_nowhere():
    class Aside(Convolutions):
        def __init__(self):
            super().__init__()
            self.aside = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.relu(self.last(self.norm(self.stem(x))))
            self.aside(x)
            return self.head(x.mean(dim=(2, 3)))

    report = find_target_layers(seeded(Aside), picture())
    found = check(report, "relu", "relu", "channels first", 0, (8, 8))
    assert found["aside"].verdict == "no gradient of the scores reaches it" and found["aside"].target is None


@pytest.mark.parametrize("frozen_part", ["no_grad", "look-up"])
def test_where_the_gradient_ends_before_the_image(frozen_part):
    class Frozen(Tokens):
        """The first part has no gradient: it runs under no_grad, or looks up a number for each pixel's brightness."""

        def __init__(self):
            super().__init__(prefix=0, reads="mean")
            self.brightness = nn.Embedding(9, 12)

        def forward(self, x):
            if frozen_part == "no_grad":
                with torch.no_grad():
                    x = self.embed(x).flatten(2).transpose(1, 2)
            else:
                levels = nn.functional.avg_pool2d(x.mean(dim=1), 4).mul(8).round().clamp(-4, 4) + 4
                x = self.brightness(levels.long().flatten(1))
            return self.head(self.norm(self.blocks[0](x)).mean(dim=1))

    report = find_target_layers(seeded(Frozen), picture())
    found = check(report, "norm", "norm", "tokens", 0, (8, 8))
    assert found["blocks.0"].back == 1 > found["blocks.0.norm1"].back


def gradient_gets_around(model, module, pixel_values):
    """The cut test as it can be done by hand: does a gradient reach the image when the layer is detached?"""
    image = pixel_values.repeat(2, 1, 1, 1).requires_grad_()
    with module.register_forward_hook(lambda layer, inputs, output: output.detach()):
        scores = LogitsModel(model)(image)
    if not scores.requires_grad:
        return False
    weights = torch.linspace(1, 2, scores.shape[1])
    return bool(torch.autograd.grad((scores[0] * weights).sum(), image, allow_unused=True)[0].any())


@pytest.mark.parametrize("name", ["resnet", "vit", "tokens", "convolutions"])
def test_the_cut_agrees_with_the_gradient_when_each_layer_is_detached(name):
    made = {"tokens": Tokens, "convolutions": Convolutions}
    model = seeded(made[name]).eval() if name in made else load(name, weights="bundled")[0]
    pixel_values = picture() if name in made else picture(64, 64) if name == "resnet" else picture(128, 128)
    report = find_target_layers(model, pixel_values)
    model.requires_grad_(False)
    tried = [entry for entry in report.candidates if entry.back is not None]
    assert len({entry.back == 1 for entry in tried}) == (1 if name == "convolutions" else 2) and len(tried) > 3
    for entry in tried:
        expected = gradient_gets_around(model, model.get_submodule(entry.path), pixel_values)
        assert (entry.back < 0.999) == expected, entry.path


@pytest.mark.parametrize("name", ["tokens", "convolutions"])
def test_the_share_with_gradient_is_that_of_layer_table(name):
    model = seeded({"tokens": Tokens, "convolutions": Convolutions}[name])
    report = find_target_layers(model, picture())
    layers = {
        entry.path: (
            model.get_submodule(entry.path),
            functools.partial(tokens_to_map, grid=(8, 8)) if entry.layout == "tokens" else None,
        )
        for entry in report.candidates
    }
    table = layer_table(model, picture(), lambda scores: (scores * torch.linspace(1, 2, 5)).sum(), layers)
    for entry in report.candidates:
        assert table.loc[entry.path, "share with gradient"] == pytest.approx(entry.share_with_gradient)


def test_the_bundled_models():
    scene = example_scene("bundled")
    model, processor = load("resnet", weights="bundled")
    pixel_values = processor(scene.image, return_tensors="pt")["pixel_values"]
    report = find_target_layers(model, pixel_values)
    check(report, "resnet.encoder.stages.2", "resnet.encoder.stages.2", "channels first", 0, (8, 8))
    concepts = factorize(model, pixel_values, report.dff.module, model.classifier, report.dff.reshape_transform)
    assert np.isfinite(concepts.maps).all()

    model, processor = load("vit", weights="bundled")
    for size, grid in (((128, 128), (8, 8)), ((96, 160), (6, 10))):
        pixel_values = nn.functional.interpolate(processor(scene.image, return_tensors="pt")["pixel_values"], size)
        wrapped = LogitsModel(model, interpolate_pos_encoding=True)
        report = find_target_layers(wrapped, pixel_values)
        found = check(report, "model.vit.layers.5.layernorm_before", "model.vit.layernorm", "tokens", 1, grid)
        assert found["model.vit.layers.4"].target
        maps = explain(wrapped, pixel_values, scene.categories, report.cam.module, report.cam.reshape_transform)
        assert maps.shape == (2, *size) and (maps.max(axis=(1, 2)) > 0.9).all()


def test_a_target_layer_is_taken_as_it_is():
    model, processor = load("vit", weights="bundled")
    scene = example_scene("bundled")
    pixel_values = processor(scene.image, return_tensors="pt")["pixel_values"]
    report = find_target_layers(model, pixel_values)
    for layer in (report.cam, [report.cam]):
        maps = explain(model, pixel_values, scene.categories, layer)
        wanted = explain(model, pixel_values, scene.categories, report.cam.module, report.cam.reshape_transform)
        np.testing.assert_array_equal(maps, wanted)
    concepts = factorize(model, pixel_values, report.dff, model.classifier)
    wanted = factorize(model, pixel_values, report.dff.module, model.classifier, report.dff.reshape_transform)
    np.testing.assert_array_equal(concepts.maps, wanted.maps)
    rows = {"as it is": report.cam, "in two": (report.cam.module, report.cam.reshape_transform)}
    table = layer_table(model, pixel_values, scene.categories[0], rows)
    assert table.loc["as it is"].tolist() == table.loc["in two"].tolist() and table.loc["as it is", "grid"] == "8 x 8"


def test_several_target_layers_need_one_reshape_transform():
    model = seeded(Tokens)
    first, second, other = (
        TargetLayer(model.blocks[i], f"blocks.{i}", functools.partial(tokens_to_map, grid=grid, prefix=1))
        for i, grid in ((0, (8, 8)), (1, (8, 8)), (1, (4, 16)))
    )
    both = explain(model, picture(), 0, [first, second])
    wanted = explain(model, picture(), 0, [first.module, second.module], first.reshape_transform)
    np.testing.assert_array_equal(both, wanted)
    with pytest.raises(ValueError, match="blocks.0, blocks.1 want different reshape transforms: explain them one by"):
        explain(model, picture(), 0, [first, other])
    for call in (
        lambda: explain(model, picture(), 0, first, tokens_to_map),
        lambda: factorize(model, picture(), first, nn.Identity(), tokens_to_map),
    ):
        with pytest.raises(ValueError, match="TargetLayer blocks.0 brings its own reshape transform: leave yours out"):
            call()


def test_grey_and_constant_images():
    class Grey(Convolutions):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 6, 4, stride=4)

    report = find_target_layers(seeded(Grey), torch.zeros(1, 1, 32, 32))
    check(report, "relu", "relu", "channels first", 0, (8, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    report = find_target_layers(seeded(Tokens).to(dtype), picture().to(dtype))
    check(report, "blocks.2.norm1", "norm", "tokens", 1, (8, 8))


def images_worth(model, call):
    """How many images go through the model forward, and back twice counted: what a call costs in forward passes."""
    worth = []

    def at_forward(module, inputs, output):
        scores = output if isinstance(output, torch.Tensor) else output.logits
        worth.append(len(inputs[0]))
        if scores.requires_grad:
            scores.register_hook(lambda gradient: worth.append(2 * len(gradient)))

    with model.register_forward_hook(at_forward):
        call()
    return sum(worth)


def test_what_it_costs():
    class Deep(Tokens):
        """Forty blocks: no more than some of them are tried."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(12, returns_tuple=False) for _ in range(40)])

    # 9 images to look for positions, 2 forward and back (6) for the gradients; image, noise and the last layer (3),
    # which is chosen at once; image, noise, and the 3 layers left.
    assert images_worth(model := seeded(Convolutions), lambda: find_target_layers(model, picture())) == 9 + 6 + 3 + 5
    for model_class in (Tokens, functools.partial(Tokens, 0, "mean"), Deep):
        model = seeded(model_class)
        assert images_worth(model, lambda model=model: find_target_layers(model, picture())) < 100


class Fails(Tokens):
    """Raises in the forward pass of the given number."""

    def __init__(self, at):
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(12)
        self.at, self.passes = at, 0

    def forward(self, x):
        self.passes += 1
        scores = super().forward(x + self.batchnorm(x.new_ones(len(x), 12)).mean())
        if self.passes == self.at:
            raise RuntimeError("the model failed")
        return scores


@pytest.mark.parametrize("at", [1, 2, 3, None])
def test_the_model_is_left_as_it_was(at):
    model = seeded(Fails, at)
    before = mixed_state(model)
    if at is None:
        find_target_layers(model, picture())
        assert model.passes > 3
    else:
        with pytest.raises(RuntimeError, match="the model failed"):
            find_target_layers(model, picture())
    assert state(model) == before


def test_the_answer_does_not_depend_on_the_mode_or_on_autograd():
    model = seeded(Fails, None)
    mixed_state(model)
    with torch.inference_mode():
        report = find_target_layers(model, picture())
    check(report, "blocks.2.norm1", "norm", "tokens", 1, (8, 8))
    random_state = torch.get_rng_state()
    find_target_layers(model, picture())
    assert torch.equal(torch.get_rng_state(), random_state)


class NoGradient(Convolutions):
    def forward(self, x):
        return super().forward(x).detach()


class Cached(NoGradient):
    """The gradient of the scores leads to a parameter alone, over a tensor that was computed before."""

    def __init__(self):
        super().__init__()
        self.kept = self.head.bias * 2

    def forward(self, x):
        return super().forward(x) + self.kept


class ZeroHead(Convolutions):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)


class AroundEverything(Convolutions):
    def forward(self, x):
        return super().forward(x) + x.mean(dim=(1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("model_class", "pixel_values", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), picture(), "Sequential has no layer to explain"),
        (AroundEverything, picture(), r"The last with positions is relu: .* evidence flows around it.*nn.Identity\(\)"),
        (NoGradient, picture(), "the scores have no gradient"),
        (Cached, picture(), "the scores have no gradient"),
        (ZeroHead, picture(), "gradient of the scores is zero everywhere.*trained weights"),
        (Convolutions, picture()[0], "unsqueeze"),
        (Convolutions, picture().repeat(2, 1, 1, 1), "one image at a time"),
    ],
)
def test_the_finder_says_what_is_wrong_and_leaves_the_model_as_it_was(model_class, pixel_values, message):
    model = seeded(model_class)
    before = mixed_state(model)
    with pytest.raises(ValueError, match=message):
        find_target_layers(model, pixel_values)
    assert state(model) == before


def test_the_report_as_a_table():
    model, _ = load("resnet", weights="bundled")
    report = find_target_layers(model, picture(64, 64))
    table, html = report.table(), report._repr_html_()
    assert len(table) == len(report.candidates) > 20
    assert table.loc["resnet.encoder.stages.2", "for"] == "Grad-CAM, DFF, sweep"
    assert table.index[table["for"].str.contains("sweep")].tolist() == list(report.sweep)[::-1]
    assert table.loc["resnet.encoder.stages.1", "grid"] == "8 x 8"
    assert table.loc["resnet.encoder.stages.1", "scores back"] == "100 %"
    # The notebook says first that no layer is needed, then shows what to choose among, and what each leaves out.
    for text in (html, repr(report)):
        assert text.index("needs no layer") < text.index("resnet.encoder")
    for shown in ("stages.2<", "stages.1<", "stages.0<", "of the evidence flows around it", "Grad-CAM, DFF"):
        assert shown in html
    assert len(report.sweep) <= html.count("<tr") - 1 <= len(report.sweep) + 2
    assert f"of {len(table)} layers" in html
    assert "resnet.encoder.stages.2 " in repr(report)

    report = find_target_layers(seeded(Tokens), picture())
    uses = report.table()["for"]
    assert uses["blocks.2.norm1"] == "Grad-CAM, sweep" and uses["norm"] == "DFF" and uses["blocks.1"] == "sweep"
    assert "blocks.1<" in report._repr_html_()


@pytest.mark.parametrize("name", RECIPES)
def test_the_layers_that_point_best_are_worth_a_sweep(name):
    model, processor = load(name, weights="bundled")
    pixel_values = examples(model, processor, 1, "validation")[0].pixel_values
    report, recipe = find_target_layers(model, pixel_values), RECIPES[name]
    assert recipe.cam(model, pixel_values).path in report.sweep
    for layer in recipe.layers.values():
        assert not layer.source or layer.module(model) in [found.module for found in report.sweep.values()]
    assert "not to be chosen" not in repr(report) and "do not" not in repr(report)


def test_a_model_on_another_device_has_the_same_layers():
    model, _ = load("vit", weights="bundled", device="cpu")
    last = {"last": (model.vit.layers[-2], functools.partial(tokens_to_map, grid=(8, 8)))}
    wanted = find_target_layers(model, picture(128, 128))
    table = layer_table(model, picture(128, 128), 0, last)
    with accelerator() as device:
        model.to(device)
        for pixel_values in (picture(128, 128), picture(128, 128).to(device)):
            assert find_target_layers(model, pixel_values).table().equals(wanted.table())
            assert layer_table(model, pixel_values, 0, last).equals(table)
