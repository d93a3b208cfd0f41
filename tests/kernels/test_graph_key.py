"""Keys from the recipe of the last one: the same as read from the objects, and cheaper."""

from __future__ import annotations

import copy
import functools
import gc
import random
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_device.models import SHAPE, denoiser
from torch import Tensor, nn

import dlms_engine as dlms
from dlms_engine.engine.native import native
from dlms_engine.learners.dlms.objective import Dlms
from dlms_engine.learners.dlms.settings import DlmsSettings

pytestmark = [
    pytest.mark.skipif(native is None, reason="the compiled key"),
    pytest.mark.skipif(sys.version_info >= (3, 13), reason="dicts have no versions: no recipes"),
]

X = {"x": torch.zeros(3)}


def key(*roots: Any, tensors: bool = True) -> Any:
    return native.graph_key(1, X, (4,), roots, tensors)[0]


def read_anew(*roots: Any) -> Any:
    """A number as a root has no recipe."""
    return native.graph_key(1, X, (4,), (*roots, 3), True)[0]


class Settings:
    def __init__(self) -> None:
        self.scale = 1.0
        self.names = ["a", 1, (2, [3.0])]
        self.inner: Any = {"deep": {"er": [1]}}

    def method(self) -> None: ...


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.number = 1.5
        self.items: list[Any] = [1.0, "text", b"bytes", (1, [2]), {"k": [3]}, None]
        self.held = Settings()
        self.table = torch.zeros(2)
        self.pair: Any = (Settings(), [1])
        cell = [1.0]

        def call(x: Tensor, factor: Any = (2.0, [1]), *, shift: float = 0.0) -> Tensor:
            return x * cell[0] * factor[0] + shift

        self.call = call
        self.bound = self.held.method
        self.part = functools.partial(call, factor=3)


def network() -> nn.Module:
    net = nn.Sequential(Layer(), nn.Sequential(Layer(), nn.SiLU()), nn.LayerNorm(2))
    net[1][0].items.append(net[0])
    net[1][0].parents = [net, [net[1]]]
    return net


def hook(*_: Any) -> None: ...


def _new_attributes(net: Any) -> None:
    net.__dict__ = dict(net.__dict__)
    net.held = copy.copy(net.held)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda net: setattr(net, "number", random.choice([1.5, 2.5])),
    "item": lambda net: net.items.__setitem__(0, random.choice([1.0, 2.0])),
    "item's kind": lambda net: net.items.__setitem__(1, random.choice(["text", 1, Settings()])),
    "more items": lambda net: net.items.append(random.random()),
    "fewer items": lambda net: net.items.pop(),
    "list in a tuple in a list": lambda net: net.items[3][1].append(1),
    "dict in a list": lambda net: net.items[4].update(k=[random.randint(0, 2)]),
    "object's number": lambda net: setattr(net.held, "scale", random.choice([1.0, 2.0])),
    "object": lambda net: setattr(net, "held", Settings()),
    "object's list": lambda net: net.held.names.__setitem__(1, random.randint(0, 2)),
    "object's dict": lambda net: net.held.inner["deep"].update(er=[random.randint(0, 1)]),
    "object in a tuple": lambda net: setattr(net.pair[0], "scale", random.random()),
    "tuple": lambda net: setattr(net, "pair", (Settings(), [random.randint(0, 1)])),
    "closure": lambda net: net.call.__closure__[0].cell_contents.__setitem__(0, random.random()),
    "cell": lambda net: setattr(net.call.__closure__[0], "cell_contents", [random.random()]),
    "cell of a number": lambda net: setattr(net.call.__closure__[0], "cell_contents", 1.0),
    "defaults": lambda net: setattr(net.call, "__defaults__", ((random.random(), [1]),)),
    "keyword defaults": lambda net: net.call.__kwdefaults__.update(shift=random.random()),
    "code": lambda net: setattr(hook, "__code__", (lambda *_: None).__code__),
    "hook": lambda net: net.register_forward_hook(hook),
    "no hooks": lambda net: net._forward_hooks.clear(),
    "weight": lambda net: setattr(net.weight, "data", net.weight.data.clone()),
    "bias": lambda net: setattr(net, "bias", None),
    "new bias": lambda net: setattr(net, "bias", nn.Parameter(torch.zeros(2))),
    "buffer": lambda net: net.register_buffer("shift", torch.zeros(random.randint(1, 3))),
    "tensor": lambda net: setattr(net, "table", torch.zeros(2)),
    "training": lambda net: net.train(not net.training),
    "layer": lambda net: net.add_module("extra", random.choice([nn.SiLU, nn.Identity])()),
    "no layer": lambda net: net._modules.clear(),
    "method": lambda net: setattr(net, "bound", random.choice([net.held.method, Settings().method])),
    "attributes": _new_attributes,
    "nothing": lambda net: None,
    "gone": lambda net: delattr(net, "items") or setattr(net, "items", [1.0, 2, 3, (1, [2]), {}]),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_keys_are_equal_exactly_where_they_are_when_read_anew(seed):
    random.seed(seed)
    net = network()
    pairs: dict[Any, Any] = {}
    back: dict[Any, Any] = {}
    names = list(CHANGES)
    for _ in range(400):
        for layer in random.sample([net[0], net[1][0]], random.choice([1, 1, 2])):
            name = random.choice(names)
            try:
                CHANGES[name](layer)
            except (IndexError, AttributeError, TypeError):
                continue  # it was taken away before
        for _ in range(random.choice([1, 2])):
            one, other = key(net), read_anew(net)
            assert pairs.setdefault(one, other) == other, "an old key for a changed network"
            assert back.setdefault(other, one) == one, "another key for the same network"


