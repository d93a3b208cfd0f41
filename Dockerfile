# dlms_engine with its compiled parts, without a compiler in the result.
#
#   docker build -t dlms .                                 CPU
#   docker build -t dlms:cuda --target cuda .              CUDA operators too
#   docker run --rm dlms doctor
#   docker run --rm --gpus all -v "$PWD:/work" dlms:cuda sample --model emoji --output samples.png
#
# Build arguments: PYTHON (3.12), TORCH (torch==2.13.0), CPU_INDEX (PyTorch's index of CPU builds),
# CUDA (version of the toolkit that compiles, fit for the CUDA build of TORCH).
ARG PYTHON=3.12
ARG CUDA=13.0.1

FROM python:${PYTHON}-slim-bookworm AS build-cpu
ARG TORCH=torch==2.13.0
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/dlms && /opt/dlms/bin/pip install --no-cache-dir ${TORCH} --index-url ${CPU_INDEX}
COPY . /src
RUN /opt/dlms/bin/pip install --no-cache-dir -C cmake.define.DLMS_REQUIRE_NATIVE=ON \
      -C cmake.define.DLMS_CUDA=OFF "/src[plots]"

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build-cuda
ARG TORCH=torch==2.13.0
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
      && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dlms && /opt/dlms/bin/pip install --no-cache-dir ${TORCH}
COPY . /src
RUN /opt/dlms/bin/pip install --no-cache-dir -C cmake.define.DLMS_REQUIRE_NATIVE=ON \
      -C cmake.define.DLMS_CUDA=ON "/src[plots]"

# torch's wheels bring the CUDA libraries; the driver comes from the host.
FROM ubuntu:24.04 AS cuda
# triton compiles its launchers with a C compiler
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev gcc libc6-dev \
      && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/dlms /opt/dlms
WORKDIR /work
ENTRYPOINT ["/opt/dlms/bin/dlms"]

FROM python:${PYTHON}-slim-bookworm AS cpu
COPY --from=build-cpu /opt/dlms /opt/dlms
WORKDIR /work
ENTRYPOINT ["/opt/dlms/bin/dlms"]
