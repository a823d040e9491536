# What the stand-in of vllm/vllm-openai-cpu needs of Debian; vLLM itself is appended as layers (images.py).
ARG BASE
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends python3 curl libnuma1 libgomp1
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin VIRTUAL_ENV=/opt/venv
ENTRYPOINT ["vllm", "serve"]
