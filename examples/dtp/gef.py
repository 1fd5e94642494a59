"""GEF (Algorithm 3 of DTP): steps that restore and do not forget how to generate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.engine.controls import FourierTransforms
from examples.common.seeds import seeded
from examples.dtp.generation import Noisy, Steps
from examples.dtp.methods import aggregator
from restoreloss import GradientOrthogonality, ParameterImportance
from restoreloss.blocks.time_moe import TimeMoE
from restoreloss.frozen import unwrap
from restoreloss.integrations.torchjd import aggregate
from restoreloss.regularizers.layer_decay import add_gradients, execution_order, layer_of, layer_weights, shallow

if TYPE_CHECKING:
    from examples.dtp.finetune import FineTuning


@dataclass(frozen=True)
class Batch:
    """Pairs to restore, and images to generate from.

    Attributes:
        degraded: (N, 3, H, W) in [0, 1].
        clean: the same images without their degradation.
        t: t* of each pair.
        replay: of so many steps None that the share of these images is right.
    """

    degraded: Tensor
    clean: Tensor
    t: Tensor
    replay: Noisy | None


class GEF(Steps):
    """Steps of one stage. Of several stages each holds on to the network that it began with.

    Args:
        recipe: the run.
        names: the degradations of the stage.
        steps: of the stage.
        last: whether no stage follows, for which memory would be freed.
    """

    recipe: "FineTuning"

    def __init__(self, recipe: "FineTuning", names: list[str], steps: int, *, last: bool) -> None:
        super().__init__(recipe, steps)
        self.names, self.steps, self.last = names, steps, last
        self.importance: ParameterImportance | None = None
        self.begun, self.count = False, 0
        config, method, network = recipe.config, recipe.method, unwrap(recipe.net)
        image = torch.zeros(1, 3, config.patch, config.patch, device=recipe.device)
        order = execution_order(network, image, 1)
        t = sum(recipe.t_star[name] for name in names) / len(names) * 50 / config.num_timesteps  # a is for T = 50
        rate = config.decay if method.decay else 0.0
        self.weights = layer_weights(order, t, rate=rate)
        self.shallow_weights = layer_weights(order, t, rate=rate, share=config.shallow)
        self.shallow = shallow(network, order, config.shallow)
        known = {id(p) for p in self.shallow}
        self.deep = [p for p in network.parameters() if id(p) not in known]
        self.orthogonality = GradientOrthogonality(self.shallow)
        self.aggregator = aggregator(config.aggregator).to(recipe.device) if config.aggregator else None
        names_of = {id(p): name for name, p in network.named_parameters()}
        self.factors = [self.weights[layer_of(names_of[id(p)], order) or ""] for p in self.shallow]  # w_l

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Eqs. (12) and (22): both objectives, then the penalty on parameters, then Adam."""
        if not self.begun:
            self._begin()
        if batch.replay is not None and self.recipe.method.conflict in ("project", "full"):
            terms = self._projected_gradients(batch, batch.replay)
        else:
            terms = self._added_gradients(batch)
        if self.importance is not None:
            with torch.no_grad():
                terms["penalty"] = self.importance()
            self.importance.apply_()
        self.update()
        self.count += 1
        if self.count == self.steps and not self.last:  # the memory is for the next stage
            self.importance = None
            self.optimizer.state.clear()
        return {name: value.detach() for name, value in terms.items()}

    def _projected_gradients(self, batch: Batch, replay: Noisy) -> dict[str, Tensor]:
        """Free one gradient of what opposes the other. The network is the one inside DDP: the projection averages."""
        recipe, network = self.recipe, unwrap(self.recipe.net)
        with recipe.accelerator.autocast():
            terms = {
                "restoration": self._restoration(network, batch) + self._balance(),
                "generative": recipe.replay_weight(replay) * recipe.generative_loss(network, replay),
            }
        if self.aggregator is None:
            terms["cosine"] = self.orthogonality.project(
                terms["generative"], terms["restoration"], others=self.deep, weight=self.factors,
                policy="full" if recipe.method.conflict == "full" else "conflict",
            )  # fmt: skip
            return terms
        both = {name: terms[name] for name in ("generative", "restoration")}
        weights = aggregate(both, self.shallow, self.aggregator, own={"restoration": self.deep})
        return terms | {f"weight_{name}": weight for name, weight in weights.items()}

    def _added_gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Add the gradient of generation, in the shallow layers, to that of restoration and of L_orth."""
        recipe, replay = self.recipe, batch.replay
        with recipe.accelerator.autocast():
            loss = self._restoration(recipe.net, batch) + self._balance()
        terms = {"restoration": loss}
        if replay is not None and self._orthogonal():
            with recipe.accelerator.autocast():
                terms["orthogonality"] = recipe.config.orthogonality_weight * self._penalty(batch, replay)
            loss = loss + terms["orthogonality"]
        recipe.accelerator.backward(loss)
        if replay is not None:
            with recipe.accelerator.autocast():
                found = recipe.generative_loss(unwrap(recipe.net), replay)
                terms["generative"] = recipe.replay_weight(replay) * found
            self._add_shallow(terms["generative"])
        return terms

    def _restoration(self, network: nn.Module, batch: Batch) -> Tensor:
        restored = network(batch.degraded, batch.t)
        loss, weight = F.l1_loss(restored, batch.clean), self.recipe.config.fft_weight
        return loss + weight * FourierTransforms()(restored, batch.clean) if weight else loss

    def _balance(self) -> Tensor | float:
        network: Any = unwrap(self.recipe.net)
        sparse = any(isinstance(module, TimeMoE) and module.top_k is not None for module in network.modules())
        return 0.01 * network.balance_loss() if sparse else 0.0

    def _orthogonal(self) -> bool:
        config = self.recipe.config
        return self.recipe.method.conflict == "orthogonality" and self.count % config.orthogonality_every == 0

    def _penalty(self, batch: Batch, noisy: Noisy) -> Tensor:
        """L_orth of two micro-batches of each objective, of as many images as the generative ones are, if there are."""
        network = unwrap(self.recipe.net)
        images = [Noisy(noisy.clean[p], noisy.noise[p], noisy.t[p]) for p in _halves(len(noisy.clean))]
        generation = [self.recipe.generative_loss(network, part) for part in images]
        parts = _halves(min(len(noisy.clean), len(batch.degraded)))
        restoration = [F.l1_loss(network(batch.degraded[p], batch.t[p]), batch.clean[p]) for p in parts]
        penalty: Tensor = self.orthogonality(generation, restoration)
        return penalty

    def _add_shallow(self, loss: Tensor) -> None:
        """The generative gradient, weighted by depth."""
        add_gradients(loss, unwrap(self.recipe.net), self.shallow_weights)

    def _begin(self) -> None:
        """Measure the importance where the stage begins, on pre-training data (Algorithm 6)."""
        self.begun = True
        recipe = self.recipe
        penalty, network = recipe.method.penalty, unwrap(recipe.net)
        if penalty is None:
            return
        # adapters that have learned nothing yet have nothing to hold on to
        new = [network.get_parameter(name) for name in recipe.new] if len(self.names) == len(recipe.turns[0]) else []
        for parameter in new:
            parameter.requires_grad_(False)
        try:
            self.importance = self._unmeasured()
            if penalty != "l2sp":
                self._measure(self.importance)
        finally:
            for parameter in new:
                parameter.requires_grad_(True)

    def _measure(self, importance: ParameterImportance) -> None:
        recipe, config, penalty = self.recipe, self.recipe.config, self.recipe.method.penalty
        processes, rank = recipe.accelerator.num_processes, recipe.accelerator.process_index
        first, last = (part * config.importance_samples // processes for part in (rank, rank + 1))
        keys = [(3, k) for k in range(first, last)]
        noisy = recipe.noisy(recipe.pool(keys), keys)
        x_t = recipe.levels.add_noise(noisy.clean, noisy.noise, noisy.t)

        def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            seen, t, clean = batch
            output: Tensor = model(seen, t)
            return seen - output if penalty in ("mas", "gn") else F.l1_loss(output, clean)

        generator = seeded(config.seed, 7)
        # every process draws its part of the signs of "gn", which are those of all images
        torch.randint(0, 2, (first, *noisy.clean.shape[1:]), generator=generator)
        importance.accumulate(loss_fn, [(x_t, noisy.t, noisy.clean)], generator=generator)

    def _unmeasured(self) -> ParameterImportance:
        config, penalty = self.recipe.config, self.recipe.method.penalty
        assert penalty is not None
        return ParameterImportance(
            unwrap(self.recipe.net), estimator=penalty, strength=config.penalty_weight, normalize=config.normalize,
            layer_weights=self.weights,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The state of optimizer, schedule and importance."""
        measured = None if self.importance is None else self.importance.state_dict()
        return {**super().state_dict(), "importance": measured, "begun": self.begun, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.begun, self.count = state["begun"], state["count"]
        if state["importance"] is not None:
            self.importance = self._unmeasured()
            self.importance.load_state_dict(state["importance"])


def _halves(count: int) -> list[slice]:
    """Two micro-batches of one size, or the only image there is."""
    half = count // 2
    return [slice(0, half), slice(half, 2 * half)] if half else [slice(0, 1)]
