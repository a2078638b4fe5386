"""Thin Linen modules: parameter names, shapes and the scan over layers."""
