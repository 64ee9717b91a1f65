"""Balanced gradients: gradients with which gradient x input adds up to the score, in any model.

An ordinary gradient says what an infinitely small change does. Three kinds of operation make it useless as an account
of the score: softmax attention, normalisation, and gates. Here they count as what they are for the picture at hand, a
weighing of the values that flow through, with weights that are constants.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def balanced_gradients(gamma: float = 0.25) -> TorchFunctionMode:
    """Within, autograd gives balanced gradients of whatever is computed, in any model, whose code is not touched.

    Values stay those of the model. The rules are laid over torch's own functions:

    - Attention weights are constants (Ali et al., XAI for Transformers, ICML 2022): those of a softmax that multiplies
      an activation, of `scaled_dot_product_attention` and of `multi_head_attention_forward`.
    - Denominators of norms are constants (the same paper): of layer, group, RMS and L2 norm, fused or written out as a
      quotient, a root or a power. In eval mode, batch norm has constants anyway.
    - Gates are constants: f(x) counts as x times f(x) / x (Achtibat et al., AttnLRP, ICML 2024; Mehri et al.,
      Libragrad, CVPR 2025): GELU, SiLU, tanh and all the other activations of torch; a sigmoid that multiplies an
      activation; and a power.
    - Of a product of two activations each gets half (AttnLRP).
    - In convolutions whose input is nowhere negative, what speaks for the sign of an output counts 1 + gamma times
      (the gamma rule of Montavon et al., Layer-Wise Relevance Propagation: An Overview, 2019), a batch norm behind the
      convolution folded in.

    A softmax or sigmoid that multiplies no activation, as at the end of a model, keeps its ordinary gradient.

    What requires a gradient counts as an activation, a Parameter aside: freeze the parameters, and what is made of
    them, by `model.requires_grad_(False)`. Code of torch.compile and torch.jit runs past it.

    Args:
        gamma: 0 or more; 0 leaves the gamma rule out, and the computation costs half as much.

    Returns:
        A context manager. It may be entered within another one, which then rests.

    Raises:
        ValueError: a negative gamma.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.SiLU(), torch.nn.LayerNorm(8))
        >>> x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        >>> with balanced_gradients():
        ...     score = net.requires_grad_(False)(x)[0, 0]
        >>> [gradient] = torch.autograd.grad(score, x)
        >>> torch.allclose((gradient * x).sum(), score)
        True
    """
    if not gamma >= 0:
        raise ValueError(f"gamma is a number of at least 0, not {gamma!r}")
    return _Rules(gamma)


def check_rules_reach(model: torch.nn.Module) -> None:
    """Raises a ValueError if a part of a model is of torch.jit, whose code runs past the rules, and past hooks."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{path or 'the model'} is of torch.jit, which runs past the rules of balanced gradients and past "
                "hooks at layers: explain the model that it was made of, or use a method that needs neither, such as "
                "occlude or rise"
            )


_within = threading.local()


@contextlib.contextmanager
def _no_rules():
    """Within, as in a rule, nothing follows the rules."""
    before = getattr(_within, "rule", False)
    _within.rule = True
    try:
        yield
    finally:
        _within.rule = before


@contextlib.contextmanager
def choices(made: list[bool] | None = None) -> Iterator[list[bool]]:
    """Within, what the rules decide by looking at values is written down, or decided as it was before.

    A computation can be traced in that way, as for an export: a trace knows no values. (Is the input of a convolution
    nowhere negative? Has a negative output a gradient?)

    Args:
        made: those of a run of the same computation; None: to write down.

    Yields:
        The choices, in the order in which they were made.

    Example:
        >>> net = torch.nn.Conv2d(1, 2, 1).requires_grad_(False)
        >>> with choices() as made, balanced_gradients():
        ...     scores = net(torch.ones(1, 1, 2, 2, requires_grad=True))
        >>> made  # the input is nowhere negative
        [True]
    """
    before = getattr(_within, "choices", None)
    written: list[bool] = [] if made is None else made
    _within.choices = written, None if made is None else iter(made)
    try:
        yield written
    finally:
        _within.choices = before


