"""`check_block` on blocks that are not in the zoo: a sound one passes, and of a broken one the fault is named."""

import pytest
import torch
from torch import nn

from vision_attn import Gate
from vision_attn.mixer import PatternMixer
from vision_attn.pattern import Past, Row
from vision_attn.testing import PROPERTIES, check_block


class Rows(PatternMixer):
    def __init__(self, dim, num_heads=None, **mixer):
        super().__init__(Row(), dim, num_heads, **mixer)


class Brightness(Gate):
    """Each channel times the logistic function of its mean."""

    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim)
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def gate(self, x):
        x = self.norm(x)
        return x * x.mean(dim=(2, 3), keepdim=True).sigmoid()

    def reference(self, x):
        norm = self.norm
        if norm.training:
            mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
        else:
            mean, var = norm.running_mean, norm.running_var
        rows = []
        for image in x:
            channels = zip(image, mean, var, norm.weight, norm.bias)
            image = [(c - m) / (v + norm.eps).sqrt() * w + b for c, m, v, w, b in channels]
            rows.append(torch.stack([c / (1 + torch.exp(-c.sum() / c.numel())) for c in image]))
        return torch.stack(rows)

    def attention_map(self, x):
        return torch.ones_like(self.checked(x)[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("block", [Rows, Brightness])
def test_a_sound_block_passes_everything(block, capsys):
    trials = check_block(block)
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("holds  ") for line in said[:-1]) and len(said) > 20
    assert f"everything holds, {trials} trials" in said[-1] and trials > 2000


def test_some_properties_can_be_chosen(capsys):
    assert check_block(Rows, only="rows_of_weights*") == 12
    assert capsys.readouterr().out.startswith(
        "holds  rows_of_weights_sum_to_one: Weights are not negative, and each token's sum to 1 (12)\n"
    )


# Broken blocks, and what must be said of each


class WithoutScale(Rows):
    def mix(self, q, k, v, grid):
        return super().mix(q / self.scale, k, v, grid)


class PaddingSeen(Rows):
    def mix(self, q, k, v, grid):
        return super().mix(q, k, v, grid) * (1 if v.shape[2] < 100 else 0.99)


class LooksAhead(PatternMixer):
    def __init__(self, dim, num_heads=None, *, causal=True, **mixer):
        super().__init__(Past(), dim, num_heads, **mixer)

    def mix(self, q, k, v, grid):
        return super().mix(q, k, v + 1e-3 * v.roll(-1, dims=2), grid)


class IgnoresDropout(Rows):
    dropout = 0.0


class DeadWeight(Rows):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.unused = nn.Parameter(torch.zeros(3))


class MixesImages(Brightness):
    def gate(self, x):
        return super().gate(x) + x.mean(dim=0, keepdim=True)


class HearsTheImageBefore(Brightness):
    def gate(self, x):
        return super().gate(x) + torch.cat([torch.zeros_like(x[:1]), x[:-1]])

    def reference(self, x):
        return super().reference(x) + torch.cat([torch.zeros_like(x[:1]), x[:-1]])


class SaysNothing(Rows):
    steps = ()


class CausalInNameOnly(Rows):
    causal = True


class RootOfZero(Gate):
    """What is added below the root is 0 in float16."""

    def gate(self, x):
        return x * (x.square().sum(dim=1, keepdim=True) + 1e-9).sqrt()

    def reference(self, x):
        return RootOfZero.gate(self, x)


class WritesToInput(Brightness):
    def gate(self, x):
        x.data.mul_(1.01)
        return super().gate(x)


class RemembersSize(Brightness):
    largest = 1

    def gate(self, x):
        self.largest = max(self.largest, x.shape[2])
        return super().gate(x) * self.largest


class TakesAnything(Brightness):
    def __init__(self, dim, *, power: float = 1.0, **factory):
        super().__init__(dim, **factory)
        self.power = power


class Overflows(Brightness):
    def gate(self, x):
        x = self.norm(x)
        total = x.exp().mean(dim=(2, 3), keepdim=True).log()
        return x * (x.mean(dim=(2, 3), keepdim=True) + total - total).sigmoid()


class OutsideTheUnit(Brightness):
    def attention_map(self, x):
        return self.checked(x)[:, 0]


class Branches(Brightness):
    def gate(self, x):
        return super().gate(x) if x.sum() > 0 else super().gate(x)


class Unpicklable(Brightness):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.function = lambda x: x


class DrawsInEval(Brightness):
    def gate(self, x):
        return super().gate(x) * (1 + 1e-3 * torch.rand(1, dtype=x.dtype))


@pytest.mark.parametrize(
    "block, options, fault, example",
    [
        (WithoutScale, {}, "fast_path_is_the_definition", "grid Grid(height=1, width=1), prefix 1"),
        (PaddingSeen, {}, "what_all_tokens_agree_on_is_kept", "grid Grid(height=13, width=17), prefix 0"),
        (LooksAhead, {"causal": True}, "the_future_has_no_effect", "place 0"),
        (IgnoresDropout, {}, "attention_dropout_drops_weights_or_is_refused", ""),
        (DeadWeight, {}, "every_parameter_learns", "block.unused"),
        (MixesImages, {}, "images_of_a_batch_never_mix", "grid Grid(height=1, width=1)"),
        (HearsTheImageBefore, {}, "images_of_a_batch_never_mix", "grid Grid(height=1, width=1)"),
        (SaysNothing, {}, "fast_path_is_the_definition", "neither steps nor a reference"),
        (SaysNothing, {}, "fast_path_is_the_definition_at_any_size_with_any_options", "nothing says"),
        (CausalInNameOnly, {}, "the_future_has_no_effect", "place 0"),
        (RootOfZero, {}, "hard_input_gives_finite_numbers", "gradient of x is not finite where the definition is"),
        (WritesToInput, {}, "an_input_is_never_modified", "grid Grid(height=1, width=1)"),
        (RemembersSize, {}, "a_size_leaves_nothing_behind", ""),
        (TakesAnything, {}, "wrong_arguments_are_refused_by_name", "power=nan is accepted"),
        (Overflows, {}, "hard_input_gives_finite_numbers", "output is not finite where the definition is"),
        (OutsideTheUnit, {}, "attention_map_is_a_weight_for_every_position", "grid Grid(height=1, width=1)"),
        (Branches, {}, "compiles_to_one_graph_for_any_size", ""),
        (Unpicklable, {}, "copies_and_pickles", "lambda"),
        (DrawsInEval, {}, "fast_path_is_the_definition", ""),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_fault_is_named_with_an_example(block, options, fault, example, capsys):
    with pytest.raises(AssertionError) as failure:
        check_block(block, only=fault, **options)
    (sentence,) = (each.sentence for each in PROPERTIES if each.name == fault)
    assert capsys.readouterr().out == f"FAILS  {fault}: {sentence}\n"
    said = str(failure.value)
    assert f"{fault}: {sentence}" in said and example in said and block.__name__ in said


def test_what_is_no_block_is_refused():
    for wrong in (nn.Linear, Rows(8), "dense"):
        with pytest.raises(TypeError, match="block_class="):
            check_block(wrong)
    with pytest.raises(ValueError, match="only='scale': no property has such a name; there are .*rows_of_weights"):
        check_block(Rows, only="scale")
    with pytest.raises(ValueError, match=r"only='the_future\*': no such property applies to .*Rows"):
        check_block(Rows, only="the_future*")


def test_properties_are_named_by_sentences():
    names = [each.name for each in PROPERTIES]
    assert len(set(names)) == len(names) >= 30
    for each in PROPERTIES:
        assert len(each.sentence.split()) > 6
