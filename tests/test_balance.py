"""Balanced gradients: each rule worked out by hand, and sums that add up, in small formulas and in whole models."""

import math
import threading
import warnings

import pytest
import timm
import torch
import torchvision
from families import FAMILIES, build, image
from torch import nn
from torch.nn import functional as F

from xai_helpers.balance import balanced_gradients, check_rules_reach
from xai_helpers.wrappers import LogitsModel, eager_attention


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def gradients(score, *leaves, gamma=0.0):
    """Balanced gradients of score(*leaves), as lists; 0 where there is none."""
    with balanced_gradients(gamma):
        value = score(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [[0.0] * one.numel() if g is None else g.flatten().tolist() for one, g in zip(leaves, found, strict=True)]


def near(*values):
    return pytest.approx(list(values), abs=1e-5)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("gate", "x", "ratio"),
    [
        (F.silu, 2.0, sigmoid(2)),
        (F.gelu, 1.0, (1 + math.erf(1 / math.sqrt(2))) / 2),
        (F.gelu, 0.0, 0.5),
        (F.gelu, -1e-6, 0.5),
        (torch.tanh, 1.0, math.tanh(1)),
        (F.hardswish, 1.0, 4 / 6),
        (F.relu6, 8.0, 6 / 8),
        (F.elu, -1.0, 1 - math.exp(-1)),
        (F.elu, 3.0, 1.0),
        (F.softplus, 2.0, (math.log(1 + math.exp(2)) - math.log(2)) / 2),
        (F.softplus, 1e-5, 0.5),
        (F.relu, -2.0, 0.0),
        (F.relu, 2.0, 1.0),
        (lambda x: F.leaky_relu(x, 0.1), -2.0, 0.1),
        (lambda x: x**3, -2.0, 4.0),
        (lambda x: x.square(), 3.0, 3.0),
        (lambda x: x * x, 3.0, 3.0),
        (lambda x: x * torch.sigmoid(x), 2.0, sigmoid(2)),
        (lambda x: F.silu(x * 1, inplace=True), 2.0, sigmoid(2)),
        (lambda x: F.elu_(x * 1), -1.0, 1 - math.exp(-1)),
    ],
)
def test_a_gate_is_its_input_times_a_constant(gate, x, ratio):
    [[found]] = gradients(lambda x: gate(x).sum(), leaf(x))
    assert found == pytest.approx(ratio, abs=1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x / x.norm(),
        lambda x: F.normalize(x, dim=0),
        lambda x: x * torch.rsqrt((x**2).sum()),
        lambda x: x / x.square().sum().sqrt(),
        lambda x: x * x.pow(2).sum().pow(-0.5),
        lambda x: x * (x.pow(2).sum() ** 0.5).reciprocal(),
        lambda x: x / torch.linalg.vector_norm(x).clamp(min=1e-6).expand(2),
        lambda x: F.rms_norm(x, (2,), eps=0.0) / 2**0.5,
    ],
)
def test_the_length_that_a_norm_divides_by_is_a_constant(norm):
    assert gradients(lambda x: norm(x)[0], leaf(3.0, 4.0)) == [near(1 / 5, 0)]


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.layer_norm(x, (2,), torch.tensor([2.0, 7.0]), torch.ones(2), eps=0.0)[0],
        lambda x: F.group_norm(x[None, :, None], 1, torch.tensor([2.0, 7.0]), torch.ones(2), eps=0.0)[0, 0, 0],
        lambda x: 2 * F.instance_norm(x[None, None], eps=0.0)[0, 0, 0],
        lambda x: 2 * ((x - x.mean()) / x.std(unbiased=False))[0],
        lambda x: 2 * ((x - x.mean()) * (x.var(unbiased=False)).rsqrt())[0],
    ],
)
def test_of_layer_norm_the_mean_counts_and_the_deviation_is_a_constant(norm):
    # Mean 2, deviation 1: twice (x - mean of both). The ordinary gradient is 0.
    assert gradients(norm, leaf(1.0, 3.0)) == [near(2 * (1 - 1 / 2), 2 * (0 - 1 / 2))]


