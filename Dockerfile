# syntax=docker/dockerfile:1
# GPU image on NVIDIA's PyTorch base, which brings torch, CUDA and Transformer Engine. The base is named at build time,
# with its registry and tag:
#   docker build --build-arg BASE=REGISTRY/nvidia/pytorch:TAG -t megatron-r1 .
#   mkdir -p runs
#   docker run --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -e HOME=/trainer/runs -v "$PWD/runs:/trainer/runs" megatron-r1 recipes
ARG BASE
FROM ${BASE}

# Apex is used when it is there and never required. Where the base has none, pass a pip requirement for NVIDIA's source
# (--build-arg APEX=...). Never "pip install apex": the package of that name is another project.
ARG APEX=""
ARG MEGATRON_CORE="megatron-core>=0.19,<0.20"

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1

WORKDIR /opt/megatron-r1

# Requirements first, so that a change of the code does not install them again. torch is the base's own: --no-deps keeps
# megatron-core from replacing it.
COPY requirements/core.txt requirements/core.txt
RUN python -m pip install -r requirements/core.txt \
    && python -m pip install --no-deps "${MEGATRON_CORE}" \
    && if [ -n "${APEX}" ]; then python -m pip install --no-deps --no-build-isolation "${APEX}"; fi

COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY requirements requirements
COPY tools/build_csrc.py tools/build_csrc.py
COPY csrc csrc
COPY megatron_r1 megatron_r1
# The kernels, C++ and CUDA (compiled for A100 and H100/H200, which takes no GPU), or no image. The doctor then looks from
# outside the sources, at what was installed; the CUDA kernels check themselves at first use, where a GPU is.
RUN MEGATRON_R1_BUILD_EXT=1 MEGATRON_R1_BUILD_CUDA=1 python -m pip install --no-deps --no-build-isolation . \
    && rm -rf build \
    && cd / \
    && python -c "import torch, transformer_engine, megatron.core, megatron_r1.cli; print(torch.__version__, megatron.core.__version__)" \
    && python -c "from megatron_r1.ops import extension as e; assert 'sm_90a' in e.build_info()['cuda'], e.missing()" \
    && megatron-r1 doctor --require csrc \
    && useradd --create-home --uid 1001 trainer \
    && install -d -o trainer -g trainer /trainer/runs

USER trainer
WORKDIR /trainer
ENTRYPOINT ["megatron-r1"]
CMD ["--help"]
