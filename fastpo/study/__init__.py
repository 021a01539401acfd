"""Studies: which labels are wrong, and does handling them help; run from a checkout."""
