"""gate_up, activation and down hand on what is no tensor, where and only where vLLM's model lets them."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm_models import module_of

from vllm_spense.kernels.region_gemm import reference
from vllm_spense.ops import elementwise_ops
from vllm_spense.plugin.activation import PLAIN_MLPS, Claim, FusedSiluAndMul, Quantized, RawSums

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _settings() -> None:
    with set_current_vllm_config(VllmConfig()):
        yield


def engine(architecture: str = "LlamaForCausalLM", lora: object = None) -> SimpleNamespace:
    return SimpleNamespace(model_config=SimpleNamespace(architectures=[architecture]), lora_config=lora)


def test_the_next_activation_answers_the_claim_and_no_other() -> None:
    first, second = Claim.of_next_activation(engine()), Claim.of_next_activation(engine())
    activation = SiluAndMul()
    assert type(activation) is FusedSiluAndMul
    assert (first.made, second.made) == (False, True)
    later = Claim()
    SiluAndMul()
    assert not later.made


@pytest.mark.parametrize("other", [engine("FalconH1ForCausalLM"), engine(lora=object())], ids=["architecture", "lora"])
def test_no_claim_where_something_might_come_between(other: SimpleNamespace) -> None:
    claim = Claim.of_next_activation(other)
    SiluAndMul()
    assert not claim.made


def test_it_goes_on_to_be_vllms_activation() -> None:
    Claim.of_next_activation(engine())
    activation = SiluAndMul()
    assert activation.name == SiluAndMul.name == "silu_and_mul"
    x = torch.randn(3, 64)
    # vLLM compiles it, which takes C++ twenty seconds and is not what is tested.
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(activation(x), F.silu(x[:, :32]) * x[:, 32:])


def test_raw_sums_become_fp8() -> None:
    Claim.of_next_activation(engine())
    raw, x_scale, w_scale = torch.randn(5, 128) * 1000, torch.rand(5, 1) / 100, torch.rand(128, 1)
    raw[3] = 0
    gate_sparse, gate_dense, up_sparse, up_dense = raw.split((48, 16, 48, 16), -1)
    by_region = torch.cat([gate_sparse, up_sparse, gate_dense, up_dense], -1)
    found = SiluAndMul()(RawSums(by_region, x_scale, w_scale, 48))
    assert isinstance(found, Quantized)
    assert found.values.dtype == FP8
    gate, up = (raw.double() * x_scale.double() * w_scale.double().t()).chunk(2, -1)
    exact = F.silu(gate) * up
    error = (found.values.double() * found.scale.double() - exact).abs()
    # Half a step of E4M3: 2⁻⁴ of a value, or 2⁻¹⁰ of the row's scale.
    assert (error <= 2**-4 * 1.001 * exact.abs() + 2**-10 * found.scale).all()
    assert (found.values.float().abs().amax(-1)[[0, 1, 2, 4]] == 448).all()
    assert found.scale[3] > 0


@pytest.mark.parametrize("architecture", sorted(PLAIN_MLPS))
def test_vllms_mlp_is_what_the_list_says(architecture: str) -> None:
    module = module_of(architecture)
    sources = [inspect.getsource(mlp.forward) for name, mlp in vars(module).items() if name.endswith("MLP")]
    assert sources
    plain = re.compile(
        r"(\w+), _ = self\.gate_up_proj\(\w+\)\n"
        # The second asks down for static scales first, which a pruned layer does not have.
        r"\s+(\w+) = (?:self\.act_fn\(\1\)|maybe_fused_act_quant\(self\.act_fn, \1, self\.down_proj\))\n"
        r"\s+\w+, _ = self\.down_proj\(\2\)\n"
    )
    assert all(plain.search(source) for source in sources), sources


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
