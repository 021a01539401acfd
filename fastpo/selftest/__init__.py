"""Faults on purpose: whether anything is lost, or comes out otherwise without a word."""
