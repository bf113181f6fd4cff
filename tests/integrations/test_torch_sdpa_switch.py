"""When scaled_dot_product_attention is ours: contexts, the registration, torch.compile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pybigmodel as pbm
from pybigmodel.integrations import torch_sdpa


def causal(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 16, 32)


# --- contexts -------------------------------------------------------------------------------------


def test_contexts_nest_and_end(x: Tensor, ours) -> None:
    def now() -> bool:
        return ours(lambda: causal(x))

    assert not now()
    with pbm.sdpa():
        assert now()
        with pbm.sdpa(False):
            assert not now()
            with pbm.sdpa():
                assert now()
            assert not now()
        assert now()
    assert not now()
    with pytest.raises(KeyError), pbm.sdpa():
        raise KeyError
    assert not now()
    assert pbm.sdpa()(now)()  # as a decorator
    assert not now()


def test_threads_have_their_own(x: Tensor, ours) -> None:
    found: dict[str, bool] = {}
    entered, asked = threading.Event(), threading.Event()

    def inside() -> None:
        with pbm.sdpa():
            entered.set()
            asked.wait(10)
            found["inside"] = ours(lambda: causal(x))

    def outside() -> None:
        entered.wait(10)
        found["outside"] = ours(lambda: causal(x))
        asked.set()

    threads = [threading.Thread(target=target) for target in (inside, outside)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"inside": True, "outside": False}


def test_many_threads_enter_and_leave(x: Tensor, monkeypatch) -> None:
    expected = causal(x)
    wrong: list[str] = []
    of_thread = threading.local()

    def spy(*args: Any, **options: Any) -> Any:
        of_thread.ran = True
        return pbm.ops.attention(*args, **options)

    monkeypatch.setattr(torch_sdpa, "attention", spy)

    def work() -> None:
        for i in range(50):
            enabled, of_thread.ran = i % 3 != 0, False
            with pbm.sdpa(enabled):
                difference = float((causal(x) - expected).abs().max())
            if of_thread.ran != enabled or difference > 1e-5:
                wrong.append(f"{i}: ours {of_thread.ran}, difference {difference}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_left_in_another_thread(x: Tensor, registration) -> None:
    """Which cannot put back what was before; but the kernels go when nobody needs them."""
    with pbm.sdpa():
        registration.remove()
    stack = contextlib.ExitStack()
    entered = threading.Thread(target=lambda: stack.enter_context(pbm.sdpa()))
    entered.start()
    entered.join()
    with pytest.raises(ValueError, match="different Context"):
        stack.close()
    registration.remove()
    assert not has_kernel()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["context", "registration"])
def test_activation_checkpointing(how: str, reentrant: bool, x: Tensor) -> None:
    def gradients(checkpointed: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        y = checkpoint(dropped, leaf, use_reentrant=reentrant) if checkpointed else dropped(leaf)
        y.square().sum().backward()
        return leaf.grad

    def dropped(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    torchs = gradients(False)
    found = None
    if how == "registration":
        found = pbm.integrations.register_sdpa()
    with pbm.sdpa() if found is None else contextlib.nullcontext():
        mine = gradients(False)
        assert torch.equal(gradients(True), mine)
    assert not torch.allclose(mine, torchs)
    if found is not None:
        found.remove()


def test_tasks_have_their_own(x: Tensor, ours) -> None:
    async def inside() -> bool:
        with pbm.sdpa():
            await asyncio.sleep(0)
            return ours(lambda: causal(x))

    async def outside() -> bool:
        await asyncio.sleep(0)
        return ours(lambda: causal(x))

    async def both() -> list[bool]:
        return list(await asyncio.gather(inside(), outside(), inside()))

    assert asyncio.run(both()) == [True, False, True]


# --- the registration -----------------------------------------------------------------------------


@pytest.fixture
def registration() -> Iterator[torch_sdpa.Registration]:
    found = pbm.integrations.register_sdpa()
    yield found
    found.remove()


def has_kernel() -> bool:
    op = "aten::scaled_dot_product_attention"
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, "AutogradCPU")


def test_registration_is_for_every_thread(x: Tensor, ours, registration) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(ours(lambda: causal(x))))
    thread.start()
    thread.join()
    assert found == [True]
    with pbm.sdpa(False):
        assert not ours(lambda: causal(x))
    assert ours(lambda: causal(x))


def test_registration_is_removed(x: Tensor, ours, registration) -> None:
    assert ours(lambda: causal(x))
    with pbm.sdpa():
        registration.remove()
        assert ours(lambda: causal(x))  # the context's
    assert not ours(lambda: causal(x))
    registration.remove()  # again
    assert not has_kernel()
    with pbm.sdpa():  # and anew
        assert ours(lambda: causal(x))


def test_a_registration_removes_itself_only(x: Tensor, ours) -> None:
    first = pbm.integrations.register_sdpa()
    second = pbm.integrations.register_sdpa()
    first.remove()
    assert ours(lambda: causal(x))
    second.remove()
    assert not ours(lambda: causal(x)) and not has_kernel()


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"),
    reason="this torch has no registry of flash attentions",
)
def test_torchs_registry(x: Tensor, ours, registration) -> None:
    attention = torch.nn.attention
    assert "pybigmodel" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() == "pybigmodel"
    attention.restore_flash_attention_impl()
    assert not ours(lambda: causal(x))
    attention.activate_flash_attention_impl("pybigmodel")
    assert ours(lambda: causal(x))
    registration.remove()
    assert attention.current_flash_attention_impl() is None
    assert not ours(lambda: causal(x))


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[Any]:
    torch._dynamo.reset()
    yield lambda f, **options: torch.compile(
        f, backend=options.pop("backend", "aot_eager"), fullgraph=True, **options
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_within(dynamic: bool, compiled, ours) -> None:
    fast = compiled(causal, dynamic=dynamic)
    with pbm.sdpa():
        for length in (16, 20, 33):
            a = torch.randn(2, 4, length, 32, requires_grad=True)
            b = a.detach().clone().requires_grad_()
            assert ours(lambda a=a: fast(a))
            for f, leaf in ((fast, a), (causal, b)):
                f(leaf).square().sum().backward()
            torch.testing.assert_close(a.grad, b.grad)


def test_compiled_in_inference_mode(compiled, ours) -> None:
    with torch.inference_mode(), pbm.sdpa():
        fast = compiled(causal)
        assert ours(lambda: fast(torch.randn(2, 4, 16, 32)))


def test_compiled_code_keeps_what_it_has(x: Tensor, compiled, ours) -> None:
    outside, inside = compiled(lambda x: causal(x) + 1), compiled(lambda x: causal(x) + 2)
    assert not ours(lambda: outside(x))
    with pbm.sdpa():
        assert not ours(lambda: outside(x))
        assert ours(lambda: inside(x))
    assert ours(lambda: inside(x))


def test_context_within_compiled_code(x: Tensor, ours) -> None:
    def f(x: Tensor) -> Tensor:
        with pbm.sdpa():
            return causal(x)

    torch._dynamo.reset()
    assert ours(lambda: torch.compile(f, backend="aot_eager")(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="around the call of the compiled"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()


CACHED = """
import contextlib, sys, torch, pybigmodel as pbm
from pybigmodel import _native
torch.set_num_threads(1)
f = torch.compile(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x) * 2)
with pbm.sdpa() if sys.argv[1] == "ours" else contextlib.nullcontext():
    f(torch.ones(1, 2, 64, 16))
