# The GPU image:
#     docker build -t llmrl .
#     docker run --gpus all -v "$PWD/runs:/llmrl/runs" llmrl grpo recipes/...
#     docker run --gpus all --ipc=host -v "$PWD/runs:/llmrl/runs" --entrypoint accelerate llmrl \
#         launch --config_file recipes/accelerate/gpu_eight_zero3.yaml -m llmrl ppo recipes/...
# torch is the image's own, built for its CUDA; whatever else pyproject.toml names has the version of constraints.txt, as
# in the Makefile. docs/gpu.md says what llmrl sets on a GPU; attention by cuDNN, at fault in torch 2.10, is off.
FROM pytorch/pytorch:2.10.0-cuda13.0-cudnn9-runtime

# The image is the environment: there is no other Python in it to protect.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1

RUN useradd --create-home llmrl
WORKDIR /llmrl
COPY . .
RUN grep -v '^torch==' constraints.txt > no-torch.txt \
    && python -m pip install -e ".[deepspeed,math,tensorboard,wandb]" -c no-torch.txt \
    && mkdir -p runs \
    && chown -R llmrl:llmrl /llmrl

USER llmrl
ENTRYPOINT ["llmrl"]
CMD ["--help"]