def test_the_comparison_finds_a_change_that_a_recipe_does_not_see():
    """A dict whose version is set back: what an unsound check would miss."""
    import ctypes

    net = nn.Sequential(Layer())
    for _ in range(40):  # an earlier network at this address may have tired of recipes: kRest
        before = key(net)
    anew = read_anew(net)
    version = ctypes.c_uint64.from_address(id(net[0].__dict__) + 24)  # after count, class and size
    old = version.value
    net[0].number = 7.0
    version.value = old
    assert key(net) == before and read_anew(net) != anew


def walks_of(function: Callable[[], Any], times: int = 5) -> int:
    function()
    before = native.key_walks()
    for _ in range(times):
        function()
    return int(native.key_walks() - before)


def test_unchanged_objects_are_not_read_again():
    net = network()
    assert walks_of(lambda: key(net)) == 0
    assert walks_of(lambda: (setattr(net[0], "number", random.random()), key(net)), 1) == 1
    assert walks_of(lambda: key(net, 3)) == 5  # a number could be another one at this address


def test_a_run_of_a_designer_changes_nothing_that_counts():
    """Its feature tap is a hook on the network, which keeps something in every call."""
    made = denoiser()
    sampler = dlms.Sampler(made, Dlms(made, DlmsSettings(nfe=3), SHAPE).policy)

    def run() -> None:
        sampler.sample(range(1), SHAPE)
        key(made, sampler.policy)

    assert walks_of(run, 3) == 0


def test_what_changes_in_every_run_is_read_in_every_run_and_nothing_more():
    """After three recipes that did not hold, no other is made for a while."""
    net = network()

    def run() -> Any:
        net[0].table = torch.zeros(2)
        return key(net)

    assert walks_of(run, 40) == 40
    assert run() == key(net)


def test_going_back_gives_the_key_of_before():
    net = network()
    first = key(net)
    net[0].held.scale = 0.5
    assert key(net) != first
    net[0].held.scale = 1.0
    assert key(net) == first


def test_recipes_keep_nothing_alive():
    net = network()
    weight, whole = weakref.ref(net[0].weight), weakref.ref(net)
    for _ in range(2):
        key(net)
    net[0] = nn.Identity()
    net[1][0].items.pop()
    gc.collect()
    assert weight() is None
    key(net)
    del net
    gc.collect()
    assert whole() is None


def test_another_network_at_the_same_address():
    """Recipes hold addresses only: memory that was freed and used again must not fit them."""
    seen = set()
    for scale in range(60):
        net = nn.Sequential(nn.Linear(1, 1))
        net[0].scale = scale
        net[0].lists = [[float(scale)], (scale,)]
        seen.add(key(net))
        del net  # nothing refers back to it: freed at once
    assert len(seen) == 60
