"""The engine inside other people's pipelines; each module needs its own extra.

    diffusers    pip install 'dlms-engine[diffusers]'
    k_diffusion  nothing to install: a function with k-diffusion's sampler signature
    comfyui      copy or link ``dlms_engine/integrations/comfyui`` into ``ComfyUI/custom_nodes``
    edm          nothing to install: EDM snapshots read without executing pickled code
    checkpoints  nothing to install: EDM, guided-diffusion and consistency-repository files
    single_file  pip install 'dlms-engine[diffusers]': latent-diffusion files as pipelines
    calibrate    pip install 'dlms-engine[diffusers]'

Nothing is imported here, so that a missing extra only shows where it is used.
"""
