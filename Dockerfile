# partial-lora on a GPU.
#
#   docker build --tag partial-lora .
#   docker run --rm --gpus all --volume partial-lora-cache:/cache --volume "$PWD:/work" partial-lora train task=digits
#
# torch's wheels bring their own CUDA libraries, so the base image has the driver's interface alone. /work is the current
# folder, where results go. /cache keeps models, data sets and calibrations between two calls.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3=3.12.* python3-pip=24.* python3-venv=3.12.* \
    && rm -rf /var/lib/apt/lists/*

# The image has a user of id 1000 already.
ARG USER_ID=1000
RUN mkdir /cache /work && chown "$USER_ID" /cache /work && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

COPY pyproject.toml README.md LICENSE /src/
COPY conf /src/conf
COPY partial_lora /src/partial_lora
RUN pip install --no-cache-dir '/src[quantization,sentencepiece,sweeps,trackers]'

ENV HOME=/cache HF_HOME=/cache/huggingface PARTIAL_LORA_CACHE=/cache/partial-lora
USER $USER_ID
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["partial-lora"]
CMD ["--help"]
