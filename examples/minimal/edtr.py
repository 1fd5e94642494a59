"""EDTR in one file: a diffusion model restores images for a task network, in two steps from a first restoration.

    python -m examples.minimal.edtr

What EDTR begins with is as small as will do and trains here first: replace it by Stable Diffusion, a SwinIR and your
classifier. EDTR itself (Algorithm S1) trains a ControlNet, the decoder and the task network H. It prints how many test
digits are read correctly by H, by H_HQ, which was trained on clean images alone, and by a control: a copy of H_HQ that
trained on pre-restored images for as long as H. Here H_HQ reads EDTR's images best, and the control more than H does.

Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", ICCV 2025.
"""

import argparse
import copy
import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

from restoreloss import FeatureMatchingLoss, HLFLoss, NoiseSchedule, WaveletColorFix, partial_diffusion, short_steps

layer = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


def convs(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(nn.Sequential(layer(i, o), nn.BatchNorm2d(o), nn.ReLU()) for i, o in pairs))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of EDTR, after three times as many for its parts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    digits = load_digits()  # 1,797 handwritten ones of 8 x 8 pixels, of which the last 397 are for the test
    images, labels = torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target)
    degraded = F.interpolate(F.interpolate(images, size=3, mode="bilinear", antialias=True), size=8, mode="bilinear")

    # The parts: R_pix, encoder E (its latents have unit variance) and decoder D, U-Net eps_theta, task network H_HQ.
    r_pix = nn.Sequential(convs(1, 32, 32), layer(32, 1))
    encoder = nn.Sequential(nn.PixelUnshuffle(2), convs(4, 32, 32), layer(32, 4), nn.BatchNorm2d(4, affine=False))
    decoder = nn.Sequential(convs(4, 32, 32), layer(32, 4), nn.PixelShuffle(2))
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=8, attention_head_dim=8,
    )  # fmt: skip
    backbone = nn.Sequential(convs(1, 16, 32), nn.MaxPool2d(2), convs(32, 32))
    h_hq = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    schedule, color_fix, t_n = NoiseSchedule.scaled_linear(), WaveletColorFix(levels=1), short_steps(200, 2)

    # None of them shares a parameter with another, so that one loop and one optimizer train all of them.
    parts = nn.ModuleList([r_pix, encoder, decoder, unet, h_hq])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=2e-3)
    for _ in range(3 * options.steps):
        batch = torch.randint(1400, (32,))
        latents = encoder(images[batch])
        t, noise = torch.randint(1000, (32,)), torch.randn(latents.shape)
        z_t = schedule.add_noise(latents.detach(), noise, t)
        loss = F.mse_loss(unet(z_t, t, torch.zeros(32, 1, 8)).sample, noise)  # Eq. 2
        loss = loss + F.mse_loss(decoder(latents), images[batch]) + F.l1_loss(r_pix(degraded[batch]), images[batch])
        loss = loss + F.cross_entropy(h_hq(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parts.eval().requires_grad_(False)

    # EDTR trains a ControlNet, whose hint is z_pre, and D; H and the control begin as H_HQ.
    controlnet = ControlNetModel.from_unet(unet, conditioning_channels=4, conditioning_embedding_out_channels=(32,))
    h, control = (copy.deepcopy(h_hq).requires_grad_(True).train() for _ in range(2))
    hlf, fm = HLFLoss(h, h_hq, "0", normalize=None), FeatureMatchingLoss(h, h_hq, "0", normalize=None)

    def edtr(pre: Tensor, steps: Tensor | Sequence[int]) -> Tensor:
        """I = High(D(z_0)) + Low(R_pix(I_LQ)), z_0 denoised from the noisy z_pre = E(R_pix(I_LQ)) (Eqs. 3 to 6)."""
        z_pre, empty = encoder(pre), torch.zeros(len(pre), 1, 8)

        def eps_theta(z_t: Tensor, t: Tensor) -> Tensor:
            down, mid = controlnet(z_t, t, empty, z_pre, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            return unet(z_t, t, empty, **residuals).sample

        return color_fix(decoder(partial_diffusion(eps_theta, z_pre, steps, schedule)), pre)

    optimizer = torch.optim.AdamW([*controlnet.parameters(), *decoder.requires_grad_(True).parameters()], lr=1e-3)
    h_optimizer = torch.optim.SGD([*h.parameters(), *control.parameters()], lr=5e-3, momentum=0.9)
    for _ in range(options.steps):
        batch = torch.randint(1400, (32,))
        clean, label = images[batch], labels[batch]  # half is restored, half stays clean
        pre = r_pix(degraded[batch[:16]])

        # ControlNet and D learn from HLF (Eq. 7) of the one-step result of a timestep drawn from T_n = [200, 100].
        t = torch.tensor(t_n)[torch.randint(len(t_n), (16,))]
        optimizer.zero_grad()
        hlf(edtr(pre, t), clean[:16]).backward()
        optimizer.step()

        # H learns the task on n-step results and clean images (Eq. 8), to see in both what H_HQ sees in clean (Eq. 9).
        with torch.no_grad():
            mixed = torch.cat([edtr(pre, t_n).clamp(0, 1), clean[16:]])
        loss = F.cross_entropy(h(mixed), label) + 1.0 * fm(mixed, clean)  # alpha = 1 for classification
        loss = loss + F.cross_entropy(control(torch.cat([pre, clean[16:]])), label)
        h_optimizer.zero_grad()
        loss.backward()
        h_optimizer.step()

    with torch.no_grad():
        pre = r_pix(degraded[1400:])
        restored, rows = edtr(pre, t_n).clamp(0, 1), ("degraded", "pre-restored", "EDTR", "clean")
        for name, x in zip(rows, (degraded[1400:], pre, restored, images[1400:]), strict=True):
            correct = [(net.eval()(x).argmax(1) == labels[1400:]).float().mean() for net in (h_hq, control, h)]
            print(f"{name:12} read by H_HQ {correct[0]:.1%}, by the control {correct[1]:.1%}, by H {correct[2]:.1%}")


if __name__ == "__main__":
    main()
