"""``python -m vision_attn check``: a device that computes something else is found out."""

import pytest
import torch
from test_cuda_kernel import FAULTS, UNHARMED, Double

from vision_attn import answers, create_block
from vision_attn.__main__ import main
from vision_attn.blocks import cbam, criss_cross
from vision_attn.engines import flash, union

CPU = torch.device("cpu")


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The kernel's double and its route for all but float64."""
    monkeypatch.setattr(flash, "aten", Double())
    monkeypatch.setattr(flash, "agrees", lambda *args: True)
    monkeypatch.setattr(union, "is_slow", lambda x: False)
    kernel_for = union.kernel_for
    monkeypatch.setattr(
        union, "kernel_for", lambda q, k, v: None if q.dtype == torch.float64 else kernel_for(q, k, v) and flash.Cuda
    )


def verdicts(blocks):
    return {(a.block, a.causal, a.dtype): a for a in answers.answers(CPU, blocks)}


def test_what_is_right_is_called_right(capsys):
    assert main(["check", "c[br]*", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu ") and sum("trusted" in line for line in lines) == 3
    rows = [line.split() for line in lines[4:-1]]
    assert {row[0] for row in rows} == {"cbam", "criss_cross"} and len(rows) == 6
    assert all(row[-1] == "right" and float(row[2]) <= 1 and float(row[3]) <= 1 for row in rows)
    assert lines[-1].startswith("0 of 6 wrong")


def test_the_route_of_cuda_is_right(as_on_cuda):
    found = verdicts("strided")
    assert len(found) == 6 and all(a.right for a in found.values()), found


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_route_of_cuda_is_found(fault, as_on_cuda, monkeypatch):
    for name, faulty in FAULTS[fault].items():
        monkeypatch.setattr(flash, name, faulty)
    wrong = {dtype for (_, _, dtype), answer in verdicts("strided").items() if not answer.right}
    assert wrong == set(answers.DTYPES) - set(UNHARMED.get(fault, ()))


@pytest.mark.parametrize(
    "what, faulty",
    [
        ("forward", lambda out: 1.001 * out),
        ("backward", lambda out: 2 * out - out.detach()),
        ("type", lambda out: out.double()),
        ("nan", lambda out: out / 0 * 0),
    ],
)
@pytest.mark.parametrize("module", [cbam, criss_cross])
def test_a_wrong_answer_is_told(module, what, faulty, monkeypatch, capsys):
    forward = module.Block.forward

    def here(self, x, *grid):
        out = forward(self, x, *grid)
        return out if x.dtype == torch.float64 else faulty(out)

    monkeypatch.setattr(module.Block, "forward", here)
    name = module.__name__.rpartition(".")[2]
    assert main(["check", name, "--device", "cpu"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name) and "float32" in line]
    forward, backward = (float(number) for number in line.split()[2:4])
    assert "WRONG" in line and ("TypeError" in line) == (what == "type")
    assert (forward > 1) == (what in ("forward", "nan"))
    assert (backward > 1) == (what in ("forward", "backward", "nan"))


def test_a_kernel_that_is_not_trusted_is_named(monkeypatch, capsys):
    monkeypatch.setattr(flash, "_agrees", {})
    monkeypatch.setattr(flash, "trial", lambda kernel, device, dtype: [0.5 if dtype == torch.bfloat16 else 0.0])
    assert main(["check", "dense", "--device", "cpu"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "NOT used" in line]
    assert len(said) == 1 and "bfloat16" in said[0] and "relative errors [0.5]" in said[0]


def test_a_choice_that_rounding_turns_over_is_no_fault(monkeypatch):
    """With these weights one rounding of the input turns over none, but rounding on the way does."""

    def made(name, mixer, causal):
        torch.manual_seed(3)
        return create_block(name, answers.DIM, num_heads=answers.HEADS).eval()

    monkeypatch.setattr(answers, "made", made)
    assert all(found.right for found in verdicts("prob_sparse").values())


def test_no_block_is_no_check():
    with pytest.raises(ValueError, match="blocks='zz\\*': no block matches"):
        answers.answers(CPU, "zz*")
