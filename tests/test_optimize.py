"""tconv.optimize on whole models, the torch.compile backend, explain."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tconv

PYTORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class UNetBlock(nn.Module):
    """Upsample, join, refine; the skip connection leaves before an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.Sequential(
            nn.ReLU(inplace=True), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        self.refine = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        low = self.down(x)
        up = self.up(low)
        return self.refine(torch.cat([x, up], 1)) + low.mean()  # sees what the in-place ReLU did to `low`


class HiFiGANUpsampler(nn.Module):
    def __init__(self, normalise) -> None:
        super().__init__()
        self.ups = nn.ModuleList(
            [normalise(nn.ConvTranspose1d(16 // 2**i, 16 // 2 ** (i + 1), 8, 4, padding=2)) for i in range(2)]
        )
        self.post = nn.Conv1d(4, 1, 7, padding=3)

    def forward(self, x):
        for up in self.ups:
            x = up(F.leaky_relu(x, 0.1))
        return torch.tanh(self.post(F.leaky_relu(x)))


def dcgan() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(10, 16, 4, 1, 0, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(True),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


class Attributes(nn.Module):
    """The chain is in the forward's code, not in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(4, 8, 3, stride=2)
        self.norm = nn.InstanceNorm3d(8, affine=True)
        self.act = nn.GELU()
        self.twice = nn.ConvTranspose3d(8, 8, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.act(self.norm(self.up(x)))
        return self.twice(self.twice(y))


class LayerNorm2d(nn.Module):
    """As segment-anything writes it."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(num_channels))
        self.bias = nn.Parameter(torch.rand(num_channels))
        self.eps = eps

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class SAMDecoder(nn.Module):
    """Activations shared between two places, and a norm of its own, as SAM does."""

    def __init__(self) -> None:
        super().__init__()
        activation = nn.GELU()
        self.upscale = nn.Sequential(
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            LayerNorm2d(4),
            activation,
            nn.ConvTranspose2d(4, 2, 2, stride=2),
            activation,
        )

    def forward(self, x):
        return self.upscale(x)


MODELS = {
    "unet": (UNetBlock, (2, 4, 8, 8)),
    "hifigan, weight_norm by hook": (lambda: HiFiGANUpsampler(nn.utils.weight_norm), (2, 16, 9)),
    "hifigan, weight_norm by parametrization": (
        lambda: HiFiGANUpsampler(nn.utils.parametrizations.weight_norm),
        (2, 16, 9),
    ),
    "dcgan": (dcgan, (2, 10, 1, 1)),
    "attributes": (Attributes, (1, 4, 3, 4, 3)),
    "sam": (SAMDecoder, (2, 8, 3, 4)),
    "nested": (lambda: nn.Sequential(nn.Sequential(dcgan()[:3]), nn.ConvTranspose2d(16, 4, 2, 2)), (2, 10, 2, 2)),
}


def convolutions(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvTransposeNd)]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", MODELS)
def test_same_model_before_and_after(name: str, device: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(5)
    theirs = build().to(device, torch.float64)
    torch.manual_seed(5)
    ours = build().to(device, torch.float64)
    parameters = {n: id(p) for n, p in ours.named_parameters()}
    names = [n for n, _ in ours.named_modules(remove_duplicate=False)]
    assert tconv.optimize(ours) is ours
    assert {n: id(p) for n, p in ours.named_parameters()} == parameters
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules(remove_duplicate=False)] == names
    swapped = {line.path for line in ours.tconv_report.of("swapped")}
    assert swapped == set(convolutions(theirs))
    x = torch.rand(shape, device=device, dtype=torch.float64, requires_grad=True)
    for training in (True, False, True):
        theirs.train(training)
        ours.train(training)
        expected, y = theirs(x), ours(x)
        torch.testing.assert_close(y, expected)
        grad = torch.rand_like(expected)
        mine = torch.autograd.grad(y, [x, *ours.parameters()], grad)
        other = torch.autograd.grad(expected, [x, *theirs.parameters()], grad)
        for a, e in zip(mine, other):
            torch.testing.assert_close(a, e)
    for a, e in zip(ours.buffers(), theirs.buffers()):
        torch.testing.assert_close(a, e)  # running statistics went the same way
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", ["unet", "dcgan", "attributes", "sam"])
def test_optimized_models_copy_and_pickle(name: str) -> None:
    build, shape = MODELS[name]
    model = tconv.optimize(build()).eval()
    x = torch.rand(shape)
    expected = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(x), expected)
        with torch.no_grad():  # the copy uses its own parameters
            for p in again.parameters():
                p.add_(1)
        assert not torch.allclose(again(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_report_says_what_and_why() -> None:
    text = str(tconv.optimize(UNetBlock()).tconv_report)
    assert "ConvTranspose2d -> BatchNorm2d -> ReLU" in text
    # The leading in-place ReLU changes a tensor that the caller still holds, so it stays.
    assert "ReLU -> ConvTranspose2d" not in text
    report = tconv.optimize(Attributes()).tconv_report
    assert any("InstanceNorm3d -> GELU" in line.text for line in report.of("fused"))
    assert "ConvTranspose2d -> ChannelLayerNorm -> GELU" in str(tconv.optimize(SAMDecoder()).tconv_report)
    assert any(line.path == "twice" and "exactly once" in line.text for line in report.of("left"))
    assert "no transposed convolution" in str(tconv.optimize(nn.Linear(2, 2)).tconv_report)


def test_tracing_leaves_no_trace() -> None:
    model = tconv.optimize(Attributes())
    assert model.calls == 0 and model.training


def test_a_leading_activation_is_applied_while_reading(device: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.LeakyReLU(0.1), nn.ConvTranspose2d(4, 4, 3), nn.Sigmoid()).to(device)
    expected = model(torch.ones(1, 4, 3, 3, device=device))
    tconv.optimize(model)
    assert "LeakyReLU -> ConvTranspose2d -> Sigmoid" in str(model.tconv_report)
    x = torch.ones(1, 4, 3, 3, device=device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=1e-3)


def test_hooks_keep_seeing_what_they_saw() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda m, a, y: seen.append(y.min().item()))
    model[3].register_forward_hook(lambda m, a, y: seen.append(y.min().item()))
    tconv.optimize(model)
    model(torch.rand(1, 4, 3, 3) - 0.5)
    assert seen[0] < 0 <= seen[1]
    text = str(model.tconv_report)
    assert "the layer has hooks on its output" in text and "ReLU has hooks" in text


def test_shared_modules() -> None:
    layer, norm = nn.ConvTranspose2d(4, 4, 1), nn.GroupNorm(2, 4)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(layer, nn.ReLU()),
            "b": nn.Sequential(layer, nn.Tanh()),
            "c": nn.Sequential(nn.ConvTranspose2d(4, 4, 1), norm),
            "d": norm,
        }
    )
    reference = copy.deepcopy(model)
    tconv.optimize(model)
    x = torch.rand(1, 4, 3, 3)
    for key in model:
        torch.testing.assert_close(model[key](x), reference[key](x))
    assert model["a"][0] is model["b"][0]
    assert "used in more than one place" in str(model.tconv_report)


def test_what_is_not_exactly_torchs_is_left() -> None:
    class Own(nn.ConvTranspose2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Own(2, 2, 1), nn.ConvTranspose2d(2, 2, 1).to(torch.complex64), torch.jit.script(nn.ReLU()))
    tconv.optimize(model)
    assert type(model[0]) is Own and type(model[1]) is nn.ConvTranspose2d
    reasons = " ".join(line.text for line in model.tconv_report.of("left"))
    assert "class of its own" in reasons and "complex64" in reasons


def test_a_norm_that_only_has_the_name_is_left() -> None:
    class LayerNorm2d(nn.LayerNorm):
        """Normalises the last axis, whatever it is called."""

    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 1), LayerNorm2d(3))
    x = torch.rand(1, 4, 3, 3)
    expected = model(x)
    tconv.optimize(model)
    assert "LayerNorm2d cannot be fused" in str(model.tconv_report)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_swap_only_and_twice() -> None:
    model = dcgan().eval()
    x = torch.rand(1, 10, 1, 1)
    expected = model(x)
    tconv.optimize(model, fuse=False)
    assert not model.tconv_report.of("fused") and type(model[0]) is tconv.nn.ConvTranspose2d
    tconv.optimize(model)
    assert len(model.tconv_report.of("fused")) == 3 and not model.tconv_report.of("swapped")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    tconv.optimize(model)
    assert not model.tconv_report.lines
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_is_one_layer() -> None:
    layer = nn.ConvTranspose2d(2, 2, 3)
    assert type(tconv.optimize(layer)) is tconv.nn.ConvTranspose2d


