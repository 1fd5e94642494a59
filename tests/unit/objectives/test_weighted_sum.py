import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from restoreloss import DiffLoss, Objective, WeightedSum


def pair(shape=(2, 3, 5, 4), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


class Gradients(Objective):
    def terms(self, restored, target):
        d = restored - target
        return {"x": d.diff(dim=3).abs().mean(), "y": 2 * d.diff(dim=2).abs().mean()}


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("offset", torch.tensor(0.5))

    def forward(self, restored, target):
        return self.scale * (restored - target).square().mean() + self.offset


class Noisy(nn.Module):
    def forward(self, restored, target, generator=None):
        noise = torch.randn(restored.shape, generator=generator)
        return ((restored - target) * noise).square().mean()


def noisy_function(restored, target, *, generator=None):
    return Noisy()(restored, target, generator)


class NoisyTerms(Objective):
    def terms(self, restored, target, *, generator=None):
        return {"noisy": Noisy()(restored, target, generator)}


class Prior(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x_t, t):
        return self.network(x_t)


def scale_and_mean(x_t, t):
    return 0.5 * x_t, x_t.mean(dim=(2, 3))


def never(restored, target):
    raise AssertionError("this objective has weight 0")


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=30, deadline=None)
@given(
    weights=st.tuples(*[st.floats(-5, 5).filter(lambda w: abs(w) > 1e-3)] * 3),
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_are_those_of_the_sum_written_by_hand(weights, shape, seed):
    restored, target = pair(shape, seed, torch.float64)
    names = ("l1", "l2", "cubes")

    def cubes(z, x):
        return (z - x).pow(3).mean()

    restored.requires_grad_()
    found = WeightedSum(
        dict(zip(names, (nn.L1Loss(), F.mse_loss, cubes), strict=True)), dict(zip(names, weights, strict=True))
    )(restored, target)
    found.backward()
    d, n = (restored - target).detach(), restored.numel()
    value = math.fsum((weights[0] * abs(e) + weights[1] * e**2 + weights[2] * e**3) / n for e in d.flatten().tolist())
    assert float(found.detach()) == pytest.approx(value, rel=1e-10, abs=1e-12)
    gradient = (weights[0] * d.sign() + weights[1] * 2 * d + weights[2] * 3 * d.square()) / n
    torch.testing.assert_close(restored.grad, gradient, rtol=1e-10, atol=1e-12)


def test_absent_weight_is_one():
    restored, target = pair()
    loss = WeightedSum({"l1": nn.L1Loss(), "l2": nn.MSELoss()}, {"l2": 0.25})
    assert loss.weights == {"l1": 1.0, "l2": 0.25}
    torch.testing.assert_close(loss(restored, target), F.l1_loss(restored, target) + F.mse_loss(restored, target) / 4)


def test_terms_of_an_objective_are_prefixed_and_weighted():
    restored, target = pair()
    loss = WeightedSum({"pixel": nn.L1Loss(), "edges": Gradients()}, {"edges": 0.1})
    terms, edges = loss.terms(restored, target), Gradients().terms(restored, target)
    assert list(terms) == ["pixel", "edges/x", "edges/y"]
    torch.testing.assert_close(terms["pixel"], F.l1_loss(restored, target))
    torch.testing.assert_close(terms["edges/x"], 0.1 * edges["x"])
    torch.testing.assert_close(terms["edges/y"], 0.1 * edges["y"])


def test_nested_sums_multiply_weights_and_join_names():
    restored, target = pair()
    inner = WeightedSum({"l1": nn.L1Loss(), "edges": Gradients()}, {"l1": 2, "edges": 3})
    terms = WeightedSum({"inner": inner, "l2": F.mse_loss}, {"inner": 0.5}).terms(restored, target)
    assert list(terms) == ["inner/l1", "inner/edges/x", "inner/edges/y", "l2"]
    torch.testing.assert_close(terms["inner/l1"], 0.5 * 2 * F.l1_loss(restored, target))
    torch.testing.assert_close(terms["inner/edges/y"], 0.5 * 3 * Gradients().terms(restored, target)["y"])


def test_terms_sum_to_the_call():
    restored, target = pair()
    loss = WeightedSum(
        {"pixel": nn.L1Loss(), "edges": Gradients(), "diff": DiffLoss(scale_and_mean)}, {"edges": 0.3, "diff": 1e-2}
    )
    terms = loss.terms(restored, target, generator=torch.Generator().manual_seed(1))
    assert list(terms) == ["pixel", "edges/x", "edges/y", "diff/noise", "diff/h_space"]
    torch.testing.assert_close(
        sum(terms.values()), loss(restored, target, generator=torch.Generator().manual_seed(1)), rtol=0, atol=0
    )


def test_custom_objective_of_a_few_lines_sums_its_terms():
    restored, target = pair(dtype=torch.float64)
    d = restored - target
    expected = (d[..., 1:] - d[..., :-1]).abs().mean() + 2 * (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    torch.testing.assert_close(Gradients()(restored, target), expected)
    torch.testing.assert_close(WeightedSum({"edges": Gradients()}, {"edges": 4})(restored, target), 4 * expected)


def test_objective_without_terms_cannot_be_made():
    class Unfinished(Objective):
        pass

    with pytest.raises(TypeError, match="terms"):
        Unfinished()


def test_weight_zero_is_not_computed():
    restored, target = pair()
    loss = WeightedSum({"l1": nn.L1Loss(), "never": never}, {"never": 0})
    assert list(loss.terms(restored, target)) == ["l1"]
    assert torch.equal(loss(restored, target), F.l1_loss(restored, target))


def test_per_sample_objectives_sum_per_sample():
    restored, target = pair(dtype=torch.float64)

    def per_sample(z, x):
        return (z - x).square().flatten(1).mean(dim=1)

    diff = DiffLoss(lambda x_t, t: 0.5 * x_t, torch.tensor([0.25]), h_space_weight=0, reduction="none")
    found = WeightedSum({"l2": per_sample, "diff": diff}, {"diff": 0.1})(restored, target)
    # d/dz of the denoiser's input is 2 (to [-1, 1]) times sqrt(0.25), and the denoiser halves it
    torch.testing.assert_close(found, (1 + 0.1 * 0.25) * per_sample(restored, target))


@pytest.mark.parametrize(
    ("objectives", "weights", "message"),
    [
        ({}, None, "`objectives` should name at least one objective, found none"),
        ({"l1": F.l1_loss}, {"l2": 1.0}, r"named after objectives \['l1'\], found \['l2'\]"),
        ({"a/b": F.l1_loss}, None, "without '/' and '.', found 'a/b'"),
        ({"a.b": F.l1_loss}, None, "without '/' and '.', found 'a.b'"),
        ({"": F.l1_loss}, None, "without '/' and '.', found ''"),
        ({1: F.l1_loss}, None, "without '/' and '.', found 1"),
        ({"l1": 0.5}, None, r"`objectives\['l1'\]` should be callable as .*, found 0.5"),
        ({"l1": F.l1_loss}, {"l1": math.nan}, "found nan"),
        ({"l1": F.l1_loss}, {"l1": math.inf}, "found inf"),
        ({"l1": F.l1_loss, "l2": F.mse_loss}, {"l1": 0, "l2": 0}, "other than 0, found {'l1': 0, 'l2': 0}"),
    ],
)
def test_bad_construction_is_refused_with_what_was_found(objectives, weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum(objectives, weights)


def test_objectives_of_different_reductions_are_refused_with_their_shapes():
    loss = WeightedSum({"mean": nn.L1Loss(), "none": lambda a, b: (a - b).mean(dim=(1, 2, 3))})
    with pytest.raises(ValueError, match=r"the same `reduction`.*'mean': \(\), 'none': \(2,\)"):
        loss(*pair())
    with pytest.raises(ValueError, match=r"'none' should return a scalar, or one value .*\(2, 3, 5, 4\)"):
        WeightedSum({"none": nn.L1Loss(reduction="none")})(*pair())


def test_objective_that_returns_no_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match="Objective 'item' should return a tensor, found 0"):
        WeightedSum({"l1": nn.L1Loss(), "item": lambda z, x: F.l1_loss(z, x).item()})(*pair())


@pytest.mark.parametrize("name", ["train", "type", "forward", "weights", "terms", "objectives", "to", "training", "_x"])
@pytest.mark.parametrize("objective", [F.l1_loss, nn.L1Loss()], ids=["function", "module"])
def test_names_of_module_attributes_are_free(name, objective):
    restored, target = pair()
    loss = WeightedSum({name: objective, "l2": nn.MSELoss()}).train().to(torch.float64).eval()
    assert list(loss.terms(restored, target)) == [name, "l2"]
    torch.testing.assert_close(loss(restored, target), F.l1_loss(restored, target) + F.mse_loss(restored, target))


def test_callable_that_is_falsy_is_an_objective_like_any_other():
    class History:
        def __init__(self):
            self.values = []

        def __len__(self):
            return len(self.values)

        def __call__(self, restored, target):
            self.values.append(F.l1_loss(restored, target))
            return self.values[-1]

    restored, target = pair()
    assert torch.equal(WeightedSum({"history": History()})(restored, target), F.l1_loss(restored, target))


def test_objectives_keep_their_order_and_identity():
    modules = {"b": nn.L1Loss(), "f": F.mse_loss, "a": Gradients()}
    found = WeightedSum(modules).objectives
    assert list(found) == ["b", "f", "a"]
    assert all(found[name] is modules[name] for name in modules)


def test_parameters_of_a_learned_objective_are_trained():
    restored, target = pair()
    learned = Learned()
    loss = WeightedSum({"l1": nn.L1Loss(), "learned": learned}, {"learned": 0.5})
    assert [each is learned.scale for each in loss.parameters()] == [True]
    loss(restored, target).backward()
    torch.testing.assert_close(learned.scale.grad, 0.5 * F.mse_loss(restored, target))


def test_parameters_of_a_learned_objective_are_saved():
    trained, fresh = (WeightedSum({"learned": Learned()}) for _ in range(2))
    with torch.no_grad():
        trained.objectives["learned"].scale.fill_(7)
    fresh.load_state_dict(saved_and_loaded(trained.state_dict()))
    restored, target = pair()
    torch.testing.assert_close(fresh(restored, target), 7 * F.mse_loss(restored, target) + 0.5)


def test_diffloss_inside_stays_hidden_and_frozen():
    network = nn.Conv2d(3, 3, 1)
    loss = WeightedSum({"l1": nn.L1Loss(), "diff": DiffLoss(Prior(network), h_space_weight=0)})
    loss.train().requires_grad_(True)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    restored, target = pair()
    loss(restored.requires_grad_(), target).backward()
    assert restored.grad.abs().min() > 0
    assert network.weight.grad is None
    assert not network.weight.requires_grad
    assert not network.training


def test_dtype_reaches_the_modules_hidden_ones_too():
    network, learned = nn.Conv2d(3, 3, 1), Learned()
    loss = WeightedSum({"learned": learned, "diff": DiffLoss(Prior(network), h_space_weight=0)})
    loss.to(torch.float64)
    assert {learned.scale.dtype, learned.offset.dtype, network.weight.dtype} == {torch.float64}
    assert loss(*pair(dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["deepcopy", "pickle"]
)
def test_copy_gives_the_same_value_and_shares_nothing(copied):
    network = nn.Conv2d(3, 3, 1)
    original = WeightedSum(
        {"l1": nn.L1Loss(), "learned": Learned(), "diff": DiffLoss(Prior(network), h_space_weight=0)},
        {"l1": 2, "diff": 0.1},
    )
    other = copied(original)
    restored, target = pair()
    values = [loss(restored, target, generator=torch.Generator().manual_seed(3)) for loss in (original, other)]
    assert torch.equal(*values)
    with torch.no_grad():
        original.objectives["learned"].scale.zero_()
        network.weight.zero_()
    assert torch.equal(other(restored, target, generator=torch.Generator().manual_seed(3)), values[1])
    assert list(other.state_dict()) == list(original.state_dict())


def test_generator_is_handed_on_in_order_to_those_that_take_one():
    restored, target = pair()
    objectives = {"plain": F.l1_loss, "function": noisy_function, "module": Noisy(), "terms": NoisyTerms()}
    loss = WeightedSum({**objectives, "nested": WeightedSum({"inner": Noisy()})})
    found = loss.terms(restored, target, generator=torch.Generator().manual_seed(5))
    generator, d = torch.Generator().manual_seed(5), restored - target
    for name in ("function", "module", "terms/noisy", "nested/inner"):
        expected = (d * torch.randn(d.shape, generator=generator)).square().mean()
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)
    torch.testing.assert_close(found["plain"], d.abs().mean())


def test_same_generator_seed_gives_the_same_value_and_leaves_the_global_state():
    restored, target = pair()
    loss = WeightedSum({"l1": nn.L1Loss(), "noisy": Noisy(), "diff": DiffLoss(scale_and_mean)})
    before = torch.get_rng_state()
    values = [float(loss(restored, target, generator=torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert values[0] == values[1] != values[2]


def test_builtin_without_a_signature_takes_no_generator():
    restored, target = pair()
    found = WeightedSum({"distance": torch.dist})(restored, target, generator=torch.Generator())
    torch.testing.assert_close(found, (restored - target).square().sum().sqrt())


def test_repr_lists_weights_names_and_objectives():
    inner = WeightedSum({"l1": nn.L1Loss()}, {"l1": 3})
    assert repr(WeightedSum({"l2": nn.MSELoss(), "inner": inner}, {"l2": 1e-3})) == (
        "WeightedSum(\n  0.001 * l2: MSELoss()\n  1 * inner: WeightedSum(\n    3 * l1: L1Loss()\n  )\n)"
    )


def test_a_compiled_objective_runs_compiled():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(DiffLoss(lambda x_t, t: (x_t, x_t)), backend=backend)
    terms = WeightedSum({"diff": compiled}).terms(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))
    assert list(terms) == ["diff"]
    assert graphs


def test_an_attribute_named_terms_that_is_no_method_does_not_matter():
    class Listed(torch.nn.L1Loss):
        terms = ("l1",)

    z, x = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    assert list(WeightedSum({"listed": Listed()}).terms(z, x)) == ["listed"]


@pytest.mark.parametrize("objectives", [[torch.nn.L1Loss()], torch.nn.L1Loss()])
def test_objectives_without_names_are_refused(objectives):
    with pytest.raises(ValueError, match="mapping by name"):
        WeightedSum(objectives)


@pytest.mark.parametrize("generator", [0, "ab", [0, 1], [torch.Generator()], iter([torch.Generator()] * 2)])
def test_wrong_generators_are_refused_also_where_nothing_draws(generator):
    with pytest.raises(ValueError, match="`generator` should be"):
        WeightedSum({"pixel": nn.L1Loss()})(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), generator=generator)


def test_a_metric_of_which_more_is_better_is_refused():
    metrics = pytest.importorskip("torchmetrics.image")
    with pytest.raises(ValueError, match=r"`objectives\['ssim'\]` should be less where images are better"):
        WeightedSum({"pixel": nn.L1Loss(), "ssim": metrics.StructuralSimilarityIndexMeasure(data_range=1.0)})
    similarity = metrics.StructuralSimilarityIndexMeasure(data_range=1.0)
    loss = WeightedSum({"pixel": nn.L1Loss(), "ssim": similarity}, weights={"ssim": -0.1})
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(loss(image, image), torch.tensor(-0.1))
    WeightedSum({"pixel": nn.L1Loss(), "distortion": metrics.SpectralAngleMapper()})
    quality = nn.MSELoss()
    quality.lower_better = False
    with pytest.raises(ValueError, match="of which more is better"):
        WeightedSum({"quality": quality})
    with pytest.raises(ValueError, match="a `WeightedSum` takes it with a weight below 0"):
        WeightedSum({"pixel": nn.L1Loss(), "quality": quality}, shares={"quality": 0.5})
    loss = WeightedSum({"pixel": nn.L1Loss(), "quality": quality}, weights={"quality": -1.0})
    loss.weights["quality"] = 1.0
    with pytest.raises(ValueError, match="of which more is better"):
        loss(image, image)
    quality.lower_better = True
    with pytest.raises(
        ValueError, match="should be more where images are better, to be weighed by -1, found a MSELoss"
    ):
        WeightedSum({"pixel": nn.L1Loss(), "quality": quality}, weights={"quality": -1.0})
