"""The pair losses in Triton. Imported only when a kernel is about to run."""
