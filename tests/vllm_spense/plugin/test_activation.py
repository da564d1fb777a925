"""gate_up, activation and down hand on what is no tensor, where and only where vLLM's model lets them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm_models import MLP, QuantConfig

from vllm_spense.kernels.region_gemm import reference
from vllm_spense.ops import elementwise_ops
from vllm_spense.plugin.activation import FusedSiluAndMul, RawSums
from vllm_spense.plugin.pairing import Pairing, Quantized
from vllm_spense.plugin.vllm_internals import stand_in

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _building_a_model() -> Iterator[None]:
    assert stand_in(FusedSiluAndMul)
    engine = VllmConfig()
    engine.quant_config = QuantConfig(Pairing(activations=True, norms=False))
    with set_current_vllm_config(engine):
        yield


def test_it_goes_on_to_be_vllms_activation() -> None:
    activation = SiluAndMul()
    assert type(activation) is FusedSiluAndMul
    assert activation.name == SiluAndMul.name == "silu_and_mul"
    x = torch.randn(3, 64)
    # vLLM compiles it, which takes C++ twenty seconds and is not what is tested.
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(activation(x), F.silu(x[:, :32]) * x[:, 32:])


def test_raw_sums_become_fp8() -> None:
    raw, x_scale, w_scale = torch.randn(5, 128) * 1000, torch.rand(5, 1) / 100, torch.rand(128, 1)
    raw[3] = 0
    gate_sparse, gate_dense, up_sparse, up_dense = raw.split((48, 16, 48, 16), -1)
    by_region = torch.cat([gate_sparse, up_sparse, gate_dense, up_dense], -1)
    found = SiluAndMul()(RawSums(by_region, x_scale, w_scale, 48, MLP, (1, 5)))
    assert isinstance(found, Quantized)
    assert (found.reader, found.leading) == (MLP, (1, 5))
    assert found.values.dtype == FP8
    gate, up = (raw.double() * x_scale.double() * w_scale.double().t()).chunk(2, -1)
    exact = F.silu(gate) * up
    error = (found.values.double() * found.scale.double() - exact).abs()
    # Half a step of E4M3: 2⁻⁴ of a value, or 2⁻¹⁰ of the row's scale.
    assert (error <= 2**-4 * 1.001 * exact.abs() + 2**-10 * found.scale).all()
    assert (found.values.float().abs().amax(-1)[[0, 1, 2, 4]] == 448).all()
    assert found.scale[3] > 0


def test_the_op_and_its_fake_agree() -> None:
    arguments = torch.randn(5, 128) * 1000, torch.rand(5, 1) / 100, torch.rand(128, 1), 32
    values, scale = elementwise_ops.silu_mul_quant(*arguments)
    twin_values, twin_scale = reference.silu_mul_quant(*arguments)
    assert torch.equal(values.view(torch.uint8), twin_values.view(torch.uint8))
    assert torch.equal(scale, twin_scale)
    torch.library.opcheck(torch.ops.spense.silu_mul_quant.default, arguments, test_utils=["test_schema"])
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = map(mode.from_tensor, arguments[:3])
        fake_values, fake_scale = elementwise_ops.silu_mul_quant(*fakes, 32)
    assert (fake_values.shape, fake_values.dtype) == (values.shape, values.dtype)
    assert (fake_scale.shape, fake_scale.dtype) == (scale.shape, scale.dtype)
