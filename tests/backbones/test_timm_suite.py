"""timm's own test_models.py, fetched with timm's sources, on every block in a ResNet and in a ViT."""

import pytest
from timm_names import KNOWN, NAMES, STOCK, Result, fetch, run, table

RESNET, VIT = STOCK
KINDS = {  # of test: the stock models that timm runs them on
    "forward": STOCK,
    "backward": STOCK,
    "default_cfgs": [RESNET],
    "default_cfgs_non_std": [VIT],
    "forward_features": [RESNET],
    "forward_intermediates": STOCK,
    "forward_intermediates_features": STOCK,
    "prune_intermediate_layers_contract": STOCK,
    "forward_fx": STOCK,
    "backward_fx": STOCK,
    "forward_torchscript": STOCK,
    "forward_fx_torchscript": STOCK,
}


@pytest.mark.slow
def test_timms_own_tests_pass_but_for_what_is_known(tmp_path):
    try:
        tests = fetch(tmp_path)
    except ConnectionError as error:
        pytest.skip(str(error))
    results = run(tests)
    ran = {(result.kind, result.name) for result in results}
    assert len(ran) == len(results)
    assert ran == {(kind, name) for kind, stock in KINDS.items() for name in NAMES if NAMES[name] in stock}
    surprises = [result for result in results if not result.as_expected]
    assert not surprises, "\n".join(f"{r.kind} {r.name} {r.outcome}: {r.message[-300:]}" for r in surprises)
    assert {result.known for result in results} == {None, *KNOWN}
    for row in table(results):
        assert row["passed"] + row["failed"] == row["total"] > 0 and bool(row["failed"]) == bool(row["note"])


@pytest.mark.parametrize(
    "kind, name, outcome, message, expected",
    [
        ("forward", f"{RESNET}_cbam", "passed", "", True),
        ("forward", f"{RESNET}_cbam", "failed", "torch/jit/", False),
        ("forward", f"{RESNET}_cbam", "skipped", "", False),
        ("forward_torchscript", f"{RESNET}_cbam", "failed", "torch/jit/", True),
        ("forward_torchscript", f"{RESNET}_cbam", "failed", "out of memory", False),
        ("forward_torchscript", f"{RESNET}_cbam", "passed", "", False),
        ("forward_torchscript", RESNET, "failed", "torch/jit/", False),
        ("forward_fx_torchscript", f"{VIT}_cbam", "failed", "torch/jit/", True),
        ("backward_fx", f"{VIT}_cbam", "failed", "TraceError", False),
    ],
)
def test_a_known_failure_must_fail_as_it_did(kind, name, outcome, message, expected):
    result = Result(kind, name, outcome, message)
    assert result.as_expected == expected
    assert bool(table([result])[0]["note"]) == (expected and outcome == "failed")
