"""Evaluation: models, texts, perplexity, retrieval, timings, and rival caches."""
