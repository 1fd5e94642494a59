"""UniRestore in one file: a restorer for people and for machines, told which by a prompt; a new task is a new prompt.

    python -m examples.minimal.unirestore

The autoencoder, the diffusion model in its latents and the recognizers are as small as will do and train here first.
Stage 1 restores the encoder's features (CFRM) and steers the diffusion model (Controller, SC-Tuner). Stage 2 trains the
decoder's adapters (TFA) with a prompt for people and one for a recognizer of digits. Stage 3 adds a prompt for another
recognizer, odd or even, and nothing else learns: the outputs for the other tasks stay the same to the last bit.

Chen et al., "UniRestore: Unified Perceptual and Task-Oriented Image Restoration Model Using Diffusion Prior", 2025.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from restoreloss import CFRM, TFA, Controller, NoiseSchedule, SCTuner


def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.GELU())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of each stage, and of the parts before")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    digits = load_digits()  # 1,797 handwritten ones of 8 x 8 pixels, of which the last 397 are for the test
    images, labels = torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target)
    # The frozen parts: autoencoder, a U-Net of two resolutions that predicts the clean latents z_0, two recognizers.
    to_latents = nn.Sequential(nn.Conv2d(32, 4, 1), nn.BatchNorm2d(4, affine=False))  # of unit variance
    encoder, up = nn.Sequential(block(1, 16), block(16, 32, 2), to_latents), nn.Upsample(scale_factor=2)
    decoder = nn.Sequential(block(4, 32), nn.Sequential(up, block(32, 16)), nn.Conv2d(16, 1, 1))
    unet = nn.ModuleList([nn.Conv2d(4, 32, 3, padding=1), block(32, 32, 2), block(64, 32), nn.Conv2d(64, 4, 1)])
    time, schedule = nn.Embedding(1000, 32), NoiseSchedule.scaled_linear(prediction_type="sample")
    body = [(block(1, 16), block(16, 32, 2), block(32, 32, 2), nn.Flatten()) for _ in range(2)]
    digit, parity = nn.Sequential(*body[0], nn.Linear(128, 10)), nn.Sequential(*body[1], nn.Linear(128, 2))
    # What UniRestore trains; it changes nothing until it has learned to. gate="sigmoid" lets prompts reach further.
    cfrm, tfa = nn.ModuleList([CFRM(16), CFRM(32)]), TFA([32, 16], [32, 16], tasks=["people", "digit"], gate="sigmoid")
    controller = Controller(4, channels=16, multipliers=(1, 2), control_channels=16, heads=2, groups=4)
    tuners = nn.ModuleList([SCTuner(32, 16), SCTuner(32, 16)])

    def encode(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Latents and the restored features of two levels; what lies behind a CFRM reads these detached."""
        f_1 = cfrm[0](encoder[0](x))
        f_2 = cfrm[1](encoder[1](f_1.detach()))
        return encoder[2](f_2.detach()), [f_1, f_2]

    def predict_z0(z_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The U-Net, steered by the latents of the degraded image through its skip connections."""
        fine = unet[0](z_t) + time(t)[:, :, None, None]
        coarse, (c_fine, c_coarse) = unet[1](fine), controller(condition, t)
        h = F.interpolate(unet[2](torch.cat([coarse, tuners[1](coarse, c_coarse)], 1)), scale_factor=2.0)
        return unet[3](torch.cat([h, tuners[0](fine, c_fine)], 1))

    def restore(degraded: Tensor, tasks: str | list[str], generator: torch.Generator | None = None) -> Tensor:
        """Encode, denoise in one step from t = 999, decode with the features that each task wants (Eq. 1)."""
        with torch.no_grad():
            z, (f_1, f_2) = encode(degraded)
            t = torch.full((len(z),), 999)
            z_0 = predict_z0(schedule.add_noise(z, torch.randn(z.shape, generator=generator), t), t, z)
        h, prompt = tfa.levels[0](decoder[0](z_0), f_2, tfa.prompt(tasks, len(z)))
        h, prompt = tfa.levels[1](decoder[1](h), f_1, prompt)
        return decoder[2](h)

    adapters = nn.ModuleList([cfrm, controller, tuners])
    parts = nn.ModuleList([encoder, decoder, unet, time, digit, parity])
    for stage, trained in (("parts", parts), ("stage 1", adapters), ("stage 2", tfa)):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3)
        for _ in range(options.steps):
            batch = torch.randint(1400, (32,))
            clean, label = images[batch], labels[batch]
            degraded = (clean + 0.4 * torch.randn_like(clean)).clamp(0, 1)
            if stage == "stage 2":  # half of the batch for people, half for the recognizer
                restored = restore(degraded, ["people"] * 16 + ["digit"] * 16)
                loss = 10 * F.mse_loss(restored[:16], clean[:16]) + F.cross_entropy(digit(restored[16:]), label[16:])
            else:
                z_0, (z, features) = encoder(clean), encode(degraded)
                t = torch.tensor([249, 499, 749, 999, 999, 999])[torch.randint(6, (32,))]
                z_t = schedule.add_noise(z_0, torch.randn(z_0.shape), t).detach()
                loss = F.mse_loss(predict_z0(z_t, t, z), z_0.detach())  # L_Control, Eq. 3
            if stage == "stage 1":  # + L_CFRM, Eq. 2
                loss = loss + 0.1 * sum(map(F.mse_loss, features, (encoder[0](clean), encoder[:2](clean))))
            if stage == "parts":
                loss = loss + F.mse_loss(decoder(z_0), clean)
                loss = loss + F.cross_entropy(digit(clean), label) + F.cross_entropy(parity(clean), label % 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.eval().requires_grad_(False)
    # Stage 3, for a task that nobody thought of before: one vector learns.
    clean, label = images[1400:], labels[1400:]
    degraded = (clean + 0.4 * torch.randn_like(clean)).clamp(0, 1)
    before = {task: restore(degraded, task, torch.Generator().manual_seed(1)) for task in tfa.tasks}
    prompt = tfa.add_task("parity", like="digit")
    optimizer = torch.optim.AdamW([prompt], lr=0.1, weight_decay=0)
    for _ in range(options.steps):
        batch = torch.randint(1400, (32,))
        noisy = (images[batch] + 0.4 * torch.randn(32, 1, 8, 8)).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(parity(restore(noisy, "parity")), labels[batch] % 2).backward()
        optimizer.step()

    after = {task: restore(degraded, task, torch.Generator().manual_seed(1)).detach() for task in tfa.tasks}
    for name, x in ({"degraded": degraded} | after | {"clean": clean}).items():
        psnr = -10 * F.mse_loss(x, clean).clamp(1e-9).log10().item()
        correct = [(net(x).argmax(1) == y).float().mean().item() for net, y in ((digit, label), (parity, label % 2))]
        print(f"{name:9} PSNR {psnr:.2f} dB, digits read {correct[0]:.1%}, odd or even {correct[1]:.1%}")
    same = all(torch.equal(before[task], after[task]) for task in before)
    print(f"stage 3 trained {prompt.numel()} numbers; outputs for people and digit are the same to the bit: {same}")


if __name__ == "__main__":
    main()