def test_of_a_product_of_two_activations_each_gets_half():
    assert gradients(lambda a, b: (a * b).sum(), leaf(2.0), leaf(5.0)) == [near(2.5), near(1.0)]
    assert gradients(lambda a, b: (a * 1).mul_(b).sum(), leaf(2.0), leaf(5.0)) == [near(2.5), near(1.0)]
    assert gradients(lambda a, b: a @ b, leaf(2.0, 1.0), leaf(5.0, 3.0)) == [near(2.5, 1.5), near(1.0, 0.5)]
    assert gradients(lambda a: (a * 3).sum(), leaf(2.0)) == [near(3.0)]


def test_a_parameter_is_no_activation():
    weight = nn.Parameter(torch.tensor([5.0]))
    assert gradients(lambda a: (a * weight).sum(), leaf(2.0)) == [near(5.0)]


def test_a_quotient_is_its_numerator_times_a_constant():
    assert gradients(lambda a, b: (a / b).sum(), leaf(2.0), leaf(5.0)) == [near(0.2), near(0.0)]


def test_a_sigmoid_that_multiplies_is_a_constant_and_one_at_the_end_is_not():
    for gate in (torch.sigmoid, lambda g: g.sigmoid().unsqueeze(0)[0], lambda g: torch.sigmoid(g) * 1):
        assert gradients(lambda x, g, gate=gate: (x * gate(g)).sum(), leaf(3.0), leaf(2.0)) == [
            near(sigmoid(2)),
            near(0.0),
        ]
    assert gradients(lambda x: torch.sigmoid(x).sum(), leaf(2.0)) == [near(sigmoid(2) * (1 - sigmoid(2)))]
    assert gradients(lambda x: F.glu(x, dim=0).sum(), leaf(3.0, 2.0)) == [near(sigmoid(2), 0)]


def test_two_sigmoids_that_multiply_keep_a_gradient():
    # As in YOLO, objectness times category. Half of a product's gradient, times sigmoid's own.
    s, t = sigmoid(1), sigmoid(2)
    found = gradients(lambda a, b: (a.sigmoid() * b.sigmoid()).sum(), leaf(1.0), leaf(2.0))
    assert found == [near(t / 2 * s * (1 - s)), near(s / 2 * t * (1 - t))]


def scores_of(query, keys):
    return query @ keys.transpose(-2, -1)


