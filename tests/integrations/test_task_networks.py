"""Networks of torchvision, timm and transformers as the readers of a restored image, with random weights."""

import copy

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torchvision import models

from restoreloss import FeatureExtractor, HLFLoss, TDPLoss
from restoreloss.integrations.task_networks import normalization, task_network

SMALL = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def detr():
    backbone = transformers.ResNetConfig(embedding_size=8, out_features=["stage4"], **SMALL)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    widths = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    depth = {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=backbone, backbone=None, use_timm_backbone=False, use_pretrained_backbone=False, **heads,
            **widths, **depth,
        )
    )  # fmt: skip


def segformer():
    heads = {"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SMALL, **heads))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=64, **LAYERS))


# name: (network, the layers by default, the size it reads)
NETWORKS = {
    "torchvision ResNet": (models.resnet18, "layer4", (50, 61)),
    "torchvision ConvNeXt": (models.convnext_tiny, "features", (50, 61)),
    "torchvision ViT": (lambda: models.VisionTransformer(64, 16, 2, 2, 16, 32), "encoder", (64, 64)),
    "torchvision Swin": (models.swin_t, "features", (50, 61)),
    "torchvision DeepLabV3": (
        lambda: models.segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None), "backbone/out", (50, 61)
    ),
    "torchvision Faster R-CNN": (
        lambda: models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights_backbone=None), "backbone/0 backbone/1",
        (50, 61),
    ),
    "torchvision RetinaNet": (
        lambda: models.detection.retinanet_resnet50_fpn(weights_backbone=None, min_size=96, max_size=128),
        "backbone/0 backbone/1 backbone/2", (50, 61),
    ),
    "timm ResNet": (lambda: timm.create_model("resnet18"), "layer4", (50, 61)),
    "timm ConvNeXt": (lambda: timm.create_model("convnext_atto"), "stages.3", (50, 61)),
    "timm ViT": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), "blocks.11", (64, 64)),
    "timm Swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64), "layers.3", (64, 64)),
    "transformers ResNet": (
        lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(embedding_size=8, **SMALL)),
        "resnet/last_hidden_state", (50, 61),
    ),
    "transformers ConvNeXt": (
        lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**SMALL)),
        "convnext/last_hidden_state", (50, 61),
    ),
    "transformers ViT": (vit, "vit/last_hidden_state", (64, 64)),
    "transformers Swin": (
        lambda: transformers.SwinForImageClassification(
            transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=64)
        ),
        "swin/last_hidden_state", (50, 61),
    ),
    "transformers SegFormer": (segformer, "segformer/last_hidden_state", (50, 61)),
    "transformers DETR": (detr, "model.encoder/last_hidden_state", (50, 61)),
}  # fmt: skip


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name][0]()
        for module in network.modules():  # networks at their random start fade or skip what they see: bring it back
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.weight.std() < 0.03:
                torch.nn.init.kaiming_normal_(module.weight)
    return network.train()


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_look_through_it_in_one_line_each(name):
    network, (_, layers, size) = build(name), NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    restored, target = torch.rand(2, 2, 3, *size, generator=generator)
    restored.requires_grad_()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    flags = [parameter.requires_grad for parameter in network.parameters()]
    loss = TDPLoss(network)
    assert " ".join(loss.layers) == layers
    value = loss(restored, target)
    (gradient,) = torch.autograd.grad(value, restored)
    assert value > 1e-6
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.5
    assert loss(target, target) == 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    reference = copy.deepcopy(network)
    high = HLFLoss(network, reference)
    torch.testing.assert_close(high(restored, target), value)  # both are one network still


@pytest.mark.parametrize("name", ["transformers ViT", "transformers SegFormer", "transformers DETR"])
def test_default_layers_of_transformers_are_what_the_model_says(name):
    network, (_, layer, size) = build(name).eval(), NETWORKS[name]
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    seen = FeatureExtractor(network, normalize=None)(images)[layer]
    output = network.base_model(images)
    expected = output.encoder_last_hidden_state if "encoder_last_hidden_state" in output else output.last_hidden_state
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchvision/resnet18", {"num_classes": 5}),
        ("torchvision/deeplabv3_mobilenet_v3_large", {"num_classes": 5}),
        ("torchvision/fasterrcnn_mobilenet_v3_large_fpn", {}),
        ("timm/vit_tiny_patch16_224", {"num_classes": 5, "image_size": 64}),
    ],
)
def test_a_network_by_its_name_and_a_file(name, options, tmp_path):
    one = task_network(name, weights="random", **options)
    assert not one.training
    files = [tmp_path / "unwrap.pth", tmp_path / "nested.pt", tmp_path / "weights.safetensors"]
    torch.save(one.state_dict(), files[0])
    torch.save({"epoch": 3, "model": {f"module.{key}": value for key, value in one.state_dict().items()}}, files[1])
    save_file({key: value.clone() for key, value in one.state_dict().items()}, files[2])
    for file in files:
        other = task_network(name, weights=str(file), **options)
        assert all(torch.equal(value, one.state_dict()[key]) for key, value in other.state_dict().items())


