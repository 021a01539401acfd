"""The kernels of FastPO, one folder per operation. Depends on torch and Triton only."""
