"""ParameterImportance: a penalty that holds in place the parameters that an earlier training needs.

It measures, on the data of the first training, how much each parameter matters to it, and in
the second training charges for moving away. The charge is a loss to add, or a gradient to add to the others'.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from restoreloss.checks import caller_level, check_callable, check_choice, check_integer, check_number, describe
from restoreloss.distributed import world_size
from restoreloss.frozen import RunMode, in_mode, unwrap
from restoreloss.precision import ExactBuffers
from restoreloss.regularizers.layer_decay import layer_of
from restoreloss.regularizers.parameter_names import buffer_name, parameter_name, plain_name
from restoreloss.regularizers.per_sample import Estimator, PerSample
from restoreloss.sharding import gather, is_sharded, shard_like

Normalize = Literal["sum", "mean"]


class ParameterImportance(ExactBuffers):
    r"""Charge parameters for moving, each by its importance to an earlier training.

    .. math:: d = \theta - \theta_0, \qquad g_i = \nabla_\theta L(x_i; \theta_0) \quad\text{of a single sample}

    ========= ============================================================ ============================================
    estimator importance :math:`\Omega`                                    penalty, summed over parameters, times lambda
    ========= ============================================================ ============================================
    taylor2   :math:`\mathrm{E}\,|g_i|`                                    :math:`\Omega|d| + \tfrac12 \Omega^2 d^2`
    fisher    :math:`\mathrm{E}\,g_i^2`                                    :math:`\tfrac12 \Omega d^2` (EWC)
    mas       :math:`\mathrm{E}\,|\nabla\lVert F(x_i)\rVert^2|`            :math:`\Omega d^2`
    gn        :math:`\mathrm{E}\,(\nabla v^\top F(x_i))^2`, v random +-1   :math:`\tfrac12 \Omega d^2`
    l2sp      1, without a measurement                                     :math:`\tfrac12 d^2` (L2-SP)
    ========= ============================================================ ============================================

    Over several trainings :meth:`begin_task` keeps a penalty for each of them, or one that decays (online EWC).

    The first two vanish where the loss of every sample does; "mas" and "gn" look at the output F and do not. "l2sp"
    holds all parameters that require a gradient alike, from where they are when it is made.

    Importances and anchors :math:`\theta_0` are buffers under the parameters' names, without the prefixes of DDP,
    ``torch.compile`` and FSDP: save them with ``state_dict()``, in float32 or higher. The network is neither registered
    nor copied. A parameter that had no importance when it was measured (frozen, or new) is not charged; one that has
    gone is not missed; a tied one counts once.

    Parameters that ``fully_shard`` (FSDP2) has cut are charged, each process its part, by importances that each holds
    whole. Measure before: gradients of single samples need whole parameters.

    Args:
        model: the network, at the parameters to stay close to.
        estimator: of the importance.
        strength: :math:`\lambda`. The 0.2 of the paper is in the scale of its authors, about 0.006 here: they take
            :math:`\Omega` from the gradient of the mean loss of 16 images, which was 3.4 times as small as the mean
            over single images, and add the penalty in every tenth step.
        normalize: "sum" over parameters as in the paper, or their "mean", which makes ``strength`` mean the same for
            networks of any size.
        layer_weights: multipliers of :math:`\lambda` by the name of a module or a parameter; the longest name that
            fits counts, 1 where none does (see :func:`restoreloss.regularizers.layer_decay.layer_weights`). What has 0
            is not charged, whatever shape it has grown to.
        mode: of the network while it is measured: "eval"; "train" for re-parameterized networks (SPAN), which compute
            with other parameters in eval mode than those that train; "keep" for the modes that its parts are in. Batch
            normalization in train mode normalizes each sample by itself, and statistics never move.
        chunk_size: samples whose gradients are held at once.

    Raises:
        ValueError: For an option that is unknown, negative or no number.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> importance = ParameterImportance(model, strength=1.0)
        >>> def loss_fn(model, batch):
        ...     return (model(batch) ** 2).mean()
        >>> _ = model.weight.data.fill_(1.0)
        >>> importance.accumulate(loss_fn, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
        2
        >>> importance().item()                            # nothing has moved yet
        0.0
        >>> _ = model.weight.data.add_(torch.tensor([0.5, -0.25]))
        >>> importance().item()                            # add this to the loss, or call apply_() before each step
        2.125

    Source: DTP, Eqs. (3) to (5), (14) to (16), (23) to (27). The equations are lost in the text that we have: the form
    of "taylor2" is that of the authors' statements and code, with the second derivative of Eq. (25) from Gauss and
    Newton. Their unified script never estimates the importance, so its penalty is 0; here an unmeasured penalty is an
    error. EWC: Kirkpatrick et al. 2017; MAS: Aljundi et al. 2018; L2-SP: Li et al. 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        estimator: Estimator = "taylor2",
        strength: float = 0.01,
        normalize: Normalize = "sum",
        layer_weights: Mapping[str, float] | None = None,
        mode: RunMode = "eval",
        chunk_size: int = 32,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"`model` should be a module, found {describe(model)}.")
        check_choice("estimator", estimator, Estimator)
        check_choice("normalize", normalize, Normalize)
        check_choice("mode", mode, RunMode)
        self.estimator, self.normalize, self.mode = estimator, normalize, mode
        self.strength = check_number("strength", strength, low=0)
        self.chunk_size = check_integer("chunk_size", chunk_size)
        self._model = (model,)  # The tuple keeps it from being registered.
        self.layer_weights = {} if layer_weights is None else layer_weights
        self._one_by_one = self._warned = False
        self._attached: list[RemovableHandle] = []
        self._open()

    @property
    def layer_weights(self) -> Mapping[str, float]:
        """The multipliers of the strength by name; assign a mapping to change them."""
        return self._layer_weights

    @layer_weights.setter
    def layer_weights(self, weights: Mapping[str, float]) -> None:
        if not isinstance(weights, Mapping):
            raise ValueError(f"`layer_weights` should be a mapping of names to numbers, found {describe(weights)}.")
        self._layer_weights = {
            name: check_number(f"layer_weights[{name!r}]", weight, low=0) for name, weight in weights.items()
        }
        self._factors: dict[str, float] = {}
        names = [*unwrap(self._model[0]).named_modules(), *unwrap(self._model[0]).named_parameters()]
        known = {plain_name(name) for name, _ in names}
        if unknown := [name for name in self._layer_weights if name not in known]:
            warnings.warn(
                f"`layer_weights` should name modules or parameters of `model`, found {unknown[:3]}, which "
                "change nothing.",
                stacklevel=caller_level(),
            )

    def accumulate(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        *,
        generator: torch.Generator | None = None,
    ) -> int:
        """Measure the importance on data of the first training; more calls refine the mean over all samples.

        The network runs in ``mode`` and is left as it was. Gradients are those of single samples: by ``torch.func``
        where the network allows it, else one by one. Over several processes, each with its own batches or none, it
        is the mean over all of them; then every process must call this. Parameters that require a gradient and get an
        importance of exactly 0 from every sample are named in a warning, once.

        Args:
            loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the batch, or for "mas" and "gn" the output
                of the network, (N, ...). For figures that can be repeated let timesteps and noise be part of the batch.
            batches: tensors, or tuples, lists or dicts of tensors, each with N samples along the first dimension.
            generator: of the signs of "gn".

        Returns:
            The number of samples seen so far, over all processes.

        Raises:
            ValueError: For a loss that is no scalar, samples without a first dimension in common, no batch at all, a
                gradient that is not finite, and parameters that FSDP2 has cut or that moved since the first call; for
                a ``loss_fn`` that does not take (model, batch), and one batch where an iterable of them is expected.
        """
        if self.estimator == "l2sp":
            raise ValueError("`estimator` should be another one to measure with, found 'l2sp', which measures nothing.")
        check_callable("loss_fn", loss_fn, "model", "batch")
        if isinstance(loss_fn, _Loss) or hasattr(loss_fn, "terms"):
            raise ValueError(
                f"`loss_fn` should be callable as loss_fn(model, batch), found a {type(loss_fn).__name__}, which "
                "compares images: call it in a function that runs the model."
            )
        if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
            raise ValueError(
                f"`batches` should be an iterable of batches, found {describe(batches)}: put a single one into a list."
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` should be a torch.Generator, found {describe(generator)}.")
        model = unwrap(self._model[0])
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("`model` should have parameters that require a gradient, found none.")
        if cut := [name for name, p in parameters.items() if is_sharded(p)]:
            raise ValueError(
                f"`model` should be whole while its importance is measured, found {cut[0]!r} cut by `fully_shard`: "
                "measure before, or load the `state_dict()` of what was measured on the whole network."
            )
        self._check_anchor()
        sums = {name: torch.zeros_like(p, dtype=_exact(p)) for name, p in parameters.items()}
        gradients = PerSample(model, loss_fn, self.estimator, one_by_one=self._one_by_one)
        count = 0
        with in_mode(model, self.mode):
            for batch in batches:
                count += gradients.add_moments(sums, parameters, batch, chunk=self.chunk_size, generator=generator)
        self._one_by_one = gradients.one_by_one
        self._keep(parameters, sums, count)
        return int(self._buffer("samples"))

    def begin_task(self, *, decay: float | None = None) -> None:
        r"""Hold what was learned until now as well: importances to come have the parameters of this moment as anchor.

        Args:
            decay: None keeps what was measured before, with its own anchor: the penalties of all tasks add up, and so
                does their memory. A number :math:`\gamma` from 0 to 1 keeps one penalty for them (online EWC, EWC++):
                the importances become :math:`\gamma \Omega + \Omega_\text{new}`, around the parameters of this
                moment alone. 1 forgets nothing, 0 forgets all that was before.

        Raises:
            ValueError: Where nothing was measured; for a decay out of [0, 1], or of a parameter of another shape since.

        Source: Schwarz et al. 2018 (Progress & Compress). The moving average of EWC++ (Chaudhry et al. 2018),
        :math:`\gamma \Omega + (1 - \gamma) \Omega_\text{new}` from 0, is :math:`1 - \gamma` times this.
        """
        self._check_measured()
        if decay is None:
            self._open(self.tasks)
            return
        decay, task = check_number("decay", decay, low=0, high=1), self.tasks - 1
        carried = {name: decay * omega for name, omega in self._named(task, "importance").items()}
        for name, parameter in unwrap(self._model[0]).named_parameters():
            if (omega := carried.get(plain_name(name))) is None or omega.shape == parameter.shape:
                continue
            if self._layer_weight(plain_name(name)) != 0:
                _check_shape(name, parameter, omega)
            del carried[plain_name(name)]
        for name in [name for name in self._buffers if name.startswith((f"{task}/importance/", f"{task}/carried/"))]:
            del self._buffers[name]
        self._open(task)
        new = self._named(task, "importance")  # Without a measurement, "l2sp" has them already.
        for name, omega in carried.items():
            self.register_buffer(buffer_name(task, "carried", name), omega)
            self.register_buffer(buffer_name(task, "importance", name), omega + new[name] if name in new else omega)

    @property
    def tasks(self) -> int:
        """How many penalties add up: the trainings remembered or being measured; ``decay`` makes one of two."""
        return 1 + max(int(name.partition("/")[0]) for name in self._buffers)

    def forward(self) -> Tensor:
        """The penalty: a scalar with a gradient to the parameters. Add it to the loss once per optimizer step."""
        self._check_measured()
        terms = []
        for parameter, omega, anchor, weight in self._charged():
            moved = parameter.to(omega.dtype) - anchor
            if self.estimator == "taylor2":
                term = (omega * moved).abs().sum() + 0.5 * (omega * moved).square().sum()
            else:
                term = (omega * moved.square()).sum() * (1.0 if self.estimator == "mas" else 0.5)
            terms.append(weight * gather(term))
        if not terms:
            return self._zero_with_graph()
        return torch.stack([term.to(terms[0]) for term in terms]).sum()

    @torch.no_grad()
    def apply_(self, only: Iterable[nn.Parameter] | None = None) -> None:
        """Add the penalty's gradient to ``.grad``: what ``forward().backward()`` does, without a graph.

        Call it once in a step, after the last ``backward()`` and ``GradScaler.unscale_``; with several optimizers for
        ``only`` the parameters of each.
        """
        self._check_measured()
        held = None if only is None else {id(parameter) for parameter in only}
        charged = False
        for parameter, omega, anchor, weight in self._charged():
            charged = True
            if not parameter.requires_grad or (held is not None and id(parameter) not in held):
                continue
            slope = moved = parameter.to(omega.dtype) - anchor
            if self.estimator == "taylor2":
                slope = moved.sign().addcmul_(omega, moved)
            elif self.estimator == "mas":
                weight *= 2
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad.dtype == omega.dtype:
                parameter.grad.addcmul_(omega, slope, value=weight)
            else:
                parameter.grad += (weight * omega * slope).to(parameter.grad.dtype)
        if not charged:
            self._zero_with_graph()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_attached": []}  # A copy is attached to nothing.

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call :meth:`apply_` before each step of an optimizer, for its parameters, after any clipping of gradients.

        Args:
            optimizer: of the network's parameters; not accelerate's wrapper, but ``wrapper.optimizer``.

        Returns:
            A handle with ``remove()``.

        Raises:
            ValueError: For something else than an optimizer of torch. Later, in ``step``: with a closure, which would
                compute the gradients anew; and for a fused optimizer under ``GradScaler``, which sees scaled gradients
                unless ``scaler.unscale_(optimizer)`` was called.
        """
        if isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            raise ValueError(
                f"`optimizer` should be the {type(inner).__name__} itself, found a wrapper: give `wrapper.optimizer`."
            )
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"`optimizer` should be an optimizer of torch, found {describe(optimizer)}.")

        def add(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if next(iter(args[1:]), kwargs.get("closure")) is not None:  # The first is the optimizer.
                raise ValueError("A closure computes the gradients anew: add `importance()` to its loss instead.")
            if getattr(optimizer, "grad_scale", None) is not None:
                raise ValueError(
                    "A fused optimizer is given scaled gradients by GradScaler: call `scaler.unscale_(optimizer)` "
                    "before `scaler.step(optimizer)`."
                )
            self.apply_(parameter for group in optimizer.param_groups for parameter in group["params"])

        own = {id(parameter) for parameter in unwrap(self._model[0]).parameters()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError("`optimizer` should hold parameters of `model`, found those of another network.")
        hooks = optimizer._optimizer_step_pre_hooks
        if any(handle.id in hooks for handle in self._attached if handle.hooks_dict_ref() is hooks):
            raise ValueError("`optimizer` should be attached to once, found that it is: the penalty would count twice.")
        handle = optimizer.register_step_pre_hook(add)
        self._attached.append(handle)
        return handle

    def importance(self, task: int = 0) -> dict[str, Tensor]:
        """The importances of one task by the parameters' names."""
        check_integer("task", task, low=0, high=self.tasks - 1)
        return self._named(task, "importance")

    def _charged(self) -> Iterable[tuple[nn.Parameter, Tensor, Tensor, float]]:
        """(parameter, importance, anchor, weight) for each parameter and task, where the network is by now."""
        parameters = self._known()
        count = max(1, sum(p.numel() for p in parameters.values())) if self.normalize == "mean" else 1
        for task in range(self.tasks):
            anchors = self._named(task, "anchor")
            for name, omega in self._named(task, "importance").items():
                if name not in parameters or self._layer_weight(name) == 0:  # Left out, of whatever shape it is now.
                    continue
                parameter, anchor = parameters[name], anchors[name]
                _check_shape(name, parameter, omega)
                omega, anchor = (shard_like(one.to(parameter.device), parameter) for one in (omega, anchor))
                yield parameter, omega, anchor, self.strength * self._layer_weight(name) / count

    def _zero_with_graph(self) -> Tensor:
        """A zero whose gradient is zeros, for where all that was measured has the weight 0."""
        known = next(iter(self._known().values()), None)
        if known is None:
            raise ValueError("`model` should have parameters that were measured, found none: was it another network?")
        return 0.0 * gather(known.to(_exact(known)).sum())

    def _known(self) -> dict[str, nn.Parameter]:
        """The parameters that some task has measured, by name."""
        names = {name for task in range(self.tasks) for name in self._named(task, "importance")}
        return {own: p for name, p in unwrap(self._model[0]).named_parameters() if (own := plain_name(name)) in names}

    def _layer_weight(self, name: str) -> float:
        if name not in self._factors:
            layer = layer_of(name, self.layer_weights)
            self._factors[name] = 1.0 if layer is None else self.layer_weights[layer]
        return self._factors[name]

    def _open(self, task: int = 0) -> None:
        """Begin a task: the parameters of this moment are its anchor, and nothing is measured."""
        anchor = torch.empty(0)
        for name, parameter in unwrap(self._model[0]).named_parameters():
            anchor = gather(parameter.detach()).to(_exact(parameter), copy=True)
            self.register_buffer(buffer_name(task, "anchor", name), anchor)
        self.register_buffer(f"{task}/samples", torch.zeros((), dtype=torch.int64, device=anchor.device))
        self._measured = self.estimator == "l2sp"
        if self._measured:
            for name, parameter in unwrap(self._model[0]).named_parameters():
                if parameter.requires_grad:
                    alike = torch.ones_like(gather(parameter.detach()), dtype=_exact(parameter))
                    self.register_buffer(buffer_name(task, "importance", name), alike)

    def _keep(self, parameters: Mapping[str, nn.Parameter], sums: dict[str, Tensor], count: int) -> None:
        total = torch.tensor(count, device=next(iter(sums.values())).device)
        if world_size() > 1:
            for tensor in [*sums.values(), total]:
                torch.distributed.all_reduce(tensor)
        task, new = self.tasks - 1, int(total)
        if new == 0:
            raise ValueError("`batches` should hold at least one batch, found none.")
        before, carried = int(self._buffer("samples")), self._named(task, "carried")
        for name in parameters:
            key, own = buffer_name(task, "importance", name), sums[name]
            if (past := carried.get(plain_name(name))) is not None:
                own += past.to(own) * new  # Each sample carries it, so that the mean over all of them has it once.
            mean = own / new
            if before and (old := self._buffers.get(key)) is not None:
                mean = (old.to(own) * before + own) / (before + new)
            self.register_buffer(key, mean)
        self.register_buffer(f"{task}/samples", total + before)
        self._measured = True
        self._warn_of_zeros(parameters)

    def _warn_of_zeros(self, parameters: Mapping[str, nn.Parameter]) -> None:
        importance = self._named(self.tasks - 1, "importance")
        sizes = {name: p.numel() for name, p in parameters.items() if p.numel()}
        zero = [name for name in sizes if not bool(importance[plain_name(name)].any())]
        if len(zero) == len(sizes):
            warnings.warn(
                "`loss_fn` should depend on the parameters of `model`, found that all importances are 0: the penalty "
                "will be 0.",
                stacklevel=caller_level(),
            )
        elif zero and not self._warned:
            self._warned = True
            share = sum(sizes[name] for name in zero) / sum(sizes.values())
            more = f" and {len(zero) - 3} more" if len(zero) > 3 else ""
            why = (
                "The loss does not depend on them in train mode."
                if self.mode == "train"
                else "If the network computes with other parameters in eval mode than those that train (SPAN and other "
                'networks that are re-parameterized), measure with `ParameterImportance(model, mode="train")`.'
            )
            warnings.warn(
                f"{', '.join(f'`{name}`' for name in zero[:3])}{more} ({share:.0%} of the numbers that require a "
                f"gradient) got an importance of exactly 0 from every sample: nothing holds them in place. {why}",
                stacklevel=caller_level(),
            )

    def _check_anchor(self) -> None:
        anchors = self._named(self.tasks - 1, "anchor")
        for name, parameter in unwrap(self._model[0]).named_parameters():
            anchor = anchors.get(plain_name(name))
            if anchor is not None and int(self._buffer("samples")):
                _check_shape(name, parameter, anchor)
            if anchor is not None and not torch.equal(parameter.detach().to(anchor), anchor):
                if not int(self._buffer("samples")):
                    self._open(self.tasks - 1)  # The anchor is where the first measurement is.
                    return
                raise ValueError(
                    f"`{name}` should be where its importance was first measured, found that it has moved: call "
                    "`begin_task()` to remember what was learned since."
                )

    def _check_measured(self) -> None:
        if not self._measured:  # Reading the buffer instead would wait for the device at every step.
            raise ValueError("The importance should be there, found not measured: call `accumulate(loss_fn, batches)`.")

    def _buffer(self, kind: str) -> Tensor:
        return self.get_buffer(f"{self.tasks - 1}/{kind}")

    def _named(self, task: int, kind: str) -> dict[str, Tensor]:
        start = f"{task}/{kind}/"
        return {
            parameter_name(name.removeprefix(start)): value
            for name, value in self._buffers.items()
            if name.startswith(start) and value is not None
        }

    def get_extra_state(self) -> Tensor:
        """The estimator, by its place among all: an importance means nothing to another one."""
        return torch.tensor(get_args(Estimator).index(self.estimator))

    def set_extra_state(self, state: Tensor) -> None:
        """Checked when the state is loaded."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        measured = state_dict.get(f"{prefix}_extra_state")
        if measured is not None and (found := get_args(Estimator)[int(measured)]) != self.estimator:
            raise ValueError(f"`state_dict` should hold importances of {self.estimator!r}, found those of {found!r}.")
        # What was measured elsewhere replaces what is here, with other tasks and parameters that this network lacks.
        loaded = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix) and k != f"{prefix}_extra_state"]
        if any(name.endswith("/samples") for name in loaded):
            devices = {plain_name(name): p.device for name, p in unwrap(self._model[0]).named_parameters()}
            usual = next(iter(devices.values()), None)
            self._buffers.clear()
            for name in loaded:
                device = devices.get(parameter_name(name.split("/", 2)[-1]), usual)
                self.register_buffer(name, torch.empty_like(state_dict[prefix + name], device=device))
        super()._load_from_state_dict(state_dict, prefix, *others)
        samples = self._buffer("samples")
        self._measured = self.estimator == "l2sp" or samples.is_meta or int(samples) > 0

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.estimator}, strength={self.strength:g}, {self.tasks} task(s), {self._buffer('samples')} samples"


def _check_shape(name: str, parameter: Tensor, measured: Tensor) -> None:
    if parameter.shape != measured.shape:
        raise ValueError(
            f"`{name}` should be of shape {tuple(measured.shape)}, as when its importance was measured, found "
            f"{tuple(parameter.shape)}: keep what has grown in a module of its own, which is not charged, or leave it "
            f"out by `importance.layer_weights = {{{name!r}: 0}}`."
        )


def _exact(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