print(_native.last_kernel().partition("_")[0] or "torch")
"""


def test_caches_on_disk_know_whose_attention_they_hold(tmp_path) -> None:
    def run(whose: str) -> str:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", CACHED, whose],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    found = [run(whose) for whose in ("torch", "ours", "torch")]
    assert found == ["torch", "attention", "torch"]


TRACED_BEFORE = """
import torch
import pybigmodel as pbm
from pybigmodel import _native

def f(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)

x = torch.ones(1, 2, 64, 16)
torch.compile(f, backend="aot_eager")(x)
torch._dynamo.reset()
compiled = torch.compile(f, backend="aot_eager")
with pbm.sdpa():  # the first of the process
    compiled(x)
print(_native.last_kernel().partition("_")[0])
torch._dynamo.reset()
pbm.ops.linear(torch.ones(1, 2), torch.ones(3, 2))
compiled(x)
print(_native.last_kernel().partition("_")[0])
"""


def test_what_was_compiled_before_the_first_context_does_not_stay() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRACED_BEFORE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["attention", "gemm"]


def test_exported_program(x: Tensor, ours) -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return causal(x)

    with pbm.sdpa():
        program = torch.export.export(Causal(), (x,))
        assert ours(lambda: program.module()(x))
    assert not ours(lambda: program.module()(x))


def test_a_precision_in_the_place_of_the_switch_is_refused() -> None:
    with pytest.raises(TypeError, match="enabled must be a bool, got 'bf16'"), pbm.sdpa("bf16"):
        pass
