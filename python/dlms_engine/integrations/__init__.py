"""The engine inside other people's pipelines; each module needs its own extra.

    diffusers    pip install 'dlms-engine[diffusers]'
    k_diffusion  nothing to install: a function with k-diffusion's sampler signature
    comfyui      copy or link ``dlms_engine/integrations/comfyui`` into ``ComfyUI/custom_nodes``
    pipelines    pip install 'dlms-engine[diffusers]': solvers distilled inside a pipeline

Nothing is imported here, so that a missing extra only shows where it is used.
"""
