"""Complete cuts, and tokens laid out as the model laid them, in small nets whose answers are plain."""

import pytest
import torch
from families import CHANNELS_FIRST, FAMILIES, TOKENS, build, image
from torch import nn

from xai_helpers.balance import balanced_gradients
from xai_helpers.cam import explain
from xai_helpers.cuts import complete_cuts, read_as_maps, tensors_of_modules
from xai_helpers.reshape import channels_last_to_map, tokens_to_map
from xai_helpers.wrappers import LogitsModel


def picture(height=24, width=40):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).requires_grad_()


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def test_what_a_shortcut_leads_around_is_no_complete_cut():
    first, inner, last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3)
    net = nn.Sequential(first, Residual(inner), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = picture()
    with tensors_of_modules(net) as (kept, outputs):
        score = net(x)[0, 0]
    kept = [tensor for tensor in kept if id(tensor) in outputs]
    made = dict(zip([first, inner, net[1], last, net[3], net[4]], kept, strict=True))
    found = complete_cuts(score, x, kept)
    assert [module for module, tensor in made.items() if any(tensor is one for one in found)] == [
        first,
        net[1],
        last,
        net[3],
        net[4],
    ]


def test_the_relevance_of_a_complete_cut_is_that_of_the_whole_score():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Residual(nn.Conv2d(4, 4, 1, bias=False)), nn.Flatten())
    x = picture(6, 6)
    with tensors_of_modules(net) as (kept, _):
        score = net(x).sum()
    for tensor in complete_cuts(score, x, kept):
        [gradient] = torch.autograd.grad(score, tensor, retain_graph=True)
        torch.testing.assert_close((tensor * gradient).sum(), score)


def test_one_of_two_parts_is_no_complete_cut():
    x = picture()
    both = x * 2
    left, right = both.chunk(2, dim=3)
    assert complete_cuts((left.sum() + right.sum()), x, [both, left, right]) == [both]
    assert complete_cuts(left.sum(), x, [both, left]) == [both, left]


def test_without_a_way_there_is_no_cut():
    x, other = picture(), torch.ones(2, requires_grad=True)
    inner = other * 2
    assert complete_cuts(inner.sum(), x, [inner]) == []


def test_hooks_go_with_the_context_and_a_tensor_is_kept_once():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)))
    with tensors_of_modules(net) as (kept, _):
        net(picture() * 1)
    assert len(kept) == 2 and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError), tensors_of_modules(net):
        net(torch.ones(1, 1, 5, 5, requires_grad=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Tokens(nn.Module):
    """Patches of 4 x 4 pixels as tokens, some tokens of its own before and behind, and mixing blocks."""

    def __init__(self, before=0, after=0, channels=6, by_linear=False, by_columns=False, is_seen=True):
        super().__init__()
        torch.manual_seed(0)
        self.by_linear, self.by_columns, self.is_seen = by_linear, by_columns, is_seen
        self.patches = nn.Linear(48, channels) if by_linear else nn.Conv2d(3, channels, 4, stride=4)
        self.before, self.after = (nn.Parameter(torch.randn(1, n, channels)) for n in (before, after))
        self.embedded, self.mix, self.norm = nn.Identity(), nn.MultiheadAttention(channels, 1), nn.LayerNorm(channels)
        self.block = nn.Identity()
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        if self.by_linear:
            pieces = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3, 5)
            self.maps = self.patches(pieces.flatten(3)).permute(0, 3, 1, 2)
        else:
            self.maps = self.patches(x)
        maps = self.maps.transpose(2, 3) if self.by_columns else self.maps
        own = torch.cat([self.before, maps.flatten(2).transpose(1, 2), self.after], dim=1)
        tokens = self.embedded(own.clone()) if self.is_seen else own
        read = self.norm(tokens).transpose(0, 1)
        tokens = self.block(tokens + self.mix(read, read, read)[0].transpose(0, 1))
        return self.head(tokens.mean(dim=1))


def read(net, x):
    net.eval().requires_grad_(False)
    with tensors_of_modules(net) as (kept, outputs):
        score = net(x)[0, 0]
    return read_as_maps(complete_cuts(score, x, [one for one in kept if id(one) in outputs]), x)


@pytest.mark.parametrize("by_linear", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (2, 0), (5, 0), (0, 3), (1, 10), (4, 7)])
def test_tokens_are_laid_out_as_the_model_laid_them(before, after, by_linear):
    net, x = Tokens(before, after, by_linear=by_linear), picture(24, 40)
    readings = [(t, lay_out) for t, lay_out in read(net, x) if t.ndim == 3]
    assert len(readings) == 2  # embedded, and after the block
    (embedded, lay_out), (mixed, lay_out_mixed) = readings
    torch.testing.assert_close(lay_out(embedded), net.maps)
    numbers = torch.arange(before + 60 + after).reshape(1, -1, 1)
    assert lay_out_mixed(numbers).tolist() == (before + torch.arange(60)).reshape(1, 1, 6, 10).tolist()


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 3), (4, 7)])
def test_tokens_are_read_where_they_have_been_mixed_before_a_module_shows_them(before, after):
    readings = read(Tokens(before, after, is_seen=False), picture(24, 40))
    [lay_out] = [lay_out for tensor, lay_out in readings if tensor.ndim == 3]
    numbers = torch.arange(before + 60 + after).reshape(1, -1, 1)
    assert lay_out(numbers).tolist() == (before + torch.arange(60)).reshape(1, 1, 6, 10).tolist()


