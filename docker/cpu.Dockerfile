# heretic_ds on a CPU. Runs, exports and caches go to the folder that is mounted at /here:
#   docker build -f docker/cpu.Dockerfile -t heretic-ds:cpu .
#   docker run --rm -it --user "$(id -u):$(id -g)" -v "$PWD:/here" heretic-ds:cpu experiment=demo
#
# TORCH is what pip installs as PyTorch; it may hold pip options. The usual wheel for Linux brings CUDA's libraries, some
# gigabytes that a CPU does not need: pytorch.org names the index of builds without them, for
#   --build-arg TORCH="torch==2.13.0 --index-url <that index>"
# No compiler: only capture.offload=nvme builds something, with g++ and libaio-dev.
FROM python:3.11-slim

ARG TORCH=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_ACCELERATOR=cpu

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
