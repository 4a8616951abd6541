# heretic_ds on NVIDIA GPUs, which the host's container toolkit has to offer. Runs, exports and caches go to the folder
# that is mounted at /here:
#   docker build -f docker/cuda.Dockerfile -t heretic-ds:cuda .
#   docker run --rm -it --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/here" heretic-ds:cuda <model>
#   docker run ... heretic-ds:cuda <model> run.launch=auto          # a rank for every GPU
#
# CUDA has to be that of TORCH (`python -c 'import torch; print(torch.version.cuda)'`): DeepSpeed's own kernels, which
# evaluate=kernel_inject and capture.offload=nvme use, are built at their first use by the toolkit in this image. Where
# neither is used a -runtime image does, at half the size.
ARG CUDA=13.0.1-devel-ubuntu24.04
FROM nvidia/cuda:${CUDA}

ARG TORCH=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/heretic-ds/bin:$PATH

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libaio-dev openssh-client python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/heretic-ds

WORKDIR /usr/src/heretic-ds
COPY constraints.txt ./
RUN grep -v '^torch==' constraints.txt > without-torch.txt && pip install -c without-torch.txt ${TORCH}
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY conf conf
COPY hydra_plugins hydra_plugins
COPY heretic_ds heretic_ds
RUN pip install -c without-torch.txt .

# Any user may be given with --user: libraries ask for a name and a home.
ENV HOME=/here USER=user
WORKDIR /here
RUN chmod 1777 /here
USER 1000:1000
ENTRYPOINT ["heretic-ds"]
CMD ["--help"]
