"""ComfyUI node pack: copy or link this folder into ``ComfyUI/custom_nodes``.

It needs ``dlms_engine`` in ComfyUI's Python and nothing else. Two nodes, for SamplerCustom and
SamplerCustomAdvanced: "DLMS Sampler" gives SAMPLER, "DLMS Sigmas" gives SIGMAS. The handcrafted solvers
are in KSampler's own list too, as ``dlms_unipc`` and so on.
"""

from __future__ import annotations

from dlms_engine.integrations.comfyui.ksampler import register_samplers
from dlms_engine.integrations.comfyui.nodes import DLMSSampler, DLMSSigmas

NODE_CLASS_MAPPINGS = {"DLMSSampler": DLMSSampler, "DLMSSigmas": DLMSSigmas}
NODE_DISPLAY_NAME_MAPPINGS = {"DLMSSampler": "DLMS Sampler", "DLMSSigmas": "DLMS Sigmas"}

register_samplers()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