def test_a_lazy_model() -> None:
    model = tconv.optimize(nn.Sequential(nn.LazyConvTranspose2d(4, 3), nn.ReLU()))
    assert model(torch.rand(1, 3, 4, 4)).shape == (1, 4, 6, 6)


def test_a_parametrization_can_be_removed_again() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(2, 2, 3))
    x = torch.rand(1, 2, 3, 3)
    expected = layer(x)
    tconv.optimize(layer)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is tconv.nn.ConvTranspose2d
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(PYTORCH < (2, 5), reason="PyTorch 2.4 does not serve operators that are registered in Python here")
def test_optimized_model_compiles_and_exports(device: str) -> None:
    torch._dynamo.reset()
    model = tconv.optimize(UNetBlock()).to(device).eval()
    x = torch.rand(2, 4, 8, 8, device=device)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, atol=1e-5, rtol=1e-5)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-5)
    lowered = program.run_decompositions(tconv.decompositions())
    assert not any("tconv" in str(n.target) for n in lowered.graph.nodes)
    torch.testing.assert_close(lowered.module()(x), expected, atol=1e-4, rtol=1e-4)


# --- torch.compile(backend="tconv") ---------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.out = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x):
        y = self.norm(F.gelu(self.up(x)))
        return torch.sigmoid(self.out(y) * 0.5) + F.conv_transpose2d(y, self.out.weight, stride=2)