ATTENTION = {
    "softmax": lambda q, k, v: scores_of(q, k).softmax(dim=-1) @ v,
    "F.softmax, a cast, dropout": lambda q, k, v: torch.bmm(
        F.dropout(F.softmax(scores_of(q, k), dim=-1, dtype=torch.float64).to(v.dtype), 0.5, training=False), v
    ),
    "written out": lambda q, k, v: (scores_of(q, k).exp() / scores_of(q, k).exp().sum(-1, keepdim=True)) @ v,
    "einsum": lambda q, k, v: torch.einsum("bqk,bkc->bqc", scores_of(q, k).softmax(dim=-1), v),
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
    "fused, with a mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, torch.cat([k, k]).reshape(1, 4, 1), torch.cat([v, v]).reshape(1, 4, 1), scale=1.0,
        attn_mask=torch.tensor([True, True, False, False]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
def test_attention_weights_are_constants(attention):
    # Scores 0 and ln 3: weights 1/4 and 3/4.
    q = torch.ones(1, 1, 1, requires_grad=True)
    k = torch.tensor([[[0.0], [math.log(3)]]], requires_grad=True)
    v = torch.tensor([[[1.0], [5.0]]], requires_grad=True)
    found = gradients(lambda q, k, v: attention(q, k, v).sum(), q, k, v)
    assert found == [near(0), near(0, 0), near(0.25, 0.75)]


def test_weights_that_heads_exchange_are_constants_too():
    mix = torch.tensor([[0.5, 0.5], [0.0, 1.0]])

    def talking_heads(scores, v):
        weights = F.linear(scores.softmax(dim=-1).transpose(0, 1), mix).transpose(0, 1)
        return (weights * v).sum()

    assert gradients(talking_heads, torch.zeros(2, 2, requires_grad=True), leaf(1.0, 3.0))[0] == near(0, 0, 0, 0)


def test_a_softmax_at_the_end_keeps_its_gradient():
    # p = 1/4 and 3/4: the gradient of the first is p (1 - p) and -p q.
    assert gradients(lambda x: x.softmax(dim=0)[0], leaf(0.0, math.log(3))) == [near(3 / 16, -3 / 16)]


@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_is_that_of_its_formula(need_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(1, 5, 8, requires_grad=True)
    with balanced_gradients():
        out, weights = attention(x, x, x, need_weights=need_weights)
    assert (weights is not None) == need_weights
    [found] = torch.autograd.grad(out[0, 0, 0], x)
    q, k, v = (x.detach() @ w.T for w in attention.in_proj_weight.chunk(3))
    by_head = [one.unflatten(2, (2, 4)).transpose(1, 2) for one in (q, k, v)]
    shares = (by_head[0] @ by_head[1].transpose(2, 3) / 2).softmax(-1)  # (1, heads, 5, 5); 2 is the root of 4 channels
    of_v = shares[0, :, 0, :, None] * attention.out_proj.weight[0].unflatten(0, (2, 4))[:, None]  # (heads, 5, 4)
    wanted = of_v.transpose(0, 1).flatten(1) @ attention.in_proj_weight.chunk(3)[2]
    torch.testing.assert_close(found[0], wanted)


def convolved(weights, x, **kwargs):
    return F.conv2d(x.reshape(1, 2, 1, 1), torch.tensor(weights).reshape(1, 2, 1, 1), **kwargs)


def test_the_gamma_rule():
    # y = 3 x 1 - 1 x 2 = 1. What speaks for it counts twice: 6 - 2 = 4, so the shares are 6/4 and -2/4.
    assert gradients(lambda x: convolved([3.0, -1.0], x).sum(), leaf(1.0, 2.0), gamma=1.0) == [near(1.5, -0.25)]
    # y = 1 - 4 = -3. What speaks for that is the second: 1 - 8 = -7, so the shares are -3 / -7 times 1 and -8.
    assert gradients(lambda x: convolved([1.0, -2.0], x).sum(), leaf(1.0, 2.0), gamma=1.0) == [near(3 / 7, -12 / 7)]
    # An input that is negative somewhere, and no gamma: the weights.
    assert gradients(lambda x: convolved([3.0, -1.0], x).sum(), leaf(-1.0, 2.0), gamma=1.0) == [near(3, -1)]
    assert gradients(lambda x: convolved([3.0, -1.0], x).sum(), leaf(1.0, 2.0)) == [near(3, -1)]


def test_a_batch_norm_is_folded_into_the_convolution_before_it():
    # Weights 6 and -2, bias 1: y = 6 - 4 + 1 = 3; with gamma 1, 12 - 4 + 2 = 10.
    def score(x):
        y = convolved([3.0, -1.0], x, bias=torch.tensor([0.5]))
        options = torch.tensor([0.5]), torch.ones(1), torch.tensor([2.0]), torch.tensor([1.0])
        return F.batch_norm(y, *options, eps=0.0).sum()

    assert gradients(score, leaf(1.0, 2.0), gamma=1.0) == [near(3 * 12 / 10 / 1, 3 * -4 / 10 / 2)]


def test_gamma_is_the_same_for_several_scores_of_one_pass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.Flatten())
    net.eval().requires_grad_(False)
    x = torch.rand(1, 3, 5, 5, requires_grad=True)
    with balanced_gradients():
        both = net(x)[0]
    found = [torch.autograd.grad(score, x, retain_graph=True)[0] for score in (*both, both[0])]
    torch.testing.assert_close(found[0], found[2])
    [alone] = gradients(lambda x: net(x)[0, 1], x, gamma=0.25)
    torch.testing.assert_close(found[1].flatten(), torch.tensor(alone))


def activations():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


W = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1))
FORMULAS = {
    "convolution, gate, pooling": lambda x: F.adaptive_avg_pool2d(F.silu(F.conv2d(x, W)), 1),
    "two convolutions": lambda x: F.conv2d(F.relu(F.conv2d(x, W, padding=1)), W[:, :, :1, :1].repeat(1, 2, 1, 1)),
    "convolution in 1 dimension": lambda x: F.conv1d(F.relu(x.flatten(2)), W.flatten(2)),
    "convolution in 3 dimensions": lambda x: F.conv3d(F.relu(x[:, None]), W[:, None, :, :2, :2]),
    "weights that the picture makes": lambda x: F.conv2d(x[:1], F.conv2d(x[1:], W).unflatten(1, (2, 3))[0]),
    "squeeze and excite": lambda x: x * F.hardsigmoid(F.silu(x.mean((2, 3), keepdim=True))),
    "cosine": lambda x: F.cosine_similarity(x[0], x[1], dim=0),
    "local response norm": lambda x: F.local_response_norm(x, 2),
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "linear attention": lambda x: (F.relu(x) @ (F.relu(x).mT @ x)) / (F.relu(x).sum() + 1),
    "powers and a root": lambda x: x.abs().clamp(min=0.1).pow(3).mean((2, 3)).pow(1 / 3),
    "gated unit": lambda x: F.gelu(x[:, :1]) * x[:, 1:2],
    "in place": lambda x: F.hardswish(F.conv2d(x, W), inplace=True).mul_(2).div_(3),
    "einsum of two": lambda x: torch.einsum("bchw,bdhw->bcd", x, x.roll(1, 1)),
    "added product": lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2]),
}


