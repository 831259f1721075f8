"""vLLM plugin: SPQ's packed model folders as a quantization method of vLLM's own LLaMA, Mistral and Qwen classes.

Importing it does nothing; vLLM calls `spq_vllm.plugin.register` in each of its processes.
"""
