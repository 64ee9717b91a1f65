import functools

import pytest
import torch

from xai_helpers.reshape import channels_last_to_map, layer_to_map, tokens_to_map


def marked_tokens(prefix):
    """One image of 2 x 2 patches, two channels: patch i is (i, 10 * i), prefix tokens are -1."""
    patches = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    return torch.cat([torch.full((prefix, 2), -1.0), patches])[None]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_marked_tokens_stand_where_their_patches_were(prefix):
    maps = tokens_to_map(marked_tokens(prefix), grid=(2, 2), prefix=prefix)
    assert maps.tolist() == [[[[1, 2], [3, 4]], [[10, 20], [30, 40]]]]
    assert maps.is_contiguous()


def test_the_grid_is_rows_by_columns():
    tokens = torch.arange(7.0).reshape(1, 7, 1)
    assert functools.partial(tokens_to_map, grid=(2, 3))(tokens).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]


@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 6, 2), (5, 2), (1, 2, 2, 2)])
def test_a_wrong_number_of_tokens_says_what_came_and_what_was_wanted(shape):
    with pytest.raises(ValueError) as error:
        tokens_to_map(torch.zeros(shape), grid=(2, 2))
    assert str(shape) in str(error.value)
    assert "(batch, 5, channels)" in str(error.value)


def test_channels_come_to_the_front():
    x = torch.tensor([[[[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]]]])  # one row of three columns, two channels
    maps = channels_last_to_map(x)
    assert maps.tolist() == [[[[1, 2, 3]], [[-1, -2, -3]]]]
    assert maps.is_contiguous()


def test_channels_last_refuses_tokens():
    with pytest.raises(ValueError, match=r"\(1, 5, 2\), wanted \(batch, height, width, channels\)"):
        channels_last_to_map(marked_tokens(1))


@pytest.mark.parametrize(
    ("output", "reshape_transform", "message"),
    [
        ((torch.zeros(1, 5, 2),), None, "returns a tuple, not a tensor"),
        (torch.zeros(1, 5, 2), None, r"returns shape \(1, 5, 2\), wanted \(batch, channels, height, width\)"),
        (torch.zeros(1, 8, 1, 1), None, "more than one position"),
        (torch.zeros(1, 5, 2), functools.partial(tokens_to_map, grid=(3, 3)), r"\(1, 5, 2\).*wanted \(batch, 10"),
        (torch.zeros(1, 5, 2), lambda x: x[:, 1:], r"\(1, 5, 2\) and, reshaped, \(1, 4, 2\)"),
        (torch.zeros(1, 5, 2), lambda x: None, "reshape transform for .*body.3 returned a NoneType, not a tensor"),
        (torch.zeros(1, 5, 2), lambda x: x.reshape(7), r"does not fit target layer body.3.*\(1, 5, 2\)"),
    ],
)
def test_a_layer_without_a_map_names_itself_and_the_way_out(output, reshape_transform, message):
    with pytest.raises(ValueError, match=message) as error:
        layer_to_map(output, reshape_transform, "body.3")
    assert "body.3" in str(error.value)
    assert "find_target_layers" in str(error.value)
