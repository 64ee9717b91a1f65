"""Complete cuts: the depths of a network that every way from the score to the picture leads through."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from xai_helpers.reshape import channels_last_to_map, tokens_to_map

SLACK = 0.2  # by which the shape of a grid may differ from that of the picture
MISPLACED = 0.5  # tokens
AGREEMENT = 0.5  # of signs: 1 if all are alike, and 0 by chance


def tensor_in(output: Any) -> torch.Tensor | None:
    """The tensor that a module puts out: by itself, first in a tuple, or as last_hidden_state; None without one."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    output = getattr(output, "last_hidden_state", output)
    return output if isinstance(output, torch.Tensor) else None


@contextlib.contextmanager
def tensors_of_modules(model: torch.nn.Module) -> Iterator[tuple[list[torch.Tensor], set[int]]]:
    """Within, collects what the modules inside a model take and put out, in the order of the computation.

    Yields:
        The tensors that have a gradient, each once; and the `id` of those that some module has put out.
    """
    kept: list[torch.Tensor] = []
    known: set[int] = set()
    outputs: set[int] = set()

    def keep(values):
        tensor = tensor_in(values)
        if tensor is None or not tensor.requires_grad:
            return None
        if id(tensor) not in known:
            known.add(id(tensor))
            kept.append(tensor)
        return id(tensor)

    def at_output(module, inputs, output):
        outputs.add(keep(output))

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if module is not model:
                stack.enter_context(module.register_forward_pre_hook(lambda module, inputs: keep(inputs) and None))
                stack.enter_context(module.register_forward_hook(at_output))
        yield kept, outputs


