"""What blocks refuse: numbers that are none, maps of another layout, and timesteps outside of the table."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from restoreloss import (
    CFRM,
    TFA,
    Controller,
    FiLM,
    ParameterImportance,
    SCTuner,
    TimeConditioned,
    TimeMoE,
    WaveletColorFix,
)  # fmt: skip
from restoreloss.blocks.tfa import TFALevel
from restoreloss.blocks.time_conditioned import channels_of


def features(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 1))


def timed(**options: Any) -> TimeConditioned:
    return TimeConditioned(network(), {"0": FiLM(8), "1": TimeMoE(8, experts=2)}, **options)


def controller(**options: Any) -> Controller:
    pytest.importorskip("diffusers")
    given: dict[str, Any] = {"channels": 8, "multipliers": (1, 2), "control_channels": 8, "heads": 2, "groups": 4}
    return Controller(4, **{**given, **options})


CFRM_8: dict[str, Any] = {"channels": 8, "blocks": 0, "groups": 4}
NUMBERS: list[tuple[str, Any, dict[str, Any]]] = [
    ("channels", CFRM, CFRM_8),
    ("groups", CFRM, CFRM_8),
    ("expansion", CFRM, CFRM_8),
    ("channels", SCTuner, {"channels": 8, "control_channels": 4}),
    ("control_channels", SCTuner, {"channels": 8, "control_channels": 4}),
    ("hidden", SCTuner, {"channels": 8, "control_channels": 4}),
    ("channels", FiLM, {"channels": 8}),
    ("time_dim", FiLM, {"channels": 8}),
    ("channels", TimeMoE, {"channels": 8}),
    ("time_dim", TimeMoE, {"channels": 8}),
    ("experts", TimeMoE, {"channels": 8}),
    ("top_k", TimeMoE, {"channels": 8}),
    ("num_timesteps", timed, {}),
    ("time_dim", timed, {}),
    ("channels", TFA, {"skips": [8, 4], "channels": [4, 4]}),
    ("skip", TFALevel, {"skip": 4, "channels": 4, "following": None}),
    ("channels", TFALevel, {"skip": 4, "channels": 4, "following": None}),
    ("following", TFALevel, {"skip": 4, "channels": 4, "following": 2}),
    ("levels", WaveletColorFix, {}),
    ("channels", controller, {}),
    ("control_channels", controller, {}),
    ("layers", controller, {}),
    ("heads", controller, {}),
    ("groups", controller, {}),
]


@pytest.mark.parametrize("value", [0, -4, "8", 2.5, True])
@pytest.mark.parametrize(("name", "build", "options"), NUMBERS)
def test_a_width_is_a_whole_number_of_at_least_one(name: str, build: Any, options: dict[str, Any], value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should be (a )?whole number.*found"):
        build(**{**options, name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: CFRM(8, blocks=0, groups=4)(features(1, 5, 6, 8)),
            r"`features` should be float \(N, 8, H, W\), found a",
        ),
        (lambda: CFRM(8, blocks=0, groups=4)(features(1, 5, 6, 8)), r"channels are last: `.permute\(0, 3, 1, 2\)`"),
        (lambda: CFRM(8, blocks=0, groups=4)(features(1, 30, 8)), r"channels are last: `.transpose\(1, 2\).unflatten"),
        (lambda: CFRM(8, blocks=0, groups=4)(features(8, 5, 6)), r"`features` should be float \(N, 8, H, W\), found a"),
        (lambda: CFRM(8, blocks=0, groups=4)(features(1, 8, 5, 6).int()), "`features` should be float .*int32"),
        (lambda: CFRM(8, blocks=0, groups=4)(features(1, 8, 5, 6).numpy()), "`features` should be .* a numpy array"),
        (lambda: CFRM(8, blocks=nn.Conv2d(8, 4, 1), groups=4)(features(1, 8, 5, 6)), "`blocks` should return features"),
        (lambda: CFRM(8, blocks="2"), "`blocks` should be a whole number of at least 0, found '2'"),
        (lambda: CFRM(8, blocks=nn.Identity, groups=4), "`blocks` should be a whole .* found the class Identity"),
        (lambda: SCTuner(8, 4)(features(1, 5, 6, 8), features(1, 4, 5, 6)), r"`skip` should be float \(N, 8, H, W\)"),
        (
            lambda: SCTuner(8, 4)(features(1, 8, 5, 6), features(1, 8, 5, 6)),
            r"`control` should be float \(N, 4, H, W\)",
        ),
        (lambda: SCTuner(8, 4)(features(1, 8, 5, 6), [features(1, 4, 5, 6)]), "`control` should be .* found list"),
        (lambda: FiLM(8, 4)(features(1, 5, 6, 8), features(1, 4)), r"`h` should be float \(N, 8, H, W\)"),
        (lambda: FiLM(8, 4)(features(2, 8, 5, 6), features(2, 8)), r"`embedding` should be of the timestep, \(2, 4\)"),
        (
            lambda: FiLM(8, 4)(features(2, 8, 5, 6), 12),
            r"`embedding` should be .* `TimeConditioned` makes it, found 12",
        ),
        (lambda: FiLM(8, 4)(features(2, 8, 5, 6), None), "`embedding` should be .* found None"),
        (lambda: TimeMoE(8, 4)(features(1, 30, 8), features(1, 4)), r"`h` should be float \(N, 8, H, W\)"),
        (lambda: TimeMoE(8, 4)(features(2, 8, 5, 6), features(3, 4)), "`embedding` should be of the timestep"),
        (
            lambda: TFALevel(4, 6, None)(features(1, 5, 5, 6), features(1, 4, 5, 5), features(1, 4)),
            "`decoded` should be f",
        ),
        (
            lambda: TFALevel(4, 6, None)(features(1, 6, 5, 5), features(1, 5, 5, 4), features(1, 4)),
            "`skip` should be fl",
        ),
        (
            lambda: TFALevel(4, 6, None)(features(1, 6, 5, 5), features(1, 4, 5, 5), "look"),
            "`prompt` should be .* 'look'",
        ),
        (lambda: TFALevel(4, 6, None, gate="relu"), "`gate` should be one of"),
        (lambda: TFA(8, 4), "`skips` should be whole numbers, one for each level, found 8"),
        (lambda: TFA([8], "4"), "`channels` should be whole numbers, one for each level, found '4'"),
        (lambda: TFA(["8"], 4), "`skips` should be a whole number of at least 1, found '8'"),
        (lambda: TFA([8], 4, tasks=3), "`tasks` should be a list of names, found 3"),
        (lambda: TFA([8], 4, tasks=[3]), "`tasks` should be text, found 3"),
        (lambda: TFA([8], 4, tasks=["look"]).prompt(0), "`tasks` should be a name, or one for each image, found 0"),
        (lambda: TFA([8], 4, tasks=["look"]).prompt(None), "`tasks` should be a name, .* found None"),
        (lambda: TFA([8], 4, tasks=["look"]).prompt(torch.tensor([0])), "`tasks` should be a name, .* found a tensor"),
        (lambda: TFA([8], 4, tasks=["look"]).prompt([0]), "`tasks` should be one of look, found 0"),
        (lambda: TFA([8], 4, tasks=["look"]).prompt("look", "2"), "`count` should be a whole number .* found '2'"),
        (lambda: TFA([8], 4, tasks=["look"]).prompt("look", 0), "`count` should be a whole number .* found 0"),
        (lambda: TFA([8], 4, tasks=["look"]).add_task("new", like=0), "`like` should be one of look, found 0"),
        (lambda: TFA([8], 4).load_prompts(["look"]), "`prompts` should be a mapping of names to tensors, found list"),
        (
            lambda: TFA([8], 4).load_prompts({"look": [0.0] * 8}),
            r"`prompts\['look'\]` should be a tensor \(8,\), found list",
        ),
        (lambda: controller(multipliers=4), "`multipliers` should be at least one whole number, found 4"),
        (lambda: controller(multipliers="11"), "`multipliers` should be at least one whole number, found '11'"),
        (lambda: controller(multipliers=(1, 0)), "`multipliers` should be a whole number of at least 1, found 0"),
        (lambda: controller(attention=True), "`attention` should be one bool for each level, found True"),
        (lambda: controller()(features(1, 8, 8, 4), 3), r"`latents` should be float \(N, 4, H, W\)"),
        (lambda: controller()(features(1, 3, 8, 8), 3), r"`latents` should be float \(N, 4, H, W\)"),
        (
            lambda: controller()(features(1, 4, 8, 8), -1),
            "`timestep` should be a finite number of at least 0, found -1",
        ),
        (lambda: controller()(features(1, 4, 8, 8), None), "`timestep` should be .* found None"),
        (
            lambda: controller()(features(1, 4, 8, 8), torch.tensor([torch.nan])),
            "`timestep` should be at least 0, found nan",
        ),
        (lambda: WaveletColorFix()(None, features(1, 3, 8, 8)), "`detail` should be a float tensor .* found None"),
        (lambda: WaveletColorFix()(features(1, 3, 8, 8), None), "`color` should have the shape .* found None"),
        (lambda: WaveletColorFix()(features(1, 3, 8, 8).numpy(), features(1, 3, 8, 8)), "`detail` .* a numpy array"),
        (lambda: WaveletColorFix().low(features(3, 8, 8)), r"`image` should be a float tensor \(N, C, H, W\)"),
    ],
)
def test_maps_prompts_and_embeddings_of_another_kind_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("t", "found"),
    [
        (60, "found 60"),
        (-5, "found -5"),
        (float("nan"), "found nan"),
        (float("inf"), "found inf"),
        ("12", "found '12'"),
        (None, "found None"),
        (True, "found True"),
        (torch.tensor([3, 60]), "found 60"),
        (torch.tensor([-5, 3]), "found -5"),
        (torch.tensor([torch.nan, 3.0]), "found nan"),
        (torch.tensor([True, False]), "torch.bool"),
    ],
)
def test_timesteps_outside_of_the_table_are_refused(t: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"`t` should be .*{found}"):
        timed()(features(2, 3, 4, 4), t)
    if not isinstance(t, Tensor):
        with pytest.raises(ValueError, match=rf"`t` should be .*{found}"):
            timed().at(t)


@pytest.mark.parametrize("t", [0, 50, 0.5, torch.tensor(50), torch.tensor([0.5, 12.0]), torch.tensor([1, 50])])
def test_timesteps_of_the_table_are_taken(t: Any) -> None:
    assert timed()(features(2, 3, 4, 4), t).shape == (2, 3, 4, 4)
    assert timed(num_timesteps=1000)(features(2, 3, 4, 4), 999).shape == (2, 3, 4, 4)


def test_timesteps_need_not_be_read_where_gradients_of_samples_are_taken_at_once() -> None:
    model = TimeConditioned(network(), {"0": FiLM(8)})
    nn.init.ones_(model.blocks["0"].to_scale_shift.weight)
    importance = ParameterImportance(model)
    batch = features(3, 3, 4, 4), torch.tensor([3, 20, 45])
    importance.accumulate(lambda model, batch: model(*batch).square().mean(), [batch])
    assert not importance._one_by_one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TimeConditioned(nn.Identity), "`network` should be a module, found the class Identity"),
        (lambda: TimeConditioned(lambda x: x), "`network` should be a module, found the function"),
        (
            lambda: TimeConditioned(network(), [FiLM(8)]),
            "`blocks` should be a mapping of layers to modules, found list",
        ),
        (lambda: TimeConditioned(network(), {"0": FiLM}), r"`blocks\['0'\]` should be a module, found the class FiLM"),
        (
            lambda: TimeConditioned(network(), {"0": FiLM(8, 32)}),
            r"`blocks\['0'\]` should have the `time_dim` .* found 32",
        ),
        (lambda: TimeConditioned(network(), {"0": FiLM(4)})(features(1, 3, 4, 4), 3), r"`blocks\['0'\]` .* 8, found 4"),
        (lambda: timed()(features(1, 3, 4, 4).numpy(), 3), "`image` should be a tensor .* found a numpy array"),
        (lambda: channels_of(network, ["0"], features(1, 3, 4, 4)), "`network` should be a module, found the function"),
    ],
)
def test_blocks_that_do_not_fit_their_network_are_named_as_the_caller_wrote_them(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_block_leaves_the_network_as_it_was() -> None:
    wrapped = timed()
    with pytest.raises(ValueError, match="`time_dim`"):
        wrapped.attach({"1": FiLM(8), "2": FiLM(3, 8)})
    assert wrapped.layers == ["0", "1"]
    wrapped.attach(nn.ModuleDict({"2": FiLM(3)}))
    wrapped.attach({"2": FiLM(4)})
    with pytest.raises(
        ValueError, match=r"`blocks\['2'\]` should have the channels that its layer returns, 3, found 4"
    ):
        wrapped(features(1, 3, 4, 4), 3)
    assert channels_of(network(), "0", features(1, 3, 4, 4)) == {"0": 8}


class Listed(nn.Module):
    """Layers in a list, which is not called itself, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)])
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.body:
            image = layer(image)
        return image