def _rewritten(model: nn.Module, x: torch.Tensor) -> list:
    """Targets of the rewritten graph."""
    from tconv import compile as backend

    torch._dynamo.reset()
    targets = []

    def spy(graph, inputs):
        backend.rewrite(graph)
        targets.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch.compile(model, backend=spy, fullgraph=True)(x)
    return targets


def test_backend_rewrites_calls_and_chains(device: str) -> None:
    from tconv import compile as backend

    torch.manual_seed(0)
    model = Functional().to(device)
    x = torch.rand(2, 4, 5, 6, device=device)
    targets = _rewritten(model, x)
    assert targets.count(backend.fused_call) == 2  # up -> gelu -> group_norm, out -> scale -> sigmoid
    assert tconv.conv_transpose2d in targets
    assert not {torch.conv_transpose2d, F.conv_transpose2d, F.group_norm, torch.sigmoid} & set(targets)


@pytest.mark.parametrize("backend", ["tconv", tconv.compile_backend])
def test_backend_trains(backend: object, device: str) -> None:
    if backend == "tconv":
        from torch._dynamo import list_backends

        if "tconv" not in list_backends(exclude_tags=()):
            pytest.skip("the package's entry point is not installed here")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Functional().to(device)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.rand(2, 4, 5, 6, device=device, requires_grad=True)
    with torch.backends.cudnn.flags(allow_tf32=False):
        y, expected = compiled(x), model(x)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
        mine = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
        other = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()])
    for a, e in zip(mine, other):
        torch.testing.assert_close(a, e, atol=1e-3, rtol=1e-3)


def test_backend_leaves_a_result_that_is_used_twice() -> None:
    from tconv import compile as backend

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 2, 2)

        def forward(self, x):
            y = self.up(x)
            return F.relu(y) + y

    targets = _rewritten(Twice(), torch.rand(1, 2, 3, 3))
    assert backend.fused_call not in targets and tconv.conv_transpose2d in targets


def test_backend_under_autocast(device: str) -> None:
    torch._dynamo.reset()
    model = Functional().to(device)
    x = torch.rand(2, 4, 5, 6, device=device)
    compiled = torch.compile(model, backend=tconv.compile_backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, expected = compiled(x), model(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, atol=5e-2, rtol=5e-2)


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain() -> None:
    layer = tconv.nn.ConvTranspose2d(8, 4, 2, stride=2)
    x = torch.rand(1, 8, 6, 6)
    text = tconv.explain(layer, x)
    assert text.startswith("2d c8>4 i6x6 t2x2 s2") and "chosen" in text and "refuses" in text
    fused = tconv.nn.Fused(layer, [nn.GELU(), nn.GroupNorm(2, 4)])
    assert "| bias gelu group_norm(2,eps=1e-05,affine)" in tconv.explain(fused, x)
    model = tconv.optimize(UNetBlock().eval())
    assert "up.1: 2d" in tconv.explain(model, torch.rand(1, 4, 8, 8))
    assert "2d b8 c64>64" in tconv.explain("2d b8 c64>64 i1024x1024 t3x3", device="h200")
    with pytest.raises(ValueError, match="no transposed convolution of tconv"):
        tconv.explain(nn.Linear(2, 2), torch.rand(2))
    with pytest.raises(TypeError, match="layer"):
        tconv.explain(3)  # type: ignore[arg-type]
    assert "nothing to do" in tconv.explain(layer, x[:0])
