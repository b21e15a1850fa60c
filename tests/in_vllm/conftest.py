"""Settings of vLLM on CPU, read when it is imported; engines live in the process of the tests."""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else vLLM claims cores for itself, whoever works on them.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
