"""Alternation: modes of layers, and precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

from restoreloss import Alternation, Phase, TDPLoss
from tests.helpers.phases import (
    assert_same_state,
    assert_untouched,
    changed,
    make_batch,
    make_batches,
    make_classifier,
    make_joint_phases,
    make_restorer,
    see,
)

# Modes


class TwoFaced(nn.Module):
    """Like torchvision's detectors: a loss in train mode, a prediction in eval mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Dropout2d(0.5))
        self.body.append(nn.InstanceNorm2d(4, track_running_stats=True))

    def forward(self, images, label=None):
        scores = self.body(images).mean(dim=(2, 3))
        return F.cross_entropy(scores, label) if self.training else scores


def test_resting_network_in_train_mode_gives_its_loss_and_keeps_its_statistics():
    restorer, network = make_restorer(chance=False), TwoFaced()
    network.body[2].eval()
    before, start, values = see(network), see(restorer), []

    def objective(batch):
        assert network.training and network.body.training
        assert not any(part.training for part in network.body[1:])
        assert not any(parameter.requires_grad for parameter in network.parameters())
        restored = restorer(batch.degraded)
        values.append([network(restored, batch.label) for _ in range(2)])
        return values[-1][0]

    phase = Phase(
        "one",
        [restorer],
        objective,
        SGD(restorer.parameters(), lr=0.1),
        frozen=[network],
        modes={network: "train"},
    )
    Alternation([phase]).step(make_batch())
    assert torch.equal(*values[0])  # dropout would show
    assert_untouched(network, before)
    assert len(changed(restorer, start)) == 4


def make_detector():
    detection = pytest.importorskip("torchvision.models.detection")
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.2), nn.ReLU())
    backbone.out_channels = 6
    return detection.FasterRCNN(
        backbone,
        min_size=32,
        max_size=48,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((8, 16),), ((1.0,),)),
        box_roi_pool=pytest.importorskip("torchvision.ops").MultiScaleRoIAlign(["0"], 3, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(6 * 9, 8),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 2),
        rpn_post_nms_top_n_train=20,
    )


def test_restorer_learns_from_the_losses_of_a_resting_detector():
    torch.manual_seed(0)
    restorer, detector = make_restorer(), make_detector()
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])}] * 2
    before, start = see(detector), see(restorer)

    def restore(batch):
        kept = [part for part in detector.modules() if isinstance(part, nn.BatchNorm2d | nn.Dropout)]
        assert len(kept) == 2 and not any(part.training for part in kept)
        assert detector.training and detector.rpn.training and detector.roi_heads.training
        return detector(list(restorer(batch)), targets)

    def detect(batch):
        assert all(part.training for part in detector.modules())
        return detector(list(restorer(batch)), targets)

    images = torch.rand(2, 3, 32, 32)
    first = Phase(
        "restorer",
        [restorer],
        restore,
        SGD(restorer.parameters(), lr=1e-3),
        frozen=[detector],
        modes={detector: "train"},
    )
    logs = Alternation([first]).step(images)
    names = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    assert list(logs) == [f"restorer/{name}" for name in names]
    assert all(value.isfinite() for value in logs.values())
    assert_untouched(detector, before)
    assert {"0.weight", "4.weight", "4.bias"} <= changed(restorer, start)
    second = Phase("detector", [detector], detect, SGD(detector.parameters(), lr=1e-3))
    assert len(Alternation([first, second]).step(images)) == 8
    assert {"backbone.0.weight", "rpn.head.cls_logits.weight"} <= changed(detector, before)
    assert see(detector)[:2] == before[:2]


def test_modes_hold_for_parts_of_the_trained_and_in_the_order_given():
    classifier = make_classifier()
    norm, before = classifier.features[1], see(classifier)

    def objective(batch):
        modes = {name for name, part in classifier.named_modules() if not part.training}
        assert modes == {"features", "features.0", "features.1", "features.3"}
        return F.cross_entropy(classifier(batch.clean), batch.label)

    phase = Phase(
        "one",
        [classifier],
        objective,
        SGD(classifier.parameters(), lr=0.1),
        modes={classifier.features: "eval", classifier.features[2]: "train"},
    )
    Alternation([phase]).step(make_batch())
    assert torch.equal(norm.running_mean, before[3]["features.1.running_mean"])
    assert changed(classifier, before) == {name for name, _ in classifier.named_parameters()}
    assert see(classifier)[0] == before[0]


