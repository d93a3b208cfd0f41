"""What people change on a pipeline's network between two calls is another captured run.

The key of a captured run is computed on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from dlms_engine.engine.cuda_graph_cache import graph_key

X = {"x": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
TEXT = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))


class Scaled(AttnProcessor2_0):
    """A processor with a number of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.scale * super().__call__(*args, **kwargs)


def unet() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
            block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8,
        )  # fmt: skip
    return made.eval().requires_grad_(False)


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    made = unet()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, rank in (("one", 2), ("two", 4)):
            config = peft.LoraConfig(
                r=rank, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k"]
            )
            made.add_adapter(config, adapter_name=name)
    made.set_adapters(["one"], [1.0])
    return made.eval()


def processed() -> Any:
    made = unet()
    made.set_attn_processor(Scaled(1.0))
    return made


def _forward(net: Any) -> None:
    old = net.conv_out.forward
    net.conv_out.forward = lambda x: 1.1 * old(x)


def _attention(net: Any) -> list[Any]:
    return [module for module in net.modules() if hasattr(module, "to_q")]


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "other adapter": (adapted, lambda net: net.set_adapters(["two"], [1.0])),
    "adapter's weight": (adapted, lambda net: net.set_adapters(["one"], [0.3])),
    "two adapters": (adapted, lambda net: net.set_adapters(["one", "two"], [0.5, 0.5])),
    "disable_lora": (adapted, lambda net: net.disable_lora()),
    "unload_lora": (adapted, lambda net: net.unload_lora()),
    "delete_adapters": (adapted, lambda net: net.delete_adapters("one")),
    "FreeU": (unet, lambda net: net.enable_freeu(0.9, 0.2, 1.2, 1.4)),
    "processor": (unet, lambda net: net.set_attn_processor(Scaled(0.5))),
    "processor's number": (processed, lambda net: [
        setattr(held, "scale", 0.5) for held in net.attn_processors.values()
    ]),
    "hook": (unet, lambda net: net.conv_out.register_forward_hook(lambda *a: 2 * a[-1])),
    "hook before": (unet, lambda net: net.conv_out.register_forward_pre_hook(lambda _, x: (2 * x[0],))),
    "forward": (unet, _forward),
    "float": (unet, lambda net: [
        setattr(held, "rescale_output_factor", 3.0) for held in _attention(net)
    ]),
    "norm's eps": (unet, lambda net: setattr(net.conv_norm_out, "eps", 0.5)),
    "config": (unet, lambda net: net.register_to_config(center_input_sample=True)),
    "other layer": (unet, lambda net: setattr(net, "conv_act", torch.nn.ReLU())),
}  # fmt: skip


# PEFT warns of a second adapter, and of one that takes a deleted one's place.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter one was active:UserWarning"),
]


@torch.no_grad()
def output(net: Any) -> torch.Tensor:
    out: torch.Tensor = net(X["x"], torch.tensor(3.0), TEXT).sample
    return out


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_output_changes_the_key(change: str) -> None:
    make, alter = CHANGES[change]
    net = make()
    before = output(net)
    key = graph_key(net, X)[0]
    assert torch.equal(output(net), before)
    assert graph_key(net, X)[0] == key
    alter(net)
    assert not torch.equal(output(net), before), "changes nothing"
    assert graph_key(net, X)[0] != key


def test_a_processor_set_to_an_equal_one_needs_no_new_run() -> None:
    net = processed()
    key = graph_key(net, X)[0]
    net.set_attn_processor(Scaled(1.0))
    assert graph_key(net, X)[0] == key
    net.set_attn_processor(AttnProcessor())
    assert graph_key(net, X)[0] != key