def _choose(condition):
    """Whether a condition, a function that gives a tensor of one boolean, holds."""
    written, again = getattr(_within, "choices", None) or (None, None)
    if again is not None:
        return next(again)
    choice = bool(condition())
    if written is not None:
        written.append(choice)
    return choice


class _Rules(TorchFunctionMode):
    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None or getattr(_within, "rule", False) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        with _no_rules():
            return rule(self.gamma, func, *args, **kwargs)


class _Value(torch.autograd.Function):
    """The value of one tensor with the gradient of another one."""

    @staticmethod
    def forward(ctx, path, value):
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Times(torch.autograd.Function):
    """A value that counts as x times a constant."""

    @staticmethod
    def forward(ctx, x, constant, value):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(constant)
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        (constant,) = ctx.saved_tensors
        return None if gradient is None else gradient * constant, None, None


class _Half(torch.autograd.Function):
    """Half of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class _Gamma(torch.autograd.Function):
    """A convolution y of x >= 0, with the gamma rule as its gradient.

    With z = y + gamma * (what speaks for a positive y), each part of a positive y gets its share of z, and of a
    negative one its share of (2 + gamma) * y - z.
    """

    @staticmethod
    def forward(ctx, y, x, weight, bias, convolution, gamma):
        ctx.save_for_backward(y, x, weight, bias)
        ctx.convolution, ctx.gamma, ctx.made = convolution, gamma, None
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        y, x, weight, bias = ctx.saved_tensors
        if ctx.made is None:  # once for all scores
            with torch.enable_grad(), _no_rules():
                x = x.detach().requires_grad_()
                more = None if bias is None else bias + ctx.gamma * bias.clamp(min=0)
                made = ctx.convolution(x, weight + ctx.gamma * weight.clamp(min=0), more)
            ctx.made = x, made, torch.where(y > 0, y / made.detach(), 0.0)
        x, made, share = ctx.made
        to_made, to_y = gradient * share, None
        at_negative = gradient.masked_fill(y >= 0, 0)
        if _choose(at_negative.any):  # not where a ReLU comes after
            down = at_negative * torch.where(y < 0, y / torch.minimum((2 + ctx.gamma) * y - made.detach(), y), 0.0)
            to_made, to_y = to_made - down, (2 + ctx.gamma) * down
        (to_x,) = torch.autograd.grad(made, x, to_made, retain_graph=True)
        return to_y, to_x, None, None, None, None


def _flows(x):
    """Whether it is an activation: what the picture has made."""
    return isinstance(x, torch.Tensor) and x.requires_grad and not isinstance(x, torch.nn.Parameter)


FACTOR, CONVOLUTION = "a factor", "a convolution"
STEPS = 16
STOPS = ("_ValueBackward", "_TimesBackward", "ReluBackward0", "LeakyReluBackward0", "ThresholdBackward0")


def _is_factor(x):
    """Whether it is a softmax, sigmoid or root, or is made of one alone, as by a mask, a cast or another layout."""
    node = x.grad_fn
    for _ in range(STEPS):
        if node is None or node.name() in STOPS:
            return False
        if FACTOR in node.metadata:
            return True
        sources = [source for source, _ in node.next_functions if source is not None]
        node = sources[0] if len(sources) == 1 else None
    return False


def _factor(gamma, func, *args, **kwargs):
    """Keeps its gradient until it multiplies an activation."""
    out = func(*args, **kwargs)
    if out.grad_fn is not None:
        out.grad_fn.metadata[FACTOR] = True
    return out


def _weighed(a, b):
    """Two factors of a product, of which a weight is constant, and two activations get half each."""
    if not (_flows(a) and _flows(b)):
        return a, b
    of_a, of_b = _is_factor(a), _is_factor(b)
    if of_a == of_b:
        return _Half.apply(a), _Half.apply(b)
    return (a.detach(), b) if of_a else (a, b.detach())


def _product(gamma, func, a, b, **kwargs):
    return func(*_weighed(a, b), **kwargs)


def _product_in_place(gamma, func, a, b):
    if not (_flows(a) and _flows(b)):
        return func(a, b)
    return a.copy_(torch.mul(*_weighed(a.clone(), b)))


def _added_product(gamma, func, added, a, b, **kwargs):
    return func(added, *_weighed(a, b), **kwargs)


def _einsum(gamma, func, equation, *operands):
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    flowing = [i for i, one in enumerate(operands) if _flows(one)]
    if len(flowing) == 2:
        operands = list(operands)
        i, j = flowing
        operands[i], operands[j] = _weighed(operands[i], operands[j])
    return func(equation, *operands)


def _quotient(gamma, func, a, b, **kwargs):
    if not _flows(b):
        return func(a, b, **kwargs)
    return func(a, b.detach(), **kwargs) if _flows(a) else _factor(gamma, func, a, b, **kwargs)


def _gate(gamma, func, input, *args, **kwargs):
    """f(x) as x times a constant, f(x) / x; what f(0) may be is no share of x's."""
    if not _flows(input):
        return func(input, *args, **kwargs)
    with torch.no_grad():
        copy = input.detach().clone()
        value = func(copy, *args, **kwargs)
        in_place = value is copy
        x = input.detach()
        with torch.enable_grad():
            zero = x.new_zeros(()).requires_grad_()
            at_zero = func(zero.clone(), *args, **kwargs)
            slope = torch.autograd.grad(at_zero, zero)[0] if at_zero.requires_grad else torch.zeros_like(zero)
        at_zero = at_zero.detach()
        has_offset = _choose(lambda: at_zero != 0)
        close = x.abs() < 1e-3 if has_offset else x == 0  # where a difference of values would be rounding
        ratio = torch.where(close, slope, (value - at_zero) / torch.where(close, 1, x))
    out = _Times.apply(input, ratio, value)
    return input.copy_(out) if in_place else out