def test_trained_part_of_a_resting_network_in_train_mode_learns_with_its_statistics():
    network = TwoFaced()
    before = see(network)
    norm = network.body[1]

    def objective(batch):
        assert network.training and norm.training and not network.body[2].training
        return network(batch.clean, batch.label)

    phase = Phase("one", [norm], objective, SGD(norm.parameters(), lr=0.1), frozen=[network], modes={network: "train"})
    Alternation([phase]).step(make_batch())
    assert not torch.equal(norm.running_mean, before[3]["body.1.running_mean"])
    assert changed(network, before) <= {"body.1.weight", "body.1.bias"}
    assert see(network)[:2] == before[:2]


def test_network_that_only_modes_mention_is_put_back_and_rests():
    restorer, network = make_restorer(), TwoFaced().eval()
    before = see(network)
    phase = Phase(
        "one",
        [restorer],
        lambda batch: network(restorer(batch.degraded), batch.label),
        SGD(restorer.parameters(), lr=0.1),
        modes={network: "train"},
    )
    try:
        Alternation([phase]).step(make_batch())
    except ValueError:
        return
    assert_untouched(network, before)


def test_part_of_the_trained_that_is_called_frozen_is_refused_or_rests():
    classifier = make_classifier()
    before = see(classifier)
    try:
        phase = Phase(
            "one",
            [classifier],
            lambda batch: F.cross_entropy(classifier(batch.clean), batch.label),
            SGD(classifier.parameters(), lr=0.1),
            frozen=[classifier.features],
        )
        Alternation([phase]).step(make_batch())
    except ValueError:
        return
    assert changed(classifier, before) == {"head.weight", "head.bias"}


# Precision


def test_precision_is_that_of_the_objective_and_of_nothing_else():
    def build():
        restorer, classifier = make_restorer(), make_classifier()
        return restorer, classifier, TDPLoss(classifier, ["features"]), AdamW(restorer.parameters(), lr=1e-2)

    def objective(restorer, tdp, batch):
        restored = restorer(batch.degraded)
        assert restored.dtype == torch.bfloat16
        return {"pixel": F.l1_loss(restored, batch.clean), "tdp": tdp(restored, batch.clean)}

    restorer, classifier, tdp, optimizer = build()
    torch.manual_seed(2)
    for batch in make_batches(2):
        optimizer.zero_grad()
        classifier.eval().requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(objective(restorer, tdp, batch).values())
        loss.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in restorer.parameters())
        optimizer.step()
    expected = restorer.state_dict()

    restorer, classifier, tdp, optimizer = build()
    torch.manual_seed(2)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append(torch.is_autocast_enabled("cpu")))
    restorer[0].weight.register_hook(lambda grad: seen.append((grad.dtype, torch.is_autocast_enabled("cpu"))))
    phase = Phase("one", [restorer], lambda b: objective(restorer, tdp, b), optimizer, frozen=[classifier])
    training = Alternation([phase], precision=torch.bfloat16)
    for batch in make_batches(2):
        logs = training.step(batch)
    assert_same_state(restorer.state_dict(), expected)
    assert seen == [(torch.float32, False), False] * 2
    assert all(value.isfinite() for value in logs.values())
    assert not torch.is_autocast_enabled("cpu")