def test_a_folder_of_transformers(tmp_path):
    network = segformer()
    network.save_pretrained(tmp_path)
    loaded = task_network(f"transformers/{tmp_path}", weights="pretrained")
    assert type(loaded) is type(network)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.state_dict().items())
    other = task_network(f"transformers/{tmp_path}", weights="random", num_classes=7)
    assert other.config.num_labels == 7
    assert normalization(f"transformers/{tmp_path}") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}')
    assert normalization(f"transformers/{tmp_path}") == ((0.1, 0.2, 0.3), (1, 1, 2))


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("torchvision/resnet18", 0.485),
        ("torchvision/fasterrcnn_resnet50_fpn", None),
        ("timm/resnet18", 0.485),
        ("timm/vit_tiny_patch16_224", 0.5),
    ],
)
def test_normalization_is_what_the_network_was_trained_with(name, mean):
    found = normalization(name)
    assert (None if found is None else found[0][0]) == mean


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, r"`name` should be 'library/name'.*found 'resnet18'"),
        ("keras/resnet18", {}, r"`name` should be 'library/name'.*found 'keras/resnet18'"),
        ("torchvision/resnet19", {}, r"`name` should be one of `torchvision.models.list_models\(\)`, found 'resnet19'"),
        ("timm/resnet19", {}, r"`name` should be one of `timm.list_models\(\)`, found 'resnet19'"),
        ("torchvision/vit_b_16", {"image_size": 64}, r"`image_size` should be left out for torchvision"),
        ("timm/resnet18", {"image_size": 64}, r"`image_size` should be left out for 'resnet18', which reads any size"),
    ],
)
def test_wrong_names_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        task_network(name, weights="random", **options)
    if not options:
        with pytest.raises(ValueError, match=message):
            normalization(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": None}, "`name` should be 'library/name' .* found None"),
        ({"name": models.resnet18}, "`name` should be 'library/name' .* found the function resnet18"),
        ({"weights": None}, "`weights` should be 'pretrained', 'random' or a file, found None"),
        ({"num_classes": "10"}, "`num_classes` should be a whole number of at least 1, found '10'"),
        ({"num_classes": 0}, "`num_classes` should be a whole number of at least 1, found 0"),
        ({"name": "timm/vit_tiny_patch16_224", "image_size": 64.0}, "`image_size` should be a whole number"),
    ],
)
def test_arguments_of_another_kind_are_named(options, message):
    given = {"name": "torchvision/resnet18", "weights": "random", **options}
    with pytest.raises(ValueError, match=message):
        task_network(given.pop("name"), **given)


def test_wrong_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`weights` should be 'pretrained', 'random' or a file.*none\.pth"):
        task_network("torchvision/resnet18", weights=str(tmp_path / "none.pth"))
    file = tmp_path / "other.pth"
    torch.save(models.resnet18(num_classes=5).state_dict(), file)
    with pytest.raises(
        ValueError,
        match=r"`weights` should fit .*num_classes.*other.pth .* another shape fc.weight \(5, 512\) instead of",
    ):
        task_network("torchvision/resnet18", weights=str(file))
    with pytest.raises(
        ValueError, match=r"weights of this VGG, found that it lacks features.0.weight, .* more; has besides"
    ):
        task_network("torchvision/vgg11", weights=str(file))
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match=r"other.pth should hold a state dict, found a list"):
        task_network("torchvision/resnet18", weights=str(file))
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names its class in `architectures`, found None"):
        task_network(f"transformers/{tmp_path}", weights="random")


def test_networks_of_torchvision_are_normalized_as_their_weights_were_trained():
    for name in models.list_models(module=models):
        preset = models.get_model_weights(name).DEFAULT.transforms()
        assert normalization(f"torchvision/{name}") == (tuple(preset.mean), tuple(preset.std)), name
    assert normalization("torchvision/efficientnet_v2_l") == ((0.5,) * 3, (0.5,) * 3)
    assert normalization("torchvision/fasterrcnn_resnet50_fpn") is None
