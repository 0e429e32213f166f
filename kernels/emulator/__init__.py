"""Runs CUDA kernels on the CPU, and checks them. See README.md; kernels.module is the way in."""