def test_as_many_tokens_as_another_grid_would_have():
    """As in YOLOS: 1 + 64 + 16 tokens are no 9 x 9 grid."""
    net, x = Tokens(1, 16), picture(32, 32)
    for tensor, lay_out in read(net, x):
        if tensor.ndim == 3:
            assert tensor.shape[1] == 81 and lay_out(tensor).shape == (1, 6, 8, 8)
            torch.testing.assert_close(lay_out(tensor)[0, :, 0, 0], tensor[0, 1])


def test_tokens_in_another_order_are_not_read():
    assert all(tensor.ndim == 4 for tensor, _ in read(Tokens(1, by_columns=True), picture(24, 40)))


class Last(nn.Module):
    """Channels last."""

    def __init__(self, channels):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.last, self.head = nn.Conv2d(3, channels, 4, stride=4), nn.Identity(), nn.Linear(channels, 2)

    def forward(self, x):
        self.maps = self.patches(x)
        return self.head(self.last(self.maps.permute(0, 2, 3, 1).clone()).mean(dim=(1, 2)))


@pytest.mark.parametrize(("channels", "size"), [(7, (24, 40)), (6, (24, 24)), (64, (24, 24)), (5, (24, 24))])
def test_channels_may_be_last(channels, size):
    net, x = Last(channels), picture(*size)
    (first, lay_out_first), (last, lay_out_last) = read(net, x)
    assert lay_out_first(first) is first is net.maps
    torch.testing.assert_close(lay_out_last(last), net.maps)


class Stages(nn.Module):
    """Tokens that are merged on the way, two by two, as in a pyramid."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.first, self.second = nn.Conv2d(3, 4, 4, stride=4), nn.Identity(), nn.Identity()
        self.merge, self.head = nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x):
        self.maps = self.patches(x)
        tokens = self.first(self.maps.flatten(2).transpose(1, 2).clone())
        rows, columns = self.maps.shape[2:]
        grid = tokens.unflatten(1, (rows // 2, 2, columns // 2, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        merged = self.merge(grid.reshape(1, rows * columns // 4, 16))
        return self.head(self.second(merged).mean(dim=1))


def test_merged_tokens_are_read_by_those_before():
    net, x = Stages(), picture(32, 48)
    shapes = [tuple(lay_out(tensor).shape) for tensor, lay_out in read(net, x)]
    assert shapes == [(1, 4, 8, 12), (1, 4, 8, 12), (1, 8, 4, 6)]


class OfBox(nn.Module):
    """Scores of a box that is cut out of the features, as in Faster R-CNN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.box, self.head = nn.Conv2d(3, 4, 2, stride=2), nn.Identity(), nn.Linear(100, 2)

    def forward(self, x):
        return self.head(self.box(self.features(x)[:, :, 2:7, 3:8].clone()).flatten(1))


def test_what_is_cut_out_of_the_picture_is_no_map_of_it():
    [(tensor, _)] = read(OfBox(), picture(24, 24))
    assert tensor.shape == (1, 4, 12, 12)


def test_windows_vectors_and_batches_are_left_out():
    x = picture(24, 24)
    windows = (x * 1).unflatten(3, (2, 12)).transpose(2, 3).flatten(0, 2)
    assert read_as_maps([windows, x.mean(dim=(2, 3)), x.flatten()], x) == []


# Real architectures, with random weights: what their layers are is written down in `families`.


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_last_layer_of_a_family_is_read_as_its_source_says(family):
    """The DFF layer: by definition the latest around which nothing flows."""
    size = family.wide or family.size
    model = build(family)
    scorer = LogitsModel(model, **(family.options if family.wide else {})).eval().requires_grad_(False)
    source, shown = image(size).requires_grad_(), []
    with model.get_submodule(family.dff[0]).register_forward_hook(lambda module, inputs, output: shown.append(output)):
        with balanced_gradients(), tensors_of_modules(scorer) as (kept, _):
            score = scorer(source.clone())[0].square().sum()
    readings = read_as_maps(complete_cuts(score, source, kept), source)
    if family.name == "imagegpt":  # its reading of colours is a choice, through which this does not look
        return
    [(tensor, lay_out)] = [(tensor, lay_out) for tensor, lay_out in readings if tensor is shown[0]]
    if family.layout == TOKENS:
        wanted = tokens_to_map(tensor, family.grid(size), family.prefix)
    else:
        wanted = tensor if family.layout == CHANNELS_FIRST else channels_last_to_map(tensor)
    assert torch.equal(lay_out(tensor), wanted)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_explained_without_a_layer(family):
    maps = explain(build(family), image(family.size), [0, 1], signed=True)
    assert maps.shape == (2, *family.size) and abs(maps).max(axis=(1, 2)) == pytest.approx([1, 1])
