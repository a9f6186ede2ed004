"""What a run is: options, files, and what is refused."""

from pathlib import Path

import pytest

from training.config import AugmentConfig, parse

CONFIGS = sorted(
    path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml") if not path.stem.endswith("_pixels")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_says_what_was_measured(path):
    config = parse("", ["--config", str(path)])
    assert config.model.name == path.stem.partition("_")[2]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Hardware:", "Time:", "Result:"):
        assert any(line.startswith(f"# {word}") for line in header), f"{path.name} lacks {word}"
    assert f"--config configs/{path.name}" in header[0]


def test_options_override_the_file_and_each_other(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim:\n  lr: 1e-3\nmodel:\n  args: {drop_rate: 0.1}\n")
    config = parse("", ["--config", str(path), "--model.args.drop_path_rate", "0.2", "--epochs", "3", "--epochs", "4"])
    assert config.optim.lr == 1e-3 and config.epochs == 4
    assert config.model.args == {"drop_rate": 0.1, "drop_path_rate": 0.2}
    assert config.augment == AugmentConfig()


def test_options_may_be_spelled_with_dashes_and_switches_stand_alone():
    argv = [
        "--dry-run",
        "--bf16",
        "--max-bad=0.5",
        "--save-every",
        "7",
        "--channels_last",
        "false",
        "--compile",
        "true",
    ]
    config = parse("", argv)
    assert config.dry_run and config.bf16 and not config.channels_last
    assert (config.max_bad, config.save_every) == (0.5, 7)


def test_several_words_after_an_option_are_a_list():
    config = parse("", ["--data.mean", "0.5", "0.4", "0.3", "--imports", "a.b", "--data.std=[1, 2, 3]"])
    assert config.data.mean == [0.5, 0.4, 0.3] and config.data.std == [1, 2, 3] and config.imports == ["a.b"]
    config = parse("", ["--model.insert", "cbam", "--model.at", "*.1", "layer3", "--optim.only", "*attn_*"])
    assert config.model.at == ["*.1", "layer3"] and config.optim.only == "*attn_*"


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--epohcs", "3"], "unknown option --epohcs; nearest: --epochs"),
        (["--epoch", "3"], "unknown option --epoch; nearest: --epochs"),  # no abbreviations
        (["--optim.lrr", "3"], "unknown option --optim.lrr; nearest: --optim.lr"),
        (["--lr", "3"], "unknown option --lr; nearest: --optim.lr"),
        (["--name=resnet18"], "unknown option --name; nearest: --model.name, --optim.name, --data.name"),
        (["--quux", "3"], "unknown option --quux; --help lists all"),
        (["--bf16", "true", "stray"], "'stray' follows no option"),
        (["--epochs", "many"], "epochs must be int, got many"),
        (["--optim.ema", "slow"], "optim.ema must be float or null, got slow"),
        (["--augment.crop", "diagonal"], "augment.crop must be pad or resized or centre, got diagonal"),
        (["--optim.lr", "-1"], "optim.lr must be positive, got -1.0"),
        (["--augment.hflip", "2"], "augment.hflip must be a probability in 0..1, got 2.0"),
        (["--data.name", "cifar11"], "data.name must be digits"),
        (["--data.num_classes", "1"], "data.num_classes must be at least 2, got 1"),
        (
            ["--batch_size", "6", "--optim.accumulate", "4"],
            "batch_size must be a multiple of optim.accumulate = 4, got 6",
        ),
        (["--batch_size", "5", "--augment.mixup", "1"], "batch_size must be a multiple of 2"),
        (["--resume", "a", "--eval", "b"], "resume, eval and dry_run exclude each other"),
        (["--max-bad", "2"], "max_bad must be a share in 0..1, got 2.0"),
        (["--keep", "0"], "keep must be at least 1, got 0"),
        (["--save_every", "0"], "save_every must be at least 1, got 0"),
        (["--parallel", "both"], "parallel"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_options_exit_with_code_2_and_their_name(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("", argv)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line


@pytest.mark.parametrize(
    "text, named",
    [
        ("epohcs: 3", "unknown option epohcs; nearest: epochs"),
        ("optim:\n  lrr: 3", "unknown option optim.lrr; nearest: optim.lr"),
        ("optim:\n  lr: fast", "optim.lr"),
        ("optim: !!python/object:os.system {}", "python/object"),
    ],
)
def test_bad_files_exit_with_code_2_and_the_name(text, named, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit:
        parse("", ["--config", str(path)])
    assert exit.value.code == 2
    assert named in capsys.readouterr().err