@pytest.mark.parametrize("gamma", [0.0, 0.25])
@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_contributions_add_up_and_values_stay(formula, gamma):
    x = activations()
    with balanced_gradients(gamma):
        value = formula(x)
    torch.testing.assert_close(value, formula(x), atol=1e-6, rtol=1e-6)
    [found] = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close((found * x).sum(), value.sum(), atol=1e-4, rtol=1e-4)


def test_within_another_one_the_inner_rules_hold():
    with balanced_gradients(1.0):
        assert gradients(lambda a, b: (a * b).sum(), leaf(2.0), leaf(5.0)) == [near(2.5), near(1.0)]
        assert gradients(lambda x: convolved([3.0, -1.0], x).sum(), leaf(1.0, 2.0)) == [near(3, -1)]
        assert gradients(lambda x: convolved([3.0, -1.0], x).sum(), leaf(1.0, 2.0), gamma=1) == [near(1.5, -0.25)]


def test_a_gradient_may_be_taken_inside():
    x = leaf(1.0, 2.0)
    with balanced_gradients(1.0):
        [found] = torch.autograd.grad(convolved([3.0, -1.0], x).sum(), x)
    assert found.tolist() == near(1.5, -0.25)


def ordinary():
    a, b = leaf(2.0), leaf(5.0)
    return torch.autograd.grad((a * b).sum(), a)[0].item()


def test_afterwards_and_elsewhere_gradients_are_ordinary():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), balanced_gradients():
        torch.ones(2, 3, requires_grad=True) @ torch.ones(2, 3, requires_grad=True)
    assert ordinary() == 5
    found = []
    with balanced_gradients():
        thread = threading.Thread(target=lambda: found.append(ordinary()))
        thread.start()
        thread.join()
        assert ordinary() == 2.5
    assert found == [5] and ordinary() == 5


def test_bad_arguments():
    with pytest.raises(ValueError, match="gamma is a number of at least 0, not -1"):
        balanced_gradients(-1)
    with pytest.raises(ValueError, match="gamma is a number of at least 0, not nan"):
        balanced_gradients(math.nan)


def test_code_of_torch_jit_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^1 is of torch\.jit, .* occlude or rise"):
        check_rules_reach(nn.Sequential(nn.ReLU(), scripted))
    check_rules_reach(nn.Linear(2, 2))


# Whole models. Biases, means, position embeddings and tokens of the model's own are set to zero, since what they
# contribute is no contribution of the picture.

OFFSETS = ("pos_emb", "position", "running_mean", "attention_biases")
OWN = ("bias", "pos_embed", "token", "cls", "probe", "class_embedding")  # as the last part of a name


