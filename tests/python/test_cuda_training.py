"""Training of quantized weights on a CUDA device, beside the CPU."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from quantloom import _training_weights
from quantloom import formats as Q
from quantloom import quantisation_training as T
from training_cases import SIGN_3D8, spec, three_layers

SPECS = {
    "blocks": spec(),
    "sparse": spec(
        family="t", scaling="rms", block=(None, None), sparse_format=Q.BFLOAT16, sparse_ratio=0.01
    ),
    "compressed": spec(scaling="rms", block=(None, None), compressor="rans"),
    "vectors": spec(2, "lloyd_max", vq_length=2, vq_format=Q.BFLOAT16),
    "signs": SIGN_3D8,
}


@pytest.mark.parametrize("mode", ["parameter", "dynamic"])
@pytest.mark.parametrize("name", SPECS)
def test_values_gradients_and_bytes_equal_those_of_the_cpu(name, mode):
    torch.manual_seed(3)
    value, gradient = torch.randn(33 if name == "signs" else 32, 128), torch.randn(33, 128)
    gradient = gradient[: value.shape[0]]
    fmt = SPECS[name].fit(value) if hasattr(SPECS[name], "fit") else SPECS[name]
    weights = [T._weight(value.to(device), fmt, mode, False, "qat") for device in ("cpu", "cuda")]
    results = [weight() for weight in weights]
    torch.testing.assert_close(results[1].detach().cpu(), results[0].detach())
    for result in results:
        result.backward(gradient.to(result.device))
    for cpu, cuda in zip(weights[0].parameters(), weights[1].parameters()):
        assert (cpu.grad is None) == (cuda.grad is None)
        if cpu.grad is not None:
            torch.testing.assert_close(cuda.grad.cpu(), cpu.grad, rtol=1e-4, atol=1e-4)
    assert weights[1].encode().decode().equal(results[1].detach().cpu())


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 1, 3_000_017), (8, 2, 1000), (4096, 4, 20_000)])
def test_sums_by_code_are_those_of_the_cpu_and_repeat(count, columns, rows):
    torch.manual_seed(4)
    codes, values = torch.randint(0, count, (rows,)), torch.randn(rows, columns)
    expected = _training_weights._sum_by_code(codes, values, count)
    found = [_training_weights._sum_by_code(codes.cuda(), values.cuda(), count) for _ in range(3)]
    torch.testing.assert_close(found[0].cpu(), expected)
    assert all(other.equal(found[0]) for other in found[1:])


def test_training_repeats():
    results = []
    for _ in range(2):
        model = three_layers().cuda()
        T.convert(model, spec(), "parameter", False)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).cuda()
        for _ in range(5):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
        encoded = T.encode(model)
        results.append(
            {f"{name}.{key}": plane for name, item in encoded.items() for key, plane in item.planes.items()}
        )
    assert all(plane.equal(results[1][name]) for name, plane in results[0].items())