def _power(gamma, func, a, b, **kwargs):
    if not _flows(a) or isinstance(b, torch.Tensor):
        return func(a, b, **kwargs)
    rule = _gate if b > 0 and b != 0.5 else _factor
    return rule(gamma, func, a, b, **kwargs)


def _centred(x, dims, eps):
    variance = x.var(dims, keepdim=True, unbiased=False)
    return (x - x.mean(dims, keepdim=True)) * (variance + eps).rsqrt().detach()


def _by_channel(values, x):
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def _value(func, *args, **kwargs):
    with torch.no_grad():
        value = func(*args, **kwargs)
    return value.clone() if value._is_view() else value


def _times(x, constant, func, *args, **kwargs):
    return _Times.apply(x, constant, _value(func, x, *args, **kwargs))


def _with_value_of(path, func, *args, **kwargs):
    return _Value.apply(path, _value(func, *args, **kwargs))


def _layer_norm(gamma, func, input, normalized_shape, weight=None, bias=None, eps=1e-5, *others):
    if not _flows(input):
        return func(input, normalized_shape, weight, bias, eps, *others)
    path = _centred(input, tuple(range(-len(normalized_shape), 0)), eps)
    path = path if weight is None else path * weight
    return _with_value_of(path, func, input, normalized_shape, weight, bias, eps, *others)


def _group_norm(gamma, func, input, num_groups, weight=None, bias=None, eps=1e-5, *others):
    if not _flows(input):
        return func(input, num_groups, weight, bias, eps, *others)
    path = _centred(input.reshape(len(input), num_groups, -1), -1, eps).reshape(input.shape)
    path = path if weight is None else path * _by_channel(weight, input)
    return _with_value_of(path, func, input, num_groups, weight, bias, eps, *others)


