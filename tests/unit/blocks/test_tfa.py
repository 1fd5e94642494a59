"""Are an encoder's features mixed in by Eq. (1), and is a task nothing but its prompt?"""

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from restoreloss import TFA
from restoreloss.blocks.tfa import TFALevel

SKIPS, WIDTHS, TASKS = (8, 6, 4), (5, 7, 3), ("look", "classify", "segment")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def learned(module: nn.Module) -> Any:
    """As if it had been trained: nothing is the identity any more."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(0.4 * normal(*parameter.shape, seed=number))
    return module


def adapters(tasks: Sequence[str] = TASKS, *, dtype: torch.dtype = torch.float64, **options: Any) -> TFA:
    return learned(TFA(SKIPS, WIDTHS, tasks=tasks, **options)).to(dtype)


def features(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """For each level the decoder's and the encoder's."""
    sizes = [(3, 4), (6, 8), (12, 16)]
    return [
        (normal(count, width, *size, seed=seed, dtype=dtype), normal(count, skip, *size, seed=9 - seed, dtype=dtype))
        for seed, (width, skip, size) in enumerate(zip(WIDTHS, SKIPS, sizes, strict=True))
    ]


def decode(tfa: TFA, tasks: str | Sequence[str], given: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What every level returns, the last prompt behind them."""
    prompt, results = tfa.prompt(tasks, len(given[0][0])), []
    for level, (decoded, skip) in zip(tfa.levels, given, strict=True):
        decoded, prompt = level(decoded, skip, prompt)
        results.append(decoded)
    return [*results, prompt]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gated(kind: str, value: Tensor) -> Tensor:
    return value.exp() / value.exp().sum() if kind == "softmax" else 1 / (1 + (-value).exp())


