# bitdance_jax for NVIDIA GPUs. JAX's CUDA libraries come from pip; the host needs only the driver and
# the NVIDIA Container Toolkit.
#
#     docker build -t bitdance_jax .
#     docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" bitdance_jax sample
#
# Not built by the developers, who had no Docker: please report what does not work.
FROM python:3.12-slim

COPY . /src
RUN pip install --no-cache-dir "/src[cuda,app]" && rm -r /src

WORKDIR /work
ENTRYPOINT ["bitdance"]
CMD ["--help"]
