"""The cost of an iteration of EDTR, next to the same iteration written plainly.

    python -m examples.benchmarks.edtr_cost

Both update the restorer by the HLF loss, then the task network by its task and the FM loss (Algorithm S1), on the same
images and noise; pre-restoration and encoding are done once, and the task network reads its batch once, in both.
Written plainly, the HLF loss runs both task networks to their end with their weights in the graph, the features of HQ
images carry a graph too, and the teacher sees the HQ images once more for the FM loss. Time is measured in turn,
round after round; the ratio is the median over the rounds. Memory is the growth of the process's peak during two
iterations, each variant in a process of its own. The gradients must be equal, or the benchmark fails.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

from examples.benchmarks.measure import peak_of_each, seconds
from restoreloss import FeatureExtractor, FeatureMatchingLoss, HLFLoss
from restoreloss.normalization import IMAGENET
from restoreloss.restorers.edtr import EDTR, Hint
from restoreloss.restorers.shapes import small_latent_prior

VARIANTS = ("plain", "ours")
Iteration = Callable[[], tuple[list[Tensor], list[Tensor]]]
"""Gives the gradients of the restorer and of the task network."""


def networks() -> tuple[EDTR, nn.Module, nn.Module]:
    """A small restorer, a ResNet18 in training and another one that was trained before."""
    torch.manual_seed(0)
    edtr = EDTR(nn.Identity(), small_latent_prior(12))
    return edtr, resnet18(num_classes=200).train(), resnet18(num_classes=200).eval()


def iteration(variant: str, batch: int, size: int) -> Iteration:
    edtr, task, reference = networks()
    generator = torch.Generator().manual_seed(1)
    first, second, degraded = torch.rand(3, batch // 2, 3, size, size, generator=generator)
    labels = torch.randint(200, (batch,), generator=generator)
    noise = torch.randn(edtr.hint(degraded).latents.shape, generator=generator)
    t = torch.full((len(first),), 200)

    def scaled(images: Tensor) -> Tensor:
        result: Tensor = normalize(images, list(IMAGENET[0]), list(IMAGENET[1]))
        return result

    def gradients(network: nn.Module) -> list[Tensor]:
        return [p.grad for p in network.parameters() if p.grad is not None]

    def read(hint: Hint) -> Tensor:
        with torch.no_grad():
            return torch.cat([edtr(hint, [200], noise=noise), second])

    student, teacher = FeatureExtractor(task), FeatureExtractor(reference)
    hlf, matching = HLFLoss(student, teacher), FeatureMatchingLoss(student, teacher)

    def ours() -> tuple[list[Tensor], list[Tensor]]:
        edtr.zero_grad()
        task.zero_grad()
        hint = edtr.hint(degraded)
        with teacher.shared():
            hlf(edtr(hint, t, noise=noise), first).backward()
            of_restorer = gradients(edtr)
            images = read(hint)
            with student.recording() as seen:
                logits = task(scaled(images))
            half = {name: (value[: len(first)], value[len(first) :]) for name, value in seen.items()}
            parts = [
                matching({name: value[k] for name, value in half.items()}, hq) for k, hq in enumerate((first, second))
            ]
            (F.cross_entropy(logits, labels) + (parts[0] + parts[1]) / 2).backward()
        return of_restorer, gradients(task)

    def run(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        hook = network.get_submodule("layer4").register_forward_hook(lambda *call: kept.append(call[-1]))
        logits = network(scaled(images))
        hook.remove()
        return kept[0], logits

    def plain() -> tuple[list[Tensor], list[Tensor]]:
        for network in (edtr, task, reference):
            network.zero_grad()
        reference.requires_grad_(True)
        hint = edtr.hint(degraded)
        restored = edtr(hint, t, noise=noise)
        task.eval()
        losses = [F.l1_loss(run(network, restored)[0], run(network, first)[0]) for network in (task, reference)]
        ((losses[0] + losses[1]) / 2).backward()
        of_restorer = gradients(edtr)
        task.zero_grad()
        task.train()
        features, logits = run(task, read(hint))
        wanted = run(reference, torch.cat([first, second]))[0].detach()
        (F.cross_entropy(logits, labels) + F.l1_loss(features, wanted)).backward()
        return of_restorer, gradients(task)

    return ours if variant == "ours" else plain


def iteration_alone(variant: str, batch: int, size: int) -> Iteration:
    """The iteration of a variant in a process of its own."""
    torch.set_num_threads(1)
    return iteration(variant, batch, size)


def restoring(batch: int, size: int, rounds: int) -> None:
    """Seconds of one, four and fifty steps, in turn; and whose parameters there are."""
    edtr, _, _ = networks()
    edtr.eval()
    degraded = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    times: dict[int, list[float]] = {1: [], 4: [], 50: []}
    for _ in tqdm(range(rounds), desc="restoring"):
        for n, found in times.items():
            found.append(seconds(lambda n=n: edtr.restore(degraded, n=n)))  # type: ignore[misc]
    long, few, one = (statistics.median(times[n]) for n in (50, 4, 1))
    print(f"restoring, 1 / 50 and 4 / 50 steps {one / long:.3f}, {few / long:.3f}")
    trained = sum(p.numel() for p in edtr.parameters())
    held = (edtr._pre, edtr._encoder, edtr._unet)
    frozen = sum(p.numel() for part in held if part is not None for p in part.network.parameters())
    print(f"parameters, trained + frozen      {trained:,} + {frozen:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="half of it is restored (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of the images (default: %(default)s)")
    args = parser.parse_args()
    memory = peak_of_each(iteration_alone, VARIANTS, args.batch, args.size)
    steps = {variant: iteration(variant, args.batch, args.size) for variant in VARIANTS}
    found = {variant: [[g.clone() for g in part] for part in step()] for variant, step in steps.items()}
    gaps = []
    for mine, theirs in zip(found["ours"], found["plain"], strict=True):
        one, other = (torch.cat([g.flatten() for g in part]) for part in (mine, theirs))
        gaps.append(float((one - other).norm() / other.norm()))
    ratios = []
    for _ in tqdm(range(args.rounds), desc="rounds"):
        times = [seconds(steps[variant]) for variant in VARIANTS]
        ratios.append(times[1] / times[0])
    print(f"{args.batch} images of {args.size}x{args.size}, ResNet18, small prior; {args.rounds} rounds\n")
    print(f"time, ours / plain                {statistics.median(ratios):.2f}")
    print(f"peak memory, ours / plain         {memory['ours'] / memory['plain']:.2f}")
    print(f"gradients differ by               {gaps[0]:.1e} (restorer), {gaps[1]:.1e} (task network)")
    restoring(args.batch, args.size, args.rounds)
    if max(gaps) > 1e-3:
        raise SystemExit("Both iterations should give the same gradients.")
    if statistics.median(ratios) > 0.85 or memory["ours"] > 0.8 * memory["plain"]:
        raise SystemExit("An iteration should take at most 0.85 of the plain one's time and 0.8 of its memory.")


if __name__ == "__main__":
    main()