@torch.no_grad()
def without_offsets(model):
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        last = name.rsplit(".", 1)[-1]
        if values.is_floating_point() and (any(n in name for n in OFFSETS) or any(n in last for n in OWN)):
            values.zero_()
    return model


def share_of_the_score(scorer, x, gamma, also=()):
    """Sum of gradient x input over the picture, divided by the score; and how far scores are from the model's."""
    with torch.no_grad():
        wanted = scorer(x)
    if also:  # of the pass before
        also.clear()
    source = x.clone().requires_grad_()
    with balanced_gradients(gamma):
        scores = scorer(source)
    score = scores[0, scores[0].abs().argmax()]
    leaves = [source, *also]
    found = torch.autograd.grad(score, leaves)
    total = sum((one * gradient).sum() for one, gradient in zip(leaves, found, strict=True))
    return (total / score).item(), ((scores - wanted).abs().max() / wanted.abs().max()).item()


# ImageGPT reads colours' numbers. The adapter's choice among them is a softmax, whose gradient is the ordinary one.
COMPLETE = [family for family in FAMILIES if family.name not in ("imagegpt", "shieldgemma2")]


@pytest.mark.parametrize("attention", ["fused", "eager"])
@pytest.mark.parametrize("family", COMPLETE, ids=lambda family: family.name)
def test_contributions_add_up_in_every_family(family, attention):
    model = without_offsets(build(family))
    scorer = LogitsModel(model).eval().requires_grad_(False)
    with eager_attention(model) if attention == "eager" else torch.enable_grad():
        for gamma in (0.0, 0.25):
            share, off = share_of_the_score(scorer, image(family.size), gamma)
            assert share == pytest.approx(1, abs=1e-3) and off < 1e-6


def test_contributions_add_up_with_words_beside_the_picture():
    """ShieldGemma 2, whose norm is written out: picture and words together are the score."""
    family = next(family for family in FAMILIES if family.name == "shieldgemma2")
    model = build(family)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "bias" in name or "position" in name:
                values.zero_()
    scorer, words = LogitsModel(model).eval().requires_grad_(False), []

    def note(module, inputs, output):
        words.append(output.detach().requires_grad_())
        return words[-1]

    embedding = next(module for module in model.modules() if "WordEmbedding" in type(module).__name__)
    with embedding.register_forward_hook(note):
        share, off = share_of_the_score(scorer, image(family.size), 0.25, words)
    assert share == pytest.approx(1, abs=1e-3) and off < 1e-6


IN_TORCHVISION = """swin_v2_t maxvit_t efficientnet_b0 mobilenet_v3_small googlenet convnext_tiny shufflenet_v2_x0_5
regnet_y_400mf squeezenet1_0 vit_b_32""".split()
IN_TIMM = """eva02_tiny_patch14_224 coatnet_nano_rw_224 mobilenetv4_conv_small fastvit_t8 efficientformer_l1
xcit_nano_12_p16_224 tiny_vit_5m_224 mambaout_femto cait_xxs24_224 edgenext_xx_small gcvit_xxtiny nfnet_f0
efficientvit_b0 gmlp_s16_224 tf_efficientnet_lite0 halonet26t lambda_resnet26t tf_efficientnet_cc_b0_4e resnest14d
convit_tiny""".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"torchvision/{n}" for n in IN_TORCHVISION), *(f"timm/{n}" for n in IN_TIMM)])
def test_contributions_add_up_in_other_libraries(name):
    library, name = name.split("/")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if library == "timm":
            model = timm.create_model(name, num_classes=10)
            size = model.default_cfg["input_size"][1:]
        else:
            options = {"init_weights": False} if name == "googlenet" else {}
            model, size = getattr(torchvision.models, name)(weights=None, **options), (224, 224)
        with torch.no_grad():
            for values in model.parameters():  # a head or a layer scale that starts at zero
                if values.min() == values.max() and values.abs().max() < 0.01:
                    values.normal_(0, 0.1)
    scorer = LogitsModel(without_offsets(model)).eval().requires_grad_(False)
    share, off = share_of_the_score(scorer, image(size), 0.25)
    assert share == pytest.approx(1, abs=1e-3) and off < 1e-6
