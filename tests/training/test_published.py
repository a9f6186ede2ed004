"""Weights with what they were trained at: what timm and others read beside and in best.safetensors."""

import json

import pytest
import timm
import torch
from pictures import make_folder
from safetensors import safe_open
from scripts import load, options
from timm.data import resolve_data_config

from training import checkpoint
from training.published import class_names, published_cfg

DATA = dict(
    data__mean=[0.4, 0.3, 0.2], data__std=[0.2, 0.3, 0.4], data__crop_pct=0.8, batch_size=4, threads=1, epochs=1
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), ("ant", "bee", "cow"), images=2)


def trained(photos, output, *argv):
    assert load("train_imagenet").main([*argv, *options(**DATA, data__dir=photos, output=output)]) == 0
    return output


@pytest.mark.parametrize(
    "name, args", [("cifar_resnet20_cbam", {}), ("vit_tiny_patch4_32", {"embed_dim": 24, "depth": 1, "num_heads": 2})]
)
def test_timm_makes_the_model_of_a_run_and_knows_what_it_was_trained_at(name, args, photos, tmp_path):
    argv = [*options(model__name=name, model__args=json.dumps(args)), "--data.img_size", "12", "20"]
    output = trained(photos, tmp_path / "run", *argv)
    saved = checkpoint.load(output / "best.pt")
    with safe_open(output / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["architecture"] == name
    cfg, made_of = json.loads(metadata["pretrained_cfg"]), json.loads(metadata["model_args"])
    by_file = timm.create_model(
        name, **made_of, checkpoint_path=output / "best.safetensors", pretrained_cfg={"architecture": name, **cfg}
    )
    by_folder = timm.create_model(f"local-dir:{output}", pretrained=True)
    for model in (by_file, by_folder):
        assert all(torch.equal(value, saved["state_dict"][key]) for key, value in model.state_dict().items())
        found = resolve_data_config(model=model)
        assert {key: list(found[key]) for key in ("input_size", "mean", "std")} == {
            key: saved["data"][key] for key in ("input_size", "mean", "std")
        }
        assert (found["crop_pct"], found["interpolation"]) == (0.8, saved["data"]["interpolation"])
        assert class_names(model.pretrained_cfg) == ["ant", "bee", "cow"]
    other = timm.create_model(f"local-dir:{output}", pretrained=True, num_classes=7)  # its classifier is made anew
    assert other.get_classifier().out_features == 7


def test_a_model_with_something_inserted_says_so_and_is_no_folder_of_timm(photos, tmp_path):
    gate = options(model__name="cifar_resnet20", model__insert="cbam", data__img_size=11)
    output = trained(photos, tmp_path / "run", *gate)
    with safe_open(output / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["insert"]) == {"block": "cbam", "at": None, "options": {}}
    assert not (output / "config.json").exists()


def test_classes_of_imagenet_in_words():
    cfg = published_cfg("resnet18")
    assert class_names(cfg)[0] == "n01440764" and "tench" in class_names(cfg, readable=True)[0]
    assert class_names(published_cfg("cifar_resnet20")) is None
    own = {"label_names": ["a", "b"], "label_descriptions": {"a": "apple"}}
    assert class_names(own, readable=True) == ["apple", "b"]


def test_weights_out_of_reach_are_told_of_with_their_model(tmp_path, monkeypatch, capsys):
    def out_of_reach(*_, **__):
        raise FileNotFoundError("cannot be had from the Hub")  # as huggingface_hub's LocalEntryNotFoundError is one

    monkeypatch.setattr(timm, "create_model", out_of_reach)
    argv = ["--model", "resnet18", *options(images=tmp_path, path=tmp_path / "x.csv")]
    (tmp_path / "a.png").touch()
    assert load("predict").main(argv) == 2
    assert capsys.readouterr().err == "error: model resnet18 {}: cannot be had from the Hub\n"