def _rms_norm(gamma, func, input, normalized_shape, weight=None, eps=None):
    if not _flows(input):
        return func(input, normalized_shape, weight, eps)
    dims, least = tuple(range(-len(normalized_shape), 0)), torch.finfo(input.dtype).eps if eps is None else eps
    path = input * (input.square().mean(dims, keepdim=True) + least).rsqrt().detach()
    path = path if weight is None else path * weight
    return _with_value_of(path, func, input, normalized_shape, weight, eps)


def _instance_norm(gamma, func, input, *args, **kwargs):
    given = inspect.signature(func).bind(input, *args, **kwargs)
    given.apply_defaults()
    options = given.arguments
    if not _flows(input) or not options["use_input_stats"]:
        return func(input, *args, **kwargs)
    path = _centred(input, tuple(range(2, input.ndim)), options["eps"])
    path = path if options["weight"] is None else path * _by_channel(options["weight"], input)
    return _with_value_of(path, func, input, *args, **kwargs)


def _batch_norm(gamma, func, input, *args, **kwargs):
    given = inspect.signature(func).bind(input, *args, **kwargs)
    given.apply_defaults()
    options = given.arguments
    if not _flows(input):
        return func(input, *args, **kwargs)
    weight = 1 if options["weight"] is None else options["weight"].detach()
    if options["training"] or options["running_mean"] is None:  # the statistics of this batch
        path = _centred(input, (0, *range(2, input.ndim)), options["eps"])
        path = path if isinstance(weight, int) else path * _by_channel(weight, input)
        return _with_value_of(path, func, input, *args, **kwargs)
    scale = (options["running_var"] + options["eps"]).rsqrt() * weight
    found, version = (None, 0) if input.grad_fn is None else input.grad_fn.metadata.get(CONVOLUTION, (None, 0))
    if found is not None and version == input._version:  # nothing was added in place since
        plain, x, kernel, bias, convolution = found
        mean = options["running_mean"] - (0 if bias is None else bias)
        shift = (0 if options["bias"] is None else options["bias"].detach()) - scale * mean
        value = _times(plain, _by_channel(scale, plain), func, *args, **kwargs)
        return _Gamma.apply(value, x, kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1)), shift, convolution, gamma)
    # By its formula: with one row, PyTorch's own (2.13 to 2.15, on a CPU) can return a wrong gradient.
    return _times(input, _by_channel(scale, input), func, *args, **kwargs)


def _convolution(gamma, func, input, weight, bias=None, *args, **kwargs):
    if _flows(weight):
        return func(*_weighed(input, weight), bias, *args, **kwargs)
    out = func(input, weight, bias, *args, **kwargs)
    if not gamma or not _flows(input) or not _choose(lambda: (input >= 0).all()):
        return out
    weight, bias = weight.detach(), None if bias is None else bias.detach()

    def convolution(x, weight, bias):
        return func(x, weight, bias, *args, **kwargs)

    by_rule = _Gamma.apply(out, input, weight, bias, convolution, gamma)
    by_rule.grad_fn.metadata[CONVOLUTION] = (out, input, weight, bias, convolution), by_rule._version
    return by_rule


def _linear(gamma, func, input, weight, bias=None):
    return func(*_weighed(input, weight), bias)


def _normalize(gamma, func, input, p=2.0, dim=1, eps=1e-12, out=None):
    return input / torch.linalg.vector_norm(input, p, dim, keepdim=True).clamp(min=eps).detach()


def _cosine_similarity(gamma, func, x1, x2, dim=1, eps=1e-8):
    a, b = _weighed(x1, x2)
    norms = [torch.linalg.vector_norm(x, dim=dim).clamp(min=eps).detach() for x in (x1, x2)]
    return (a * b).sum(dim) / norms[0] / norms[1]


