# The steps of docs/installing.md in an image:
#
#   docker build -t cogvideox-sat .
#   docker run --rm --gpus all -v "$PWD":/work cogvideox-sat sample \
#       --base configs/tiny/cogvideox_tiny.yaml configs/tiny/inference.yaml --seed 42
#
# Inputs and outputs are in /work, the folder that is mounted. Without a GPU leave --gpus all out.
FROM python:3.11-slim

# Compilers are for torch.compile and Triton.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/cogvideox-sat
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt

COPY pyproject.toml setup.py README.md LICENSE requirements-web.txt ./
COPY tests/requirements.txt tests/
COPY docs/requirements.txt docs/
COPY sat sat
COPY sgm sgm
COPY vae_modules vae_modules
COPY configs configs
COPY assets assets
RUN pip install --no-cache-dir .

ENV TOKENIZERS_PARALLELISM=false
WORKDIR /work
ENTRYPOINT ["cogvideox"]
CMD ["--help"]
