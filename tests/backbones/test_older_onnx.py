"""Torch's older exporter to ONNX (``dynamo=False``), which detectors use: its graphs are right at any size."""

import io

import onnxruntime
import pytest
import torch
from conftest import block_of, often
from traced import EVERY, MIXERS, OTHERS, TRACED, WithPrefix, inputs

from vision_attn.layout import OnMap

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch would rather have its newer one used
    pytest.mark.filterwarnings("error::torch.jit.TracerWarning"),  # what depends on a number of the input is not traced
]


def export(module, args, opset=17, free=True):
    """onnxruntime's run of the graph."""
    file, names = io.BytesIO(), ["prefix", "x"][-len(args) :]
    axes = {"prefix": {0: "batch"}, "x": {0: "batch", 2: "height", 3: "width"}}
    options = dict(dynamic_axes={name: axes[name] for name in names}) if free else {}
    torch.onnx.export(module, args, file, dynamo=False, opset_version=opset, input_names=names, **options)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # what the exporter says of shapes holds for the traced ones
    session = onnxruntime.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])
    return lambda *args: torch.from_numpy(session.run(None, dict(zip(names, (t.numpy() for t in args))))[0])


def assert_same_answers(run, module, case, sizes, prefix=None):
    for size in sizes:
        args = inputs(case, size, prefix)
        if block_of(case) == "fixed" and case.options.get("causal") and size[1] == 1:
            with pytest.raises(Exception, match="ONNXRuntimeError.* Reshape"):  # no rows above: nothing to shape
                run(*args)
        else:
            torch.testing.assert_close(run(*args), module(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", EVERY)
def test_a_layer_for_any_size(case):
    layer = case.layer().float()
    sizes = [TRACED, *OTHERS]
    assert_same_answers(export(layer, inputs(case, TRACED)), layer, case, sizes)


SEVEN = dict(dim=35, num_heads=7, key_dim=35)


def shared_unevenly():
    """Blocks whose patterns have shares of seven heads that differ."""
    for param in MIXERS:
        block = param.values[0].new(**SEVEN, device="meta")
        if hasattr(block, "pattern") and len(set(block.pattern.shares(7))) > 1:
            yield param


@pytest.mark.parametrize("case", list(shared_unevenly()))
def test_heads_that_patterns_share_unevenly(case):
    layer, x = OnMap(case.new(**SEVEN), init_gain=0.7).eval(), torch.randn(2, 35, 7, 11)
    torch.testing.assert_close(export(layer, (x,), free=False)(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", often(EVERY))
def test_a_layer_for_one_size(case):
    layer = case.layer().float()
    run = export(layer, inputs(case, TRACED), free=False)
    assert_same_answers(run, layer, case, [TRACED])
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        run(*inputs(case, OTHERS[0]))


@pytest.mark.parametrize("case", often(MIXERS))
def test_a_mixer_with_prefix_tokens(case):
    module = WithPrefix(case.block().float())
    run = export(module, inputs(case, TRACED, prefix=5))
    assert_same_answers(run, module, case, [TRACED, *OTHERS], prefix=5)
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(*inputs(case, TRACED, prefix=2))


@pytest.mark.parametrize("opset", [pytest.param(14, marks=pytest.mark.slow), 20])
@pytest.mark.parametrize("case", often(EVERY))
def test_other_opsets(case, opset):
    layer = case.layer().float()
    run = export(layer, inputs(case, TRACED), opset)
    assert_same_answers(run, layer, case, [TRACED, OTHERS[0]])