def written_out(level: TFALevel, decoded: Tensor, skip: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (1) sample by sample, in float64: three stacks of their own, and convolutions before the average."""
    level = copy.deepcopy(level).double().requires_grad_(False)
    results, prompts = [], []
    for f_dec, f_enc, before in zip(decoded.double(), skip.double(), prompt.double(), strict=True):

        def theta(part: int, f_enc: Tensor = f_enc) -> Tensor:
            first, second = (
                [value.chunk(3)[part] for value in (conv.weight, conv.bias)] for conv in (level.see, level.tell)
            )
            x = gelu(F.conv2d(F.instance_norm(f_enc[None]), *first, padding=1))
            return F.conv2d(x, *second, padding=1)[0].mean(dim=(1, 2))

        f, i, c = gated(level.gate, theta(0)), gated(level.gate, theta(1)), torch.tanh(theta(2))
        cell = f * before + i * c
        o = torch.tanh(level.out_gate.weight @ cell + level.out_gate.bias)
        inner = o[:, None, None] * F.conv2d(f_enc[None], level.squeeze.weight, level.squeeze.bias)[0]
        f_enc = f_enc + F.conv2d(inner[None], level.unsqueeze.weight, level.unsqueeze.bias)[0]
        both = torch.cat([f_dec, f_enc])[None]
        results.append(f_dec + F.conv2d(both, level.merge.weight, level.merge.bias)[0])
        following = level.to_next
        prompts.append(cell if following is None else gelu(following.weight @ cell + following.bias))
    return torch.stack(results), torch.stack(prompts)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda size: size != (1, 1)),
    st.one_of(st.none(), st.integers(1, 4)),
    st.sampled_from(["softmax", "sigmoid"]),
)
def test_a_level_computes_equation_one(
    shape: tuple[int, int, int], size: tuple[int, int], following: int | None, gate: str
) -> None:
    count, skip, channels = shape
    level = learned(TFALevel(skip, channels, following, gate=gate)).double()
    given_to = [normal(count, n, *at, seed=n, dtype=torch.float64) for n, at in ((channels, size), (skip, size))]
    prompt = normal(count, skip, seed=7, dtype=torch.float64)
    for found, expected in zip(level(*given_to, prompt), written_out(level, *given_to, prompt), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_prompt_passes_from_level_to_level(gate: str) -> None:
    tfa, given_to = adapters(gate=gate), features(3)
    prompt = torch.stack([tfa.prompts[task] for task in TASKS])
    found = decode(tfa, TASKS, given_to)
    for level, pair, result in zip(tfa.levels, given_to, found, strict=False):
        expected, prompt = written_out(level, *pair, prompt)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[-1], prompt, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_decoder_computes_what_it_did_until_the_adapters_have_learned(dtype: torch.dtype) -> None:
    tfa, given_to = TFA(SKIPS, WIDTHS, tasks=TASKS).to(dtype), features(3, dtype)
    *found, _ = decode(tfa, TASKS, given_to)
    sum(result.float().square().mean() for result in found).backward()
    for (decoded, _), result, level in zip(given_to, found, tfa.levels, strict=True):
        assert torch.equal(result, decoded) and result.dtype == dtype
        assert bool(level.merge.weight.grad.any()) and bool(level.merge.bias.grad.any())


def test_tasks_in_one_batch_are_each_task_alone() -> None:
    tfa, given_to = adapters(), features(3)
    together = decode(tfa, TASKS, given_to)
    for n, task in enumerate(TASKS):
        alone = decode(tfa, task, [(decoded[n : n + 1], skip[n : n + 1]) for decoded, skip in given_to])
        for one, found in zip(alone, together, strict=True):
            torch.testing.assert_close(one, found[n : n + 1])
    again = decode(tfa, "look", given_to)[0]
    assert torch.allclose(again[0], together[0][0]) and not torch.allclose(again[1], together[0][1])


def test_one_name_is_for_all_pictures() -> None:
    tfa = adapters()
    assert torch.equal(tfa.prompt("look"), tfa.prompts["look"][None])
    assert torch.equal(tfa.prompt("look", 3), tfa.prompt(["look"] * 3))
    assert torch.equal(tfa.prompt(["segment", "look"], 2)[0], tfa.prompts["segment"])
    tfa.prompt(["look", "segment", "look"]).sum().backward()
    assert [float(p.grad.sum()) if p.grad is not None else 0 for p in tfa.prompts.values()] == [16, 0, 8]


@pytest.mark.parametrize("like", [None, "classify"])
def test_a_new_task_is_trained_and_all_others_go_on_to_the_bit_as_before(like: str | None) -> None:
    tfa, given_to = adapters(dtype=torch.float32), features(3, torch.float32)
    state, before = copy.deepcopy(tfa.state_dict()), decode(tfa, TASKS, given_to)
    prompt = tfa.add_task("detect", like=like)
    assert prompt is tfa.prompts["detect"] and tfa.tasks == (*TASKS, "detect")
    assert torch.equal(prompt, torch.zeros(8) if like is None else tfa.prompts[like])
    assert all(torch.equal(one, two) for one, two in zip(decode(tfa, TASKS, given_to), before, strict=True))

    start, optimizer, losses = prompt.detach().clone(), torch.optim.Adam([prompt], lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = sum(result.square().mean() for result in decode(tfa, "detect", given_to))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(prompt, start)
    assert all(torch.equal(one, two) for one, two in zip(decode(tfa, TASKS, given_to), before, strict=True))
    after = tfa.state_dict()
    assert set(after) - set(state) == {"prompts.detect"}
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize("like", [None, "look"])
def test_where_all_else_is_frozen_a_new_prompt_alone_learns(like: str | None) -> None:
    tfa = adapters().requires_grad_(False)
    tfa.add_task("detect", like=like)
    sum(result.square().mean() for result in decode(tfa, "detect", features(2))[:-1]).backward()
    assert [name for name, p in tfa.named_parameters() if p.requires_grad] == ["prompts.detect"]
    assert bool(tfa.prompts["detect"].grad.any())


def test_a_task_that_begins_like_another_is_on_its_own() -> None:
    tfa = adapters()
    prompt, expected = tfa.add_task("detect", like="look"), tfa.prompts["look"].detach().clone()
    nn.init.zeros_(prompt)
    assert torch.equal(tfa.prompts["look"], expected) and prompt.requires_grad


def test_a_prompt_has_the_dtype_and_the_device_of_the_adapters() -> None:
    tfa = TFA(SKIPS, WIDTHS).to(torch.bfloat16)
    assert tfa.tasks == () and tfa.add_task("look").dtype == torch.bfloat16
    assert TFA(SKIPS, WIDTHS).to("meta").add_task("look").device.type == "meta"


def test_prompts_are_parameters_and_kept_with_the_weights() -> None:
    tfa = adapters()
    assert {f"prompts.{task}" for task in TASKS} < set(tfa.state_dict())
    assert {id(p) for p in tfa.prompts.values()} < {id(p) for p in tfa.parameters()}
    other = TFA(SKIPS, WIDTHS, tasks=TASKS).double()
    other.load_state_dict(tfa.state_dict())
    pairs = zip(decode(tfa, TASKS, features(3)), decode(other, TASKS, features(3)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_prompts_that_were_trained_elsewhere_are_loaded() -> None:
    tfa = adapters()
    held, classify = tfa.prompts["look"], tfa.prompts["classify"].detach().clone()
    tfa.load_prompts({"look": normal(8, seed=1), "detect": normal(8, seed=2)})
    assert tfa.tasks == (*TASKS, "detect") and tfa.prompts["look"] is held
    assert torch.equal(held.float(), normal(8, seed=1)) and torch.equal(
        tfa.prompts["detect"].float(), normal(8, seed=2)
    )
    assert torch.equal(tfa.prompts["classify"], classify) and held.dtype == tfa.prompts["detect"].dtype == torch.float64
    other = adapters(())
    other.load_prompts(tfa.prompts)
    assert other.tasks == tfa.tasks and all(torch.equal(other.prompts[task], tfa.prompts[task]) for task in tfa.tasks)
    assert other.prompts["look"] is not held and other.prompts["look"].requires_grad


def test_of_prompts_of_another_width_none_is_loaded() -> None:
    tfa = adapters()
    state = copy.deepcopy(tfa.state_dict())
    with pytest.raises(ValueError, match=r"`prompts\['detect'\]` should be \(8,\), found \(6,\)"):
        tfa.load_prompts({"look": torch.ones(8), "new": torch.ones(8), "detect": torch.ones(6)})
    assert tfa.tasks == TASKS and all(torch.equal(value, state[name]) for name, value in tfa.state_dict().items())


def test_the_default_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        tfa = TFA(tasks=TASKS)
    formula = 3 * 512
    for skip, following in ((512, 256), (256, 128), (128, None)):
        theta = 2 * skip * (9 * skip + 1)
        formula += 3 * theta + (skip + 1) * skip + 2 * (skip + 1) * skip + (512 + skip + 1) * 512
        formula += 0 if following is None else (skip + 1) * following
    count = sum(p.numel() for p in tfa.parameters())
    assert count == formula == 21_032_192 and f"{count / 1e6:.2f}" == "21.03"  # Table 5
    assert {level.gate for level in tfa.levels} == {"softmax"}
    assert tfa.add_task("detect").numel() == 512 and tfa.prompts["detect"].device.type == "meta"


def test_the_gradient_reaches_prompts_as_soon_as_the_last_layer_is_not_zero() -> None:
    tfa, given_to = TFA(SKIPS, WIDTHS, tasks=TASKS).double(), features(2)
    for expected in (False, True):
        tfa.zero_grad()
        sum(result.square().mean() for result in decode(tfa, ["look", "segment"], given_to)[:-1]).backward()
        reached = [prompt.grad is not None and bool(prompt.grad.any()) for prompt in tfa.prompts.values()]
        assert reached == [expected, False, expected]
        with torch.no_grad():
            for level in tfa.levels:
                level.merge.weight -= 0.1 * level.merge.weight.grad


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_gradient_reaches_the_features_and_every_parameter(gate: str) -> None:
    tfa = adapters(gate=gate)
    given_to = [(decoded.requires_grad_(), skip.requires_grad_()) for decoded, skip in features(3)]
    sum(result.square().mean() for result in decode(tfa, TASKS, given_to)[:-1]).backward()
    for value in (*tfa.parameters(), *sum(given_to, ())):
        assert value.grad is not None and bool(value.grad.any()) and value.grad.isfinite().all()


@pytest.mark.parametrize("channels", [8, 32, 128])
def test_a_softmax_gate_shrinks_the_reach_of_a_prompt_by_half_the_channels(channels: int) -> None:
    # f is 1 / C where a fresh sigmoid is 1 / 2, at the first level and in all that follows from it: with the 512
    # channels of the paper a prompt moves the decoder 256 times less
    reach = {}
    for gate in ("softmax", "sigmoid"):
        torch.manual_seed(0)
        tfa = TFA((channels, channels // 2), 4, tasks=["look"], gate=gate)
        pairs = [(normal(2, 4, 3, 3), normal(2, skip, 3, 3)) for skip in (channels, channels // 2)]
        for level in tfa.levels:
            nn.init.ones_(level.merge.weight)
        sum(result.square().mean() for result in decode(tfa, "look", pairs)[:-1]).backward()
        reach[gate] = float(tfa.prompts["look"].grad.norm())
    assert reach["sigmoid"] / reach["softmax"] == pytest.approx(channels / 2, rel=0.1)


def test_the_gradient_is_that_of_finite_differences() -> None:
    level = learned(TFALevel(3, 2, 2)).double()
    names, values = zip(*level.named_parameters(), strict=True)

    def run(decoded: Tensor, skip: Tensor, prompt: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(level, dict(zip(names, parameters, strict=True)), (decoded, skip, prompt))

    given_to = [normal(2, *shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 2), (3, 3, 2), (3,))]
    assert torch.autograd.gradcheck(run, (*given_to, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*given_to, *values), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_half_precision_and_autocast_give_nearly_the_same(gate: str, dtype: torch.dtype) -> None:
    tfa, given_to = adapters(gate=gate, dtype=torch.float32), features(3, torch.float32)
    expected = [result.detach() for result in decode(tfa, TASKS, given_to)]
    with torch.autocast("cpu", dtype):
        cast = decode(tfa, TASKS, given_to)
    half = decode(tfa.to(dtype), TASKS, features(3, dtype))
    assert all(result.dtype == dtype for result in half)
    for found in (cast, half):
        for result, value in zip(found, expected, strict=True):
            scale = float(value.abs().max())
            torch.testing.assert_close(result.float() / scale, value / scale, rtol=0.05, atol=0.05)
    sum(result.float().square().mean() for result in half[:-1]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tfa.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1.0, -30.0])
def test_constant_features_have_finite_gradients(value: float, dtype: torch.dtype) -> None:
    tfa = adapters(dtype=dtype)
    given_to = [tuple(torch.full_like(x, value).requires_grad_() for x in pair) for pair in features(3, dtype)]
    *found, _ = decode(tfa, TASKS, given_to)
    sum(result.float().square().mean() for result in found).backward()
    assert all(result.isfinite().all() for result in found)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (*sum(given_to, ()), *tfa.parameters()))


def test_the_average_over_a_large_picture_does_not_overflow_in_half_precision() -> None:
    level = learned(TFALevel(3, 2, None, gate="sigmoid"))
    nn.init.constant_(level.see.bias, 2.0)
    decoded, skip, prompt = normal(1, 2, 260, 260), normal(1, 3, 260, 260), normal(1, 3)
    seen = F.gelu(level.see(level.norm(skip)))
    assert seen.sum(dim=(2, 3)).max() > torch.finfo(torch.float16).max
    expected = level(decoded, skip, prompt)
    for found, value in zip(level.half()(decoded.half(), skip.half(), prompt.half()), expected, strict=True):
        torch.testing.assert_close(found.float(), value, rtol=0.02, atol=0.02)


def test_a_picture_of_one_pixel_has_no_instance_norm() -> None:
    level = TFALevel(3, 2, None)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        level(torch.rand(2, 2, 1, 1), torch.rand(2, 3, 1, 1), torch.rand(2, 3))
    level(torch.rand(2, 2, 1, 2), torch.rand(2, 3, 1, 2), torch.rand(2, 3))


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_computes_the_same_and_is_on_its_own(duplicate: Callable[[Any], Any]) -> None:
    tfa, given_to = adapters(), features(3)
    again, expected = duplicate(tfa), decode(tfa, TASKS, given_to)
    assert all(torch.equal(*pair) for pair in zip(decode(again, TASKS, given_to), expected, strict=True))
    again.add_task("detect")
    nn.init.zeros_(again.prompts["look"])
    assert tfa.tasks == TASKS and torch.equal(decode(tfa, TASKS, given_to)[0], expected[0])


def test_compiled_adapters_compute_the_same() -> None:
    tfa, given_to = adapters(dtype=torch.float32), features(3, torch.float32)

    def run(decoded: Tensor, skip: Tensor) -> Tensor:
        result: Tensor = tfa.levels[0](decoded, skip, tfa.prompt(TASKS))[0]
        return result

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given_to[0]), run(*given_to[0]), rtol=1e-4, atol=1e-4)
    compiled(*given_to[0]).square().mean().backward()
    assert all(prompt.grad is not None and bool(prompt.grad.any()) for prompt in tfa.prompts.values())


def call(*shapes: tuple[int, ...]) -> Any:
    return TFALevel(3, 2, None)(*(torch.rand(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: TFA(()), r"`channels` should be one number for each of `skips` \(\), found 512"),
        (lambda: TFA((4, 2), (8,)), r"each of `skips` \(4, 2\), found \(8,\)"),
        (lambda: TFA((4, 2), gate="relu"), "`gate` should be one of .'softmax', 'sigmoid'., found 'relu'"),
        (lambda: TFA((4,), tasks=["look", "look"]), "`tasks` should be a new task, found 'look', .* one of look"),
        (lambda: adapters().add_task("segment"), "found 'segment', which is one of look, classify, segment"),
        (lambda: adapters().add_task("a.b"), "`name` should be .* found 'a.b'"),
        (lambda: adapters().add_task(""), "`name` should be .* found ''"),
        (lambda: adapters().add_task("new", like="old"), "one of look, classify, segment, found 'old'"),
        (lambda: adapters().prompt("old"), "`tasks` should be one of look, classify, segment, found 'old'"),
        (lambda: adapters(()).prompt("old"), "`tasks` should be one of none yet, found 'old'"),
        (lambda: adapters().prompt(["look", "old"]), "one of look, classify, segment, found 'old'"),
        (lambda: adapters().prompt(["look", "look"], 3), "one for each of 3 images, found 2"),
        (lambda: adapters().prompt([]), "`tasks` should name one for each .* found 0"),
        (lambda: call((1, 2, 4, 4), (1, 3, 4, 5), (1, 3)), r"`skip` \(1, 3, 4, 5\), found \(1, 2, 4, 4\)"),
        (lambda: call((1, 2, 4, 4), (1, 3, 4, 4), (1, 2)), r"`skip` \(1, 3, 4, 4\), found .* and \(1, 2\)"),
        (lambda: call((2, 2, 4, 4), (2, 3, 4, 4), (1, 3)), r"found .* and \(1, 3\)"),
        (lambda: call((2, 2, 4, 4), (2, 3, 4, 4), (3,)), r"found .* and \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(fail: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fail()


@pytest.mark.parametrize("name", ["look", "a.b", "", "keys", "train", "training"])
def test_what_is_refused_changes_nothing(name: str) -> None:
    tfa = adapters()
    state = tfa.state_dict()
    with pytest.raises(ValueError, match="`name` should be"):
        tfa.add_task(name)
    with pytest.raises(ValueError, match="found 'old'"):
        tfa.add_task("new", like="old")
    assert tfa.tasks == TASKS and set(tfa.state_dict()) == set(state) and tfa.eval().prompts.training is False


def test_one_string_is_no_list_of_tasks() -> None:
    with pytest.raises(ValueError, match="list of names, found the string 'ir'"):
        TFA([8, 4], 8, tasks="ir")
