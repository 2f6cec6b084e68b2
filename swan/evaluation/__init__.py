"""Evaluation: where models and texts come from, perplexity, retrieval, memory, and rival caches."""