def test_blocks_that_did_nothing_are_told_once() -> None:
    timed = TimeConditioned(Listed(), {"body": FiLM(8), "unused": TimeMoE(8, experts=2), "body.0": FiLM(8)})
    with pytest.warns(UserWarning, match=r"ran without passing \['body', 'unused'\], so that the blocks there did"):
        timed(features(1, 3, 8, 8), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timed(features(1, 3, 8, 8), 2)


def test_hooks_that_compiled_code_does_not_know_are_told() -> None:
    late, early = network(), network()
    late.compile(backend="eager")
    late(features(1, 3, 8, 8))
    with pytest.warns(UserWarning, match="'0' was compiled before it got a block: .* Wrap the network first, and"):
        TimeConditioned(late, {"0": FiLM(8)})
    inside, outside = TimeConditioned(early, {"0": FiLM(8)}), TimeConditioned(network(), {"0": FiLM(8)})
    early.compile(backend="aot_eager")
    forward = network()
    forward.forward = torch.compile(forward.forward, backend="aot_eager")  # type: ignore[method-assign]
    wrapped = TimeConditioned(torch.compile(network(), backend="aot_eager"), {"_orig_mod.0": FiLM(8)})
    with warnings.catch_warnings(record=True) as found:
        TimeConditioned(forward, {"0": FiLM(8)})(features(1, 3, 8, 8), 1)
        wrapped(features(1, 3, 8, 8), 1)
        for steps in (1, 2):
            inside(features(1, 3, 8, 8), steps)
            torch.compile(outside, backend="aot_eager")(features(1, 3, 8, 8), torch.tensor([steps]))
    assert not [warning for warning in found if "block" in str(warning.message)]
