"""The packed weights that pybigmodel.nn.Linear keeps: made once, and never used out of date."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import pybigmodel as pbm
from pybigmodel import _native
from pybigmodel._measure import difference
from pybigmodel.nn import _packing

K, N = 40, 24


def packed_layer() -> pbm.nn.Linear:
    """A layer whose weight is packed."""
    torch.manual_seed(0)
    layer = pbm.nn.Linear(K, N)
    with torch.no_grad():
        layer(x())
    return layer


def x(rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, K, generator=generator)


def assert_current(layer: nn.Linear) -> None:
    """The layer computes with the weight that it holds."""
    with torch.no_grad():
        expected = nn.functional.linear(x(), layer.weight, layer.bias)
        assert difference(layer(x()), expected)[0] < 1e-6
    for _ in range(2):  # with gradients: packed on the way, then the copy
        assert difference(layer(x()), expected)[0] < 1e-6


def test_the_packed_weight_is_used_and_made_once() -> None:
    layer = packed_layer()
    copies = layer._packed.copies
    assert list(copies) == [0]
    with torch.no_grad():
        layer(x(1))
    assert layer._packed.copies is copies
    assert _native.last_kernel() == f"gemm_f32.{_native.active_isa()}"


def test_with_gradients_a_weight_met_again_is_packed() -> None:
    torch.manual_seed(0)
    layer, torchs = pbm.nn.Linear(K, N), nn.Linear(K, N)
    torchs.load_state_dict(layer.state_dict())
    first = layer(x())
    assert id(layer.weight) not in _packing._entries
    second = layer(x())
    assert list(_packing._entries[id(layer.weight)].copies) == [0]
    assert torch.equal(first, second)
    for y in (first, second, torchs(x()), torchs(x())):
        y.square().sum().backward()
    for p, q in zip(layer.parameters(), torchs.parameters(), strict=True):
        assert difference(p.grad, q.grad)[0] < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_training_makes_no_copies(fused: bool) -> None:
    layer = pbm.nn.Linear(K, N)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        layer(x()).square().sum().backward()
        assert id(layer.weight) not in _packing._entries
        optimizer.step()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wrong_width(precision: str, grad: bool) -> None:
    """Of an odd one, too, which pairs of bf16 round up to the weight's."""
    layer = pbm.nn.Linear(K, N, precision=precision)
    with torch.set_grad_enabled(grad):
        for width in (K, K, K - 1, K + 1):
            if width == K:
                layer(torch.ones(2, K))
            else:
                with pytest.raises(RuntimeError, match=rf"in_features = {K}.*\(2, {width}\)"):
                    layer(torch.ones(2, width))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_is_torchs_and_is_seen(make) -> None:
    ours, theirs = packed_layer(), nn.Linear(K, N)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours.eval(), theirs.eval()):
        optimizer = make(layer.parameters())
        for _ in range(3):
            assert_current(layer)
            optimizer.zero_grad()
            layer(x()).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-5)
    assert_current(ours)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_step_on_one_element_is_seen(make) -> None:
    layer = packed_layer()
    tied = pbm.nn.Linear.from_linear(layer)
    optimizer = make([layer.weight])
    for row in range(0, N, 5):
        assert_current(layer)
        assert_current(tied)
        layer.weight.grad = torch.zeros(N, K)
        layer.weight.grad[row, 7] = 10.0
        optimizer.step()
    assert_current(layer)
    assert_current(tied)


def numpy_write(layer: pbm.nn.Linear) -> None:
    array = layer.weight.detach().numpy()
    array *= 2


def target_network_update(layer: pbm.nn.Linear) -> None:
    online = torch.randn(N, K)
    layer.weight.data.copy_(0.005 * online + 0.995 * layer.weight.data)


def edit_data_then_forget(layer: pbm.nn.Linear) -> None:
    layer.weight.data[3, 4] += 1
    layer.forget_packed()


def edit_data_then_change_mode(layer: pbm.nn.Linear) -> None:
    layer.weight.data[3, 4] += 1
    layer.train(not layer.training)


def swap_parameter(layer: pbm.nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(N, K))


def assign_data(layer: pbm.nn.Linear) -> None:
    layer.weight.data = torch.randn(N, K)


def assign_data_at_the_freed_address(layer: pbm.nn.Linear) -> None:
    """The same address, counter and samples, and another element."""
    memory = bytearray(4 * N * K)
    layer.weight.data = torch.frombuffer(memory, dtype=torch.float32).view(N, K)
    layer(x())
    layer.weight.data = torch.empty(0)
    again = torch.frombuffer(memory, dtype=torch.float32).view(N, K)
    again[3, 4] += 1
    layer.weight.data = again


def other_strides_at_the_address(layer: pbm.nn.Linear) -> None:
    layer.weight.data = layer.weight.data.as_strided((N, K), (1, N))


def fewer_rows_at_the_address(layer: pbm.nn.Linear) -> None:
    layer.weight.data, layer.bias.data = layer.weight.data[:8], layer.bias.data[:8]


def another_parameter_on_the_data(layer: pbm.nn.Linear) -> None:
    data = layer.weight.data
    layer.weight[3, 4] += 1
    del layer.weight  # so that the new one may get its id; its counter is the packed one's
    layer.weight = nn.Parameter(data)


def swapped_tensors(layer: pbm.nn.Linear) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(N, K)))


