"""Does an aggregator of TorchJD see the gradients that it should, and is our projection one of them?"""

import copy
import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.dtp.config import Config
from examples.dtp.methods import aggregator
from examples.dtp.train import trainer
from restoreloss import GradientOrthogonality, WeightedSum
from tests.helpers.processes import ROOT

pytest.importorskip("torchjd")
from torchjd.aggregation import MGDA, Constant, GradDrop, Mean, PCGrad, Sum, UPGrad
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad

from restoreloss.integrations.torchjd import Projection, ProjectionWeighting, aggregate
from tests.helpers.processes import launch

E2 = (0.0, 1.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)).to(dtype)


def losses(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64, batch: slice = slice(None)) -> Any:
    images = [normal(4, 2, 5, 5, seed=seed + k, dtype=dtype)[batch] for k in range(2)]
    return {
        "generative": (model(images[0]) - 0.5 * images[0]).square().mean(),
        "restoration": (model(images[1]) + 0.3 * images[1]).square().mean(),
    }


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def plane(one: Any, other: Any, aggregator: Any) -> list[float]:
    """The gradient written for two losses that have these gradients."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    sides = {"one": (weight * torch.tensor(one)).sum(), "other": (weight * torch.tensor(other)).sum()}
    aggregate(sides, [weight], aggregator)
    assert weight.grad is not None
    return weight.grad.tolist()


# our projection as an aggregator


@pytest.mark.parametrize(
    ("gen", "rec", "conflict", "full"),
    [
        ((1.0, -1.0), E2, (1.0, 0.0), (1.0, 0.0)),
        ((1.0, 1.0), E2, (1.0, 1.0), (1.0, 0.0)),
        ((1.0, -3.0), (0.0, 2.0), (1.0, 0.0), (1.0, 0.0)),
        ((0.0, 0.0), E2, (0.0, 0.0), (0.0, 0.0)),
        ((2.0, 1.0), (0.0, 0.0), (2.0, 1.0), (2.0, 1.0)),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_projection_of_the_closed_forms(gen: Any, rec: Any, conflict: Any, full: Any, weight: float) -> None:
    for policy, freed in (("conflict", conflict), ("full", full)):
        expected = [r + weight * g for r, g in zip(rec, freed, strict=True)]
        aggregator = Projection(policy=policy, weight=weight)  # type: ignore[arg-type]
        assert plane(gen, rec, aggregator) == pytest.approx(expected)
        assert aggregator(torch.tensor([gen, rec])).tolist() == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 999), st.sampled_from(["conflict", "full"]), st.floats(0.01, 2),
    st.sampled_from([torch.float32, torch.float64]), st.booleans(),
)  # fmt: skip
def test_it_is_that_of_gradient_orthogonality(
    seed: int, policy: Any, weight: float, dtype: torch.dtype, held: bool
) -> None:
    one, other, theirs = network(dtype), network(dtype), network(dtype)
    for p in (*one.parameters(), *other.parameters()):
        p.grad = torch.full_like(p, 0.25) if held else None
    GradientOrthogonality(one[0].parameters()).project(
        *losses(one, seed, dtype).values(), policy=policy, weight=weight, others=one[2].parameters()
    )
    own = {"restoration": other.parameters()}
    aggregator = Projection(policy=policy, weight=weight)
    aggregate(losses(other, seed, dtype), other[0].parameters(), aggregator, own=own)
    torch.testing.assert_close(gradients(other), gradients(one))
    for optimized in (False, True):  # and by TorchJD's own functions
        shared = list(theirs[0].parameters())
        theirs.zero_grad()
        backward(list(losses(theirs, seed, dtype).values()), inputs=shared)
        jac_to_grad(shared, aggregator, optimize_gramian_computation=optimized)
        for p, q in zip(shared, one[0].parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            torch.testing.assert_close(p.grad + (0.25 if held else 0), q.grad)


@pytest.mark.parametrize("policy", ["conflict", "full"])
def test_its_weighting_serves_autogram(policy: Any) -> None:
    one, other = network(), network()
    GradientOrthogonality(one.parameters()).project(*losses(one).values(), policy=policy, weight=0.7)
    engine = Engine(other[0], other[2], batch_dim=None)
    rows = torch.stack(list(losses(other).values()))
    rows.backward(ProjectionWeighting(policy=policy, weight=0.7)(engine.compute_gramian(rows)))
    torch.testing.assert_close(gradients(other), gradients(one))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tiny_and_huge_gradients_are_projected_alike(scale: float) -> None:
    rows = scale * torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    torch.testing.assert_close(Projection()(rows) / scale, torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_projected_in_single(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=dtype))
    of_gen, of_rec = torch.tensor([300.0, -300.0], dtype=dtype), torch.tensor([0.0, 300.0], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        aggregate({"gen": (weight * of_gen).sum(), "rec": (weight * of_rec).sum()}, [weight], Projection())
    assert weight.grad is not None and weight.grad.dtype == dtype  # 300 squared leaves float16
    torch.testing.assert_close(weight.grad, torch.tensor([300.0, 300.0], dtype=dtype))


def test_it_is_copied_pickled_and_named() -> None:
    aggregator = Projection(policy="full", weight=0.5)
    assert repr(aggregator) == "Projection(policy='full', weight=0.5)"
    rows = normal(2, 7)
    for other in (copy.deepcopy(aggregator), pickle.loads(pickle.dumps(aggregator))):
        assert torch.equal(other(rows), aggregator(rows))


# their aggregators


def test_pcgrad_of_two_losses_by_hand() -> None:
    # each is freed of the other: (1, -1) of (0, 1) is (1, 0), and (0, 1) of (1, -1) is (0, 1) + (1, -1) / 2
    assert plane((1.0, -1.0), E2, PCGrad()) == pytest.approx([1.5, 0.5])
    assert plane((1.0, 1.0), E2, PCGrad()) == pytest.approx([1.0, 2.0])  # no conflict: the sum


def test_mgda_of_two_losses_by_hand() -> None:
    # the shortest vector between (1, -1) and (0, 1) is at 2/5 of the way
    assert plane((1.0, -1.0), E2, MGDA()) == pytest.approx([0.4, 0.2], abs=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_upgrad_of_two_losses_by_hand(scale: float) -> None:
    pytest.importorskip("quadprog")
    from torchjd.linalg import QuadprogProjector

    gen, rec = (scale, -scale), (0.0, scale)
    # half of (1, -1) freed of (0, 1), and half of (0, 1) freed of (1, -1)
    projector = QuadprogProjector(norm_eps=1e-30, reg_eps=1e-9)
    assert plane(gen, rec, UPGrad(projector=projector)) == pytest.approx([0.75 * scale, 0.25 * scale], rel=1e-3)
    # as it comes, it is the mean of the rows where these are short: the page says so
    found = plane(gen, rec, UPGrad())
    assert found == pytest.approx([0.75 * scale, 0.25 * scale] if scale == 1 else [0.5 * scale, 0.0], rel=1e-3)


def test_the_sum_is_what_backward_writes_and_own_parameters_have_their_own_loss() -> None:
    one, other = network(), network()
    sum(losses(one).values()).backward()
    weights = aggregate(losses(other), other.parameters(), Sum())
    assert {name: float(weight) for name, weight in weights.items()} == {"generative": 1.0, "restoration": 1.0}
    torch.testing.assert_close(gradients(other), gradients(one))
    one.zero_grad(), other.zero_grad()
    losses(one)["restoration"].backward()
    aggregate(losses(other), other[0].parameters(), Constant(torch.tensor([0.0, 1.0]).double()), own={
        "restoration": [*other[0].parameters(), *other[2].parameters()]
    })  # fmt: skip
    torch.testing.assert_close(gradients(other), gradients(one))


def test_terms_of_a_weighted_sum_are_losses_by_name() -> None:
    objective = WeightedSum({"l1": nn.L1Loss(), "l2": nn.MSELoss()}, weights={"l2": 2.0})
    one, other, x = network(), network(), normal(2, 2, 4, 4)
    objective(one(x), 0.3 * x).backward()
    assert list(aggregate(objective.terms(other(x), 0.3 * x), other.parameters(), Sum())) == ["l1", "l2"]
    torch.testing.assert_close(gradients(other), gradients(one))


def test_aggregators_without_weights_write_all_the_same() -> None:
    model = network()
    assert aggregate(losses(model), model.parameters(), GradDrop()) == {}
    assert all(gradient.any() for gradient in gradients(model))


@pytest.mark.parametrize("aggregator", [Projection(), MGDA(), PCGrad()])
def test_micro_batches_give_what_the_whole_batch_gives(aggregator: Any) -> None:
    one, other = network(), network()
    aggregate(losses(one), one[0].parameters(), aggregator, own={"restoration": one[2].parameters()})
    for number, batch in enumerate((slice(0, 2), slice(2, 4)), start=1):
        halves = {name: loss / 2 for name, loss in losses(other, batch=batch).items()}
        own = {"restoration": other[2].parameters()}
        weights = aggregate(halves, other[0].parameters(), aggregator, own=own, last=number == 2)
        assert list(weights) == (["generative", "restoration"] if number == 2 else [])
    torch.testing.assert_close(gradients(other), gradients(one))
    assert not any(hasattr(p, "jac") for p in other.parameters())


def test_the_parts_of_a_gradient_do_not_share_memory() -> None:
    model = network()
    aggregate(losses(model), model.parameters(), Mean())
    assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}) == 4


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    pytest.importorskip("quadprog")
    for kind in (Projection, UPGrad):  # the latter's solver would raise
        model = network(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        for finite in (False, True):
            before = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            factor = 4.0 if finite else 1e4
            scaled = {k: scaler.scale(factor * v) for k, v in losses(model, dtype=torch.float32).items()}
            assert bool(aggregate(scaled, model.parameters(), kind())) == finite
            scaler.step(optimizer)
            scaler.update(2.0**10)
            assert torch.equal(before["0.weight"], model[0].weight) != finite


# over two processes


@pytest.mark.slow
def test_two_processes_are_one_on_the_whole_batch() -> None:
    done = launch("tests/integrations/torchjd_worker.py", timeout=300)
    for name in ("Projection", "MGDA", "PCGrad", "GradDrop"):
        assert f"{name}: equal" in done.stdout, done.stderr[-3000:]


# in the trainer of DTP


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    out = tmp_path_factory.mktemp("dtp")
    tiny = Config(
        out=out / "pretrained", method="pretrain", steps=2, save_every=1, batch=4, patch=24, train_count=16,
        test_count=2, test_size=24, cpu=True, timesteps="paper", replay_share=1.0,
    )  # fmt: skip
    trainer(tiny).run()
    return replace(tiny, method="project", pretrained=tiny.out)


def trained(config: Config, out: Path, name: Any) -> tuple[dict[str, Tensor], set[str]]:
    run = trainer(replace(config, out=out, aggregator=name))
    assert all(math.isfinite(value) for value in run.run().values())
    logged = set(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]))
    return {name: value.clone() for name, value in run.net.state_dict().items()}, logged


def test_the_trainer_takes_an_aggregator(pretrained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projected, logged = trained(pretrained, tmp_path / "project", None)
    assert "cosine" in logged
    for name in ("pcgrad", "mgda"):
        found, logged = trained(pretrained, tmp_path / name, name)
        assert {"weight_generative", "weight_restoration"} < logged
        if name == "mgda":  # without a conflict PCGrad adds, as the projection does
            assert not all(torch.equal(found[key], projected[key]) for key in found)
    monkeypatch.setattr("examples.dtp.gef.aggregator", lambda name: Projection())
    found, _ = trained(pretrained, tmp_path / "ours", "pcgrad")
    for key in found:
        torch.testing.assert_close(found[key], projected[key], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`aggregator` should be left out for 'full': it is for 'project'"):
        trained(replace(pretrained, method="full"), tmp_path / "full", "mgda")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_short_gradients_are_freed_too(name: Any) -> None:
    pytest.importorskip("quadprog")
    rows = 1e-6 * torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    # UPGrad adds (1, 0) and (0.5, 0.5); DualProj frees the sum (1, 0), which opposes neither, of nothing
    expected = {"upgrad": [1.5, 0.5], "dualproj": [1.0, 0.0]}[name]
    assert (1e6 * aggregator(name)(rows)).tolist() == pytest.approx(expected, rel=1e-2, abs=1e-3)
    opposed = 1e-6 * torch.tensor([[1.0, -3.0], [0.0, 1.0]])
    assert float(aggregator(name)(opposed) @ opposed[1]) > -1e-13  # the sum has -2e-12


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": []}, "`losses` should be a mapping of names to scalars, found list"),
        ({"losses": {}}, "`losses` should be a mapping of names to scalars, found an empty one"),
        (
            {"losses": {"a": torch.ones(2)}},
            r"scalars that depend on the parameters, found 'a': .* shape \(2,\) .*without",
        ),
        ({"losses": {"a": 1.0}}, "scalars that depend on the parameters, found 'a': 1.0"),
        ({"parameters": []}, "`parameters` should hold at least one that requires a gradient, found none"),
        (
            {"aggregator": nn.Linear(1, 1)},
            "`aggregator` should be an instance of one of torchjd.aggregation, found a Linear",
        ),
        (
            {"aggregator": UPGrad},
            "`aggregator` should be an instance of one of torchjd.aggregation, found the class UPGrad",
        ),
        ({"losses": None}, "`losses` should be a mapping of names to scalars, found None"),
        ({"parameters": network()}, r"`parameters` should be parameters, .* give its `.parameters\(\)`"),
        ({"parameters": None}, "`parameters` should be several parameters, .* found None"),
        ({"own": [nn.Linear(1, 1)]}, "`own` should be a mapping of losses to their parameters, found list"),
        ({"own": {"generative": nn.Linear(1, 1)}}, r"`own\['generative'\]` should be parameters, found a Linear"),
        ({"own": {"restorer": []}}, r"`own` should be named after losses \['generative', .*found \['restorer'\]"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    model = network()
    given = {"losses": losses(model), "parameters": model.parameters(), "aggregator": Mean(), **change}
    with pytest.raises(ValueError, match=message):
        aggregate(given["losses"], given["parameters"], given["aggregator"], own=given.get("own"))
    assert all(p.grad is None for p in model.parameters())


def test_the_wrong_number_of_rows_is_refused_and_leaves_nothing_behind() -> None:
    model = network()
    three = {**losses(model), "third": model(normal(1, 2, 4, 4)).mean()}
    with pytest.raises(ValueError, match=r"`matrix` should have two rows, .* found 3"):
        aggregate(three, model.parameters(), Projection())
    with pytest.raises(ValueError, match="should have 3 rows"):
        aggregate({k: v * 1 for k, v in losses(model).items()}, model.parameters(), Constant(torch.ones(3)))
    assert not any(hasattr(p, "jac") or p.grad is not None for p in model.parameters())
    aggregate(losses(model), model.parameters(), Mean(), last=False)
    with pytest.raises(ValueError, match="`losses` should be as many in every micro-batch, found 2 before and 1"):
        aggregate({"one": losses(model)["restoration"]}, model.parameters(), Mean())
    with pytest.raises(ValueError, match="`policy` should be one of .'conflict', 'full'., found 'half'"):
        Projection(policy="half")  # type: ignore[arg-type]
    for weight in ("1e-3", None, -1.0, True):
        with pytest.raises(ValueError, match="`weight` should be a finite number of at least 0, found"):
            Projection(weight=weight)  # type: ignore[arg-type]


def test_what_is_not_installed_is_named() -> None:
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = {"torchjd"}
sys.meta_path.insert(0, Blocked())
import torch
from restoreloss.integrations.torchjd import Projection, aggregate
from tests.helpers.processes import ROOT
for call in (Projection, lambda: aggregate({"a": torch.ones(())}, [], torch.nn.Identity())):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = launch("-c", code, processes=1)
    needs = 'needs `torchjd`, which is not installed: pip install -e ".[integrations]" in a clone of restoreloss'
    assert done.stdout.splitlines() == [f"ProjectionWeighting {needs}", f"aggregate {needs}"], done.stderr


def test_the_page_runs() -> None:
    page = (ROOT / "docs" / "integrations" / "torchjd.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    written = []
    included = (ROOT / "integrations" / "torchjd" / "train.py").read_text(encoding="utf-8")
    assert "integrations/torchjd/train.py" in page
    for snippet in (included, *re.findall(r"^```py\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)):
        if "restorer" in namespace:
            namespace["restorer"].zero_grad()
        exec(compile(snippet, "torchjd.md", "exec"), namespace)
        written.append([p.grad.clone() for p in namespace["restorer"].parameters()])
    assert len(written) == 4
    for both, once in zip(written[2], written[3], strict=True):  # project and aggregate, then the engine
        torch.testing.assert_close(both, 2 * once)
