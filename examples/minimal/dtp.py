"""DTP in one file: a restoration network learns to generate first, then to restore without forgetting it.

    python -m examples.minimal.dtp

Pre-training (TMGP) takes noise of every strength out of clean photographs. Matching finds the strength that is most
like rain (t*). Fine-tuning (GEF) on rain runs twice from the same start: plain, and with what keeps the network from
forgetting. It prints PSNR on held-out photographs, in such rain and in rain from the other side, and the loss of the
pre-training. Here GEF forgets less and pays with PSNR; the paper's gain in unseen conditions does not show.

"Elucidating and Endowing the Diffusion Training Paradigm for General Image Restoration", arXiv 2506.21722.
"""

import argparse
import copy
from collections.abc import Sequence

import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomCrop

from restoreloss import DenoisingLoss, GradientOrthogonality, NoiseLevels, ParameterImportance, match_timestep
from restoreloss.regularizers.layer_decay import execution_order, layer_weights, shallow

TRAIN, TEST = ("astronaut", "brick", "coins", "grass"), ("camera", "chelsea", "coffee", "rocket")
BATCH, CROP, T, STRENGTH = 8, 32, 50, 0.02


def photograph(name: str) -> Tensor:
    """A photograph of scikit-image, (3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(getattr(skimage.data, name)()).float() / 255
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)


def crops(photographs: Sequence[Tensor], count: int, size: int) -> Tensor:
    """Random crops of random photographs, (N, 3, size, size)."""
    chosen = torch.randint(len(photographs), (count,)).tolist()
    return torch.stack([RandomCrop(size)(photographs[k]) for k in chosen])


def rain(clean: Tensor, *, mirrored: bool = False) -> Tensor:
    """Slanted streaks in a noisy photograph; mirrored ones slant to the other side, which no training shows."""
    streak = torch.eye(9)[None, None] if mirrored else torch.eye(9).flip(1)[None, None]
    streaks = F.conv2d((torch.rand_like(clean[:, :1]) < 0.01).float(), streak, padding=4)
    return (clean + 0.3 * streaks + 5 / 255 * torch.randn_like(clean)).clamp(0, 1)


class Restorer(nn.Module):
    """Plain convolutions and a time embedding, (N, 3, H, W) to the same; TimeConditioned gives t to other networks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        hidden = [layer for _ in range(4) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.GELU())]
        self.first, self.time = nn.Conv2d(3, width, 3, padding=1), nn.Embedding(T + 1, width)
        self.body = nn.Sequential(nn.GELU(), *hidden, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, degraded: Tensor, t: Tensor) -> Tensor:
        return degraded + self.body(self.first(degraded) + self.time(t)[:, :, None, None])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of pre-training, and half as many of each fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    photos = [photograph(name) for name in TRAIN]
    test = torch.cat([crops([photograph(name)], 12, 64) for name in TEST])
    rainy, mirrored = rain(test), rain(test, mirrored=True)
    # TMGP (Eqs. 11, 13): x_t = x + sigma_t e with t ~ U{1..T}; L_gen = |restored - x|_1.
    net, levels = Restorer(), NoiseLevels.ir_sde(T, prediction_type="sample")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(options.steps):
        optimizer.zero_grad()
        DenoisingLoss(net, levels)(crops(photos, BATCH, CROP)).backward()
        optimizer.step()
    # t* (Algorithm 2): the timestep at which the pre-trained network restores the degraded images best.
    clean = crops(photos, 32, CROP)
    match = match_timestep(net, levels, rain(clean), clean, timesteps=range(1, T + 1, 2))
    t_star = torch.tensor([match.best])
    print(f"rain: t* = {match.best} of {T}, which takes away {match.gain:.1%} of the distance to the clean images")

    @torch.no_grad()
    def report(name: str) -> None:
        generative = DenoisingLoss(net, levels)(test, generator=torch.Generator().manual_seed(0))
        psnr = [-10 * F.mse_loss(net(x, t_star).clamp(0, 1), test).log10().item() for x in (rainy, mirrored)]
        print(f"{name:12} PSNR {psnr[0]:.2f} dB, mirrored {psnr[1]:.2f} dB, generative loss {255 * generative:.2f}")

    report("pre-trained")
    pretrained = copy.deepcopy(net.state_dict())
    for method in ("plain", "GEF"):
        torch.manual_seed(options.seed + 1)
        net.load_state_dict(pretrained)
        # Omega = E|dL_gen / d theta| at theta_0 (Eqs. 14-16), weighed by depth: w_l = exp(-a t* l / (L - 1)) (Eq. 10).
        order = execution_order(net, clean[:1], t_star)
        importance = ParameterImportance(net, strength=STRENGTH, layer_weights=layer_weights(order, match.best))
        t = torch.randint(1, T + 1, (len(clean),))
        x_t = levels.add_noise(clean, torch.randn_like(clean), t)
        importance.accumulate(lambda model, batch: F.l1_loss(model(*batch[:2]), batch[2]), [(x_t, t, clean)])
        orthogonality = GradientOrthogonality(shallow(net, order, 0.5))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for step in range(max(1, options.steps // 2)):
            x = crops(photos, BATCH, CROP)
            reconstruction = F.l1_loss(net(rain(x), t_star), x)  # L_rec
            optimizer.zero_grad()
            if method == "GEF" and step % 10 == 0:
                # Generation, too: the shallow layers learn from it what does not oppose restoration.
                generation = DenoisingLoss(net, levels)(crops(photos, BATCH, CROP))
                orthogonality.project(generation, reconstruction, others=net.parameters())
            else:
                reconstruction.backward()
            if method == "GEF":
                importance.apply_()  # the gradient of L_reg = lambda sum Omega |d| + Omega^2 d^2 / 2
            optimizer.step()
        report(method)


if __name__ == "__main__":
    main()
