"""The KV cache connector that runs inside each vLLM instance."""