def _local_response_norm(gamma, func, input, *args, **kwargs):
    with torch.no_grad():
        ratio = func(input, *args, **kwargs) / torch.where(input == 0, 1, input)
    return input * ratio


def _glu(gamma, func, input, dim=-1):
    values, gates = input.chunk(2, dim)
    return values * gates.sigmoid().detach()


def _attention(
    gamma, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """By its formula: the fused kernels compute more gradients than there are, and can't be exported."""
    given = query.detach(), key.detach(), value, attn_mask, dropout_p, is_causal
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if not _flows(value) or dropout_p:
        return func(*given, **options)
    with torch.no_grad():
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    with torch.no_grad():
        scores = query @ key.transpose(-2, -1)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
        weights = scores.softmax(dim=-1)
        weights = weights if attn_mask is None else weights.nan_to_num(0)  # of a row that may read nothing
    return _with_value_of(weights @ value, func, *given, **options)


def _multi_head_attention(gamma, func, query, key, value, *args, **kwargs):
    """Query and key make the weights only."""
    given = inspect.signature(func).bind(query.detach(), key.detach(), value, *args, **kwargs)
    given.apply_defaults()
    wanted, given.arguments["need_weights"] = given.arguments["need_weights"], True  # else by a fused kernel
    out, weights = func(*given.args, **given.kwargs)
    return out, weights if wanted else None


Tensor = torch.Tensor
GATES = """gelu silu mish hardswish elu elu_ selu selu_ celu celu_ hardtanh hardtanh_ relu6 softplus softsign tanhshrink
softshrink hardshrink logsigmoid tanh""".split()
RULES: dict[Any, Callable] = {
    **dict.fromkeys(
        [F.softmax, torch.softmax, Tensor.softmax, F.softmin, torch.sigmoid, Tensor.sigmoid, F.sigmoid]
        + [Tensor.sigmoid_, torch.sigmoid_, F.hardsigmoid, torch.special.expit, torch.special.softmax]
        + [torch.rsqrt, Tensor.rsqrt, Tensor.rsqrt_, torch.sqrt, Tensor.sqrt, Tensor.sqrt_]
        + [torch.reciprocal, Tensor.reciprocal, Tensor.__rtruediv__, torch.norm, Tensor.norm]
        + [torch.linalg.norm, torch.linalg.vector_norm, torch.std, Tensor.std, torch.var, Tensor.var]
        + [torch.exp, Tensor.exp, Tensor.exp_],
        _factor,
    ),
    **dict.fromkeys([getattr(F, name) for name in GATES], _gate),
    **dict.fromkeys([torch.tanh, Tensor.tanh, Tensor.tanh_, torch.selu, torch.celu], _gate),
    **dict.fromkeys([torch.square, Tensor.square], _gate),
    **dict.fromkeys([torch.pow, Tensor.pow, Tensor.__pow__], _power),
    **dict.fromkeys(
        [torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply]
        + [torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm]
        + [torch.bmm, Tensor.bmm],
        _product,
    ),
    **dict.fromkeys([Tensor.mul_, Tensor.__imul__, Tensor.multiply_], _product_in_place),
    **dict.fromkeys([torch.baddbmm, Tensor.baddbmm, torch.addmm, torch.addcmul], _added_product),
    **dict.fromkeys([torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide], _quotient),
    **dict.fromkeys([torch.divide, Tensor.divide, Tensor.div_, Tensor.__itruediv__], _quotient),
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], _convolution),
    **dict.fromkeys([F.layer_norm, torch.layer_norm], _layer_norm),
    **dict.fromkeys([F.group_norm, torch.group_norm], _group_norm),
    **dict.fromkeys([F.rms_norm, torch.rms_norm], _rms_norm),
    torch.einsum: _einsum,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.local_response_norm: _local_response_norm,
    F.normalize: _normalize,
    **dict.fromkeys([F.cosine_similarity, torch.cosine_similarity], _cosine_similarity),
    F.glu: _glu,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
