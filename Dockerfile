# navil_megatron for Hopper GPUs (docs/multi_node.md). Built from the checkout, on a machine without a GPU:
#   docker build -t navil_megatron .
#   docker build -t navil_megatron --build-arg WITH_APEX=1 --build-arg MAX_JOBS=16 .

# torch 2.13.0 for CUDA 13.0 with nvcc, Python 3.12. Why this tag: docs/multi_node.md. Both stages must share it.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

# --- Wheels of what compiles against this very torch; sources and build tools stay behind in this stage.
FROM ${BASE} AS wheels
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Ubuntu's Python takes packages only when told so; in an image there is nothing else to break.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ git python3-dev && rm -rf /var/lib/apt/lists/*
RUN pip install pybind11==3.1.0 ninja==1.13.2 nvidia-cudnn-frontend==1.32.0 setuptools==84.2.1 wheel==0.48.0

# One compiler takes about 4 GB: raise MAX_JOBS with the memory of the building machine.
ARG MAX_JOBS=4
# 9.0 is Hopper. The kernels of Transformer Engine come compiled in transformer_engine_cu13; its part for torch is built
# here, and from source: without FORCE_BUILD its setup.py looks for a wheel on the web first.
ENV MAX_JOBS=${MAX_JOBS} TORCH_CUDA_ARCH_LIST=9.0 \
    NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 NVTE_PYTORCH_FORCE_BUILD=TRUE
ARG TRANSFORMER_ENGINE=2.20.2
# torch's own packages hold the headers of cuDNN and NCCL.
RUN packages=$(python3 -c 'import nvidia; print(nvidia.__path__[0])') && \
    CPATH="${packages}/cudnn/include:${packages}/nccl/include" \
    pip wheel --no-deps --no-build-isolation --wheel-dir /wheels "transformer-engine-torch==${TRANSFORMER_ENGINE}"

# NVIDIA Apex has no releases on PyPI: the package called apex there is a web toolkit. Only the LM head can use it
# (runtime.gradient_accumulation_fusion = "apex").
ARG WITH_APEX=0
ARG APEX_COMMIT=1bcf66dc11c3f614d6a071b1bb39854189ea3110
RUN if [ "${WITH_APEX}" = 1 ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip wheel --no-deps --no-build-isolation --wheel-dir /wheels \
            "git+https://github.com/NVIDIA/apex@${APEX_COMMIT}"; \
    fi

# --- The image: still the devel base, for Transformer Engine and Triton compile small kernels while they run.
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc python3-dev && rm -rf /var/lib/apt/lists/*

# What changes least comes first: the lock of what goes in beside the base's own torch (make lock), by hash.
WORKDIR /opt/navil_megatron
COPY requirements/image-py312.txt requirements/
RUN pip install --require-hashes --no-deps --requirement requirements/image-py312.txt
# The constraint keeps pip from replacing the torch that the wheels were built for, and what the lock brought.
ARG TRANSFORMER_ENGINE=2.20.2
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip list --format=freeze >/constraints.txt && \
    pip install --constraint /constraints.txt /wheels/*.whl "transformer-engine[core-cu13]==${TRANSFORMER_ENGINE}"

COPY setup.py pyproject.toml README.md LICENSE ./
COPY navil_megatron navil_megatron
COPY examples examples
RUN pip install --no-deps --no-build-isolation . && rm -rf build ./*.egg-info

# Fails the build if anything is missing, wrong, or was built for another torch. Needs no GPU: the toolkit's stub stands
# in for the driver's library, which only a node has.
COPY tools/check_image.py tools/
RUN mkdir /tmp/stub && ln -s /usr/local/cuda/lib64/stubs/libcuda.so /tmp/stub/libcuda.so.1 && \
    LD_LIBRARY_PATH="/tmp/stub:${LD_LIBRARY_PATH}" python3 tools/check_image.py && rm -r /tmp/stub

# Ubuntu's images have a user of this number, called ubuntu. The folders that a run writes to are mounted.
USER 1000:1000
ENV HOME=/tmp PYTHONUNBUFFERED=1
CMD ["navil-megatron", "doctor"]
