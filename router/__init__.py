"""The gateway: sends each prompt to the worker that holds the most of its KV cache."""