def test_scaler_gives_the_gradient_of_the_loss_itself():
    results = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2), None):
        networks = make_restorer(chance=False), make_classifier(chance=False)
        training = Alternation(make_joint_phases(*networks, max_norm=0.05), scaler=scaler)
        logs = [training.step(batch) for batch in make_batches(3)]
        results.append([logs, [network.state_dict() for network in networks]])
        if scaler is not None:
            assert scaler.get_scale() == 2.0**15  # doubled with every second phase
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_float16_with_a_scaler_is_the_loop_written_by_hand():
    batches = list(make_batches(3))

    def objective(restorer, batch):
        restored = restorer(batch.degraded)
        assert restored.dtype == torch.float16
        return F.l1_loss(restored.float(), batch.clean)

    restorer, scaler = make_restorer(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = SGD(restorer.parameters(), lr=0.1)
    torch.manual_seed(2)
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = objective(restorer, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(restorer.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    expected = restorer.state_dict()

    restorer, scaler = make_restorer(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(2)
    phase = Phase("one", [restorer], lambda b: objective(restorer, b), SGD(restorer.parameters(), lr=0.1), max_norm=0.1)
    training = Alternation([phase], precision=torch.float16, scaler=scaler)
    logs = [training.step(batch) for batch in batches]
    assert_same_state(restorer.state_dict(), expected)
    assert torch.equal(logs[-1]["one/grad_norm"], norm)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_step_with_an_infinite_gradient_is_skipped_for_its_phase_alone(max_norm):
    restorer, classifier = make_restorer(chance=False), make_classifier(chance=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    optimizer = AdamW(restorer.parameters(), lr=1e-2)
    factor = [1e10]  # times the scale is more than float32 holds
    training = Alternation(
        [
            Phase(
                "restorer",
                [restorer],
                lambda b: factor[0] * F.l1_loss(restorer(b.degraded), b.clean),
                optimizer,
                max_norm=max_norm,
            ),
            Phase(
                "classifier",
                [classifier],
                lambda b: F.cross_entropy(classifier(b.clean), b.label),
                SGD(classifier.parameters(), lr=0.1),
            ),
        ],
        scaler=scaler,
    )
    before = see(restorer), see(classifier)
    logs = training.step(make_batch())
    assert not changed(restorer, before[0]) and not optimizer.state
    assert len(changed(classifier, before[1])) == 4
    assert scaler.get_scale() == 2.0**119
    assert logs["restorer/loss"].isfinite()
    assert max_norm is None or not logs["restorer/grad_norm"].isfinite()
    factor[0] = 1.0
    training.step(make_batch())
    assert len(changed(restorer, before[0])) == 4
    assert all(parameter.isfinite().all() for parameter in restorer.parameters())
    assert scaler.get_scale() == 2.0**119


def test_accelerator_changes_no_number(accelerate):
    results = []
    for accelerator in (None, accelerate.Accelerator(cpu=True)):
        restorer, classifier = make_restorer(), make_classifier()
        first, second = AdamW(restorer.parameters(), lr=1e-2), SGD(classifier.parameters(), lr=0.1, momentum=0.9)
        schedulers = [StepLR(first, 1, gamma=0.5), StepLR(second, 1, gamma=0.5)]
        own = restorer, classifier
        if accelerator is not None:
            restorer, classifier, first, second, *schedulers = accelerator.prepare(*own, first, second, *schedulers)
        tdp = TDPLoss(classifier, ["features"])

        def restore(batch, restorer=restorer, tdp=tdp):
            restored = restorer(batch.degraded)
            return {"pixel": F.l1_loss(restored, batch.clean), "tdp": tdp(restored, batch.clean)}

        def recognise(batch, restorer=restorer, classifier=classifier):
            return F.cross_entropy(classifier(restorer(batch.degraded)), batch.label)

        training = Alternation(
            [
                Phase("restorer", [restorer], restore, first, schedulers[0], max_norm=0.05),
                Phase("classifier", [classifier], recognise, second, schedulers[1]),
            ],
            accelerator=accelerator,
        )
        torch.manual_seed(2)
        logs = [training.step(*make_batches(2, seed=step)) for step in range(3)]
        assert logs[0]["restorer/grad_norm"] > 0.05
        assert [each.param_groups[0]["lr"] for each in (first, second)] == [1e-2 / 8, 0.1 / 8]
        results.append([*logs, *(network.state_dict() for network in own)])
    for found, expected in zip(*results, strict=True):
        assert_same_state(found, expected)


def test_accelerator_does_the_autocast_and_the_backward(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    restorer, classifier = make_restorer(), make_classifier()
    own, tdp = restorer, TDPLoss(classifier, ["features"])
    restorer, optimizer = accelerator.prepare(restorer, SGD(restorer.parameters(), lr=0.1))
    before, seen = see(own), []

    def objective(batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        restored = restorer(batch.degraded)
        return {"pixel": F.l1_loss(restored, batch.clean), "tdp": tdp(restored, batch.clean)}

    backward, losses = accelerator.backward, []
    accelerator.backward = lambda loss, **options: (losses.append(loss), backward(loss, **options))
    phase = Phase("one", [restorer], objective, optimizer, frozen=[classifier])
    logs = Alternation([phase], accelerator=accelerator).step(make_batch())
    assert seen == [True] and len(losses) == 1
    torch.testing.assert_close(losses[0].detach().float(), (logs["one/pixel"] + logs["one/tdp"]).float())
    assert len(changed(own, before)) == 6


def test_a_resting_ddp_network_is_as_it_was_after_an_objective_that_raised(process_group):
    restorer, network = make_restorer(chance=False), nn.parallel.DistributedDataParallel(make_classifier())

    def objective(batch):
        raise RuntimeError("no")

    phase = Phase("one", [restorer], objective, SGD(restorer.parameters(), lr=0.1), frozen=[network])
    with pytest.raises(RuntimeError, match="no"):
        Alternation([phase]).step(make_batch())
    assert network.require_forward_param_sync and network.require_backward_grad_sync
