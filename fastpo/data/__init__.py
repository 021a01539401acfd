"""Preference data: sources, preparation into a cache, and reading the cache."""
