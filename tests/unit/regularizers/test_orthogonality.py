"""Are the gradients of two objectives turned apart, by a loss that is one and by a projection that is exact?"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from restoreloss import GradientOrthogonality
from tests.helpers.networks import tiny_unet
from tests.helpers.processes import launch

WORKER = "tests/unit/regularizers/regularizers_worker.py"
E1, E2, ZERO = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rule(**options: Any) -> GradientOrthogonality:
    return GradientOrthogonality([nn.Parameter(torch.zeros(2))], **options)


def rows(vectors: Any, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    return [[torch.tensor(vector, dtype=dtype)] for vector in vectors]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)).to(dtype)


def losses(model: Any, count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batches = normal(3 * count, 2, 4, 4, seed=seed, dtype=dtype).chunk(count)
    return [(model(batch) - 0.5 * batch).square().mean() for batch in batches]


def written_out(gen: list[Tensor], rec: list[Tensor], gamma: float, mode: str) -> float:
    """Pair by pair; the vectors are flat."""

    def cosine(one: Tensor, other: Tensor) -> float:
        return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))

    gen, rec = ([v for v in side if float(v @ v) > 0] for side in (gen, rec))
    within = [cosine(a, b) for side in (gen, rec) for i, a in enumerate(side) for b in side[i + 1 :]]
    across = [cosine(a, b) for a in gen for b in rec]
    s = sum(within) / len(within) if within else 1.0
    d = sum(across) / len(across) if across else 0.0
    if mode == "align":
        s, d = d, s
    return 1 - s + gamma * abs(d)


@pytest.mark.parametrize(
    ("gen", "rec", "orthogonal", "align"),
    [
        ([E1, E1], [E2, E2], 0.0, 2.0),
        ([E1, E1], [E1, E1], 1.0, 1.0),
        ([E1, E2], [E1, E2], 1.5, 0.5),
        ([(3.0, 4.0)], [(4.0, 3.0)], 0.96, 0.04 + 1),
        ([E1, E1], [(-1.0, 0.0)] * 2, 1.0, 3.0),
        ([E1, (-1.0, 0.0)], [E2], 2.0, 2.0),
        ([E1, ZERO], [E2, E2], 0.0, 2.0),  # what is zero drops out
        ([ZERO], [E1], 0.0, 2.0),
        ([ZERO, ZERO], [ZERO], 0.0, 2.0),
    ],
)
def test_the_closed_forms(gen: Any, rec: Any, orthogonal: float, align: float) -> None:
    assert rule().from_gradients(rows(gen), rows(rec)).item() == pytest.approx(orthogonal, abs=1e-12)
    assert rule(mode="align").from_gradients(rows(gen), rows(rec)).item() == pytest.approx(align, abs=1e-12)


def test_gamma_weighs_what_is_across() -> None:
    assert rule(gamma=0.25).from_gradients(rows([E1, E1]), rows([E1, E1])).item() == 0.25


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99), st.floats(0, 3),
    st.sampled_from(["orthogonal", "align"]), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_the_loss_is_that_of_all_pairs(
    n: int, m: int, size: int, seed: int, gamma: float, mode: Any, dtype: torch.dtype
) -> None:
    one, other = normal(n + m, size, 2, seed=seed, dtype=dtype), normal(n + m, 3, seed=seed + 1, dtype=dtype)
    if seed % 3 == 0:
        one[0], other[0] = 0, 0
    gradients = [[a, b] for a, b in zip(one, other, strict=True)]
    flat = [torch.cat([a.flatten(), b]).double() for a, b in gradients]
    found = rule(gamma=gamma, mode=mode).from_gradients(gradients[:n], gradients[n:])
    assert found.dtype == dtype
    assert found.item() == pytest.approx(written_out(flat[:n], flat[n:], gamma, mode), abs=1e-5)


@pytest.mark.parametrize("mode", ["orthogonal", "align"])
def test_the_gradient_is_that_of_the_loss(mode: Any) -> None:
    inputs = [normal(4, seed=seed).requires_grad_() for seed in range(5)]

    def penalty(*vectors: Tensor) -> Tensor:
        return rule(gamma=0.7, mode=mode).from_gradients([[v] for v in vectors[:2]], [[v] for v in vectors[2:]])

    assert torch.autograd.gradcheck(penalty, inputs)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e25])
def test_tiny_and_huge_gradients_have_the_same_cosine(scale: float) -> None:
    gen, rec = (rows([[scale * x for x in v]], torch.float32) for v in ((3.0, 4.0), (4.0, 3.0)))
    assert rule().from_gradients(gen, rec).item() == pytest.approx(0.96, rel=1e-5)


def test_gradients_of_half_precision_are_compared_in_single() -> None:
    gen, rec = rows([(300.0, 400.0)], torch.float16), rows([(400.0, 300.0)], torch.float16)  # squares leave float16
    found = rule().from_gradients(gen, rec)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(0.96, rel=1e-4)


def test_zeros_have_a_finite_gradient() -> None:
    vectors = [torch.zeros(3, requires_grad=True) for _ in range(3)] + [torch.ones(3, requires_grad=True)]
    rule().from_gradients([[vectors[0]], [vectors[1]]], [[vectors[2]], [vectors[3]]]).backward()
    assert all(v.grad is None or v.grad.isfinite().all() for v in vectors)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("mode", ["orthogonal", "align"])
def test_the_loss_of_a_network_is_that_of_its_gradients(count: int, mode: Any) -> None:
    model = network()
    found = GradientOrthogonality(model[0].parameters(), gamma=0.5, mode=mode)(
        losses(model, count), losses(model, 2, seed=5)
    )
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model[0].parameters()))])
        for loss in (*losses(model, count), *losses(model, 2, seed=5))
    ]
    assert found.item() == pytest.approx(written_out(flat[:count], flat[count:], 0.5, mode), abs=1e-9)


@pytest.mark.parametrize("mode", ["orthogonal", "align"])
def test_a_step_on_the_loss_lowers_it(mode: Any) -> None:
    model = network()
    orthogonality = GradientOrthogonality(model[0].parameters(), mode=mode)
    values = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        penalty = orthogonality(losses(model), losses(model, seed=5))
        assert penalty.requires_grad
        values.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert values[1] < values[0] - 1e-4
    # with respect to all that the losses depend on, not the shared parameters alone
    assert all(p.grad is not None and bool(p.grad.any()) for p in (model[0].weight, model[2].weight))


def test_the_graphs_of_the_losses_are_kept() -> None:
    model = network()
    gen, rec = losses(model), losses(model, seed=5)
    penalty = GradientOrthogonality(model[0].parameters())(gen, rec)
    (sum(gen) + sum(rec) + penalty).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_unet_is_differentiated_twice() -> None:
    unet = tiny_unet()

    def loss(seed: int) -> Tensor:
        x = normal(1, 3, 8, 8, seed=seed, dtype=torch.float32)
        return (unet(x, torch.tensor([seed])).sample - x).square().mean()

    penalty = GradientOrthogonality(unet.conv_in.parameters())([loss(1), loss(2)], [loss(3), loss(4)])
    penalty.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in unet.parameters())
    assert bool(unet.conv_out.weight.grad.any())


def test_parameters_that_one_loss_does_not_reach_have_a_gradient_of_zero() -> None:
    shared = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    gen, rec = shared[0].square().sum(), (shared[0].square() + shared[1].square()).sum()
    found = GradientOrthogonality(shared)(gen, rec)
    assert found.item() == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("of", ["activations", "outputs"])
def test_every_sample_is_a_micro_batch_where_gradients_are_taken_at_a_tensor(of: str) -> None:
    model, x, y = network(), normal(3, 2, 4, 4), normal(2, 2, 4, 4, seed=1)
    target = 0.3 * x.tanh(), 0.5 * y
    hidden = [model[0](image) for image in (x, y)]
    outputs = [model[2](model[1](h)) for h in hidden]
    points = hidden if of == "activations" else outputs
    gen, rec = ((out - aim).square().mean() for out, aim in zip(outputs, target, strict=True))
    penalty = GradientOrthogonality(model[0].parameters())(gen, rec, at=(points[0], points[1]))
    flat = [
        torch.autograd.grad(loss, point, retain_graph=True)[0].flatten(1)
        for loss, point in zip((gen, rec), points, strict=True)
    ]
    assert penalty.item() == pytest.approx(written_out([*flat[0]], [*flat[1]], 1.0, "orthogonal"), abs=1e-9)
    penalty.backward()
    assert bool(model[0].weight.grad.any())


def test_the_samples_of_several_losses_are_taken_together() -> None:
    model = network()
    images = [normal(n, 2, 4, 4, seed=n) for n in (1, 2, 3, 4)]
    hidden = [model[0](image) for image in images]
    each = [(model[2](model[1](h)) - 0.5 * x).square().sum() for h, x in zip(hidden, images, strict=True)]
    flat = [
        row for loss, h in zip(each, hidden, strict=True) for row in torch.autograd.grad(loss, h, retain_graph=True)[0]
    ]
    flat = [row.flatten() for row in flat]
    found = GradientOrthogonality(model[0].parameters())(each[:2], each[2:], at=(hidden[:2], hidden[2:]))
    assert found.item() == pytest.approx(written_out(flat[:3], flat[3:], 1.0, "orthogonal"), abs=1e-9)


def plane(gen: Any, rec: Any, **options: Any) -> tuple[list[float], float]:
    """The gradient written for two losses that have these gradients, and the cosine."""
    weight = nn.Parameter(torch.zeros(2))
    cosine = GradientOrthogonality([weight]).project(
        (weight * torch.tensor(gen)).sum(), (weight * torch.tensor(rec)).sum(), **options
    )
    assert weight.grad is not None
    return weight.grad.tolist(), cosine.item()


@pytest.mark.parametrize(
    ("gen", "rec", "conflict", "full", "cosine"),
    [
        ((1.0, -1.0), E2, (1.0, 0.0), (1.0, 0.0), -math.sqrt(0.5)),
        ((1.0, 1.0), E2, (1.0, 1.0), (1.0, 0.0), math.sqrt(0.5)),
        ((1.0, -3.0), (0.0, 2.0), (1.0, 0.0), (1.0, 0.0), -3 / math.sqrt(10)),
        (ZERO, E2, ZERO, ZERO, 0.0),
        ((2.0, 1.0), ZERO, (2.0, 1.0), (2.0, 1.0), 0.0),
        (ZERO, ZERO, ZERO, ZERO, 0.0),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_projection_of_the_closed_forms(
    gen: Any, rec: Any, conflict: Any, full: Any, cosine: float, weight: float
) -> None:
    for policy, freed in (("conflict", conflict), ("full", full)):
        gradient, found = plane(gen, rec, policy=policy, weight=weight)
        assert gradient == pytest.approx([r + weight * g for r, g in zip(rec, freed, strict=True)])
        assert found == pytest.approx(cosine)
    assert plane(gen, rec, weight=weight)[0] == plane(gen, rec, weight=weight, policy="conflict")[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["conflict", "full"]), st.floats(0.01, 2), st.booleans())
def test_what_is_projected_is_all_shared_parameters_together(seed: int, policy: Any, weight: float, held: bool) -> None:
    model = network()
    gen, rec = losses(model, seed=seed), losses(model, seed=seed + 1)
    shared, deep = list(model[0].parameters()), list(model[2].parameters())
    of_gen, of_rec = (torch.autograd.grad(side[0], shared, retain_graph=True) for side in (gen, rec))
    of_deep = torch.autograd.grad(rec[0], deep, retain_graph=True)
    dot = sum(float((a * b).sum()) for a, b in zip(of_gen, of_rec, strict=True))
    square = sum(float((b * b).sum()) for b in of_rec)
    own = sum(float((a * a).sum()) for a in of_gen)
    factor = dot / square if policy == "full" or dot < 0 else 0.0
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25) if held else None
    cosine = GradientOrthogonality(shared).project(
        gen[0], rec[0], policy=policy, weight=weight, others=model.parameters()
    )
    start = 0.25 if held else 0.0
    for p, a, b in zip(shared, of_gen, of_rec, strict=True):
        torch.testing.assert_close(p.grad, start + b + weight * (a - factor * b))
    for p, b in zip(deep, of_deep, strict=True):  # of generation not the least bit
        assert p.grad is not None and torch.equal(p.grad, start + b)
    assert cosine.item() == pytest.approx(dot / math.sqrt(square * own)) and not cosine.requires_grad


def test_each_parameter_may_have_a_weight_of_its_own() -> None:
    weight, bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    of_gen, of_rec = [torch.tensor([1.0, -1.0]), torch.tensor([2.0])], [torch.tensor([0.0, 1.0]), torch.tensor([1.0])]
    losses_of = [(weight * side[0]).sum() + (bias * side[1]).sum() for side in (of_gen, of_rec)]
    orthogonality = GradientOrthogonality([weight, bias])
    orthogonality.project(*losses_of, policy="full", weight=[0.5, 0.0])
    weighted = torch.tensor([0.5, -0.5, 0.0])
    reference = torch.tensor([0.0, 1.0, 1.0])
    expected = reference + weighted - weighted @ reference / (reference @ reference) * reference
    assert weight.grad is not None and bias.grad is not None
    torch.testing.assert_close(torch.cat([weight.grad, bias.grad]), expected)
    with pytest.raises(ValueError, match="`weight` should be one, or 2"):
        orthogonality.project((weight * 2).sum(), weight.sum(), weight=[1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cosines_are_single_precision_under_autocast(dtype: torch.dtype) -> None:
    orthogonality = GradientOrthogonality(nn.Linear(1, 1).parameters())
    rows = [[1 + 0.05 * normal(1000, seed=seed, dtype=torch.float32)] for seed in range(4)]
    with torch.autocast("cpu", dtype):
        found = orthogonality.from_gradients(rows[:2], rows[2:])
        large = orthogonality.from_gradients([[torch.ones(100_000)]], [[torch.ones(100_000)]])
    assert found.dtype == torch.float32 and torch.equal(found, orthogonality.from_gradients(rows[:2], rows[2:]))
    assert large.item() == pytest.approx(1.0)


def test_others_are_left_out_unless_they_are_named() -> None:
    model = network()
    model[2].bias.requires_grad_(False)
    orthogonality = GradientOrthogonality(model[0].parameters())
    orthogonality.project(losses(model)[0], losses(model, seed=5)[0])
    assert all(p.grad is None for p in model[2].parameters()) and model[0].weight.grad is not None
    orthogonality.project(losses(model)[0], losses(model, seed=5)[0], others=model[2].parameters())
    assert model[2].weight.grad is not None and model[2].bias.grad is None


def test_one_pass_may_serve_both_losses() -> None:
    model, x = network(), normal(2, 2, 4, 4)
    out = model(x)
    GradientOrthogonality(model.parameters()).project((out - x).square().mean(), (out + x).square().mean())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_projected_in_single(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=dtype))
    of_gen, of_rec = torch.tensor([300.0, -300.0], dtype=dtype), torch.tensor([0.0, 300.0], dtype=dtype)
    cosine = GradientOrthogonality([weight]).project((weight * of_gen).sum(), (weight * of_rec).sum())
    assert weight.grad is not None and weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad, torch.tensor([300.0, 300.0], dtype=dtype))
    assert cosine.item() == pytest.approx(-math.sqrt(0.5), rel=1e-3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class OnceOnly(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))


def flash(model: nn.Module, x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return model(x).square().mean()


@pytest.mark.parametrize(
    ("build", "loss", "way"),
    [
        (
            lambda: OnceOnly(8, 8),
            lambda model, x: model(x).square().mean(),
            "Find the operation that is differentiable",
        ),
        (Attention, flash, r"attention under `torch.nn.attention.sdpa_kernel\(SDPBackend.MATH\)`"),
        (
            lambda: torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), backend="aot_eager"),
            lambda model, x: model(x).square().mean(),
            "Take the losses from the network before `torch.compile`",
        ),
    ],
)
def test_where_differentiating_twice_fails_the_error_names_the_way_out(build: Any, loss: Any, way: str) -> None:
    model = build()
    orthogonality = GradientOrthogonality(model.parameters())
    sides = [loss(model, normal(2, 5, 8, seed=seed, dtype=torch.float32)) for seed in range(4)]
    with pytest.raises(ValueError, match=f"cannot be differentiated twice: .*{way}.*`project`"):
        orthogonality(sides[:2], sides[2:])
    sides = [loss(model, normal(2, 5, 8, seed=seed, dtype=torch.float32)) for seed in range(2)]
    assert orthogonality.project(*sides).isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_attention_of_plain_operations_is_differentiated_twice() -> None:
    model = Attention()
    with sdpa_kernel(SDPBackend.MATH):
        sides = [model(normal(2, 5, 8, seed=seed, dtype=torch.float32)).square().mean() for seed in range(2)]
        GradientOrthogonality(model.parameters())(*sides).backward()
    assert bool(model.to_qkv.weight.grad.any())


def test_parameters_are_neither_registered_nor_counted_twice() -> None:
    model = network()
    orthogonality = GradientOrthogonality([*model.parameters(), model[0].weight, nn.Parameter(torch.ones(1), False)])
    assert list(orthogonality.parameters()) == [] and orthogonality.state_dict() == {}
    assert repr(orthogonality) == "GradientOrthogonality(4 parameters, gamma=1, mode='orthogonal')"


LOSS = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradientOrthogonality(LOSS), "`parameters` should be several parameters, .* found a tensor"),
        (lambda: GradientOrthogonality(network()), r"`parameters` should be parameters, .* give its `.parameters\(\)`"),
        (lambda: GradientOrthogonality(network().named_parameters()), "`parameters` should hold .* found tuple"),
        (lambda: GradientOrthogonality(None), "`parameters` should be several parameters, .* found None"),
        (lambda: GradientOrthogonality([nn.Parameter(torch.ones(0))]), "at least one that requires a gradient"),
        (lambda: rule(gamma="1e-3"), "`gamma` should be a finite number of at least 0, found '1e-3' .YAML"),
        (lambda: rule(gamma=-1.0), "`gamma` should be a finite number of at least 0, found -1.0"),
        (lambda: rule(gamma=True), "`gamma` should be a finite number of at least 0, found True"),
        (lambda: rule()(0.5, LOSS.sum()), "`generation` should be scalar losses .* found 0.5"),
        (lambda: rule()(None, LOSS.sum()), "`generation` should be scalar losses .* found None"),
        (lambda: rule()({"a": LOSS.sum()}, LOSS.sum()), "`generation` should be scalar losses .* found dict"),
        (lambda: rule()(LOSS.sum(), LOSS.sum(), at=LOSS), "`at` should be .tensors of generation, .* found a tensor"),
        (lambda: rule()(LOSS.sum(), LOSS.sum(), at=(LOSS,)), "`at` should be .tensors of generation, .* found 1"),
        (lambda: rule().project([LOSS.sum()] * 2, LOSS.sum()), "`generation` should be one scalar loss, found 2"),
        (lambda: rule().project(LOSS.sum(), LOSS.sum(), weight="1"), "`weight` should be a finite number .* found '1'"),
        (lambda: rule().project(LOSS.sum(), LOSS.sum(), weight=-1), "`weight` should be a finite number of at least 0"),
        (
            lambda: rule().project(LOSS.sum(), LOSS.sum(), others=network()),
            "`others` should be parameters, found a Seq",
        ),
        (lambda: GradientOrthogonality([nn.Parameter(LOSS.data, False)]), "at least one that requires a gradient"),
        (lambda: rule(mode="swap"), "`mode` should be one of .'orthogonal', 'align'., found 'swap'"),
        (lambda: rule()(LOSS, LOSS.sum()), r"`generation` should be scalar losses .* a tensor of shape \(2,\)"),
        (lambda: rule()(LOSS.sum(), torch.ones(())), "`reconstruction` should be .* without a graph"),
        (lambda: rule()(LOSS.sum(), [1.0]), "`reconstruction` should be scalar losses .* found 1.0"),
        (lambda: rule()([], LOSS.sum()), "`generation` should hold at least one loss, found none"),
        (lambda: rule()(LOSS.sum(), LOSS.sum(), at=([], LOSS)), "`at` should hold at least one tensor, found none"),
        (
            lambda: rule()(LOSS.sum(), LOSS.sum(), at=([LOSS, LOSS], LOSS)),
            r"`at` should hold one tensor for each loss \(1\), found 2",
        ),
        (
            lambda: rule().project(LOSS.sum(), LOSS.sum(), policy="half"),
            "`policy` should be one of .'conflict', 'full'.",
        ),
        (lambda: rule().project(LOSS, LOSS.sum()), "`generation` should be scalar losses"),
        (lambda: rule().project(LOSS.sum(), LOSS.sum().detach()), "`reconstruction` should be .* without a graph"),
        (lambda: rule().from_gradients(rows([E1]), [[torch.ones(3)]]), "of the same shapes in all micro-batches"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_two_processes_project_what_one_does() -> None:
    done = launch(WORKER, "orthogonality")
    for policy in ("conflict", "full"):
        assert f"{policy}: equal" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("scale", [1e-12, 1e-25, 1e12])
def test_gradients_of_any_size_are_projected(scale: float) -> None:
    weight = nn.Parameter(torch.zeros(2))
    generation, reconstruction = ((weight * torch.tensor(side)).sum() for side in ([scale, -scale], [0.0, scale]))
    cosine = GradientOrthogonality([weight]).project(generation, reconstruction)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad / scale, torch.tensor([1.0, 1.0]))
    assert cosine.item() == pytest.approx(-(0.5**0.5))


def test_gradients_of_two_parameters_are_two_tensors() -> None:
    weight, one, other = (nn.Parameter(torch.ones(3)) for _ in range(3))
    generation, reconstruction = weight.square().sum(), (weight + one + other).square().sum()
    GradientOrthogonality([weight]).project(generation, reconstruction, others=[one, other])
    assert one.grad is not None and one.grad is not other.grad
    torch.nn.utils.clip_grad_norm_([one, other], 1.0)
    assert torch.cat([one.grad, other.grad]).norm().item() == pytest.approx(1.0, rel=1e-3)  # type: ignore[list-item]


def test_empty_parameters_are_skipped() -> None:
    model, empty = network(), nn.Parameter(torch.ones(0, 3, dtype=torch.float64))
    expected = GradientOrthogonality(model.parameters())(losses(model), losses(model, seed=1))
    found = GradientOrthogonality([empty, *model.parameters()])(losses(model), losses(model, seed=1))
    assert torch.equal(found, expected) and found.isfinite()
    gradients = [[empty.detach(), *row] for row in rows([E1, E2])]
    assert rule().from_gradients(gradients, gradients).item() == 1.5
    with pytest.raises(ValueError, match="The gradients should hold numbers, found empty ones only"):
        rule().from_gradients([[empty]], [[empty]])