def vector_to_parameters(layer: pbm.nn.Linear) -> None:
    vector = torch.randn(N * K + N)
    nn.utils.vector_to_parameters(vector, layer.parameters())


def conversion_that_swaps_tensors(layer: pbm.nn.Linear) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.half().float()
        layer(x())
        layer.load_state_dict({"weight": torch.randn(N, K), "bias": torch.randn(N)})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def through_half(layer: pbm.nn.Linear) -> None:
    layer.half().float()


CHANGES = [
    swap_parameter,
    assign_data,
    assign_data_at_the_freed_address,
    other_strides_at_the_address,
    fewer_rows_at_the_address,
    another_parameter_on_the_data,
    swapped_tensors,
    edit_data_then_forget,
    edit_data_then_change_mode,
    numpy_write,
    target_network_update,
    lambda layer: layer.weight.data.mul_(2),
    vector_to_parameters,
    conversion_that_swaps_tensors,
    through_half,
    lambda layer: layer.weight.mul_(2),
    lambda layer: layer.weight[3].zero_(),
    lambda layer: layer.weight.detach().mul_(2),
    lambda layer: layer.bias.mul_(2),
    lambda layer: nn.init.normal_(layer.weight),
    lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    lambda layer: layer.reset_parameters(),
    lambda layer: layer.double().float(),
    lambda layer: layer.to_empty(device="cpu").reset_parameters(),
    lambda layer: setattr(layer, "bias", None),
    lambda layer: setattr(layer, "precision", "fp32"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_weight_is_seen(change) -> None:
    layer = packed_layer()
    with torch.no_grad():
        change(layer)
    for _ in range(2):
        assert_current(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_smallest_weight(dtype: torch.dtype) -> None:
    layer = pbm.nn.Linear(1, 1, bias=False, dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    with torch.no_grad():
        for value in (3.0, 5.0):
            layer.weight.data.fill_(value)
            assert layer(one) == value


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_on_a_buffer_that_the_weight_is_a_view_of_is_seen(fused: bool) -> None:
    layer = packed_layer()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    layer.weight.data = flat.data[: N * K].view(N, K)
    layer.bias.data = flat.data[N * K :]
    optimizer = torch.optim.SGD([flat], lr=0.1, fused=fused)
    for row in range(0, N, 5):
        assert_current(layer)
        flat.grad = torch.zeros_like(flat)
        flat.grad[row * K + 7] = 10.0
        optimizer.step()
    assert_current(layer)


def test_tied_layers_convert_by_swapping() -> None:
    layer = packed_layer()
    embedding = nn.Embedding(N, K)
    embedding.weight = layer.weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        nn.ModuleList([embedding, layer]).half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.weight is embedding.weight and layer.weight.dtype == torch.float16


def test_inference_tensors_are_never_cached() -> None:
    with torch.inference_mode():
        layer = packed_layer()
        assert_current(layer)
        layer.weight[3, 4] += 1  # no counter moves
        assert_current(layer)
        assert layer._packed is _packing.NOT_PACKED
    assert_current(layer)


def test_shared_memory_is_never_cached() -> None:
    layer = packed_layer().share_memory()
    alias = torch.empty(0).set_(layer.weight.untyped_storage(), 0, (N, K))  # as another process
    assert_current(layer)
    alias[3, 4] += 1
    assert_current(layer)


def test_tied_layers_share_one_copy_and_see_each_others_changes() -> None:
    layer = packed_layer()
    tied = pbm.nn.Linear.from_linear(layer)
    assert_current(tied)
    assert tied._packed is layer._packed
    with torch.no_grad():
        layer.weight.mul_(2)
    assert_current(tied)
    assert_current(layer)
    assert tied._packed is layer._packed


def test_copies_die_with_the_parameter() -> None:
    layer = packed_layer()
    key, packed = id(layer.weight), weakref.ref(layer._packed)
    assert key in _packing._entries
    del layer
    gc.collect()
    assert key not in _packing._entries
    assert packed() is None


def test_copies_die_with_the_memory() -> None:
    layer = packed_layer()
    copy_ = weakref.ref(layer._packed.copies[0])
    layer.weight.data = torch.randn(N, K)
    gc.collect()
    assert copy_() is None
    assert_current(layer)


def test_a_step_frees_the_copies() -> None:
    layer = packed_layer()
    copy_ = weakref.ref(layer._packed.copies[0])
    other = nn.Parameter(torch.zeros(1))
    torch.optim.SGD([other]).step()
    gc.collect()
    assert copy_() is None
    assert_current(layer)


def test_deepcopy_and_pickle_leave_the_copy_behind() -> None:
    layer = packed_layer()
    with torch.no_grad():
        expected = layer(x())
    assert len(pickle.dumps(layer)) < 4 * (K * N + N) + 4000
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(again) is pbm.nn.Linear
        assert again._packed is _packing.NOT_PACKED
        with torch.no_grad():
            assert torch.equal(again(x()), expected)
            again.weight.zero_()
        assert_current(again)
    assert_current(layer)


def test_threads() -> None:
    layer = packed_layer()
    errors: list[float] = []

    def work() -> None:
        with torch.no_grad():
            expected = nn.functional.linear(x(), layer.weight, layer.bias)
            for _ in range(200):
                errors.append(difference(layer(x()), expected)[0])
                layer.forget_packed()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 800
    assert max(errors) < 1e-6
