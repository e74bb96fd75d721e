"""Swin SMT in JAX: Swin UNETR with Soft Mixture-of-Experts for whole-body CT."""
