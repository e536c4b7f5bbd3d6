"""Text from models: a local generator, vLLM, or an API with a budget and a journal."""