def complete_cuts(score: torch.Tensor, source: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of some tensors that every way from the score back to the source leads through.

    They are found by counting paths in autograd's graph: those from the score to a tensor, times those from it to the
    source, are all of them. The relevance of such a tensor, gradient times value, is an account of the whole score.

    Args:
        score: a scalar with a graph.
        source: a leaf that requires a gradient.
        tensors: some that the score may have been computed from.

    Returns:
        Those that are complete, in the given order.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> inner = x * 2
        >>> branch = inner * 3
        >>> [one is inner for one in complete_cuts((inner + branch).sum(), x, [inner, branch])]
        [True]
    """
    through, paths = _paths(score, source)
    return [tensor for tensor in tensors if paths and through(tensor) == paths]


def _paths(score, source):
    """How many paths from the score to the source lead through a tensor, as a function, and how many there are."""
    order, seen, stack = [], set(), [(score.grad_fn, False)]
    while stack:  # depth first, sources first
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(before, False) for before, _ in node.next_functions]
    leaf = source.view_as(source).grad_fn.next_functions[0][0]
    to_source = {None: 0}
    for node in order:
        to_source[node] = 1 if node is leaf else sum(to_source[before] for before, _ in node.next_functions)
    at_output, at_node = {(score.grad_fn, score.output_nr): 1}, dict.fromkeys(order, 0) | {score.grad_fn: 1}
    for node in reversed(order):
        for before, number in node.next_functions:
            if before is not None:
                at_output[before, number] = at_output.get((before, number), 0) + at_node[node]
                at_node[before] += at_node[node]

    def through(tensor):
        return at_output.get((tensor.grad_fn, tensor.output_nr), 0) * to_source.get(tensor.grad_fn, 0)

    return through, to_source[score.grad_fn]


def _grids(positions, height, width):
    """Rows and columns of the shape of a picture that most of some positions may be laid out in."""
    for rows in range(2, height + 1):
        near = rows * width / height
        for columns in {int(near), int(near) + 1}:
            is_most = positions / 3 <= rows * columns <= positions
            if 1 < columns and is_most and not _misfit((rows, columns), height, width):
                yield rows, columns


def _misfit(grid, height, width):
    """How far the shape of a grid is from that of a picture, 0 if it is so to a cell; infinite if it is too far off."""
    rows, columns = grid
    if not (1 < rows <= height and 1 < columns <= width):
        return math.inf
    if min(abs(columns - rows * width / height), abs(rows - columns * height / width)) < 1:
        return 0
    difference = abs(columns / rows / (width / height) - 1)
    return difference if difference < SLACK else math.inf


def _laid_out(tokens, known, known_map, height, width, may_be_mixed=True):
    """The grid, and how many tokens stand before it, in which tokens stand for places; None if they do not.

    Gradients of the tokens' sum tell at which token a position of an earlier map arrives, if each token is times a code
    of its number. Where one token reads a position, the quotient of the gradients of numbered and plain sum is its
    number. Where others read it, too, as behind an attention, the gradients' signs with binary digits as codes tell
    most digits of the one that reads most.
    """
    n = tokens.shape[1]
    weights = torch.randn(tokens.shape[2], generator=torch.Generator().manual_seed(0)).to(tokens)
    read, numbers = tokens[0] @ weights, torch.arange(n, device=tokens.device)

    def gradient_of(code):
        (gradient,) = torch.autograd.grad((read * code).sum(), known, retain_graph=True)
        return known_map(gradient)[0]

    plain = gradient_of(torch.ones_like(read))
    y, x = (torch.arange(side, device=known.device) + 0.5 for side in plain.shape[1:])

    def expected(rows, columns):  # at which patch each position arrives
        row, column = (y * rows / len(y)).long(), (x * columns / len(x)).long()
        return row[:, None] * columns + column

    found = (gradient_of(numbers.to(read)) * plain).sum(0) / plain.square().sum(0).clamp(min=1e-30)
    readings = []
    for grid in _grids(n, height, width):
        number = expected(*grid)
        prefix = int((found - number).median().round())
        if 0 <= prefix <= n - grid[0] * grid[1]:
            readings.append(((found - number - prefix).abs().median().item(), (grid, prefix)))
    error, reading = min(readings, default=(MISPLACED, None))
    if error < MISPLACED or not may_be_mixed:
        return reading if error < MISPLACED else None
    digits = [(numbers >> digit & 1) * 2 - 1 for digit in range((n - 1).bit_length())]
    signs = [(gradient_of(digit.to(read)) * plain).sum(0).sign().flatten() for digit in digits]
    agree = torch.stack(digits, 1).to(read) @ torch.stack(signs) / len(digits)  # of each token and position, -1 to 1
    readings = []
    for grid in _grids(n, height, width):
        prefixes = torch.arange(n - grid[0] * grid[1] + 1, device=known.device)
        tokens_read = expected(*grid).flatten() + prefixes[:, None]
        agreement, prefix = agree.gather(0, tokens_read).mean(dim=1).max(dim=0)
        readings.append((agreement.item(), (grid, int(prefix))))
    agreement, reading = max(readings, default=(0, None))
    return reading if agreement > AGREEMENT else None


def _covers(tensor, lay_out, known, known_map):
    """Whether a map can be one of the whole picture, as the map before it; not so what is pooled from a box of it."""
    before, rows = known_map(known).shape[2], lay_out(tensor).shape[2]
    if min(abs(before / rows - usual) for usual in (1, 2, 4)) < 0.25:
        return True  # as a step of a network; only another one is worth a look
    weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    (gradient,) = torch.autograd.grad((tensor * weights).sum(), known, retain_graph=True)
    return (known_map(gradient) != 0).any(dim=1).float().mean() > 0.5


def read_as_maps(
    tensors: list[torch.Tensor], source: torch.Tensor
) -> list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
    """Those of some tensors that have positions of a picture, each with what lays it out as a map.

    Channels may be first or last. Tokens are laid out as the model laid them: at which token a patch arrives is asked
    of the gradient between one tensor and the next, so that CLS, register, detection and prompt tokens, in front or
    behind, do not count as places. Neither do those of a box that was cut out of the picture.

    Args:
        tensors: of one picture, (1, ...), in the order of the computation, with a graph back to the source.
        source: pixel values (1, channels, height, width).

    Returns:
        (tensor, function to (1, channels, rows, columns)) for those that can be read.
    """
    height, width = source.shape[2:]
    readings, tokens_known = [], {}  # by their number
    known, known_map = source, _as_it_is
    for tensor in tensors:
        lay_out = None
        if tensor.ndim == 4 and len(tensor) == 1:
            first, last = (_misfit(grid, height, width) for grid in (tensor.shape[2:], tensor.shape[1:3]))
            if first == last < math.inf:  # then the one whose places are where they were
                found = _laid_out(tensor.flatten(1, 2), known, known_map, height, width, may_be_mixed=False)
                last -= found == (tuple(tensor.shape[1:3]), 0)
            if min(first, last) < math.inf:
                lay_out = _as_it_is if first <= last else channels_last_to_map
                if not _covers(tensor, lay_out, known, known_map):
                    lay_out = None
        elif tensor.ndim == 3 and len(tensor) == 1 and tensor.shape[1] >= 4:
            n = tensor.shape[1]
            if n not in tokens_known:
                tokens_known[n] = _laid_out(tensor, known, known_map, height, width)
            lay_out = tokens_known[n] and _patches(*tokens_known[n])
        if lay_out is not None:
            readings.append((tensor, lay_out))
            known, known_map = tensor, lay_out
    return readings


def _as_it_is(tensor):
    return tensor


def _patches(grid, prefix):
    def lay_out(tokens):
        return tokens_to_map(tokens[:, : prefix + grid[0] * grid[1]], grid, prefix)

    return lay_out
